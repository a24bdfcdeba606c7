"""Documents out of local files: plain text and JSON lines, also compressed, and tables (parquet.py), from files, folders and globs.

Everything streams: memory is bounded by one passage or one line, whatever the size of the file. JSON lines are read
strictly, because a line that is half understood trains a model on something else than what its owner sees: every
line is one UTF-8 JSON object without double keys, with a string under the text key, ended by a newline. A `.json` file may be one
array of such objects (arrays.py). The faults of up to 20 lines are told at once, each with file and line. Lines that are empty, or
whose text is, are left out and counted.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import zstandard

from dist_llm.data.arrays import BLANK, elements, is_array
from dist_llm.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".csv", ".html", ".xml")
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
PACKED_SUFFIXES = (".gz", ".zst")
MAX_LINE = 8 << 20  # bytes of one JSON line
MAX_DEPTH = 64  # brackets open at once in one JSON line
MAX_TOLD = 20  # faulty lines told at once
PASSAGE = 32 << 10  # characters after which a long text is cut at the next empty line; at twice this, at any line
LINES_EXPECTED = "UTF-8 JSON objects with a string under the text key, one a line"
ROWS_EXPECTED = "a string in the text column of every row"
SEPARATOR = "<|endoftext|>"  # alone on a line of a text file, it ends a document


@dataclass(frozen=True)
class Document:
    """One text, where it came from, and how far through its source it lies (0 to 1, for progress).

    key: what decides between training and validation; the text itself where None. ids: of a document that comes as tokens,
    without its end token; it has no text.
    """

    text: str
    name: str
    place: float = 0.0
    key: str | None = None
    ids: np.ndarray | None = None


@dataclass
class BadLines:
    """The lines that could not be read: how many are allowed, where they were, and the first few in words.

    A corpus is read more than once; a line counts once. met: those that came by since somebody cleared it. blank: for each
    file, how many lines without text there are. rows: whether they are called rows, as those of a table are. ways: for each
    file of which one is known, the setting that may read it.
    """

    allowed: int = 0
    expected: str = LINES_EXPECTED
    places: set[str] = field(default_factory=set)
    met: set[str] = field(default_factory=set)
    told: list[str] = field(default_factory=list)
    blank: dict[str, int] = field(default_factory=dict)
    rows: bool = False
    ways: dict[str, str] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """`line`, or what it is called where the text comes from."""
        return "row" if self.rows else "line"

    @property
    def count(self) -> int:
        """How many lines were bad so far."""
        return len(self.places)

    def add(self, where: str, why: str, excerpt: bytes) -> None:
        """Note a bad line; raises DataError when more lines than allowed are bad and enough are known to tell."""
        self.met.add(where)
        if where in self.places:
            return
        self.places.add(where)
        if len(self.told) < MAX_TOLD:
            shown = printable(excerpt[:200].decode("utf-8", "backslashreplace"), 60)
            self.told.append(f"{where}: {why}" + (f": {shown}" if shown else ""))
        if self.count >= max(MAX_TOLD, self.allowed + 1):
            self.check(more=True)

    def check(self, *, more: bool = False) -> None:
        """Raises DataError when more lines than allowed are bad. more: there may be others that were not read yet."""
        if self.count <= self.allowed:
            return
        lines = f"{'at least ' if more else ''}{self.count} {self.word}{'' if self.count == 1 else 's'}"
        wanted = 50 * self.count if more else self.count
        way = next((way for path, way in self.ways.items() if self.told[0].startswith(f"{path}:")), "")
        raise DataError(
            f"{lines} cannot be read" + (f" and {self.allowed} may be skipped" if self.allowed else ""),
            where=self.told[0].split(": ", 1)[0],
            expected=ROWS_EXPECTED if self.rows and self.expected == LINES_EXPECTED else self.expected,
            details=self.told,
            next=(way and f"{way}; or ") + f"mend, or skip: dist-llm data build CONFIG data.max_bad_lines={wanted}; train takes it too",
        )


def find_files(source: str) -> list[Path]:
    """The files that a path, a folder (searched through, sorted) or a glob names.

    Raises UsageError when nothing is there, DataError when a folder holds no file of a known kind.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = sorted(p for p in path.rglob("*") if _is_readable(p.relative_to(path)) and p.is_file())
        if not found:
            known = " ".join((*JSON_SUFFIXES, *TEXT_SUFFIXES))
            expected = f"files ending in {known}, also with .gz or .zst, or in {' '.join(TABLE_SUFFIXES)}"
            way = "the same command with data.source=PATH"
            raise DataError("the folder holds no text", where=str(path), expected=expected, found="none of these", next=way)
        return found
    if found := sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)):
        return found
    expected = "python, skills, entropy, hub:owner/name, or a file, folder or glob"
    way = "the same command with data.source=PATH"
    if os.path.isfile(f"{path}.idx"):  # Megatron names its data sets without the end of a name
        way = f"the same command with data.source={source}.idx"
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source, re.ASCII) and not path.parent.exists():
        way = f"the same command with data.source=hub:{source}, if it is one of the hub, or data.source=PATH"
    raise UsageError("the data source does not exist", where=f"data.source: {source}", expected=expected, found="no such file", next=way)


