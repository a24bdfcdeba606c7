"""From a corpus to token stores: encode, split by document, write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_llm.data.corpora import GENERATED, Corpus, limited
from dist_llm.data.journal import Stores
from dist_llm.data.readers import Document
from dist_llm.data.store import SHARD_TOKENS
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import DataError

ENCODED_AT_ONCE = 1_000_000  # characters of text

Progress = Callable[[str, float], None]  # a message, and how much of the work is done (0 to 1)


@dataclass(frozen=True)
class Encoded:
    """A document as ids (without the end token); its digest, its place for the split in [0, 1), its bytes of text.

    number: how many documents of the corpus come before it.
    """

    ids: Sequence[int] | np.ndarray
    digest: bytes
    fraction: float
    text_bytes: int
    number: int


def build_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
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
    document short. note: the file that says how far a build has come, which a later call goes on from. Returns notes.
    Raises DataError when there is no text.
    """
    threshold, notes = validation, []
    for again in (True, False, False):
        terms = [corpus.identity, threshold, max_tokens]
        stores = Stores(folder, tokenizer=tokenizer, terms=terms, shard_tokens=shard_tokens, note=note)
        if stores.tokens:
            notes.append(f"an interrupted build of {corpus.name} was gone on with: {stores.tokens:,} tokens were there")
        batches = encode(corpus, tokenizer, max_tokens=max_tokens, progress=progress, documents=stores.documents, tokens=stores.tokens)
        _write(batches, stores, threshold=threshold)
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
    tokenizer: Tokenizer,
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
    source = limited(corpus.documents(), GENERATED) if endless else corpus.read(tokenizer)
    kept_tokens = tokens

    def tell(place: float) -> None:
        if progress:
            progress(f"{corpus.name}: {kept_tokens:,} tokens taken up from an interrupted build", place)

    for group in _groups(_after(source, documents, tell)):
        batch = []
        for document, ids in zip(group, _ids(group, tokenizer), strict=True):
            kept = ids if max_tokens is None else ids[: max(0, max_tokens - tokens - 1)]
            if len(kept) or (document.ids is not None and not len(ids)):  # an end token alone, where others have written one
                batch.append(Encoded(kept, *identify(document), len(document.text.encode()), documents))
                tokens += len(kept) + 1
            documents += 1
        yield batch
        if progress:
            progress(f"{corpus.name}: {tokens:,} tokens", tokens / max_tokens if max_tokens else group[-1].place)
        if max_tokens is not None and tokens >= max_tokens - 1:
            return


def identify(document: Document) -> tuple[bytes, float]:
    """16 bytes that stand for the text or the ids, and where in [0, 1) the document falls for the split."""
    content = document.text.encode() if document.ids is None else document.ids.astype("<u4").tobytes()
    digest = hashlib.blake2b(content, digest_size=16).digest()
    mark = digest if document.key is None else hashlib.blake2b(document.key.encode(), digest_size=16).digest()
    return digest, int.from_bytes(mark[:6], "big") / 2**48


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
    expected, way = "at least one document that is not empty", "name other text: data.source=PATH, or --data PATH with train"
    return DataError("there is no text", where=where, expected=expected, next=way)


def _write(batches: Iterable[list[Encoded]], stores: Stores, *, threshold: float) -> None:
    """One pass: documents whose fraction is at most a positive threshold are held out."""
    for batch in batches:
        held_out = [one for one in batch if threshold > 0 and one.fraction <= threshold]
        trained = [one for one in batch if not (threshold > 0 and one.fraction <= threshold)]
        for split, part in (("train", trained), ("validation", held_out)):
            if part:
                digests, text_bytes = b"".join(one.digest for one in part), sum(one.text_bytes for one in part)
                stores.add(split, [one.ids for one in part], digests=digests, text_bytes=text_bytes)
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


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about ENCODED_AT_ONCE characters."""
    group: list[Document] = []
    held = 0
    for document in documents:
        group.append(document)
        held += len(document.text) if document.ids is None else len(document.ids)
        if held >= ENCODED_AT_ONCE:
            yield group
            group, held = [], 0
    if group:
        yield group


def _ids(group: Sequence[Document], tokenizer: Tokenizer) -> list[Any]:
    """The ids of each document; those that come as ids are taken as they are."""
    texts = iter(tokenizer.encode_batch([document.text for document in group if document.ids is None]))
    return [next(texts) if document.ids is None else document.ids for document in group]


def _join(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest
