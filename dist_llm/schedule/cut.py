"""Cutting a model into pipeline stages: consecutive parts, the largest stage as cheap as it can be."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from dist_llm.errors import UsageError


def cut(costs: Sequence[float], num_stages: int) -> list[range]:
    """The parts of each stage, in order: `costs` holds one cost per part of the model (embedding first, head last), any unit of measure.

    Among all cuts into non-empty stages, the one whose dearest stage is cheapest; among those the most even one (least sum of
    squares); among those the one with the shortest first stage, then second, and so on, because early stages hold the most
    micro-batches. Exact: costs are compared as whole numbers, so no rounding decides a tie. Raises UsageError for too few parts.
    """
    assert num_stages >= 1 and all(math.isfinite(cost) and cost >= 0 for cost in costs), (costs, num_stages)
    if len(costs) < num_stages:
        raise UsageError(
            f"{len(costs)} parts (embedding, halves of blocks, head) over {num_stages} stages leave {num_stages - len(costs)} stages empty",
            expected=f"at most {len(costs)} stages (pp x chunks)",
            found=f"{num_stages} stages",
        )
    total = [0, *accumulate(_whole(costs))]  # cost of parts i to j - 1 = total[j] - total[i]
    limit = _smallest_limit(total, num_stages)
    return _most_even(total, num_stages, limit)


def _whole(costs: Sequence[float]) -> list[int]:
    """The costs as whole numbers in the same proportions (a float is a fraction, so they exist)."""
    fractions = [Fraction(cost) for cost in costs]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def _smallest_limit(total: list[int], num_stages: int) -> int:
    """The cost of the dearest stage in a best cut: the least with which stages that take as much as they may come to the end."""
    low, high = max(b - a for a, b in pairwise(total)), total[-1]
    while low < high:
        middle = (low + high) // 2
        if _reach(total, num_stages, middle)[-1] == len(total) - 1:
            high = middle
        else:
            low = middle + 1
    return low


def _reach(total: list[int], num_stages: int, limit: int) -> list[int]:
    """The largest number of parts that 0, 1, ... stages of at most `limit` can hold, from the first part on."""
    reached = [0]
    for _ in range(num_stages):
        reached.append(bisect_right(total, total[reached[-1]] + limit) - 1)
    return reached


def _most_even(total: list[int], num_stages: int, limit: int) -> list[range]:
    """The cut with no stage above `limit`, the least sum of squared stage costs, and the earliest boundaries among equals.

    least[s][i] = the least sum of squares for parts i and later in s stages, with the end of the first of them; only for
    parts that the stages before can have reached.
    """
    parts, reached = len(total) - 1, _reach(total, num_stages, limit)
    least: list[dict[int, tuple[int, int]]] = [{parts: (0, parts)}]
    for stages in range(1, num_stages + 1):
        row: dict[int, tuple[int, int]] = {}
        before, after = num_stages - stages, least[-1]
        for start in range(before, reached[before] + 1):
            last = bisect_right(total, total[start] + limit) - 1
            ends = (end for end in range(start + 1, last + 1) if end in after)
            if best := min(((after[end][0] + (total[end] - total[start]) ** 2, end) for end in ends), default=None):
                row[start] = best
        least.append(row)
    cuts, start = [], 0
    for stages in range(num_stages, 0, -1):
        end = least[stages][start][1]
        cuts.append(range(start, end))
        start = end
    return cuts
