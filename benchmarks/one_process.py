"""One process: ours against transformers' Llama and a plain loop."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.command import main
from benchmarks.harness import Against, Row
from benchmarks.interval import faster
from benchmarks.setting import Setting

TITLE = "One process against transformers' Llama and a plain loop"


def rows() -> list[Row]:
    """The rows of this question."""
    rivals = (
        Against("transformers", "transformers", faster(0.85), known_peak=955),
        Against("plain", "plain loop", faster(0.9), known_peak=1036),
    )
    return [
        Row("one process", "ours:dp=1", rivals, Setting(), peak=0.5),
        Row("one process, two threads", "ours:dp=1", rivals, replace(Setting(), threads=2), peak=0.5),
    ]


if __name__ == "__main__":
    main("one-process")
