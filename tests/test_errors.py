"""Failures: codes, the final block, what crosses a process, and what a terminal may not see."""

from __future__ import annotations

import json
from typing import Any
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_llm import errors
from dist_llm.errors import FAILURES, MAX_LINES, MAX_WIDTH, Code, DataError, Failure, UsageError, from_dict, plain, render

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Failure)]
FIELDS = ("what", "where", "expected", "found", "safe", "next", "details")


def test_codes_are_those_that_are_documented() -> None:
    numbers = {code.name: int(code) for code in Code}
    assert numbers == {
        "DONE": 0, "BUG": 1, "USAGE": 2, "DATA": 3, "CHECKPOINT": 4, "PEER": 5, "NUMERIC": 6, "SPACE": 7, "MEMORY": 8,
        "PREEMPTED": 75, "INTERRUPTED": 130, "TERMINATED": 143,
    }  # fmt: skip


def test_every_failure_has_a_code_of_its_own() -> None:
    codes = [int(kind.code) for kind in KINDS]
    assert len(set(codes)) == len(codes) and 0 not in codes
    assert {int(kind.code): kind for kind in KINDS} == FAILURES


@pytest.mark.parametrize("kind", KINDS)
def test_failures_survive_json(kind: type[Failure]) -> None:
    failure = kind("what", where="a:1", expected="x", found="y", safe="z", next="do", details=["1", "2"])
    again = from_dict(json.loads(json.dumps(failure.as_dict())))
    assert type(again) is kind and again.code == failure.code
    assert all(getattr(again, field) == getattr(failure, field) for field in FIELDS)


def test_an_unknown_code_is_still_a_failure() -> None:
    assert type(from_dict({"code": 99, "what": "new"})) is Failure


def test_the_final_block() -> None:
    failure = DataError("line 7 is no JSON", where="a.jsonl:7", expected="an object", found="{", safe="nothing was written", next="look")
    assert render(failure).splitlines() == [
        "error: line 7 is no JSON",
        "  where:    a.jsonl:7",
        "  expected: an object",
        "  found:    {",
        "  safe:     nothing was written",
        "  next:     look",
    ]


def test_many_details_are_cut_and_counted() -> None:
    failure = UsageError("much is wrong", where="w", expected="e", found="f", safe="s", next="n", details=[f"fault {n}" for n in range(40)])
    lines = render(failure).splitlines()
    assert len(lines) == MAX_LINES and lines[-1] == "  next:     n"
    shown = sum(line.startswith("  - fault") for line in lines)
    assert lines[-2] == f"  - ... and {40 - shown} more"


@given(st.builds(Failure, st.text(), **{field: st.none() | st.text() for field in FIELDS[1:6]}, details=st.lists(st.text(), max_size=30)))
def test_no_block_is_long_wide_or_dangerous(failure: Failure) -> None:
    block = render(failure)
    assert len(block.split("\n")) <= MAX_LINES
    assert all(len(line) <= MAX_WIDTH + 12 for line in block.split("\n"))
    assert not any(category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for character in block if character not in "\n\t")
    assert len(block.splitlines()) == len(block.split("\n"))  # no other separator starts a line of its own


@pytest.mark.parametrize(
    "dangerous", ["\x1b[2J", "a\rb", "\x07", "\u202e", "\u200b", "\x9b31m", "\ud800", "a\nerror: b", "\u2028", "\u0085"]
)
def test_terminals_are_safe_from_data(dangerous: str) -> None:
    shown = plain(dangerous)
    assert shown.isprintable() and len(shown.splitlines()) == 1


@pytest.mark.parametrize("value", [3, None, ["a"], b"x"])
def test_anything_can_be_shown(value: Any) -> None:
    assert plain(value) == str(value)
