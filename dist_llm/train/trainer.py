"""The training step, under any layout and engine: it reads as sentences and knows nothing of how work is split."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dist_llm.config.schema import Config
from dist_llm.data.batches import MicroBatch
from dist_llm.engines.native import NativeEngine, Totals
from dist_llm.errors import NumericError
from dist_llm.mesh import Mesh
from dist_llm.model.transformer import Context, make_context
from dist_llm.train.learning_rate import learning_rate


class Order(Protocol):
    """Where batches come from: a pure function of the step."""

    def micro_batches(self, step: int, *, dp_rank: int, dp_size: int, micro: int) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches of the global batch of a step."""

    def targets(self, step: int) -> int:
        """Target tokens of that whole global batch: every rank knows them without asking the others."""


@dataclass(frozen=True)
class Step:
    """What one step did: mean loss per target token, global gradient norm before clipping, rate, and token counts."""

    step: int
    loss: float
    norm: float
    learning_rate: float
    tokens: int
    targets: int
    data_wait: float  # seconds


class Contexts(Sequence[Context]):
    """The contexts of a step, each made when it is asked for: with masks they are large."""

    def __init__(self, trainer: Trainer, batches: Sequence[MicroBatch], step: int) -> None:
        self.trainer, self.batches, self.step = trainer, batches, step

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, at: Any) -> Any:
        return self.trainer.context(self.batches[at], step=self.step, training=True)


class Trainer:
    """Takes steps with an engine and an order of batches."""

    def __init__(self, config: Config, mesh: Mesh, engine: NativeEngine, order: Order) -> None:
        self.config, self.mesh, self.engine, self.order = config, mesh, engine, order

    def step(self, step: int) -> Step:
        """One optimizer step (0-based): the same update under every layout."""
        taken = self.gradients(step)
        self.engine.step(taken.learning_rate)
        return taken

    def gradients(self, step: int) -> Step:
        """The first half of a step: leaves with complete, finite global gradients, before clipping."""
        start = time.perf_counter()
        batches = self._take(step)
        waited = time.perf_counter() - start
        targets = self._count_targets(step)
        self.engine.run(Contexts(self, batches, step), targets=targets)
        totals = self.engine.finish_gradients()
        self._refuse_non_finite(totals, step)
        rate = learning_rate(step, self.config.schedule, peak=self.config.optimizer.lr)
        tokens = self.config.batch.global_ * self.config.data.sequence
        return Step(step, totals.loss / targets, totals.norm, rate, tokens, targets, waited)

    def _take(self, step: int) -> list[MicroBatch]:
        place, micro = self.mesh.at, self.config.batch.micro
        return self.order.micro_batches(step, dp_rank=place.dp, dp_size=self.mesh.layout.dp, micro=micro)

    def _count_targets(self, step: int) -> int:
        """Target tokens of the whole global batch, known before backward: losses are sums and are divided once."""
        total = self.order.targets(step)
        if total == 0:
            what, expected = "a batch without a single target token", "at least one label to learn from"
            raise NumericError(what, where=f"step {step + 1}", expected=expected)
        return total

    def context(self, batch: MicroBatch, *, step: int, training: bool) -> Context:
        """A micro-batch on the engine's device, as the model takes it."""
        data, device = self.config.data, self.engine.device
        optional: dict[str, Any] = {
            "positions": batch.positions.to(device) if data.reset_positions else None,
            "documents": batch.documents.to(device) if data.document_mask else None,
            "rows": batch.rows.to(device),
        }
        addressed: dict[str, Any] = {"seed": self.config.runtime.seed, "step": step, "training": training, "dtype": self.engine.dtype}
        return make_context(self.config.model, batch.tokens.to(device), batch.labels.to(device), **optional, **addressed)

    def _refuse_non_finite(self, totals: Totals, step: int) -> None:
        """Stops all ranks before the update: the norm and the loss are global, so every rank sees the same."""
        if math.isfinite(totals.norm) and math.isfinite(totals.loss):
            return
        wrong = "loss" if not math.isfinite(totals.loss) else "gradient norm"
        raise NumericError(
            f"the {wrong} is not finite",
            where=f"step {step + 1}",  # as metrics.jsonl counts
            expected="finite numbers",
            found=f"loss {totals.loss}, gradient norm {totals.norm}",
            safe="no weight was changed by this step",
            details=["a lower optimizer.lr, a longer schedule.warmup or runtime.dtype=float32 are the usual cures"],
        )
