"""A source of text whose entropy rate is known exactly: the loss floor of a model trained on it.

A Markov chain over letters and the end of a document. Every transition has an integer weight out of 65536, so the
text is the same on every machine, and the rate counts the end token too: with the byte tokenizer the concatenated
tokens of the store *are* the chain, and no model's expected loss lies below `rate` nats per token.
"""

from __future__ import annotations

import hashlib
import string
from functools import cached_property

import numpy as np

TOTAL = 1 << 16  # the weights of every row sum to this
END_WEIGHT = 64  # out of TOTAL: documents have 1024 letters on average
LETTERS = string.ascii_letters + string.digits
CHUNK = 4096  # letters drawn at a time


class MarkovSource:
    """A chain over `alphabet` letters, drawn from the seed; state number `alphabet` is the end of a document.

    After a letter of state i the next is likelier the earlier it stands in a shuffled order that belongs to i: the
    weights fall as 1/rank for one half of the states and as 1/rank^2 for the other. An end is never followed by an end.
    """

    def __init__(self, seed: int, *, alphabet: int = 32) -> None:
        assert 2 <= alphabet <= len(LETTERS), alphabet
        self.seed, self.alphabet = seed, alphabet
        self.weights = np.array([self._row(state) for state in range(alphabet + 1)], dtype=np.int64)  # (A+1, A+1)
        self._next = [np.repeat(np.arange(alphabet + 1, dtype=np.uint8), row).tobytes() for row in self.weights]

    @cached_property
    def stationary(self) -> np.ndarray:
        """How often each state is visited in the long run; float64 of shape (alphabet + 1,)."""
        size = self.alphabet + 1
        equations = np.vstack([(self.weights / TOTAL).T - np.eye(size), np.ones(size)])
        return np.linalg.lstsq(equations, np.append(np.zeros(size), 1.0), rcond=None)[0]

    @property
    def rate(self) -> float:
        """The entropy rate in nats per token, the end token counted."""
        chance = self.weights / TOTAL
        surprise = -np.log(chance, out=np.zeros_like(chance), where=chance > 0)
        return float(self.stationary @ (chance * surprise).sum(axis=1))

    def document(self, index: int) -> str:
        """Document number `index`, at least one letter long; a pure function of seed, alphabet and index."""
        letters: list[str] = []
        state, chunk = self.alphabet, 0
        while True:
            for draw in self._draws(index, chunk):
                state = self._next[state][draw]
                if state == self.alphabet:
                    return "".join(letters)
                letters.append(LETTERS[state])
            chunk += 1

    def _draws(self, index: int, chunk: int) -> list[int]:
        name = f"{self.seed}\x1fentropy\x1f{self.alphabet}\x1f{index}\x1f{chunk}"
        return np.frombuffer(hashlib.shake_128(name.encode()).digest(2 * CHUNK), dtype="<u2").tolist()

    def _row(self, state: int) -> list[int]:
        """The integer weights of the transitions out of a state; they sum to TOTAL."""
        names = [f"{self.seed}\x1forder\x1f{state}\x1f{to}".encode() for to in range(self.alphabet)]
        order = sorted(range(self.alphabet), key=lambda to: hashlib.blake2b(names[to], digest_size=8).digest())
        end = 0 if state == self.alphabet else END_WEIGHT
        raw = [TOTAL // (rank + 1) ** (1 + state % 2) for rank in range(self.alphabet)]
        shares = [max(1, weight * (TOTAL - end) // sum(raw)) for weight in raw]
        shares[0] += TOTAL - end - sum(shares)
        return [shares[order.index(to)] for to in range(self.alphabet)] + [end]


def entropy_rate(seed: int, *, alphabet: int = 32) -> float:
    """Nats per token that no model can stay below on the `entropy` corpus of this seed, with the byte tokenizer."""
    return MarkovSource(seed, alphabet=alphabet).rate
