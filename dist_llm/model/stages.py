"""The stages of a pipeline: a model cut where it evens out what they cost, between blocks or between the halves of one. Torch-free.

A head over a large vocabulary costs as much as several blocks, and whole blocks are large pieces to even that out with:
of Llama 3 8B over 16 stages the dearest has 1.41 of an even share, and 1.27 where blocks may be cut. The residual stream
goes over any such cut, so a message is as large as ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from dist_llm.config.schema import ModelConfig
from dist_llm.model.cost import forward_flops
from dist_llm.model.table import HALVES, half_names, unit_names
from dist_llm.schedule.cut import cut

WORTH = 0.05  # of the dearest stage: what a cut inside a block must save, because FLOPs tell costs no better than that


def stage_units(model: ModelConfig, sequence: int, num_stages: int) -> list[list[str]]:
    """The walk units of each stage, cut so that the dearest stage is as cheap as it can be: whole blocks, or halves at its ends.

    Raises UsageError for too few parts.
    """
    costs = forward_flops(model, sequence)
    finest = _cut([(name,) for name in half_names(model)], costs, num_stages)
    units = [halves_of(unit) for unit in unit_names(model)]
    whole = _cut(units, costs, num_stages) if len(units) >= num_stages else finest
    best = finest if _dearest(finest, costs) <= (1.0 - WORTH) * _dearest(whole, costs) else whole
    return [_joined(part) for part in best]


def _cut(parts: Sequence[tuple[str, ...]], costs: dict[str, float], num_stages: int) -> list[list[str]]:
    """Parts that stay together, in order -> the halves of each stage."""
    weights = [sum(costs[half] for half in part) for part in parts]
    return [[half for at in stage for half in parts[at]] for stage in cut(weights, num_stages)]


def _dearest(stages: Sequence[Sequence[str]], costs: dict[str, float]) -> float:
    return max(sum(costs[half] for half in halves) for halves in stages)


def halves_of(unit: str) -> tuple[str, ...]:
    """The parts of a walk unit that costs are known of, each a key of `forward_flops`."""
    whole = unit.startswith("blocks.") and not unit.endswith(HALVES)
    return tuple(f"{unit}.{half}" for half in HALVES) if whole else (unit,)


def _joined(names: Sequence[str]) -> list[str]:
    """Both halves of a block become the block."""
    found: list[str] = []
    for name in names:
        block = name.removesuffix(f".{HALVES[1]}")
        if found and block != name and found[-1] == f"{block}.{HALVES[0]}":
            found[-1] = block
        else:
            found.append(name)
    return found
