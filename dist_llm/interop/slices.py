"""Slices of a Hugging Face folder under our names: what a rank holds is read, and nothing else.

Rows that a box holds whole lie side by side and are one read; columns of rows are a read per row. GPT-2 keeps its matrices
transposed, so there our rows are their columns. Nothing is kept: a slice costs its own memory, twice while it is transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from dist_llm.interop.hugging_face import HuggingFaceFolder, Source
from dist_llm.sharding import Box

TORCH = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in TORCH.items()}
PIECE = 4 << 20  # elements of a streamed tensor at a time


class Slices:
    """Reads our tensors from theirs. read_bytes: of weights, headers left out."""

    def __init__(self, folder: HuggingFaceFolder) -> None:
        self.folder, self._before = folder, folder.bytes_read

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read so far."""
        return self.folder.bytes_read - self._before

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a global tensor, (stop - start,) on the CPU, in the dtype of the file."""
        assert kind == "weight", kind
        source = self.folder.sources[name]
        (low, high), (left, right) = (*box, (0, 1))[:2]
        width = right - left
        assert 0 <= start < stop <= (high - low) * width, (name, box, start, stop)
        first, last = low + start // width, low + (stop - 1) // width + 1  # our rows that the run touches
        if source.place.transposed:
            values = _block(source, left, right, source.place.first + first, source.place.first + last).t().reshape(-1)
            return values[start - (first - low) * width : stop - (first - low) * width]
        if right - left == prod(source.shape[1:]):  # whole rows: one piece of the file
            at = source.stored.start + ((source.place.first + low) * width + start) * source.stored.width
            return _read(source, [(at, stop - start)])
        row = source.shape[1]
        runs = []
        for number in range(first, last):
            a, b = max(start - (number - low) * width, 0), min(stop - (number - low) * width, width)
            runs.append((source.stored.start + ((source.place.first + number) * row + left + a) * source.stored.width, b - a))
        return _read(source, runs)

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """The dtype in which a tensor is kept."""
        return TORCH[self.folder.sources[name].stored.dtype]

    def whole(self, name: str) -> Tensor:
        """A whole tensor in our shape."""
        shape = self.folder.sources[name].shape
        return self.read("weight", name, tuple((0, extent) for extent in shape), 0, prod(shape)).view(shape)

    def stream(self, name: str) -> Iterator[Tensor]:
        """A whole tensor row-major, in pieces that are bounded; a transposed one is one piece."""
        source = self.folder.sources[name]
        count, box = prod(source.shape), tuple((0, extent) for extent in source.shape)
        step = count if source.place.transposed else PIECE
        for at in range(0, count, step):
            yield self.read("weight", name, box, at, min(at + step, count))


def _block(source: Source, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Rows [top, bottom) and columns [left, right) of the stored matrix."""
    stored, row = source.stored, source.stored.shape[1]
    runs = [(stored.start + (number * row + left) * stored.width, right - left) for number in range(top, bottom)]
    if right - left == row:
        runs = [(stored.start + top * row * stored.width, (bottom - top) * row)]
    return _read(source, runs).view(bottom - top, right - left)


def _read(source: Source, runs: list[tuple[int, int]]) -> Tensor:
    """The elements of runs (first byte, elements), one behind the other."""
    width = source.stored.width
    out = torch.empty(sum(count for _, count in runs), dtype=TORCH[source.stored.dtype])
    target, at = out.view(torch.uint8).numpy().data, 0
    for start, count in runs:
        source.file.read_into(target[at : at + count * width], start)
        at += count * width
    return out
