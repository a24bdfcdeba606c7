"""The run around the steps: metrics, validation, samples and checkpoints are visible lines of `fit`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_llm import flight
from dist_llm.data.prepare import Prepared
from dist_llm.train import spike
from dist_llm.train.checkpoint import Saver
from dist_llm.train.digest import Digests
from dist_llm.train.evaluate import Validation
from dist_llm.train.metrics import Lines, Meter
from dist_llm.train.profile import Profile
from dist_llm.train.questions import Questions
from dist_llm.train.sample import Samples
from dist_llm.train.trainer import Trainer

Tell = Callable[[dict[str, Any]], None]


def fit(
    trainer: Trainer, prepared: Prepared, *, folder: Path, start: int, tell: Tell, profile: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Trains from step `start` (updates already made) to `schedule.steps`; every rank calls it, rank 0 writes and tells.

    profile: the first and the last step to be profiled (train/profile.py).
    tell: gets {"step": metrics}, {"sample": ...}, {"checkpoint": path}, {"note": ...}. Returns the step it began after, the last step's
    metrics, the last checkpoint, and the step after which it was told to stop, if it was.
    """
    config, engine, writes = trainer.config, trainer.engine, trainer.mesh.rank == 0
    steps, save, track = config.schedule.steps, config.save, config.track
    meter = Meter(trainer, start=start, steps=steps)
    profiled = Profile(profile, folder=folder / "logs", rank=trainer.mesh.rank, device=engine.device)
    validation = Validation(trainer, prepared)
    samples = Samples(engine, config, prepared, folder)
    questions = Questions(engine, config, prepared, folder)
    digests, spikes = Digests(engine, every=config.runtime.digest_every), spike.Spikes()
    metrics = Lines(folder / "metrics.jsonl", start=start, writes=writes)
    texts = Lines(folder / "samples.jsonl", start=start, writes=writes)

    def take_samples(step: int) -> None:
        for sample in samples.take():
            texts.write({"step": step, **sample})
            tell({"sample": {"step": step, **sample}})

    def watch_loss(record: dict[str, Any]) -> None:
        if record.get("skipped"):
            tell({"note": f"step {record['step']} was not finite and changed nothing (optimizer.skip_non_finite)"})
        elif (usual := spikes.usual(record["loss"], record["step"])) is not None:
            tell({"note": spike.sentence(record["step"], record["loss"], usual, spike.examine(trainer, record["step"] - 1))})

    def examine(step: int) -> dict[str, Any]:
        """What the held-out split says: its loss, and answers to questions where the run has such."""
        measured: dict[str, Any] = validation.measure()
        if (answers := questions.ask()) is not None:
            measured["answers"] = answers
            tell({"answers": {"step": step, "marks": answers}})
        return measured

    record: dict[str, Any] = {}
    done = start
    if config.base is not None and start == 0:  # what fine-tuning begins with
        before = {"step": 0, **examine(0)}
        metrics.write(before)
        tell({"before": before})
    if track.sample_every and start == 0:
        take_samples(0)
    with Saver(folder, engine, config=config, prepared=prepared, saved=lambda path: tell({"checkpoint": str(path)})) as saver:
        for done in range(start + 1, steps + 1):
            flight.begin_step(done)
            digests.check(done)
            with meter.measure(done - 1), profiled.step(done):
                taken = trainer.step(done - 1)
            record = meter.record(taken)
            last, saves = done == steps or trainer.stopping, _due(done, save.every)
            if done == steps:
                record |= examine(done)
            elif _due(done, track.validate_every):
                record |= validation.measure()
            metrics.write(record)
            tell({"step": record})
            watch_loss(record)
            saver.poll()
            if track.sample_every and (done == steps or _due(done, track.sample_every)):
                take_samples(done)
            if last or saves or digests.due(done):
                digests.compare(done)
            if last or saves:
                saver.start(done)
            if trainer.stopping:
                break
    metrics.close()
    texts.close()
    flight.enter("end")
    stopped = done if trainer.stopping and done < steps else None
    return {"start": start, "last": record, "checkpoint": saver.last and str(saver.last), "stopped": stopped}


def _due(done: int, every: int) -> bool:
    """Whether something done every so many steps is due after step `done`; 0: only at the end."""
    return bool(every) and done % every == 0
