"""Which token comes next: logits in, tokens out, in float64 on the CPU, the same on every rank.

The rules apply in the order that the field is used to: repetition penalty (arXiv:1909.05858), temperature, top-k, top-p
(arXiv:1904.09751), min-p (arXiv:2407.01082), each over what the one before it has left. A random number is addressed by
(seed, sample, position): what a prompt is followed by does not depend on the prompts beside it.

Legend: B lines, V vocabulary, N candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import log

import torch
from torch import Tensor

from dist_llm.random import key_of, uniform

BLOCK = 256  # random numbers made at a time


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen. temperature 0: the likeliest.

    top_k: among the likeliest k. top_p: among the likeliest that make up p. min_p: among those at least p times as likely as
    the likeliest. repetition_penalty: logits of tokens that are there already are divided by it (above zero) or multiplied (below).
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0


def choose(logits: Tensor, choice: Choice, points: Tensor) -> Tensor:
    """Logits (B, V) and a random number in (0, 1) for each line, float64 (B,) -> tokens, int64 (B,) on the CPU.

    By the inverse of the cumulative distribution over tokens in falling order.
    """
    logits = logits.detach().to("cpu", torch.float64)
    if choice.temperature == 0:
        return logits.argmax(-1)
    values, tokens = ranked(logits, choice)
    mass = torch.softmax(values, dim=-1).cumsum(-1)
    place = torch.searchsorted(mass, (points * mass[:, -1])[:, None])
    last = values.isfinite().sum(-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(place, last))[:, 0]


def ranked(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Logits (B, V) -> (values (B, N) in falling order, after the temperature and -inf where the rules drop a token; the tokens)."""
    values, tokens = _falling(logits, choice.top_k)
    values = (values - values[:, :1]) / choice.temperature
    if choice.top_p is not None:
        mass = torch.softmax(values, dim=-1).cumsum(-1)
        dropped = torch.zeros_like(mass, dtype=torch.bool)
        dropped[:, 1:] = mass[:, :-1] >= choice.top_p  # the likelier ones make it up already
        values = values.masked_fill(dropped, -torch.inf)
    if choice.min_p:
        values = values.masked_fill(values < log(choice.min_p), -torch.inf)
    return values, tokens


def _falling(logits: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """The largest logits in falling order, and their tokens; of equal ones the lower token comes first."""
    if most is None or most >= logits.shape[-1]:
        values, tokens = logits.sort(dim=-1, descending=True, stable=True)
        return values, tokens
    tokens = logits.topk(most, dim=-1).indices.sort(dim=-1).values
    values, order = logits.gather(1, tokens).sort(dim=-1, descending=True, stable=True)
    return values, tokens.gather(1, order)


def penalised(logits: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Logits (B, V), and the tokens that each line has seen -> logits after the repetition penalty; 1 changes nothing."""
    if penalty == 1.0:
        return logits
    logits = logits.clone()
    for row, tokens in zip(logits, seen, strict=True):
        there = torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=logits.device)
        values = row[there]
        row[there] = torch.where(values < 0, values * penalty, values / penalty)
    return logits


def points(choice: Choice, samples: Sequence[int], position: int) -> Tensor:
    """The random number of each line: float64 (B,). samples: which sample of its prompt a line is. position: of the token in it."""
    block, place = divmod(position, BLOCK)
    return torch.stack([_numbers(choice.seed, sample, block)[place] for sample in samples])


@lru_cache(maxsize=256)
def _numbers(seed: int, sample: int, block: int) -> Tensor:
    """Numbers [block x BLOCK, (block + 1) x BLOCK) of one sample."""
    index = torch.arange(block * BLOCK, (block + 1) * BLOCK)
    return uniform(index, key_of(seed, "sample", str(sample) if sample else ""))
