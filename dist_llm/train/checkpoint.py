"""Checkpoints of a run: all ranks write theirs, together; any layout takes up what any other has saved.

A save has two halves. Every rank writes its files, flushes them and reads them back; then, when all of them have, rank 0 commits
the folder and deletes older ones. Either half runs in the background while training goes on: what is written is a copy in host
memory. The ranks speak to each other at step boundaries alone, on the thread that trains, so no collective ever runs beside another.
"""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from dist_llm import comm, flight
from dist_llm.config.load import config_tree
from dist_llm.config.schema import Config
from dist_llm.errors import CheckpointError, Failure, NumericError
from dist_llm.model.table import table
from dist_llm.train.durable import Disk
from dist_llm.train.folder import VERSION, Checkpoint, begin, commit, flush, open_checkpoint, retain
from dist_llm.train.nonfinite import finite
from dist_llm.train.parts import Part, Stage, Staged, part_of, write_part
from dist_llm.train.storage import together

if TYPE_CHECKING:
    from dist_llm.data.prepare import Prepared
    from dist_llm.engines.native import NativeEngine

KINDS = ("weight", "first_moment", "second_moment")
PULSE_SECONDS = 1.0  # between signs of life of a rank that waits for its disk


# --- save ----------------------------------------------------------------------------------------------------------------


class Background:
    """A function that runs in a thread; `result` waits for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self._value = work()
        except BaseException as error:  # raised where the result is asked for
            self._error = error

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def wait(self, disk: Disk) -> None:
        """Until it has ended. As long as bytes go to the disk or come back the flight record hears of it: a slow disk is no hang."""
        moved = disk.moved
        while self.running:
            self._thread.join(PULSE_SECONDS)
            if disk.moved != moved:
                moved = disk.moved
                flight.enter("save")

    def result(self) -> Any:
        """What it returned; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value


class Saver:
    """The saves of a run, at most one under way; every rank makes the same calls in the same order.

    A save that fails raises SpaceError on all ranks from the next call; former checkpoints are untouched then, and nothing of it is
    left. saved: hears of each checkpoint when it is there. A context: on leaving it waits for the save under way, except where
    ranks may have been lost.
    """

    def __init__(
        self, run: Path, engine: NativeEngine, *, config: Config, prepared: Prepared, saved: Callable[[Path], None] = lambda path: None
    ) -> None:
        self.run, self.engine, self.config, self.prepared, self.saved = run, engine, config, prepared, saved
        self.mesh = engine.mesh
        self.last: Path | None = None
        self._stage = Stage()
        self._writing: Background | None = None
        self._committing: Background | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, NumericError):  # which all ranks raise alike
            self.finish()

    def start(self, step: int) -> None:
        """Begins to save the state after `step` updates. With `save.async` off it is there on return."""
        self.finish()
        flight.enter("save")
        mesh = self.mesh
        self._step, self._disk = step, Disk(rank=mesh.rank, step=step)
        self._safe = f"the checkpoints before step {step} are untouched"

        def make_folder() -> list[str] | None:
            if mesh.rank != 0:
                return None
            save_id = secrets.token_hex(8)
            return [save_id, str(begin(self._disk, self.run, step, save_id))]

        self._save_id, folder = together(mesh, self.engine.device, make_folder, safe=self._safe)[0]
        self._partial = Path(folder)
        part = part_of(item for item in self.engine.state() if item.kind in KINDS)
        if not self.config.save.async_:
            self._writing = Background(lambda: self._write(part))
            self.finish()
            return
        copied = self._stage.copy(part)
        self._disk.reach("save.copy")
        self._writing = Background(lambda: self._write(copied))

    def poll(self) -> None:
        """At a step boundary: takes the save under way a step further when every rank is ready for it."""
        work = self._writing or self._committing
        if work is None:
            return
        with comm.booked_on("control"):
            running = comm.all_reduce(torch.tensor([int(work.running)], device=self.engine.device), self.mesh.world, op="max")
        if not int(running):
            self._advance()

    def finish(self) -> None:
        """Waits until nothing is under way."""
        flight.enter("save")
        while self._writing or self._committing:
            self._advance()

    def _advance(self) -> None:
        """From one half of a save to the next; waits for every rank."""
        mesh, device = self.mesh, self.engine.device
        writing, self._writing = self._writing, None
        committing, self._committing = self._committing, None
        for work in (writing, committing):
            if work is not None:
                work.wait(self._disk)
        try:
            if writing is not None:
                parts = together(mesh, device, writing.result, safe=self._safe)
                manifest = self._manifest({name: about for part in parts for name, about in part.items()})
                self._committing = Background(lambda: self._commit(manifest) if mesh.rank == 0 else None)
            elif committing is not None:
                self.last = Path(together(mesh, device, committing.result, safe=self._safe)[0])
                self.saved(self.last)
        except Failure:
            if mesh.rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise

    def _write(self, part: Part) -> dict[str, dict[str, Any]]:
        """Writes this rank's files, and on rank 0 the tokenizer; returns size and hash of each, as they came back from the disk."""
        disk, folder, rank = self._disk, self._partial, self.mesh.rank
        self._require_finite(part)
        written = write_part(disk, folder, rank, part)
        if rank == 0:
            beside = self.prepared.tokenizer.kept | self.prepared.beside
            written |= {name: disk.write(folder / name, [content]) for name, content in beside.items()}
        flush(disk, folder, written)
        return {name: digest.about for name, digest in written.items()}

    def _require_finite(self, part: Part) -> None:
        """Raises NumericError: what is not finite is never saved."""
        for key, values in zip(part.runs, part.tensors, strict=True):
            if not finite(values):
                kind, name, _ = key.split("/")
                what, where = f"a {kind.replace('_', ' ')} is not finite", f"rank {self.mesh.rank}, after step {self._step}, {name}"
                raise NumericError(what, where=where, expected="finite numbers", safe=self._safe)

    def _commit(self, manifest: dict[str, Any]) -> str:
        final = commit(self._disk, self._partial, manifest)
        retain(self._disk, self.run, self.config.save.keep, verified=final)
        return str(final)

    def _manifest(self, files: dict[str, Any]) -> dict[str, Any]:
        """What a reader must know beside the tensors."""
        base = {"base": self.prepared.base, "base_weights": self.prepared.base_weights}
        return {key: identity for key, identity in base.items() if identity} | {
            "version": VERSION,
            "save_id": self._save_id,
            "step": self._step,  # the number of optimizer updates made; the sample order goes on from it
            "world": self.mesh.layout.world,
            "layout": asdict(self.mesh.layout),
            "config": config_tree(self.config),
            "rows": [[row.name, row.shape] for row in table(self.config.model) if row.trained],
            "tokenizer": self.prepared.tokenizer.hash,
            "data": self.prepared.fingerprint,
            "seed": self.config.runtime.seed,
            "files": files,
        }


