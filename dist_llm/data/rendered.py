"""The text that a template has made, and its tokens: marks of what is trained, and names of special tokens that are letters.

No message holds a NUL, so that one in a rendered text is ours: `NUL <` and `NUL >` around what is trained, `NUL 17 ;` in the place of the
name of special token 17 inside a message, `NUL ! 17 ;` and `NUL ! ;` beside
what a template must show (shown.py), which is never encoded.

A template may take the mark of a name apart, or spell its letters (`['\\x0017;']`). So a conversation that has some is rendered once more
with marks of which every letter is another one, and both texts must be the same but for whole marks: then no letter of one is in them.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import DataError

MARK = re.compile("\x00([<>])")
LITERAL = re.compile("\x00([0-9]+);")  # the place of a special token's name in a message
SIGNS = (*"~^`@$#=+*", *map(chr, range(0x2190, 0x2C00)))  # what may stand in the place of NUL, the first that is in no text
OTHER_DIGITS, DIGITS = str.maketrans("0123456789", "5678901234"), str.maketrans("5678901234", "0123456789")


@dataclass(frozen=True)
class Span:
    """Characters [start, stop) of a text, and the weight of the tokens in it."""

    start: int
    stop: int
    weight: float = 1.0


def unmarked(text: str) -> tuple[str, list[Span]]:
    """The text without marks, and where they were, empty parts left out. Raises DataError where they do not fit together."""
    parts, spans, at, size = [], [], 0, 0
    opened: int | None = None
    for match in MARK.finditer(text):
        parts.append(text[at : match.start()])
        size, at = size + match.start() - at, match.end()
        if (match[1] == "<") == (opened is not None):
            raise DataError("the marks of the chat template do not fit together", found="{% generation %} inside another, or cut apart")
        if opened is None:
            opened = size
        else:
            if size > opened:
                spans.append(Span(opened, size))
            opened = None
    if opened is not None:
        raise DataError("the marks of the chat template do not fit together", found="{% generation %} without its end")
    return "".join((*parts, text[at:])), spans


def guarded(content: str, tokenizer: Tokenizer | None) -> str:
    """A message with a mark in the place of each special token's name. Raises DataError for a NUL."""
    if "\x00" in content:
        raise DataError("a message holds a NUL character")
    if tokenizer is None or not tokenizer.special_pattern.search(content):
        return content
    numbers = {name: number for number, name in enumerate(tokenizer.special_names)}
    return tokenizer.special_pattern.sub(lambda match: f"\x00{numbers[match[0]]};", content)


def guarded_all(value: Any, tokenizer: Tokenizer | None) -> Any:
    """A value of JSON with every text in it guarded, names of keys too. Raises DataError for a NUL."""
    if isinstance(value, str):
        return guarded(value, tokenizer)
    if isinstance(value, dict):
        return {guarded(key, tokenizer): guarded_all(one, tokenizer) for key, one in value.items()}
    return [guarded_all(one, tokenizer) for one in value] if isinstance(value, list) else value


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value of JSON, names of keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from texts_in(one)


def respelled(value: Any, sign: str) -> Any:
    """A value with the marks of names in other letters, all of them."""
    if isinstance(value, str):
        return LITERAL.sub(lambda match: sign + match[1].translate(OTHER_DIGITS) + sign, value)
    if isinstance(value, dict):
        return {respelled(key, sign): respelled(one, sign) for key, one in value.items()}
    return [respelled(one, sign) for one in value] if isinstance(value, list) else value


def spelled_back(text: str, sign: str) -> str:
    """What was respelled as it was."""
    return re.sub(f"{re.escape(sign)}([0-9]+){re.escape(sign)}", lambda match: f"\x00{match[1].translate(DIGITS)};", text)


def restored(text: str, names: Sequence[str]) -> str:
    """The text with the names of special tokens where their marks are."""
    return LITERAL.sub(lambda match: names[int(match[1])] if int(match[1]) < len(names) else "", text)


def last_special(text: str, tokenizer: Tokenizer) -> str | None:
    """The special token with which a text ends, spaces aside."""
    text = text.rstrip()
    return next((name for name in tokenizer.special_names if text.endswith(name)), None)


def end_of_turn(text: str, tokenizer: Tokenizer) -> int:
    """The length of a turn up to its last special token, when only spaces come after; else all of it."""
    return len(text.rstrip()) if last_special(text, tokenizer) else len(text)


def tokens(text: str, spans: Sequence[Span], tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a rendered text, and the first id and the one after the last of each span; no token reaches over an edge."""
    if "\x00" not in text and (found := _whole(text, spans, tokenizer)) is not None:
        return found
    edges = sorted({0, len(text), *(span.start for span in spans), *(span.stop for span in spans)})
    ids: list[int] = []
    starts = {0: 0}
    for start, stop in zip(edges, edges[1:], strict=False):
        for part in _pieces(text[start:stop], tokenizer):
            ids += part
        starts[stop] = len(ids)
    return ids, [(starts[span.start], starts[span.stop]) for span in spans]


def _whole(text: str, spans: Sequence[Span], tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]] | None:
    """The ids of a text encoded in one piece; None where a token reaches over an edge, or is another one without what follows."""
    encoder = tokenizer.commanding
    encoding = encoder.encode(text, add_special_tokens=False)
    ids, offsets = encoding.ids, encoding.offsets
    starts, stops, places = [start for start, _ in offsets], [stop for _, stop in offsets], []
    for span in spans:
        first, last = bisect_right(stops, span.start), bisect_left(starts, span.stop)
        if first >= last or starts[first] < span.start or stops[last - 1] > span.stop:
            return None
        if not _stands_alone(text[: span.start], ids[:first], stops, tokenizer):
            return None
        places.append((first, last))
    return ids, places


def _stands_alone(text: str, ids: list[int], stops: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a beginning of a text gives these ids without what follows. What stands before a special token is tried last."""
    known = tokenizer.special.values()
    at = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in known), -1)
    encoder = tokenizer.commanding
    if at >= 0 and encoder.encode(text[stops[at] :], add_special_tokens=False).ids == ids[at + 1 :]:
        return True
    return encoder.encode(text, add_special_tokens=False).ids == ids


def _pieces(text: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of a part of a text: special tokens by their id, names of them in messages as letters."""
    if "\x00" not in text:
        yield tokenizer.commanding.encode(text, add_special_tokens=False).ids
        return
    names, at = tokenizer.special_names, 0
    for match in tokenizer.special_pattern.finditer(text):
        yield tokenizer.encode(restored(text[at : match.start()], names))
        yield [tokenizer.special[match[0]]]
        at = match.end()
    yield tokenizer.encode(restored(text[at:], names))
