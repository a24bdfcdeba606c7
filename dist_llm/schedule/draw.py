"""Pictures of a step from its spans, simulated or measured alike: a text grid, an SVG, a trace for Perfetto."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dist_llm.schedule.actions import ALL, COMPUTE, Kind, Span
from dist_llm.schedule.simulate import Simulation, summary

NAMES = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
    Kind.SEND_F: "send forward",
    Kind.RECV_F: "receive forward",
    Kind.SEND_B: "send backward",
    Kind.RECV_B: "receive backward",
    Kind.REDUCE: "reduce",
}
THREADS = ["compute", *(name for kind, name in NAMES.items() if kind not in COMPUTE)]


def grid(spans: Sequence[Span], *, ranks: int, columns: int = 120) -> str:
    """Ranks from top to bottom, time from left to right, as plain text of about `columns` characters a line at most.

    Wide form, where it fits: each cell is the shortest action's time and names what runs, `F0` or, with several stages on a rank,
    `4F0`; dashes continue it, a dot is idle. Narrow form: one character per cell, a digit for a forward, a letter for a backward
    (0 and a are micro-batch 0, 10, 20 ...).
    """
    step = summary(spans, ranks=ranks)
    compute = [span for span in spans if span.action.kind in COMPUTE and span.end > span.start]
    if not compute:
        return "nothing was computed\n"
    begin = min(span.start for span in spans)
    quantum = min(span.end - span.start for span in compute)
    chunked = len({span.action.stage for span in compute}) > len({span.rank for span in compute})
    labels = {span: str(span.action) if chunked else str(span.action).removeprefix(str(span.action.stage)) for span in compute}
    width = max(map(len, labels.values())) + 1
    margin = len(f"rank {ranks - 1}") + 2
    wide = step.makespan / quantum * width + margin <= columns
    if not wide:
        quantum = max(quantum, step.makespan / (columns - margin))
    rows = [["." + " " * (width - 1) if wide else "."] * max(1, round(step.makespan / quantum)) for _ in range(ranks)]
    for span in compute:
        first, last = round((span.start - begin) / quantum), round((span.end - begin) / quantum)
        for column in range(first, min(last, len(rows[span.rank]))):
            if not wide:
                rows[span.rank][column] = _letter(span)
            elif column == first:
                rows[span.rank][column] = labels[span].ljust(width)
            else:
                rows[span.rank][column] = "-" * (width - 1) + " "
    lines = [f"rank {rank}".ljust(margin) + "".join(row).rstrip() for rank, row in enumerate(rows)]
    return "\n".join([*lines, " " * margin + _figures(step, quantum)]) + "\n"


def _letter(span: Span) -> str:
    digit = span.action.micro % 10
    return {Kind.F: str(digit), Kind.B: "abcdefghij"[digit], Kind.I: "ABCDEFGHIJ"[digit]}.get(span.action.kind, "+")


def _figures(step: Simulation, quantum: float | None = None) -> str:
    parts = [] if quantum is None else [f"one cell {_seconds(quantum)}"]
    parts += [f"step {_seconds(step.makespan)}", f"bubble {100 * step.bubble_fraction:.1f} %"]
    return ", ".join([*parts, f"micro-batches in flight {' '.join(map(str, step.in_flight))}"])


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} us"


def trace(spans: Sequence[Span]) -> dict:
    """The spans as a Chrome trace, for `json.dump`: open it at https://ui.perfetto.dev. A process per rank, a thread per kind of work."""
    begin = min((span.start for span in spans), default=0.0)
    events: list[dict] = []
    for rank in sorted({span.rank for span in spans}):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"pipeline rank {rank}"}})
        threads = {_thread(span.action.kind) for span in spans if span.rank == rank}
        events += [{"ph": "M", "name": "thread_name", "pid": rank, "tid": at, "args": {"name": THREADS[at]}} for at in sorted(threads)]
    for span in spans:
        action = span.action
        events.append(
            {
                "ph": "X",
                "name": str(action),
                "cat": NAMES[action.kind],
                "pid": span.rank,
                "tid": _thread(action.kind),
                "ts": (span.start - begin) * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"stage": action.stage, "micro_batch": None if action.micro == ALL else action.micro, "bytes": span.bytes},
            }
        )
    return {"displayTimeUnit": "ms", "traceEvents": events}


def _thread(kind: Kind) -> int:
    return 0 if kind in COMPUTE else THREADS.index(NAMES[kind])


# The SVG: one band per rank with the compute actions, and under it two thin lines for messages and reductions.
FILLS = {Kind.F: "#8ab8f0", Kind.B: "#8fd3a4", Kind.I: "#7fd6d6", Kind.W: "#f5c76e"}
LINES = {Kind.SEND_F: "#4c6fae", Kind.SEND_B: "#3d8a5a", Kind.REDUCE: "#a06cc4"}
INK, FAINT, GRID, EMPTY = "#1b1f24", "#59636e", "#d9dee3", "#f3f5f7"
LEFT, TOP, BAND, BAR, RIGHT = 76, 84, 44, 28, 24


@dataclass(frozen=True)
class _Scale:
    begin: float
    per_second: float

    def x(self, seconds: float) -> float:
        return LEFT + (seconds - self.begin) * self.per_second


