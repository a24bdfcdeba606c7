"""Tensor parallelism, with and without sequence parallelism, as custom operations.

Megatron's split (arXiv:1909.08053): the projections that one input feeds are cut by output feature (column), the one
that leads back by input feature (row), the vocabulary by rows; with sequence parallelism (arXiv:2205.05198) norms and
residuals see S/tp of the tokens, and all-reduces become an all-gather before and a reduce-scatter after.

One reduction per block input: `column` takes all projections of an input, so its backward sums their input
gradients locally and reduces once, while the weight gradients are computed. With sequence parallelism the gathered
input is not kept but gathered again in backward (memory is what it is for). With a group of one rank the
same lines run and nothing is sent.

The operations take in what is cheap to compute and dear to keep: the norm before a projection, the activation before
the way back. They keep what goes into it and compute it again in backward (`model/kernels.py`). Under torch.compile
norms and activations stay outside, for the compiler to fuse and to decide.

The operations are registered with torch.library (fake and autograd), so that blocks compile around them. Each takes
the group's key and `sp`. Legend: B batch, S sequence, S' = S/tp if sp else S, D dim, O local output features, F local
ffn, T tokens B x S, v local vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_llm import comm
from dist_llm.mesh import Group, groups_by_key
from dist_llm.model import loss as vocabulary
from dist_llm.model.kernels import TOKENS, activate, activate_backward, norm, norm_backward
from dist_llm.model.parts import Norm, Projections
from dist_llm.model.roles import Roles
from dist_llm.parallel.operation import differentiable, operation


class TensorRoles(Roles):
    """The model's seams for the ranks of a tensor-parallel group."""

    def __init__(self, group: Group, *, sp: bool, vocab: int, first: int, smoothing: float = 0.0) -> None:
        super().__init__(smoothing=smoothing)
        self.group, self.sp, self.vocab, self.first = group, sp, vocab, first

    def columns(self, x: Tensor, norm: Norm, projections: Projections) -> list[Tensor]:
        """Enters with (B, S', D) before its norm, leaves with (B, S, O_i) for each projection: this rank's output features."""
        weights, biases, joined = projections.weights, projections.biases, projections.joined
        if torch.compiler.is_compiling():
            return column(norm(x), None, None, "none", 0.0, weights, biases, joined, self.group.key, self.sp)
        return column(x, norm.weight, norm.bias, norm.kind, norm.eps, weights, biases, joined, self.group.key, self.sp)

    def row(self, parts: Sequence[Tensor], activation: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Enters with this rank's features (B, S, O), leaves with the sum over ranks (B, S', D), the bias added once."""
        if torch.compiler.is_compiling():
            parts, activation = [activate(parts, kind=activation)], "none"
        y = row(list(parts), activation, weight, self.group.key, self.sp)
        return y if bias is None else y + bias

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Enters with all tokens (B, S) and rows [first, first + v) of the table, leaves with (B, S', D)."""
        return embed(tokens, weight, self.first, self.group.key, self.sp)

    def loss(self, x: Tensor, norm: Norm, weight: Tensor, labels: Tensor, *, smooth: bool = True) -> Tensor:
        """Enters with (B, S', D) before its norm and v rows of the output table, leaves with the summed loss of all tokens on each rank."""
        smoothing, rule = self.smoothing if smooth else 0.0, (norm.weight, norm.bias, norm.kind, norm.eps)
        slopes = torch.is_grad_enabled()
        return vocabulary_loss(x, *rule, weight, labels, self.first, self.vocab, smoothing, slopes, self.group.key, self.sp)[0]

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """Enters with (B, S', D), leaves with this rank's logits (B, S, v)."""
        return _gather(x, self.group, self.sp) @ weight.T

    def outside(self, per_token: Tensor) -> Tensor:
        """Enters with (B, S, ...), leaves with this rank's tokens (B, S', ...)."""
        if not self.sp:
            return per_token
        length = per_token.shape[1] // self.group.size
        return per_token[:, self.group.index * length : (self.group.index + 1) * length]


# --- sequence slices -------------------------------------------------------------------------------------------------


def _gather(x: Tensor, group: Group, sp: bool) -> Tensor:
    """Enters with (B, S', D), leaves with (B, S, D)."""
    return _finish_gather(_start_gather(x, group, sp), sp)


