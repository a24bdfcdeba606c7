"""Drops texts that were seen before, whole or nearly.

A text is a near-duplicate when at least four fifths of its distinct lines were first seen in one and the same
earlier text: containment, so that an excerpt counts and a common licence head does not. One table lookup per line.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter

SHARE = 0.8  # of the distinct lines that one earlier text must hold
SHORTEST = 8  # characters of a line that says something about where it is from
FEWEST = 5  # distinct lines below which only exact duplicates are dropped


class Duplicates:
    """The texts seen so far, by digest and by line."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()
        self._owner: dict[int, int] = {}

    def seen(self, text: str) -> bool:
        """Whether the text, or nearly all of it, was given before; remembers it when not."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in self._digests:
            return True
        lines = {zlib.crc32(line.encode()) for line in map(str.strip, text.splitlines()) if len(line) >= SHORTEST}
        if len(lines) >= FEWEST:
            owners = Counter(self._owner[line] for line in lines if line in self._owner)
            if owners and owners.most_common(1)[0][1] >= SHARE * len(lines):
                return True
        number = len(self._digests)
        self._digests.add(digest)
        for line in lines:
            self._owner.setdefault(line, number)
        return False
