"""The plain loop: a Llama as one would write it by hand, and the step around it.

A rival that deserves the name: RMSNorm by `F.rms_norm`, torch's attention kernel, rotary tables made once, two matrices
per position half instead of four, torch's fused AdamW, gradients set to None. It knows nothing of ours; its parameters
have the names of our table, so that weights can be copied. DDP, ZeRO-1, FSDP2, DeepSpeed, DTensor and torch's pipelining
wrap this model.

Legend: B batch, S sequence, D dim, H heads of this rank, E width of a head, V vocab.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.setting import Setting, initial_weights

EPS = 1e-5
THETA = 10000.0


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions on (B, H, S, E); cosine and sine (S, E/2)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)


class Attention(nn.Module):
    """Causal self-attention of as many heads as the weights have."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.width = dim // heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        batch, sequence, _ = x.shape
        q, k, v = (part(x).view(batch, sequence, -1, self.width).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, sequence, -1))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, ffn: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(dim, ffn, bias=False), nn.Linear(dim, ffn, bias=False), nn.Linear(ffn, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and feed-forward around the residual stream."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(setting.dim, eps=EPS), nn.RMSNorm(setting.dim, eps=EPS)
        self.attention, self.mlp = Attention(setting.dim, setting.heads), Mlp(setting.dim, setting.ffn)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Tokens (B, S) -> logits (B, S, V). `blocks` and the two ends may be left out, for a stage of a pipeline."""

    def __init__(self, setting: Setting, *, blocks: range | None = None, first: bool = True, last: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(setting.vocab, setting.dim) if first else None
        kept = range(setting.layers) if blocks is None else blocks
        self.blocks = nn.ModuleDict({str(layer): Block(setting) for layer in kept})
        self.norm = nn.RMSNorm(setting.dim, eps=EPS) if last else None
        self.head = nn.Linear(setting.dim, setting.vocab, bias=False) if last else None
        width = setting.dim // setting.heads
        angle = torch.outer(torch.arange(setting.sequence).float(), THETA ** -(torch.arange(0, width, 2).float() / width))
        self.register_buffer("cosine", angle.cos(), persistent=False)  # (S, E/2)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S), or (B, S, D) in a later stage -> (B, S, V), or (B, S, D) in an earlier one."""
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x, self.cosine, self.sine)
        if self.norm is not None and self.head is not None:
            x = self.head(self.norm(x))
        return x


class WithLoss(nn.Module):
    """The model with its loss, for libraries that wrap one module: tokens and labels (B, S) -> mean loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy."""
        return loss_of(self.model(tokens), labels)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, S, V) and labels (B, S) -> the mean cross-entropy."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@torch.no_grad()
def load_initial(model: nn.Module, setting: Setting) -> None:
    """Gives a plain model, or a part of one, our initial weights."""
    held = dict(model.named_parameters())
    for name, values in initial_weights(setting):
        if name in held:
            held.pop(name).copy_(values)
    assert setting.own_weights or not held, sorted(held)


def plain_model(setting: Setting) -> Llama:
    """The whole model with our initial weights."""
    model = Llama(setting)
    load_initial(model, setting)
    return model


def decay_groups(model: nn.Module, setting: Setting) -> list[dict]:
    """Matrices take weight decay, norms do not."""
    parameters = list(model.parameters())
    decayed, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": setting.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, setting: Setting) -> torch.optim.AdamW:
    """torch's fused AdamW."""
    return torch.optim.AdamW(decay_groups(model, setting), lr=setting.lr, betas=setting.betas, fused=True)
