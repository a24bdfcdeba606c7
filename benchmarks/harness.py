"""Measures the rows of a question: memory of each rival alone, then all of them alive at once and stepped in turn.

A round is one step of every contestant, the order moved on by one from round to round; its ratio is the time of ours over
the rival's in that round, so what disturbs a whole round cancels. The time of a step is its slowest rank's, from a common
barrier. The interval is looked at after 8, 12, 18, 27, ... rounds, and a row ends when every figure is decided or its
rounds or seconds are used up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from benchmarks.interval import Figure, Interval, decided, median_interval, verdict
from benchmarks.machine import Clock
from benchmarks.rank import contestant
from benchmarks.setting import Setting, predicted_peaks
from benchmarks.worlds import World
from dist_llm.errors import Failure, NumericError

WARM = 3  # training steps before the clock starts; their losses must agree
TOLERANCE = 1e-4  # relative, of loss and norm: the same numbers in float32
PREDICTED = 0.1  # of the predicted peak: how far the measured one may be
FIRST_LOOK = 8
UNJUDGED_ROUNDS = 12  # of a row without figures of time
Say = Callable[[str], None]


@dataclass(frozen=True)
class Against:
    """A rival of a row. time: what ours must show against it; None: shown, not judged. judged: its memory counts for the row."""

    key: str
    label: str
    time: Figure | None = None
    judged: bool = True
    known_peak: float | None = None  # MB, as measured elsewhere for the same model
    known_sent: float | None = None


class Task(Protocol):
    """What all contestants of a row do; they know its kind."""

    @property
    def threads(self) -> int:
        """Of a rank."""

    def quick(self) -> Task:
        """The same in miniature."""

    def described(self) -> dict[str, Any]:
        """As the results keep it."""


@dataclass(frozen=True)
class Row:
    """One comparison: ours against some rivals. peak: part of the best judged rival's memory; sent: MB a rank and step, at most."""

    name: str
    ours: str
    rivals: tuple[Against, ...]
    setting: Task
    world: int = 1
    peak: float | None = None
    sent: float | None = None
    numbers: Literal["train", "same", "any"] = "train"  # train: losses and norms agree, and move; same: exactly; any: no matter
    note: str = ""

    @property
    def warm(self) -> int:
        """Steps before the clock starts."""
        return WARM if self.numbers == "train" else 1


@dataclass(frozen=True)
class Limits:
    """When a row ends."""

    rounds: int = 40
    seconds: float = 240.0


@dataclass
class Contestant:
    """What is known of one of a row's contestants."""

    key: str
    label: str
    alone: dict[str, Any] = field(default_factory=dict)
    warm: list[list[dict[str, Any]]] = field(default_factory=list)
    rounds: list[list[dict[str, Any]]] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def seconds(self) -> list[float]:
        """Of each round: the slowest rank's."""
        return [max(rank["seconds"] for rank in ranks) for ranks in self.rounds]

    @property
    def cpu_seconds(self) -> list[float]:
        """Of each round: all ranks' together."""
        return [sum(rank["cpu"] for rank in ranks) for ranks in self.rounds]


def measure(row: Row, limits: Limits, say: Say) -> dict[str, Any]:
    """A row of the results. A rival that cannot take part is named with its failure; ours must."""
    ours = Contestant(row.ours, "ours")
    everyone = [ours, *(Contestant(rival.key, rival.label) for rival in row.rivals)]
    for one in everyone if row.numbers == "train" else []:
        say(f"{row.name}: memory of {one.label}")
        _alone(one, row)
    if ours.failure is not None:
        raise ours.failure
    during = _together([one for one in everyone if one.failure is None], row, limits, say)
    _refuse_other_numbers(everyone, row)
    return _result(row, everyone, during)


def _alone(one: Contestant, row: Row) -> None:
    """Live memory of one contestant in fresh ranks: the third step, with everything since before the building seen."""
    try:
        with World(row.world, contestant, one.key, row.setting, True) as world:
            steps = [world.ask({"do": "memory", "step": step}) for step in range(2)]
    except Failure as failure:
        one.failure = failure
        return
    ranks = steps[-1]
    one.alone = {"peak_bytes": [rank["peak"] for rank in ranks], "kept_bytes": [rank["kept"] for rank in ranks]}


