"""What a line of conversations may be, written a second time and apart from dist_llm: its messages, or None where it is refused.

A message is [role, content, weight], and what stands beside the content as a fourth where there is anything; tools come last.
"""

from __future__ import annotations

import json
import re
from typing import Any

MEANS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "developer": "system"} | {
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
NEVER = ("tools", "functions", "images", "audios", "videos", "chat_template_kwargs")  # with something in them; of a turn also:
NEVER_IN_TURNS = ("tools", "functions", "images", "audios", "videos", "function_call")
TOOLED = ("messages", "sharegpt", "prompt_completion")  # where tools are not among them
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in value)


def weight_of(one: dict[str, Any]) -> tuple[bool, float | None]:
    """(sound, weight)."""
    weight, train = one.get("weight"), one.get("train")
    if train is not None:
        return weight is None and train in (True, False) and type(train) is bool, None if train else 0.0
    if weight is None:
        return True, None
    sound = type(weight) in (int, float) and 0 <= weight <= 1000
    return sound, float(weight) if sound else None


def says(one: dict[str, Any], keys: tuple[str, ...]) -> bool:
    """Whether one of the keys has a text, a list or an object with something in it."""
    return any(type(one.get(key)) in (str, list, dict) and len(one[key]) > 0 for key in keys)


def lost(one: dict[str, Any], keys: tuple[str, ...]) -> bool:
    """The same, where an object with nothing but what is empty says nothing."""
    empty: list[Any] = [None, "", [], {}]
    held = {key: one[key] for key in keys if key in one}
    return says({key: [v for v in value.values() if v not in empty] if type(value) is dict else value for key, value in held.items()}, keys)


def encodes(value: Any) -> bool:
    """Whether a value holds texts that can be encoded alone, and finite numbers."""
    if isinstance(value, dict):
        return all(encodes(key) and encodes(one) for key, one in value.items())
    if isinstance(value, list):
        return all(map(encodes, value))
    return (is_text(value + "x") if isinstance(value, str) else True) and value not in (float("inf"), float("-inf"))


def parsed(value: Any) -> Any:
    """A text as the JSON it spells, False where it spells none; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=lambda name: 1 / 0, object_pairs_hook=once) if value.strip() else None
    except (ValueError, ZeroDivisionError, RecursionError):
        return False


def named(one: Any) -> bool:
    return isinstance(one, dict) and is_text(one.get("name"))


def calls_of(value: Any) -> list[Any] | None:
    """Calls as templates get them, None where one is wrong."""
    found = []
    for one in value if isinstance(value, list) else [None]:
        if not isinstance(one, dict) or one.get("type") not in (None, "function"):
            return None
        inner = one.get("function", {key: value for key, value in one.items() if key not in ("id", "type")})
        if not named(inner) or "arguments" not in inner:
            return None
        arguments = parsed(inner["arguments"])
        arguments = {} if arguments is None else arguments
        outer = one if "function" in one else {"type": "function", **{key: one[key] for key in ("id", "type") if key in one}}
        if not isinstance(arguments, dict) or not encodes([outer, inner, arguments]):
            return None
        found.append({**outer, "function": {**inner, "arguments": arguments}})
    return found or None


def tools_of(record: dict[str, Any]) -> list[Any] | None:
    value = parsed(record["tools"]) if says(record, ("tools",)) else []
    value = [] if value is None else value
    fine = isinstance(value, list) and all(isinstance(one, dict) and named(one.get("function", one)) and encodes(one) for one in value)
    return value if fine else None


def beside(one: dict[str, Any], role: str) -> dict[str, Any] | None:
    """What stands beside a content, None where something is wrong."""
    found: dict[str, Any] = {}
    if says(one, ("tool_calls",)):
        calls = calls_of(one["tool_calls"])
        if calls is None or role != "assistant":
            return None
        found["tool_calls"] = calls
    given = {key: one[key] for key in THOUGHTS if says(one, (key,))}
    if not all(isinstance(text, str) and encodes(text) for text in given.values()):
        return None
    given = {key: text for key, text in given.items() if text.strip()}
    if given and (role != "assistant" or len(set(given.values())) > 1):
        return None
    found |= given
    if role == "tool":
        for key in ("name", "tool_call_id"):
            if one.get(key) is not None:
                if not is_text(one[key]):
                    return None
                found[key] = one[key]
    return found


def joined(content: Any) -> Any:
    """A list of parts of text as a text; None for a list of anything else."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(texts) if all(text == "" or is_text(text + "x") if isinstance(text, str) else False for text in texts) else None


