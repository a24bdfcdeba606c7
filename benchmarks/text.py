"""Results in words: one line per rival, for a terminal, for plain text and for the page."""

from __future__ import annotations

from typing import Any

from benchmarks.interval import COVERAGE

COLUMNS = ("row", "rival", "time, ours / rival", "figure", "time is", "CPU time", "peak MB, ours / rival", "resident MB", "sent MB")


def mb(values: list[float] | None) -> float | None:
    """The largest of the ranks, in MB."""
    return max(values) / 1e6 if values else None


def cells(row: dict[str, Any], rival: dict[str, Any]) -> list[str]:
    """The texts of one line, in the order of COLUMNS."""
    ours, failed = row["ours"], rival["error"]
    if failed:
        return [row["name"], rival["label"], "could not run", "", "", f"{failed['what']}: {failed['next'] or failed['found']}", "", "", ""]
    return [
        row["name"],
        rival["label"],
        time_of(row, rival),
        rival["figure"] or "-",
        rival["verdict"] or "-",
        span(rival["cpu"]),
        pair(mb(ours.get("peak_bytes")), mb(rival.get("peak_bytes"))),
        pair(mb(ours["peak_rss_bytes"]), mb(rival["peak_rss_bytes"])),
        _sent(ours, rival),
    ]


def time_of(row: dict[str, Any], rival: dict[str, Any]) -> str:
    """`0.840 [0.820, 0.860], 12 rounds`."""
    return f"{span(rival['time'])}, {row['rounds']} rounds" if rival["time"] else "-"


def span(found: dict[str, float] | None) -> str:
    """`0.840 [0.820, 0.860]`; with too few rounds for an interval it is their range, which is said."""
    if found is None:
        return "-"
    return f"{found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" + ("" if found["coverage"] >= COVERAGE else " (range)")


def pair(ours: float | None, rival: float | None) -> str:
    """`312 / 641 = 0.49`."""
    if ours is None or rival is None:
        return "-"
    return f"{shown(ours)} / {shown(rival)} = {ours / rival:.2f}" if rival else f"{shown(ours)} / {shown(rival)}"


def shown(value: float) -> str:
    """A number of MB."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _sent(ours: dict[str, Any], rival: dict[str, Any]) -> str:
    mine, theirs = mb(ours["sent_bytes"]), mb(rival["sent_bytes"])
    return f"{mine:.1f} / {theirs:.1f}" if mine or theirs else "-"


def findings(row: dict[str, Any]) -> list[str]:
    """The figures of memory and bytes, and what disturbed the measuring, as sentences."""
    found = []
    for kind in ("peak", "resident"):
        if memory := row[kind]:
            found.append(f"{kind} {memory['ratio']:.2f}x the best judged rival's, figure <= {memory['figure']:g}x: {memory['verdict']}")
    if known := row.get("predicted"):  # results of before there were predictions have none
        found.append(f"peak {known['difference']:+.1%} from the predicted one, figure within {known['figure']:.0%}: {known['verdict']}")
    if row["sent"]:
        sent = row["sent"]
        found.append(f"sent by our books {sent['mb']:.1f} MB a rank and step, figure <= {sent['figure']:g}: {sent['verdict']}")
    read = {one["label"]: mb(one.get("read_bytes")) or 0.0 for one in (row["ours"], *row["rivals"])}
    if min(read.values()) > 1.0:
        found.append(f"read by a rank: {', '.join(f'{label} {shown(value)} MB' for label, value in read.items())}")
    during = row["during"]
    disturbed = f"stolen {during['stolen_fraction']:.1%}, other processes {during['others_fraction']:.0%} of the cores"
    return [*found, f"{disturbed}, load {during['load_average'][0]:g}"]


def verdicts(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What was met, missed and left undecided, each as `row: figure`."""
    found: dict[str, list[str]] = {"met": [], "missed": [], "undecided": []}
    for result in results:
        for row in result["rows"]:
            for rival in row["rivals"]:
                if rival["verdict"]:
                    found[rival["verdict"]].append(f"{row['name']}: time against {rival['label']} {rival['figure']}")
            for kind, unit in (("peak", "x"), ("resident", "x"), ("sent", " MB")):
                if row[kind]:
                    found[row[kind]["verdict"]].append(f"{row['name']}: {kind} <= {row[kind]['figure']:g}{unit}")
            if known := row.get("predicted"):
                found[known["verdict"]].append(f"{row['name']}: peak within {known['figure']:.0%} of the predicted one")
    return found


def plain_table(rows: list[dict[str, Any]]) -> str:
    """Aligned text, the findings of a row below its lines."""
    lines = [list(COLUMNS), *(cells(row, rival) for row in rows for rival in row["rivals"])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    texts.insert(1, "  ".join("-" * width for width in widths))
    notes = [f"{row['name']}: {'; '.join(findings(row))}" for row in rows]
    return "\n".join([*texts, "", *notes])
