"""Start-up: commands, imports and the first step of a cold process, against torchrun, DeepSpeed and transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import main
from benchmarks.harness import Against, Row
from benchmarks.rivals import Rival, Taken, rival

TITLE = "Start-up and import time"
ROOT = Path(__file__).parent.parent
IMPORTS = {
    "ours": "import dist_llm.train.run, dist_llm.engines.native",
    "torch": "import torch",
    "fsdp2": "import torch; from torch.distributed.fsdp import fully_shard",
    "deepspeed": "import deepspeed",
    "transformers": "from transformers import LlamaForCausalLM",
}
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.first_step"
COMMANDS = {
    "help-ours": "-m dist_llm --help",
    "help-torchrun": "-m torch.distributed.run --help",
    "help-deepspeed": "-m deepspeed.launcher.runner --help",
    "check-ours": "-m dist_llm check configs/quickstart.yaml --world 4",
    "first-ours": "-m benchmarks.first_step ours:dp=1",
    "first-plain": "-m benchmarks.first_step plain",
    "first-transformers": "-m benchmarks.first_step transformers",
    "first-two-ours": "-m benchmarks.first_step ours:dp=2,zero=3 2",
    "first-torchrun-ours": f"{TORCHRUN} ours:dp=2,zero=3",
    "first-two-fsdp2": f"{TORCHRUN} fsdp2:reshard",
    "first-two-deepspeed": f"{TORCHRUN} deepspeed:3",
}


@dataclass(frozen=True)
class ColdSetting:
    """A step is one command in a fresh process, from its start to its end."""

    threads: int = 1

    def quick(self) -> ColdSetting:
        """It is small already."""
        return self

    def described(self) -> dict[str, Any]:
        """As the results keep it."""
        return asdict(self)


# A process inherits the high-water mark of the one that forked it: a light one in between has next to none.
HIGH_WATER = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


class Command:
    """A command line of this Python."""

    def __init__(self, words: list[str]) -> None:
        self.words = [sys.executable, *words]
        # DeepSpeed asks the accelerator and torchrun the threads of the environment; both say so on every start otherwise.
        self.environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules of a checkout are compiled once, as those of packages are

    def step(self, step: int) -> Taken:
        """Runs it to its end; raises where it fails."""
        done = subprocess.run(self.words, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
        if done.returncode:
            raise RuntimeError(f"{' '.join(self.words)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        return Taken(0.0)

    def resident(self) -> int:
        """Runs it once more: the most resident bytes of any of its processes."""
        words = [sys.executable, "-c", HIGH_WATER, *self.words]
        return int(subprocess.run(words, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    def booked(self) -> dict[str, float]:
        """Nothing."""
        return {}


@rival("command")
def _command(setting: Any, name: str, rank: int, world: int) -> Rival:
    return Command(COMMANDS[name].split())


@rival("import")
def _import(setting: Any, name: str, rank: int, world: int) -> Rival:
    return Command(["-c", IMPORTS[name]])


def rows() -> list[Row]:
    """The rows of this question; no figure is set for them."""
    cold = ColdSetting()
    helps = (Against("command:help-torchrun", "torchrun"), Against("command:help-deepspeed", "deepspeed"))
    imports = tuple(Against(f"import:{name}", IMPORTS[name].rpartition("import ")[2]) for name in IMPORTS if name != "ours")
    bare = (Against("import:torch", "import of torch alone"),)
    one = (Against("command:first-plain", "plain loop"), Against("command:first-transformers", "transformers"))
    two = (Against("command:first-two-fsdp2", "FSDP2 under torchrun"), Against("command:first-two-deepspeed", "DeepSpeed under torchrun"))
    return [
        Row("--help", "command:help-ours", helps, cold, numbers="any"),
        Row(
            "check of a config",
            "command:check-ours",
            bare,
            cold,
            numbers="any",
            note="others check after their import of torch at the earliest",
        ),
        Row("import of the trainer", "import:ours", imports, cold, numbers="any"),
        Row("first step, one process", "command:first-ours", one, cold, numbers="any"),
        Row("first step, two ranks", "command:first-two-ours", two, cold, numbers="any", note="ours forks its ranks itself"),
        Row("first step, all under torchrun", "command:first-torchrun-ours", two, cold, numbers="any"),
    ]


if __name__ == "__main__":
    main("start-up")
