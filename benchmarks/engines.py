"""Engines and ZeRO stages at worlds 2 and 4: ours against DDP, ZeroRedundancyOptimizer, FSDP2 and DeepSpeed."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.command import main
from benchmarks.harness import Against, Row
from benchmarks.interval import faster, not_slower
from benchmarks.setting import Setting

TITLE = "Engines and ZeRO stages against DDP, ZeroRedundancyOptimizer, FSDP2 and DeepSpeed"
OVERSUBSCRIBED = "four ranks: on fewer than four cores they fill each other's gaps"


def rows() -> list[Row]:
    """The rows of this question."""
    wide = replace(Setting(), layers=4, dim=768, heads=12, ffn=2048, sequence=128, batch=4)
    return [
        *stages(Setting(), 2),
        wide_stage_3(wide),
        *same_kernels(Setting(), 2),
        *(replace(row, note=OVERSUBSCRIBED) for row in stages(Setting(), 4)),
    ]


def stages(setting: Setting, world: int) -> list[Row]:
    """The four stages. The figures are of world 2; at world 4 times are shown and the rest is judged alike."""
    judged = world == 2
    whole = 2 * 4 * setting.parameters / 1e6  # MB of an all-reduce of float32 gradients by n / (n - 1)
    part = (world - 1) / world

    def against(key: str, label: str, time=None, peak=None, sent=None) -> Against:
        return Against(key, label, time if judged else None, known_peak=peak if judged else None, known_sent=sent if judged else None)

    deepspeed = {stage: (f"deepspeed:{stage}", f"DeepSpeed zero={stage}") for stage in range(4)}
    return [
        Row(
            f"zero=0, world {world}", f"ours:dp={world},zero=0",
            (against("ddp", "DDP", not_slower(), 641, 23.3), against(*deepspeed[0])),
            setting, world, peak=0.6, sent=round(whole * part, 1),
        ),
        Row(
            f"zero=1, world {world}", f"ours:dp={world},zero=1",
            (
                against("zero-redundancy", "ZeroRedundancyOptimizer", faster(0.93), 637, 34.9),
                against(*deepspeed[1], faster(0.93), 760, 34.9),
            ),
            setting, world, peak=0.55, sent=round(whole * part, 1),
        ),
        Row(
            f"zero=2, world {world}", f"ours:dp={world},zero=2",
            (against("fsdp2:keep", "FSDP2, no reshard", faster(0.9), 577, 34.8), against(*deepspeed[2], faster(0.9), 740, 34.9)),
            setting, world, peak=0.6, sent=round(whole * part, 1),
        ),
        Row(
            f"zero=3, world {world}", f"ours:dp={world},zero=3",
            (against("fsdp2:reshard", "FSDP2", faster(0.83), 589, 46.4), against(*deepspeed[3], faster(0.83), 812, 34.9)),
            setting, world, peak=0.55, sent=31.1 if judged else None,
        ),
    ]  # fmt: skip


def wide_stage_3(setting: Setting) -> Row:
    """Stage 3 where parameters, not activations, fill the memory."""
    rivals = (Against("fsdp2:reshard", "FSDP2", faster(0.83)), Against("deepspeed:3", "DeepSpeed zero=3", faster(0.83)))
    return Row("zero=3, wide model, world 2", "ours:dp=2,zero=3", rivals, setting, 2, peak=0.55)


def same_kernels(setting: Setting, world: int) -> list[Row]:
    """The libraries around our own model code: what is left is the engine. And our engine as it is where ranks share no memory."""
    pairs = {0: ("ddp", "deepspeed"), 1: ("deepspeed",), 2: ("fsdp2", "deepspeed"), 3: ("fsdp2", "deepspeed")}
    return [
        Row(
            f"zero={stage}, same kernels, world {world}", f"ours:dp={world},zero={stage}",
            (
                *(Against(f"ours:dp={world},zero={stage},engine={name}", f"our model in {name}") for name in names),
                Against(f"ours-sockets:dp={world},zero={stage}", "ours through sockets", judged=False),
            ),
            setting, world,
        )
        for stage, names in pairs.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main("engines")
