"""The keys and values of the tokens that a model has read, in memory that is made once.

Lines of different length lie side by side, each from place 0 on: there is no padding on the left, so that a token's
place is its position. What lies behind a line's length is rubbish: masks keep every query from it, and the next token
overwrites it.

Legend: B lines, H query heads, K key and value heads of this rank, G = H / K, S new tokens, T tokens looked at, E head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_llm.model.attention import attend, capped


class Cache:
    """Room for `capacity` tokens on each of some lines, in each layer of a model. lengths: how many are there, by line."""

    def __init__(
        self, *, layers: int, lines: int, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.lengths = [0] * lines
        shape = (lines, kv_heads, capacity, head_dim)
        self.keys, self.values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)] for _ in "kv")

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def keep(self, lines: Sequence[int]) -> None:
        """Lets other lines go; a line that is named n times is there n times."""
        self.lengths = [self.lengths[line] for line in lines]
        chosen = torch.tensor(list(lines), device=self.keys[0].device)
        for held in (self.keys, self.values):
            for layer, tensor in enumerate(held):
                held[layer] = tensor.index_select(0, chosen)

    def put(self, lines: Sequence[int], other: Cache) -> None:
        """Takes the lines of another cache in the place of some of its own."""
        longest, chosen = max(other.lengths), torch.tensor(list(lines), device=self.keys[0].device)
        for held, taken in ((self.keys, other.keys), (self.values, other.values)):
            for mine, theirs in zip(held, taken, strict=True):
                mine[chosen, :, :longest] = theirs[:, :, :longest]
        for line, length in zip(lines, other.lengths, strict=True):
            self.lengths[line] = length


class Pass:
    """One reading of S more tokens on every line of a cache: where they go, and what each of them may look at."""

    def __init__(self, cache: Cache, sizes: Sequence[int]) -> None:
        starts, self.cache, self.size = cache.lengths, cache, max(sizes)
        self.first, self.even = max(starts) == 0, len(set(starts)) == 1
        self.start, self.total = starts[0], max(starts) + self.size
        assert max(start + size for start, size in zip(starts, sizes, strict=True)) <= cache.capacity, (starts, sizes, cache.capacity)
        assert self.even or self.size == 1, "lines of different length go on by one token at a time"
        device = cache.keys[0].device
        own = torch.arange(self.size, device=device)
        self.positions = (torch.tensor(starts, device=device)[:, None] + own)[: 1 if self.even else None]  # (B or 1, S)
        self.lines = torch.arange(len(starts), device=device)[:, None, None]

    def mask(self, dtype: torch.dtype, *, window: int = 0) -> Tensor | None:
        """What is added to the scores of a later pass, (B or 1, 1, S, T); None: all tokens are looked at.

        window: tokens that a token sees, itself included; 0: all before it.
        """
        narrow = 0 < window < self.total
        if self.even and self.size == 1 and not narrow:
            return None
        places, own = torch.arange(self.total, device=self.positions.device), self.positions[:, None, :, None]
        hidden = places > own  # (B or 1, 1, S, T)
        if narrow:
            hidden = hidden | (places <= own - window)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps keys and values (B, K, S, E) of the new tokens -> those of all tokens, (B, K, T, E) each."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.even:
            keys[:, :, self.start : self.total], values[:, :, self.start : self.total] = k, v
        else:
            heads = torch.arange(keys.shape[1], device=keys.device)[None, :, None]
            place = (self.lines, heads, self.positions[:, None, :])
            keys[place], values[place] = k, v
        return keys[:, :, : self.total], values[:, :, : self.total]


class Kept:
    """The attention of one layer while a model makes text: over what its cache holds."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.reading: Pass | None = None  # None: plain attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None, softcap: float = 0.0) -> Tensor:
        """q (B, H, S, E), k and v (B, K, S, E) -> (B, H, S, E). mask: of the first pass as in training, then that of the Pass."""
        if self.reading is None:
            return attend(q, k, v, mask, scale, softcap)
        keys, values = self.reading.store(self.layer, k, v)
        if self.reading.first:
            return attend(q, k, v, mask, scale, softcap)
        if softcap:
            return capped(q, keys, values, mask, scale, softcap)
        return attend_grouped(q, keys, values, mask, scale)


def attend_grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention without a triangle: q (B, H, S, E), k and v (B, K, T, E), mask (B or 1, 1, S, T) -> (B, H, S, E).

    The G query heads of a key head become G x S queries of it: every fast kernel knows that, with a mask too.
    """
    lines, _, size, width = q.shape
    heads = k.shape[1]
    groups = q.shape[1] // heads
    if mask is not None and groups > 1 and size > 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(q.reshape(lines, heads, groups * size, width), k, v, attn_mask=mask, scale=scale)
    return out.view(lines, heads * groups, size, width)
