"""Named fault points: where a test can have a rank killed. Nothing happens unless one is armed, and the command line alone does that.

save.copy      tensors are copied           save.commit    COMMIT is written, the folder not yet named
save.write     part of a file is written    save.replace   an earlier folder of the same step has given up its name
save.sync      written, not yet flushed     save.rename    named, the name not yet flushed
save.verify    flushed, not yet read back   retain.rename  old checkpoints are renamed, the names not yet flushed
save.manifest  every rank has written       retain.delete  one file of an old checkpoint is deleted
data.shard     a shard is on the disk       data.index     all tokens are, the manifest is not
data.note      how far a build has come     data.rename    a data set is complete, not yet named
               is written, not yet named    (rank 0; the step is the number of the shard or of the note, otherwise 0)
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

POINTS = (
    *("save.copy", "save.write", "save.sync", "save.verify", "save.manifest", "save.commit", "save.replace", "save.rename"),
    *("retain.rename", "retain.delete"),
    *("data.shard", "data.note", "data.index", "data.rename"),
)


@dataclass(frozen=True)
class Fault:
    """The signal that a rank sends itself at a point of the save of a step."""

    point: str
    rank: int
    step: int
    signal: int = signal.SIGKILL


_armed: Fault | None = None


def arm(text: str | None) -> None:
    """Arms `POINT:RANK:STEP` or `POINT:RANK:STEP:SIGNAL` in this process and those forked from it; None disarms."""
    global _armed
    if text is None:
        _armed = None
        return
    point, rank, step, *name = text.split(":")
    assert point in POINTS, point
    _armed = Fault(point, int(rank), int(step), signal.Signals[name[0]] if name else signal.SIGKILL)


def reach(point: str, *, rank: int, step: int) -> None:
    """Passes a point."""
    if _armed is not None and (_armed.point, _armed.rank, _armed.step) == (point, rank, step):
        os.kill(os.getpid(), _armed.signal)
