"""Hugging Face folders of small models with random weights of odd shape, made by transformers and the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dist_llm.data.tokenizer import bytes_tokenizer

VOCAB = 263  # the tokens of the bytes tokenizer, and a few rows that no token has
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama, tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 10}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5, "tie_word_embeddings": False}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 1, "head_dim": 10, "sliding_window": 6, "query_pre_attn_scalar": 9}),
    "gemma3": ("Gemma3Text", {"num_key_value_heads": 1, "head_dim": 10, "sliding_window": 6, "query_pre_attn_scalar": 9}),
    "gpt2": ("GPT2", {}),
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False}),
}
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def bring() -> None:
    """Imports what tests take from PEFT and transformers, for the helpers that commands and ranks are forked from."""
    import peft  # noqa: F401
    import transformers

    for kind, _ in SHAPES.values():
        name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind.removesuffix('Text')}ForCausalLM"
        assert getattr(transformers, name), "a class is imported when it is asked for"
    assert transformers.AutoModelForCausalLM and transformers.AutoTokenizer


def their_model(kind: str, *, vocab: int = VOCAB, layers: int = 2) -> nn.Module:
    """A transformers model in float64, with random weights: norms and biases too."""
    import transformers

    name, more = SHAPES[kind]
    ids = {"bos_token_id": 256, "eos_token_id": 256}
    if name == "GPT2":
        shape = {"n_embd": 20, "n_layer": layers, "n_head": 4, "n_inner": 52, "n_positions": 64}
        shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab, **shape, **more, **ids))
    else:
        shape = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 44, "num_hidden_layers": layers}
        config = getattr(transformers, f"{name}Config")(vocab_size=vocab, max_position_embeddings=64, **shape, **more, **ids)
        config._attn_implementation = "eager"  # the one that knows every family's scores
        made = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    made = made.double().eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return made


def save_theirs(model: nn.Module, folder: Path, *, dtype: str = "float32", shard: str = "5GB") -> Path:
    """A folder as people find them: weights, config, a tokenizer with its config and chat template, generation config."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    inner = bytes_tokenizer().inner
    inner.encode_special_tokens = False
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "temperature": 0.6}))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, by the library."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert not found.keys() & set(file.keys())
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found
