"""Floating-point operations of a model, unit by unit, without torch.

A multiply-add is two operations; backward costs twice the forward. Attention scores and values are counted in full
(S x S), as PaLM does (arXiv:2204.02311, appendix B) and as is computed where there is a mask, or causally (half of it, or
what a window leaves).
"""

from __future__ import annotations

from typing import Literal

from dist_llm.config.schema import ModelConfig
from dist_llm.model.table import HALVES, half_names, is_windowed, rows_of, table, table_trained, uses

Convention = Literal["full", "causal"]


def forward_flops(model: ModelConfig, sequence: int, *, convention: Convention = "full") -> dict[str, float]:
    """FLOP of the forward pass of one token: of the embedding, the halves of blocks and the head. Looking up an embedding costs none."""
    costs = dict.fromkeys(half_names(model), 0.0)
    for layer in range(model.layers):
        for half in HALVES:
            name = f"blocks.{layer}.{half}"
            rows = (row for unit in uses(model, name) for row in rows_of(model, unit))
            costs[name] = sum(2.0 * row.numel for row in rows if len(row.shape) == 2)
        pairs = sequence if convention == "full" else _seen(model, layer, sequence)
        costs[f"blocks.{layer}.attention"] += 4.0 * pairs * model.heads * model.head_dim
    costs["head"] = 2.0 * model.vocab * model.dim
    return costs


def _seen(model: ModelConfig, layer: int, sequence: int) -> float:
    """Tokens that one sees on the mean: half of the sequence, fewer where the layer has a window."""
    window = model.sliding_window
    if not is_windowed(model, layer) or window >= sequence:
        return sequence / 2
    return window - window**2 / (2 * sequence)


def step_flops_per_token(model: ModelConfig, sequence: int, *, convention: Convention = "full") -> float:
    """FLOP of forward and backward of one token: three times the forward; recomputation is not counted (model FLOPs).

    Weights that are not trained have no gradient: their products come twice.
    """
    still = sum(2.0 * row.numel for row in table(model) if not row.trained and len(row.shape) == 2 and row.unit.startswith("blocks."))
    still += 0.0 if table_trained(model, "head") else 2.0 * model.vocab * model.dim
    return 3.0 * sum(forward_flops(model, sequence, convention=convention).values()) - still
