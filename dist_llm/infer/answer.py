"""A line that grows by turns: what the model has read stays read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from dist_llm.infer.choose import Choice
from dist_llm.infer.model import Model
from dist_llm.infer.write import Writer


def _always() -> bool:
    return True


class Answers:
    """One conversation with a model. window: tokens that the model can see; computed: tokens that it has read so far, of all turns."""

    def __init__(self, model: Model, *, window: int) -> None:
        self.model, self.window, self.computed = model, window, 0
        self.cache = model.cache(lines=1, capacity=window)
        self.held: list[int] = []  # the tokens whose keys and values are in the cache

    def forget(self) -> None:
        """What was read was read by another model."""
        self.held = []

    def go_on(
        self, ids: Sequence[int], *, count: int, choice: Choice, ends: Iterable[int], going: Callable[[], bool] = _always
    ) -> Iterator[int]:
        """The tokens that follow `ids`, of which only those are computed that were not there in the turn before.

        At most `count`, and no more than the window has room for; stops after one of `ends`, or after the token at which
        `going` says no. Leaves the cache sound wherever it is interrupted.
        """
        assert 0 < len(ids) < self.window
        same = 0
        while same < min(len(self.held), len(ids) - 1) and self.held[same] == ids[same]:
            same += 1
        self.cache.lengths = [same]
        room = min(count, self.window - len(ids))
        writer = Writer(self.model, [list(ids)], count=room, choice=choice, window=self.window, ends=ends, cache=self.cache)
        try:
            for tokens in writer:
                yield tokens[0]
                if not going():
                    writer.stop(0)
        finally:
            self.held = writer.seen[0][: self.cache.lengths[0]]
            self.computed += self.cache.lengths[0] - same
