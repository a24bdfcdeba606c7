"""The folder of a checkpoint, RUN/checkpoints/step-00000100/: complete and verified, or not there at all.

    rank-00000.safetensors, rank-00000.json   each rank's tensors (parts.py): weights, first and second moments
    tokenizer.json, tokenizer_config.json     so that text can be made from the folder alone; and what else was carried along (sidefiles.py)
    manifest.json                             step, config, layout, rows, hashes of tokenizer and data, size and hash of each file
    COMMIT                                    the sha256 of manifest.json

Files are written into a folder of another name, flushed and read back; then come the manifest and COMMIT; then the folder
gets its name, and only then is an older one deleted. So a folder of that name without COMMIT has lost it: it is damaged and
told of, never taken. An earlier folder of the same step keeps a name that readers know until the new one has its own. Torch-free.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config, LayoutConfig
from dist_llm.errors import CheckpointError
from dist_llm.sidefiles import NEEDED, SIDE_FILES
from dist_llm.strict import is_count, read_bounded, strict_json
from dist_llm.train.durable import BLOCK, Digest, Disk

if TYPE_CHECKING:
    from dist_llm.train.parts import Parts

VERSION = 3
MANIFEST, COMMIT = "manifest.json", "COMMIT"
LARGEST_MANIFEST = 64 << 20  # bytes
FILE_NAME = re.compile(r"rank-\d{5}\.(safetensors|json)", re.ASCII)
FOLDER_NAME = re.compile(r"step-(\d{8,18})|\.step-(\d{8,18})\.[0-9a-f]{16}\.replaced", re.ASCII)
ROW_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
SHA256, XXH128 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}")
COMMITTED = re.compile(rb"[0-9a-f]{64}\n")
KEYS = {"version", "save_id", "step", "world", "layout", "config", "rows", "tokenizer", "data", "seed", "files"}
OPTIONAL = {"base", "base_weights"}  # identities of the weights that the run began with: as they lay, and under an adapter in any form
ANOTHER = "dist-llm train CONFIG --resume auto takes the newest one that is sound"  # to do where one is damaged
NO_TEXT = "0" * 64  # the data of a checkpoint that no run of ours has made


class Checkpoint:
    """A committed checkpoint: its manifest is sound and every file has the size it should have; `verify` hashes them."""

    def __init__(self, path: Path, manifest: dict[str, Any], config: Config) -> None:
        self.path, self.manifest, self.config = path, manifest, config  # config: of the run that saved it
        self.step: int = manifest["step"]
        self.shapes = {name: tuple(shape) for name, shape in manifest["rows"]}
        self._parts: Parts | None = None

    @property
    def files(self) -> list[str]:
        """The names of all files but the manifest, sorted."""
        return sorted(self.manifest["files"])

    @property
    def beside(self) -> dict[str, bytes]:
        """name -> content of the files beside the tensors; each was compared with its hash. Raises CheckpointError."""
        names = [name for name in self.files if name in SIDE_FILES]
        self.verify(names)
        return {name: (self.path / name).read_bytes() for name in names}

    @property
    def imported(self) -> bool:
        """Whether it is no run's: weights from elsewhere, before a first step."""
        return self.step == 0 and self.manifest["data"] == NO_TEXT

    @property
    def opened(self) -> bool:
        """Whether files of tensors may be open."""
        return self._parts is not None

    @property
    def parts(self) -> Parts:
        """The tensors; each byte that is read of them is compared with its hash."""
        from dist_llm.train.parts import Parts  # torch comes with the tensors

        self._parts = self._parts or Parts(self.path, self.manifest["world"], self.shapes, files=self.manifest["files"])
        return self._parts

    def verify(self, files: list[str] | None = None) -> None:
        """Hashes files (None: all). Raises CheckpointError that names the damaged one and both hashes."""
        for name in self.files if files is None else files:
            path, found = self.path / name, Digest()
            try:
                with path.open("rb") as handle:
                    while chunk := handle.read(BLOCK):
                        found.update(chunk)
            except OSError as error:
                raise damaged("a file of the checkpoint cannot be read", path, found=error.strerror) from None
            require_hash(path, found.about["xxh128"], expected=self.manifest["files"][name]["xxh128"])


