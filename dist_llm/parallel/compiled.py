"""Column and row for compiled blocks: the same work as in `tensor.py`, as operations that torch.compile leaves alone.

Norms and activations stay outside, for the compiler. The operations are registered with torch.library (fake and
autograd). None of their results share memory, as the compiler wants it: neighbouring projections come as one tensor and
are cut outside.

Legend: as in `tensor.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.mesh import groups_by_key
from dist_llm.model.kernels import activate
from dist_llm.model.parts import Draw, Norm, Projection, Projections, neighbours
from dist_llm.parallel import tensor
from dist_llm.parallel.across import across
from dist_llm.parallel.operation import differentiable, operation
from dist_llm.parallel.tensor import Split, TensorRoles, beside

NARROW = 4096  # output features of a projection, up to which a product that serves its neighbours too is the quicker one


class CompiledRoles(TensorRoles):
    """The seams of blocks that are compiled; should one run as it is after all, it runs the same lines."""

    in_place = False  # neighbouring projections are views of one tensor

    def columns(
        self, x: Tensor, norm: Norm, projections: Projections, draw: Draw | None = None, *, any_order: bool = False
    ) -> list[Tensor]:
        """Enters with (B, S', D) before its norm, leaves with (B, S, O_i) for each projection: this rank's output features.

        A product that serves neighbours needs their slopes in one tensor, for which the compiler reads what they are made of twice.
        """
        weights, split = projections.weights, self.order(any_order, draw)
        joined = projections.joined and min(weight.shape[0] for weight in weights) <= NARROW
        outputs = column(norm(x), weights, projections.biases, joined, split.group.key, split.tokens, split.fp8)
        return list(outputs[0].split_with_sizes([weight.shape[0] for weight in weights], dim=-1)) if joined else outputs

    def across(self, parts: Sequence[Tensor], norms: Sequence[Norm]) -> list[Tensor]:
        """Enters with this rank's queries and keys (B, S, H E), leaves with them normed over the heads of all ranks."""
        rule = (norms[0].kind, norms[0].eps, self.split.group.key)
        return list(across([part.contiguous() for part in parts], [norm.weight for norm in norms], *rule))[: len(parts)]

    def row(
        self, parts: Sequence[Tensor], activation: str, projection: Projection, draw: Draw | None = None, *, any_order: bool = False
    ) -> Tensor:
        """Enters with this rank's features (B, S, O), leaves with the sum over ranks (B, S', D), the bias added once."""
        split = self.order(any_order, draw)
        y = row(activate(parts, kind=activation), projection.weight, split.group.key, split.tokens, split.fp8)
        return y if projection.bias is None else y + projection.bias


def keep_little() -> None:
    """From now on blocks that are compiled keep for backward what others keep.

    torch's own rule saves whatever a product reads in backward. Here that would be each norm's output and the activation,
    two tensors of (tokens, dim) and one of (tokens, ffn) a block, which take a pass of cheap operations to make again.
    """
    from torch._functorch import config

    config.ban_recompute_materialized_backward = False


def tag_caches() -> None:
    """From now on what torch has compiled and kept on a disk is found again only by the same operations of ours.

    Its keys hold the names that are called forward, not what their backward is: another version of ours would be served
    the backward of this one.
    """
    from torch.compiler import config

    tag = f"dist_llm operations {sources_digest(Path(__file__).parent)}"
    if tag not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag} {tag}".strip()


