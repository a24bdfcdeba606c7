"""Transfers of device memory by a backend that knows host memory alone: through pinned copies, beside what the device computes.

So ranks can share a GPU (`runtime.backend: gloo`), which NCCL refuses. A transfer copies what it sends to the host on a
stream of its own, hands it to the backend on a thread of its own, and copies what has come back to the device.
There is one thread for each process group: it keeps the order of the group's calls, and no group waits for another's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

Call = Callable[[list[Tensor]], Any]  # begins a transfer of host tensors, returns what can be waited for

_lanes: dict[Any, Lane] = {}  # by process group


class Transfer:
    """A transfer under way; `wait` as torch.distributed's Work has it."""

    def __init__(self, done: Future, stream: Any) -> None:
        self.done, self.stream = done, stream

    def wait(self) -> None:
        """The host waits for the backend; the device waits for the copies back. Raises what the backend raised."""
        event = self.done.result()
        if event is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)


class Lane:
    """The transfers of one process group, in the order in which they are begun."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transfer")

    def start(self, call: Call, *, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Transfer:
        """Begins call(host copies of reads, then of writes); a tensor in both has one copy. Until `wait` all belong to the transfer."""
        known: dict[int, Tensor] = {}
        for tensor in (*reads, *writes):
            known.setdefault(id(tensor), torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.stream is not None))
        copied = self._copy([(known[id(tensor)], tensor) for tensor in reads], after_device=True)
        given = [known[id(tensor)] for tensor in (*reads, *(one for one in writes if all(one is not read for read in reads)))]
        back = [(tensor, known[id(tensor)]) for tensor in writes]
        return Transfer(self.thread.submit(self._move, call, given, copied, back), self.stream)

    def _move(self, call: Call, given: list[Tensor], copied: Any, back: list[tuple[Tensor, Tensor]]) -> Any:
        """On the thread: waits for the copies, lets the backend work, begins the copies back."""
        if copied is not None:
            copied.synchronize()
        call(given).wait()
        return self._copy(back, after_device=False)

    def _copy(self, pairs: Sequence[tuple[Tensor, Tensor]], *, after_device: bool) -> Any:
        """Begins (out, x) copies on the lane's stream; the event after them, None where they are done at once."""
        if self.stream is None:
            for out, x in pairs:
                out.copy_(x)
            return None
        if after_device:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for out, x in pairs:
                out.copy_(x, non_blocking=True)
                (out if out.is_cuda else x).record_stream(self.stream)
            return self.stream.record_event()


def lane(group: Any, device: torch.device) -> Lane:
    """The lane of a process group."""
    if group not in _lanes:
        _lanes[group] = Lane(device)
    return _lanes[group]


def close() -> None:
    """Ends the threads; nothing may be under way."""
    for one in _lanes.values():
        one.thread.shutdown(wait=False, cancel_futures=True)
    _lanes.clear()


class HostCopies:
    """torch.distributed's calls, on host copies. calls: the module, or what has its functions."""

    def __init__(self, calls: Any, device: torch.device) -> None:
        self.calls, self.device = calls, device

    def all_reduce(self, x: Tensor, *, group: Any, **how: Any) -> Transfer:
        """x in place."""
        return lane(group, self.device).start(lambda host: self.calls.all_reduce(host[0], group=group, **how), reads=[x], writes=[x])

    def all_gather_single(self, out: Tensor, x: Tensor, *, group: Any, **how: Any) -> Transfer:
        """x (n, ...) of every rank -> out (size n, ...)."""
        return self._both(self.calls.all_gather_single, out, x, (), group, how)

    def reduce_scatter_single(self, out: Tensor, x: Tensor, *, group: Any, **how: Any) -> Transfer:
        """x (size n, ...) of every rank -> the sum of this rank's part, out (n, ...)."""
        return self._both(self.calls.reduce_scatter_single, out, x, (), group, how)

    def all_to_all_single(self, out: Tensor, x: Tensor, *splits: Any, group: Any, **how: Any) -> Transfer:
        """Part i of x to rank i; what rank i sends becomes part i of out. splits: sizes of the parts of out, of x."""
        return self._both(self.calls.all_to_all_single, out, x, splits, group, how)

    def isend(self, x: Tensor, *, group: Any, **how: Any) -> Transfer:
        """x to another rank."""
        return lane(group, self.device).start(lambda host: self.calls.isend(host[0], group=group, **how), reads=[x], writes=[])

    def irecv(self, out: Tensor, *, group: Any, **how: Any) -> Transfer:
        """Into out, from another rank."""
        return lane(group, self.device).start(lambda host: self.calls.irecv(host[0], group=group, **how), reads=[], writes=[out])

    def _both(self, call: Callable, out: Tensor, x: Tensor, splits: tuple, group: Any, how: dict[str, Any]) -> Transfer:
        return lane(group, self.device).start(lambda host: call(host[1], host[0], *splits, group=group, **how), reads=[x], writes=[out])
