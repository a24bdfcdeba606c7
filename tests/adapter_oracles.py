"""What the ranks of test_adapters.py do: models of transformers under PEFT's LoRA, beside ours with the same matrices."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.schema import AdapterConfig, ModelConfig
from dist_llm.engines.whole import Whole
from dist_llm.interop.adapters import adapter_keys, joined, write_adapter_config
from dist_llm.interop.joined import join, split
from dist_llm.interop.peft_folder import PeftFolder, rows_of, write_adapter
from dist_llm.model.parts import Adapter, Draw
from dist_llm.model.table import table
from dist_llm.model.transformer import Context, make_context
from dist_llm.sharding import Box
from tests.family_oracles import MODELS, SMALL, nothing_narrowed, our_tensors, parameters_of, plain_of, theirs_of
from tests.oracles import batch, worst

Say = Callable[..., None]
ALL = ("q", "k", "v", "o", "gate", "up", "down")
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {  # family -> adapter
    "llama": ("llama", {"rank": 3, "alpha": 7.0}),
    "llama, biases": ("llama, biases", {"rank": 4, "alpha": 2.0, "rank_stabilized": True, "targets": ["q", "v", "o", "up"]}),
    "gpt2": ("gpt2", {"rank": 5, "alpha": 6.0, "targets": ["o", "up", "down"]}),
    "gpt2, one": ("gpt2", {"rank": 2, "targets": ["down"]}),
    "gpt2, whole": ("gpt2", {"rank": 2, "alpha": 3.0, "rank_stabilized": True}),
    "gpt2, two in one": ("gpt2", {"rank": 3, "alpha": 3.0, "targets": ["q", "v", "up"]}),
    "gpt2, one in one": ("gpt2", {"rank": 2, "targets": ["k"]}),
    "gpt2, whole, dora": ("gpt2", {"rank": 2, "dora": True}),
    "olmo2": ("olmo2", {"rank": 2, "targets": ["k", "gate", "down"]}),
    "gemma3": ("gemma3", {"rank": 2, "alpha": 1.0}),
    "qwen3": ("qwen3", {"rank": 6, "targets": ["q", "k"]}),
    "llama, dora": ("llama, biases", {"rank": 3, "alpha": 7.0, "dora": True}),
    "gpt2, dora": ("gpt2", {"rank": 5, "alpha": 6.0, "dora": True, "rank_stabilized": True, "targets": ["o", "up", "down"]}),
    "llama, dropped": ("llama", {"rank": 3, "dropout": 0.3}),
    "llama, dora, dropped": ("llama, biases", {"rank": 2, "dropout": 0.2, "dora": True, "targets": ["q", "o", "up", "down"]}),
    "llama, and ends": ("llama", {"rank": 2, "targets": ["q"], "modules_to_save": ["embedding", "head"]}),
    "llama, tied, and table": ("llama, tied, wide heads", {"rank": 2, "targets": ["o"], "modules_to_save": ["embedding"]}),
    "gpt2, and ends": ("gpt2", {"rank": 2, "targets": ["up"], "modules_to_save": ["embedding", "head"]}),
    "gpt2, untied, and head": ("gpt2, untied", {"rank": 2, "dora": True, "targets": ["up"], "modules_to_save": ["head"]}),
    "gemma3, and ends": ("gemma3", {"rank": 2, "targets": ["k"], "modules_to_save": ["head", "embedding"]}),
    "gemma3, dora": ("gemma3", {"rank": 2, "dora": True, "targets": ["v", "gate"]}),
}


SAVED: dict[str, tuple[str, dict[str, Any]]] = {  # folder -> one of ADAPTED's models, and what PEFT is asked for
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "pattern": ("llama", {"target_modules": r".*\.(q|k)_proj"}),
    "whole names": (
        "llama",
        {"target_modules": [f"model.layers.{at}.{end}" for at in range(3) for end in ("self_attn.v_proj", "mlp.down_proj")]},
    ),
    "one block": ("llama", {"target_modules": r".*\.1\..*q_proj"}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "gpt2, all-linear": ("gpt2", {"target_modules": "all-linear"}),
    "gpt2, joined": ("gpt2", {"target_modules": ["c_attn"]}),
}


def save_with_peft(rank: int, world: int, say: Say, folder: str) -> None:
    """Writes the folders of SAVED, their matrices random."""
    from peft import LoraConfig, get_peft_model

    generator = torch.Generator().manual_seed(4)
    for name, (family, asked) in SAVED.items():
        made = get_peft_model(theirs_of(bare(model_of(family)), torch.float64), LoraConfig(task_type="CAUSAL_LM", r=2, **asked))
        with torch.no_grad():
            for key, parameter in made.named_parameters():
                if ".lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        made.save_pretrained(Path(folder) / name, save_embedding_layers=False)


def model_of(name: str) -> ModelConfig:
    """One of the adapted models."""
    family, adapter = ADAPTED[name]
    return ModelConfig(**{**SMALL, **MODELS[family], "adapter": adapter})


def bare(model: ModelConfig) -> ModelConfig:
    """The model without its adapter."""
    return model.model_copy(update={"adapter": AdapterConfig()})


def with_peft(model: ModelConfig, folder: Path) -> nn.Module:
    """The transformers model with PEFT's LoRA as our config says, its matrices random."""
    from peft import LoraConfig, get_peft_model

    folder.mkdir(exist_ok=True)
    written = write_adapter_config(model, base="base")
    (folder / "adapter_config.json").write_text(json.dumps({**written, "inference_mode": False}))
    made = get_peft_model(theirs_of(bare(model), torch.float64), LoraConfig.from_pretrained(str(folder)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if ".c_attn.lora_B" in name:  # as it is of several: each in its rows and its columns
                parameter.copy_(join(apart(parameter, "lora_b", model), "lora_b", rows_of(model)))
    return made.double()


def apart(tensor: Tensor, last: str, model: ModelConfig) -> dict[str, Tensor]:
    """Of a matrix that several projections share, what is each one's."""
    parts = [part for part in joined(model) if part in model.adapter.targets]
    return split(tensor, last, parts, rows_of(model), rank=model.adapter.rank)


def matrices(made: nn.Module, model: ModelConfig, take: Callable[[nn.Parameter], Any]) -> dict[str, Tensor]:
    """Something of each LoRA matrix of theirs, and of what is trained whole, under our names."""
    theirs = {
        name.replace(".modules_to_save", "").replace(".default.", "."): take(parameter) for name, parameter in made.named_parameters()
    }
    theirs |= {name.replace("vector.weight", "vector"): value for name, value in theirs.items() if ".lora_magnitude_vector." in name}
    found, together = {}, joined(model)
    for ours, key in adapter_keys(model).items():
        *_, part, last = ours.split(".")
        found[ours] = apart(theirs[key], last, model)[part] if part in together else theirs[key]
    return found


class Addressed(nn.Module):
    """Dropout with the masks that ours have."""

    def __init__(self, draw: Draw, adapter: Adapter) -> None:
        super().__init__()
        self.draw, self.adapter = draw, adapter

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapter
        keep = self.draw.keep(adapter.place, torch.arange(adapter.width), width=adapter.width, drop=adapter.drop)
        assert 0.4 < float(keep.double().mean()) < 1.0, "it drops"
        return x * keep / (1 - adapter.drop)


def drop_alike(made: nn.Module, model: ModelConfig, context: Context) -> None:
    """Gives PEFT's dropouts our masks."""
    plain, draw = Whole(model, dtype=torch.float64, device=torch.device("cpu")), context.draw
    assert draw is not None
    made.train()
    for name, key in adapter_keys(model).items():
        if name.endswith(".lora_a"):
            _, layer, half, target, _ = name.split(".")
            projection = getattr(getattr(plain.blocks[int(layer)], half), target)
            made.get_submodule(key.removesuffix(".lora_A.weight")).lora_dropout["default"] = Addressed(draw, projection.adapter)


def against_peft(rank: int, world: int, say: Say, folder: str) -> dict[str, dict[str, Any]]:
    """Of each model: logits, loss, gradients of A and B in float64; which parameters of either have a gradient."""
    torch.set_num_threads(1)
    return {name: _differences(model_of(name), Path(folder)) for name in ADAPTED}


class Given:
    """Weights of a base by our names, as PeftFolder reads them."""

    bytes_read = 0

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box."""
        return self.weights[name][tuple(slice(low, high) for low, high in box)].flatten()[start:stop]


def _through_folders(
    made: nn.Module, model: ModelConfig, tokens: Tensor, logits: Tensor, weights: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Any], float]:
    """The adapter that we read of PEFT's folder; and how far the logits of PEFT with the folder that we write are off."""
    from peft import PeftModel

    mine = f"{model.family}-{len(list(folder.iterdir()))}"
    made.save_pretrained(folder / mine / "theirs", save_embedding_layers=False)
    found = PeftFolder.open(folder / mine / "theirs", bare(model), Given({}))
    trained = {row.name: weights[row.name] for row in table(model) if row.trained}
    assert found.tensors.keys() == trained.keys() and all(torch.equal(found.whole(name), trained[name]) for name in trained)
    write_adapter(folder / mine / "ours", model, trained, base="base", identity="b" * 64)
    again = PeftFolder.open(folder / mine / "ours", bare(model), Given({}))
    assert again.model == found.model and all(torch.equal(again.whole(name), trained[name]) for name in trained)
    with warnings.catch_warnings(), nothing_narrowed(), torch.no_grad():
        warnings.filterwarnings("error", message=".*(missing|tie_word)")
        theirs = PeftModel.from_pretrained(theirs_of(bare(model), torch.float64), folder / mine / "ours").double()
        off = 0.0 if model.adapter.dropout else worst({"logits": theirs(input_ids=tokens, use_cache=False).logits}, {"logits": logits})[0]
    return found.model.adapter.model_dump(), off


def _differences(model: ModelConfig, folder: Path) -> dict[str, Any]:
    data = {name: tensor for name, tensor in batch(model.vocab).items() if name in ("tokens", "labels")}
    made = with_peft(model, folder)
    context = make_context(model, **data, dtype=torch.float64)
    if model.adapter.dropout:
        drop_alike(made, model, context)
    with nothing_narrowed():
        logits = made(input_ids=data["tokens"], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    base = {
        name.replace(".base_layer", "").replace(".original_module", ""): p.data for name, p in parameters_of(made.get_base_model()).items()
    }
    weights = our_tensors(base, bare(model)) | matrices(made, model, lambda parameter: parameter.data)
    gradients = matrices(made, model, lambda parameter: parameter.grad)
    plain = plain_of(model, weights, torch.float64)
    ours, summed = plain.logits(context), plain(context)
    summed.backward()
    found = {name: parameter.grad for name, parameter in plain.by_name.items() if parameter.grad is not None}
    theirs = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    keys = len({*adapter_keys(model).values()})
    adapter, off = _through_folders(made, model, data["tokens"], logits, weights, folder)
    return {
        "folders": off,
        "logits": worst({"logits": ours}, {"logits": logits})[0],
        "loss": abs(float(summed.detach() / loss.detach()) - 1),
        "trained": found.keys() == gradients.keys() == {row.name for row in table(model) if row.trained} and len(theirs) == keys,
        "gradient": worst(found, gradients),
        "read back": adapter,
    }
