"""Are replicas still the same? Every so many steps the ranks compare what they hold twice, to the bit.

What data-parallel ranks, replicas of shards or tensor-parallel ranks hold alike is hashed (the XOR of its words, which no single
flipped bit leaves as it was), and the hashes are compared. What a rank alone holds has nothing to be compared with: its hash is taken
when a step ends, and again when the next one begins. A difference ends the run with exit 6 and the name of the tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_llm import comm
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import NumericError
from dist_llm.mesh import Group
from dist_llm.parallel.weights import FlatWeights

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor) -> Tensor:
    """The XOR of a flat tensor's words, int64 scalar on its device; any one changed bit changes it."""
    narrow = values.view(WORDS[values.element_size()])
    wide = narrow.nbytes % 8 == 0 and narrow.storage_offset() * narrow.element_size() % 8 == 0
    return torch.hash_tensor(narrow.view(torch.int64) if wide else narrow).view(torch.int64)


@dataclass(frozen=True)
class Held:
    """Something that all ranks of a group hold alike; a group of one rank: that this rank alone holds."""

    kind: str
    flat: FlatWeights
    start: int  # of `values` in the unit's buffer
    values: Tensor
    group: Group

    def by_name(self) -> dict[str, int]:
        """The checksum of each parameter's part, by `kind name`."""
        if self.flat.plan.block:  # codes, or scales
            return {f"{self.kind} {self.flat.plan.unit}": int(checksum(self.values))}
        found = {}
        for slot in self.flat.plan.slots:
            low, high = (min(max(at - self.start, 0), self.values.numel()) for at in (slot.offset, slot.offset + slot.numel))
            if low < high:
                found[f"{self.kind} {slot.name}"] = int(checksum(self.values[low:high]))
        return found


def held(engine: NativeEngine) -> Iterator[Held]:
    """Weights and optimizer state of this rank, each with the ranks that hold the same."""
    mesh = engine.mesh
    engine.arrive()
    for frozen in engine.frozen:
        for part in frozen.kept_tensors():
            yield Held("weight", frozen, frozen.own[0], part, mesh.replica if frozen.sharded else mesh.data)
        if not frozen.sharded and not frozen.plan.block:
            yield from _across_tensor_parallel(engine, frozen)
    for flat, moments in zip(engine.flats, engine.moments, strict=True):
        if flat.sharded:
            yield Held("weight", flat, flat.own[0], flat.shard, mesh.replica)
        else:
            yield Held("weight", flat, 0, flat.weights, mesh.data)
        owners = mesh.replica if flat.stage else mesh.data
        for kind, tensor in (("master weight", flat.master), ("first moment", moments.first), ("second moment", moments.second)):
            if tensor is not None and tensor is not flat.owned_weights:
                yield Held(kind, flat, flat.owned[0], tensor, owners)
        if not flat.sharded:
            yield from _across_tensor_parallel(engine, flat)
        if flat.tied is not None and not flat.sharded:
            yield Held("tied weight", flat, 0, flat.weights, flat.tied)


def _across_tensor_parallel(engine: NativeEngine, flat: FlatWeights) -> Iterator[Held]:
    """The weights that tensor-parallel ranks hold alike: norms and biases, and the kv heads that several ranks share."""
    mesh, size = engine.mesh, engine.mesh.tp.size
    for slot in flat.plan.slots if size > 1 else ():
        boxes = [slot.sharding.box(rank) for rank in range(size)]
        run = flat.weights[slot.offset : slot.offset + slot.numel]
        if all(box == boxes[0] for box in boxes):
            yield Held("weight", flat, slot.offset, run, mesh.tp)
        elif mesh.kv.size > 1 and all(boxes[mesh.tp.ranks.index(rank)] == slot.box for rank in mesh.kv.ranks):
            yield Held("weight", flat, slot.offset, run, mesh.kv)


