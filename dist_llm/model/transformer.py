"""A decoder-only transformer as plain single-device code: it has never heard of ranks.

RMSNorm (arXiv:1910.07467) or LayerNorm, before or after a half of a block or both; rotary (arXiv:2104.09864) or learned
positions; grouped-query attention (arXiv:2305.13245), in all or some layers to a window (arXiv:2004.05150); gated
(arXiv:2002.05202) or plain feed-forward; optional q and k norms, capped scores and logits, biases, tied embeddings, dropout.
Head counts come from the shapes of the weights, positions are inputs, and the loss is a summed cross-entropy: the
strategies change shapes, `roles` and `attend`, never this file.

Legend: B batch, S sequence, D dim, H query heads, K key and value heads, E head_dim, F ffn, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.presets import GATED
from dist_llm.config.schema import ModelConfig
from dist_llm.model.attention import attend
from dist_llm.model.kernels import RotateInPlace, rotated
from dist_llm.model.parts import Draw, Make, Norm, Projection, Projections
from dist_llm.model.preference import Pairs
from dist_llm.model.roles import Roles
from dist_llm.model.rotary import rotary_table as rotary_table
from dist_llm.model.rotary import rotary_tables
from dist_llm.model.table import HALVES, is_windowed
from dist_llm.random import halves, key_of, place_of


@dataclass(frozen=True)
class Context:
    """What the units of one micro-batch share; made by `make_context`."""

    tokens: Tensor  # (B, S)
    labels: Tensor  # (B, S), below 0 where no loss is taken
    positions: Tensor  # (B, S), or (1, S) where all sequences count alike
    mask: Tensor | None  # (B, 1, S, S), added to the scores: 0 where a query may look, else -inf; None: plain causal
    places: Tensor  # (B, S) number of each token in the global batch: the address of its dropout masks
    rotary: tuple[Tensor, Tensor] | None  # cosines and sines, (B or 1, S, 1, E)
    key: Tensor | None  # (2,) the halves of the key of this step's random numbers; None: nothing is dropped and nothing is noisy
    training: bool
    weights: Tensor | None = None  # (B, S) what the loss of each token counts; None: 1
    local_mask: Tensor | None = None  # (B or 1, 1, S, S) of windowed layers; None: the window holds all, `mask` serves
    local_rotary: tuple[Tensor, Tensor] | None = None  # of windowed layers; None: as `rotary`
    noise: Tensor | None = None  # (B, S) the largest noise that an embedded token gets, float64 (NEFTune, arXiv:2310.05914)
    pairs: Pairs | None = None  # what the loss makes of the tokens instead of their sum

    @property
    def draw(self) -> Draw | None:
        """The address of random numbers inside blocks, of all tokens; None: nothing is drawn."""
        return None if self.key is None else Draw(self.places, self.key)

    @property
    def loss_shape(self) -> tuple[int, ...]:
        """Of what the head leaves: a number, or for pairs several of which the first is the loss."""
        return () if self.pairs is None else (self.pairs.size,)


def make_context(
    model: ModelConfig,
    tokens: Tensor,
    labels: Tensor,
    *,
    dtype: torch.dtype,
    positions: Tensor | None = None,
    documents: Tensor | None = None,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    samples: Tensor | None = None,
    pairs: Pairs | None = None,
    seed: int = 0,
    step: int = 0,
    training: bool = True,
) -> Context:
    """The context of tokens and labels (B, S).

    positions (B, S): default 0..S-1 in every sequence. documents (B, S): attention stays inside a document. rows (B,):
    place of each sequence in the global batch; with seed and step they address the dropout masks. weights (B, S), floats:
    what each token's loss counts. samples (B, S): number of the sample that a token belongs to, for NEFTune; None: a row is one.
    pairs: what is made of the losses instead of their sum.
    """
    (batch, length), device = tokens.shape, tokens.device
    line = torch.arange(length, device=device)
    positions = line[None] if positions is None else positions
    rows = torch.arange(batch, device=device) if rows is None else rows
    mask = None if documents is None else _mask(length, length, documents, dtype=dtype, device=device)
    narrow = 0 < model.sliding_window < length
    local_mask = _mask(length, model.sliding_window, documents, dtype=dtype, device=device) if narrow else None
    rotary = model.positions == "rotary"
    tables = rotary_tables(model, positions, dtype=dtype) if rotary else (None, None)
    draws = training and bool(model.dropout or model.adapter.dropout or model.neftune)
    key = torch.tensor(halves(key_of(seed, "dropout", step=step)), device=device) if draws else None
    noise = _noise(model, tokens if samples is None else samples, one=samples is None) if training and model.neftune else None
    places = rows[:, None] * length + line
    return Context(tokens, labels, positions, mask, places, tables[0], key, training, weights, local_mask, tables[1], noise, pairs)


def _noise(model: ModelConfig, samples: Tensor, *, one: bool) -> Tensor:
    """alpha / sqrt(L D) of each token (B, S), float64: L tokens in its sample, numbers of which are `samples`. one: a row is a sample."""
    members = torch.zeros_like(samples) if one else samples
    count = members.new_zeros(len(members), members.shape[1] + 1).scatter_add_(1, members, torch.ones_like(members))
    return count.gather(1, members).double().mul_(model.dim).rsqrt_().mul_(model.neftune)


def _mask(length: int, window: int, documents: Tensor | None, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B or 1, 1, S, S): 0 where a token looks, at most window - 1 tokens back and inside its document, else -inf.

    As numbers: of a boolean mask attention would make these in every block, and keep them.
    """
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window < length:
        seen = seen.triu(1 - window)
    if documents is None:
        seen = seen[None, None]
    else:
        seen = (documents[:, None, :, None] == documents[:, None, None, :]) & seen
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


