"""An adapter's checkpoint as a whole model: its own matrices, what was trained whole beside it, and the rest out of its base.

Where the base was quantized in training it is quantized here too: what an adapter has learned is a correction of those weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dist_llm.config.schema import ModelConfig
from dist_llm.errors import UsageError
from dist_llm.model.quantize import dequantize, quantize
from dist_llm.model.table import Row, table
from dist_llm.sharding import Box
from dist_llm.train.base import Base
from dist_llm.train.folder import Checkpoint
from dist_llm.train.parts import Parts, Source


class Over(Protocol):
    """The matrices of an adapter."""

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a global tensor, (stop - start,) on the CPU."""

    def close(self) -> None:
        """Lets the files go."""


@dataclass(frozen=True)
class Overlay:
    """Weights of two sources under the names of one table."""

    base: Base
    under: Source
    over: Over
    rows: dict[str, Row]
    quantize: str

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a global tensor, (stop - start,) on the CPU."""
        row = self.rows[name]
        if row.trained:
            return self.over.read(kind, name, box, start, stop)
        if not row.block:
            return self.under.read(kind, name, box, start, stop)
        (top, bottom), (left, right), width = *box, row.shape[1]
        values = self.under.read(kind, name, ((top, bottom), (0, width)), 0, (bottom - top) * width)  # scales are of whole rows' blocks
        codes, scales = quantize(values, kind=self.quantize, block=row.block)
        values = dequantize(codes, scales, values.clone(), kind=self.quantize, block=row.block)
        return values.view(bottom - top, width)[:, left:right].flatten()[start:stop]

    def whole(self, name: str) -> Tensor:
        """A whole weight, on the CPU."""
        shape = self.rows[name].shape
        return self.read("weight", name, tuple((0, extent) for extent in shape), 0, prod(shape)).view(shape)

    @property
    def beneath(self) -> Overlay:
        """The base alone, quantized as it is under the adapter."""
        return replace(self, rows={row.name: replace(row, trained=False) for row in self.rows.values() if not row.beside})

    def close(self) -> None:
        """Lets the files go."""
        self.base.close()
        self.over.close()


def adapted(beside: Overlay, name: str, values: Tensor, scale: float) -> Tensor | None:
    """What an adapter makes of a weight W (out, in), float32 at least: W + s B A, with DoRA its rows brought to their lengths; or another
    one in its place, where it was trained whole. A tensor of its own, or None where it has nothing on it.
    """
    if beside.rows[name].trained:
        return beside.whole(name).to(values.dtype, copy=True)
    module = name.removesuffix(".weight")
    if f"{module}.lora_a" not in beside.rows:
        return None
    a, b = (beside.whole(f"{module}.{part}").to(values.dtype) for part in ("lora_a", "lora_b"))
    made = values.addmm(b, a, alpha=scale)
    if f"{module}.lora_m" in beside.rows:
        lengths = torch.linalg.vector_norm(made, dim=1, dtype=torch.float64)
        made.mul_((beside.whole(f"{module}.lora_m") / lengths).to(made.dtype)[:, None])
    return made


def base_of(opened: Checkpoint) -> Base:
    """The base of an adapter's checkpoint. Raises UsageError where it is not the one that the adapter was trained on (F30)."""
    assert opened.config.model.adapter.rank and opened.config.base is not None
    base = Base(opened.config.base, kept=opened)
    require_base(opened, base)
    return base


def require_base(opened: Checkpoint, base: Base) -> None:
    """Raises UsageError where an adapter was trained on another base: on these weights it means nothing."""
    require_weights(base, opened.manifest.get("base"), opened.manifest.get("base_weights"), where=opened.path)


def require_weights(base: Base, identity: str | None, weights: str | None, *, where: Path) -> None:
    """Raises UsageError where a base is not the one of an identity, and its weights in another form are not those of the other."""
    if base.identity != identity and (weights is None or base.weights != weights):
        what, advice = "the adapter was trained on another base", "give it the base that it was trained on"
        found = f"{base.identity[:16]}, of {base.path}"
        raise UsageError(what, where=str(where), expected=f"base {str(identity)[:16]}", found=found, next=advice)


def weights_of(opened: Checkpoint) -> Parts | Overlay:
    """The weights of a checkpoint's model, of its base too where it is an adapter. Raises UsageError, CheckpointError."""
    if not opened.config.model.adapter.rank:
        return opened.parts
    return overlay(base_of(opened), opened.config.model, over=opened.parts)


def overlay(base: Base, model: ModelConfig, *, over: Over) -> Overlay:
    """An adapter over its base. model: the base's with the adapter."""
    return Overlay(base, base.source(), over, {row.name: row for row in table(model)}, model.adapter.quantize)
