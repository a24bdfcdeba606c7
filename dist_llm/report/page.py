"""Write report.html: one page that holds its data, its style and plotly, and reaches for nothing else.

Safety: data enters the page in two ways only, as text through jinja2 with autoescape, and as JSON in an inert block; control characters
are replaced in both. The content security policy allows exactly our scripts, by hash, and no request of any kind.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup, escape

from dist_llm import __version__
from dist_llm.report import template
from dist_llm.report.figures import comparison_figures
from dist_llm.report.plot import SERIES
from dist_llm.report.run import MOST_SAMPLES, Run, read_run, run_answers, run_facts, run_figures, run_sentence
from dist_llm.report.script import SCRIPT
from dist_llm.report.style import STYLE
from dist_llm.report.text import (
    KINDS,
    difference_place,
    label,
    reference_name,
    reference_row,
    rows_of,
    sent_bytes,
    state,
    step_ratio,
    verdict,
)
from dist_llm.report.units import (
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

COLUMNS = (
    ("layout", "text"),
    ("equal", "text"),
    ("loss", ""),
    ("gradient", ""),
    ("parameter", ""),
    ("moment", ""),
    ("step time", ""),
    ("tokens/s", ""),
    ("peak memory", ""),
    ("bytes per step", ""),
    ("bubble", ""),
)
OUTCOMES = {  # of a row's state: text, tone; in the order they sort in
    "reference": ("reference", ""),
    "equal": ("✓ equal", "good"),
    "unknown": ("not proved", "warn"),
    "differs": ("✗ differs", "bad"),
    "failed": ("✗ did not run", "bad"),
}


def write_comparison_page(comparison: dict[str, Any], path: Path, *, title: str | None = None) -> None:
    """Write the page of a comparison (the content of comparison.json); missing and null keys leave out what needs them."""
    figures = comparison_figures(comparison)
    reference = reference_row(comparison)
    context = {
        "title": title or "Comparison of layouts",
        "verdict": verdict(comparison),
        "facts": comparison_facts(comparison),
        "reference": reference_name(comparison),
        "columns": COLUMNS,
        "rows": [table_row(row, index, reference) for index, row in enumerate(rows_of(comparison))],
        "spans": [label(rows_of(comparison)[index]) for index, *_ in figures.get("spans", [])],
        "command": _command(comparison.get("command")),
        "environment": [(shown(key), described(value)) for key, value in mapping(comparison.get("environment")).items()],
    }
    write_page(path, template.COMPARISON, context, figures)


def write_run_page(run_dir: Path, path: Path) -> None:
    """Write the page of a training run from its folder: metrics.jsonl, config.yaml and samples.jsonl, each optional."""
    run = read_run(run_dir)
    context = {
        "title": f"Training run {run_dir.resolve().name}",
        "sentence": run_sentence(run),
        "facts": run_facts(run),
        "unreadable": run.unreadable,
        "answers": run_answers(run),
        "samples": _samples(run),
        "config": run.config,
    }
    write_page(path, template.RUN, context, run_figures(run))


def comparison_facts(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """Model, dtypes, steps, ranks and date, each as far as the rows name it."""
    rows = rows_of(comparison)
    proofs = [mapping(row.get("proof")) for row in rows]
    when = comparison.get("when") or mapping(comparison.get("environment")).get("when")
    found = [
        ("proved on", _distinct(proof.get("model") for proof in proofs)),
        ("proved in", _distinct(proof.get("dtype") for proof in proofs)),
        ("proof steps", _distinct(proof.get("steps") for proof in proofs)),
        ("ranks", _distinct(sorted(world for row in rows if (world := finite(row.get("world"))) is not None))),
        ("engines", _distinct(row.get("engine") for row in rows)),
        ("when", described(when) if when else ""),
    ]
    return [(name, value) for name, value in found if value]


def _distinct(values: Any) -> str:
    texts = [f"{value:g}" if isinstance(value, float) else described(value) for value in values if value is not None]
    return ", ".join(dict.fromkeys(texts))


def table_row(row: dict[str, Any], index: int, reference: dict[str, Any] | None) -> dict[str, Any]:
    """One line of the page's table: its texts, what each column sorts by, and the predicted value under a measured one."""
    found = "reference" if row is reference and state(row) in ("equal", "unknown") else state(row)
    outcome, tone = OUTCOMES[found]
    engine = described(row.get("engine") or "native")
    under = [f"engine {engine}"] if engine != "native" and engine not in label(row) else []
    canonical = " ".join(shown(row.get("layout") or "").split())
    under += [canonical] if canonical and canonical != label(row) else []
    if state(row) == "differs" and (place := difference_place(row)):
        under.append(f"first in {place}")
    return {
        "label": label(row),
        "colour": index % SERIES + 1,
        "has_loss": any(finite(value) is not None for key in ("loss", "losses") for value in sequence(row.get(key))),
        "under": "; ".join(under),
        "outcome": outcome,
        "tone": tone,
        "order": list(OUTCOMES).index(found),
        "error": described(row["error"]) if state(row) == "failed" else "",
        "cells": [*_difference_cells(row), *_cost_cells(row, reference)],
    }


