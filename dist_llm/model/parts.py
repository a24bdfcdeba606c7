"""What blocks are made of and roles are handed: norms, and the weights of projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.model.kernels import Normed, norm

Make = Callable[[str], Any]  # global name -> its nn.Parameter, None where the model has no such row


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension; shapes stay. Where the model has no such row it leaves all as it is."""

    def __init__(self, make: Make, name: str, *, kind: str, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = make(f"{name}.weight"), make(f"{name}.bias"), eps
        self.kind = "none" if self.weight is None else kind

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.kind == "none":
            return x
        if not torch.compiler.is_compiling():
            return Normed.apply(x, self.weight, self.bias, self.kind, self.eps)
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return norm(x, self.weight, self.bias, kind=self.kind, eps=self.eps)


@dataclass(frozen=True)
class Adapter:
    """What is added to a projection: scale B A x, with a (R, D) and b (O, R) (LoRA, arXiv:2106.09685)."""

    a: Tensor
    b: Tensor
    scale: float


class Projection(nn.Module):
    """A weight (O, D) and perhaps a bias (O,) and an adapter; `roles` decides how they are applied. scale: of the adapter."""

    def __init__(self, make: Make, name: str, *, scale: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = make(f"{name}.weight"), make(f"{name}.bias")
        self.lora_a = make(f"{name}.lora_a") if scale else None
        self.lora_b = make(f"{name}.lora_b") if scale else None
        self.adapter = None if self.lora_a is None or self.lora_b is None else Adapter(self.lora_a, self.lora_b, scale)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O), in plain linear algebra."""
        y = F.linear(x, self.weight, self.bias)
        adapter = self.adapter
        return y if adapter is None else y + adapter.scale * F.linear(F.linear(x, adapter.a), adapter.b)


class Projections:
    """Projections that one input feeds. joined: their weights lie side by side in memory, so that one product serves all."""

    def __init__(self, *parts: Projection) -> None:
        self.parts, self.joined = parts, neighbours([part.weight for part in parts])

    @property
    def weights(self) -> list[Tensor]:
        """(O_i, D) of each."""
        return [part.weight for part in self.parts]

    @property
    def adapters(self) -> list[Adapter | None]:
        """Of each."""
        return [part.adapter for part in self.parts]

    @property
    def biases(self) -> list[Tensor]:
        """(O_i,) of each, or none at all."""
        return [part.bias for part in self.parts if part.bias is not None]


def neighbours(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors lie side by side in one storage, in this order."""
    pairs = list(zip(tensors, tensors[1:], strict=False))
    same = all(a.untyped_storage()._cdata == b.untyped_storage()._cdata for a, b in pairs)
    return bool(pairs) and same and all(a.storage_offset() + a.numel() == b.storage_offset() for a, b in pairs)
