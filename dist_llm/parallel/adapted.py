"""Column and row over weights that are not trained, with or without an adapter on them (`correction.py`).

Of a column-parallel W each rank has rows of W, B and m and all of A: what it adds to A's gradient comes from its own rows, so that
gradient is a partial sum over tp. Of a row-parallel W each rank has columns of W and A and all of B and m: its part of y is a part of
the sum that W x goes through anyway, and the gradients of B and m are the partial ones. LoRA adds no collective to a block. DoRA adds
one a use of a row-parallel W: the sum of the squares of its rows.

No gradient is made for W. What is kept for backward is what goes in; A x is computed again, it costs R / out of the product.

Legend: as in `tensor.py`; R rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from dist_llm.mesh import Group
from dist_llm.model.kernels import activate, activate_backward
from dist_llm.model.parts import Adapter, Draw, Norm, Projection, Projections
from dist_llm.parallel.correction import Correction, row_norms
from dist_llm.parallel.tensor import Rule, Split, TensorRoles, finish_gather, gather, own, reduce, start_gather, start_reduce


class AdaptedRoles(TensorRoles):
    """The seams of a model whose own weights stay as they are."""

    draws = True

    def columns(
        self, x: Tensor, norm: Norm, projections: Projections, draw: Draw | None = None, *, any_order: bool = False
    ) -> list[Tensor]:
        """Enters with (B, S', D) before its norm, leaves with (B, S, O_i) for each projection: this rank's output features."""
        corrections = [self._correction(part, draw, columns=True) for part in projections.parts]
        frozen = [(part.weight, part.bias) for part in projections.parts]
        given = (Rule(norm.kind, norm.eps), self.order(any_order, draw), frozen, corrections)
        return list(AdaptedColumn.apply(x, norm.weight, norm.bias, *given, *_trained(corrections)))

    def row(
        self, parts: Sequence[Tensor], activation: str, projection: Projection, draw: Draw | None = None, *, any_order: bool = False
    ) -> Tensor:
        """Enters with this rank's features (B, S, O), leaves with the sum over ranks (B, S', D), the bias added once."""
        correction = self._correction(projection, draw, columns=False)
        split = self.order(any_order, draw)
        y = AdaptedRow.apply(activation, split, projection.weight, correction, len(parts), *parts, *_trained([correction]))
        return y if projection.bias is None else y + projection.bias

    def norm_of(self, weight: Tensor, adapter: Adapter, group: Group | None) -> Tensor:
        """The lengths of the rows of W + s B A, (O,); group: the ranks that its columns are cut over."""
        return row_norms(weight, adapter, group)

    def _correction(self, projection: Projection, draw: Draw | None, *, columns: bool) -> Correction | None:
        """What is on a projection in this use of it. columns: its outputs are cut over ranks, not its inputs."""
        adapter, group = projection.adapter, None if columns else self.split.group
        if adapter is None:
            return None
        norm = None
        if adapter.m is not None:  # in the digits of m, so that c is 1 where m begins
            norm = self.norm_of(projection.weight, adapter, group).to(adapter.m.dtype)
        return Correction.of(adapter, norm, draw, group)


def _trained(corrections: Sequence[Correction | None]) -> list[Tensor]:
    """A, B and where there is one m of each adapter: what gradients are made for."""
    adapters = [correction.adapter for correction in corrections if correction is not None]
    return [matrix for adapter in adapters for matrix in (adapter.a, adapter.b, adapter.m) if matrix is not None]


class AdaptedColumn(Function):
    """The norm of an input and its projections."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor | None,
        rule: Rule,
        split: Split,
        frozen: Sequence[tuple[Tensor, Tensor | None]],
        corrections: Sequence[Correction | None],
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        """x (B, S', D), weights (O_i, D) with biases (O_i,) or None, and what is on them -> (B, S, O_i)."""
        ctx.rule, ctx.split, ctx.corrections, ctx.weights = rule, split, corrections, [weight for weight, _ in frozen]
        ctx.save_for_backward(x, gain, shift)
        return tuple(own(y) for y in columns_forward(rule(x, gain, shift), frozen, corrections, split))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """By x (B, S', D), and by A, B and m of each adapter."""
        x, gain, shift = ctx.saved_tensors
        flat = [slope.flatten(0, 1) for slope in slopes]
        by_normed, trained = columns_backward(flat, ctx.rule(x, gain, shift), ctx.weights, ctx.corrections, ctx.split)
        by_x, _, _ = ctx.rule.backward(by_normed, x, gain, shift)
        return by_x, *[None] * 6, *trained


