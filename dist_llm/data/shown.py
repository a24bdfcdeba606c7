"""Whether a template shows what is said beside the contents of a plain conversation: tools, calls, what came of them, reasoning.

A conversation is rendered once more with a mark of ours, `NUL ! 17 ;`, at each such text. A text whose mark does not come out again is
not shown. The marks also part what is said from what the template writes beside it: where a special token is there without them and
not with them, the two make it together, as `<|im_end` in the name of an argument does with a `|>` after it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dist_llm.data.readers import printable
from dist_llm.data.rendered import LITERAL, Span, guarded_all, respelled, texts_in
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.data.turns import REASONING, reasoning_of

SEEN = re.compile("\x00!([0-9]+);")
PARTING = "\x00!;"  # beside what need not be shown and is a part of a special token's name
BESIDE_TEXTS = ("tool_calls", "name", "tool_call_id")
BESIDE = (*REASONING, *BESIDE_TEXTS)  # what templates read of a message, its role and content aside
NAMES_OF = ("properties", "$defs", "definitions", "patternProperties")  # where the keys of a JSON schema are names


@dataclass(frozen=True)
class Part:
    """Something that is said. at: the place of its message; -1 of a tool's definition. what: in words. spoken: the assistant says it."""

    at: int
    what: str
    spoken: bool = False
    reasoning: bool = False


@dataclass(frozen=True)
class Talk:
    """A conversation as a template reads it, and the weight of each message.

    Names of special tokens in it are marks where a tokenizer knows them.
    """

    messages: list[dict[str, Any]]
    tools: list[Any]
    weights: list[float]

    @property
    def plain(self) -> bool:
        """Whether it has nothing but contents of a system, a user and the assistant."""
        return not self.tools and all(len(message) == 2 and message["role"] != "tool" for message in self.messages)

    @cached_property
    def names_tokens(self) -> bool:
        """Whether a mark stands in it for the name of a special token."""
        return any(LITERAL.search(text) for text in texts_in([self.messages, self.tools]))

    def respelled(self, sign: str) -> Talk:
        """The same with those marks in other letters."""
        return replace(self, messages=respelled(self.messages, sign), tools=respelled(self.tools, sign))


def read_by_template(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], tokenizer: Tokenizer | None, *, nothing: str | None
) -> Talk:
    """A conversation as a template reads it. nothing: the content of a turn that calls and says nothing. Raises DataError for a NUL."""
    found = []
    for message in messages:
        content = message["content"] if message["content"] or "tool_calls" not in message else nothing
        more = {key: message[key] for key in BESIDE if key in message}
        if thought := reasoning_of(more):
            more = {"thinking": thought, **more, REASONING[0]: thought}  # as transformers does
        found.append(guarded_all({"role": str(message["role"]), "content": content, **more}, tokenizer))
    return Talk(found, guarded_all(list(tools), tokenizer), [float(message.get("weight", 1.0)) for message in messages])


@dataclass
class Witness:
    """A conversation whose texts have marks. tokenizer: knows the special tokens. parts: what each mark stands for."""

    talk: Talk
    tokenizer: Tokenizer
    parts: list[Part] = field(default_factory=list)
    marked: Talk = field(init=False)

    def __post_init__(self) -> None:
        tools = [self._tool(tool, number) for number, tool in enumerate(self.talk.tools, start=1)]
        messages = [self._message(message, at) for at, message in enumerate(self.talk.messages)]
        self.marked = Talk(messages, self._parted(tools), self.talk.weights)

    def hidden(self, text: str, spans: Sequence[Span] = ()) -> list[Part]:
        """What did not come out in the text of the marked conversation, each thing once; with spans, in none of them."""
        within = [text] if not spans else [text[span.start : span.stop] for span in spans]
        seen = {int(number) for part in within for number in SEEN.findall(part)}
        return list(dict.fromkeys(part for number, part in enumerate(self.parts) if number not in seen))

    def _mark(self, part: Part) -> str:
        self.parts.append(part)
        return f"\x00!{len(self.parts) - 1};"

    def _around(self, text: str, part: Part) -> str:
        sign = self._mark(part)
        return sign + text + sign

    def _message(self, message: dict[str, Any], at: int) -> dict[str, Any]:
        found, turn = dict(message), f"turn {at + 1}"
        if message["role"] == "tool":
            found["content"] += self._mark(Part(at, f"what a tool says in {turn}"))
        if calls := message.get("tool_calls"):
            if message["content"]:
                found["content"] += self._mark(Part(at, f"the content of {turn}, beside its calls", spoken=True))
            found["tool_calls"] = [
                self._call(call, Part(at, f"call {number} of {turn}", spoken=True)) for number, call in enumerate(calls, start=1)
            ]
        if thought := reasoning_of(message):
            thought += self._mark(Part(at, f"the reasoning of {turn}", spoken=True, reasoning=True))
            found |= {key: thought for key in REASONING if key in message}
        return found | {key: self._parted(found[key]) for key in BESIDE_TEXTS if key in found}

    def _parted(self, value: Any) -> Any:
        """A value with marks at what has none yet and is a part of a special token's name: types, ids and the like."""
        if isinstance(value, dict):
            return {self._parted(key): self._parted(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._parted(one) for one in value]
        parts = isinstance(value, str) and not SEEN.search(value) and self.tokenizer.part_of_special(value)
        return PARTING + value + PARTING if parts else value

    def _call(self, call: dict[str, Any], part: Part) -> dict[str, Any]:
        function = call["function"]
        made = {"name": self._around(function["name"], part), "arguments": self._all(function["arguments"], part)}
        return {**call, "function": {**function, **made}}

    def _all(self, value: Any, part: Part) -> Any:
        """A value with marks at each key and each text or number in it, which become texts."""
        if isinstance(value, dict):
            return {self._around(key, part): self._all(one, part) for key, one in value.items()}
        if isinstance(value, list):
            return [self._all(one, part) for one in value]
        return self._around(value if isinstance(value, str) else json.dumps(value), part)

    def _tool(self, tool: dict[str, Any], number: int) -> dict[str, Any]:
        """A definition with marks at its name, its description, and what its parameters are called and described as."""
        name, function = f"tool {number}", tool.get("function", tool)
        made = {**function, "name": self._around(function["name"], Part(-1, name))}
        made |= self._schema({key: function[key] for key in ("description", "parameters") if key in function}, name)
        return {**tool, "function": made} if "function" in tool else made

    def _schema(self, value: Any, name: str) -> Any:
        if isinstance(value, list):
            return [self._schema(one, name) for one in value]
        if not isinstance(value, dict):
            return value
        found: dict[str, Any] = {}
        for key, one in value.items():
            if key in NAMES_OF and isinstance(one, dict):
                parts = {own: Part(-1, f"{printable(own, 30)!r} of {name}") for own in one}
                found[key] = {self._around(own, parts[own]): self._schema(each, name) for own, each in one.items()}
            elif key == "description" and isinstance(one, str):
                found[key] = self._around(one, Part(-1, f"a description of {name}"))
            else:
                found[key] = self._schema(one, name)
        return found
