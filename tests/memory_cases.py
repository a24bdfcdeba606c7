"""What the ranks of tests/test_memory.py do. Nothing at import may run a torch operator."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from dist_llm.parallel.zero import FlatUnit
from dist_llm.train.memory import LiveMemory
from tests.engine_cases import build


def peaks(rank: int, world: int, say: Callable[..., None], given: dict[str, Any], layout: dict[str, Any], dtype: str) -> int:
    """The peak of live tensor bytes in the second step."""
    _, engine, trainer = build(given, layout, rank, dtype)
    trainer.step(0)
    with LiveMemory(engine) as live:
        trainer.step(1)
    assert all(flat.gathering is None for flat in engine.flats)  # what was lent to a transfer must outlive it
    return live.peak


def slope_outlives(rank: int, world: int, say: Callable[..., None], given: dict[str, Any], layout: dict[str, Any]) -> list[str]:
    """The units whose backward begins while the first message that this rank received is alive; one micro-batch."""
    _, engine, trainer = build(given, layout, rank, "float32")
    received: list[weakref.ref[Any]] = []
    boundary, found = engine._boundary, []

    def noted() -> Any:
        made = boundary()
        received.append(weakref.ref(made))
        return made

    def begin(flat: FlatUnit, use: int, body: Callable = FlatUnit.begin_backward) -> None:
        if received[0]() is not None:
            found.append(flat.plan.unit)
        body(flat, use)

    engine._boundary = noted
    FlatUnit.begin_backward = begin
    trainer.step(0)
    return found