class Digests:
    """The comparisons of a run. every: steps between them; 0: none. Engines around other libraries keep their state to themselves."""

    def __init__(self, engine: NativeEngine, *, every: int) -> None:
        self.engine, self.every = engine, every if isinstance(engine, NativeEngine) else 0
        self.equal_at = 0  # the last step after which all was equal
        self.alone: list[int] | None = None

    def due(self, step: int) -> bool:
        """Whether the state after step `step` is compared."""
        return bool(self.every) and step % self.every == 0

    @torch.no_grad()
    def compare(self, step: int) -> None:
        """After step `step`, on all ranks: raises NumericError on all of them where replicas differ."""
        if not self.every:
            return
        everything = list(held(self.engine))
        shared = [one for one in everything if one.group.size > 1]
        self.alone = self._hash(one for one in everything if one.group.size == 1)
        groups = {one.group.key: one.group for one in shared}
        differs = torch.zeros((), device=self.engine.device)
        with comm.booked_on("control"):
            for key, group in groups.items():
                mine = torch.stack([checksum(one.values).to(self.engine.device) for one in shared if one.group.key == key])
                rows = comm.all_gather(mine, group).view(group.size, -1)
                differs += (rows != rows[0]).any()
            found = float(comm.all_reduce(differs.view(1), self.engine.mesh.world, op="max"))
        if found:
            raise self._failure(shared, step)
        self.equal_at = step

    @torch.no_grad()
    def check(self, step: int) -> None:
        """Before step `step`: raises NumericError on all ranks where something that one rank alone holds has changed since `compare`."""
        before, self.alone = self.alone, None
        if before is None:
            return
        alone = [one for one in held(self.engine) if one.group.size == 1]
        changed = [one for one, old, new in zip(alone, before, self._hash(alone), strict=True) if old != new]
        names = [f"{one.kind} of {one.flat.plan.unit}" for one in changed]
        facts = comm.gather_json(names, self.engine.mesh.world, device=self.engine.device)
        for rank, found in enumerate(facts):
            if found:
                raise NumericError(
                    "what a rank alone holds has changed between two steps",
                    where=f"rank {rank}, before step {step}: {found[0]}",
                    expected=f"the bits that step {step - 1} left",
                    found="other bits: memory of this rank's host or device is not to be trusted",
                    safe=f"it was as it should be after step {step - 1}",
                )

    def _hash(self, some: Any) -> list[int]:
        return [int(checksum(one.values)) for one in some]

    def _failure(self, shared: list[Held], step: int) -> NumericError:
        """Which tensors differ on which ranks: the fewer are wrong, where there are fewer."""
        mine: list[dict[str, Any]] = [{"ranks": list(one.group.ranks), "sums": one.by_name()} for one in shared]
        everything = comm.gather_json(mine, self.engine.mesh.world, device=self.engine.device)
        lines: dict[str, None] = {}
        by_place: dict[tuple[tuple[int, ...], int, str], dict[int, int]] = {}
        for rank, parts in enumerate(everything):
            seen: Counter[tuple[int, ...]] = Counter()
            for part in parts:
                ranks = tuple(part["ranks"])
                for name, value in part["sums"].items():
                    by_place.setdefault((ranks, seen[ranks], name), {})[rank] = value
                seen[ranks] += 1
        for (ranks, _, name), sums in by_place.items():
            counts = Counter(sums.values()).most_common()
            if len(counts) > 1:
                odd = [rank for rank, value in sums.items() if value != counts[0][0]] if counts[0][1] > counts[1][1] else list(ranks)
                who = "rank" if len(odd) == 1 else "ranks"
                lines[f"{name}: {who} {', '.join(map(str, odd))} of {', '.join(map(str, ranks))}"] = None
        first, *more = lines or ["weights"]
        return NumericError(
            "replicas of a tensor differ",
            where=f"after step {step}, {first}",
            expected="the same bits on all of these ranks",
            found=f"{len(lines)} tensors that differ",
            safe=f"all were equal after step {self.equal_at}" if self.equal_at else "they had not been compared before",
            details=more,
        )
