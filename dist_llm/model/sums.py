"""Where the gradients by weights are added up, while a unit's backward runs.

The parameters of a unit are views of one flat buffer, and their gradients views of another of the same layout. A backward
that makes the gradient of a matrix by a product can let the product add into that second buffer, in its wider digits,
instead of leaving a tensor for autograd to add: no memory for it, no pass over it, and no rounding to bfloat16 on the way.

It is asked for by the weight alone, since a gradient lies as far from the start of its buffer as the weight from its own.
So neighbours that one product serves are one place here too, and a compiled block's operations find it as eager ones do.

The head makes its gradients while its logits are there, in its forward. That runs in here too: the slope of the loss by which
they are to be scaled is known before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_open: dict[int, Tensor] = {}  # by the storage of the weights, which lives at least as long
_slopes: list[Tensor] = []


@contextmanager
def summing(pairs: Iterable[tuple[Tensor, Tensor]], *, slope: Tensor | None = None) -> Iterator[None]:
    """Inside, gradients by views of weights (padded,) are added into the sums (padded,) beside them; one use of a weight at a time.

    slope: of what a forward in here leaves; only its first number is not zero.
    """
    opened = {weights.untyped_storage()._cdata: sums for weights, sums in pairs}
    _open.update(opened)
    if slope is not None:
        _slopes.append(slope.view(-1)[0])
    try:
        yield
    finally:
        for key in opened:
            del _open[key]
        if slope is not None:
            _slopes.pop()


def sums_of(weight: Tensor) -> Tensor | None:
    """The place of the gradient by a weight, in its shape; None where gradients are autograd's to keep."""
    sums = _open.get(weight.untyped_storage()._cdata)
    return None if sums is None else torch.as_strided(sums, weight.shape, weight.stride(), weight.storage_offset())


def known_slope() -> Tensor | None:
    """The slope of what a forward leaves, a scalar, where it is known before; its gradients by weights go to `sums_of` them."""
    return _slopes[-1] if _slopes else None


def add_rows(total: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """total (V, D) plus values (T, D), which may be narrower, at rows (T,), in place and in a fixed order."""
    values = values.to(total.dtype)
    if total.is_cuda:  # it adds what belongs to a row in whatever order it comes, and what is zero in none
        rows, values = gathered_by_row(rows, values, len(total))
    return total.index_add_(0, rows, values)


def gathered_by_row(rows: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values (T, D) at rows (T,) of `count` -> rows (T,) and values (T, D) in which no row comes twice, but for zeros.

    Without asking the device how many there are. The values of a row are added up by the backward of an embedding over the rows that
    occur, whose work is cut into pieces where one of them (a padding's, say) occurs thousands of times.
    """
    ordered, places = rows.sort(stable=True)
    number = torch.cat([torch.zeros_like(ordered[:1]), (ordered[1:] != ordered[:-1]).cumsum(0)])  # among the rows that occur
    here = torch.arange(len(rows), device=rows.device).remainder(count).scatter_(0, number, ordered)
    number = torch.empty_like(rows).scatter_(0, places, number)
    return here, torch.ops.aten.embedding_dense_backward(values, number, len(rows), -1, False)
