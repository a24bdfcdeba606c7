"""The three matrix products of a projection, in one place: forward, gradient by input, gradient by weight.

`off` is the plain product. The other two kinds are 8-bit floats with dynamic scales (arXiv:2209.05433): an operand is
divided by its largest magnitude, cast, and `torch._scaled_mm` puts the scales back. The recipes are torchao's:

| kind       | scales of                               | forward    | by input             | by weight           |
|------------|-----------------------------------------|------------|----------------------|---------------------|
| tensorwise | a whole operand                         | e4m3, e4m3 | slope e5m2, w e4m3   | slope e5m2, x e4m3  |
| rowwise    | a row along which is summed; for the    | e4m3, e4m3 | slope e4m3, w e4m3   | the plain product   |
|            | weight in `by input` the whole operand  |            |                      |                     |

rowwise is `rowwise_with_gw_hp`: a weight gradient sums over tokens, where one loud token would set the scale of a whole
feature, and both operands would have to be cast a second time, transposed. Scales are rounded to powers of two there, so
that they cost no digits. Results are bfloat16.

A scale is one number of the whole operand, also where ranks hold parts of it: `share` takes the maximum over them. So
the casts, and with them the run, are those of one process under every layout.

Legend: T tokens, D input features, O output features, of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from dist_llm.model.fused import fused
from dist_llm.model.kernels import wide

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 1e-12  # of a largest magnitude: an operand of zeros has a finite scale


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) @ right (K, N) -> (M, N), float32 at least: a GPU writes the sums as it has them, a CPU rounds them to bfloat16 first."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).to(wide(left.dtype))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total (M, N), which may be wider than left (M, K) and right (K, N), plus their product, in place."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    if total.is_cuda:
        return torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    return total.add_(left @ right)


def scaled_product(a: Tensor, back_a: Tensor, b: Tensor, back_b: Tensor, *, fast: bool = False) -> Tensor:
    """a (M, K), b (N, K) in 8 bits, their factors (1, 1), or (M, 1) and (N, 1) -> a b^T times both (M, N), bfloat16.

    fast: a GPU's kernel sums in fewer digits. A CPU's takes hundreds of times as long as the same product in float32, which stands for it.
    """
    if a.is_cuda:
        return torch._scaled_mm(a, b.T, scale_a=back_a, scale_b=back_b.T, out_dtype=torch.bfloat16, use_fast_accum=fast)
    return (a.float() @ b.float().T).mul_(back_a).mul_(back_b.T).bfloat16()


@dataclass(frozen=True)
class Products:
    """The products of one projection under one rule.

    cut: which features are spread over ranks, "output" (column parallel) or "input" (row parallel). share: largest
    magnitudes of this rank's part, float32 -> those over all ranks; None: all is here.
    An operand with one scale is measured once, as long as this object lives; it is held as long, so it must not be written to.
    """

    kind: str = "off"
    cut: Literal["input", "output"] = "output"
    share: Callable[[Tensor], Tensor] | None = None
    known: dict[tuple[int, int], tuple[Any, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, D), weight (O, D), bias (O,) -> (T, O)."""
        if self.kind == "off":
            return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        over_ranks = self.cut == "input"
        y = self._scaled((x,), weight.T, (E4M3, E4M3), whole=(False, False), over_ranks=over_ranks, fast=True)
        return y if bias is None else y.add_(bias)

    def forward_apart(self, x: Tensor, weight: Tensor, widths: Sequence[int], bias: Tensor | None = None) -> list[Tensor]:
        """As `forward` in 8 bits -> (T, O_i) for each of the widths, whose sum is O: what is cast once serves all."""
        over_ranks = self.cut == "input"
        a, back_a, b, back_b = self._cast((x,), weight.T, (E4M3, E4M3), whole=(False, False), over_ranks=over_ranks)
        backs = [back_b] * len(widths) if len(back_b) == 1 else back_b.split(list(widths))
        parts = [scaled_product(a, back_a, part, back, fast=True) for part, back in zip(b.split(list(widths)), backs, strict=True)]
        return parts if bias is None else [part.add_(some) for part, some in zip(parts, bias.split(list(widths)), strict=True)]

    def by_input(self, slope: Tensor | Sequence[Tensor], weight: Tensor, *, total: Tensor | None = None) -> Tensor:
        """Slope (T, O), in 8 bits perhaps pieces (T, O_i) of it, weight (O, D) -> (T, D), added to `total` where there is one."""
        if self.kind == "off":
            assert isinstance(slope, Tensor), "pieces are put side by side by their cast"
            return slope @ weight if total is None else total.addmm_(slope, weight)
        dtype = E5M2 if self.kind == "tensorwise" else E4M3
        over_ranks = self.cut == "output"
        y = self._scaled(pieces_of(slope), weight, (dtype, E4M3), whole=(False, True), over_ranks=over_ranks, fast=self.kind == "rowwise")
        return y if total is None else total.add_(y)

    def by_weight(self, slope: Tensor | Sequence[Tensor], x: Tensor, *, total: Tensor | None = None) -> Tensor:
        """Slope (T, O), in 8 bits or pieces (T, O_i) of it, x (T, D) -> (O, D), added to `total`, which may be wider, if there is one."""
        pieces = pieces_of(slope)
        if self.kind == "tensorwise":
            y = self._scaled([piece.T for piece in pieces], x, (E5M2, E4M3), whole=(True, True), over_ranks=True, fast=False, dim=0)
            return y if total is None else total.add_(y)
        if total is None:
            return torch.cat([piece.T @ x for piece in pieces]) if len(pieces) > 1 else pieces[0].T @ x
        for piece, part in zip(pieces, total.split([piece.shape[1] for piece in pieces]), strict=True):
            add_product(part, piece.T, x)
        return total

    def _scaled(self, left: Sequence[Tensor], right: Tensor, dtypes: Sequence[torch.dtype], *, fast: bool, **how: Any) -> Tensor:
        """left (M, K) @ right (K, N) in 8 bits -> (M, N), as `_cast` has it. fast: sums in fewer digits."""
        a, back_a, b, back_b = self._cast(left, right, dtypes, **how)
        return scaled_product(a, back_a, b, back_b, fast=fast)

    def _cast(
        self,
        left: Sequence[Tensor],
        right: Tensor,
        dtypes: Sequence[torch.dtype],
        *,
        whole: tuple[bool, bool],
        over_ranks: bool,
        dim: int = 1,
    ) -> Sequence[Tensor]:
        """left (M, K), in pieces along `dim`, and right (K, N) -> (left in 8 bits, its factors; right.T in 8 bits, its factors).

        whole: operands with one scale where the kind is rowwise. over_ranks: K is cut, so that rows are spread over ranks; whole
        operands always may be.
        """
        rows = self.kind == "rowwise"
        one = whole if rows else (True, True)
        operands = (tuple(left), right.T)  # both with the dimension that is summed over last
        places = [(left[0].data_ptr(), sum(piece.numel() for piece in left)), (right.data_ptr(), right.numel())]
        before = [self.known.get(place) if whole else None for place, whole in zip(places, one, strict=True)]
        found: list[Any] = [None if known is None else known[1] for known in before]
        if self.share is not None:
            found = self._shared(operands, found, one, over_ranks)
        a, back_a, b, back_b, *found = measured_and_cast(*operands, dim, *found, one, (dtypes[0], dtypes[1]), rows)
        self.known.update((places[at], (operands[at], found[at])) for at in range(2) if one[at])  # held, so that no other takes its place
        return a, back_a, b, back_b

    def _shared(
        self, operands: tuple[tuple[Tensor, ...], Tensor], known: Sequence[Tensor | None], one: tuple[bool, bool], over_ranks: bool
    ) -> list[Tensor]:
        """The largest magnitudes of both operands, over all ranks in one exchange; what is known has been shared already."""
        found = list(measured(*operands, *known, one))
        spread = [at for at in range(2) if (over_ranks or one[at]) and known[at] is None]
        if spread and self.share is not None:
            shared = self.share(torch.cat([found[at] for at in spread]))
            for at, part in zip(spread, shared.split([len(found[at]) for at in spread]), strict=True):
                found[at] = part
        return found


