"""Files that are one long line of ids: nanoGPT's, which have no head, and those of llm.c and modded-nanogpt, which have one.

    nanoGPT    uint16 ids from the first byte; uint32 where the vocabulary is larger than 65,536, or where every second
               16-bit word of the first 64 KiB is zero (and not all of them are)
    llm.c      256 int32: a magic number, a version, the number of ids, zeros. 20240520 version 1: uint16 ids follow;
               20240801 version 7: uint32 ids

There are no documents in them but the token that ends one; llm.c's writers put it before each document, nanoGPT's after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_llm.data.binary import BinaryFile, new_file, require_ids
from dist_llm.data.megatron import copy_ids
from dist_llm.data.store import TokenStore
from dist_llm.errors import UsageError

HEAD = 1024  # bytes: 256 int32
HEADS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic -> (version, kind of id)
LOOKED_AT = 1 << 16  # bytes at the beginning of a file without a head
BLOCK = 1 << 20  # ids that are read together
MOST_IDS = 2**31 - 1  # what the head of llm.c can count


@dataclass(frozen=True)
class Stream:
    """A file of ids whose head and size were found sound. dtype: of the ids; at: the byte they begin at; count: how many."""

    file: BinaryFile
    dtype: str
    at: int
    count: int

    @property
    def first(self) -> int | None:
        """The first id; None where there is none."""
        return int(self.file.array(self.dtype, at=self.at, count=1)[0]) if self.count else None

    def blocks(self, *, vocab: int) -> Iterator[tuple[np.ndarray, int]]:
        """The ids in blocks, int64 of shape (n,), each with the byte it begins at. Raises DataError for an id that is not below `vocab`."""
        width = np.dtype(self.dtype).itemsize
        for first in range(0, self.count, BLOCK):
            at = self.at + first * width
            ids = self.file.array(self.dtype, at=at, count=min(BLOCK, self.count - first))
            require_ids(ids, vocab=vocab, file=self.file, at=at)
            yield ids.astype(np.int64), at


def open_stream(path: Path, *, vocab: int) -> Stream:
    """Reads and compares the head, where there is one, and the size. Raises DataError with file, byte, expected and found."""
    file = BinaryFile(path)
    head = file.array("<i4", at=0, count=min(256, file.size // 4))
    magic = int(head[0]) if head.size else 0
    if magic in HEADS:
        return _with_head(file, head, magic)
    if head.size == 256 and not head[3:].any() and head[:3].any():
        expected = " or ".join(map(str, HEADS)) + ", or ids without a head"
        raise file.refused("this looks like a head of 256 numbers, of a kind that is not known", byte=0, expected=expected, found=magic)
    words = file.array("<u2", at=0, count=min(file.size, LOOKED_AT) // 4 * 2)
    wide = vocab > 1 << 16 or (words.size > 0 and not words[1::2].any() and words[::2].any())
    dtype = "<u4" if wide else "<u2"
    width = np.dtype(dtype).itemsize
    if file.size % width:
        expected = f"a multiple of {width}: {'uint32' if wide else 'uint16'} ids"
        raise file.refused("the last id is cut short", byte=file.size - file.size % width, expected=expected, found=f"{file.size} bytes")
    return Stream(file, dtype, 0, file.size // width)


def _with_head(file: BinaryFile, head: np.ndarray, magic: int) -> Stream:
    version, dtype = HEADS[magic]
    width = np.dtype(dtype).itemsize
    if head.size < 256:
        raise file.refused("the head is cut short", byte=file.size, expected=f"at least {HEAD} bytes", found=f"{file.size} bytes")
    if head[1] != version:
        expected = f"version {version}, which goes with {magic}"
        raise file.refused("the head is of another format", byte=4, expected=expected, found=f"version {head[1]}")
    if head[2] < 0 or HEAD + width * int(head[2]) != file.size:
        expected = f"{max(0, file.size - HEAD) / width:g} ids of {width} bytes, by the size of the file"
        raise file.refused("the head says another number of ids than there are", byte=8, expected=expected, found=f"{head[2]} ids")
    if head[3:].any():
        first = 3 + int(np.flatnonzero(head[3:])[0])
        raise file.refused("the head holds what is not known", byte=4 * first, expected="0", found=head[first])
    return Stream(file, dtype, HEAD, int(head[2]))


def write_plain(store: TokenStore, path: Path) -> Path:
    """Writes a store as nanoGPT reads it: ids alone, each document followed by its end. uint16, or uint32 for more than 65,536 ids."""
    with new_file(path) as handle:
        copy_ids(store, handle, np.dtype("<u2" if store.manifest.vocab <= 1 << 16 else "<u4"))
    return path


def write_headed(store: TokenStore, path: Path) -> Path:
    """Writes a store as llm.c reads it: a head, then the ids, each document after its end token. Raises UsageError for 2^31 ids."""
    if len(store) > MOST_IDS:
        what, expected = "these are more ids than the head of such a file can count", f"at most {MOST_IDS}"
        raise UsageError(what, where=str(path), expected=expected, found=str(len(store)), next="use --format megatron or nanogpt")
    magic = 20240520 if store.manifest.vocab <= 1 << 16 else 20240801
    version, dtype = HEADS[magic]
    head = np.zeros(256, dtype="<i4")
    head[:3] = magic, version, len(store)
    with new_file(path) as handle:
        handle.write(head.tobytes())
        handle.write(np.array([store.manifest.end_id], dtype=dtype).tobytes())
        copy_ids(store, handle, np.dtype(dtype), stop=len(store) - 1)
    return path
