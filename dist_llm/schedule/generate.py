"""The order of computing: for each pipeline rank, its forwards and backwards as one list.

All schedules here are one weave: each rank runs its forwards in one order and its backwards in another, starts with `warmup` forwards,
then takes one forward and one backward in turn, then the backwards that are left. They differ in the warm-up and in the two orders:

    gpipe        every forward first                                    arXiv:1811.06965
    1f1b         ranks - 1 - rank forwards first                        arXiv:2006.09503, arXiv:2104.04473
    interleaved  several stages per rank, see `_interleaved`            arXiv:2104.04473

Backwards of one stage run in rising order of micro-batch in all of them, so that gradients are summed in the same order everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_llm.errors import UsageError
from dist_llm.schedule.actions import Action, Kind


@dataclass(frozen=True)
class Schedule:
    """A named schedule: the order of one rank, the rank of a stage, and whether a rank may hold several stages."""

    order: Callable[[int, int, int, int], list[Action]]  # (rank, ranks, micro_batches, chunks)
    rank_of: Callable[[int, int], int]  # (stage, ranks)
    chunked: bool


def generate(name: str, *, ranks: int, micro_batches: int, chunks: int = 1) -> list[list[Action]]:
    """The compute actions of every pipeline rank, one list per rank. `chunks` stages live on each rank.

    Raises UsageError with the arithmetic where `limits` names any.
    """
    if refused := limits(name, ranks=ranks, micro_batches=micro_batches, chunks=chunks):
        raise UsageError(f"schedule {name!r} cannot be built", details=refused)
    return [SCHEDULES[name].order(rank, ranks, micro_batches, chunks) for rank in range(ranks)]


def limits(name: str, *, ranks: int, micro_batches: int, chunks: int = 1) -> list[str]:
    """Why `name` cannot run at this size, one line per reason; empty when it can."""
    if name not in SCHEDULES:
        return [f"there is no schedule {name!r}: choose {', '.join(SCHEDULES)}"]
    counts = {"pp": ranks, "micro-batches": micro_batches, "chunks": chunks}
    refused = [f"{label} = {count}: at least 1 is needed" for label, count in counts.items() if count < 1]
    if chunks > 1 and not SCHEDULES[name].chunked:
        refused.append(f"{name} has one stage per rank, chunks = {chunks} asks for {chunks}: use schedule=interleaved or chunks=1")
    return refused


def rank_of(stage: int, ranks: int, name: str = "interleaved") -> int:
    """The pipeline rank that holds `stage` under the schedule `name`."""
    return SCHEDULES[name].rank_of(stage, ranks)


def stages_of(rank: int, ranks: int, chunks: int, name: str = "interleaved") -> list[int]:
    """The stages that `rank` holds, first chunk first."""
    return [stage for stage in range(ranks * chunks) if rank_of(stage, ranks, name) == rank]


def _looped(stage: int, ranks: int) -> int:
    """Chunk c of rank r is stage c * ranks + r: the model passes over all ranks once per chunk."""
    return stage % ranks


def _gpipe(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[Action]:
    micros = range(micro_batches)
    warmup = micro_batches if ranks > 1 else 0  # alone there is nobody to fill the pipeline for: free each micro-batch at once
    return _weave([Action(rank, Kind.F, m) for m in micros], [Action(rank, Kind.B, m) for m in micros], warmup)


def _1f1b(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[Action]:
    micros = range(micro_batches)
    return _weave([Action(rank, Kind.F, m) for m in micros], [Action(rank, Kind.B, m) for m in micros], ranks - 1 - rank)


def _interleaved(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[Action]:
    """Micro-batches go in rounds of `size`: a round passes the first chunk of all ranks, then the second, and so on (depth first).

    Any number of micro-batches works. The pattern is laid for rounds of one size, with holes where a round is shorter, and the holes
    are dropped at the end. Why it cannot deadlock: give the k-th forward of rank r the number 2k + 2r, and its j-th backward
    2j + 2(ranks - 1 - r) + 2(ranks - 1) + 2(chunks - 1)size + 1. With this warm-up and size >= ranks, every action has a larger number
    than the action before it on its rank and than the one whose output it needs, so no circle of waiting exists; dropping a
    micro-batch drops whole chains, which adds no waiting. A single round of micro_batches < ranks has such numbers too: count each of
    its passes as `ranks` places long. In flight: at most warm-up + 1.
    """
    if chunks == 1:
        return _1f1b(rank, ranks, micro_batches, chunks)
    rounds = _rounds(ranks, micro_batches)
    stages = [chunk * ranks + rank for chunk in range(chunks)]
    forwards = [Action(stage, Kind.F, m) for micros in rounds for stage in stages for m in micros]
    backwards = [Action(stage, Kind.B, m) for micros in rounds for stage in reversed(stages) for m in micros]
    woven = _weave(forwards, backwards, 2 * (ranks - 1 - rank) + (chunks - 1) * len(rounds[0]))
    return [action for action in woven if action.micro != _HOLE]


_HOLE = -2  # a place in a round that no micro-batch takes


def _rounds(ranks: int, micro_batches: int) -> list[list[int]]:
    """Micro-batches in as many rounds of at least `ranks` as there can be, as equal as possible, filled up with holes to one size.

    A round shorter than `ranks` would make rank 0 wait for its own output to come round, once per chunk: only micro_batches < ranks
    needs one.
    """
    count = max(1, micro_batches // ranks)
    size, longer = divmod(micro_batches, count)
    sizes = [size + 1] * longer + [size] * (count - longer)
    starts = [sum(sizes[:index]) for index in range(count)]
    return [[*range(start, start + real), *[_HOLE] * (sizes[0] - real)] for start, real in zip(starts, sizes, strict=True)]


def _weave(forwards: Sequence[Action], backwards: Sequence[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return [*forwards[:warmup], *steady, *backwards[max(0, len(forwards) - warmup) :]]


SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule(_gpipe, _looped, chunked=False),
    "1f1b": Schedule(_1f1b, _looped, chunked=False),
    "interleaved": Schedule(_interleaved, _looped, chunked=True),
}
