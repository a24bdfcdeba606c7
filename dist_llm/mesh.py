"""Rank and coordinates, then the process groups: all of them are made here, and only those a layout needs.

Rank order: tp fastest, then cp, dp, pp, so that the axis with the most traffic sits on neighbouring devices:
rank = ((pp * DP + dp) * CP + cp) * TP + tp.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dist_llm import staging
from dist_llm.config.layout import Layout
from dist_llm.meeting import Meeting, MeetingError, within
from dist_llm.sharding import split_parts
from dist_llm.shm import CARD, Offer, Segment

AXES = ("pp", "dp", "cp", "tp")  # slowest first
MARGIN_SECONDS = 2.0  # what torch's own timeouts are given to speak first
_keys = itertools.count()
_patience = timedelta(minutes=10)  # how long a group waits for its ranks: what `connect` was told
groups_by_key: dict[str, Group] = {}  # custom operations name their group by a string
segments: dict[Any, Segment | None] = {}  # by process group: the memory that its ranks share, None where they do not


@dataclass(frozen=True)
class Group:
    """The ranks that take part in a collective, as this rank sees them. `axis` is what its bytes are booked on."""

    axis: str
    ranks: tuple[int, ...]
    index: int  # this rank's place in `ranks`
    handle: Any = field(repr=False, compare=False, default=None)  # None when the group has one rank
    title: str = field(compare=False, default="")  # the same text on every rank of the group
    key: str = field(compare=False, default="")

    def __post_init__(self) -> None:
        title = self.title or f"{self.axis} of ranks {_ranges(self.ranks)}"
        object.__setattr__(self, "title", title)
        object.__setattr__(self, "key", f"{self.axis}#{next(_keys)}")
        groups_by_key[self.key] = self

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


def _ranges(ranks: tuple[int, ...]) -> str:
    """`0,1`; many ranks as `0,4..124` (first, second, last)."""
    return ",".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]},{ranks[1]}..{ranks[-1]}"


@dataclass(frozen=True)
class Coordinate:
    """A rank's place on each axis of the mesh."""

    pp: int
    dp: int
    cp: int
    tp: int


def coordinate(rank: int, layout: Layout) -> Coordinate:
    """The coordinates of a rank."""
    rest, place = rank, {}
    for axis in reversed(AXES):
        rest, place[axis] = divmod(rest, getattr(layout, axis))
    assert rest == 0, (rank, layout)
    return Coordinate(**place)


def rank_of(place: Coordinate, layout: Layout) -> int:
    """The rank at the given coordinates."""
    rank = 0
    for axis in AXES:
        rank = rank * getattr(layout, axis) + getattr(place, axis)
    return rank


@dataclass(frozen=True)
class Mesh:
    """This rank's coordinates and groups.

    tp, pp: the lines through this rank along one axis. data: the ranks with the same parameters (dp x cp), over which
    gradients are summed. shard: the neighbours in `data` that split what ZeRO splits; replica: the ranks of `data` with
    the same part of it, one from each such group (arXiv:2304.11277, hybrid sharding). tied: first and last pipeline
    stage, where they share a weight. kv: the tp ranks that hold the same key and value heads. world: everyone.
    channels: (source rank, destination rank, "F" or "B") -> group.
    """

    layout: Layout
    rank: int
    at: Coordinate
    tp: Group
    pp: Group
    data: Group
    shard: Group
    replica: Group
    tied: Group
    kv: Group
    world: Group
    channels: dict[tuple[int, int, str], Group]


