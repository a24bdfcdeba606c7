"""What is known of a layout before it runs: bytes sent, the peak of memory, the schedule and its bubble. Torch-free."""

from __future__ import annotations

from typing import Any

from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config
from dist_llm.model.cost import forward_flops
from dist_llm.model.stages import halves_of
from dist_llm.plan.memory import peak_bytes
from dist_llm.plan.traffic import Shape, sent_bytes
from dist_llm.schedule.simulate import Simulation, simulate


def shape_of(config: Config, layout: Layout, *, dtype: str, device: str = "cpu") -> Shape:
    """The numbers that traffic and memory depend on. dtype and device: of the ranks."""
    optimizer = config.optimizer
    return Shape(
        model=config.model,
        layout=layout,
        sequence=config.data.sequence,
        micro=config.batch.micro,
        micro_batches=config.batch.global_ // (layout.dp * config.batch.micro),
        dtype=dtype,
        smoothing=optimizer.label_smoothing > 0,
        fp8=config.runtime.fp8,
        moments=2 if optimizer.kind == "adamw" else int(optimizer.momentum > 0),
        masked=config.data.document_mask,
        restarting=config.data.reset_positions,
        fixed=config.runtime.reduce_order == "fixed",
        device=device,
        shared=device == "cpu" and config.runtime.shared_memory,
        pairs=config.preference.loss is not None,
        compiled=config.runtime.compile,
    )


def predicted(shape: Shape) -> dict[str, Any]:
    """Bytes of the busiest rank, peak memory of the fullest, and the bubble of a schedule whose costs are FLOP."""
    last = shape.layout.tp - 1  # no tensor-parallel rank has a larger part of any cut (sharding.split_parts)
    places = [(pp, last) for pp in range(shape.layout.pp)]
    sent = [sent_bytes(shape, pp=pp, tp=tp) for pp, tp in places]
    axes = sorted({axis for each in sent for axis in each})
    memory = max((peak_bytes(shape, pp=pp, tp=tp) for pp, tp in places), key=lambda found: found["total"])
    return {
        "sent_bytes_per_step": {axis: max(each.get(axis, 0) for each in sent) for axis in axes},
        "memory_bytes": memory,
        "bubble_fraction": timeline(shape).bubble_fraction if shape.layout.pp > 1 else 0.0,
    }


def timeline(shape: Shape) -> Simulation:
    """The schedule on a clock whose unit is the forward pass of the dearest stage; backward takes twice the forward."""
    costs = forward_flops(shape.model, shape.sequence)
    forward = [sum(costs[half] for name in units for half in halves_of(name)) for units in shape.stage_units()]
    forward = [cost / max(forward) for cost in forward]
    return simulate(shape.lists(), forward=forward, backward=[2 * cost for cost in forward])
