"""`compare`: the same run under several layouts and engines, proved equal and measured, a row for each."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dist_llm.compare.measure import prepare_rank, speed_rank, speed_row
from dist_llm.compare.prove import Prover, subject
from dist_llm.config.layout import Layout, parse_layout, resolve, world_of
from dist_llm.config.rules import nearest_layouts, nearest_worlds, problems
from dist_llm.config.schema import Config, changed
from dist_llm.errors import Failure, UsageError, plain
from dist_llm.ranks import run_ranks
from dist_llm.schedule.actions import Span, parse
from dist_llm.schedule.draw import trace
from dist_llm.train.proof import Verdict

VERSION = 1
PROVED = 3  # steps of the proof, at least
TIMED = 5  # steps under the clock
Say = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A layout of the comparison: as typed and concrete."""

    given: str
    layout: Layout


def read_layouts(config: Config, texts: Sequence[str], *, nproc: int | None) -> list[Entry]:
    """The layouts as typed, concrete and checked. Raises UsageError with the faults of all of them at once."""
    entries, faults, works, way = [], [], [], "dist-llm compare --help"
    for text in texts:
        try:
            given = parse_layout(text)
            world = world_of(given, nproc)
            if nproc is not None and world > nproc:
                raise UsageError(f"it needs {world} ranks, --nproc gives {nproc}", next=f"the same command with --nproc {world}")
            layout = resolve(given, world)
            wrong = problems(changed(config, {"layout": given}), layout)
            near = (nearest_layouts(config, layout) or nearest_worlds(config, layout, world=layout.world)) if wrong else []
            works += near[:1] or ([] if wrong else [layout])
            faults += [f"{text}: {problem.text}" for problem in wrong]
            faults += [f"{text}: nearest that work: {', '.join(map(str, near))}"] if near else []
            entries.append(Entry(text, layout))
        except UsageError as fault:
            way = fault.next or way
            lines = fault.details or [f"{fault.what} ({fault.found})" if fault.found else fault.what]
            faults += [line if line.startswith(f"{text}: ") else f"{text}: {line}" for line in lines]
    if faults:
        way = f"dist-llm compare CONFIG {' '.join(dict.fromkeys(map(str, works)))}" if works else way
        raise UsageError("these layouts cannot run", where=" ".join(texts), details=faults, next=way)
    return entries


