"""Families and published models: the values a model takes where the config names none.

A family fixes the shape of a block; a preset fixes every number of a published model. A preset's numbers give that model's
exact parameter count. Rotary scaling that some of them received after pretraining is left out: these are for training from the start.
"""

from __future__ import annotations

from typing import Any

_ROTARY = {"positions": "rotary", "rope_theta": 10000.0, "norm": "rms", "activation": "swiglu"}
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}

_GEMMA: dict[str, Any] = {
    **_ROTARY,
    **_NO_BIAS,
    "norm": "unit_rms",
    "norm_eps": 1e-6,
    "norm_place": "both",
    "activation": "geglu_tanh",
    "embedding_scale": True,
    "tied": True,
}
GATED = ("swiglu", "geglu_tanh")  # activations with a gate beside them

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_ROTARY, **_NO_BIAS, "norm_eps": 1e-5, "qk_norm": False, "tied": False},
    "mistral": {**_ROTARY, **_NO_BIAS, "norm_eps": 1e-5, "qk_norm": False, "tied": False, "sliding_window": 4096},
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
    "olmo2": {**_ROTARY, **_NO_BIAS, "norm_eps": 1e-6, "norm_place": "after", "qk_norm": True, "qk_norm_over": "all", "tied": False},
    "gemma2": {**_GEMMA, "qk_norm": False, "attention_softcap": 50.0, "logit_softcap": 30.0, "sliding_window": 4096, "full_every": 2},
    "gemma3": {**_GEMMA, "qk_norm": True, "rope_theta": 1e6, "rope_local_theta": 10000.0, "sliding_window": 512, "full_every": 6},
    "custom": {**_ROTARY, **_NO_BIAS, "norm_eps": 1e-5, "qk_norm": False, "tied": False},
}

_LLAMA3 = {"family": "llama", "kv_heads": 8, "head_dim": 128, "vocab": 128256, "rope_theta": 500000.0}
_QWEN2 = {"family": "qwen2", "vocab": 151936}
_GEMMA2 = {"family": "gemma2", "vocab": 256000, "head_dim": 256}
_GEMMA3 = {"family": "gemma3", "vocab": 262144, "head_dim": 256}
_SMOLLM2 = {"family": "llama", "vocab": 49152, "rope_theta": 100000.0, "tied": True}
_OLMO2 = {"family": "olmo2", "vocab": 100352, "rope_theta": 500000.0}
_QWEN3 = {"family": "qwen3", "kv_heads": 8, "head_dim": 128, "vocab": 151936}

PRESETS: dict[str, dict[str, Any]] = {
    # Radford et al. 2019; the small model as released
    "gpt2-124m": {"family": "gpt2", "layers": 12, "dim": 768, "heads": 12, "ffn": 3072, "vocab": 50257, "max_positions": 1024},
    # Llama 3.2 1B and Llama 3 (arXiv 2407.21783)
    "llama-1b": {**_LLAMA3, "layers": 16, "dim": 2048, "heads": 32, "head_dim": 64, "ffn": 8192, "tied": True},
    "llama3-8b": {**_LLAMA3, "layers": 32, "dim": 4096, "heads": 32, "ffn": 14336},
    "llama3-70b": {**_LLAMA3, "layers": 80, "dim": 8192, "heads": 64, "ffn": 28672},
    "llama3-405b": {**_LLAMA3, "layers": 126, "dim": 16384, "heads": 128, "ffn": 53248},
    # Mistral 7B v0.1 (arXiv 2310.06825)
    "mistral-7b": {"family": "mistral", "layers": 32, "dim": 4096, "heads": 32, "kv_heads": 8, "ffn": 14336, "vocab": 32000},
    # Qwen2 (arXiv 2407.10671)
    "qwen2-0.5b": {**_QWEN2, "layers": 24, "dim": 896, "heads": 14, "kv_heads": 2, "ffn": 4864, "tied": True},
    # Qwen3 (arXiv 2505.09388)
    "qwen3-0.6b": {**_QWEN3, "layers": 28, "dim": 1024, "heads": 16, "ffn": 3072, "tied": True},
    "qwen3-8b": {**_QWEN3, "layers": 36, "dim": 4096, "heads": 32, "ffn": 12288},
    # SmolLM2 (arXiv 2502.02737)
    "smollm2-135m": {**_SMOLLM2, "layers": 30, "dim": 576, "heads": 9, "kv_heads": 3, "ffn": 1536},
    # OLMo 2 (arXiv 2501.00656)
    "olmo2-1b": {**_OLMO2, "layers": 16, "dim": 2048, "heads": 16, "ffn": 8192},
    # Gemma 2 (arXiv 2408.00118) and Gemma 3 (arXiv 2503.19786)
    "gemma2-2b": {**_GEMMA2, "layers": 26, "dim": 2304, "heads": 8, "kv_heads": 4, "ffn": 9216},
    "gemma3-1b": {**_GEMMA3, "layers": 26, "dim": 1152, "heads": 4, "kv_heads": 1, "ffn": 6912},
}

# What a model without preset starts from: small enough to train on a laptop.
SMALL: dict[str, Any] = {"layers": 4, "dim": 128, "heads": 4, "vocab": 2048, "max_positions": 1024}

# Where a family says nothing else.
COMMON: dict[str, Any] = {
    "dropout": 0.0,
    "neftune": 0.0,
    "init_std": 0.02,
    "residual_scale": True,
    "norm_place": "before",
    "rope_scaling": "none",
    "rope_factor": 1.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_positions": 8192,
    "qk_norm_over": "head",
    "attention_softcap": 0.0,
    "logit_softcap": 0.0,
    "embedding_scale": False,
    "sliding_window": 0,
    "full_every": 0,
}


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


def _derived(values: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Values that follow from others. A wrong type counts as 1 here: it is reported where it was written, once."""
    dim, heads = (values[key] if type(values[key]) is int and values[key] > 0 else 1 for key in ("dim", "heads"))
    gated = values["activation"] in GATED
    head_dim = max(dim // heads, 1)
    ffn = (-(-8 * dim // 3) + 7) // 8 * 8 if gated else 4 * dim
    return {
        "kv_heads": (heads, "= heads"),
        "head_dim": (head_dim, "= dim / heads"),
        "query_scale": (given if type(given := values.get("head_dim")) is int and given > 0 else head_dim, "= head_dim"),
        "rope_local_theta": (theta if type(theta := values["rope_theta"]) in (int, float) and theta > 0 else 1.0, "= rope_theta"),
        "ffn": (ffn, "= 8/3 dim, rounded up to a multiple of 8" if gated else "= 4 dim"),
    }