@fused
def measured(
    left: tuple[Tensor, ...], right: Tensor, left_known: Tensor | None, right_known: Tensor | None, one: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The largest magnitudes of two operands (rows, K), float32: (1, 1) where one serves the whole, else of each row (rows, 1).

    The left one in pieces; where each row has its own, they are pieces of all rows.
    """
    return (
        reduce(torch.maximum, [largest(piece, whole=one[0]) for piece in left]) if left_known is None else left_known,
        largest(right, whole=one[1]) if right_known is None else right_known,
    )


@fused
def measured_and_cast(
    left: tuple[Tensor, ...],
    right: Tensor,
    dim: int,
    left_known: Tensor | None,
    right_known: Tensor | None,
    one: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
    rows: bool,
) -> tuple[Tensor, ...]:
    """Two operands (rows, K) -> (the left in 8 bits, its factors, the right, its factors, the largest magnitudes of both).

    The left one in pieces along `dim`, which come side by side on the way.
    All in one call, because between small kernels a host cannot keep up with a GPU. rows: factors are powers of two, one for
    each row of both, as the kernel takes them.
    """
    most = measured(left, right, left_known, right_known, one)
    whole = torch.cat(left, dim) if len(left) > 1 else left[0]
    (a, back_a), (b, back_b) = (cast(*each, power=rows) for each in zip((whole, right), most, dtypes, strict=True))
    if rows:
        back_a, back_b = (back.expand(len(y), 1).contiguous() for back, y in ((back_a, a), (back_b, b)))
    return a, back_a, b, back_b, *most


def pieces_of(x: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A tensor as its only piece."""
    return (x,) if isinstance(x, Tensor) else tuple(x)


def largest(x: Tensor, *, whole: bool) -> Tensor:
    """The largest magnitude of x (rows, K), float32: (1, 1), or of each row (rows, 1)."""
    return (x.abs().amax().view(1, 1) if whole else x.abs().amax(1, keepdim=True)).float()


def cast(x: Tensor, largest: Tensor, dtype: torch.dtype, *, power: bool) -> tuple[Tensor, Tensor]:
    """x (rows, K) and its largest magnitudes -> (x in 8 bits, row-major; the factors that give it back, shaped as `largest`).

    power: factors are powers of two.
    """
    limit = torch.finfo(dtype).max
    scale = limit / largest.clamp(min=SMALLEST)
    if power:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    scaled = (x.float() * scale).clamp_(-limit, limit)
    return scaled.to(dtype).contiguous(), scale.reciprocal()
