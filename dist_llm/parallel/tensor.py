"""Tensor parallelism, with and without sequence parallelism, as operations with their backward written out.

Megatron's split (arXiv:1909.08053): the projections that one input feeds are cut by output feature (column), the one
that leads back by input feature (row), the vocabulary by rows; with sequence parallelism (arXiv:2205.05198) norms and
residuals see S/tp of the tokens, and all-reduces become an all-gather before and a reduce-scatter after.

One reduction per block input: `Column` takes all projections of an input, so its backward sums their input
gradients locally and reduces once, while the weight gradients are computed. With sequence parallelism the gathered
input is not kept but gathered again in backward (memory is what it is for). With a group of one rank the
same lines run and nothing is sent.

The operations take in what is cheap to compute and dear to keep: the norm before a projection, the activation before
the way back. They keep what goes into it and compute it again in backward (`model/kernels.py`). Under torch.compile
they stay outside, for the compiler to fuse and to decide: `compiled.py`.

Legend: B batch, S sequence, S' = S/tp if sp else S, D dim, O local output features, F local ffn, T tokens B x S,
v local vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function

from dist_llm import comm
from dist_llm.mesh import Group, groups_by_key
from dist_llm.model import loss as vocabulary
from dist_llm.model.kernels import TOKENS, activate, activate_backward, norm, norm_backward
from dist_llm.model.parts import Draw, Norm, Projection, Projections
from dist_llm.model.preference import Pairs
from dist_llm.model.products import Products
from dist_llm.model.roles import Roles
from dist_llm.model.sums import add_rows, known_slope, sums_of
from dist_llm.parallel.across import Across


@dataclass(frozen=True)
class Split:
    """How a group shares a block. sp: outside split regions each rank keeps S/tp tokens. fp8: the kind of products, or off.

    ordered: inside a region under sp, tokens are in the order of their sequences, for which they are copied when they come and
    when they go; otherwise in the order of the ranks that keep them, slice by slice, under the same shape.
    """

    group: Group
    sp: bool
    fp8: str = "off"
    ordered: bool = True

    @property
    def tokens(self) -> int:
        """sp and ordered as a number that an operation can be given: `from_key` reads it."""
        return int(self.sp) * (1 if self.ordered else 2)

    @classmethod
    def from_key(cls, group: str, tokens: int, fp8: str) -> Split:
        """From the key of its group."""
        return cls(groups_by_key[group], tokens > 0, fp8, tokens != 2)

    def products(self, cut: Literal["input", "output"]) -> Products:
        """The products of a projection whose features are cut over the group; scales are those of the whole operands."""
        share = None if self.group.size == 1 else lambda largest: comm.all_reduce(largest, self.group, op="max")
        return Products(self.fp8, cut, share)


@dataclass(frozen=True)
class Rule:
    """The norm in front of an operation."""

    kind: str
    eps: float

    def __call__(self, x: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        """(..., D) -> (..., D)."""
        return norm(x, gain, shift, kind=self.kind, eps=self.eps)

    def backward(self, slope: Tensor, x: Tensor, gain: Tensor, shift: Tensor | None) -> list[Tensor | None]:
        """[by x, by gain, by shift], None where the norm has no such weight."""
        found = norm_backward(slope, x, gain, shift, kind=self.kind, eps=self.eps)
        return [*found, *[None] * (3 - len(found))]


class TensorRoles(Roles):
    """The model's seams for the ranks of a tensor-parallel group. draws: a region may draw masks, those of an adapter's dropout."""

    draws = False

    def __init__(self, group: Group, *, sp: bool, vocab: int, first: int, smoothing: float = 0.0, fp8: str = "off") -> None:
        super().__init__(smoothing=smoothing)
        self.split, self.vocab, self.first = Split(group, sp, fp8), vocab, first
        self.loose = replace(self.split, ordered=False)

    def columns(
        self, x: Tensor, norm: Norm, projections: Projections, draw: Draw | None = None, *, any_order: bool = False
    ) -> list[Tensor]:
        """Enters with (B, S', D) before its norm, leaves with (B, S, O_i) for each projection: this rank's output features."""
        weights, rule = projections.weights, Rule(norm.kind, norm.eps)
        split = self.order(any_order, draw)
        given = (rule, projections.joined, len(weights), split, *weights, *projections.biases)
        return list(Column.apply(x, norm.weight, norm.bias, *given))

    def row(
        self, parts: Sequence[Tensor], activation: str, projection: Projection, draw: Draw | None = None, *, any_order: bool = False
    ) -> Tensor:
        """Enters with this rank's features (B, S, O), leaves with the sum over ranks (B, S', D), the bias added once."""
        y = Row.apply(activation, self.order(any_order, draw), projection.weight, *parts)
        return y if projection.bias is None else y + projection.bias

    def order(self, any_order: bool, draw: Draw | None) -> Split:
        """How a region keeps its tokens: in their order where it is asked for, or where masks may be drawn by their places."""
        return self.loose if any_order and not (self.draws and draw is not None) else self.split

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Enters with all tokens (B, S) and rows [first, first + v) of the table, leaves with (B, S', D)."""
        return Embed.apply(by_rank(tokens, self.loose), weight, self.first, self.loose)

    def across(self, parts: Sequence[Tensor], norms: Sequence[Norm]) -> list[Tensor]:
        """Enters with this rank's queries and keys (B, S, H E), leaves with them normed over the heads of all ranks."""
        return list(Across.apply(norms[0].kind, norms[0].eps, self.split.group, len(parts), *parts, *(norm.weight for norm in norms)))

    def loss(
        self,
        x: Tensor,
        norm: Norm,
        weight: Tensor,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        pairs: Pairs | None = None,
        softcap: float = 0.0,
        smooth: bool = True,
    ) -> Tensor:
        """Enters with (B, S', D) before its norm and v rows of the output table, leaves with the summed loss of all tokens on each rank.

        weights (B, S): what each token's loss counts. pairs: what is made of the losses instead of their sum.
        """
        smoothing, group = self.smoothing if smooth else 0.0, self.split.group
        part = vocabulary.Slice(self.first, self.vocab, smoothing, lambda known: _share(known, group), softcap)
        rule, split = Rule(norm.kind, norm.eps), self.split if pairs else self.loose
        counts = None if weights is None else by_rank(weights, split).flatten()
        given = (rule, by_rank(labels, split), pairs or vocabulary.Counted(counts), part, torch.is_grad_enabled(), split)
        return VocabularyLoss.apply(x, norm.weight, norm.bias, weight, *given)

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Enters with (B, S', D), leaves with this rank's logits (B, S, v)."""
        return gather(x, self.split) @ weight.T

    def outside(self, per_token: Tensor) -> Tensor:
        """Enters with (B, S, ...), leaves with this rank's tokens (B, S', ...)."""
        if not self.split.sp:
            return per_token
        group = self.split.group
        length = per_token.shape[1] // group.size
        return per_token[:, group.index * length : (group.index + 1) * length]


# --- sequence slices -------------------------------------------------------------------------------------------------


def gather(x: Tensor, split: Split) -> Tensor:
    """Enters with (B, S', D), leaves with (B, S, D)."""
    return finish_gather(start_gather(x, split), split)


def start_gather(x: Tensor, split: Split) -> comm.Pending:
    """Begins what `finish_gather` ends."""
    if not split.sp:
        return comm.Pending(None, lambda: x)
    return (comm.start_all_gather_inner if split.ordered else comm.start_all_gather)(x.contiguous(), split.group)


def finish_gather(pending: comm.Pending, split: Split) -> Tensor:
    """Leaves with (B, S, D)."""
    gathered = pending.finish()
    if not split.sp or split.ordered:
        return gathered
    return gathered.view(len(gathered) // split.group.size, -1, gathered.shape[-1])


def start_reduce(x: Tensor, split: Split) -> comm.Pending:
    """Enters with partial sums (B, S, D); finishing leaves their sum, (B, S', D)."""
    if not split.sp:
        return comm.start_all_reduce(x, split.group)
    ranks, fixed = split.group.size, _sums_here(x)
    if split.ordered:
        return comm.start_reduce_scatter_inner(x.contiguous(), split.group, fixed=fixed)
    return comm.start_reduce_scatter(x.view(ranks * len(x), -1, x.shape[-1]), split.group, fixed=fixed)


def by_rank(per_token: Tensor, split: Split) -> Tensor:
    """(B, S) in the order that tokens have inside a region which is not `ordered`."""
    if not split.sp or split.ordered:
        return per_token
    return per_token.unflatten(1, (split.group.size, -1)).transpose(0, 1).reshape(per_token.shape)


def reduce(x: Tensor, split: Split) -> Tensor:
    """Enters with partial sums (B, S, D), leaves with their sum (B, S', D)."""
    return start_reduce(x, split).finish()


def _sums_here(x: Tensor) -> bool:
    """On gloo our own sum after an all-to-all sends half of what its reduce_scatter does; NCCL's is the better one."""
    return x.device.type == "cpu"


def by_weight(slope: Tensor | Sequence[Tensor], x: Tensor, weight: Tensor, products: Products) -> Tensor | None:
    """Slope (T, O), or its pieces, x (T, D) -> the gradient by weight (O, D); None where it was added to the sums of a unit's gradients."""
    sums = sums_of(weight)
    found = products.by_weight(slope, x, total=sums)
    return found if sums is None else None


# --- column: one input, several projections --------------------------------------------------------------------------


def columns_forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], split: Split, widths: Sequence[int] = ()
) -> list[Tensor]:
    """x (B, S', D), normed, weights (O_i, D), biases (O_i,) for all or none -> outputs (B, S, O_i).

    widths: those of the outputs of one weight in 8 bits.
    """
    whole, products = gather(x, split).flatten(0, 1), split.products("output")
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    if widths:
        outputs = products.forward_apart(whole, weights[0], widths, given[0])
    else:
        outputs = [products.forward(whole, weight, bias) for weight, bias in zip(weights, given, strict=True)]
    return [y.unflatten(0, (x.shape[0], -1)) for y in outputs]


