"""A loss that jumps: what is usual, what is not, and which part of the batch stands out when it is computed again."""

from __future__ import annotations

from collections import deque
from itertools import pairwise
from statistics import median
from typing import Any

from dist_llm import comm
from dist_llm.train.trainer import Trainer, weight_of

WINDOW = 16  # steps that say what is usual; before there are so many, nothing can stand out
SPREADS = 10.0  # times the median change from one step to the next
RISE = 0.2  # and at least so many nats
REST = 32  # steps after a notice without another
MOST = 8  # sample ids in a notice


class Spikes:
    """Watches the loss of a run; every rank sees the same numbers and so comes to the same end."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.quiet_until = 0

    def usual(self, loss: float, step: int) -> float | None:
        """The usual loss where this one is far above it, else None. What is far above is not taken for usual."""
        if len(self.losses) == WINDOW:
            middle = median(self.losses)
            spread = median(abs(later - earlier) for earlier, later in pairwise(self.losses))
            if loss > middle + max(SPREADS * spread, RISE):
                first, self.quiet_until = step >= self.quiet_until, step + REST
                return middle if first else None
        self.losses.append(loss)
        return None


def examine(trainer: Trainer, step: int) -> dict[str, Any]:
    """Computes a step's batch (0-based) again, forward only, and finds the micro-batch with the highest loss; every rank calls it.

    Returns {"replayed": mean loss, "worst": mean loss of that micro-batch, "data_rank", "micro_batch", "samples": ids}.
    """
    engine, place = trainer.engine, trainer.mesh.at
    batches = trainer.take(step)
    sums = [float(engine.local_loss([trainer.context(batch, step=step, training=False)]).view(-1)[0]) for batch in batches]
    targets = [batch.weight for batch in batches]
    ids = [trainer.sample_ids(batch, step) for batch in batches]
    mine = {"dp": place.dp, "sums": sums, "targets": targets, "ids": ids}
    facts = comm.gather_json(mine, trainer.mesh.world, device=engine.device)
    total = sum(sum(fact["sums"]) for fact in facts)
    means = [
        (loss / (count or 1.0), fact["dp"], micro, names)
        for fact in facts
        for micro, (loss, count, names) in enumerate(zip(fact["sums"], fact["targets"], fact["ids"], strict=True))
    ]
    worst, data_rank, micro, names = max(means, key=lambda one: one[0])
    replayed = total / weight_of(trainer.order, step)
    return {"replayed": replayed, "worst": worst, "data_rank": data_rank, "micro_batch": micro, "samples": names}


def sentence(step: int, loss: float, usual: float, found: dict[str, Any]) -> str:
    """The notice in one line."""
    ids = ", ".join(map(str, found["samples"][:MOST])) + (" ..." if len(found["samples"]) > MOST else "")
    where = f"micro-batch {found['micro_batch']} of data rank {found['data_rank']} (samples {ids})"
    return (
        f"the loss of step {step} is {loss:.3f}, usual is {usual:.3f}; computed again with the weights after it, its batch has "
        f"{found['replayed']:.3f}, and {found['worst']:.3f} in {where}"
    )
