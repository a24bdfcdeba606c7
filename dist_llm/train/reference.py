"""What answers were worth to the weights that a run begins with: the log probability of each side of its pairs, RUN/reference.bin.

The reference of a preference never changes, so that its numbers are a function of those weights and of the data. The run's own engine
works them out before the first step, under its layout and stage of ZeRO, forward alone; no second model is ever in memory, and a step
costs what one of fine-tuning does. Kept are 16 bytes a pair, on the disk and in each rank. A resumed run reads the same numbers; where
the file is lost, or more steps ask for more pairs, the run's base gives them again before the checkpoint is taken up.

    {"version", "key", "dtype", "shapes", "sha256"}, a line; then the tables one after the other, float64, NaN where nobody asked
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_llm import flight
from dist_llm.config.load import config_tree
from dist_llm.config.schema import Config
from dist_llm.data.batches import PADDING, MicroBatch, training_batches, validation_batches
from dist_llm.data.pairs import PairBatches
from dist_llm.data.prepare import Prepared
from dist_llm.data.sealed import checked, read_small, spell, sync_folder, with_checksum, write_durably
from dist_llm.errors import NumericError
from dist_llm.model.transformer import Context
from dist_llm.train.storage import together
from dist_llm.train.trainer import Trainer

FILE = "reference.bin"
VERSION = 1
LARGEST = 4 << 30  # bytes of the file

Tell = Callable[[dict[str, Any]], None]


def find(run: Path, config: Config, prepared: Prepared, *, dtype: torch.dtype | None) -> bool:
    """Gives the stores of pairs what RUN/reference.bin knows of them; returns whether it was there, sound, and of this run's beginning.

    dtype: in which it must have been worked out; None: in any.
    """
    try:
        raw = read_small(run / FILE, most=LARGEST)
    except OSError:
        return False
    line, _, content = (raw or b"").partition(b"\n")
    head, stores = checked(line), _stores(prepared)
    if head is None or (head["version"], head["key"], head["shapes"]) != (VERSION, _key(config, prepared), _shapes(stores)):
        return False
    if (dtype is not None and head["dtype"] != str(dtype)) or hashlib.sha256(content).hexdigest() != head["sha256"]:
        return False
    numbers, at = np.frombuffer(content, "<f8"), 0
    for store, (pairs, _) in zip(stores, _shapes(stores), strict=True):
        store.reference = numbers[at : at + 2 * pairs].reshape(pairs, 2).copy()
        at += 2 * pairs
    return True


def work_out(trainer: Trainer, wanted: Sequence[tuple[PairBatches, list[int]]], *, tell: Tell = lambda message: None) -> None:
    """Gives the stores the log probabilities of the sides of these samples that are not known yet; every rank calls it.

    The engine must hold the weights that the run begins with. Raises NumericError where they are not finite.
    """
    flight.enter("reference")
    size = trainer.config.batch.global_
    lacking = [(order, [number for number in samples if np.isnan(order.reference(number)).any()]) for order, samples in wanted]
    groups = [(order, numbers[at : at + size]) for order, numbers in lacking for at in range(0, len(numbers), size)]
    for done, (order, numbers) in enumerate(groups):
        tell({"progress": ["log probabilities of the reference", done / len(groups)]})
        _group(trainer, order, numbers)


def asked(config: Config, prepared: Prepared) -> list[tuple[PairBatches, list[int]]]:
    """The samples that a run's steps and validations look at, of each of its orders."""
    size, steps = config.batch.global_, config.schedule.steps
    train = training_batches(prepared, config.data, global_batch=size, seed=config.runtime.seed)
    held_out = validation_batches(prepared, config.data, global_batch=size)
    found = [(train, steps), *([(held_out, min(config.track.validate_batches, held_out.num_batches))] if held_out else [])]
    return [(order, samples_of(order, count)) for order, count in found if isinstance(order, PairBatches)]


