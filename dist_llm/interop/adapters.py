"""Adapters in PEFT's form: where it keeps A and B of a projection, and what its config says of them. Torch-free.

    adapter_config.json         rank, alpha, targets, rsLoRA, the base's name
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (R, in), .lora_B.weight (out, R),
                                with DoRA .lora_magnitude_vector (out,); what is trained whole as in the base,
                                base_model.model.model.embed_tokens.weight

PEFT names targets by the ends of module names, by a pattern, or as "all-linear", which it writes out as whole names: which modules have
matrices is read off the names of the tensors. Projections that Hugging Face keeps in one matrix (GPT-2's q, k and v) have one adapter
there, of n times the rank: all A one below the other, each B in its rows and the columns of its A (joined.py).

Of what is trained whole it asks whether a module's whole name ends with the
one given, so that "norm" is "input_layernorm" too: whole names are written. A table that is the output matrix too stays one where
`ensure_weight_tying` is set and lm_head is named (or a table called embed_tokens); PEFT then has it under both names, and needs both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import isclose
from pathlib import Path
from typing import Any

from dist_llm.config.schema import AdapterConfig, ModelConfig
from dist_llm.errors import UsageError
from dist_llm.interop.families import place
from dist_llm.interop.safe_file import unsound
from dist_llm.model.table import ENDS, table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MATRICES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "lora_m": "lora_magnitude_vector"}
# What changes the numbers and is not done here: key -> the values that change nothing.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, True, None),  # whether the base's matrices are transposed: its family says so
    "lora_bias": (False, None),
    "layers_to_transform": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    **dict.fromkeys(("use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config"), (None,)),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others begin by changing the base
}


def adapter_keys(model: ModelConfig) -> dict[str, str]:
    """Our name -> PEFT's, of every matrix of the model's adapter; projections that are one matrix there share a name.

    Raises UsageError where PEFT has no such adapter.
    """
    adapter, parts = model.adapter, joined(model)
    lacking = [part for part in parts if part not in adapter.targets]
    if adapter.dora and 0 < len(lacking) < len(parts):
        what, where = "PEFT measures the rows of a whole matrix", f"model.adapter.targets: {', '.join(adapter.targets)}"
        raise UsageError(what, where=where, expected=f"all of {', '.join(parts)}, or none", found=f"DoRA without {', '.join(lacking)}")
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


def joined(model: ModelConfig) -> tuple[str, ...]:
    """The projections that Hugging Face keeps in one matrix, in its order; none in most families."""
    return next((targets for targets in _modules(model).values() if len(targets) > 1), ())


def _module(model: ModelConfig, name: str) -> str:
    """Their module of one of our projections, "model.layers.0.self_attn.q_proj"."""
    return place(model, f"{name}.weight").key.removesuffix(".weight")


def _modules(model: ModelConfig, block: str = "blocks.0.") -> dict[str, tuple[str, ...]]:
    """Their module in a block -> our targets in it, of every projection."""
    found: dict[str, tuple[str, ...]] = {}
    for row in table(model):
        if row.name.startswith(block) and row.name.endswith(".weight") and row.role in ("column", "row"):
            name = row.name.removesuffix(".weight")
            module = _module(model, name)
            found[module] = (*found.get(module, ()), name.rsplit(".", 1)[1])
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


def _patterns(model: ModelConfig, adapter: AdapterConfig, count: int) -> dict[str, dict[str, Any]]:
    """What PEFT is told of a matrix with `count` of our adapters: so many times the rank, and an alpha that leaves the scale alone."""
    modules = _modules(model)
    names = [_shortest(module, modules) for module, targets in modules.items() if len(targets) > 1 and count > 1]
    factor = count**0.5 if adapter.rank_stabilized else count
    return {"rank_pattern": dict.fromkeys(names, count * adapter.rank), "alpha_pattern": dict.fromkeys(names, factor * adapter.alpha)}


def write_adapter_config(model: ModelConfig, *, base: str) -> dict[str, Any]:
    """adapter_config.json. base: the name or path under which PEFT finds the base."""
    adapter = model.adapter
    adapter_keys(model)  # raises where PEFT has no such adapter
    modules = _modules(model)
    names = sorted(_shortest(module, modules) for module, targets in modules.items() if {*targets} & {*adapter.targets})
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
        **_patterns(model, adapter, len({*joined(model)} & {*adapter.targets})),
        "target_modules": names,
        "bias": "none",
        "lora_dropout": adapter.dropout,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "use_dora": adapter.dora,
        "modules_to_save": list(dict.fromkeys(whole)) + [tied_key(model).removeprefix(PREFIX).removesuffix(".weight")] * shared or None,
        "ensure_weight_tying": shared,
    }


def read_adapter_config(values: Mapping[str, Any], model: ModelConfig, *, where: str, tensors: Collection[str]) -> AdapterConfig:
    """adapter_config.json -> our section, for a base. tensors: their names, which say on which modules it is.

    Of projections that are one matrix there, all are among the targets: what its tensors hold is not known yet. Raises UsageError for
    what changes the numbers and is not done here, CheckpointError where config and tensors contradict each other.
    """
    if values.get("peft_type") != "LORA":
        raise UsageError("this is no LoRA adapter", where=where, expected="peft_type LORA", found=str(values.get("peft_type"))[:80])
    for key, plain in PLAIN.items():
        if values.get(key) not in plain:
            found = f"{key} {values[key]!r}"[:120]
            raise UsageError("the adapter does something that is not done here", where=where, expected=f"{key} {plain[0]!r}", found=found)
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not alpha or alpha < 0:
        raise UsageError(
            "the adapter has no rank or no alpha", where=where, expected="r above 0, lora_alpha above 0", found=f"{rank}, {alpha}"
        )
    dropout = values.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise UsageError(
            "the adapter's dropout is no part", where=where, expected="lora_dropout from 0 to below 1", found=f"{dropout!r}"[:80]
        )
    kinds: dict[str, Any] = {"rank_stabilized": values.get("use_rslora") is True, "dora": values.get("use_dora") is True}
    ends = saved_modules(values, model, where=where).values()
    kinds |= {"dropout": float(dropout), "modules_to_save": tuple(end for end in ("embedding", "head") if end in ends)}
    targets: Any = _targets(values, model, where=where, tensors=tensors)
    adapter = AdapterConfig(rank=rank, alpha=float(alpha), targets=targets, **kinds)
    joined_rank(values, model, adapter, where=where)  # raises where other ranks are asked for
    return adapter


def _targets(values: Mapping[str, Any], model: ModelConfig, *, where: str, tensors: Collection[str]) -> tuple[str, ...]:
    """Our targets on which there are matrices, in every block."""
    placed = {module: (at, here) for at in range(model.layers) for module, here in _modules(model, f"blocks.{at}.").items()}
    on = sorted({name.removeprefix(PREFIX).split(".lora_")[0] for name in tensors if ".lora_" in name})
    first = [module for module, (at, _) in placed.items() if not at]
    if not on or (unknown := [module for module in on if module not in placed]):
        what, expected = "the adapter is on modules that take none here", ", ".join(_shortest(module, first) for module in first)
        found = ", ".join(unknown)[:200] if on else "no matrix of LoRA at all"
        raise UsageError(what, where=where, expected=expected, found=found)
    given = values.get("target_modules")
    named = list(map(str, given)) if isinstance(given, list) else on  # a pattern, or "all-linear": the tensors alone tell
    if strange := [module for module in on if not any(module == name or module.endswith(f".{name}") for name in named)]:
        what, expected = "the adapter has matrices that its config does not name", f"target_modules {', '.join(named)}"[:200]
        raise unsound(what, Path(where), expected=expected, found=", ".join(strange)[:200])
    met = dict.fromkeys(target for module in on for target in placed[module][1])
    for target in met:
        blocks = [placed[module][0] for module in on if target in placed[module][1]]
        if len(blocks) < model.layers:
            seen = f"{target} in {len(blocks)} of them, the first {blocks[0]}"
            raise UsageError("the adapter is on some blocks alone", where=where, expected=f"all {model.layers} blocks", found=seen)
    return tuple(target for targets in _modules(model).values() for target in targets if target in met)


def joined_rank(values: Mapping[str, Any], model: ModelConfig, adapter: AdapterConfig, *, where: str) -> int:
    """The rank of a matrix that is several projections of ours, where `r` is that of the others. Raises UsageError for other ranks."""
    given = {key: values.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for count in range(1, max(1, len(joined(model))) + 1):
        if all(_alike(given[key], wanted) for key, wanted in _patterns(model, adapter, count).items()):
            return count * adapter.rank
    key = next(key for key, value in given.items() if value != {})
    what, found = "the adapter has ranks or scales of their own for some modules", f"{key} {given[key]!r}"[:120]
    raise UsageError(what, where=where, expected=f"{key} {{}}", found=found)


def _alike(given: object, wanted: Mapping[str, float]) -> bool:
    """Whether a table has the numbers that are wanted, to the last digits."""
    if not isinstance(given, dict) or given.keys() != wanted.keys():
        return False
    return all(type(value) in (int, float) and isclose(value, wanted[name], rel_tol=1e-12) for name, value in given.items())
