"""torch's FSDP2 (`fully_shard`) behind the engine's calls, as an oracle and a rival (arXiv:2304.11277)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dist_llm.engines.whole import TorchEngine
from dist_llm.model.transformer import Context


class Fsdp2Engine(TorchEngine):
    """zero=3 layouts, and zero=2 as weights that stay gathered from forward to backward. bfloat16 has float32 masters."""

    name = "fsdp2"
    dtypes = (torch.float32, torch.float64, torch.bfloat16)

    def _weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.bfloat16 else self.dtype

    def _wrap(self) -> None:
        names = {parameter: name for name, parameter in self.whole.by_name.items()}
        places = [(module, key, names[p]) for module in self.whole.modules() for key, p in module.named_parameters(recurse=False)]
        mesh = init_device_mesh(self.device.type, (self.mesh.layout.dp,))
        policy = MixedPrecisionPolicy(self.dtype, torch.float32) if self.dtype == torch.bfloat16 else MixedPrecisionPolicy()
        for unit in (*self.whole.blocks, self.whole):
            fully_shard(unit, mesh=mesh, reshard_after_forward=self.mesh.layout.zero == 3, mp_policy=policy)
        self.whole.by_name = {name: getattr(module, key) for module, key, name in places}  # now DTensors, cut along dim 0
        self._make_optimizer()

    def _loss(self, context: Context) -> Tensor:
        return self.whole(context)

    def _micro_batch(self, context: Context, slope: float, *, last: bool) -> Tensor:
        assert isinstance(self.whole, FSDPModule)  # fully_shard made it one
        self.whole.set_requires_gradient_sync(last or self.mesh.layout.reduce == "micro_batch")
        loss = self.whole(context)
        (loss * slope).backward()
        return loss

    def _range(self, name: str) -> tuple[int, int]:
        slot, group = self.whole.slots[name], self.mesh.data
        rows = slot.shape[0]
        chunk, width = -(-rows // group.size), slot.numel // rows
        return min(group.index * chunk, rows) * width, min((group.index + 1) * chunk, rows) * width

    def _values(self, kind: str, name: str) -> Tensor | None:
        values = self._tensor(kind, name)
        assert values is None or isinstance(values, DTensor)
        return None if values is None else values.to_local().view(-1)
