"""Which source gives sample k: a pure function of the weights, exact within one at every k."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

LONGEST = 4096  # samples after which the pattern repeats, at most (or the number of sources)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportion of the weights, each at least 1, with a sum of at most LONGEST.

    0.7 and 0.3 give 7 and 3. Proportions that need a longer pattern are rounded to it, by at most 1 in LONGEST.
    """
    assert weights and all(weight > 0 for weight in weights), weights
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    shared = gcd(*whole)
    whole = [weight // shared for weight in whole]
    if sum(whole) <= LONGEST:
        return whole
    total, room = sum(whole), LONGEST - len(whole)
    return [1 + weight * room // total for weight in whole]


def pattern(weights: Sequence[int]) -> np.ndarray:
    """The sources of samples 0 .. sum(weights) - 1, after which it repeats: int64 numbers of sources.

    After any k samples each source was taken its share of k times, give or take less than one. The method is
    Tijdeman's for the chairman assignment problem (Discrete Mathematics 32, 1980): among the sources that are due,
    the one whose deadline comes first.
    """
    total, spread = sum(weights), max(1, 2 * len(weights) - 2)
    taken = [0] * len(weights)
    chosen = np.empty(total, dtype=np.int64)
    for k in range(1, total + 1):
        owed = [weight * k - total * count for weight, count in zip(weights, taken, strict=True)]
        due = [i for i, debt in enumerate(owed) if spread * debt >= total] if len(weights) > 1 else [0]
        source = min(due, key=lambda i: (Fraction(total * (spread - 1) - spread * owed[i], weights[i]), i))
        chosen[k - 1] = source
        taken[source] += 1
    assert taken == list(weights), (taken, weights)
    return chosen
