"""What a config takes from the weights that it begins with: the model, whose numbers it may not contradict, and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_llm.config.presets import fill_model
from dist_llm.config.yaml_file import flow

# What says nothing about the weights: how they are trained, and where they came from. An adapter lies beside them.
FREE = ("preset", "dropout", "neftune", "init_std", "residual_scale", "adapter")


@dataclass(frozen=True)
class Facts:
    """What is known of a base. path: as the config is to name it; model: every value of its section; tokenizer: its file.

    was: where a config of the run may still look for that file, which is there no more.
    """

    path: str
    model: dict[str, Any]
    tokenizer: str
    was: str | None = None


ReadBase = Callable[[dict[str, Any]], Facts]  # of a config's plain tree


def take(tree: dict[str, Any], facts: Facts) -> tuple[list[tuple[tuple[str, ...], str]], dict[str, str]]:
    """Fills a config's plain tree from a base. Returns contradictions as (key, sentence), and the origins of what was filled in."""
    given = tree.get("model")
    if given is not None and not isinstance(given, dict):
        return [], {}
    given = given or {}
    values, origins = fill_model(given)  # a preset and the shorthand `bias` spelled out
    asked = {name for name in values if origins.get(name, "given").split(" ")[0] in ("given", "preset") or origins.get(name) == "= bias"}
    faults: list[tuple[tuple[str, ...], str]] = []
    for name in sorted(asked - {*FREE}):
        wanted, has = values[name], facts.model.get(name)
        if name in facts.model and (type(wanted) is bool, wanted) != (type(has) is bool, has) and not _idle(name, facts.model):
            key = ("model", name) if name in given else ("model", "bias" if origins[name] == "= bias" else "preset")
            faults.append((key, f"model.{name}: {flow(wanted)[:60]} here, {flow(has)} in the base {facts.path}"))
    taken = {name: value for name, value in facts.model.items() if name not in given or name not in FREE}
    tree["model"] = {**{name: given[name] for name in FREE if name in given}, **taken}
    tree["base"] = facts.path
    filled = {f"model.{name}": f"base {facts.path}" for name in taken if name not in given}
    data = tree.get("data")
    known = data.get("tokenizer") if isinstance(data, dict) else data
    if known is None or (facts.was is not None and isinstance(known, dict) and known.get("path") == facts.was):
        tree["data"] = {**(data or {}), "tokenizer": {"kind": "file", "path": facts.tokenizer}}
        filled |= dict.fromkeys(("data.tokenizer.kind", "data.tokenizer.path"), f"base {facts.path}")
    return faults, filled


def of_weights(model: dict[str, Any]) -> dict[str, Any]:
    """The values of a model section that say what its weights compute."""
    return {name: value for name, value in model.items() if name not in (*FREE, "family") and not _idle(name, model)}


def _idle(name: str, model: dict[str, Any]) -> bool:
    """Whether a number means nothing to this model."""
    unused = "max_positions" if model["positions"] == "rotary" else "rope_theta"
    return name == unused
