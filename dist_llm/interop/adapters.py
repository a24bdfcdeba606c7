"""Adapters in PEFT's form: where it keeps A and B of a projection, and what its config says of them. Torch-free.

    adapter_config.json         rank, alpha, targets, rsLoRA, the base's name
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (R, in), .lora_B.weight (out, R),
                                with DoRA .lora_magnitude_vector (out,); what is trained whole as in the base,
                                base_model.model.model.embed_tokens.weight

PEFT names targets by the ends of module names. A module of ours that Hugging Face keeps with others in one matrix (GPT-2's q, k and
v) has no adapter of its own there, and cannot be written. Of what is trained whole it asks whether a module's whole name ends with the
one given, so that "norm" is "input_layernorm" too: whole names are written. A table that is the output matrix too stays one where
`ensure_weight_tying` is set and lm_head is named (or a table called embed_tokens); PEFT then has it under both names, and needs both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from dist_llm.config.schema import AdapterConfig, ModelConfig
from dist_llm.errors import UsageError
from dist_llm.interop.families import place
from dist_llm.model.table import ENDS, table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MATRICES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "lora_m": "lora_magnitude_vector"}
# What changes the numbers and is not done here: key -> the values that change nothing.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, True, None),  # whether the base's matrices are transposed: its family says so
    "lora_bias": (False, None),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
}


def adapter_keys(model: ModelConfig) -> dict[str, str]:
    """Our name -> PEFT's, of every matrix of the model's adapter. Raises UsageError where PEFT has no such adapter."""
    found = {}
    for row in table(model):
        module, _, last = row.name.rpartition(".")
        if last in MATRICES:
            found[row.name] = f"{PREFIX}{_module(model, module)}.{MATRICES[last]}"
        elif row.trained:
            found[row.name] = f"{PREFIX}{place(model, row.name).key}"
    return found


def tied_key(model: ModelConfig) -> str:
    """Where PEFT has the table of tokens a second time, where it is the output matrix too."""
    return f"{PREFIX}{place(model, 'head.weight').key}"


def _module(model: ModelConfig, name: str) -> str:
    """Their module of one of our projections, "model.layers.0.self_attn.q_proj". Raises UsageError where it has others in it."""
    at = place(model, f"{name}.weight")
    block = f"{'.'.join(name.split('.')[:2])}."
    matrices = [row.name for row in table(model) if row.name.startswith(block) and row.name.endswith(".weight")]
    if [place(model, other).key for other in matrices].count(at.key) > 1:
        what, target = "PEFT has no adapter for a part of a matrix", name.rsplit(".", 1)[1]
        raise UsageError(what, where=f"model.adapter.targets: {target}", expected="o, up, down", found=f"{at.key} holds others beside it")
    return at.key.removesuffix(".weight")


def _modules(model: ModelConfig) -> dict[str, str]:
    """Their module in the first block -> our target, of every projection that PEFT can put an adapter on."""
    found = {}
    for row in table(model):
        if row.name.startswith("blocks.0.") and row.name.endswith(".weight") and row.role in ("column", "row"):
            name = row.name.removesuffix(".weight")
            with contextlib.suppress(UsageError):
                found[_module(model, name)] = name.rsplit(".", 1)[1]
    return found


def _whole_modules(model: ModelConfig) -> dict[str, str | None]:
    """Their module -> which end of a model it belongs to, of every module with weights; None: neither of them."""
    found = {place(model, row.name).key.rpartition(".")[0]: ENDS.get(row.unit) for row in table(model) if not row.beside}
    return {**found, place(model, "head.weight").key.removesuffix(".weight"): "embedding" if model.tied else "head"}


def saved_modules(values: Mapping[str, Any], model: ModelConfig, *, where: str) -> dict[str, str]:
    """Their module -> our end, of what a config says is trained whole; of a tied table the first.

    Raises UsageError for what is not done here.
    """
    names, ours, found = values.get("modules_to_save") or [], _whole_modules(model), dict[str, str]()
    for name in names if isinstance(names, list) else [names]:
        met = {module: end for module, end in ours.items() if isinstance(name, str) and name and module.endswith(name)}
        other = next((module for module, end in met.items() if end is None), None)
        if not met or other is not None:
            expected = ", ".join(module for module, end in ours.items() if end is not None)
            seen = f"modules_to_save {name!r}"[:80] + ("" if other is None else f", which is {other} too")
            raise UsageError("the adapter trains modules whole that stay as they are here", where=where, expected=expected, found=seen)
        found |= {module: end for module, end in met.items() if end is not None}
    table_of, output = (place(model, name).key.removesuffix(".weight") for name in ("embedding.weight", "head.weight"))
    if model.tied and output in found:
        del found[output]
        found[table_of] = "embedding"
    return found


def _shortest(module: str, modules: Iterable[str]) -> str:
    """The shortest end of a module's name that no other module ends with."""
    parts, others = module.split("."), [other for other in modules if other != module]
    ends = (".".join(parts[-length:]) for length in range(1, len(parts)))
    return next(end for end in ends if not any(other.endswith(f".{end}") for other in others))


