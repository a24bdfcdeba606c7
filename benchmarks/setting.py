"""What the rivals of a row train: model, batch, tokens and optimizer, the same numbers for all.

Modules of ours are imported where they are used: a rival's start is not to be charged with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dist_llm.config.layout import Layout
    from dist_llm.config.schema import Config, ModelConfig
    from dist_llm.data.batches import MicroBatch

SEED = 7
BATCHES = 4  # different global batches, taken in turn


@dataclass(frozen=True)
class Setting:
    """A model and the batch of a step. micro_batches: of one data-parallel rank. own_weights: everybody draws their own."""

    layers: int = 6
    dim: int = 256
    heads: int = 8
    ffn: int = 688
    vocab: int = 2048
    sequence: int = 256
    batch: int = 16
    micro_batches: int = 1
    threads: int = 1  # of a rank
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    own_weights: bool = False

    def config(self, *, dp: int = 1) -> Config:
        """As a config of ours, for dp data-parallel ranks."""
        from dist_llm.config.schema import Config

        model = {"layers": self.layers, "dim": self.dim, "heads": self.heads, "ffn": self.ffn, "vocab": self.vocab, "tied": False}
        sections: dict[str, Any] = {
            "model": {"family": "llama", **model},
            "data": {"sequence": self.sequence, "tokenizer": {"kind": "bpe", "vocab": None}},
            "batch": {"global": self.batch, "micro": self.micro(dp)},
            "optimizer": {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay, "clip": self.clip},
            "schedule": {"kind": "constant"},
            "runtime": {"device": "cpu", "dtype": "float32", "seed": SEED, "threads": self.threads},
        }
        return Config.model_validate(sections)

    @property
    def model(self) -> ModelConfig:
        """The model as our table knows it."""
        return self.config().model

    def micro(self, dp: int) -> int:
        """Sequences of a micro-batch."""
        size, rest = divmod(self.batch, dp * self.micro_batches)
        assert rest == 0 and size > 0, (self.batch, dp, self.micro_batches)
        return size

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        from dist_llm.model.table import table

        return sum(row.numel for row in table(self.model))

    def described(self) -> dict[str, Any]:
        """As the results keep it."""
        names = ("layers", "dim", "heads", "ffn", "vocab", "sequence", "batch", "micro_batches", "threads")
        return {"parameters": self.parameters, **{name: getattr(self, name) for name in names}, "dtype": "float32", "optimizer": "adamw"}

    def quick(self) -> Setting:
        """The same question in miniature, for tests."""
        return replace(self, layers=2, dim=32, heads=4, ffn=88, vocab=128, sequence=32)


class Tokens:
    """The batches of a row: (batch, sequence) tokens and labels, drawn once and taken in turn.

    Tokens are drawn by Zipf's law, so that there is something to learn and the losses of the first steps say whether
    two rivals train the same. Every label counts.
    """

    def __init__(self, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(SEED)
        weights = 1.0 / torch.arange(1, setting.vocab + 1)
        drawn = torch.multinomial(weights, BATCHES * setting.batch * (setting.sequence + 1), replacement=True, generator=generator)
        self.windows = drawn.view(BATCHES, setting.batch, setting.sequence + 1)
        self.sequence = setting.sequence

    def batch(self, step: int, *, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
        """(tokens, labels) of a data-parallel rank's contiguous part of a step's global batch."""
        mine = self.windows[step % BATCHES].chunk(parts)[part]
        return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()

    def micro_batches(self, step: int, *, dp_rank: int, dp_size: int, micro: int) -> list[MicroBatch]:
        """The same for our trainer."""
        from dist_llm.data.batches import MicroBatch

        tokens, labels = self.batch(step, part=dp_rank, parts=dp_size)
        line = torch.arange(self.sequence).expand(micro, -1)
        found = []
        for at, (some, wanted) in enumerate(zip(tokens.split(micro), labels.split(micro), strict=True)):
            rows = torch.arange(micro) + dp_rank * len(tokens) + at * micro
            found.append(MicroBatch(some, wanted, line, torch.zeros_like(some), rows))
        return found

    def targets(self, step: int) -> int:
        """Every token of a step's global batch is one."""
        return self.windows[step % BATCHES, :, 1:].numel()


def initial_weights(setting: Setting) -> Iterator[tuple[str, Tensor]]:
    """Our initial weights, whole, by global name, one after the other; none where everybody draws their own."""
    if setting.own_weights:
        return
    from dist_llm.model.init import initialise
    from dist_llm.model.table import table

    for row in table(setting.model):
        values = torch.empty(row.numel)
        initialise(values, row, tuple((0, extent) for extent in row.shape), seed=SEED)
        yield row.name, values.view(row.shape)


def predicted_peaks(setting: Setting, layout: str) -> list[int]:
    """Peak bytes of live tensors on each rank of our own engine, from table and layout alone."""
    from dist_llm.mesh import coordinate
    from dist_llm.plan.memory import peak_bytes
    from dist_llm.plan.predict import shape_of

    given = layout_of(layout)
    shape = shape_of(setting.config(dp=given.dp), given, dtype="float32")
    places = [coordinate(rank, given) for rank in range(given.world)]
    return [peak_bytes(shape, pp=at.pp, tp=at.tp)["total"] for at in places]


def layout_of(text: str) -> Layout:
    """A layout from its text; dp is 1 where it is not named."""
    from dist_llm.config.layout import concrete, parse_layout

    given = parse_layout(text)
    return concrete(given, given.dp or 1)
