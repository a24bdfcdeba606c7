"""Megatron's indexed data sets, read and written: `<name>.bin` holds the ids, `<name>.idx` says where sequences and documents begin.

The index, all little-endian:

    bytes 0-8     MMIDIDX and two zeros
    9-16          uint64    version, 1
    17            uint8     what an id is: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6 and 7 are floats: no ids)
    18-25         uint64    sequences, S
    26-33         uint64    entries of the document index, D: documents + 1
    from 34       int32     S lengths, in ids
                  int64     S places, in bytes of the .bin
                  int64     D numbers: document i is the sequences from entry i to entry i + 1
                  int8      S modes, in data sets of several kinds of data alone; 0 is text

Sequences lie one after the other without a gap, as Megatron writes them: anything else is refused, with file and byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dist_llm.data.binary import BinaryFile, new_file
from dist_llm.data.store import TokenStore

MAGIC = b"MMIDIDX\x00\x00"
EARLIER = b"TNTIDX\x00\x00"  # its ids are written otherwise, and the file says less
VERSION = 1
HEAD = 34  # bytes before the lengths
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
SHORT_VOCAB = 65_500  # Megatron writes uint16 below it, int32 from there on
BLOCK = 1 << 16  # entries that are compared, or ids that are copied, together


@dataclass(frozen=True)
class Indexed:
    """A data set whose index was read and found sound. dtype: of the ids; sequences, documents: how many."""

    index: BinaryFile
    data: BinaryFile
    dtype: str
    sequences: int
    documents: int

    def document_arrays(self) -> Iterator[tuple[np.ndarray, int]]:
        """Each document's ids, a view of the file of shape (ids,), and the byte of the .bin that they begin at.

        The ids were not compared with a vocabulary yet.
        """
        width = np.dtype(self.dtype).itemsize
        places = self.index.array("<i8", at=HEAD + 4 * self.sequences, count=self.sequences)
        bounds = self.index.array("<i8", at=HEAD + 12 * self.sequences, count=self.documents + 1)
        for first in range(0, self.documents, BLOCK):
            edges = bounds[first : first + BLOCK + 1]
            starts = np.full(edges.size, self.data.size, dtype=np.int64)
            inside = edges < self.sequences
            starts[inside] = places[edges[inside]]
            for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
                yield self.data.array(self.dtype, at=start, count=(stop - start) // width), start


def open_indexed(index_path: Path, data_path: Path) -> Indexed:
    """Reads and compares everything that the index says, a block at a time. Raises DataError with file, byte, expected and found."""
    index, data = BinaryFile(index_path), BinaryFile(data_path)
    head = bytes(index.array("u1", at=0, count=min(HEAD, index.size)))
    if head[:8] == EARLIER:
        way = "make it anew by Megatron's tools/preprocess_data.py with --dataset-impl mmap"
        raise index.refused("an index of fairseq, or of Megatron before mmap", byte=0, expected=repr(MAGIC), found=repr(EARLIER), next=way)
    if head[:9] != MAGIC:
        expected = f"{MAGIC!r}, as an index of Megatron begins"
        raise index.refused("this is not a Megatron index", byte=0, expected=expected, found=repr(head[:9]))
    if len(head) < HEAD:
        raise index.refused("the index is cut short", byte=index.size, expected=f"at least {HEAD} bytes", found=f"{index.size} bytes")
    version, code, sequences, entries = struct.unpack("<QBQQ", head[9:])
    if version != VERSION:
        raise index.refused("the index has another format", byte=9, expected=f"version {VERSION}", found=f"version {version}")
    if code not in DTYPES:
        kinds = {6: "float64", 7: "float32"}.get(code, "an unknown one")
        expected = "1 uint8, 2 int8, 3 int16, 4 int32, 5 int64 or 8 uint16"
        raise index.refused("the ids are of a kind that is not read", byte=17, expected=expected, found=f"{code}: {kinds}")
    if not entries:
        raise index.refused("the index has no documents, not even none", byte=26, expected="at least 1 entry", found="0")
    size = HEAD + 12 * sequences + 8 * entries
    if index.size not in (size, size + sequences):
        expected = f"{size} bytes for {sequences} sequences and {entries - 1} documents, {sequences} more where it has modes"
        raise index.refused("the size of the index contradicts its head", byte=18, expected=expected, found=f"{index.size} bytes")
    found = Indexed(index, data, DTYPES[code], sequences, entries - 1)
    _check_sequences(found)
    _check_documents(found)
    if index.size > size:
        modes = index.array("i1", at=size, count=sequences)
        if modes.any():
            first = int(np.flatnonzero(modes)[0])
            raise index.refused("a sequence is not text", byte=size + first, expected="mode 0", found=f"mode {modes[first]}")
    return found


def _check_sequences(found: Indexed) -> None:
    """Lengths are not negative, each sequence begins where the one before has ended, and the last ends with the file."""
    index, width = found.index, np.dtype(found.dtype).itemsize
    place = 0
    for first in range(0, found.sequences, BLOCK):
        count = min(BLOCK, found.sequences - first)
        lengths = index.array("<i4", at=HEAD + 4 * first, count=count).astype(np.int64)
        if (lengths < 0).any():
            bad = int(np.flatnonzero(lengths < 0)[0])
            raise index.refused("a sequence of negative length", byte=HEAD + 4 * (first + bad), expected="at least 0", found=lengths[bad])
        ends = place + width * np.cumsum(lengths)
        expected = np.concatenate([[place], ends[:-1]])
        at = HEAD + 4 * found.sequences + 8 * first
        given = index.array("<i8", at=at, count=count)
        if (given != expected).any():
            bad = int(np.flatnonzero(given != expected)[0])
            what = "a sequence overlaps the one before it" if given[bad] < expected[bad] else "there is a gap before a sequence"
            raise index.refused(what, byte=at + 8 * bad, expected=f"it begins at byte {expected[bad]}", found=f"byte {given[bad]}")
        place = int(ends[-1])
    if place != found.data.size:
        expected_size = f"{place} bytes, as the index says: {place // width} ids of {width}"
        raise found.data.refused("the ids are cut short, or more than the index says", byte=min(place, found.data.size),
                                 expected=expected_size, found=f"{found.data.size} bytes")  # fmt: skip


def _check_documents(found: Indexed) -> None:
    """The document index begins with 0, never falls, and ends with the number of sequences."""
    index, start = found.index, HEAD + 12 * found.sequences
    before = 0
    for first in range(0, found.documents + 1, BLOCK):
        count = min(BLOCK, found.documents + 1 - first)
        edges = index.array("<i8", at=start + 8 * first, count=count)
        if first == 0 and edges[0] != 0:
            raise index.refused("the first document does not begin with the first sequence", byte=start, expected=0, found=edges[0])
        earlier = np.concatenate([[before], edges[:-1]])
        wrong = (edges < earlier) | (edges > found.sequences)
        if wrong.any():
            bad = int(np.flatnonzero(wrong)[0])
            expected = f"{earlier[bad]} to {found.sequences}"
            at = start + 8 * (first + bad)
            raise index.refused("the document index falls, or leads outside", byte=at, expected=expected, found=edges[bad])
        before = int(edges[-1])
    if before != found.sequences:
        at = start + 8 * found.documents
        raise index.refused("the last document does not end with the last sequence", byte=at, expected=found.sequences, found=before)


def write_indexed(store: TokenStore, name: Path) -> list[Path]:
    """Writes a store as `<name>.bin` and `<name>.idx`: one sequence a document, its end token included; returns the paths.

    Ids are uint16 where Megatron would choose it, int32 elsewhere. The store is compared with its hashes as it is read.
    """
    code = 8 if store.manifest.vocab < SHORT_VOCAB else 4
    dtype = np.dtype(DTYPES[code])
    paths = [name.with_name(f"{name.name}{suffix}") for suffix in (".bin", ".idx")]
    with new_file(paths[0]) as data:
        copy_ids(store, data, dtype)
    starts, documents = store.document_starts, store.manifest.documents
    with new_file(paths[1]) as index:
        index.write(MAGIC + struct.pack("<QBQQ", VERSION, code, documents, documents + 1))
        for first in range(0, documents, BLOCK):
            index.write(np.diff(starts[first : first + BLOCK + 1].astype(np.int64)).astype("<i4").tobytes())
        for first in range(0, documents, BLOCK):
            index.write((starts[first : min(documents, first + BLOCK)].astype("<i8") * dtype.itemsize).tobytes())
        for first in range(0, documents + 1, BLOCK):
            index.write(np.arange(first, min(documents + 1, first + BLOCK), dtype="<i8").tobytes())
    return paths


def copy_ids(store: TokenStore, handle: BinaryIO, dtype: np.dtype, *, start: int = 0, stop: int | None = None) -> None:
    """Appends ids start .. stop - 1 of a store to a file, as numbers of another kind."""
    stop = len(store) if stop is None else stop
    for first in range(start, stop, BLOCK):
        block = np.empty(min(BLOCK, stop - first), dtype=np.int64)
        store.read(first, block)
        handle.write(block.astype(dtype).tobytes())
