"""Tokens on disk: shards of whole numbers that are mapped into memory, an index of documents, and a manifest.

    manifest.json      what there is, with the sha256 of every file, and of itself
    documents.bin      where each document starts, and the end of the last: uint64 of (documents + 1,)
    tokens-00000.bin   the documents one after the other, each ended by the end token: uint16 or uint32

No token is given out that was not compared with its hash before: a small store is hashed when it is opened, a shard of a
large one when it is first read.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_llm import faults
from dist_llm.data.sealed import BUILD, MANIFEST, checked, compare, compare_size, damaged, read_small, with_checksum, write_durably
from dist_llm.errors import DataError, UsageError

VERSION = 1
SHARD_TOKENS = 1 << 26  # tokens in a full shard: 128 MiB of uint16
VERIFIED_ON_OPEN = 256 << 20  # bytes up to which a store is hashed when it is opened
INDEX = "documents.bin"

_verified: set[tuple[str, int, int]] = set()  # files hashed by this process: path, size, time of change


@dataclass(frozen=True)
class Shard:
    """A file of a store: its name, entries, bytes and sha256."""

    file: str
    entries: int
    bytes: int
    sha256: str


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

    def encode(self) -> bytes:
        """The one spelling of the manifest."""
        return with_checksum({"version": VERSION, **asdict(self)})


class StoreWriter:
    """Writes documents of token ids into a new folder; nothing is a store before `close`.

    digests: the file for the documents' digests, which `keep` needs. kept: what `keep` gave to a process that has ended;
    the files are cut back to that moment and gone on with. Raises DataError when one of them is not as it was then.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab: int,
        end_id: int,
        shard_tokens: int = SHARD_TOKENS,
        digests: Path | None = None,
        kept: dict[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=kept is not None)
        self.folder, self.vocab, self.end_id, self.shard_tokens = folder, vocab, end_id, shard_tokens
        self.dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
        counts: list[int] = kept["counts"] if kept else [0, 0, 0]
        self.tokens, self.documents, self.text_bytes = counts
        self._shards = [Shard(**shard) for shard in kept["shards"]] if kept else []
        if kept:
            _keep_only(folder, [INDEX, *(shard["file"] for shard in (*kept["shards"], *kept["open"]))])
            for shard in self._shards:
                compare(folder / shard.file, size=shard.bytes, sha256=shard.sha256, home=folder.parent)
        self._index = _HashedFile(folder / INDEX, kept["index"] if kept else None)
        self._digests = _HashedFile(digests, kept["digests"] if kept else None)
        self._shard = _HashedFile(folder / kept["open"][0]["file"], kept["open"][0]) if kept and kept["open"] else None
        if not kept:
            self._index.write(np.zeros(1, "<u8"))

    def add(self, batch: Sequence[Sequence[int] | np.ndarray], *, digests: bytes, text_bytes: int) -> None:
        """Append documents; the end token of each is added here. digests: what the fingerprint is made of."""
        ends = np.cumsum([len(ids) + 1 for ids in batch], dtype=np.int64)
        tokens = np.full(int(ends[-1]) if len(ends) else 0, self.end_id, dtype=np.int64)
        for ids, end in zip(batch, ends.tolist(), strict=True):
            tokens[end - 1 - len(ids) : end - 1] = ids
        assert np.all((tokens >= 0) & (tokens < self.vocab)), "a token outside the vocabulary"
        assert np.array_equal(np.flatnonzero(tokens == self.end_id) + 1, ends), "the end token inside a document"
        self._index.write((ends + self.tokens).astype("<u8"))
        self._digests.write(np.frombuffer(digests, np.uint8))
        self.tokens, self.documents, self.text_bytes = self.tokens + tokens.size, self.documents + len(batch), self.text_bytes + text_bytes
        tokens = tokens.astype(self.dtype)
        while tokens.size:
            if self._shard is None:
                self._shard = _HashedFile(self.folder / f"tokens-{len(self._shards):05d}.bin")
            room = self.shard_tokens - self._shard.entries
            self._shard.write(tokens[:room])
            tokens = tokens[room:]
            if self._shard.entries == self.shard_tokens:
                self._finish_shard()

    def keep(self) -> dict[str, Any]:
        """Wait until all that was added is on the disk; returns what another process needs to go on from here."""
        return {
            "counts": [self.tokens, self.documents, self.text_bytes],
            "shards": [asdict(shard) for shard in self._shards],
            "open": [asdict(self._shard.sync())] if self._shard else [],
            "index": asdict(self._index.sync()),
            "digests": asdict(self._digests.sync()),
        }

    def close(self, *, split: str, source: str, tokenizer: str) -> Manifest:
        """Flush all to the disk and write the manifest."""
        self._finish_shard()
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
            shards=tuple(self._shards),
        )
        faults.reach("data.index", rank=0, step=0)
        write_durably(self.folder / MANIFEST, manifest.encode())
        return manifest

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None
            faults.reach("data.shard", rank=0, step=len(self._shards) - 1)


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
        files = (self.manifest.index, *self.manifest.shards)
        for file in files:
            compare_size(self.folder / file.file, size=file.bytes, home=self.folder.parent)
        self._verify(self.manifest.index)
        self._unread = set(range(len(self.manifest.shards)))  # shards that are hashed when they are first read
        if verify or (verify is None and sum(file.bytes for file in files) <= VERIFIED_ON_OPEN):
            self.verify()
        self._shards = [_mapped(self.folder / shard.file, self.manifest.dtype) for shard in self.manifest.shards]
        self._starts = list(accumulate((shard.entries for shard in self.manifest.shards), initial=0))
        self.document_starts = _mapped(self.folder / INDEX, "<u8")  # (documents + 1,)

    def __len__(self) -> int:
        return self.manifest.tokens

    def verify(self) -> None:
        """Hash every shard that this process has not hashed yet; raises DataError that names the damaged one."""
        for number in sorted(self._unread):
            self._verify(self.manifest.shards[number])
        self._unread.clear()

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, of shape (n,), with tokens start .. start + n - 1. Raises DataError when a shard is damaged."""
        assert start >= 0 and start + out.size <= len(self), (start, out.size, len(self))
        done, shard = 0, bisect_right(self._starts, start) - 1
        while done < out.size:
            if shard in self._unread:
                self._verify(self.manifest.shards[shard])
                self._unread.remove(shard)
            offset = start + done - self._starts[shard]
            part = self._shards[shard][offset : offset + out.size - done]
            out[done : done + part.size] = part
            done, shard = done + part.size, shard + 1

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

    def _verify(self, file: Shard) -> None:
        """Compare a file with its hash, unless this process has done so since it was changed."""
        path = self.folder / file.file
        state = path.stat()
        mark = (str(path.resolve()), state.st_size, state.st_mtime_ns)
        if mark not in _verified:
            compare(path, size=file.bytes, sha256=file.sha256, home=self.folder.parent)
            _verified.add(mark)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises DataError when it is missing, damaged, or newer than this program."""
    path = folder / MANIFEST
    try:
        raw = read_small(path)
    except OSError as error:
        raise DataError("there is no token store here", where=str(path), found=error.strerror, next=BUILD) from error
    if raw is None:
        found = "something else, or too large for one"
        raise DataError("there is no token store here", where=str(path), expected="a file", found=found, next=BUILD)
    body = checked(raw)
    if body is None:
        raise damaged("the manifest of the token store is damaged", path, home=folder.parent)
    if body.pop("version", None) != VERSION:
        raise DataError("the token store has another format", where=str(path), expected=f"version {VERSION}", next=BUILD)
    try:
        manifest = Manifest(**{**body, "index": Shard(**body["index"]), "shards": tuple(Shard(**shard) for shard in body["shards"])})
        _check_manifest(manifest)
    except (KeyError, TypeError, AssertionError) as error:
        raise damaged("the manifest of the token store contradicts itself", path, home=folder.parent, found=str(error)) from error
    return manifest


