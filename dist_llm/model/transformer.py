"""A decoder-only transformer as plain single-device code: it has never heard of ranks.

RMSNorm (arXiv:1910.07467) or LayerNorm, rotary (arXiv:2104.09864) or learned positions, grouped-query attention
(arXiv:2305.13245), SwiGLU (arXiv:2002.05202) or GELU, optional q and k norms, biases, tied embeddings, dropout.
Head counts come from the shapes of the weights, positions are inputs, and the loss is a summed cross-entropy: the
strategies change shapes, `roles` and `attend`, never this file.

Legend: B batch, S sequence, D dim, H query heads, K key and value heads, E head_dim, F ffn, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.schema import ModelConfig
from dist_llm.model.kernels import RotateInPlace, rotated
from dist_llm.model.parts import Make, Norm, Projection, Projections
from dist_llm.model.roles import Roles
from dist_llm.random import halves, keep_mask, key_of


@dataclass(frozen=True)
class Context:
    """What the units of one micro-batch share; made by `make_context`."""

    tokens: Tensor  # (B, S)
    labels: Tensor  # (B, S), below 0 where no loss is taken
    positions: Tensor  # (B, S), or (1, S) where all sequences count alike
    mask: Tensor | None  # (B, 1, S, S), added to the scores: 0 where a query may look, else -inf; None: plain causal
    places: Tensor  # (B, S) number of each token in the global batch: the address of its dropout masks
    rotary: tuple[Tensor, Tensor] | None  # cosines and sines, (B or 1, S, 1, E)
    dropout: Tensor | None  # (2,) the halves of the key of this step's masks; None: nothing is dropped
    training: bool
    weights: Tensor | None = None  # (B, S) what the loss of each token counts; None: 1


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
    seed: int = 0,
    step: int = 0,
    training: bool = True,
) -> Context:
    """The context of tokens and labels (B, S).

    positions (B, S): default 0..S-1 in every sequence. documents (B, S): attention stays inside a document. rows (B,):
    place of each sequence in the global batch; with seed and step they address the dropout masks. weights (B, S), floats:
    what each token's loss counts.
    """
    (batch, length), device = tokens.shape, tokens.device
    line = torch.arange(length, device=device)
    positions = line[None] if positions is None else positions
    rows = torch.arange(batch, device=device) if rows is None else rows
    mask = None
    if documents is not None:  # as numbers: of a boolean mask attention would make these in every block, and keep them
        same = documents[:, None, :, None] == documents[:, None, None, :]
        seen = same & torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    rotary = model.positions == "rotary"
    table = rotary_table(positions, width=model.head_dim, theta=model.rope_theta, dtype=dtype) if rotary else None
    drops = bool(model.dropout) and training
    key = torch.tensor(halves(key_of(seed, "dropout", step=step)), device=device) if drops else None
    return Context(tokens, labels, positions, mask, rows[:, None] * length + line, table, key, training, weights)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention: q (B, H, S, E), k and v (B, K, S, E), H a multiple of K -> (B, H, S, E)."""
    groups = q.shape[1] // k.shape[1]
    if mask is not None and groups > 1 and q.is_cuda:
        # With a mask CUDA's fast kernels do not know grouped queries, and the slow one would write out all scores.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        groups = 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=groups > 1)


