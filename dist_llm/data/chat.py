"""Conversations out of JSON lines: which shape the objects have, and what is wrong with one that does not fit.

    alpaca             {"instruction": text, "input": text, "output": text}             input may be left out
    sharegpt           {"conversations": [{"from": "human" | "gpt" | "system", "value": text}, ...]}     or turns as messages has them
    messages           {"messages": [{"role": "user" | "assistant" | "system" | "tool", "content": text}, ...]}       perhaps with `tools`
    prompt_completion  {"prompt": text or messages, "completion": text or messages}
    text               {"text": text}                                                   trained whole, without a template

All but text may carry `system`, a text, for a system turn at the beginning.
A turn, or an object of the shapes without turns, may carry `weight`, from 0 to 1000, or `train`, true or false. All objects of a
source have one shape. A conversation is a first system turn, if any, then turns of the user and the assistant in alternation,
the user first; what the tools say that the assistant calls comes after its turn, and then the assistant, if anybody. It becomes a document
whose text is one spelling of its messages and tools (turns.py). What would have to be left out for that is refused (LOST).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import zstandard

from dist_llm.data.readers import MAX_TOLD, Take, is_json, is_table, parse_object, printable, records, type_name, unpack, unreadable
from dist_llm.data.templates import Trained
from dist_llm.data.turns import Turn, WrongError, beside, joined, reasoning_of, says, spelled_calls, tools_of, wanted_text, weight_of
from dist_llm.errors import DataError, Failure, UsageError

TrainOn = Trained | Literal["each"]  # each: every turn of the assistant in a sample of its own, which ends with it
Format = Literal["alpaca", "sharegpt", "messages", "prompt_completion", "text", "preference"]

KEYS: dict[str, tuple[str, ...]] = {  # what an object of a shape has at least; text, which others carry beside their own, is last
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),  # data/preferences.py
    "text": ("text",),
}
ROLES = {
    "messages": ("user", "assistant", "system", "developer", "tool"),
    "sharegpt": ("human", "user", "gpt", "assistant", "system", "developer", "tool", "function_call", "observation"),
}
MEANS = {"human": "user", "gpt": "assistant", "developer": "system", "function_call": "assistant", "observation": "tool"}
WITH_TOOLS: tuple[Format, ...] = ("messages", "sharegpt", "prompt_completion")
_CALLS = "a call is written under 'tool_calls' of the assistant's turn, and what comes of it is a turn of the role 'tool'"
_TOOLS = "conversations of the formats messages, sharegpt and prompt_completion alone carry tools"
_OTHERS = "only text is trained; leave the conversation out, or take the key away"
TOOL_ROLES = ("function", "function_call", "function_response", "observation", "ipython", "tool_call", "tool_response")
_TOLD = "a template gets messages and tools alone; write what it says into them or into a template of your own, or take the key away"
_MEDIA = dict.fromkeys(("images", "audios", "videos"), _OTHERS)
_REST = {"chat_template_kwargs": _TOLD, **_MEDIA}
LOST = {**dict.fromkeys(("tools", "functions"), _TOOLS), **_REST}  # keys of an object with something in them that would be gone
LOST_BESIDE_TOOLS = {"functions": "write them under 'tools', each as the JSON schema of a function", **_REST}
LOST_OF_TURN = {  # and of a turn
    **dict.fromkeys(("tools", "functions"), "tools belong to the whole conversation: write them as 'tools' beside its turns"),
    "function_call": _CALLS,
    **_MEDIA,
}
LOOKED_AT = 1000  # lines among which the first object is looked for
MOST_TURNS = 10_000
EXPECTED = "conversations as JSON objects of one shape, one a line"


@dataclass(frozen=True)
class Reading:
    """How conversations are read. shape: auto: found from the first object of a source. train_on: what may have a weight."""

    shape: Literal["auto"] | Format = "auto"
    train_on: TrainOn = "assistant"


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
    record, where, faults = first_object(files)
    if record is None:
        what = "there is no sound JSON object to tell the shape of the conversations by"
        where = faults[0].split(": ", 1)[0] if faults else str(files[0])
        way = "mend them, or name other conversations: data.source=PATH"
        raise DataError(what, where=where, expected=EXPECTED, details=faults[:MAX_TOLD] or ["nothing but empty lines"], next=way)
    return _only_shape(record, where)


def first_keys(files: Sequence[Path]) -> list[str]:
    """The keys of the first object, or the columns of the first table, among files of objects; none where there is no sound one."""
    first = next((path for path in files if is_json(path) or is_table(path)), None)
    if first is None:
        return []
    try:
        if is_table(first):
            from dist_llm.data.parquet import column_names

            return column_names(first)
        return list(first_object([first])[0] or ())
    except Failure:
        return []  # it is told when it is read


def way_of(keys: Sequence[str]) -> str:
    """The setting that reads objects with these keys as what they look like, where that is not text; empty where it is."""
    found = [name for name in shapes_of(dict.fromkeys(keys)) if name != "text"]
    if found == ["preference"]:
        return "the same command with preference.loss=sigmoid learns from the pairs that they look like (DPO)"
    return f"the same command with data.chat.format={'|'.join(found)} trains the answers of what they look like" if found else ""


def first_object(files: Sequence[Path]) -> tuple[dict[str, Any] | None, str, list[str]]:
    """The first sound object among the first of each file, where it is, and what is wrong with those before it. Raises DataError."""
    faults: list[str] = []
    for path in files:
        if is_table(path):
            from dist_llm.data.parquet import read_rows, without_nulls

            if (first := next(read_rows(path), None)) is not None:
                return without_nulls(first.values), first.place, faults
            continue
        try:
            with path.open("rb") as raw:
                for place, line, why in islice(records(unpack(raw, path), path), LOOKED_AT):
                    record, why = (None, why) if why else parse_object(line)
                    if record is not None:
                        return record, place, faults
                    if why:
                        shown = printable(line[:200].decode("utf-8", "backslashreplace"), 60)
                        faults.append(f"{place}: {why}" + (f": {shown}" if shown else ""))
        except (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError) as error:
            raise unreadable(path, error) from error
    return None, "", faults


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
            turns = _turns(record, shape, train_on=train_on)
            if shape != "text":
                check_order(turns, train_on=train_on)
            tools = tools_of(record) if shape in WITH_TOOLS else []
        except WrongError as error:
            return "", str(error)
        return spell(turns, tools), ""

    return take


def spell(turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()) -> str:
    """The one text of a conversation's messages, and of its tools where it has any."""
    return _spelled(as_messages(turns), tools)


