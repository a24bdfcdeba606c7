"""What an adapter makes of a projection on one rank, forward and backward: LoRA, DoRA, and dropout on what goes into A.

    LoRA, arXiv:2106.09685     y = W x + s B A x
    DoRA, arXiv:2402.09353     y = c (W x + s B A x),  c = m / |W + s B A|, a length for each row; m is trained, the norm is not
                               differentiated (section 4.3 of the paper, and PEFT)
    dropout, as PEFT has it    y = W x + s B A d(x), and y = W x + (c - 1) W d(x) + c s B A d(x), another product with W

d(x) and the masks in it are addressed (random.py), so backward makes them again instead of keeping them. The slope of m needs what the
rows gave, W x + s B A x, and that is computed again too: an adapter keeps nothing of (tokens, features).

Legend: T tokens, t of them at once, D input features, O output features, of this rank; R rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_llm import comm
from dist_llm.mesh import Group
from dist_llm.model.kernels import TOKENS, wide
from dist_llm.model.parts import Adapter, Draw

PIECE = 1 << 20  # elements of a weight whose rows are measured at once


@torch.no_grad()
def row_norms(weight: Tensor, adapter: Adapter | None, group: Group | None) -> Tensor:
    """The lengths of the rows of W + s B A, float64 (O,), of a weight (O, D). group: the ranks that its columns are cut over.

    Sums of squares are float64, so that they are those of one process up to its last digits.
    """
    squares, exact = torch.empty(len(weight), dtype=torch.float64, device=weight.device), wide(weight.dtype)
    rows = max(1, PIECE // weight.shape[1])
    for at in range(0, len(weight), rows):
        some = weight[at : at + rows].to(exact)
        if adapter is not None:
            some = torch.addmm(some, adapter.b[at : at + rows].to(exact), adapter.a.to(exact), alpha=adapter.scale)
        torch.sum(some.double().square(), 1, out=squares[at : at + rows])
    return (squares if group is None else comm.all_reduce(squares, group)).sqrt_()


@dataclass(frozen=True)
class Masks:
    """The dropout in front of A on one rank. first: of this rank's input features among all of them."""

    draw: Draw
    adapter: Adapter
    first: int

    def __call__(self, x: Tensor, at: slice) -> Tensor:
        """d(x) of the tokens `at` of all, x (t, D) -> (t, D); linear, so that slopes pass it the same way."""
        adapter, places = self.adapter, self.draw.places.flatten()[at]
        assert adapter.place is not None, "an adapter that drops has a place"
        features = torch.arange(self.first, self.first + x.shape[1], device=x.device)
        keep = Draw(places, self.draw.key).keep(adapter.place, features, width=adapter.width, drop=adapter.drop)
        return (x * keep).div_(1.0 - adapter.drop)


@dataclass(frozen=True)
class Correction:
    """An adapter in one use of its projection. norm: lengths of the rows (O,), with DoRA; masks: None where nothing is dropped."""

    adapter: Adapter
    norm: Tensor | None
    masks: Masks | None

    @classmethod
    def of(cls, adapter: Adapter, norm: Tensor | None, draw: Draw | None, group: Group | None) -> Correction:
        """What an adapter is in one use. group: the ranks that its input features are cut over, as sharding.split_parts cuts them."""
        first = 0 if group is None else group.index * adapter.width // group.size
        return cls(adapter, norm, None if draw is None or not adapter.drop else Masks(draw, adapter, first))

    @property
    def factor(self) -> Tensor | None:
        """c, (O,)."""
        magnitude = self.adapter.m
        return None if magnitude is None or self.norm is None else magnitude / self.norm

    def _pieces(self, tokens: int) -> Iterator[slice]:
        """All tokens at once, or some at a time where they cost (t, D) or (t, O) beside x."""
        size = tokens if self.norm is None and self.masks is None else TOKENS
        return (slice(at, min(at + size, tokens)) for at in range(0, tokens, size))

    def add(self, y: Tensor, x: Tensor, weight: Tensor) -> None:
        """Makes of y (T, O), which is W x, what comes out of the projection; x (T, D)."""
        adapter, factor = self.adapter, self.factor
        if self.masks is None:
            y.addmm_(x @ adapter.a.T, adapter.b.T, alpha=adapter.scale)
            if factor is not None:
                y.mul_(factor)
            return
        b = adapter.b if factor is None else adapter.b * factor[:, None]
        for at in self._pieces(len(x)):
            some = self.masks(x[at], at)
            y[at].addmm_(some @ adapter.a.T, b.T, alpha=adapter.scale)
            if factor is not None:
                y[at].add_((some @ weight.T).mul_(factor - 1.0))

    def scaled(self, slope: Tensor) -> Tensor:
        """The slope (T, O) that the product with W gets."""
        factor = self.factor
        return slope if factor is None or self.masks is not None else slope * factor

    def by_input(self, slope: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        """Adds what the adapter gives to `total` (T, D), the gradient by the input; returns its slope behind A, (T, R)."""
        adapter, factor = self.adapter, self.factor
        by_low = (slope @ (adapter.b if factor is None else adapter.b * factor[:, None])).mul_(adapter.scale)
        if self.masks is None:
            total.addmm_(by_low, adapter.a)
            return by_low
        for at in self._pieces(len(slope)):
            back = by_low[at] @ adapter.a
            if factor is not None:
                back.addmm_(slope[at] * (factor - 1.0), weight)
            total[at].add_(self.masks(back, at))
        return by_low

    def by_trained(self, slope: Tensor, by_low: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        """Slope (T, O), by_low (T, R), x (T, D) -> gradients by A (R, D), B (O, R) and m (O,), where there is one; partial sums alike."""
        found: list[Tensor] = []
        for at in self._pieces(len(x)):
            parts = self._by_trained(slope[at], by_low[at], x[at] if self.masks is None else self.masks(x[at], at), weight)
            if len(slope[at]) < len(slope):  # several pieces are added up in float32 at least
                parts = [part.to(wide(x.dtype)) for part in parts]
            found = [total.add_(part) for total, part in zip(found, parts, strict=True)] if found else parts
        if self.norm is not None and (factor := self.factor) is not None:
            found[1].mul_(factor[:, None])
            found[2].div_(self.norm)
        return [part.to(x.dtype) for part in found]

    def _by_trained(self, slope: Tensor, by_low: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        """The same of some tokens, before c; with DoRA the third is the slope by each row's length as it is."""
        adapter = self.adapter
        low = (x @ adapter.a.T).mul_(adapter.scale)
        rows = [] if self.norm is None else [(x @ weight.T).addmm_(low, adapter.b.T).mul_(slope).sum(0, dtype=wide(x.dtype))]
        return [by_low.T @ x, slope.T @ low, *rows]
