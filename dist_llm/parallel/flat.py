"""Packing the parameters of a unit into one padded buffer: pure arithmetic, without torch.

The buffer exists for communication and for the optimizer; parameters keep their identity as views of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from dist_llm.model.table import Row
from dist_llm.sharding import Box, Sharding, shard

ALIGN = 8  # elements: every parameter and shard starts on 16 bytes in bfloat16, which fast GPU kernels want


@dataclass(frozen=True)
class Slot:
    """One parameter inside a unit's flat buffer: elements [offset, offset + numel) are its local box, row-major."""

    row: Row
    sharding: Sharding
    box: Box
    offset: int

    @property
    def name(self) -> str:
        """Global name."""
        return self.row.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Local shape."""
        return tuple(stop - start for start, stop in self.box)

    @property
    def numel(self) -> int:
        """Local number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's local elements inside one shard of the flat buffer."""

    slot: Slot
    start: int  # first element, counted inside the slot's box
    stop: int
    at: int  # where the run begins in the shard


@dataclass(frozen=True)
class FlatPlan:
    """A unit's parameters packed into one padded buffer, cut into equal shards.

    Parameters with weight decay come first, so that a shard has at most two optimizer segments.
    """

    unit: str
    slots: tuple[Slot, ...]
    used: int
    decayed: int  # elements below this offset take weight decay
    shards: int
    padded: int

    @property
    def trained(self) -> bool:
        """Whether the unit's parameters are trained: all of them or none."""
        return self.slots[0].row.trained

    @property
    def beside(self) -> bool:
        """Whether it is an adapter's, which no base has."""
        return self.slots[0].row.beside

    @property
    def block(self) -> int:
        """Elements that share a scale where the unit is quantized, else 0."""
        return self.slots[0].row.block

    @property
    def shard_size(self) -> int:
        """Elements of one shard."""
        return self.padded // self.shards

    def range(self, shard: int) -> tuple[int, int]:
        """The (start, stop) of a shard in the buffer."""
        return shard * self.shard_size, (shard + 1) * self.shard_size

    def segments(self, shard: int) -> list[tuple[int, int, bool]]:
        """(start, stop, decay) runs of a shard in buffer positions, padding left out."""
        start, stop = self.range(shard)
        runs = [(start, min(stop, self.decayed), True), (max(start, self.decayed), min(stop, self.used), False)]
        return [run for run in runs if run[0] < run[1]]

    def pieces(self, shard: int) -> list[Piece]:
        """The runs of parameters inside a shard."""
        start, stop = self.range(shard)
        found = []
        for slot in self.slots:
            low, high = max(start, slot.offset), min(stop, slot.offset + slot.numel)
            if low < high:
                found.append(Piece(slot, low - slot.offset, high - slot.offset, low - start))
        return found


def pack(rows: Iterable[Row], *, unit: str, tp: int, sp: bool, coordinate: int, shards: int, replicas: int = 1) -> FlatPlan:
    """Packs a unit's rows as tp coordinate `coordinate` holds them; the buffer divides into `shards` equal parts.

    replicas: ranks that hold the same shard; it divides by their number, so that they can sum it in equal parts.
    """
    rows = list(rows)
    slots: list[Slot] = []
    offset, decayed, align = 0, 0, max(ALIGN, rows[0].block)
    for row in [*(r for r in rows if r.decay), *(r for r in rows if not r.decay)]:
        sharding = shard(row, tp=tp, sp=sp)
        slots.append(Slot(row, sharding, sharding.box(coordinate), offset))
        offset += -(-slots[-1].numel // align) * align
        decayed = offset if row.decay else decayed
    used = slots[-1].offset + slots[-1].numel
    block = align * shards * replicas
    return FlatPlan(unit, tuple(slots), used, min(decayed, used), shards, -(-offset // block) * block)
