"""A wish to stop, as a scheduler sends it: SIGTERM or SIGUSR1 are noted, and the training loop saves and ends at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_asked = False


def listen() -> None:
    """From now on these signals are wishes to stop, however often they come."""
    for number in SIGNALS:
        signal.signal(number, ask)


def ask(number: int = 0, frame: FrameType | None = None) -> None:
    """Notes the wish."""
    global _asked
    _asked = True


def asked() -> bool:
    """Whether this process was told to stop."""
    return _asked
