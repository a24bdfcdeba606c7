"""Tensor parallelism at world 2: ours against DTensor's `parallelize_module`, with and without sequence parallelism."""

from __future__ import annotations

from benchmarks.command import main
from benchmarks.harness import Against, Row
from benchmarks.interval import faster
from benchmarks.setting import Setting

TITLE = "Tensor parallelism against DTensor's parallelize_module"


def rows() -> list[Row]:
    """The rows of this question."""
    setting = Setting()
    tokens = setting.batch * setting.sequence
    # Four reductions a layer and one at each end; the loss may add three scalars a token.
    sent = 4 * tokens * ((4 * setting.layers + 2) * setting.dim + 3) / 1e6
    rivals = (
        Against("dtensor", "DTensor", faster(0.67), known_peak=708, known_sent=185),
        Against("dtensor:sp", "DTensor, SP", faster(0.67), known_peak=686, known_sent=164),
    )
    return [
        Row(
            f"tp=2, {name}", f"ours:{layout}",
            (*rivals, Against(f"ours-sockets:{layout}", "ours through sockets", judged=False)),
            setting, 2, peak=0.55, sent=round(sent, 1),
        )
        for name, layout in (("SP", "tp=2,sp=on"), ("no SP", "tp=2,sp=off"))
    ]  # fmt: skip


if __name__ == "__main__":
    main("tensor-parallel")
