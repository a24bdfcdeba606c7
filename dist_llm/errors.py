"""What every failure looks like: one short, true message and a documented exit code.

A user's mistake raises a `Failure`; the command line prints `render(failure)` once per job and exits with
`failure.code`. Our own invariants are asserts, and end in code 1 with the log named.
"""

from __future__ import annotations

import re
import unicodedata
from enum import IntEnum

MAX_LINES = 12
MAX_WIDTH = 300
MAX_COMMAND = 4000  # a command that is cut cannot be run
MOST_SHOWN = 10_000  # characters of one text that are looked at
HIDDEN = "***"
# What is a secret by its form: the password in a web address, and keys that their makers begin with a mark of their own.
_KEYS = re.compile(
    r"(?:(?<=://)|(?<=:/)(?!/))[^/\s:@]{0,200}:[^/\s@]{1,200}(?=@)"  # a path has one of the two slashes
    r"|\bhf_[A-Za-z0-9]{30,}|\bAKIA[A-Z0-9]{16}\b|\bgh[opsu]_[A-Za-z0-9]{36,}|\bsk-[\w-]{32,}"
)
# What is one by the name before it: `api_key=...`, `"password": "..."`.
_NAMED = re.compile(
    r"""((?:passw(?:or)?d|secret|credentials?|(?:api|access|auth|hf|private)[_-]?(?:key|token))[\w-]{0,40}["']?\s?[=:]\s?["']?)"""
    r"""[^\s,"'}]+?(?=:?(?:[\s,"'}]|$))""",
    re.IGNORECASE,
)


class Code(IntEnum):
    """Exit codes, kept through the local launcher (see docs/reference.md)."""

    DONE = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    CHECKPOINT = 4
    PEER = 5
    NUMERIC = 6
    SPACE = 7
    MEMORY = 8
    PREEMPTED = 75
    INTERRUPTED = 130
    TERMINATED = 143


class Failure(Exception):
    """A fault with a known cause.

    what: one sentence, the fault. code: the exit code. where: file:line, key, or rank and step.
    expected / found: what was required and what is there. safe: what is not lost. next: the exact next command.
    details: further lines (one per error when several are found at once); the message is cut to 12 lines.
    """

    code: int = Code.BUG

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        safe: str | None = None,
        next: str | None = None,
        details: list[str] | None = None,
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.expected, self.found = what, where, expected, found
        self.safe, self.next, self.details = safe, next, list(details or [])

    def __reduce__(self) -> tuple:
        return (_rebuild, (type(self), self.what, self.as_dict()))

    def as_dict(self) -> dict[str, object]:
        """The message as data, without secrets: `{"code", "what", "where", "expected", "found", "safe", "next", "details"}`."""
        texts = {key: getattr(self, key) for key in ("what", "where", "expected", "found", "safe", "next")}
        shown = {key: text if text is None else redacted(str(text)) for key, text in texts.items()}
        return {"code": int(self.code), **shown, "details": [redacted(str(line)) for line in self.details]}


class UsageError(Failure):
    """A config, flag or layout that cannot work (exit 2)."""

    code = Code.USAGE


class DataError(Failure):
    """Text, token shards or samples that cannot be read or are too few (exit 3)."""

    code = Code.DATA


class CheckpointError(Failure):
    """No checkpoint, or a damaged one (exit 4)."""

    code = Code.CHECKPOINT


class PeerError(Failure):
    """A rank was lost, hangs, or never came (exit 5)."""

    code = Code.PEER


class NumericError(Failure):
    """Not finite, replicas differ, or layouts are not equal (exit 6)."""

    code = Code.NUMERIC


class SpaceError(Failure):
    """No space left, an input/output error, or a run folder in use (exit 7)."""

    code = Code.SPACE


class MemoryFailure(Failure):
    """Out of memory on a device or the host (exit 8)."""

    code = Code.MEMORY


FAILURES: dict[int, type[Failure]] = {
    int(kind.code): kind for kind in (Failure, UsageError, DataError, CheckpointError, PeerError, NumericError, SpaceError, MemoryFailure)
}


def from_dict(message: dict) -> Failure:
    """Rebuild the failure that another process reported with `as_dict`."""
    fields = {key: message.get(key) for key in ("where", "expected", "found", "safe", "next", "details")}
    return FAILURES.get(int(message["code"]), Failure)(message["what"], **fields)


def _rebuild(kind: type[Failure], what: str, message: dict) -> Failure:
    return kind(what, **{key: message[key] for key in ("where", "expected", "found", "safe", "next", "details")})


def holds_secret(text: str) -> bool:
    """Whether a text has the form of a secret: a web address with a password, a key of a known maker."""
    return _KEYS.search(text) is not None


def redacted(text: str) -> str:
    """`text` with `***` in the place of what looks like a secret."""
    return _NAMED.sub(rf"\1{HIDDEN}", _KEYS.sub(HIDDEN, text))


def plain(text: object, *, width: int = MAX_WIDTH) -> str:
    """`text` without secrets, control and format characters made visible or dropped, cut to a line's width; safe for a terminal."""
    text = redacted(str(text)[:MOST_SHOWN])
    shown = "".join(c if c == "\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else "?" for c in text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def render(failure: Failure) -> str:
    """The final block of a failed job: at most 12 lines, the fault first and the next command last."""
    lines = [f"error: {plain(failure.what)}"]
    for label in ("where", "expected", "found", "safe"):
        if value := getattr(failure, label):
            lines.append(f"  {label + ':':<10}{plain(value)}")
    room = MAX_LINES - len(lines) - (1 if failure.next else 0)
    details = [f"  - {plain(line)}" for line in failure.details]
    if len(details) > room:
        details = [*details[: room - 1], f"  - ... and {len(details) - room + 1} more"]
    lines += details
    if failure.next:
        lines.append(f"  {'next:':<10}{plain(failure.next, width=MAX_COMMAND)}")
    return "\n".join(lines)
