"""Column and row over weights that are not trained, with or without an adapter on them (LoRA, arXiv:2106.09685).

    y = W x + s B A x       W as it came, A (R, in), B (out, R), s = alpha / rank

Of a column-parallel W each rank has rows of W and B and all of A: what it adds to A's gradient comes from its own rows, so that
gradient is a partial sum over tp. Of a row-parallel W each rank has columns of W and A and all of B: its B A x is a part of the sum
that W x goes through anyway, and B's gradient is the partial one. No collective is added to a block.

No gradient is made for W. What is kept for backward is what goes in; A x is computed again, it costs R / out of the product.

Legend: as in `tensor.py`; R rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function

from dist_llm.model.kernels import activate, activate_backward
from dist_llm.model.parts import Adapter, Norm, Projection, Projections
from dist_llm.parallel.tensor import Rule, Split, TensorRoles, finish_gather, finish_reduce, gather, own, reduce, start_gather, start_reduce


class AdaptedRoles(TensorRoles):
    """The seams of a model whose own weights stay as they are."""

    def columns(self, x: Tensor, norm: Norm, projections: Projections) -> list[Tensor]:
        """Enters with (B, S', D) before its norm, leaves with (B, S, O_i) for each projection: this rank's output features."""
        adapters, weights = projections.adapters, projections.weights
        given = [adapter for adapter in adapters if adapter is not None]
        scales = [None if adapter is None else adapter.scale for adapter in adapters]
        biases = [part.bias for part in projections.parts]
        trained = [matrix for adapter in given for matrix in (adapter.a, adapter.b)]
        rule = Rule(norm.kind, norm.eps)
        return list(AdaptedColumn.apply(x, norm.weight, norm.bias, rule, self.split, scales, *weights, *biases, *trained))

    def row(self, parts: Sequence[Tensor], activation: str, projection: Projection) -> Tensor:
        """Enters with this rank's features (B, S, O), leaves with the sum over ranks (B, S', D), the bias added once."""
        adapter = projection.adapter
        a, b, scale = (None, None, 0.0) if adapter is None else (adapter.a, adapter.b, adapter.scale)
        y = AdaptedRow.apply(activation, self.split, scale, projection.weight, a, b, *parts)
        return y if projection.bias is None else y + projection.bias


def _pairs(scales: Sequence[float | None], matrices: Sequence[Tensor]) -> list[Adapter | None]:
    """The adapter of each projection, None where it has none, out of A and B of those that have one."""
    rest = iter(matrices)
    return [None if scale is None else Adapter(next(rest), next(rest), scale) for scale in scales]


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
        scales: Sequence[float | None],
        *matrices: Tensor,
    ) -> tuple[Tensor, ...]:
        """x (B, S', D), then weights (O_i, D), biases (O_i,) or None, A (R, D) and B (O_i, R) of those with a scale -> (B, S, O_i)."""
        count, products = len(scales), split.products("output")
        weights, biases, adapters = matrices[:count], matrices[count : 2 * count], matrices[2 * count :]
        ctx.rule, ctx.split, ctx.scales = rule, split, scales
        ctx.save_for_backward(x, gain, shift, *weights, *adapters)
        whole, outputs = gather(rule(x, gain, shift), split).flatten(0, 1), []
        for weight, bias, adapter in zip(weights, biases, _pairs(scales, adapters), strict=True):
            y = products.forward(whole, weight, bias)
            outputs.append(y if adapter is None else y.addmm_(whole @ adapter.a.T, adapter.b.T, alpha=adapter.scale))
        return tuple(own(y.unflatten(0, (x.shape[0], -1))) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """By x (B, S', D), and by A and B of each adapter."""
        count, rule = len(ctx.scales), ctx.rule
        x, gain, shift, *rest = ctx.saved_tensors
        flat, adapters = [slope.flatten(0, 1) for slope in slopes], _pairs(ctx.scales, rest[count:])
        by_normed, trained = _columns_backward(flat, rule(x, gain, shift), rest[:count], adapters, ctx.split)
        by_x, _, _ = rule.backward(by_normed, x, gain, shift)
        return by_x, *[None] * (5 + 2 * count), *trained


def _columns_backward(
    slopes: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], adapters: Sequence[Adapter | None], split: Split
) -> tuple[Tensor, list[Tensor]]:
    """Slopes (T, O_i), x (B, S', D), normed -> (by x (B, S', D), by A and B of each adapter, made while by x travels)."""
    gathering, products = start_gather(x, split), split.products("output")
    by_whole, inner = None, []
    for slope, weight, adapter in zip(slopes, weights, adapters, strict=True):
        by_whole = products.by_input(slope, weight, total=by_whole)
        if adapter is not None:
            by_low = (slope @ adapter.b).mul_(adapter.scale)  # (T, R)
            by_whole.addmm_(by_low, adapter.a)
            inner.append((adapter, slope, by_low))
    assert by_whole is not None
    whole = finish_gather(gathering, split).flatten(0, 1)
    reducing = start_reduce(by_whole.unflatten(0, (x.shape[0], -1)), split)
    trained: list[Tensor] = []
    for adapter, slope, by_low in inner:
        low = (whole @ adapter.a.T).mul_(adapter.scale)
        trained += [by_low.T @ whole, slope.T @ low]
    return finish_reduce(reducing, split), trained


class AdaptedRow(Function):
    """An activation and the projection behind it, summed over ranks."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, split: Split, scale: float, weight: Tensor, a: Tensor | None, b: Tensor | None, *parts: Tensor
    ) -> Tensor:
        """Weight (D, F), a (R, F) and b (D, R) or neither, parts (B, S, F) -> (B, S', D)."""
        ctx.activation, ctx.split, ctx.scale = activation, split, scale
        ctx.save_for_backward(weight, a, b, *parts)
        wide = activate([part.flatten(0, 1) for part in parts], kind=activation)
        y = split.products("input").forward(wide, weight)
        if a is not None and b is not None:
            y.addmm_(wide @ a.T, b.T, alpha=scale)
        del wide  # before the sum over ranks takes its own
        return reduce(y.unflatten(0, (parts[0].shape[0], -1)), split)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """By a, by b, and by each part, in whose memory it lies behind an activation: a graph is good for one backward."""
        weight, a, b, *parts = ctx.saved_tensors
        whole = gather(slope.contiguous(), ctx.split).flatten(0, 1)
        by_wide, by_a, by_b = ctx.split.products("input").by_input(whole, weight), None, None
        flat = [part.detach().flatten(0, 1) for part in parts]
        if a is not None:
            by_low = (whole @ b).mul_(ctx.scale)  # (T, R)
            by_wide.addmm_(by_low, a)
        if ctx.activation == "none":
            wide, slopes = flat[0], [by_wide.view(parts[0].shape)]
        else:
            wide, slopes = activate_backward(by_wide, flat, kind=ctx.activation), [part.detach() for part in parts]
        if a is not None:
            by_a, by_b = by_low.T @ wide, whole.T @ (wide @ a.T).mul_(ctx.scale)
        return None, None, None, None, by_a, by_b, *slopes
