"""Preferences out of JSON objects: a question, an answer that is preferred, and one that is not; what is wrong with one that does not fit.

    {"prompt": text, "chosen": text, "rejected": text}
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}
    {"chosen": [messages], "rejected": [messages]}                     what both begin with is the prompt

Each perhaps with `system`. Messages are those of data/chat.py.
A `prompt` in text beside messages that begin with it, as UltraFeedback has them, says nothing more.
A pair becomes one document, whose text spells the two conversations; nothing of their prompt is trained. It becomes two documents of a
store, the chosen side and then the rejected one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_llm.config.preference import SIDES
from dist_llm.data.chat import (
    LOST,
    TrainOn,
    Turn,
    WrongError,
    as_messages,
    check_order,
    listed,
    missing_key,
    require_nothing_lost,
    said,
    wanted_text,
    with_system,
)
from dist_llm.data.encoding import ChatEncoder, Ids, place_of
from dist_llm.data.readers import Document, Take, type_name
from dist_llm.data.templates import Encoded
from dist_llm.data.turns import REASONING, says
from dist_llm.errors import DataError

BESIDE = ("tool_calls", *REASONING)  # what a turn may say beside its content, and a pair may not


def taker(*, train_on: TrainOn) -> Take:
    """What makes the text of a document of an object, or says what is wrong with it."""

    def take(record: dict[str, Any]) -> tuple[str, str]:
        try:
            chosen, rejected, asked = _conversations(record)
            for name, turns in zip(SIDES, (chosen, rejected), strict=True):
                _check_side(name, turns, asked, train_on=train_on)
        except WrongError as error:
            return "", str(error)
        return spell(chosen, rejected, asked), ""

    return take


def spell(chosen: Sequence[Turn], rejected: Sequence[Turn], asked: int) -> str:
    """The one text of a pair whose sides begin with `asked` turns of their prompt."""
    told = asked - sum(not turn.content for turn in chosen[:asked])  # a system turn that says nothing is not there
    sides = [as_messages([Turn(turn.role, turn.content, 0.0) for turn in side[:asked]] + list(side[asked:])) for side in (chosen, rejected)]
    return json.dumps({"asked": told, **dict(zip(SIDES, sides, strict=True))}, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def key_of(asked: Sequence[dict[str, Any]]) -> str:
    """What decides between training and validation: the messages of the prompt alone, whatever was answered."""
    return json.dumps([[message["role"], message["content"]] for message in asked])


def _conversations(record: dict[str, Any]) -> tuple[list[Turn], list[Turn], int]:
    """The chosen and the rejected conversation, whole, and how many turns of both are the prompt. Raises WrongError."""
    if why := missing_key(record, "preference"):
        raise WrongError(why)
    require_nothing_lost(record, "the object", LOST)
    prompt, kinds = record.get("prompt"), {type(record[name]) for name in SIDES}
    if len(kinds) == 2:
        found = f"{type_name(record['chosen'])} and {type_name(record['rejected'])}"
        raise WrongError(f"'chosen' and 'rejected' must be of one kind, found {found}")
    sides = [_side(record, name) for name in SIDES]
    if isinstance(prompt, list):
        before = _listed(prompt, "prompt")
    elif prompt is None and kinds == {str}:
        raise WrongError("expected preference, found no key 'prompt'; texts need one, messages may begin with theirs")
    elif prompt is None or (kinds == {list} and all(side[0].role != "assistant" for side in sides)):
        return _shared([with_system(record, side) for side in sides], prompt)
    else:
        before = [Turn("user", wanted_text(prompt, "'prompt'"))]
    before = with_system(record, before)
    chosen, rejected = ([*before, *side] for side in sides)
    return chosen, rejected, len(before)


def _side(record: dict[str, Any], name: str) -> list[Turn]:
    """The turns of one side, its prompt among them where it begins with it."""
    value = record[name]
    if isinstance(value, str):
        return [Turn("assistant", wanted_text(value, repr(name)))]
    if not isinstance(value, list):
        raise WrongError(f"{name!r} must be a string or an array of messages, found {type_name(value)}")
    return _listed(value, name)


def _listed(values: Any, name: str) -> list[Turn]:
    """The turns of a list. Raises WrongError where one says more than a content."""
    for number, one in enumerate(values if isinstance(values, list) else (), start=1):
        more = [repr(key) for key in BESIDE if says(one.get(key))] if isinstance(one, dict) else []
        if isinstance(one, dict) and one.get("role") == "tool":
            more = ["the role 'tool'"]
        if more:
            raise WrongError(f"turn {number} has {more[0]}: pairs of answers are trained by their contents alone")
    return listed(values, name)


def _shared(sides: Sequence[list[Turn]], prompt: Any) -> tuple[list[Turn], list[Turn], int]:
    """Conversations that begin with the same prompt. Raises WrongError where they do not, or a prompt beside them is another."""
    chosen, rejected = sides
    same = 0
    for one, other in zip(chosen, rejected, strict=False):
        if (one.role, one.content) != (other.role, other.content):
            break
        same += 1
    if same == len(chosen) == len(rejected):
        raise WrongError("'chosen' and 'rejected' are the same")
    if same == min(len(chosen), len(rejected)):
        longer = SIDES[len(chosen) < len(rejected)]
        raise WrongError(f"all of the other side is the beginning of {longer!r}: there is nothing to prefer")
    if chosen[same].role != "assistant" or rejected[same].role != "assistant":
        raise WrongError(f"the prompts differ at turn {same + 1}: expected the same turns up to an assistant's")
    if not same:
        raise WrongError("there is no prompt: expected the same turns at the beginning of both sides, or 'prompt'")
    if prompt is not None and wanted_text(prompt, "'prompt'") not in [turn.content for turn in chosen[:same] if turn.role == "user"]:
        raise WrongError("'prompt' is not what the messages begin with")
    return chosen, rejected, same


def _check_side(name: str, turns: Sequence[Turn], asked: int, *, train_on: TrainOn) -> None:
    """Raises WrongError where a side is no conversation, or does not answer its prompt."""
    try:
        check_order(turns, train_on=train_on)
    except WrongError as error:
        raise WrongError(f"{name!r}: {error}") from None
    if turns[asked - 1].role != "user" or turns[asked].role != "assistant":
        raise WrongError(f"{name!r}: the prompt must end with a user's turn, which the assistant answers")


class PairEncoder(ChatEncoder):
    """Pairs of conversations through a template: both sides of a pair, or neither."""

    def _encoded(self, document: Document) -> Ids | None:
        pair = json.loads(document.text)
        found = self.template.encode_batch([pair[name] for name in SIDES], self.tokenizer, train_on=self.train_on)
        for name, side in zip(SIDES, found, strict=True):
            if isinstance(side, DataError):
                self.note_bad(document, f"{name!r}: {side.what}" + (f" ({side.found})" if side.found else ""), pair[name])
                return None
        chosen, rejected = (side for side in found if isinstance(side, Encoded))
        if chosen.ids == rejected.ids:
            self.note_bad(document, "'chosen' and 'rejected' are the same tokens", pair["chosen"])
            return None
        ids, weights = chosen.ids + rejected.ids, chosen.weights + rejected.weights
        digest = hashlib.blake2b(np.array(ids, "<i8").tobytes() + np.array(weights, "<f8").tobytes(), digest_size=16)
        digest.update(len(chosen.ids).to_bytes(8, "little"))
        text_bytes = sum(len(text.encode()) for name in SIDES for text in said(pair[name]))
        place = place_of(key_of(pair["chosen"][: pair["asked"]]))
        return Ids(ids, digest.digest(), place, text_bytes, weights, second=len(chosen.ids))
