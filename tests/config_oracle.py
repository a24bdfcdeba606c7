"""What a config may say, written a second time and apart: own scalars, own table of keys, own arithmetic of the layout rules.

The syntax of YAML is the library's (its parser events); everything after it is here, and nothing of `dist_llm` is used.
`judge` answers with the reasons against a text; none: it can run on so many ranks.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from math import ceil, inf, isfinite
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml import events as ev

LARGEST = 2**40
MOST_VALUES = 20_000
MOST_RANKS = 1_000_000
LONGEST_TEXT = 4096


class No(Exception):
    """A reason against the text."""


# --- text to a tree ------------------------------------------------------------------------------------------------------


def tree_of(text: str) -> Any:
    """Nested dicts, lists and scalars of one document; no document is an empty mapping. Raises No."""
    try:
        events = list(YAML(typ="safe", pure=True).parse(text))
    except Exception as error:  # whatever the library raises: it is no YAML
        raise No(f"syntax: {type(error).__name__}") from None
    for event in events:
        if isinstance(event, ev.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None) not in (None, "!"):
            raise No("an alias, an anchor or a tag")
    body = [event for event in events if not isinstance(event, (ev.StreamStartEvent, ev.StreamEndEvent))]
    starts = sum(isinstance(event, ev.DocumentStartEvent) for event in body)
    if starts == 0:
        return {}
    if starts > 1:
        raise No("two documents")
    if sum(isinstance(event, (ev.ScalarEvent, ev.MappingStartEvent, ev.SequenceStartEvent)) for event in body) > MOST_VALUES:
        raise No("too many values")
    values = iter([event for event in body if not isinstance(event, (ev.DocumentStartEvent, ev.DocumentEndEvent))])
    return _node(next(values), values)


def _node(event: Any, rest: Any) -> Any:
    if isinstance(event, ev.SequenceStartEvent):
        items = []
        while not isinstance(event := next(rest), ev.SequenceEndEvent):
            items.append(_node(event, rest))
        return items
    if isinstance(event, ev.MappingStartEvent):
        found: dict[str, Any] = {}
        while not isinstance(event := next(rest), ev.MappingEndEvent):
            if not isinstance(event, ev.ScalarEvent) or not event.value or event.value in found:
                raise No("a key that is no word, or comes twice")
            found[event.value] = _node(next(rest), rest)
        return found
    if event.style or not event.implicit[0]:
        return joined(event.value)
    return plain_scalar(event.value)


def joined(text: str) -> str:
    """JSON writes a letter beyond U+FFFF as two escapes."""
    return re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda m: m[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"), text)


def plain_scalar(word: str) -> Any:
    """YAML 1.2's core schema, and `_` between digits of whole numbers of at most 40 digits."""
    if word in ("", "~", "null", "Null", "NULL"):
        return None
    if word.lower() in ("true", "false") and word in (word.lower(), word.upper(), word.capitalize()):
        return word.lower() == "true"
    digits = word.lstrip("+-") if word[:1] in "+-" and word[1:2] not in ("+", "-") else word
    ascii_digits = digits.isascii() and digits.replace("_", "").isdigit()
    if ascii_digits and digits[0] != "_" and digits[-1] != "_" and "__" not in digits and len(digits.replace("_", "")) <= 40:
        return int(word.replace("_", ""))
    for mark, letters, base in (("0o", "01234567", 8), ("0x", "0123456789abcdefABCDEF", 16)):
        if word.startswith(mark) and 1 <= len(word) - 2 <= 40 and not set(word[2:]) - set(letters):
            return int(word[2:], base)
    bare = word.lstrip("+-") if word[:1] in "+-" else word
    if bare in (".inf", ".Inf", ".INF") and len(word) - len(bare) <= 1:
        return -inf if word[0] == "-" else inf
    if word in (".nan", ".NaN", ".NAN"):
        return float("nan")
    if len(word) <= 100 and not set(word) - set("0123456789+-.eE") and any(c.isdigit() for c in word):
        try:
            return float(word)
        except ValueError:
            return word
    return word