def svg(spans: Sequence[Span], *, ranks: int, title: str = "Pipeline schedule", width: int = 1200) -> str:
    """A standalone picture: a band per rank with its compute, thin lines under it for sends and reductions, an axis in seconds, a legend.

    On a rank with several stages the later ones are paler. Pointing at a bar shows its action, times and bytes.
    """
    step = summary(spans, ranks=ranks)
    scale = _Scale(min((span.start for span in spans), default=0.0), (width - LEFT - RIGHT) / (step.makespan or 1.0))
    height = TOP + BAND * ranks + 40
    drawn = [span for span in spans if span.end > span.start and span.action.kind in FILLS | LINES]
    depth = _depths(spans)
    note = "; paler: later stages of the same rank" if any(depth.values()) else ""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
            f' font-family="system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            _text(16, 26, title, size=16, weight=600),
            _text(16, 46, _figures(step) + note, fill=FAINT),
            *_legend({span.action.kind for span in drawn}),
            *(_track(rank, width) for rank in range(ranks)),
            *_axis(scale, step.makespan, ranks),
            *(_bar(span, scale, depth[span.rank, span.action.stage]) for span in drawn if span.action.kind in FILLS),
            *(_line(span, scale) for span in drawn if span.action.kind in LINES),
            "</svg>\n",
        ]
    )


def _track(rank: int, width: int) -> str:
    """The empty band of a rank: what stays visible of it is idle time."""
    band = f'<rect x="{LEFT}" y="{_top(rank)}" width="{width - LEFT - RIGHT}" height="{BAR}" fill="{EMPTY}"/>'
    return band + _text(LEFT - 10, _top(rank) + BAR / 2 + 4, f"rank {rank}", anchor="end")


def _top(rank: int) -> float:
    return TOP + BAND * rank


def _depths(spans: Sequence[Span]) -> dict[tuple[int, int], int]:
    """(rank, stage) -> which of the rank's stages it is, counted from 0."""
    stages: dict[int, set[int]] = defaultdict(set)
    for span in spans:
        stages[span.rank].add(span.action.stage)
    return {(rank, stage): depth for rank, own in stages.items() for depth, stage in enumerate(sorted(own))}


def _bar(span: Span, scale: _Scale, depth: int) -> str:
    x, width = scale.x(span.start), (span.end - span.start) * scale.per_second
    gap = 1.0 if width > 4 else 0.0
    label = str(span.action.micro)
    text = _text(x + width / 2, _top(span.rank) + BAR / 2 + 4, label, anchor="middle", size=11) if width > 7 * len(label) + 3 else ""
    return (
        f'<g><rect x="{x:.2f}" y="{_top(span.rank)}" width="{max(width - gap, 0.3):.2f}" height="{BAR}" rx="{2 if gap else 0}" '
        f'fill="{FILLS[span.action.kind]}" fill-opacity="{max(0.4, 1 - 0.22 * depth):.2f}"/>{text}{_hint(span, scale)}</g>'
    )


def _line(span: Span, scale: _Scale) -> str:
    y = _top(span.rank) + BAR + (3 if span.action.kind is not Kind.REDUCE else 8)
    width = max((span.end - span.start) * scale.per_second, 0.8)
    colour = LINES[span.action.kind]
    return f'<rect x="{scale.x(span.start):.2f}" y="{y}" width="{width:.2f}" height="4" fill="{colour}">{_hint(span, scale)}</rect>'


def _hint(span: Span, scale: _Scale) -> str:
    size = f", {span.bytes} bytes" if span.bytes else ""
    start, length = _seconds(span.start - scale.begin), _seconds(span.end - span.start)
    return f"<title>{span.action} on rank {span.rank}: {NAMES[span.action.kind]}, from {start} for {length}{size}</title>"


def _legend(kinds: set[Kind]) -> list[str]:
    parts, x = [], 16.0
    for kind in (kind for kind in Kind if kind in kinds and kind in FILLS | LINES):
        tall = kind in FILLS
        colour = FILLS[kind] if tall else LINES[kind]
        parts.append(f'<rect x="{x}" y="{58 if tall else 62}" width="14" height="{12 if tall else 4}" fill="{colour}"/>')
        parts.append(_text(x + 19, 68, NAMES[kind], fill=FAINT))
        x += 36 + 6.6 * len(NAMES[kind])
    return parts


def _axis(scale: _Scale, makespan: float, ranks: int) -> list[str]:
    """Vertical lines at round times, with their labels below the bands."""
    if makespan <= 0:
        return []
    power = 10.0 ** math.floor(math.log10(makespan / 10))
    tick = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 10 >= makespan * (1 - 1e-9))
    bottom = _top(ranks) - BAND + BAR + 16
    parts = []
    for count in range(int(makespan / tick + 1e-9) + 1):
        x = scale.x(scale.begin + count * tick)
        parts.append(f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{TOP - 6}" y2="{bottom}" stroke="{GRID}"/>')
        parts.append(_text(x, bottom + 16, _seconds(count * tick) if count else "0", anchor="middle", fill=FAINT, size=11))
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = INK, size: int = 12, weight: int = 400) -> str:
    style = f'text-anchor="{anchor}" fill="{fill}" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:.2f}" y="{y:.2f}" {style}>{escape(text)}</text>'
