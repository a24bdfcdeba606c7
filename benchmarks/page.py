"""docs/benchmarks.md, made from the kept results: the newest of each question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.command import QUESTIONS
from benchmarks.text import findings, mb, pair, shown, span, time_of, verdicts
from dist_llm.errors import UsageError

HEAD = """# Benchmarks

Made by `dist-llm bench --page` from the newest results; do not edit. How each number is taken, and how to take it again,
is in [benchmarks/README.md](../benchmarks/README.md).

Times are ratios ours / rival of the same round: median and 95 % interval of order statistics; below 1 ours is faster.
*CPU time* is the same ratio of the processor seconds of all ranks, which other processes disturb less. *peak* is live
tensor memory of the fullest rank, *resident* the growth of its process, *sent* what a rank sent in a step: through sockets as
the kernel counts it, through memory that ours share as it is written there.
"""
COLUMNS = ("row", "rival", "time, ours / rival", "figure", "", "CPU time", "peak MB", "resident MB", "sent MB")


def write(results: Path, page: Path) -> str:
    """Writes the page from the newest file of each question; returns its path. Raises UsageError where there is none."""
    found = [newest for question in QUESTIONS if (newest := _newest(results, question)) is not None]
    if not found:
        raise UsageError("there are no results to make a page of", where=str(results), next="dist-llm bench one-process")
    page.write_text(made(found))
    return str(page)


def _newest(results: Path, question: str) -> dict[str, Any] | None:
    paths = sorted(results.glob(f"{question}-[0-9]*.json"))
    return json.loads(paths[-1].read_text()) if paths else None


def made(results: list[dict[str, Any]]) -> str:
    """The page's text."""
    parts = [HEAD, _summary(results)]
    for result in results:
        parts.append(f"## {result['title']}\n")
        parts.append(_environment(result) + "\n")
        parts.append(_table(result["rows"]))
        parts += [f"- {row['name']}: {'; '.join(_notes(row))}." for row in result["rows"]]
        parts.append("")
    return "\n".join(parts)


def _summary(results: list[dict[str, Any]]) -> str:
    found = verdicts(results)
    lines = [", ".join(f"{len(names)} figures {kind}" for kind, names in found.items()) + "."]
    for kind in ("missed", "undecided"):
        lines += [f"\n{kind.capitalize()}:\n", *(f"- {name}" for name in found[kind])] if found[kind] else []
    return "\n".join(lines) + "\n"


def _environment(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    memory = machine["memory_bytes"] / 2**30
    return f"{machine['cpu']}, {machine['cores']} cores, {memory:.0f} GiB, {machine['system']}, Python {machine['python']}; {packages}."


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    for row in rows:
        lines += [_line(_cells(row, rival)) for rival in row["rivals"]]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(row: dict[str, Any], rival: dict[str, Any]) -> list[str]:
    ours, failed = row["ours"], rival["error"]
    if failed:
        return [row["name"], rival["label"], f"could not run: {failed['what']}", *[""] * (len(COLUMNS) - 3)]
    judged = {"missed": "**missed**", "undecided": "**undecided**", "met": "met", None: ""}[rival["verdict"]]
    sent = [mb(one["sent_bytes"]) or 0.0 for one in (ours, rival)]
    return [
        row["name"],
        rival["label"],
        time_of(row, rival),
        rival["figure"] or "",
        judged,
        span(rival["cpu"]),
        pair(mb(ours.get("peak_bytes")), mb(rival.get("peak_bytes"))),
        pair(mb(ours["peak_rss_bytes"]), mb(rival["peak_rss_bytes"])),
        " / ".join(shown(value) for value in sent) if any(sent) else "-",
    ]


def _notes(row: dict[str, Any]) -> list[str]:
    model = row["setting"]
    size = [f"{model['parameters'] / 1e6:.1f} M parameters, {model['batch']} x {model['sequence']} tokens"] if "parameters" in model else []
    note = [row["note"]] if row["note"] else []
    return [*size, *findings(row), *note, f"{row['when']}, `{row['command']}`"]