def _spelled(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
    return json.dumps({"messages": messages, "tools": tools} if tools else messages, ensure_ascii=False, separators=(",", ":"))


def as_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as a template reads them, without a system turn that says nothing."""
    said = [turn for turn in turns if turn.content or turn.role != "system"]
    weights = [{} if turn.weight is None else {"weight": turn.weight} for turn in said]
    return [{"content": turn.content, "role": turn.role, **turn.more, **weight} for turn, weight in zip(said, weights, strict=True)]


def each_turn(text: str) -> list[tuple[str, str]]:
    """(text, key) of a sample for each turn of the assistant that is trained: what comes before it, and the turn at its end.

    So a template shows earlier turns as it does when the turn is generated. What is held out goes by the first answer and what it
    answers, which conversations that begin alike share. Where nothing is trained it is the conversation as it is.
    """
    messages, tools = conversation_of(text)
    ends = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends:
        return [(text, key_of(text))]
    key = _key(messages[: ends[0] + 1], tools)
    taken = [at for at in ends if messages[at].get("weight", 1.0)] or ends[-1:]
    return [(_spelled(messages[: at + 1], tools), key) for at in taken]


def of_pair(question: str, answer: str) -> str:
    """The one text of a question and its answer."""
    return spell([Turn("user", question), Turn("assistant", answer)])


def conversation_of(text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The messages and the tools that `spell` has spelled."""
    found = json.loads(text)
    return (found["messages"], found["tools"]) if isinstance(found, dict) else (found, [])


def messages_of(text: str) -> list[dict[str, Any]]:
    """The messages that `spell` has spelled."""
    return conversation_of(text)[0]


def key_of(text: str) -> str:
    """What decides between training and validation: what was said and called, and the tools at hand, whatever weights it has."""
    return _key(*conversation_of(text))


def _key(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
    rows = [[message["role"], message["content"], *_beside(message)] for message in messages]
    return json.dumps([*rows, *([{"tools": tools}] if tools else [])], sort_keys=True)


def _beside(message: dict[str, Any]) -> list[Any]:
    """What a message says beside its content, whatever ids its calls have."""
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())]
    return [part for part in (calls, reasoning_of(message)) if part]


