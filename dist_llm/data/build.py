"""From a corpus to token stores: encode, split by document, write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_llm.data.corpora import GENERATED, Corpus, limited
from dist_llm.data.encoding import ChatEncoder, Encoder, Ids, TextEncoder, identify
from dist_llm.data.journal import Stores
from dist_llm.data.readers import Document
from dist_llm.data.store import SHARD_TOKENS
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import DataError

ENCODED_AT_ONCE = 1_000_000  # characters of text
CHARACTERS = 4  # of a token, about

Progress = Callable[[str, float], None]  # a message, and how much of the work is done (0 to 1)


@dataclass(frozen=True)
class Encoded(Ids):
    """A document as ids. number: how many documents of the corpus come before it."""

    number: int = 0


def build_store(
    corpus: Corpus,
    by: Encoder | Tokenizer,
    folder: Path,
    *,
    validation: float,
    max_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
    note: Path | None = None,
) -> list[str]:
    """Write `folder`/train and, when validation > 0, `folder`/validation: the documents whose hash falls below that fraction.

    When none falls there, the document with the smallest hash is held out. max_tokens (at least 2) cuts the last
    document short, or leaves out the conversation that would go over it and all after it. note: the file that says
    how far a build has come, which a later call goes on from. Returns notes. Raises DataError when there is no text.
    """
    threshold, notes = validation, []
    encoder: Encoder = TextEncoder(by) if isinstance(by, Tokenizer) else by
    for again in (True, False, False):
        terms = [corpus.identity, threshold, max_tokens, *encoder.identity]
        sizes: dict[str, Any] = {"shard_tokens": shard_tokens, "weighted": encoder.weighted}
        stores = Stores(folder, tokenizer=encoder.tokenizer, terms=terms, note=note, **sizes)
        if isinstance(encoder, ChatEncoder):
            encoder.full = False
            for where, why, excerpt in stores.faulty:
                encoder.bad.add(where, why, excerpt.encode())
        if stores.tokens:
            notes.append(f"an interrupted build of {corpus.name} was gone on with: {stores.tokens:,} tokens were there")
        batches = encode(corpus, encoder, max_tokens=max_tokens, progress=progress, documents=stores.documents, tokens=stores.tokens)
        _write(batches, stores, threshold=threshold, faulty=encoder.faulty if isinstance(encoder, ChatEncoder) else [])
        if isinstance(encoder, ChatEncoder):
            encoder.bad.check()
        if not stores.close(source=corpus.name):
            raise no_text(corpus)
        if not threshold or ((folder / "train").is_dir() and (folder / "validation").is_dir()):
            break
        threshold = stores.lowest if again else 0.0
    if validation and not threshold:
        notes.append(f"{corpus.name} is one document, or one many times: nothing is held out for validation")
    return [*notes, *(f"{corpus.name}: {note}" for note in corpus.found())]


def encode(
    corpus: Corpus,
    by: Encoder | Tokenizer,
    *,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    documents: int = 0,
    tokens: int = 0,
) -> Iterator[list[Encoded]]:
    """The documents of a corpus as ids, in lists of about a megabyte; with their ends they make at most `max_tokens` tokens.

    A generator without a limit gives its default amount of text. documents, tokens: how many are done already; the former
    are read past, not encoded.
    """
    endless = corpus.endless and max_tokens is None
    encoder: Encoder = TextEncoder(by) if isinstance(by, Tokenizer) else by
    source = limited(corpus.documents(), GENERATED) if endless else corpus.read(encoder.tokenizer)
    added, kept_tokens = 0 if encoder.weighted else 1, tokens  # added: the end token that a store gives each document

    def tell(place: float) -> None:
        if progress:
            progress(f"{corpus.name}: {kept_tokens:,} tokens taken up from an interrupted build", place)

    def left() -> int | None:
        return None if max_tokens is None else max_tokens - tokens

    for group in _groups(_after(source, documents, tell), left):
        batch = []
        for one in encoder.encode(group, limit=left()):
            if one is not None:
                batch.append(Encoded(**vars(one), number=documents))
                tokens += len(one.ids) + added
            documents += 1
        yield batch
        if progress:
            progress(f"{corpus.name}: {tokens:,} tokens", tokens / max_tokens if max_tokens else group[-1].place)
        if (max_tokens is not None and tokens >= max_tokens - added) or getattr(encoder, "full", False):
            return


def sample(corpus: Corpus, budget: int) -> Iterator[Document]:
    """About `budget` bytes of documents from all over the corpus, chosen by their hash: always the same ones."""
    if corpus.shuffled or corpus.size <= budget:
        return limited(corpus.documents(), budget)
    chosen = (document for document in corpus.documents() if identify(document)[1] < budget / corpus.size)
    first = next(chosen, None)
    return limited(_join(first, chosen), budget) if first else limited(corpus.documents(), budget)


def no_text(*corpora: Corpus) -> DataError:
    """The failure of corpora without a single document."""
    where = f"data.source: {', '.join(corpus.place or corpus.name for corpus in corpora)}"
    expected, way = "at least one document that is not empty", "the same command with data.source=PATH"
    return DataError("there is no text", where=where, expected=expected, found="none", next=way)


def _write(batches: Iterable[list[Encoded]], stores: Stores, *, threshold: float, faulty: list[list[str]]) -> None:
    """One pass: documents whose fraction is at most a positive threshold are held out. faulty: what the last batch left out, and why."""
    for batch in batches:
        stores.faulty += faulty
        held_out = [one for one in batch if threshold > 0 and one.fraction <= threshold]
        trained = [one for one in batch if not (threshold > 0 and one.fraction <= threshold)]
        for split, part in (("train", trained), ("validation", held_out)):
            if part:
                digests, text_bytes = b"".join(one.digest for one in part), sum(one.text_bytes for one in part)
                sides = [side for one in part for side in one.sides]
                weights = [each for _, each in sides if each is not None] if stores.weighted else None
                stores.add(split, [ids for ids, _ in sides], digests=digests, text_bytes=text_bytes, weights=weights)
        if batch:
            stores.documents, stores.lowest = batch[-1].number + 1, min([stores.lowest, *(one.fraction for one in batch)])
        stores.keep()


def _after(documents: Iterator[Document], count: int, tell: Callable[[float], object]) -> Iterator[Document]:
    """The documents after the first `count`, which are read past. Raises DataError when there are fewer."""
    for number in range(count):
        document = next(documents, None)
        if document is None:
            what, found = "the text is not what it was when its build was interrupted", f"{number} documents"
            raise DataError(what, expected=f"at least {count}", found=found)
        if number % 4096 == 0:
            tell(document.place)
    yield from documents


def _groups(documents: Iterator[Document], left: Callable[[], int | None]) -> Iterator[list[Document]]:
    """Documents in lists of about ENCODED_AT_ONCE characters; fewer where only so many tokens are `left` to be taken."""

    def enough() -> int:
        tokens = left()
        return ENCODED_AT_ONCE if tokens is None else min(ENCODED_AT_ONCE, CHARACTERS * tokens)

    group: list[Document] = []
    held, most = 0, enough()
    for document in documents:
        group.append(document)
        held += len(document.text) if document.ids is None else len(document.ids)
        if held >= most:
            yield group
            most = enough()
            group, held = [], 0
    if group:
        yield group


def _join(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest
