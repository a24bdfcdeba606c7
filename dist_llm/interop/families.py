"""Hugging Face's `config.json` and tensor names beside our `model` section and our table. Torch-free.

`write_config` takes the family of a model's name where that fits, else the first that can say what the model does: features
decide, not names. The families are in `kinds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dist_llm.config.schema import ModelConfig
from dist_llm.errors import UsageError
from dist_llm.interop.kinds import (
    BIASES,
    CAPS,
    FAMILIES,
    PLAIN,
    Family,
    Values,
    read_rope,
    read_window,
    refusal,
    write_rope,
    write_window,
)


@dataclass(frozen=True)
class Place:
    """Where Hugging Face keeps one of our tensors.

    transposed: stored (in, out), as GPT-2's Conv1D does. first: our tensor is rows [first, first + shape[0]) of the stored
    one, after transposing: GPT-2 keeps q, k and v in one.
    """

    key: str
    transposed: bool = False
    first: int = 0


# --- config.json -> model section ------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # key -> (values that change nothing, what it would mean)
    "quantization_config": ((None,), "weights in fewer bits; take the unquantised model"),
    "is_encoder_decoder": ((None, False), "an encoder beside the decoder"),
    "add_cross_attention": ((None, False), "attention to an encoder"),
    "partial_rotary_factor": ((None, 1, 1.0), "positions in a part of each head"),
    "use_bidirectional_attention": ((None, False), "attention to later tokens"),
    "is_causal": ((None, True), "attention to later tokens"),
    "scale_attn_by_inverse_layer_idx": ((None, False), "scores that shrink with depth"),
    "scale_attn_weights": ((None, True), "scores that are not divided by the square root of head_dim"),
}
GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu_tanh"}


def read_config(values: Values, *, where: str) -> dict[str, Any]:
    """A `config.json` of Hugging Face -> every value of our `model` section. where: the file, for messages.

    Raises UsageError with key and value for a model type, or a property of one, that our model does not have.
    """
    family = _family_of(values, where)
    for key, (harmless, meaning) in REFUSED.items():
        if key in values and values[key] not in harmless:
            raise refusal(where, key, values[key], meaning)
    read = _read_gpt2 if family.name == "gpt2" else _read_rotary
    found = {
        "family": family.ours or family.name,
        "preset": None,
        **PLAIN,
        **family.fixed,
        **read({**family.defaults, **values}, family, where),
    }
    try:
        return ModelConfig.model_validate(found).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "config"
        raise UsageError("this config.json gives no model", where=where, found=f"model.{key}: {first['msg']}") from None


def _family_of(values: Values, where: str) -> Family:
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    experts = isinstance(kind, str) and ("moe" in kind or kind in ("mixtral", "dbrx", "deepseek_v2", "deepseek_v3"))
    what = "mixtures of experts cannot be read yet" if experts else "this kind of model cannot be read"
    raise UsageError(
        what,
        where=where,
        expected=f"model_type {', '.join(FAMILIES)}",
        found=f"model_type: {kind!r}",
        next="name a model of one of these kinds",
    )


def _needed(values: Values, key: str, where: str) -> Any:
    """A size without which there is no model."""
    if values.get(key) is None:
        raise UsageError("this config.json lacks a size of its model", where=where, expected=f"a number at {key}", found="nothing there")
    return values[key]


def _one_of(values: Values, key: str, names: Mapping[str, str], where: str, default: str) -> str:
    """A name of theirs -> ours."""
    given = values.get(key, default)
    if not isinstance(given, str) or given not in names:
        raise refusal(where, key, given, f"we have {', '.join(names)}")
    return names[given]


def _read_gpt2(values: Values, family: Family, where: str) -> dict[str, Any]:
    """Dropout of attention weights is a choice of training that we do not have; it is passed over."""
    dim, heads = (_needed(values, key, where) for key in ("n_embd", "n_head"))
    drops = [values.get(key, 0.0) for key in ("resid_pdrop", "embd_pdrop")]
    if drops[0] != drops[1]:
        raise refusal(where, "embd_pdrop", drops[1], f"we drop embeddings as often as residuals, resid_pdrop: {drops[0]!r}")
    found = {"dim": dim, "heads": heads, "kv_heads": heads, "layers": _needed(values, "n_layer", where)}
    inner = values.get("n_inner")
    found |= {"ffn": 4 * dim if inner is None and isinstance(dim, int) else inner, "vocab": _needed(values, "vocab_size", where)}
    found |= {"max_positions": values.get("n_positions", 1024), "norm_eps": values.get("layer_norm_epsilon", 1e-5)}
    found |= {"dropout": drops[0], "init_std": values.get("initializer_range", 0.02), "tied": values["tie_word_embeddings"]}
    return {**found, "activation": _one_of(values, "activation_function", GPT2_ACTIVATIONS, where, "gelu_new")}


def _read_rotary(values: Values, family: Family, where: str) -> dict[str, Any]:
    """The families with rotary positions."""
    same = {"dim": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "ffn": "intermediate_size"}
    found = {ours: _needed(values, theirs, where) for ours, theirs in {**same, "vocab": "vocab_size"}.items()}
    for ours, theirs in (("kv_heads", "num_key_value_heads"), ("head_dim", "head_dim")):  # left out or null: as ours
        if values.get(theirs) is not None:
            found[ours] = values[theirs]
    found |= {"norm_eps": values.get("rms_norm_eps", 1e-6), "init_std": values.get("initializer_range", 0.02)}
    found |= {"max_positions": values.get("max_position_embeddings", 2048), "tied": values.get("tie_word_embeddings", False)}
    activation = family.fixed.get("activation", PLAIN["activation"])
    names = {theirs: ours for theirs, ours in ACTIVATIONS.items() if ours == activation}
    key = "hidden_activation" if activation == "geglu_tanh" else "hidden_act"
    found["activation"] = _one_of(values, key, names, where, next(iter(names)))
    found |= read_rope(values, family, where) | read_window(values, family, found["layers"], where)
    if "query_scale" in family.open:
        found["query_scale"] = values.get("query_pre_attn_scalar")
        found |= {ours: values.get(theirs) or 0.0 for ours, theirs in CAPS.items() if ours in family.open}
    if "out_bias" in family.open:
        found |= dict.fromkeys(BIASES, values.get("attention_bias", False))
    elif values.get("attention_bias") not in (None, False):
        raise refusal(where, "attention_bias", values["attention_bias"], f"{family.name} has its biases fixed")
    if "mlp_bias" in family.open:
        found["mlp_bias"] = values.get("mlp_bias", False)
    return found


# --- model section -> config.json ------------------------------------------------------------------------------------


def family_of(model: ModelConfig) -> Family:
    """The family that says what a model does: the one of its name where it fits. Raises UsageError where none does."""
    named = sorted(FAMILIES.values(), key=lambda family: (family.ours or family.name) != model.family)
    for family in named:
        if not _misfits(model, family):
            return family
    nearest = min(FAMILIES.values(), key=lambda family: len(_misfits(model, family)))
    details = [f"nearest is {nearest.name}: {misfit}" for misfit in _misfits(model, nearest)]
    raise UsageError("transformers has no model that does what this one does", where="model", details=details)


def _misfits(model: ModelConfig, family: Family) -> list[str]:
    """What a family cannot say of a model."""
    wanted = {name: value for name, value in {**PLAIN, **family.fixed}.items() if name not in family.open}
    found = [f"{name} {getattr(model, name)}, it has {value}" for name, value in wanted.items() if getattr(model, name) != value]
    if "query_scale" not in family.open and model.query_scale != model.head_dim:
        found.append(f"query_scale {model.query_scale:g}, it has head_dim {model.head_dim}")
    if model.sliding_window and "rope_local_theta" not in family.open and model.rope_local_theta != model.rope_theta:
        found.append(f"rope_local_theta {model.rope_local_theta:g}, it has rope_theta {model.rope_theta:g}")
    if "out_bias" in family.open and model.qkv_bias != model.out_bias:
        found.append(f"qkv_bias {model.qkv_bias} and out_bias {model.out_bias}, it has one switch for both")
    if family.name == "gpt2":
        found += [f"kv_heads {model.kv_heads} of {model.heads} heads, it has as many"] if model.kv_heads != model.heads else []
        found += ["a gate, it has none"] if model.activation not in GPT2_ACTIVATIONS.values() else []
        if model.head_dim * model.heads != model.dim:
            found.append(f"head_dim {model.head_dim} x {model.heads} heads, it has dim {model.dim}")
    if model.dim % model.heads:
        found.append(f"dim {model.dim} over {model.heads} heads leaves {model.dim % model.heads}, it wants a multiple")
    return found


def write_config(model: ModelConfig) -> dict[str, Any]:
    """A model -> its `config.json`, keys as transformers 5.23 writes them; whoever exports adds dtype and the ids of special tokens.

    Raises UsageError where transformers has no such model.
    """
    family = family_of(model)
    shared = {"architectures": [family.architecture], "model_type": family.name, "vocab_size": model.vocab}
    shared |= {"initializer_range": model.init_std, "tie_word_embeddings": model.tied, "use_cache": True}
    shared |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    write: Callable[[ModelConfig, Family], dict[str, Any]] = _write_gpt2 if family.name == "gpt2" else _write_rotary
    return {**shared, **write(model, family)}


def _write_gpt2(model: ModelConfig, family: Family) -> dict[str, Any]:
    written: dict[str, Any] = {"n_embd": model.dim, "n_layer": model.layers, "n_head": model.heads, "n_inner": model.ffn}
    written |= {"n_positions": model.max_positions, "layer_norm_epsilon": model.norm_eps}
    written |= {"resid_pdrop": model.dropout, "embd_pdrop": model.dropout, "attn_pdrop": 0.0}
    return {**written, "activation_function": {"gelu_tanh": "gelu_new"}.get(model.activation, model.activation)}


def _write_rotary(model: ModelConfig, family: Family) -> dict[str, Any]:
    written: dict[str, Any] = {"hidden_size": model.dim, "intermediate_size": model.ffn, "num_hidden_layers": model.layers}
    written |= {"num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim}
    gemma = model.activation == "geglu_tanh"
    written |= {"hidden_activation": "gelu_pytorch_tanh"} if gemma else {"hidden_act": "silu"}
    written |= {"rms_norm_eps": model.norm_eps, "max_position_embeddings": model.max_positions, "attention_dropout": 0.0}
    written |= {"rope_parameters": write_rope(model, family), **write_window(model, family)}
    if "out_bias" in family.open:
        written["attention_bias"] = model.qkv_bias
    if "mlp_bias" in family.open:
        written["mlp_bias"] = model.mlp_bias
    if "query_scale" in family.open:
        scale = model.query_scale
        written["query_pre_attn_scalar"] = int(scale) if scale.is_integer() else scale
        written |= {theirs: getattr(model, ours) or None for ours, theirs in CAPS.items() if ours in family.open}
    return written


# --- tensors ---------------------------------------------------------------------------------------------------------

KEYS = {  # inside a block, without its kind (weight or bias)
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",  # where attention has a norm behind it; else what that one is called
    "mlp_post_norm": "post_feedforward_layernorm",
    **{f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"attention.{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
ENDS = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
GPT2_KEYS = {
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.o": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
    **{f"attention.{part}": "attn.c_attn" for part in "qkv"},
}
GPT2_ENDS = {"embedding": "transformer.wte", "positions": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"}


def place(model: ModelConfig, name: str) -> Place:
    """Where Hugging Face keeps the tensor of one row of `model/table.py`. Raises UsageError as `write_config` does."""
    gpt2 = family_of(model).name == "gpt2"
    part, _, kind = name.rpartition(".")
    if not part.startswith("blocks."):
        return Place(f"{(GPT2_ENDS if gpt2 else ENDS)[part]}.{kind}")
    _, layer, inside = part.split(".", 2)
    if inside == "mlp_norm" and not gpt2 and model.norm_place == "before":
        inside = "attention_post_norm"
    if not gpt2:
        return Place(f"model.layers.{layer}.{KEYS[inside]}.{kind}")
    first = {"attention.k": model.dim, "attention.v": 2 * model.dim}.get(inside, 0)
    matrix = kind == "weight" and not inside.endswith("norm")
    return Place(f"transformer.h.{layer}.{GPT2_KEYS[inside]}.{kind}", matrix, first)
