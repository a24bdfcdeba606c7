"""The figures of a comparison, as plotly specifications made of plain dicts.

A figure is {"data": traces, "layout": layout} and, where its y axis lists layouts, {"labels": one per row, "row": height in pixels}.
A colour is `var(--name)`: the page's script puts in the value of the theme that is shown. All text that comes from data passes
through `plot_text`, since plotly reads some HTML tags in labels.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from typing import Any

from dist_llm.report.text import KINDS, label, reference_row, rows_of
from dist_llm.report.units import (
    byte_ticks,
    described,
    finite,
    finite_numbers,
    mapping,
    number,
    sequence,
    show_bytes,
    show_difference,
    show_fraction,
    show_seconds,
    shown,
)

Figure = dict[str, Any]
SERIES, PARTS = 12, 6  # colours of the theme: one per layout, one per category
MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "buffers")
AXES = ("dp", "tp", "pp", "cp", "ep", "control")
SYMBOLS = {"loss": ("circle", 8), "gradient": ("diamond", 9), "parameter": ("square", 8), "moment": ("triangle-up", 10)}
ACTION = re.compile(r"(\d+)(F|B|I|W)(\d+)")
ACTION_KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
OTHER_ACTION = "communication and other"
ROW, GAP, TOP = 36, 62, 62  # of a Gantt chart, in pixels: one rank, between the panels, above the first
COINCIDE = 0.004  # of the plotted range: about the width of a line
INK, MUTED, BAD = "var(--ink)", "var(--muted)", "var(--bad)"


def plot_text(value: Any) -> str:
    """Text from data for a plotly label: control characters replaced, markup escaped, one line."""
    return html.escape(" ".join(shown(value).split()), quote=False)


def series_colour(index: int) -> str:
    """The colour of layout `index`, the same in every figure and in the table."""
    return f"var(--series-{index % SERIES + 1})"


def part_colour(index: int) -> str:
    """The colour of category `index` (a mesh axis, a part of the memory, a kind of action)."""
    return f"var(--part-{index % PARTS + 1})"


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
    """Loss over steps, one line per layout. Lines that coincide share one rope: each draws its own dash of it, so that all are seen."""
    values = [[finite(value) for value in curve] for curve in curves]
    drawn = [index for index, curve in enumerate(values) if any(value is not None for value in curve)]
    if not drawn:
        return None
    anchor = values[reference_index if reference_index in drawn else drawn[0]]
    every = [value for index in drawn for value in values[index] if value is not None]
    near = COINCIDE * (max(every) - min(every))
    rope = [index for index in drawn if _distance(values[index], anchor) <= near]
    traces = []
    for index in drawn:
        dash = _rope_dash(rope.index(index), len(rope)) if index in rope and len(rope) > 1 else "solid"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines" if len(values[index]) > 1 else "markers",
                "x": list(range(1, len(values[index]) + 1)),
                "y": values[index],
                "name": plot_text(label(rows[index])),
                "meta": {"row": index},
                "line": {"color": series_colour(index), "width": 3 if dash != "solid" else 2, "dash": dash},
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


def _rope_dash(place: int, of: int, length: int = 9) -> str:
    return f"0px,{place * length}px,{length}px,{(of - 1 - place) * length}px"


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
    traces = [_bar(part, place, stacks, offset=0, width=0.56) for place, part in enumerate(MEMORY_PARTS) if any(part in s for s in stacks)]
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


def caption(row: dict[str, Any]) -> str:
    """The bubble of a row, measured and predicted, for the line under its Gantt chart."""
    found = {"measured": row.get("bubble_fraction"), "predicted": mapping(row.get("predicted")).get("bubble_fraction")}
    texts = [f"{show_fraction(value)} {how}" for how, value in found.items() if finite(value) is not None]
    return f"Bubble: {', '.join(texts)}." if texts else ""


def spans_figure(spans: dict[str, Any]) -> Figure | None:
    """The measured step over the simulated one: a bar per action, a line per rank, both on one time axis in seconds from their start."""
    panels = [(how, found) for how in ("measured", "simulated") if (found := list(_spans(spans.get(how))))]
    if not panels:
        return None
    longest = max(_length(found) for _, found in panels)
    scale, unit = (1.0, "s") if longest >= 1 else (1e3, "ms") if longest >= 1e-3 else (1e6, "µs")
    rooms = [ROW * len({rank for rank, *_ in found}) for _, found in panels]
    plot = sum(rooms) + GAP * (len(rooms) - 1)
    traces: list[Figure] = []
    layout: dict[str, Any] = {"height": plot + TOP + 34, "barmode": "overlay", "hovermode": "closest", "annotations": []}
    for place, (how, found) in enumerate(panels):
        ranks = sorted({rank for rank, *_ in found})
        top = 1 - place * (rooms[0] + GAP) / plot
        layout |= _panel_axes(place, ranks, (max(0, top - rooms[place] / plot), top), longest * scale, unit)
        layout["annotations"].append(_panel_title(top, f"<b>{how}</b>  {show_seconds(_length(found))}"))
        seen = {trace["name"] for trace in traces}
        traces += [trace | {"showlegend": trace["name"] not in seen} for trace in _panel_traces(found, ranks, scale, place)]
    layout |= {"legend": {"yref": "container", "yanchor": "top", "y": 1}, "margin": {"t": TOP}}
    return {"data": traces, "layout": layout}


def _spans(given: Any) -> Iterable[tuple[int, str, float, float, float | None]]:
    found = []
    for span in sequence(given):
        if isinstance(span, list) and len(span) >= 4:
            rank, start, end = finite(span[0]), finite(span[2]), finite(span[3])
            if rank is not None and start is not None and end is not None and end >= start:
                found.append((int(rank), described(span[1]), start, end, finite(span[4]) if len(span) > 4 else None))
    first = min((start for _, _, start, _, _ in found), default=0.0)
    return [(rank, action, start - first, end - first, size) for rank, action, start, end, size in found]


def _length(found: list[tuple[int, str, float, float, float | None]]) -> float:
    return max(end for _, _, _, end, _ in found)


def _panel_traces(found: list[tuple[int, str, float, float, float | None]], ranks: list[int], scale: float, place: int) -> list[Figure]:
    held = {(rank, int(parts[1])) for rank, action, *_ in found if (parts := ACTION.fullmatch(action))}
    stages = {rank: sorted(stage for at, stage in held if at == rank) for rank in ranks}
    kinds: dict[str, list[tuple]] = {}
    for rank, action, start, end, size in found:
        parts = ACTION.fullmatch(action)
        kind = ACTION_KINDS[parts[2]] if parts else OTHER_ACTION
        chunk = stages[rank].index(int(parts[1])) if parts else 0
        hover = f"{plot_text(action)} on rank {rank}<br>{show_seconds(start)} to {show_seconds(end)} ({show_seconds(end - start)})"
        hover += f"<br>{show_bytes(size)}" if size else ""
        kinds.setdefault(kind, []).append((ranks.index(rank), start, end, parts[3] if parts else "", hover, 0.6 if chunk % 2 else 1.0))
    order = [*ACTION_KINDS.values(), OTHER_ACTION]
    return [_kind_trace(kind, order.index(kind), kinds[kind], scale, place) for kind in order if kind in kinds]


def _kind_trace(kind: str, colour: int, bars: list[tuple], scale: float, place: int) -> Figure:
    suffix = "" if place == 0 else str(place + 1)
    heights, starts, ends, texts, hovers, opacities = (list(column) for column in zip(*bars, strict=True))
    return {
        "type": "bar",
        "orientation": "h",
        "name": kind,
        "legendgroup": kind,
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "y": heights,
        "base": [start * scale for start in starts],
        "x": [(end - start) * scale for start, end in zip(starts, ends, strict=True)],
        "width": 0.4 if kind == OTHER_ACTION else 0.8,
        "text": texts,
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "hovertext": hovers,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": part_colour(colour), "opacity": opacities, "line": {"color": "var(--card)", "width": 1}},
    }


def _panel_axes(place: int, ranks: list[int], domain: tuple[float, float], longest: float, unit: str) -> dict[str, Any]:
    suffix = "" if place == 0 else str(place + 1)
    x = {"range": [0, longest * 1.01], "ticksuffix": f" {unit}", "anchor": f"y{suffix}", "nticks": 6} | ({"matches": "x"} if place else {})
    y = {"domain": list(domain), "range": [len(ranks) - 0.5, -0.5], "tickvals": list(range(len(ranks))), "fixedrange": True}
    y |= {"ticktext": [f"rank {rank} " for rank in ranks], "anchor": f"x{suffix}", "showgrid": False}
    return {f"xaxis{suffix}": x, f"yaxis{suffix}": y}


def _panel_title(top: float, text: str) -> dict[str, Any]:
    style = {"xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom", "showarrow": False, "font": {"color": INK}}
    return {"x": 0, "y": top, "text": text, **style}
