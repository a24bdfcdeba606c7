"""Where DoRA's magnitudes begin: at the lengths of the rows of the weights under them, so that the first model is the base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dist_llm.mesh import Mesh
from dist_llm.model.init import initialise
from dist_llm.parallel.correction import row_norms
from dist_llm.parallel.flat import Slot
from dist_llm.parallel.weights import FlatWeights
from dist_llm.parallel.zero import FlatUnit

ENDING = ".lora_m"


@torch.no_grad()
def begin_magnitudes(flats: Iterable[FlatWeights], mesh: Mesh, *, seed: int) -> None:
    """Gives adapters their initial values: magnitudes those of the weights that this rank and those of its tp group hold.

    The whole weights of a unit are gathered (stage 3), one unit after the other; every rank calls it.
    """
    held = list(flats)
    for unit in held:
        if isinstance(unit, FlatUnit) and any(slot.name.endswith(ENDING) for slot in unit.plan.slots):
            _begin(unit, dict(_norms(unit, held, mesh)), seed=seed)


def _begin(unit: FlatUnit, norms: dict[str, Tensor], *, seed: int) -> None:
    """Initial values of a unit, of which magnitudes have those of `norms`."""

    def read(slot: Slot, start: int, stop: int) -> Tensor:
        if slot.name in norms:
            return norms[slot.name][start:stop]
        out = torch.empty(stop - start, dtype=unit.gradient_dtype, device=unit.device)
        return initialise(out, slot.row, slot.box, seed=seed, start=start)

    unit.load(read)


def _norms(unit: FlatUnit, held: list[FlatWeights], mesh: Mesh) -> Iterator[tuple[str, Tensor]]:
    """Name of a magnitude -> its initial value, of this rank's rows, float64."""
    wanted = {f"{slot.name.removesuffix(ENDING)}.weight": slot.name for slot in unit.plan.slots if slot.name.endswith(ENDING)}
    for base in held:
        slots = [slot for slot in base.plan.slots if slot.name in wanted]
        if slots:
            base.finish_gather()
            for slot in slots:
                yield wanted[slot.name], row_norms(base.parameter(slot.name), None, mesh.tp if slot.row.role == "row" else None)
            base.end_step()
