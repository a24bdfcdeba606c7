"""`dist-llm report RUN`: write report.html beside a finished run or a comparison."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm.errors import DataError, UsageError

LARGEST_COMPARISON = 256 * 1024 * 1024  # bytes


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, a folder with comparison.json, or such a file itself.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write report.html, one page that opens anywhere without a network, and print its path."""
    kind, source = find_source(run)
    page = (source if source.is_dir() else source.parent) / "report.html"
    from dist_llm.report.page import write_comparison_page, write_run_page

    if kind == "run":
        write_run_page(source, page)
    else:
        write_comparison_page(read_comparison(source), page)
    typer.echo(json_format.dumps({"version": 1, "kind": kind, "report": str(page)}) if json else str(page))


def find_source(run: Path) -> tuple[str, Path]:
    """What there is to report: ("run", folder with metrics.jsonl) or ("comparison", file); a run folder's own metrics come first."""
    if run.is_file():
        return ("run", run.parent) if run.name == "metrics.jsonl" else ("comparison", run)
    if (run / "metrics.jsonl").is_file():
        return "run", run
    if (run / "comparison.json").is_file():
        return "comparison", run / "comparison.json"
    raise UsageError(
        "there is nothing to report here",
        where=str(run),
        expected="a folder with metrics.jsonl (from train) or comparison.json (from compare)",
        found="a folder with neither" if run.is_dir() else "no such file or folder",
        next="dist-llm train CONFIG, then dist-llm report RUN_FOLDER",
    )


def read_comparison(path: Path) -> dict[str, Any]:
    """The content of a comparison.json. Raises DataError where it is not one."""
    if path.stat().st_size > LARGEST_COMPARISON:
        raise DataError("this file is too large for a comparison", where=str(path), expected=f"at most {LARGEST_COMPARISON} bytes")
    try:
        comparison = json_format.loads(path.read_text(encoding="utf-8"))
    except json_format.JSONDecodeError as error:
        raise DataError("the comparison is not valid JSON", where=f"{path}:{error.lineno}:{error.colno}", found=error.msg) from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise DataError("the comparison cannot be read", where=str(path), found=str(error)) from None
    if not isinstance(comparison, dict) or not isinstance(comparison.get("layouts"), list):
        raise DataError("this JSON is not a comparison", where=str(path), expected='an object with the list "layouts"')
    return comparison