def damaged(what: str, path: Path, *, expected: str | None = None, found: str | None = None) -> CheckpointError:
    """The failure of a file that is not what was saved."""
    return CheckpointError(what, where=str(path), expected=expected, found=found, safe="no weight was changed", next=ANOTHER)


def require_hash(path: Path, found: str, *, expected: str, part: str = "") -> None:
    """Raises CheckpointError where a file, or the part of it that is named, has another hash."""
    if found != expected:
        raise damaged("a file of the checkpoint is damaged", path, expected=f"xxh128 {expected}{part}", found=f"xxh128 {found}{part}")


# --- find ----------------------------------------------------------------------------------------------------------------


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder, by its name."""
    match = FOLDER_NAME.fullmatch(path.name)
    assert match, path
    return int(match[1] or match[2])


def step_folders(run: Path) -> list[Path]:
    """The step folders of a run, the newest first, damaged ones too.

    One whose place a newer save of the same step was to take counts until that one is there: the save was cut between two renames.
    """
    found: dict[int, Path] = {}
    for path in sorted((run / "checkpoints").glob("*step-*"), reverse=True):  # `step-` comes before `.step-`
        if FOLDER_NAME.fullmatch(path.name) and (path.is_dir() if path.name[0] != "." else (path / COMMIT).is_file()):
            found.setdefault(step_of(path), path)
    return [found[step] for step in sorted(found, reverse=True)]


def committed(run: Path) -> list[Path]:
    """Those that a save has completed, the newest first: they alone count for `keep`, and are deleted."""
    return [path for path in step_folders(run) if (path / COMMIT).is_file()]


def newest(path: Path) -> Path:
    """The step folder that `path` means: itself, or the newest one of a run folder. Raises CheckpointError when there is none."""
    if os.path.isfile(path / MANIFEST) or FOLDER_NAME.fullmatch(path.name):
        return path
    if os.path.isdir(path) and (folders := step_folders(path)):
        return folders[0]
    there = sorted(p.name for p in path.glob("checkpoints/*")) if os.path.isdir(path) else []
    seen = f"{', '.join(there)}: without a COMMIT, a save that was cut" if there else "none" if os.path.exists(path) else "no such folder"
    way, name = "dist-llm train CONFIG --save-every 100", path.resolve().name
    for file, what, more in (("config.json", "a Hugging Face folder", ""), ("adapter_config.json", "an adapter of PEFT's", " --base BASE")):
        if os.path.isfile(path / file):
            seen, way = what, f"dist-llm import {path} runs/{name}{more}"
    raise CheckpointError(
        "there is no checkpoint here",
        where=str(path),
        expected="a step folder with a COMMIT, or a run folder that has one in checkpoints/",
        found=seen,
        next=way,
    )


# --- open ----------------------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a step folder, or the newest of a run folder. Raises CheckpointError (exit 4) when it is absent, damaged or too new."""
    folder = newest(path)
    try:
        commit, text = read_bounded(folder / COMMIT, 1 << 10), read_bounded(folder / MANIFEST, LARGEST_MANIFEST)
    except OSError as error:
        what, lacks = "the checkpoint is not complete", f"{Path(error.filename or folder).name}: {error.strerror}"
        raise CheckpointError(what, where=str(folder), expected=f"{MANIFEST} and {COMMIT}", found=lacks, next=ANOTHER) from None
    found = hashlib.sha256(text).hexdigest()
    if not COMMITTED.fullmatch(commit):
        raise damaged(
            "the COMMIT of the checkpoint is damaged", folder / COMMIT, expected="a sha256 and a line feed", found=f"{len(commit)} bytes"
        )
    if commit != f"{found}\n".encode():
        expected = f"sha256 {commit.decode(errors='replace').strip()} (in {COMMIT})"
        raise damaged("the manifest of the checkpoint is damaged", folder / MANIFEST, expected=expected, found=f"sha256 {found}")
    manifest, config = read_manifest(text, folder / MANIFEST)
    for name, about in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != about["bytes"]:
            seen = "no such file" if size is None else f"{size} bytes"
            raise damaged("a file of the checkpoint is missing or cut", folder / name, expected=f"{about['bytes']} bytes", found=seen)
    return Checkpoint(folder, manifest, config)


