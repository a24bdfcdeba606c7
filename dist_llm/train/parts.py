"""A run's tensors on disk, in the key space of global names and boxes: written under one layout, read under any other.

    rank-00000.safetensors   `kind/name/start` -> a run of one tensor's elements (n,)
    rank-00000.json          runs: for each key the box the run lies in, and its (start, stop) counted row-major inside the box;
                             blocks: the hash of each 256 KiB of the other file

Each rank writes what it answers for, so that together the files hold every element once. A reader takes a run of any
box; where boxes are cut alike that is a slice of a file, otherwise elements are matched by their place in the global tensor.
It reads the blocks that the run lies in and nothing else, and compares each with its hash before a byte of it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from dist_llm.engines.native import Item, Wanted
from dist_llm.errors import CheckpointError
from dist_llm.sharding import Box
from dist_llm.strict import first_line, is_count, strict_json
from dist_llm.train.durable import BLOCK, Bytes, Digest, Disk
from dist_llm.train.folder import XXH128, damaged, require_hash

CHUNK = 1 << 20  # elements matched at a time: bounds the int64 temporaries
LARGEST_HEADER = 100 << 20  # bytes, as the safetensors library has it
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def file_names(rank: int) -> tuple[str, str]:
    """The names of a rank's tensors and of their index."""
    return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


# --- write ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one rank writes: its runs by key, and their elements (n,) in the order in which they lie in the file."""

    runs: dict[str, dict[str, Any]]
    tensors: list[Tensor]

    @property
    def header(self) -> bytes:
        """The head of the safetensors file: the length of a JSON text, and that text, filled up to 8 bytes."""
        entries, at = {}, 0
        for key, tensor in zip(self.runs, self.tensors, strict=True):
            entries[key] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
            at += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def chunks(self) -> Iterator[Bytes]:
        """The bytes of the file; a tensor on a device is brought over when its turn comes."""
        yield self.header
        for tensor in self.tensors:
            yield tensor.to("cpu").contiguous().view(torch.uint8).numpy().data


def part_of(items: Iterable[Item]) -> Part:
    """What a rank answers for, as it is to be written. The tensors are those of the engine, not copies."""
    found: dict[str, Item] = {}
    for item in items:
        key = f"{item.kind}/{item.piece.slot.name}/{item.piece.start}"
        assert key not in found, key
        found[key] = item
    keys = sorted(found, key=lambda key: -found[key].values.element_size())  # wide elements first, so that all lie on their width
    pieces = {key: found[key].piece for key in keys}
    runs = {key: {"box": piece.slot.box, "start": piece.start, "stop": piece.stop} for key, piece in pieces.items()}
    return Part(runs, [found[key].values.detach() for key in keys])


