"""Where a number that is not finite came from: the state is looked through, and the batch is computed again with every rank's own
gradients watched before they are added up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dist_llm import comm
from dist_llm.engines.native import Item, NativeEngine, Totals
from dist_llm.errors import NumericError
from dist_llm.model.transformer import Context
from dist_llm.parallel.zero import FlatUnit

MOST = 6  # names or samples in a message
KINDS = {"weight": "weight", "frozen": "weight", "first_moment": "first moment", "second_moment": "second moment"}


def all_finite(totals: Totals) -> bool:
    """Whether a step's loss and norm are numbers; both are global, so every rank sees the same."""
    return math.isfinite(totals.norm) and math.isfinite(totals.loss)


def bad_state(items: Iterable[Item]) -> list[str]:
    """Weights and moments among these that hold a number which is not finite: `kind name`."""
    return [f"{KINDS[item.kind]} {item.piece.slot.name}" for item in items if item.kind in KINDS and not finite(item.values)]


def finite(values: Tensor) -> bool:
    """Whether a tensor has finite numbers alone. The sum first, which is fast: what is not finite makes it so."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def diagnose(
    engine: NativeEngine, contexts: Sequence[Context], samples: list[int], totals: Totals, *, targets: float, step: int
) -> NumericError:
    """The failure of a step (counted from 1) whose totals are not finite; every rank calls it. samples: ids of this rank's batch."""
    mine: dict[str, Any] = {"state": bad_state(engine.state())[:MOST], "loss": False, "gradients": [], "samples": samples}
    again = totals
    if isinstance(engine, NativeEngine) and engine.graph is None:
        again = replay(engine, contexts, mine, targets=targets)
    facts = comm.gather_json(mine, engine.mesh.world, device=engine.device)
    wrong = "loss" if not math.isfinite(totals.loss) else "gradient norm"
    guilty = [rank for rank, fact in enumerate(facts) if fact["state"] or fact["loss"] or fact["gradients"]]
    details = [line for rank in guilty for line in _lines(rank, facts[rank])]
    if all_finite(again):
        details.append("the same batch gave finite numbers when it was computed again: look at the hardware first")
    elif not any(fact["state"] for fact in facts):
        details.append("a lower optimizer.lr, a longer schedule.warmup or runtime.dtype=float32 are the usual cures")
    return NumericError(
        f"the {wrong} is not finite",
        where=f"step {step}" + (f", rank {guilty[0]}" if guilty else ""),
        expected="finite numbers",
        found=f"loss {totals.loss}, gradient norm {totals.norm}",
        safe="no weight was changed by this step",
        details=details,
    )


def _lines(rank: int, fact: dict[str, Any]) -> list[str]:
    """What one rank has found, in two lines at most."""
    loss = ["the loss of its micro-batches"] if fact["loss"] else []
    names = [*fact["state"], *loss, *fact["gradients"]]
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    lines = [f"rank {rank}: {', '.join(names[:MOST])}{more}"]
    ids = fact["samples"]
    if ids and (fact["loss"] or fact["gradients"]):
        more = f" and {len(ids) - MOST} more" if len(ids) > MOST else ""
        lines.append(f"rank {rank} had samples {', '.join(map(str, ids[:MOST]))}{more}")
    return lines


def replay(engine: NativeEngine, contexts: Sequence[Context], mine: dict[str, Any], *, targets: float) -> Totals:
    """Computes the step's gradients again; `mine` gets what is not finite on this rank before anything is summed over ranks."""

    def look(flat: FlatUnit, buffer: Tensor) -> None:
        for slot in flat.plan.slots:
            if not finite(buffer[slot.offset : slot.offset + slot.numel]):
                mine["gradients"].append(f"gradient {slot.name}")

    for flat in engine.flats:
        flat.gradient, flat.seen = None, look
    engine.run(contexts, targets=targets)
    mine["loss"] = not finite(engine.loss)
    totals = engine.finish_gradients()
    for flat in engine.flats:
        flat.seen = None
    mine["gradients"] = list(dict.fromkeys(mine["gradients"]))
    return totals
