"""YAML 1.2 with the place of every key, and nothing that can surprise: no tags, no aliases, no duplicate keys, a size cap.

`read` turns text into `Node`s and collects every fault; only a syntax error ends it early. `dump` writes what `read` reads back equal.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from dist_llm.errors import UsageError

OTHER = "name a config in its place, such as configs/quickstart.yaml of the source"
MAX_BYTES = 1 << 18
MAX_TAG = 1000  # characters: a longer one costs the parser the square of its length
MAX_DEPTH = 12
MAX_FAULTS = 1000
MAX_NODES = 20_000  # a second of parsing; no config comes near

_INT = re.compile(r"[-+]?[0-9](?:_?[0-9]){0,39}")
_BASED = re.compile(r"0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + word: float(sign + "inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
_LONG_TAG = re.compile(rf"!\S{{{MAX_TAG}}}")
_PAIR = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")
_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")


@dataclass(frozen=True)
class Place:
    """Where a key or value was written. Lines and columns count from 1; line 0 means an override, of `key`."""

    name: str
    line: int = 0
    column: int = 0
    key: str = ""

    def __str__(self) -> str:
        return f"{self.name}:{self.line}:{self.column}" if self.line else self.name


@dataclass
class Node:
    """A value with its place. A mapping holds Nodes by key, a sequence a list of Nodes, a scalar a Python value.

    `place` is that of the key for a mapping's values, so that a message points at the name.
    """

    place: Place
    value: Any


@dataclass(frozen=True)
class Fault:
    """One thing wrong, and where. value: what an override is to give its key instead; None where no value mends it."""

    place: Place
    text: str
    value: str | None = "VALUE"

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a config file. Raises UsageError when it is missing, not a file, unreadable or over 256 KiB."""
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise UsageError("the config is not a file", where=name, expected="a YAML file", found="a folder or a device", next=OTHER)
        with open(name, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        near = _near(name) if isinstance(error, FileNotFoundError) else []
        way = f"the same command with {shlex.quote(near[0])}" if near else OTHER
        raise UsageError("the config cannot be read", where=name, expected="a YAML file", found=why, next=way) from None
    if len(data) > MAX_BYTES:
        expected, found = f"at most {MAX_BYTES >> 10} KiB", f"more than {MAX_BYTES >> 10} KiB"
        raise UsageError("the config is too large", where=name, expected=expected, found=found, next=OTHER)
    return data


def _near(name: str) -> list[str]:
    """The path of a config in the same folder whose name is the nearest to that of one that is not there."""
    folder, wanted = os.path.split(name)
    try:
        there = [entry for entry in islice(os.listdir(folder or "."), 1000) if entry.endswith((".yaml", ".yml"))]
    except OSError:
        return []
    return [os.path.join(folder, entry) for entry in difflib.get_close_matches(wanted, there, n=1)]


def read(data: bytes | str, *, name: str) -> tuple[Node, list[Fault]]:
    """The root node of one YAML document and every fault found in it; an empty document is an empty mapping."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        head = bytes(error.object[: error.start])
        place = Place(name, head.count(b"\n") + 1, error.start - head.rfind(b"\n"))
        return _empty(name), [Fault(place, f"not UTF-8: byte 0x{error.object[error.start]:02x}")]
    if long := _LONG_TAG.search(text):
        before = text[: long.start()]
        place = Place(name, before.count("\n") + 1, long.start() - before.rfind("\n"))
        return _empty(name), [Fault(place, f"a tag of more than {MAX_TAG} characters")]
    reader = _Reader(name)
    try:
        reader.document(YAML(typ="safe", pure=True).parse(text))
    except _Stop:
        pass
    except ReaderError as error:
        before = text[: error.position]
        place = Place(name, before.count("\n") + 1, error.position - before.rfind("\n"))
        reader.faults.append(Fault(place, "a character that YAML does not allow"))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(name, mark.line + 1, mark.column + 1) if mark else Place(name, 1, 1)
        reader.faults.append(Fault(place, f"not YAML: {_explained(error)}"))
    except (YAMLError, ValueError, OverflowError, IndexError) as error:  # ruamel lets a few of its own slips through on odd text
        reader.faults.append(Fault(Place(name, 1, 1), f"not YAML: {type(error).__name__}"))
    return reader.root or _empty(name), reader.faults


def _explained(error: MarkedYAMLError) -> str:
    """What the parser found, with the line of a bracket or quote that was left open, and a tab by its name."""
    problem, context, mark, end = str(error.problem or error.context), str(error.context or ""), error.context_mark, error.problem_mark
    if "'\\t'" in problem:
        return "a tab; lines are indented with blanks"
    opened = "bracket" if "flow" in context else "quote" if "quoted" in context else ""
    return problem + (f"; was the {opened} of line {mark.line + 1} closed?" if opened and mark and end and mark.line < end.line else "")


def _empty(name: str) -> Node:
    return Node(Place(name, 1, 1), {})


class _Stop(Exception):
    """Reading on makes no sense; the fault is noted."""


@dataclass
class _Reader:
    """Builds nodes from parser events, so that every place is known and nothing is constructed but plain values."""

    name: str
    faults: list[Fault] = field(default_factory=list)
    root: Node | None = None
    nodes: int = 0

    def document(self, events: Iterator[Event]) -> None:
        for event in events:
            if isinstance(event, DocumentStartEvent):
                if self.root is not None:
                    self._fault(event, "a second document; a config is one")
                    raise _Stop
                self.root = self._node(next(events), events, depth=0)

    def _place(self, event: Event) -> Place:
        mark = event.start_mark
        return Place(self.name, mark.line + 1, mark.column + 1)

    def _fault(self, event: Event, text: str) -> None:
        self.faults.append(Fault(self._place(event), text))
        if len(self.faults) >= MAX_FAULTS:
            raise _Stop

    def _node(self, event: Event, events: Iterator[Event], *, depth: int) -> Node:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            self._fault(event, f"nested deeper than {MAX_DEPTH}" if depth > MAX_DEPTH else f"more than {MAX_NODES} values")
            raise _Stop
        if isinstance(event, AliasEvent):
            self._fault(event, f"alias *{event.anchor}: write the value out")
            return Node(self._place(event), None)
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor is not None:
            self._fault(event, f"anchor &{anchor}: write the value out where it is used")
        if tag not in (None, "!"):
            self._fault(event, f"tag {tag}: a config holds plain values only")
        place = self._place(event)
        if isinstance(event, ScalarEvent):
            return Node(place, scalar(event.value) if event.implicit[0] and not event.style else _joined(event.value))
        if isinstance(event, SequenceStartEvent):
            items = []
            while not isinstance(event := next(events), SequenceEndEvent):
                items.append(self._node(event, events, depth=depth + 1))
            return Node(place, items)
        assert isinstance(event, MappingStartEvent)
        return Node(place, self._mapping(events, depth=depth + 1))

    def _mapping(self, events: Iterator[Event], *, depth: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            key_node = self._node(event, events, depth=depth)
            node = self._node(next(events), events, depth=depth)
            if not isinstance(event, ScalarEvent) or not event.value:
                self._fault(event, "a key must be a word")
            elif event.value in found:
                self._fault(event, f"duplicate key {event.value!r}, first at line {found[event.value].place.line}")
            else:
                found[event.value] = Node(key_node.place, node.value)
        return found


def _joined(text: str) -> str:
    """Quoted text in which a letter was written as two escapes, as JSON writes those beyond U+FFFF."""
    return _PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)


def scalar(text: str) -> Any:
    """The value of an unquoted YAML 1.2 scalar (core schema, and `1_000` as a whole number)."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _BASED.fullmatch(text):
        return int(text, 0)
    return float(text) if _FLOAT.fullmatch(text) and len(text) <= 100 else text


def dump(tree: dict[str, Any]) -> str:
    """YAML of nested mappings, lists and scalars; `read` gives an equal tree back."""
    return "".join(f"{line}\n" for line in _lines(tree))


def _lines(tree: dict[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {flow(value)}"


def flow(value: Any) -> str:
    """One value on one line, as YAML writes it: text quoted only where it must be."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and isinstance(scalar(value), str) else _quoted(value)
    if isinstance(value, float):
        return repr(value) if abs(value) < float("inf") else {"inf": ".inf", "-inf": "-.inf"}.get(str(value), ".nan")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    """Double quotes with JSON's escapes; what is not printable by number, since YAML would refuse some of it raw."""
    shown = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in shown)
