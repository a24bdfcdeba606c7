"""Rotary positions (arXiv:2104.09864): the frequencies of a model, and the tables that its blocks turn queries and keys by.

Models that were stretched to longer texts after pretraining have slower frequencies:

| rope_scaling | what becomes of a frequency                                                                              |
|--------------|----------------------------------------------------------------------------------------------------------|
| linear       | divided by the factor (arXiv:2306.15595)                                                                 |
| llama3       | as it is where it turns more than `high` times over the original positions, divided where fewer than     |
|              | `low` times, a mix of both in between                                                                    |
| yarn         | the same with a ramp over the features, and cosines and sines grow by 0.1 ln(factor) + 1 (arXiv:2309.00071) |

Angles are float32, as Hugging Face computes them. Legend: B batch, S sequence, E head_dim.
"""

from __future__ import annotations

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from dist_llm.config.schema import ModelConfig

Table = tuple[Tensor, Tensor]


def rotary_tables(model: ModelConfig, positions: Tensor, *, dtype: torch.dtype) -> tuple[Table, Table | None]:
    """Cosines and sines of positions (B, S), (B, S, 1, E) each; and those of windowed layers, where they turn at another speed.

    Scaling is of the layers that see everything, where the two differ.
    """
    plain = frequencies(model.head_dim, model.rope_theta, device=positions.device)
    grown = 1.0
    if model.rope_scaling != "none":
        plain, grown = scaled(plain, model)
    table = angles(positions, plain, dtype=dtype, grown=grown)
    if not model.sliding_window or model.rope_local_theta == model.rope_theta:
        return table, None
    return table, rotary_table(positions, width=model.head_dim, theta=model.rope_local_theta, dtype=dtype)


def rotary_table(positions: Tensor, *, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (B, S) -> cosines and sines (B, S, 1, E) of plain frequencies."""
    return angles(positions, frequencies(width, theta, device=positions.device), dtype=dtype)


def frequencies(width: int, theta: float, *, device: torch.device) -> Tensor:
    """How far each pair of features turns from one position to the next, (E/2,), float32."""
    exponent = torch.arange(0, width, 2, device=device, dtype=torch.int64).float() / width
    return 1.0 / (theta**exponent)


def angles(positions: Tensor, speed: Tensor, *, dtype: torch.dtype, grown: float = 1.0) -> tuple[Tensor, Tensor]:
    """positions (B, S) and frequencies (E/2,) -> cosines and sines (B, S, 1, E), `grown` times as large."""
    angle = positions[..., None, None].float() * speed  # (B, S, 1, E/2)
    angle = torch.cat((angle, angle), dim=-1)
    if grown == 1.0:
        return angle.cos().to(dtype), angle.sin().to(dtype)
    return (angle.cos() * grown).to(dtype), (angle.sin() * grown).to(dtype)


def scaled(plain: Tensor, model: ModelConfig) -> tuple[Tensor, float]:
    """Frequencies (E/2,) -> those of `model.rope_scaling`, and what cosines and sines are multiplied by."""
    if model.rope_scaling == "linear":
        return plain / model.rope_factor, 1.0
    if model.rope_scaling == "llama3":
        return _llama3(plain, model), 1.0
    return _yarn(plain, model), yarn_growth(model.rope_factor)


def yarn_growth(factor: float) -> float:
    """What sharpens attention over more tokens."""
    return 0.1 * log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(plain: Tensor, model: ModelConfig) -> Tensor:
    low, high, length = model.rope_low_freq_factor, model.rope_high_freq_factor, model.rope_original_positions
    wave = 2 * pi / plain
    slow, fast = wave > length / low, wave < length / high
    divided = torch.where(slow, plain / model.rope_factor, plain)
    part = (length / wave - low) / (high - low)
    mixed = (1 - part) * divided / model.rope_factor + part * divided
    return torch.where(~fast & ~slow, mixed, divided)


def _yarn(plain: Tensor, model: ModelConfig) -> Tensor:
    width, base, length = 2 * len(plain), model.rope_theta, model.rope_original_positions

    def feature(turns: float) -> float:
        """The feature that turns so often over the original positions."""
        return width * log(length / (turns * 2 * pi)) / (2 * log(base))

    first = max(floor(feature(model.rope_high_freq_factor)), 0)
    last = min(ceil(feature(model.rope_low_freq_factor)), width - 1)
    line = torch.arange(len(plain), dtype=torch.float32, device=plain.device)
    ramp = torch.clamp((line - first) / (last - first if last != first else 0.001), 0, 1)
    powers = base ** (torch.arange(0, width, 2, device=plain.device).float() / width)
    keep = 1 - ramp
    return 1.0 / (model.rope_factor * powers) * (1 - keep) + 1.0 / powers * keep
