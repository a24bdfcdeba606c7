"""The cheap parts of a block, forward and backward by hand: norms, activations, rotary positions.

They cost little to compute and much to keep. The operations of `parallel/tensor.py` therefore keep what goes into them
and compute them again in backward: a block of a Llama holds about 11 tensors of (tokens, dim) instead of 19.

Legend: T tokens, D dim, F ffn, H heads, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = 512  # tokens of an activation handled at once: they stay in a CPU's cache from one line to the next
MANY = 1 << 15  # elements from which a CPU turns heads by pieces: with fewer the calls cost more than their arithmetic


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics and softmax are taken: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- norms -------------------------------------------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, kind: str, eps: float) -> Tensor:
    """RMSNorm (kind "rms", arXiv:1910.07467) or LayerNorm ("layer") over the last dimension: (..., D) -> (..., D).

    "unit_rms" is RMSNorm times 1 + weight; "none" leaves x as it is.
    """
    if kind == "none":
        return x
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind == "unit_rms":
        exact = wide(x.dtype)  # the sum with 1 would cost a bfloat16 weight its digits
        return norm(x.to(exact), weight.to(exact) + 1.0, None, kind="rms", eps=eps).to(x.dtype)
    if x.is_cuda or x.dtype != weight.dtype or x.dtype != wide(x.dtype):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return (x * _inverse_root(x, eps)).mul_(weight)  # on CPU half the time of F.rms_norm


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps): (..., D) -> (..., 1). One pass: `vecdot` would write x^2 out, which takes three times as long."""
    return torch.linalg.vector_norm(x, dim=-1).square().div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]


def norm_backward(slope: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, kind: str, eps: float) -> list[Tensor]:
    """Slope and x (..., D) -> [by x (..., D), by weight (D,), by bias (D,) if there is one], sums in float32 at least.

    RMSNorm is LayerNorm with the mean taken as zero, but for the mean's own part of the gradient: LayerNorm's fused
    kernel serves both, and that part is put back.
    """
    if kind == "none":
        return [slope]
    width, exact = x.shape[-1], wide(x.dtype)
    if kind == "rms" and x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:  # one kernel each, sums in float32
        inverse = torch.ops.aten._fused_rms_norm(x, (width,), weight, eps)[1]
        return list(torch.ops.aten._fused_rms_norm_backward(slope.contiguous(), x, (width,), inverse, weight, [True, True]))
    flat, given, gain = x.flatten(0, -2).to(exact), slope.flatten(0, -2).to(exact), weight.to(exact)
    if kind == "unit_rms":
        gain = gain + 1.0
    if kind == "layer":
        mean, inverse = torch.native_layer_norm(flat, (width,), None, None, eps)[1:]  # its output is not needed again
    else:
        inverse = _inverse_root(flat, eps)
        mean = torch.zeros_like(inverse)
    wanted = [True, True, bias is not None]
    shift = None if bias is None else bias.to(exact)
    by_x, *rest = torch.ops.aten.native_layer_norm_backward(given, flat, (width,), mean, inverse, gain, shift, wanted)
    if kind != "layer":
        by_x.addcmul_((given @ gain).div_(width)[:, None], inverse)
    return [by_x.view(x.shape).to(x.dtype), *(by.to(x.dtype) for by, here in zip(rest, wanted[1:], strict=True) if here)]


class Normed(torch.autograd.Function):
    """`norm` that keeps its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float) -> Tensor:
        """(..., D) -> (..., D)."""
        ctx.save_for_backward(x, weight, bias)
        ctx.rule = {"kind": kind, "eps": eps}
        return norm(x, weight, bias, **ctx.rule)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Computes the statistics again."""
        by_x, by_weight, *by_bias = norm_backward(slope, *ctx.saved_tensors, **ctx.rule)
        return by_x, by_weight, by_bias[0] if by_bias else None, None, None


# --- activations ---------------------------------------------------------------------------------------------------------

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh", "geglu_tanh": "tanh"}


def activate(parts: Sequence[Tensor], *, kind: str) -> Tensor:
    """SwiGLU or GeGLU of [gate, up] (arXiv:2002.05202), GELU of [up], or ("none") the one part itself: (..., F) each -> (..., F)."""
    if kind == "none":
        return parts[0]
    if kind == "swiglu":
        return F.silu(parts[0]).mul_(parts[1]) if not torch.is_grad_enabled() else F.silu(parts[0]) * parts[1]
    y = F.gelu(parts[0], approximate=_APPROXIMATE[kind])
    if len(parts) == 1:
        return y
    return y * parts[1] if torch.is_grad_enabled() else y.mul_(parts[1])


