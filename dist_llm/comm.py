"""The collectives: one line each at the call, bytes booked per axis, spans recorded on request.

Bytes are the payload that a ring algorithm sends from one rank: for n ranks and a whole tensor of V bytes,
all_gather and reduce_scatter (n-1)/n V, all_reduce 2 (n-1)/n V, point to point V (Thakur et al. 2005;
ZeRO, arXiv:1910.02054, section 7). A group of one rank communicates nothing: the same lines run, nothing is sent.

`start_` begins a transfer and returns a `Pending`; its `finish()` waits and returns the result. A buffer belongs
to the transfer until then. A thread of gloo holds it a moment longer, how long depends on the load of the machine; where
memory is counted (`Ledger.lending`) `finish()` waits for that too.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_llm import flight
from dist_llm.mesh import Group, segments
from dist_llm.shm import Segment, Transfer
from dist_llm.staging import HostCopies

_EARLIER = {"all_gather_single": "all_gather_into_tensor", "reduce_scatter_single": "reduce_scatter_tensor"}  # in earlier versions of torch
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass
class Ledger:
    """What this rank sent: bytes per axis, and calls as (name, axis, start, end, bytes) while `recording`.

    lending: tensors are only lent to the backend, a transfer is finished when it has given them back.
    """

    sent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: list[tuple[str, str, float, float, float]] = field(default_factory=list)
    recording: bool = False
    lending: bool = False

    def book(self, axis: str, sent: float) -> None:
        """Adds bytes to an axis."""
        self.sent[axis] += sent

    def take(self) -> dict[str, float]:
        """The bytes since the last call, per axis, and starts anew."""
        taken = {axis: int(sent) if sent == int(sent) else sent for axis, sent in sorted(self.sent.items()) if sent}
        self.sent.clear()
        return taken


ledger = Ledger()


@contextmanager
def booked_on(axis: str):
    """Books the bytes of the block on `axis` (control: norms and flags)."""
    before = ledger.sent.copy()
    try:
        yield
    finally:
        moved = sum(ledger.sent.values()) - sum(before.values())
        ledger.sent = before
        ledger.book(axis, moved)


@dataclass
class Pending:
    """A transfer under way."""

    work: Any  # torch.distributed.Work, or None when there is nothing to wait for
    result: Callable[[], Tensor]
    note: tuple[str, str, float, float] = ("", "", 0.0, 0.0)
    number: int = -1  # in the flight recorder
    lent: Sequence[tuple[Tensor, weakref.ref]] = ()  # held as the work holds it; what the backend has of it, while it does

    def finish(self) -> Tensor:
        """Waits for the transfer and returns its result."""
        if self.work is not None:
            with _waiting(self.number):
                self.work.wait()
                if self.lent:
                    self.work = None  # it holds what the backend has
                while any(buffer() is not None for _, buffer in self.lent):
                    time.sleep(0)  # the backend's thread has told of the end already, and is about to let go
            name, axis, start, sent = self.note
            if ledger.recording:
                ledger.calls.append((name, axis, start, time.perf_counter(), sent))
        return self.result()


@contextmanager
def _waiting(number: int):
    """Around the wait for a collective: the flight recorder says that this rank waits, and for how long it did."""
    recorder = flight.current
    if recorder is None:
        yield
        return
    recorder.wait(number)
    start = time.perf_counter()
    yield  # a wait that fails stays recorded as one
    recorder.done(number, time.perf_counter() - start)


def _recorded(name: str, group: Group, x: Tensor) -> int:
    """Tells the flight recorder that a collective begins."""
    return -1 if flight.current is None else flight.current.begin(name, group.title, str(x.dtype)[6:], x.shape)


class _Direct:
    """torch.distributed, by its newest names."""

    def all_reduce(self, x: Tensor, *, op: str, **how: Any) -> Any:
        """op: sum, max."""
        return dist.all_reduce(x, op=_OPERATIONS[op], **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name if hasattr(dist, name) else _EARLIER[name])


_direct = _Direct()


def _by(x: Tensor, group: Group) -> Any:
    """Who moves tensors like x in a group: torch.distributed, its calls on host copies (staging.py), or memory the ranks share (shm.py)."""
    if _through_host(x, group):
        return HostCopies(_direct, x.device)
    segment = segments.get(group.handle) if x.device.type == "cpu" else None
    return _direct if segment is None else segment


def _through_host(x: Tensor, group: Group) -> bool:
    """Whether the group's backend cannot reach the memory of x."""
    return x.is_cuda and dist.get_backend(group.handle) == "gloo"