class Dropout:
    """Dropout with an addressed mask: the same elements are dropped under every layout."""

    def __init__(self, name: str, rate: float, roles: Roles, device: torch.device | None = None) -> None:
        self.place, self.rate, self.roles = place_of("dropout", name, device=device) if rate else None, rate, roles

    def __call__(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, D) -> (B, S, D), S the tokens kept outside split regions."""
        if context.key is None or self.place is None:
            return x
        width, here = x.shape[-1], Draw(self.roles.outside(context.places), context.key)
        keep = here.keep(self.place, torch.arange(width, device=x.device), width=width, drop=self.rate)
        return x * keep / (1.0 - self.rate)


class Attention(nn.Module):
    """Grouped-query self-attention over the heads whose weights are here."""

    def __init__(self, make: Make, name: str, model: ModelConfig, roles: Roles, *, windowed: bool) -> None:
        super().__init__()
        wide = model.heads * model.head_dim
        widths = {"q": model.dim, "k": model.dim, "v": model.dim, "o": wide}
        made = (Projection(make, f"{name}.{part}", adapter=model.adapter, width=width) for part, width in widths.items())
        self.q, self.k, self.v, self.o = made
        self.qkv = Projections(self.q, self.k, self.v)
        norm: dict[str, Any] = {"kind": "unit_rms" if model.norm == "unit_rms" else "rms", "eps": model.norm_eps}
        self.q_norm = Norm(make, f"{name}.q_norm", **norm) if model.qk_norm else None
        self.k_norm = Norm(make, f"{name}.k_norm", **norm) if model.qk_norm else None
        self.across_heads = model.qk_norm and model.qk_norm_over == "all"
        self.window = model.sliding_window if windowed else 0
        self.scale = None if model.query_scale == model.head_dim else model.query_scale**-0.5
        self.head_dim, self.softcap, self.roles = model.head_dim, model.attention_softcap, roles
        self.attend: Callable[..., Tensor] = attend

    def forward(self, x: Tensor, norm: Norm, context: Context) -> Tensor:
        """(B, S, D), to be normed first -> (B, S, D)."""
        q, k, v = self.roles.columns(x, norm, self.qkv, context.draw)  # (B, S, H E), (B, S, K E) twice
        if self.across_heads:
            assert self.q_norm is not None and self.k_norm is not None
            q, k = self.roles.across([q, k], [self.q_norm, self.k_norm])
        rotary, mask = context.rotary, context.mask
        if self.window:
            rotary = context.rotary if context.local_rotary is None else context.local_rotary
            mask = context.mask if context.local_mask is None else context.local_mask
        q, k = self._placed(q, self.q_norm, rotary), self._placed(k, self.k_norm, rotary)
        q, k, v = (self._heads(y).transpose(1, 2) for y in (q, k, v))  # (B, H or K, S, E)
        y = self.attend(q, k, v, mask, self.scale, self.softcap)
        return self.roles.row([y.transpose(1, 2).flatten(2)], "none", self.o, context.draw)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, S, H E) or (B, S, H, E) -> (B, S, H, E)."""
        return x.view(*x.shape[:2], -1, self.head_dim)

    def _placed(self, x: Tensor, norm: Norm | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries or keys (B, S, H E), each head normed where the model does so, and turned to its position."""
        if norm is not None and not self.across_heads:
            x = norm(self._heads(x))
        if rotary is None:
            return x
        if not self.roles.in_place:
            return rotated(self._heads(x), *rotary)
        return RotateInPlace.apply(x, *rotary)


class Mlp(nn.Module):
    """The feed-forward: gate and up, or up alone."""

    def __init__(self, make: Make, name: str, model: ModelConfig, roles: Roles) -> None:
        super().__init__()
        given: dict[str, Any] = {"adapter": model.adapter, "width": model.dim}
        self.gate = Projection(make, f"{name}.gate", **given) if model.activation in GATED else None
        self.up = Projection(make, f"{name}.up", **given)
        self.down = Projection(make, f"{name}.down", adapter=model.adapter, width=model.ffn)
        self.wide = Projections(self.up) if self.gate is None else Projections(self.gate, self.up)
        self.activation, self.roles = model.activation, roles

    def forward(self, x: Tensor, norm: Norm, draw: Draw | None) -> Tensor:
        """(B, S, D), to be normed first -> (B, S, D)."""
        parts = self.roles.columns(x, norm, self.wide, draw, any_order=True)  # (B, S, F) each
        return self.roles.row(parts, self.activation, self.down, draw, any_order=True)


class Embedding(nn.Module):
    """The first unit: tokens to vectors, with learned positions where the model has them."""

    def __init__(self, make: Make, model: ModelConfig, roles: Roles) -> None:
        super().__init__()
        self.embedding, self.positions = Projection(make, "embedding"), Projection(make, "positions")
        device = self.embedding.weight.device
        self.roles, self.dropout = roles, Dropout("embedding", model.dropout, roles, device)
        self.noise = place_of("noise", device=device) if model.neftune else None
        # Rounded as the weights are: so were the published models trained.
        self.scale = float(torch.tensor(model.dim**0.5, dtype=self.embedding.weight.dtype)) if model.embedding_scale else None

    def forward(self, context: Context) -> Tensor:
        """The context's tokens (B, S) -> (B, S, D)."""
        x = self.roles.embed(context.tokens, self.embedding.weight)
        if context.noise is not None and context.key is not None and self.noise is not None:
            here, most = Draw(self.roles.outside(context.places), context.key), self.roles.outside(context.noise)
            x = x + here.spread(self.noise, x.shape[-1]).mul_(most[..., None]).to(x.dtype)
        if self.scale is not None:
            x = x * self.scale
        if self.positions.weight is not None:
            x = x + F.embedding(self.roles.outside(context.positions), self.positions.weight)  # (B or 1, S, D)
        return self.dropout(x, context)


class Block(nn.Module):
    """A middle unit: attention and feed-forward, each with its norms and around the residual stream.

    halves: what is here; where a stage of a pipeline ends inside a block, each half is a unit of its own.
    """

    def __init__(self, make: Make, layer: int, model: ModelConfig, roles: Roles, *, halves: Sequence[str] = HALVES) -> None:
        super().__init__()
        name, self.halves = f"blocks.{layer}", tuple(halves)
        norm: dict[str, Any] = {"kind": model.norm, "eps": model.norm_eps}
        if "attention" in halves:
            self.attention_norm = Norm(make, f"{name}.attention_norm", **norm)
            self.attention_post_norm = Norm(make, f"{name}.attention_post_norm", **norm)
            self.attention = Attention(make, f"{name}.attention", model, roles, windowed=is_windowed(model, layer))
            self.drop_attention = Dropout(f"{name}.attention", model.dropout, roles, self.attention.q.weight.device)
        if "mlp" in halves:
            self.mlp_norm, self.mlp_post_norm = Norm(make, f"{name}.mlp_norm", **norm), Norm(make, f"{name}.mlp_post_norm", **norm)
            self.mlp = Mlp(make, f"{name}.mlp", model, roles)
            self.drop_mlp = Dropout(f"{name}.mlp", model.dropout, roles, self.mlp.up.weight.device)
        self.run_mlp: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda run, x: run(x)  # a seam for recomputation

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        if "attention" in self.halves:
            x = x + self.drop_attention(self.attention_post_norm(self.attention(x, self.attention_norm, context)), context)
        if "mlp" in self.halves:
            draw = context.draw
            x = x + self.drop_mlp(self.run_mlp(lambda x: self.mlp_post_norm(self.mlp(x, self.mlp_norm, draw)), x), context)
        return x


class Head(nn.Module):
    """The last unit: norm, output projection and loss. With tied weights `head` is the embedding's table."""

    def __init__(self, make: Make, model: ModelConfig, roles: Roles) -> None:
        super().__init__()
        self.norm = Norm(make, "norm", kind=model.norm, eps=model.norm_eps)
        self.head = Projection(make, "embedding" if model.tied else "head")
        self.roles, self.softcap = roles, model.logit_softcap

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, D) -> the summed cross-entropy over the context's labels, each times its weight, float64; or what pairs make of it."""
        rules: dict[str, Any] = {"weights": context.weights, "pairs": context.pairs, "softcap": self.softcap, "smooth": context.training}
        return self.roles.loss(x, self.norm, self.head.weight, context.labels, **rules)

    def logits(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V)."""
        logits = self.roles.logits(self.norm(x), self.head.weight)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def build_unit(name: str, model: ModelConfig, make: Make, roles: Roles) -> Embedding | Block | Head:
    """The module of one unit of the walk ("embedding", "blocks.3" or half of it, "blocks.3.mlp", "head"); `make` gives its parameters."""
    if name == "embedding":
        return Embedding(make, model, roles)
    if name == "head":
        return Head(make, model, roles)
    _, layer, *half = name.split(".")
    return Block(make, int(layer), model, roles, halves=half or HALVES)