def build_mesh(layout: Layout, rank: int, *, tied: bool = False, kv_heads: int | None = None, shared_memory: bool = True) -> Mesh:
    """Makes the groups of a layout; every rank of the job calls this with the same layout.

    The process group is connected already (`connect`) if the world has more than one rank. Returns with every group in use.
    shared_memory: groups on gloo whose ranks can share memory do (shm.py).
    """
    tp, cp, dp, pp = layout.tp, layout.cp, layout.dp, layout.pp

    def line(**moving: range) -> list[tuple[int, ...]]:
        """All groups in which the named axes move and the others stand still."""
        fixed = [axis for axis in AXES if axis not in moving]
        found = []
        for still in itertools.product(*(range(getattr(layout, axis)) for axis in fixed)):
            here = dict(zip(fixed, still, strict=True))
            moves = itertools.product(*moving.values())
            found.append(tuple(rank_of(Coordinate(**here, **dict(zip(moving, m, strict=True))), layout) for m in moves))
        return found

    make = _GroupMaker(layout.world, rank)
    data, size = line(dp=range(dp), cp=range(cp)), layout.shard
    assert dp * cp % size == 0, layout
    parts = min(kv_heads or tp, tp)
    shared = [[r for r, cut in enumerate(split_parts(parts, tp)) if cut == kept] for kept in sorted(set(split_parts(parts, tp)))]
    mesh = Mesh(
        layout=layout,
        rank=rank,
        at=coordinate(rank, layout),
        world=make.one_of("control", [tuple(range(layout.world))]),
        tp=make.one_of("tp", line(tp=range(tp))),
        pp=make.one_of("pp", line(pp=range(pp))),
        data=make.one_of("dp", data),
        shard=make.one_of("dp", [ranks[at : at + size] for ranks in data for at in range(0, len(ranks), size)]),
        replica=make.one_of("dp", [ranks[at::size] for ranks in data for at in range(size)]),
        tied=make.one_of("pp", line(pp=range(0, pp, pp - 1)) if tied and pp > 1 else []),
        kv=make.one_of("tp", [tuple(group[i] for i in held) for group in line(tp=range(tp)) for held in shared]),
        channels=make.channels(line(pp=range(pp)) if pp > 1 else [], looped=layout.chunks > 1),
    )
    make.open(mesh.channels, shared_memory=shared_memory)
    return mesh


def whole_world(rank: int, world: int) -> Group:
    """All ranks of the job, before there is a mesh."""
    return Group("control", tuple(range(world)), rank, dist.group.WORLD if world > 1 else None)


class _GroupMaker:
    """Makes process groups in the same order on every rank, one for each distinct set of ranks and use."""

    def __init__(self, world: int, rank: int) -> None:
        self.world, self.rank = world, rank
        self.handles: dict[tuple[int, ...], Any] = {}

    def one_of(self, axis: str, groups: list[tuple[int, ...]]) -> Group:
        """The one of `groups` (disjoint sets of ranks) that this rank is in; a rank in none is a group of its own."""
        for ranks in groups:
            if len(ranks) > 1 and ranks not in self.handles:
                whole = ranks == tuple(range(self.world))
                self.handles[ranks] = dist.group.WORLD if whole else dist.new_group(list(ranks), timeout=_patience)
        mine = next((ranks for ranks in groups if self.rank in ranks), (self.rank,))
        return Group(axis, mine, mine.index(self.rank), self.handles.get(mine))

    def channels(self, lines: list[tuple[int, ...]], *, looped: bool) -> dict[tuple[int, int, str], Group]:
        """A group of its own for each direction between neighbouring stages, the ring closed for looped schedules.

        Point-to-point operations of one NCCL group run in issue order, so that a send forward could block a send
        backward; with a channel each, order matters only inside a channel.
        """
        found = {}
        for ranks in lines:
            for source, target in zip(ranks, (*ranks[1:], *(ranks[:1] if looped else ())), strict=looped):
                for pair in ((source, target, "F"), (target, source, "B")):
                    handle = dist.new_group([source, target], timeout=_patience)
                    if self.rank in pair[:2]:
                        ends = tuple(sorted(pair[:2]))
                        found[pair] = Group("pp", ends, ends.index(self.rank), handle, f"pp {pair[2]} from rank {pair[0]} to {pair[1]}")
        return found

    def open(self, channels: dict[tuple[int, int, str], Group], *, shared_memory: bool) -> None:
        """Uses each group and channel of this rank once, in the order in which all ranks have made them; booked nowhere.

        NCCL connects the ranks of a group at its first use, and that holds up each of them until all are there. In a step it
        would be a deadlock: a rank posts what it will receive while the sender waits for it elsewhere. So it happens here.
        Gloo has connected them; here its ranks find out whether they can share memory.
        """
        mine = {handle: ranks for ranks, handle in self.handles.items() if self.rank in ranks}
        if not mine:
            return
        if dist.get_backend() == "gloo":
            for handle, ranks in (mine | {channel.handle: channel.ranks for channel in channels.values()}).items():
                if not shared_memory:
                    _forget(handle)
                elif segments.get(handle) is None:
                    segments[handle] = _share(handle, ranks.index(self.rank), len(ranks))
            return
        token = torch.zeros(1, device="cuda")
        for handle in mine:
            dist.all_reduce(token, group=handle)
        for (source, target, _), channel in channels.items():
            if self.rank == source:
                dist.send(token, dst=target, group=channel.handle)
            else:
                dist.recv(token, src=source, group=channel.handle)