def read_manifest(text: bytes, path: Path) -> tuple[dict[str, Any], Config]:
    """A manifest and the config in it. Raises CheckpointError where it is of another format or contradicts itself."""
    try:
        manifest = strict_json(text)
        version = manifest["version"]
        if type(version) is int and version != VERSION:
            what = f"the checkpoint has {'a newer' if version > VERSION else 'an older'} format"
            advice = "open it with the dist-llm that saved it"
            raise CheckpointError(what, where=str(path.parent), expected=f"version {VERSION}", found=f"version {version}", next=advice)
        _check_manifest(manifest)
        return manifest, Config.model_validate(manifest["config"])
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError, AttributeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise damaged("the manifest of the checkpoint contradicts itself", path, expected="parts that agree", found=first[:200]) from None


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Asserts that names lead nowhere else, that every rank has its files, and that the tensors fit into them."""
    assert type(manifest["version"]) is int and KEYS <= manifest.keys() <= KEYS | OPTIONAL, "its keys"
    assert re.fullmatch(r"[0-9a-f]{16}", manifest["save_id"]), "the save id"
    assert is_count(manifest["step"]) and is_count(manifest["world"], least=1) and type(manifest["seed"]) is int, "a count"
    assert all(SHA256.fullmatch(manifest[key]) for key in ("tokenizer", "data", *(OPTIONAL & manifest.keys()))), "a hash"
    _check_files(manifest["files"], manifest["world"])
    names = [name for name, _ in manifest["rows"]]
    assert len(set(names)) == len(names) and all(ROW_NAME.fullmatch(name) for name in names), "a name of a tensor"
    assert all(type(shape) is list and shape and all(is_count(n, least=1) for n in shape) for _, shape in manifest["rows"]), "a shape"
    assert sum(prod(shape) for _, shape in manifest["rows"]) <= sum(about["bytes"] for about in manifest["files"].values()), "rows"
    assert manifest["layout"].keys() == {field.name for field in fields(Layout)}, "the layout"
    LayoutConfig.model_validate(manifest["layout"])
    assert Layout(**manifest["layout"]).world == manifest["world"], "the layout"


def _check_files(files: dict[str, Any], world: int) -> None:
    """Asserts that the files of a manifest are those of `world` ranks and a tokenizer, each with a size and a hash."""
    assert all(FILE_NAME.fullmatch(name) or name in SIDE_FILES for name in files), "a file name"
    assert 2 * world + len(NEEDED) <= len(files) <= 2 * world + len(SIDE_FILES), "the number of files"
    ranks = (f"rank-{rank:05d}.{end}" for rank in range(world) for end in ("safetensors", "json"))
    assert {*files} - {*SIDE_FILES} == {*ranks} and {*NEEDED} <= files.keys(), "a file name"
    for about in files.values():
        assert about.keys() == {"bytes", "xxh128"} and is_count(about["bytes"]) and XXH128.fullmatch(about["xxh128"]), "a file"


# --- save ----------------------------------------------------------------------------------------------------------------


def begin(disk: Disk, run: Path, step: int, save_id: str) -> Path:
    """Makes the folder into which all ranks write, and returns it."""
    home = run / "checkpoints"
    if not home.exists():
        disk.make_folder(home)
        disk.sync_folder(run)
        disk.sync_folder(run.parent)
    partial = home / f".step-{step:08d}.{save_id}.partial"
    disk.make_folder(partial)
    return partial


def flush(disk: Disk, folder: Path, written: Mapping[str, Digest]) -> None:
    """Waits until one rank's files are on the disk, and reads them back. Raises OSError where they are not what was written."""
    disk.reach("save.sync")
    for name in written:
        disk.sync(folder / name)
    disk.sync_folder(folder)
    disk.reach("save.verify")
    for name, digest in written.items():
        back = disk.read_back(folder / name)
        if (back.size, back.blocks) != (digest.size, digest.blocks):
            raise OSError(errno.EIO, "the disk gives back other bytes than were written", str(folder / name))