def _start_gather(x: Tensor, group: Group, sp: bool) -> comm.Pending:
    return comm.start_all_gather(x.transpose(0, 1).contiguous(), group) if sp else comm.Pending(None, lambda: x)


def _finish_gather(pending: comm.Pending, sp: bool) -> Tensor:
    gathered = pending.finish()
    return gathered.transpose(0, 1).contiguous() if sp else gathered


def _start_reduce(x: Tensor, group: Group, sp: bool) -> comm.Pending:
    """Enters with partial sums (B, S, D); finishing leaves their sum, (B, S', D)."""
    if sp:
        return comm.start_reduce_scatter(x.transpose(0, 1).contiguous(), group, fixed=_sums_here(x))
    return comm.start_all_reduce(x, group)


def _finish_reduce(pending: comm.Pending, sp: bool) -> Tensor:
    reduced = pending.finish()
    return reduced.transpose(0, 1).contiguous() if sp else reduced


def _sums_here(x: Tensor) -> bool:
    """On gloo our own sum after an all-to-all sends half of what its reduce_scatter does; NCCL's is the better one."""
    return x.device.type == "cpu"


def _outside_like(x: Tensor, group: Group, sp: bool, width: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // (group.size if sp else 1), width)


def _inside_like(x: Tensor, group: Group, sp: bool, width: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * (group.size if sp else 1), width)


# --- column: one input, several projections --------------------------------------------------------------------------


def _column_fake(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    kind: str,
    eps: float,
    weights: list[Tensor],
    biases: list[Tensor],
    joined: bool,
    group: str,
    sp: bool,
) -> list[Tensor]:
    widths = [weight.shape[0] for weight in weights]
    if joined:
        return list(_inside_like(x, groups_by_key[group], sp, sum(widths)).split_with_sizes(widths, dim=-1))
    return [_inside_like(x, groups_by_key[group], sp, width) for width in widths]


@operation(
    "column(Tensor x, Tensor? gain, Tensor? shift, str kind, float eps, Tensor[] weights, Tensor[] biases, bool joined, "
    "str group, bool sp) -> Tensor[]",
    fake=_column_fake,
)
def column(
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    kind: str,
    eps: float,
    weights: list[Tensor],
    biases: list[Tensor],
    joined: bool,
    group: str,
    sp: bool,
) -> list[Tensor]:
    """x (B, S', D), its norm (kind "none": there is none), weights (O_i, D), biases (O_i,) for all or none -> outputs (B, S, O_i).

    joined: the weights are neighbours in memory; one product gives all outputs, side by side.
    """
    whole = _gather(_normed(x, gain, shift, kind, eps), groups_by_key[group], sp).flatten(0, 1)
    if joined:
        y = _product(whole, _beside(weights, 0), torch.cat(biases) if biases else None)
        parts = y.unflatten(0, (x.shape[0], -1)).split_with_sizes([weight.shape[0] for weight in weights], dim=-1)
        return [_own(part) for part in parts]
    given: Sequence[Tensor | None] = biases or [None] * len(weights)
    outputs = [_product(whole, weight, bias) for weight, bias in zip(weights, given, strict=True)]
    return [_own(y.unflatten(0, (x.shape[0], -1))) for y in outputs]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


def _normed(x: Tensor, gain: Tensor | None, shift: Tensor | None, kind: str, eps: float) -> Tensor:
    return x if gain is None else norm(x, gain, shift, kind=kind, eps=eps)


def _own(view: Tensor) -> Tensor:
    """The same memory, no longer a view to autograd, which lets nobody write into one of several views of a buffer."""
    return view.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, view.stride())


