"""A finished training run as the report shows it: metrics.jsonl, samples.jsonl and config.yaml read leniently, and their figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from dist_llm.report.plot import Figure, series_colour
from dist_llm.report.units import byte_ticks, finite, finite_numbers, mapping, show_bytes, show_count, show_number, show_seconds

Point = tuple[float, float]  # (step, value)
MOST_POINTS = 1500  # of one line; longer series keep the least and the largest value of every bucket
MOST_SAMPLES = 60
LONGEST_CONFIG = 100_000  # characters
LONGEST_LINE = 1 << 20  # characters; a longer one counts as several that cannot be read


@dataclass
class Run:
    """What a run folder holds. steps: metrics sorted by step, the last line of a step wins; unreadable: lines that were no JSON object."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    config: str = ""
    unreadable: int = 0


def read_run(run_dir: Path) -> Run:
    """Read a run folder; missing files are empty, a cut last line is left out."""
    records, unreadable = read_lines(run_dir / "metrics.jsonl")
    steps = {step: record for record in records if (step := finite(record.get("step"))) is not None}
    samples, _ = read_lines(run_dir / "samples.jsonl")
    config = run_dir / "config.yaml"
    text = ""
    if config.is_file():
        with config.open(encoding="utf-8", errors="replace") as file:
            text = file.read(LONGEST_CONFIG)
    return Run([steps[step] for step in sorted(steps)], samples, text, unreadable)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a JSON-lines file and the number of lines that are none; a last line without its line break is not counted."""
    if not path.is_file():
        return [], 0
    records, unreadable, line = [], 0, ""
    with path.open(encoding="utf-8", errors="replace") as lines:
        while part := lines.readline(LONGEST_LINE):
            line = part
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            elif line.strip():
                unreadable += 1
    cut = bool(line.strip()) and not line.endswith("\n") and record is None
    return records, unreadable - cut


def run_sentence(run: Run) -> str:
    """The run in one sentence: steps, loss at the start and at the end, tokens, time."""
    losses = [(record["step"], loss) for record in run.steps if (loss := finite(record.get("loss"))) is not None]
    if not losses:
        return "No step with a loss was recorded."
    (_, first), (last_step, last) = losses[0], losses[-1]
    sentence = f"{show_count(last_step)} steps: loss {first:.3f} to {last:.3f}"
    validated = [loss for record in run.steps if (loss := finite(record.get("validation_loss"))) is not None]
    sentence += f", validation {validated[-1]:.3f}" if validated else ""
    tokens = finite(run.steps[-1].get("tokens"))
    seconds = sum(value for record in run.steps if (value := finite(record.get("step_seconds"))) is not None)
    sentence += f", {show_count(tokens)} tokens" if tokens else ""
    return sentence + (f" in {show_seconds(seconds)}" if seconds else "")


def run_figures(run: Run) -> dict[str, Figure]:
    """The figures that the run has data for, by name; `reward_margin` and `accuracy` are of a preference."""
    made = {
        "loss": _loss_figure(run.steps),
        "reward_margin": _pair_figure(run.steps, "reward_margin", "reward margin", "%{y:.4f}", {}),
        "accuracy": _pair_figure(run.steps, "accuracy", "pairs right", "%{y:.1%}", {"range": [0, 1], "tickformat": ".0%"}),
        "grad_norm": _line_figure(_points(run.steps, "grad_norm"), "gradient norm", 4, "%{y:.4g}"),
        "learning_rate": _line_figure(_points(run.steps, "learning_rate"), "learning rate", 2, "%{y:.3e}", {"tickformat": "~e"}),
        "tokens_per_second": _line_figure(_points(run.steps, "tokens_per_second"), "tokens/s", 5, "%{y:,.0f}", {"rangemode": "tozero"}),
        "memory": _memory_figure(_points(run.steps, "peak_memory_bytes", read=_largest)),
    }
    return {name: figure for name, figure in made.items() if figure}


def run_facts(run: Run) -> list[tuple[str, str]]:
    """What a reader asks first: medians of the step time and the rate, the best validation loss, MFU."""
    facts = []
    for key, name, show in (("step_seconds", "median step", show_seconds), ("tokens_per_second", "median tokens/s", show_count)):
        values = sorted(value for record in run.steps if (value := finite(record.get(key))) is not None)
        if values:
            facts.append((name, show(values[len(values) // 2])))
    validated = [value for record in run.steps if (value := finite(record.get("validation_loss"))) is not None]
    if validated:
        facts.append(("best validation loss", show_number(min(validated))))
    used = sorted(value for record in run.steps if (value := finite(record.get("mfu"))) is not None)
    return [*facts, ("median MFU", f"{100 * used[len(used) // 2]:.1f} %")] if used else facts


def run_answers(run: Run) -> tuple[list[str], list[list[str]]]:
    """Questions with one right answer: the headings of the steps at which they were asked, and a row for each task."""
    asked = [(record["step"], mapping(record.get("answers"))) for record in run.steps if mapping(record.get("answers"))]
    tasks = list(dict.fromkeys(task for _, marks in asked for task in marks))
    return [f"step {show_count(step)}" for step, _ in asked], [[task, *(_mark(marks.get(task)) for _, marks in asked)] for task in tasks]


def _mark(mark: Any) -> str:
    """`39 of 40, 97.5 % (87 to 100)`: right answers, their share and its 95 % interval."""
    right, count, share, low, high = (finite(mapping(mark).get(key)) for key in ("right", "count", "share", "low", "high"))
    if right is None or count is None:
        return ""
    text = f"{right:g} of {count:g}"
    return text if share is None or low is None or high is None else f"{text}, {100 * share:.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def thinned(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points: of every bucket the least and the largest, in order, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return kept


def running_mean(points: list[Point], windows: int = 50) -> list[Point]:
    """The mean over a window of a 50th of the run around every point; empty for a run too short to need one."""
    half = len(points) // windows // 2
    if half < 1:
        return []
    sums = [0.0, *accumulate(y for _, y in points)]
    spans = [(max(0, place - half), min(len(points), place + half + 1)) for place in range(len(points))]
    return [(x, (sums[end] - sums[start]) / (end - start)) for (x, _), (start, end) in zip(points, spans, strict=True)]


def _points(steps: list[dict[str, Any]], key: str, *, read: Callable[[Any], float | None] = finite) -> list[Point]:
    return [(record["step"], value) for record in steps if (value := read(record.get(key))) is not None]


def _largest(value: Any) -> float | None:
    return max(finite_numbers(value), default=None)


def _trace(points: list[Point], name: str, colour: int, hover: str, *, mode: str = "lines", opacity: float = 1) -> dict[str, Any]:
    kept = thinned(points)
    paint = series_colour(colour)
    style = {"line": {"color": paint, "width": 2}, "marker": {"color": paint, "size": 6}, "opacity": opacity}
    place = {"x": [x for x, _ in kept], "y": [y for _, y in kept]}
    return {"type": "scatter", "mode": mode if len(kept) > 1 else "markers", "name": name, "hovertemplate": hover, **style, **place}


def _loss_figure(steps: list[dict[str, Any]]) -> Figure | None:
    training, validation = _points(steps, "loss"), _points(steps, "validation_loss")
    means = running_mean(training)
    traces = [_trace(training, "training", 0, "%{y:.4f}", opacity=0.35 if means else 1)] if training else []
    traces += [_trace(means, "training, running mean", 0, "%{y:.4f}")] if means else []
    traces += [_trace(validation, "validation", 1, "%{y:.4f}", mode="lines+markers")] if validation else []
    return _figure(traces, 340, {}) if traces else None


def _pair_figure(steps: list[dict[str, Any]], key: str, name: str, hover: str, axis: dict[str, Any]) -> Figure | None:
    """A figure of a preference's pairs: of the steps, and of the pairs held out."""
    training, validation = _points(steps, key), _points(steps, f"validation_{key}")
    traces = [_trace(training, name, 0, hover)] if training else []
    traces += [_trace(validation, f"{name}, validation", 1, hover, mode="lines+markers")] if validation else []
    return _figure(traces, 230, axis) if traces else None


def _line_figure(points: list[Point], name: str, colour: int, hover: str, axis: dict[str, Any] | None = None) -> Figure | None:
    return _figure([_trace(points, name, colour, hover)], 230, axis or {}) if points else None


def _memory_figure(points: list[Point]) -> Figure | None:
    if not points:
        return None
    trace = _trace(points, "peak memory", 6, "%{customdata}")
    places, texts = byte_ticks(max(trace["y"]), most=4)
    trace["customdata"] = [show_bytes(size) for size in trace["y"]]
    return _figure([trace], 230, {"tickvals": places, "ticktext": texts, "rangemode": "tozero"})


def _figure(traces: list[dict[str, Any]], height: int, axis: dict[str, Any]) -> Figure:
    x = {"title": {"text": "step"}, "tickformat": "d", "nticks": 8}
    layout = {"height": height, "xaxis": x, "yaxis": axis, "showlegend": len(traces) > 1, "hovermode": "x unified"}
    return {"data": traces, "layout": layout}
