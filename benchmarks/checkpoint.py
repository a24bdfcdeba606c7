"""Checkpoints: saving, what a save in the background costs training, and taking up, against torch.distributed.checkpoint."""

from __future__ import annotations

from benchmarks.checkpointing import LAYOUTS
from benchmarks.command import main
from benchmarks.harness import Against, Row
from benchmarks.interval import faster
from benchmarks.setting import Setting

TITLE = "Saving and loading a checkpoint, against torch.distributed.checkpoint"


def rows() -> list[Row]:
    """The rows of this question. A save in the background stalls training for less than a tenth of the time of one that it waits for."""
    setting = Setting()
    save, take = (Against("save-dcp", "DCP"),), (Against("load-dcp", "DCP"),)
    waited = (Against("save-ours", "ours, training waits", faster(0.1)), Against("save-dcp", "DCP"))
    hashed = "ours also hashes, reads back and commits; DCP has no hashes"
    checked = "ours compares every byte with its hash before a weight changes; DCP compares nothing"
    return [
        Row("stall of a save in the background, one process", "save-behind", waited, setting, numbers="any"),
        Row("save, one process", "save-ours", save, setting, numbers="any", note=hashed),
        Row(f"save, {LAYOUTS[2]}", "save-ours", save, setting, world=2, numbers="any", note=hashed),
        Row("load, one process", "load-ours", take, setting, numbers="same", note=checked),
        Row(f"load, {LAYOUTS[2]}", "load-ours", take, setting, world=2, numbers="any", note=checked),
    ]


if __name__ == "__main__":
    main("checkpoint")
