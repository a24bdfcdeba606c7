"""Pipeline schedules at world 2, 4 micro-batches: ours against torch.distributed.pipelining."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.command import main
from benchmarks.harness import Against, Row
from benchmarks.interval import faster
from benchmarks.setting import Setting

TITLE = "Pipeline schedules against torch.distributed.pipelining"


def rows() -> list[Row]:
    """The rows of this question."""
    setting = replace(Setting(), micro_batches=4)
    one_f_one_b = Against("torch-pipeline:1f1b", "torch 1F1B", faster(0.9), known_peak=341, known_sent=4.2)
    gpipe = Against("torch-pipeline:gpipe", "torch GPipe", faster(0.9), known_peak=534, known_sent=4.2)
    return [
        Row("1F1B", "ours:pp=2,schedule=1f1b", (one_f_one_b,), setting, 2, peak=0.6, sent=4.2),
        Row("GPipe", "ours:pp=2,schedule=gpipe", (gpipe,), setting, 2, sent=4.2),
    ]


if __name__ == "__main__":
    main("pipeline")
