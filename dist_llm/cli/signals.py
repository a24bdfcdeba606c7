"""Signals that end a command, from its first moment on: heard before anything large is imported. The standard library alone."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from dist_llm import stop
from dist_llm.errors import Code


def end_on_signals() -> None:
    """SIGTERM and SIGUSR1 end this process as Ctrl-C does, with what it holds put away; a rank forked from it simply dies.

    Where ranks train, they are wishes to stop instead (ranks.py). torchrun's ranks die at once, also while they wait in a collective.
    """
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        interrupted = number == signal.SIGINT
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if _importing(frame):  # an exception might be lost in there, or leave half a module; of what is held only locks go by themselves
            tell_end(interrupted=interrupted)
            os._exit(Code.INTERRUPTED if interrupted else Code.TERMINATED)
        if interrupted:
            raise KeyboardInterrupt
        stop.ask()  # where Python swallows the exit (in a callback), what comes next still knows
        tell_end(interrupted=False)
        raise SystemExit(Code.TERMINATED)

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell starts what runs in its background
        signal.signal(signal.SIGINT, end)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        for number in stop.SIGNALS:
            signal.signal(number, end)


def tell_end(*, interrupted: bool) -> None:
    """The one line of a command that a signal ends."""
    print(f"{'interrupted' if interrupted else 'terminated'}: nothing was saved after the last checkpoint", file=sys.stderr, flush=True)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
