"""What would make a run smaller: single changes of its config, and the peak that each is predicted to have. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_llm.config.layout import Layout
from dist_llm.config.rules import check
from dist_llm.config.schema import Config, changed
from dist_llm.errors import UsageError
from dist_llm.plan.predict import predicted, shape_of

MOST = 3


@dataclass(frozen=True)
class Relief:
    """A change as it is added to the command, and the predicted bytes of the fullest rank."""

    words: str
    bytes: int


def peak(config: Config, layout: Layout, *, dtype: str, device: str) -> int:
    """Predicted bytes of the fullest rank at its peak, those on the host besides where the device is the host."""
    found = predicted(shape_of(config, layout, dtype=dtype, device=device))["memory_bytes"]
    return found["total"] + (found["host"] if device == "cpu" else 0)


def reliefs(config: Config, layout: Layout, *, dtype: str, device: str) -> list[Relief]:
    """The legal single changes that need the least memory, least first; only those that need less than now."""
    now = peak(config, layout, dtype=dtype, device=device)
    found = []
    for change in _candidates(config, layout):
        try:
            other = changed(config, change)
            split = check(other, layout.world)
            need = peak(other, split, dtype=dtype, device=device)
        except (UsageError, ValueError):
            continue
        if need < now:
            words = f"--layout {split}" if split != layout else " ".join(f"{key}={value}" for key, value in change.items())
            found.append(Relief(words, need))
    return sorted(found, key=lambda one: one.bytes)[:MOST]


def _candidates(config: Config, layout: Layout) -> list[dict[str, Any]]:
    """Changes that leave the run as it is: the split, what is computed again, what lies on the host, the micro-batch."""
    found: list[dict[str, Any]] = [{"layout.recompute": "full"}, {"layout.recompute": "selective"}]
    found += [{"batch.micro": micro} for micro in (config.batch.micro // 2, 1) if 0 < micro < config.batch.micro]
    found += [{"layout.zero": stage} for stage in range(layout.zero + 1, 4) if layout.dp > 1]
    return [*found, {"layout.offload": "optimizer"}] if layout.offload == "none" else found
