"""The weights that a run begins with: a checkpoint of ours of any layout, or a Hugging Face folder. Torch-free until they are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.config.base import Facts, of_weights
from dist_llm.config.schema import ModelConfig, SaveConfig
from dist_llm.errors import CheckpointError, UsageError
from dist_llm.interop.hugging_face import HuggingFaceFolder, is_hugging_face, no_folder
from dist_llm.model.table import table
from dist_llm.sidefiles import SLOW_TOKENIZER_FILES, TOKENIZER_FILES
from dist_llm.strict import strict_json
from dist_llm.train.folder import ANOTHER, MANIFEST, Checkpoint, newest, open_checkpoint, step_folders

if TYPE_CHECKING:
    from dist_llm.data.prepare import Prepared
    from dist_llm.train.parts import Source

OTHER_BASE = "a sound copy in its place, or the same command with base=PATH"  # to do where a base is damaged
SAMPLE = 1024  # elements of every tensor that weights are known by
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


class Base:
    """An opened base. path: the step folder, or the folder of Hugging Face's. Raises CheckpointError or UsageError.

    kept: a checkpoint of a run that began with it. Where the base's run folder is named, the step that the run began with is meant, and
    where that is gone the checkpoint knows all but the weights, which only an adapter still needs.
    """

    def __init__(self, given: str | Path, *, kept: Checkpoint | None = None) -> None:
        path, before = Path(given).expanduser(), kept.config.base if kept is not None else None
        if before is not None and Path(before).parent.name == "checkpoints" and _same(path, Path(before).parent.parent):
            path = Path(before)  # its run may have gone on since
        self.folder: HuggingFaceFolder | None = None
        self.checkpoint: Checkpoint | None = None
        self.gone = not path.is_dir() and before is not None and _same(path, Path(before))
        if kept is not None and self.gone:
            if kept.config.model.adapter.rank:
                raise self._lost(path, kept.manifest.get("base"), "the base that this adapter lies beside is gone")
            self.checkpoint, self.path = kept, path
            return
        if not path.is_dir():
            expected = "a run folder or step folder, or a Hugging Face folder"
            seen, hub = no_folder(path)
            way = f"{hub}, and base={path.name}" if hub else "the same command with base=PATH"
            raise CheckpointError("there is no base here", where=str(path), expected=expected, found=seen, next=way)
        self.folder = HuggingFaceFolder(path) if is_hugging_face(path) else None
        try:
            self.checkpoint = None if self.folder else open_checkpoint(path)
        except CheckpointError as error:
            error.next = OTHER_BASE if error.next == ANOTHER else error.next
            raise
        self.path = path if self.checkpoint is None else self.checkpoint.path
        if self.model.adapter.rank:
            what, advice = "the base is an adapter and not a model", "dist-llm merge BASE ADAPTER DIR, and DIR as the base"
            raise UsageError(what, where=str(self.path), expected="all weights of a model", found="an adapter's alone", next=advice)

    @staticmethod
    def _lost(path: Path, identity: str | None, what: str) -> CheckpointError:
        expected, way = f"the weights {str(identity)[:16]}, which the run began with", "put them back there, or name a copy: base=PATH"
        return CheckpointError(what, where=str(path), expected=expected, found="no such folder", next=way)

    @property
    def model(self) -> ModelConfig:
        """The model of the weights."""
        return self.folder.model if self.folder else self._opened.config.model

    @property
    def _opened(self) -> Checkpoint:
        assert self.checkpoint is not None
        return self.checkpoint

    @cached_property
    def identity(self) -> str:
        """What tells these weights from others: the hash of the manifest, or of a Hugging Face folder's config and headers."""
        if self.gone:
            return self._opened.manifest["base"]
        return self.folder.identity() if self.folder else hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    @cached_property
    def weights(self) -> str:
        """What tells these weights from others in whatever form they lie: a hash of the model, and of the shape, the dtype and the first
        elements of every tensor.

        A Hugging Face folder, its import and an export of that in the same dtypes are one. Raises CheckpointError.
        """
        import torch

        source, total = self.source(), hashlib.sha256(json.dumps(of_weights(self.model.model_dump()), sort_keys=True).encode())
        for row in table(self.model):
            values = source.read("weight", row.name, tuple((0, extent) for extent in row.shape), 0, min(SAMPLE, row.numel))
            total.update(f"{row.name} {row.shape} {values.dtype} ".encode() + values.contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    @cached_property
    def tokenizer(self) -> str:
        """The hash of the tokenizer whose ids the weights know."""
        if self.checkpoint is not None:
            return self.checkpoint.manifest["tokenizer"]
        from dist_llm.data.tokenizer import load

        return load(self.path).hash

    def facts(self) -> Facts:
        """What a config takes from it."""
        model = self.model.model_dump(exclude={"adapter", "neftune"})
        if not self.gone:
            return Facts(str(self.path), model, str(self.path / "tokenizer.json"))
        return Facts(str(self.path), model, str(self._opened.path / "tokenizer.json"), self._opened.config.data.tokenizer.path)

    def require_tokenizer(self, found: str, *, where: str = "data.tokenizer") -> None:
        """Raises UsageError when a run's tokenizer is another: its ids would mean other things. Tokens that a template adds come after."""
        if found != self.tokenizer:
            what, expected = "the tokenizer is not the one that the base was trained with", f"hash {self.tokenizer[:16]}, of {self.path}"
            advice = "leave data.tokenizer out: the base's own is taken"
            raise UsageError(what, where=where, expected=expected, found=f"hash {found[:16]}", next=advice)

    def beside(self, prepared: Prepared) -> Prepared:
        """The data of a run, with the base's identity and the files that are carried along. Raises UsageError for another tokenizer.

        Where a template has made tokens special the tokenizer is the run's own, and the base's files of it stay behind.
        """
        self.require_tokenizer(prepared.plain)
        behind = (*TOKENIZER_FILES, *SLOW_TOKENIZER_FILES) if prepared.plain != prepared.tokenizer.hash else ()
        beside = {name: content for name, content in self.beside_files().items() if name not in behind}
        own = prepared.tokenizer.chat_template
        return replace(prepared, base=self.identity, beside=with_template(beside, own) if own and not behind else beside)

    def beside_files(self) -> dict[str, bytes]:
        """name -> content of the files beside its weights."""
        return self.folder.beside if self.folder else self._opened.beside

    @property
    def sequence(self) -> int:
        """Tokens that it was trained to see, as far as is known."""
        return self.folder.model.max_positions if self.folder else self._opened.config.data.sequence

    def source(self) -> Source:
        """The weights. Every byte that is read of a checkpoint of ours is compared with its hash. Raises CheckpointError if it is gone."""
        if self.gone:
            raise self._lost(self.path, self.identity, "the base is gone, and with it what the pairs were worth before training")
        if self.folder is None:
            return self._opened.parts
        from dist_llm.interop.slices import Slices

        return Slices(self.folder)

    def close(self) -> None:
        """Lets the files go."""
        if self.folder is not None:
            self.folder.close()
        elif self.checkpoint is not None and self.checkpoint.opened:
            self.checkpoint.parts.close()


def with_template(files: dict[str, bytes], template: str) -> dict[str, bytes]:
    """A tokenizer's files with the chat template that a run has trained with, as they are where it is theirs."""
    held = strict_json(files.get(CONFIG, b"{}"))
    config = held if isinstance(held, dict) else {}
    given = files[TEMPLATE].decode(errors="replace") if TEMPLATE in files else config.get("chat_template")
    if given == template:
        return files
    kept = {name: content for name, content in files.items() if name != TEMPLATE}
    return kept | {CONFIG: json.dumps({**config, "chat_template": template}, ensure_ascii=False, indent=2).encode()}


def _same(one: Path, other: Path) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)


def kept_of(candidates: Iterable[Path]) -> Checkpoint | None:
    """The first sound checkpoint of those that a run may go on from, where it began with a base."""
    for path in candidates:
        with contextlib.suppress(CheckpointError):
            opened = open_checkpoint(path)
            return opened if "base" in opened.manifest else None
    return None


def read_base(tree: dict[str, Any], *, resume: str | None = None) -> Facts:
    """What a config takes from the base that its plain tree names. resume: `auto`, or the checkpoint that the run goes on from."""
    base = Base(tree["base"], kept=kept_of(_resumed(tree, resume)))
    try:
        return base.facts()
    finally:
        base.close()


def _resumed(tree: dict[str, Any], resume: str | None) -> list[Path]:
    """The step folders that a run may go on from, the newest first."""
    with contextlib.suppress(OSError, CheckpointError):
        if resume == "auto":
            save = tree.get("save")
            run = save.get("dir") if isinstance(save, dict) else None
            return step_folders(Path(run if isinstance(run, str) else SaveConfig().dir).expanduser())
        return [newest(Path(resume))] if resume is not None else []
    return []
