"""`dist-llm bench [QUESTION...]`: ours against other libraries, interleaved in one run; the suite lies in the checkout."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm.cli.spinner import Spinner
from dist_llm.errors import UsageError, plain

ROOT = Path(__file__).parents[2]
QUIET_SECONDS = 10.0  # between two lines of progress where there is no terminal


def bench(
    questions: Annotated[
        list[str] | None, typer.Argument(metavar="[QUESTION...]", help="QUESTION or QUESTION:ROW; all by default.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="At most so many rounds of a row.")] = 40,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="No new round of a row after so many.")] = 240.0,
    out: Annotated[Path | None, typer.Option("--out", help="Where results go; benchmarks/results by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models and 3 rounds: does it run? Kept only with --out.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="The questions and their rows.")] = False,
    page: Annotated[bool, typer.Option("--page", help="Measure nothing; write docs/benchmarks.md from the kept results.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Measure ours against other libraries: time in pairs of one run, memory, bytes; a missed figure is shown as missed."""
    suite = _suite("command")
    if listing:
        _show_list(suite.listed(), as_json)
        return
    if page:
        typer.echo(_suite("page").write(out or suite.RESULTS, ROOT / "docs/benchmarks.md"))
        return
    folder = out or (None if quick else suite.RESULTS)
    command = " ".join(["dist-llm", "bench", *(questions or []), *(["--quick"] if quick else [])])
    with Progress(as_json) as progress:
        settings: dict[str, Any] = {"rounds": rounds, "seconds": seconds, "quick": quick, "out": folder, "command": command}
        found = suite.run_questions(questions or [], **settings, say=progress.say, done=progress.done)
    if as_json:
        typer.echo(json.dumps({"version": suite.VERSION, "results": found}))
        return
    _show(found, folder)


def _suite(module: str) -> Any:
    """A module of the suite, which is not installed with the package."""
    if not (ROOT / "benchmarks/command.py").is_file():
        found, way = f"no benchmarks folder in {ROOT}", "clone the repository, pip install -e . there, and run it again"
        raise UsageError("the benchmark suite lies in the checkout, not in the package", where="dist-llm bench", found=found, next=way)
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"benchmarks.{module}")


class Progress(Spinner):
    """What is being measured, without a terminal now and then; each row when it is done."""

    last = 0.0  # when a line was printed

    def say(self, text: str) -> None:
        """What is under way."""
        if not self.turn(text) and time.monotonic() - self.last > QUIET_SECONDS:
            self.last = time.monotonic()
            self.print(text)

    def done(self, question: str, row: dict[str, Any]) -> None:
        """A row that has been measured."""
        text = _suite("text")
        for rival in row["rivals"]:
            _, label, times, figure, judged, *_ = text.cells(row, rival)
            self.print(f"{question}, {row['name']}: {label} {times}" + (f", {figure}: {judged}" if rival["figure"] else ""))


def _show_list(questions: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"version": 1, "questions": questions}))
        return
    for question in questions:
        typer.echo(f"{question['question']}: {question['title']}")
        for row in question["rows"]:
            typer.echo(f"  {question['question']}:{row}")


def _show(results: list[dict[str, Any]], folder: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    text, console = _suite("text"), Console()
    for result in results:
        typer.echo(f"\n{result['title']}")
        if console.is_terminal:
            table = Table(*text.COLUMNS)
            for row in result["rows"]:
                for rival in row["rivals"]:
                    table.add_row(*(Text(cell) for cell in text.cells(row, rival)))
            console.print(table)
            for row in result["rows"]:
                typer.echo(f"{row['name']}: {'; '.join(text.findings(row))}")
        else:
            typer.echo(text.plain_table(result["rows"]))
    found = text.verdicts(results)
    typer.echo("\n" + ", ".join(f"{len(names)} figures {kind}" for kind, names in found.items()))
    for kind in ("missed", "undecided"):
        for name in found[kind]:
            typer.echo(f"  {kind}: {name}")
    if folder is not None:
        typer.echo(f"results: {plain(folder)}")
