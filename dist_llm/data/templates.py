"""Chat templates: how a conversation becomes tokens, which of them are trained, and where generation begins and ends.

A conversation is a list of messages, `{"role": "system" | "user" | "assistant" | "tool", "content": text}`, with an optional
`weight` of a turn's tokens (1 when left out), and what data/turns.py lets stand beside a content; tools may be at hand. A template
is Jinja, in transformers' dialect; it is rendered in a sandbox (sandbox.py). What the assistant says is found by `{% generation %}`
marks, or else as the difference between the text up to a turn and with it.

Special tokens belong to the template alone: `<|im_end|>` inside a message, a call or a tool's definition is encoded as the letters
it is made of. What is said and a template does not show is refused (shown.py), never left out. Where a token
would reach over the edge of a trained turn the text is cut there, so that training sees the tokens that generation gives.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from dist_llm.data.rendered import SIGNS, Span, end_of_turn, last_special, restored, spelled_back, texts_in, tokens, unmarked
from dist_llm.data.renderer import Apart, Here, Renderer
from dist_llm.data.sandbox import TemplateFault, has_generation
from dist_llm.data.shown import Talk, Witness, read_by_template
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import DataError, Failure, UsageError, plain

Message = Mapping[str, Any]
Trained = Literal["assistant", "all", "last"]  # of one conversation; "each" (chat.py) makes several of one

NAMES = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>")  # what looks like a special token in a template
PROBE = "What is it?", "It is this.", "And that?", "That too."
CALLED = "look_it_up"
CALLING: list[dict[str, Any]] = [
    {"role": "user", "content": PROBE[0]},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "lookitup1", "type": "function", "function": {"name": CALLED, "arguments": {"what": "it"}}}],
    },
]
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": CALLED,
            "description": "Looks it up.",
            "parameters": {"type": "object", "properties": {"what": {"type": "string", "description": "What."}}, "required": ["what"]},
        },
    }
]


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids with a weight each; spans of ids [start, stop) of the turns that are trained."""

    ids: list[int]
    weights: list[float]
    turns: tuple[tuple[int, int], ...]