def _together(everyone: list[Contestant], row: Row, limits: Limits, say: Say) -> dict[str, Any]:
    """All contestants alive at once: warmed up one after the other, then round after round in turn; what the machine did meanwhile."""
    worlds: dict[str, World] = {}
    try:
        for one in everyone:
            say(f"{row.name}: starting {one.label}")
            worlds[one.key] = World(row.world, contestant, one.key, row.setting, False)
            try:
                one.warm = [worlds[one.key].ask({"do": "warm", "step": step}) for step in range(row.warm)]
            except Failure as failure:
                one.failure = failure
        if everyone[0].failure is not None:
            raise everyone[0].failure
        able, begun = [one for one in everyone if one.failure is None], Clock.now()
        _rounds(able, worlds, row, limits, say)
        return begun.until(Clock.now(), own=sum(sum(one.cpu_seconds) for one in able))
    finally:
        for world in worlds.values():
            world.close()


def _rounds(everyone: list[Contestant], worlds: dict[str, World], row: Row, limits: Limits, say: Say) -> None:
    start, look = time.monotonic(), FIRST_LOOK
    for turn in range(limits.rounds):
        for at in range(len(everyone)):
            one = everyone[(turn + at) % len(everyone)]
            one.rounds.append(worlds[one.key].ask({"do": "timed", "step": row.warm + turn}))
        say(f"{row.name}: round {turn + 1}, time ours / " + _standing(everyone))
        if turn + 1 >= look:
            look = turn + 1 + (turn + 1) // 2
            figures = judged(everyone, row)
            settled = all(decided(interval_of(everyone[0], one), figure) for one, figure in figures)
            if settled and (figures or turn + 1 >= UNJUDGED_ROUNDS):
                return
        if time.monotonic() - start > limits.seconds:
            return


def judged(everyone: list[Contestant], row: Row) -> list[tuple[Contestant, Figure]]:
    """The contestants with a figure of time."""
    figures = {rival.key: rival.time for rival in row.rivals}
    return [(one, figure) for one in everyone[1:] if (figure := figures[one.key]) is not None]


def interval_of(ours: Contestant, rival: Contestant) -> Interval:
    """Of the ratios of time ours / rival, round by round."""
    return median_interval([a / b for a, b in zip(ours.seconds, rival.seconds, strict=True)])


def _standing(everyone: list[Contestant]) -> str:
    ours, *rivals = everyone
    return ", ".join(f"{one.label} {interval_of(ours, one).median:.3f}" for one in rivals)


def _refuse_other_numbers(everyone: list[Contestant], row: Row) -> None:
    """All must have done the same: losses and norms of the first steps agree, and the loss moved."""
    ours, *rivals = [one for one in everyone if one.failure is None]
    mine = _numbers(ours)
    if row.numbers == "any":
        return
    if row.numbers == "train" and abs(mine[0][0] / mine[-1][0] - 1) < 10 * TOLERANCE:
        raise NumericError("the loss does not move, so it proves nothing", where=row.name, found=str(mine))
    allowed = TOLERANCE if row.numbers == "train" else 0.0
    for one in rivals:
        for step, (a, b) in enumerate(zip(mine, _numbers(one), strict=True)):
            for kind, x, y in zip(("loss", "norm"), a, b, strict=True):
                if x is not None and y is not None and abs(x - y) > allowed * abs(x):
                    where, expected = f"{row.name}, {one.label}, step {step}, {kind}", f"{x} within {allowed:g}"
                    raise NumericError("a rival does not train the same numbers", where=where, expected=expected, found=str(y))


def _numbers(one: Contestant) -> list[tuple[float, float | None]]:
    """(loss, norm) of the warm steps."""
    return [(sum(rank["loss"] for rank in ranks), ranks[0]["norm"]) for ranks in one.warm]