def _beside(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """One view over 2-D tensors that lie side by side along `dim`."""
    rows, columns = tensors[0].shape
    whole = sum(tensor.shape[dim] for tensor in tensors)
    return tensors[0].as_strided((whole, columns) if dim == 0 else (rows, whole), tensors[0].stride())


def _are_beside(tensors: Sequence[Tensor]) -> bool:
    """Whether 2-D tensors are neighbouring columns of one buffer."""
    pairs = zip(tensors, tensors[1:], strict=False)
    return all(a.stride() == b.stride() and a.data_ptr() + a.shape[1] * a.element_size() == b.data_ptr() for a, b in pairs)


def _column_backward_fake(
    slopes: list[Tensor],
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    kind: str,
    eps: float,
    weights: list[Tensor],
    biased: bool,
    joined: bool,
    group: str,
    sp: bool,
) -> list[Tensor]:
    by_norm = [torch.empty_like(given) for given in (gain, shift) if given is not None]
    by_biases = [weight.new_empty(weight.shape[0]) for weight in weights] if biased else []
    return [torch.empty_like(x), *by_norm, *(torch.empty_like(weight) for weight in weights), *by_biases]


@operation(
    "column_backward(Tensor[] slopes, Tensor x, Tensor? gain, Tensor? shift, str kind, float eps, Tensor[] weights, bool biased, "
    "bool joined, str group, bool sp) -> Tensor[]",
    fake=_column_backward_fake,
)
def column_backward(
    slopes: list[Tensor],
    x: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    kind: str,
    eps: float,
    weights: list[Tensor],
    biased: bool,
    joined: bool,
    group: str,
    sp: bool,
) -> list[Tensor]:
    """Slopes (B, S, O_i) -> [by x (B, S', D), by the norm's weight and bias (D,), by each weight (O_i, D), by each bias (O_i,)]."""
    mesh_group = groups_by_key[group]
    gathering = _start_gather(_normed(x, gain, shift, kind, eps), mesh_group, sp)
    flat = [slope.reshape(-1, slope.shape[-1]) for slope in slopes]
    one = joined and _are_beside(flat)  # one product for all projections
    outer, inner = ([_beside(flat, 1)], [_beside(weights, 0)]) if one else (flat, weights)
    by_normed = outer[0] @ inner[0]
    for slope, weight in zip(outer[1:], inner[1:], strict=True):
        by_normed.addmm_(slope, weight)
    whole = _finish_gather(gathering, sp).flatten(0, 1)
    reducing = _start_reduce(by_normed.unflatten(0, (x.shape[0], -1)), mesh_group, sp)  # while the weight gradients are computed
    by_weights = [slope.T @ whole for slope in outer]
    by_biases = [slope.sum(0) for slope in flat] if biased else []
    if one:
        by_weights = list(by_weights[0].split_with_sizes([weight.shape[0] for weight in weights]))
    by_x = _finish_reduce(reducing, sp)
    by_norm = [by_x] if gain is None else norm_backward(by_x, x, gain, shift, kind=kind, eps=eps)
    return [*by_norm, *by_weights, *by_biases]


def _column_setup(ctx, inputs, output) -> None:
    x, gain, shift, ctx.kind, ctx.eps, weights, biases, ctx.joined, ctx.group, ctx.sp = inputs
    ctx.count, ctx.biased = len(weights), bool(biases)
    ctx.save_for_backward(x, gain, shift, *weights)


def _column_backward(ctx, slopes: list[Tensor]):
    x, gain, shift, *weights = ctx.saved_tensors
    rule = (gain, shift, ctx.kind, ctx.eps)
    by_x, *rest = column_backward(slopes, x, *rule, weights, ctx.biased, ctx.joined, ctx.group, ctx.sp)
    by_gain = None if gain is None else rest.pop(0)
    by_shift = None if shift is None else rest.pop(0)
    return by_x, by_gain, by_shift, None, None, rest[: ctx.count], rest[ctx.count :], None, None, None


differentiable("column", backward=_column_backward, setup=_column_setup)


# --- row: back to the residual stream --------------------------------------------------------------------------------


def _row_fake(parts: list[Tensor], activation: str, weight: Tensor, group: str, sp: bool) -> Tensor:
    return _outside_like(parts[0], groups_by_key[group], sp, weight.shape[0])


@operation("row(Tensor[] parts, str activation, Tensor weight, str group, bool sp) -> Tensor", fake=_row_fake)
def row(parts: list[Tensor], activation: str, weight: Tensor, group: str, sp: bool) -> Tensor:
    """parts (B, S, F), made one by the activation, weight (D, F) -> the sum over ranks (B, S', D)."""
    y = _activated_product(parts, activation, weight)
    return _finish_reduce(_start_reduce(y, groups_by_key[group], sp), sp)


def _activated_product(parts: list[Tensor], activation: str, weight: Tensor) -> Tensor:
    """Parts (B, S, F), weight (D, F) -> (B, S, D), partial; on a CPU in pieces whose activation stays in the cache."""
    if activation == "none" or parts[0].device.type != "cpu":
        return activate(parts, kind=activation) @ weight.T
    flat = [part.flatten(0, 1) for part in parts]
    y = parts[0].new_empty(flat[0].shape[0], weight.shape[0])
    for at in range(0, y.shape[0], TOKENS):
        here = slice(at, at + TOKENS)
        torch.mm(activate([part[here] for part in flat], kind=activation), weight.T, out=y[here])
    return y.unflatten(0, (parts[0].shape[0], -1))


def _row_backward_fake(slope: Tensor, x: Tensor, weight: Tensor, group: str, sp: bool) -> list[Tensor]:
    return [x.new_empty(x.shape), torch.empty_like(weight)]


@operation("row_backward(Tensor slope, Tensor x, Tensor weight, str group, bool sp) -> Tensor[]", fake=_row_backward_fake)
def row_backward(slope: Tensor, x: Tensor, weight: Tensor, group: str, sp: bool) -> list[Tensor]:
    """Slope (B, S', D), x (B, S, F) -> [by x (B, S, F), by weight (D, F)]."""
    whole = _gather(slope.contiguous(), groups_by_key[group], sp).flatten(0, 1)
    return [(whole @ weight).view(x.shape), whole.T @ x.flatten(0, 1)]


def activated_row_backward(slope: Tensor, parts: list[Tensor], activation: str, weight: Tensor, group: str, sp: bool) -> Tensor:
    """Slope (B, S', D), parts (B, S, F) -> by weight (D, F); the slopes by each part take its place.

    Nobody else reads the parts: what a projection has made goes through the activation alone. Never traced by a compiler.
    """
    whole = _gather(slope.contiguous(), groups_by_key[group], sp).flatten(0, 1)
    flat = [part.flatten(0, 1) for part in parts]
    by_weight = torch.zeros_like(weight, dtype=vocabulary.wide(weight.dtype))
    some = TOKENS if whole.device.type == "cpu" else whole.shape[0]
    for at in range(0, whole.shape[0], some):
        here = slice(at, at + some)
        y = activate_backward(whole[here] @ weight, [part[here] for part in flat], kind=activation)
        if by_weight.dtype == y.dtype:
            by_weight.addmm_(whole[here].T, y)
        else:
            by_weight += whole[here].T @ y
    return by_weight.to(weight.dtype)


def _row_setup(ctx, inputs, output) -> None:
    parts, ctx.activation, weight, ctx.group, ctx.sp = inputs
    ctx.save_for_backward(weight, *parts)


def _row_backward(ctx, slope: Tensor):
    weight, *parts = ctx.saved_tensors
    if ctx.activation == "none":
        by_x, by_weight = row_backward(slope, parts[0], weight, ctx.group, ctx.sp)
        return [by_x], None, by_weight, None, None
    parts = [part.detach() for part in parts]
    by_weight = activated_row_backward(slope, parts, ctx.activation, weight, ctx.group, ctx.sp)
    return parts, None, by_weight, None, None


differentiable("row", backward=_row_backward, setup=_row_setup)


# --- the two ends over the vocabulary ---------------------------------------------------------------------------------


def _embed_fake(tokens: Tensor, weight: Tensor, first: int, group: str, sp: bool) -> Tensor:
    length = tokens.shape[1] // (groups_by_key[group].size if sp else 1)
    return weight.new_empty(tokens.shape[0], length, weight.shape[1])


@operation("embed(Tensor tokens, Tensor weight, int first, str group, bool sp) -> Tensor", fake=_embed_fake)
def embed(tokens: Tensor, weight: Tensor, first: int, group: str, sp: bool) -> Tensor:
    """tokens (B, S), weight (v, D) -> (B, S', D): each rank looks up its own rows, the rest are zero, then the sum."""
    inside, local = _local_rows(tokens, first, weight.shape[0])
    found = torch.nn.functional.embedding(local, weight).masked_fill_(~inside[..., None], 0.0)
    return _finish_reduce(_start_reduce(found, groups_by_key[group], sp), sp)


def _embed_backward_fake(slope: Tensor, tokens: Tensor, rows: int, first: int, group: str, sp: bool) -> Tensor:
    return slope.new_empty(rows, slope.shape[-1])


@operation("embed_backward(Tensor slope, Tensor tokens, int rows, int first, str group, bool sp) -> Tensor", fake=_embed_backward_fake)
def embed_backward(slope: Tensor, tokens: Tensor, rows: int, first: int, group: str, sp: bool) -> Tensor:
    """Slope (B, S', D) -> by weight (v, D)."""
    whole = _gather(slope.contiguous(), groups_by_key[group], sp)
    inside, local = _local_rows(tokens, first, rows)
    return torch.ops.aten.embedding_dense_backward(whole * inside[..., None], local, rows, -1, False)


def _embed_setup(ctx, inputs, output) -> None:
    tokens, weight, ctx.first, ctx.group, ctx.sp = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(tokens)


def _embed_backward(ctx, slope: Tensor):
    (tokens,) = ctx.saved_tensors
    return None, embed_backward(slope, tokens, ctx.rows, ctx.first, ctx.group, ctx.sp), None, None, None


differentiable("embed", backward=_embed_backward, setup=_embed_setup)


def _local_rows(tokens: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    local = tokens - first
    inside = (local >= 0) & (local < rows)
    return inside, local.masked_fill(~inside, 0)


def _vocabulary_loss_fake(
    x: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    kind: str,
    eps: float,
    weight: Tensor,
    labels: Tensor,
    first: int,
    vocab: int,
    smoothing: float,
    slopes: bool,
    group: str,
    sp: bool,
) -> list[Tensor]:
    given = [x, gain, *([] if shift is None else [shift]), weight] if slopes else []
    return [x.new_empty((), dtype=torch.float64), *(torch.empty_like(one) for one in given)]


@operation(
    "vocabulary_loss(Tensor x, Tensor gain, Tensor? shift, str kind, float eps, Tensor weight, Tensor labels, int first, "
    "int vocab, float smoothing, bool slopes, str group, bool sp) -> Tensor[]",
    fake=_vocabulary_loss_fake,
)
def vocabulary_loss(
    x: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    kind: str,
    eps: float,
    weight: Tensor,
    labels: Tensor,
    first: int,
    vocab: int,
    smoothing: float,
    slopes: bool,
    group: str,
    sp: bool,
) -> list[Tensor]:
    """x (B, S', D), its norm, weight (v, D), labels (B, S) -> [summed loss, float64 scalar, the same on each rank] and, if `slopes`,
    the gradients of that loss by x (B, S', D), by the norm's weight and bias (D,) and by weight (v, D).

    Sends three scalars a token: the largest logit, then the exponentials and the label's logit in one reduction
    (a fourth, the sum of logits, only under label smoothing).
    """
    mesh_group, flat_labels = groups_by_key[group], labels.flatten()
    part = vocabulary.Slice(first, vocab, smoothing, lambda known: _share(known, mesh_group))
    gathered = _gather(_normed(x, gain, shift, kind, eps), mesh_group, sp)
    if not slopes:
        return [vocabulary.loss_alone(gathered.flatten(0, 1), weight, flat_labels, part)]
    loss, by_normed, by_weight = vocabulary.loss_and_gradients(gathered.flatten(0, 1), weight, flat_labels, part)
    by_normed = _finish_reduce(_start_reduce(by_normed.view(gathered.shape), mesh_group, sp), sp)
    return [loss, *norm_backward(by_normed, x, gain, shift, kind=kind, eps=eps), by_weight]


def _share(known: vocabulary.Statistics, group: Group) -> vocabulary.Statistics:
    """Statistics of each token over a slice of the vocabulary -> over all of it, on each rank."""
    if group.size == 1:
        return known
    local = known.largest.clone()
    largest = comm.all_reduce(known.largest, group, op="max")
    exponentials = known.exponentials * (local - largest).exp_()
    summed = comm.all_reduce(torch.stack([exponentials, known.label, *([] if known.total is None else [known.total])]), group)
    return vocabulary.Statistics(largest, summed[0], summed[1], None if known.total is None else summed[2])


def _vocabulary_setup(ctx, inputs, output) -> None:
    ctx.has_shift = inputs[2] is not None
    ctx.save_for_backward(*output[1:])


def _vocabulary_backward(ctx, slopes: list[Tensor]):
    by_x, by_gain, *by_shift, by_weight = (gradient * slopes[0] for gradient in ctx.saved_tensors)
    return by_x, by_gain, by_shift[0] if by_shift else None, None, None, by_weight, *[None] * 7


differentiable("vocabulary_loss", backward=_vocabulary_backward, setup=_vocabulary_setup)