# --- a tree to values ----------------------------------------------------------------------------------------------------


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_int(value) or isinstance(value, float)


def whole(low: int, high: int = LARGEST) -> Any:
    return lambda value: is_int(value) and low <= value <= high


def number(fits: Any) -> Any:
    return lambda value: is_number(value) and isfinite(value) and fits(value)


def choice(words: str) -> Any:
    return lambda value: isinstance(value, str) and value in words.split()


def switch(value: Any) -> bool:
    return isinstance(value, bool) or value in ("on", "off")


def words(value: Any) -> bool:
    """A name or path: printable, short enough, and no web address with a password or a key in it."""
    return isinstance(value, str) and 1 <= len(value) <= LONGEST_TEXT and all(map(str.isprintable, value)) and not secret(value)


def secret(value: str) -> bool:
    """A web address with a password, or the marks of Hugging Face and Amazon."""
    addresses = [re.split(r"[/\s]", rest)[0] for rest in value.split("://")[1:]]
    users = [address.split("@")[0] for address in addresses if "@" in address]
    return any(":" in user and user.split(":", 1)[1] for user in users) or bool(re.search(r"\bhf_\w{30}|\bAKIA\w{16}\b", value))


def sources(value: Any) -> bool:
    return words(value) or (isinstance(value, list) and bool(value) and all(map(words, value)))


def or_null(fits: Any) -> Any:
    return lambda value: value is None or fits(value)


def betas(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(BELOW_ONE, value))


def tasks(value: Any) -> bool:
    names = choice("copy reverse sort order brackets add subtract largest count upper last series")
    return isinstance(value, list) and bool(value) and all(map(names, value))


def from_to(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(whole(1, 64), value)) and value[0] <= value[1]


def some_of(words: str, *, least: int) -> Any:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(choice(words), value))


def adapter_name(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value))


