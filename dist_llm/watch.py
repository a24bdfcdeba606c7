"""Who holds up the others: the flight records of all ranks laid side by side.

Pure functions of snapshots, and a `Watchdog` that looks at them now and then. Ranks wait for each other in collectives, so the one that
hangs is the one that waits for nothing, or for something that the others have passed. Torch-free.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from dist_llm import flight
from dist_llm.errors import Code, Failure, PeerError
from dist_llm.flight import Call, Snapshot

LOOK_SECONDS = 0.5  # between two looks
MARGIN_SECONDS = 1.0  # what the backend's own timeout is given to speak first
SLOW = 2.0  # times the others' median
SLOW_STEPS = 8  # over which a slow rank's own work is compared
SLOW_SECONDS = 0.02  # of work a step, below which slowness says nothing
STACK_SECONDS = 0.5  # for the ranks to write their stacks
STOPPED, ENDED = ("T", "t"), ("Z", "X")  # what the kernel calls a process that a signal or a debugger has stopped, and one that is no more


# --- what records say ----------------------------------------------------------------------------------------------------


class HangError(PeerError):
    """Rank `rank` no longer goes on: it hangs, or has ended. spoke: it has told why itself."""

    def __init__(self, what: str, *, rank: int = -1, spoke: bool = False, **fields: Any) -> None:
        super().__init__(what, **fields)
        self.rank, self.spoke = rank, spoke


@dataclass(frozen=True)
class Mismatch:
    """Two ranks' collectives in the same place of a group's order that are not the same."""

    ranks: tuple[int, int]
    calls: tuple[Call, Call]


def mismatch(snapshots: Sequence[Snapshot]) -> Mismatch | None:
    """The first collective that differs between ranks: another kind, dtype or shape."""
    first: dict[tuple[str, int], tuple[int, Call]] = {}
    found: list[Mismatch] = []
    for snapshot in snapshots:
        for call in (call for call in snapshot.calls if call.group != flight.NO_PLACE):
            rank, other = first.setdefault((call.group, call.place), (snapshot.rank, call))
            if other.what != call.what:
                found.append(Mismatch((rank, snapshot.rank), (other, call)))
    return min(found, key=lambda one: one.calls[0].number, default=None)


def culprit(snapshots: Sequence[Snapshot], states: dict[int, str]) -> Snapshot:
    """The rank for which the others wait. states: of processes, as the kernel calls them, where they are known.

    A stopped process; else who waits for nothing, the longest silent first; else who is least far in what another waits for, and of
    those that are equally far who came there last.
    """
    stopped = [one for one in snapshots if states.get(one.rank) in STOPPED]
    free = [one for one in snapshots if one.awaited is None]
    if stopped or free:
        return min(stopped or free, key=lambda one: one.changed_at)
    waited = {one.awaited.group for one in snapshots if one.awaited is not None}

    def progress(one: Snapshot) -> tuple[int, float]:
        places = [call.place for call in one.calls if call.group in waited]
        return (max(places, default=-1), -one.changed_at)

    return min(snapshots, key=progress)


def ended(snapshots: Sequence[Snapshot], states: dict[int, str]) -> Snapshot | None:
    """The first rank that has ended, for another reason than that it gave up waiting or was done. states: read before the snapshots."""
    gone = [one for one in snapshots if states.get(one.rank) in ENDED]
    cause = [one for one in gone if one.code not in (Code.DONE, Code.PEER)]
    return min(cause, key=lambda one: one.changed_at, default=None)


def slow_rank(snapshots: Sequence[Snapshot]) -> tuple[int, float] | None:
    """(rank, ratio) of a rank whose own work takes SLOW times the others' median, over the last SLOW_STEPS steps.

    What counts is the time outside of collectives: a slow rank holds up all, and waits for none.
    """
    if len(snapshots) < 2 or any(len(one.seconds) < SLOW_STEPS for one in snapshots):
        return None
    work = {one.rank: median(one.seconds[-SLOW_STEPS:]) for one in snapshots}
    rank = max(work, key=lambda one: work[one])
    others = median(seconds for other, seconds in work.items() if other != rank)
    if work[rank] < max(SLOW * others, SLOW_SECONDS):
        return None
    return rank, work[rank] / max(others, 1e-9)


# --- as messages ---------------------------------------------------------------------------------------------------------


def place_of(snapshot: Snapshot) -> str:
    """Where a rank is."""
    step = f"step {snapshot.step}" if snapshot.step else "before the first step"
    return f"rank {snapshot.rank} (process {snapshot.pid} on {snapshot.host}), {step}, {snapshot.phase}"


def mismatch_failure(found: Mismatch) -> PeerError:
    """The message for collectives that differ."""
    (a, b), (first, second) = found.ranks, found.calls
    return PeerError(
        "two ranks do not make the same collective",
        where=f"rank {b}, step {second.step}, {second.site}",
        expected=f"as rank {a}: {first}",
        found=f"on rank {b}: {second}",
        safe="what was computed since is not to be trusted; checkpoints before this step are",
    )


def hang_failure(snapshots: Sequence[Snapshot], states: dict[int, str], *, now: float, logs: object = None) -> HangError:
    """The message for ranks that no longer go on."""
    slow = culprit(snapshots, states)
    waiting = [one for one in snapshots if one.rank != slow.rank and one.awaited is not None]
    stopped = "; its process is stopped (SIGSTOP)" if states.get(slow.rank) in STOPPED else ""
    last = slow.calls[-1] if slow.calls else None
    lines = [f"last collective of rank {slow.rank}: {last}"] if last is not None else []
    lines += [f"stacks of the ranks that still answer: {logs}/rank-*.log"] if logs is not None else []
    return HangError(
        f"rank {slow.rank} hangs",
        rank=slow.rank,
        where=place_of(slow),
        expected=f"rank {waiting[0].rank} waits for {waiting[0].awaited}" if waiting else "a sign of life",
        found=f"silent for {now - slow.changed_at:.0f} s{stopped}",
        details=lines,
    )


def end_failure(one: Snapshot, *, logs: object = None) -> HangError:
    """The message for a rank that has ended, when it is not us who started it: a signal is known to its parent alone."""
    log = [] if logs is None else [f"its last words: {logs}/rank-{one.rank}.log"]
    if one.code is not None:
        found = f"exit code {one.code}"
        return HangError(f"rank {one.rank} failed", rank=one.rank, spoke=True, where=place_of(one), found=found, details=log)
    found = "its process has ended without a word; the signal is in torchrun's own report"
    return HangError(f"rank {one.rank} died", rank=one.rank, where=place_of(one), found=found, details=log)


def slow_note(rank: int, ratio: float, snapshots: Sequence[Snapshot]) -> str:
    """One line about a slow rank."""
    step = max(one.step for one in snapshots)
    return f"rank {rank} is slow: its own work takes {ratio:.1f} times the others' (the last {SLOW_STEPS} steps before step {step})"


# --- the watch -----------------------------------------------------------------------------------------------------------


def process_states(snapshots: Sequence[Snapshot]) -> dict[int, str]:
    """The kernel's letter for each rank's process that is on this machine, where it tells; X for one that is no longer there."""
    found, here = {}, socket.gethostname()
    for one in snapshots:
        if one.host != here:
            continue
        try:
            with open(f"/proc/{one.pid}/stat", "rb") as file:
                found[one.rank] = file.read().rsplit(b")", 1)[1].split()[0].decode()
        except (FileNotFoundError, ProcessLookupError):
            found[one.rank] = "X"
        except (OSError, IndexError):
            continue
    return found


class Watchdog:
    """Looks at the records of all ranks. note: hears of a slow rank, once each. A record that is out of reach is None."""

    def __init__(
        self, buffers: Sequence[Any | None], *, timeout_seconds: float, logs: object = None, note: Callable[[str], None] | None
    ) -> None:
        self.complete, buffers = None not in buffers, [buffer for buffer in buffers if buffer is not None]
        self.buffers, self.timeout, self.logs, self.note = buffers, timeout_seconds, logs, note
        self.looked_at = time.monotonic()
        self.noted: set[int] = set()
        self.stopped: dict[int, float] = {}  # rank -> when its process was first seen stopped

    def snapshots(self) -> list[Snapshot]:
        """The records of the ranks that have begun one."""
        return [one for buffer in self.buffers if (one := flight.read(buffer)) is not None]

    def look(self) -> Failure | None:
        """At most every LOOK_SECONDS: the failure to end the job with, if there is one."""
        now = time.monotonic()
        if now - self.looked_at < LOOK_SECONDS:
            return None
        self.looked_at = now
        if self._differ() and (differing := self.mismatch()) is not None:
            return differing
        found = [one for buffer in self.buffers if (one := flight.read(buffer, calls=False)) is not None]
        if self.note is not None and (slow := slow_rank(found)) is not None and slow[0] not in self.noted:
            self.noted.add(slow[0])
            self.note(slow_note(*slow, found))
        self.stopped = {rank: self.stopped.get(rank, now) for rank, state in process_states(found).items() if state in STOPPED}
        training = [one.changed_at for one in found if one.step]  # before its first step a rank may work in silence as long as it likes
        quiet_since = min([*self.stopped.values(), max(training, default=now)])
        if now - quiet_since > self.timeout + MARGIN_SECONDS:
            return self.hang(self.snapshots())
        return None

    def _differ(self) -> bool:
        """Whether two ranks' collectives in the same place are not the same, as far as a quick look tells."""
        first: dict[tuple[str, int], tuple] = {}
        return any(first.setdefault(place, what) != what for buffer in self.buffers for place, what in flight.signatures(buffer).items())

    def explain(self) -> Failure | None:
        """After a rank has given up waiting: what the records say of it. Nobody is blamed where not all of them are here."""
        if (differing := self.mismatch()) is not None:
            return differing
        found = self.snapshots()
        if not self.complete or len(found) < len(self.buffers):  # a record may be there and not have begun
            return None
        if any(one.awaited is not None for one in found):
            return self.hang(found)
        return self._end(found)

    def mismatch(self) -> Failure | None:
        """The failure of ranks that do not make the same collectives, if they do not."""
        found = mismatch(self.snapshots())
        return None if found is None else mismatch_failure(found)

    def hang(self, found: Sequence[Snapshot]) -> Failure:
        """Says which rank has ended or, with the stacks of the living ones written, which one hangs."""
        if (end := self._end(found)) is not None:
            return end
        now, states = time.monotonic(), process_states(found)
        if self.logs is not None:
            for one in found:
                if states.get(one.rank, "X") not in STOPPED + ENDED:
                    with contextlib.suppress(ProcessLookupError):  # it may end meanwhile
                        os.kill(one.pid, signal.SIGUSR2)
            time.sleep(STACK_SECONDS)
        return self._end(found) or hang_failure(found, states, now=now, logs=self.logs)  # connections close before a process ends

    def _end(self, found: Sequence[Snapshot]) -> Failure | None:
        """The failure of a rank that has ended, if one has."""
        states = process_states(found)
        end = ended(self.snapshots(), states)
        return None if end is None else end_failure(end, logs=self.logs)
