"""Checkpoints: RUN/checkpoints/step-00000100/, complete and verified, or not there at all.

    rank-00000.safetensors, rank-00000.json   each rank's tensors (parts.py): weights, first and second moments
    tokenizer.json, tokenizer_config.json     so that text can be made from the folder alone
    manifest.json                             step, config, layout, rows, hashes of tokenizer and data, size and sha256 of each file
    COMMIT                                    the sha256 of manifest.json

Everything is written into a folder of another name, flushed to the disk, and renamed; a folder without COMMIT is never
chosen. Any layout loads what any other has saved. All tensors are safetensors and all else is JSON: there is no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.config.load import config_tree
from dist_llm.config.schema import Config
from dist_llm.data.store import sync_folder, write_durably
from dist_llm.errors import CheckpointError, Failure
from dist_llm.mesh import Mesh
from dist_llm.model.table import table
from dist_llm.train.parts import Parts, write_part
from dist_llm.train.storage import together

if TYPE_CHECKING:
    from dist_llm.data.prepare import Prepared
    from dist_llm.engines.native import NativeEngine

VERSION = 1
KINDS = ("weight", "first_moment", "second_moment")
MANIFEST, COMMIT = "manifest.json", "COMMIT"
LARGEST_MANIFEST = 64 << 20  # bytes
FILE_NAME = re.compile(r"rank-\d{5}\.(safetensors|json)|tokenizer(_config)?\.json")
FOLDER_NAME = re.compile(r"step-(\d{8,})")


class Checkpoint:
    """A committed checkpoint: its manifest is sound and every file has the size it should have; `verify` hashes them."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.step: int = manifest["step"]
        self.shapes = {name: tuple(shape) for name, shape in manifest["rows"]}
        self._parts: Parts | None = None

    @property
    def files(self) -> list[str]:
        """The names of all files but the manifest, sorted."""
        return sorted(self.manifest["files"])

    @property
    def config(self) -> Config:
        """The config of the run that saved it."""
        return Config.model_validate(self.manifest["config"])

    @property
    def parts(self) -> Parts:
        """The tensors. Verify the files first."""
        self._parts = self._parts or Parts(self.path, self.manifest["world"], self.shapes)
        return self._parts

    def verify(self, files: list[str] | None = None) -> None:
        """Hashes files (None: all). Raises CheckpointError that names the damaged one and both hashes."""
        for name in self.files if files is None else files:
            _require_hash(self.path / name, _hash(self.path / name), expected=self.manifest["files"][name]["sha256"])


# --- save ----------------------------------------------------------------------------------------------------------------


def save(run: Path, engine: NativeEngine, *, config: Config, prepared: Prepared, step: int, keep: int) -> Path:
    """Saves the state after `step` updates from all ranks, and deletes all but the newest `keep` (0: none). Returns the folder.

    Raises SpaceError on every rank when one of them cannot write; former checkpoints are untouched then.
    """
    mesh, home = engine.mesh, run / "checkpoints"
    final = home / f"step-{step:08d}"
    save_id = together(mesh, engine.device, lambda: secrets.token_hex(8))[0]
    partial = home / f".{final.name}.{save_id}.partial"
    safe = f"the checkpoints before step {step} are untouched"
    try:
        together(mesh, engine.device, lambda: partial.mkdir(parents=True) if mesh.rank == 0 else None, safe=safe)
        parts = together(mesh, engine.device, lambda: _write_files(partial, engine, prepared if mesh.rank == 0 else None), safe=safe)
        files = {name: about for part in parts for name, about in part.items()}
        manifest = {"version": VERSION, "save_id": save_id, **_describe(config, engine, prepared, step), "files": files}
        together(mesh, engine.device, lambda: _commit(partial, final, manifest) if mesh.rank == 0 else None, safe=safe)
    except Failure:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if mesh.rank == 0:
        retain(run, keep)
    return final


def _describe(config: Config, engine: NativeEngine, prepared: Prepared, step: int) -> dict[str, Any]:
    """What a reader must know beside the tensors."""
    mesh = engine.mesh
    return {
        "step": step,  # the number of optimizer updates made; the sample order goes on from it
        "world": mesh.layout.world,
        "layout": asdict(mesh.layout),
        "config": config_tree(config),
        "rows": [[row.name, row.shape] for row in table(config.model)],
        "tokenizer": prepared.tokenizer.hash,
        "data": prepared.fingerprint,
        "seed": config.runtime.seed,
    }


def _write_files(folder: Path, engine: NativeEngine, prepared: Prepared | None) -> dict[str, dict[str, Any]]:
    """Writes this rank's files, and the tokenizer where one is given; returns size and sha256 of each, as read back."""
    paths = write_part(folder, engine.mesh.rank, (item for item in engine.state() if item.kind in KINDS))
    if prepared is not None:
        file = prepared.tokenizer.save(folder)
        paths += [file, file.with_name("tokenizer_config.json")]
    for path in paths:
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())
    return {path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in paths}