def _begin(
    name: str, group: Group, sent: float, call: Callable[..., Any], tensors: Sequence[Tensor], result: Callable[[], Tensor], **how: Any
) -> Pending:
    """Begins call(*tensors, group=..., **how); the last tensor is what the flight recorder tells of."""
    ledger.book(group.axis, sent)
    number, given, lent = _recorded(name, group, tensors[-1]), tensors, []
    if ledger.lending and all(x.numel() and x.device.type == "cpu" for x in tensors):
        given, lent = zip(*(_lend(x) for x in tensors), strict=True)
    work = call(*given, group=group.handle, **how)
    if lent and isinstance(work, Transfer):
        work.helps = False  # its sums are made on its own thread: here they would be seen as tensors
    return Pending(work, result, (name, group.axis, time.perf_counter(), sent), number, lent)


def _lend(x: Tensor) -> tuple[Tensor, tuple[Tensor, weakref.ref]]:
    """The memory of a tensor on the host as another one, flat, that holds nothing of the first; the first, and what dies with the other."""
    buffer = (ctypes.c_char * x.nbytes).from_address(x.data_ptr())
    return torch.frombuffer(buffer, dtype=x.dtype), (x, weakref.ref(buffer))


def _done(x: Tensor) -> Pending:
    return Pending(None, lambda: x)


def _swapped(pending: Pending) -> Pending:
    """The same, with the first two dimensions of its result in each other's place."""
    result = pending.result
    pending.result = lambda: result().transpose(0, 1).contiguous()
    return pending


def start_all_reduce(x: Tensor, group: Group, *, op: str = "sum") -> Pending:
    """Enters with a partial tensor on each rank, leaves with the sum (or maximum) on each, in place."""
    if group.size == 1:
        return _done(x)
    assert x.is_contiguous()
    sent, by = 2 * (group.size - 1) * x.nbytes / group.size, _by(x, group)
    return _begin("all_reduce", group, sent, by.all_reduce, [x], lambda: x, op=op, async_op=True)


def all_reduce(x: Tensor, group: Group, *, op: str = "sum") -> Tensor:
    """`start_all_reduce`, finished."""
    return start_all_reduce(x, group, op=op).finish()


def start_all_gather(x: Tensor, group: Group, *, out: Tensor | None = None) -> Pending:
    """Enters with a shard (n, ...) on each rank, leaves with all shards joined along dim 0 (size * n, ...) on each."""
    if group.size == 1:
        if out is not None and out.data_ptr() != x.data_ptr():
            out.copy_(x)
        return _done(x if out is None else out)
    whole = x.new_empty((group.size * x.shape[0], *x.shape[1:])) if out is None else out
    sent, by = (group.size - 1) * whole.nbytes / group.size, _by(x, group)
    return _begin("all_gather", group, sent, by.all_gather_single, [whole, x], lambda: whole, async_op=True)


def start_all_gather_inner(x: Tensor, group: Group) -> Pending:
    """Enters with (B, n, ...), leaves with (B, size * n, ...), joined along dim 1; without shared memory by copies around an all_gather."""
    if group.size == 1:
        return _done(x)
    if not isinstance(by := _by(x, group), Segment):
        return _swapped(start_all_gather(x.transpose(0, 1).contiguous(), group))
    whole = x.new_empty(len(x), group.size * x.shape[1], *x.shape[2:])
    return _begin("all_gather", group, (group.size - 1) * x.nbytes, by.all_gather_single, [whole, x], lambda: whole, runs=len(x))


