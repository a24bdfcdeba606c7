"""The figures of a comparison, as plotly specifications made of plain dicts.

A figure is {"data": traces, "layout": layout} and, where its y axis lists layouts, {"labels": one per row, "row": height in pixels}.
A colour is `var(--name)`: the page's script puts in the value of the theme that is shown. All text that comes from data passes
through `plot_text`, since plotly reads some HTML tags in labels.
"""

from __future__ import annotations

import math
from typing import Any

from dist_llm.report.gantt import caption, spans_figure
from dist_llm.report.plot import BAD, INK, MUTED, Figure, part_colour, plot_text, series_colour
from dist_llm.report.text import KINDS, label, reference_row, rows_of
from dist_llm.report.units import (
    byte_ticks,
    finite,
    finite_numbers,
    mapping,
    number,
    sequence,
    show_bytes,
    show_difference,
)

MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "host")
AXES = ("dp", "tp", "pp", "cp", "ep", "control")
SYMBOLS = {"loss": ("circle", 8), "gradient": ("diamond", 9), "parameter": ("square", 8), "moment": ("triangle-up", 10)}
COINCIDE = 0.004  # of the plotted range: about the width of a line


def comparison_figures(comparison: dict[str, Any]) -> dict[str, Any]:
    """All figures that the comparison has data for, by name; `spans` is a list of [row, caption, figure]."""
    rows = rows_of(comparison)
    reference = reference_row(comparison)
    reference_index = next((index for index, row in enumerate(rows) if row is reference), None)
    made = {
        "proof": loss_figure([sequence(row.get("loss")) for row in rows], rows, reference_index),
        "losses": loss_figure([sequence(row.get("losses")) for row in rows], rows, reference_index),
        "differences": difference_figure(rows),
        "memory": memory_figure(rows),
        "bytes": bytes_figure(rows),
        "spans": [[index, caption(row), figure] for index, row in enumerate(rows) if (figure := spans_figure(mapping(row.get("spans"))))],
    }
    return {name: figure for name, figure in made.items() if figure}


def loss_figure(curves: list[list[Any]], rows: list[dict[str, Any]], reference_index: int | None) -> Figure | None:
    """Loss over steps, one line per layout. Lines that coincide are marked `rope`: the page draws each as its own dash of one line."""
    values = [[finite(value) for value in curve] for curve in curves]
    drawn = [index for index, curve in enumerate(values) if any(value is not None for value in curve)]
    if not drawn:
        return None
    anchor = values[reference_index if reference_index in drawn else drawn[0]]
    every = [value for index in drawn for value in values[index] if value is not None]
    near = COINCIDE * (max(every) - min(every))
    traces = []
    for index in drawn:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines" if len(values[index]) > 1 else "markers",
                "x": list(range(1, len(values[index]) + 1)),
                "y": values[index],
                "name": plot_text(label(rows[index])),
                "meta": {"row": index, "rope": _distance(values[index], anchor) <= near},
                "line": {"color": series_colour(index), "width": 2},
                "marker": {"color": series_colour(index), "size": 8},
                "hovertemplate": "%{y:.6f}",
            }
        )
    ticks = {"dtick": 1} if max(len(values[index]) for index in drawn) <= 8 else {"nticks": 8}
    axes = {"xaxis": {"title": {"text": "step"}, "tickformat": "d", **ticks}, "yaxis": {"title": {"text": "loss"}}}
    return {"data": traces, "layout": {**axes, "height": 320, "showlegend": False, "hovermode": "x unified"}}


def _distance(curve: list[float | None], other: list[float | None]) -> float:
    pairs = [(a, b) for a, b in zip(curve, other, strict=False) if a is not None and b is not None]
    return max((abs(a - b) for a, b in pairs), default=math.inf)