def columns_forward(
    x: Tensor, frozen: Sequence[tuple[Tensor, Tensor | None]], corrections: Sequence[Correction | None], split: Split
) -> list[Tensor]:
    """x (B, S', D), normed, weights (O_i, D) with biases (O_i,) or None, and what is on them -> (B, S, O_i)."""
    whole, products, outputs = gather(x, split).flatten(0, 1), split.products("output"), []
    for (weight, bias), correction in zip(frozen, corrections, strict=True):
        late = None if correction is None or correction.norm is None else bias  # c leaves the bias alone
        y = products.forward(whole, weight, bias if late is None else None)
        if correction is not None:
            correction.add(y, whole, weight)
        outputs.append(y if late is None else y.add_(late))
    return [y.unflatten(0, (x.shape[0], -1)) for y in outputs]


def columns_backward(
    slopes: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], corrections: Sequence[Correction | None], split: Split
) -> tuple[Tensor, list[Tensor]]:
    """Slopes (T, O_i), x (B, S', D), normed -> (by x (B, S', D), by A, B and m of each adapter, made while by x travels)."""
    gathering, products = start_gather(x, split), split.products("output")
    by_whole, inner = None, []
    for slope, weight, correction in zip(slopes, weights, corrections, strict=True):
        scaled = slope if correction is None else correction.scaled(slope)
        by_whole = products.by_input(scaled, weight, total=by_whole)
        del scaled  # before the next one
        if correction is not None:
            inner.append((correction, slope, correction.by_input(slope, weight, by_whole), weight))
    assert by_whole is not None
    whole = finish_gather(gathering, split).flatten(0, 1)
    reducing = start_reduce(by_whole.unflatten(0, (x.shape[0], -1)), split)
    trained: list[Tensor] = []
    for correction, slope, by_low, weight in inner:
        trained += correction.by_trained(slope, by_low, whole, weight)
    return reducing.finish(), trained


class AdaptedRow(Function):
    """An activation and the projection behind it, summed over ranks."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, split: Split, weight: Tensor, correction: Correction | None, count: int, *matrices: Tensor
    ) -> Tensor:
        """Weight (D, F), `count` parts (B, S, F), then what is trained on it -> (B, S', D)."""
        parts = matrices[:count]
        ctx.activation, ctx.split, ctx.weight, ctx.correction = activation, split, weight, correction
        ctx.save_for_backward(*parts)
        return row_forward(activate(parts, kind=activation), weight, correction, split)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """By each part, in whose memory it lies behind an activation: a graph is good for one backward; and by what is trained."""
        parts, weight, correction = ctx.saved_tensors, ctx.weight, ctx.correction
        whole, by_wide, by_low = row_slopes(slope, weight, correction, ctx.split)
        flat = [part.detach().flatten(0, 1) for part in parts]
        if ctx.activation == "none":
            wide, slopes = flat[0], [by_wide.view(parts[0].shape)]
        else:
            wide, slopes = activate_backward(by_wide, flat, kind=ctx.activation), [part.detach() for part in parts]
        trained = [] if correction is None or by_low is None else correction.by_trained(whole, by_low, wide, weight)
        return *[None] * 5, *slopes, *trained


def row_forward(wide: Tensor, weight: Tensor, correction: Correction | None, split: Split) -> Tensor:
    """wide (B, S, F), weight (D, F) and what is on it -> the sum over ranks (B, S', D)."""
    batch, flat = len(wide), wide.flatten(0, 1)
    y = split.products("input").forward(flat, weight)
    if correction is not None:
        correction.add(y, flat, weight)
    del wide, flat  # before the sum over ranks takes its own
    return reduce(y.unflatten(0, (batch, -1)), split)


def row_slopes(slope: Tensor, weight: Tensor, correction: Correction | None, split: Split) -> tuple[Tensor, Tensor, Tensor | None]:
    """Slope (B, S', D) -> (of all tokens (T, D), by the input (T, F), behind A (T, R), where there is one)."""
    whole = gather(slope.contiguous(), split).flatten(0, 1)
    by_wide = split.products("input").by_input(whole if correction is None else correction.scaled(whole), weight)
    return whole, by_wide, None if correction is None else correction.by_input(whole, weight, by_wide)
