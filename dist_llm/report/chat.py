"""The page of `data preview` for conversations: which tokens are trained, and what the data looks like as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from dist_llm.report.page import write_page
from dist_llm.report.units import show_count, show_fraction, shown

CONTENT = """{% extends "base" %}
{% block content %}
<h1>{{ title }}</h1>
<section class="verdict equal">
<p class="sentence">{{ sentence }}</p>
{{ fact_list(facts) }}
</section>
<section>
<h2>{{ noun }}</h2>
<p class="note">What is marked is trained: the model learns to say it. The rest it only reads. An edge in another colour, and a number
after it, are weights other than 1. Point at a token for its id and weight.</p>
{% for sample in samples %}
<div class="sample"><div class="step">sequence {{ sample.sequence }}<br>{{ sample.size }}
{% if sample.side %}<br>{{ sample.side }}{% endif %}</div>
<div class="turns">{{ sample.text }}</div></div>
{% endfor %}
</section>
<section>
<h2>Template</h2>
<p class="note">{{ template.note }}</p>
<pre>{{ template.text }}</pre>
</section>
{% endblock %}
"""


def write_chat_page(preview: dict[str, Any], path: Path) -> None:
    """Write the page of a preview, the content of `data preview --json` with `template_text`, in one move."""
    counts = preview["counts"]
    facts = [
        ("template", preview["template"]),
        ("format", ", ".join(preview["formats"])),
        ("trained on", preview["train_on"]),
        (preview["noun"], show_count(counts["samples"])),
        ("tokens", show_count(counts["tokens"])),
        ("trained", f"{show_count(counts['trained_tokens'])}, {show_fraction(counts['trained_share'])}"),
        ("sequences", f"{show_count(counts['sequences'])} of {preview['sequence']} tokens"),
        ("padding", show_fraction(counts["padding_share"])),
        ("padding without packing", show_fraction(counts["padding_share_unpacked"])),
        ("longest", f"{show_count(counts['longest'])} tokens"),
        ("too long", f"{show_count(counts['too_long'])}, {show_count(counts['left_out'])} left out, {show_count(counts['cut'])} cut"),
        ("ends a turn", " ".join(preview["stops"])),
    ]
    samples = [
        {
            "sequence": row["row"],
            "size": f"{sum(map(len, row['ids']))} tokens",
            "side": row.get("side"),
            "text": _tokens(row["pieces"], row["ids"], row["weights"]),
        }
        for row in preview["rows"]
    ]
    sentence = f"{show_fraction(counts['trained_share'])} of {show_count(counts['tokens'])} tokens are trained"
    note = "As it is rendered, in a sandbox. What lies between generation and endgeneration is the assistant's."
    context = {"title": preview["title"], "noun": preview["noun"].capitalize(), "sentence": sentence, "facts": facts, "samples": samples}
    write_page(path, CONTENT, {**context, "template": {"note": note, "text": preview["template_text"]}}, {})


def _tokens(pieces: list[str], ids: list[list[int]], weights: list[float]) -> Markup:
    """The pieces of a conversation, each escaped and in an element of its own."""
    parts = []
    for place, (piece, numbers, weight) in enumerate(zip(pieces, ids, weights, strict=True)):
        kind = "" if weight == 0 else "trained" if weight == 1 else "trained more" if weight > 1 else "trained less"
        lines = Markup('<i class="break">⏎</i>\n').join(escape(_line(line)) for line in piece.split("\n"))
        last = place + 1 == len(weights) or weights[place + 1] != weight
        mark = Markup("<sub>×{}</sub>").format(f"{weight:g}") if weight not in (0, 1) and last else ""
        title = f"id {', '.join(map(str, numbers))}, weight {weight:g}"
        parts.append(Markup('<span class="{}" title="{}">{}</span>{}').format(kind, title, lines, mark))
    return Markup("").join(parts)


def _line(text: str) -> str:
    return shown(text) if text else ""