COUNT, WHOLE, SEED = whole(1), whole(0), whole(0, 2**63 - 1)
NUMBER, POSITIVE = number(lambda value: value >= 0), number(lambda value: value > 0)
SHARE, BELOW_ONE = number(lambda value: 0 <= value <= 1), number(lambda value: 0 <= value < 1)
WHEN = choice("micro_batch step")
PRESETS: dict[str, dict[str, Any]] = {  # the published numbers
    "gpt2-124m": {"family": "gpt2", "layers": 12, "dim": 768, "heads": 12, "ffn": 3072, "vocab": 50257, "max_positions": 1024},
    "llama-1b": {"layers": 16, "dim": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "ffn": 8192, "vocab": 128256},
    "llama3-8b": {"layers": 32, "dim": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 14336, "vocab": 128256},
    "llama3-70b": {"layers": 80, "dim": 8192, "heads": 64, "kv_heads": 8, "head_dim": 128, "ffn": 28672, "vocab": 128256},
    "llama3-405b": {"layers": 126, "dim": 16384, "heads": 128, "kv_heads": 8, "head_dim": 128, "ffn": 53248, "vocab": 128256},
    "qwen3-0.6b": {"layers": 28, "dim": 1024, "heads": 16, "kv_heads": 8, "head_dim": 128, "ffn": 3072, "vocab": 151936},
    "qwen3-8b": {"layers": 36, "dim": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "ffn": 12288, "vocab": 151936},
}
SCHEMA: dict[str, Any] = {
    "model": {
        "family": choice("llama gpt2 qwen3 custom"), "preset": or_null(choice(" ".join(PRESETS))), "layers": whole(1, 100_000),
        **dict.fromkeys(("dim", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_positions"), COUNT),
        **dict.fromkeys(("tied", "qk_norm", "qkv_bias", "out_bias", "mlp_bias", "bias", "residual_scale"), switch),
        "norm": choice("rms layer"), "norm_eps": POSITIVE, "positions": choice("rotary learned"), "rope_theta": POSITIVE,
        "activation": choice("swiglu gelu gelu_tanh"), "dropout": BELOW_ONE, "init_std": NUMBER, "neftune": NUMBER,
        "adapter": {
            "name": adapter_name, "rank": WHOLE, "alpha": POSITIVE, "rank_stabilized": switch, "dora": switch, "dropout": BELOW_ONE,
            "quantize": choice("none nf4 int8"), "block": lambda value: COUNT(value) and value % 8 == 0,
            "targets": some_of("q k v o gate up down", least=1), "modules_to_save": some_of("embedding head", least=0),
        },
    },
    "data": {
        "source": sources, "mix": None, "tokenizer": {"kind": choice("bpe bytes file ids"), "vocab": or_null(COUNT), "path": or_null(words),
                                                         "end": or_null(WHOLE)},
        "sequence": whole(2), "packing": choice("concat best_fit none"), "document_mask": switch, "reset_positions": switch,
        "validation": number(lambda value: 0 <= value <= 0.5), "text_key": words, "max_bad_lines": WHOLE, "dir": words,
        "max_tokens": or_null(COUNT), "seed": or_null(SEED),
        "chat": {
            "format": or_null(choice("auto alpaca sharegpt messages prompt_completion text preference")), "template": words,
            "train_on": choice("assistant all last each"), "too_long": choice("refuse drop truncate"),
        },
        "skills": {"tasks": or_null(tasks), "length": or_null(from_to), "apart": switch},
    },
    "preference": {
        "loss": or_null(choice("sigmoid ipo hinge")), "beta": POSITIVE, "label_smoothing": number(lambda value: 0 <= value < 0.5),
        "length_normalised": switch, "sft": NUMBER,
    },
    "batch": {"global": COUNT, "micro": COUNT},
    "optimizer": {
        "kind": choice("adamw sgd"), "lr": NUMBER, "betas": betas, "eps": POSITIVE, "weight_decay": NUMBER, "momentum": BELOW_ONE,
        "nesterov": switch, "clip": or_null(NUMBER), "label_smoothing": BELOW_ONE, "skip_non_finite": WHOLE,
    },
    "schedule": {
        "kind": choice("constant linear cosine wsd inverse_sqrt"), "warmup": WHOLE, "steps": COUNT, "final": SHARE, "decay": SHARE,
    },
    "layout": {
        **dict.fromkeys(("tp", "cp", "pp", "ep"), COUNT), **dict.fromkeys(("dp", "shard", "chunks"), or_null(COUNT)),
        "sp": or_null(switch), "cp_kind": choice("ring ulysses"), "zero": whole(0, 3),
        "schedule": choice("gpipe 1f1b interleaved zb-h1 zb-v dualpipe-v auto"), "reduce": or_null(WHEN), "unshard": or_null(WHEN),
        "recompute": choice("none full selective"), "offload": choice("none optimizer all"),
        "engine": choice("native ddp fsdp2 deepspeed"),
    },
    "runtime": {
        "device": choice("auto cpu cuda"), "dtype": choice("auto float64 float32 bfloat16"), "backend": choice("auto gloo nccl"),
        "shared_memory": switch, "compile": switch, "fp8": choice("off tensorwise rowwise"), "cuda_graph": switch, "seed": SEED,
        "timeout_seconds": number(lambda value: 0 < value <= 1e7), "digest_every": WHOLE, "reduce_order": choice("fixed fast"),
        "peak_tflops": or_null(POSITIVE), "threads": or_null(whole(1, 4096)), "offload_dir": or_null(words),
    },
    "save": {"every": WHOLE, "keep": WHOLE, "async": switch, "dir": words},
    "track": {"tensorboard": switch, "wandb": switch, "sample_every": WHOLE, "validate_every": WHOLE, "validate_batches": COUNT,
              "questions": whole(0, 10_000)},
}  # fmt: skip


def need(condition: Any, why: str) -> None:
    if not condition:
        raise No(why)


def section(given: Any, table: dict[str, Any], name: str) -> dict[str, Any]:
    """The values that a section gives, each of them right. null is the empty section."""
    given = {} if given is None else given
    need(isinstance(given, dict), f"{name}: no section")
    found = {}
    for key, value in given.items():
        need(key in table, f"{name}.{key}: unknown")
        fits = table[key]
        if isinstance(fits, dict):
            found[key] = section(value, fits, f"{name}.{key}")
        elif key == "mix":
            found[key] = mixture(value)
        else:
            need(fits(value), f"{name}.{key}: {value!r}")
            found[key] = {"on": True, "off": False}.get(value, value) if fits is switch or key == "sp" else value
    return found


def mixture(value: Any) -> Any:
    need(value is None or (isinstance(value, list) and value), "data.mix")
    for item in value or ():
        found = section(item, {"source": words, "weight": POSITIVE}, "data.mix")
        need("source" in found, "data.mix: no source")
    return value


def layout_text(text: str) -> dict[str, Any]:
    """`dp=2,tp=2` as a section."""
    found: dict[str, Any] = {}
    for pair in text.split(",") if text.strip() else ():
        key, equals, word = (part.strip() for part in pair.partition("="))
        need(equals and key in SCHEMA["layout"] and key not in found, f"layout: {pair}")
        if key == "sp":
            need(word in ("on", "off", "true", "false", "1", "0"), "layout: sp")
            found[key] = word in ("on", "true", "1")
        elif key in ("dp", "tp", "cp", "pp", "ep", "zero", "shard", "chunks"):
            need(word.isascii() and word.isdigit() and len(word) <= 13, f"layout: {key}")
            found[key] = int(word)
        else:
            found[key] = word
    return section(found, SCHEMA["layout"], "layout")


def values_of(tree: Any) -> dict[str, dict[str, Any]]:
    """Every section with what it gives; the model and the tokenizer filled in. Raises No."""
    need(isinstance(tree, dict), "the root")
    need(not set(tree) - {"base", *SCHEMA}, f"unknown sections {set(tree) - set(SCHEMA)}")
    need(tree.get("base") is None or words(tree["base"]), "base")
    given = {}
    for name, table in SCHEMA.items():
        value = tree.get(name)
        given[name] = layout_text(value) if name == "layout" and isinstance(value, str) else section(value, table, name)
    tokenizer = given["data"].setdefault("tokenizer", {})
    given["model"] = filled(given["model"], sequence=given["data"].get("sequence", 256), tokenizer=tokenizer)
    return given


def filled(model: dict[str, Any], *, sequence: int, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """A model with every number that a rule looks at; gives the tokenizer its vocabulary."""
    preset = PRESETS.get(model.get("preset") or "", {})
    family = model.get("family", preset.get("family", "llama"))
    start = {"layers": 4, "dim": 128, "heads": 4, **preset, **model}
    kind, asked = tokenizer.get("kind", "bpe"), tokenizer.get("vocab")
    known = asked if asked is not None else 257 if kind == "bytes" else None
    start.setdefault("vocab", known or 2048)
    start.setdefault("max_positions", sequence)
    tokenizer["vocab"] = start["vocab"] if known is None and kind == "bpe" else known
    gpt2 = family == "gpt2"
    start.setdefault("positions", "learned" if gpt2 else "rotary")
    start.setdefault("activation", "gelu_tanh" if gpt2 else "swiglu")
    start.setdefault("kv_heads", start["heads"])
    if "head_dim" not in start:
        need(start["dim"] % start["heads"] == 0, "dim over heads")
        start["head_dim"] = start["dim"] // start["heads"]
    eights = ceil(ceil(Fraction(8 * start["dim"], 3)) / Fraction(8))
    start.setdefault("ffn", 8 * eights if start["activation"] == "swiglu" else 4 * start["dim"])
    need(start["ffn"] <= LARGEST, "ffn")
    return start


# --- values to a layout that can run -------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def read(text: str) -> dict[str, dict[str, Any]] | No:
    """The values of a text, or the first reason against it."""
    try:
        return values_of(tree_of(text))
    except No as error:
        return error


def judge(text: str, world: int) -> list[str]:
    """Why this text cannot run on `world` ranks; empty: it can."""
    given = read(text)
    if isinstance(given, No):
        return [str(given)]
    return [name for name, broken in rules(given, world).items() if broken]


def own_world(text: str) -> int | None:
    """The ranks that the layout of a text names; None where it cannot be read."""
    given = read(text)
    if isinstance(given, No):
        return None
    layout = given["layout"]
    return (layout.get("dp") or 1) * layout.get("tp", 1) * layout.get("cp", 1) * layout.get("pp", 1)


def rules(given: dict[str, dict[str, Any]], world: int) -> dict[str, bool]:
    """Each rule by name, and whether it is broken."""
    if prefers(given) and given["data"].get("chat", {}).get("format") in (None, "auto"):
        given = {**given, "data": {**given["data"], "chat": {**given["data"].get("chat", {}), "format": "preference"}}}
    model, layout = given["model"], given["layout"]
    tp, pp, cp, ep = (layout.get(axis, 1) for axis in ("tp", "pp", "cp", "ep"))
    rest = tp * pp * cp
    dp = layout.get("dp") or world // rest or 1
    zero, engine, schedule = layout.get("zero", 0), layout.get("engine", "native"), layout.get("schedule", "1f1b")
    data = dp * cp
    shard, chunks = layout.get("shard") or data, layout.get("chunks") or (2 if schedule == "interleaved" else 1)
    sp = tp > 1 and layout.get("sp") is not False
    sequence = given["data"].get("sequence", 256)
    small, large = sorted((model["kv_heads"], tp))
    broken = chat_rules(given["data"], given["track"]) | {
        "world": dp * rest != world or world > MOST_RANKS,
        "not yet": cp > 1 or ep > 1 or schedule not in ("gpipe", "1f1b", "interleaved"),
        "ep": data % ep > 0,
        "shard": data % shard > 0 or (zero == 0 and shard != data),
        "heads": model["heads"] % model["kv_heads"] > 0 or model["heads"] % tp > 0 or large % small > 0,
        "empty ranks": min(model["vocab"], model["ffn"]) < tp,
        "sequence": sequence % (tp if sp else 1) > 0,
        "depth": model["layers"] < pp * chunks,
        "batch": given["batch"].get("global", 16) % (dp * given["batch"].get("micro", 4)) > 0,
        "chunks": chunks > 1 and schedule in ("gpipe", "1f1b"),
    }
    early = "micro_batch" if zero >= 2 and pp == 1 else "step"
    place = {"tp": tp, "pp": pp, "cp": cp, "ep": ep, "dp": dp, "zero": zero, "engine": engine, "shard": shard, "data": data}
    place["reduce"], place["unshard"] = layout.get("reduce") or early, (layout.get("unshard") or early) if zero == 3 else "step"
    place["offload"], place["recompute"] = layout.get("offload", "none"), layout.get("recompute", "none")
    broken |= adapter_rules(given["model"].get("adapter", {}), given, tp, engine)
    return broken | preference_rules(given, engine) | engine_rules(given, place) | machine_rules(given, place, world) | value_rules(given)


def prefers(given: dict[str, dict[str, Any]]) -> bool:
    return bool(given["preference"]) and given["preference"].get("loss", "sigmoid") is not None


def preference_rules(given: dict[str, dict[str, Any]], engine: str) -> dict[str, bool]:
    preference, chat, on = given["preference"], given["data"].get("chat", {}), prefers(given)
    return {
        "pairs": on != (chat.get("format") == "preference"),
        "trained prompt": on and chat.get("train_on") == "all",
        "each of two": on and chat.get("train_on") == "each",
        "wrong pairs": on and preference.get("label_smoothing", 0) > 0 and preference.get("loss", "sigmoid") != "sigmoid",
        "smoothed tokens": on and given["optimizer"].get("label_smoothing", 0) > 0,
        "engine of pairs": on and engine != "native",
        "graph of pairs": on and given["runtime"].get("cuda_graph", False),
    }


def adapter_rules(adapter: dict[str, Any], given: dict[str, dict[str, Any]], tp: int, engine: str) -> dict[str, bool]:
    """What lies beside a model's matrices, and under it quantized ones: no block of theirs crosses an end of what a rank holds."""
    model, runtime, on = given["model"], given["runtime"], adapter.get("rank", 0) > 0
    quantized, block = adapter.get("quantize", "none") != "none", adapter.get("block", 64)
    ends = {model["dim"]}
    for rank in range(1, min(tp, 4096) + 1 if quantized else 1):  # as many ranks as anybody has, one after the other
        ends |= {model["heads"] * rank // tp * model["head_dim"], model["ffn"] * rank // tp}
    return {
        "no adapter": not on and (adapter.get("dora", False) or adapter.get("dropout", 0) > 0 or bool(adapter.get("modules_to_save"))),
        "beside 8 bits": (adapter.get("dora", False) or adapter.get("dropout", 0) > 0) and runtime.get("fp8", "off") != "off",
        "quantized": quantized and (not on or any(end % block for end in ends)),
        "engine of an adapter": on and engine != "native",
    }


def engine_rules(given: dict[str, dict[str, Any]], at: dict[str, Any]) -> dict[str, bool]:
    runtime, engine, zero = given["runtime"], at["engine"], at["zero"]
    foreign, compiled = engine != "native", runtime.get("compile", False)
    takes = {
        "native": {"optimizer"},
        "ddp": set(),
        "fsdp2": {"all"},
        "deepspeed": [set(), {"optimizer"}, {"optimizer"}, {"optimizer", "all"}][zero],
    }
    stages = {"native": {0, 1, 2, 3}, "ddp": {0}, "fsdp2": {2, 3}, "deepspeed": {0, 1, 2, 3}}
    deep = engine == "deepspeed"
    return {
        "engine axes": foreign and max(at["tp"], at["pp"], at["cp"], at["ep"]) > 1,
        "engine zero": zero not in stages[engine],
        "engine shard": deep and at["shard"] != at["data"],
        "engine reduce": deep and at["reduce"] != ("micro_batch" if zero >= 2 else "step"),
        "engine unshard": deep and zero == 3 and at["unshard"] != "micro_batch",
        "engine recompute": foreign and at["recompute"] != "none",
        "engine compile": (foreign and compiled) or (compiled and at["recompute"] == "selective"),
        "engine masters": foreign and zero == 0 and runtime.get("dtype") == "bfloat16",
        "offload": at["offload"] != "none" and at["offload"] not in takes[engine],
        "offload dir": at["offload"] != "none" and runtime.get("offload_dir") is not None and not (deep and zero == 3),
    }


def chat_rules(data: dict[str, Any], track: dict[str, Any]) -> dict[str, bool]:
    chat = data.get("chat", {})
    on = chat.get("format", "auto" if chat else None) is not None
    packing = data.get("packing", "best_fit" if on else "concat")
    apart = {data.get("document_mask", True), data.get("reset_positions", True)} == {True}
    named = [item["source"] for item in data["mix"]] if data.get("mix") else data.get("source", "python")
    flat = [named] if isinstance(named, str) else named
    pairs = data.get("skills", {})
    drawn = pairs.get("tasks") is not None or pairs.get("length") is not None or pairs.get("apart", False)
    return {
        "skills": (drawn or track.get("questions", 0) > 0) and "skills" not in flat,
        "packing": on == (packing == "concat"),
        "apart": on and (packing == "best_fit" or chat.get("format") == "preference") and not apart,
        "conversations": on and bool({"python", "entropy"} & set(flat)),
        "own template": on and chat.get("template") == "model" and data["tokenizer"].get("kind", "bpe") != "file",
    }


def machine_rules(given: dict[str, dict[str, Any]], at: dict[str, Any], world: int) -> dict[str, bool]:
    runtime, model, track = given["runtime"], given["model"], given["track"]
    device, dtype, fp8 = runtime.get("device", "auto"), runtime.get("dtype", "auto"), runtime.get("fp8", "off")
    tp, width = at["tp"], model["head_dim"]
    sizes = {(model["dim"], 1), (model["heads"] * width, tp), (model["ffn"], tp), (model["kv_heads"] * width, min(tp, model["kv_heads"]))}
    tokens = given["batch"].get("micro", 4) * given["data"].get("sequence", 256)
    graph = runtime.get("cuda_graph", False)
    host = at["pp"] > 1 or at["zero"] == 3 or at["offload"] != "none" or at["engine"] != "native"
    return {
        "fp8": fp8 != "off"
        and (
            dtype in ("float32", "float64")
            or (dtype == "auto" and device == "cpu")
            or at["engine"] != "native"
            or any(size % (16 * parts) for size, parts in sizes)
            or (fp8 == "tensorwise" and tokens % 16 > 0)
        ),
        "graph": graph and (device == "cpu" or host or (world > 1 and runtime.get("backend") == "gloo")),
        "backend": runtime.get("backend") == "nccl" and device == "cpu",
        "track": track.get("tensorboard", False) or track.get("wandb", False),
    }


def value_rules(given: dict[str, dict[str, Any]]) -> dict[str, bool]:
    model, schedule, optimizer, tokenizer = given["model"], given["schedule"], given["optimizer"], given["data"]["tokenizer"]
    warmup, steps = schedule.get("warmup", 0), schedule.get("steps", 200)
    falling = schedule.get("decay", 0.2) * steps if schedule.get("kind") == "wsd" else 0
    kind, tokens = tokenizer.get("kind", "bpe"), tokenizer["vocab"]
    momentum = optimizer.get("kind") == "sgd" and optimizer.get("momentum", 0) > 0
    return {
        "odd": model["positions"] == "rotary" and model["head_dim"] % 2 == 1,
        "positions": model["positions"] == "learned" and model["max_positions"] < given["data"].get("sequence", 256),
        "warmup": warmup + falling > steps,
        "nesterov": optimizer.get("nesterov", False) and not momentum,
        "vocab": tokens is not None and tokens > model["vocab"],
        "bytes": kind == "bytes" and tokens != 257,
        "bpe": kind == "bpe" and not 257 <= tokens <= MOST_TOKENS,
        "file": kind == "file" and tokenizer.get("path") is None,
        "ids": kind == "ids" and not (tokens is not None and tokens <= 2**22 and -1 < (tokenizer.get("end") or 0) < tokens),
        "end": (tokenizer.get("end") is None) == (kind == "ids"),
        "hub": any(source.startswith("hub:") for source in texts_of(given["data"])) and not hub_names(given["data"]),
    }


def texts_of(data: dict[str, Any]) -> list[str]:
    """The sources that a data section names."""
    source = data.get("source", "python")
    return [item["source"] for item in data["mix"]] if data.get("mix") else [source] if isinstance(source, str) else list(source)


def hub_names(data: dict[str, Any]) -> bool:
    """Whether every source that begins as one of the hub is one, by a reader of its parts."""
    for text in (source for source in texts_of(data) if source.startswith("hub:")):
        rest, at, revision = text.removeprefix("hub:").partition("@")
        path, colon, split = rest.partition(":")
        parts = path.split("/")
        names = [*parts, *([split] if colon else []), *(revision.split("/") if at else [])]
        first, others = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"), set(".+-")
        sound = all(name and name[0] in first and set(name) <= first | others and len(name) <= 96 for name in names)
        if len(parts) not in (2, 3) or not sound or ".." in text:
            return False
    return True


MOST_TOKENS = 2**24  # of a bpe
