"""The seams of the model: where activations enter and leave regions that a strategy may split.

A block calls `columns` where one input, normed, feeds projections whose outputs may be split, and `row` where they come
back; `across` norms queries and keys over all heads, which may be split; `embed` and `loss` are the two ends over the
vocabulary; `outside` cuts per-token values to the tokens that this rank keeps between those regions. `Roles` is the
single-device version in plain torch; `parallel/tensor.py` offers the same methods for a tensor-parallel group, as
operations that keep little for backward.

Legend: B batch, S sequence, D dim, O output features, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_llm.model.kernels import activate
from dist_llm.model.loss import IGNORED, cross_entropy
from dist_llm.model.parts import Draw, Norm, Projection, Projections
from dist_llm.model.preference import Pairs


class Roles:
    """Single device: plain linear algebra. in_place: what `columns` leaves may be overwritten."""

    in_place = True

    def __init__(self, *, smoothing: float = 0.0) -> None:
        self.smoothing = smoothing

    def columns(
        self, x: Tensor, norm: Norm, projections: Projections, draw: Draw | None = None, *, any_order: bool = False
    ) -> list[Tensor]:
        """(B, S, D) before its norm -> a (B, S, O_i) for each projection. draw: of an adapter's dropout; None: nothing is dropped.

        any_order: up to the `row` that follows nothing depends on which token comes where, so that they may come in another order.
        """
        x = norm(x)
        return [part(x, draw) for part in projections.parts]

    def row(
        self, parts: Sequence[Tensor], activation: str, projection: Projection, draw: Draw | None = None, *, any_order: bool = False
    ) -> Tensor:
        """Parts (B, S, O), made one by the activation ("none": there is one), and a weight (D, O) -> (B, S, D)."""
        return projection(activate(parts, kind=activation), draw)

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Tokens (B, S) and weight (V, D) -> (B, S, D)."""
        return F.embedding(tokens, weight)

    def across(self, parts: Sequence[Tensor], norms: Sequence[Norm]) -> list[Tensor]:
        """Queries and keys (B, S, H E), each normed over all its heads together; shapes stay."""
        return [norm(part) for part, norm in zip(parts, norms, strict=True)]

    def loss(
        self,
        x: Tensor,
        norm: Norm,
        weight: Tensor,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        pairs: Pairs | None = None,
        softcap: float = 0.0,
        smooth: bool = True,
    ) -> Tensor:
        """(B, S, D) before its norm, weight (V, D), labels and weights of tokens (B, S) -> the summed cross-entropy, a float64 scalar.

        pairs: what is made of the losses instead of their sum. softcap c: logits become c tanh(logits / c). smooth: in training.
        """
        if pairs is not None:
            logits = self.logits(norm(x), weight).flatten(0, 1)
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            return pairs.figures(F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="none").double())
        rules = {"smoothing": self.smoothing if smooth else 0.0, "softcap": softcap}
        counts = None if weights is None else weights.flatten()
        return cross_entropy(norm(x).flatten(0, 1), weight, labels.flatten(), weights=counts, **rules)

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, S, D) and weight (V, D) -> (B, S, V), whole: for sampling and for tests."""
        return F.linear(x, weight)

    def outside(self, per_token: Tensor) -> Tensor:
        """(B, S, ...) -> the tokens kept outside the split regions: here all of them."""
        return per_token
