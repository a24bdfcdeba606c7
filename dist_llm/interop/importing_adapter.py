"""PEFT's adapter folder becomes a run folder of ours: a checkpoint of step 0 beside the base that it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from dist_llm.config.schema import Config
from dist_llm.data.tokenizer import load
from dist_llm.interop.first import write_first
from dist_llm.interop.given import open_adapter, require_apart
from dist_llm.interop.importing import LONGEST, Imported, refuse_run
from dist_llm.model.table import num_trained, table
from dist_llm.train.base import Base
from dist_llm.train.parts import Part
from dist_llm.train.storage import RunFolder


def import_adapter(source: Path, run: Path, *, base_path: Path) -> Imported:
    """Makes the run folder `run` from PEFT's folder; it trains on, is sampled from and merged like one of ours.

    Raises UsageError where the adapter is of another base or does what is not done here, CheckpointError where a file is not sound.
    """
    refuse_run(run)
    base = Base(base_path)
    try:
        given = open_adapter(source, base)
        require_apart(given, base, where=str(source), way="the same command with --base PATH")
        rows = [row for row in table(given.model) if row.trained]
        part = _part({row.name: given.matrices.whole(row.name) for row in rows})
        tokenizer = load(base.path)
        data = {"sequence": max(2, min(base.sequence, LONGEST)), "tokenizer": {"kind": "file", "path": str(base.path / "tokenizer.json")}}
        tree = {"base": str(base.path), "model": given.model.model_dump(), "data": data, "save": {"dir": f"{run}-trained"}}
        config = Config.model_validate(tree)
        known = (base.identity, base.weights)
        path = write_first(RunFolder(run), config, part, tokenizer=tokenizer, beside=base.beside_files(), base=known)
        return Imported(path, given.model.family, num_trained(given.model), sum(tensor.nbytes for tensor in part.tensors), given.note)
    finally:
        base.close()


def _part(tensors: dict[str, Tensor]) -> Part:
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    runs: dict[str, dict[str, Any]] = {}
    for name in names:
        box = tuple((0, extent) for extent in tensors[name].shape)
        runs[f"weight/{name}/0"] = {"box": box, "start": 0, "stop": tensors[name].numel()}
    return Part(runs, [tensors[name].flatten() for name in names])
