"""Where text comes from: `python`, `skills`, `entropy`, the user's own files, or the hub, behind one small type."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.config.hub import MARK
from dist_llm.data import chat, preferences, python_corpus, skills
from dist_llm.data.chat import Reading
from dist_llm.data.entropy import MarkovSource
from dist_llm.data.readers import BadLines, Document, Take, find_files, is_table, read_files, size_of
from dist_llm.data.token_files import TokenFiles, is_tokens
from dist_llm.errors import DataError, UsageError

if TYPE_CHECKING:
    from dist_llm.data.tokenizer import Tokenizer

PACKED = {".gz": 4, ".zst": 4, ".parquet": 3}  # about how many bytes of text a byte of such a file holds
READ_AS = 4  # how objects of conversations are read: what was built from them another way is not found again
GENERATED = 4_000_000  # bytes of text that a generator gives where no limit is set


@dataclass(frozen=True)
class Corpus:
    """A named source of documents that can be read from the start any number of times.

    size: bytes of text expected, for progress and sampling. identity: what the text depends on, without reading it:
    equal identities mean equal text. endless: a generator, to be cut by the caller. notes: what a user should know.
    place: the path or glob of files. shape: of the objects, where they are conversations: documents are as data/chat.py spells them.
    tokens: how documents that come as ids of a tokenizer are read; `documents` fails then. found: what the last reading has met
    that a user should know.
    """

    name: str
    identity: tuple
    documents: Callable[[], Iterator[Document]]
    size: int
    endless: bool = False
    shuffled: bool = False
    notes: tuple[str, ...] = ()
    place: str = ""
    shape: str = ""
    tokens: Callable[[Tokenizer], Iterator[Document]] | None = None
    found: Callable[[], list[str]] = list

    def read(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """Every document, as text or as the tokenizer's ids."""
        return self.documents() if self.tokens is None else self.tokens(tokenizer)


def open_corpus(
    source: str | tuple[str, ...],
    *,
    seed: int,
    text_key: str = "text",
    bad: BadLines | None = None,
    reading: Reading | None = None,
    home: Path | None = None,
    mixture: skills.Mixture = skills.ALL,
) -> Corpus:
    """The corpus that a config names: `python`, `skills`, `entropy`, a path, a glob, a data set of the hub, or several of these one
    after the other.

    reading: its documents are conversations. Raises UsageError for a source that does not exist, DataError for one without
    text. Bad lines are counted in `bad`. home: the folder that keeps which commit of a data set of the hub is read.
    mixture: the pairs that `skills` draws.
    """
    bad = BadLines() if bad is None else bad
    names = (source,) if isinstance(source, str) else source
    parts = [
        _skills(seed, mixture, reading)
        if name == "skills"
        else _open_one(name, seed=seed, text_key=text_key, bad=bad, home=home)
        if reading is None
        else _open_chat(name, bad=bad, reading=reading, home=home)
        for name in names
    ]
    return parts[0] if len(parts) == 1 else _chain(parts)


def _open_one(source: str, *, seed: int, text_key: str, bad: BadLines, home: Path | None) -> Corpus:
    if source == "python":
        return _python()
    if source == "entropy":
        return Corpus("entropy", ("entropy", seed), lambda: _entropy(seed), GENERATED, endless=True, shuffled=True)
    if source.startswith(MARK):
        return _hub(source, text_key=text_key, bad=bad, home=home)
    files = find_files(source)
    if any(map(is_tokens, files)):
        return _token_files(source, files)
    return _files(source, files, text_key=text_key, bad=bad)


