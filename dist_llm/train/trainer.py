"""The training step, under any layout and engine: it reads as sentences and knows nothing of how work is split."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dist_llm import flight
from dist_llm.config.preference import FIGURES
from dist_llm.config.schema import Config, PreferenceConfig
from dist_llm.data.batches import MicroBatch, no_targets
from dist_llm.engines.native import NativeEngine
from dist_llm.mesh import Mesh
from dist_llm.model.preference import Pairs
from dist_llm.model.transformer import Context, make_context
from dist_llm.train.learning_rate import learning_rate
from dist_llm.train.nonfinite import all_finite, diagnose


class Order(Protocol):
    """Where batches come from: a pure function of the step."""

    def micro_batches(self, step: int, *, dp_rank: int, dp_size: int, micro: int) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches of the global batch of a step."""

    def targets(self, step: int) -> int:
        """Target tokens of that whole global batch: every rank knows them without asking the others."""

    # weight(step) -> float: what they count together, in an order where a token may count other than 1


def weight_of(order: Order, step: int) -> float:
    """What the target tokens of a whole global batch count together: the divisor of its loss."""
    weight: Callable[[int], float] = getattr(order, "weight", order.targets)
    return float(weight(step))


@dataclass(frozen=True)
class Step:
    """What one step did: mean loss per target token (by their weights) or pair, global norm before clipping, rate, and token counts."""

    step: int
    loss: float
    norm: float
    learning_rate: float
    tokens: int
    targets: int
    data_wait: float  # seconds
    skipped: bool = False  # its numbers were not finite, and it changed nothing
    figures: dict[str, float] = field(default_factory=dict)  # of pairs: means of what their loss adds up beside itself


class Contexts(Sequence[Context]):
    """The contexts of a step, each made when it is asked for: with masks they are large."""

    def __init__(self, trainer: Trainer, batches: Sequence[MicroBatch], step: int) -> None:
        self.trainer, self.batches, self.step = trainer, batches, step

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, at: Any) -> Any:
        return self.trainer.context(self.batches[at], step=self.step, training=True)


class Trainer:
    """Takes steps with an engine and an order of batches.

    stop_asked: whether this rank was told to stop; `stopping` is what all ranks know of it after a step, alike.
    """

    def __init__(
        self, config: Config, mesh: Mesh, engine: NativeEngine, order: Order, *, stop_asked: Callable[[], bool] = lambda: False
    ) -> None:
        self.config, self.mesh, self.engine, self.order, self.stop_asked = config, mesh, engine, order, stop_asked
        self.stopping = False
        self.skipped = 0  # steps in a row

    def step(self, step: int) -> Step:
        """One optimizer step (0-based): the same update under every layout."""
        taken = self.gradients(step)
        if taken.skipped:
            self.engine.skip()
        else:
            self.engine.step(taken.learning_rate)
        return taken

    def gradients(self, step: int) -> Step:
        """The first half of a step: leaves with complete, finite global gradients, before clipping."""
        start = time.perf_counter()
        batches = self.take(step)
        waited = time.perf_counter() - start
        targets, weight = self._count_targets(step)
        if self.stop_asked():
            self.engine.stop.fill_(1.0)
        self.engine.run(Contexts(self, batches, step), targets=weight)
        totals = self.engine.finish_gradients()
        self.stopping = self.stopping or totals.stop
        self.skipped = 0 if all_finite(totals) else self.skipped + 1
        if self.skipped > self.config.optimizer.skip_non_finite:
            samples = [number for batch in batches for number in self.sample_ids(batch, step)]
            raise diagnose(self.engine, Contexts(self, batches, step), samples, totals, targets=weight, step=step + 1)
        rate = learning_rate(step, self.config.schedule, peak=self.config.optimizer.lr)
        tokens = self.config.batch.global_ * self.config.data.sequence
        figures = pair_figures(totals.figures, weight)
        return Step(step, totals.loss / weight, totals.norm, rate, tokens, targets, waited, self.skipped > 0, figures)

    def take(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step."""
        flight.enter("data")
        place, micro = self.mesh.at, self.config.batch.micro
        return self.order.micro_batches(step, dp_rank=place.dp, dp_size=self.mesh.layout.dp, micro=micro)

    def sample_ids(self, batch: MicroBatch, step: int) -> list[int]:
        """The samples of a micro-batch of this step; its rows where the order has no ids."""
        ids = getattr(self.order, "sample_ids", lambda step: None)(step)
        return (batch.rows if ids is None else ids[batch.rows]).tolist()

    def _count_targets(self, step: int) -> tuple[int, float]:
        """Target tokens of the whole global batch and their weight, known before backward: losses are sums and are divided once."""
        total, weight = self.order.targets(step), weight_of(self.order, step)
        if not total or not weight:
            raise no_targets(step, getattr(self.order, "sample_ids", lambda step: ())(step))
        return total, weight

    def context(self, batch: MicroBatch, *, step: int, training: bool) -> Context:
        """A micro-batch on the engine's device, as the model takes it."""
        return context_of(batch, self.config, device=self.engine.device, dtype=self.engine.dtype, step=step, training=training)


def pair_figures(sums: Sequence[float], pairs: float) -> dict[str, float]:
    """Means over pairs of what their loss has summed beside itself, and by how much the chosen answers lead; {} of other losses."""
    found = {name: value / pairs for name, value in zip(FIGURES[1:], sums, strict=False)}
    return found | ({"reward_margin": found["reward_chosen"] - found["reward_rejected"]} if found else {})


def context_of(batch: MicroBatch, config: Config, *, device: torch.device, dtype: torch.dtype, step: int = 0, training: bool) -> Context:
    """A micro-batch on a device, as the model takes it. step: addresses masks and noise, in training."""
    data = config.data
    optional: dict[str, Any] = {
        "positions": batch.positions.to(device) if data.reset_positions else None,
        "documents": batch.documents.to(device) if data.document_mask else None,
        "rows": batch.rows.to(device),
        "samples": batch.documents.to(device) if config.model.neftune and (data.document_mask or data.packing != "concat") else None,
        "weights": None if batch.weights is None else batch.weights.to(device),
        "pairs": None if batch.pairs is None else pairs_of(batch, config.preference, device=device),
    }
    addressed: dict[str, Any] = {"seed": config.runtime.seed, "step": step, "training": training, "dtype": dtype}
    return make_context(config.model, batch.tokens.to(device), batch.labels.to(device), **optional, **addressed)


def pairs_of(batch: MicroBatch, rule: PreferenceConfig, *, device: torch.device) -> Pairs:
    """The sides of a micro-batch, numbered row after row."""
    assert batch.pairs is not None
    number, before = 2 * int(batch.pairs.sum()), 2 * (batch.pairs.cumsum(0) - batch.pairs)
    sides = torch.where(batch.documents < 2 * batch.pairs[:, None], before[:, None] + batch.documents, number)
    counts = (batch.labels >= 0).double() if batch.weights is None else batch.weights
    reference = None if batch.reference is None else batch.reference.to(device)
    return Pairs(sides.flatten().to(device), counts.flatten().to(device), number, reference, rule)
