"""From ratios per round to an interval and a verdict: plain functions, without torch.

The interval is the one of order statistics: for n rounds the k-th smallest and the k-th largest ratio hold the true
median with probability 1 - 2 P(Binomial(n, 1/2) < k), whatever the distribution. It needs no normality, takes an outlier
for one vote, and exists at 95 % from 6 rounds on.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Literal

COVERAGE = 0.95
NOT_SLOWER = 1.05  # "not slower": the upper end lies at or below this

Verdict = Literal["met", "missed", "undecided"]


@dataclass(frozen=True)
class Interval:
    """The median of some ratios, the ends of its interval, and the probability with which they hold the true median."""

    median: float
    low: float
    high: float
    coverage: float


def median_interval(values: Sequence[float]) -> Interval:
    """The narrowest pair of order statistics that covers the median with 95 %; fewer than 6 values: their range, which covers less."""
    ordered, count, k = sorted(values), len(values), 1
    below = 0.5**count  # P(Binomial(n, 1/2) < k)
    while 2 * (k + 1) <= count + 1 and 1 - 2 * (more := below + comb(count, k) * 0.5**count) >= COVERAGE:
        below, k = more, k + 1
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[count - k], 1 - 2 * below)


@dataclass(frozen=True)
class Figure:
    """What a time ratio ours / rival must show. limit: of the median where `faster`, else of the interval's upper end."""

    limit: float
    faster: bool

    def __str__(self) -> str:
        return f"<= {self.limit:g}x" if self.faster else "not slower"


def faster(limit: float) -> Figure:
    """The interval lies below 1 and the median at or below `limit`."""
    return Figure(limit, True)


def not_slower() -> Figure:
    """The interval's upper end lies at or below 1.05."""
    return Figure(NOT_SLOWER, False)


def verdict(found: Interval, figure: Figure) -> Verdict:
    """met by the figure's rule; missed where the whole interval lies above its limit; else more or calmer rounds would have to tell."""
    if found.coverage < COVERAGE:
        return "undecided"
    met = found.high < 1 and found.median <= figure.limit if figure.faster else found.high <= figure.limit
    if met:
        return "met"
    return "missed" if found.low > figure.limit else "undecided"


def decided(found: Interval, figure: Figure) -> bool:
    """Whether further rounds would not change the verdict: the limit lies outside the interval."""
    if found.coverage < COVERAGE:
        return False
    return found.high <= figure.limit or found.low > figure.limit
