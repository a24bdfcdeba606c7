"""Column and row over weights that are not trained, with or without an adapter on them, for compiled blocks.

What `adapted.py` does, as operations that torch.compile leaves alone; norms and activations stay outside, as in `compiled.py`. An
operation takes tensors and numbers, no objects: `Beside` is that form of what is on some projections, and back. Lengths of rows (DoRA)
are an operation of their own, which has no gradient. Weights have none either: None in the place of theirs.

Legend: as in `tensor.py`; R rank of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_llm.mesh import groups_by_key
from dist_llm.model.kernels import activate
from dist_llm.model.parts import Adapter, Draw, Norm, Projection, Projections
from dist_llm.parallel import adapted
from dist_llm.parallel.compiled import CompiledRoles
from dist_llm.parallel.correction import Correction, row_norms
from dist_llm.parallel.operation import differentiable, operation
from dist_llm.parallel.tensor import Split

Tensors = list[Tensor]
FORM = 4  # numbers that say what is on a projection: its trained tensors (none, A and B, or m too), scale, part dropped, input features


class Beside(NamedTuple):
    """What is on some projections in one use, and how they are cut: the last arguments of the operations.

    trained: A, B and m of each. fixed: of each its lengths of rows, with DoRA, and where something is dropped places, key and place.
    """

    trained: Tensors
    fixed: Tensors
    forms: list[float]
    group: str
    tokens: int
    fp8: str

    @classmethod
    def of(cls, projections: Sequence[Projection], draw: Draw | None, split: Split, *, columns: bool) -> Beside:
        """columns: their outputs are cut over ranks, not their inputs."""
        found = cls([], [], [], split.group.key, split.tokens, split.fp8)
        for projection in projections:
            adapter = projection.adapter
            if adapter is None:
                found.forms.extend([0.0] * FORM)
                continue
            matrices, dropped = [adapter.a, adapter.b], 0.0
            if adapter.m is not None:
                matrices.append(adapter.m)
                given = (projection.weight, adapter.a.detach(), adapter.b.detach(), adapter.scale)
                found.fixed.append(lengths(*given, "" if columns else found.group).to(adapter.m.dtype))
            if draw is not None and adapter.place is not None:
                dropped = adapter.drop
                found.fixed.extend([draw.places, draw.key, adapter.place])
            found.trained.extend(matrices)
            found.forms.extend([float(len(matrices)), adapter.scale, dropped, float(adapter.width)])
        return found

    def split(self) -> Split:
        """How a block is cut."""
        return Split.from_key(self.group, self.tokens, self.fp8)

    def corrections(self, *, columns: bool) -> list[Correction | None]:
        """What is on each projection, as `adapted.py` takes it."""
        trained, fixed, group = iter(self.trained), iter(self.fixed), None if columns else groups_by_key[self.group]
        found: list[Correction | None] = []
        for at in range(0, len(self.forms), FORM):
            count, scale, dropped, width = self.forms[at : at + FORM]
            if not count:
                found.append(None)
                continue
            a, b, m = next(trained), next(trained), next(trained) if count > 2 else None
            norm = None if m is None else next(fixed)
            draw, place = (Draw(next(fixed), next(fixed)), next(fixed)) if dropped else (None, None)
            found.append(Correction.of(Adapter(a, b, scale, m, dropped, place, int(width)), norm, draw, group))
        return found


ARGUMENTS = "Tensor[] trained, Tensor[] fixed, float[] forms, str group, int tokens, str fp8"


class CompiledAdaptedRoles(CompiledRoles):
    """The seams of compiled blocks whose own weights stay as they are; should one run as it is after all, it runs the same lines."""

    draws = True

    def columns(
        self, x: Tensor, norm: Norm, projections: Projections, draw: Draw | None = None, *, any_order: bool = False
    ) -> list[Tensor]:
        """Enters with (B, S', D) before its norm, leaves with (B, S, O_i) for each projection: this rank's output features."""
        beside = Beside.of(projections.parts, draw, self.order(any_order, draw), columns=True)
        return column(norm(x), projections.weights, projections.biases, *beside)

    def row(
        self, parts: Sequence[Tensor], activation: str, projection: Projection, draw: Draw | None = None, *, any_order: bool = False
    ) -> Tensor:
        """Enters with this rank's features (B, S, O), leaves with the sum over ranks (B, S', D), the bias added once."""
        beside = Beside.of([projection], draw, self.order(any_order, draw), columns=False)
        y = row(activate(parts, kind=activation), projection.weight, *beside)
        return y if projection.bias is None else y + projection.bias


@operation(
    "adapted_lengths(Tensor weight, Tensor a, Tensor b, float scale, str group) -> Tensor",
    fake=lambda weight, *rest: weight.new_empty(weight.shape[0], dtype=torch.float64),
)
def lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float, group: str) -> Tensor:
    """The lengths of the rows of W + s B A, float64 (O,). group: key of the ranks that columns of W are cut over, or nothing."""
    return row_norms(weight, Adapter(a, b, scale), groups_by_key[group] if group else None)


# --- column ----------------------------------------------------------------------------------------------------------


def _column_fake(x: Tensor, weights: Tensors, biases: Tensors, *what: Any) -> Tensors:
    split = Beside(*what).split()
    return [x.new_empty(x.shape[0], x.shape[1] * (split.group.size if split.sp else 1), weight.shape[0]) for weight in weights]


@operation(f"adapted_column(Tensor x, Tensor[] weights, Tensor[] biases, {ARGUMENTS}) -> Tensor[]", fake=_column_fake)
def column(x: Tensor, weights: Tensors, biases: Tensors, *what: Any) -> Tensors:
    """x (B, S', D), normed, weights (O_i, D), biases (O_i,) for all or none, what is `Beside` them -> (B, S, O_i)."""
    beside = Beside(*what)
    frozen = [(weight, biases[at] if biases else None) for at, weight in enumerate(weights)]
    return adapted.columns_forward(x, frozen, beside.corrections(columns=True), beside.split())


def _slopes_fake(x: Tensor, trained: Tensors) -> Tensors:
    return [each.new_empty(each.shape) for each in (x, *trained)]


@operation(
    f"adapted_column_backward(Tensor[] slopes, Tensor x, Tensor[] weights, {ARGUMENTS}) -> Tensor[]",
    fake=lambda slopes, x, weights, trained, *rest: _slopes_fake(x, trained),
)
def column_backward(slopes: Tensors, x: Tensor, weights: Tensors, *what: Any) -> Tensors:
    """Slopes (B, S, O_i) -> [by x (B, S', D), then by A, B and m of each adapter]."""
    beside, flat = Beside(*what), [slope.flatten(0, 1) for slope in slopes]
    by_x, trained = adapted.columns_backward(flat, x, weights, beside.corrections(columns=True), beside.split())
    return [by_x, *trained]


def _column_setup(ctx: Any, inputs: tuple, output: Tensors) -> None:
    x, weights, biases, trained, fixed, *ctx.rest = inputs
    ctx.counts = [len(part) for part in (weights, biases, trained, fixed)]
    ctx.save_for_backward(x, *weights, *trained, *fixed)


def _column_backward(ctx: Any, slopes: Tensors) -> Any:
    (x, *saved), (weights, biases, trained, fixed) = ctx.saved_tensors, ctx.counts
    end = weights + trained
    by_x, *by_trained = column_backward(slopes, x, saved[:weights], saved[weights:end], saved[end:], *ctx.rest)
    return by_x, [None] * weights, [None] * biases, by_trained, [None] * fixed, *[None] * len(ctx.rest)


differentiable("adapted_column", backward=_column_backward, setup=_column_setup)


# --- row -------------------------------------------------------------------------------------------------------------


def _row_fake(x: Tensor, weight: Tensor, *what: Any) -> Tensor:
    split = Beside(*what).split()
    return x.new_empty(x.shape[0], x.shape[1] // (split.group.size if split.sp else 1), weight.shape[0])


@operation(f"adapted_row(Tensor x, Tensor weight, {ARGUMENTS}) -> Tensor", fake=_row_fake)
def row(x: Tensor, weight: Tensor, *what: Any) -> Tensor:
    """x (B, S, F), weight (D, F), what is `Beside` it -> the sum over ranks (B, S', D)."""
    beside = Beside(*what)
    (correction,) = beside.corrections(columns=False)
    return adapted.row_forward(x, weight, correction, beside.split())


@operation(
    f"adapted_row_backward(Tensor slope, Tensor x, Tensor weight, {ARGUMENTS}) -> Tensor[]",
    fake=lambda slope, x, weight, trained, *rest: _slopes_fake(x, trained),
)
def row_backward(slope: Tensor, x: Tensor, weight: Tensor, *what: Any) -> Tensors:
    """Slope (B, S', D), x (B, S, F) -> [by x (B, S, F), then by A, B and m]."""
    beside = Beside(*what)
    (correction,) = beside.corrections(columns=False)
    whole, by_x, by_low = adapted.row_slopes(slope, weight, correction, beside.split())
    trained = [] if correction is None or by_low is None else correction.by_trained(whole, by_low, x.flatten(0, 1), weight)
    return [by_x.view(x.shape), *trained]


def _row_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, trained, fixed, *ctx.rest = inputs
    ctx.count = len(trained)
    ctx.save_for_backward(x, weight, *trained, *fixed)


def _row_backward(ctx: Any, slope: Tensor) -> Any:
    x, weight, *saved = ctx.saved_tensors
    trained, fixed = saved[: ctx.count], saved[ctx.count :]
    by_x, *by_trained = row_backward(slope, x, weight, trained, fixed, *ctx.rest)
    return by_x, None, by_trained, [None] * len(fixed), *[None] * len(ctx.rest)


differentiable("adapted_row", backward=_row_backward, setup=_row_setup)
