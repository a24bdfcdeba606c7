"""One long line of whole numbers as files of at most so many entries: written and hashed on the way, mapped and compared when read."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dist_llm.data.sealed import compare, damaged

_verified: set[tuple[str, int, int]] = set()  # files hashed by this process: path, size, time of change


@dataclass(frozen=True)
class Shard:
    """A file of a store: its name, entries, bytes and sha256."""

    file: str
    entries: int
    bytes: int
    sha256: str


class HashedFile:
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
        """Append an array."""
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
        """Wait for the disk and let the file go; what there is."""
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


class ShardWriter:
    """Appends numbers to `<prefix>-00000.bin` and so on, each of `limit` entries but the last. kept: what `keep` gave, to go on from.

    finished: called with the number of a shard that is full. Raises DataError when a kept file is not as it was.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        *,
        dtype: np.dtype,
        limit: int,
        kept: dict[str, Any] | None = None,
        finished: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.folder, self.prefix, self.dtype, self.limit, self.finished = folder, prefix, dtype, limit, finished
        self._full = [Shard(**shard) for shard in kept["shards"]] if kept else []
        for shard in self._full:
            compare(folder / shard.file, size=shard.bytes, sha256=shard.sha256, home=folder.parent)
        self._open = HashedFile(folder / kept["open"][0]["file"], kept["open"][0]) if kept and kept["open"] else None

    def write(self, numbers: np.ndarray) -> None:
        """Append numbers, (n,)."""
        numbers = numbers.astype(self.dtype)
        while numbers.size:
            if self._open is None:
                self._open = HashedFile(self.folder / f"{self.prefix}-{len(self._full):05d}.bin")
            room = self.limit - self._open.entries
            self._open.write(numbers[:room])
            numbers = numbers[room:]
            if self._open.entries == self.limit:
                self._finish()

    def keep(self) -> dict[str, Any]:
        """Wait until all is on the disk; what another process needs to go on from here."""
        opened = [asdict(self._open.sync())] if self._open else []
        return {"shards": [asdict(shard) for shard in self._full], "open": opened}

    def close(self) -> tuple[Shard, ...]:
        """All the files, now on the disk."""
        self._finish()
        return tuple(self._full)

    def _finish(self) -> None:
        if self._open is not None:
            self._full.append(self._open.close())
            self._open = None
            self.finished(len(self._full) - 1)


class ShardReader:
    """The numbers of some shards as if they were one array; each file is compared with its hash before it is read, once a process."""

    def __init__(self, folder: Path, shards: Sequence[Shard], *, dtype: str) -> None:
        self.folder, self.shards = folder, shards
        self._unread = set(range(len(shards)))
        self._arrays = [mapped(folder / shard.file, dtype) for shard in shards]
        self._starts = list(accumulate((shard.entries for shard in shards), initial=0))

    def verify(self) -> None:
        """Hash every shard that this process has not hashed yet. Raises DataError."""
        for number in sorted(self._unread):
            verify(self.folder, self.shards[number])
        self._unread.clear()

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, of shape (n,), with entries start .. start + n - 1. Raises DataError when a shard is damaged."""
        assert start >= 0 and start + out.size <= self._starts[-1], (start, out.size, self._starts[-1])
        done, shard = 0, bisect_right(self._starts, start) - 1
        while done < out.size:
            if shard in self._unread:
                verify(self.folder, self.shards[shard])
                self._unread.remove(shard)
            offset = start + done - self._starts[shard]
            part = self._arrays[shard][offset : offset + out.size - done]
            out[done : done + part.size] = part
            done, shard = done + part.size, shard + 1


def verify(folder: Path, file: Shard) -> None:
    """Compare a file with its hash, unless this process has done so since it was changed. Raises DataError."""
    path = folder / file.file
    state = path.stat()
    mark = (str(path.resolve()), state.st_size, state.st_mtime_ns)
    if mark not in _verified:
        compare(path, size=file.bytes, sha256=file.sha256, home=folder.parent)
        _verified.add(mark)


def mapped(path: Path, dtype: str) -> np.ndarray:
    """A file as an array that is read from disk where it is touched. As a plain array: a slice of np.memmap costs ten times as much."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