Take = Callable[[dict[str, Any]], tuple[str, str]]  # the object of a line -> its text, and what is wrong with it


def read_files(files: list[Path], *, text_key: str, bad: BadLines, take: Take | None = None) -> Iterator[Document]:
    """Every document of the files, in order. Raises DataError; `bad` counts the lines skipped. take: makes texts of the lines' objects."""
    sizes = [size_of(path) for path in files]
    total, done = max(1, sum(sizes)), 0
    for path, size in zip(files, sizes, strict=True):
        for document, taken in _reader(path)(path, text_key=text_key, bad=bad, take=take):
            place = (done + min(taken, size)) / total
            yield Document(document.text, document.name, place)
        done += size


def is_table(path: Path) -> bool:
    """Whether the name says rows of a table."""
    return path.suffix.lower() in TABLE_SUFFIXES


def _reader(path: Path) -> Callable[..., Iterator[tuple[Document, int]]]:
    """What reads a file: by its name, a table or lines."""
    if not is_table(path):
        return read_file
    from dist_llm.data.parquet import read_table

    return read_table


def read_file(path: Path, *, text_key: str, bad: BadLines, take: Take | None = None) -> Iterator[tuple[Document, int]]:
    """The documents of one file, each with the bytes of the file taken so far."""
    try:
        with path.open("rb") as raw:
            stream = unpack(raw, path)
            reader = take or partial(text_of, text_key=text_key)
            documents = _json_lines(stream, path, reader, bad) if is_json(path) else _passages(stream, path)
            for document in documents:
                yield document, raw.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(
            "the compressed file is damaged or cut short", where=str(path), expected="a whole file", found=str(error)
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if is_json(path):
        bad.check()


def unreadable(path: Path, error: Exception) -> DataError:
    """What says that a file is there and cannot be read."""
    found = getattr(error, "strerror", None) or str(error)
    return DataError("the file cannot be read", where=str(path), expected="a file that can be read", found=found)


def size_of(path: Path) -> int:
    """Bytes of the file on disk. Raises DataError when it went away."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def is_json(path: Path) -> bool:
    """Whether the name says JSON lines; a packing suffix is looked through."""
    return _kind(path) in JSON_SUFFIXES


def unpack(raw: BinaryIO, path: Path) -> BinaryIO:
    """The stream as it was before compression, by the file's suffix."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_Zstandard(raw), buffer_size=1 << 17)
    return raw


class _Zstandard(io.RawIOBase):
    """A zstandard stream that notices a missing end (the library's own reader ends a cut file without a word)."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.ready, self.waiting, self.inside = memoryview(b""), b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self.ready and self._advance():
            pass
        taken = min(len(buffer), len(self.ready))
        buffer[:taken] = self.ready[:taken]
        self.ready = self.ready[taken:]
        return taken

    def _advance(self) -> bool:
        """Unpack some more; False at the end of the file."""
        packed = self.waiting or self.raw.read(1 << 14)
        if not packed:
            if self.inside:
                raise EOFError("the last zstandard frame does not end")
            return False
        self.ready, self.inside = memoryview(self.frame.decompress(packed)), True
        self.waiting = b""
        if self.frame.eof:
            self.waiting, self.inside = self.frame.unused_data, False
            self.frame = zstandard.ZstdDecompressor().decompressobj()
        return True


def records(stream: BinaryIO, path: Path) -> Iterator[tuple[str, bytes, str]]:
    """(place, bytes, what is wrong with its size or place) of each line of JSON, or of each element of a `.json` file that is an array."""
    if _kind(path) == ".json" and is_array(stream):
        for number, (line_number, content, why) in enumerate(elements(stream, longest=MAX_LINE), start=1):
            yield f"{path}:{line_number}, object {number}", content, why
        return
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        yield f"{path}:{number}", line, "" if len(line) <= MAX_LINE else f"longer than {MAX_LINE >> 20} MiB"
        while len(line) > MAX_LINE and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE + 1)
            if not line:
                break


def _json_lines(stream: BinaryIO, path: Path, take: Take, bad: BadLines) -> Iterator[Document]:
    blank = 0
    for place, line, why in records(stream, path):
        text, why = ("", why) if why else parse_line(line, take=take)
        if why:
            bad.add(place, why, line[:200])
        elif text.strip():
            yield Document(text, place)
        else:
            blank += 1
            bad.blank[str(path)] = max(blank, bad.blank.get(str(path), 0))


def parse_line(line: bytes, *, take: Take) -> tuple[str, str]:
    """The text of one JSON line, and what is wrong with the line (empty when nothing is).

    An empty line gives an empty text and no fault.
    """
    record, why = parse_object(line)
    return ("", why) if record is None else take(record)


def parse_object(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object of one JSON line, and what is wrong with the line; neither for an empty line."""
    if why := _wrong_bytes(line):
        return None, why
    if not line.strip(BLANK):
        return None, ""
    record, why = _loaded(line)
    if why:
        return None, why
    return (record, "") if isinstance(record, dict) else (None, f"expected an object, found {type_name(record)}")


def parse_text(text: str) -> tuple[Any, str]:
    """The value of JSON that stands in a text, and what is wrong with it; as strict as a line is read."""
    content = text.encode() + b"\n"
    return (None, f"nested deeper than {MAX_DEPTH}") if _depth(content) > MAX_DEPTH else _loaded(content)


def _loaded(line: bytes) -> tuple[Any, str]:
    """The value of a line of JSON, and what is wrong with it."""
    try:
        return json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_object), ""
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n"):
            return None, "the last line is cut off"
        return None, f"not JSON ({error.msg} at column {error.colno})"
    except _TwiceError as error:
        return None, f"holds the key {printable(str(error), 20)} twice"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({printable(str(error), 60)})"


