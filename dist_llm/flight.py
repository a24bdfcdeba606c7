"""The flight recorder: what each rank is doing, in memory that the launcher shares, so that it can be read when the rank cannot speak.

A record costs a microsecond. It says the step and the phase, and of the last collectives: which group, the how-manyth of it, what was
sent, and the line of code. Ranks that wait for each other are explained by laying their records side by side (watch.py). Torch-free.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from zlib import crc32

PHASES = ("start", "data", "forward", "backward", "reduce", "update", "validate", "sample", "save", "end", "reference")
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send", "recv", "barrier")
DTYPES = ("float32", "bfloat16", "float64", "float16", "int64", "int32", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "another dtype")
BEGUN, WAITED_FOR, DONE = range(3)
_SENT, _RECEIVED = KINDS.index("send"), KINDS.index("recv")

READS = 100  # tries to find a whole head, while its process writes both in turn
RING = 512  # collectives that are remembered
STEPS = 32  # steps whose own work is remembered
TEXTS, TEXT = 256, 96  # places for names of groups and lines of code; the last one is for those that find none
NO_PLACE = "..."
_HEAD = struct.Struct("<QIIqdqqqBh")  # number, rank, pid, step, changed at, collectives begun, awaited, steps done, phase, exit code
_SUM = struct.Struct("<I")  # of the head, after it
_SLOT = 80  # the head is written here and there in turn, so one of the two is always whole, even where a rank is stopped in the middle
_ENTRY = struct.Struct("<QQIHHBBBB4I")  # number, place in its group, step, group, site, kind, dtype, state, num dims, dims
_SECONDS = 2 * _SLOT
_RING_AT = _SECONDS + 8 * STEPS
_TEXTS_AT = _RING_AT + RING * _ENTRY.size
SIZE = _TEXTS_AT + TEXTS * TEXT
_OURS = (__file__, str(Path(__file__).with_name("comm.py")))


class Flight:
    """One rank's record. `waited`: seconds inside collectives since the step began."""

    def __init__(self, buffer: Any, *, rank: int, pid: int) -> None:
        self.buffer, self.rank, self.pid = buffer, rank, pid
        self.step, self.phase, self.begun, self.awaited, self.steps, self.written = 0, 0, 0, -1, 0, 0
        self.waited, self.step_began, self.code = 0.0, time.monotonic(), -1
        self._texts: dict[Any, int] = {}
        self._counts: dict[int, int] = {}
        self._text("host", socket.gethostname())  # the first of the texts
        self._write()

    def _write(self) -> None:
        self.written += 1
        if self.code < 0:  # else it has gone on no further
            self.changed_at = time.monotonic()
        place = (self.written, self.rank, self.pid, self.step, self.changed_at)
        head = _HEAD.pack(*place, self.begun, self.awaited, self.steps, self.phase, self.code)
        at = self.written % 2 * _SLOT
        self.buffer[at : at + _HEAD.size + _SUM.size] = head + _SUM.pack(crc32(head))

    def enter(self, phase: str) -> None:
        """What the rank does from now on."""
        self.phase = PHASES.index(phase)
        self._write()

    def begin_step(self, step: int) -> None:
        """A step begins, counted from 1. The seconds of the one before that were not waiting are kept."""
        now = time.monotonic()
        if self.step:
            struct.pack_into("<d", self.buffer, _SECONDS + 8 * (self.steps % STEPS), now - self.step_began - self.waited)
            self.steps += 1
        self.step, self.step_began, self.waited = step, now, 0.0
        self._write()

    def leave(self, code: int) -> None:
        """The rank is about to end by itself, with an exit code."""
        self.code = code
        self._write()

    def begin(self, kind: str, group: str, dtype: str, shape: Sequence[int]) -> int:
        """A collective of a group begins; returns its number. group: the same text on every rank of it."""
        number, name = self.begun, self._text(group, group)
        place = self._counts.get(name, 0)
        self._counts[name] = place + 1
        dims = [*(min(dim, 2**32 - 1) for dim in shape[:4]), 0, 0, 0, 0][:4]
        what = (KINDS.index(kind), DTYPES.index(dtype) if dtype in DTYPES else len(DTYPES) - 1, BEGUN, min(len(shape), 4))
        _ENTRY.pack_into(self.buffer, self._at(number), number, place, self.step, name, self._site(sys._getframe(1)), *what, *dims)
        self.begun = number + 1
        self._write()
        return number

    def wait(self, number: int) -> None:
        """The rank waits for a collective from now on."""
        self.awaited = number
        self._state(number, WAITED_FOR)
        self._write()

    def done(self, number: int, seconds: float) -> None:
        """It has come, after so many seconds of waiting."""
        self.awaited = -1
        self.waited += seconds
        self._state(number, DONE)
        self._write()

    def _at(self, number: int) -> int:
        return _RING_AT + number % RING * _ENTRY.size

    def _state(self, number: int, state: int) -> None:
        if number > self.begun - RING:  # else its place is another's already
            self.buffer[self._at(number) + 26] = state

    def _site(self, frame: FrameType | None) -> int:
        """The line of code outside of the collectives' own file."""
        while frame is not None and frame.f_code.co_filename in _OURS:
            frame = frame.f_back
        if frame is None:
            return self._text("", "")
        file, line = frame.f_code.co_filename, frame.f_lineno
        known = self._texts.get((file, line))
        return known if known is not None else self._text((file, line), f"{_short(file)}:{line}")

    def _text(self, key: Any, text: str) -> int:
        """The number of a text that is written once."""
        known = self._texts.get(key)
        if known is None:
            known = min(len(self._texts), TEXTS - 1)
            self._texts[key] = known
            text = text if known < TEXTS - 1 else NO_PLACE
            self.buffer[_TEXTS_AT + known * TEXT : _TEXTS_AT + (known + 1) * TEXT] = text.encode()[:TEXT].ljust(TEXT, b"\0")
        return known


