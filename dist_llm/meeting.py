"""Where ranks that were not forked by us meet, and what is said when they do not. Torch-free."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_llm.errors import PeerError

PROBE_SECONDS = 1.0  # for who answers at an address
_THREAD = "dist-llm meeting"


class MeetingError(PeerError):
    """The ranks did not meet. teller: the first of those that came; None where this rank could not learn who did."""

    def __init__(self, what: str, *, teller: int | None = None, **fields: Any) -> None:
        super().__init__(what, **fields)
        self.teller = teller


@dataclass(frozen=True)
class Meeting:
    """A store's address. served: torchrun serves it, else rank 0 does. attempt: how often torchrun has started the ranks anew."""

    host: str
    port: int
    served: bool
    attempt: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def answer(self) -> str:
        """Who is there instead of the store, as far as a plain connection tells."""
        try:
            within(PROBE_SECONDS, lambda: socket.create_connection((self.host, self.port)).close())
        except OSError as error:
            owner = "torchrun" if self.served else "rank 0"
            return f"nobody answers there, where {owner} should serve the store: {error.strerror or 'no answer'}"
        return "what answers there is not torch's store: another program, or a rank that stands still"


def within(seconds: float, work: Callable[[], object]) -> None:
    """Does `work` on a thread of its own; raises what it raises, or TimeoutError when it takes longer.

    torch's C++ may wait for an answer without end, and Python hears no signal meanwhile on the thread that does.
    """
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name=_THREAD, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    if outcome[0] is not None:
        raise outcome[0]


def is_stuck() -> bool:
    """Whether a thread was given up that still waits: it aborts a process that takes Python down around it."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