def _open_chat(source: str, *, bad: BadLines, reading: Reading, home: Path | None) -> Corpus:
    """A source of conversations."""
    if source in ("python", "entropy"):
        expected = "skills, JSON lines, tables, or a data set of the hub"
        raise UsageError("this source holds no conversations", where=f"data.source: {source}", expected=expected)
    if source.startswith(MARK):
        if reading.shape == "auto":
            what, expected = "the shape of conversations on the hub is to be named", "one of " + ", ".join(chat.KEYS)
            raise UsageError(what, where="data.chat.format", expected=expected, found="auto")
        take = _taker(reading.shape, reading)
        corpus = _hub(source, text_key="text", bad=bad, home=home, take=take)
        return _told(corpus, reading.shape, reading)
    files = find_files(source)
    chat.require_objects(files)
    shape = reading.shape if reading.shape != "auto" else chat.find_format(files)
    if shape == "preference" and reading.shape == "auto":
        what, way = (
            "the source holds preferences: answers that are chosen and rejected",
            "the same command with preference.loss=sigmoid trains them (DPO)",
        )
        expected = "conversations, or a preference section"
        raise UsageError(what, where=f"data.source: {source}", expected=expected, found="pairs without a preference section", next=way)
    take = _taker(shape, reading)
    corpus = _files(source, files, text_key="text", bad=bad, take=take)
    found = f"{source} holds conversations of the shape {shape}" + (", as its first object says" if reading.shape == "auto" else "")
    return replace(_told(corpus, shape, reading), notes=(*corpus.notes, found))


def _told(corpus: Corpus, shape: chat.Format, reading: Reading) -> Corpus:
    """A corpus of conversations of a shape; with train_on=each a document for each turn that is trained."""
    read = partial(_each_turn, corpus.documents) if reading.train_on == "each" else corpus.documents
    return replace(corpus, identity=("chat", READ_AS, shape, reading.train_on, corpus.identity), shape=shape, documents=read)


def _each_turn(documents: Callable[[], Iterator[Document]]) -> Iterator[Document]:
    return (replace(one, text=text, key=key) for one in documents() for text, key in chat.each_turn(one.text))


def _taker(shape: chat.Format, reading: Reading) -> Take:
    """What makes documents of the objects of a shape."""
    if shape == "preference":
        return preferences.taker(train_on=reading.train_on)
    return chat.taker(shape, train_on=reading.train_on)


def _python() -> Corpus:
    items, lacking = python_corpus.inventory()
    if not items:
        what, way = "this Python carries no sources and no documentation", "the same command with data.source=skills, or your own text"
        raise DataError(what, where="data.source: python", expected="sources of the standard library", found="none", next=way)
    identity = ("python", *((item.kind, item.name, item.size) for item in items))
    notes = tuple(f"the python corpus goes without {name}: not installed here" for name in lacking)
    size = sum(map(python_corpus.effort, items))
    return Corpus("python", identity, lambda: python_corpus.documents(items), size, shuffled=True, notes=notes)


def _files(source: str, files: list[Path], *, text_key: str, bad: BadLines, take: Take | None = None) -> Corpus:
    """Local files. Their identity is path, size and time of change: reading gigabytes to learn that nothing changed would cost minutes."""
    identity = ("files", text_key, *_states(files))
    bad.rows |= any(map(is_table, files))
    size = sum(size_of(path) * PACKED.get(path.suffix, 1) for path in files)
    read = partial(read_files, files, text_key=text_key, bad=bad, take=take)
    notes = () if take is not None else _looks_like_chat(source, files, text_key=text_key, bad=bad)
    return Corpus(_name(source) or "text", identity, read, size, place=source, notes=notes)


def _looks_like_chat(source: str, files: list[Path], *, text_key: str, bad: BadLines) -> tuple[str, ...]:
    """What to say of conversations that are about to be read as text; `bad` is told what reads them, where they have no text."""
    keys = chat.first_keys(files)
    if not (way := chat.way_of(keys)):
        return ()
    if text_key not in keys:
        bad.ways.update(dict.fromkeys(map(str, files), way))
        return ()
    return (f"{source} looks like conversations, and their {text_key!r} alone is trained, as plain text: {way}",)


def _hub(source: str, *, text_key: str, bad: BadLines, home: Path | None, take: Take | None = None) -> Corpus:
    """A data set of the hub at one commit, which is its identity. Its size is not known: a sample of it is its beginning."""
    from dist_llm.data import hub

    reference, commit = hub.resolve(source, home=home)
    bad.rows = True
    identity = ("hub", reference.repo, reference.config, reference.split, commit, text_key)
    name = _name(f"{reference.repo.replace('/', '-')}-{commit[:8]}")
    note = f"{reference} was read at commit {commit}"
    read = partial(hub.documents, reference, commit, text_key=text_key, bad=bad, take=take)
    return Corpus(name, identity, read, 1, shuffled=True, notes=(note,), place=source)


