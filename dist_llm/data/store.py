"""Tokens on disk: shards of whole numbers that are mapped into memory, an index of documents, and a manifest.

    manifest.json      what there is, with the sha256 of every file, and of itself
    documents.bin      where each document starts, and the end of the last: uint64 of (documents + 1,)
    tokens-00000.bin   the documents one after the other, each ended by the end token: uint16 or uint32

A store of conversations keeps the weight of each token too (weights.py), and its documents end as their template ends them.

No token is given out that was not compared with its hash before: a small store is hashed when it is opened, a shard of a
large one when it is first read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_llm import faults
from dist_llm.data.sealed import BUILD, MANIFEST, checked, compare_size, damaged, read_small, with_checksum, write_durably
from dist_llm.data.shards import HashedFile, Shard, ShardReader, ShardWriter, mapped
from dist_llm.data.shards import verify as verify_file
from dist_llm.data.weights import WeightReader, Weights, WeightWriter, kept_names, read_weights
from dist_llm.errors import DataError, UsageError

VERSION = 1
SHARD_TOKENS = 1 << 26  # tokens in a full shard: 128 MiB of uint16
VERIFIED_ON_OPEN = 256 << 20  # bytes up to which a store is hashed when it is opened
INDEX = "documents.bin"


@dataclass(frozen=True)
class Manifest:
    """What a store holds. text_bytes: of the UTF-8 text behind the tokens. fingerprint: sha256 over its documents' digests."""

    split: str
    source: str
    dtype: str
    tokenizer: str
    vocab: int
    end_id: int
    documents: int
    tokens: int
    text_bytes: int
    fingerprint: str
    index: Shard
    shards: tuple[Shard, ...]
    weights: Weights | None = None  # of conversations

    def encode(self) -> bytes:
        """The one spelling of the manifest."""
        body = asdict(self)
        if self.weights is None:
            del body["weights"]
        return with_checksum({"version": VERSION, **body})

    @property
    def files(self) -> tuple[Shard, ...]:
        """Every file beside the manifest."""
        weights = (self.weights.index, *self.weights.shards) if self.weights else ()
        return (self.index, *self.shards, *weights)


class StoreWriter:
    """Writes documents of token ids into a new folder; nothing is a store before `close`.

    weighted: they are conversations: each token comes with its weight, and no end token is added. digests: the file for the
    documents' digests, which `keep` needs. kept: what `keep` gave to a process that has ended; the files are cut back to that
    moment and gone on with. Raises DataError when one of them is not as it was then.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab: int,
        end_id: int,
        shard_tokens: int = SHARD_TOKENS,
        weighted: bool = False,
        digests: Path | None = None,
        kept: dict[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=kept is not None)
        self.folder, self.vocab, self.end_id, self.shard_tokens = folder, vocab, end_id, shard_tokens
        self.dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
        counts: list[int] = kept["counts"] if kept else [0, 0, 0]
        self.tokens, self.documents, self.text_bytes = counts
        if kept:
            names = [INDEX, *(shard["file"] for shard in (*kept["shards"], *kept["open"])), *kept_names(kept.get("weights"))]
            _keep_only(folder, names)
        self._index = HashedFile(folder / INDEX, kept["index"] if kept else None)
        self._digests = HashedFile(digests, kept["digests"] if kept else None)
        self._shards = ShardWriter(folder, "tokens", dtype=self.dtype, limit=shard_tokens, kept=kept, finished=_reach)
        self._weights = WeightWriter(folder, limit=shard_tokens, kept=kept["weights"] if kept else None) if weighted else None
        if not kept:
            self._index.write(np.zeros(1, "<u8"))

    def add(
        self,
        batch: Sequence[Sequence[int] | np.ndarray],
        *,
        digests: bytes,
        text_bytes: int,
        weights: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Append documents; to one without weights the end token is added, one with weights is not empty. digests: for the fingerprint."""
        assert (weights is None) == (self._weights is None)
        tail = 1 if weights is None else 0
        ends = np.cumsum([len(ids) + tail for ids in batch], dtype=np.int64)
        tokens = np.full(int(ends[-1]) if len(ends) else 0, self.end_id, dtype=np.int64)
        for ids, end in zip(batch, ends.tolist(), strict=True):
            tokens[end - tail - len(ids) : end - tail] = ids
        assert np.all((tokens >= 0) & (tokens < self.vocab)), "a token outside the vocabulary"
        assert tail or all(map(len, batch)), "an empty conversation"
        if weights is None or self._weights is None:
            assert np.array_equal(np.flatnonzero(tokens == self.end_id) + 1, ends), "the end token inside a document"
        else:
            assert [len(ids) for ids in batch] == [len(one) for one in weights], "a weight for each token"
            self._weights.add(weights)
        self._index.write((ends + self.tokens).astype("<u8"))
        self._digests.write(np.frombuffer(digests, np.uint8))
        self.tokens, self.documents, self.text_bytes = self.tokens + tokens.size, self.documents + len(batch), self.text_bytes + text_bytes
        self._shards.write(tokens)

    def keep(self) -> dict[str, Any]:
        """Wait until all that was added is on the disk; returns what another process needs to go on from here."""
        return {
            "counts": [self.tokens, self.documents, self.text_bytes],
            **self._shards.keep(),
            "index": asdict(self._index.sync()),
            "digests": asdict(self._digests.sync()),
            **({"weights": self._weights.keep()} if self._weights else {}),
        }

    def close(self, *, split: str, source: str, tokenizer: str) -> Manifest:
        """Flush all to the disk and write the manifest."""
        shards = self._shards.close()
        manifest = Manifest(
            split=split,
            source=source,
            dtype=self.dtype.name,
            tokenizer=tokenizer,
            vocab=self.vocab,
            end_id=self.end_id,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            fingerprint=self._digests.close().sha256,
            index=self._index.close(),
            shards=shards,
            weights=self._weights.close() if self._weights else None,
        )
        faults.reach("data.index", rank=0, step=0)
        write_durably(self.folder / MANIFEST, manifest.encode())
        return manifest