# --- load ----------------------------------------------------------------------------------------------------------------


def load(candidates: list[Path], engine: NativeEngine, *, accept: Callable[[Checkpoint], None]) -> tuple[Checkpoint, list[str]]:
    """Gives the engine the first sound checkpoint; returns it, and why earlier ones were passed over.

    Each rank reads what it keeps, every block is read and compared by some rank, and only then a weight changes. accept: raises
    where the checkpoint is of another run. Ends the same on every rank. Raises CheckpointError when none is sound.
    """
    refused: list[CheckpointError] = []
    for path in candidates:
        try:
            found, staged = _verified(path, engine, accept)
        except CheckpointError as error:
            refused.append(error)
            continue
        engine.load_state(staged.read, count=found.step)
        return found, [f"{error.where}: {error.what}" for error in refused]
    assert refused
    if len(refused) > 1:
        refused[0].details += [f"{error.where}: {error.what}" for error in refused[1:]]
    raise refused[0]


def _verified(path: Path, engine: NativeEngine, accept: Callable[[Checkpoint], None]) -> tuple[Checkpoint, Staged]:
    """A checkpoint of which every byte has been compared by some rank, and what this rank keeps of it."""
    mesh, device = engine.mesh, engine.device
    opened: list[Checkpoint] = []
    staged: list[Staged] = []
    together(mesh, device, lambda: opened.append(open_checkpoint(path)))
    (found,) = opened
    accept(found)

    def stage() -> dict[str, list[list[int]]]:
        fresh = set(KINDS) - {kind for kind, _ in found.parts.runs} if found.step == 0 else set()
        staged.append(Staged(found.parts, engine.wanted(), fresh=fresh))
        return {name: _spans(numbers) for name, numbers in found.parts.seen().items()}

    seen = {
        (name, number)
        for rank in together(mesh, device, stage)
        for name, spans in rank.items()
        for first, end in spans
        for number in range(first, end)
    }
    left = [place for place in found.parts.blocks() if place not in seen]  # a kind that nobody keeps, the head of a file nobody reads
    others = [name for name in found.files if not name.startswith("rank-")]

    def verify_rest() -> None:
        found.parts.verify_blocks(left[mesh.rank :: mesh.layout.world])
        found.verify(others[mesh.rank :: mesh.layout.world])

    together(mesh, device, verify_rest)
    found.parts.close()
    return found, staged[0]


def _spans(numbers: list[int]) -> list[list[int]]:
    """Rising numbers as [first, last + 1] of those that follow each other."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number:
            spans[-1][1] += 1
        else:
            spans.append([number, number + 1])
    return spans
