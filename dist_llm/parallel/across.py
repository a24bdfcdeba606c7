"""RMSNorm over features that tensor-parallel ranks share: queries and keys, each over all of its heads (arXiv:2501.00656).

Ranks add up their sums of squares, (B, S) for queries and keys in one exchange, and in backward the products of slopes and
inputs. Heads that several ranks hold come as often from each of them: in the mean they count once.

Legend: B batch, S sequence, H this rank's heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dist_llm import comm
from dist_llm.mesh import Group, groups_by_key
from dist_llm.model.kernels import wide
from dist_llm.parallel.operation import differentiable, operation

Tensors = list[Tensor]


def forward(parts: Sequence[Tensor], gains: Sequence[Tensor], *, kind: str, eps: float, group: Group) -> tuple[Tensors, Tensors]:
    """Parts (B, S, H E), gains (H E,) -> (parts normed over the features of all ranks; 1 / root of their mean squares, (B, S, 1))."""
    squares = torch.stack([torch.linalg.vecdot(x, x) for x in (part.to(wide(part.dtype)) for part in parts)])
    squares = comm.all_reduce(squares, group)  # (parts, B, S)
    counts = [part.shape[-1] * group.size for part in parts]
    inverses = [(square / count + eps).rsqrt()[..., None] for square, count in zip(squares, counts, strict=True)]
    normed = [(x * inverse * _gain(gain, kind)).to(x.dtype) for x, inverse, gain in zip(parts, inverses, gains, strict=True)]
    return normed, inverses


def backward(
    slopes: Sequence[Tensor], parts: Sequence[Tensor], gains: Sequence[Tensor], inverses: Sequence[Tensor], *, kind: str, group: Group
) -> tuple[Tensors, Tensors]:
    """Slopes and parts (B, S, H E) -> (by each part (B, S, H E), by each gain (H E,)).

    Of heads that several ranks hold a slope is a part of a sum, and so are both results.
    """
    steep = [slope.to(inverse.dtype) * _gain(gain, kind) for slope, gain, inverse in zip(slopes, gains, inverses, strict=True)]
    inner = torch.stack([torch.linalg.vecdot(a, x.to(a.dtype)) for a, x in zip(steep, parts, strict=True)])
    inner = comm.all_reduce(inner, group)  # (parts, B, S)
    by_parts, by_gains = [], []
    for at, (x, inverse, slope) in enumerate(zip(parts, inverses, slopes, strict=True)):
        straight = x * inverse
        mean = (inner[at][..., None] * inverse).div_(x.shape[-1] * group.size)
        by_gains.append((slope * straight).flatten(0, -2).sum(0).to(gains[at].dtype))
        by_parts.append(steep[at].addcmul_(straight, mean, value=-1).mul_(inverse).to(x.dtype))
    return by_parts, by_gains


def _gain(gain: Tensor, kind: str) -> Tensor:
    """What a normed feature is multiplied by, in the dtype of statistics."""
    gain = gain.to(wide(gain.dtype))
    return gain + 1.0 if kind == "unit_rms" else gain


class Across(Function):
    """The norms of queries and keys; what goes in is kept."""

    @staticmethod
    def forward(ctx: Any, kind: str, eps: float, group: Group, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`count` parts (B, S, H E), then as many gains (H E,) -> normed parts."""
        normed, inverses = forward(tensors[:count], tensors[count:], kind=kind, eps=eps, group=group)
        ctx.kind, ctx.group, ctx.count = kind, group, count
        ctx.save_for_backward(*tensors, *inverses)
        return tuple(normed)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """One exchange, as forward."""
        tensors, n = ctx.saved_tensors, ctx.count
        by_parts, by_gains = backward(slopes, tensors[:n], tensors[n : 2 * n], tensors[2 * n :], kind=ctx.kind, group=ctx.group)
        return *[None] * 4, *by_parts, *by_gains


# --- for compiled blocks -------------------------------------------------------------------------------------------------


def _fake(parts: Tensors, gains: Tensors, kind: str, eps: float, group: str) -> Tensors:
    statistics = [part.new_empty((*part.shape[:2], 1), dtype=wide(part.dtype)) for part in parts]
    return [*(torch.empty_like(part) for part in parts), *statistics]


@operation("across(Tensor[] parts, Tensor[] gains, str kind, float eps, str group) -> Tensor[]", fake=_fake)
def across(parts: Tensors, gains: Tensors, kind: str, eps: float, group: str) -> Tensors:
    """Parts (B, S, H E), gains (H E,) -> parts normed over all ranks, then what they were multiplied by, (B, S, 1) each."""
    normed, inverses = forward(parts, gains, kind=kind, eps=eps, group=groups_by_key[group])
    return [*normed, *inverses]


def _backward_fake(slopes: Tensors, parts: Tensors, gains: Tensors, inverses: Tensors, kind: str, group: str) -> Tensors:
    return [torch.empty_like(each) for each in (*parts, *gains)]


@operation(
    "across_backward(Tensor[] slopes, Tensor[] parts, Tensor[] gains, Tensor[] inverses, str kind, str group) -> Tensor[]",
    fake=_backward_fake,
)
def across_backward(slopes: Tensors, parts: Tensors, gains: Tensors, inverses: Tensors, kind: str, group: str) -> Tensors:
    """Slopes (B, S, H E) -> [by each part (B, S, H E), by each gain (H E,)]."""
    by_parts, by_gains = backward(slopes, parts, gains, inverses, kind=kind, group=groups_by_key[group])
    return [*by_parts, *by_gains]


def _setup(ctx: Any, inputs: tuple, output: Tensors) -> None:
    parts, gains, ctx.kind, _, ctx.group = inputs
    ctx.count = len(parts)
    ctx.save_for_backward(*parts, *gains, *output[len(parts) :])


def _backward(ctx: Any, slopes: Tensors) -> Any:
    tensors, n = ctx.saved_tensors, ctx.count
    found = across_backward(list(slopes[:n]), list(tensors[:n]), list(tensors[n : 2 * n]), list(tensors[2 * n :]), ctx.kind, ctx.group)
    return found[:n], found[n:], None, None, None


differentiable("across", backward=_backward, setup=_setup)
