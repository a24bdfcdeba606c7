"""A conversation: its messages, and how they become the tokens that a model goes on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dist_llm.data.template_files import choose_template as named_template
from dist_llm.data.template_files import load_template
from dist_llm.data.templates import Template
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import Failure, UsageError
from dist_llm.train.folder import Checkpoint


class TooLong(UsageError):
    """A message that is longer than what the model can see."""


@dataclass
class Conversation:
    """Messages so far. window: tokens that the model can see; reserve: of them kept for an answer. dropped: turns that were forgotten."""

    template: Template
    tokenizer: Tokenizer
    window: int
    reserve: int
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    dropped: int = 0

    def ask(self, text: str) -> list[int]:
        """Adds what the user says; the ids after which the answer is to come. The oldest turns go where they no longer fit.

        Raises TooLong, DataError or UsageError where the message cannot be asked; the conversation is then as it was.
        """
        asked = {"role": "user", "content": text}
        kept, room = list(self.messages), self.window - self.reserve
        ids = self._prompt([*kept, asked])
        while len(ids) > room and kept:
            del kept[: next((at for at, message in enumerate(kept[1:], 1) if message["role"] == "user"), len(kept))]
            ids = self._prompt([*kept, asked])
        if len(ids) > room:
            found = f"{len(ids)} tokens with the template"
            raise TooLong("the message is too long", where="the message", expected=f"at most {room} tokens of {self.window}", found=found)
        self.dropped += sum(message["role"] == "user" for message in self.messages[: len(self.messages) - len(kept)])
        self.messages = [*kept, asked]
        return ids

    def answered(self, text: str) -> None:
        """Adds what the model has said."""
        self.messages.append({"role": "assistant", "content": text})

    def reset(self) -> None:
        """Forgets all messages."""
        self.messages, self.dropped = [], 0

    def save(self, path: Path) -> None:
        """Writes the conversation as a line of chat data into a new file. Raises OSError, also where the file is there already."""
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": self._with_system(self.messages)}, ensure_ascii=False) + "\n")

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages

    def _prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return self.template.prompt(self._with_system(messages), self.tokenizer)


def choose_template(
    given: str | None, opened: Checkpoint, tokenizer: Tokenizer, *, tell: Callable[[str], object]
) -> tuple[Template, Tokenizer]:
    """The template of a name or file; else the run's own, or what lies beside the tokenizer, or `plain`, which is told.

    And the tokenizer, to which all that the template writes of special tokens is special. Raises UsageError for a template that is not
    there, or writes tokens that the tokenizer does not have.
    """
    wanted = given or opened.config.data.chat.template
    names: dict[str, str] = {"end": tokenizer.end, "begin": tokenizer.begin_names}
    try:
        template = named_template(wanted, **names, tokenizer=opened.path)
        fitted = template.fit(tokenizer)
        if lacking := sorted(fitted.added - tokenizer.added):
            what = "the tokenizer does not have the tokens of the chat template"
            raise UsageError(what, where=template.where, expected=", ".join(lacking), found=str(opened.path))
        if (rows := fitted.rows(template.commands(fitted))) > opened.config.model.vocab:
            what, expected = "the model has no row for a token of the chat template", f"{rows} rows"
            found = f"{opened.config.model.vocab} in {opened.path}"
            raise UsageError(what, where=template.where, expected=expected, found=found)
        template.require_end(fitted)
    except Failure as failure:  # one that is no longer there, or was never used
        if given is not None:
            failure.next = "the same command with --template plain"
            raise
        template, fitted = load_template("plain", end=tokenizer.end, begin=tokenizer.begin_names), tokenizer
        found = f", {failure.found}" if failure.found else ""
        tell(f"the template {wanted} cannot be used ({failure.what}{found}): plain is used, which the model may not know")
    else:
        if wanted == "auto" and not template.models:
            tell("no chat template lies beside the tokenizer: plain is used, which the model may not know")
    return template, fitted
