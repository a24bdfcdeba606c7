"""The file system under a run: its faults as one failure that all ranks share, and the folder that one job holds at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dist_llm import comm
from dist_llm.config.load import dump_config
from dist_llm.config.schema import Config
from dist_llm.errors import Failure, SpaceError, from_dict
from dist_llm.mesh import Mesh
from dist_llm.train.durable import Disk

WRITABLE = "room on the disk, and files and folders that can be written"


@contextmanager
def storing(where: object, *, safe: str | None = None) -> Iterator[None]:
    """Turns what the file system refuses inside the block into a SpaceError. where: when the system names no file."""
    try:
        yield
    except OSError as error:
        place, found = error.filename or where, error.strerror or str(error)
        raise SpaceError(
            "a file of the run cannot be read or written", where=str(place), expected=WRITABLE, found=found, safe=safe
        ) from error
    except SafetensorError as error:  # its writer reports a full disk so
        raise SpaceError(
            "a file of the run cannot be read or written", where=str(where), expected=WRITABLE, found=str(error), safe=safe
        ) from error


def together(mesh: Mesh, device: torch.device, work: Callable[[], Any], *, safe: str | None = None) -> list[Any]:
    """Runs `work` on every rank and gives all ranks all answers (JSON); raises the first rank's failure on all of them.

    An error of the file system becomes a SpaceError.
    """
    failure: Failure | None = None
    value = None
    try:
        with storing(f"rank {mesh.rank}", safe=safe):
            value = work()
    except Failure as known:
        failure = known
    answers = comm.gather_json({"value": value, "failure": failure and failure.as_dict()}, mesh.world, device=device)
    for answer in answers:
        if answer["failure"] is not None:
            raise from_dict(answer["failure"])
    return [answer["value"] for answer in answers]


def make_folders(disk: Disk, path: Path) -> None:
    """Makes a folder and those it lies in, as far as they are not there, and waits until their names are on the disk."""
    if not path.is_dir():
        make_folders(disk, path.parent)
        try:
            disk.make_folder(path)
        except FileExistsError:
            if not path.is_dir():  # else another job has made it
                raise
        disk.sync_folder(path.parent)


class RunFolder:
    """The folder of a run, held by one job at a time until the process ends.

    Raises SpaceError when another job holds it or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with storing(path):
                make_folders(Disk(), path)
                self._handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except SpaceError as error:
            if isinstance(error.__cause__, BlockingIOError):
                what, advice = "another job uses this run folder", "wait for it, or the same command with --run-dir DIR"
                raise SpaceError(
                    what, where=str(path), expected="a folder that no job uses", found="its lock is held", next=advice
                ) from None
            raise


def write_config(run: Path, config: Config) -> None:
    """Writes the resolved config into a run's folder, itself a valid one. Raises SpaceError."""
    spare = run / ".config.yaml"
    with storing(spare):
        spare.unlink(missing_ok=True)  # it may be a link to somewhere else
        with spare.open("x", encoding="utf-8") as file:
            file.write(dump_config(config))
        os.replace(spare, run / "config.yaml")
