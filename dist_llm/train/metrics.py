"""What is kept of every step: one JSON object a line in RUN/metrics.jsonl, and samples in RUN/samples.jsonl.

step                 optimizer updates made, so the first line is step 1
loss, loss_hex       mean training loss in nats per target token (of a preference per pair), and the same number to the bit (float.hex)
reward_chosen, reward_rejected, reward_margin   of a preference's pairs: means of beta times what the answers have gained
accuracy             part of the pairs whose chosen answer has gained more, half of a tie
logp_chosen, logp_rejected   mean log probabilities of the answers
grad_norm            global, before clipping            learning_rate   of this update
tokens               trained on since the run began     target_tokens   of this step's global batch
step_seconds         of this step                       tokens_per_second   of all ranks; null where memory was watched
mfu, mfu_causal      part of the devices' peak, attention counted in full or causally; null where the peak is not known
peak_memory_bytes    of rank 0: on CUDA so far; on CPU the live tensors of the second step, watched once, which slows it down
sent_bytes           by rank 0 in this step, per axis   data_wait_seconds   for this step's batch
skipped              true where the numbers were not finite and the step changed nothing (loss and grad_norm are null)
validation_loss, validation_perplexity, validation_bits_per_byte   in steps that end in a validation; of a preference its loss, with
                      validation_reward_margin, validation_accuracy and the rest of the figures above
answers              where questions were asked: by task, `right`, `count`, `share` and its 95 % interval `low`, `high`

A run from a base begins with a line of step 0, which has the last four alone: what the base says of the held-out split.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from dist_llm import comm
from dist_llm.config.schema import Config
from dist_llm.model.cost import step_flops_per_token
from dist_llm.train.hardware import mfu, peak_flops
from dist_llm.train.memory import LiveMemory
from dist_llm.train.storage import storing
from dist_llm.train.trainer import Step, Trainer


class Lines:
    """A JSON-lines file that is written line by line; one that stays empty on other ranks than 0.

    Lines after step `start` are set aside first: a resumed run makes those steps again.
    """

    def __init__(self, path: Path, *, start: int, writes: bool) -> None:
        self.file: TextIO | None = None
        if writes:
            with storing(path):
                keep_until(path, start)
                self.file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line."""
        if self.file is not None:
            with storing(self.file.name):
                self.file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()


def keep_until(path: Path, step: int) -> None:
    """Takes what comes after `step` out of a JSON-lines file, and a line that was cut; no file, no change.

    What is taken out is appended to a file beside it: `metrics.set-aside.jsonl` of `metrics.jsonl`.
    """
    if not path.is_file():
        return
    kept: list[str] = []
    aside: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            (kept if record.get("step", 0) <= step and step else aside).append(line + "\n")
    if aside:
        with path.with_name(f"{path.stem}.set-aside{path.suffix}").open("a", encoding="utf-8") as file:
            _write_through(file, aside)
    spare = path.with_name(f".{path.name}.kept")
    spare.unlink(missing_ok=True)  # it may be a link to somewhere else
    with spare.open("x", encoding="utf-8") as file:
        _write_through(file, kept)  # before it takes the other's name: a crash must leave one of the two
    os.replace(spare, path)


def _write_through(file: TextIO, lines: list[str]) -> None:
    """Writes lines, and waits until they are on the disk."""
    file.write("".join(lines))
    file.flush()
    os.fsync(file.fileno())


class Meter:
    """Measures the steps that are taken inside `measure`."""

    def __init__(self, trainer: Trainer, *, start: int, steps: int) -> None:
        config, engine = trainer.config, trainer.engine
        self.engine, self.world = engine, trainer.mesh.layout.world
        self.on_cuda = engine.device.type == "cuda"
        watched = trainer.mesh.rank == 0 and not self.on_cuda and hasattr(engine, "persistent")
        self.memory_step = min(start + 1, steps - 1) if watched else None  # the second: the first one makes what then stays
        self.peak_memory: int | None = None
        self.seconds = 0.0
        self.peak = device_peak(config, engine.device, engine.dtype)
        model, sequence = config.model, config.data.sequence
        self.flops = step_flops_per_token(model, sequence)
        self.flops_causal = step_flops_per_token(model, sequence, convention="causal")

    @contextmanager
    def measure(self, step: int) -> Iterator[None]:
        """Around one step (0-based): its time and bytes, and once the memory."""
        comm.ledger.take()
        start = time.perf_counter()
        if step == self.memory_step:
            with LiveMemory(self.engine) as live:
                yield
            self.peak_memory = live.peak
        else:
            yield
        self.seconds = time.perf_counter() - start
        if self.on_cuda:
            self.peak_memory = torch.cuda.max_memory_allocated()

    def record(self, taken: Step) -> dict[str, Any]:
        """The line of metrics of the step that was measured last, on every rank."""
        rate = taken.tokens / self.seconds if taken.step != self.memory_step else None  # watching memory slows a step down
        return {
            "step": taken.step + 1,
            "loss": None if taken.skipped else taken.loss,
            "loss_hex": taken.loss.hex(),
            **({} if taken.skipped else taken.figures),
            "grad_norm": None if taken.skipped else taken.norm,
            "learning_rate": taken.learning_rate,
            "tokens": taken.tokens * (taken.step + 1),
            "target_tokens": taken.targets,
            "step_seconds": self.seconds,
            "tokens_per_second": rate,
            "mfu": mfu(rate, flops_per_token=self.flops, peak=self.peak, devices=self.world),
            "mfu_causal": mfu(rate, flops_per_token=self.flops_causal, peak=self.peak, devices=self.world),
            "peak_memory_bytes": self.peak_memory,
            "sent_bytes": comm.ledger.take(),
            "data_wait_seconds": taken.data_wait,
            **({"skipped": True} if taken.skipped else {}),
        }


def device_peak(config: Config, device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device: what `runtime.peak_tflops` says, else by the name of the GPU; None on a CPU."""
    if config.runtime.peak_tflops is not None:
        return config.runtime.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), str(dtype).removeprefix("torch."))
