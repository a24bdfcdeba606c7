"""Validation: mean loss, perplexity and bits per byte over the held-out text, the same batches every time."""

from __future__ import annotations

import json
import math
from itertools import zip_longest

import torch
from torch import Tensor

from dist_llm import flight
from dist_llm.data.batches import IGNORED, Batches, validation_batches
from dist_llm.data.prepare import Prepared
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.train.trainer import Trainer, pair_figures


class Validation:
    """The first `track.validate_batches` global batches of the held-out text."""

    def __init__(self, trainer: Trainer, prepared: Prepared) -> None:
        config, self.trainer = trainer.config, trainer
        self.batches = validation_batches(prepared, config.data, global_batch=config.batch.global_)
        self.count = min(config.track.validate_batches, self.batches.num_batches) if self.batches else 0
        self.targets = sum(self.batches.weight(number) for number in range(self.count)) if self.batches else 0.0  # their number, or weight
        counts = self.targets and trainer.mesh.rank == 0 and config.preference.loss is None
        self.text_bytes = text_bytes(self.batches, self.count, prepared.tokenizer) if counts and self.batches else 0.0

    def measure(self) -> dict[str, float | None]:
        """`validation_loss` in nats per target token, `validation_perplexity`, `validation_bits_per_byte`; every rank calls it.

        Null where nothing is held out, and on other ranks than 0 for the bits per byte.
        """
        if self.batches is None or not self.targets:
            return {"validation_loss": None, "validation_perplexity": None, "validation_bits_per_byte": None}
        trainer, place = self.trainer, self.trainer.mesh.at
        where = {"dp_rank": place.dp, "dp_size": trainer.mesh.layout.dp, "micro": trainer.config.batch.micro}
        sums: list[float] = []
        for number in range(self.count):
            flight.enter("validate")
            batches = self.batches.micro_batches(number, **where)
            found = trainer.engine.figures([trainer.context(batch, step=0, training=False) for batch in batches])
            sums = [a + b for a, b in zip_longest(sums, found.view(-1).tolist(), fillvalue=0.0)]
        told = figures(sums[0], self.targets, self.text_bytes)
        if len(sums) > 1:  # a loss of pairs is of no text
            told = {**dict.fromkeys(told), "loss": told["loss"], **pair_figures(sums[1:], self.targets)}
        return {f"validation_{name}": value for name, value in told.items()}


def figures(total: float, targets: float, text_bytes: float) -> dict[str, float | None]:
    """A summed loss in nats -> `loss` per target token (by their weights), `perplexity` and `bits_per_byte`; null where unknown."""
    loss = total / targets
    bits = total / math.log(2) / text_bytes if text_bytes else None
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else None, "bits_per_byte": bits}


def text_bytes(batches: Batches, count: int, tokenizer: Tokenizer) -> float:
    """Bytes of text that the target tokens of the first `count` batches stand for, by their weights.

    The end of a document costs bits and stands for none. Exact for byte-level tokenizers; for others the average of the stores.
    """
    widths = token_bytes(tokenizer)
    if widths is None:
        manifests = [store.manifest for store in batches.stores]
        targets = sum(batches.weight(number) for number in range(count))
        return targets * sum(m.text_bytes for m in manifests) / sum(m.tokens for m in manifests)
    total, size = 0.0, batches.global_batch
    for number in range(count):
        (batch,) = batches.micro_batches(number, dp_rank=0, dp_size=1, micro=size)
        counts = widths[batch.labels.clamp(min=0)] * (batch.labels != IGNORED)
        total += float((counts if batch.weights is None else counts * batch.weights).sum())
    return total


def token_bytes(tokenizer: Tokenizer) -> Tensor | None:
    """How many bytes of text each id stands for, int64 (V,), 0 for special tokens; None where ids are not made of bytes.

    In a byte-level vocabulary every letter of an entry is one byte.
    """
    decoder = json.loads(tokenizer.canonical).get("decoder") or {}
    if "ByteLevel" not in (decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))):
        return None
    widths = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for piece, number in tokenizer.inner.get_vocab(with_added_tokens=False).items():
        widths[number] = len(piece)
    for number, added in tokenizer.inner.get_added_tokens_decoder().items():
        widths[number] = 0 if added.special else len(added.content.encode())
    return widths
