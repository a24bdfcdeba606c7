"""The user's side of a chat: lines in, answers out, on a terminal, through a pipe or as JSON lines."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dist_llm.errors import Failure, plain
from dist_llm.infer.choose import Choice
from dist_llm.infer.text import Text
from dist_llm.train.console import printable
from dist_llm.use.chat import Brake, Turns
from dist_llm.use.conversation import Conversation
from dist_llm.use.load import BASE

LARGEST_LINE = 1 << 20  # bytes
HELP = """\
/reset         forget the conversation
/system TEXT   what the model is told first; without a text: nothing
/save FILE     write the conversation into a new file
/adapter NAME  the adapter that answers from now on; base: none; without a name: which there are
/help          this
/quit          end; so does Ctrl-D. Ctrl-C stops an answer. A line that begins with // is said with one /"""


@dataclass(frozen=True)
class Manner:
    """How answers are made and shown: at most `count` tokens; stops: strings; about: what the first line of JSON says.

    adapters: names of those that there are, of which the first begins.
    """

    choice: Choice
    count: int
    stops: tuple[str, ...]
    ends: tuple[int, ...]
    as_json: bool
    about: dict[str, Any]
    adapters: tuple[str, ...] = ()


class Talk:
    """A conversation with a user. turns: what `hold_chat` asks for."""

    def __init__(self, conversation: Conversation, manner: Manner, brake: Brake) -> None:
        self.conversation, self.manner, self.brake = conversation, manner, brake
        self.terminal = sys.stdin.isatty() and not manner.as_json
        self.turn, self.console = 0, Console(highlight=False)
        self.adapter = manner.adapters[0] if manner.adapters else None

    def turns(self) -> Turns:
        """Gives an order for each line that the user says, and shows what comes of it."""
        ready = yield None
        if self.manner.as_json:
            self._json({"version": 1, **self.manner.about, **ready["ready"]})
        elif self.terminal:
            self._note("/help says what else there is; Ctrl-D ends")
        for line in self._lines():
            ids = self._ask(line)
            if ids is not None:
                yield from self._answer(line, ids)

    def _answer(self, line: str, ids: Sequence[int]) -> Turns:
        """One answer, as it comes."""
        manner, self.turn = self.manner, self.turn + 1
        text, tokens = Text(self.conversation.tokenizer, stops=manner.stops, silent=manner.ends), list[int]()
        choice = replace(manner.choice, seed=(manner.choice.seed + self.turn) % 2**63)
        about = {"ids": list(ids), "count": manner.count, "choice": asdict(choice), "ends": list(manner.ends), "adapter": self.adapter}
        order: dict[str, Any] | None = about
        with self._stoppable():
            message: dict[str, Any] = {}
            while "done" not in message:
                message = yield order
                order = None
                if "token" in message and text.stopped is None:
                    tokens.append(message["token"])
                    self._show(text.add(tokens[-1]))
                    if text.stopped is not None:
                        self.brake.pull()
            self._show(text.finish())
        if not manner.as_json:
            print(flush=True)
        self.conversation.answered(text.shown)
        ended = text.stopped is not None or tokens[-1:] and tokens[-1] in manner.ends
        full = len(ids) + len(tokens) >= self.conversation.window
        finish = "stop" if ended else "interrupted" if self.brake.pulled else "window" if full else "length"
        if manner.as_json:
            about = {"turn": self.turn, "user": line, "text": text.shown, "tokens": tokens, "finish": finish}
            about |= {} if self.adapter is None else {"adapter": self.adapter}
            self._json({**about, "read": message["done"]["read"], "dropped": self.conversation.dropped})
        elif finish == "window":
            self._note("the context is full: the answer was cut")

    def _ask(self, line: str) -> list[int] | None:
        """The ids of what is to be answered; None where a line was a command, or cannot be said."""
        before = self.conversation.dropped
        try:
            ids = self.conversation.ask(line)
        except Failure as failure:
            expected = f"; expected {failure.expected}" if failure.expected else ""
            self._note(f"{failure.what}{f', {failure.found}' if failure.found else ''}{expected}: it was not said")
            return None
        if count := self.conversation.dropped - before:
            self._note(f"the context is full: the oldest {'turn was' if count == 1 else f'{count} turns were'} dropped")
        return ids

    # --- lines in --------------------------------------------------------------------------------------------------------------

    def _lines(self) -> Iterator[str]:
        """What the user says, without commands, until it ends."""
        while (line := self._read()) is not None:
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line[1:].partition(" ")
                if name == "quit":
                    return
                self._command(name, rest.strip())
            elif line.strip():
                yield line[1:] if line.startswith("//") else line

    def _read(self) -> str | None:
        """The next line; None at the end. Ctrl-C here begins the line anew."""
        while True:
            try:
                if self.terminal:
                    with suppress(ImportError):
                        import readline  # noqa: F401  editing and history of lines
                    return self.console.input("> ", markup=False)
                content = sys.stdin.buffer.readline(LARGEST_LINE + 1)
                if not content:
                    return None
                if len(content) > LARGEST_LINE:
                    while content and not content.endswith(b"\n"):
                        content = sys.stdin.buffer.readline(LARGEST_LINE)
                    self._note("the line is too long: it was not said")
                    continue
                return content.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                self._note("the line is not UTF-8: it was not said")
            except EOFError:
                print(flush=True)
                return None
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                print(flush=True)
                self._note("Ctrl-D or /quit ends")

    def _command(self, name: str, rest: str) -> None:
        conversation = self.conversation
        if name == "reset":
            conversation.reset()
            self._note("the conversation is forgotten")
        elif name == "system":
            conversation.system = rest
            self._note("the system's message is set" if rest else "there is no system's message now")
        elif name == "save" and rest:
            try:
                conversation.save(Path(rest).expanduser())
                self._note(f"saved {rest}")
            except (OSError, ValueError, RuntimeError) as error:
                self._note(f"{rest} cannot be written: {getattr(error, 'strerror', None) or error}")
        elif name == "adapter":
            self._choose(rest)
        elif name == "help":
            for line in HELP.splitlines():
                self._note(line)
        else:
            self._note("a file is needed: /save FILE" if name == "save" else f"there is no command /{name}; /help")

    def _choose(self, name: str) -> None:
        """Another adapter for the answers to come."""
        names = self.manner.adapters
        if name in names or (name == BASE and names):
            self.adapter = None if name == BASE else name
            self._note(f"{name} answers from now on")
        elif not names:
            self._note("there are no adapters; --adapter NAME=PATH brings some")
        else:
            known = f"there are {', '.join((*names, BASE))}"
            self._note(f"there is no adapter {name}; {known}" if name else f"{self.adapter or BASE} answers; {known}")

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Inside, Ctrl-C stops the answer and nothing else."""
        self.brake.release()
        before = signal.signal(signal.SIGINT, lambda number, frame: self.brake.pull())
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    # --- text out --------------------------------------------------------------------------------------------------------------

    def _show(self, piece: str) -> None:
        if piece and not self.manner.as_json:
            print(printable(piece), end="", flush=True)

    def _note(self, text: str) -> None:
        if self.manner.as_json:
            self._json({"note": plain(text)})
        else:
            print(plain(text), file=sys.stderr, flush=True)

    def _json(self, value: dict[str, Any]) -> None:
        print(json.dumps(value), flush=True)
