"""Generation: text that goes on from prompts with a cache, against transformers' `generate` and PEFT."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.command import main
from benchmarks.harness import Against, Row
from benchmarks.setting import Setting
from benchmarks.writing import WritingSetting

TITLE = "Generation with a cache, against transformers' generate"
LARGER = Setting(layers=12, dim=768, heads=12, ffn=2048, vocab=8192)  # 97.5 M parameters


def rows() -> list[Row]:
    """The rows of this question. Greedy text must be the same."""
    theirs, peft = (Against("write-transformers", "transformers"),), (Against("write-transformers", "transformers with PEFT"),)
    one, note = WritingSetting(), "greedy; the texts are the same"
    return [
        Row("one line", "write-ours", theirs, one, numbers="same", note=note),
        Row("8 lines", "write-ours", theirs, replace(one, lines=8), numbers="same", note=note),
        Row("8 lines, sampled", "write-ours", theirs, replace(one, lines=8, sampled=True), numbers="any", note="top-k 50, top-p 0.95"),
        Row("one line under an adapter", "write-ours", peft, replace(one, adapter=8), numbers="same", note=note),
        Row("one line, 98 M parameters", "write-ours", theirs, replace(one, model=LARGER), numbers="same", note=note),
    ]


if __name__ == "__main__":
    main("generate")
