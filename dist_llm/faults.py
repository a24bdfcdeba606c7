"""Named fault points: where a test can have a rank killed. Nothing happens unless one is armed, and the command line alone does that.

save.copy      tensors are copied           save.commit    COMMIT is written, the folder not yet named
save.write     part of a file is written    save.replace   an earlier folder of the same step has given up its name
save.sync      written, not yet flushed     save.rename    named, the name not yet flushed
save.verify    flushed, not yet read back   retain.rename  old checkpoints are renamed, the names not yet flushed
save.manifest  every rank has written       retain.delete  one file of an old checkpoint is deleted
data.shard     a shard is on the disk       data.index     all tokens are, the manifest is not
data.note      how far a build has come     data.rename    a data set is complete, not yet named
               is written, not yet named    (rank 0; the step is the number of the shard or of the note, otherwise 0)

step.data, step.forward, step.backward, step.reduce, step.update, step.validate: the rank enters that phase of a step
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

from dist_llm import flight

POINTS = (
    *("save.copy", "save.write", "save.sync", "save.verify", "save.manifest", "save.commit", "save.replace", "save.rename"),
    *("retain.rename", "retain.delete"),
    *("data.shard", "data.note", "data.index", "data.rename"),
    *("step.data", "step.forward", "step.backward", "step.reduce", "step.update", "step.validate"),
)


OTHERS = ("SLOW", "MEMORY")  # than signals
SLOW_SECONDS = 0.05


@dataclass(frozen=True)
class Fault:
    """The signal that a rank sends itself, once, at a point of a step. In a phase also SLOW: from this step on it sleeps there each time,
    and MEMORY: it finds none.
    """

    point: str
    rank: int
    step: int
    signal: int | str = signal.SIGKILL


_armed: Fault | None = None


def arm(text: str | None) -> None:
    """Arms `POINT:RANK:STEP`, with `:SIGNAL` or in a phase `:SLOW` or `:MEMORY`, in this process and those forked from it; None disarms."""
    global _armed
    if text is None:
        _armed = flight.on_enter = None
        return
    point, rank, step, *name = text.split(":")
    assert point in POINTS, point
    what = name[0] if name else "SIGKILL"
    _armed = Fault(point, int(rank), int(step), what if what in OTHERS else signal.Signals[what])
    flight.on_enter = _enter


def reach(point: str, *, rank: int, step: int) -> None:
    """Passes a point."""
    global _armed
    if _armed is not None and (_armed.point, _armed.rank, _armed.step) == (point, rank, step):
        fault, _armed = _armed, None
        assert isinstance(fault.signal, int)
        os.kill(os.getpid(), fault.signal)


def _enter(phase: str) -> None:
    """Passes the point of a phase, of the step that is recorded."""
    here = flight.current
    if _armed is None or here is None:
        return
    if isinstance(_armed.signal, int):
        reach(f"step.{phase}", rank=here.rank, step=here.step)
    elif (_armed.point, _armed.rank) == (f"step.{phase}", here.rank) and here.step >= _armed.step:
        if _armed.signal == "MEMORY":
            raise MemoryError
        time.sleep(SLOW_SECONDS)
