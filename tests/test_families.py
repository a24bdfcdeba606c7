"""Families of transformers: names of tensors, configs there and back, logits and gradients against their own code."""

from __future__ import annotations

from typing import Any

import pytest

from dist_llm.config.presets import PRESETS
from dist_llm.config.schema import ModelConfig
from dist_llm.errors import UsageError
from dist_llm.interop.families import Place, place, read_config, write_config
from tests.family_oracles import MODELS, SMALL, model_of
from tests.ranks import Ranks

pytestmark = pytest.mark.usefixtures("with_transformers")


@pytest.fixture(scope="module")
def differences(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """All models in one process: transformers takes seconds to import."""
    return ranks.run(1, "tests.family_oracles:against_transformers", timeout_seconds=120)[0]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_transformers(differences: dict[str, dict[str, Any]], name: str) -> None:
    """Its model is made from our config and our names; eager attention, norms and softmax kept in float64."""
    found = differences[name]
    assert found["not named"] == [], "every tensor of theirs has a row, every row a tensor"
    assert found["logits"] < 1e-10 and found["loss"] < 1e-10, found
    assert found["gradient"][0] < 1e-10, found["gradient"]
    assert found["narrow logits"] < 1e-4, found["narrow logits"]


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_keeps_of_our_config_is_our_model(differences: dict[str, dict[str, Any]], name: str) -> None:
    assert differences[name]["read back"]


def test_sampled_tokens_are_those_of_transformers(ranks: Ranks) -> None:
    """Greedy, with a cache of keys and values, past the window, capped, under two tables of positions."""
    for name, (ours, theirs) in ranks.run(1, "tests.family_oracles:greedy", timeout_seconds=120)[0].items():
        assert ours == theirs, name
        assert len(set(ours)) > 2, f"{name}: a model that says one thing alone proves little"


@pytest.mark.parametrize("name", MODELS)
def test_a_config_there_and_back(name: str) -> None:
    model = model_of(name)
    assert ModelConfig(**read_config(write_config(model), where="config.json")) == model


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_there_and_back(preset: str) -> None:
    model = ModelConfig(preset=preset)
    assert ModelConfig(**read_config(write_config(model), where="config.json")) == model.model_copy(update={"preset": None})


def test_features_decide_and_not_names() -> None:
    custom = ModelConfig(**{**SMALL, "family": "custom", "qk_norm": True})
    assert write_config(custom)["model_type"] == "qwen3"
    assert write_config(ModelConfig(**{**SMALL, "family": "llama", "qkv_bias": True}))["model_type"] == "qwen2"


def test_gpt2_keeps_three_in_one_and_transposed() -> None:
    model = model_of("gpt2")
    assert place(model, "blocks.2.attention.v.weight") == Place("transformer.h.2.attn.c_attn.weight", True, 40)
    assert place(model, "blocks.2.attention.k.bias") == Place("transformer.h.2.attn.c_attn.bias", False, 20)
    assert place(model, "blocks.0.attention_norm.weight") == Place("transformer.h.0.ln_1.weight")


LLAMA = write_config(model_of("llama"))


def test_files_of_earlier_versions_are_read() -> None:
    """rope_theta by itself, kv heads and head_dim left out."""
    old = {key: value for key, value in LLAMA.items() if key not in ("rope_parameters", "num_key_value_heads", "head_dim")}
    read = read_config({**old, "rope_theta": 5000.0, "rope_scaling": None}, where="config.json")
    assert (read["rope_theta"], read["kv_heads"], read["head_dim"]) == (5000.0, 6, 4)


def test_a_window_has_a_switch_in_qwen_alone() -> None:
    """Mistral's code takes the window whatever `use_sliding_window` says."""
    windowed = {**LLAMA, "sliding_window": 8, "use_sliding_window": False}
    assert read_config({**windowed, "model_type": "mistral"}, where="config.json")["sliding_window"] == 8
    assert read_config({**windowed, "model_type": "qwen2", "head_dim": None}, where="config.json")["sliding_window"] == 0


def test_scaling_may_be_said_twice_if_it_is_the_same() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    read = read_config({**LLAMA, "rope_scaling": scaling, "rope_parameters": {**scaling, "rope_theta": 300.0}}, where="config.json")
    assert (read["rope_scaling"], read["rope_factor"], read["rope_theta"]) == ("linear", 2.0, 300.0)


def test_a_gemma3_file_of_earlier_versions_is_read() -> None:
    """rope_local_base_freq, sliding_window_pattern; and what its class takes where a file says nothing."""
    kept = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    written = write_config(ModelConfig(preset="gemma3-1b"))
    old = {key: written[key] for key in kept} | {"sliding_window": 512, "rope_theta": 1_000_000, "rope_local_base_freq": 10_000}
    read = read_config({**old, "sliding_window_pattern": 6, "max_position_embeddings": 32768}, where="config.json")
    assert ModelConfig(**read) == ModelConfig(**{**ModelConfig(preset="gemma3-1b").model_dump(), "preset": None, "max_positions": 32768})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, "mixtures of experts"),
        ({"model_type": "bert"}, "model_type: 'bert'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "rope_type: 'su'"),
        ({"rope_parameters": 5}, "rope_parameters: 5"),
        ({"hidden_act": "relu2"}, "hidden_act: 'relu2'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -3}, "model.dim"),
        ({"num_hidden_layers": 10**9}, "model.layers"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "max_window_layers: 1"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"], "use_sliding_window": True, "sliding_window": 8}, "layer_types"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type: 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "8"}}, "factor: '8'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor: None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 3.0}}, "attention_factor: 3.0"),
        ({"model_type": "gemma3", "text_config": {}}, "model_type: 'gemma3'"),
        ({"model_type": "qwen2", "attention_bias": True}, "attention_bias: True"),
        ({"is_causal": False}, "is_causal: False"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act: 'gelu_pytorch_tanh'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: {'type': 'yarn', 'factor': 4.0}"),
        ({"model_type": "gemma3_text", "hidden_act": None, "rope_parameters": {"rope_theta": 5.0}}, "rope_parameters: {'rope_theta': 5.0}"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters: {'full_attention': {'rope_theta': 1000000.0}}"),
    ],
    ids=str,
)
def test_what_we_do_not_have_is_refused_with_key_and_value(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_config({**LLAMA, **change}, where="there/config.json")
    failure = caught.value
    assert failure.where == "there/config.json"
    assert words in " ".join(filter(None, [failure.what, failure.expected, failure.found]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": "layer"}, "norm layer"),
        ({"query_scale": 3.0}, "query_scale 3"),
        ({"attention_softcap": 5.0}, "attention_softcap 5"),
        ({"dim": 25, "head_dim": 4}, "leaves 1"),
        ({"out_bias": True}, "one switch for both"),
    ],
    ids=str,
)
def test_a_model_that_transformers_has_not_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        write_config(ModelConfig(**{**SMALL, "family": "llama", **change}))
    assert words in " ".join(caught.value.details)
