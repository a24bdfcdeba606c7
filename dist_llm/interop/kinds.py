"""The kinds of models that transformers has code for, as tables, and the parts of their configs that have changed over time.

A family is a table of what its code fixes and of what its config leaves open. Mixtures of experts have no row yet: a new
family is a new `Family`, and where its experts lie a line in `families.place`. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from typing import Any

from dist_llm.config.schema import ModelConfig
from dist_llm.errors import UsageError
from dist_llm.model.table import is_windowed

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A model type of transformers.

    fixed: what its code always does, by the names of our section; what is neither there nor in `open` must be as in PLAIN.
    defaults: values of its config class that a file may leave out, where other families have others.
    """

    name: str  # model_type
    architecture: str
    fixed: dict[str, Any]
    open: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict)
    ours: str = ""  # the family in our section, where it is called otherwise


# What a block does where a family says nothing else.
PLAIN: dict[str, Any] = {
    "norm": "rms",
    "norm_place": "before",
    "positions": "rotary",
    "activation": "swiglu",
    "qk_norm": False,
    "qk_norm_over": "head",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "attention_softcap": 0.0,
    "logit_softcap": 0.0,
    "embedding_scale": False,
    "sliding_window": 0,
    "full_every": 0,
}
BIASES = ("qkv_bias", "out_bias")  # one switch of theirs
WINDOW = ("sliding_window", "full_every")
CAPS = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
GPT2: dict[str, Any] = {"norm": "layer", "positions": "learned", "qkv_bias": True, "out_bias": True, "mlp_bias": True}
OLMO2: dict[str, Any] = {"norm_place": "after", "qk_norm": True, "qk_norm_over": "all"}
GEMMA: dict[str, Any] = {"norm": "unit_rms", "norm_place": "both", "activation": "geglu_tanh", "embedding_scale": True}
GEMMA_OPEN = (*BIASES, *WINDOW, *CAPS, "query_scale")
GEMMA_DEFAULTS: dict[str, Any] = {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
GEMMA2_DEFAULTS = {**GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2}
GEMMA3_DEFAULTS = {**GEMMA_DEFAULTS, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
# The code of gemma3 takes no cap of scores, whatever its config says.
GEMMA3_OPEN = (*(name for name in GEMMA_OPEN if name != "attention_softcap"), "rope_local_theta")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", {}, (*BIASES, "mlp_bias")),
        Family("mistral", "MistralForCausalLM", {}, ("sliding_window",), {"sliding_window": 4096}),
        Family("qwen2", "Qwen2ForCausalLM", {"qkv_bias": True}, WINDOW, {"use_sliding_window": False, "sliding_window": 4096}),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {"qk_norm": True},
            (*BIASES, *WINDOW),
            {"head_dim": 128, "use_sliding_window": False, "sliding_window": 4096},
        ),
        Family("olmo2", "Olmo2ForCausalLM", OLMO2, BIASES, {"rms_norm_eps": 1e-5}),
        Family("gemma2", "Gemma2ForCausalLM", GEMMA, GEMMA_OPEN, GEMMA2_DEFAULTS),
        Family("gemma3_text", "Gemma3ForCausalLM", {**GEMMA, "qk_norm": True}, GEMMA3_OPEN, GEMMA3_DEFAULTS, ours="gemma3"),
        Family("gpt2", "GPT2LMHeadModel", GPT2, ("activation",), {"tie_word_embeddings": True}),
    )
}


def refusal(where: str, key: str, value: Any, meaning: str) -> UsageError:
    """What our model does not do: `key: value` of a config.json, and what it would mean."""
    details = [f"{key}: {meaning}"]
    return UsageError("this model does something that ours does not", where=where, found=f"{key}: {value!r}", details=details)


# --- windows: which layers see no more than near tokens ------------------------------------------------------------------

SLIDING, FULL = "sliding_attention", "full_attention"


def read_window(values: Values, family: Family, layers: Any, where: str) -> dict[str, Any]:
    """`sliding_window` and `full_every` from `layer_types`, or from what earlier versions had in its place."""
    window, switched = values.get("sliding_window"), "use_sliding_window" in family.defaults  # others' code does not look at the switch
    if "sliding_window" not in family.open or window is None or type(layers) is not int:
        return {}
    if switched and values["use_sliding_window"] is False:
        return {}
    if "full_every" not in family.open:
        return {"sliding_window": window}
    types, usual = values.get("layer_types"), values.get("sliding_window_pattern", 0)
    if types is None and switched:
        first = values.get("max_window_layers", 28)
        if type(first) is not int or 0 < first < layers:
            raise refusal(where, "max_window_layers", first, "windows from some layer on; we have them in all layers but each n-th")
        return {} if first else {"sliding_window": window, "full_every": 0}
    if types is None:
        return {"sliding_window": window, "full_every": usual}
    if not isinstance(types, list) or len(types) != layers or any(kind not in (SLIDING, FULL) for kind in types):
        raise refusal(where, "layer_types", types, f"{layers} times {SLIDING} or {FULL}")
    if FULL not in types:
        return {"sliding_window": window, "full_every": usual if type(usual) is int and usual > layers else 0}
    if SLIDING not in types:
        return {}
    every = types.index(FULL) + 1
    if any((kind == FULL) != ((layer + 1) % every == 0) for layer, kind in enumerate(types)):
        raise refusal(where, "layer_types", types, "we have windows in all layers but each n-th")
    return {"sliding_window": window, "full_every": every}


