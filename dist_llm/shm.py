"""Collectives of CPU ranks on one machine through memory they share, as NCCL has them for GPUs: gloo sends through sockets there too.

A group has one segment: for each of its n ranks two slots to write into, and for each pair of ranks two semaphores, of slots that are
filled and of slots that are free again. A tensor goes a slot's size at a time: its rank writes, tells the readers, and they tell it when
they have read. Bytes written times readers are what the ring algorithms send (comm.py), for any n and size.

The memory has no name: one rank makes it and tells the others the number of its descriptor, which they open in /proc. Nothing is left of
it, however they end. `Offer` finds out whether all of that works; the ranks of a group go by the answer together (mesh.py).
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import hashlib
import mmap
import os
import secrets
import select
import stat
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

SLOT = 1 << 20  # bytes
SLOTS = 2  # one is read while the next is written
CELL = 64  # bytes of a semaphore, which has a line of the cache to itself
CARD = 4  # integers that a rank tells the others: its machine, its process, the descriptor of the memory, the word in it
LOOK_SECONDS = 0.2  # between two looks whether a rank that is waited for is there
CLOSE_SECONDS = 1.0  # for a thread to end
SERIAL = 1 << 14  # elements that torch adds on the thread that asks: for more it would start others, as many for each group

_c = ctypes.CDLL(None, use_errno=True)


class _Moment(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))  # struct timespec


# --- transfers, in their order -------------------------------------------------------------------------------------------


class Transfer:
    """A transfer that is begun; `wait` as torch.distributed's Work has it. Until it has ended it holds its tensors."""

    def __init__(self, lane: Lane, move: Callable[..., None], *tensors: Tensor) -> None:
        assert all(x.is_contiguous() and x.device.type == "cpu" for x in tensors)
        self.lane, self.move, self.tensors = lane, move, tensors
        self.helps = True  # who waits may do the work
        self.done, self.error = False, None  # type: tuple[bool, BaseException | None]
        self.ended = threading.Lock()
        self.ended.acquire()

    def run(self) -> None:
        """Moves the bytes. After one that failed none is moved: what the others have in the slots belongs to that one."""
        try:
            if self.lane.error is None:
                self.move(*self.tensors)
        except BaseException as error:  # told to who waits
            self.lane.error = error
        self.error, self.done = self.lane.error, True
        del self.move, self.tensors
        self.ended.release()

    def wait(self) -> None:
        """Returns when it has ended; raises what stopped it. Who waits does the work, where the lane's thread has not begun it."""
        self.lane.awaited = time.monotonic()
        if not (self.helps and self.lane.run(until=self)):
            with self.ended:
                pass
        self.lane.awaited = None
        if self.error is not None:
            raise self.error


