"""From a corpus to token stores: encode, split by document, write."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_llm.data.corpora import GENERATED, Corpus, limited
from dist_llm.data.readers import Document
from dist_llm.data.store import SHARD_TOKENS, StoreWriter
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import DataError

ENCODED_AT_ONCE = 1_000_000  # characters of text

Progress = Callable[[str, float], None]  # a message, and how much of the work is done (0 to 1)


@dataclass(frozen=True)
class Encoded:
    """A document as ids (not empty, without the end token); its digest, its place for the split in [0, 1), its bytes of text."""

    ids: list[int]
    digest: bytes
    fraction: float
    text_bytes: int


def build_store(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    validation: float,
    max_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> list[str]:
    """Write `folder`/train and, when validation > 0, `folder`/validation: the documents whose hash falls below that fraction.

    When none falls there, the document with the smallest hash is held out. max_tokens (at least 2) cuts the last
    document short. Returns notes. Raises DataError when there is no text.
    """
    train, held_out, threshold = folder / "train", folder / "validation", validation
    for again in (True, False, False):
        batches = encode(corpus, tokenizer, max_tokens=max_tokens, progress=progress)
        lowest = _write(batches, corpus.name, tokenizer, folder, threshold=threshold, shard_tokens=shard_tokens)
        if not threshold or (train.is_dir() and held_out.is_dir()):
            break
        shutil.rmtree(train, ignore_errors=True)
        shutil.rmtree(held_out, ignore_errors=True)
        threshold = lowest if again else 0.0
    return [f"{corpus.name} is one document, or one many times: nothing is held out for validation"] if validation and not threshold else []


def encode(
    corpus: Corpus, tokenizer: Tokenizer, *, max_tokens: int | None = None, progress: Progress | None = None
) -> Iterator[list[Encoded]]:
    """The documents of a corpus as ids, in lists of about a megabyte; with their ends they make at most `max_tokens` tokens.

    A generator without a limit gives its default amount of text.
    """
    tokens, endless = 0, corpus.endless and max_tokens is None
    for group in _groups(limited(corpus.documents(), GENERATED) if endless else corpus.documents()):
        batch = []
        for document, ids in zip(group, tokenizer.encode_batch([document.text for document in group]), strict=True):
            kept = ids if max_tokens is None else ids[: max(0, max_tokens - tokens - 1)]
            if kept:
                batch.append(Encoded(kept, *identify(document), len(document.text.encode())))
                tokens += len(kept) + 1
        yield batch
        if progress:
            progress(f"{corpus.name}: {tokens:,} tokens", tokens / max_tokens if max_tokens else group[-1].place)
        if max_tokens is not None and tokens >= max_tokens - 1:
            return


def identify(document: Document) -> tuple[bytes, float]:
    """16 bytes that stand for the text, and where in [0, 1) the document falls for the split."""
    digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
    mark = digest if document.key is None else hashlib.blake2b(document.key.encode(), digest_size=16).digest()
    return digest, int.from_bytes(mark[:6], "big") / 2**48


def sample(corpus: Corpus, budget: int) -> Iterator[Document]:
    """About `budget` bytes of documents from all over the corpus, chosen by their hash: always the same ones."""
    if corpus.shuffled or corpus.size <= budget:
        return limited(corpus.documents(), budget)
    chosen = (document for document in corpus.documents() if identify(document)[1] < budget / corpus.size)
    first = next(chosen, None)
    return limited(_join(first, chosen), budget) if first else limited(corpus.documents(), budget)


def no_text(source: str) -> DataError:
    """The failure of a corpus without a single document."""
    return DataError("there is no text", where=f"data.source: {source}", expected="at least one document that is not empty")


def _write(
    batches: Iterable[list[Encoded]], source: str, tokenizer: Tokenizer, folder: Path, *, threshold: float, shard_tokens: int
) -> float:
    """One pass: documents whose fraction is at most a positive threshold are held out. Returns the smallest fraction seen."""
    writers: dict[str, StoreWriter] = {}
    lowest = 1.0
    for batch in batches:
        lowest = min([lowest, *(one.fraction for one in batch)])
        held_out = [one for one in batch if threshold > 0 and one.fraction <= threshold]
        trained = [one for one in batch if not (threshold > 0 and one.fraction <= threshold)]
        for split, part in (("train", trained), ("validation", held_out)):
            if part and split not in writers:
                home = folder / split
                writers[split] = StoreWriter(home, vocab=tokenizer.vocab_size, end_id=tokenizer.end_id, shard_tokens=shard_tokens)
            if part:
                digests, text_bytes = b"".join(one.digest for one in part), sum(one.text_bytes for one in part)
                writers[split].add([one.ids for one in part], digests=digests, text_bytes=text_bytes)
    if not writers:
        raise no_text(source)
    for split, writer in writers.items():
        writer.close(split=split, source=source, tokenizer=tokenizer.hash)
    return lowest


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about ENCODED_AT_ONCE characters."""
    group: list[Document] = []
    held = 0
    for document in documents:
        group.append(document)
        held += len(document.text)
        if held >= ENCODED_AT_ONCE:
            yield group
            group, held = [], 0
    if group:
        yield group


def _join(first: Document, rest: Iterator[Document]) -> Iterator[Document]:
    yield first
    yield from rest