class _HashedFile:
    """A file that is hashed while it is written; without a path, hashed alone. kept: what `sync` gave, to go on from."""

    def __init__(self, path: Path | None, kept: dict[str, Any] | None = None) -> None:
        self.path, self.entries, self.bytes = path, 0, 0
        self._digest = hashlib.sha256()
        self._handle: BinaryIO | None = None
        if path is not None:
            self._handle = path.open("r+b" if kept else "xb")
        if kept is not None:
            self._go_on(Shard(**kept))

    def write(self, array: np.ndarray) -> None:
        content = array.tobytes()
        if self._handle is not None:
            self._handle.write(content)
        self._digest.update(content)
        self.entries, self.bytes = self.entries + array.size, self.bytes + len(content)

    def sync(self) -> Shard:
        """Wait until all that was written is on the disk; what there is."""
        if self._handle is not None:
            self._handle.flush()
            os.fsync(self._handle.fileno())
        return Shard(self.path.name if self.path else "", self.entries, self.bytes, self._digest.hexdigest())

    def close(self) -> Shard:
        shard = self.sync()
        if self._handle is not None:
            self._handle.close()
        return shard

    def _go_on(self, kept: Shard) -> None:
        """Cut the file back to what was kept. Raises DataError when that is not what is there."""
        assert self._handle is not None and self.path is not None, "nothing was kept of it"
        while self.bytes < kept.bytes and (content := self._handle.read(min(1 << 20, kept.bytes - self.bytes))):
            self._digest.update(content)
            self.bytes += len(content)
        if self._digest.hexdigest() != kept.sha256:
            self._handle.close()
            raise damaged("what an interrupted build has left is damaged", self.path, home=self.path.parent)
        self._handle.seek(kept.bytes)
        self._handle.truncate()
        self.entries = kept.entries


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


def _mapped(path: Path, dtype: str) -> np.ndarray:
    """A file as an array that is read from disk where it is touched. As a plain array: a slice of np.memmap costs ten times as much."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
