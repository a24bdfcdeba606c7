"""From compute actions to everything a rank does: messages between stages on different ranks, and the gradient reductions.

How the result is to be executed:
- SEND and RECV only post (isend, irecv) and return. A compute action waits for the RECV that brings its input, no other action waits.
- Messages with the same (from rank, to rank, direction) form a first-in first-out channel: SENDs and RECVs stand in the same order.
- REDUCE says that a stage's weight gradients are reduced over its replicas. The walk of the backward before it begins that, unit by
  unit; nothing waits here. It is finished before the next backward of the same stage begins, the last one before the optimizer step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from dist_llm.schedule.actions import ALL, FINISHES, Action, Channel, Kind, Lists, advance, channel, gives, needs, owners, partner

Reduce = Literal["step", "micro_batch"]


def lower(compute: Lists, *, reduce: Reduce) -> list[list[Action]]:
    """Add SEND, RECV and REDUCE to lists of compute actions, one list per rank in and out.

    reduce: "step" adds one REDUCE per stage after its last backward (text `2R`), "micro_batch" one after each backward (`2R0`).
    A boundary between two stages of one rank needs no message and gets none.

    A rank's RECV is posted before the action that it runs while the message is made, when all actions take equal time: at least one
    action ahead of its consumer, so that the transfer runs beside compute, and early enough that even a transport whose sends wait for
    the receiver cannot deadlock (by induction over time: every message finds its RECV posted). What must wait, waits at the receiver.
    """
    owner = owners(compute)
    sends = [[send for action in actions for send in _sends(action, owner)] for actions in compute]
    inbox: list[dict[Channel, list[Action]]] = [defaultdict(list) for _ in compute]
    for send in (send for queue in sends for send in queue):
        inbox[owner[partner(send).stage]][channel(send, owner)].append(send)
    starts, made = _slots(compute, owner)
    posts = [_posts(starts[rank], lines, made) for rank, lines in enumerate(inbox)]
    return [_lower_rank(actions, posts[rank], owner, reduce) for rank, actions in enumerate(compute)]


def _lower_rank(compute: Sequence[Action], posts: list[list[Action]], owner: dict[int, int], reduce: Reduce) -> list[Action]:
    """One rank's list. Between two compute actions: first the RECVs, then the SEND, then the REDUCE."""
    reductions = _reductions(compute, reduce)
    lowered = [*posts[0]] if compute else []
    for index, action in enumerate(compute):
        lowered += [action, *posts[index + 1], *_sends(action, owner), *reductions[index]]
    return lowered


def _sends(action: Action, owner: dict[int, int]) -> list[Action]:
    """The message right after `action`: one if another rank needs its result, else none."""
    send = gives(action)
    receiver = owner.get(partner(send).stage) if send else None
    return [send] if send and receiver not in (None, owner[action.stage]) else []


def _slots(compute: Lists, owner: dict[int, int]) -> tuple[list[list[int]], dict[Action, int]]:
    """A run in which every action takes one slot: the slot of each action by rank, and the slot in which each SEND's content is made."""
    starts: list[list[int]] = [[] for _ in compute]
    made: dict[Action, int] = {}

    def do(rank: int, action: Action) -> bool:
        slot = starts[rank][-1] + 1 if starts[rank] else 0
        if (recv := needs(action)) is not None and (source := partner(recv)).stage in owner:
            if source not in made:
                return False
            slot = max(slot, made[source] + 1)
        starts[rank].append(slot)
        if (send := gives(action)) is not None:
            made[send] = slot
        return True

    stuck = advance(compute, do)
    assert not stuck, f"compute actions wait for each other in a circle: {stuck}"
    return starts, made


def _posts(starts: list[int], lines: dict[Channel, list[Action]], made: dict[Action, int]) -> list[list[Action]]:
    """The RECVs that a rank posts before each compute action (none after the last), in the order of the SENDs on each channel."""
    posts: list[list[Action]] = [[] for _ in range(len(starts) + 1)]
    for sends in lines.values():
        latest = len(starts)
        for send in reversed(sends):
            latest = min(latest, max(0, bisect_right(starts, made[send]) - 1))
            posts[latest].append(partner(send))
    return [recvs[::-1] for recvs in posts]


def _reductions(compute: Sequence[Action], reduce: Reduce) -> list[list[Action]]:
    """The REDUCE after each compute action: none, or one for its stage."""
    last = {action.stage: index for index, action in enumerate(compute) if action.kind in FINISHES}
    if reduce == "step":
        return [[Action(a.stage, Kind.REDUCE, ALL)] if last.get(a.stage) == i else [] for i, a in enumerate(compute)]
    return [[Action(a.stage, Kind.REDUCE, a.micro)] if a.kind in FINISHES else [] for a in compute]