def _token_files(source: str, files: list[Path]) -> Corpus:
    """Token files of other tools. Raises UsageError where other files are among them."""
    if others := [path for path in files if not is_tokens(path)]:
        what, expected = "token files and text cannot come from one path", "files of ids alone (.bin, .idx), or none"
        raise UsageError(what, where=f"data.source: {source}", expected=expected, found=str(others[0]), next="name both: data.source=[A,B]")
    held = TokenFiles(files)
    identity = ("tokens", *_states(held.files))

    def no_text() -> Iterator[Document]:
        what, expected = "the files hold ids and no text", "text: a token file is read with the tokenizer that has made it"
        raise UsageError(what, where=f"data.source: {source}", expected=expected, next="data.tokenizer.kind=file data.tokenizer.path=DIR")

    size = sum(map(size_of, held.files))
    return Corpus(_name(source) or "tokens", identity, no_text, size, place=source, tokens=held.documents, found=held.notes)


def _states(files: list[Path]) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of change of each file."""
    return ((str(path.resolve()), size_of(path), path.stat().st_mtime_ns) for path in files)


def _name(source: str) -> str:
    """A short name for what a path or glob names, fit for a folder."""
    return re.sub(r"[^A-Za-z0-9]+", "-", Path(source).name.split(".")[0]).strip("-").lower()[:32]


def _skills(seed: int, mixture: skills.Mixture, reading: Reading | None) -> Corpus:
    """Questions without end, as text, as conversations, or each with its right answer and a wrong one.

    The split goes by what is asked, so that no question held out is trained on.
    """
    kind = "text" if reading is None else "preference" if reading.shape == "preference" else "chat"

    def documents() -> Iterator[Document]:
        for index in itertools.count():
            one = skills.pair(seed, index, mixture)
            if kind == "preference":
                asked = chat.Turn("user", one.prompt)
                right, wrong = ([asked, chat.Turn("assistant", said)] for said in (one.answer, skills.wrong(seed, index, mixture)))
                text = preferences.spell(right, wrong, 1)
            else:
                text = one.text if kind == "text" else chat.of_pair(one.prompt, one.answer)
            yield Document(text, f"skills:{index}")

    drawn = () if mixture == skills.ALL else (mixture.tasks, mixture.length, mixture.apart)
    identity = ("skills", *(() if kind == "text" else (kind,)), seed, *drawn)
    shape = {"text": "", "chat": "messages", "preference": "preference"}[kind]
    return Corpus("skills", identity, documents, GENERATED, endless=True, shuffled=True, shape=shape)


def _entropy(seed: int) -> Iterator[Document]:
    """Documents without end; the split goes by their number, so that it does not favour any letters."""
    source = MarkovSource(seed)
    for index in itertools.count():
        yield Document(source.document(index), f"entropy:{index}", key=f"entropy:{index}")


def limited(documents: Iterator[Document], budget: int) -> Iterator[Document]:
    """The first documents that together hold at least `budget` bytes of text; their place counts towards the budget."""
    taken = 0
    for document in documents:
        taken += len(document.text.encode())
        yield Document(document.text, document.name, min(1.0, taken / budget), document.key)
        if taken >= budget:
            return


def _chain(parts: list[Corpus]) -> Corpus:
    """Several corpora one after the other; generators give their default amount."""
    total = sum(part.size for part in parts)

    def read(tokenizer: Tokenizer | None) -> Iterator[Document]:
        before = 0
        for part in parts:
            source = part.documents() if tokenizer is None else part.read(tokenizer)
            for document in limited(source, part.size) if part.endless else source:
                yield replace(document, place=(before + document.place * part.size) / total)
            before += part.size

    def found() -> list[str]:
        return [note for part in parts for note in part.found()]

    notes = tuple(note for part in parts for note in part.notes)
    name = "-".join(dict.fromkeys(part.name for part in parts))[:48]
    place = ", ".join(part.place or part.name for part in parts)
    shape = ", ".join(dict.fromkeys(part.shape for part in parts if part.shape))
    tokens, identity = read if any(part.tokens for part in parts) else None, tuple(part.identity for part in parts)
    more: dict[str, Any] = {"notes": notes, "place": place, "shape": shape, "tokens": tokens, "found": found}
    return Corpus(name, identity, lambda: read(None), total, **more)
