"""Weights that are kept in 4 or 8 bits and made whole for each use of their unit (QLoRA, arXiv:2305.14314).

A rank keeps codes and scales of all it would hold, or in stage 3 of its shard. Around a unit the shards' codes are gathered, which
costs a quarter of what weights cost, and the weights are made in the dtype of the run; afterwards they go. So beside codes a rank has
the weights of the units in use, one or two, and nothing else of the model. Everything behind it is that of other weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_llm import comm
from dist_llm.mesh import Mesh
from dist_llm.model.quantize import code_bytes, dequantize, quantize
from dist_llm.parallel.flat import FlatPlan, Piece, Slot
from dist_llm.parallel.weights import FlatWeights


class QuantizedWeights(FlatWeights):
    """As FlatWeights. codes, scales: of the whole buffer, or of this rank's shard of it."""

    def __init__(self, plan: FlatPlan, mesh: Mesh, *, kind: str, **options: Any) -> None:
        super().__init__(plan, mesh, **options)
        self.rule: dict[str, Any] = {"kind": kind, "block": plan.block}
        self.coming: list[comm.Pending] = []
        count = plan.shard_size if self.sharded else plan.padded
        self.codes = torch.zeros(code_bytes(count, kind), dtype=torch.uint8, device=self.device)
        self.scales = torch.zeros(count // plan.block, dtype=torch.float32, device=self.device)

    def settle(self) -> None:
        """After the weights were written: keeps their codes alone."""
        codes, scales = quantize(self.shard if self.sharded else self.weights, **self.rule)
        self.codes.copy_(codes)
        self.scales.copy_(scales)
        self.shard = self.shard.new_empty(0)
        self._let_go()

    def load(self, read: Callable[[Slot, int, int], Tensor]) -> None:
        """As FlatWeights; what is read is quantized."""
        if self.sharded:
            self.shard = torch.zeros(self.plan.shard_size, dtype=self.dtype, device=self.device)
        else:
            self._make_room()
            self.weights.zero_()
        super().load(read)

    def start_gather(self) -> None:
        """Stage 3: begins to fetch the codes and scales of the whole unit."""
        if self.sharded and not self.here and not self.coming:
            self.coming = [comm.start_all_gather(part, self.group) for part in (self.codes, self.scales)]

    def finish_gather(self) -> None:
        """Leaves with the whole weights in memory."""
        if self.here:
            return
        self.start_gather()
        codes, scales = (pending.finish() for pending in self.coming) if self.sharded else (self.codes, self.scales)
        self.coming = []
        self._make_room()
        dequantize(codes, scales, self.weights, **self.rule)
        self.here = True

    def release(self) -> None:
        """The whole weights go, unless `unshard=step` keeps what was gathered for the step."""
        if not (self.sharded and self.keep):
            self.end_step()

    def end_step(self) -> None:
        """The whole weights go."""
        assert not self.coming, self.plan.unit
        self._let_go()

    def shard_run(self, piece: Piece) -> Tensor:
        """The elements of a piece in this rank's shard, as they are used."""
        block, kind = self.rule["block"], self.rule["kind"]
        first = piece.at if self.sharded else self.own[0] + piece.at
        stop = first + piece.stop - piece.start
        out = torch.empty(stop - first, dtype=self.dtype, device=self.device)
        codes = self.codes[code_bytes(first, kind) : code_bytes(stop, kind)]
        return dequantize(codes, self.scales[first // block : stop // block], out, **self.rule)

    def kept_tensors(self) -> list[Tensor]:
        """Codes and scales."""
        return [self.codes, self.scales]

    def _make_room(self) -> None:
        self.weights.untyped_storage().resize_(self.plan.padded * self.weights.element_size())  # views keep their identity

    def _let_go(self) -> None:
        self.weights.untyped_storage().resize_(0)
        self.here = False
