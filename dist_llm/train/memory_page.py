"""A page of a CUDA device's memory over some steps, from the allocator's own record: a curve, and what was alive at its top.

torch's page for this (torch.cuda._memory_viz) carries a pickle and loads its script from the network. This one is a file
by itself: a picture and a table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

POINTS = 2000  # of the curve: of all between two of them the largest is shown
ROWS = 40
WIDTH, HEIGHT = 1000, 320
BEFORE = "before these steps"
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body {{ font: 14px system-ui, sans-serif; margin: 2rem; max-width: 70rem }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: left }}
td:first-child, td:nth-child(2) {{ text-align: right; font-variant-numeric: tabular-nums }}
svg {{ width: 100%; background: #f4f4f6 }}</style>
<h1>{title}</h1>
<p>Live tensors: {start} at first, {peak} at most, {end} at last; {events} events of the allocator.</p>
<svg viewBox="0 0 {width} {height}" role="img" aria-label="live bytes over the allocator's events">
<polyline points="{points}" fill="none" stroke="#2456a6" stroke-width="1.5"/></svg>
<h2>Alive at the top</h2>
<table><tr><th>MiB</th><th>tensors</th><th>made in</th></tr>{rows}</table></html>
"""


@dataclass(frozen=True)
class Timeline:
    """Live bytes before the first event and after each, and what was alive at their largest: place -> (bytes, tensors)."""

    live: list[int]
    at_peak: dict[str, tuple[int, int]]


def memory_page(snapshot: dict[str, Any], *, title: str) -> str:
    """The page of what `torch.cuda.memory._snapshot` gives, of the device with the most events."""
    device = max(range(len(snapshot["device_traces"])), key=lambda at: len(snapshot["device_traces"][at]), default=None)
    events = [] if device is None else snapshot["device_traces"][device]
    end = sum(block["size"] for segment in snapshot["segments"] if segment["device"] == device for block in _active(segment))
    found = timeline(events, end=end)
    rows = sorted(found.at_peak.items(), key=lambda item: -item[1][0])[:ROWS]
    cells = "".join(f"<tr><td>{size / 2**20:.1f}</td><td>{count}</td><td>{escape(place)}</td></tr>" for place, (size, count) in rows)
    numbers = {name: f"{size / 2**20:,.1f} MiB" for name, size in (("start", found.live[0]), ("peak", max(found.live)), ("end", end))}
    shape = {"width": WIDTH, "height": HEIGHT, "points": _points(found.live)}
    return PAGE.format(title=escape(title), events=len(found.live) - 1, rows=cells, **numbers, **shape)


def _active(segment: dict[str, Any]) -> Iterable[dict[str, Any]]:
    return (block for block in segment["blocks"] if block["state"] == "active_allocated")


def timeline(events: Sequence[dict[str, Any]], *, end: int) -> Timeline:
    """The allocator's events in order (actions alloc and free_requested, with addr, size and frames); end: live bytes after them."""
    steps = [(event, 1 if event["action"] == "alloc" else -1) for event in events if event["action"] in ("alloc", "free_requested")]
    live = [end - sum(sign * event["size"] for event, sign in steps)]
    for event, sign in steps:
        live.append(live[-1] + sign * event["size"])
    alive: dict[int, tuple[int, str]] = {}
    before = live[0]
    for event, sign in steps[: live.index(max(live))]:
        if sign > 0:
            alive[event["addr"]] = event["size"], place(event.get("frames", ()))
        elif event["addr"] in alive:
            del alive[event["addr"]]
        else:
            before -= event["size"]
    at_peak: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for size, where in alive.values():
        at_peak[where] = at_peak[where][0] + size, at_peak[where][1] + 1
    return Timeline(live, {**at_peak, **({BEFORE: (before, 1)} if before else {})})


def place(frames: Iterable[dict[str, Any]]) -> str:
    """The innermost line of ours in a stack that is given innermost first, else the innermost line."""
    known = [f"{frame['filename']}:{frame['line']} {frame['name']}" for frame in frames]
    ours = [text[text.index("dist_llm/") :] for text in known if "dist_llm/" in text]
    return next(iter([*ours, *known]), "unknown")


def _points(live: Sequence[int]) -> str:
    """The curve as SVG points."""
    width, top = max(1, -(-len(live) // POINTS)), max(1, *live)
    shown = [max(live[at : at + width]) for at in range(0, len(live), width)]
    return " ".join(f"{at * WIDTH / max(1, len(shown) - 1):.1f},{HEIGHT - (HEIGHT - 10) * size / top:.1f}" for at, size in enumerate(shown))