def text_of(record: dict[str, Any], *, text_key: str) -> tuple[str, str]:
    """The text under a key of an object, and what is wrong with it."""
    if text_key not in record:
        keys = ", ".join(printable(key, 20) for key in list(record)[:5])
        return "", f"no key {text_key!r}" + (f" (it has {keys})" if keys else "")
    text = record[text_key]
    why = wrong_text(text, repr(text_key))
    return ("", why) if why else (text, "")


def wrong_text(text: object, name: str) -> str:
    """What is wrong with a value that should be a text; empty when nothing is."""
    if not isinstance(text, str):
        return f"{name} must be a string, found {type_name(text)}"
    if "\x00" in text:
        return f"{name} holds a NUL character"
    return "" if _encodes(text) else f"{name} holds half of a surrogate pair"


def printable(text: str, width: int) -> str:
    """The beginning of `text` on one line; whatever a terminal would act on is shown as an escape."""
    shown = (letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text[:width])
    return "".join(shown)[:width]


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _wrong_bytes(line: bytes) -> str:
    """What is wrong with the line before it is JSON; empty when nothing is."""
    if line.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "starts with a byte order mark"
    if b"\x00" in line:
        return "holds a NUL byte"
    if line.removesuffix(b"\n").endswith(b"\r"):
        return "ends in CRLF, expected LF"
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and not line.endswith(b"\n"):
            return "the last line is cut off"
        return f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH}"
    return ""


def _depth(line: bytes) -> int:
    """The most brackets open at once outside of strings, as far as MAX_DEPTH + 1; a string without end reaches to the end of the line."""
    depth = deepest = 0
    for match in re.finditer(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{\]}]', line, re.DOTALL):
        first = match.group()[0]
        depth += (first in b"[{") - (first in b"]}")
        deepest = max(deepest, depth)
        if deepest > MAX_DEPTH:
            break
    return deepest


def _passages(stream: BinaryIO, path: Path) -> Iterator[Document]:
    """The documents of a text file: parts between separator lines, long ones cut into passages."""
    lines: list[str] = []
    held, number, begun = 0, 0, 1
    reader = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    try:
        while line := reader.readline(PASSAGE):
            number += line.endswith("\n")
            if "\x00" in line:
                what, place = "the text holds a NUL byte: is it a binary file?", f"{path}:{max(1, number)}"
                raise DataError(what, where=place, expected="text in UTF-8", found="byte 0x00")
            if number == 1 and not lines:
                line = line.removeprefix("\ufeff")
            ends = line.strip() == SEPARATOR
            if not ends:
                lines.append(line)
                held += len(line)
            if ends or (held >= PASSAGE and not line.strip()) or held >= 2 * PASSAGE:
                if any(map(str.strip, lines)):
                    yield Document("".join(lines), f"{path}:{begun}")
                lines, held, begun = [], 0, number + 1
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x}"
        raise DataError("the text is not UTF-8", where=f"{path}:{number + 1} or after", expected="UTF-8", found=found) from error
    if any(map(str.strip, lines)):
        yield Document("".join(lines), f"{path}:{begun}")
    reader.detach()


def _kind(path: Path) -> str:
    """The lower-case suffix under a packing suffix."""
    name = path.with_suffix("") if path.suffix.lower() in PACKED_SUFFIXES else path
    return name.suffix.lower()


def _is_readable(path: Path) -> bool:
    """Whether a file found in a folder is text of a known kind; hidden files and folders are not."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and (is_table(path) or _kind(path) in (*JSON_SUFFIXES, *TEXT_SUFFIXES))


def type_name(value: object) -> str:
    """What a value of JSON is called."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


class _TwiceError(ValueError):
    """An object has a key twice."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON, none of whose keys is there twice."""
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(key)
        found[key] = value
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
