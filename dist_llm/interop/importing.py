"""A Hugging Face folder becomes a run folder of ours: a sealed checkpoint of step 0, its tokenizer, and a config to train on from it.

    RUN/checkpoints/step-00000000/    one rank's tensors in the dtypes they had, the tokenizer, and what else lay beside the weights
    RUN/config.yaml                   the model, and the checkpoint as its base

Tensors pass through one piece after the other. There are no moments: before a first step they are zero.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.config.schema import Config
from dist_llm.data.tokenizer import Tokenizer, load
from dist_llm.errors import NumericError, SpaceError, UsageError
from dist_llm.interop.first import write_first
from dist_llm.interop.hugging_face import HuggingFaceFolder, no_folder
from dist_llm.interop.safe_file import unsound
from dist_llm.interop.slices import TORCH, Slices
from dist_llm.model.table import table
from dist_llm.train.durable import BLOCK, Bytes
from dist_llm.train.folder import step_folders
from dist_llm.train.nonfinite import finite
from dist_llm.train.parts import Part
from dist_llm.train.storage import RunFolder

LONGEST = 2048  # tokens of a sequence that the config asks for where the model could read more
ABOUT = 512  # bytes that the index and the header need for a tensor, at most; and those of a block's hash
HASH = 36


@dataclass(frozen=True)
class Imported:
    """What was made: the step folder, the number of parameters, the bytes of the weights; note: what a user should know."""

    path: Path
    family: str
    parameters: int
    bytes: int
    note: str | None = None


def import_folder(source: Path, run: Path) -> Imported:
    """Makes the run folder `run` from a Hugging Face folder; nothing of it is there when that fails.

    Raises CheckpointError (a file is not sound), UsageError (a model or tokenizer that cannot be ours, a run folder in use),
    NumericError (weights that are not finite), SpaceError.
    """
    if not source.is_dir():
        (found, hub), expected = no_folder(source), "a folder as Hugging Face lays it out"
        way = hub and f"{hub}, then: dist-llm import {source.name} {shlex.quote(str(run))}"
        raise unsound("there is no model here", source, expected=expected, found=found, next=way)
    folder = HuggingFaceFolder(source)
    try:
        tokenizer = _tokenizer(folder)
        config = _config(folder, run)
        refuse_run(run)
        made = [path for path in (run, *run.parents) if not path.exists()]
        try:
            return _write(folder, tokenizer, config, run)
        except BaseException:
            if made:
                shutil.rmtree(made[-1], ignore_errors=True)
            raise
    finally:
        folder.close()


def _tokenizer(folder: HuggingFaceFolder) -> Tokenizer:
    """The tokenizer of a folder, which the model can read. Raises UsageError."""
    if "tokenizer.json" not in folder.beside:
        name = str(folder.path)
        advice = f"in Python, AutoTokenizer.from_pretrained({name!r}).save_pretrained({name!r}), then the same command again"
        raise UsageError("the folder has no tokenizer.json", where=name, expected="a fast tokenizer", found="no such file", next=advice)
    tokenizer = load(folder.path)
    if tokenizer.rows() > folder.model.vocab:
        what, expected = "the tokenizer has more tokens than the model", f"at most {folder.model.vocab}, the vocab_size of config.json"
        raise UsageError(what, where=str(folder.path), expected=expected, found=f"{tokenizer.rows()} tokens")
    return tokenizer


def _config(folder: HuggingFaceFolder, run: Path) -> Config:
    """A config that trains on from the checkpoint, in a run folder beside it."""
    step = run / "checkpoints" / "step-00000000"
    sequence = max(2, min(folder.model.max_positions, LONGEST))
    data = {"sequence": sequence, "tokenizer": {"kind": "file", "path": str(step / "tokenizer.json")}}
    tree = {"base": str(step), "model": folder.model.model_dump(), "data": data, "save": {"dir": f"{run}-trained"}}
    return Config.model_validate(tree)


def refuse_run(run: Path) -> None:
    """Raises UsageError where a folder already holds something."""
    if run.exists() and (not run.is_dir() or step_folders(run)):
        found, way = step_folders(run)[0].name if run.is_dir() else "a file", "name another folder for the run"
        raise UsageError("the run folder already holds a run", where=str(run), expected="a new folder", found=found, next=way)


def _write(folder: HuggingFaceFolder, tokenizer: Tokenizer, config: Config, run: Path) -> Imported:
    held, part = RunFolder(run), Streamed.of(folder)
    size = sum(tensor.nbytes for tensor in part.tensors)
    _require_room(run, size + size // BLOCK * HASH + ABOUT * len(part.tensors) + sum(map(len, folder.beside.values())))
    final = write_first(held, config, part, tokenizer=tokenizer, beside=folder.beside)
    others = "the templates of additional_chat_templates are not carried along: chat_template.jinja is the only one here"
    note = others if (folder.path / "additional_chat_templates").is_dir() else None
    return Imported(final, config.model.family, sum(tensor.numel() for tensor in part.tensors), size, note)


def _require_room(run: Path, need: int) -> None:
    """Raises SpaceError where the disk has less."""
    free = shutil.disk_usage(run).free
    if need > free:
        expected = f"{need:,} bytes"
        raise SpaceError("the disk has no room for these weights", where=str(run), expected=expected, found=f"{free:,} bytes free")


@dataclass(frozen=True)
class Streamed(Part):
    """The part of the only rank, whose elements come from the folder when their turn comes. tensors: their shapes and dtypes alone."""

    source: Slices
    names: tuple[str, ...]

    @classmethod
    def of(cls, folder: HuggingFaceFolder) -> Streamed:
        """All tensors of the table, wide elements first."""
        sources = folder.sources
        names = sorted((row.name for row in table(folder.model)), key=lambda name: -sources[name].stored.width)
        runs: dict[str, dict[str, Any]] = {}
        tensors: list[Tensor] = []
        for name in names:
            shape, dtype = sources[name].shape, TORCH[sources[name].stored.dtype]
            runs[f"weight/{name}/0"] = {"box": tuple((0, extent) for extent in shape), "start": 0, "stop": prod(shape)}
            tensors.append(torch.empty(prod(shape), dtype=dtype, device="meta"))
        return cls(runs, tensors, Slices(folder), tuple(names))

    def chunks(self) -> Iterator[Bytes]:
        """The bytes of the file. Raises NumericError: what is not finite is never saved."""
        yield self.header
        for name in self.names:
            for values in self.source.stream(name):
                if not finite(values):
                    one = self.source.folder.sources[name]
                    what, where = "a weight is not finite", f"{one.file.path}, {one.place.key}"
                    raise NumericError(what, where=where, expected="finite numbers", safe="nothing was written")
                yield values.view(torch.uint8).numpy().data
