"""Cases run on ranks: a transport whose groups connect at their first use, and groups that wait for a rank in vain."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dist_llm import comm
from dist_llm.config.layout import Layout
from dist_llm.mesh import build_mesh
from dist_llm.train import proof


def proof_where_first_use_waits(rank: int, world: int, say: Any, job: dict[str, Any], layout: dict[str, Any], folder: str) -> int:
    """`proof_rank` where the first use of a group holds up each of its ranks until all are there; how many groups this rank used."""
    used: set[int] = set()
    meet = dist.barrier

    def waiting(call: Callable) -> Callable:
        def first_waits(*words: Any, group: Any, **more: Any) -> Any:
            if id(group) not in used:
                used.add(id(group))
                meet(group=group)
            return call(*words, group=group, **more)

        return first_waits

    gathers = ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    for name in ("all_reduce", "all_to_all_single", "isend", "irecv", "send", "recv", "barrier", *gathers):
        if hasattr(dist, name):
            setattr(dist, name, waiting(getattr(dist, name)))
    proof.proof_rank(rank, world, say, job, layout, folder)
    return len(used)


def one_rank_stays_away(rank: int, world: int, say: Any, which: str) -> None:
    """Rank 1 of four does not come to its tensor-parallel group, or to its end of a channel."""
    torch.set_num_threads(1)
    mesh = build_mesh(Layout(dp=2, tp=2) if which == "tp" else Layout(dp=2, pp=2), rank)
    if rank == 0 and which == "tp":
        comm.all_reduce(torch.ones(3), mesh.tp)
    elif rank == 2 and which == "channel":
        comm.start_recv(torch.ones(3), mesh.channels[0, 2, "F"]).finish()
    time.sleep(20)