def sources_digest(folder: Path) -> str:
    """Of all Python files in a folder."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()[:16]


# --- column ----------------------------------------------------------------------------------------------------------


def _column_fake(x: Tensor, weights: list[Tensor], biases: list[Tensor], joined: bool, group: str, tokens: int, fp8: str) -> list[Tensor]:
    widths = [weight.shape[0] for weight in weights]
    length = x.shape[1] * (groups_by_key[group].size if tokens else 1)
    return [x.new_empty(x.shape[0], length, width) for width in ([sum(widths)] if joined else widths)]


@operation(
    "column(Tensor x, Tensor[] weights, Tensor[] biases, bool joined, str group, int tokens, str fp8) -> Tensor[]",
    fake=_column_fake,
)
def column(x: Tensor, weights: list[Tensor], biases: list[Tensor], joined: bool, group: str, tokens: int, fp8: str) -> list[Tensor]:
    """x (B, S', D), weights (O_i, D), biases (O_i,) for all or none -> (B, S, O_i); joined: one output, side by side."""
    apart = not joined and _cast_once(weights, fp8)
    widths = [weight.shape[0] for weight in weights] if apart else []
    if joined or apart:
        weights, biases = [beside(weights, 0)], [torch.cat(biases)] if biases else []
    return tensor.columns_forward(x, weights, biases, Split.from_key(group, tokens, fp8), widths)


def _cast_once(weights: list[Tensor], fp8: str) -> bool:
    """Whether neighbours are one operand in 8 bits, although their outputs and slopes are apart: cast once, with the scales of one."""
    return fp8 != "off" and neighbours(weights)


def _by_x_fake(slopes: list[Tensor], x: Tensor, weights: list[Tensor], joined: bool, group: str, tokens: int, fp8: str) -> Tensor:
    return torch.empty_like(x)


@operation(
    "column_backward(Tensor[] slopes, Tensor x, Tensor[] weights, bool joined, str group, int tokens, str fp8) -> Tensor",
    fake=_by_x_fake,
)
def column_backward(slopes: list[Tensor], x: Tensor, weights: list[Tensor], joined: bool, group: str, tokens: int, fp8: str) -> Tensor:
    """Slopes (B, S, O_i) -> by x (B, S', D); joined: of one slope and one weight. Gradients by weights go to their sums."""
    inner = [beside(weights, 0)] if joined or _cast_once(weights, fp8) else weights
    flat = [slope.reshape(-1, slope.shape[-1]) for slope in slopes]
    by_x, by_weights = tensor.columns_backward(flat, x, inner, Split.from_key(group, tokens, fp8))
    assert by_weights == [None] * len(inner), "the sums of the unit's gradients are not open"
    return by_x


def _column_setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, biases, ctx.joined, *ctx.rest = inputs
    ctx.biased = bool(biases)
    ctx.save_for_backward(x, *weights)


def _column_backward(ctx: Any, slopes: list[Tensor]) -> Any:
    x, *weights = ctx.saved_tensors
    by_x = column_backward(slopes, x, weights, ctx.joined, *ctx.rest)
    by_biases = [slope.flatten(0, 1).sum(0) for slope in slopes] if ctx.biased else []
    if ctx.joined and ctx.biased:
        by_biases = list(by_biases[0].split_with_sizes([weight.shape[0] for weight in weights]))
    return by_x, [None] * len(weights), by_biases, *[None] * 4


differentiable("column", backward=_column_backward, setup=_column_setup)


# --- row -------------------------------------------------------------------------------------------------------------


def _row_fake(x: Tensor, weight: Tensor, group: str, tokens: int, fp8: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // (groups_by_key[group].size if tokens else 1), weight.shape[0])


@operation("row(Tensor x, Tensor weight, str group, int tokens, str fp8) -> Tensor", fake=_row_fake)
def row(x: Tensor, weight: Tensor, group: str, tokens: int, fp8: str) -> Tensor:
    """x (B, S, F), weight (D, F) -> the sum over ranks (B, S', D)."""
    return tensor.row_forward([x], "none", weight, Split.from_key(group, tokens, fp8))


def _row_backward_fake(slope: Tensor, x: Tensor, weight: Tensor, group: str, tokens: int, fp8: str) -> Tensor:
    return x.new_empty(x.shape)


@operation("row_backward(Tensor slope, Tensor x, Tensor weight, str group, int tokens, str fp8) -> Tensor", fake=_row_backward_fake)
def row_backward(slope: Tensor, x: Tensor, weight: Tensor, group: str, tokens: int, fp8: str) -> Tensor:
    """Slope (B, S', D), x (B, S, F) -> by x (B, S, F). The gradient by weight goes to its sums."""
    by_x, by_weight = tensor.row_backward(slope, x, weight, Split.from_key(group, tokens, fp8))
    assert by_weight is None, "the sums of the unit's gradients are not open"
    return by_x


def _row_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, *ctx.rest = inputs
    ctx.save_for_backward(x, weight)


def _row_backward(ctx: Any, slope: Tensor) -> Any:
    return row_backward(slope, *ctx.saved_tensors, *ctx.rest), *[None] * 4


differentiable("row", backward=_row_backward, setup=_row_setup)