def said(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[str]:
    """All texts that a conversation is made of; calls and tools as JSON."""
    found = [json.dumps(tool, ensure_ascii=False) for tool in tools]
    for message in messages:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        found += [text for text in (reasoning_of(message), message["content"], *calls) if text]
    return found


def spoken(text: str) -> str:
    """What was said alone, one turn a line: for the training of a tokenizer. Of a pair both sides."""
    found: Any = json.loads(text)
    if isinstance(found, dict) and "chosen" in found:
        return "\n".join(said([*found["chosen"], *found["rejected"][found["asked"] :]]))
    return "\n".join(said(*conversation_of(text)))


def _turns(record: dict[str, Any], shape: Format, *, train_on: TrainOn) -> list[Turn]:
    """The turns of an object of a shape. Raises WrongError."""
    if why := missing_key(record, shape):
        raise WrongError(why)
    if shape != "text":
        require_nothing_lost(record, "the object", LOST_BESIDE_TOOLS if shape in WITH_TOOLS else LOST)
    if shape in ("messages", "sharegpt"):
        return with_system(record, listed(record[KEYS[shape][0]], KEYS[shape][0], shape))
    weight = weight_of(record, "the object")
    if shape == "text":
        return [Turn("text", wanted_text(record["text"], "'text'"), weight)]
    if shape == "prompt_completion":
        return with_system(record, [*_prompt(record["prompt"], train_on=train_on), *_completion(record["completion"], weight)])
    asked = wanted_text(record["instruction"], "'instruction'")
    if record.get("input") not in (None, ""):
        asked += "\n\n" + wanted_text(record["input"], "'input'", empty=True)
    system = system_of(record)
    return [*system, Turn("user", asked.rstrip("\n")), Turn("assistant", wanted_text(record["output"], "'output'"), weight)]


def _prompt(value: Any, *, train_on: TrainOn) -> list[Turn]:
    """What is asked, a text or messages, which are read and not trained. Raises WrongError."""
    if not isinstance(value, list):
        return [Turn("user", wanted_text(value, "'prompt'"))]
    turns = listed(value, "prompt")
    if turns[-1].role not in ("user", "tool"):
        raise WrongError("'prompt' must end with a turn of the user or a tool, which 'completion' answers")
    if train_on == "all":
        return turns
    if any(turn.weight or one.get("train") for turn, one in zip(turns, value, strict=True)):
        raise WrongError(f"a turn of 'prompt' is to be trained, and train_on={train_on} never trains it; 'messages' trains every answer")
    return [replace(turn, weight=0.0 if turn.role == "assistant" else turn.weight) for turn in turns]


def _completion(value: Any, weight: float | None) -> list[Turn]:
    """The answer, a text or messages. weight: of the object. Raises WrongError."""
    if not isinstance(value, list):
        return [Turn("assistant", wanted_text(value, "'completion'"), weight)]
    if weight is not None:
        raise WrongError("the object has a weight and its completion is messages, expected it on one of these")
    return listed(value, "completion")


def require_nothing_lost(one: dict[str, Any], name: str, lost: Mapping[str, str]) -> None:
    """Raises WrongError where an object or a turn says something under a key that would be gone without a word; a flag says nothing,
    and neither does a table without values, which is how files of columns have one that is not there."""
    for key, way in lost.items():
        value = one.get(key)
        parts = [part for part in value.values() if part not in (None, "", [], {})] if isinstance(value, dict) else value
        if says(parts):
            raise WrongError(f"{name} has {key!r}: {way}")


def missing_key(record: dict[str, Any], shape: Format) -> str:
    """What an object lacks of a shape; empty when nothing."""
    missing = [key for key in KEYS[shape] if key not in record]
    others = shapes_of(record) if missing else []
    looks = f"; it looks like {others[0]}" if others else ""
    return f"expected {shape}, found no key {missing[0]!r}{looks}" if missing else ""


def listed(values: Any, key: str, shape: Format = "messages") -> list[Turn]:
    """The turns that an object lists under a key, an empty one of the system among them. Raises WrongError."""
    if not isinstance(values, list):
        raise WrongError(f"{key!r} must be an array, found {type_name(values)}")
    if not 0 < len(values) <= MOST_TURNS:
        raise WrongError(f"{key!r} has {len(values)} turns, expected 1 to {MOST_TURNS}")
    return [_listed_turn(one, number, shape) for number, one in enumerate(values, start=1)]


def _listed_turn(one: Any, number: int, shape: Format) -> Turn:
    """Turn `number` of a list. Raises WrongError."""
    name = f"turn {number}"
    if not isinstance(one, dict):
        raise WrongError(f"{name} must be an object, found {type_name(one)}")
    role_key, text_key = ("from", "value") if shape == "sharegpt" and ("from" in one or "role" not in one) else ("role", "content")
    require_nothing_lost(one, name, LOST_OF_TURN)
    calls = says(one.get("tool_calls"))
    for key in (role_key,) if calls else (role_key, text_key):
        if key not in one:
            raise WrongError(f"{name} has no key {key!r} (it has {', '.join(printable(k, 20) for k in list(one)[:4])})")
    given = one[role_key]
    if isinstance(given, str) and given in TOOL_ROLES and given not in ROLES[shape]:
        raise WrongError(f"{name} has the role {given!r}: {_CALLS}")
    if not isinstance(given, str) or given not in ROLES[shape]:
        shown = repr(printable(given, 20)) if isinstance(given, str) else type_name(given)
        raise WrongError(f"{name} has the unknown role {shown}; known are {', '.join(ROLES[shape])}")
    role, weight = MEANS.get(given, given), weight_of(one, name)
    more = beside(one, role, name)
    value = "" if calls and one.get(text_key) is None else joined(one[text_key], name)
    text = wanted_text(value, name, empty=calls or role in ("system", "tool"))
    if given == "function_call" and not calls:
        return Turn(role, "", weight, {**more, "tool_calls": spelled_calls(text, name)})
    return Turn(role, text if text.strip() or role == "tool" else "", weight, more)


def system_of(record: dict[str, Any]) -> list[Turn]:
    """The system turn that stands beside the others, if there is one that says something."""
    text = "" if record.get("system") is None else wanted_text(record["system"], "'system'", empty=True)
    return [Turn("system", text)] if text.strip() else []


def with_system(record: dict[str, Any], turns: Sequence[Turn]) -> list[Turn]:
    """Turns that begin with what the system says beside them, if anything. Raises WrongError where they begin with something else."""
    system = system_of(record)
    if not system or turns[0].role != "system":
        return [*system, *turns]
    if turns[0].content not in ("", system[0].content):
        raise WrongError("'system' beside the turns says something else than the system turn at their beginning")
    return [replace(turns[0], content=system[0].content), *turns[1:]]


def check_order(turns: Sequence[Turn], *, train_on: TrainOn) -> None:
    """Raises WrongError where turns do not alternate, nobody answers, or something that is never trained has a weight."""
    before = Turn("system", "")
    for number, turn in enumerate(turns, start=1):
        if turn.role == "system" and number > 1:
            raise WrongError(f"turn {number} is a system turn, expected at the beginning alone")
        if turn.role == "tool" and number == 1:
            raise WrongError("a tool speaks first, expected the user")
        if turn.role == "tool" and before.role != "tool" and "tool_calls" not in before.more:
            raise WrongError(f"turn {number} is what a tool says, and turn {number - 1} calls none; {_CALLS}")
        if turn.role == "user" and before.role == "tool":
            raise WrongError(f"turn {number} of the user comes after what a tool says, expected the assistant")
        if turn.role == before.role not in ("system", "tool"):
            raise WrongError(f"two {turn.role} turns in a row, {number - 1} and {number}")
        if turn.role == "assistant" and before.role == "system":
            raise WrongError("the assistant speaks first, expected the user")
        if turn.role != "assistant" and turn.weight and train_on != "all":
            raise WrongError(f"turn {number} of the {turn.role} has a weight, and train_on={train_on} never trains it")
        before = turn
    if not any(turn.role == "assistant" for turn in turns):
        raise WrongError("no assistant turn")
