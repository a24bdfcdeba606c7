"""What is known of a layout before it runs: bytes sent, memory that lives between steps, the schedule and its bubble. Torch-free."""

from __future__ import annotations

from typing import Any

from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config
from dist_llm.model.cost import forward_flops
from dist_llm.plan.traffic import Shape, persistent_bytes, sent_bytes
from dist_llm.schedule.simulate import Simulation, simulate


def shape_of(config: Config, layout: Layout, *, dtype: str) -> Shape:
    """The numbers that traffic and memory depend on."""
    batches = config.batch.global_ // (layout.dp * config.batch.micro)
    smoothed = config.optimizer.label_smoothing > 0
    return Shape(config.model, layout, config.data.sequence, config.batch.micro, batches, dtype, smoothed, config.runtime.fp8)


def predicted(shape: Shape) -> dict[str, Any]:
    """For the busiest rank: bytes, persistent memory, and the bubble of a schedule whose costs are FLOP."""
    last = shape.layout.tp - 1  # no tensor-parallel rank has a larger part of any cut (sharding.split_parts)
    places = [(pp, last) for pp in range(shape.layout.pp)]
    sent = [sent_bytes(shape, pp=pp, tp=tp) for pp, tp in places]
    axes = sorted({axis for each in sent for axis in each})
    memory = max((persistent_bytes(shape, pp=pp, tp=tp) for pp, tp in places), key=lambda found: sum(found.values()))
    return {
        "sent_bytes_per_step": {axis: max(each.get(axis, 0) for each in sent) for axis in axes},
        "memory_bytes": memory,
        "bubble_fraction": timeline(shape).bubble_fraction if shape.layout.pp > 1 else 0.0,
    }


def timeline(shape: Shape) -> Simulation:
    """The schedule on a clock whose unit is the forward pass of the dearest stage; backward takes twice the forward."""
    costs = forward_flops(shape.model, shape.sequence)
    forward = [sum(costs[name] for name in units) for units in shape.stage_units()]
    forward = [cost / max(forward) for cost in forward]
    return simulate(shape.lists(), forward=forward, backward=[2 * cost for cost in forward])