def all_gather(x: Tensor, group: Group) -> Tensor:
    """`start_all_gather`, finished."""
    return start_all_gather(x, group).finish()


def start_reduce_scatter(x: Tensor, group: Group, *, fixed: bool = True, out: Tensor | None = None) -> Pending:
    """Enters with a partial tensor (size * n, ...) on each rank, leaves with the sum of one shard (n, ...) on each, in `out`.

    fixed: shards travel by all-to-all and are added here in rank order, so that the sum is the same to the bit on
    any backend (on gloo it also sends half of what its reduce_scatter does); otherwise the backend reduces. Memory that
    ranks share has that order always, and no buffer beside.
    """
    if group.size == 1:
        if out is not None and out.data_ptr() != x.data_ptr():
            out.copy_(x)
        return _done(x if out is None else out)
    shard = x.new_empty(x.shape[0] // group.size, *x.shape[1:]) if out is None else out
    sent, by = (group.size - 1) * x.nbytes / group.size, _by(x, group)
    if not fixed or isinstance(by, Segment):
        return _begin("reduce_scatter", group, sent, by.reduce_scatter_single, [shard, x], lambda: shard, async_op=True)
    parts = torch.empty_like(x)

    def add_in_rank_order() -> Tensor:
        first, second, *others = parts.view(group.size, -1)
        torch.add(first, second, out=shard.view(-1))
        for part in others:
            shard.view(-1).add_(part)
        return shard

    return _begin("reduce_scatter", group, sent, by.all_to_all_single, [parts, x], add_in_rank_order, async_op=True)


def start_reduce_scatter_inner(x: Tensor, group: Group, *, fixed: bool = True) -> Pending:
    """Enters with a partial tensor (B, size * n, ...), leaves with the sum of one shard of dim 1, (B, n, ...); copies as above."""
    if group.size == 1:
        return _done(x)
    if not isinstance(by := _by(x, group), Segment):
        return _swapped(start_reduce_scatter(x.transpose(0, 1).contiguous(), group, fixed=fixed))
    shard, sent = x.new_empty(len(x), x.shape[1] // group.size, *x.shape[2:]), (group.size - 1) * x.nbytes / group.size
    return _begin("reduce_scatter", group, sent, by.reduce_scatter_single, [shard, x], lambda: shard, runs=len(x))


def reduce_scatter(x: Tensor, group: Group, *, fixed: bool = True) -> Tensor:
    """`start_reduce_scatter`, finished."""
    return start_reduce_scatter(x, group, fixed=fixed).finish()


def start_send(x: Tensor, channel: Group) -> Pending:
    """Sends a tensor to the other rank of a channel; `x` stays alive until finished."""
    peer = channel.ranks[1 - channel.index]
    return _begin("send", channel, x.nbytes, _by(x, channel).isend, [x], lambda: x, dst=peer)


def start_recv(out: Tensor, channel: Group) -> Pending:
    """Receives into `out` from the other rank of a channel."""
    peer = channel.ranks[1 - channel.index]
    return _begin("recv", channel, 0, _by(out, channel).irecv, [out], lambda: out, src=peer)


def barrier(group: Group) -> None:
    """Waits for every rank of the group."""
    if group.size > 1:
        number = -1 if flight.current is None else flight.current.begin("barrier", group.title, "another dtype", ())
        with _waiting(number):
            dist.barrier(group=group.handle)


def gather_json(value: Any, group: Group, *, device: torch.device) -> list[Any]:
    """Every rank's JSON value, in rank order, on every rank (booked as control)."""
    import json

    if group.size == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    with booked_on("control"):
        sizes = all_gather(torch.tensor([text.numel()], device=device), group).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
        padded[: text.numel()] = text
        rows = all_gather(padded, group).view(group.size, -1).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]
