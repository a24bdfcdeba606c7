"""Runs questions: finds their rows, measures them, keeps the results."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from dist_llm import __version__
from dist_llm.errors import UsageError

VERSION = 1
RESULTS = Path(__file__).parent / "results"
QUESTIONS = {  # name -> module
    "one-process": "one_process",
    "engines": "engines",
    "tensor-parallel": "tensor_parallel",
    "pipeline": "pipeline",
    "data": "data",
    "start-up": "start_up",
    "checkpoint": "checkpoint",
    "generate": "generate",
}
QUICK_ROUNDS = 3


def main(question: str) -> None:
    """`python -m benchmarks.NAME`: the same as `dist-llm bench NAME`."""
    from dist_llm.cli.main import run

    sys.exit(run(["bench", question, *sys.argv[1:]]))


def listed() -> list[dict[str, Any]]:
    """Every question with its rows."""
    return [
        {"question": name, "title": import_module(f"benchmarks.{module}").TITLE, "rows": [row.name for row in _rows(name)]}
        for name, module in QUESTIONS.items()
    ]


def chosen(words: list[str]) -> dict[str, list[Any]]:
    """The rows that `QUESTION` and `QUESTION:TEXT` name, TEXT a part of a row's name; all rows when there is no word."""
    found: dict[str, list[Any]] = {}
    for word in words or list(QUESTIONS):
        question, _, text = word.partition(":")
        if question not in QUESTIONS:
            raise UsageError("no such question", found=question, expected=", ".join(QUESTIONS), next="dist-llm bench --list")
        rows = [row for row in _rows(question) if text in row.name]
        if not rows:
            names = [row.name for row in _rows(question)]
            raise UsageError(f"no row of {question} is named so", found=text, details=names, next="dist-llm bench --list")
        found.setdefault(question, []).extend(rows)
    return found


def _rows(question: str) -> list[Any]:
    return import_module(f"benchmarks.{QUESTIONS[question]}").rows()


def run_questions(
    words: list[str], *, rounds: int, seconds: float, quick: bool, out: Path | None, command: str, say: Callable[[str], None],
    done: Callable[[str, dict[str, Any]], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Measures the chosen rows one after the other; `done(question, row)` hears of each, and `out` keeps each."""
    from benchmarks.harness import Limits, measure
    from benchmarks.machine import machine, versions

    rows = chosen(words)
    import torch._dynamo  # noqa: F401  once here instead of in every rank that is forked from this process

    limits, results = Limits(min(rounds, QUICK_ROUNDS) if quick else rounds, seconds), []
    for question, some in rows.items():
        head = {"version": VERSION, "question": question, "title": import_module(f"benchmarks.{QUESTIONS[question]}").TITLE}
        head |= {"dist_llm": __version__, "quick": quick, "machine": machine(), "versions": versions()}
        result: dict[str, Any] = {**head, "rows": []}
        results.append(result)
        for row in some:
            row = miniature(row) if quick else row
            found = {"when": time.strftime("%Y-%m-%d %H:%M"), "command": command, **measure(row, limits, say)}
            result["rows"].append(found)
            done(question, found)
            if out is not None:
                keep(result, out)
    return results


def miniature(row: Any) -> Any:
    """A row on a tiny model; its figures say nothing there."""
    rivals = tuple(replace(rival, time=None, known_peak=None, known_sent=None) for rival in row.rivals)
    return replace(row, setting=row.setting.quick(), rivals=rivals, peak=None, sent=None)


def keep(result: dict[str, Any], out: Path) -> Path:
    """Writes `QUESTION-DATE.json`; rows of the same day that were not measured again stay."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{result['question']}-{time.strftime('%Y-%m-%d')}.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    path.write_text(json.dumps({**result, "rows": merged(earlier, result["rows"])}, indent=1) + "\n")
    return path


def merged(earlier: Iterable[dict[str, Any]], later: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by name: the later one in the place of the earlier."""
    rows = {row["name"]: row for row in earlier}
    rows |= {row["name"]: row for row in later}
    return list(rows.values())
