"""Files of whole numbers, mapped and never trusted: what is asked for is compared with the size of the file before it is touched."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dist_llm.data.readers import unreadable
from dist_llm.errors import DataError


class BinaryFile:
    """A regular file, mapped read-only. size: its bytes when it was opened.

    Raises DataError when it is not there, is no regular file (a pipe would be waited for), or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                raise DataError("this is not a file", where=str(path), expected="a regular file", found="a folder, a pipe or a device")
            self.size = state.st_size
            self._map = mmap.mmap(handle, self.size, prot=mmap.PROT_READ) if self.size else b""
        except OSError as error:
            raise unreadable(path, error) from error
        finally:
            os.close(handle)

    def array(self, dtype: str, *, at: int, count: int) -> np.ndarray:
        """`count` numbers from byte `at`, as a view of the file: shape (count,). They must lie inside the file."""
        width = np.dtype(dtype).itemsize
        assert at >= 0 and count >= 0 and at + count * width <= self.size, (self.path, at, count)
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=at) if count else np.empty(0, dtype)

    def refused(self, what: str, *, byte: int, expected: object, found: object, next: str | None = None) -> DataError:
        """The failure of a file whose content at `byte` is not what it should be."""
        return DataError(what, where=f"{self.path}, byte {byte}", expected=str(expected), found=str(found), next=next)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is not there yet, to be written; it is on the disk when the block is left."""
    with path.open("xb") as handle:
        yield handle
        handle.flush()
        os.fsync(handle.fileno())


def require_ids(ids: np.ndarray, *, vocab: int, file: BinaryFile, at: int) -> None:
    """Raises DataError when one of the ids, which begin at byte `at` of `file`, is not in 0 .. vocab - 1."""
    if not ids.size or (int(ids.max()) < vocab and int(ids.min()) >= 0):
        return
    first = int(np.flatnonzero((ids < 0) | (ids >= vocab))[0])
    expected = f"0 to {vocab - 1}, as the tokenizer has {vocab} ids"
    raise file.refused("an id that the tokenizer does not have", byte=at + first * ids.itemsize, expected=expected, found=int(ids[first]))
