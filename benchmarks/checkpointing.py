"""Contestants of the checkpoint question: one state, after one step of training, saved and taken up again. Each on the same disk."""

from __future__ import annotations

import shutil
import threading
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.reading import FOLDER
from benchmarks.rivals import Ours, Rival, Taken, rival
from benchmarks.setting import Setting
from dist_llm.config.schema import changed
from dist_llm.data.tokenizer import bytes_tokenizer
from dist_llm.train.checkpoint import KINDS, Saver, load

LAYOUTS = {1: "dp=1", 2: "dp=2,zero=1"}
DCP = "torch.distributed.checkpoint"


class Trained:
    """Our engine after one step, and a folder on the disk that all ranks share and nobody else does."""

    def __init__(self, setting: Setting, name: str, rank: int, world: int) -> None:
        ours = Ours(setting, LAYOUTS[world], rank)
        ours.step(0)
        self.engine, self.config, self.rank, self.world = ours.engine, ours.trainer.config, rank, world
        self.folder = FOLDER / f"checkpoints-{name}-{world}"
        if rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        self.meet()

    def meet(self) -> None:
        """Waits for the other ranks."""
        if self.world > 1:
            torch.distributed.barrier()

    def state(self) -> dict[str, Tensor]:
        """What this rank answers for, by names of its own, as the engine has it."""
        items = (item for item in self.engine.state() if item.kind in KINDS)
        return {f"{item.kind}/{item.piece.slot.name}/{self.rank}/{item.piece.start}": item.values for item in items}

    def checked(self) -> Taken:
        """The sum of the state's absolute values, over the ranks: what all must agree on."""
        return Taken(sum(float(values.abs().sum(dtype=torch.float64)) for values in self.state().values()))

    def saver(self, *, background: bool) -> Saver:
        """Our saver, that keeps one checkpoint."""
        prepared: Any = SimpleNamespace(tokenizer=bytes_tokenizer(), fingerprint="0" * 64, base=None, base_weights=None, beside={})
        config = changed(self.config, {"save.async": background, "save.keep": 1})
        return Saver(self.folder, self.engine, config=config, prepared=prepared)

    def booked(self) -> dict[str, float]:
        """Nothing."""
        return {}


class Save(Trained):
    """Our save while training waits: written, flushed, read back, committed, the older one deleted."""

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.made = self.saver(background=False)

    def step(self, step: int) -> Taken:
        """One save."""
        self.made.start(step)
        return self.checked() if step == 0 else Taken(0.0)


class SaveBehind(Trained):
    """Our save in the background of one process: the time is what training waits for. It ends before the next turn."""

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.made, self.rest = self.saver(background=True), threading.Thread()
        self.rest.start()

    def step(self, step: int) -> Taken:
        """The start of a save."""
        self.ready()
        self.made.start(step)
        self.rest = threading.Thread(target=self.finish)
        self.rest.start()
        return Taken(0.0)

    def ready(self) -> None:
        """Waits for the save before."""
        self.rest.join()

    def finish(self) -> None:
        """Polls, as steps do, until the save is committed."""
        before = self.made.last
        while self.made.last == before:
            self.made.poll()
            time.sleep(0.01)


class Load(Trained):
    """Our resume: every byte is compared with its hash before a weight changes."""

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        self.saver(background=False).start(1)
        self.path = self.folder / "checkpoints/step-00000001"

    def step(self, step: int) -> Taken:
        """One resume, from what the system remembers of the files."""
        load([self.path], self.engine, accept=lambda found: None)
        return self.checked()


class DcpSave(Trained):
    """torch.distributed.checkpoint: written and flushed, without hashes."""

    def step(self, step: int) -> Taken:
        """One save, and the deletion of the older one."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state(), checkpoint_id=self.folder / str(step), no_dist=self.world == 1)
        if self.rank == 0:
            shutil.rmtree(self.folder / str(step - 1), ignore_errors=True)
        return self.checked() if step == 0 else Taken(0.0)


class DcpLoad(Trained):
    """torch.distributed.checkpoint: read into the engine's tensors, without a check."""

    def __init__(self, *place: Any) -> None:
        super().__init__(*place)
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state(), checkpoint_id=self.folder / "1", no_dist=self.world == 1)
        self.path = self.folder / "1"

    def step(self, step: int) -> Taken:
        """One load."""
        import torch.distributed.checkpoint as dcp

        state = self.state()
        dcp.load(state, checkpoint_id=self.path, no_dist=self.world == 1)
        return self.checked()


@rival("save-ours")
def _save(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return Save(setting, "ours", rank, world)


@rival("save-behind")
def _save_behind(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return SaveBehind(setting, "behind", rank, world)


@rival("save-dcp", DCP)
def _save_dcp(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return DcpSave(setting, "dcp", rank, world)


@rival("load-ours")
def _load(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return Load(setting, "load", rank, world)


@rival("load-dcp", DCP)
def _load_dcp(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return DcpLoad(setting, "load-dcp", rank, world)