def activate_backward(slope: Tensor, parts: Sequence[Tensor], *, kind: str) -> Tensor:
    """Slope (T, F), parts (T, F) -> the activation again, (T, F); the slopes by each part take its place."""
    rule = {} if kind == "swiglu" else {"approximate": _APPROXIMATE[kind]}
    inner_backward = (torch.ops.aten.silu_backward if kind == "swiglu" else torch.ops.aten.gelu_backward).grad_input
    y = F.silu(parts[0]) if kind == "swiglu" else F.gelu(parts[0], **rule)
    if len(parts) == 1:
        inner_backward(slope, parts[0], **rule, grad_input=parts[0])
        return y
    gate, up = parts
    gated = y * up
    inner_backward(up.mul_(slope), gate, **rule, grad_input=gate)
    torch.mul(y, slope, out=up)
    return gated


# --- rotary positions ------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) on (B, S, H, E), features paired half with half; cosine and sine (B or 1, S, 1, E)."""
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-right, left), dim=-1) * sine


class RotateInPlace(torch.autograd.Function):
    """`rotated`, in the memory of its input: what a projection has made is needed nowhere else.

    Takes (B, S, H E) as the projection gives it, or (B, S, H, E): on a view of either autograd would copy the slope.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Overwrites x and keeps the angles alone."""
        ctx.save_for_backward(cosine, sine)
        ctx.mark_dirty(x)
        if not x.is_cuda and x.numel() >= MANY:
            _turn(x, cosine, sine, out=x, back=False)
            return x
        half = cosine.shape[-1] // 2
        left, right = x.view(*x.shape[:2], -1, 2 * half).split(half, dim=-1)  # (B, S, H, E/2)
        moved = left * sine[..., :half]
        left.mul_(cosine[..., :half]).addcmul_(right, sine[..., :half], value=-1)
        right.mul_(cosine[..., half:]).add_(moved)
        return x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Turns the slope back by the same angle."""
        cosine, sine = ctx.saved_tensors
        half, out = cosine.shape[-1] // 2, torch.empty(slope.shape, dtype=slope.dtype, device=slope.device)
        if not slope.is_cuda and slope.numel() >= MANY:
            _turn(slope, cosine, sine, out=out, back=True)
            return out, None, None
        left, right = slope.reshape(*slope.shape[:2], -1, 2 * half).split(half, dim=-1)
        by_left, by_right = out.view(*out.shape[:2], -1, 2 * half).split(half, dim=-1)
        torch.mul(left, cosine[..., :half], out=by_left).addcmul_(right, sine[..., :half])
        torch.mul(right, cosine[..., half:], out=by_right).addcmul_(left, sine[..., half:], value=-1)
        return out, None, None


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, *, out: Tensor, back: bool) -> None:
    """As `RotateInPlace` takes x, or its slope (back) -> out, x itself perhaps, some tokens at once.

    A CPU goes through halves of a head in steps of E / 2 numbers, and fetches all from memory for each line. Here a piece's halves
    change places in a copy, by which whole heads are worked on while they are in the cache: 0.4 of the time.
    """
    half, (batch, length) = cosine.shape[-1] // 2, x.shape[:2]
    signed = torch.cat((-sine[..., :half], sine[..., half:]), dim=-1)
    some = max(1, TOKENS // length)  # sequences
    across = torch.arange(some * min(length, TOKENS) * x[0, 0].numel() // half).view(-1, 2).flip(1).view(-1)  # of halves: 1, 0, 3, 2, ...
    for row in range(0, batch, some):
        for at in range(0, length, TOKENS):
            here = (slice(row, row + some) if len(cosine) > 1 else slice(None), slice(at, at + TOKENS))
            piece = x[row : row + some, at : at + TOKENS]
            halves = piece.reshape(-1, half)
            heads = (*piece.shape[:2], -1, 2 * half)  # (b, s, H, E)
            moved = halves.index_select(0, across[: len(halves)]).view(heads)
            to = out[row : row + some, at : at + TOKENS].view(heads)
            torch.mul(piece.view(heads), cosine[here], out=to).addcmul_(moved, signed[here], value=-1 if back else 1)
