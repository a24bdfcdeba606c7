"""A config file plus overrides becomes a `Config`: every error at once with its place, and the origin of every value."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dist_llm.config import layout as layouts
from dist_llm.config.base import ReadBase
from dist_llm.config.base import take as take_base
from dist_llm.config.layout import did_you_mean, nearest
from dist_llm.config.presets import fill_model
from dist_llm.config.schema import Config, MixItem, Section, fill_across
from dist_llm.config.yaml_file import MAX_DEPTH, MAX_FAULTS, Fault, Node, Place, dump, flow, read, read_file
from dist_llm.errors import UsageError, plain

# What other trainers call our keys: refused, with the name to write.
OTHER_NAMES = {
    "model.layers": "n_layers n_layer num_layers num_hidden_layers",
    "model.dim": "hidden_size n_embd d_model embed_dim model_dim",
    "model.heads": "n_heads n_head num_heads num_attention_heads",
    "model.kv_heads": "n_kv_heads num_kv_heads num_key_value_heads",
    "model.ffn": "intermediate_size ffn_dim hidden_dim d_ff",
    "model.vocab": "vocab_size",
    "model.tied": "tie_word_embeddings weight_tying",
    "model.norm_eps": "rms_norm_eps layer_norm_eps",
    "model.max_positions": "max_position_embeddings n_positions",
    "model.adapter.rank": "r lora_r lora_rank",
    "model.adapter.alpha": "lora_alpha",
    "model.adapter.dropout": "lora_dropout",
    "model.adapter.targets": "target_modules",
    "data.sequence": "seq_len sequence_length block_size max_seq_len seq_length context_length",
    "data.source": "dataset datasets",
    "preference.loss": "loss_type",
    "preference.beta": "dpo_beta",
    "preference.sft": "rpo_alpha",
    "batch.global": "batch_size global_batch_size",
    "batch.micro": "micro_batch_size micro_batch per_device_train_batch_size",
    "optimizer.lr": "learning_rate max_lr",
    "optimizer.clip": "grad_clip max_grad_norm clip_grad_norm gradient_clipping",
    "optimizer.weight_decay": "wd",
    "optimizer.eps": "epsilon adam_eps",
    "schedule.warmup": "warmup_steps lr_warmup_steps",
    "schedule.steps": "max_steps total_steps train_steps train_iters",
    "layout.dp": "data_parallel data_parallel_size",
    "layout.tp": "tensor_parallel tensor_parallel_size",
    "layout.pp": "pipeline_parallel pipeline_parallel_size",
    "layout.zero": "zero_stage",
    "runtime.dtype": "precision",
    "runtime.timeout_seconds": "timeout",
    "save.every": "save_every save_interval",
    "save.dir": "run_dir output_dir",
}
SAID_OTHERWISE = {  # what is not our key by another name
    "load_in_4bit": "model.adapter.quantize: nf4 says it here",
    "load_in_8bit": "model.adapter.quantize: int8 says it here",
    "gradient_accumulation_steps": "it follows from batch.global here, the sequences of a step over all ranks",
    "num_train_epochs": "schedule.steps says it here, in steps",
}
RENAMED = {old: new for new, others in OTHER_NAMES.items() for old in others.split()}
OTHER_VALUES = {"preference.loss": {"dpo": "sigmoid"}}  # the same for values
SHORTHANDS = {"model": ("bias",)}  # accepted, spread over other keys, not kept

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Loaded:
    """A config and, for each dotted key, where its value comes from: `file:line`, `override ...`, preset, family, a rule or default."""

    config: Config
    origins: dict[str, str]
    path: str


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, base: ReadBase | None = None) -> Loaded:
    """Read a YAML config, then apply overrides such as `model.layers=2`. Raises UsageError (exit 2) with every error at once.

    base: reads what the config names as its base, for the model and the tokenizer; without it they are as written.
    """
    return load_text(read_file(path), overrides, name=os.fspath(path), base=base)


def load_text(data: bytes | str, overrides: Sequence[str] = (), *, name: str, base: ReadBase | None = None) -> Loaded:
    """`load_config` of text already read; `name` stands in messages."""
    root, faults = read(data, name=name)
    broken = bool(faults) and not root.value  # nothing was read: what follows would only add noise
    if not isinstance(root.value, dict):
        faults.append(Fault(root.place, f"expected sections such as model and data, found {_found(root.value)}"))
        root.value, broken = {}, True
    for override in overrides:
        faults += _override(root, override)
    walk = _Walk(faults)
    tree = walk.section(root, Config, ())
    taken: dict[str, str] = {}
    if base is not None and isinstance(tree.get("base"), str) and tree["base"].isprintable() and not faults:
        contradictions, taken = take_base(tree, base(tree))
        faults += [Fault(walk.places.get(key, Place("the config")), text) for key, text in contradictions]
    config = None if broken else _validated(tree, walk)
    if faults or config is None:
        raise _refusal(faults, name)
    return Loaded(config, _origins(tree, walk.places) | taken, name)


def _refusal(faults: list[Fault], name: str) -> UsageError:
    faults = sorted(faults, key=lambda fault: (not fault.place.line, fault.place.line, fault.place.column))
    count, first = "1 error" if len(faults) == 1 else f"{len(faults)} errors", faults[0].place
    way = f"dist-llm check {shlex.quote(name)} --explain lists every key"
    if first.line:
        way = f"mend {first if len(faults) == 1 else f'these lines of {name}'}, then the same command again"
    elif first.key in (*KNOWN, "layout") and faults[0].value is not None:
        way = f"the same command with {first.key}={faults[0].value}"
    return UsageError(f"{count} in {name}", where=plain(first), details=[plain(fault) for fault in faults], next=way)


def _override(root: Node, text: str) -> list[Fault]:
    """Write `a.b=value` into the tree; the value is YAML. Returns what is wrong with it."""
    name, equals, word = text.partition("=")
    place = Place(f"override {text}", key=name.strip() if equals else "")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        return [Fault(place, "expected a.b=value")]
    if len(parts) > MAX_DEPTH:
        return [Fault(place, f"a name of {len(parts)} parts; no key has more than three")]
    if parts == ["layout"] and not word.lstrip().startswith("{"):  # `layout=dp=2,tp=2`: the text form, which is no YAML
        value: Any = word
    else:
        node, faults = read(word, name="value")
        if faults:
            return [Fault(place, fault.text) for fault in faults[:1]]
        value = node.value if word.strip() else None
    at = root
    for part in parts[:-1]:
        below = at.value.setdefault(part, Node(place, {})) if isinstance(at.value, dict) else None
        if below is not None and below.value is None:
            below.value = {}  # `model:` with nothing under it
        if below is None or not isinstance(below.value, dict):
            return [Fault(place, f"{part} is not a section", value=None)]
        at = below
    at.value[parts[-1]] = _placed(value, place)
    return []


def _placed(value: Any, place: Place) -> Node:
    """A value of an override, every node of it at the override's place."""
    if isinstance(value, dict):
        return Node(place, {key: _placed(node.value, place) for key, node in value.items()})
    if isinstance(value, list):
        return Node(place, [_placed(node.value, place) for node in value])
    return Node(place, value)