def _commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest and its hash, then gives the folder its name."""
    text = json.dumps(manifest, sort_keys=True).encode()
    write_durably(partial / MANIFEST, text)
    write_durably(partial / COMMIT, hashlib.sha256(text).hexdigest().encode() + b"\n")
    sync_folder(partial)
    replaced = partial.with_suffix(".replaced")
    if final.exists():  # a damaged one of the same step, which a resumed run has passed again
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def retain(run: Path, keep: int) -> None:
    """Deletes all but the newest `keep` committed checkpoints (0: none), and what interrupted saves left behind."""
    for left in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    for old in step_folders(run)[keep:] if keep else []:
        gone = old.rename(old.with_name(f".{old.name}.old"))  # first of all: half a folder must not look like a checkpoint
        shutil.rmtree(gone, ignore_errors=True)


def set_aside(run: Path, step: int) -> list[Path]:
    """Renames the checkpoints after `step`: a run that goes on from there makes them anew. Returns their new paths."""
    later = [path for path in step_folders(run) if int(path.name.removeprefix("step-")) > step]
    return [path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.set-aside")) for path in later]


# --- find and open -------------------------------------------------------------------------------------------------------


def step_folders(run: Path) -> list[Path]:
    """The step folders with a COMMIT of a run, the newest first."""
    folders = (run / "checkpoints").glob("step-*")
    found = {path: int(match[1]) for path in folders if (match := FOLDER_NAME.fullmatch(path.name)) and (path / COMMIT).is_file()}
    return sorted(found, key=lambda path: found[path], reverse=True)


def newest(path: Path) -> Path:
    """The step folder that `path` means: itself, or the newest one of a run folder. Raises CheckpointError when there is none."""
    if (path / MANIFEST).is_file() or FOLDER_NAME.fullmatch(path.name):
        return path
    if folders := step_folders(path):
        return folders[0]
    seen = "nothing: no such folder" if not path.exists() else ", ".join(sorted(p.name for p in path.glob("checkpoints/*"))) or "none"
    raise CheckpointError(
        "there is no checkpoint here",
        where=str(path),
        expected="a step folder with a COMMIT, or a run folder that has one in checkpoints/",
        found=seen,
        next="dist-llm train CONFIG --save-every 100",
    )


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a step folder, or the newest of a run folder. Raises CheckpointError (exit 4) when it is absent, damaged or too new."""
    folder = newest(path)
    try:
        commit, text = (folder / COMMIT).read_bytes(), _read_bounded(folder / MANIFEST)
    except OSError as error:
        what, lacks = "the checkpoint is not complete", f"{Path(error.filename).name}: {error.strerror}"
        raise CheckpointError(what, where=str(folder), expected=f"{MANIFEST} and {COMMIT}", found=lacks) from None
    found = hashlib.sha256(text).hexdigest()
    if commit != f"{found}\n".encode():
        expected = f"sha256 {commit.decode(errors='replace').strip()} (in {COMMIT})"
        raise damaged("the manifest of the checkpoint is damaged", folder / MANIFEST, expected=expected, found=f"sha256 {found}")
    try:
        manifest = json.loads(text)
        if manifest["version"] != VERSION:
            what = "the checkpoint has another format"
            raise CheckpointError(what, where=str(folder), expected=f"version {VERSION}", found=f"version {manifest['version']}")
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise damaged("the manifest of the checkpoint contradicts itself", folder / MANIFEST, found=str(error)) from None
    for name, about in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != about["bytes"]:
            seen = "no such file" if size is None else f"{size} bytes"
            raise damaged("a file of the checkpoint is missing or cut", folder / name, expected=f"{about['bytes']} bytes", found=seen)
    return Checkpoint(folder, manifest)


def choose(candidates: list[Path], mesh: Mesh, engine: NativeEngine) -> tuple[Checkpoint, list[str]]:
    """The first sound checkpoint, every byte of it hashed by one of the ranks, and why earlier ones were passed over.

    Ends the same on every rank. Raises CheckpointError when none is sound.
    """
    refused: list[CheckpointError] = []
    for path in candidates:
        try:
            together(mesh, engine.device, lambda path=path: _verify_share(path, mesh))  # type: ignore[misc]
            return open_checkpoint(path), [f"{error.where}: {error.what}" for error in refused]
        except CheckpointError as error:
            refused.append(error)
    assert refused
    if len(refused) > 1:
        refused[0].details += [f"{error.where}: {error.what}" for error in refused[1:]]
    raise refused[0]


def _verify_share(path: Path, mesh: Mesh) -> None:
    checkpoint = open_checkpoint(path)
    checkpoint.verify(checkpoint.files[mesh.rank :: mesh.layout.world])


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Asserts that names lead nowhere else and that the tensors are no larger than the files that hold them."""
    assert all(FILE_NAME.fullmatch(name) for name in manifest["files"]), "a file name"
    assert all(type(manifest[key]) is int and manifest[key] >= 0 for key in ("step", "world", "seed")), "a count"
    assert 2 * manifest["world"] <= len(manifest["files"]), "fewer files than ranks"
    assert sum(prod(shape) for _, shape in manifest["rows"]) <= sum(about["bytes"] for about in manifest["files"].values()), "rows"


def damaged(what: str, path: Path, *, expected: str | None = None, found: str | None = None) -> CheckpointError:
    """The failure of a file that is not what was saved."""
    advice = "dist-llm train CONFIG --resume auto takes the newest one that is sound"
    return CheckpointError(what, where=str(path), expected=expected, found=found, safe="no weight was changed", next=advice)


def _require_hash(path: Path, found: str, *, expected: str) -> None:
    if found != expected:
        raise damaged("a file of the checkpoint is damaged", path, expected=f"sha256 {expected}", found=f"sha256 {found}")


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as handle:
        return handle.read(LARGEST_MANIFEST)


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