def _result(row: Row, everyone: list[Contestant], during: dict[str, Any]) -> dict[str, Any]:
    ours, *others = everyone
    mine = _measured(ours) | _forecast(row)
    judged_for_memory = [one for one, rival in zip(others, row.rivals, strict=True) if rival.judged and one.failure is None]
    rivals = [_against(ours, one, rival) for one, rival in zip(others, row.rivals, strict=True)]
    return {
        "name": row.name,
        "world": row.world,
        "note": row.note,
        "setting": row.setting.described(),
        "rounds": len(ours.rounds),
        "during": during,
        "ours": mine,
        "rivals": rivals,
        "peak": _memory(_peak, ours, judged_for_memory, row.peak),
        "resident": _memory(_resident, ours, judged_for_memory, row.peak),
        "predicted": _as_predicted(mine),
        "sent": _sent(mine["booked_bytes"], row.sent),
    }


def _memory(of: Callable[[Contestant], float], ours: Contestant, rivals: list[Contestant], figure: float | None) -> dict[str, Any] | None:
    """Ours over the best of the judged rivals."""
    if figure is None or not rivals:
        return None
    ratio = of(ours) / min(of(one) for one in rivals)
    return {"figure": figure, "ratio": ratio, "verdict": "met" if ratio <= figure else "missed"}


def _forecast(row: Row) -> dict[str, Any]:
    """The peak of each rank of ours from table and layout alone, where the row trains a layout."""
    name, _, layout = row.ours.partition(":")
    return {"predicted_peak_bytes": predicted_peaks(row.setting, layout)} if name == "ours" and isinstance(row.setting, Setting) else {}


def _as_predicted(mine: dict[str, Any]) -> dict[str, Any] | None:
    """How far the measured peak is from the predicted one, as a part of it, on the rank where it is farthest."""
    if not mine.get("predicted_peak_bytes") or not mine.get("peak_bytes"):
        return None
    pairs = zip(mine["peak_bytes"], mine["predicted_peak_bytes"], strict=True)
    difference = max((measured / predicted - 1 for measured, predicted in pairs), key=abs)
    return {"figure": PREDICTED, "difference": difference, "verdict": "met" if abs(difference) <= PREDICTED else "missed"}


def _peak(one: Contestant) -> float:
    """Live tensor bytes of the fullest rank."""
    return max(one.alone["peak_bytes"])


def _resident(one: Contestant) -> float:
    """Growth of resident memory of the fullest rank."""
    return max(rank["resident"] for rank in one.warm[-1])


def _sent(booked: list[dict[str, float]], figure: float | None) -> dict[str, Any] | None:
    """What the busiest rank of ours sends in a step; norms, counts and flags are apart."""
    if figure is None:
        return None
    sent = max(sum(moved for axis, moved in rank.items() if axis != "control") for rank in booked) / 1e6
    return {"figure": figure, "mb": sent, "verdict": "met" if round(sent, 1) <= figure else "missed"}


def _measured(one: Contestant) -> dict[str, Any]:
    """What one contestant measured."""
    last = one.warm[-1] if one.warm else []
    seconds = one.seconds
    cpu = [[rank["cpu"] for rank in ranks] for ranks in one.rounds]
    return {
        "key": one.key,
        "label": one.label,
        "step_seconds": statistics.median(seconds) if seconds else None,
        "all_step_seconds": [round(value, 5) for value in seconds],
        "cpu_seconds": [round(statistics.median(ranks), 5) for ranks in zip(*cpu, strict=True)],
        **one.alone,
        "peak_rss_bytes": [rank["resident"] for rank in last],
        "sent_bytes": [rank["sent"] for rank in last],
        "read_bytes": [rank["read"] for rank in last],
        "booked_bytes": [rank["booked"] for rank in last],
        "losses": [loss for loss, _ in _numbers(one)],
        "norms": [norm for _, norm in _numbers(one)],
        "error": one.failure.as_dict() if one.failure else None,
    }


def _against(ours: Contestant, one: Contestant, rival: Against) -> dict[str, Any]:
    found = _measured(one) | {"known_peak_mb": rival.known_peak, "known_sent_mb": rival.known_sent}
    found |= {"figure": str(rival.time) if rival.time else None, "time": None, "cpu": None, "verdict": None}
    if one.failure is None and one.rounds:
        interval = interval_of(ours, one)
        found["time"] = asdict(interval)
        found["cpu"] = asdict(median_interval([a / b for a, b in zip(ours.cpu_seconds, one.cpu_seconds, strict=True)]))
        found["verdict"] = verdict(interval, rival.time) if rival.time else None
        found["peak_ratio"] = _peak(ours) / _peak(one) if one.alone else None
    return found
