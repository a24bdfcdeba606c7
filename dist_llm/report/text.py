"""What a comparison says, in words and as a table for the terminal.

`comparison` is the content of comparison.json (version 1). Any key may be missing or null; nothing here raises for that.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dist_llm.report.units import (
    MISSING,
    described,
    finite,
    finite_numbers,
    mapping,
    number,
    sequence,
    show_bytes,
    show_count,
    show_difference,
    show_fraction,
    show_seconds,
    shown,
)

if TYPE_CHECKING:
    from rich.table import Table

KINDS = ("loss", "gradient", "parameter", "moment")
COLUMNS = ("layout", "equal", "max diff", "step time", "tokens/s", "peak memory", "bytes/step", "bubble")
UNEQUAL = (("differs", "differs", "differ"), ("failed", "could not run", "could not run"), ("unknown", "was not proved", "were not proved"))
LONGEST_LABEL = 64


def rows_of(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the comparison, the reference among them where it was measured too."""
    return [row for row in sequence(comparison.get("layouts")) if isinstance(row, dict)]


def label(row: dict[str, Any]) -> str:
    """The layout's name: as typed, else canonical; one line, cut to 64 characters."""
    text = " ".join(shown(row.get("given") or row.get("layout") or "unnamed layout").split())
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def reference_name(comparison: dict[str, Any]) -> str:
    """The name of the layout that the others are held against."""
    named = [comparison.get("reference"), *(mapping(row.get("proof")).get("reference") for row in rows_of(comparison))]
    return next((described(name) for name in named if name), "the reference")


def reference_row(comparison: dict[str, Any]) -> dict[str, Any] | None:
    """The first row whose layout is the reference; None where the reference was not measured as a row."""
    name = reference_name(comparison)
    return next((row for row in rows_of(comparison) if name in (row.get("layout"), row.get("given"))), None)


def state(row: dict[str, Any]) -> str:
    """`failed` (could not run), `equal`, `differs` or `unknown` (ran, but nothing was proved)."""
    if row.get("error"):
        return "failed"
    if row.get("equal") is True:
        return "equal"
    return "differs" if row.get("equal") is False else "unknown"


def largest_difference(row: dict[str, Any]) -> float | None:
    """The largest of the loss, gradient, parameter and moment differences; NaN counts as the largest."""
    found = [value for kind in KINDS if (value := number(row.get(f"max_{kind}_difference"))) is not None]
    return max(found, key=lambda value: (value != value, value), default=None)


def step_ratio(row: dict[str, Any], reference: dict[str, Any] | None) -> float | None:
    """Step time over the reference's step time."""
    mine, theirs = finite(row.get("step_seconds")), finite((reference or {}).get("step_seconds"))
    return mine / theirs if mine is not None and theirs else None


def sent_bytes(row: dict[str, Any]) -> float | None:
    """Bytes one rank sends per step, over all axes."""
    sizes = mapping(row.get("sent_bytes_per_step"))
    return sum(finite_numbers(list(sizes.values()))) if sizes else None


def difference_place(row: dict[str, Any]) -> str:
    """Where a row first departs from the reference: `gradient layers.0.wq, step 1, rank 2`; empty where nothing is known."""
    first = mapping(row.get("first_difference"))
    tensor = " ".join(described(first[key]) for key in ("kind", "name") if first.get(key) is not None)
    place = [f"{key} {described(first[key])}" for key in ("step", "rank") if first.get(key) is not None]
    return ", ".join([tensor, *place] if tensor else place)


def difference_sentence(row: dict[str, Any]) -> str:
    """The place of the first difference with its size, the tolerance and the hint; empty where no place is known."""
    place, first = difference_place(row), mapping(row.get("first_difference"))
    if not place:
        return ""
    tolerance = number(mapping(row.get("proof")).get("tolerance"))
    limit = f" (tolerance {show_difference(tolerance)})" if tolerance is not None else ""
    hint = f". {described(first['hint'])}" if first.get("hint") else ""
    return f"{place}: {show_difference(first.get('difference'))}{limit}{hint}"


@dataclass
class Verdict:
    """The outcome in one sentence. state: `equal`, `differs` or `unknown`; findings: (layout, what happened) per row that is not equal."""

    state: str
    sentence: str
    findings: list[tuple[str, str]] = field(default_factory=list)


