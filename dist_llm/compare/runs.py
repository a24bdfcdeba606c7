"""`compare RUN_A RUN_B`: the first step, and where checkpoints allow it the first tensor, in which two finished runs differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """{"steps", "first_step", "loss": [a, b], "relative", "max_relative"} of two run folders; first_step is None when all losses are equal.

    Losses are compared to the bit (`loss_hex`). Raises DataError where a folder has no metrics or no step in common.
    """
    ours, theirs = _losses(first), _losses(second)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        raise DataError("these runs have no step in common", found=f"{len(ours)} steps in {first}, {len(theirs)} in {second}")
    found: dict[str, Any] = {"steps": len(common), "first_step": None, "loss": None, "relative": 0.0, "max_relative": 0.0}
    for step in common:
        a, b = float.fromhex(ours[step]), float.fromhex(theirs[step])
        relative = abs(a - b) / max(abs(a), 1e-300)
        found["max_relative"] = max(found["max_relative"], relative)
        if found["first_step"] is None and ours[step] != theirs[step]:
            found |= {"first_step": step, "loss": [a, b], "relative": relative}
    return found


def _losses(run: Path) -> dict[int, str]:
    """step -> loss_hex of a run's metrics."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise DataError("no finished run here", where=str(run), expected="a run folder with metrics.jsonl")
    losses = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            if record.get("loss_hex"):
                losses[int(record["step"])] = str(record["loss_hex"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError("a line of the metrics cannot be read", where=f"{path}:{number}", found=line[:80]) from error
    return losses
