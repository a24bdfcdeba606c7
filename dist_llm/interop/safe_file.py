"""Safetensors files that others have written: a header that is checked whole before a tensor is read, and bounded reads. Torch-free.

    length of the header (8 bytes, little-endian), a JSON text {name: {"dtype", "shape", "data_offsets"}}, the tensors

Taken is what the safetensors library takes, and less: names come once, tensors lie one behind the other from the first byte
after the header to the last of the file. Reads go through `pread`: a file that is cut meanwhile is a failure, not a signal.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dist_llm.errors import CheckpointError
from dist_llm.strict import first_line, is_count, strict_json

LARGEST_HEADER = 32 << 20  # bytes; those of models with tens of thousands of tensors have a tenth of it
MOST_DIMENSIONS = 8
SIZES = {8: "F64 I64 U64 C64", 4: "F32 I32 U32", 2: "F16 BF16 I16 U16", 1: "I8 U8 BOOL F8_E4M3 F8_E5M2"}
WIDTHS = {name: width for width, names in SIZES.items() for name in names.split()}  # bytes of an element


@dataclass(frozen=True)
class Stored:
    """A tensor of a file. start: its first byte, counted from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def width(self) -> int:
        """Bytes of an element."""
        return WIDTHS[self.dtype]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.width


class SafeFile:
    """An opened safetensors file. tensors: by name; header: its bytes. Raises CheckpointError where it is not sound."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes_read = path, 0
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
        except OSError as error:
            raise unsound("a file of weights cannot be read", path, found=error.strerror) from None
        try:
            about = os.fstat(self._handle)
            if not stat.S_ISREG(about.st_mode):
                raise unsound("a file of weights cannot be read", path, expected="a file", found="a folder or a device")
            self.size = about.st_size
            self.header = self._header()
            self.tensors = read_header(self.header, size=self.size, path=path)
        except BaseException:
            os.close(self._handle)
            raise

    def _header(self) -> bytes:
        """The JSON text at the beginning."""
        length = int.from_bytes(self.read(0, 8), "little") if self.size >= 8 else 0
        most = min(LARGEST_HEADER, self.size - 8)
        if not 2 <= length <= most:
            expected = f"a header of 2 to {max(most, 2):,} bytes in a file of {self.size:,}"
            raise unsound("the file is cut, or no safetensors file", self.path, expected=expected, found=f"{length:,}")
        return self.read(8, 8 + length)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises CheckpointError where the file has fewer."""
        content = bytearray(stop - start)
        self.read_into(memoryview(content), start)
        return bytes(content)

    def read_into(self, out: memoryview, start: int) -> None:
        """Fills `out` with the bytes from `start` on."""
        at = 0
        try:
            while at < len(out) and (got := os.preadv(self._handle, [out[at:]], start + at)):
                at += got
        except OSError as error:
            raise unsound("a file of weights cannot be read", self.path, found=error.strerror) from None
        if at < len(out):
            expected, found = f"{len(out):,} bytes from {start:,} on", f"{at:,}"
            raise unsound("a file of weights was cut while it was read", self.path, expected=expected, found=found)
        self.bytes_read += at

    def close(self) -> None:
        """Lets the file go."""
        os.close(self._handle)


def read_header(text: bytes, *, size: int, path: Path) -> dict[str, Stored]:
    """The tensors of a header in a file of `size` bytes, in the order of the file. Raises CheckpointError where it is not sound."""
    try:
        assert text[:1] == b"{", "it does not begin with {"
        entries = strict_json(text)
        about = entries.pop("__metadata__", {})
        assert type(about) is dict and all(type(value) is str for value in about.values()), "__metadata__: not a table of texts"
        found = {name: _stored(name, entry) for name, entry in entries.items()}
        at = begin = 8 + len(text)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = (begin + offset for offset in entry["data_offsets"])
            assert first == at, f"{name}: begins at byte {first:,}, the one before it ends at {at:,}"
            need, at = found[name].bytes, last
            assert last - first == need, f"{name}: {last - first:,} bytes for {need:,} of {found[name].dtype} {list(found[name].shape)}"
        assert at == size, f"the tensors end at byte {at:,}, the file at {size:,}"
        return {name: Stored(one.dtype, one.shape, begin + one.start) for name, one in found.items()}
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError, AttributeError) as error:
        expected = f"safetensors: tensors end to end in {size:,} bytes"
        raise unsound("the header of a file of weights is not sound", path, expected=expected, found=first_line(error)) from None


def _stored(name: str, entry: Any) -> Stored:
    assert type(entry) is dict and entry.keys() == {"dtype", "shape", "data_offsets"}, f"{name}: its keys"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    assert type(dtype) is str and dtype in WIDTHS, f"{name}: dtype {dtype!r}"
    assert type(shape) is list and len(shape) <= MOST_DIMENSIONS and all(map(is_count, shape)), f"{name}: its shape"
    assert type(offsets) is list and len(offsets) == 2 and all(map(is_count, offsets)), f"{name}: its place"
    return Stored(dtype, tuple(shape), offsets[0])


def unsound(what: str, path: object, *, expected: str | None = None, found: str | None = None, next: str | None = None) -> CheckpointError:
    """The failure of a file of somebody else's that cannot be used."""
    return CheckpointError(what, where=str(path), expected=expected, found=found, safe="nothing was written", next=next)
