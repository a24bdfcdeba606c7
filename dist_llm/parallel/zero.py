"""ZeRO stages 0-3 (arXiv:1910.02054): one residency table and three moments of a unit.

| stage | weights | gradients       | optimizer | unit's backward done | around a unit     | after the update |
|-------|---------|-----------------|-----------|----------------------|-------------------|------------------|
| 0     | whole   | whole           | whole     | reduce (*)           |                   |                  |
| 1     | whole   | whole until (*) | shard     | reduce_scatter (*)   |                   | all_gather (**)  |
| 2     | whole   | shard           | shard     | reduce_scatter, free |                   | all_gather (**)  |
| 3     | shard   | shard           | shard     | reduce_scatter, free | all_gather / free |                  |

(*) after the last micro-batch. That is `reduce=step`; with `reduce=micro_batch` every micro-batch is reduced into a
shard and the whole buffer lives only during the unit's backward. Either value goes with any stage. Stage 0 reduces by
reduce_scatter and all_gather, so that all stages take the same sums in the same order: they are equal to the bit.
(**) begun when the unit is updated, waited for where the next step first reads it.

Gradients live from a unit's first backward of a step to the update: where activations are most, with one micro-batch,
there are none yet.

"Shard" is over the ranks of `mesh.shard`: all of the data group, or with the layout key `shard` some neighbours in it
(hybrid sharding, arXiv:2304.11277). The ranks of `mesh.replica` then hold the same shard: its gradient, complete inside
the shard group, is summed over them once a step, each rank adding up an equal part and all gathering the parts, so that
replicas stay equal to the bit. Weights never travel between replicas.

A unit's parameters are views of one flat buffer; gradients accumulate in float32 at least. A tied weight has one
accumulator per use, added once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dist_llm import comm
from dist_llm.mesh import Mesh
from dist_llm.model.init import initialise
from dist_llm.parallel.flat import FlatPlan, Piece, Slot
from dist_llm.parallel.weights import FlatWeights, flat_view


class FlatUnit(FlatWeights):
    """One trained unit's parameters on this rank, as the residency table says.

    master (owned,) float32 weights beside bfloat16 ones, else the weights themselves, and in host memory with `offload`. During a
    step, per use: whole (padded,) gradients not yet reduced, and sums (padded / N,) of reduced ones. `owned` is the range of the
    buffer that this rank updates: all of it in stage 0, its shard otherwise.
    """

    trained = True

    def __init__(self, plan: FlatPlan, mesh: Mesh, *, fixed: bool, **options: Any) -> None:
        """fixed: gradients are added in rank order. The other options are those of FlatWeights."""
        super().__init__(plan, mesh, **options)
        self.fixed, self.by_step = fixed, mesh.layout.reduce == "step"
        self.offload = mesh.layout.offload == "optimizer"
        self.gradient_dtype = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        self.owned = self.own if self.stage else (0, plan.padded)
        self.whole: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.reducing: dict[int, comm.Pending] = {}
        self.crossing: comm.Pending | None = None  # the sum over replicas, of this rank's part of the shard
        self.spreading: comm.Pending | None = None  # parts on their way to all who own them
        self.gradient: Tensor | None = None  # (owned,) between the last backward and the update
        self.seen: Callable[[FlatUnit, Tensor], None] | None = None  # gets this rank's own gradients before they are reduced

    # --- build -------------------------------------------------------------------------------------------------------

    def initialise(self, *, seed: int) -> None:
        """Fills what this rank holds with the initial weights, then fixes the residency."""
        super().initialise(seed=seed)

        def made(slot: Slot, start: int, stop: int) -> Tensor:
            out = torch.empty(stop - start, dtype=self.gradient_dtype, device=self.device)
            return initialise(out, slot.row, slot.box, seed=seed, start=start)

        self._fill_masters(made)

    def settle(self) -> None:
        """After the weights were written: makes the master copy and frees what the stage does not keep."""
        low = self.own[0] if self.sharded else 0
        mine = self.shard if self.sharded else self.weights
        mine = mine[self.owned[0] - low : self.owned[1] - low]
        self.owned_weights = mine
        apart = self.offload or self.dtype != self.gradient_dtype
        self.master = mine.to("cpu" if self.offload else self.device, self.gradient_dtype, copy=True) if apart else mine
        super().settle()

    def load(self, read: Callable[[Slot, int, int], Tensor]) -> None:
        """As FlatWeights; master weights have all the digits that `read` gives."""
        super().load(read)
        self._fill_masters(read)

    def _fill_masters(self, read: Callable[[Slot, int, int], Tensor]) -> None:
        """Gives master weights the digits that bfloat16 weights have lost."""
        if self.dtype != self.gradient_dtype:
            for piece in self.owned_pieces():
                self.master[piece.at : piece.at + piece.stop - piece.start].copy_(read(piece.slot, piece.start, piece.stop))

    # --- backward ----------------------------------------------------------------------------------------------------

    def begin_backward(self, use: int) -> None:
        """Gives backward the place to add this use's gradients: products add there themselves, autograd the rest."""
        assert use not in self.reducing, self.plan.unit
        if use not in self.whole:
            self.whole[use] = torch.zeros(self.plan.padded, dtype=self.gradient_dtype, device=self.device)
        if self.dtype == self.gradient_dtype:
            for slot in self.plan.slots:
                self.parameters[use][slot.name].grad = flat_view(self.whole[use], slot)

    def end_backward(self, use: int) -> None:
        """Takes over what autograd has added up beside the place, because it is bfloat16."""
        for slot in self.plan.slots:
            parameter = self.parameters[use][slot.name]
            if parameter.grad is not None and self.dtype != self.gradient_dtype:
                flat_view(self.whole[use], slot).add_(parameter.grad)
            parameter.grad = None

    def start_reduce(self, use: int) -> None:
        """Begins the reduce-scatter of a use's gradients over the shard group.

        `reduce=step`: once, when the last use of this stage is done, the uses added first. `micro_batch`: each use by itself.
        """
        if self.by_step:
            for other in [other for other in self.whole if other]:
                self.whole[0].add_(self.whole.pop(other))
            use = 0
        buffer = self.whole[use]
        if self.seen is not None:
            self.seen(self, buffer)
        self._sum_partial(buffer)
        out = buffer[slice(*self.own)] if self.by_step and not self.stage else None  # stage 0 gathers the whole again
        assert use not in self.reducing
        self.reducing[use] = comm.start_reduce_scatter(buffer, self.group, fixed=self.fixed, out=out)

    def collect(self) -> None:
        """Finishes the reductions under way; with `reduce=micro_batch` adds them to the shard's sums. Frees what was reduced.

        `step`: the shard is complete inside its group, so its sum over replicas begins, while backward goes on below; in stage 0,
        which has no replicas, its way to all ranks.
        """
        for use in list(self.reducing):
            reduced = self.reducing.pop(use).finish()  # the others' parts are free before the sum over replicas makes its own
            if use in self.sums:
                self.sums[use].add_(reduced)
            else:
                self.sums[use] = reduced
            if self.stage or not self.by_step:
                del self.whole[use]
            if self.by_step:
                self.crossing = self._start_sum_of_replicas(self.sums[use])
                if not self.stage and self.tied is None:
                    self._start_spread()

    def start_crossing(self) -> None:
        """After the last micro-batch: begins the sum over replicas, if `collect` did not."""
        self.collect()
        if self.crossing is None and self.spreading is None:
            for other in [other for other in self.sums if other]:
                self.sums[0].add_(self.sums.pop(other))
            self.crossing = self._start_sum_of_replicas(self.sums[0])

    def _start_sum_of_replicas(self, shard: Tensor) -> comm.Pending:
        """The pending's result is this rank's part of the shard, summed; the other parts are not."""
        part = shard.view(self.replica.size, -1)[self.replica.index]
        return comm.start_reduce_scatter(shard, self.replica, fixed=self.fixed, out=part)

    def start_finish(self) -> comm.Pending:
        """After the last micro-batch: the pending's result is the global gradient of the owned range, for `finish`."""
        self.start_crossing()
        if self.spreading is None:
            self._start_spread()
        assert self.spreading is not None
        pending, self.spreading = self.spreading, None
        return pending

    def _start_spread(self) -> None:
        """Begins to gather the parts that ranks have summed: over replicas, in stage 0 over all."""
        assert self.crossing is not None
        part, self.crossing = self.crossing.finish(), None
        if self.tied is not None:
            comm.all_reduce(part, self.tied)  # the other use of the weight, on the last or first stage
        if self.stage:
            self.spreading = comm.start_all_gather(part, self.replica, out=self.sums[0])
        else:
            self.spreading = comm.start_all_gather(part, self.group, out=self.whole.get(0))

    def finish(self, pending: comm.Pending) -> None:
        """Leaves with the gradient of the owned range alone, and in stage 3 with a shard of the weights."""
        self.gradient = pending.finish()
        self.whole.clear()
        self.sums.clear()
        self.end_step()

    def _sum_partial(self, buffer: Tensor) -> None:
        """Adds up gradients of which each tensor-parallel rank has only a part (Sharding.partial)."""
        for group, shared in ((self.mesh.tp, False), (self.mesh.kv, True)):
            slots = [s for s in self.plan.slots if s.sharding.partial and (s.row.role == "column") == shared]
            if slots and group.size > 1:
                joined = torch.cat([buffer[s.offset : s.offset + s.numel] for s in slots])
                comm.all_reduce(joined, group)
                for slot, part in zip(slots, joined.split([s.numel for s in slots]), strict=True):
                    buffer[slot.offset : slot.offset + slot.numel].copy_(part)

    @cached_property
    def _halves(self) -> list[tuple[str, bool, list[Piece]]]:
        """The runs of this rank's shard by half of a block, or unit, and whether this rank counts them."""
        found: dict[tuple[str, bool], list[Piece]] = {}
        for piece in self.plan.pieces(self.group.index):
            once = self.counted and piece.slot.sharding.owner(self.mesh.at.tp)
            found.setdefault((piece.slot.row.half, once), []).append(piece)
        return [(half, once, pieces) for (half, once), pieces in found.items()]

    def square_sums(self) -> dict[str, Tensor]:
        """By half of a block, or unit: the sum of the squares of this rank's shard of the gradient, float64.

        Elements held twice are counted once. A replica that is not finite makes the sum NaN, so that no rank takes the update.
        """
        assert self.gradient is not None
        found: dict[str, Tensor] = {}
        for half, once, pieces in self._halves:
            some = [self.own_run(self.gradient, piece) for piece in pieces]  # one kernel on a GPU, without a float64 copy of the gradient
            squares = float(once) * torch.stack(torch._foreach_norm(some, 2, dtype=torch.float64)).square().sum()
            found[half] = found[half] + squares if half in found else squares
        return found

    # --- update ------------------------------------------------------------------------------------------------------

    def segments(self) -> Iterator[tuple[slice, bool]]:
        """(run inside the owned range, takes weight decay) for each shard that this rank updates."""
        shards = range(self.group.size) if self.stage == 0 else [self.group.index]
        for shard in shards:
            for start, stop, decay in self.plan.segments(shard):
                yield slice(start - self.owned[0], stop - self.owned[0]), decay

    def publish(self) -> None:
        """After the update: casts the master weights and, in stages 1 and 2, begins to share the new shards.

        They travel beside what comes now; `finish_gather` before the unit's next use, or `arrive`, waits for them.
        """
        if self.master is not self.owned_weights and not self.offload:  # from host memory they have come back already
            self.owned_weights.copy_(self.master)
        if self.stage in (1, 2):
            self.gathering, self.here = comm.start_all_gather(self.shard, self.group, out=self.weights), False

    def arrive(self) -> None:
        """Stages 1 and 2: leaves with the whole weights as they are since the update."""
        if not self.sharded:
            self.finish_gather()

    # --- state -------------------------------------------------------------------------------------------------------

    def owned_pieces(self) -> list[Piece]:
        """The runs of parameters in the owned range; `at` is counted inside it."""
        if self.stage:
            return self.plan.pieces(self.group.index)
        return [Piece(slot, 0, slot.numel, slot.offset) for slot in self.plan.slots]

    def own_run(self, owned: Tensor, piece: Piece) -> Tensor:
        """The elements of a piece in a tensor aligned with the owned range."""
        return self._run(self._own_part(owned), piece)

    def _own_part(self, owned: Tensor) -> Tensor:
        return owned[self.own[0] - self.owned[0] : self.own[1] - self.owned[0]]
