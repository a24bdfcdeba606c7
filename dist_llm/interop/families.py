"""Hugging Face's `config.json` and tensor names beside our `model` section and our table. Torch-free.

A family of theirs is a table of what its code fixes and of what its config leaves open. `write_config` takes the family of
a model's name where that fits, else the first that can say what the model does; features decide, not names.
Mixtures of experts have no row yet: a new family is a new `Family`, and where its experts lie a line in `place`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from dist_llm.config.schema import ModelConfig
from dist_llm.errors import UsageError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where Hugging Face keeps one of our tensors.

    transposed: stored (in, out), as GPT-2's Conv1D does. first: our tensor is rows [first, first + shape[0]) of the stored
    one, after transposing: GPT-2 keeps q, k and v in one.
    """

    key: str
    transposed: bool = False
    first: int = 0


@dataclass(frozen=True)
class Family:
    """A model type of transformers.

    fixed: what its code always does, by the names of our section; what is neither there nor in `open` must be as in PLAIN.
    defaults: values of its config class that a file may leave out.
    """

    name: str  # model_type
    architecture: str
    fixed: dict[str, Any]
    open: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)


# What a block does where a family says nothing else.
PLAIN: dict[str, Any] = {
    "norm": "rms",
    "positions": "rotary",
    "activation": "swiglu",
    "qk_norm": False,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
}
GPT2: dict[str, Any] = {"norm": "layer", "positions": "learned", "qkv_bias": True, "out_bias": True, "mlp_bias": True}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", {}, ("qkv_bias", "out_bias", "mlp_bias")),
        Family("mistral", "MistralForCausalLM", {}),
        Family("qwen2", "Qwen2ForCausalLM", {"qkv_bias": True}),
        Family("qwen3", "Qwen3ForCausalLM", {"qk_norm": True}, ("qkv_bias", "out_bias"), {"head_dim": 128}),
        Family("gpt2", "GPT2LMHeadModel", GPT2, ("activation",), {"tie_word_embeddings": True}),
    )
}

# --- config.json -> model section ------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # key -> (values that change nothing, what it would mean)
    "quantization_config": ((None,), "weights in fewer bits; take the unquantised model"),
    "is_encoder_decoder": ((None, False), "an encoder beside the decoder"),
    "add_cross_attention": ((None, False), "attention to an encoder"),
    "partial_rotary_factor": ((None, 1, 1.0), "positions in a part of each head"),
    "use_bidirectional_attention": ((None, False), "attention to later tokens"),
    "scale_attn_by_inverse_layer_idx": ((None, False), "scores that shrink with depth"),
    "scale_attn_weights": ((None, True), "scores that are not divided by the square root of head_dim"),
}
GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}


def read_config(values: Values, *, where: str) -> dict[str, Any]:
    """A `config.json` of Hugging Face -> every value of our `model` section. where: the file, for messages.

    Raises UsageError with key and value for a model type, or a property of one, that our model does not have.
    """
    family = _family_of(values, where)
    for key, (harmless, meaning) in REFUSED.items():
        if key in values and values[key] not in harmless:
            raise _refusal(where, key, values[key], meaning)
    read = _read_gpt2 if family.name == "gpt2" else _read_rotary
    found = {"family": family.name, "preset": None, **PLAIN, **family.fixed, **read({**family.defaults, **values}, family, where)}
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
    raise UsageError(what, where=where, expected=f"model_type {', '.join(FAMILIES)}", found=f"model_type: {kind!r}")


def _refusal(where: str, key: str, value: Any, meaning: str) -> UsageError:
    return UsageError("this model does something that ours does not", where=where, found=f"{key}: {value!r}", details=[f"{key}: {meaning}"])


def _needed(values: Values, key: str, where: str) -> Any:
    """A size without which there is no model."""
    if values.get(key) is None:
        raise UsageError("this config.json lacks a size of its model", where=where, expected=f"a number at {key}", found="nothing there")
    return values[key]


