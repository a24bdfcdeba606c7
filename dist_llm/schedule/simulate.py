"""What a schedule costs in time and memory: the lowered lists run against a clock that knows the seconds of each action.

The result is a list of `Span`, the record that measured steps have too, so `summary` and the drawings serve both.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dist_llm.schedule.actions import COMPUTE, FINISHES, SENDS, Action, Channel, Kind, Lists, Span, advance, channel, needs, owners, partner

Cost = float | Sequence[float]  # seconds: the same for every stage, or one number per stage


@dataclass(frozen=True)
class Simulation:
    """A step on the clock; the lists are per rank.

    makespan: seconds from the first start to the last end. idle: seconds without compute. bubble_fraction: the idle share of all
    rank-seconds. in_flight: the most micro-batch activations of one stage that were alive at once (from F to the end of B or W).
    """

    spans: tuple[Span, ...]
    makespan: float
    bubble_fraction: float
    idle: tuple[float, ...]
    in_flight: tuple[int, ...]


def simulate(
    lists: Lists,
    *,
    forward: Cost,
    backward: Cost,
    input_gradient: Cost | None = None,
    weight_gradient: Cost | None = None,
    transfer: float = 0.0,
    reduce: Cost = 0.0,
    transfer_bytes: int = 0,
    reduce_bytes: int | Sequence[int] = 0,
) -> Simulation:
    """Run lowered lists that `validate` accepts. Costs are seconds per action: a number, or one per stage.

    backward is the whole B; I and W cost half of it each where input_gradient and weight_gradient are not given.
    A rank computes one action at a time. A transfer starts when both ends are posted and the one before it on its channel is over,
    takes `transfer` seconds, and runs beside compute. A rank's reductions run one after the other, beside compute; a backward waits for
    the reduction of its stage that is under way.
    """
    halves = [seconds / 2 for seconds in backward] if isinstance(backward, Sequence) else backward / 2
    costs: dict[Kind, Cost] = {
        Kind.F: forward,
        Kind.B: backward,
        Kind.I: halves if input_gradient is None else input_gradient,
        Kind.W: halves if weight_gradient is None else weight_gradient,
        Kind.REDUCE: reduce,
    }
    clock = _Clock(owners(lists), costs, transfer, transfer_bytes, reduce_bytes)
    stuck = advance(lists, clock.run)
    assert not stuck, f"a deadlock at {stuck}: validate the lists first"
    return summary(sorted(clock.spans, key=lambda span: (span.start, span.end, span.rank)), ranks=len(lists))


def summary(spans: Sequence[Span], *, ranks: int) -> Simulation:
    """The figures of simulated or measured spans."""
    start, end = min((span.start for span in spans), default=0.0), max((span.end for span in spans), default=0.0)
    makespan = end - start
    compute: list[list[Span]] = [[] for _ in range(ranks)]
    for span in spans:
        if span.action.kind in COMPUTE:
            compute[span.rank].append(span)
    idle = tuple(makespan - math.fsum(span.end - span.start for span in own) for own in compute)
    fraction = math.fsum(idle) / (ranks * makespan) if makespan > 0 else 0.0
    orders = (sorted(own, key=lambda span: (span.start, span.end)) for own in compute)
    return Simulation(tuple(spans), makespan, fraction, idle, tuple(in_flight([span.action for span in own]) for own in orders))


def in_flight(actions: Sequence[Action]) -> int:
    """The most micro-batch activations of one stage that a rank holds at once when it computes in this order."""
    alive = peak = 0
    for action in actions:
        alive += (action.kind is Kind.F) - (action.kind in FINISHES)
        peak = max(peak, alive)
    return peak


@dataclass
class _Clock:
    """How far each rank, channel and reduction queue is, in seconds."""

    owner: dict[int, int]
    costs: Mapping[Kind, Cost]
    transfer: float
    transfer_bytes: int
    reduce_bytes: int | Sequence[int]
    spans: list[Span] = field(default_factory=list)
    now: dict[int, float] = field(default_factory=lambda: defaultdict(float))  # rank -> when its compute is free
    reduced: dict[int, float] = field(default_factory=lambda: defaultdict(float))  # rank -> when its last reduction ends
    summed: dict[int, float] = field(default_factory=lambda: defaultdict(float))  # stage -> when its own last one ends
    sent: dict[Channel, float] = field(default_factory=lambda: defaultdict(float))  # channel -> when its last transfer ends
    posted: dict[Action, float] = field(default_factory=dict)
    arrived: dict[Action, float] = field(default_factory=dict)  # by RECV

    def run(self, rank: int, action: Action) -> bool:
        """Put `action` on the clock; False if its input is not there yet."""
        if action.kind in COMPUTE:
            return self._compute(rank, action)
        if action.kind is Kind.REDUCE:
            start = max(self.now[rank], self.reduced[rank])
            self.reduced[rank] = self.summed[action.stage] = start + _at(self.costs[Kind.REDUCE], action.stage)
            self.spans.append(Span(rank, action, start, self.reduced[rank], int(_at(self.reduce_bytes, action.stage))))
        else:
            self.posted[action] = self.now[rank]
            if partner(action) in self.posted:
                self._transfer(action if action.kind in SENDS else partner(action))
        return True

    def _compute(self, rank: int, action: Action) -> bool:
        recv = needs(action)
        awaited = recv in self.posted
        if awaited and recv not in self.arrived:
            return False
        start = max(self.now[rank], self.arrived[recv]) if awaited and recv else self.now[rank]
        if action.kind is not Kind.F:
            start = max(start, self.summed[action.stage])
        self.now[rank] = start + _at(self.costs[action.kind], action.stage)
        self.spans.append(Span(rank, action, start, self.now[rank]))
        return True

    def _transfer(self, send: Action) -> None:
        line, recv = channel(send, self.owner), partner(send)
        start = max(self.posted[send], self.posted[recv], self.sent[line])
        self.sent[line] = self.arrived[recv] = start + self.transfer
        self.spans.append(Span(line[0], send, start, self.sent[line], self.transfer_bytes))
        self.spans.append(Span(line[1], recv, start, self.sent[line]))


def _at(value: float | Sequence[float], stage: int) -> float:
    return value[stage] if isinstance(value, Sequence) else value