def difference_figure(rows: list[dict[str, Any]]) -> Figure | None:
    """The largest difference of every kind per layout on a log axis, with the tolerance. x is log10, so that denormals fit too."""
    found = [{kind: number(row.get(f"max_{kind}_difference")) for kind in KINDS} for row in rows]
    drawn = [index for index, kinds in enumerate(found) if any(value is not None for value in kinds.values())]
    if not drawn:
        return None
    limits = [finite(mapping(rows[index].get("proof")).get("tolerance")) for index in drawn]
    tolerances = [limit if limit and limit > 0 else None for limit in limits]
    known = [value for index in drawn for value in found[index].values() if value is not None] + [t for t in tolerances if t]
    logs = [math.log10(abs(value)) for value in known if value and math.isfinite(value)] or [-10.0]
    wild = any(not math.isfinite(value) for value in known)
    floor, ceiling = math.floor(min(logs)) - 1, math.ceil(max(logs)) + wild
    traces = [_tolerance_trace(tolerances)]
    for place, kind in enumerate(KINDS):
        symbol, size = SYMBOLS[kind]
        points = [(height, index, found[index][kind]) for height, index in enumerate(drawn) if found[index][kind] is not None]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": kind,
                "x": [_log_place(value, floor, ceiling) for _, _, value in points],
                "y": [height + 0.15 * (place - 1.5) for height, _, _ in points],
                "customdata": [[plot_text(label(rows[index])), show_difference(value)] for _, index, value in points],
                "marker": {"symbol": symbol, "size": size, "color": [series_colour(index) for _, index, _ in points]},
                "hovertemplate": f"%{{customdata[0]}}<br>{kind}: %{{customdata[1]}}<extra></extra>",
                "showlegend": False,
            }
        )
        key = {"symbol": symbol, "size": size, "color": MUTED}
        traces.append({"type": "scatter", "mode": "markers", "x": [None], "y": [None], "name": kind, "marker": key})
    layout = {"xaxis": _log_axis(floor, ceiling, wild), "hovermode": "closest"}
    return {"data": traces, "layout": layout, "labels": [plot_text(label(rows[index])) for index in drawn], "row": 30}


def _log_place(value: float | None, floor: int, ceiling: int) -> float:
    if value is None or not math.isfinite(value):
        return ceiling
    return math.log10(abs(value)) if value else floor


def _log_axis(floor: int, ceiling: int, wild: bool) -> dict[str, Any]:
    step = max(1, math.ceil((ceiling - floor) / 7))
    inner = [exponent for exponent in range(floor + 1, ceiling + (not wild)) if exponent % step == 0]
    texts = ["0", *(f"10<sup>{exponent}</sup>".replace("-", "−") for exponent in inner), *(["NaN"] if wild else [])]
    places = [floor, *inner, *([ceiling] if wild else [])]
    return {"range": [floor - 0.4, ceiling + 0.4], "tickvals": places, "ticktext": texts, "fixedrange": True}


def _tolerance_trace(tolerances: list[float | None]) -> dict[str, Any]:
    x: list[float | None] = []
    y: list[float | None] = []
    for height, tolerance in enumerate(tolerances):
        if tolerance is not None:
            x += [math.log10(tolerance)] * 2 + [None]
            y += [height - 0.5, height + 0.5, None]
    style = {"color": BAD, "width": 2}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": "tolerance", "line": style, "hoverinfo": "skip"}


