"""`python -m benchmarks.first_step KEY [WORLD]`: one training step of a tiny model by one rival, in a fresh process.

Ours starts its WORLD ranks itself; for the others this runs under torchrun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from dist_llm.mesh import connect
from dist_llm.ranks import run_ranks


def take(rank: int, world: int, say: Callable | None, key: str) -> float:
    """Builds and takes the step."""
    from benchmarks.rivals import bring, make_rival
    from benchmarks.setting import Setting

    bring(key)
    return make_rival(key, Setting().quick(), rank, world).step(0).loss


if __name__ == "__main__":
    key, world = sys.argv[1], int((sys.argv[2:] or ["1"])[0])
    if "RANK" in os.environ:
        connect(rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]), backend="gloo", timeout_seconds=60)
        take(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None, key)
    elif world > 1:
        run_ranks(world, take, key)
    else:
        take(0, 1, None, key)
