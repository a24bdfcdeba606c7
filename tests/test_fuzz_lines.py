"""JSON lines that nobody sane writes: taken with the same text, left out, or refused, exactly as a reader of another make says.

The other is the oracle below: the grammar of RFC 8259 and the rules of docs/reference.md, read by hand, without `json`. Each
find is a kept case.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist_llm.data.corpora import open_corpus
from dist_llm.data.readers import BadLines
from dist_llm.errors import DataError, render
from tests.commands import Commands, Result

CASES, LONG_CASES, LINES = 5000, 100_000, 250  # lines; lines of a file
BLANK, BAD = "blank", "bad"

# --- the oracle --------------------------------------------------------------------------------------------------------------

UTF8 = re.compile(
    rb"(?:[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]"
    rb"|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2})*+"
)
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
WORDS = {"true": True, "false": False, "null": None}


class RefusedError(Exception):
    """The oracle does not take the line."""


class Grammar:
    """RFC 8259 by recursive descent; no key twice, at most 64 deep, whole numbers of at most 4300 digits."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.deep = text, 0, 0

    def need(self, condition: Any) -> None:
        if not condition:
            raise RefusedError(self.at)

    def skip(self) -> str:
        """The next character that is not blank; empty at the end."""
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1
        return self.text[self.at : self.at + 1]

    def whole(self) -> Any:
        found = self.value()
        self.need(self.skip() == "")
        return found

    def value(self) -> Any:
        first = self.skip()
        if first in ("{", "["):
            return self.collection(first)
        if first == '"':
            return self.string()
        for word, meaning in WORDS.items():
            if self.text.startswith(word, self.at):
                self.at += len(word)
                return meaning
        number = NUMBER.match(self.text, self.at)
        self.need(number)
        assert number is not None
        self.need(number[2] or number[3] or len(number[1]) <= 4300)
        self.at = number.end()
        return 0

    def collection(self, first: str) -> Any:
        self.at, self.deep = self.at + 1, self.deep + 1
        self.need(self.deep <= 64)
        pairs: dict[str, Any] = {}
        close = "}" if first == "{" else "]"
        more = self.skip() != close
        while more:
            key = str(len(pairs))
            if first == "{":
                self.need(self.skip() == '"')
                key = self.string()
                self.need(self.skip() == ":" and key not in pairs)
                self.at += 1
            pairs[key] = self.value()
            more = self.skip() == ","
            self.at += more
        self.need(self.skip() == close)
        self.at, self.deep = self.at + 1, self.deep - 1
        return pairs if first == "{" else list(pairs.values())

    def string(self) -> str:
        """The text of a string as UTF-16 would join it: pairs of escapes made one, halves left as they are."""
        self.at += 1
        units: list[str] = []
        while True:
            self.need(self.at < len(self.text))
            letter = self.text[self.at]
            self.at += 1
            if letter == '"':
                break
            self.need(ord(letter) >= 32)
            units.append(self.escape() if letter == "\\" else letter)
        return "".join(units).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")

    def escape(self) -> str:
        letter = self.text[self.at : self.at + 1]
        self.at += 1
        if letter != "u":
            self.need(letter in ESCAPES and letter)
            return ESCAPES[letter]
        digits = self.text[self.at : self.at + 4]
        self.need(re.fullmatch(r"[0-9a-fA-F]{4}", digits))
        self.at += 4
        return chr(int(digits, 16))


def verdict(line: bytes) -> tuple[str, str]:
    """(BLANK, ""), (BAD, "") or ("text", the text) of a line without its newline."""
    try:
        if line.startswith(b"\xef\xbb\xbf") or b"\0" in line or line.endswith(b"\r") or not UTF8.fullmatch(line):
            raise RefusedError("bytes")
        if not line.strip(b" \t\r"):
            return BLANK, ""
        tree = Grammar(line.decode()).whole()
        text = tree.get("text") if isinstance(tree, dict) else None
        if not isinstance(text, str) or "\0" in text or any(0xD800 <= ord(letter) < 0xE000 for letter in text):
            raise RefusedError("text")
    except RefusedError:
        return BAD, ""
    return ("text", text) if text and not text.isspace() else (BLANK, "")