class _Walk:
    """Turns nodes into plain values, judges key names against the schema, and remembers the place of every key."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        self.places: dict[Key, Place] = {}

    def section(self, node: Node, kind: type[Section], key: Key) -> Any:
        """The plain mapping of a section; unknown keys are noted and left out."""
        self.places[key] = node.place
        if node.value is None:
            return {}
        if key == ("layout",) and isinstance(node.value, str):
            values, faults = layouts.read_layout(node.value)
            self.faults += [Fault(node.place, f"layout: {fault}") for fault in faults]
            self.places.update({("layout", name): node.place for name in values})
            return {} if faults else values
        if not isinstance(node.value, dict):
            self.faults.append(Fault(node.place, f"{dotted(key)}: expected a section of keys, found {_found(node.value)}"))
            return {}
        fields = {info.alias or name: info for name, info in kind.model_fields.items()}
        known = (*fields, *SHORTHANDS.get(dotted(key), ()))
        values = {}
        for name, child in node.value.items():
            if len(self.faults) >= MAX_FAULTS:
                break
            if name not in known:
                self.faults.append(Fault(child.place, unknown_key(name, known, dotted(key)), value=None))
                continue
            below, kind_below = (*key, name), _section_kind(fields.get(name))
            values[name] = self.section(child, kind_below, below) if kind_below else self.value(child, below)
        return values

    def value(self, node: Node, key: Key) -> Any:
        """The plain value of any other node."""
        self.places[key] = node.place
        if isinstance(node.value, list):
            of_mix = key == ("data", "mix")
            items = enumerate(node.value)
            return [self.section(item, MixItem, (*key, i)) if of_mix else self.value(item, (*key, i)) for i, item in items]
        if isinstance(node.value, dict):
            return {name: self.value(child, (*key, name)) for name, child in node.value.items()}
        return node.value


def unknown_key(name: str, known: Sequence[str], section: str) -> str:
    """The sentence for a key that `section` does not have: its new name, its true section, or the nearest known key."""
    full = f"{section}.{name}" if section else name
    if name in SAID_OTHERWISE:
        return f"unknown key {full!r}: {SAID_OTHERWISE[name]}"
    if name in RENAMED:
        return f"unknown key {full!r}: it is called {RENAMED[name]} here"
    if homes := [home for home in KNOWN if home.split(".")[-1] == name and home != full]:
        return f"unknown key {full!r}: it belongs at {homes[0]}"
    return f"unknown key {full!r}{did_you_mean(name, list(known))}"


def _section_kind(info: FieldInfo | None) -> type[Section] | None:
    """The class of a field that is itself a section."""
    kind: Any = info.annotation if info else None
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _leaves(kind: type[Section], prefix: str = "") -> Iterator[str]:
    for name, info in kind.model_fields.items():
        full = prefix + (info.alias or name)
        if below := _section_kind(info):
            yield from _leaves(below, f"{full}.")
        else:
            yield full


KNOWN = tuple(_leaves(Config))  # every dotted key there is


def _validated(tree: dict[str, Any], walk: _Walk) -> Config | None:
    """Types and bounds, by pydantic; each error becomes one fault at the place of its key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first: dict[Key, Any] = {}
        for item in error.errors(include_url=False):
            first.setdefault(_known_part(item["loc"], item.get("ctx", {}).get("key"), walk.places), item)
        for key, item in first.items():
            if not any(other[: len(key)] == key for other in first if other != key):  # a list is not at fault for its entry
                place, fault = walk.places.get(key, Place("the config")), f"{dotted(key)}: {_sentence(item, key)}"
                meant = _meant(item, key) if place.key == dotted(key) else None
                walk.faults.append(Fault(place, fault, value=meant) if meant else Fault(place, fault))
        return None


