"""What ranks do in tests of shared memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dist_llm import comm, flight, mesh, shm
from dist_llm.config.layout import Layout
from dist_llm.mesh import build_mesh, segments
from dist_llm.train.memory import LiveMemory

Say = Callable[..., None]


def lost_or_late(rank: int, world: int, say: Say, kind: str) -> None:
    """Rank 1 ends, or sleeps, while rank 0 waits for it."""
    group = build_mesh(Layout(dp=world), rank).data
    assert segments.get(group.handle) is not None
    flight.begin_step(1)
    comm.all_reduce(torch.ones(4), group)
    if rank == 1:
        if kind == "lost":
            os._exit(3)
        time.sleep(30.0)
    comm.all_reduce(torch.ones(4), group)


def unequal(rank: int, world: int, say: Say) -> None:
    """Rank 1 brings a tensor of more slots than rank 0."""
    group = build_mesh(Layout(dp=world), rank).data
    flight.begin_step(1)
    comm.all_reduce(torch.ones(4 if rank == 0 else 4 * shm.SLOT), group)
    time.sleep(20.0)


def without(rank: int, world: int, say: Say, kind: str) -> list[Any]:
    """Whether a segment is there, and a sum."""
    if kind == "one cannot" and rank == 1:
        shm._machine = lambda: 12345
    if kind == "off again":  # another mesh of the same job had it
        assert segments[build_mesh(Layout(dp=world), rank).data.handle] is not None
    group = build_mesh(Layout(dp=world), rank, shared_memory=kind == "one cannot").data
    return [segments.get(group.handle) is not None, comm.all_reduce(torch.ones(1), group).item()]


def every_group(rank: int, world: int, say: Say) -> None:
    """A mesh of two axes: no segment serves two groups; booked bytes, and those of the segments."""
    built = build_mesh(Layout(tp=2, pp=world // 2) if world > 2 else Layout(pp=2), rank)
    groups = [built.tp, built.pp, built.world, *built.channels.values()]
    handles = {group.handle for group in groups if group.size > 1}
    found = [segments[handle] for handle in handles]
    assert all(found) and len({segment.base for segment in found if segment}) == len(handles)
    before = sum(segment.sent for segment in found if segment)
    comm.ledger.take()
    for group in (built.tp, built.pp, built.world):
        x = torch.arange(1200.0)
        assert torch.equal(comm.all_reduce(x, group), torch.arange(1200.0) * group.size)
        comm.all_gather(x, group)
        comm.reduce_scatter(x, group)
    for (source, target, _), channel in built.channels.items():
        if rank == source:
            comm.start_send(torch.ones(7), channel).finish()
        elif rank == target:
            assert comm.start_recv(torch.empty(7), channel).finish().sum() == 7
    booked = sum(comm.ledger.take().values())
    assert booked == sum(segment.sent for segment in found if segment) - before > 0
    comm.barrier(built.world)
    held = [segment for segment in found if segment]
    mesh.disconnect()
    assert not segments and not dist.is_initialized()
    for segment in held:
        assert segment.lane.thread is None or not segment.lane.thread.join(5.0) and not segment.lane.thread.is_alive()


def counted(rank: int, world: int, say: Say) -> None:
    """Live bytes around collectives: the tensors that are given, and no others."""
    group = build_mesh(Layout(dp=world), rank).data
    with LiveMemory() as live:
        x = torch.ones(1 << 20)
        comm.all_reduce(x, group)
        assert live.peak == x.nbytes
        out = torch.empty(1 << 19)
        comm.start_reduce_scatter(x, group, out=out).finish()
        assert live.peak == x.nbytes + out.nbytes and x[0] == 2 and out[0] == 4