class Stage:
    """Host memory for the copy of a part, made at the first use and used again."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def copy(self, part: Part) -> Part:
        """The part as it is now, in host memory: the engine may go on."""
        if [(old.shape, old.dtype) for old in self.buffers] != [(new.shape, new.dtype) for new in part.tensors]:
            pinned = any(tensor.device.type == "cuda" for tensor in part.tensors)
            self.buffers = [torch.empty(new.shape, dtype=new.dtype, device="cpu", pin_memory=pinned) for new in part.tensors]
        for buffer, tensor in zip(self.buffers, part.tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        if any(tensor.device.type == "cuda" for tensor in part.tensors):
            torch.cuda.synchronize()
        return Part(part.runs, self.buffers)


def write_part(disk: Disk, folder: Path, rank: int, part: Part) -> dict[str, Digest]:
    """Writes what one rank answers for; returns what its two files should hold (they are not yet flushed to the disk)."""
    data, about = file_names(rank)
    digest = disk.write(folder / data, part.chunks())
    text = json.dumps({"blocks": digest.blocks, "runs": part.runs}, separators=(",", ":")).encode()
    return {data: digest, about: disk.write(folder / about, [text])}


# --- read ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredRun:
    """Where a file holds elements [start, stop) of a box of one tensor."""

    file: str
    key: str
    box: Box
    start: int
    stop: int


class HashedFile:
    """A file of which only bytes are given out whose block has been compared with its hash."""

    def __init__(self, path: Path, blocks: list[str]) -> None:
        self.path, self.blocks = path, blocks
        self.size, self.bytes_read = path.stat().st_size, 0
        self.seen: set[int] = set()  # numbers of the blocks that were read and are sound
        self._handle = path.open("rb", buffering=0)
        self._last = (-1, memoryview(b""))
        if len(blocks) != -(-self.size // BLOCK):
            raise damaged("the index of a file does not fit it", path, expected=f"{len(blocks)} blocks", found=f"{self.size} bytes")

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop). Raises CheckpointError where a block of them is damaged."""
        first, end = start // BLOCK, -(-stop // BLOCK)
        held = self._last[1] if self._last[0] == first and first < end else memoryview(b"")
        fetched = self._fetch(first + bool(held), end)
        if held and end == first + 1:
            return held[start - first * BLOCK : stop - first * BLOCK]
        whole = memoryview(bytearray().join((held, fetched))) if held else fetched
        if first < end:
            self._last = (end - 1, whole[(end - 1 - first) * BLOCK :])
        return whole[start - first * BLOCK : stop - first * BLOCK]

    def _fetch(self, first: int, end: int) -> memoryview:
        """Blocks [first, end), each compared with its hash."""
        size = max(0, min(end * BLOCK, self.size) - first * BLOCK)
        content, at = memoryview(bytearray(size)), 0
        try:
            while at < size and (got := os.preadv(self._handle.fileno(), [content[at:]], first * BLOCK + at)):
                at += got
        except OSError as error:
            raise damaged("a file of the checkpoint cannot be read", self.path, found=error.strerror) from None
        self.bytes_read += at
        for number in range(first, end):
            block = content[(number - first) * BLOCK : (number + 1 - first) * BLOCK]
            part = f" of bytes {number * BLOCK} to {number * BLOCK + len(block)}"
            require_hash(self.path, xxh3_128_hexdigest(block), expected=self.blocks[number], part=part)
            self.seen.add(number)
        return content

    def close(self) -> None:
        """Lets the file go."""
        self._handle.close()
        self._last = (-1, memoryview(b""))


def read_header(file: HashedFile) -> dict[str, tuple[torch.dtype, int, int]]:
    """key -> (dtype, first byte, last byte + 1) of a safetensors file of runs. Raises CheckpointError where it is not sound."""
    try:
        assert file.size >= 8, "shorter than a header"
        size = int.from_bytes(file.read(0, 8), "little")
        assert size <= min(LARGEST_HEADER, file.size - 8), "the length of the header"
        entries, found, at = strict_json(bytes(file.read(8, 8 + size))), {}, 8 + size
        for key, entry in entries.items():
            assert entry.keys() == {"dtype", "shape", "data_offsets"}, f"{key}: its keys"
            dtype, (count,), (start, stop) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            assert all(is_count(number) for number in (count, start, stop)) and count > 0, f"{key}: a count"
            assert (8 + size + start, stop - start) == (at, count * dtype.itemsize), f"{key}: its place"
            found[key], at = (dtype, at, 8 + size + stop), 8 + size + stop
        assert at == file.size, "the end of the last tensor"
        return found
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError, AttributeError) as error:
        raise damaged("the header of a file contradicts itself", file.path, found=first_line(error)) from None


def read_index(text: bytes, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], dict[str, tuple[Box, int, int]]]:
    """(blocks, key -> (box, start, stop)) of an index. Raises CheckpointError where it is not sound."""
    try:
        index = strict_json(text)
        assert index.keys() == {"blocks", "runs"}, "its keys"
        assert type(index["blocks"]) is list and all(XXH128.fullmatch(block) for block in index["blocks"]), "a hash"
        runs = {}
        for key, entry in index["runs"].items():
            _, name, first = key.split("/")
            assert entry.keys() == {"box", "start", "stop"} and all(len(side) == 2 for side in entry["box"]), f"{key}: its keys"
            box, start, stop = tuple((low, high) for low, high in entry["box"]), entry["start"], entry["stop"]
            assert all(is_count(number) for number in (start, stop, *(end for side in box for end in side))), f"{key}: a count"
            inside = (low < high <= extent for (low, high), extent in zip(box, shapes[name], strict=True))
            assert all(inside) and start < stop <= prod(high - low for low, high in box) and first == str(start), f"{key}: its place"
            runs[key] = (box, start, stop)
        return index["blocks"], runs
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError, AttributeError) as error:
        raise damaged("the index of a file contradicts itself", path, found=first_line(error)) from None