def _reach(shard: int) -> None:
    faults.reach("data.shard", rank=0, step=shard)


class TokenStore:
    """An opened store: the tokens as if they were one array of shape (tokens,), read from disk as they are asked for.

    tokenizer: the hash that the reader's tokenizer has, when it is known. verify: hash every shard now (True), each when
    it is first read (False), or now when there are few enough of them (None). Each file is hashed once a process. Raises
    DataError for a damaged store, UsageError when the tokenizer is another.
    """

    def __init__(self, folder: Path | str, *, tokenizer: str | None = None, verify: bool | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if tokenizer is not None and tokenizer != self.manifest.tokenizer:
            found = self.manifest.tokenizer
            what = "the tokens were made with another tokenizer"
            raise UsageError(what, where=str(self.folder), expected=f"hash {tokenizer[:16]}", found=f"hash {found[:16]}", next=BUILD)
        files = self.manifest.files
        for file in files:
            compare_size(self.folder / file.file, size=file.bytes, home=self.folder.parent)
        verify_file(self.folder, self.manifest.index)
        self._tokens = ShardReader(self.folder, self.manifest.shards, dtype=self.manifest.dtype)
        self.document_starts = mapped(self.folder / INDEX, "<u8")  # (documents + 1,)
        self.weights: WeightReader | None = None
        self.reference: np.ndarray | None = None  # of pairs, once a run asks: log probabilities of their sides, (pairs, 2), NaN: not known
        if self.manifest.weights is not None:
            verify_file(self.folder, self.manifest.weights.index)
            self.weights = WeightReader(self.folder, self.manifest.weights)
        if verify or (verify is None and sum(file.bytes for file in files) <= VERIFIED_ON_OPEN):
            self.verify()

    def __len__(self) -> int:
        return self.manifest.tokens

    def verify(self) -> None:
        """Hash every shard that this process has not hashed yet; raises DataError that names the damaged one."""
        self._tokens.verify()
        if self.weights is not None:
            self.weights.stream.verify()

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, of shape (n,), with tokens start .. start + n - 1. Raises DataError when a shard is damaged."""
        self._tokens.read(start, out)

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document, its end token included."""
        start, stop = int(self.document_starts[number]), int(self.document_starts[number + 1])
        out = np.empty(stop - start, dtype=np.int64)
        self.read(start, out)
        return out

    def longer_than(self, tokens: int) -> int:
        """How many documents have more than so many tokens, their end token included."""
        return int((np.diff(self.document_starts) > tokens).sum())

    @property
    def shortest(self) -> int:
        """The tokens of the shortest document, its end token included; 0 where there is none."""
        return int(np.diff(self.document_starts).min(initial=len(self)))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises DataError when it is missing, damaged, or newer than this program."""
    path = folder / MANIFEST
    try:
        raw = read_small(path)
    except OSError as error:
        raise DataError("there is no token store here", where=str(path), expected="a file", found=error.strerror, next=BUILD) from error
    if raw is None:
        found = "something else, or too large for one"
        raise DataError("there is no token store here", where=str(path), expected="a file", found=found, next=BUILD)
    body = checked(raw)
    if body is None:
        raise damaged("the manifest of the token store is damaged", path, home=folder.parent)
    if (version := body.pop("version", None)) != VERSION:
        what, expected = "the token store has another format", f"version {VERSION}"
        raise DataError(what, where=str(path), expected=expected, found=f"version {version}", next=BUILD)
    try:
        shards, weights = tuple(Shard(**shard) for shard in body["shards"]), read_weights(body.get("weights"))
        manifest = Manifest(**{**body, "index": Shard(**body["index"]), "shards": shards, "weights": weights})
        _check_manifest(manifest)
    except (KeyError, TypeError, AssertionError) as error:
        raise damaged("the manifest of the token store contradicts itself", path, home=folder.parent, found=str(error)) from error
    return manifest


def _keep_only(folder: Path, names: Sequence[str]) -> None:
    """Remove the files of a folder that came after the moment that is gone back to."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def _check_manifest(manifest: Manifest) -> None:
    """Asserts that the numbers of a manifest agree, and that no name in it leads out of the folder."""
    width = {"uint16": 2, "uint32": 4}[manifest.dtype]
    counts = [manifest.vocab, manifest.documents, manifest.tokens, manifest.text_bytes, manifest.end_id]
    assert all(type(count) is int and count >= 0 for count in counts), "a count"
    assert manifest.end_id < manifest.vocab <= 1 << 8 * width, "vocabulary"
    assert (manifest.index.file, manifest.index.entries) == (INDEX, manifest.documents + 1), "index"
    assert manifest.index.bytes == 8 * manifest.index.entries, "index"
    for shard in manifest.shards:
        assert re.fullmatch(r"tokens-\d{5}\.bin", shard.file) and shard.bytes == width * shard.entries > 0, f"shard {shard.file}"
    assert sum(shard.entries for shard in manifest.shards) == manifest.tokens, "tokens"
    if manifest.weights is not None:
        manifest.weights.check(documents=manifest.documents, tokens=manifest.tokens)
