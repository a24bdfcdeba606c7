"""Models and layouts of the parity tests: named rows, and a seeded generator of legal layouts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from dist_llm.config.layout import Layout, parse_layout, resolve, world_of
from dist_llm.config.rules import problems
from dist_llm.config.schema import Config

BATCH = {"global": 8, "micro": 2}
# Batches are made up, no text is read: a tokenizer file that is not there may have any size.
DATA = {"sequence": 24, "tokenizer": {"kind": "file", "path": "tokenizer.json"}}
OPTIMIZER = {"kind": "adamw", "lr": 1e-2, "weight_decay": 0.1, "clip": 0.5, "betas": [0.9, 0.95]}

# Small models with odd shapes; between them every switch of the table is on once and off once.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "layers": 4, "dim": 24, "heads": 8, "kv_heads": 4, "head_dim": 6, "ffn": 44, "vocab": 97},
    "tied": {"family": "llama", "layers": 4, "dim": 24, "heads": 8, "kv_heads": 2, "head_dim": 4, "ffn": 36, "vocab": 83, "tied": True},
    "one kv head": {"family": "llama", "layers": 4, "dim": 20, "heads": 8, "kv_heads": 1, "head_dim": 4, "ffn": 26, "vocab": 61},
    "gpt2": {"family": "gpt2", "layers": 4, "dim": 24, "heads": 8, "ffn": 50, "vocab": 89, "dropout": 0.1},
    "qwen3": {"family": "qwen3", "layers": 5, "dim": 28, "heads": 8, "kv_heads": 2, "head_dim": 6, "ffn": 40, "vocab": 101, "tied": True},
    "seven layers": {
        "family": "llama",
        "layers": 7,
        "dim": 16,
        "heads": 8,
        "kv_heads": 8,
        "ffn": 22,
        "vocab": 67,
        "bias": True,
        "dropout": 0.05,
    },
}
# Trained are small matrices alone: on all projections, and on some of them with biases, tied weights and other scales.
MODELS["lora"] = {**MODELS["llama"], "adapter": {"rank": 3, "alpha": 8.0}}
MODELS["lora on some"] = {
    **MODELS["tied"],
    "bias": True,
    "adapter": {"rank": 5, "alpha": 3.0, "rank_stabilized": True, "targets": ["q", "v", "o", "up"]},
}
# Rows that have lengths of their own, and inputs that reach A in part.
MODELS["dora"] = {**MODELS["llama"], "bias": True, "adapter": {"rank": 3, "alpha": 8.0, "dora": True}}
MODELS["lora dropped"] = {**MODELS["llama"], "ffn": 46, "adapter": {"rank": 3, "dropout": 0.3}}
MODELS["dora dropped"] = {**MODELS["tied"], "adapter": {"rank": 2, "dropout": 0.2, "dora": True, "targets": ["v", "o", "gate", "down"]}}
# Beside an adapter: the two ends of a model, the table with learned positions that is the output matrix too, the output matrix alone.
ENDS = ["embedding", "head"]
MODELS["lora and ends"] = {**MODELS["llama"], "vocab": 59, "adapter": {"rank": 2, "modules_to_save": ENDS}}
ON_ENDS = {"rank": 2, "dora": True, "targets": ["o", "up"], "modules_to_save": ["embedding"]}
MODELS["dora and table"] = {**MODELS["gpt2"], "tied": True, "adapter": ON_ENDS}
# Noise on embedded tokens, as much as the documents are long.
MODELS["noisy"] = {**MODELS["llama"], "neftune": 5.0, "vocab": 23}
QLORA = {**MODELS["llama"], "head_dim": 8, "ffn": 64, "vocab": 53}
MODELS["nf4 and head"] = {**QLORA, "adapter": {"rank": 2, "quantize": "nf4", "block": 8, "modules_to_save": ["head"]}}
MODELS["nf4"] = {**QLORA, "adapter": {"rank": 4, "quantize": "nf4", "block": 8}}
ON_SOME = {"dora": True, "targets": ["k", "o", "up", "down"]}
MODELS["nf4 dora"] = {**QLORA, "kv_heads": 2, "adapter": {"rank": 4, "quantize": "nf4", "block": 8, **ON_SOME}}
MODELS["int8"] = {**QLORA, "tied": True, "bias": True, "adapter": {"rank": 2, "quantize": "int8", "block": 8, "targets": ["q", "down"]}}
# More rows in the vocabulary than the tokenizer has tokens: over tp=4 the last rank holds nothing but padding.
MODELS["padded"] = {**MODELS["llama"], "layers": 2, "tied": True}
# Labels that count unequally, as those of conversations do.
MODELS["weighted"] = {**MODELS["llama"], "vocab": 79, "tied": True}
# Answers preferred to others: the loss is of pairs, divided by their number; with a trained and with an untrained table of the output.
MODELS["pairs"] = {**MODELS["llama"], "vocab": 71}
MODELS["lora pairs"] = {**MODELS["lora"], "vocab": 59, "tied": True}
MODELS["lora pairs and head"] = {**MODELS["lora"], "vocab": 59, "adapter": {"rank": 2, "modules_to_save": ["head"]}}
# What other families of models do besides: windows, norms behind a half of a block or over all heads, capped scores and logits.
WIDER: dict[str, dict[str, Any]] = {
    "mistral": {
        "family": "mistral",
        "layers": 4,
        "dim": 24,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 6,
        "ffn": 44,
        "vocab": 97,
        "sliding_window": 7,
    },
    "olmo2": {"family": "olmo2", "layers": 4, "dim": 24, "heads": 8, "kv_heads": 2, "head_dim": 6, "ffn": 36, "vocab": 83},
    "gemma2": {
        "family": "gemma2",
        "layers": 4,
        "dim": 20,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 6,
        "ffn": 42,
        "vocab": 61,
        "query_scale": 5.0,
        "sliding_window": 6,
        "attention_softcap": 0.5,
        "logit_softcap": 1.0,
    },
    "gemma3": {
        "family": "gemma3",
        "layers": 5,
        "dim": 24,
        "heads": 8,
        "kv_heads": 1,
        "head_dim": 4,
        "ffn": 38,
        "vocab": 71,
        "sliding_window": 5,
        "full_every": 3,
        "rope_local_theta": 50.0,
        "rope_scaling": "linear",
        "rope_factor": 8.0,
        "dropout": 0.1,
    },
}
PAIRS = {**DATA, "source": "skills", "chat": {"format": "preference"}}
EXTRA: dict[str, dict[str, Any]] = {  # sections beside the model
    "padded": {"data": {**DATA, "tokenizer": {**DATA["tokenizer"], "vocab": 70}}},
    "one kv head": {"data": {**DATA, "document_mask": True, "reset_positions": True}},
    "llama": {"optimizer": {**OPTIMIZER, "label_smoothing": 0.1}},
    "weighted": {"data": {**DATA, "source": "skills", "chat": {"format": "messages"}}, "optimizer": {**OPTIMIZER, "label_smoothing": 0.05}},
    "noisy": {"data": {**DATA, "document_mask": True}},
    "pairs": {"data": PAIRS, "preference": {"beta": 0.05, "label_smoothing": 0.1, "sft": 0.2}, "optimizer": OPTIMIZER},
    "lora pairs": {"data": PAIRS, "preference": {"loss": "ipo", "beta": 2.0, "length_normalised": True}},
    "lora pairs and head": {"data": PAIRS, "preference": {"beta": 0.05}},
    "mistral": {"data": {**DATA, "document_mask": True, "reset_positions": True}},
    "gemma2": {"optimizer": {**OPTIMIZER, "label_smoothing": 0.1}},
}

# Layouts that had a bug here or elsewhere, and those that users type first.
NAMED: list[tuple[str, str]] = [
    ("llama", "dp=1,zero=3"),
    ("llama", "dp=2"),
    ("llama", "dp=2,reduce=micro_batch"),
    ("llama", "dp=2,zero=1"),
    ("llama", "dp=2,zero=1,reduce=micro_batch"),
    ("llama", "dp=2,zero=2"),
    ("llama", "dp=2,zero=2,reduce=step"),
    ("llama", "dp=2,zero=3"),
    ("llama", "dp=2,zero=3,reduce=step"),
    ("llama", "dp=2,zero=3,unshard=step"),
    ("llama", "dp=2,zero=3,recompute=full"),
    ("llama", "dp=3,zero=0"),
    ("llama", "dp=4,zero=2"),
    ("llama", "tp=2"),
    ("llama", "tp=2,sp=off"),
    ("llama", "tp=2,recompute=full"),
    ("llama", "tp=2,recompute=selective"),
    ("llama", "tp=4"),
    ("llama", "pp=2,schedule=gpipe"),
    ("llama", "pp=2,schedule=1f1b"),
    ("llama", "pp=2,schedule=interleaved,chunks=2"),
    ("llama", "pp=4"),
    ("llama", "pp=4,recompute=full"),
    ("llama", "dp=2,tp=2,zero=1"),
    ("llama", "dp=2,tp=2,zero=3"),
    ("llama", "dp=2,pp=2,zero=2"),
    ("llama", "tp=2,pp=2"),
    ("llama", "dp=2,tp=2,pp=2,zero=1"),
    ("tied", "dp=2,zero=3"),  # a tied weight: one accumulator per use (trap 13)
    ("tied", "pp=2,schedule=gpipe"),
    ("tied", "pp=4,schedule=1f1b"),
    ("tied", "dp=2,pp=2,zero=3,unshard=micro_batch"),
    ("tied", "tp=4,sp=off"),  # 2 kv heads on 4 ranks (trap 9)
    ("lora", "dp=2"),
    ("lora", "dp=2,zero=1"),
    ("lora", "dp=2,zero=2"),
    ("lora", "dp=2,zero=3"),
    ("lora", "tp=2"),
    ("lora", "pp=2"),
    ("lora", "dp=2,tp=2,zero=3,recompute=full"),
    ("lora", "tp=2,pp=2,sp=off"),
    ("lora on some", "tp=4"),  # 2 kv heads on 4 ranks
    ("lora on some", "dp=2,pp=2,zero=3,unshard=micro_batch"),
    ("lora on some", "dp=2,tp=2,zero=2,recompute=selective"),
    ("lora on some", "pp=4,schedule=1f1b"),
    ("nf4", "dp=2"),
    ("nf4", "dp=2,zero=2"),
    ("nf4", "dp=2,zero=3"),
    ("nf4", "tp=2"),
    ("nf4", "dp=2,tp=2,zero=3,unshard=step"),
    ("nf4", "pp=2,recompute=full"),
    ("int8", "dp=2,pp=2,zero=3"),
    ("int8", "tp=4,sp=off"),
    ("int8", "dp=4,zero=3,shard=2"),
    ("dora", "dp=2,zero=1"),
    ("dora", "dp=2,zero=3"),
    ("dora", "tp=2"),
    ("dora", "tp=2,recompute=full"),
    ("dora", "tp=4,sp=off,recompute=selective"),
    ("dora", "pp=2,schedule=gpipe"),
    ("dora", "dp=2,tp=2,zero=2,offload=optimizer"),
    ("nf4 dora", "dp=2,zero=3"),
    ("nf4 dora", "tp=4"),  # 2 kv heads on 4 ranks: a magnitude that two ranks share
    ("nf4 dora", "tp=2,pp=2"),
    ("lora dropped", "tp=4"),  # 46 features over 4 ranks: uneven, and masks know which are whose
    ("lora dropped", "dp=2,zero=1"),
    ("lora dropped", "tp=2,sp=off,recompute=full"),
    ("lora dropped", "pp=2,schedule=interleaved"),
    ("dora dropped", "tp=2,recompute=selective"),
    ("dora dropped", "dp=2,zero=3"),
    ("dora dropped", "tp=4,sp=off"),
    ("lora and ends", "dp=2,zero=3"),
    ("lora and ends", "dp=2,tp=2,zero=2,reduce=micro_batch"),
    ("lora and ends", "tp=4,sp=off"),
    ("lora and ends", "pp=2,schedule=interleaved"),
    ("lora and ends", "dp=2,pp=2,zero=1,offload=optimizer"),
    ("dora and table", "tp=2,pp=2"),
    ("dora and table", "dp=2,tp=2,zero=3,recompute=full"),
    ("dora and table", "dp=2,pp=2,zero=3,unshard=micro_batch"),
    ("dora and table", "dp=2,zero=1"),
    ("nf4 and head", "tp=2,pp=2"),
    ("nf4 and head", "dp=2,zero=3"),
    ("nf4 and head", "dp=4,zero=2,shard=2"),
    ("noisy", "tp=2"),  # each rank its tokens' noise
    ("noisy", "dp=2,zero=3"),
    ("noisy", "pp=2"),
    ("noisy", "dp=2,tp=2,sp=off"),
    ("one kv head", "tp=2"),
    ("one kv head", "tp=4,sp=off"),
    ("one kv head", "tp=8"),
    ("gpt2", "dp=2,zero=2"),  # a key bias has no gradient; dropout under every split (trap 11)
    ("gpt2", "tp=2"),
    ("gpt2", "tp=2,sp=off"),
    ("gpt2", "pp=2,schedule=interleaved"),
    ("gpt2", "dp=2,tp=2,pp=2"),
    ("padded", "tp=4"),
    ("qwen3", "tp=2"),  # q and k norms inside the split region (trap 9)
    ("qwen3", "tp=4"),
    ("qwen3", "dp=2,tp=2,zero=2"),
    ("seven layers", "pp=4,schedule=1f1b"),  # uneven stages
    ("seven layers", "pp=2,schedule=interleaved,chunks=3"),
    ("seven layers", "dp=2,tp=4,zero=3"),
    # Labels with weights: the loss is divided by their sum over the global batch.
    ("weighted", "dp=2"),
    ("weighted", "dp=2,zero=1"),
    ("weighted", "dp=2,zero=2"),
    ("weighted", "dp=2,zero=3"),
    ("weighted", "tp=2"),
    ("weighted", "tp=2,sp=off"),
    ("weighted", "pp=2"),
    ("weighted", "dp=2,tp=2,pp=2,zero=1"),
    # The loss of a pair needs both of its sides; the log probabilities come from the vocabulary in slices, on the last stage.
    ("pairs", "dp=2"),
    ("pairs", "dp=2,zero=1"),
    ("pairs", "dp=2,zero=2"),
    ("pairs", "dp=2,zero=3"),
    ("pairs", "tp=2"),
    ("pairs", "tp=2,sp=off"),
    ("pairs", "pp=2,schedule=gpipe"),
    ("pairs", "pp=2"),
    ("pairs", "pp=2,schedule=interleaved,chunks=2"),
    ("pairs", "dp=2,tp=2,pp=2,zero=1"),
    ("pairs", "dp=4,zero=3,shard=2"),
    ("pairs", "dp=2,tp=2,zero=3,recompute=full"),
    ("lora pairs", "dp=2,zero=2"),
    ("lora pairs", "tp=2"),
    ("lora pairs", "pp=2"),
    ("lora pairs", "dp=2,tp=2,zero=3"),
    ("lora pairs and head", "tp=2"),
    # Hybrid sharding: shards inside a group, replicas across.
    ("llama", "dp=4,zero=1,shard=2"),
    ("llama", "dp=4,zero=1,shard=2,reduce=micro_batch"),
    ("llama", "dp=4,zero=2,shard=2"),
    ("llama", "dp=4,zero=3,shard=2"),
    ("llama", "dp=4,zero=3,shard=2,reduce=step"),
    ("llama", "dp=4,zero=3,shard=2,unshard=step,recompute=full"),
    ("llama", "dp=2,zero=3,shard=1"),  # a shard group of one rank: nothing is split, everything replicated
    ("llama", "dp=3,zero=2,shard=1"),  # three replicas: each sums a third of a shard
    ("llama", "dp=4,tp=2,zero=3,shard=2"),
    ("llama", "dp=8,zero=3,shard=4"),
    ("llama", "dp=8,zero=2,shard=2"),
    ("tied", "dp=4,zero=3,shard=2"),
    ("tied", "dp=2,pp=2,zero=2,shard=1"),  # a tied weight: summed over replicas, then over both stages
    ("tied", "dp=4,pp=2,zero=1,shard=2,schedule=gpipe"),
    ("one kv head", "dp=2,tp=2,zero=2,shard=1,sp=off"),
    ("gpt2", "dp=4,pp=2,zero=3,shard=2,schedule=interleaved"),
    # Master weights and moments in host memory.
    ("llama", "dp=2,offload=optimizer"),
    ("llama", "dp=2,zero=1,offload=optimizer"),
    ("llama", "dp=2,zero=2,offload=optimizer"),
    ("llama", "dp=2,zero=3,offload=optimizer"),
    ("llama", "dp=2,tp=2,zero=1,offload=optimizer"),
    ("tied", "dp=2,pp=2,zero=3,offload=optimizer"),
    ("gpt2", "tp=2,pp=2,offload=optimizer"),
    ("llama", "dp=4,zero=3,shard=2,offload=optimizer"),
]


NAMED += [
    ("mistral", "tp=2"),
    ("mistral", "dp=2,zero=3"),
    ("mistral", "pp=2,schedule=gpipe"),
    ("olmo2", "dp=2,zero=2"),
    ("olmo2", "tp=2"),
    ("olmo2", "tp=2,sp=off"),
    ("olmo2", "tp=4"),  # 2 kv heads on 4 ranks: in the mean over all heads they count once (trap 9)
    ("olmo2", "tp=8,sp=off"),
    ("olmo2", "tp=2,recompute=full"),
    ("olmo2", "tp=4,recompute=selective"),
    ("olmo2", "tp=2,pp=2"),
    ("olmo2", "dp=2,tp=2,zero=3"),
    ("gemma2", "dp=2,zero=2"),
    ("gemma2", "tp=2"),
    ("gemma2", "tp=4,sp=off"),
    ("gemma2", "tp=2,recompute=selective"),
    ("gemma2", "pp=4,schedule=1f1b"),
    ("gemma2", "dp=2,tp=2,pp=2,zero=1"),
    ("gemma3", "tp=2"),
    ("gemma3", "tp=4,sp=off"),
    ("gemma3", "dp=2,zero=1"),
    ("gemma3", "dp=2,zero=3,recompute=full"),
    ("gemma3", "pp=2,schedule=interleaved"),
    ("gemma3", "tp=2,pp=2,schedule=gpipe"),
]

# Five blocks over two stages: the end of the first lies inside the third. Adapters on both halves of a block, and on one alone.
HALVED: dict[str, dict[str, Any]] = {
    "halved": {**MODELS["llama"], "layers": 5, "bias": True, "dropout": 0.1, "vocab": 67},
    "halved, tied": {**WIDER["gemma2"], "layers": 5, "tied": True},
    "halved lora": {**MODELS["lora on some"], "layers": 5, "adapter": {"rank": 3, "targets": ["q", "v"], "dora": True}},
    "halved nf4": {**MODELS["nf4"], "layers": 5, "vocab": 59},
}
HALVED_ROWS: list[tuple[str, str]] = [
    ("halved", "pp=2"),
    ("halved", "pp=2,schedule=gpipe,recompute=selective"),
    ("halved", "pp=2,schedule=interleaved,recompute=full"),
    ("halved", "tp=2,pp=2"),
    ("halved", "dp=2,pp=2,zero=3"),
    ("halved, tied", "tp=2,pp=2,sp=off,recompute=selective"),
    ("halved, tied", "pp=2"),
    ("halved lora", "tp=2,pp=2"),
    ("halved lora", "dp=2,pp=2,zero=3,unshard=micro_batch"),
    ("halved nf4", "pp=2,recompute=full"),
]
NAMED += HALVED_ROWS

# Of those the ones that run behind `long`: what they alone show is little beside the others.
LATER: set[tuple[str, str]] = {
    *(("qwen3", text) for text in ("tp=4", "dp=2,tp=2,zero=2")),
    *(("seven layers", text) for text in ("dp=2,tp=4,zero=3", "pp=4,schedule=1f1b")),
    *(("llama", text) for text in ("dp=8,zero=3,shard=4", "dp=4,tp=2,zero=3,shard=2")),
    *(("tied", text) for text in ("dp=4,zero=3,shard=2", "dp=4,pp=2,zero=1,shard=2,schedule=gpipe")),
    ("gpt2", "dp=4,pp=2,zero=3,shard=2,schedule=interleaved"),
    ("gemma3", "tp=4,sp=off"),
    ("weighted", "dp=2,tp=2,pp=2,zero=1"),
    *(("one kv head", text) for text in ("tp=4,sp=off", "tp=8")),
    ("olmo2", "tp=8,sp=off"),
    *(("olmo2", text) for text in ("tp=2,sp=off", "tp=2,recompute=full", "tp=4,recompute=selective", "tp=2,pp=2", "dp=2,tp=2,zero=3")),
    *(("gemma2", text) for text in ("dp=2,zero=2", "tp=4,sp=off", "dp=2,tp=2,pp=2,zero=1")),
    *(("gemma3", text) for text in ("tp=2", "dp=2,zero=1", "pp=2,schedule=interleaved")),
    *(("mistral", text) for text in ("dp=2,zero=3", "pp=2,schedule=gpipe")),
    *(("lora", text) for text in ("dp=2", "dp=2,zero=1", "dp=2,zero=2", "tp=2,pp=2,sp=off")),
    *(("lora on some", text) for text in ("dp=2,tp=2,zero=2,recompute=selective", "pp=4,schedule=1f1b")),
    *(("nf4", text) for text in ("dp=2", "dp=2,zero=2", "dp=2,tp=2,zero=3,unshard=step")),
    *(("int8", text) for text in ("tp=4,sp=off", "dp=4,zero=3,shard=2")),
    *(("dora", text) for text in ("dp=2,zero=1", "tp=2,recompute=full", "tp=4,sp=off,recompute=selective", "pp=2,schedule=gpipe")),
    ("dora", "dp=2,tp=2,zero=2,offload=optimizer"),
    *(("nf4 dora", text) for text in ("dp=2,zero=3", "tp=2,pp=2")),
    *(("lora dropped", text) for text in ("dp=2,zero=1", "tp=2,sp=off,recompute=full", "pp=2,schedule=interleaved")),
    *(("dora dropped", text) for text in ("dp=2,zero=3", "tp=4,sp=off")),
    *(("lora and ends", text) for text in ("dp=2,tp=2,zero=2,reduce=micro_batch", "tp=4,sp=off", "pp=2,schedule=interleaved")),
    ("lora and ends", "dp=2,pp=2,zero=1,offload=optimizer"),
    *(("dora and table", text) for text in ("dp=2,tp=2,zero=3,recompute=full", "dp=2,pp=2,zero=3,unshard=micro_batch", "dp=2,zero=1")),
    *(("nf4 and head", text) for text in ("tp=2,pp=2", "dp=4,zero=2,shard=2")),
    *(("noisy", text) for text in ("dp=2,zero=3", "dp=2,tp=2,sp=off")),
    *(("pairs", text) for text in ("dp=2", "dp=2,zero=1", "dp=2,zero=2", "tp=2,sp=off", "pp=2", "dp=4,zero=3,shard=2")),
    *(("pairs", text) for text in ("pp=2,schedule=interleaved,chunks=2", "dp=2,tp=2,zero=3,recompute=full", "dp=2,tp=2,pp=2,zero=1")),
    *(("lora pairs", text) for text in ("dp=2,zero=2", "pp=2", "dp=2,tp=2,zero=3")),
    *(("weighted", text) for text in ("dp=2,zero=1", "dp=2,zero=2", "tp=2,sp=off")),
    *((model, "tp=4") for model in ("lora dropped", "nf4 dora", "lora on some", "olmo2")),
    *(("llama", text) for text in ("dp=4,zero=1,shard=2,reduce=micro_batch", "dp=2,tp=2,zero=1,offload=optimizer", "dp=8,zero=2,shard=2")),
    ("gemma3", "dp=2,zero=3,recompute=full"),
    ("dora dropped", "tp=2,recompute=selective"),
    ("gemma2", "tp=2,recompute=selective"),
    ("lora", "dp=2,tp=2,zero=3,recompute=full"),
    ("gpt2", "tp=2,pp=2,offload=optimizer"),
    ("tied", "dp=2,pp=2,zero=3,offload=optimizer"),
}
# Of the drawn ones: four ranks that wait for each other hundreds of times, which `tp=4` of other models shows.
DRAWN_LATER: set[tuple[str, str]] = {
    ("nf4 and head", "dp=1,tp=4,zero=2,sp=off,recompute=full"),
    ("nf4", "dp=1,tp=4,zero=2,reduce=micro_batch,recompute=full"),
    ("dora and table", "dp=1,tp=4,zero=2,sp=off"),
}


def config_of(model: str) -> Config:
    """The config of one of the models."""
    sections = {"data": DATA, "batch": BATCH, "optimizer": OPTIMIZER, "schedule": {"kind": "constant", "steps": 4}}
    return Config.model_validate({"model": {**MODELS, **WIDER, **HALVED}[model], **sections, **EXTRA.get(model, {})})


def concrete(text: str) -> Layout:
    """A layout text on its own number of ranks."""
    given = parse_layout(text)
    return resolve(given, world_of(given))


def for_layout(config: Config, layout: Layout) -> Config:
    """The same run with a batch that divides over dp=3 or 6; one of two micro-batches where shards have replicas, or tp is alone."""
    if layout.shard != layout.dp * layout.cp or layout.dp == layout.pp == 1:
        size = 2 * layout.dp * config.batch.micro
    else:
        size = 6 if config.batch.global_ % layout.dp else config.batch.global_
    return config.model_copy(update={"batch": config.batch.model_copy(update={"global_": size})})


def drawn(seed: int, *, largest: int = 8, models: dict[str, dict[str, Any]] = MODELS) -> Iterator[tuple[str, str]]:
    """A row of (model, layout) pairs that `check` accepts, each layout once per model; worlds up to `largest`."""
    dice = random.Random(seed)
    seen = set()
    for _ in range(100_000):
        model = dice.choice([name for name in models if name not in ("padded", "weighted") and "pairs" not in name])
        axes = {"dp": dice.choice([1, 1, 2, 2, 3, 4]), "tp": dice.choice([1, 1, 2, 2, 4, 8]), "pp": dice.choice([1, 1, 2, 2, 3, 4])}
        text = ",".join(f"{axis}={size}" for axis, size in axes.items() if size > 1 or axis == "dp")
        text += f",zero={dice.randrange(4)}" + dice.choice(["", ",reduce=step", ",reduce=micro_batch"])
        if "zero=0" not in text:
            text += dice.choice(["", "", *(f",shard={size}" for size in range(1, axes["dp"]) if axes["dp"] % size == 0)])
        text += dice.choice(["", ",unshard=step", ",unshard=micro_batch"]) if "zero=3" in text else ""
        text += dice.choice(["", ",sp=off"]) if axes["tp"] > 1 else ""
        if axes["pp"] > 1:
            text += dice.choice(["", ",schedule=gpipe", ",schedule=interleaved", ",schedule=interleaved,chunks=3"])
        text += dice.choice(["", "", ",recompute=full", ",recompute=selective"])
        text += dice.choice(["", "", "", ",offload=optimizer"])
        layout = concrete(text)
        if layout.world > largest or (model, layout) in seen or problems(for_layout(config_of(model), layout), layout):
            continue
        seen.add((model, layout))
        yield model, text


def distinct(rows: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The rows whose layout no row before them has, with whatever model."""
    seen = set()
    for model, text in rows:
        if (layout := concrete(text)) not in seen:
            seen.add(layout)
            yield model, text
