"""`compare RUN_A RUN_B`: the first step, and where checkpoints allow it the first tensor, in which two finished runs differ."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError
from dist_llm.train.checkpoint import KINDS
from dist_llm.train.folder import Checkpoint, open_checkpoint, step_folders

TRAIN = "dist-llm train CONFIG --run-dir {run} makes one"
FLOOR = 1e-3  # of the largest value of a kind; see train/proof.py


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """{"steps", "first_step", "loss": [a, b], "relative", "max_relative", "tensor"} of two run folders.

    Losses are compared to the bit (`loss_hex`); first_step is None when all are equal. tensor: the first one that differs in the
    earliest checkpoint that both runs have, or null. Raises DataError where a folder has no metrics or no step in common.
    """
    ours, theirs = _losses(first), _losses(second)
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        what, expected = "these runs have no step in common", "a step with a loss in both"
        raise DataError(
            what,
            where=f"{first}, {second}",
            expected=expected,
            next="name two runs of the same steps",
            found=f"{len(ours)} steps in {first}, {len(theirs)} in {second}",
        )
    found: dict[str, Any] = {"steps": len(common), "first_step": None, "loss": None, "relative": 0.0, "max_relative": 0.0}
    for step in common:
        a, b = float.fromhex(ours[step]), float.fromhex(theirs[step])
        relative = abs(a - b) / max(abs(a), 1e-300)
        found["max_relative"] = max(found["max_relative"], relative)
        if found["first_step"] is None and ours[step] != theirs[step]:
            found |= {"first_step": step, "loss": [a, b], "relative": relative}
    return {**found, "tensor": _first_tensor(first, second)}


def _first_tensor(first: Path, second: Path) -> dict[str, Any] | None:
    """{"step", "kind", "name", "difference"} of the first tensor that differs in the earliest step both runs have saved."""
    ours, theirs = ({path.name: path for path in step_folders(run)} for run in (first, second))
    for name in sorted(ours.keys() & theirs.keys()):
        pair = open_checkpoint(ours[name]), open_checkpoint(theirs[name])
        for checkpoint in pair:
            checkpoint.verify()
        for kind in KINDS:
            if (found := _first_of_kind(*pair, kind)) is not None:
                return {"step": pair[0].step, "kind": kind, **found}
    return None


def _first_of_kind(a: Checkpoint, b: Checkpoint, kind: str) -> dict[str, Any] | None:
    if a.shapes != b.shapes:
        name = next(iter(sorted(set(a.shapes.items()) ^ set(b.shapes.items()))))[0]
        raise DataError("these runs train different models", where=name, found=f"shape {a.shapes.get(name)} and {b.shapes.get(name)}")
    names = [name for name in a.shapes if (kind, name) in a.parts.runs and (kind, name) in b.parts.runs]
    largest = max((float(a.parts.whole(name, kind).abs().max()) for name in names), default=0.0)
    for name in names:
        ours, theirs = (checkpoint.parts.whole(name, kind).double() for checkpoint in (a, b))
        gap = float((ours - theirs).abs().max())
        if gap:
            return {"name": name, "difference": gap / max(float(ours.abs().max()), FLOOR * largest)}
    return None


def _losses(run: Path) -> dict[int, str]:
    """step -> loss_hex of a run's metrics."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        found = "no metrics.jsonl" if run.is_dir() else "no such folder"
        way = TRAIN.format(run=shlex.quote(str(run)))
        raise DataError("no finished run here", where=str(run), expected="a run folder with metrics.jsonl", found=found, next=way)
    losses = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if record.get("loss_hex"):
                losses[int(record["step"])] = float.fromhex(record["loss_hex"]).hex()
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            what, expected = "a line of the metrics cannot be read", '{"step": 1, "loss_hex": "0x1.5p+2"}, and more'
            raise DataError(what, where=f"{path}:{number}", expected=expected, found=line[:80]) from error
    return losses
