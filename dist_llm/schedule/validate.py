"""The proof that a lowered schedule is right before anything runs: each action once, messages paired and in order, no deadlock.

The checks are written from the meaning of the actions, not from the generators or the lowering, so that a fault there is found here.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from dist_llm.schedule.actions import (
    ALL,
    COMPUTE,
    FINISHES,
    RECVS,
    SENDS,
    Action,
    Channel,
    Kind,
    Lists,
    advance,
    channel,
    needs,
    owners,
    partner,
)
from dist_llm.schedule.lower import Reduce


class ScheduleError(AssertionError):
    """A schedule that breaks its own rules: our fault, never the user's. `action` is the offending one, `rank` its list."""

    def __init__(self, what: str, *, action: Action | None = None, rank: int | None = None) -> None:
        super().__init__(f"{what}{'' if action is None else f': {action}'}{'' if rank is None else f' on rank {rank}'}")
        self.action, self.rank = action, rank


def validate(lists: Lists, *, num_stages: int, micro_batches: int, reduce: Reduce) -> None:
    """Prove a lowered schedule of `num_stages` stages and `micro_batches` micro-batches. Raises ScheduleError at the first fault.

    Deadlock is excluded twice: with sends that return at once, and with sends that hold up their rank until the receiver has posted
    (synchronous sends). In both, RECVs return at once and messages of a channel arrive in order. A transport that holds up the receiver
    too, until a channel is connected, is not covered: the mesh uses every channel once before a schedule runs (mesh.py).
    """
    owner = _check_compute(lists, num_stages, micro_batches)
    _check_messages(lists, owner, micro_batches)
    _check_channels(lists, owner)
    _check_reductions(lists, num_stages, micro_batches, reduce)
    for synchronous in (False, True):
        _check_progress(lists, owner, synchronous)


def _check_compute(lists: Lists, num_stages: int, micro_batches: int) -> dict[int, int]:
    """Every (stage, micro-batch) has one F, then one B or one I and one W, all on one rank. Returns stage -> rank."""
    place: dict[Action, tuple[int, int]] = {}
    for rank, actions in enumerate(lists):
        for index, action in enumerate(actions):
            if action.kind not in COMPUTE:
                continue
            if not (0 <= action.stage < num_stages and 0 <= action.micro < micro_batches):
                raise ScheduleError(f"not one of {num_stages} stages x {micro_batches} micro-batches", action=action, rank=rank)
            if action in place:
                raise ScheduleError("computed twice", action=action, rank=rank)
            place[action] = (rank, index)
    owner = owners(lists)
    for action, (rank, _) in place.items():
        if owner[action.stage] != rank:
            raise ScheduleError(f"stage {action.stage} is on ranks {rank} and {owner[action.stage]}", action=action, rank=rank)
    for stage in range(num_stages):
        for micro in range(micro_batches):
            chain = [Action(stage, kind, micro) for kind in _chain(place, stage, micro)]
            for action in chain:
                if action not in place:
                    raise ScheduleError("never computed", action=action, rank=owner.get(stage))
            for before, after in zip(chain, chain[1:], strict=False):
                if place[before] > place[after]:
                    raise ScheduleError(f"runs before {before}", action=after, rank=owner[stage])
    return owner


def _chain(place: dict[Action, tuple[int, int]], stage: int, micro: int) -> list[Kind]:
    """The kinds that (stage, micro) must have, in order: a backward is whole (B) or in two parts (I, W), not both."""
    parts = [Action(stage, kind, micro) for kind in (Kind.I, Kind.W) if Action(stage, kind, micro) in place]
    if parts and Action(stage, Kind.B, micro) in place:
        raise ScheduleError("a second backward", action=parts[0], rank=place[parts[0]][0])
    return [Kind.F, Kind.I, Kind.W] if parts else [Kind.F, Kind.B]


