"""Faults of the file system as one failure, and the run folder that one job holds at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dist_llm.config.load import dump_config
from dist_llm.config.schema import Config
from dist_llm.errors import SpaceError


@contextmanager
def storing(where: object, *, safe: str | None = None) -> Iterator[None]:
    """Turns what the file system refuses inside the block into a SpaceError. where: when the system names no file."""
    try:
        yield
    except OSError as error:
        place, found = error.filename or where, error.strerror or str(error)
        raise SpaceError("a file of the run cannot be read or written", where=str(place), found=found, safe=safe) from error
    except SafetensorError as error:  # its writer reports a full disk so
        raise SpaceError("a file of the run cannot be read or written", where=str(where), found=str(error), safe=safe) from error


class RunFolder:
    """The folder of a run, held by one job at a time until the process ends.

    Raises SpaceError when another job holds it or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with storing(path):
                path.mkdir(parents=True, exist_ok=True)
                self._handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except SpaceError as error:
            if isinstance(error.__cause__, BlockingIOError):
                what, advice = "another job uses this run folder", "wait for it, or name another --run-dir"
                raise SpaceError(what, where=str(path), next=advice) from None
            raise

    def write_config(self, config: Config) -> None:
        """Writes the resolved config, itself a valid one."""
        spare = self.path / ".config.yaml"
        with storing(spare):
            spare.write_text(dump_config(config), encoding="utf-8")
            os.replace(spare, self.path / "config.yaml")
