"""`dist-llm compare CONFIG LAYOUT...`: the same run under several layouts, proved equal and measured."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm.cli.loopback import stay_on_loopback
from dist_llm.cli.spinner import Spinner
from dist_llm.cli.train import short_overrides
from dist_llm.config.load import Loaded, load_config
from dist_llm.errors import Failure, NumericError, UsageError, plain
from dist_llm.train.base import read_base


def compare(
    config_path: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file of the run; or a finished run's folder.")],
    words: Annotated[list[str], typer.Argument(metavar="LAYOUT...", help="Layouts (dp=2,tp=2) and overrides (a.b=v); or a second run.")],
    nproc: Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks for layouts that do not name dp.")] = None,
    reference: Annotated[str, typer.Option("--reference", help="The layout that the others are held against.")] = "dp=1",
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps timed and proved (at least 3 are proved).")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the speed pass: float32, bfloat16, float64.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Text to train on, instead of data.source.")] = None,
    run_dir: Annotated[str | None, typer.Option("--run-dir", help="Where comparison.json and report.html go.")] = None,
    baseline: Annotated[Path | None, typer.Option("--baseline", help="An earlier comparison.json; exit 6 if this one is worse.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Prove layouts equal to one process and measure them; exit 6 if one is not equal."""
    if os.path.isdir(config_path):
        _compare_runs(Path(config_path), words, as_json)
        return
    overrides = [word for word in words if "." in word.split("=")[0] or word.startswith("base=")]
    texts = [word for word in words if word not in overrides]
    loaded = load_config(config_path, [*overrides, *short_overrides({"runtime.dtype": dtype, "save.dir": run_dir}, data)], base=read_base)
    folder = Path(run_dir or Path(loaded.config.save.dir) / "compare")
    earlier = None if baseline is None else _read_baseline(baseline)  # before minutes are spent on what is held against it
    found = _compare(loaded, texts, nproc=nproc, reference=reference, steps=steps, folder=folder, quiet=as_json)
    worse, notes = ([], []) if baseline is None else _held_against(found, earlier, baseline)
    _show(found, folder, notes, as_json)
    _judge(found, worse, folder)


def _compare(
    loaded: Loaded, texts: list[str], *, nproc: int | None, reference: str, steps: int | None, folder: Path, quiet: bool
) -> dict[str, Any]:
    from dist_llm.compare.run import Comparison, read_layouts, write

    if not texts:
        where, expected = "dist-llm compare", "at least one, such as dp=2"
        raise UsageError("no layout to compare", where=where, expected=expected, found="none", next="dist-llm compare CONFIG dp=2 tp=2")
    entries = read_layouts(loaded.config, texts, nproc=nproc)
    try:
        (held,) = read_layouts(loaded.config, [reference], nproc=None)
    except UsageError as error:
        error.where = "--reference"
        raise
    command = " ".join(["dist-llm", *sys.argv[1:]])
    stay_on_loopback()
    with Progress(quiet) as progress:
        found = Comparison(loaded.config, entries, held, steps=steps, run_dir=folder, say=progress.say).run(command=command)
    write(found, folder)
    return found


class Progress(Spinner):
    """What is being compared, and what has come out."""

    def say(self, text: str) -> None:
        """Shows a line; on a terminal what is under way stays in the spinner."""
        under_way = "proving" in text or text.startswith("data:")
        if not (under_way and self.turn(text)):
            self.print(text)


def _read_baseline(path: Path) -> Any:
    """An earlier comparison. Raises UsageError where the file is none."""
    from dist_llm.cli.report import read_comparison

    try:
        return read_comparison(path)
    except Failure as failure:
        what, expected, found = "the baseline cannot be read", "a comparison.json", failure.found or failure.what
        way = "the same command without --baseline makes one"
        raise UsageError(what, where=failure.where, expected=expected, found=found, next=way) from None


def _held_against(found: dict[str, Any], earlier: Any, path: Path) -> tuple[list[str], list[str]]:
    from dist_llm.compare.run import against_baseline

    try:
        return against_baseline(found, earlier)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError("the baseline contradicts itself", where=str(path), expected="a comparison.json", found=why) from error


def _show(found: dict[str, Any], folder: Path, notes: list[str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    from rich.console import Console

    from dist_llm.report.text import plain_table, table, verdict

    console = Console()
    if console.is_terminal:
        console.print(table(found))
        typer.echo(verdict(found).sentence)
    else:
        typer.echo(plain_table(found))
    for note in notes:
        typer.echo(f"  baseline: {plain(note)}")
    typer.echo(f"report: {plain(folder / 'report.html')}")


def _judge(found: dict[str, Any], worse: list[str], folder: Path) -> None:
    """Exit 6 with the first tensor that differs, or with what is worse than the baseline."""
    wrong = [row for row in found["layouts"] if not row["equal"]]
    if wrong:
        lines = []
        for row in wrong:
            first = row.get("first_difference")
            place = first and f"{first['kind']} of {first['name']}, step {first['step']}, rank {first['rank']}"
            size = first and f"by {first['difference']:.2e}: {first['hint']}"
            lines.append(f"{row['given']}: {row['error'] or f'{place}, {size}'}")
        raise NumericError(
            "layouts that are not equal" if any(not row["error"] for row in wrong) else "layouts that could not run",
            where=" ".join(row["given"] for row in wrong),
            expected=f"equal to {found['reference']}",
            details=lines,
            safe=f"the other rows are in {folder / 'comparison.json'}",
            next=f"the report shows where: {folder / 'report.html'}; each rank's words are in {folder / 'logs'}",
        )
    if worse:
        kept = f"this comparison is in {folder / 'comparison.json'}"
        raise NumericError("worse than the baseline", where=str(folder), details=worse, safe=kept, next=f"dist-llm report {folder}")


def _compare_runs(first: Path, words: list[str], as_json: bool) -> None:
    from dist_llm.compare.runs import compare_runs

    if len(words) != 1:
        what, expected = "a run is compared with one other run", "dist-llm compare RUN_A RUN_B"
        raise UsageError(
            what,
            where=str(first),
            expected=expected,
            found=f"{1 + len(words)} names",
            next=f"dist-llm compare {shlex.join([str(first), *words[:1]])}",
        )
    found = compare_runs(first, Path(words[0]))
    if as_json:
        typer.echo(json.dumps(found))
    elif found["first_step"] is None:
        typer.echo(f"{found['steps']} steps, every loss equal to the bit")
    else:
        a, b = found["loss"]
        typer.echo(f"first difference at step {found['first_step']}: loss {a!r} and {b!r}, relative {found['relative']:.2e}")
        typer.echo(f"largest relative difference over {found['steps']} steps: {found['max_relative']:.2e}")
    if not as_json and (tensor := found["tensor"]):
        place = f"{tensor['kind']} of {tensor['name']} after step {tensor['step']}"
        typer.echo(f"first tensor that differs: {place}, by {tensor['difference']:.2e}")