def commit(disk: Disk, partial: Path, manifest: dict[str, Any]) -> Path:
    """Writes the manifest and its hash, gives the folder its name, and returns it; every rank's files are flushed and read back."""
    home, step = partial.parent, manifest["step"]
    final, replaced = home / f"step-{step:08d}", home / f".step-{step:08d}.{manifest['save_id']}.replaced"
    text = json.dumps(manifest, sort_keys=True).encode()
    disk.reach("save.manifest")
    for name, content in ((MANIFEST, text), (COMMIT, hashlib.sha256(text).hexdigest().encode() + b"\n")):
        disk.write(partial / name, [content])
        disk.sync(partial / name)
    disk.sync_folder(partial)
    open_checkpoint(partial)
    disk.reach("save.commit")
    if final.exists():  # a damaged one of the same step, which a resumed run has passed again
        disk.rename(final, replaced)
        disk.reach("save.replace")
    disk.rename(partial, final)
    disk.reach("save.rename")
    disk.sync_folder(home)
    return final


def retain(disk: Disk, run: Path, keep: int, *, verified: Path) -> None:
    """Deletes checkpoints before `verified`, which has been read back, but for the newest `keep` in all (0: none are deleted)."""
    home, folders = run / "checkpoints", committed(run)
    if verified not in folders:
        return
    old = [path for path in folders[keep:] if step_of(path) < step_of(verified)] if keep else []
    gone = [path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(4)}.old") for path in old]
    for path, name in zip(old, gone, strict=True):
        disk.rename(path, name)  # first of all: half a folder must not look like a checkpoint
    disk.reach("retain.rename")
    if old:
        disk.sync_folder(home)
    tidy(disk, run)


def settle(disk: Disk, run: Path) -> None:
    """Before a run goes on in its folder: flushes the names that a killed one may not have flushed, and deletes what it has left."""
    home = run / "checkpoints"
    if home.exists():
        for folder in (home, run, run.parent):
            disk.sync_folder(folder)
        tidy(disk, run)


def tidy(disk: Disk, run: Path) -> None:
    """Deletes what interrupted saves and deletions have left behind."""
    used = step_folders(run)
    for left in sorted((run / "checkpoints").glob(".step-*")):
        if left in used:
            continue
        if left.is_dir() and not left.is_symlink():
            disk.remove_tree(left)
        else:
            disk.remove(left)  # never what a link leads to


def set_aside(disk: Disk, run: Path, step: int) -> list[Path]:
    """Renames the checkpoints after `step`: a run that goes on from there makes them anew. Returns their new paths."""
    later = [path for path in step_folders(run) if step_of(path) > step]
    names = [path.with_name(f"step-{step_of(path):08d}.{secrets.token_hex(4)}.set-aside") for path in later]
    for path, name in zip(later, names, strict=True):
        disk.rename(path, name)
    if later:
        disk.sync_folder(run / "checkpoints")
    return names


def writable(run: Path) -> bool:
    """Whether checkpoints can be made in a run folder."""
    home = run / "checkpoints"
    return os.access(home if home.exists() else run, os.W_OK | os.X_OK)
