"""A run's tensors on disk, in the key space of global names and boxes: written under one layout, read under any other.

    rank-00000.safetensors   `kind/name/start` -> a run of one tensor's elements (n,)
    rank-00000.json          for each key: the box the run lies in, and its (start, stop) counted row-major inside the box

Each rank writes what it answers for, so that together the files hold every element once. A reader takes a run of any
box; where boxes are cut alike that is a slice of a file, otherwise elements are matched by their place in the global tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dist_llm.engines.native import Item
from dist_llm.errors import CheckpointError
from dist_llm.sharding import Box

CHUNK = 1 << 20  # elements matched at a time: bounds the int64 temporaries


@dataclass(frozen=True)
class StoredRun:
    """Where a file holds elements [start, stop) of a box of one tensor."""

    file: str
    key: str
    box: Box
    start: int
    stop: int


def file_names(rank: int) -> tuple[str, str]:
    """The names of a rank's tensors and of their index."""
    return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


def write_part(folder: Path, rank: int, items: Iterable[Item]) -> list[Path]:
    """Writes what one rank answers for; returns the paths of its two files (not yet flushed to the disk)."""
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for item in items:
        key = f"{item.kind}/{item.piece.slot.name}/{item.piece.start}"
        assert key not in tensors, key
        tensors[key] = item.values.detach().to("cpu", copy=True)
        index[key] = {"box": item.piece.slot.box, "start": item.piece.start, "stop": item.piece.stop}
    data, about = (folder / name for name in file_names(rank))
    save_file(tensors, data)
    about.write_text(json.dumps(index, separators=(",", ":")))
    return [data, about]


class Parts:
    """The tensors of a folder that ranks have written. shapes: of every global tensor, by name."""

    def __init__(self, folder: Path, ranks: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.folder, self.shapes = folder, shapes
        self.runs: dict[tuple[str, str], list[StoredRun]] = {}
        self._open: dict[str, Any] = {}
        for rank in range(ranks):
            data, about = file_names(rank)
            for key, entry in json.loads((folder / about).read_text()).items():
                kind, name, _ = key.split("/")
                box = tuple((low, high) for low, high in entry["box"])
                self.runs.setdefault((kind, name), []).append(StoredRun(data, key, box, entry["start"], entry["stop"]))

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a global tensor, (stop - start,) on the CPU; reads no more than it needs.

        Raises CheckpointError when an element is missing.
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

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A whole global tensor."""
        shape = self.shapes[name]
        return self.read(kind, name, tuple((0, extent) for extent in shape), 0, prod(shape)).view(shape)

    def close(self) -> None:
        """Lets the files go."""
        self._open.clear()

    def _values(self, run: StoredRun, where: slice | Tensor) -> Tensor:
        """The elements of a stored run at `where`: a slice, or places in rising order."""
        if run.file not in self._open:
            self._open[run.file] = safe_open(self.folder / run.file, framework="pt")
        stored = self._open[run.file].get_slice(run.key)
        if isinstance(where, slice):
            return stored[where]
        low, high = int(where[0]), int(where[-1]) + 1
        return stored[low:high][where - low]


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
