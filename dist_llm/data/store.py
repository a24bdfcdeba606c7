"""Tokens on disk: shards of whole numbers that are mapped into memory, an index of documents, and a manifest.

    manifest.json      what there is, with the sha256 of every file, and of itself
    documents.bin      where each document starts, and the end of the last: uint64 of (documents + 1,)
    tokens-00000.bin   the documents one after the other, each ended by the end token: uint16 or uint32

The manifest has one spelling (sorted keys, no spaces, one line) and carries the sha256 of the rest of itself, so that a
change of any byte of it is noticed, even of a blank. There are no times or paths in it: equal input gives equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_llm.errors import DataError, UsageError

VERSION = 1
SHARD_TOKENS = 1 << 26  # tokens in a full shard: 128 MiB of uint16
VERIFIED_ON_OPEN = 256 << 20  # bytes up to which a store is hashed when it is opened
BUILD = "build the data again: dist-llm data build CONFIG"
INDEX = "documents.bin"
MANIFEST = "manifest.json"

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
        body = {"version": VERSION, **asdict(self)}
        return _spell({**body, "checksum": hashlib.sha256(_spell(body)).hexdigest()})


class StoreWriter:
    """Writes documents of token ids into a new folder; nothing is a store before `close`."""

    def __init__(self, folder: Path, *, vocab: int, end_id: int, shard_tokens: int = SHARD_TOKENS) -> None:
        folder.mkdir(parents=True)
        self.folder, self.vocab, self.end_id, self.shard_tokens = folder, vocab, end_id, shard_tokens
        self.dtype = np.dtype("<u2" if vocab <= 1 << 16 else "<u4")
        self.tokens = self.documents = self.text_bytes = 0
        self._digest = hashlib.sha256()
        self._index = _HashedFile(folder / INDEX)
        self._index.write(np.zeros(1, "<u8"))
        self._shard: _HashedFile | None = None
        self._shards: list[Shard] = []

    def add(self, batch: Sequence[Sequence[int]], *, digests: bytes, text_bytes: int) -> None:
        """Append documents, none of them empty; the end token of each is added here. digests: what the fingerprint is made of."""
        ends = np.cumsum([len(ids) + 1 for ids in batch], dtype=np.int64)
        tokens = np.array([token for ids in batch for token in (*ids, self.end_id)], dtype=np.int64)
        assert all(map(len, batch)) and np.all((tokens >= 0) & (tokens < self.vocab)), "a token outside the vocabulary"
        assert np.array_equal(np.flatnonzero(tokens == self.end_id) + 1, ends), "the end token inside a document"
        self._index.write((ends + self.tokens).astype("<u8"))
        self._digest.update(digests)
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
            fingerprint=self._digest.hexdigest(),
            index=self._index.close(),
            shards=tuple(self._shards),
        )
        write_durably(self.folder / MANIFEST, manifest.encode())
        return manifest

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None


class TokenStore:
    """An opened store: the tokens as if they were one array of shape (tokens,), read from disk as they are asked for.

    tokenizer: the hash that the reader's tokenizer has, when it is known. verify: hash the files first; None: when
    there are few enough of them. Each file is hashed once a process. Raises DataError for a damaged store,
    UsageError when the tokenizer is another.
    """

    def __init__(self, folder: Path | str, *, tokenizer: str | None = None, verify: bool | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if tokenizer is not None and tokenizer != self.manifest.tokenizer:
            found = self.manifest.tokenizer
            what = "the tokens were made with another tokenizer"
            raise UsageError(what, where=str(self.folder), expected=f"hash {tokenizer[:16]}", found=f"hash {found[:16]}", next=BUILD)
        for file in self._files():
            _check_size(self.folder / file.file, file)
        if verify or (verify is None and sum(file.bytes for file in self._files()) <= VERIFIED_ON_OPEN):
            self.verify()
        self._shards = [_mapped(self.folder / shard.file, self.manifest.dtype) for shard in self.manifest.shards]
        self._starts = list(accumulate((shard.entries for shard in self.manifest.shards), initial=0))
        self.document_starts = _mapped(self.folder / INDEX, "<u8")  # (documents + 1,)

    def __len__(self) -> int:
        return self.manifest.tokens

    def verify(self) -> None:
        """Hash every file that this process has not hashed yet; raises DataError that names the damaged one."""
        for file in self._files():
            path = self.folder / file.file
            state = path.stat()
            mark = (str(path.resolve()), state.st_size, state.st_mtime_ns)
            if mark not in _verified:
                found = _hash_file(path)
                if found != file.sha256:
                    raise _damaged("a file of the token store is damaged", path, expected=f"sha256 {file.sha256}", found=f"sha256 {found}")
                _verified.add(mark)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, of shape (n,), with tokens start .. start + n - 1."""
        assert start >= 0 and start + out.size <= len(self), (start, out.size, len(self))
        done, shard = 0, bisect_right(self._starts, start) - 1
        while done < out.size:
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

    def _files(self) -> Iterator[Shard]:
        yield self.manifest.index
        yield from self.manifest.shards


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises DataError when it is missing, damaged, or newer than this program."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError("there is no token store here", where=str(path), found=error.strerror, next=BUILD) from error
    try:
        body = json.loads(raw)
        checksum = body.pop("checksum")
        sound = raw == _spell({**body, "checksum": checksum}) and checksum == hashlib.sha256(_spell(body)).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise _damaged("the manifest of the token store is damaged", path)
    if body.pop("version", None) != VERSION:
        raise DataError("the token store has another format", where=str(path), expected=f"version {VERSION}", next=BUILD)
    try:
        manifest = Manifest(**{**body, "index": Shard(**body["index"]), "shards": tuple(Shard(**shard) for shard in body["shards"])})
        _check_manifest(manifest)
    except (KeyError, TypeError, AssertionError) as error:
        raise _damaged("the manifest of the token store contradicts itself", path, found=str(error)) from error
    return manifest


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _HashedFile:
    """A new file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries, self.bytes = path, 0, 0
        self._handle: BinaryIO = path.open("xb")
        self._digest = hashlib.sha256()

    def write(self, array: np.ndarray) -> None:
        content = array.tobytes()
        self._handle.write(content)
        self._digest.update(content)
        self.entries, self.bytes = self.entries + array.size, self.bytes + len(content)

    def close(self) -> Shard:
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        return Shard(self.path.name, self.entries, self.bytes, self._digest.hexdigest())


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


def _check_size(path: Path, file: Shard) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != file.bytes:
        shown = "no such file" if found is None else f"{found} bytes"
        raise _damaged("a file of the token store is missing or has another size", path, expected=f"{file.bytes} bytes", found=shown)


def _hash_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _damaged(what: str, path: Path, *, expected: str | None = None, found: str | None = None) -> DataError:
    return DataError(what, where=str(path), expected=expected, found=found, next=f"remove {path.parent.parent}, then {BUILD}")


def _spell(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