def memory_figure(rows: list[dict[str, Any]]) -> Figure | None:
    """Predicted bytes of one rank, stacked by what holds them, and the measured peak of every rank as a mark."""
    predicted = [mapping(mapping(row.get("predicted")).get("memory_bytes")) for row in rows]
    parts = [{part: size for part in MEMORY_PARTS if (size := finite(sizes.get(part))) is not None} for sizes in predicted]
    peaks = [finite_numbers(row.get("peak_memory_bytes")) for row in rows]
    drawn = [index for index in range(len(rows)) if parts[index] or peaks[index]]
    if not drawn:
        return None
    stacks = [parts[index] for index in drawn]
    there = [(place, part) for place, part in enumerate(MEMORY_PARTS) if any(stack.get(part) for stack in stacks)]
    traces = [_bar(part, place, stacks, offset=0, width=0.56) for place, part in there]
    marks = [(height, index, rank, peak) for height, index in enumerate(drawn) for rank, peak in enumerate(peaks[index])]
    if marks:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "measured peak of a rank",
                "x": [peak for *_, peak in marks],
                "y": [height for height, *_ in marks],
                "customdata": [[plot_text(label(rows[index])), rank, show_bytes(peak)] for _, index, rank, peak in marks],
                "marker": {"symbol": "line-ns", "size": 20, "color": INK, "line": {"width": 2.5, "color": INK}},
                "hovertemplate": "%{customdata[0]}<br>rank %{customdata[1]}, measured: %{customdata[2]}<extra></extra>",
            }
        )
    largest = max([sum(stack.values()) for stack in stacks] + [peak for *_, peak in marks])
    return {"data": traces, "layout": _byte_layout(largest), "labels": [plot_text(label(rows[index])) for index in drawn], "row": 34}


def bytes_figure(rows: list[dict[str, Any]]) -> Figure | None:
    """Bytes that one rank sends per step, stacked by mesh axis: measured above, predicted (hatched) below it."""
    measured = [_axis_bytes(row.get("sent_bytes_per_step")) for row in rows]
    predicted = [_axis_bytes(mapping(row.get("predicted")).get("sent_bytes_per_step")) for row in rows]
    drawn = [index for index in range(len(rows)) if measured[index] or predicted[index]]
    if not drawn:
        return None
    both = any(predicted)
    stacks, forecast = [measured[index] for index in drawn], [predicted[index] for index in drawn]
    named = list(dict.fromkeys([*AXES, *(axis for stack in stacks + forecast for axis in stack)]))
    axes = [axis for axis in named if any(stack.get(axis) for stack in stacks + forecast)]
    traces = []
    for axis in axes:
        place = named.index(axis)
        traces.append(_bar(axis, place, stacks, offset=-0.17 if both else 0, width=0.32 if both else 0.56))
        if both:
            traces.append(_bar(axis, place, forecast, offset=0.17, width=0.32, hatched=True))
    if both:
        key = {"color": MUTED, "pattern": {"shape": "/", "fillmode": "replace", "size": 5}}
        traces.append({"type": "bar", "x": [None], "y": [0], "name": "predicted", "orientation": "h", "marker": key})
    largest = max(sum(stack.values()) for stack in stacks + forecast)
    return {"data": traces, "layout": _byte_layout(largest), "labels": [plot_text(label(rows[index])) for index in drawn], "row": 40}


def _axis_bytes(sizes: Any) -> dict[str, float]:
    return {plot_text(axis): size for axis, value in mapping(sizes).items() if (size := finite(value)) is not None}


def _bar(name: str, place: int, stacks: list[dict[str, float]], *, offset: float, width: float, hatched: bool = False) -> dict[str, Any]:
    heights = [height for height, stack in enumerate(stacks) if name in stack]
    marker: dict[str, Any] = {"color": part_colour(place)}
    if hatched:
        marker["pattern"] = {"shape": "/", "fillmode": "replace", "size": 5}
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "legendgroup": name,
        "showlegend": not hatched,
        "x": [stacks[height][name] for height in heights],
        "y": [height + offset for height in heights],
        "width": width,
        "marker": marker,
        "customdata": [f"{name}{', predicted' if hatched else ''}: {show_bytes(stacks[height][name])}" for height in heights],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _byte_layout(largest: float) -> dict[str, Any]:
    places, texts = byte_ticks(largest)
    axis = {"range": [0, max(largest * 1.04, 1)], "tickvals": places, "ticktext": texts, "fixedrange": True}
    return {"barmode": "stack", "xaxis": axis, "yaxis": {"showgrid": False}, "hovermode": "closest"}
