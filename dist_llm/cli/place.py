"""Where torchrun has put this process, if it started us."""

from __future__ import annotations

import os
from dataclasses import dataclass

from dist_llm.errors import UsageError
from dist_llm.meeting import Meeting

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """This process among torchrun's. restarts: how often torchrun starts the ranks anew at most."""

    rank: int
    world: int
    local_rank: int
    meeting: Meeting
    restarts: int = 0


def torchrun_place() -> Place | None:
    """Where torchrun has put this process; None when it did not start us. Raises UsageError where its variables make no sense."""
    if not all(name in os.environ for name in TORCHRUN):
        return None
    host = os.environ["MASTER_ADDR"]
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        rank, world, local_rank, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        attempt, restarts = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    except ValueError as error:
        raise UsageError("torchrun's variables are no numbers", where=", ".join(TORCHRUN), found=str(error)) from None
    if not (0 <= rank < world and local_rank >= 0 and 0 < port < 1 << 16):
        found = f"RANK={rank} WORLD_SIZE={world} LOCAL_RANK={local_rank} MASTER_PORT={port}"
        raise UsageError("torchrun's variables contradict each other", expected="0 <= RANK < WORLD_SIZE, a port", found=found)
    return Place(rank, world, local_rank, Meeting(host, port, served, attempt), restarts)