def _one_of(values: Values, key: str, names: Mapping[str, str], where: str, default: str) -> str:
    """A name of theirs -> ours."""
    given = values.get(key, default)
    if not isinstance(given, str) or given not in names:
        raise _refusal(where, key, given, f"we have {', '.join(names)}")
    return names[given]


def _read_gpt2(values: Values, family: Family, where: str) -> dict[str, Any]:
    """Dropout of attention weights is a choice of training that we do not have; it is passed over."""
    dim, heads = (_needed(values, key, where) for key in ("n_embd", "n_head"))
    drops = [values.get(key, 0.0) for key in ("resid_pdrop", "embd_pdrop")]
    if drops[0] != drops[1]:
        raise _refusal(where, "embd_pdrop", drops[1], f"we drop embeddings as often as residuals, resid_pdrop: {drops[0]!r}")
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
    found["activation"] = _one_of(values, "hidden_act", ACTIVATIONS, where, "silu")
    found |= _read_rope(values, where)
    if "out_bias" in family.open:
        found |= dict.fromkeys(("qkv_bias", "out_bias"), values.get("attention_bias", False))
    elif values.get("attention_bias") not in (None, False):
        raise _refusal(where, "attention_bias", values["attention_bias"], f"{family.name} has its biases fixed")
    if "mlp_bias" in family.open:
        found["mlp_bias"] = values.get("mlp_bias", False)
    windowed = values.get("sliding_window") is not None and values.get("use_sliding_window", family.name == "mistral")
    if windowed:
        raise _refusal(where, "sliding_window", values["sliding_window"], "attention to near tokens alone")
    return found


def _read_rope(values: Values, where: str) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes it, or `rope_theta` and `rope_scaling` as earlier ones did."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise _refusal(where, "rope_parameters", given, "a table of values")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        raise _refusal(where, "rope_type", kind, "scaled rotary positions")
    return {"rope_theta": given.get("rope_theta", values.get("rope_theta", 10000.0))}


# --- model section -> config.json ------------------------------------------------------------------------------------


def family_of(model: ModelConfig) -> Family:
    """The family that says what a model does: the one of its name where it fits. Raises UsageError where none does."""
    if model.family in FAMILIES and not _misfits(model, FAMILIES[model.family]):
        return FAMILIES[model.family]
    for family in FAMILIES.values():
        if not _misfits(model, family):
            return family
    nearest = min(FAMILIES.values(), key=lambda family: len(_misfits(model, family)))
    details = [f"nearest is {nearest.name}: {misfit}" for misfit in _misfits(model, nearest)]
    raise UsageError("transformers has no model that does what this one does", where="model", details=details)


def _misfits(model: ModelConfig, family: Family) -> list[str]:
    """What a family cannot say of a model."""
    wanted = {name: value for name, value in {**PLAIN, **family.fixed}.items() if name not in family.open}
    found = [f"{name} {getattr(model, name)}, it has {value}" for name, value in wanted.items() if getattr(model, name) != value]
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
    written |= {"hidden_act": "silu", "rms_norm_eps": model.norm_eps, "max_position_embeddings": model.max_positions}
    written |= {"rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta}, "attention_dropout": 0.0}
    if "out_bias" in family.open:
        written["attention_bias"] = model.qkv_bias
    if "mlp_bias" in family.open:
        written["mlp_bias"] = model.mlp_bias
    if family.name == "mistral":
        written["sliding_window"] = None
    if family.name in ("qwen2", "qwen3"):
        written |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": model.layers}
        written["layer_types"] = ["full_attention"] * model.layers
    return written


# --- tensors ---------------------------------------------------------------------------------------------------------

KEYS = {  # inside a block, without its kind (weight or bias)
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
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
    if not gpt2:
        return Place(f"model.layers.{layer}.{KEYS[inside]}.{kind}")
    first = {"attention.k": model.dim, "attention.v": 2 * model.dim}.get(inside, 0)
    matrix = kind == "weight" and not inside.endswith("norm")
    return Place(f"transformer.h.{layer}.{GPT2_KEYS[inside]}.{kind}", matrix, first)
