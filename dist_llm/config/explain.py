"""What a config comes to: the equations of a run, and every value with its origin. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_llm.config.layout import Layout, equation
from dist_llm.config.load import Loaded, flat
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.config.yaml_file import flow


def rows(loaded: Loaded) -> list[tuple[str, str, str]]:
    """(dotted key, value as YAML writes it, origin) of every key, in the order of the schema."""
    return [(name, flow(value), loaded.origins[name]) for name, value in flat(loaded.config).items()]


def sizes(config: Config, layout: Layout) -> dict[str, int]:
    """Micro-batches per step and dp rank, and tokens per step and in all."""
    tokens = config.batch.global_ * config.data.sequence
    micro_batches = config.batch.global_ // (layout.dp * config.batch.micro)
    return {"micro_batches": micro_batches, "tokens_per_step": tokens, "tokens": tokens * config.schedule.steps}


def equations(config: Config, layout: Layout) -> list[str]:
    """The run in numbers: `64 ranks = dp 4 x pp 4 x cp 1 x tp 4`, the batch, the tokens."""
    batch, data, steps, size = config.batch, config.data, config.schedule.steps, sizes(config, layout)
    return [
        equation(layout),
        f"{batch.global_} sequences = {layout.dp} dp x {size['micro_batches']} micro x {batch.micro}",
        f"{size['tokens']:,} tokens = {steps} steps x {batch.global_} sequences x {data.sequence}",
    ]


def model_line(config: Config, parameters: int, trained: int) -> str:
    """`llama: 1,442,048 parameters; 4 layers, dim 128, 4 heads over 2 kv heads of 32, ffn 344, vocab 2048`."""
    m = config.model
    shape = f"{m.layers} layers, dim {m.dim}, {m.heads} heads over {m.kv_heads} kv heads of {m.head_dim}, ffn {m.ffn}, vocab {m.vocab}"
    some = f", {trained:,} of them trained" if trained < parameters else ""
    return f"{m.preset or m.family}: {parameters:,} parameters{some}; {shape}{', tied' if m.tied else ''}"


def new_rows(model: ModelConfig, added: Sequence[str]) -> list[str]:
    """What is to be said where a template adds tokens to a base's tokenizer whose rows an adapter leaves as they are."""
    lacking = [end for end in ("embedding", "head") if end not in model.adapter.modules_to_save and not (end == "head" and model.tied)]
    if not added or not model.adapter.rank or not lacking:
        return []
    wanted = "embedding" if model.tied else "embedding, head"
    names = " ".join(added)
    return [f"the base never saw {names}, and their rows stay as they are under this adapter: model.adapter.modules_to_save=[{wanted}]"]


def long_sequences(config: Config) -> list[str]:
    """What is to be said where sequences are longer than the positions that a model was made for."""
    most, sequence = config.model.max_positions, config.data.sequence
    if sequence <= most or config.model.positions == "learned":
        return []
    whose = "the base was made for" if config.base is not None else "model.max_positions is"
    return [f"sequences have {sequence} tokens, and {whose} {most}: positions from there on are new to it, and an export says {sequence}"]


def as_data(loaded: Loaded, layout: Layout, *, parameters: int, explain: bool) -> dict[str, Any]:
    """The answer of `check --json`."""
    answer: dict[str, Any] = {"version": 1, "config": loaded.path, "world": layout.world, "layout": str(layout), "parameters": parameters}
    answer |= sizes(loaded.config, layout)
    if explain:
        values = flat(loaded.config)
        answer["values"] = {name: {"value": values[name], "origin": loaded.origins[name]} for name in values}
    return answer
