"""Families and published models: the values a model takes where the config names none.

A family fixes the shape of a block; a preset fixes every number of a published model. A preset's numbers give that model's
exact parameter count. Rotary scaling that some of them received after pretraining is left out: these are for training from the start.
"""

from __future__ import annotations

from typing import Any

_ROTARY = {"positions": "rotary", "rope_theta": 10000.0, "norm": "rms", "activation": "swiglu"}
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_ROTARY, **_NO_BIAS, "norm_eps": 1e-5, "qk_norm": False, "tied": False},
    "mistral": {**_ROTARY, **_NO_BIAS, "norm_eps": 1e-5, "qk_norm": False, "tied": False},
    "qwen2": {**_ROTARY, **_NO_BIAS, "norm_eps": 1e-6, "qk_norm": False, "tied": False, "qkv_bias": True, "rope_theta": 1e6},
    "qwen3": {**_ROTARY, **_NO_BIAS, "norm_eps": 1e-6, "qk_norm": True, "tied": False, "rope_theta": 1e6},
    "gpt2": {
        "norm": "layer",
        "norm_eps": 1e-5,
        "positions": "learned",
        "rope_theta": 10000.0,
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "tied": True,
    },
    "custom": {**_ROTARY, **_NO_BIAS, "norm_eps": 1e-5, "qk_norm": False, "tied": False},
}

_LLAMA3 = {"family": "llama", "kv_heads": 8, "head_dim": 128, "vocab": 128256, "rope_theta": 500000.0}
_QWEN3 = {"family": "qwen3", "kv_heads": 8, "head_dim": 128, "vocab": 151936}

PRESETS: dict[str, dict[str, Any]] = {
    # Radford et al. 2019; the small model as released
    "gpt2-124m": {"family": "gpt2", "layers": 12, "dim": 768, "heads": 12, "ffn": 3072, "vocab": 50257, "max_positions": 1024},
    # Llama 3.2 1B and Llama 3 (arXiv 2407.21783)
    "llama-1b": {**_LLAMA3, "layers": 16, "dim": 2048, "heads": 32, "head_dim": 64, "ffn": 8192, "tied": True},
    "llama3-8b": {**_LLAMA3, "layers": 32, "dim": 4096, "heads": 32, "ffn": 14336},
    "llama3-70b": {**_LLAMA3, "layers": 80, "dim": 8192, "heads": 64, "ffn": 28672},
    "llama3-405b": {**_LLAMA3, "layers": 126, "dim": 16384, "heads": 128, "ffn": 53248},
    # Qwen3 (arXiv 2505.09388)
    "qwen3-0.6b": {**_QWEN3, "layers": 28, "dim": 1024, "heads": 16, "ffn": 3072, "tied": True},
    "qwen3-8b": {**_QWEN3, "layers": 36, "dim": 4096, "heads": 32, "ffn": 12288},
}

# What a model without preset starts from: small enough to train on a laptop.
SMALL: dict[str, Any] = {"layers": 4, "dim": 128, "heads": 4, "vocab": 2048, "max_positions": 1024}

# Equal in every family.
COMMON: dict[str, Any] = {"dropout": 0.0, "init_std": 0.02, "residual_scale": True}


def fill_model(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Every field of a model that gives only `given`, and where each added value comes from.

    Returns `(values, origins)`; origins hold only the names that `given` lacks: `preset llama3-8b`, `family gpt2`, `default`,
    or the rule of a derived value such as `= heads`. Values in `given` are not judged here, wrong types pass through.
    """
    given = dict(given)
    preset = given.get("preset")
    published = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    family = given.get("family", published.get("family", "llama"))
    values: dict[str, Any] = {"preset": None, "family": family, **SMALL, **COMMON}
    origins = dict.fromkeys(values, "default")
    shape = FAMILIES.get(family, FAMILIES["llama"]) if isinstance(family, str) else FAMILIES["llama"]
    for source, name in ((shape, f"family {family}"), (published, f"preset {preset}")):
        values.update(source)
        origins.update(dict.fromkeys(source, name))
    if "bias" in given:
        spread = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), given.pop("bias"))
        values.update(spread)
        origins.update(dict.fromkeys(spread, "= bias"))
    values.update(given)
    for name, (value, rule) in _derived(values).items():
        if name not in values:
            values[name], origins[name] = value, rule
    return values, {name: origin for name, origin in origins.items() if name not in given}


def _derived(values: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Values that follow from others. A wrong type counts as 1 here: it is reported where it was written, once."""
    dim, heads = (values[key] if type(values[key]) is int and values[key] > 0 else 1 for key in ("dim", "heads"))
    gated = values["activation"] == "swiglu"
    ffn = (-(-8 * dim // 3) + 7) // 8 * 8 if gated else 4 * dim
    return {
        "kv_heads": (heads, "= heads"),
        "head_dim": (max(dim // heads, 1), "= dim / heads"),
        "ffn": (ffn, "= 8/3 dim, rounded up to a multiple of 8" if gated else "= 4 dim"),
    }
