"""Cross-entropy over the vocabulary that never holds the whole logits.

Tokens go through the output projection a chunk at a time, forward and again backward, so the largest intermediate is
(chunk, V) instead of (T, V). The mathematics works on a slice of the vocabulary; `model/roles.py` calls it with the
whole, `parallel/tensor.py` puts two reductions between the slices. A vocabulary slice is rows [first, first + v).

Legend: T tokens, D dim, v local vocabulary rows, V global vocabulary. A label below 0 is ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1024  # tokens whose logits exist at once
IGNORED = -100


@dataclass
class Statistics:
    """Per token, of one slice of the vocabulary: the largest logit, sum exp(logit - largest), the label's logit, the sum."""

    largest: Tensor  # (T,)
    exponentials: Tensor  # (T,) relative to `largest`
    label: Tensor  # (T,) zero where the label lies in another slice
    total: Tensor  # (T,) sum of the logits, for label smoothing


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which softmax is taken: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def local_statistics(x: Tensor, weight: Tensor, labels: Tensor, *, first: int) -> Statistics:
    """x (T, D), weight (v, D), labels (T,) -> what this slice of the vocabulary knows of each token."""
    tokens, kind = x.shape[0], wide(x.dtype)
    found = Statistics(*(torch.empty(tokens, dtype=kind, device=x.device) for _ in range(4)))
    for at in range(0, tokens, CHUNK):
        here = slice(at, at + CHUNK)
        logits = (x[here] @ weight.T).to(kind)  # (chunk, v)
        inside, local = _local(labels[here], first=first, rows=weight.shape[0])
        found.largest[here] = logits.amax(-1)
        found.label[here] = logits.gather(1, local[:, None])[:, 0].masked_fill(~inside, 0.0)
        found.total[here] = logits.sum(-1)
        found.exponentials[here] = logits.sub_(found.largest[here, None]).exp_().sum(-1)
    return found


def losses(known: Statistics, labels: Tensor, *, vocab: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Statistics of the whole vocabulary -> (loss of each token (T,), zero where ignored; log-sum-exp (T,)).

    Smoothing e mixes the label with the uniform distribution over the global vocabulary (arXiv:1512.00567).
    """
    log_sum = known.largest + known.exponentials.log()
    loss = log_sum - (1.0 - smoothing) * known.label - (smoothing / vocab) * known.total
    return loss.masked_fill(labels < 0, 0.0), log_sum


def gradients(
    x: Tensor, weight: Tensor, labels: Tensor, log_sum: Tensor, scale: Tensor, *, first: int, vocab: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """d(scale * summed loss) by x (T, D), this slice's part of the sum, and by weight (v, D)."""
    by_x, by_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide(weight.dtype))  # chunks add up in float32
    for at in range(0, x.shape[0], CHUNK):
        here = slice(at, at + CHUNK)
        slope = (x[here] @ weight.T).to(log_sum.dtype).sub_(log_sum[here, None]).exp_()  # (chunk, v) softmax
        inside, local = _local(labels[here], first=first, rows=weight.shape[0])
        if smoothing:
            slope.sub_(smoothing / vocab)
        slope.scatter_add_(1, local[:, None], inside[:, None].to(slope.dtype) * (smoothing - 1.0))
        slope.mul_((labels[here, None] >= 0) * scale)
        slope = slope.to(x.dtype)
        torch.mm(slope, weight, out=by_x[here])
        if by_weight.dtype == x.dtype:
            by_weight.addmm_(slope.T, x[here])
        else:
            by_weight += slope.T @ x[here]
    return by_x, by_weight.to(weight.dtype)


def _local(labels: Tensor, *, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """(is the label in this slice, its row here or 0)."""
    local = labels - first
    inside = (labels >= 0) & (local >= 0) & (local < rows)
    return inside, local.masked_fill(~inside, 0)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed loss of x (T, D) @ weight (V, D).T against labels (T,), as a float64 scalar."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Keeps the inputs and the log-sum-exp (T,)."""
        known = local_statistics(x, weight, labels, first=0)
        loss, log_sum = losses(known, labels, vocab=weight.shape[0], smoothing=smoothing)
        ctx.save_for_backward(x, weight, labels, log_sum)
        ctx.smoothing = smoothing
        return loss.sum(dtype=torch.float64)

    @staticmethod
    def backward(ctx, scale: Tensor):
        """The slope of the summed loss -> by x (T, D) and by weight (V, D)."""
        x, weight, labels, log_sum = ctx.saved_tensors
        scale = scale.to(log_sum.dtype)
        by_x, by_weight = gradients(x, weight, labels, log_sum, scale, first=0, vocab=weight.shape[0], smoothing=ctx.smoothing)
        return by_x, by_weight, None, None
