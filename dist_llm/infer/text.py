"""Tokens as text while they come: letters whole, and no further than a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from dist_llm.data.tokenizer import Tokenizer
from dist_llm.infer.write import Writer

LETTER = 4  # no letter has more bytes


class Text:
    """The text of one line of tokens.

    Bytes of an unfinished letter wait for the rest, and so does what may be the beginning of a stop string, across tokens.
    stopped: the stop string that has come; the text ends before it. Tokens named in `silent` have no text. after: the tokens of a text
    that goes on here, so that a space between the two is shown; a text of its own begins without one, as an answer after a template does.
    """

    def __init__(self, tokenizer: Tokenizer, *, stops: Sequence[str] = (), silent: Iterable[int] = (), after: Sequence[int] = ()) -> None:
        self.tokenizer, self.stops, self.silent = tokenizer, [stop for stop in stops if stop], frozenset(silent)
        self.tokens: list[int] = []
        self.stopped: str | None = None
        self._given: list[str] = []
        self._begins = not after or after[-1] in tokenizer.special.values()  # no text stands before it
        self._shown = 0  # the text of the tokens before it is given
        self._held = ""  # may begin a stop string

    @property
    def shown(self) -> str:
        """All the text that was given so far."""
        return "".join(self._given)

    def add(self, token: int) -> str:
        """Takes a token; returns what can be shown now."""
        return self._give(self._added(token))

    def _give(self, text: str) -> str:
        self._given.append(text)
        return text

    def _added(self, token: int) -> str:
        if self.stopped is not None or token in self.silent:
            return ""
        self.tokens.append(token)
        text = self._rest()
        if text.endswith("\ufffd") and len(self.tokens) - self._shown <= LETTER:
            return ""
        self._shown = len(self.tokens)
        return self._release(text)

    def _rest(self) -> str:
        """The text of the tokens that is not given yet."""
        return self.tokenizer.piece(self.tokens[self._shown :], first=self._begins and not self._shown)

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped is not None:
            return ""
        text, self._shown = self._release(self._rest()), len(self.tokens)
        rest, self._held = self._held, ""
        return self._give(text if self.stopped is not None else text + rest)

    def _release(self, text: str) -> str:
        """What is no stop string and cannot become one."""
        self._held += text
        found = [(at, stop) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found)
            return self._held[:at]
        kept = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of a text may be the first ones of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def stream(tokenizer: Tokenizer, tokens: Iterator[int], *, silent: Iterable[int] = (), after: Sequence[int] = ()) -> Iterator[str]:
    """The text of tokens as they come, which may go on after others; the end token has none, and ends it."""
    text = Text(tokenizer, silent=silent, after=after)
    for token in tokens:
        if token == tokenizer.end_id:
            break
        if piece := text.add(token):
            yield piece
    if rest := text.finish():
        yield rest


def texts_of(writer: Writer, tokenizer: Tokenizer, *, lines: int, stops: Sequence[str] = (), silent: Iterable[int] = ()) -> list[str]:
    """What a writer writes in each of its lines, a line no further than its stop string."""
    texts = [Text(tokenizer, stops=stops, silent=silent) for _ in range(lines)]
    for tokens in writer:
        for line, token in tokens.items():
            texts[line].add(token)
            if texts[line].stopped is not None:
                writer.stop(line)
    for text in texts:
        text.finish()
    return [text.shown for text in texts]
