"""A JSON file that is one array of objects, an object at a time: memory is bounded by one of them, whatever the size of the file.

Only brackets, commas and the edges of strings are looked at here, to find where an object ends. Each is then read as strictly as a
line of JSON lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

BLANK = b" \t\r\n"  # what JSON allows between its words
CHUNK = 1 << 16
KEPT = 200  # bytes of an object that is too long, for its excerpt
MARKS = re.compile(rb'\\.|["\\\[\]{},\n]', re.DOTALL)  # an escape is taken with what it escapes


def is_array(stream: BinaryIO) -> bool:
    """Whether the first letter is that of an array; nothing of the stream is taken."""
    return stream.peek(CHUNK).lstrip(BLANK).startswith(b"[")  # type: ignore[attr-defined]


def elements(stream: BinaryIO, *, longest: int) -> Iterator[tuple[int, bytes, str]]:
    """(line on which it begins, bytes with a newline at the end, what is wrong with it) of each element of the array.

    longest: bytes that an element may have. Something after the array, and an array without an end, are faults as well.
    """
    held, line, begun, depth, in_string, escaped, any_yet = bytearray(), 1, 1, 0, False, False, False
    while chunk := stream.read(CHUNK):
        start = 0  # of what is held next
        for match in MARKS.finditer(chunk, int(escaped)):
            mark, at = match[0], match.start()
            line += mark.count(b"\n")
            if mark == b'"':
                in_string = not in_string
            if in_string or len(mark) > 1:
                continue
            if mark in b"[{":
                depth += 1
                if depth == 1:
                    start, begun = at + 1, line
            closes = mark in b"]}" and depth > 0
            depth -= closes
            if (closes and depth == 0) or (mark == b"," and depth == 1):
                held += chunk[start:at]
                one = held.strip(BLANK)
                if one or any_yet or not closes:
                    blank = held[: len(held) - len(held.lstrip(BLANK))]
                    yield begun + blank.count(b"\n"), bytes(one[: longest + 1]) + b"\n", _wrong(one, longest)
                held.clear()
                start, begun, any_yet = at + 1, line, True
                if depth == 0:
                    rest = chunk[start:].lstrip(BLANK)
                    while not rest and (chunk := stream.read(CHUNK)):
                        rest = chunk.lstrip(BLANK)
                    if rest:
                        yield line, rest[:KEPT], "something comes after the end of the array"
                    return
        last = chunk[int(escaped) :]
        escaped = (len(last) - len(last.rstrip(b"\\"))) % 2 == 1
        if len(held) <= longest:
            held += chunk[start:]
    yield begun, bytes(held.strip(BLANK)[:KEPT]), "the array does not end: the file is cut off"


def _wrong(one: bytearray, longest: int) -> str:
    """What is wrong with an element before it is JSON."""
    if not one:
        return "nothing stands where an object is expected"
    return f"longer than {longest >> 20} MiB" if len(one) > longest else ""
