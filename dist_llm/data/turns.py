"""One turn of a conversation out of a JSON object: who speaks, what is said, and what stands beside it: calls of tools, and reasoning.

    {"role": "assistant", "content": text or null, "tool_calls": [{"type": "function", "function": {"name": text, "arguments": {...}}}]}
    {"role": "tool", "content": text, "name": text, "tool_call_id": text}          what came of a call; name and id may be left out
    {"role": "assistant", "content": text, "reasoning_content": text}              thinking and reasoning are other names of it

Tools are objects with a name, as JSON schemas of functions are, or a text that spells a list of them; arguments may be a text too. Both
become what they spell, for templates write them as JSON: a text would be escaped a second time. The order of keys stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_llm.data.readers import parse_text, printable, type_name, wrong_text
from dist_llm.data.weights import LARGEST

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first, gpt-oss's the second
OF_A_RESULT = ("name", "tool_call_id")
MOST_TOOLS = 10_000


class WrongError(ValueError):
    """What is wrong with an object."""


@dataclass(frozen=True)
class Turn:
    """One message. weight: None where nothing was said about it. more: what templates read beside content, under their names for it."""

    role: str
    content: str
    weight: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


def wanted_text(value: Any, name: str, *, empty: bool = False) -> str:
    """A text with something in it. Raises WrongError for anything else; `empty`: it may be without."""
    if why := wrong_text(value, name):
        raise WrongError(why)
    if not empty and not value.strip():
        raise WrongError(f"{name} is empty")
    return value


def joined(value: Any, name: str) -> Any:
    """A content that comes in parts, each `{"type": "text", "text": text}`, as one text; anything else as it is. Raises WrongError."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = f"of the type {printable(kind, 20)!r}" if isinstance(kind, str) else "without a type"
            raise WrongError(f"{name} has a part {shown}: only parts of the type 'text' are trained")
    return "".join(wanted_text(part.get("text"), f"a part of {name}", empty=True) for part in value)


def weight_of(one: dict[str, Any], name: str) -> float | None:
    """The weight that a turn carries, or None. Raises WrongError."""
    weight, train = one.get("weight"), one.get("train")
    if weight is not None and train is not None:
        raise WrongError(f"{name} has both weight and train")
    if train is not None:
        if not isinstance(train, bool):
            raise WrongError(f"{name}: train must be true or false, found {type_name(train)}")
        return None if train else 0.0
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise WrongError(f"{name}: weight must be a number, found {type_name(weight)}")
    if not 0 <= weight <= LARGEST:
        raise WrongError(f"{name}: weight must be from 0 to {LARGEST:g}, found {printable(str(weight), 20)}")
    return float(weight)


def says(value: Any) -> bool:
    """Whether the value of a key says something: a text, a list or an object that is not empty; a flag says nothing."""
    return isinstance(value, str | list | dict) and bool(value)


def beside(one: dict[str, Any], role: str, name: str) -> dict[str, Any]:
    """What a turn has beside its content: calls and reasoning of the assistant, the name and id of a tool's result. Raises WrongError."""
    found: dict[str, Any] = {}
    if says(one.get("tool_calls")):
        if role != "assistant":
            raise WrongError(f"{name} of the {role} has 'tool_calls': the assistant alone calls tools")
        found["tool_calls"] = _calls(one["tool_calls"], name)
    thoughts = {key: wanted_text(one[key], f"{key!r} of {name}", empty=True) for key in REASONING if says(one.get(key))}
    thoughts = {key: text for key, text in thoughts.items() if text.strip()}
    if thoughts and role != "assistant":
        raise WrongError(f"{name} of the {role} has {next(iter(thoughts))!r}: only the assistant's reasoning is shown")
    if len(set(thoughts.values())) > 1:
        raise WrongError(f"{name} has different texts under {' and '.join(map(repr, thoughts))}, which are names of one thing")
    found |= thoughts
    if role == "tool":
        found |= {key: wanted_text(one[key], f"{key!r} of {name}") for key in OF_A_RESULT if one.get(key) is not None}
    return found


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning of a message, under whichever name; empty where there is none."""
    return next((message[key] for key in REASONING if key in message), "")


def spelled_calls(text: str, name: str) -> list[dict[str, Any]]:
    """The calls that a turn's text spells in JSON, an object with `name` and `arguments` or a list of them. Raises WrongError."""
    value, why = parse_text(text)
    if why:
        raise WrongError(f"{name} is a call and must spell it in JSON: {why}")
    return _calls([value] if isinstance(value, dict) else value, name)


