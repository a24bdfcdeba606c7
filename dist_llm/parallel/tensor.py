"""Tensor parallelism, with and without sequence parallelism, as custom operations.

Megatron's split (arXiv:1909.08053): the projections that one input feeds are cut by output feature (column), the one
that leads back by input feature (row), the vocabulary by rows; with sequence parallelism (arXiv:2205.05198) norms and
residuals see S/tp of the tokens, and all-reduces become an all-gather before and a reduce-scatter after.

One reduction per block input: `column` takes all projections of an input, so its backward sums their input
gradients locally and reduces once, while the weight gradients are computed. With sequence parallelism the gathered
input is not kept but gathered again in backward (memory is what it is for). With a group of one rank the
same lines run and nothing is sent.

The operations are registered with torch.library (fake and autograd), so that blocks compile around them. Each takes
the group's key and `sp`. Legend: B batch, S sequence, S' = S/tp if sp else S, D dim, O local output features, v local vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_llm import comm
from dist_llm.mesh import Group, groups_by_key
from dist_llm.model import loss as vocabulary
from dist_llm.model.roles import Roles
from dist_llm.parallel.operation import differentiable, operation


class TensorRoles(Roles):
    """The model's seams for the ranks of a tensor-parallel group."""

    def __init__(self, group: Group, *, sp: bool, vocab: int, first: int, smoothing: float = 0.0) -> None:
        super().__init__(smoothing=smoothing)
        self.group, self.sp, self.vocab, self.first = group, sp, vocab, first

    def columns(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
        """Enters with (B, S', D), leaves with (B, S, O_i) for each weight (O_i, D): this rank's output features."""
        return column(x, list(weights), [bias for bias in biases if bias is not None], self.group.key, self.sp)

    def row(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Enters with this rank's features (B, S, O), leaves with the sum over ranks (B, S', D), the bias added once."""
        y = row(x, weight, self.group.key, self.sp)
        return y if bias is None else y + bias

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Enters with all tokens (B, S) and rows [first, first + v) of the table, leaves with (B, S', D)."""
        return embed(tokens, weight, self.first, self.group.key, self.sp)

    def loss(self, x: Tensor, weight: Tensor, labels: Tensor, *, smooth: bool = True) -> Tensor:
        """Enters with (B, S', D) and v rows of the output table, leaves with the summed loss of all tokens on each rank."""
        smoothing = self.smoothing if smooth else 0.0
        return vocabulary_loss(x, weight, labels, self.first, self.vocab, smoothing, self.group.key, self.sp)[0]

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


def _column_fake(x: Tensor, weights: list[Tensor], biases: list[Tensor], group: str, sp: bool) -> list[Tensor]:
    return [_inside_like(x, groups_by_key[group], sp, weight.shape[0]) for weight in weights]


@operation("column(Tensor x, Tensor[] weights, Tensor[] biases, str group, bool sp) -> Tensor[]", fake=_column_fake)
def column(x: Tensor, weights: list[Tensor], biases: list[Tensor], group: str, sp: bool) -> list[Tensor]:
    """x (B, S', D), weights (O_i, D), biases (O_i,) for all or none -> outputs (B, S, O_i)."""
    whole = _gather(x, groups_by_key[group], sp).flatten(0, 1)
    outputs = []
    for at, weight in enumerate(weights):
        y = torch.addmm(biases[at], whole, weight.T) if biases else whole @ weight.T
        outputs.append(y.unflatten(0, (x.shape[0], -1)))
    return outputs


def _column_backward_fake(slopes: list[Tensor], x: Tensor, weights: list[Tensor], biased: bool, group: str, sp: bool) -> list[Tensor]:
    by_biases = [weight.new_empty(weight.shape[0]) for weight in weights] if biased else []
    return [torch.empty_like(x), *(torch.empty_like(weight) for weight in weights), *by_biases]


@operation(
    "column_backward(Tensor[] slopes, Tensor x, Tensor[] weights, bool biased, str group, bool sp) -> Tensor[]", fake=_column_backward_fake
)
def column_backward(slopes: list[Tensor], x: Tensor, weights: list[Tensor], biased: bool, group: str, sp: bool) -> list[Tensor]:
    """Slopes (B, S, O_i) -> [by x (B, S', D), by each weight (O_i, D), by each bias (O_i,)]."""
    mesh_group = groups_by_key[group]
    gathering = _start_gather(x, mesh_group, sp)
    flat = [slope.reshape(-1, slope.shape[-1]) for slope in slopes]
    by_x = flat[0] @ weights[0]
    for slope, weight in zip(flat[1:], weights[1:], strict=True):
        by_x.addmm_(slope, weight)
    whole = _finish_gather(gathering, sp).flatten(0, 1)
    reducing = _start_reduce(by_x.unflatten(0, (x.shape[0], -1)), mesh_group, sp)  # while the weight gradients are computed
    by_weights = [slope.T @ whole for slope in flat]
    by_biases = [slope.sum(0) for slope in flat] if biased else []
    return [_finish_reduce(reducing, sp), *by_weights, *by_biases]


def _column_setup(ctx, inputs, output) -> None:
    x, weights, biases, ctx.group, ctx.sp = inputs
    ctx.count, ctx.biased = len(weights), bool(biases)
    ctx.save_for_backward(x, *weights)


def _column_backward(ctx, slopes: list[Tensor]):
    x, *weights = ctx.saved_tensors
    by_x, *rest = column_backward(slopes, x, weights, ctx.biased, ctx.group, ctx.sp)
    return by_x, rest[: ctx.count], rest[ctx.count :], None, None


differentiable("column", backward=_column_backward, setup=_column_setup)


# --- row: back to the residual stream --------------------------------------------------------------------------------


def _row_fake(x: Tensor, weight: Tensor, group: str, sp: bool) -> Tensor:
    return _outside_like(x, groups_by_key[group], sp, weight.shape[0])


@operation("row(Tensor x, Tensor weight, str group, bool sp) -> Tensor", fake=_row_fake)
def row(x: Tensor, weight: Tensor, group: str, sp: bool) -> Tensor:
    """x (B, S, O), weight (D, O) -> the sum over ranks (B, S', D)."""
    return _finish_reduce(_start_reduce(x @ weight.T, groups_by_key[group], sp), sp)


def _row_backward_fake(slope: Tensor, x: Tensor, weight: Tensor, group: str, sp: bool) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(weight)]


