"""What a line of conversations may be, written a second time and apart from dist_llm: its messages, or None where it is refused."""

from __future__ import annotations

import json
from typing import Any

MEANS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


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


def judge(line: str, shape: str, train_on: str) -> list[list[Any]] | None:
    """[[role, content, weight], ...] of a line of one shape."""
    try:
        record = json.loads(line, parse_constant=lambda name: 1 / 0, object_pairs_hook=once)
    except (ValueError, ZeroDivisionError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    turns: list[list[Any]] = []
    if shape in ("messages", "sharegpt"):
        listed = record.get("messages" if shape == "messages" else "conversations")
        if not isinstance(listed, list) or not listed:
            return None
        names = ("role", "content") if shape == "messages" else ("from", "value")
        known = {"user", "assistant", "system"} | ({"human", "gpt"} if shape == "sharegpt" else set())
        if shape == "sharegpt" and record.get("system") not in (None, ""):
            turns.append(["system", record["system"], None])
        for one in listed:
            if not isinstance(one, dict) or not all(name in one for name in names):
                return None
            role, (sound, weight) = one[names[0]], weight_of(one)
            if not isinstance(role, str) or role not in known or not sound:
                return None
            turns.append([MEANS[role], one[names[1]], weight])
    else:
        sound, weight = weight_of(record)
        keys = {"alpaca": ("instruction", "output"), "prompt_completion": ("prompt", "completion"), "text": ("text",)}[shape]
        if not sound or not all(key in record for key in keys):
            return None
        if shape == "text":
            return [["text", record["text"], weight]] if is_text(record["text"]) else None
        asked = record[keys[0]]
        if shape == "alpaca":
            if record.get("system") not in (None, ""):
                turns.append(["system", record["system"], None])
            extra = record.get("input")
            if extra not in (None, ""):
                if not is_text(extra) and not (isinstance(extra, str) and not extra.strip()):
                    return None
                asked = f"{asked}\n\n{extra}" if isinstance(asked, str) and asked.strip() else asked
            asked = asked.rstrip("\n") if isinstance(asked, str) else asked
        turns += [["user", asked, None], ["assistant", record[keys[1]], weight]]
    if not all(is_text(content) for _, content, _ in turns):
        return None
    roles = [role for role, _, _ in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in talk or talk != [("user", "assistant")[at % 2] for at in range(len(talk))]:
        return None
    if train_on != "all" and any(weight for role, _, weight in turns if role != "assistant"):
        return None
    return turns


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("twice")
    return found