def _share(handle: Any, index: int, size: int) -> Segment | None:
    """The memory that the ranks of a group share; None on all of them where one of them cannot."""
    offer = Offer(index, size)
    cards = [torch.zeros(CARD, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(cards, torch.tensor(offer.card), group=handle)
    segment = offer.join([card.tolist() for card in cards], patience=_patience.total_seconds())
    agreed = torch.tensor(int(segment is not None))
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=handle)
    offer.close()
    if segment is not None and not agreed:
        segment.close()
    return segment if agreed else None


def _forget(handle: Any) -> None:
    """Its ranks share no memory from now on; nothing may be under way."""
    segment = segments.pop(handle, None)
    if segment is not None:
        segment.close()


def connect(*, rank: int, world: int, backend: str, timeout_seconds: float, store_path: str = "", meeting: Meeting | None = None) -> None:
    """Joins the job: through a file store on one machine, or at a meeting point.

    timeout_seconds: how long a rank waits for the others, here and in every group that is made later. Raises MeetingError that names the
    place and the ranks that did not come.
    """
    global _patience
    _patience, deadline = timedelta(seconds=timeout_seconds), time.monotonic() + timeout_seconds
    store: Any = None
    away: list[int] = []

    def left() -> timedelta:
        """The rest of the time, for the next thing that is waited for."""
        return timedelta(seconds=max(deadline - time.monotonic(), 0.5))

    def meet() -> None:
        nonlocal store, away
        if meeting is None:
            store = dist.FileStore(store_path, world)
        else:
            serves = rank == 0 and not meeting.served
            tcp = dist.TCPStore(meeting.host, meeting.port, world, is_master=serves, timeout=_patience, wait_for_workers=False)
            store = dist.PrefixStore(f"attempt {meeting.attempt}", tcp)
        try:
            store.set_timeout(left())
            store.set(f"here/{rank}", "yes")
            store.wait([f"here/{other}" for other in range(world)])
            store.set_timeout(_patience)
            dist.init_process_group(backend, timeout=_patience, store=dist.PrefixStore("groups", store), rank=rank, world_size=world)
            store.set(f"met/{rank}", "yes")  # who is done and leaves would break a connection that another rank still makes
            store.wait([f"met/{other}" for other in range(world)], left())
        except RuntimeError:
            away = _missing(store, world)
            raise

    try:
        within(timeout_seconds + MARGIN_SECONDS, meet)
    except (RuntimeError, ValueError, TimeoutError) as error:
        raise MeetingError(
            "the ranks could not meet",
            teller=min(set(range(world)) - set(away)) if away else None,
            where=f"rank {rank} of {world}, backend {backend}" + (f", at {meeting}" if meeting else ""),
            expected=f"{world} ranks within {timeout_seconds:g} s",
            found=_reason(error, away, meeting if store is None else None),
            next="dist-llm doctor",
        ) from error


def _missing(store: Any, world: int) -> list[int]:
    """Which ranks have not come to the store; none where it does not say."""
    try:
        return [rank for rank in range(world) if not store.check([f"here/{rank}"])]
    except RuntimeError:  # it has gone
        return []


def _reason(error: Exception, away: list[int], unreached: Meeting | None) -> str:
    """Why the ranks did not meet. unreached: where the store should have been."""
    if away:
        return f"rank{'' if len(away) == 1 else 's'} {', '.join(map(str, away[:16]))} did not come"
    if unreached is not None and "EADDRINUSE" not in str(error):
        return unreached.answer()
    return "a rank that had come no longer answers" if isinstance(error, TimeoutError) else str(error).splitlines()[0]


def disconnect() -> None:
    """Leaves the job."""
    groups_by_key.clear()
    for handle in list(segments):
        _forget(handle)
    staging.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def default_backend(device_type: str) -> str:
    """The backend for a type of device: NCCL for "cuda" where this torch has it, gloo elsewhere."""
    return "nccl" if device_type == "cuda" and dist.is_nccl_available() else "gloo"
