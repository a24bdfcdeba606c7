"""`python -m benchmarks.first_step KEY [WORLD]`: one training step of a tiny model by one rival, in a fresh process.

Ours starts its WORLD ranks itself, or runs under torchrun as the others do. Everybody draws their own weights, and a rival
imports nothing of ours but two small modules.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.rivals import bring, make_rival
from benchmarks.setting import Setting


def take(rank: int, world: int, say: Callable | None, key: str) -> float:
    """Builds and takes the step."""
    bring(key)
    return make_rival(key, replace(Setting().quick(), own_weights=True), rank, world).step(0).loss


def join(key: str, rank: int, world: int) -> None:
    """Under torchrun: meets the other ranks."""
    if key.startswith("ours:"):
        from dist_llm.mesh import connect

        connect(rank=rank, world=world, backend="gloo", timeout_seconds=60)
    else:
        torch.distributed.init_process_group("gloo")


if __name__ == "__main__":
    key, world = sys.argv[1], int((sys.argv[2:] or ["1"])[0])
    if "RANK" in os.environ:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        join(key, rank, world)
        take(rank, world, None, key)
    elif world > 1:
        from dist_llm.ranks import run_ranks

        run_ranks(world, take, key)
    else:
        take(0, 1, None, key)
