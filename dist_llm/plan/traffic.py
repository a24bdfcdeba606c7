"""Bytes that each rank sends in a step, as closed forms from the table and the layout: torch-free, nothing is run.

Ring payload per rank of n, for a whole tensor of V bytes: all_gather and reduce_scatter (n-1)/n V, all_reduce twice that,
a message V. Activations have b x s x d elements for a micro-batch (s/tp of them between blocks with sequence parallelism).
Per block and micro-batch tensor parallelism takes 2 + 2 all_reduces, or with sequence parallelism 4 + 4 gathers and
scatters and 2 gathers again in backward (arXiv:2205.05198); the embedding one reduction, the head one, the loss three
scalars a token. `tests/test_parity.py` holds every layout's ledger against these numbers.

Legend: b micro, s sequence, d dim, m micro-batches, n ranks of the data group that split what ZeRO splits, r replicas of
each such group, t tp, P padded elements of a flat unit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dist_llm.config.layout import Layout
from dist_llm.config.preference import FIGURES
from dist_llm.config.schema import AdapterTarget, ModelConfig
from dist_llm.model.stages import halves_of, stage_units
from dist_llm.model.table import rows_of, table, table_trained, uses
from dist_llm.parallel.flat import FlatPlan, pack
from dist_llm.schedule.actions import SENDS, Action, Kind
from dist_llm.schedule.generate import generate, stages_of
from dist_llm.schedule.lower import lower

KEPT_UNITS = 2  # units at the end of a stage that keep their weights between a forward and the backward that follows at once


@dataclass(frozen=True)
class Widths:
    """Bytes of an element: weights and activations, gradients, softmax statistics."""

    weight: int
    gradient: int
    statistic: int


WIDTHS = {"bfloat16": Widths(2, 4, 4), "float32": Widths(4, 4, 4), "float64": Widths(8, 8, 8)}


@dataclass(frozen=True)
class Shape:
    """The numbers of a run that traffic and memory depend on.

    smoothing: of the labels. moments: of the optimizer, 2 for AdamW, 1 for SGD with momentum, 0 without. masked: attention
    stays inside documents; restarting: so do positions. fixed: gradients are added in rank order. device: cpu or cuda.
    shared: ranks pass tensors through memory they share (shm.py). pairs: the loss is of pairs. compiled: blocks are.
    """

    model: ModelConfig
    layout: Layout
    sequence: int
    micro: int
    micro_batches: int
    dtype: str
    smoothing: bool = False
    fp8: str = "off"
    moments: int = 2
    masked: bool = False
    restarting: bool = False
    fixed: bool = True
    device: str = "cpu"
    shared: bool = True
    pairs: bool = False
    compiled: bool = False

    @property
    def widths(self) -> Widths:
        """Bytes per element."""
        return WIDTHS[self.dtype]

    @property
    def data(self) -> int:
        """Ranks that share gradients."""
        return self.layout.dp * self.layout.cp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same shard."""
        return self.data // self.layout.shard

    def stage_units(self) -> list[list[str]]:
        """Walk units of each stage."""
        return _stage_units(self)

    def rank_stages(self, pp: int) -> dict[int, list[str]]:
        """Stage -> walk units, of one pipeline rank."""
        parts = self.stage_units()
        return {stage: parts[stage] for stage in stages_of(pp, self.layout.pp, self.layout.chunks, self.layout.schedule)}

    def flat_plans(self, pp: int, tp: int) -> dict[str, tuple[FlatPlan, int]]:
        """Parameter unit -> (flat plan, uses of it on this rank)."""
        return _flat_plans(self, pp, tp)

    def trained_plans(self, pp: int, tp: int) -> list[tuple[FlatPlan, int]]:
        """As `flat_plans`, of units that are trained."""
        return [(plan, num_uses) for plan, num_uses in self.flat_plans(pp, tp).values() if plan.trained]

    def kept_bytes(self, plan: FlatPlan, count: int) -> int:
        """Bytes of `count` elements of a unit as they are kept: in the run's dtype, or codes and float32 scales."""
        if not plan.block:
            return count * self.widths.weight
        return (count // 2 if self.model.adapter.quantize == "nf4" else count) + count // plan.block * 4

    def lists(self) -> list[list[Action]]:
        """The lowered schedule, one list per pipeline rank."""
        return _lists(self)


@lru_cache(maxsize=8)
def _lists(shape: Shape) -> list[list[Action]]:
    layout = shape.layout
    compute = generate(layout.schedule, ranks=layout.pp, micro_batches=shape.micro_batches, chunks=layout.chunks)
    return lower(compute, reduce=layout.reduce)


@lru_cache(maxsize=8)
def _stage_units(shape: Shape) -> list[list[str]]:
    return stage_units(shape.model, shape.sequence, shape.layout.stages)


@lru_cache(maxsize=512)
def _flat_plans(shape: Shape, pp: int, tp: int) -> dict[str, tuple[FlatPlan, int]]:
    found: dict[str, tuple[FlatPlan, int]] = {}
    for name in (name for units in shape.rank_stages(pp).values() for name in units):
        for unit in uses(shape.model, name):
            if unit in found:
                found[unit] = (found[unit][0], found[unit][1] + 1)
                continue
            layout, rows = shape.layout, rows_of(shape.model, unit)
            split = {"shards": layout.shard, "replicas": shape.replicas}
            found[unit] = (pack(rows, unit=unit, tp=layout.tp, sp=layout.sp, coordinate=tp, **split), 1)
    return found


def sent_bytes(shape: Shape, *, pp: int = 0, tp: int = 0) -> dict[str, float]:
    """Bytes per axis that a rank at pipeline and tensor coordinates (pp, tp) sends in one step; axes with none are left out."""
    actions = shape.lists()[pp]
    total: defaultdict[str, float] = defaultdict(float)
    _data(total, shape, actions, pp, tp)
    _tensor(total, shape, actions, pp, tp)
    _pipeline(total, shape, actions, pp, tp)
    _control(total, shape)
    return {axis: sent for axis, sent in sorted(total.items()) if sent}


def _data(total: defaultdict[str, float], shape: Shape, actions: Sequence[Action], pp: int, tp: int) -> None:
    """Gradient reductions, and the weights that ZeRO moves: inside the shard group, and once a step shards between replicas."""
    layout, wide, part = shape.layout, shape.widths, (shape.layout.shard - 1) / shape.layout.shard
    for plan, num_uses in shape.trained_plans(pp, tp):
        reductions = 1 if layout.reduce == "step" else shape.micro_batches * num_uses
        total["dp"] += reductions * part * plan.padded * wide.gradient
        total["dp"] += 2 * (shape.replicas - 1) / shape.replicas * plan.shard_size * wide.gradient
        if layout.zero == 0:
            total["dp"] += part * plan.padded * wide.gradient
        elif layout.zero < 3:
            total["dp"] += part * plan.padded * wide.weight
    if layout.zero == 3 and layout.shard > 1:
        total["dp"] += part * _gathered(shape, actions, pp, tp)


def _gathered(shape: Shape, actions: Sequence[Action], pp: int, tp: int) -> int:
    """Stage 3: bytes of flat units gathered in a step."""
    size = {unit: shape.kept_bytes(plan, plan.padded) for unit, (plan, _) in shape.flat_plans(pp, tp).items()}
    if shape.layout.unshard == "step":
        return sum(size.values())
    gathered = 0
    compute = [action for action in actions if action.kind in (Kind.F, Kind.B)]
    kept: dict[int, set[str]] = defaultdict(set)
    stages = shape.rank_stages(pp)
    for at, action in enumerate(compute):
        units = stages[action.stage]
        here = kept[action.stage]
        if action.kind == Kind.F:
            follows = at + 1 < len(compute) and compute[at + 1] == Action(action.stage, Kind.B, action.micro)
            kept[action.stage] = set(units[-KEPT_UNITS:]) if follows else set()
            walked = [name for name in units if name != "head" or follows]  # the head runs where its backward begins
            gathered += sum(size[unit] for name in walked for unit in uses(shape.model, name))
        else:
            again = [name for name in units if name != "embedding" and name not in here]
            gathered += sum(size[unit] for name in again for unit in uses(shape.model, name))
    return gathered


def _tensor(total: defaultdict[str, float], shape: Shape, actions: Sequence[Action], pp: int, tp: int) -> None:
    """Activations over the tensor-parallel axis, and gradients that are partial over it."""
    layout, wide, t = shape.layout, shape.widths, shape.layout.tp
    if t == 1:
        return
    tokens = shape.micro * shape.sequence
    moved = (t - 1) / t * tokens * shape.model.dim * wide.weight  # one gather or scatter; an all_reduce is two
    scalars = 2 * (t - 1) / t * tokens * wide.statistic * (4 if shape.smoothing else 3)
    scalars *= 2 if shape.pairs and table_trained(shape.model, "head") else 1  # logits are made twice where their table is trained
    per_embedding = 1 if layout.sp and not table_trained(shape.model, "embedding") else 2  # without a gradient no slope is gathered
    ends = {"embedding": per_embedding * moved, "head": 2 * moved + scalars}
    for name in (half for units in shape.rank_stages(pp).values() for unit in units for half in halves_of(unit)):
        total["tp"] += shape.micro_batches * (ends[name] if name in ends else _half(shape, name.rpartition(".")[2], moved))
    for plan, num_uses in shape.trained_plans(pp, tp):
        reductions = 1 if layout.reduce == "step" else shape.micro_batches * num_uses
        for slot in plan.slots:
            if slot.sharding.partial:
                sharing = len(slot.sharding.replicas(tp))
                total["tp"] += reductions * 2 * (sharing - 1) / sharing * slot.numel * wide.gradient


def _half(shape: Shape, half: str, moved: float) -> float:
    """Bytes a micro-batch of half a block: its gathers and scatters, and what its operations know of all ranks.

    A column's output is made where its input is, its backward adds up; a row's is the other way round. With sequence
    parallelism a column's input is gathered again in backward.
    """
    layout = shape.layout
    again = {"none": 0, "selective": 2 if half == "mlp" else 0, "full": 2}[layout.recompute]
    across = _across(shape) if half == "attention" else 0.0
    return ((5 if layout.sp else 4) + again) * moved + across + _scales(shape, half) + _lengths(shape, half)


def _across(shape: Shape) -> float:
    """Where queries and keys are normed over all heads: two numbers a token, forward and backward. Bytes a micro-batch and block."""
    model, layout = shape.model, shape.layout
    if not (model.qk_norm and model.qk_norm_over == "all"):
        return 0.0
    times = 3 if layout.recompute == "full" else 2
    return times * 2 * (layout.tp - 1) / layout.tp * 2 * shape.micro * shape.sequence * shape.widths.statistic


def _lengths(shape: Shape, half: str) -> float:
    """With DoRA: the sums of squares of the rows of o or down, float64, in each forward of theirs. Bytes a micro-batch."""
    model, layout = shape.model, shape.layout
    target: AdapterTarget = "o" if half == "attention" else "down"
    if not model.adapter.dora or target not in model.adapter.targets:
        return 0.0
    times = 2 if layout.recompute == "full" or (layout.recompute == "selective" and half == "mlp") else 1
    return times * 2 * (layout.tp - 1) / layout.tp * model.dim * 8


def _scales(shape: Shape, half: str) -> float:
    """The largest magnitudes that the 8-bit products of half a block share over the tensor-parallel ranks, bytes a micro-batch.

    tensorwise: a number for each operand of a projection's forward, and again of its backward, where q, k and v have slopes apart
    unless a compiler has put them side by side.
    rowwise: a number for each row of what is cut along it (tokens, output features), one for a weight in a gradient by input.
    """
    layout, tokens, dim, attention = shape.layout, shape.micro * shape.sequence, shape.model.dim, half == "attention"
    apart = attention and not (shape.compiled and not shape.model.adapter.rank)
    if shape.fp8 == "tensorwise":
        forward, backward = 2 * 2, (3 + 3 + 1) + 3 if apart else 3 + 3
    elif shape.fp8 == "rowwise":
        forward, backward = tokens + dim, (3 if apart else 1) * (tokens + 1) + 1
    else:
        return 0.0
    again = {"none": 0, "selective": 0 if attention else forward, "full": forward}[layout.recompute]
    return 2 * (layout.tp - 1) / layout.tp * 4 * (forward + backward + again)


def _pipeline(total: defaultdict[str, float], shape: Shape, actions: Sequence[Action], pp: int, tp: int) -> None:
    """Activations and their gradients between stages, and a tied weight's gradient between the first and the last."""
    layout, wide = shape.layout, shape.widths
    length = shape.sequence // (layout.tp if layout.sp else 1)
    message = shape.micro * length * shape.model.dim * wide.weight
    total["pp"] += message * sum(action.kind in SENDS for action in actions)
    plans = shape.flat_plans(pp, tp)
    if layout.pp > 1 and "tied" in plans and plans["tied"][0].trained:
        total["pp"] += plans["tied"][0].shard_size // shape.replicas * wide.gradient


def _control(total: defaultdict[str, float], shape: Shape) -> None:
    """The norm with the loss, or all that pairs make of it, and the wish to stop: float64 each, one number per half of a block."""
    halves = len({row.half for row in table(shape.model)})
    world, numbers = shape.layout.world, halves + (len(FIGURES) if shape.pairs else 1) + 1
    total["control"] += 2 * (world - 1) / world * numbers * 8
