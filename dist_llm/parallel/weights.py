"""A unit's weights on one rank: whole, or a shard of them that is gathered around each use (ZeRO stage 3).

Weights that are not trained (the base under an adapter) are this and nothing more: they have no gradients, no master copy and
no optimizer state, take no part in norms or reductions, and are divided over the shard group in stage 3 like all others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_llm import comm
from dist_llm.mesh import Mesh
from dist_llm.model.init import initialise
from dist_llm.parallel.flat import FlatPlan, Piece, Slot


class FlatWeights:
    """The parameters of a unit as views of one flat buffer.

    weights (padded,), or nothing between uses in stage 3; shard (padded / N,) this rank's part of it. N: ranks of `mesh.shard`.
    """

    trained = False

    def __init__(self, plan: FlatPlan, mesh: Mesh, *, dtype: torch.dtype, device: torch.device, num_uses: int, shared: bool) -> None:
        layout, group = mesh.layout, mesh.shard
        assert layout.zero or mesh.replica.size == 1, "stage 0 has no shards to replicate"
        self.plan, self.mesh, self.group, self.replica = plan, mesh, group, mesh.replica
        self.stage, self.keep = layout.zero, layout.unshard == "step"
        self.dtype, self.device = dtype, device
        self.own = plan.range(group.index)
        self.weights = torch.zeros(plan.padded, dtype=dtype, device=device)
        self.sharded = self.stage == 3 and group.size > 1
        self.shard = self.weights[slice(*self.own)].clone() if self.sharded else self.weights[slice(*self.own)]
        # .data: in-place writes to the buffer are ours to order, autograd's version counter must not see them.
        views = {slot.name: flat_view(self.weights, slot) for slot in plan.slots}
        self.parameters = [
            {name: nn.Parameter(view.data, requires_grad=self.trained) for name, view in views.items()} for _ in range(num_uses)
        ]
        self.gathering: comm.Pending | None = None
        self.here = not self.sharded  # are the whole weights in memory
        self.tied = mesh.tied if shared else None
        self.counted = mesh.replica.index == 0 and (self.tied is None or self.tied.index == 0)

    # --- build -------------------------------------------------------------------------------------------------------

    def parameter(self, name: str, use: int = 0) -> nn.Parameter:
        """The module's parameter: a view of the flat weights, one object per use so that gradients stay apart."""
        return self.parameters[use][name]

    def initialise(self, *, seed: int) -> None:
        """Fills what this rank holds with the initial weights, then fixes the residency."""
        if self.sharded:
            for piece in self.plan.pieces(self.group.index):
                initialise(self._run(self.shard, piece), piece.slot.row, piece.slot.box, seed=seed, start=piece.start)
        else:
            for slot in self.plan.slots:
                initialise(self.weights[slot.offset : slot.offset + slot.numel], slot.row, slot.box, seed=seed)
        self.settle()

    def settle(self) -> None:
        """After the weights were written: frees what the stage does not keep."""
        self.end_step()

    def kept(self) -> list[tuple[Slot, int, int]]:
        """The runs of weights that this rank keeps between steps: (slot, start, stop)."""
        if self.sharded:
            return [(piece.slot, piece.start, piece.stop) for piece in self.plan.pieces(self.group.index)]
        return [(slot, 0, slot.numel) for slot in self.plan.slots]

    def load(self, read: Callable[[Slot, int, int], Tensor]) -> None:
        """Takes the weights from `read(slot, start, stop)`, a run of the slot's elements, and fixes the residency."""
        if self.sharded:
            for piece in self.plan.pieces(self.group.index):
                self._run(self.shard, piece).copy_(read(piece.slot, piece.start, piece.stop))
        else:
            for slot in self.plan.slots:
                self.weights[slot.offset : slot.offset + slot.numel].copy_(read(slot, 0, slot.numel))
        self.settle()

    # --- around a unit -----------------------------------------------------------------------------------------------

    def start_gather(self) -> None:
        """Stage 3: begins to fetch the whole weights, if they are not here."""
        if not self.here and self.gathering is None:
            self.weights.untyped_storage().resize_(self.plan.padded * self.weights.element_size())  # views keep their identity
            self.gathering = comm.start_all_gather(self.shard, self.group, out=self.weights)

    def finish_gather(self) -> None:
        """Leaves with the whole weights in memory."""
        self.start_gather()
        if self.gathering is not None:
            self.gathering.finish()
            self.gathering, self.here = None, True

    def release(self) -> None:
        """Stage 3: frees the whole weights after a unit's use, unless `unshard=step` keeps them for the step."""
        if not self.keep:
            self.end_step()

    def end_step(self) -> None:
        """Stage 3: frees the whole weights."""
        assert self.gathering is None, self.plan.unit
        if self.sharded:
            self.weights.untyped_storage().resize_(0)
            self.here = False

    # --- state -------------------------------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """The runs of parameters in this rank's shard that this rank answers for (replicas answer once)."""
        mine = self.plan.pieces(self.group.index) if self.counted else []
        return [piece for piece in mine if piece.slot.sharding.owner(self.mesh.at.tp)]

    def kept_tensors(self) -> list[Tensor]:
        """The tensors that this rank keeps between uses."""
        return [self.shard if self.sharded else self.weights]

    def shard_run(self, piece: Piece) -> Tensor:
        """The elements of a piece in this rank's shard of the weights."""
        return self._run(self.shard, piece)

    @staticmethod
    def _run(shard: Tensor, piece: Piece) -> Tensor:
        return shard[piece.at : piece.at + piece.stop - piece.start]


def flat_view(buffer: Tensor, slot: Slot) -> Tensor:
    """The parameter of a slot in a tensor aligned with the unit's buffer."""
    return buffer[slot.offset : slot.offset + slot.numel].view(slot.shape)