def tools_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools that an object defines under `tools`, a list of objects or a text that spells one. Raises WrongError."""
    value = record.get("tools")
    if not says(value) or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        value, why = parse_text(wanted_text(value, "'tools'"))
        if why:
            raise WrongError(f"'tools' is a text and must spell a list in JSON: {why}")
    value = [] if value is None else value
    if not isinstance(value, list):
        raise WrongError(f"'tools' must be an array, found {type_name(value)}")
    if len(value) > MOST_TOOLS:
        raise WrongError(f"'tools' has {len(value)} of them, expected at most {MOST_TOOLS}")
    return [_tool(one, f"tool {number}") for number, one in enumerate(value, start=1)]


def _tool(one: Any, name: str) -> dict[str, Any]:
    function = one.get("function", one) if isinstance(one, dict) else one
    if not isinstance(function, dict):
        raise WrongError(f"{name} must be an object that defines a function, found {type_name(function)}")
    if "name" not in function:
        raise WrongError(f"{name} has no name")
    wanted_text(function["name"], f"the name of {name}")
    _require_plain(one, name)
    return one


def _calls(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise WrongError(f"the calls of {name} must be an array, found {type_name(value)}")
    if not 0 < len(value) <= MOST_TOOLS:
        raise WrongError(f"{name} has {len(value)} calls, expected 1 to {MOST_TOOLS}")
    return [_call(one, f"call {number} of {name}") for number, one in enumerate(value, start=1)]


def _call(one: Any, name: str) -> dict[str, Any]:
    """A call as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with what else it has. Raises WrongError."""
    if not isinstance(one, dict):
        raise WrongError(f"{name} must be an object, found {type_name(one)}")
    if (kind := one.get("type")) not in (None, "function"):
        shown = repr(printable(kind, 20)) if isinstance(kind, str) else type_name(kind)
        raise WrongError(f"{name} is of the type {shown}, known is 'function'")
    if "function" not in one:
        outer = {key: one[key] for key in ("id", "type") if key in one}
        one = {"type": "function", **outer, "function": {key: value for key, value in one.items() if key not in outer}}
    function = one["function"]
    if not isinstance(function, dict):
        raise WrongError(f"the function of {name} must be an object, found {type_name(function)}")
    for key in ("name", "arguments"):
        if key not in function:
            raise WrongError(f"{name} has no {key}" + (": {} says that it takes none" if key == "arguments" else ""))
    wanted_text(function["name"], f"the name of {name}")
    made = {**one, "function": {**function, "arguments": _arguments(function["arguments"], name)}}
    _require_plain(made, name)
    return made


def _arguments(value: Any, name: str) -> dict[str, Any]:
    """The arguments of a call as an object, whether they come as one or as a text that spells it. Raises WrongError."""
    if isinstance(value, str) and value.strip():
        value, why = parse_text(wanted_text(value, f"the arguments of {name}"))
        if why:
            raise WrongError(f"the arguments of {name} are a text and must spell an object in JSON: {why}")
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if not isinstance(value, dict):
        raise WrongError(f"the arguments of {name} must be an object, found {type_name(value)}")
    return value


def _require_plain(value: Any, name: str) -> None:
    """Raises WrongError unless a value is JSON all through, without a NUL, half of a surrogate pair, or a number that is not finite."""
    if isinstance(value, dict):
        for key, one in value.items():
            _require_plain(key, name)
            _require_plain(one, name)
    elif isinstance(value, list):
        for one in value:
            _require_plain(one, name)
    elif isinstance(value, str):
        if why := wrong_text(value, name):
            raise WrongError(why)
    elif isinstance(value, float) and not math.isfinite(value):
        raise WrongError(f"{name} holds a number that is too large")
    elif not isinstance(value, int | float | None):
        raise WrongError(f"{name} holds {printable(type(value).__name__, 20)}, which is not JSON")
