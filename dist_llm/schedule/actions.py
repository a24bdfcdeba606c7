"""The words of a schedule: what one rank does to one stage for one micro-batch, and when it did.

A schedule is data: one list of actions per pipeline rank. The same lists are generated (generate.py), completed with messages
(lower.py), proved (validate.py), simulated (simulate.py), drawn (draw.py) and executed.

Messages are named by the stage that acts: `2SF0` sends the output of stage 2 onward and arrives as `3RF0`;
`2SB0` sends the gradient of stage 2's input back and arrives as `1RB0`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

ALL = -1  # the micro-batch of a REDUCE that covers every micro-batch of the step


class Kind(StrEnum):
    """What an action does; the value is its text form."""

    F = "F"  # forward
    B = "B"  # full backward: gradients of the input and of the weights
    I = "I"  # noqa: E741  gradient of the input only
    W = "W"  # gradient of the weights only
    SEND_F = "SF"
    RECV_F = "RF"
    SEND_B = "SB"
    RECV_B = "RB"
    REDUCE = "R"  # sum the weight gradients of a stage over its replicas

    __hash__ = str.__hash__  # Enum's own hash is Python code, and schedules live in sets


COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
SENDS = frozenset({Kind.SEND_F, Kind.SEND_B})
RECVS = frozenset({Kind.RECV_F, Kind.RECV_B})
FINISHES = frozenset({Kind.B, Kind.W})  # after these the weight gradient of the micro-batch is whole and its activations are free


class Action(NamedTuple):
    """One thing to do: `kind` for micro-batch `micro` at `stage` (0 is the embedding's end of the model)."""

    stage: int
    kind: Kind
    micro: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{'' if self.micro == ALL else self.micro}"


@dataclass(frozen=True, slots=True)
class Span:
    """An action as it ran or was simulated on `rank`, from `start` to `end` in seconds; `bytes` sent by messages and reductions."""

    rank: int
    action: Action
    start: float
    end: float
    bytes: int = 0


Lists = Sequence[Sequence[Action]]  # one list per pipeline rank
Channel = tuple[int, int, Kind]  # from rank, to rank, SEND_F or SEND_B

_TEXT = re.compile(r"([0-9]+)(SF|RF|SB|RB|F|B|I|W|R)([0-9]*)")
_TAKES = {Kind.F: Kind.RECV_F, Kind.B: Kind.RECV_B, Kind.I: Kind.RECV_B}
_GIVES = {Kind.F: Kind.SEND_F, Kind.B: Kind.SEND_B, Kind.I: Kind.SEND_B}
_PARTNER = {
    Kind.SEND_F: (Kind.RECV_F, 1),
    Kind.RECV_F: (Kind.SEND_F, -1),
    Kind.SEND_B: (Kind.RECV_B, -1),
    Kind.RECV_B: (Kind.SEND_B, 1),
}


def parse(text: str) -> Action:
    """Read the text form of an action, the inverse of `str`: `2F0`, `2SB0`, `2R`. Raises ValueError."""
    match = _TEXT.fullmatch(text)
    if not match or (not match[3] and match[2] != Kind.REDUCE):
        raise ValueError(f"not an action: {text!r} (an action is stage, kind, micro-batch: 2F0, 2SF0, 2R)")
    return Action(int(match[1]), Kind(match[2]), int(match[3]) if match[3] else ALL)


def needs(action: Action) -> Action | None:
    """The RECV that brings a compute action its input, if that comes from another rank; None for all but F, B and I."""
    return Action(action.stage, _TAKES[action.kind], action.micro) if action.kind in _TAKES else None


def gives(action: Action) -> Action | None:
    """The SEND that hands on a compute action's result, if that goes to another rank; None for all but F, B and I."""
    return Action(action.stage, _GIVES[action.kind], action.micro) if action.kind in _GIVES else None


def partner(message: Action) -> Action:
    """The other end of a message: `2SF0` and `3RF0` are partners, `2SB0` and `1RB0` too."""
    kind, step = _PARTNER[message.kind]
    return Action(message.stage + step, kind, message.micro)


def owners(lists: Lists) -> dict[int, int]:
    """Stage -> the rank whose list computes it. The lists themselves say where a stage lives: no second table can disagree."""
    return {action.stage: rank for rank, actions in enumerate(lists) for action in actions if action.kind in COMPUTE}


def channel(message: Action, owner: dict[int, int]) -> Channel:
    """The first-in first-out line that a SEND or RECV uses: (from rank, to rank, SEND_F or SEND_B).

    A transport that runs the two directions between a pair of ranks in one queue (an NCCL communicator does) can deadlock on posts
    that are free of deadlock here: give each channel its own.
    """
    send = message if message.kind in SENDS else partner(message)
    return owner[send.stage], owner[partner(send).stage], send.kind


def advance(lists: Lists, do: Callable[[int, Action], bool]) -> dict[int, Action]:
    """Let every rank go through its list: `do(rank, action)` returns False where the rank must wait for another, and is asked again later.

    Returns rank -> the action at which it waits for ever; empty when all lists came to their ends.
    """
    heads = [0] * len(lists)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(lists):
            while heads[rank] < len(actions) and do(rank, actions[heads[rank]]):
                heads[rank] += 1
                moved = True
    return {rank: actions[head] for rank, (actions, head) in enumerate(zip(lists, heads, strict=True)) if head < len(actions)}