class Template:
    """A chat template. name: as the config names it; where: its file, for messages. eos, bos: what `eos_token` and `bos_token` are in it.

    special: what it writes that looks like a special token. trusted: it is this package's, and is rendered in this process.
    models: it came with the tokenizer of a model, which knows what is a token and what are letters.
    """

    def __init__(
        self, name: str, text: str, *, eos: str, bos: str = "", where: str = "", trusted: bool = False, models: bool = False
    ) -> None:
        self.name, self.text, self.eos, self.bos, self.where, self.models = name, text, eos, bos, where or name, models
        self.special = tuple(dict.fromkeys(token for token in (*NAMES.findall(text), bos, eos) if token))
        self.marked = has_generation(text)
        self._renderer: Renderer = Here(text) if trusted else Apart(text)
        self._ends: dict[str, frozenset[str]] = {}

    @cached_property
    def hash(self) -> str:
        """sha256 of all that its output depends on."""
        return hashlib.sha256("\x00".join((self.text, self.eos, self.bos)).encode()).hexdigest()

    def commands(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """The special tokens that it writes. A model's own template may write `<|user|>` where the model was trained on these letters."""
        ends = (self.bos, self.eos)
        return tuple(name for name in self.special if not self.models or name in tokenizer.added or name in ends)

    def fit(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the special tokens that this template writes; new ones come after those it has."""
        return tokenizer.extended(self.commands(tokenizer))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Sequence[Message] = ()) -> str:
        """The text of a conversation; add_generation_prompt: and the beginning of the assistant's next turn.

        Raises UsageError where the template cannot be rendered, DataError where it refuses the conversation.
        """
        ((text, _),) = self._texts(self._talk(messages, tools, None), [(len(messages), add_generation_prompt)])
        return restored(text, ())

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, train_on: Trained = "assistant", tools: Sequence[Message] = ()
    ) -> tuple[list[int], list[float]]:
        """(ids, weights) of a conversation: the weight of a token is that of the loss of predicting it, 0 where it is only read.

        train_on: what the assistant says and the tokens that end it, in every turn or the last; or all tokens. Raises
        UsageError where the template is at fault, DataError where the conversation is.
        """
        (found,) = self.encode_batch([messages], tokenizer, train_on=train_on, tools=tools)
        if isinstance(found, Failure):
            raise found
        return found.ids, found.weights

    def encode_batch(
        self,
        conversations: Sequence[Sequence[Message]],
        tokenizer: Tokenizer,
        *,
        train_on: Trained = "assistant",
        tools: Sequence[Message] = (),
    ) -> list[Encoded | DataError]:
        """Each conversation encoded, or what is wrong with it; tools: of all. Raises UsageError where the template is at fault."""
        return [self._encoded(messages, tools, tokenizer, train_on) for messages in conversations]

    def prompt(self, messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Sequence[Message] = ()) -> list[int]:
        """The ids after which the assistant's next turn is to be generated. Raises UsageError or DataError."""
        talk = self._talk(messages, tools, tokenizer)
        ((text, spans),) = self._texts(talk, [(len(messages), True)])
        if not self.marked:
            try:
                spans = self._differences(text, talk, tokenizer, _assistants(talk, "assistant"))
            except UsageError:
                spans = []  # a template that rewrites earlier turns: they are read as they stand
        return tokens(text, spans, tokenizer)[0]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end what the assistant says: of the turn, and of a document. Raises UsageError where the template trains none."""
        ends = {tokenizer.special[name] for name in self._end_names(tokenizer)}
        return tuple(sorted(ends | {tokenizer.end_id}))

    def require_end(self, tokenizer: Tokenizer) -> None:
        """Raises UsageError where the token that ends a turn would never be trained, so that the model would never stop."""
        self._end_names(tokenizer)

    def _others(self) -> str:
        """What may be done instead."""
        first, *others = [name for name in NAMED if name != self.name]
        return f"the same command with data.chat.template={first}, or {', '.join(others)} or the path of a .jinja file"

    # --- rendering ---------------------------------------------------------------------------------------------------------

    def _talk(self, messages: Sequence[Message], tools: Sequence[Message], tokenizer: Tokenizer | None) -> Talk:
        """A conversation as this template reads it. Raises DataError for a NUL."""
        silent = any("tool_calls" in message and not message["content"] for message in messages)
        return read_by_template(messages, tools, tokenizer, nothing=self._nothing if silent else None)

    @cached_property
    def _nothing(self) -> str | None:
        """What a turn that calls and says nothing has as its content: null, or an empty text where it cannot be null, or is written out."""
        null, empty = (self._render(read_by_template(CALLING, TOOLS, None, nothing=one), [(2, False)])[0] for one in (None, ""))
        if isinstance(null, TemplateFault) or isinstance(empty, TemplateFault):
            return "" if isinstance(null, TemplateFault) else None
        return "" if null.count("None") > empty.count("None") else None

    def _render(self, talk: Talk, wanted: Sequence[tuple[int, bool]]) -> list[str | TemplateFault]:
        """Texts of the first messages of a conversation, so many each, and whether they ask for the next turn; with marks."""
        texts = self._as_written(talk, wanted)
        if not talk.names_tokens:
            return texts
        said = "".join((self.text, self.bos, self.eos, *texts_in([talk.messages, talk.tools])))
        sign = next(one for one in SIGNS if one not in said)
        others = self._as_written(talk.respelled(sign), wanted)
        return [_unspelled(text, other, sign) for text, other in zip(texts, others, strict=True)]

    def _as_written(self, talk: Talk, wanted: Sequence[tuple[int, bool]]) -> list[str | TemplateFault]:
        """As the template gives them, whatever it does with the marks."""
        rest = {"bos_token": self.bos, "eos_token": self.eos, **({"tools": talk.tools} if talk.tools else {})}
        asked = [{"messages": talk.messages[:count], "add_generation_prompt": generation, **rest} for count, generation in wanted]
        return self._renderer.render(asked)

    def _sound(self, text: str | TemplateFault) -> str:
        """The text. Raises what a fault means."""
        if not isinstance(text, TemplateFault):
            return text
        if text.kind == "spelled":
            what = "the chat template takes what is said apart: the name of a special token in it would not be trained as its letters"
            raise DataError(what, where=self.where, found=plain(text), next=self._others())
        if text.kind == "refused":
            raise DataError("the chat template refuses the conversation", where=self.where, found=plain(text), next=self._others())
        raise UsageError(
            "the chat template cannot be rendered", where=self.where, expected="a Jinja template", found=plain(text), next=self._others()
        )

    def _texts(self, talk: Talk, wanted: Sequence[tuple[int, bool]]) -> list[tuple[str, list[Span]]]:
        """As `_render`, without the marks of what is trained, and where they were. Raises what a fault means."""
        return [unmarked(self._sound(text)) for text in self._render(talk, wanted)]

    def _encoded(
        self, messages: Sequence[Message], tools: Sequence[Message], tokenizer: Tokenizer, train_on: Trained
    ) -> Encoded | DataError:
        try:
            talk = self._talk(messages, tools, tokenizer)
            shown = None if talk.plain else self._shown(talk, tokenizer)
            text, spans = self._trained(talk, tokenizer, train_on)
            if shown is not None:
                self._require_shown(shown, text, talk, tokenizer, train_on)
            if train_on != "all":
                self._require_ends(text, spans, tokenizer)
        except DataError as fault:
            return fault
        ids, places = tokens(text, spans, tokenizer)
        weights = [0.0] * len(ids)
        for (start, stop), span in zip(places, spans, strict=True):
            weights[start:stop] = [span.weight] * (stop - start)
        weights[:1] = [0.0] * len(ids[:1])  # nothing comes before it
        if not any(weights):
            return DataError("no token of the conversation is trained", expected=NEEDS[train_on])
        return Encoded(ids, weights, tuple(places))

    # --- what is trained ---------------------------------------------------------------------------------------------------

    def _trained(self, talk: Talk, tokenizer: Tokenizer, train_on: Trained) -> tuple[str, list[Span]]:
        """The text of a conversation, and the parts of it that are trained. Raises UsageError or DataError."""
        ((text, marked),) = self._texts(talk, [(len(talk.messages), False)])
        return text, self._spans(text, marked, talk, tokenizer, train_on)

    def _spans(self, text: str, marked: list[Span], talk: Talk, tokenizer: Tokenizer, train_on: Trained) -> list[Span]:
        """The parts of the text that are trained, those of weight 0 left out."""
        if train_on == "all":
            if set(talk.weights) == {1.0}:
                return [Span(0, len(text))]
            return [span for span in self._turns(text, talk) if span.weight]
        chosen = _assistants(talk, train_on)
        if self.marked and marked:
            spans = _weighted(marked, talk, chosen)
            if spans is not None:
                return spans
            found = f"{len(marked)} marked parts for {len(_assistants(talk, 'assistant'))} turns of the assistant"
            raise UsageError(
                "the template marks more or fewer parts than there are turns",
                where=self.where,
                expected="one part a turn",
                found=found,
                next=self._others(),
            )
        return self._differences(text, talk, tokenizer, chosen)

    def _differences(self, text: str, talk: Talk, tokenizer: Tokenizer, chosen: Mapping[int, float]) -> list[Span]:
        """What each chosen turn adds to the text that asks for it. Raises UsageError where earlier text changes with it."""
        wanted = [pair for at in chosen for pair in ((at, True), (at + 1, False))]
        rendered = [text for text, _ in self._texts(talk, wanted)]
        spans = []
        for (at, weight), before, after in zip(chosen.items(), rendered[::2], rendered[1::2], strict=True):
            if not after.startswith(before):
                what = "the text that asks for a turn is not the beginning of the text with it, so that what is said cannot be told"
                expected = "{% generation %} marks in the template, or a text that only grows with each turn"
                raise UsageError(what, where=self.where, expected=expected, found=f"turn {at + 1}", next=self._others())
            if not text.startswith(after):
                what = "the chat template rewrites earlier turns, so that what it adds for a turn cannot be told"
                expected = "{% generation %} marks in the template, or a text that only grows with each turn"
                found = f"what comes after turn {at + 1} changes the text up to it"
                raise UsageError(what, where=self.where, expected=expected, found=found, next=f"{EACH}; or {self._others()}")
            stop = len(before) + end_of_turn(after[len(before) :], tokenizer)
            spans.append(Span(len(before), stop, weight))
        return spans

    def _turns(self, text: str, talk: Talk) -> list[Span]:
        """What each message adds to the text, with its weight; what tools say in a row is one, as templates put it in one turn."""
        roles = [message["role"] for message in talk.messages]
        ends = [at for at, role in enumerate(roles) if role != "tool" or roles[at + 1 : at + 2] != ["tool"]]
        rendered = [text for text, _ in self._texts(talk, [(at + 1, False) for at in ends])]
        spans, before, first = [], "", 0
        for at, after in zip(ends, rendered, strict=True):
            if not after.startswith(before) or not text.startswith(after):
                what = "the chat template rewrites earlier turns, so that a weight of a turn has no place"
                raise UsageError(what, where=self.where, next=f"{EACH}; or {self._others()}")
            if len(set(talk.weights[first : at + 1])) > 1:
                raise DataError("what tools say in a row has different weights", found=f"turns {first + 1} to {at + 1}")
            spans.append(Span(len(before), len(after), talk.weights[at]))
            before, first = after, at + 1
        return spans

    # --- what is shown -----------------------------------------------------------------------------------------------------

    def _shown(self, talk: Talk, tokenizer: Tokenizer) -> tuple[Witness, str, list[Span]]:
        """A conversation with marks at what it says beside plain contents, and its text. Raises DataError where that is not shown."""
        witness = Witness(talk, tokenizer)
        (text,) = self._render(witness.marked, [(len(talk.messages), False)])
        if isinstance(text, TemplateFault) and text.kind == "broken":
            raise DataError(f"the template {self.name} cannot show tools, calls or reasoning; {self._shows()}", found=plain(text))
        found, spans = unmarked(self._sound(text))
        if hidden := [part for part in witness.hidden(found) if not part.reasoning]:
            raise DataError(f"the template {self.name} does not show {hidden[0].what}; {self._shows()}")
        return witness, found, spans

    def _require_shown(
        self, shown: tuple[Witness, str, list[Span]], text: str, talk: Talk, tokenizer: Tokenizer, train_on: Trained
    ) -> None:
        """Raises DataError where reasoning that is to be trained is not shown, or something outside of the marks of what is trained,
        or where what is said becomes a special token by what stands beside it."""
        witness, found, marked = shown
        trained = _assistants(talk, "last" if train_on == "last" else "assistant")
        if hidden := [part for part in witness.hidden(found) if part.at in trained]:
            earlier = all(part.at < max(trained) for part in hidden)
            way = "data.chat.train_on=each trains every turn in a sample of its own" if earlier else self._shows(reasoning=True)
            raise DataError(f"the template {self.name} does not show {hidden[0].what}; {way}")
        if train_on != "all" and marked:
            outside = [part for part in witness.hidden(found, marked) if part.spoken and part.at in trained]
            if outside:
                raise DataError(f"the template {self.name} shows {outside[0].what} outside of what it marks as trained; {self._shows()}")
        names, parted = (tokenizer.special_pattern.findall(one) for one in (text, found))
        if names != parted:
            name = next((one for one, other in zip(names, [*parted, ""], strict=False) if one != other), names[-1] if names else "")
            raise DataError(f"what is said and what the template writes beside it make the token {name} together")

    def _shows(self, *, reasoning: bool = False) -> str:
        """Which templates show more than plain contents."""
        own = "a template in a .jinja file may" if self.models else "data.chat.template=model does where the model's own template knows it"
        if reasoning:
            return f"{own}; or write it into the content, as the model spells it"
        return own if self.models or self.name == "qwen" else f"data.chat.template=qwen shows tools; {own}"

    # --- how a turn ends ---------------------------------------------------------------------------------------------------

    def _require_ends(self, text: str, spans: Sequence[Span], tokenizer: Tokenizer) -> None:
        """Raises DataError where a trained turn does not end as the assistant's turns do."""
        ends = self._end_names(tokenizer)
        for number, span in enumerate(spans):
            if last_special(text[span.start : span.stop], tokenizer) not in ends:
                found = f"trained part {number + 1} ends before it"
                raise DataError("the end of an assistant's turn is not trained", where=self.where, found=found, next=self._others())

    def _end_names(self, tokenizer: Tokenizer) -> frozenset[str]:
        """The special tokens with which the assistant's turns end. Raises UsageError where one of them would not be trained."""
        if tokenizer.hash not in self._ends:
            self._ends[tokenizer.hash] = self._probed(tokenizer)
        return self._ends[tokenizer.hash]

    def _probed(self, tokenizer: Tokenizer) -> frozenset[str]:
        """Two small conversations, of one round and of two, and what ends their turns."""
        ends = set()
        for rounds in (1, 2):
            roles = ("user", "assistant") * rounds
            messages = [{"role": role, "content": content} for role, content in zip(roles, PROBE, strict=False)]
            train_on: Trained = "assistant" if self.marked or rounds == 1 else "last"  # one that rewrites is told where it matters
            talk = self._talk(messages, (), tokenizer)
            try:
                text, spans = self._trained(talk, tokenizer, train_on)
            except DataError as fault:
                raise UsageError(
                    "the chat template refuses a plain conversation",
                    where=self.where,
                    expected="turns of a user and the assistant",
                    found=fault.found,
                    next=self._others(),
                ) from fault
            if not spans:
                raise UsageError("the chat template leaves nothing to train", where=self.where, next=self._others())
            for span in spans:
                name = last_special(text[span.start : span.stop], tokenizer)
                if name is None:
                    what = "the chat template never trains the token that ends a turn, so that the model would not stop"
                    expected = "a special token at the end of what the assistant says, inside {% generation %} where that is there"
                    found = repr(restored(text[span.start : span.stop], ())[-40:])
                    raise UsageError(what, where=self.where, expected=expected, found=found, next=self._others())
                ends.add(name)
        return frozenset(ends | self._ends_of_calls(tokenizer, ends))

    def _ends_of_calls(self, tokenizer: Tokenizer, ends: Collection[str]) -> set[str]:
        """The special tokens with which turns end that call a tool; none where the template shows no calls, or trains their end never.

        ends: those of other turns.
        """
        talk, found = self._talk(CALLING, TOOLS, tokenizer), set()
        try:
            text, spans = self._trained(talk, tokenizer, "assistant")
        except Failure:
            return set()
        for span in spans:
            name, after = last_special(text[span.start : span.stop], tokenizer), tokenizer.special_pattern.match(text[span.stop :].lstrip())
            if name is not None and CALLED in text[span.start : span.stop] and not (after and after[0] in ends):
                found.add(name)
        return found


NAMED = ("chatml", "llama3", "qwen", "plain", "model")
EACH = "the same command with data.chat.train_on=each trains every turn in a sample of its own"
NEEDS = {
    "assistant": "an assistant's turn with a weight above 0",
    "last": "a last turn of the assistant with a weight above 0",
    "all": "at least two tokens, and a weight above 0",
}


def _unspelled(text: str | TemplateFault, other: str | TemplateFault, sign: str) -> str | TemplateFault:
    """The text, where it is `other` but for whole marks, which are in other letters there: then no letter of a mark is in it."""
    if isinstance(text, TemplateFault):
        return text
    again = other if isinstance(other, TemplateFault) else spelled_back(other, sign)
    if text == again:
        return text
    return TemplateFault("a text that depends on how such a name is spelled", "spelled")


def _assistants(talk: Talk, train_on: Trained) -> dict[int, float]:
    """Places of the assistant's turns that are trained, and their weights; those of weight 0 are left out."""
    found = {at: talk.weights[at] for at, message in enumerate(talk.messages) if message["role"] == "assistant"}
    if train_on == "last":
        found = dict(list(found.items())[-1:])
    return {at: weight for at, weight in found.items() if weight}


def _weighted(marked: Sequence[Span], talk: Talk, chosen: Mapping[int, float]) -> list[Span] | None:
    """The marked parts of the chosen turns with their weights; None where parts and turns cannot be told to belong together."""
    turns = [at for at, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if len(turns) == len(marked):
        return [replace(span, weight=chosen[at]) for at, span in zip(turns, marked, strict=True) if at in chosen]
    return list(marked) if len(marked) > len(turns) == len(chosen) and set(chosen.values()) <= {1.0} else None
