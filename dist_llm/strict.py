"""JSON and small files from elsewhere, read so that nothing in them can surprise: bounded, UTF-8, no key twice. Torch-free."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

LARGEST_COUNT = 2**40  # a bound on every number of things that a file may speak of


def strict_json(text: bytes) -> Any:
    """JSON in UTF-8 in which no key comes twice and every number is finite. Raises ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key comes twice")
        return found

    def refuse(word: str) -> Any:
        raise ValueError(f"the number {word}")

    def finite(word: str) -> float:
        number = float(word)
        return number if math.isfinite(number) else refuse(word)  # 1e999

    return json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_float=finite, parse_constant=refuse)


def is_count(value: Any, *, least: int = 0) -> bool:
    """Whether a JSON value is a whole number that a file can speak of."""
    return type(value) is int and least <= value <= LARGEST_COUNT


def read_bounded(path: Path, most: int) -> bytes:
    """At most so many bytes of a file. Raises OSError, also for a pipe, which would keep its reader waiting for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a file", str(path))
    with path.open("rb") as handle:
        return handle.read(most)


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its kind."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