class Lane:
    """The transfers of one group, one after the other in the order in which they are begun: on a thread of its own, or on who waits.

    awaited: since when somebody waits for one of them. error: what has stopped one, and with it those behind.
    """

    def __init__(self) -> None:
        self.begun: deque[Transfer] = deque()
        self.turn = threading.Lock()
        self.bell: SimpleQueue[bool] = SimpleQueue()
        self.thread: threading.Thread | None = None
        self.awaited: float | None = None
        self.error: BaseException | None = None
        _lanes.add(self)

    def begin(self, move: Callable[..., None], *tensors: Tensor) -> Transfer:
        """Puts a transfer behind the others."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._serve, name="shared memory", daemon=True)
            self.thread.start()
        transfer = Transfer(self, move, *tensors)
        self.begun.append(transfer)
        self.bell.put(True)
        return transfer

    def run(self, *, until: Transfer) -> bool:
        """Moves what has been begun up to a transfer, which has ended then; False where the thread is about it."""
        if not self.turn.acquire(blocking=False):
            return False
        try:
            while not until.done:
                self.begun.popleft().run()
        finally:
            self.turn.release()
        return True

    def _serve(self) -> None:
        while self.bell.get():
            with self.turn:
                if self.begun:  # else who waited has done it
                    self.begun.popleft().run()

    def close(self) -> None:
        """Ends the thread when it has done what was begun."""
        self.bell.put(False)
        if self.thread is not None:
            self.thread.join(CLOSE_SECONDS)


_lanes: weakref.WeakSet[Lane] = weakref.WeakSet()


@atexit.register
def _stop() -> None:
    """Before Python ends: a thread that it would end while torch adds would take the whole process with it (SIGABRT)."""
    lanes = list(_lanes)
    for lane in lanes:
        lane.error = lane.error or RuntimeError("the process ends")
    for lane in lanes:
        lane.close()


# --- the memory of a group -----------------------------------------------------------------------------------------------


class Segment:
    """The memory of one group as one of its ranks sees it, with torch.distributed's calls. sent: bytes that others read from here.

    Tensors are contiguous and on the CPU. Every rank of the group makes the same calls in the same order; messages have a group of two
    ranks to themselves, and one direction. Patience is counted from when somebody waits for a transfer, as gloo counts it.
    """

    def __init__(self, memory: mmap.mmap, *, index: int, peers: Sequence[int], patience: float) -> None:
        """peers: a pidfd for each rank of the group. patience: seconds until another rank is given up."""
        self.memory, self.index, self.size, self.peers, self.patience = memory, index, len(peers), peers, patience
        self.others = [rank for rank in range(self.size) if rank != index]
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.given, self.taken = 0, [0] * self.size  # slots of this rank that were filled; slots of each rank that were read here
        self.sent = 0
        self.lane = Lane()

    def close(self) -> None:
        """Nothing may be under way."""
        self.lane.close()
        for peer in self.peers:
            os.close(peer)

    # --- torch.distributed's calls -----------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, *, op: str, **_: Any) -> Transfer:
        """x in place, op: sum, max. Each rank joins a part, in rank order, and all gather the parts; two ranks show each other all of x."""
        join: Callable[..., Tensor] = getattr(torch, {"sum": "add", "max": "maximum"}[op])
        return self.lane.begin(partial(self._swap if self.size == 2 else self._reduce, join), x)

    def all_gather_single(self, out: Tensor, x: Tensor, *, runs: int = 1, **_: Any) -> Transfer:
        """x (n, ...) of every rank -> out (size n, ...), of which x may be a part; with `runs` (runs, n, ...) -> (runs, size n, ...)."""
        assert out.dtype == x.dtype and out.nbytes == self.size * x.nbytes
        return self.lane.begin(partial(self._gather, max(runs, 1)), out, x)

    def reduce_scatter_single(self, out: Tensor, x: Tensor, *, runs: int = 1, **_: Any) -> Transfer:
        """x (size n, ...) of every rank -> the sum of this rank's part in rank order, out (n, ...). out may be that part of x.

        runs: x (runs, size n, ...) -> out (runs, n, ...), elsewhere.
        """
        assert out.dtype == x.dtype and x.nbytes == self.size * out.nbytes
        return self.lane.begin(partial(self._reduce_scatter, max(runs, 1)), out, x)

    def isend(self, x: Tensor, **_: Any) -> Transfer:
        """x to the other rank."""
        return self.lane.begin(self._send, x)

    def irecv(self, out: Tensor, **_: Any) -> Transfer:
        """Into out, from the other rank."""
        return self.lane.begin(self._receive, out)

    # --- how the bytes go --------------------------------------------------------------------------------------------

    def _swap(self, join: Callable[..., Tensor], x: Tensor) -> None:
        (other,) = self.others
        for at, size in _pieces(x.nbytes, SLOT):
            here = x.data_ptr() + at
            self._give([(0, here, size)], sent=size)
            with self._taken(other) as there:
                _joined(join, [here, there] if self.index == 0 else [there, here], size, here, x.dtype)

    def _reduce(self, join: Callable[..., Tensor], x: Tensor) -> None:
        for at, size in _pieces(x.nbytes, SLOT):
            count, here = size // x.itemsize, x.data_ptr() + at
            starts = [count * rank // self.size * x.itemsize for rank in range(self.size + 1)]
            parts = [(start, here + start, stop - start) for start, stop in zip(starts, starts[1:], strict=False)]
            self._join(join, [[part] for part in parts], parts[self.index][1], x.dtype)
            self._spread(parts[self.index][1:], [[part[1:]] for part in parts])

    def _reduce_scatter(self, runs: int, out: Tensor, x: Tensor) -> None:
        length = out.nbytes // runs
        for first, count, at, size in _blocks(runs, length, self._room):
            parts = [
                [
                    ((rank * count + run) * size, x.data_ptr() + ((first + run) * self.size + rank) * length + at, size)
                    for run in range(count)
                ]
                for rank in range(self.size)
            ]
            self._join(torch.add, parts, out.data_ptr() + first * length + at, x.dtype)

    def _gather(self, runs: int, out: Tensor, x: Tensor) -> None:
        length = x.nbytes // runs
        for first, count, at, size in _blocks(runs, length, SLOT):
            parts = [
                [(out.data_ptr() + ((first + run) * self.size + rank) * length + at, size) for run in range(count)]
                for rank in range(self.size)
            ]
            self._spread((x.data_ptr() + first * length + at, count * size), parts)

    def _send(self, x: Tensor) -> None:
        for at, size in _pieces(x.nbytes, SLOT):
            self._give([(0, x.data_ptr() + at, size)], sent=size)

    def _receive(self, out: Tensor) -> None:
        for at, size in _pieces(out.nbytes, SLOT):
            with self._taken(self.others[0]) as there:
                ctypes.memmove(out.data_ptr() + at, there, size)

    @property
    def _room(self) -> int:
        """Bytes of a slot for each rank."""
        return SLOT // self.size // CELL * CELL

    def _join(self, join: Callable[..., Tensor], parts: Sequence[Sequence[tuple[int, int, int]]], out: int, dtype: torch.dtype) -> None:
        """Gives each rank its part, runs of (place in slot, address, bytes); joins what all have of this rank's, in rank order, in `out`.

        The runs of a part lie one after the other in the slot, and in `out`.
        """
        own = parts[self.index]
        low, size = own[0][0], sum(run[2] for run in own)
        # `out` may be where its own part is, which the first two of all would be joined over.
        kept = self.index > 1 or len(own) > 1
        given = [run for rank, part in enumerate(parts) if kept or rank != self.index for run in part]
        slot = self._give(given, sent=sum(run[2] for rank in self.others for run in parts[rank]))
        mine = slot + low if kept else own[0][1]
        _joined(join, [mine if rank == self.index else self._take(rank) + low for rank in range(self.size)], size, out, dtype)
        for rank in self.others:
            self._back(rank)

    def _spread(self, mine: tuple[int, int], parts: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Gives all ranks what is at (address, bytes), and puts what each has given into its runs of (address, bytes)."""
        address, size = mine
        self._give([(0, address, size)], sent=size * len(self.others))
        if parts[self.index][0][0] != address:
            _scatter(address, parts[self.index])
        for rank in self.others:
            with self._taken(rank) as there:
                _scatter(there, parts[rank])

    # --- slots -------------------------------------------------------------------------------------------------------

    def _give(self, runs: Sequence[tuple[int, int, int]], *, sent: int) -> int:
        """Fills this rank's next slot with (place in it, address, bytes) and tells all; returns its address. sent: bytes they will read."""
        slot = self._slot(self.index, self.given)
        for rank in self.others:
            self._wait(self._free(self.index, rank), rank)
        for place, address, size in runs:
            ctypes.memmove(slot + place, address, size)
        for rank in self.others:
            _c.sem_post(self._filled(self.index, rank))
        self.given += 1
        self.sent += sent
        return slot

    def _take(self, rank: int) -> int:
        """The address of a rank's next slot, filled. It is this rank's to read until `_back`."""
        self._wait(self._filled(rank, self.index), rank)
        self.taken[rank] += 1
        return self._slot(rank, self.taken[rank] - 1)

    def _back(self, rank: int) -> None:
        _c.sem_post(self._free(rank, self.index))

    @contextmanager
    def _taken(self, rank: int) -> Iterator[int]:
        """`_take`, and back again."""
        yield self._take(rank)
        self._back(rank)

    def _slot(self, rank: int, turn: int) -> int:
        return self.base + _slots_at(self.size) + (rank * SLOTS + turn % SLOTS) * SLOT

    def _filled(self, writer: int, reader: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.base + _semaphore(self.size, writer, reader, free=False))

    def _free(self, writer: int, reader: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.base + _semaphore(self.size, writer, reader, free=True))

    def _wait(self, semaphore: ctypes.c_void_p, rank: int) -> None:
        """Takes one from a semaphore. Raises RuntimeError, in gloo's words, where the rank that adds to it is gone or does not come."""
        if _c.sem_trywait(semaphore) == 0:
            return
        start, look = time.monotonic(), 0.0
        while True:
            if (now := time.monotonic()) >= look:
                gone, awaited = look and _has_ended(self.peers[rank]), self.lane.awaited
                if _c.sem_trywait(semaphore) == 0:  # what it did last counts
                    return
                if gone:
                    raise RuntimeError("Connection closed by peer")
                if awaited is not None and now - max(start, awaited) > self.patience:
                    raise RuntimeError(f"Timed out waiting {self.patience:g} s for a rank of the group")
                if self.lane.error is not None:
                    raise self.lane.error
                look = now + LOOK_SECONDS
            moment = _Moment(int(look), int(look % 1 * 1e9))
            if _c.sem_clockwait(semaphore, time.CLOCK_MONOTONIC, ctypes.byref(moment)) == 0:
                return
            assert ctypes.get_errno() in (errno.ETIMEDOUT, errno.EINTR), os.strerror(ctypes.get_errno())


