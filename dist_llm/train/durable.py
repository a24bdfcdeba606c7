"""Durable files: every effect of a save on the file system is one method of `Disk`, so that a test can record and replay them.

What a crash leaves for certain is the bytes of a file after `sync` and the names in a folder after `sync_folder`; all else
may be there, in part, in any order, or not at all. Torch-free.

Bytes are hashed with XXH3 (128 bits), at nine times the speed of SHA-256 where this was measured: a hash is to find damage, not a
forger, who could write the hashes too. A second thread hashes a large piece while the first one writes it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from dist_llm import faults

BLOCK = 1 << 18  # bytes that are hashed together, and so the least that a reader of tensors reads
LARGE = 1 << 20  # bytes of a piece that is hashed beside its writing
Bytes = bytes | memoryview


class Digest:
    """The hash of each block of a file, taken while its bytes pass, and one of all: that of these hashes, for bytes are hashed once."""

    def __init__(self, data: Bytes = b"") -> None:
        self.size, self._blocks = 0, [xxh3_128()]
        self.update(data)

    def update(self, data: Bytes) -> None:
        """Takes the next bytes."""
        rest = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while len(rest):
            if self.size == len(self._blocks) * BLOCK:
                self._blocks.append(xxh3_128())
            part = rest[: len(self._blocks) * BLOCK - self.size]
            self._blocks[-1].update(part)
            self.size, rest = self.size + len(part), rest[len(part) :]

    @property
    def blocks(self) -> list[str]:
        """The hash of each block of BLOCK bytes, the last one shorter; none of an empty file."""
        return [block.hexdigest() for block in self._blocks] if self.size else []

    @property
    def about(self) -> dict[str, Any]:
        """`{"bytes", "xxh128"}`, as a manifest keeps it."""
        return {"bytes": self.size, "xxh128": xxh3_128("".join(self.blocks).encode()).hexdigest()}


class Disk:
    """The file system as a save uses it. rank, step: for fault points. Every method raises OSError that names the file."""

    def __init__(self, *, rank: int = 0, step: int = 0) -> None:
        self.rank, self.step = rank, step
        self.moved = 0  # bytes written and read back so far

    def reach(self, point: str) -> None:
        """Passes a fault point."""
        faults.reach(point, rank=self.rank, step=self.step)

    def make_folder(self, path: Path) -> None:
        """Makes a folder in one that is there."""
        path.mkdir()

    def write(self, path: Path, chunks: Iterable[Bytes]) -> Digest:
        """Writes a new file and hashes what it should hold. Nothing of it is on the disk for certain."""
        digest = Digest()
        with _named(path), path.open("xb", buffering=0) as handle, ThreadPoolExecutor(1) as beside:  # its thread begins with its first work
            for chunk in chunks:
                size = memoryview(chunk).nbytes
                hashed = beside.submit(digest.update, chunk) if size >= LARGE else None
                if hashed is None:
                    digest.update(chunk)
                _write_all(handle, chunk)
                self.moved += size
                if hashed is not None:
                    hashed.result()
                self.reach("save.write")
        return digest

    def sync(self, path: Path) -> None:
        """Waits until the bytes of a file are on the disk."""
        with _named(path), path.open("rb+") as handle:
            os.fsync(handle.fileno())

    def sync_folder(self, path: Path) -> None:
        """Waits until the names in a folder are on the disk."""
        with _named(path):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file or folder another name in the same folder."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """Deletes a file."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Deletes an empty folder."""
        path.rmdir()

    def remove_tree(self, path: Path) -> None:
        """Deletes a folder of files, what is in it first."""
        for inner in sorted(path.iterdir()):
            if inner.is_dir() and not inner.is_symlink():
                self.remove_tree(inner)
            else:
                self.remove(inner)
            self.reach("retain.delete")
        self.remove_folder(path)

    def read_back(self, path: Path) -> Digest:
        """Hashes the blocks of a file as the disk gives it back: what the system remembers of it is dropped first, where it can be."""
        digest = Digest()
        with _named(path), path.open("rb", buffering=0) as handle:
            with contextlib.suppress(OSError):
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while chunk := handle.read(BLOCK):
                digest.update(chunk)
                self.moved += len(chunk)
        return digest


def _write_all(handle: Any, chunk: Bytes) -> None:
    rest = memoryview(chunk)
    while len(rest):
        rest = rest[handle.write(rest) :]


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error inside names the file: the system itself names it only when it is opened."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
