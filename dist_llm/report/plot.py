"""What all figures share: the colours of the theme by name, and text made safe for plotly.

A colour is `var(--name)`: the page's script puts in the value of the theme that is shown. All text that comes from data passes
through `plot_text`, since plotly reads some HTML tags in labels.
"""

from __future__ import annotations

import html
from typing import Any

from dist_llm.report.units import shown

Figure = dict[str, Any]
SERIES, PARTS = 12, 6  # colours of the theme: one per layout, one per category
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
