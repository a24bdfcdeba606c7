"""What a rank of a rival does for the conductor: builds, steps under the clock, and is measured alone."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import peak_resident, read_bytes, resident, sent_bytes
from benchmarks.rivals import Rival, Taken, bring, make_rival
from dist_llm.train.memory import LiveMemory


def contestant(rank: int, world: int, key: str, setting: Any, watched: bool) -> Callable[[dict], Any]:
    """Builds a rival and returns what answers requests. watched: its live memory is counted from before the building."""
    import torch._dynamo  # noqa: F401  any torch.optim object brings it (67 MB): in every rank, before memory is judged

    torch.set_num_threads(setting.threads)
    bring(key)
    live = LiveMemory() if watched else None
    before = resident()
    with live or contextlib.nullcontext():
        made = make_rival(key, setting, rank, world)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: building is not judged
    seat = Seat(made, world, live, before)
    return lambda request: getattr(seat, request.pop("do"))(**request)


class Seat:
    """One rank of one rival, asked by name."""

    def __init__(self, rival: Rival, world: int, live: LiveMemory | None, before: int) -> None:
        self.rival, self.world, self.live, self.before = rival, world, live, before

    def warm(self, step: int) -> dict[str, Any]:
        """A step that is not judged: its loss and norm, what was sent, and what was read."""
        self._meet()
        self.rival.booked()
        before, held = sent_bytes(), read_bytes()
        taken = self.rival.step(step)
        read = read_bytes() - held
        self._meet()
        sent = sent_bytes() - before
        return {**self._told(taken), "sent": sent, "read": read, "booked": self.rival.booked(), "resident": self._resident()}

    def timed(self, step: int) -> dict[str, Any]:
        """A step under the clock: wall and CPU seconds of this rank. What a contestant still has under way ends before."""
        if ready := getattr(self.rival, "ready", None):
            ready()
        self._meet()
        start, used = time.perf_counter(), cpu_seconds()
        taken = self.rival.step(step)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - used
        return {**self._told(taken), "seconds": seconds, "cpu": cpu}

    def memory(self, step: int) -> dict[str, Any]:
        """A step under the memory tracker: bytes alive before it and at its peak."""
        assert self.live is not None
        self.live.restart()
        with self.live:
            taken = self.rival.step(step)
        return {**self._told(taken), "kept": self.live.now, "peak": self.live.peak}

    def _resident(self) -> int:
        """Growth of resident memory; a contestant that works in processes of its own knows theirs."""
        own = getattr(self.rival, "resident", None)
        return own() if own else max(0, peak_resident() - self.before)

    def _meet(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def _told(self, taken: Taken) -> dict[str, Any]:
        return {"loss": taken.loss, "norm": taken.norm}


def cpu_seconds() -> float:
    """That this process and its ended children have used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
