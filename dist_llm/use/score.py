"""What evaluation suites ask of a model: log likelihoods of texts, and texts that go on until a string comes.

The conventions are those of lm-evaluation-harness (`lm_eval_adapter.py` makes its subclass of this): blanks at the end of a
context belong to what follows, a text begins as the tokenizer's own rule says (BOS, where it has one), an empty context is that, or the
end of a document, and a text that is longer than the window is cut into windows each of whose tokens is predicted once. Of a whole text
BOS is predicted too, after BOS, as the harness has it. Special tokens have no text in what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dist_llm.data.readers import printable
from dist_llm.data.templates import Template
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import UsageError
from dist_llm.infer.choose import Choice
from dist_llm.infer.model import Model
from dist_llm.infer.text import texts_of
from dist_llm.infer.write import Writer

NEW_TOKENS = 256  # of an answer, where nothing is said
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # as tasks call them; the first that is given counts


@dataclass(frozen=True)
class Piece:
    """Tokens to be predicted, after some that are given: at least one."""

    given: list[int]
    wanted: list[int]


class Scorer:
    """A model with its tokenizer. window: tokens that it can see; batch: texts at once; ends: of an answer, beside that of a document.

    template: of its conversations, which the tokenizer is fit for.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        window: int,
        batch: int = 8,
        ends: Iterable[int] = (),
        template: Template | None = None,
    ) -> None:
        self.model, self.tokenizer, self.window, self.batch, self.template = model, tokenizer, window, batch, template
        self.ends = frozenset((tokenizer.end_id, *ends))
        self.talks = False  # contexts are conversations
        self.rendered: dict[str, list[int]] = {}  # what `chat` gave, and the tokens that it stands for

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
        """A conversation as a context: where it comes again as one, it stands for the template's very tokens.

        answer: the assistant's next turn is asked for; else its last message is to go on. Raises UsageError or DataError.
        """
        assert self.template is not None
        self.talks = True
        begun = "" if answer or messages[-1]["role"] != "assistant" else str(messages[-1]["content"])
        before = list(messages[:-1] if begun else messages)
        text = self.template.render(before, add_generation_prompt=True) + begun
        ids = [*self.template.prompt(before, self.tokenizer), *self.tokenizer.encode(begun)]
        if self.rendered.setdefault(text, ids) != ids:
            what = "two conversations look alike, one of which holds letters where the other has special tokens"
            raise UsageError(what, where=self.template.where, found=printable(text, 200), next="a task without such letters")
        return text

    def _context(self, text: str) -> list[int]:
        """The ids of a context. Raises UsageError for a part of a conversation, whose special tokens would become letters."""
        if (ids := self.rendered.get(text)) is not None:
            return ids
        named = self.template.commands(self.tokenizer) if self.talks and self.template is not None else ()
        if strange := next((name for name in named if name in text), None):
            what, found = "a context is not what the chat template gave", f"{strange} in {printable(text, 200)}"
            raise UsageError(
                what, where="context", expected="a whole conversation", found=found, next="the task without apply_chat_template"
            )
        return self.tokenizer.prompt(text)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(context, continuation) of each -> (the log probability of the continuation, whether it is what greedy text would be)."""
        return self._scored([self._pieces(*self.tokens(context, continuation)) for context, continuation in pairs])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log probability of each whole text, after what stands before a text."""
        first, begin = self.tokenizer.opening[-1:], self.tokenizer.begin
        pieces = [self._pieces(first, [*begin, *self.tokenizer.encode(text)]) for text in texts]
        return [value for value, _ in self._scored(pieces)]

    def tokens(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of what follows it, encoded together; apart where both are one token then."""
        if context in self.rendered:
            given, blanks = self._without_blanks(context)
            return given, self.tokenizer.encode(blanks + continuation)
        kept = context.rstrip()
        context, continuation = kept, context[len(kept) :] + continuation
        if not context:
            return self.tokenizer.opening, self.tokenizer.encode(continuation)
        given, whole = self._context(context), self.tokenizer.prompt(context + continuation)
        return given, whole[len(given) :] or self.tokenizer.encode(continuation)

    def _without_blanks(self, context: str) -> tuple[list[int], str]:
        """The ids of a conversation without tokens at its end that are blanks, and these blanks."""
        ids, left = list(self.rendered[context]), context[len(context.rstrip()) :]
        blanks = left
        while left and (piece := self.tokenizer.piece(ids[-1:], first=False)) and left.endswith(piece):
            left = left.removesuffix(piece)
            ids.pop()
        return ids, blanks.removeprefix(left)

    def until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """(context, settings) of each -> the text that follows, which ends before a string of `until`.

        Settings: until, max_gen_toks (or LENGTHS), do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed; greedy without
        do_sample or a temperature. Raises UsageError where an answer may take the whole window.
        """
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for at, (_, settings) in enumerate(requests):
            groups.setdefault(repr(sorted(settings.items(), key=lambda item: item[0])), []).append(at)
        for alike in groups.values():
            for first in range(0, len(alike), self.batch):
                numbers = alike[first : first + self.batch]
                texts = self._written([requests[at][0] for at in numbers], requests[numbers[0]][1])
                for at, text in zip(numbers, texts, strict=True):
                    answers[at] = text
        return answers

    def _written(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        count, special = self._count(settings), self.tokenizer.special
        ends = {*self.ends, *(special[stop] for stop in stops if stop in special)}
        prompts = [self._context(context)[count - self.window :] for context in contexts]  # the end of a long one counts
        writer = Writer(self.model, prompts, count=count, choice=_choice(settings), window=self.window, ends=ends)
        return texts_of(writer, self.tokenizer, lines=len(prompts), stops=stops, silent={*ends, *special.values()})

    def _count(self, settings: Mapping[str, Any]) -> int:
        """The most tokens of an answer; where nothing is said no more than half the window."""
        given = next((int(settings[name]) for name in LENGTHS if settings.get(name) is not None), min(NEW_TOKENS, self.window // 2))
        if not 0 < given < self.window:
            way = f"a smaller one: simple_evaluate(..., gen_kwargs='max_gen_toks={max(1, self.window // 2)}')"
            expected = f"1 to {self.window - 1} tokens, of a window of {self.window}"
            raise UsageError(
                "an answer of that length leaves no room for a question",
                where="max_gen_toks",
                expected=expected,
                found=str(given),
                next=way,
            )
        return given

    def _pieces(self, given: list[int], wanted: list[int]) -> list[Piece]:
        """One piece where all fits into the window with the end of what is given; else several, each as full as it can be."""
        if len(wanted) <= self.window:
            return [Piece((given + wanted)[-(self.window + 1) : -len(wanted)] if wanted else given, wanted)]
        whole, pieces, done = given[-1:] + wanted, [], 0  # token number i is whole[i + 1]
        while done < len(wanted):
            stop = min(done + self.window, len(wanted))
            start = max(0, stop - self.window)
            pieces.append(Piece(whole[start : done + 1], wanted[done:stop]))
            done = stop
        return pieces

    def _scored(self, texts: Sequence[list[Piece]]) -> list[tuple[float, bool]]:
        """The sum over each text's pieces, and whether all of them are greedy."""
        flat = [(number, piece) for number, pieces in enumerate(texts) for piece in pieces if piece.wanted]
        flat.sort(key=lambda item: -len(item[1].given) - len(item[1].wanted))
        totals, greedy = [0.0] * len(texts), [True] * len(texts)
        for first in range(0, len(flat), self.batch):
            group = flat[first : first + self.batch]
            for (number, _), (value, likeliest) in zip(group, self._predicted([piece for _, piece in group]), strict=True):
                totals[number] += value
                greedy[number] &= likeliest
        return list(zip(totals, greedy, strict=True))

    def _predicted(self, pieces: Sequence[Piece]) -> Iterator[tuple[float, bool]]:
        """(log probability, greedy or not) of each piece, all in one pass."""
        size = max(len(piece.given) + len(piece.wanted) - 1 for piece in pieces)
        tokens, labels = torch.zeros(len(pieces), size, dtype=torch.int64), torch.full((len(pieces), size), -1)
        for row, piece in enumerate(pieces):
            line = torch.tensor(piece.given + piece.wanted)
            tokens[row, : len(line) - 1] = line[:-1]
            labels[row, len(piece.given) - 1 : len(line) - 1] = line[len(piece.given) :]
        values, likeliest = self.model.scores(tokens, labels)
        for row in range(len(pieces)):
            yield float(values[row].sum()), bool(likeliest[row].all())


def _choice(settings: Mapping[str, Any]) -> Choice:
    """How tokens are chosen, by the names that transformers gives these settings."""
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0):
        temperature = 0.0
    elif not temperature:
        temperature = 1.0
    names = ("top_k", "top_p", "min_p")
    rules: dict[str, Any] = {name: settings[name] for name in names if settings.get(name)}
    return Choice(
        temperature, **rules, repetition_penalty=float(settings.get("repetition_penalty", 1.0)), seed=int(settings.get("seed", 0))
    )
