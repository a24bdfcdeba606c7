"""SGD and AdamW on flat segments.

The kernels are torch's fused ones, called directly: building a `torch.optim` object would import torch._dynamo
(67 MB). A segment is a run of one shard with one weight decay; updating shard by shard keeps every ZeRO stage
equal to the bit, because vector loops start at the same elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_llm.config.schema import OptimizerConfig


@dataclass
class Moments:
    """Optimizer state of one unit, aligned with the weights it owns; None where the optimizer has no such moment."""

    first: Tensor | None
    second: Tensor | None

    def part(self, run: slice) -> Moments:
        """The state of a run of the weights."""
        return Moments(*(None if moment is None else moment[run] for moment in (self.first, self.second)))


class Optimizer:
    """SGD (momentum, Nesterov, coupled weight decay) or AdamW (arXiv:1711.05101, decoupled weight decay)."""

    def __init__(self, config: OptimizerConfig, device: torch.device) -> None:
        self.config = config
        self.count = torch.zeros((), dtype=torch.float32, device=device)  # updates made so far

    def moments(self, weights: Tensor) -> Moments:
        """Fresh state for a flat tensor of weights."""
        adam = self.config.kind == "adamw"
        first = torch.zeros_like(weights) if adam or self.config.momentum else None
        return Moments(first, torch.zeros_like(weights) if adam else None)

    def update(self, weights: list[Tensor], gradients: list[Tensor], moments: list[Moments], *, lr: float, decay: bool) -> None:
        """One update of lists of equally shaped flat segments, in place. `count` must have been raised already."""
        if not weights:
            return
        weight_decay = self.config.weight_decay if decay else 0.0
        if self.config.kind == "adamw":
            self._adamw(weights, gradients, moments, lr, weight_decay)
        else:
            self._sgd(weights, gradients, moments, lr, weight_decay)

    def _adamw(self, weights: list[Tensor], gradients: list[Tensor], moments: list[Moments], lr: float, weight_decay: float) -> None:
        first = [m.first for m in moments if m.first is not None]
        second = [m.second for m in moments if m.second is not None]
        beta1, beta2 = self.config.betas
        counts = [self.count] * len(weights)
        rule: dict[str, Any] = {"beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": self.config.eps}
        torch._fused_adamw_(weights, gradients, first, second, [], counts, lr=lr, **rule, amsgrad=False, maximize=False)

    def _sgd(self, weights: list[Tensor], gradients: list[Tensor], moments: list[Moments], lr: float, weight_decay: float) -> None:
        buffers = [m.first for m in moments if m.first is not None]
        rule: dict[str, Any] = {"weight_decay": weight_decay, "momentum": self.config.momentum, "nesterov": self.config.nesterov}
        # The buffers start at zero: momentum x 0 + gradient is what torch does on the first step.
        torch._fused_sgd_(weights, gradients, buffers, lr=lr, **rule, dampening=0.0, maximize=False, is_first_step=False)