def _known_part(location: Key, sub: str | None, places: dict[Key, Place]) -> Key:
    """The longest part of pydantic's location that the user wrote (it adds the names of union members at the end)."""
    key = (*location, sub) if sub and (*location, sub) in places else location
    if key not in places and key[:1] == ("model",) and str(key[-1]).endswith("_bias"):
        key = ("model", "bias")  # one word that sets three keys
    while key and key not in places:
        key = key[:-1]
    return key


def _sentence(item: Any, key: Key) -> str:
    """What was expected and what was found, in our words."""
    context, found = item.get("ctx", {}), item["input"]
    kind = item["type"]
    if kind in ("division", "text"):
        return item["msg"]
    if kind == "missing":
        return "expected 2 values" if isinstance(item["loc"][-1], int) else f"{item['loc'][-1]} is missing"
    if kind == "literal_error":
        meant, known = _meant(item, key), isinstance(found, str) and found.lower() in OTHER_VALUES.get(dotted(key), {})
        near = f": it is called {meant} here" if known else f"; did you mean {meant!r}?" if meant else ""
        return f"expected one of {', '.join(_choices(item))}, found {_found(found)}{near}"
    if key == ("data", "source"):
        return f"expected a corpus name, a path, or a list of them, found {'an empty list' if found in ([], ()) else _found(found)}"
    hint = f" (write {int(found)})" if kind == "int_type" and isinstance(found, float) and found.is_integer() and abs(found) < 1e18 else ""
    bound = next((context[name] for name in ("ge", "gt", "le", "lt") if name in context), None)
    limit = f"{bound:g}" if isinstance(bound, float) else str(bound)
    return f"expected {_EXPECTED[kind].format(bound=limit) if kind in _EXPECTED else item['msg']}, found {_found(found)}{hint}"


def _choices(item: Any) -> list[str]:
    """Of a literal_error."""
    return item["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")


def _meant(item: Any, key: Key) -> str | None:
    """The choice that a word was to be which is none: by another name, or the nearest."""
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return None
    return OTHER_VALUES.get(dotted(key), {}).get(item["input"].lower()) or nearest(item["input"], _choices(item))


_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "greater_than_equal": "at least {bound}",
    "greater_than": "more than {bound}",
    "less_than_equal": "at most {bound}",
    "less_than": "less than {bound}",
    "finite_number": "a finite number",
    "string_too_short": "some text",
    "string_too_long": "a shorter text",
    "string_unicode": "valid Unicode",
    "too_short": "at least one entry",
    "too_long": "fewer values",
    "int_parsing_size": "a smaller number",
}


def _found(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return repr(value if len(value) <= 60 else value[:59] + "…") if isinstance(value, str) else flow(value)[:60]


def dotted(key: Key) -> str:
    """`data.mix.0.weight`."""
    return ".".join(str(part) for part in key)


def config_tree(config: Config) -> dict[str, Any]:
    """The config as plain nested mappings under the names of the YAML file."""
    return config.model_dump(by_alias=True)


def dump_config(config: Config) -> str:
    """The resolved config as YAML; loading it gives an equal Config."""
    return dump(config_tree(config))


def flat(config: Config) -> dict[str, Any]:
    """Every dotted key with its value."""
    return {name: reduce(lambda node, part: node[part], name.split("."), config_tree(config)) for name in KNOWN}


def _origins(tree: dict[str, Any], places: dict[Key, Place]) -> dict[str, str]:
    whole, across = fill_across(tree)
    filled = {f"model.{name}": origin for name, origin in fill_model(whole.get("model", {}))[1].items()} | across
    origins = {}
    for name in KNOWN:
        key = tuple(name.split("."))
        if key in places:
            place = places[key]
            origins[name] = f"{place.name}:{place.line}" if place.line else place.name
        else:
            origins[name] = filled.get(name, "default")
    return origins