def write_window(model: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of a family that has windows."""
    if "sliding_window" not in family.open:
        return {}
    types = [SLIDING if is_windowed(model, layer) else FULL for layer in range(model.layers)]
    written: dict[str, Any] = {"sliding_window": model.sliding_window or None}
    if "full_every" in family.open:
        written["layer_types"] = types
    if "use_sliding_window" in family.defaults:
        written |= {"use_sliding_window": SLIDING in types, "max_window_layers": 0 if SLIDING in types else model.layers}
    return written


# --- rotary positions and their scaling ----------------------------------------------------------------------------------

SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
TURNS = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}


def read_rope(values: Values, family: Family, where: str) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes it, or `rope_theta` and `rope_scaling` as earlier ones did."""
    given, scaling = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    local: Any = {}
    apart = "rope_local_theta" in family.open
    if given and isinstance(given, Mapping) and apart != (FULL in given):
        meaning = f"a table for each of {FULL} and {SLIDING}" if apart else f"{family.name} has the same positions in all layers"
        raise refusal(where, "rope_parameters", given, meaning)
    if isinstance(given, Mapping) and FULL in given:
        given, local = given[FULL] or {}, given.get(SLIDING) or {}
    if scaling and given and not (isinstance(given, Mapping) and isinstance(scaling, Mapping) and scaling.items() <= given.items()):
        # transformers 5 takes rope_scaling alone, and with it a rope_theta that nobody has written.
        raise refusal(where, "rope_scaling", scaling, "rope_parameters is there too, and says otherwise: write all of it there")
    given = given or scaling
    if not isinstance(given, Mapping) or not isinstance(local, Mapping):
        raise refusal(where, "rope_parameters", given, "a table of values")
    if local.get("rope_type", "default") != "default":
        raise refusal(where, "rope_type", local["rope_type"], "scaled positions of windowed layers")
    if given.get("partial_rotary_factor", 1) not in (None, 1):
        raise refusal(where, "partial_rotary_factor", given["partial_rotary_factor"], "positions in a part of each head")
    found = {"rope_theta": given.get("rope_theta", values.get("rope_theta", 10000.0))}
    if "rope_local_theta" in family.open:
        found["rope_local_theta"] = local.get("rope_theta", values.get("rope_local_base_freq"))
    kind = given.get("rope_type", given.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise refusal(where, "rope_type", kind, f"we have {', '.join(SCALINGS)}")
    return found if kind == "default" else {**found, "rope_scaling": SCALINGS[kind], **_read_scaling(given, values, kind, where)}


def _read_scaling(given: Values, values: Values, kind: str, where: str) -> dict[str, Any]:
    factor = given.get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool):
        raise refusal(where, "factor", factor, f"rope_type {kind} stretches positions by a number")
    found: dict[str, Any] = {"rope_factor": factor}
    if kind == "linear":
        return found
    original = given.get("original_max_position_embeddings") or values.get("max_position_embeddings")
    usual = {"llama3": (None, None), "yarn": (1.0, 32.0)}[kind]
    turns = [given.get(key) or default for key, default in zip(TURNS[kind], usual, strict=True)]
    for key, value in (("original_max_position_embeddings", original), *zip(TURNS[kind], turns, strict=True)):
        if type(value) not in (int, float):
            raise refusal(where, key, value, f"rope_type {kind} needs a number there")
    if kind == "yarn":
        growth = 0.1 * log(factor) + 1.0 if factor > 1 else 1.0
        for key, harmless in (("truncate", (None, True)), ("mscale", (None,)), ("attention_factor", (None, growth))):
            if given.get(key) not in harmless:
                raise refusal(where, key, given[key], f"we have yarn with {key} {harmless[-1]}")
    return {**found, "rope_original_positions": original, "rope_low_freq_factor": turns[0], "rope_high_freq_factor": turns[1]}


def write_rope(model: ModelConfig, family: Family) -> dict[str, Any]:
    """`rope_parameters`, as transformers 5.23 writes them."""
    kind = {ours: theirs for theirs, ours in SCALINGS.items()}[model.rope_scaling]
    written: dict[str, Any] = {"rope_type": kind, "rope_theta": model.rope_theta}
    if kind != "default":
        written["factor"] = model.rope_factor
    if kind in TURNS:
        written["original_max_position_embeddings"] = model.rope_original_positions
        written |= dict(zip(TURNS[kind], (model.rope_low_freq_factor, model.rope_high_freq_factor), strict=True))
    if "rope_local_theta" in family.open:
        return {FULL: written, SLIDING: {"rope_type": "default", "rope_theta": model.rope_local_theta}}
    return written