def rotary_table(positions: Tensor, *, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (B, S) -> cosines and sines (B, S, 1, E), angles in float32 as Hugging Face computes them."""
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.int64).float() / width
    angle = positions[..., None, None].float() * (1.0 / (theta**exponent))  # (B, S, 1, E/2)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


class Dropout:
    """Dropout with an addressed mask: the same elements are dropped under every layout."""

    def __init__(self, name: str, rate: float, roles: Roles) -> None:
        self.name, self.rate, self.roles = halves(key_of(0, "dropout", name)), rate, roles

    def __call__(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, D) -> (B, S, D), S the tokens kept outside split regions."""
        if context.dropout is None:
            return x
        place = self.roles.outside(context.places)[..., None] * x.shape[-1] + torch.arange(x.shape[-1], device=x.device)
        keep = keep_mask(place, context.dropout, self.name, drop=self.rate)
        return x * keep / (1.0 - self.rate)


class Attention(nn.Module):
    """Grouped-query self-attention over the heads whose weights are here."""

    def __init__(self, make: Make, name: str, model: ModelConfig, roles: Roles) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Projection(make, f"{name}.{part}") for part in "qkvo")
        self.qkv = Projections(self.q, self.k, self.v)
        norm: dict[str, Any] = {"kind": "rms", "eps": model.norm_eps}
        self.q_norm = Norm(make, f"{name}.q_norm", **norm) if model.qk_norm else None
        self.k_norm = Norm(make, f"{name}.k_norm", **norm) if model.qk_norm else None
        self.head_dim, self.roles, self.attend = model.head_dim, roles, attend

    def forward(self, x: Tensor, norm: Norm, context: Context) -> Tensor:
        """(B, S, D), to be normed first -> (B, S, D)."""
        q, k, v = self.roles.columns(x, norm, self.qkv)  # (B, S, H E), (B, S, K E) twice
        q, k = self._placed(q, self.q_norm, context), self._placed(k, self.k_norm, context)
        q, k, v = (self._heads(y).transpose(1, 2) for y in (q, k, v))  # (B, H or K, S, E)
        y = self.attend(q, k, v, context.mask)
        return self.roles.row([y.transpose(1, 2).flatten(2)], "none", self.o.weight, self.o.bias)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, S, H E) or (B, S, H, E) -> (B, S, H, E)."""
        return x.view(*x.shape[:2], -1, self.head_dim)

    def _placed(self, x: Tensor, norm: Norm | None, context: Context) -> Tensor:
        """Queries or keys (B, S, H E), each head normed where the model does so, and turned to its position."""
        if norm is not None:
            x = norm(self._heads(x))
        if context.rotary is None:
            return x
        if not self.roles.in_place:
            return rotated(self._heads(x), *context.rotary)
        return RotateInPlace.apply(x, *context.rotary)


class Mlp(nn.Module):
    """The feed-forward: SwiGLU with gate and up, or GELU with up alone."""

    def __init__(self, make: Make, name: str, model: ModelConfig, roles: Roles) -> None:
        super().__init__()
        self.gate = Projection(make, f"{name}.gate") if model.activation == "swiglu" else None
        self.up, self.down = Projection(make, f"{name}.up"), Projection(make, f"{name}.down")
        self.wide = Projections(self.up) if self.gate is None else Projections(self.gate, self.up)
        self.activation, self.roles = model.activation, roles

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        """(B, S, D), to be normed first -> (B, S, D)."""
        parts = self.roles.columns(x, norm, self.wide)  # (B, S, F) each
        return self.roles.row(parts, self.activation, self.down.weight, self.down.bias)


class Embedding(nn.Module):
    """The first unit: tokens to vectors, with learned positions where the model has them."""

    def __init__(self, make: Make, model: ModelConfig, roles: Roles) -> None:
        super().__init__()
        self.embedding, self.positions = Projection(make, "embedding"), Projection(make, "positions")
        self.roles, self.dropout = roles, Dropout("embedding", model.dropout, roles)

    def forward(self, context: Context) -> Tensor:
        """The context's tokens (B, S) -> (B, S, D)."""
        x = self.roles.embed(context.tokens, self.embedding.weight)
        if self.positions.weight is not None:
            x = x + F.embedding(self.roles.outside(context.positions), self.positions.weight)  # (B or 1, S, D)
        return self.dropout(x, context)


class Block(nn.Module):
    """A middle unit: attention and feed-forward, each behind its norm and around the residual stream."""

    def __init__(self, make: Make, layer: int, model: ModelConfig, roles: Roles) -> None:
        super().__init__()
        name = f"blocks.{layer}"
        norm: dict[str, Any] = {"kind": model.norm, "eps": model.norm_eps}
        self.attention_norm, self.mlp_norm = Norm(make, f"{name}.attention_norm", **norm), Norm(make, f"{name}.mlp_norm", **norm)
        self.attention, self.mlp = Attention(make, f"{name}.attention", model, roles), Mlp(make, f"{name}.mlp", model, roles)
        self.drop_attention = Dropout(f"{name}.attention", model.dropout, roles)
        self.drop_mlp = Dropout(f"{name}.mlp", model.dropout, roles)
        self.run_mlp: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = lambda run, x: run(x)  # a seam for recomputation

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.drop_attention(self.attention(x, self.attention_norm, context), context)
        return x + self.drop_mlp(self.run_mlp(lambda x: self.mlp(x, self.mlp_norm), x), context)


class Head(nn.Module):
    """The last unit: norm, output projection and loss. With tied weights `head` is the embedding's table."""

    def __init__(self, make: Make, model: ModelConfig, roles: Roles) -> None:
        super().__init__()
        self.norm = Norm(make, "norm", kind=model.norm, eps=model.norm_eps)
        self.head = Projection(make, "embedding" if model.tied else "head")
        self.roles = roles

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, S, D) -> the summed cross-entropy over the context's labels, each times its weight, a float64 scalar."""
        return self.roles.loss(x, self.norm, self.head.weight, context.labels, weights=context.weights, smooth=context.training)

    def logits(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, V)."""
        return self.roles.logits(self.norm(x), self.head.weight)


def build_unit(name: str, model: ModelConfig, make: Make, roles: Roles) -> Embedding | Block | Head:
    """The module of one unit of the walk ("embedding", "blocks.3", "head"); `make` gives its parameters."""
    if name == "embedding":
        return Embedding(make, model, roles)
    if name == "head":
        return Head(make, model, roles)
    return Block(make, int(name.removeprefix("blocks.")), model, roles)