class Comparison:
    """One `compare`: proves and measures entry after entry, and keeps the rows."""

    def __init__(self, config: Config, entries: Sequence[Entry], reference: Entry, *, steps: int | None, run_dir: Path, say: Say) -> None:
        """steps: of both passes, the proof never fewer than three; None: a few of each."""
        self.config, self.reference, self.run_dir, self.say = config, reference, run_dir, say
        typed = [entry.layout for entry in entries]
        self.entries = [*([] if reference.layout in typed else [reference]), *entries]
        self.steps = TIMED if steps is None else steps
        self.options: dict[str, Any] = {"timeout_seconds": config.runtime.timeout_seconds, "log_dir": run_dir / "logs"}
        self.subject = subject(config, [entry.layout for entry in self.entries], steps=max(PROVED, steps or 0))

    def run(self, *, command: str | None = None) -> dict[str, Any]:
        """Everything; returns the content of comparison.json."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        config = self.config.model_dump(by_alias=True)

        def progress(rank: int, value: dict[str, Any]) -> None:
            self.say(f"data: {value['message']}")

        largest = max(entry.layout.world for entry in self.entries)
        (found,) = run_ranks(1, prepare_rank, config, largest, **self.options, on_message=progress)
        self.kind, self.options["backend"] = {"dtype": found["dtype"], "device": found["device"]}, found["backend"]
        for note in found["notes"]:
            self.say(f"note: {plain(note)}")
        self.prover = Prover(self.subject, self.reference.layout, **self.options)
        rows = []
        for at, entry in enumerate(self.entries):
            self.say(f"[{at + 1}/{len(self.entries)}] {entry.given}: proving and measuring on {entry.layout.world} rank(s)")
            rows.append(self._row(entry))
            self.say(f"[{at + 1}/{len(self.entries)}] {entry.given}: {_outcome(rows[-1])}")
        return {
            "version": VERSION,
            "reference": str(self.reference.layout),
            "layouts": rows,
            "model": f"{self.config.model.family} {self.config.model.layers} x {self.config.model.dim}",
            "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "command": command,
            "environment": environment(),
        }

    def _row(self, entry: Entry) -> dict[str, Any]:
        layout = entry.layout
        row: dict[str, Any] = {"layout": str(layout), "given": entry.given, "engine": layout.engine, "world": layout.world}
        row |= {"equal": None, "error": None}
        try:
            verdict, about, losses = self.prover.prove(layout)
            row |= _proof_keys(verdict, about, losses)
            config = changed(self.config, {"layout": parse_layout(entry.given)}).model_dump(by_alias=True)
            ranks = run_ranks(layout.world, speed_rank, config, asdict(layout), self.steps, **self.options)
            row |= speed_row(self.config, layout, ranks, **self.kind)
        except Failure as failure:
            found = f" ({failure.found})" if failure.found else ""
            said = plain(f"{failure.what}{found}; {failure.where or ''}".rstrip("; "))
            row |= {"equal": False, "error": said, "error_code": int(failure.code)}
        return row


def _proof_keys(verdict: Verdict, about: dict[str, Any], losses: list[float]) -> dict[str, Any]:
    return {
        "equal": verdict.equal,
        "proof": about,
        "loss": losses,
        "max_loss_difference": verdict.loss,
        "max_norm_difference": verdict.norm,
        "max_gradient_difference": verdict.gradient,
        "max_parameter_difference": verdict.parameter,
        "max_moment_difference": verdict.moment,
        "first_difference": asdict(verdict.first) if verdict.first else None,
    }


def _outcome(row: dict[str, Any]) -> str:
    if row["error"]:
        return f"could not run: {row['error']}"
    largest = max(row[f"max_{kind}_difference"] for kind in ("loss", "norm", "gradient", "parameter", "moment"))
    first = row["first_difference"]
    wrong = first and f"NOT EQUAL: {first['kind']} of {first['name']} at step {first['step']}"
    said = f"equal, largest difference {largest:.1e}" if row["equal"] else wrong
    return f"{said}; step {row['step_seconds']:.3f} s"


def environment() -> dict[str, str]:
    """What ran where, for the page and for whoever repeats it."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", "cores": str(os.cpu_count())}
    for package in ("dist-llm", "torch", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def against_baseline(comparison: dict[str, Any], baseline: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(regressions, notes) of a comparison against an earlier one, layout by layout.

    Regressions: absent, no longer equal, more bytes sent, over 5 % more memory. Times are noted as ratios, one run's being too noisy.
    """
    before = {row["layout"]: row for row in baseline.get("layouts", [])}
    here = {row["layout"] for row in comparison["layouts"]}
    worse, notes = [f"{row['given']}: in the baseline, not compared now" for row in before.values() if row["layout"] not in here], []
    for row in comparison["layouts"]:
        old = before.get(row["layout"])
        if old is None:
            notes.append(f"{row['given']}: not in the baseline")
            continue
        if old.get("equal") and not row["equal"]:
            worse.append(f"{row['given']}: was equal, now {row['error'] or 'differs'}")
        for axis, sent in (row.get("sent_bytes_per_step") or {}).items():
            was = (old.get("sent_bytes_per_step") or {}).get(axis, 0)
            if sent > was:
                worse.append(f"{row['given']}: sends {sent:,.0f} bytes a step on {axis}, was {was:,.0f}")
        now, was = max(row.get("peak_memory_bytes") or [0]), max(old.get("peak_memory_bytes") or [0])
        if was and now > 1.05 * was:
            worse.append(f"{row['given']}: peak memory {now / was:.2f} times the baseline's")
        if row.get("step_seconds") and old.get("step_seconds"):
            notes.append(f"{row['given']}: step time {row['step_seconds'] / old['step_seconds']:.2f} times the baseline's")
    return worse, notes


def write(comparison: dict[str, Any], run_dir: Path) -> tuple[Path, Path]:
    """Writes comparison.json, report.html and a Perfetto trace for each layout; returns the first two paths."""
    from dist_llm.report.page import write_comparison_page

    for row in comparison["layouts"]:
        measured = row.get("spans", {}).get("measured")
        if measured:
            spans = [Span(rank, parse(text), start, end, sent) for rank, text, start, end, sent in measured]
            (run_dir / "traces").mkdir(exist_ok=True)
            (run_dir / "traces" / f"{row['layout']}.json").write_text(json.dumps(trace(spans)))
    data, page = run_dir / "comparison.json", run_dir / "report.html"
    data.write_text(json.dumps(comparison, indent=1) + "\n")
    write_comparison_page(comparison, page)
    return data, page