def _short(file: str) -> str:
    """The end of a path, from the package on."""
    parts = Path(file).parts
    return "/".join(parts[parts.index("dist_llm") if "dist_llm" in parts else -2 :])


# --- the recorder of this process ----------------------------------------------------------------------------------------

current: Flight | None = None
on_enter: Callable[[str], None] | None = None  # fault points listen here


def start(buffer: Any, *, rank: int, pid: int) -> None:
    """Records this process from now on."""
    global current
    current = Flight(buffer, rank=rank, pid=pid)


def enter(phase: str) -> None:
    """What this process does from now on; nothing where it is not recorded."""
    if current is not None:
        current.enter(phase)
    if on_enter is not None:
        on_enter(phase)


def begin_step(step: int) -> None:
    """This process begins a step, counted from 1."""
    if current is not None:
        current.begin_step(step)


def leave(code: int) -> None:
    """This process is about to end by itself."""
    if current is not None:
        current.leave(code)


def make() -> mmap.mmap:
    """Memory for a record, shared with processes that are forked later."""
    return mmap.mmap(-1, SIZE)


def make_file(path: Path) -> mmap.mmap:
    """Memory for a record, shared through a file. Raises OSError for a link or a pipe in its place: it is never written through.

    A file that is there gives way: it may be the record of a run that goes on, whose folder this job is about to be refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not path.is_symlink():
        path.unlink()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    with open(handle, "wb+", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)  # a page that finds no room on the disk later would kill the process (SIGBUS)
        return mmap.mmap(file.fileno(), SIZE)


def open_file(path: Path) -> mmap.mmap | None:
    """The record that another process keeps in a file; None where there is none."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None


# --- read ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A collective as a rank has recorded it. place: the how-manyth of its group. state: begun, waited for, done."""

    number: int
    place: int
    step: int
    group: str
    site: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    state: int

    @property
    def what(self) -> tuple[str, str, tuple[int, ...]]:
        """What must be equal on all ranks of the group; a send and its receive are one thing."""
        return ("message" if self.kind in ("send", "recv") else self.kind, self.dtype, self.shape)

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape)) or "scalar"
        return f"{self.kind} {self.place + 1} on {self.group} ({self.dtype} {size}) at {self.site}"


@dataclass(frozen=True)
class Snapshot:
    """What a rank's record says at a moment.

    changed_at: time.monotonic of its last word; awaited: None when it waits for nothing; code: with which it ends by itself.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    changed_at: float
    calls: list[Call]  # in order; the last RING of them
    awaited: Call | None
    seconds: list[float]  # own work of the last steps
    code: int | None = None


def _head(buffer: Any) -> tuple | None:
    """The newest head that is whole: the process may be writing one. None before the first."""
    for _ in range(READS):
        raw = bytes(buffer[: 2 * _SLOT])
        slots = [raw[at : at + _HEAD.size + _SUM.size] for at in (0, _SLOT)]
        whole = [slot[: _HEAD.size] for slot in slots if _SUM.unpack_from(slot, _HEAD.size)[0] == crc32(slot[: _HEAD.size])]
        if whole:  # never one of zeros alone: their sum is not zero
            return max(map(_HEAD.unpack, whole))
    return None


def read(buffer: Any, *, calls: bool = True) -> Snapshot | None:
    """The record in a shared memory; None before its process has begun it. calls: the collectives too."""
    head = _head(buffer)
    if head is None:
        return None
    _, rank, pid, step, changed_at, begun, awaited, steps, phase, code = head
    found = [_call(buffer, number) for number in range(max(0, begun - RING + 8), begun)] if calls else []
    seconds = [struct.unpack_from("<d", buffer, _SECONDS + 8 * (at % STEPS))[0] for at in range(max(0, steps - STEPS), steps)]
    good = [call for call in found if call is not None]
    waiting = _call(buffer, awaited) if awaited >= 0 else None
    return Snapshot(rank, _text_at(buffer, 0), pid, step, PHASES[phase], changed_at, good, waiting, seconds, None if code < 0 else code)


def signatures(buffer: Any) -> dict[tuple[str, int], tuple]:
    """What was sent, by group and place, of all remembered collectives: the quick half of a comparison between ranks."""
    head, names, found = _head(buffer), dict[int, str](), dict[tuple[str, int], tuple]()
    begun = 0 if head is None else head[5]
    ring = _ENTRY.iter_unpack(bytes(buffer[_RING_AT:_TEXTS_AT]))
    for at, (held, place, _, group, _, kind, dtype, _, *shape) in enumerate(ring):
        if begun - RING + 8 <= held < begun and held % RING == at:
            name = names.get(group) or names.setdefault(group, _text_at(buffer, group))
            if name == NO_PLACE:
                continue
            found[name, place] = (_RECEIVED if kind == _SENT else kind, dtype, *shape)
    return found


def _call(buffer: Any, number: int) -> Call | None:
    """One entry of the ring; None where it is being written over."""
    at = _RING_AT + number % RING * _ENTRY.size
    held, place, step, group, site, kind, dtype, state, dims, *shape = _ENTRY.unpack_from(buffer, at)
    if held != number:
        return None
    texts = (_text_at(buffer, group), _text_at(buffer, site))
    return Call(number, place, step, *texts, KINDS[kind], DTYPES[dtype], tuple(shape[:dims]), state)


def _text_at(buffer: Any, index: int) -> str:
    raw = bytes(buffer[_TEXTS_AT + index * TEXT : _TEXTS_AT + (index + 1) * TEXT])
    return raw.rstrip(b"\0").decode(errors="replace")
