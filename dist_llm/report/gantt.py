"""The measured step over the simulated one, as a plotly specification: a line per rank, a bar per action."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dist_llm.report.plot import INK, Figure, part_colour, plot_text
from dist_llm.report.units import described, finite, mapping, sequence, show_bytes, show_fraction, show_seconds
from dist_llm.schedule.actions import COMPUTE, Action, Kind, parse

NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "input gradient", Kind.W: "weight gradient", Kind.REDUCE: "reduce"}
MESSAGE = "send and receive"  # and whatever else was recorded
ORDER = (*NAMES.values(), MESSAGE)
ROW, GAP, TOP = 38, 62, 62  # pixels: one rank, between the panels, above the first
PALE = 0.6  # opacity of a rank's second, fourth ... chunk


class Bar(NamedTuple):
    """One recorded action; seconds count from the panel's first start. action is None where `text` is not the text form of one."""

    rank: int
    text: str
    action: Action | None
    start: float
    end: float
    bytes: float | None

    @property
    def name(self) -> str:
        """What the bar is, in words."""
        return NAMES.get(self.action.kind, MESSAGE) if self.action else MESSAGE


def spans_figure(spans: dict[str, Any]) -> Figure | None:
    """Both panels on one time axis. spans: {"measured" and "simulated": [[rank, "2F0", start, end, bytes], ...]}, in seconds."""
    panels = [(how, bars) for how in ("measured", "simulated") if (bars := read_bars(spans.get(how)))]
    if not panels:
        return None
    longest = max(bar.end for _, bars in panels for bar in bars)
    scale, unit = (1.0, "s") if longest >= 1 else (1e3, "ms") if longest >= 1e-3 else (1e6, "µs")
    rooms = [ROW * len({bar.rank for bar in bars}) for _, bars in panels]
    plot = sum(rooms) + GAP * (len(rooms) - 1)
    traces: list[Figure] = []
    layout: dict[str, Any] = {"height": plot + TOP + 34, "barmode": "overlay", "hovermode": "closest", "annotations": []}
    for place, (how, bars) in enumerate(panels):
        ranks = sorted({bar.rank for bar in bars})
        top = 1 - place * (rooms[0] + GAP) / plot
        layout |= _axes(place, ranks, (max(0, top - rooms[place] / plot), top), longest * scale, unit)
        layout["annotations"].append(_title(top, f"<b>{how}</b>  {show_seconds(max(bar.end for bar in bars))}"))
        seen = {trace["name"] for trace in traces}
        traces += [trace | {"showlegend": trace["name"] not in seen} for trace in _traces(bars, ranks, scale, place)]
    layout |= {"legend": {"yref": "container", "yanchor": "top", "y": 1}, "margin": {"t": TOP}}
    return {"data": traces, "layout": layout}


def caption(row: dict[str, Any]) -> str:
    """The bubble of a row, measured and predicted, for the line under its chart."""
    found = {"measured": row.get("bubble_fraction"), "predicted": mapping(row.get("predicted")).get("bubble_fraction")}
    texts = [f"{show_fraction(value)} {how}" for how, value in found.items() if finite(value) is not None]
    return f"Bubble: {', '.join(texts)}." if texts else ""


def read_bars(given: Any) -> list[Bar]:
    """The spans of one panel, with the first start at zero; entries without a rank, a start and an end after it are left out."""
    found = [bar for span in sequence(given) if isinstance(span, list) and (bar := _read_bar(span))]
    first = min((bar.start for bar in found), default=0.0)
    return [bar._replace(start=bar.start - first, end=bar.end - first) for bar in found]


def _read_bar(span: Sequence[Any]) -> Bar | None:
    if len(span) < 4:
        return None
    rank, start, end = finite(span[0]), finite(span[2]), finite(span[3])
    if rank is None or start is None or end is None or end < start:
        return None
    text = described(span[1])
    try:
        action = parse(text)
    except ValueError:
        action = None
    return Bar(int(rank), text, action, start, end, finite(span[4]) if len(span) > 4 else None)


def _traces(bars: list[Bar], ranks: list[int], scale: float, place: int) -> list[Figure]:
    held = sorted({(bar.rank, bar.action.stage) for bar in bars if bar.action and bar.action.kind in COMPUTE})
    chunks = {rank: [stage for at, stage in held if at == rank] for rank in ranks}
    kinds = {name: [bar for bar in bars if bar.name == name] for name in ORDER}
    beside = bool(kinds[MESSAGE] or kinds[NAMES[Kind.REDUCE]])
    return [_trace(name, group, ranks, chunks, scale, place, beside) for name, group in kinds.items() if group]


def _trace(name: str, bars: list[Bar], ranks: list[int], chunks: dict[int, list[int]], scale: float, place: int, beside: bool) -> Figure:
    """One kind of action in one panel; communication is a thin line under the rank's compute."""
    suffix = "" if place == 0 else str(place + 1)
    computes = name in [NAMES[kind] for kind in COMPUTE]
    shift, width = (-0.06 if beside else 0, 0.66 if beside else 0.8) if computes else (0.36 if name == MESSAGE else 0.43, 0.1)
    pale = [bool(computes and bar.action and chunks[bar.rank].index(bar.action.stage) % 2) for bar in bars]
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "legendgroup": name,
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "y": [ranks.index(bar.rank) + shift for bar in bars],
        "base": [bar.start * scale for bar in bars],
        "x": [(bar.end - bar.start) * scale for bar in bars],
        "width": width,
        "text": [str(bar.action.micro) if computes and bar.action else "" for bar in bars],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "hovertext": [_hover(bar) for bar in bars],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {
            "color": part_colour(ORDER.index(name)),
            "opacity": [PALE if is_pale else 1 for is_pale in pale],
            "line": {"color": "var(--card)", "width": 1 if computes else 0},
        },
    }


def _hover(bar: Bar) -> str:
    text = f"{plot_text(bar.text)} on rank {bar.rank}: {bar.name}<br>"
    text += f"{show_seconds(bar.start)} to {show_seconds(bar.end)} ({show_seconds(bar.end - bar.start)})"
    return f"{text}<br>{show_bytes(bar.bytes)}" if bar.bytes else text


def _axes(place: int, ranks: list[int], domain: tuple[float, float], longest: float, unit: str) -> dict[str, Any]:
    suffix = "" if place == 0 else str(place + 1)
    x = {"range": [0, longest * 1.01], "ticksuffix": f" {unit}", "anchor": f"y{suffix}", "nticks": 6} | ({"matches": "x"} if place else {})
    y = {"domain": list(domain), "range": [len(ranks) - 0.5, -0.5], "tickvals": list(range(len(ranks))), "fixedrange": True}
    y |= {"ticktext": [f"rank {rank} " for rank in ranks], "anchor": f"x{suffix}", "showgrid": False}
    return {f"xaxis{suffix}": x, f"yaxis{suffix}": y}


def _title(top: float, text: str) -> dict[str, Any]:
    style = {"xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom", "showarrow": False, "font": {"color": INK}}
    return {"x": 0, "y": top, "text": text, **style}
