"""What can be known of a run's disk before its first step. Torch-free."""

from __future__ import annotations

import shutil
from pathlib import Path

from dist_llm.config.schema import Config, ModelConfig, OptimizerConfig
from dist_llm.errors import SpaceError
from dist_llm.model.table import num_trained, table
from dist_llm.train.folder import committed, writable

HEADS = 512  # bytes that a tensor's run takes in headers and indices, at most
TOKENIZER = 160  # bytes of tokenizer.json for a token, as others write it


def checkpoint_bytes(model: ModelConfig, optimizer: OptimizerConfig, *, dtype: str, world: int) -> tuple[int, int]:
    """(bytes of the tensors, bytes of all else at most) of one checkpoint. dtype: of the weights that are trained.

    Weights are kept as the optimizer has them: four bytes where they are trained in bfloat16. AdamW has two moments, SGD one
    with momentum.
    """
    kinds = 1 + (2 if optimizer.kind == "adamw" else int(optimizer.momentum > 0))
    width = 8 if dtype == "float64" else 4
    return kinds * width * num_trained(model), kinds * len(table(model)) * world * HEADS + model.vocab * TOKENIZER + (1 << 16)


def copies_to_come(config: Config, *, held: int) -> int:
    """How many checkpoints a run can have more than now at one time: `keep` and the one being written; keep 0: all it will make."""
    every, steps, keep = config.save.every, config.schedule.steps, config.save.keep
    made = -(-steps // every) if every else 1
    return max(1, min(keep + 1, held + made) - min(keep + 1, held)) if keep else max(1, made - held)


def require_space(run: Path, config: Config, *, dtype: str, world: int) -> None:
    """Raises SpaceError where the file system of a run's folder has no room for its checkpoints, or they cannot be written."""
    if not writable(run):
        expected, way = "a folder that can be written", "the same command with --run-dir DIR"
        raise SpaceError("checkpoints cannot be written here", where=str(run), expected=expected, found="no right to write there", next=way)
    tensors, rest = checkpoint_bytes(config.model, config.optimizer, dtype=dtype, world=world)
    copies, free = copies_to_come(config, held=len(committed(run))), shutil.disk_usage(run).free
    need = copies * (tensors + rest)
    if need > free:
        parts = f"{num_trained(config.model):,} parameters x {tensors // num_trained(config.model)} bytes + {rest:,} of the rest"
        raise SpaceError(
            "the disk has no room for the checkpoints of this run",
            where=str(run),
            expected=f"{need:,} bytes = {copies} checkpoints x {tensors + rest:,} ({parts})",
            found=f"{free:,} bytes free",
            safe="nothing was started",
            next="the same command with --run-dir DIR on another disk, or a smaller save.keep or larger save.every",
        )