def turns_of(listed: Any, shape: str) -> list[list[Any]] | None:
    """[[role, content, weight], ...] of a list of messages."""
    if not isinstance(listed, list) or not listed:
        return None
    known = {"user", "assistant", "system", "developer", "tool"}
    known |= {"human", "gpt", "function_call", "observation"} if shape == "sharegpt" else set()
    turns = []
    for one in listed:
        if not isinstance(one, dict) or lost(one, NEVER_IN_TURNS):
            return None
        names = ("from", "value") if shape == "sharegpt" and ("from" in one or "role" not in one) else ("role", "content")
        called = says(one, ("tool_calls",))
        if not all(name in one for name in names[: 1 if called else 2]):
            return None
        role, (fine, weight) = one[names[0]], weight_of(one)
        if not isinstance(role, str) or role not in known or not fine:
            return None
        more = beside(one, MEANS[role])
        if more is None:
            return None
        content = "" if called and one.get(names[1]) is None else joined(one[names[1]])
        if role == "function_call" and not called:
            value = parsed(content) if is_text(content) else None
            calls = calls_of([value] if isinstance(value, dict) else value)
            if calls is None:
                return None
            content, more = "", {**more, "tool_calls": calls}
        turns.append([MEANS[role], content, weight, *([more] if more else [])])
    return turns


def judge(line: str, shape: str, train_on: str) -> list[list[Any]] | None:
    """[[role, content, weight], ...] of a line of one shape."""
    try:
        record = json.loads(line, parse_constant=lambda name: 1 / 0, object_pairs_hook=once)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    if shape != "text" and lost(record, NEVER[1:] if shape in TOOLED else NEVER):
        return None
    tools = tools_of(record) if shape in TOOLED else []
    if tools is None:
        return None
    turns: list[list[Any]] = []
    told = None if shape == "text" else record.get("system")
    if told is not None and not (isinstance(told, str) and encodes(told)):
        return None
    if shape in ("messages", "sharegpt"):
        found = turns_of(record.get("messages" if shape == "messages" else "conversations"), shape)
        if found is None:
            return None
        turns += found
    elif shape == "prompt_completion" and any(isinstance(record.get(key), list) for key in ("prompt", "completion")):
        sound, weight = weight_of(record)
        asked, said = record.get("prompt"), record.get("completion")
        if not sound or (weight is not None and isinstance(said, list)):
            return None
        if isinstance(asked, list) and train_on != "all" and any(isinstance(one, dict) and trains(one) for one in asked):
            return None
        before = turns_of(asked, "messages") if isinstance(asked, list) else [["user", asked, None]]
        after = turns_of(said, "messages") if isinstance(said, list) else [["assistant", said, weight]]
        if before is None or after is None or before[-1][0] not in ("user", "tool"):
            return None
        if train_on != "all" and isinstance(asked, list):
            before = [[role, content, 0.0 if role == "assistant" else weight, *more] for role, content, weight, *more in before]
        turns = [*before, *after]
    else:
        sound, weight = weight_of(record)
        keys = {"alpaca": ("instruction", "output"), "prompt_completion": ("prompt", "completion"), "text": ("text",)}[shape]
        if not sound or not all(key in record for key in keys):
            return None
        if shape == "text":
            return [["text", record["text"], weight]] if is_text(record["text"]) else None
        asked = record[keys[0]]
        if shape == "alpaca":
            extra = record.get("input")
            if extra not in (None, ""):
                if not is_text(extra) and not (isinstance(extra, str) and not extra.strip()):
                    return None
                asked = f"{asked}\n\n{extra}" if isinstance(asked, str) and asked.strip() else asked
            asked = asked.rstrip("\n") if isinstance(asked, str) else asked
        turns += [["user", asked, None], ["assistant", record[keys[1]], weight]]
    if told is not None and not told.isspace() and told:
        if turns[0][0] != "system":
            turns.insert(0, ["system", told, None])
        elif isinstance(turns[0][1], str) and not turns[0][1].strip():
            turns[0][1] = told
        elif turns[0][1] != told:
            return None
    may = [turn[0] in ("system", "tool") or "tool_calls" in (turn[3:] or [{}])[0] for turn in turns]  # say nothing
    if not all(
        is_text(turn[1]) or (empty and isinstance(turn[1], str) and encodes(turn[1])) for turn, empty in zip(turns, may, strict=True)
    ):
        return None
    letters = "".join(
        {"system": "s", "user": "u", "tool": "t"}.get(turn[0], "c" if turn[3:] and "tool_calls" in turn[3] else "a") for turn in turns
    )
    if not re.fullmatch("s?(u(ct+)*[ca])*(u(ct+)*)?", letters) or not re.search("[ca]", letters):
        return None
    if train_on != "all" and any(turn[2] for turn in turns if turn[0] != "assistant"):
        return None
    for turn in turns:
        turn[1] = "" if turn[0] != "tool" and not turn[1].strip() else turn[1]
    return [turn for turn in turns if turn[1] or turn[0] != "system"] + ([["tools", tools]] if tools else [])


def trains(one: dict[str, Any]) -> bool:
    """Whether a turn asks for it."""
    return one.get("train") is True or (type(one.get("weight")) in (int, float) and one["weight"] > 0)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("twice")
    return found