def write_adapter_config(model: ModelConfig, *, base: str) -> dict[str, Any]:
    """adapter_config.json. base: the name or path under which PEFT finds the base."""
    adapter = model.adapter
    adapter_keys(model)  # raises where PEFT has no such adapter
    modules = _modules(model)
    names = sorted(_shortest(module, modules) for module, target in modules.items() if target in adapter.targets)
    whole = [place(model, row.name).key.rpartition(".")[0] for row in table(model) if row.trained and not row.beside]
    shared = model.tied and "embedding" in adapter.modules_to_save
    transposed = place(model, "blocks.0.attention.o.weight").transposed
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rank_stabilized,
        "target_modules": names,
        "bias": "none",
        "lora_dropout": adapter.dropout,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "use_dora": adapter.dora,
        "modules_to_save": list(dict.fromkeys(whole)) + [tied_key(model).removeprefix(PREFIX).removesuffix(".weight")] * shared or None,
        "ensure_weight_tying": shared,
    }


def read_adapter_config(values: Mapping[str, Any], model: ModelConfig, *, where: str) -> AdapterConfig:
    """adapter_config.json -> our section, for a base. Raises UsageError for what changes the numbers and is not done here."""
    if values.get("peft_type") != "LORA":
        raise UsageError("this is no LoRA adapter", where=where, expected="peft_type LORA", found=str(values.get("peft_type"))[:80])
    for key, plain in PLAIN.items():
        if values.get(key) not in plain:
            found = f"{key} {values[key]!r}"[:120]
            raise UsageError("the adapter does something that is not done here", where=where, expected=f"{key} {plain[0]!r}", found=found)
    rank, alpha, modules = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not alpha or alpha < 0:
        raise UsageError(
            "the adapter has no rank or no alpha", where=where, expected="r above 0, lora_alpha above 0", found=f"{rank}, {alpha}"
        )
    dropout = values.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UsageError(
            "the adapter's dropout is no part", where=where, expected="lora_dropout from 0 to below 1", found=f"{dropout!r}"[:80]
        )
    ours = _modules(model)
    wanted = list(ours) if modules == "all-linear" else modules if isinstance(modules, list) else []
    met = {name: [target for module, target in ours.items() if module == name or module.endswith(f".{name}")] for name in map(str, wanted)}
    unknown = [name for name, targets in met.items() if not targets] if met else [str(modules)]
    if unknown:
        expected = ", ".join(_shortest(module, ours) for module in ours)
        raise UsageError("the adapter is on modules that are not known", where=where, expected=expected, found=", ".join(unknown)[:200])
    targets: Any = tuple(target for target in dict.fromkeys(ours.values()) if any(target in found for found in met.values()))
    kinds: dict[str, Any] = {"rank_stabilized": values.get("use_rslora") is True, "dora": values.get("use_dora") is True}
    ends = saved_modules(values, model, where=where).values()
    kinds |= {"dropout": float(dropout), "modules_to_save": tuple(end for end in ("embedding", "head") if end in ends)}
    return AdapterConfig(rank=rank, alpha=float(alpha), targets=targets, **kinds)