def columns_backward(slopes: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], split: Split) -> tuple[Tensor, list[Tensor | None]]:
    """Slopes (T, O_i), x (B, S', D), normed, weights (O_i, D) -> (by x (B, S', D), by each weight (O_i, D), as `by_weight` leaves it).

    Slopes of one weight in 8 bits may be pieces.
    """
    gathering, products = start_gather(x, split), split.products("output")
    given: Sequence[Tensor | Sequence[Tensor]] = [slopes] if len(weights) == 1 < len(slopes) else slopes
    by_x = products.by_input(given[0], weights[0])
    for slope, weight in zip(given[1:], weights[1:], strict=True):
        products.by_input(slope, weight, total=by_x)
    whole = finish_gather(gathering, split).flatten(0, 1)
    reducing = start_reduce(by_x.unflatten(0, (x.shape[0], -1)), split)  # while the weight gradients are computed
    by_weights = [by_weight(slope, whole, weight, products) for slope, weight in zip(given, weights, strict=True)]
    return reducing.finish(), by_weights


class Column(Function):
    """The norm of an input and its projections. joined: their weights are neighbours in memory, so that one product serves all."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, shift: Tensor | None, rule: Rule, joined: bool, count: int, split: Split, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        """x (B, S', D), `count` weights (O_i, D), then biases (O_i,) for all or none -> outputs (B, S, O_i)."""
        weights, biases = parameters[:count], parameters[count:]
        ctx.rule, ctx.joined, ctx.split, ctx.biased = rule, joined, split, bool(biases)
        ctx.save_for_backward(x, gain, shift, *weights)
        if not joined:
            return tuple(own(y) for y in columns_forward(rule(x, gain, shift), weights, biases, split))
        (y,) = columns_forward(rule(x, gain, shift), [beside(weights, 0)], [torch.cat(biases)] if biases else [], split)
        return tuple(own(part) for part in y.split_with_sizes([len(weight) for weight in weights], dim=-1))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        """One product for all projections where the slopes are neighbours too."""
        x, gain, shift, *weights = ctx.saved_tensors
        flat = [slope.reshape(-1, slope.shape[-1]) for slope in slopes]
        one = ctx.joined and _are_beside(flat)
        outer, inner = ([beside(flat, 1)], [beside(weights, 0)]) if one else (flat, weights)
        by_normed, by_weights = columns_backward(outer, ctx.rule(x, gain, shift), inner, ctx.split)
        if one:
            (whole,) = by_weights
            by_weights = [None] * len(weights) if whole is None else list(whole.split_with_sizes([len(weight) for weight in weights]))
        by_biases = [slope.sum(0) for slope in flat] if ctx.biased else []
        return *ctx.rule.backward(by_normed, x, gain, shift), *[None] * 4, *by_weights, *by_biases


def own(view: Tensor) -> Tensor:
    """The same memory, no longer a view to autograd, which lets nobody write into one of several views of a buffer."""
    return view.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def beside(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """One view over 2-D tensors that lie side by side along `dim`."""
    rows, columns = tensors[0].shape
    whole = sum(tensor.shape[dim] for tensor in tensors)
    return tensors[0].as_strided((whole, columns) if dim == 0 else (rows, whole), tensors[0].stride())


def _are_beside(tensors: Sequence[Tensor]) -> bool:
    """Whether 2-D tensors are neighbouring columns of one buffer."""
    pairs = zip(tensors, tensors[1:], strict=False)
    return all(a.stride() == b.stride() and a.data_ptr() + a.shape[1] * a.element_size() == b.data_ptr() for a, b in pairs)


# --- row: back to the residual stream --------------------------------------------------------------------------------


def row_forward(parts: Sequence[Tensor], activation: str, weight: Tensor, split: Split) -> Tensor:
    """Parts (B, S, F), made one by the activation, weight (D, F) -> the sum over ranks (B, S', D).

    On a CPU the activation is made in pieces that stay in the cache.
    """
    flat = [part.flatten(0, 1) for part in parts]
    some = _piece(flat[0], activation, split)
    if some == flat[0].shape[0]:
        y = split.products("input").forward(activate(flat, kind=activation), weight)
    else:
        y = parts[0].new_empty(flat[0].shape[0], weight.shape[0])
        for at in range(0, y.shape[0], some):
            here = slice(at, at + some)
            torch.mm(activate([part[here] for part in flat], kind=activation), weight.T, out=y[here])
    return reduce(y.unflatten(0, (parts[0].shape[0], -1)), split)


def row_backward(slope: Tensor, x: Tensor, weight: Tensor, split: Split) -> tuple[Tensor, Tensor | None]:
    """Slope (B, S', D), x (B, S, F), weight (D, F) -> (by x (B, S, F), by weight (D, F), as `by_weight` leaves it)."""
    whole, products = gather(slope.contiguous(), split).flatten(0, 1), split.products("input")
    return products.by_input(whole, weight).view(x.shape), by_weight(whole, x.flatten(0, 1), weight, products)


def activated_row_backward(slope: Tensor, parts: Sequence[Tensor], activation: str, weight: Tensor, split: Split) -> Tensor | None:
    """Slope (B, S', D), parts (B, S, F) -> by weight (D, F), as `by_weight` leaves it; the slopes by each part take its place.

    Nobody else reads the parts: what a projection has made goes through the activation alone.
    """
    whole = gather(slope.contiguous(), split).flatten(0, 1)
    flat, products, sums = [part.flatten(0, 1) for part in parts], split.products("input"), sums_of(weight)
    total = torch.zeros_like(weight, dtype=vocabulary.wide(weight.dtype)) if sums is None else sums
    some = _piece(whole, activation, split)
    for at in range(0, whole.shape[0], some):
        here = slice(at, at + some)
        y = activate_backward(products.by_input(whole[here], weight), [part[here] for part in flat], kind=activation)
        products.by_weight(whole[here], y, total=total)
        del y  # before the next piece makes its own
    return total.to(weight.dtype) if sums is None else None


def _piece(x: Tensor, activation: str, split: Split) -> int:
    """Tokens of x (T, ...) that go through an activation at once; an 8-bit product wants them all, for its scale."""
    apart = x.device.type == "cpu" and activation != "none" and split.fp8 == "off"
    return min(TOKENS, x.shape[0]) if apart else x.shape[0]


class Row(Function):
    """An activation and the projection behind it, summed over ranks."""

    @staticmethod
    def forward(ctx: Any, activation: str, split: Split, weight: Tensor, *parts: Tensor) -> Tensor:
        """Weight (D, F), parts (B, S, F) -> (B, S', D)."""
        ctx.activation, ctx.split = activation, split
        ctx.save_for_backward(weight, *parts)
        return row_forward(parts, activation, weight, split)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Behind an activation it uses up the parts: a graph is good for one backward."""
        weight, *parts = ctx.saved_tensors
        if ctx.activation == "none":
            by_part, by_weight = row_backward(slope, parts[0], weight, ctx.split)
            return None, None, by_weight, by_part
        slopes = [part.detach() for part in parts]
        by_weight = activated_row_backward(slope, slopes, ctx.activation, weight, ctx.split)
        return None, None, by_weight, *slopes


# --- the two ends over the vocabulary ---------------------------------------------------------------------------------


class Embed(Function):
    """Each rank looks up its own rows, the rest are zero, then the sum."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, first: int, split: Split) -> Tensor:
        """Tokens (B, S), weight (v, D) -> (B, S', D)."""
        ctx.first, ctx.rows, ctx.split = first, weight.shape[0], split
        ctx.save_for_backward(tokens, weight)
        inside, local = _local_rows(tokens, first, weight.shape[0])
        return reduce(torch.nn.functional.embedding(local, weight).masked_fill_(~inside[..., None], 0.0), split)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Slope (B, S', D) -> by weight (v, D), or added to its sums, a row for each token."""
        tokens, weight = ctx.saved_tensors
        whole = gather(slope.contiguous(), ctx.split)
        inside, local = _local_rows(tokens, ctx.first, ctx.rows)
        whole = whole if ctx.split.group.size == 1 else whole * inside[..., None]
        sums = sums_of(weight)
        if sums is None:
            return None, torch.ops.aten.embedding_dense_backward(whole, local, ctx.rows, -1, False), None, None
        add_rows(sums, local.flatten(), whole.flatten(0, 1))  # rows that are elsewhere: nothing, to row 0
        return None, None, None, None


def _local_rows(tokens: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    local = tokens - first
    inside = (local >= 0) & (local < rows)
    return inside, local.masked_fill(~inside, 0)


class VocabularyLoss(Function):
    """The norm of an input and its summed loss over a vocabulary in slices; with `slopes` its gradients are made on the way.

    Sends three scalars a token: the largest logit, then the exponentials and the label's logit in one reduction
    (a fourth, the sum of logits, only under label smoothing); for pairs whose table is trained both ways twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        rule: Rule,
        labels: Tensor,
        objective: vocabulary.Objective,
        part: vocabulary.Slice,
        slopes: bool,
        split: Split,
    ) -> Tensor:
        """x (B, S', D), weight (v, D), labels (B, S) -> what the objective makes of them, float64, the same on each rank."""
        flat = labels.flatten()

        def gathered() -> Tensor:
            return gather(rule(x, gain, shift), split).flatten(0, 1)

        if not slopes:
            return objective.alone(gathered(), weight, flat, part)
        trained, slope = ctx.needs_input_grad[3], known_slope()
        total = sums_of(weight) if trained and slope is not None else None
        ctx.scaled = slope is not None
        loss, by_normed, by_weight = objective.with_gradients(gathered(), weight, flat, part, trained=trained, slope=slope, total=total)
        by_normed = reduce(by_normed.unflatten(0, (x.shape[0], -1)), split)
        ctx.save_for_backward(*rule.backward(by_normed, x, gain, shift), by_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        """The slope of the loss, the first of what came out -> by x (B, S', D), by the norm's weight and bias (D,), by weight (v, D).

        Scaled where they lie, unless they are: autograd refuses a second backward, because what was kept has changed.
        """
        if ctx.scaled:
            return *ctx.saved_tensors, *[None] * 6
        slope = scale.view(-1)[0]
        gradients = (None if gradient is None else vocabulary.scale_by(gradient, slope) for gradient in ctx.saved_tensors)
        return *gradients, *[None] * 6


def _share(known: vocabulary.Statistics, group: Group) -> vocabulary.Statistics:
    """Statistics of each token over a slice of the vocabulary -> over all of it, on each rank."""
    if group.size == 1:
        return known
    local = known.largest.clone()
    largest = comm.all_reduce(known.largest, group, op="max")
    exponentials = known.exponentials * (local - largest).exp_()
    summed = comm.all_reduce(torch.stack([exponentials, known.label, *([] if known.total is None else [known.total])]), group)
    return vocabulary.Statistics(largest, summed[0], summed[1], None if known.total is None else summed[2])
