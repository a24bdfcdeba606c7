"""A folder appears under its name complete or not at all, one process makes it, and what a killed one has made is gone on with.

    .<name>.partial/   the workshop: `lock`, `made/`, which will be <name>, and whatever going on needs; gone when all is done

The lock lies in the workshop and goes with it, so whoever has waited for it looks again whether it is still the one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_llm import faults
from dist_llm.data.sealed import sync_folder
from dist_llm.errors import UsageError

WORKSHOP = re.compile(r"\.[A-Za-z0-9-]+-[0-9a-f]{12}\.partial")  # of the folders that prepare.py makes
LOCK = "lock"
MADE = "made"
NOTE = "note.json"  # beside made/: how far `make` has come, when it can go on from there


def require_new(target: Path, *, where: str | None = None) -> None:
    """Raises UsageError where there is something under the name of a folder that is to be made, a link that leads nowhere too."""
    if target.exists() or target.is_symlink():
        what, expected, way = "the folder is already there", "a new folder", "name another folder, or remove this one"
        raise UsageError(what, where=where or str(target), expected=expected, found="one that is there", next=way)


def publish(home: Path, make: Callable[[Path], object], *, waiting: Callable[[], object] = lambda: None) -> bool:
    """Make the folder `home` unless it is there; returns whether this call made it.

    make(made): fills the folder `made`, which holds what an earlier call has left that was killed. One process at a time;
    `waiting` is called when another one is at it. A failure leaves nothing; an interrupt leaves what can be gone on with.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    workshop, made = home.parent / f".{home.name}.partial", False
    while not home.is_dir() or workshop.is_dir():
        with _locked(workshop, waiting) as held:
            if held and not home.is_dir():
                _make(home, workshop, make)
                made = True
            if held:
                _clear(workshop)
    return made


def leftovers(folder: Path) -> list[Path]:
    """The workshops in a folder, by name: of builds that run, and of those that were interrupted."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if WORKSHOP.fullmatch(path.name) and path.is_dir() and not path.is_symlink())


def discard(workshop: Path) -> bool:
    """Removes a workshop unless a living process holds its lock; returns whether it did."""
    try:
        handle = os.open(workshop / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_still(workshop / LOCK, handle):
            return False
        _clear(workshop)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(handle)


def _make(home: Path, workshop: Path, make: Callable[[Path], object]) -> None:
    """Fill made/, wait until all is on the disk, and give it its name."""
    made = workshop / MADE
    try:
        made.mkdir(exist_ok=True)
        make(made)
        for folder in (*(path for path in made.iterdir() if path.is_dir()), made):
            sync_folder(folder)
        faults.reach("data.rename", rank=0, step=0)
        made.rename(home)
        sync_folder(home.parent)
    except BaseException as error:
        if isinstance(error, Exception) or not (workshop / NOTE).exists():
            _clear(workshop)
        raise


@contextmanager
def _locked(workshop: Path, waiting: Callable[[], object]) -> Iterator[bool]:
    """Hold the lock of a workshop; it ends with the process, however that ends. False: the workshop went away, try again."""
    workshop.mkdir(exist_ok=True)
    path = workshop / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield _is_still(path, handle)
    finally:
        os.close(handle)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _clear(workshop: Path) -> None:
    """Remove a workshop that is held, its lock last: the next one starts in an empty folder."""
    for path in workshop.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (workshop / LOCK).unlink()
    with contextlib.suppress(OSError):  # the next one may have come already
        workshop.rmdir()