def _check_messages(lists: Lists, owner: dict[int, int], micro_batches: int) -> None:
    """Each rank boundary has one SEND after its producer and one RECV before its consumer per micro-batch; there are no others."""
    expected = Counter(
        message
        for stage in range(len(owner) - 1)
        if owner[stage] != owner[stage + 1]
        for micro in range(micro_batches)
        for send in (Action(stage, Kind.SEND_F, micro), Action(stage + 1, Kind.SEND_B, micro))
        for message in (send, partner(send))
    )
    for rank, actions in enumerate(lists):
        done: set[Action] = set()
        posted: set[Action] = set()
        for action in actions:
            if action.kind in SENDS | RECVS:
                if not expected[action] or owner[action.stage] != rank:
                    raise ScheduleError("a message too many", action=action, rank=rank)
                expected[action] -= 1
                posted.add(action)
            if action.kind in SENDS and done.isdisjoint(_producers(action)):
                raise ScheduleError("sent before it is computed", action=action, rank=rank)
            if action.kind in COMPUTE and (recv := needs(action)) in expected and recv not in posted:
                raise ScheduleError(f"computed before {recv} is posted", action=action, rank=rank)
            done.add(action)
    for message in +expected:
        raise ScheduleError("a message is missing", action=message, rank=owner[message.stage])


def _producers(send: Action) -> set[Action]:
    kinds = (Kind.F,) if send.kind is Kind.SEND_F else (Kind.B, Kind.I)
    return {Action(send.stage, kind, send.micro) for kind in kinds}


def _check_channels(lists: Lists, owner: dict[int, int]) -> None:
    """On every channel the k-th SEND is the partner of the k-th RECV."""
    sent: dict[Channel, list[Action]] = defaultdict(list)
    received: dict[Channel, list[Action]] = defaultdict(list)
    for action in (action for actions in lists for action in actions):
        if action.kind in SENDS:
            sent[channel(action, owner)].append(action)
        elif action.kind in RECVS:
            received[channel(action, owner)].append(action)
    for line, sends in sent.items():
        for send, recv in zip(sends, received[line], strict=True):
            if partner(send) != recv:
                raise ScheduleError(f"out of order with {send} of rank {line[0]}", action=recv, rank=line[1])


def _check_reductions(lists: Lists, num_stages: int, micro_batches: int, reduce: Reduce) -> None:
    """Each stage is reduced once after its last backward ("step"), or once per micro-batch after that backward ("micro_batch")."""
    micros = [ALL] if reduce == "step" else range(micro_batches)
    expected = {Action(stage, Kind.REDUCE, micro) for stage in range(num_stages) for micro in micros}
    for rank, actions in enumerate(lists):
        finished: dict[int, set[int]] = defaultdict(set)
        for action in actions:
            if action.kind in FINISHES:
                finished[action.stage].add(action.micro)
            if action.kind is not Kind.REDUCE:
                continue
            if action not in expected:
                raise ScheduleError("a reduction too many", action=action, rank=rank)
            expected.remove(action)
            complete = len(finished[action.stage]) == micro_batches if action.micro == ALL else action.micro in finished[action.stage]
            if not complete:
                raise ScheduleError("reduced before its backward", action=action, rank=rank)
    for action in sorted(expected):
        raise ScheduleError("never reduced", action=action)


def _check_progress(lists: Lists, owner: dict[int, int], synchronous: bool) -> None:
    """Execute by rule: every rank goes on until it must wait; if all wait before their ends, they wait for ever."""
    done: set[Action] = set()

    def do(rank: int, action: Action) -> bool:
        if not _can_go(action, done, owner, synchronous):
            return False
        done.add(action)
        return True

    stuck = advance(lists, do)
    for rank, action in stuck.items():
        waits = ", ".join(f"rank {r} at {a}" for r, a in stuck.items())
        raise ScheduleError(f"deadlock with {'synchronous' if synchronous else 'free'} sends ({waits})", action=action, rank=rank)


def _can_go(action: Action, done: set[Action], owner: dict[int, int], synchronous: bool) -> bool:
    """Whether a rank whose next action is this one need not wait: posts are free, compute waits for its input."""
    if action.kind in SENDS:
        return not synchronous or partner(action) in done
    recv = needs(action)
    if recv is None or partner(recv).stage not in owner:  # no input from a neighbour: the first F, the last B, W, RECV, REDUCE
        return True
    if owner[partner(recv).stage] == owner[action.stage]:
        return not done.isdisjoint(_producers(partner(recv)))
    return partner(recv) in done
