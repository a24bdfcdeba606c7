"""torch's FSDP2 (`fully_shard`) behind the engine's calls, as an oracle and a rival (arXiv:2304.11277)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dist_llm.engines.whole import TorchEngine
from dist_llm.model.transformer import Context


class Fsdp2Engine(TorchEngine):
    """zero=3 layouts, and zero=2 as weights that stay gathered from forward to backward. bfloat16 has float32 masters.

    offload=all keeps weights, gradients and moments in host memory, where torch's fused optimizer updates them.

    With `shard` weights are split over neighbours and replicated across them, which FSDP2 calls hybrid sharding.
    """

    name = "fsdp2"
    dtypes = (torch.float32, torch.float64, torch.bfloat16)

    def _weight_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.bfloat16 else self.dtype

    def _wrap(self) -> None:
        names = {parameter: name for name, parameter in self.whole.by_name.items()}
        places = [(module, key, names[p]) for module in self.whole.modules() for key, p in module.named_parameters(recurse=False)]
        sizes = {"replica": self.mesh.replica.size, "shard": self.mesh.shard.size}  # of a mesh with two, the first replicates
        sizes = sizes if sizes["replica"] > 1 else {"shard": sizes["shard"]}
        mesh = init_device_mesh(self.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        policy = MixedPrecisionPolicy(self.dtype, torch.float32) if self.dtype == torch.bfloat16 else MixedPrecisionPolicy()
        home = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.offload else OffloadPolicy()
        for unit in (*self.whole.blocks, self.whole):
            fully_shard(unit, mesh=mesh, reshard_after_forward=self._frees(), mp_policy=policy, offload_policy=home)
        self.whole.by_name = {name: getattr(module, key) for module, key, name in places}  # now DTensors, cut along dim 0
        self._make_optimizer()

    def _frees(self) -> bool:
        """Whether a unit's gathered weights go after its forward. zero=2 keeps them for the backward, unshard=step for the step."""
        return self.mesh.layout.zero == 3 and self.mesh.layout.unshard == "micro_batch"

    def _loss(self, context: Context) -> Tensor:
        return self.whole(context)

    def evaluate(self, contexts: Sequence[Context]) -> float:
        """The summed loss of forward-only micro-batches over all ranks, equal on all ranks. Leaves no weights gathered."""
        loss = super().evaluate(contexts)
        for unit in self.whole.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()
        return loss

    def _micro_batch(self, context: Context, slope: float, *, last: bool) -> Tensor:
        assert isinstance(self.whole, FSDPModule)  # fully_shard made it one
        layout = self.mesh.layout
        self.whole.set_requires_gradient_sync(last or layout.reduce == "micro_batch")
        self.whole.set_reshard_after_backward(last or layout.zero == 2 or layout.unshard == "micro_batch")
        loss = self.whole(context)
        (loss * slope).backward()
        return loss

    def _clip(self) -> None:
        """In host memory by the norm that is known already: torch's own would sum it with the backend of the device."""
        if not self.offload:
            return super()._clip()
        return nn.utils.clip_grads_with_norm_(self.whole.parameters(), self.config.clip, torch.tensor(self.norm, dtype=torch.float64))

    def _range(self, name: str) -> tuple[int, int]:
        slot, group = self.whole.slots[name], self.mesh.shard
        rows = slot.shape[0]
        chunk, width = -(-rows // group.size), slot.numel // rows
        return min(group.index * chunk, rows) * width, min((group.index + 1) * chunk, rows) * width

    def _values(self, kind: str, name: str) -> Tensor | None:
        values = self._tensor(kind, name)
        assert values is None or isinstance(values, DTensor)
        return None if values is None else values.to_local().view(-1)