def verdict(comparison: dict[str, Any]) -> Verdict:
    """Say whether every layout equals the reference, and which does not and why."""
    reference, name = reference_row(comparison), reference_name(comparison)
    rows = [row for row in rows_of(comparison) if row is not reference or state(row) in ("differs", "failed")]
    if not rows:
        return Verdict("unknown", "No layout was compared.")
    states = Counter(state(row) for row in rows)
    within = _within([row for row in rows if state(row) == "equal"])
    if states["equal"] == len(rows):
        who = f"{len(rows)} layouts, all equal" if len(rows) > 1 else f"{label(rows[0])} is equal"
        return Verdict("equal", f"{who} to {name}{within}")
    rest = ", ".join(f"{states[key]} {one if states[key] == 1 else many}" for key, one, many in UNEQUAL if states[key])
    outcome = "differs" if states["differs"] or states["failed"] else "unknown"
    sentence = f"{states['equal']} of {len(rows)} layouts equal to {name}{within if states['equal'] else ''}; {rest}"
    return Verdict(outcome, sentence, [(label(row), _finding(row)) for row in rows if state(row) in ("differs", "failed")])


def _finding(row: dict[str, Any]) -> str:
    if row.get("error"):
        return f"could not run: {described(row['error'])}"
    where = difference_sentence(row)
    return f"differs first in {where}" if where else f"differs by {show_difference(largest_difference(row))}"


def _within(rows: list[dict[str, Any]]) -> str:
    """` within 1e-10 (float64, 3 steps)`; with counts where the rows were proved in several ways."""
    ways = Counter(_way(row) for row in rows)
    if len(ways) == 1:
        return next(f" {way}" if way else "" for way in ways)
    return ": " + ", ".join(f"{count} {way or 'by an unnamed proof'}" for way, count in ways.most_common()) if ways else ""


def _way(row: dict[str, Any]) -> str:
    proof = mapping(row.get("proof"))
    steps = finite(proof.get("steps"))
    inside = [described(proof["dtype"])] if proof.get("dtype") else []
    inside += [f"{steps:.0f} step{'s' if steps != 1 else ''}"] if steps is not None else []
    tolerance = number(proof.get("tolerance"))
    words = [f"within {show_difference(tolerance)}"] if tolerance is not None else []
    return " ".join(words + ([f"({', '.join(inside)})"] if inside else []))


def cells(row: dict[str, Any], reference: dict[str, Any] | None) -> list[str]:
    """The texts of one terminal row, in the order of `COLUMNS`."""
    outcome = {"equal": "yes", "differs": "NO", "failed": "did not run", "unknown": "-"}[state(row)]
    ratio = step_ratio(row, reference)
    step = show_seconds(row.get("step_seconds")) + (f" ({ratio:.2f}x)" if ratio is not None and row is not reference else "")
    peak = max(finite_numbers(row.get("peak_memory_bytes")), default=None)
    found = [
        label(row),
        "reference" if row is reference and state(row) in ("equal", "unknown") else outcome,
        show_difference(largest_difference(row)),
        step,
        show_count(row.get("tokens_per_second")),
        show_bytes(peak),
        show_bytes(sent_bytes(row)),
        show_fraction(row.get("bubble_fraction")),
    ]
    return [text.replace(MISSING, "-") for text in found]


def plain_table(comparison: dict[str, Any]) -> str:
    """The comparison as aligned text: verdict, one line per layout, then a line per row that is not equal."""
    outcome, reference = verdict(comparison), reference_row(comparison)
    lines = [list(COLUMNS), *(cells(row, reference) for row in rows_of(comparison))]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    sides = [str.ljust if column < 2 else str.rjust for column in range(len(COLUMNS))]
    texts = ["  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)) for line in lines]
    texts.insert(1, "  ".join("-" * width for width in widths))
    findings = [" ".join(f"{name}: {finding}".split()) for name, finding in outcome.findings]
    return "\n".join(line.rstrip() for line in [outcome.sentence, "", *texts, *([""] if findings else []), *findings]) + "\n"


def table(comparison: dict[str, Any]) -> Table:
    """The comparison as a rich table: the verdict as its title, what is not equal as its caption. Data is never read as markup."""
    from rich.table import Table
    from rich.text import Text

    outcome, reference = verdict(comparison), reference_row(comparison)
    findings = "\n".join(f"{name}: {finding}" for name, finding in outcome.findings)
    colour = {"equal": "green", "differs": "red"}.get(outcome.state, "yellow")
    made = Table(
        title=Text(outcome.sentence, style=f"bold {colour}"),
        caption=Text(findings, style="red") if findings else None,
        title_justify="left",
        caption_justify="left",
    )
    for index, column in enumerate(COLUMNS):
        least = 14 if index == 0 else None
        made.add_column(column, justify="left" if index < 2 else "right", no_wrap=index > 1, overflow="fold", min_width=least)
    styles = {"equal": "green", "differs": "bold red", "failed": "bold red", "unknown": "yellow"}
    for row in rows_of(comparison):
        texts = cells(row, reference)
        style = "" if texts[1] == "reference" else styles[state(row)]
        made.add_row(*(Text(text, style=style if index == 1 else "") for index, text in enumerate(texts)))
    return made
