"""What blocks are made of and roles are handed: norms, and the weights of projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.schema import AdapterConfig
from dist_llm.model.kernels import Normed, norm
from dist_llm.random import keep_mask, place_of, uniform_at

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
class Draw:
    """The address of a micro-batch's random numbers: places (B, S) of its tokens in the global batch, key (2,) of seed and step."""

    places: Tensor
    key: Tensor

    def keep(self, place: Tensor, features: Tensor, *, width: int, drop: float) -> Tensor:
        """(B, S, len(features)), False with probability `drop`: of some of `width` features, under the key of where they are."""
        return keep_mask(self.places[..., None] * width + features, self.key, place, drop=drop)

    def spread(self, place: Tensor, width: int) -> Tensor:
        """(B, S, width), uniform in (-1, 1), float64."""
        features = torch.arange(width, device=self.places.device)
        return uniform_at(self.places[..., None] * width + features, self.key, place).mul_(2.0).sub_(1.0)


@dataclass(frozen=True)
class Adapter:
    """What is added to a projection: scale B A x, with a (R, D) and b (O, R) (LoRA, arXiv:2106.09685).

    m (O,): the lengths that the rows of W + scale B A are brought to (DoRA, arXiv:2402.09353); None: they stay as they are. drop: the
    part of x that does not reach A in training; place, width: of its masks, and how many features the whole input has.
    """

    a: Tensor
    b: Tensor
    scale: float
    m: Tensor | None = None
    drop: float = 0.0
    place: Tensor | None = None
    width: int = 0


class Projection(nn.Module):
    """A weight (O, D) and perhaps a bias (O,) and an adapter; `roles` decides how they are applied. width: whole input features."""

    def __init__(self, make: Make, name: str, *, adapter: AdapterConfig | None = None, width: int = 0) -> None:
        super().__init__()
        self.weight, self.bias = make(f"{name}.weight"), make(f"{name}.bias")
        self.adapter: Adapter | None = None
        if adapter is None or (a := make(f"{name}.lora_a")) is None:
            return
        self.lora_a, self.lora_b, self.lora_m = a, make(f"{name}.lora_b"), make(f"{name}.lora_m")
        place = place_of("adapter dropout", name, device=a.device) if adapter.dropout else None
        self.adapter = Adapter(self.lora_a, self.lora_b, adapter.scale, self.lora_m, adapter.dropout, place, width)

    def forward(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        """(..., D) -> (..., O), in plain linear algebra; with `draw` x is (B, S, D), and the adapter's dropout on."""
        y, adapter = F.linear(x, self.weight, self.bias), self.adapter
        if adapter is None:
            return y
        given = x
        if adapter.place is not None and draw is not None:
            features = torch.arange(adapter.width, device=x.device)
            given = x * draw.keep(adapter.place, features, width=adapter.width, drop=adapter.drop) / (1.0 - adapter.drop)
        added = adapter.scale * F.linear(F.linear(given, adapter.a), adapter.b)
        if adapter.m is None:
            return y + added
        norm = torch.linalg.vector_norm((self.weight + adapter.scale * adapter.b @ adapter.a).detach(), dim=1)
        factor = adapter.m / norm
        return y + (factor - 1.0) * F.linear(given, self.weight) + factor * added


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
