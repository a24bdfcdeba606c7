"""What a line of conversations may be, written a second time and apart from dist_llm: its messages, or None where it is refused."""

from __future__ import annotations

import json
from typing import Any

MEANS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "developer": "system"}
NEVER = ("tools", "functions", "images", "audios", "videos")  # with something in them; of a turn also:
NEVER_IN_TURNS = (*NEVER, "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


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
    known = {"user", "assistant", "system", "developer"} | ({"human", "gpt"} if shape == "sharegpt" else set())
    turns = []
    for one in listed:
        if not isinstance(one, dict) or says(one, NEVER_IN_TURNS):
            return None
        names = ("from", "value") if shape == "sharegpt" and ("from" in one or "role" not in one) else ("role", "content")
        if not all(name in one for name in names):
            return None
        role, (sound, weight) = one[names[0]], weight_of(one)
        if not isinstance(role, str) or role not in known or not sound:
            return None
        turns.append([MEANS[role], joined(one[names[1]]), weight])
    return turns


def judge(line: str, shape: str, train_on: str) -> list[list[Any]] | None:
    """[[role, content, weight], ...] of a line of one shape."""
    try:
        record = json.loads(line, parse_constant=lambda name: 1 / 0, object_pairs_hook=once)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    if shape != "text" and says(record, NEVER):
        return None
    turns: list[list[Any]] = []
    if shape in ("sharegpt", "alpaca") and record.get("system") is not None:
        turns.append(["system", record["system"], None])
        if turns[0][1] == "" or (isinstance(turns[0][1], str) and turns[0][1].isspace() and "\0" not in turns[0][1]):
            turns.clear()
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
        if before is None or after is None or before[-1][0] != "user":
            return None
        if train_on != "all" and isinstance(asked, list):
            before = [[role, content, 0.0 if role == "assistant" else weight] for role, content, weight in before]
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
    if not all(is_text(content) or (role == "system" and isinstance(content, str) and not content.strip()) for role, content, _ in turns):
        return None
    roles = [role for role, _, _ in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in talk or talk != [("user", "assistant")[at % 2] for at in range(len(talk))]:
        return None
    if train_on != "all" and any(weight for role, _, weight in turns if role != "assistant"):
        return None
    return [turn for turn in turns if turn[1].strip()]


def trains(one: dict[str, Any]) -> bool:
    """Whether a turn asks for it."""
    return one.get("train") is True or (type(one.get("weight")) in (int, float) and one["weight"] > 0)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("twice")
    return found
