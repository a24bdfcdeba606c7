"""Where text comes from: `python`, `skills`, `entropy`, or the user's own files, behind one small type."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dist_llm.data import chat, python_corpus, skills
from dist_llm.data.chat import Reading
from dist_llm.data.entropy import MarkovSource
from dist_llm.data.readers import BadLines, Document, Take, find_files, read_files, size_of
from dist_llm.errors import DataError, UsageError

GENERATED = 4_000_000  # bytes of text that a generator gives where no limit is set


@dataclass(frozen=True)
class Corpus:
    """A named source of documents that can be read from the start any number of times.

    size: bytes of text expected, for progress and sampling. identity: what the text depends on, without reading it:
    equal identities mean equal text. endless: a generator, to be cut by the caller. notes: what a user should know.
    place: the path or glob of files. shape: of the objects, where they are conversations: documents are as data/chat.py spells them.
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


def open_corpus(
    source: str | tuple[str, ...], *, seed: int, text_key: str = "text", bad: BadLines | None = None, reading: Reading | None = None
) -> Corpus:
    """The corpus that a config names: `python`, `skills`, `entropy`, a path, a glob, or several of these one after the other.

    reading: its documents are conversations. Raises UsageError for a source that does not exist, DataError for one without
    text. Bad lines are counted in `bad`.
    """
    bad = BadLines() if bad is None else bad
    names = (source,) if isinstance(source, str) else source
    parts = [
        _open_one(name, seed=seed, text_key=text_key, bad=bad) if reading is None else _open_chat(name, seed=seed, bad=bad, reading=reading)
        for name in names
    ]
    return parts[0] if len(parts) == 1 else _chain(parts)


def _open_one(source: str, *, seed: int, text_key: str, bad: BadLines) -> Corpus:
    if source == "python":
        return _python()
    if source == "skills":
        return Corpus("skills", ("skills", seed), lambda: _skills(seed), GENERATED, endless=True, shuffled=True)
    if source == "entropy":
        return Corpus("entropy", ("entropy", seed), lambda: _entropy(seed), GENERATED, endless=True, shuffled=True)
    return _files(source, text_key=text_key, bad=bad)


def _open_chat(source: str, *, seed: int, bad: BadLines, reading: Reading) -> Corpus:
    """A source of conversations."""
    if source == "skills":
        identity = ("skills", "chat", seed)
        return Corpus("skills", identity, lambda: _skill_chats(seed), GENERATED, endless=True, shuffled=True, shape="messages")
    if source in ("python", "entropy"):
        raise UsageError("this source holds no conversations", where=f"data.source: {source}", expected="skills, or JSON lines")
    shape = reading.shape if reading.shape != "auto" else chat.find_format(find_files(source))
    take = chat.taker(shape, train_on=reading.train_on)
    corpus = _files(source, text_key="text", bad=bad, take=take)
    found = f"{source} holds conversations of the shape {shape}" + (", as its first object says" if reading.shape == "auto" else "")
    return replace(corpus, identity=("chat", shape, reading.train_on, corpus.identity), shape=shape, notes=(*corpus.notes, found))


def _python() -> Corpus:
    items, lacking = python_corpus.inventory()
    if not items:
        raise DataError("this Python carries no sources and no documentation", next="use data.source=skills, or your own text")
    identity = ("python", *((item.kind, item.name, item.size) for item in items))
    notes = tuple(f"the python corpus goes without {name}: not installed here" for name in lacking)
    size = sum(map(python_corpus.effort, items))
    return Corpus("python", identity, lambda: python_corpus.documents(items), size, shuffled=True, notes=notes)


def _files(source: str, *, text_key: str, bad: BadLines, take: Take | None = None) -> Corpus:
    """Local files. Their identity is path, size and time of change: reading gigabytes to learn that nothing changed would cost minutes."""
    files = find_files(source)
    identity = ("files", text_key, *((str(path.resolve()), size_of(path), path.stat().st_mtime_ns) for path in files))
    size = sum(size_of(path) * (4 if path.suffix in (".gz", ".zst") else 1) for path in files)
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(source).name.split(".")[0]).strip("-").lower()[:32]
    return Corpus(name or "text", identity, lambda: read_files(files, text_key=text_key, bad=bad, take=take), size, place=source)


def _skills(seed: int) -> Iterator[Document]:
    """Pairs without end; the split goes by the text, so that no question of the validation set is trained on."""
    for index in itertools.count():
        yield Document(skills.pair(seed, index).text, f"skills:{index}")


def _skill_chats(seed: int) -> Iterator[Document]:
    """The same pairs as conversations."""
    for index in itertools.count():
        one = skills.pair(seed, index)
        yield Document(chat.spell([chat.Turn("user", one.prompt), chat.Turn("assistant", one.answer)]), f"skills:{index}")


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

    def documents() -> Iterator[Document]:
        before = 0
        for part in parts:
            for document in limited(part.documents(), part.size) if part.endless else part.documents():
                yield Document(document.text, document.name, (before + document.place * part.size) / total, document.key)
            before += part.size

    notes = tuple(note for part in parts for note in part.notes)
    name = "-".join(dict.fromkeys(part.name for part in parts))[:48]
    place = ", ".join(part.place or part.name for part in parts)
    shape = ", ".join(dict.fromkeys(part.shape for part in parts if part.shape))
    return Corpus(name, tuple(part.identity for part in parts), documents, total, notes=notes, place=place, shape=shape)
