"""A run begins with the weights of a base instead of initial ones: each rank reads the slices that it holds, a unit at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dist_llm.engines.native import NativeEngine
from dist_llm.errors import NumericError
from dist_llm.model.table import table
from dist_llm.sharding import Box
from dist_llm.train.base import Base
from dist_llm.train.nonfinite import bad_state
from dist_llm.train.parts import Source, Staged
from dist_llm.train.storage import together

MOMENTS = ("first_moment", "second_moment")


class ByUnit:
    """A source whose slices are kept while their unit is filled: bfloat16 weights and their float32 masters ask for the same ones."""

    def __init__(self, source: Source, units: Mapping[str, str]) -> None:
        self.source, self.units = source, units
        self.unit = ""
        self.held: list[tuple[str, Box, int, int, Tensor]] = []

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a global tensor; moments are zero before the first step."""
        if kind in MOMENTS:
            return torch.zeros(stop - start)
        if self.units[name] != self.unit:
            self.unit, self.held = self.units[name], []
        for held, where, first, last, values in self.held:
            if held == name and where == box and first <= start and stop <= last:
                return values[start - first : stop - first]
        values = self.source.read(kind, name, box, start, stop)
        self.held.append((name, box, start, stop, values))
        return values


def take_base(engine: NativeEngine, base: Base) -> list[int]:
    """Gives an engine the weights of a base; moments are zero and the count of updates is 0. Returns the bytes that each rank read.

    Raises CheckpointError or NumericError on all ranks alike.
    """
    mesh, device = engine.mesh, engine.device

    staged: list[Staged] = []

    def take() -> int:
        source = base.source()
        if isinstance(engine, NativeEngine):
            read = ByUnit(source, {row.name: row.unit for row in table(base.model)}).read
            if engine.frozen:  # what is trained lies beside the base, and starts from its own initial weights
                engine.load_frozen(read)
            else:
                engine.load_state(read, count=0)
        else:
            staged.append(Staged(source, engine.wanted(), fresh=MOMENTS))
        return source.bytes_read

    def bad() -> list[str]:
        return bad_state(engine.state())[:3]

    counts: list[int] = together(mesh, device, take)
    if isinstance(engine, NativeEngine):
        engine.begin_adapter()
    if staged:  # other libraries may speak to their ranks while they take weights: by now nothing can fail
        engine.load_state(staged[0].read, count=0)
    base.close()
    for rank, names in enumerate(together(mesh, device, bad)):
        if names:
            what, where = "the base holds numbers that are not finite", f"{base.path}, rank {rank}"
            raise NumericError(what, where=where, expected="finite numbers", details=names)
    return counts


def begin(engine: NativeEngine, base: Base, *, tell: Callable[[dict[str, Any]], None]) -> int:
    """`take_base` for a run; returns the number of steps done, which is 0."""
    counts = take_base(engine, base)
    tell({"base": {"path": str(base.path), "bytes": counts}})
    return 0