# --- mutation ----------------------------------------------------------------------------------------------------------------

SEEDS = rb"""
{"text": "one"}
{"id": 7, "text": "two lines\nof it", "tags": ["a", "b"]}
{"text": "gr\u00fcn \ud83d\ude00"}
{"meta": {"n": [1, -2.5e3, 0.1], "ok": true, "no": null}, "text": "deep"}
 { "text" : "blanks" } 
{"text": ""}
{"text": " \t "}
{"t\u0065xt": "escaped key"}
{"text": "quote \" slash \\ / \/", "x": false}
{"text": "a", "n": 1E+2}
[{"text": "in a list"}]
{"body": "no text"}
{"text": "x", "x": {"text": 3}}""".split(b"\n")
SEEDS += ['{"text": "grün 😀 \u2028\u00a0\ufeff\u202e"}'.encode()]
TOKENS: tuple[bytes, ...] = (
    *(b'"', b"\\", b"\\u", b"\\ud800", b"\\udc00", b"\\u0000", b"\\u00", b"NaN", b"-Infinity", b"Infinity", b"true", b"null", b"{", b"}"),
    *(b"[", b"]", b",", b":", b"0", b"01", b"-", b"1e999", b"1.", b".5", b"\x00", b"\r", b"\x0b", b"\x0c", b"\x1b[31m", b"\xef\xbb\xbf"),
    *(b"\xff\xfe", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x80", b"\xc2\xa0", b"\xe2\x80\xa8", b'"text": "again", '),
    *(b'"text"', b"//", b"'", b'{"a":' * 70, b"[" * 64, b"]" * 64, b"9" * 4301, b"9" * 4300, b" ", b"\t", b"\n", b"\r\n", b'\\"' * 40),
    *(b'"k":1,' * 3, b"\x7f", b"\x1f"),
)
VALUE = re.compile(rb'"[^"]*"|true|false|null|-?[0-9][0-9.eE+-]*')


def mutated(chance: random.Random) -> bytes:
    """A seed with up to four changes."""
    line = bytearray(chance.choice(SEEDS))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        at = chance.choice((0, len(line), *(chance.randrange(len(line) + 1) for _ in range(4))))
        values = list(VALUE.finditer(line))
        match chance.randrange(10):
            case 0:
                line[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del line[at : at + chance.randrange(1, 6)]
            case 2:
                line[at:at] = line[chance.randrange(len(line) + 1) :][: chance.randrange(1, 30)]
            case 3:
                line = line[:at] + bytearray(chance.choice(SEEDS))[chance.randrange(20) :]
            case 4 if chance.random() < 0.3:
                line = line[:at]
            case 5 if chance.random() < 0.2:
                depth = chance.choice((1, 62, 63, 64, 65, 500, 3000))
                line = bytearray(b'{"d": ' + b"[" * depth + b"]" * depth + b', "text": "n"}')
            case 6 | 7 if values:
                value = chance.choice(values)
                line[value.start() : value.end()] = chance.choice(TOKENS)
            case _:
                line[at:at] = chance.choice(TOKENS)
    return bytes(line)


@contextmanager
def seconds_of_cpu(limit: float) -> Iterator[None]:
    """A hang is an error: so much of this process' time, whatever else runs here."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"over {limit} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def agree(file: Path, content: bytes) -> None:
    """What the reader makes of a file is what the oracle makes of its lines; a whole last line needs no newline."""
    file.write_bytes(content)
    lines = content.split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines
    expected = dict(enumerate(map(verdict, lines), start=1))
    bad = BadLines(allowed=10**9)
    with seconds_of_cpu(10):
        documents = list(open_corpus(str(file), seed=0, bad=bad).documents())
    texts = {int(document.name.rsplit(":", 1)[1]): document.text for document in documents}
    refused = {int(place.rsplit(":", 1)[1]) for place in bad.places}
    for number, (kind, text) in expected.items():
        found = ("text", texts[number]) if number in texts else (BAD, "") if number in refused else (BLANK, "")
        assert found == (kind, text), (lines[number - 1][:300], found, (kind, text))
    assert set(texts) | refused <= set(expected) and sum(bad.blank.values()) == sum(kind == BLANK for kind, _ in expected.values())
    told = [detail for detail in bad.told if not detail.isprintable() or len(detail) > 400]
    assert not told


def fuzz(folder: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    kinds: dict[str, int] = {}
    for _ in range(count // LINES):
        lines = [mutated(chance) for _ in range(LINES)]
        for line in lines:
            kinds[verdict(line)[0]] = kinds.get(verdict(line)[0], 0) + 1
        agree(folder / "x.jsonl", b"\n".join(lines) + chance.choice((b"\n", b"")))
    assert min(kinds[kind] for kind in ("text", BLANK, BAD)) > count / 50, kinds


def test_five_thousand_mutated_lines(tmp_path: Path) -> None:
    fuzz(tmp_path, CASES, 1)


@pytest.mark.long
def test_a_hundred_thousand_mutated_lines(tmp_path: Path) -> None:
    fuzz(tmp_path, LONG_CASES, 2)


def test_each_line_alone_may_be_the_last(tmp_path: Path) -> None:
    """Every cut of every seed, as the end of a file."""
    for seed in SEEDS:
        for cut in range(len(seed) + 1):
            for end in (b"", b"\r", b" "):
                agree(tmp_path / "x.jsonl", b'{"text": "first"}\n' + seed[:cut] + end)


# --- arrays ------------------------------------------------------------------------------------------------------------------


def agree_on_array(file: Path, elements: list[bytes], chance: random.Random) -> bool:
    """Up to the first element that is bad a `.json` file of one array gives what the oracle makes of each, by its line; else all of it."""
    content, lines, verdicts = bytearray(b" [" if chance.random() < 0.5 else b"["), [], []
    for number, element in enumerate(elements):
        content += chance.choice((b"", b"\n", b"\r\n  ", b" "))
        lines.append((content + element[: len(element) - len(element.lstrip(b" \t\r\n"))]).count(b"\n") + 1)
        content += element + chance.choice((b"", b"\n", b" \t")) + (b"," if number + 1 < len(elements) else b"")
        bare = element.strip(b" \t\r\n")
        verdicts.append(verdict(bare) if bare else (BLANK if len(elements) == 1 else BAD, ""))  # nothing alone is an empty array
    content += chance.choice((b"]", b"\n]\n"))
    file.write_bytes(content)
    bad = BadLines(allowed=10**9)
    with seconds_of_cpu(10):
        documents = list(open_corpus(str(file), seed=0, bad=bad).documents())
    sound = next((at for at, (kind, _) in enumerate(verdicts) if kind == BAD), len(verdicts))
    expected = {f"{file}:{lines[at]}, object {at + 1}": text for at, (kind, text) in enumerate(verdicts[:sound]) if kind == "text"}
    found = {document.name: document.text for document in documents}
    assert {name: text for name, text in found.items() if int(name.rsplit(" ", 1)[1]) <= sound} == expected, content
    assert bool(bad.count) == (sound < len(verdicts)) and (bad.count or len(found) == len(expected)), (content, bad.told)
    return sound == len(verdicts)


def test_mutated_arrays(tmp_path: Path) -> None:
    chance, whole = random.Random(5), 0
    for _ in range(600):
        seeds = [chance.choice(SEEDS[1:8]) for _ in range(chance.randrange(1, 8))]
        if chance.random() < 0.6:
            seeds[chance.randrange(len(seeds))] = mutated(chance)
        whole += agree_on_array(tmp_path / "x.json", seeds, chance)
    assert 200 < whole < 500, whole


def test_a_bad_object_of_an_array_is_one(tmp_path: Path) -> None:
    """Where its brackets close, what comes after it is read; an object may be larger than what is read at once, and not too large."""
    good = [b'{"text": "%s"}' % (b'y, \\"]' + b"\\\\" * size) for size in (0, 1, 16_380, 16_381, 32_761, 32_762, 32_763, 65_536)]
    bad = [b'{"text": "a", "text": "b"}', b"7", b"[]", b'"a"', b'{"text": NaN}', b'{"text": "\xff"}', b'{"a": "]"}', b'{"text": "\x00"}']
    bad += [b'{"text": "' + b"x" * (9 << 20) + b'"}', b"", b"{" * 70 + b"}" * 70]
    pairs = [one for pair in zip(bad, [good[at % len(good)] for at in range(len(bad))], strict=True) for one in pair]
    file, faults = tmp_path / "x.json", BadLines(allowed=len(bad))
    file.write_bytes(b"[" + b",\n".join([*good, *pairs]) + b"]")
    documents = list(open_corpus(str(file), seed=0, bad=faults).documents())
    assert [json.dumps({"text": document.text}).encode() for document in documents] == [*good, *pairs[1::2]]
    assert faults.places == {f"{file}:{n}, object {n}" for n in range(len(good) + 1, len(good) + len(pairs), 2)}
    for content, words in (
        (b'[{"text": "a"}', "the array does not end"),
        (b'[{"text": "a"', "the array does not end"),
        (b'[{"text": "a"}]{"text": "b"}', "something comes after the end"),
        (b'[{"text": "a"}]' + b" " * 70_000 + b"x", "something comes after the end"),
        (b'[{"text": "a"},]', "nothing stands where an object is expected"),
        (b'\xef\xbb\xbf[{"text": "a"}]', "starts with a byte order mark"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError) as caught:
            list(open_corpus(str(file), seed=0).documents())
        assert words in caught.value.details[0] and f"{file}:1" in str(caught.value.where), caught.value.details
    file.write_bytes(b" [ ] ")
    assert not list(open_corpus(str(file), seed=0).documents())
    packed = tmp_path / "y.json.gz"
    packed.write_bytes(gzip.compress(b'[{"text": "a"},\n{"text": "b"}]'))
    assert [document.text for document in open_corpus(str(packed), seed=0).documents()] == ["a", "b"]


# --- kept cases ----------------------------------------------------------------------------------------------------------------

KEPT: dict[str, tuple[bytes, str]] = {
    "a key twice": (b'{"text": "one", "text": "two"}', BAD),
    "a key twice, once as an escape": (b'{"text": "one", "t\\u0065xt": "two"}', BAD),
    "a key twice, deep inside": (b'{"text": "one", "more": [{"a": 1, "a": 2}]}', BAD),
    "a byte order mark in the middle of a file": (b'\xef\xbb\xbf{"text": "one"}', BAD),
    "blanks that JSON does not know": (b"\x0b", BAD),
    "a form feed": (b"\x0c ", BAD),
    "a carriage return at the end": (b'{"text": "one"}\r', BAD),
    "a million escaped quotes after 70 brackets": (b"[]," * 70 + b'"' + b'\\"' * 1_000_000, BAD),
    "a million keys and one of them twice": (
        b'{"text": "x"' + b"".join(b', "k%d": 0' % number for number in range(500_000)) + b', "k499999": 0}',
        BAD,
    ),
    "four million brackets": (b'{"text": "x", "a": [' + b"[],[]," * 300_000 + b"[]]}", "text"),
    "a fraction of a million digits": (b'{"text": "x", "n": 0.' + b"7" * 1_000_000 + b"}", "text"),
    "an exponent of a million digits": (b'{"text": "x", "n": 1e' + b"7" * 1_000_000 + b"}", "text"),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_find_stays_found(tmp_path: Path, name: str) -> None:
    line, kind = KEPT[name]
    assert len(line) > 500_000 or verdict(line)[0] == kind
    bad = BadLines(allowed=1)
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "first"}\n' + line + b"\n" + b'{"text": "last"}\n')
    with seconds_of_cpu(10):
        texts = [document.text for document in open_corpus(str(tmp_path / "x.jsonl"), seed=0, bad=bad).documents()]
    assert (len(texts), bad.count) == ((2, 1) if kind == BAD else (3, 0)) and (texts[0], texts[-1]) == ("first", "last")


# --- through the shell -----------------------------------------------------------------------------------------------------------

SPOILT: tuple[bytes, ...] = (
    *(line for line, kind in KEPT.values() if kind == BAD and len(line) < 500_000),
    *(b"bad", b"{", b'"text"', b"null", b"[]", b'{"text": 7}', b'{"text": ["a"]}', b'{"text": null}', b'{"body": "x"}'),
    *(b'{"text": "a\\u0000"}', b'{"text": "\\ud800"}', b'{"text": "a\x00b"}', b'{"text": "caf\xe9"}', b'{"text": "x", "n": NaN}'),
    *(b'{"text": "x", "n": -Infinity}', b'{"text": "x"} {}', b"{'text': 'x'}", b'{"text": "x",}', b"[" * 5000, b'{"text": "x"'),
    *(b'{"text": "\x1b[2J\x07"}', b'{"text": "x", "n": 01}', b'{"text": "tab\there"}', b'{"text": "\xed\xa0\x80"}'),
    b'\xff\xfe{"text": "x"}',
    b'{"text": "' + b"x" * (9 << 20) + b'"}',
)


def build(commands: Commands, file: Path, *words: str) -> Result:
    """`data build` in a process of its own."""
    where = ["configs/tiny.yaml", f"data.source={file}", f"data.dir={file.parent / 'data'}"]
    return commands.run("data", "build", *where, *words)


def test_bad_lines_through_the_shell(commands: Commands, tmp_path: Path) -> None:
    """Twenty are told at once; with as many allowed as there are, all are listed and the rest is built."""
    file, good = tmp_path / "x.jsonl", [b'{"text": "good %d"}' % number for number in range(len(SPOILT))]
    file.write_bytes(b"\n".join([*(line for pair in zip(SPOILT, good, strict=True) for line in pair), *good]) + b"\n")
    failed = build(commands, file, "--json")
    error = json.loads(failed.stdout)["error"]
    assert failed.returncode == 3 and error["code"] == 3 and error["where"] == f"{file}:1", failed.stderr
    assert [int(line.split(":")[1]) for line in error["details"]] == list(range(1, 41, 2))
    block = failed.stderr[failed.stderr.index("error: ") :].splitlines()
    assert len(block) <= 12 and "more" in block[-2] and all(line.isprintable() for line in block) and "Traceback" not in failed.stderr
    short = build(commands, file, "--max-bad-lines", str(len(SPOILT) - 1))
    assert short.returncode == 3 and f"{len(SPOILT)} lines cannot be read and {len(SPOILT) - 1} may be skipped" in short.stderr
    built = build(commands, file, "--json", "--max-bad-lines", str(len(SPOILT)))
    assert built.returncode == 0, built.stderr
    (home,) = {Path(store["folder"]).parent for store in json.loads(built.stdout)["stores"]}
    skipped = [int(place.rsplit(":", 1)[1]) for place in json.loads((home / "skipped.json").read_text())]
    assert sorted(skipped) == list(range(1, 2 * len(SPOILT), 2))


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(SPOILT)))
def test_each_bad_line_through_the_shell(commands: Commands, tmp_path: Path, number: int) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "first"}\n' + SPOILT[number] + b"\n")
    done = build(commands, tmp_path / "x.jsonl")
    assert done.returncode == 3 and f"{tmp_path / 'x.jsonl'}:2" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 12 and all(line.isprintable() for line in done.stderr.splitlines())


def test_control_characters_are_shown_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\x1b[31m\x07\xe2\x80\xae{"text"\n')
    with pytest.raises(DataError) as caught:
        list(open_corpus(str(tmp_path / "x.jsonl"), seed=0).documents())
    assert "\\x1b[31m\\x07\\u202e" in render(caught.value)