class Parts:
    """The tensors of a folder that ranks have written. shapes: of every global tensor, by name; files: as the manifest has them."""

    def __init__(
        self, folder: Path, ranks: int, shapes: Mapping[str, tuple[int, ...]], *, files: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        self.folder, self.shapes, self.index_bytes = folder, shapes, 0
        self.runs: dict[tuple[str, str], list[StoredRun]] = {}
        self._blocks: dict[str, list[str]] = {}
        self._counts: dict[str, dict[str, int]] = {}
        self._open: dict[str, tuple[HashedFile, dict[str, tuple[torch.dtype, int, int]]]] = {}
        for rank in range(ranks):
            data, about = file_names(rank)
            text = self._read_index(folder / about, files[about]["xxh128"] if files else None)
            self._blocks[data], runs = read_index(text, folder / about, shapes)
            self._counts[data] = {key: stop - start for key, (_, start, stop) in runs.items()}
            for key, (box, start, stop) in runs.items():
                kind, name, _ = key.split("/")
                self.runs.setdefault((kind, name), []).append(StoredRun(data, key, box, start, stop))
        for (kind, name), stored in self.runs.items():
            if not _holds_once(stored, prod(shapes[name])):
                raise damaged(f"the indices do not hold every element of {kind} {name} once", folder)

    def _read_index(self, path: Path, expected: str | None) -> bytes:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise damaged("a file of the checkpoint cannot be read", path, found=error.strerror) from None
        self.index_bytes += len(text)
        if expected is not None:
            require_hash(path, Digest(text).about["xxh128"], expected=expected)
        return text

    @property
    def bytes_read(self) -> int:
        """Bytes read of the folder so far, indices among them."""
        return self.index_bytes + sum(file.bytes_read for file, _ in self._open.values())

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a global tensor, (stop - start,) on the CPU; reads no more than the blocks it needs.

        Raises CheckpointError when an element is missing or a block is damaged.
        """
        out, found = None, 0
        for run in self.runs.get((kind, name), ()):
            for wanted, stored in _matches(self.shapes[name], box, (start, stop), run):
                values = self._values(run, stored)
                out = values.new_empty(stop - start) if out is None else out
                out[wanted] = values
                found += values.numel()
        if out is None or found != stop - start:
            lacks = f"{found} of {stop - start} elements"
            raise CheckpointError(f"the checkpoint does not hold all of {kind} {name}", where=str(self.folder), found=lacks)
        return out

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """The dtype in which a tensor is kept. Raises CheckpointError where there is none."""
        for run in self.runs.get((kind, name), ()):
            return self._file(run.file)[1][run.key][0]
        raise CheckpointError(f"the checkpoint does not hold {kind} {name}", where=str(self.folder))

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A whole global tensor."""
        shape = self.shapes[name]
        return self.read(kind, name, tuple((0, extent) for extent in shape), 0, prod(shape)).view(shape)

    def seen(self) -> dict[str, list[int]]:
        """The numbers of the blocks of each file that were read, and are sound."""
        return {name: sorted(file.seen) for name, (file, _) in self._open.items()}

    def verify_blocks(self, places: Iterable[tuple[str, int]]) -> None:
        """Reads and compares blocks (file, number). Raises CheckpointError."""
        for name, number in places:
            file, _ = self._file(name)
            file.read(number * BLOCK, min((number + 1) * BLOCK, file.size))

    def blocks(self) -> list[tuple[str, int]]:
        """Every block of every file of tensors."""
        return [(name, number) for name, hashes in self._blocks.items() for number in range(len(hashes))]

    def close(self) -> None:
        """Lets the files go."""
        for file, _ in self._open.values():
            file.close()
        self._open.clear()

    def _file(self, name: str) -> tuple[HashedFile, dict[str, tuple[torch.dtype, int, int]]]:
        """An opened file and its header, which agrees with the index."""
        if name not in self._open:
            try:
                file = HashedFile(self.folder / name, self._blocks[name])
            except OSError as error:
                raise damaged("a file of the checkpoint cannot be read", self.folder / name, found=error.strerror) from None
            header = read_header(file)
            if {key: (stop - start) // dtype.itemsize for key, (dtype, start, stop) in header.items()} != self._counts[name]:
                raise damaged("the header of a file does not fit its index", self.folder / name)
            self._open[name] = file, header
        return self._open[name]

    def _values(self, run: StoredRun, where: slice | Tensor) -> Tensor:
        """The elements of a stored run at `where`: a slice, or places in rising order."""
        file, header = self._file(run.file)
        dtype, at, _ = header[run.key]
        low, high = (where.start, where.stop) if isinstance(where, slice) else (int(where[0]), int(where[-1]) + 1)
        content = file.read(at + low * dtype.itemsize, at + high * dtype.itemsize)
        values = torch.frombuffer(content, dtype=torch.uint8).view(dtype)
        return values if isinstance(where, slice) else values[where - low]


class Source(Protocol):
    """Weights, and perhaps moments, of which any slice can be read."""

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a global tensor, (stop - start,) on the CPU."""


class Staged:
    """Runs of tensors that were read, and so verified, before any weight changes; an engine takes them from here.

    fresh: kinds that are not there, and zero: the moments before a first step.
    """

    def __init__(self, parts: Source, wanted: Iterable[Wanted], *, fresh: Collection[str] = ()) -> None:
        self.fresh = fresh
        self.runs: dict[tuple[str, str, Box], list[tuple[int, int, Tensor]]] = {}
        for want in wanted:
            if want.kind in fresh:
                continue
            held = self.runs.setdefault((want.kind, want.name, want.box), [])
            if not any(start <= want.start and want.stop <= stop for start, stop, _ in held):
                held.append((want.start, want.stop, parts.read(want.kind, want.name, want.box, want.start, want.stop)))

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a global tensor, (stop - start,)."""
        if kind in self.fresh:
            return torch.zeros(stop - start)
        for first, last, values in self.runs.get((kind, name, box), ()):
            if first <= start and stop <= last:
                return values[start - first : stop - first]
        raise AssertionError(f"the engine did not say that it wants {kind} {name}")


def _holds_once(runs: list[StoredRun], count: int) -> bool:
    """Whether runs hold `count` elements and none of them twice: their boxes are equal or apart, their ranges in a box too."""
    ranges: dict[Box, list[tuple[int, int]]] = {}
    for run in runs:
        ranges.setdefault(run.box, []).append((run.start, run.stop))
    for held in ranges.values():
        held.sort()
        if any(stop > start for (_, stop), (start, _) in pairwise(held)):
            return False
    apart = all(any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(one, two, strict=True)) for one, two in combinations(ranges, 2))
    return apart and sum(run.stop - run.start for run in runs) == count


Place = slice | Tensor


def _matches(shape: tuple[int, ...], box: Box, wanted: tuple[int, int], run: StoredRun) -> Iterator[tuple[Place, Place]]:
    """Pairs (place in the wanted run, place in the stored run) of the elements that both hold."""
    if any(a[1] <= b[0] or b[1] <= a[0] for a, b in zip(box, run.box, strict=True)):
        return
    start, stop = wanted
    ours, theirs = (0, 0) if box == run.box else (_offset(shape, box), _offset(shape, run.box))
    if ours is not None and theirs is not None:  # both lie in one piece in the same line of elements
        low, high = max(ours + start, theirs + run.start), min(ours + stop, theirs + run.stop)
        if low < high:
            yield slice(low - ours - start, high - ours - start), slice(low - theirs - run.start, high - theirs - run.start)
        return
    for at in range(start, stop, CHUNK):
        local = torch.arange(at, min(at + CHUNK, stop))
        there, inside = _translate(local, box, run.box)
        inside &= (there >= run.start) & (there < run.stop)
        if inside.any():
            yield local[inside] - start, there[inside] - run.start


def _offset(shape: tuple[int, ...], box: Box) -> int | None:
    """Where a box begins in the global tensor, if it lies there in one piece: cut in its first dimension only."""
    whole = all((low, high) == (0, extent) for (low, high), extent in zip(box[1:], shape[1:], strict=True))
    return box[0][0] * prod(shape[1:]) if whole else None


def _translate(local: Tensor, box: Box, other: Box) -> tuple[Tensor, Tensor]:
    """Row-major places inside `box` -> (the same elements' places inside `other`, whether they lie in it)."""
    there, inside, stride, rest = torch.zeros_like(local), torch.ones_like(local, dtype=torch.bool), 1, local
    for (low, high), (first, last) in zip(reversed(box), reversed(other), strict=True):
        place = rest % (high - low) + low
        inside &= (place >= first) & (place < last)
        there += (place - first) * stride
        rest, stride = rest // (high - low), stride * (last - first)
    return there, inside
