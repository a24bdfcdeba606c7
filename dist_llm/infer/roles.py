"""The seams of a model that makes text: as in training, with less Python around a token.

A pass over one token a line is a few dozen small operations, and the operations of `parallel/tensor.py`, which are made
for a backward, would cost more in Python than their arithmetic. Longer passes run the same lines as training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dist_llm import comm
from dist_llm.mesh import Group
from dist_llm.model.kernels import activate
from dist_llm.model.kernels import norm as plain_norm
from dist_llm.model.parts import Adapter, Draw, Norm, Projection, Projections
from dist_llm.parallel.adapted import AdaptedRoles
from dist_llm.parallel.tensor import TensorRoles, beside


class ReadingRoles(TensorRoles):
    """Tensor-parallel roles without gradients; S is 1 in the short forms."""

    one = False

    def short(self, one: bool) -> None:
        """Before a pass: whether it reads one token a line."""
        self.one, self.in_place = one, not one  # in place is an operation with a backward

    def columns(
        self, x: Tensor, norm: Norm, projections: Projections, draw: Draw | None = None, *, any_order: bool = False
    ) -> list[Tensor]:
        """Enters with (B, S, D) before its norm, leaves with (B, S, O_i) for each projection: this rank's output features."""
        if not self.one or not projections.joined or projections.biases:
            return super().columns(x, norm, projections)
        weights = projections.weights
        y = F.linear(_normed(x, norm), beside(weights, 0))
        return list(y.split_with_sizes([len(weight) for weight in weights], dim=-1))

    def row(
        self, parts: Sequence[Tensor], activation: str, projection: Projection, draw: Draw | None = None, *, any_order: bool = False
    ) -> Tensor:
        """Enters with this rank's features (B, S, O), leaves with the sum over ranks (B, S, D), the bias added once."""
        if not self.one:
            return super().row(parts, activation, projection)
        y = comm.all_reduce(F.linear(activate(parts, kind=activation), projection.weight), self.split.group)
        return y if projection.bias is None else y + projection.bias


class ReadingAdaptedRoles(AdaptedRoles):
    """The same of a model under an adapter, which has no short form. Weights stay as they are: rows are measured once."""

    def __init__(self, group: Group, **options: Any) -> None:
        super().__init__(group, **options)
        self.norms: dict[int, Tensor] = {}  # by the address of A: it lives as long as the model

    def norm_of(self, weight: Tensor, adapter: Adapter, group: Group | None) -> Tensor:
        """As AdaptedRoles, kept from the first use on."""
        known = self.norms.get(adapter.a.data_ptr())
        return known if known is not None else self.norms.setdefault(adapter.a.data_ptr(), super().norm_of(weight, adapter, group))

    def short(self, one: bool) -> None:
        """As ReadingRoles."""


def _normed(x: Tensor, norm: Norm) -> Tensor:
    if norm.kind == "rms":
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
    return plain_norm(x, norm.weight, norm.bias, kind=norm.kind, eps=norm.eps)
