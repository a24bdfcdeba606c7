"""`dist-llm report RUN`: write report.html beside a finished run or a comparison."""

from __future__ import annotations

import json as json_format
import os
import stat
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm.errors import DataError, SpaceError, UsageError, plain

COMPARE = "dist-llm compare CONFIG LAYOUT writes one"

LARGEST_COMPARISON = 256 * 1024 * 1024  # bytes


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, a folder with comparison.json, or such a file itself.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write report.html, one page that opens anywhere without a network, and print its path."""
    kind, source = find_source(run)
    page = (source if source.is_dir() else source.parent) / "report.html"
    from dist_llm.report.page import write_comparison_page, write_run_page

    comparison = read_comparison(source) if kind == "comparison" else None
    try:
        if comparison is None:
            write_run_page(source, page)
        else:
            write_comparison_page(comparison, page)
    except OSError as error:
        raise SpaceError("the report cannot be made", where=error.filename or str(page), found=error.strerror) from None
    typer.echo(json_format.dumps({"version": 1, "kind": kind, "report": str(page)}) if json else plain(page))


def find_source(run: Path) -> tuple[str, Path]:
    """What there is to report: ("run", folder with metrics.jsonl) or ("comparison", file); a run folder's own metrics come first."""
    if os.path.isfile(run):
        return ("run", run.parent) if run.name == "metrics.jsonl" else ("comparison", run)
    if os.path.isfile(run / "metrics.jsonl"):
        return "run", run
    if os.path.isfile(run / "comparison.json"):
        return "comparison", run / "comparison.json"
    raise UsageError(
        "there is nothing to report here",
        where=str(run),
        expected="a folder with metrics.jsonl (from train) or comparison.json (from compare)",
        found="a folder with neither" if os.path.isdir(run) else "no such file or folder",
        next="dist-llm train CONFIG, then dist-llm report RUN_FOLDER",
    )


def read_comparison(path: Path) -> dict[str, Any]:
    """The content of a comparison.json. Raises DataError where it is not one."""
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise DataError("the comparison is not a file", where=str(path), expected="a file", found="a folder or a device", next=COMPARE)
        if about.st_size > LARGEST_COMPARISON:
            raise DataError("this file is too large for a comparison", where=str(path), expected=f"at most {LARGEST_COMPARISON} bytes")
        comparison = json_format.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            "the comparison cannot be read", where=str(path), expected="a file that can be read", found=error.strerror
        ) from None
    except json_format.JSONDecodeError as error:
        raise DataError(
            "the comparison is not valid JSON", where=f"{path}:{error.lineno}:{error.colno}", expected="JSON", found=error.msg, next=COMPARE
        ) from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise DataError("the comparison cannot be read", where=str(path), expected="JSON", found=str(error), next=COMPARE) from None
    if not isinstance(comparison, dict) or not isinstance(comparison.get("layouts"), list):
        raise DataError(
            "this JSON is not a comparison", where=str(path), expected='an object with the list "layouts"', found="other keys", next=COMPARE
        )
    return comparison
