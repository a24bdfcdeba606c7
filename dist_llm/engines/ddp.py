"""torch's DistributedDataParallel behind the engine's calls, as an oracle and a rival (arXiv:2006.15704)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_llm.engines.whole import TorchEngine
from dist_llm.model.transformer import Context


class DdpEngine(TorchEngine):
    """zero=0 layouts: whole weights, gradients and optimizer state on every rank. No master weights, so no bfloat16."""

    name = "ddp"
    dtypes = (torch.float32, torch.float64)

    def _wrap(self) -> None:
        self.module = DistributedDataParallel(self.whole, process_group=self.mesh.data.handle)
        self._make_optimizer()

    def _loss(self, context: Context) -> Tensor:
        return self.whole(context)

    def _micro_batch(self, context: Context, slope: float, *, last: bool) -> Tensor:
        reduce = last or self.mesh.layout.reduce == "micro_batch"
        with nullcontext() if reduce else self.module.no_sync():
            loss = self.module(context)
            (loss * slope).backward()
        return loss

    def _range(self, name: str) -> tuple[int, int]:
        return 0, self.whole.slots[name].numel

    def _values(self, kind: str, name: str) -> Tensor | None:
        values = self._tensor(kind, name)
        return None if values is None else values.view(-1)
