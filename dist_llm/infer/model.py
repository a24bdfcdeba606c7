"""A model for inference: weights alone, whole or this rank's slices of them, whatever layout they come from.

The units are those of training, and so are the operations in them: `parallel/tensor.py`, over a group of one rank or
more. q, k and v, and gate and up, are neighbours in memory here too, so that the same products give the same bits.

Legend: B lines, S tokens, D dim, V vocabulary, v this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_llm import comm
from dist_llm.config.schema import ModelConfig
from dist_llm.infer.cache import Cache, Kept, Pass
from dist_llm.infer.roles import ReadingAdaptedRoles, ReadingRoles
from dist_llm.mesh import Group
from dist_llm.model.table import Row, table, unit_names
from dist_llm.model.transformer import Attention, Context, build_unit, make_context
from dist_llm.sharding import Box, shard, split_parts

CHUNK = 1024  # tokens whose logits are whole at a time


class Weights(Protocol):
    """The weights of a checkpoint, or of a model that trains, by global name."""

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a global tensor, (stop - start,) on the CPU; kind: "weight"."""


def alone() -> Group:
    """The tensor-parallel group of one process."""
    return Group("tp", (0,), 0)


class Model:
    """A model on one device, or one rank's slice of it.

    tokens: the ids that its tokenizer has; rows of a padded vocabulary are never chosen. group: the ranks that share it, each
    with its slice of the weights; all of them make the same calls and get the same logits.
    """

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        tokens: Iterable[int] | None = None,
        group: Group | None = None,
    ) -> None:
        self.config, self.dtype, self.device, self.group = config, dtype, device, group or alone()
        absent = [] if tokens is None else sorted(set(range(config.vocab)).difference(tokens))
        self.absent = torch.tensor(absent, dtype=torch.int64, device=device)
        self.slices = split_parts(config.vocab, self.group.size)  # of the vocabulary, by rank
        self.named = self._load(weights, table(config))  # this rank's weights by global name
        self.adapters: dict[str, tuple[ModelConfig, dict[str, nn.Parameter]]] = {}
        self.adapter: str | None = None
        self._build(config, self.named)

    def add(self, name: str, config: ModelConfig, weights: Weights) -> None:
        """Loads an adapter for these weights under a name; `use` puts it on. config: the model with the adapter."""
        self.adapters[name] = config, self._load(weights, [row for row in table(config) if row.trained])

    def use(self, name: str | None) -> None:
        """Puts one of the added adapters on the weights, or none; what a cache holds was computed by another model from then on."""
        if name != self.adapter:
            config, matrices = (self.config, {}) if name is None else self.adapters[name]
            self.adapter = name
            self._build(config, self.named | matrices)

    def _build(self, config: ModelConfig, named: dict[str, nn.Parameter]) -> None:
        """The units over these weights."""
        kind = ReadingAdaptedRoles if config.adapter.rank else ReadingRoles
        self.roles = roles = kind(self.group, sp=False, vocab=config.vocab, first=self.slices[self.group.index][0])
        self.units: list[Any] = [build_unit(name, config, named.get, roles) for name in unit_names(config)]
        modules = [module for unit in self.units for module in unit.modules()]
        self.attentions = [module for module in modules if isinstance(module, Attention)]
        self.kept = [Kept(layer) for layer in range(len(self.attentions))]
        for attention, kept in zip(self.attentions, self.kept, strict=True):
            attention.attend = kept

    def _load(self, weights: Weights, wanted: Iterable[Row]) -> dict[str, nn.Parameter]:
        """This rank's slices by name; those of a unit are one buffer, in the table's order."""
        units: dict[str, list[Row]] = {}
        for row in wanted:
            units.setdefault(row.unit, []).append(row)
        made: dict[str, nn.Parameter] = {}
        for rows in units.values():
            boxes = [shard(row, tp=self.group.size, sp=False).box(self.group.index) for row in rows]
            shapes = [tuple(stop - start for start, stop in box) for box in boxes]
            buffer, at = torch.empty(sum(map(prod, shapes)), dtype=self.dtype, device=self.device), 0
            for row, box, shape in zip(rows, boxes, shapes, strict=True):
                view = buffer[at : at + prod(shape)].view(shape)
                view.copy_(weights.read("weight", row.name, box, 0, prod(shape)).view(shape))
                made[row.name], at = nn.Parameter(view, requires_grad=False), at + prod(shape)
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's weights."""
        return sum(weight.nbytes for weight in self.named.values())

    def cache(self, *, lines: int, capacity: int) -> Cache:
        """An empty cache for some lines of at most `capacity` tokens: the keys and values of this rank's heads."""
        width = self.config.head_dim
        heads = self.attentions[0].k.weight.shape[0] // width
        sizes = {"layers": len(self.attentions), "lines": lines, "kv_heads": heads, "capacity": capacity, "head_dim": width}
        return Cache(**sizes, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def read(self, cache: Cache, fresh: Sequence[Sequence[int]]) -> Tensor:
        """Reads more tokens on every line of a cache (at least one each): the logits (B, V) after the last of each.

        Lines that hold different numbers of tokens already go on by one token at a time. A row that is no token has -inf.
        """
        sizes = [len(tokens) for tokens in fresh]
        reading = Pass(cache, sizes)
        padded = [list(tokens) + [0] * (reading.size - len(tokens)) for tokens in fresh]
        line = torch.tensor(padded, device=self.device)
        context = make_context(self.config, line, line, dtype=self.dtype, positions=reading.positions, training=False)
        if not reading.first:
            narrow = self.config.sliding_window
            local = reading.mask(self.dtype, window=narrow) if narrow else None
            context = replace(context, mask=reading.mask(self.dtype), local_mask=local)
        x = self._walk(context, reading)
        cache.lengths = [length + size for length, size in zip(cache.lengths, sizes, strict=True)]
        if reading.size > 1:
            x = x[torch.arange(len(sizes), device=self.device), torch.tensor(sizes, device=self.device) - 1][:, None]
        return self._whole(x)[:, 0].index_fill(1, self.absent, -torch.inf)

    @torch.no_grad()
    def scores(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and labels (B, S) -> (the log probability of each label, float64 (B, S); whether it is the likeliest token).

        A label below 0 asks for nothing, and gets 0.
        """
        context = make_context(self.config, tokens.to(self.device), labels.to(self.device), dtype=self.dtype, training=False)
        x, wanted = self._walk(context, None).flatten(0, 1), context.labels.flatten()
        found = torch.zeros(len(wanted), dtype=torch.float64, device=self.device)
        likeliest = torch.ones(len(wanted), dtype=torch.bool, device=self.device)
        places = (wanted >= 0).nonzero()[:, 0]
        for part in places.split(CHUNK):
            logits = self._whole(x[part][None])[0].to(torch.float64)
            found[part] = logits.log_softmax(-1).gather(1, wanted[part][:, None])[:, 0]
            likeliest[part] = logits.argmax(-1) == wanted[part]
        return found.view(labels.shape).cpu(), likeliest.view(labels.shape).cpu()

    @torch.no_grad()
    def loss(self, context: Context) -> Tensor:
        """The summed loss over a context's labels, a float64 scalar: as training computes it."""
        return self.units[-1](self._walk(context, None), context)

    def _walk(self, context: Context, reading: Pass | None) -> Tensor:
        """The context's tokens (B, S) -> (B, S, D), all units but the last."""
        for kept in self.kept:
            kept.reading = reading
        self.roles.short(context.tokens.shape[1] == 1)
        embedding, *blocks, _ = self.units
        x = embedding(context)
        for block in blocks:
            x = block(x, context)
        return x

    def _whole(self, x: Tensor) -> Tensor:
        """(B, S, D) -> logits (B, S, V), of all ranks' slices of the vocabulary."""
        logits, group = self.units[-1].logits(x), self.group  # (B, S, v)
        if group.size == 1:
            return logits
        widths = [stop - start for start, stop in self.slices]
        sent = logits.new_zeros(max(widths), *logits.shape[:2])
        sent[: logits.shape[2]] = logits.permute(2, 0, 1)
        parts = comm.all_gather(sent, group).view(group.size, *sent.shape)
        return torch.cat([part[:width] for part, width in zip(parts, widths, strict=True)]).permute(1, 2, 0)