def samples_of(order: PairBatches, steps: int) -> list[int]:
    """The samples of the first steps; all of them where the steps are enough to see each."""
    if steps * order.global_batch >= order.num_samples:
        return list(range(order.num_samples))
    return sorted({int(number) for step in range(steps) for number in order.sample_ids(step)} - {PADDING})


def is_complete(wanted: Sequence[tuple[PairBatches, list[int]]]) -> bool:
    """Whether the log probabilities of all these samples are known."""
    return not any(np.isnan(order.reference(number)).any() for order, samples in wanted for number in samples)


def keep(run: Path, trainer: Trainer, prepared: Prepared) -> None:
    """Writes RUN/reference.bin, on rank 0; every rank calls it. Raises SpaceError."""

    def write() -> None:
        if trainer.mesh.rank != 0:
            return
        stores = _stores(prepared)
        tables = [np.full(_shapes([store])[0], np.nan) if store.reference is None else store.reference for store in stores]
        content = b"".join(table.astype("<f8").tobytes() for table in tables)
        head = {"version": VERSION, "key": _key(trainer.config, prepared), "dtype": str(trainer.engine.dtype)}
        head |= {"shapes": _shapes(stores), "sha256": hashlib.sha256(content).hexdigest()}
        fresh = run / f".{FILE}.new"
        fresh.unlink(missing_ok=True)
        write_durably(fresh, with_checksum(head) + b"\n" + content)
        fresh.replace(run / FILE)
        sync_folder(run)

    together(trainer.mesh, trainer.engine.device, write)


def _stores(prepared: Prepared) -> list[Any]:
    return [*prepared.train, *prepared.validation]


def _shapes(stores: Sequence[Any]) -> list[list[int]]:
    """[pairs, 2] of each store."""
    return [[store.manifest.documents // 2, 2] for store in stores]


def _key(config: Config, prepared: Prepared) -> str:
    """What the numbers depend on: the weights at the beginning, the pairs, and how they are cut."""
    tree = config_tree(config)
    begun = prepared.base or ["initial weights", config.runtime.seed]
    cut = [tree["data"]["sequence"], tree["data"]["chat"]["too_long"]]
    return hashlib.sha256(spell([begun, prepared.fingerprint, cut, tree["model"]])).hexdigest()


def _group(trainer: Trainer, order: PairBatches, numbers: list[int]) -> None:
    """Works out the sides of at most a global batch of samples."""
    size, place = trainer.config.batch.global_, trainer.mesh.at
    ids = np.array(numbers + [PADDING] * (size - len(numbers)))
    sides = np.cumsum([0, *(2 * len(order.pairs(number)) for number in ids.tolist())])  # the first of each row, and their number
    batches = order.cut(ids, dp_rank=place.dp, dp_size=trainer.mesh.layout.dp, micro=trainer.config.batch.micro)
    logps = trainer.engine.figures(_Asking(trainer, batches, sides)).numpy()
    if not np.isfinite(logps).all():
        what, found = "the reference gives log probabilities that are not finite", f"{int((~np.isfinite(logps)).sum())} of {logps.size}"
        raise NumericError(what, where="before the first step", expected="finite numbers", found=found)
    for row, number in enumerate(numbers):
        order.note(number, logps[sides[row] : sides[row + 1]].reshape(-1, 2))


class _Asking(Sequence[Context]):
    """Contexts that ask for the log probability of each side, numbered over the global batch; each is made when it is asked for."""

    def __init__(self, trainer: Trainer, batches: Sequence[MicroBatch], sides: np.ndarray) -> None:
        self.trainer, self.batches, self.sides = trainer, batches, sides

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, at: Any) -> Any:
        batch = replace(self.batches[at], reference=None)
        context = self.trainer.context(batch, step=0, training=False)
        pairs, total, before = context.pairs, int(self.sides[-1]), int(self.sides[int(batch.rows[0])])
        assert pairs is not None
        sides = torch.where(pairs.sides == pairs.number, total, pairs.sides + before)
        return replace(context, pairs=replace(pairs, sides=sides, number=total))