def _pieces(total: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, length) of runs of at most `most`."""
    return ((at, min(most, total - at)) for at in range(0, total, most))


def _blocks(runs: int, length: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of `length` bytes in blocks of at most `most`: (first run, number of runs, where it begins in them, bytes of each)."""
    if 0 < length <= most:
        yield from ((first, count, 0, length) for first, count in _pieces(runs, most // length))
    else:
        yield from ((run, 1, at, size) for run in range(runs) for at, size in _pieces(length, most))


def _scatter(source: int, runs: Sequence[tuple[int, int]]) -> None:
    """Copies what is at an address to runs of (address, bytes), one after the other."""
    for address, size in runs:
        ctypes.memmove(address, source, size)
        source += size


def _joined(join: Callable[..., Tensor], places: Sequence[int], size: int, out: int, dtype: torch.dtype) -> None:
    """Joins what is at some addresses, `size` bytes each, in their order, at `out`, which may be the first or the second of them."""
    for at, some in _pieces(size, SLOT if torch.get_num_threads() == 1 else SERIAL * dtype.itemsize):
        joined, first = _tensor(out + at, some, dtype), _tensor(places[0] + at, some, dtype)
        for place in places[1:]:
            join(first, _tensor(place + at, some, dtype), out=joined)
            first = joined


def _tensor(address: int, size: int, dtype: torch.dtype) -> Tensor:
    """Memory as a flat tensor."""
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)


def _has_ended(peer: int) -> bool:
    """Whether the process behind a pidfd has."""
    poll = select.poll()
    poll.register(peer, select.POLLIN)
    return bool(poll.poll(0))


def _semaphore(size: int, writer: int, reader: int, *, free: bool) -> int:
    """Where it is: the first cell is for the word, then come those of filled slots, then those of free ones."""
    return CELL * (1 + (free * size + writer) * size + reader)


def _slots_at(size: int) -> int:
    return -(-_semaphore(size, size, 0, free=True) // mmap.PAGESIZE) * mmap.PAGESIZE


# --- how ranks find out that they can share it -----------------------------------------------------------------------------


class Offer:
    """One rank's part in agreeing on a segment. card: CARD integers for the others; zeros where this rank cannot take part.

    The first rank of the group makes the memory, and keeps it until `close`.
    """

    def __init__(self, index: int, size: int) -> None:
        self.index, self.size, self.made = index, size, -1
        self.length = _slots_at(size) + size * SLOTS * SLOT
        self.card = [0] * CARD
        try:
            os.close(os.pidfd_open(os.getpid()))
            _c.sem_clockwait  # noqa: B018  it is there, or AttributeError
            word = self._make() if index == 0 else 0
            self.card = [_machine(), os.getpid(), self.made, word]
        except (OSError, AttributeError):  # a system that lacks one of these
            pass

    def _make(self) -> int:
        """Makes the memory; returns the word that the others will find in it."""
        self.made = os.memfd_create("dist-llm-group")
        os.ftruncate(self.made, self.length)
        word = secrets.randbits(62) + 1
        with mmap.mmap(self.made, self.length) as memory:
            start = ctypes.c_char.from_buffer(memory)
            for free in (False, True):
                for at in range(self.size**2):
                    place = ctypes.addressof(start) + _semaphore(self.size, *divmod(at, self.size), free=free)
                    _c.sem_init(ctypes.c_void_p(place), 1, SLOTS * free)
            memory[:8] = word.to_bytes(8, "little")
            del start
        return word

    def join(self, cards: Sequence[Sequence[int]], *, patience: float) -> Segment | None:
        """The segment, from all ranks' cards; None where it cannot be had here. patience: seconds until a rank is given up."""
        if self.card[0] == 0 or any(card[0] != self.card[0] for card in cards):
            return None
        _, maker, descriptor, word = cards[0]
        peers: list[int] = []
        try:
            memory = _opened(Path(f"/proc/{maker}/fd/{descriptor}"), self.length, word)
            for card in cards:
                peers.append(os.pidfd_open(card[1]))
        except OSError:
            memory = None
        if memory is not None and len(peers) == self.size:
            return Segment(memory, index=self.index, peers=peers, patience=patience)
        for peer in peers:
            os.close(peer)
        return None

    def close(self) -> None:
        """After all have joined."""
        if self.made >= 0:
            os.close(self.made)


def possible() -> bool:
    """Whether ranks of this machine can share memory, tried by this process alone."""
    offers = [Offer(index, 2) for index in range(2)]
    found = [offer.join([one.card for one in offers], patience=1.0) for offer in offers]
    for offer in offers:
        offer.close()
    for segment in found:
        if segment is not None:
            segment.close()
    return None not in found


def _opened(path: Path, length: int, word: int) -> mmap.mmap | None:
    """The memory behind another process's descriptor; None where it is something else: a process of another namespace has that number."""
    if not stat.S_ISREG(path.stat().st_mode):
        return None
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if os.fstat(handle).st_size != length:
            return None
        memory = mmap.mmap(handle, length)
    finally:
        os.close(handle)
    return memory if int.from_bytes(memory[:8], "little") == word else None


def _machine() -> int:
    """A number of this machine, and of what sees the same processes and may open their descriptors."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    seen = f"{os.stat('/proc/self/ns/pid').st_ino} {os.getuid()}".encode()
    return int.from_bytes(hashlib.sha256(boot + seen).digest()[:8], "little") >> 2 or 1
