"""Conversations out of JSON lines: which shape the objects have, and what is wrong with one that does not fit.

    alpaca             {"instruction": text, "input": text, "output": text}             input and system may be left out
    sharegpt           {"conversations": [{"from": "human" | "gpt" | "system", "value": text}, ...]}
    messages           {"messages": [{"role": "user" | "assistant" | "system", "content": text}, ...]}
    prompt_completion  {"prompt": text, "completion": text}
    text               {"text": text}                                                   trained whole, without a template

A turn, or an object of the shapes without turns, may carry `weight`, from 0 to 1000, or `train`, true or false. All objects of a
source have one shape. A conversation is a first system turn, if any, then turns of the user and the assistant in alternation,
the user first; it becomes a document whose text is one spelling of its messages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_llm.data.readers import MAX_LINE, Take, is_json, is_table, parse_object, printable, type_name, unpack, wrong_text
from dist_llm.data.templates import TrainOn
from dist_llm.data.weights import LARGEST
from dist_llm.errors import DataError, UsageError

Format = Literal["alpaca", "sharegpt", "messages", "prompt_completion", "text", "preference"]

KEYS: dict[str, tuple[str, ...]] = {  # what an object of a shape has at least; text, which others carry beside their own, is last
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),  # data/preferences.py
    "text": ("text",),
}
ROLES = {"messages": ("user", "assistant", "system"), "sharegpt": ("human", "user", "gpt", "assistant", "system")}
MEANS = {"human": "user", "gpt": "assistant"}
LOOKED_AT = 1000  # lines among which the first object is looked for
MOST_TURNS = 10_000
EXPECTED = "conversations as JSON objects of one shape, one a line"


@dataclass(frozen=True)
class Reading:
    """How conversations are read. shape: auto: found from the first object of a source. train_on: what may have a weight."""

    shape: Literal["auto"] | Format = "auto"
    train_on: TrainOn = "assistant"


class WrongError(ValueError):
    """What is wrong with an object."""


@dataclass(frozen=True)
class Turn:
    """One message. weight: None where nothing was said about it."""

    role: str
    content: str
    weight: float | None = None


def shapes_of(record: dict[str, Any]) -> list[Format]:
    """The shapes that an object may have; `text` only where it has no other, for others often carry a text of their own."""
    found: list[Format] = [name for name, keys in KEYS.items() if all(key in record for key in keys)]  # type: ignore[misc]
    return found if len(found) < 2 else [name for name in found if name != "text"]


def require_objects(files: Sequence[Path]) -> None:
    """Raises UsageError for a file that holds no objects."""
    for path in files:
        if not is_json(path) and not is_table(path):
            expected = "files ending in .jsonl, .ndjson or .json, also with .gz or .zst, or in .parquet, .arrow or .feather"
            raise UsageError("conversations are read from JSON lines or tables", where=str(path), expected=expected)


def find_format(files: Sequence[Path]) -> Format:
    """The shape of the first object in the files. Raises DataError where it is not clear."""
    for path in files:
        if is_table(path):
            from dist_llm.data.parquet import read_rows, without_nulls

            if (first := next(read_rows(path), None)) is not None:
                return _only_shape(without_nulls(first.values), first.place)
            continue
        with path.open("rb") as raw:
            stream = unpack(raw, path)
            for number in range(1, LOOKED_AT + 1):
                try:
                    line = stream.readline(MAX_LINE + 1)
                except (OSError, EOFError, ValueError) as error:
                    raise DataError(
                        "the file cannot be read", where=str(path), expected="a file that can be read", found=str(error)
                    ) from error
                if not line:
                    break
                record = parse_object(line)[0] if len(line) <= MAX_LINE else None
                if record is not None:
                    return _only_shape(record, f"{path}:{number}")
    raise DataError("there is no JSON object to tell the shape of the conversations by", where=str(files[0]), expected=EXPECTED)


def _only_shape(record: dict[str, Any], where: str) -> Format:
    found = shapes_of(record)
    if len(found) == 1:
        return found[0]
    keys = ", ".join(printable(key, 20) for key in list(record)[:6])
    what = "the shape of the conversations is not known" if not found else "the conversations may have more than one shape"
    known = {name: keys for name, keys in KEYS.items() if name != "preference"}  # which is never meant without its keys
    expected = "; ".join(f"{name}: {', '.join(names)}" for name, names in known.items()) if not found else "one of " + ", ".join(found)
    way = "name it: data.chat.format=" + "|".join(found or known)
    raise DataError(what, where=where, expected=expected, found=f"an object with the keys {keys}", next=way)


def taker(shape: Format, *, train_on: TrainOn) -> Take:
    """What makes the text of a document of an object, or says what is wrong with it."""

    def take(record: dict[str, Any]) -> tuple[str, str]:
        try:
            turns = _turns(record, shape)
            if shape != "text":
                check_order(turns, train_on=train_on)
        except WrongError as error:
            return "", str(error)
        return spell(turns), ""

    return take


def spell(turns: Sequence[Turn]) -> str:
    """The one text of a conversation's messages."""
    return json.dumps(as_messages(turns), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def as_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as a template reads them."""
    return [{"content": turn.content, "role": turn.role, **({} if turn.weight is None else {"weight": turn.weight})} for turn in turns]


def of_pair(question: str, answer: str) -> str:
    """The one text of a question and its answer."""
    return spell([Turn("user", question), Turn("assistant", answer)])


def messages_of(text: str) -> list[dict[str, Any]]:
    """The messages that `spell` has spelled."""
    return json.loads(text)


def key_of(text: str) -> str:
    """What decides between training and validation: what was said, whatever weights it has."""
    return json.dumps([[message["role"], message["content"]] for message in messages_of(text)])


def spoken(text: str) -> str:
    """What was said alone, one turn a line: for the training of a tokenizer. Of a pair both sides."""
    found: Any = json.loads(text)
    messages = [*found["chosen"], *found["rejected"][found["asked"] :]] if isinstance(found, dict) else found
    return "\n".join(message["content"] for message in messages)


def _turns(record: dict[str, Any], shape: Format) -> list[Turn]:
    """The turns of an object of a shape. Raises WrongError."""
    if why := missing_key(record, shape):
        raise WrongError(why)
    if shape in ("messages", "sharegpt"):
        return [*(system_of(record) if shape == "sharegpt" else []), *listed(record[KEYS[shape][0]], KEYS[shape][0], shape)]
    weight = _weight(record, "the object")
    if shape == "text":
        return [Turn("text", wanted_text(record["text"], "'text'"), weight)]
    if shape == "prompt_completion":
        question = Turn("user", wanted_text(record["prompt"], "'prompt'"))
        return [question, Turn("assistant", wanted_text(record["completion"], "'completion'"), weight)]
    asked = wanted_text(record["instruction"], "'instruction'")
    if record.get("input") not in (None, ""):
        asked += "\n\n" + wanted_text(record["input"], "'input'", empty=True)
    system = system_of(record)
    return [*system, Turn("user", asked.rstrip("\n")), Turn("assistant", wanted_text(record["output"], "'output'"), weight)]


def missing_key(record: dict[str, Any], shape: Format) -> str:
    """What an object lacks of a shape; empty when nothing."""
    missing = [key for key in KEYS[shape] if key not in record]
    others = shapes_of(record) if missing else []
    looks = f"; it looks like {others[0]}" if others else ""
    return f"expected {shape}, found no key {missing[0]!r}{looks}" if missing else ""


def listed(values: Any, key: str, shape: Format = "messages") -> list[Turn]:
    """The turns that an object lists under a key. Raises WrongError."""
    role_key, text_key = ("from", "value") if shape == "sharegpt" else ("role", "content")
    if not isinstance(values, list):
        raise WrongError(f"{key!r} must be an array, found {type_name(values)}")
    if not 0 < len(values) <= MOST_TURNS:
        raise WrongError(f"{key!r} has {len(values)} turns, expected 1 to {MOST_TURNS}")
    turns = []
    for number, one in enumerate(values, start=1):
        if not isinstance(one, dict):
            raise WrongError(f"turn {number} must be an object, found {type_name(one)}")
        for name in (role_key, text_key):
            if name not in one:
                raise WrongError(f"turn {number} has no key {name!r} (it has {', '.join(printable(k, 20) for k in list(one)[:4])})")
        role = one[role_key]
        if not isinstance(role, str) or role not in ROLES[shape]:
            shown = repr(printable(role, 20)) if isinstance(role, str) else type_name(role)
            raise WrongError(f"turn {number} has the unknown role {shown}; known are {', '.join(ROLES[shape])}")
        turns.append(Turn(MEANS.get(role, role), wanted_text(one[text_key], f"turn {number}"), _weight(one, f"turn {number}")))
    return turns


def system_of(record: dict[str, Any]) -> list[Turn]:
    """The system turn that stands beside the others, if there is one."""
    return [] if record.get("system") in (None, "") else [Turn("system", wanted_text(record["system"], "'system'"))]


def wanted_text(value: Any, name: str, *, empty: bool = False) -> str:
    """A text with something in it. Raises WrongError for anything else; `empty`: it may be without."""
    if why := wrong_text(value, name):
        raise WrongError(why)
    if not empty and not value.strip():
        raise WrongError(f"{name} is empty")
    return value


def _weight(one: dict[str, Any], name: str) -> float | None:
    """The weight that a turn carries, or None."""
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
    if not (math.isfinite(weight) and 0 <= weight <= LARGEST):
        raise WrongError(f"{name}: weight must be from 0 to {LARGEST:g}, found {printable(str(weight), 20)}")
    return float(weight)


def check_order(turns: Sequence[Turn], *, train_on: TrainOn) -> None:
    """Raises WrongError where turns do not alternate, nobody answers, or something that is never trained has a weight."""
    before = "system"
    for number, turn in enumerate(turns, start=1):
        if turn.role == "system" and number > 1:
            raise WrongError(f"turn {number} is a system turn, expected at the beginning alone")
        if turn.role == before != "system":
            raise WrongError(f"two {turn.role} turns in a row, {number - 1} and {number}")
        if turn.role == "assistant" and before == "system":
            raise WrongError("the assistant speaks first, expected the user")
        if turn.role != "assistant" and turn.weight and train_on != "all":
            raise WrongError(f"turn {number} of the {turn.role} has a weight, and train_on={train_on} never trains it")
        before = turn.role
    if not any(turn.role == "assistant" for turn in turns):
        raise WrongError("no assistant turn")