@operation("row_backward(Tensor slope, Tensor x, Tensor weight, str group, bool sp) -> Tensor[]", fake=_row_backward_fake)
def row_backward(slope: Tensor, x: Tensor, weight: Tensor, group: str, sp: bool) -> list[Tensor]:
    """Slope (B, S', D) -> [by x (B, S, O), by weight (D, O)]."""
    whole = _gather(slope.contiguous(), groups_by_key[group], sp).flatten(0, 1)
    return [(whole @ weight).view(x.shape), whole.T @ x.flatten(0, 1)]


def _row_setup(ctx, inputs, output) -> None:
    x, weight, ctx.group, ctx.sp = inputs
    ctx.save_for_backward(x, weight)


def _row_backward(ctx, slope: Tensor):
    return (*row_backward(slope, *ctx.saved_tensors, ctx.group, ctx.sp), None, None)


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
    x: Tensor, weight: Tensor, labels: Tensor, first: int, vocab: int, smoothing: float, group: str, sp: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float64), x.new_empty(labels.numel(), dtype=vocabulary.wide(x.dtype))


@operation(
    "vocabulary_loss(Tensor x, Tensor weight, Tensor labels, int first, "
    "int vocab, float smoothing, str group, bool sp) -> (Tensor, Tensor)",
    fake=_vocabulary_loss_fake,
)
def vocabulary_loss(
    x: Tensor, weight: Tensor, labels: Tensor, first: int, vocab: int, smoothing: float, group: str, sp: bool
) -> tuple[Tensor, Tensor]:
    """x (B, S', D), weight (v, D), labels (B, S) -> (summed loss, float64 scalar, same on each rank; log-sum-exp (T,)).

    Sends three scalars a token: the largest logit, then the exponentials and the label's logit in one reduction
    (a fourth, the sum of logits, only under label smoothing).
    """
    mesh_group, flat_labels = groups_by_key[group], labels.flatten()
    known = vocabulary.local_statistics(_gather(x, mesh_group, sp).flatten(0, 1), weight, flat_labels, first=first)
    local_largest = known.largest.clone()
    known.largest = comm.all_reduce(known.largest, mesh_group, op="max")
    known.exponentials *= (local_largest - known.largest).exp_()
    shared = [known.exponentials, known.label, *([known.total] if smoothing else [])]
    summed = comm.all_reduce(torch.stack(shared), mesh_group)
    known.exponentials, known.label = summed[0], summed[1]
    known.total = summed[2] if smoothing else known.total
    loss, log_sum = vocabulary.losses(known, flat_labels, vocab=vocab, smoothing=smoothing)
    return loss.sum(dtype=torch.float64), log_sum


def _vocabulary_loss_backward_fake(scale: Tensor, x: Tensor, weight: Tensor, *_) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(weight)]


@operation(
    "vocabulary_loss_backward(Tensor scale, Tensor x, Tensor weight, Tensor labels, Tensor log_sum, "
    "int first, int vocab, float smoothing, str group, bool sp) -> Tensor[]",
    fake=_vocabulary_loss_backward_fake,
)
def vocabulary_loss_backward(
    scale: Tensor,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    log_sum: Tensor,
    first: int,
    vocab: int,
    smoothing: float,
    group: str,
    sp: bool,
) -> list[Tensor]:
    """The slope of the summed loss, a scalar -> [by x (B, S', D), by weight (v, D)]."""
    mesh_group = groups_by_key[group]
    whole = _gather(x, mesh_group, sp)
    by_x, by_weight = vocabulary.gradients(
        whole.flatten(0, 1), weight, labels.flatten(), log_sum, scale.to(log_sum.dtype), first=first, vocab=vocab, smoothing=smoothing
    )
    return [_finish_reduce(_start_reduce(by_x.view(whole.shape), mesh_group, sp), sp), by_weight]


def _vocabulary_setup(ctx, inputs, output) -> None:
    x, weight, labels, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _vocabulary_backward(ctx, scale: Tensor, _):
    return (*vocabulary_loss_backward(scale, *ctx.saved_tensors, *ctx.rest), None, None, None, None, None, None)


differentiable("vocabulary_loss", backward=_vocabulary_backward, setup=_vocabulary_setup)