def _difference_cells(row: dict[str, Any]) -> list[dict[str, Any]]:
    tolerance = number(mapping(row.get("proof")).get("tolerance"))
    values = [number(row.get(f"max_{kind}_difference")) for kind in KINDS]
    past = [tolerance is not None and value is not None and not value <= tolerance for value in values]
    return [_cell(value, show_difference(value), tone="bad" if bad else "") for value, bad in zip(values, past, strict=True)]


def _cost_cells(row: dict[str, Any], reference: dict[str, Any] | None) -> list[dict[str, Any]]:
    predicted = mapping(row.get("predicted"))
    ratio = step_ratio(row, reference) if row is not reference else None
    peak, sent = max(finite_numbers(row.get("peak_memory_bytes")), default=None), sent_bytes(row)
    parts = mapping(predicted.get("memory_bytes"))
    memory = finite(parts.get("total")) if "total" in parts else sum(finite_numbers(list(parts.values()))) or None
    forecast = sent_bytes({"sent_bytes_per_step": predicted.get("sent_bytes_per_step")})
    sizes = mapping(row.get("sent_bytes_per_step"))
    axes = [f"{shown(axis)} {show_bytes(size)}" for axis, size in sizes.items() if axis != "control" and finite(size)]
    return [
        _cost(show_seconds, row.get("step_seconds"), predicted.get("step_seconds"), [f"{ratio:.2f}×"] if ratio else []),
        _cost(show_count, row.get("tokens_per_second"), predicted.get("tokens_per_second")),
        _cost(show_bytes, peak, memory),
        _cost(show_bytes, sent, forecast, axes if len(axes) > 1 else []),
        _cost(show_fraction, row.get("bubble_fraction"), predicted.get("bubble_fraction")),
    ]


def _cost(show: Callable[[Any], str], measured: Any, predicted: Any, under: list[str] | None = None) -> dict[str, Any]:
    text, forecast = show(measured), show(predicted)
    known = [] if finite(predicted) is None else ["as predicted"] if forecast == text else [f"predicted {forecast}"]
    return _cell(measured, text, [*(under or []), *known])


def _cell(value: Any, text: str, under: list[str] | None = None, tone: str = "") -> dict[str, Any]:
    sort = number(value)
    key = "" if sort is None else "Infinity" if math.isnan(sort) else repr(sort).replace("inf", "Infinity")
    return {"value": key, "text": text, "under": "\n".join(under or []), "tone": tone}


def _command(command: Any) -> str:
    return " ".join(shown(word) for word in command) if isinstance(command, list) else shown(command) if command else ""


def _samples(run: Run) -> list[tuple[str, str, str]]:
    found = []
    for record in run.samples[-MOST_SAMPLES:]:
        prompt, text = shown(record.get("prompt") or ""), shown(record.get("text") or "")
        found.append((described(record.get("step")), prompt, text.removeprefix(prompt) if prompt else text))
    return found


def write_page(path: Path, content: str, context: dict[str, Any], figures: dict[str, Any]) -> None:
    """Render a template with a context, `title` in it, and put the page in place in one move: a reader never sees half of it."""
    pages = Environment(
        loader=DictLoader({"base": template.BASE, "content": content}),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else shown(value),
        trim_blocks=True,
    )
    pages.filters["breakable"] = breakable
    plotly = inline(plotly_source()) if figures else ""
    text = pages.get_template("content").render(
        **context,
        drawn=list(figures),
        figures=Markup(embedded(figures)) if figures else "",
        plotly=Markup(plotly),
        script=Markup(inline(SCRIPT)),
        style=Markup(STYLE),
        policy=policy(scripts=[plotly, inline(SCRIPT)] if figures else [], style=STYLE),
        version=__version__,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.unlink(missing_ok=True)  # it may be a link to somewhere else
        with unfinished.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def breakable(text: str) -> Markup:
    """Text that may break after its commas, where a layout is long."""
    return Markup(escape(shown(text)).replace(",", Markup(",<wbr>")))


def plotly_source() -> str:
    """plotly.js as the installed plotly package ships it."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def inline(script: str) -> str:
    """A script as it may stand in a script element: no end tag inside, line ends as the HTML parser leaves them (it is hashed so)."""
    return script.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def embedded(data: Any) -> str:
    """Data as JSON that is inert inside HTML: ASCII only, no angle bracket or ampersand, no NaN, control characters replaced."""
    text = json.dumps(_clean(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _clean(data: Any) -> Any:
    if isinstance(data, dict):
        return {shown(key): _clean(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_clean(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return shown(data) if isinstance(data, str) else data


def policy(*, scripts: list[str], style: str) -> str:
    """The content security policy: these scripts and this style, nothing from anywhere.

    plotly makes empty style elements at run time and fills them by script, hence the hash of the empty text, and it positions text with
    style attributes, hence the attribute rule; neither can load anything under default-src 'none'.
    """
    allowed = " ".join(_source_hash(script) for script in scripts) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src-elem {_source_hash(style)} {_source_hash('')}; "
        "style-src-attr 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
