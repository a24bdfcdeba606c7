"""Learning rates: the closed forms, their ends and joints."""

from __future__ import annotations

from math import cos, pi, sqrt
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.config.schema import ScheduleConfig
from dist_llm.train.learning_rate import learning_rate

KINDS = ["constant", "linear", "cosine", "wsd", "inverse_sqrt"]


def rates(peak: float = 2.0, **settings: Any) -> list[float]:
    """The rate of every step."""
    schedule = ScheduleConfig(**{"steps": 100, "final": 0.1, **settings})
    return [learning_rate(step, schedule, peak=peak) for step in range(schedule.steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_is_linear_and_reaches_the_peak(kind: str) -> None:
    found = rates(kind=kind, warmup=10)
    assert found[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    assert max(found) == 2.0 and found[0] > 0


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_the_last_step_reaches_the_floor_and_no_step_goes_below(kind: str, warmup: int) -> None:
    found = rates(kind=kind, warmup=warmup)
    assert found[-1] == pytest.approx(0.2) and min(found[warmup:]) == pytest.approx(0.2)
    assert learning_rate(10_000, ScheduleConfig(kind=kind, steps=100, final=0.1), peak=2.0) == pytest.approx(0.2)


def test_closed_forms() -> None:
    assert rates(kind="constant", warmup=0) == [2.0] * 100
    assert rates(kind="linear")[49] == pytest.approx(2.0 - 1.8 * 0.5)
    assert rates(kind="cosine")[24] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + cos(pi * 0.25)))
    assert rates(kind="cosine")[49] == pytest.approx(1.1)
    assert rates(kind="inverse_sqrt", warmup=4, final=0.0)[15:64:48] == pytest.approx([2.0 * sqrt(4 / 16), 2.0 * sqrt(4 / 64)])
    assert rates(kind="inverse_sqrt", warmup=4, final=0.5)[-1] == 1.0


@pytest.mark.parametrize("warmup", [0, 20])
def test_wsd_falls_in_the_last_part_of_all_steps(warmup: int) -> None:
    """decay 0.2 of 100 steps: the last 20 steps, with or without warmup."""
    found = rates(kind="wsd", warmup=warmup, decay=0.2)
    assert found[warmup:80] == [2.0] * (80 - warmup)
    assert found[80:] == pytest.approx([2.0 - 1.8 * (step + 1) / 20 for step in range(20)])
    assert rates(kind="wsd", warmup=warmup, decay=0.0)[warmup:] == [2.0] * (100 - warmup)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rate_is_negative(kind: str) -> None:
    """Not even by a rounding at the end of the fall to zero."""
    parts = [part / 100 for part in range(1, 101)]
    assert min(min(rates(kind=kind, final=0.0, decay=decay)) for decay in (parts if kind == "wsd" else [0.2])) >= 0.0


@given(st.sampled_from(KINDS), st.integers(0, 50), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_rates_fall_after_the_warmup_and_stay_in_bounds(kind: str, warmup: int, rest: int, final: float, decay: float) -> None:
    found = rates(kind=kind, warmup=warmup, steps=warmup + rest, final=final, decay=decay)[warmup:]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in zip(found, found[1:], strict=False))
    assert all(final * 2.0 - 1e-12 <= rate <= 2.0 + 1e-12 for rate in found)
