"""Cross-entropy over the vocabulary that never holds the whole logits, and takes its gradient on the way.

Tokens go through the output projection a chunk at a time; while a chunk's logits are there, they become its loss and
the gradients of that loss by input and by weight. So the largest intermediate is (chunk, V) instead of (T, V), and
the projection runs once forward, not again for backward. The mathematics works on a slice of the vocabulary, rows
[first, first + v): `share` joins what the slices know of a chunk. weights (T,): what each token's loss counts; None: 1.

Legend: T tokens, D dim, v local vocabulary rows, V global vocabulary. A label below 0 is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dist_llm.model.fused import compiling, fused
from dist_llm.model.kernels import wide
from dist_llm.model.products import add_product, wide_product

CHUNK = 1024  # tokens whose logits exist at once
CHUNK_BYTES = 2**30  # of float32 logits at once on a GPU, which is idle for long between small products
SCALED = 2**22  # elements of a gradient that are scaled at once
IGNORED = -100


def at_once(tokens: int, rows: int, *, cpu: bool) -> int:
    """Tokens of a chunk, of all that there are, over so many rows of the vocabulary."""
    most = CHUNK if cpu else max(CHUNK, 1 << max(1, CHUNK_BYTES // (4 * rows)).bit_length() - 1)
    return min(most, tokens)


@dataclass
class Statistics:
    """Of each token of a chunk, over a slice of the vocabulary (local) or all of it (shared)."""

    largest: Tensor  # (T,) logit
    exponentials: Tensor  # (T,) sum of exp(logit - largest)
    label: Tensor  # (T,) the label's logit, zero where the label lies in another slice
    total: Tensor | None  # (T,) sum of the logits, under label smoothing


Shared = tuple[Tensor, Tensor, Tensor, Tensor | None]  # its fields, over the whole vocabulary, as a compiler takes them


@dataclass(frozen=True)
class Slice:
    """A rank's part of the vocabulary. share: local statistics -> those of the whole vocabulary, in place.

    softcap c: logits become c tanh(logits / c); 0: they do not.
    """

    first: int
    vocab: int
    smoothing: float
    share: Callable[[Statistics], Statistics]
    softcap: float = 0.0


def whole(weight: Tensor, smoothing: float, softcap: float = 0.0) -> Slice:
    """The vocabulary in one piece."""
    return Slice(0, weight.shape[0], smoothing, lambda known: known, softcap)


class Objective(Protocol):
    """What is made of the losses of a micro-batch's tokens; `Counted`, or `Pairs` of model/preference.py."""

    def alone(self, x: Tensor, weight: Tensor, labels: Tensor, part: Slice) -> Tensor:
        """x (T, D), weight (v, D), labels (T,) -> float64; where there are several numbers the first is the loss."""

    def with_gradients(
        self,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        part: Slice,
        *,
        trained: bool,
        slope: Tensor | None = None,
        total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `alone`, with the gradients of the loss by x (T, D) and by weight (v, D), if it is trained.

        slope and total: as `loss_and_gradients` takes them.
        """


@dataclass(frozen=True)
class Counted:
    """Their sum, each times its weight (T,); None: 1."""

    weights: Tensor | None

    def alone(self, x: Tensor, weight: Tensor, labels: Tensor, part: Slice) -> Tensor:
        """As Objective."""
        return loss_alone(x, weight, labels, part, self.weights)

    def with_gradients(
        self,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        part: Slice,
        *,
        trained: bool,
        slope: Tensor | None = None,
        total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As Objective."""
        return loss_and_gradients(x, weight, labels, part, self.weights, trained=trained, slope=slope, total=total)


def loss_alone(
    x: Tensor, weight: Tensor, labels: Tensor, part: Slice, weights: Tensor | None = None, *, each: Tensor | None = None
) -> Tensor:
    """x (T, D), weight (v, D), labels (T,), weights (T,) -> the summed loss, a float64 scalar. each (T,): takes that of each token."""
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    for here in _chunks(x, weight):
        taken = _chunk(x[here], weight, labels[here], part, _some(weights, here))[0]
        _take(taken, loss, each, here)
    return loss


def loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    part: Slice,
    weights: Tensor | None = None,
    *,
    trained: bool = True,
    each: Tensor | None = None,
    slope: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `loss_alone` -> (summed loss, float64; its gradient by x (T, D), this slice's part; by weight (v, D), if it is trained).

    slope: a float64 scalar by which the gradients are multiplied; the loss is not. total (v, D), which may be wider than the
    weight: the gradient by it is added there, and none is returned.
    """
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    by_x, by_weight = torch.empty_like(x), total
    if trained and total is None:
        by_weight = torch.zeros_like(weight, dtype=wide(weight.dtype))  # chunks add up in float32
    for here in _chunks(x, weight):
        taken, by_logits = _chunk(x[here], weight, labels[here], part, _some(weights, here), slope)
        _take(taken, loss, each, here)
        by_logits = by_logits.to(x.dtype)
        torch.mm(by_logits, weight, out=by_x[here])
        if by_weight is not None:
            add_product(by_weight, by_logits.T, x[here])
        del by_logits  # before the next chunk makes its logits
    return loss, by_x, None if by_weight is None or total is not None else by_weight.to(weight.dtype)


def _chunks(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """The tokens of x (T, D) in pieces."""
    some = max(1, at_once(x.shape[0], weight.shape[0], cpu=x.device.type == "cpu"))
    return (slice(at, at + some) for at in range(0, x.shape[0], some))


def _take(taken: Tensor, loss: Tensor, each: Tensor | None, here: slice) -> None:
    """Adds a chunk's losses up in `loss`, and keeps them where each is asked for."""
    loss += taken.sum(dtype=torch.float64)
    if each is not None:
        each[here] = taken


def _some(weights: Tensor | None, here: slice) -> Tensor | None:
    return None if weights is None else weights[here]


def _chunk(
    x: Tensor, weight: Tensor, labels: Tensor, part: Slice, weights: Tensor | None, slope: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of each token of a chunk, and the slope of their sum by each logit (chunk, v), times `slope`.

    As it is, all happens in the memory of the logits. Compiled, a pass costs its bytes and little else: the logits stay
    what they are, read twice, and the slope comes in the dtype of x.
    Smoothing e mixes the label with the uniform distribution over the global vocabulary (arXiv:1512.00567).
    """
    logits = wide_product(x, weight.T)  # (chunk, v)
    bend, kept = _cap(logits, part.softcap) if part.softcap else None, compiling()
    here = _statistics(logits, labels, part.first, part.smoothing > 0, kept)
    largest = here[0].clone()  # `share` may write over the one it is given
    known = part.share(Statistics(*here))
    shared: Shared = (known.largest, known.exponentials, known.label, known.total)
    rule = (part.first, part.vocab, part.smoothing)
    if kept:
        return _loss_and_new_slope(logits, labels, weights, slope, bend, shared, *rule, x.dtype)
    return _loss_and_slope(logits, labels, weights, slope, bend, largest, shared, *rule), logits


def _cap(logits: Tensor, softcap: float) -> Tensor:
    """Logits (chunk, v) become softcap x tanh(logits / softcap) in place; leaves the slope of that, as large."""
    logits.div_(softcap).tanh_()
    bend = logits.square().neg_().add_(1.0)
    logits.mul_(softcap)
    return bend


@fused
def _statistics(logits: Tensor, labels: Tensor, first: int, smoothed: bool, kept: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Logits (chunk, v) -> what `Statistics` holds, of this slice. Unless they are kept, they become exp(logit - largest)."""
    inside, local = _local(labels, first=first, rows=logits.shape[1])
    label = logits.gather(1, local[:, None])[:, 0].masked_fill_(~inside, 0.0)
    largest, total = logits.amax(-1, keepdim=True), logits.sum(-1) if smoothed else None
    relative = logits - largest if kept else logits.sub_(largest)
    exponentials = (relative.exp() if kept else relative.exp_()).sum(-1, keepdim=True)  # as a compiler knows a softmax: one pass for both
    return largest[:, 0], exponentials[:, 0], label, total


@fused
def _loss_and_slope(
    slope: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    scale: Tensor | None,
    bend: Tensor | None,
    local_largest: Tensor,
    shared: Shared,
    first: int,
    vocab: int,
    smoothing: float,
) -> Tensor:
    """exp(logit - local_largest) (chunk, v) becomes the slope in place; the rest is of the whole vocabulary, (chunk,). Leaves each loss."""
    inside, local = _local(labels, first=first, rows=slope.shape[1])
    loss, counted = _losses(labels, weights, scale, shared, vocab, smoothing)
    largest, exponentials = shared[:2]
    # Of a softmax relative to this slice's largest logit only one factor a token is missing.
    slope.mul_(((local_largest - largest).exp() / exponentials * counted)[:, None])
    if smoothing:
        slope.sub_((smoothing / vocab * counted)[:, None])
    hit = inside * counted
    slope.scatter_add_(1, local[:, None], (hit * (smoothing - 1.0))[:, None])
    if bend is not None:
        slope.mul_(bend)
    return loss


@fused
def _loss_and_new_slope(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    scale: Tensor | None,
    bend: Tensor | None,
    shared: Shared,
    first: int,
    vocab: int,
    smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `_loss_and_slope`, of the logits (chunk, v) themselves -> (each loss, the slope in `dtype`)."""
    loss, counted = _losses(labels, weights, scale, shared, vocab, smoothing)
    largest, exponentials = shared[:2]
    slope = (logits - largest[:, None]).exp() * (counted / exponentials)[:, None]
    hit = torch.arange(first, first + logits.shape[1], device=labels.device) == labels[:, None]
    aim = hit.to(logits.dtype) * (1.0 - smoothing) + smoothing / vocab  # numbers alone would make float32 of float64
    slope = slope - aim * counted[:, None]
    return loss, (slope if bend is None else slope * bend).to(dtype)


def scale_by(gradient: Tensor, slope: Tensor) -> Tensor:
    """A gradient times the slope of the loss, a float64 scalar of the same device, in place.

    A GPU would round the slope to bfloat16 first, and so all gradients up or down by as much as 0.4 %.
    """
    if not gradient.is_cuda or gradient.dtype == wide(gradient.dtype):
        return gradient.mul_(slope)
    for part in [gradient] if compiling() else gradient.view(-1).split(SCALED):
        _scale_by(part, slope)
    return gradient


@fused
def _scale_by(gradient: Tensor, slope: Tensor) -> Tensor:
    exact = wide(gradient.dtype)
    return gradient.copy_(gradient.to(exact) * slope.to(exact))


def _losses(
    labels: Tensor,
    weights: Tensor | None,
    scale: Tensor | None,
    shared: Shared,
    vocab: int,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """(the loss of each token times its weight, what the token counts times `scale`, a scalar), both (chunk,)."""
    largest, exponentials, label, total = shared
    counted = (labels >= 0).to(largest.dtype)
    loss = largest + exponentials.log() - (1.0 - smoothing) * label
    if total is not None:
        loss = loss - smoothing / vocab * total
    loss = loss.masked_fill(labels < 0, 0.0)
    if weights is not None:
        loss, counted = loss * weights.to(loss.dtype), counted * weights.to(loss.dtype)
    return loss, counted if scale is None else counted * scale.to(loss.dtype)


def _local(labels: Tensor, *, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """(is the label in this slice, its row here or 0)."""
    local = labels - first
    inside = (labels >= 0) & (local >= 0) & (local < rows)
    return inside, local.masked_fill(~inside, 0)


def cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, smoothing: float, weights: Tensor | None = None, softcap: float = 0.0
) -> Tensor:
    """x (T, D), weight (V, D), labels (T,), weights (T,) -> the summed loss, a float64 scalar."""
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(x, weight, labels, smoothing, weights, softcap)
    return loss_alone(x, weight, labels, whole(weight, smoothing, softcap), weights)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed loss of x (T, D) @ weight (V, D).T against labels (T,), as a float64 scalar."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None = None, softcap: float = 0.0
    ) -> Tensor:
        """Makes the gradients at once and keeps them alone."""
        loss, *gradients = loss_and_gradients(x, weight, labels, whole(weight, smoothing, softcap), weights)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, scale: Tensor):
        """The slope of the summed loss -> by x (T, D) and by weight (V, D)."""
        by_x, by_weight = ctx.saved_tensors
        return scale_by(by_x.clone(), scale), scale_by(by_weight.clone(), scale), *[None] * 4
