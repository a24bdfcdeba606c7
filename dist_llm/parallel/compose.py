"""The one page with the order in which strategies are put together.

    table -> cut into stages (pp) -> tensor-parallel roles (tp, sp) -> flat units with initial weights by name (zero)
    -> modules on views of the flat buffers -> compile -> recompute

Strategies never import each other; only this page knows all. Which combinations are legal, and what changes in each:

| with      | tp                            | pp                                 | zero                                    |
|-----------|-------------------------------|------------------------------------|-----------------------------------------|
| dp        | data group per tp coordinate  | per stage; reduced once a step (1) | shards over the data group, or over     |
|           |                               |                                    | `shard` neighbours of it (4)            |
| tp (sp)   |                               | messages carry S/tp tokens         | shards of local slices (2)              |
| pp        |                               |                                    | `reduce`, `unshard` default to step (1) |
| tied      | vocabulary rows on every rank | a copy on both end stages (3)      | one unit, one accumulator per use       |
| recompute | full: collectives run again;  | as without                         | reuses the gather of the backward       |
|           | selective: the feed-forward's |                                    |                                         |

(1) so that traffic does not grow with the number of micro-batches. (2) gradients that are partial over tp are summed
there before the reduce-scatter. (3) their gradients are added between the two stages after the reduce-scatter.
(4) the shard's gradient is then summed over its replicas, once a step; a tied one between that sum's two halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dist_llm.config.schema import ModelConfig
from dist_llm.mesh import Mesh
from dist_llm.model.fused import fuse
from dist_llm.model.stages import stage_units
from dist_llm.model.table import rows_of, uses
from dist_llm.model.transformer import Block, build_unit
from dist_llm.parallel.adapted import AdaptedRoles
from dist_llm.parallel.compiled import CompiledRoles, keep_little, tag_caches
from dist_llm.parallel.compiled_adapted import CompiledAdaptedRoles
from dist_llm.parallel.flat import FlatPlan, pack
from dist_llm.parallel.pipeline import Stage, Unit
from dist_llm.parallel.quantized import QuantizedWeights
from dist_llm.parallel.recompute import run_again
from dist_llm.parallel.tensor import TensorRoles
from dist_llm.parallel.weights import FlatWeights
from dist_llm.parallel.zero import FlatUnit
from dist_llm.schedule.generate import stages_of
from dist_llm.sharding import split_parts


@dataclass(frozen=True)
class Options:
    """What an engine is built from, beside model, optimizer and mesh; read from the config in one place (train/setup.py).

    sequence: tokens. micro: sequences in a micro-batch; micro_batches: of one data-parallel rank a step. dtype: of weights
    and activations. fixed: gradients are added in rank order (libraries choose their own). smoothing: of the labels.
    offload_dir: a folder for what is offloaded, instead of host memory, where a library can use one. fp8: how the blocks'
    matrix products are made (model/products.py). graph: a step is replayed as a CUDA graph (engines/graph.py). pairs: the loss is
    of pairs (model/preference.py).
    """

    sequence: int
    micro: int
    micro_batches: int
    dtype: torch.dtype
    device: torch.device
    seed: int
    fixed: bool
    smoothing: float
    compiled: bool
    offload_dir: str | None
    fp8: str = "off"
    graph: bool = False
    pairs: bool = False


def compose(model: ModelConfig, mesh: Mesh, options: Options) -> list[Stage]:
    """This rank's stages, with initial weights."""
    layout, tp = mesh.layout, mesh.at.tp
    fuse(options.compiled and options.device.type == "cuda")
    if options.compiled:
        keep_little()
        tag_caches()
    first_row = split_parts(model.vocab, layout.tp)[tp][0]
    kinds = {False: (TensorRoles, CompiledRoles), True: (AdaptedRoles, CompiledAdaptedRoles)}
    kind = kinds[model.adapter.rank > 0][options.compiled]
    roles = kind(mesh.tp, sp=layout.sp, vocab=model.vocab, first=first_row, smoothing=options.smoothing, fp8=options.fp8)
    parts = stage_units(model, options.sequence, layout.stages)
    mine = stages_of(mesh.at.pp, layout.pp, layout.chunks, layout.schedule)
    walk = [name for index in mine for name in parts[index]]
    flats = _flat_units(model, mesh, walk, options)
    stages = []
    for index in mine:
        units = []
        for name in parts[index]:
            own = [(flats[unit], _use(model, unit, name, flats)) for unit in uses(model, name)]
            module: nn.Module = build_unit(name, model, _maker(own), roles)
            block = name.startswith("blocks.")
            if isinstance(module, Block) and layout.recompute == "selective":
                module.run_mlp = run_again
            if options.compiled and block:
                module.compile()
            units.append(Unit(name, module, own, recomputed=block and layout.recompute == "full", deferred=name == "head"))
        stages.append(Stage(index, units, first=index == 0, last=index == layout.stages - 1))
    return stages


def _flat_units(model: ModelConfig, mesh: Mesh, walk: Sequence[str], options: Options) -> dict[str, FlatWeights]:
    """A flat unit for each parameter unit that this rank's walk reads, with initial weights.

    One after the other: in stage 3 a unit is whole only while it is made.
    """
    layout, dtype, device = mesh.layout, options.dtype, options.device
    flats: dict[str, FlatWeights] = {}
    for name in walk:
        for unit in uses(model, name):
            if unit in flats:
                continue
            split = {"shards": mesh.shard.size, "replicas": mesh.replica.size}
            plan = pack(rows_of(model, unit), unit=unit, tp=layout.tp, sp=layout.sp, coordinate=mesh.at.tp, **split)
            num_uses = sum(unit in uses(model, other) for other in walk)
            shared = unit == "tied" and layout.pp > 1
            given = {"dtype": dtype, "device": device, "num_uses": num_uses, "shared": shared}
            flats[unit] = _made(plan, mesh, model, options, given)
            flats[unit].initialise(seed=options.seed)
    return flats


def _made(plan: FlatPlan, mesh: Mesh, model: ModelConfig, options: Options, given: dict[str, Any]) -> FlatWeights:
    """The flat unit of a plan: trained, or as it came, in the run's dtype or quantized."""
    if plan.trained:
        return FlatUnit(plan, mesh, fixed=options.fixed, **given)
    if plan.block:
        return QuantizedWeights(plan, mesh, kind=model.adapter.quantize, **given)
    return FlatWeights(plan, mesh, **given)


def _use(model: ModelConfig, unit: str, walk_unit: str, flats: dict[str, FlatWeights]) -> int:
    """Which use of a flat unit a walk unit makes: 0 for the one that comes first in the model, so last in backward."""
    return 1 if unit == "tied" and walk_unit == "head" and len(flats[unit].parameters) > 1 else 0


def _maker(flats: list[tuple[FlatWeights, int]]):
    """Gives a module its parameters: views of the flat buffers, None for names that the model does not have."""
    known = {slot.name: (flat, use) for flat, use in flats for slot in flat.plan.slots}

    def make(name: str) -> nn.Parameter | None:
        if name not in known:
            return None
        flat, use = known[name]
        return flat.parameter(name, use)

    return make
