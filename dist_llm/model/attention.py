"""Attention over the heads that are here: torch's kernels where they can say it, written out where scores are capped.

Legend: B batch, S queries, T keys, H query heads, K key and value heads, G = H / K, E head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_llm.model.kernels import wide


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None, softcap: float = 0.0) -> Tensor:
    """Causal attention: q (B, H, S, E), k and v (B, K, S, E), H a multiple of K -> (B, H, S, E).

    mask (B or 1, 1, S, S) is added to the scores, None: plain causal. scale: of the scores, None: 1 / sqrt(E). softcap c:
    scores become c tanh(scores / c), 0: they do not.
    """
    if softcap:
        causal = torch.full((q.shape[2],) * 2, float("-inf"), dtype=q.dtype, device=q.device).triu(1) if mask is None else mask
        return capped(q, k, v, causal, scale, softcap)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # There CUDA's fast kernels do not know grouped queries, and the slow one would write out all scores.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        groups = 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1)


def look_back(q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float) -> Tensor:
    """The newest token alone looks at all keys that are given: q (B, H, 1, E), k and v (B, K, T, E) -> (B, H, 1, E)."""
    if softcap:
        return capped(q, k, v, None, scale, softcap)
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float) -> Tensor:
    """As `attend`, T keys, with all scores written out: no kernel of torch caps them. The softmax is float32 at least.

    Keeps two tensors of (B, H, S, T) for backward.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grouped = q.unflatten(1, (k.shape[1], -1))  # (B, K, G, S, E)
    scores = softcap * torch.tanh(grouped @ k[:, :, None].transpose(-1, -2) * scale / softcap)  # (B, K, G, S, T)
    if mask is not None:
        scores = scores + mask[..., None, :, :]
    weights = torch.softmax(scores, dim=-1, dtype=wide(q.dtype)).to(q.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)
