"""The update in host memory (`offload=optimizer`): gradients go down, new weights come up (arXiv:2101.06840).

Master weights and moments live in host memory, so a device keeps weights and gradients alone. Unit by unit the owned
gradient travels to the host, the host updates, and the new weights travel back in the dtype that the model computes
with: a bfloat16 weight costs 4 bytes down and 2 up. On CUDA the copies of other units travel meanwhile, each direction on
a stream of its own; on a CPU device the same lines run and a copy is done at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dist_llm.parallel.zero import FlatUnit

HOST = torch.device("cpu")
BUFFERS = 3  # one takes the next gradient, one is worked on, one sends weights


class Lane:
    """Copies between a device and host memory, in order, beside what the device computes."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def follow(self) -> None:
        """Copies begun from now on come after what the device has been given to compute."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def lead(self) -> None:
        """What the device is given to compute from now on comes after the copies begun."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def start_copy(self, out: Tensor, x: Tensor) -> Callable[[], None]:
        """Begins out <- x; the call it returns waits until that is done. Until then both belong to the copy."""
        if self.stream is None:
            out.copy_(x)
            return _nothing
        with torch.cuda.stream(self.stream):
            out.copy_(x, non_blocking=True)
            return self.stream.record_event().synchronize


def _nothing() -> None:
    pass


class Ferry:
    """Carries the owned gradients of a rank's units to host memory, and the new weights back.

    The buffers go round and are as large as the largest gradient: a unit's new weights go up in the buffer in which its
    gradient came down. They alone are pinned: the update reads and writes the rest, the bus does not.
    """

    def __init__(self, flats: Sequence[FlatUnit], device: torch.device) -> None:
        size, pinned = max((flat.master.nbytes for flat in flats), default=0), device.type == "cuda"
        self.buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(BUFFERS)]
        self.left: list[Callable[[], None]] = [_nothing] * BUFFERS  # waits until a buffer's weights have gone up
        self.down, self.up = Lane(device), Lane(device)

    def visit(self, owned: Sequence[tuple[FlatUnit, Tensor]]) -> Iterator[tuple[FlatUnit, Tensor]]:
        """For each unit and its owned gradient: the unit and the gradient in host memory, the caller's until the next one is asked for.

        What the caller has then made of the unit's master weights becomes its weights; they are there when the last is done.
        """
        self.down.follow()
        self.up.follow()
        arrived = self._start_fetch(owned, 0)
        for at, (flat, gradient) in enumerate(owned):
            now, arrived = arrived, self._start_fetch(owned, at + 1)
            now()
            yield flat, self._part(at, gradient)
            weights = self._part(at, flat.owned_weights)
            weights.copy_(flat.master)
            self.left[at % BUFFERS] = self.up.start_copy(flat.owned_weights, weights)
        self.up.lead()

    def _start_fetch(self, owned: Sequence[tuple[FlatUnit, Tensor]], at: int) -> Callable[[], None]:
        if at == len(owned):
            return _nothing
        self.left[at % BUFFERS]()
        gradient = owned[at][1]
        return self.down.start_copy(self._part(at, gradient), gradient)

    def _part(self, at: int, like: Tensor) -> Tensor:
        """The start of a buffer as a tensor of the same dtype and size."""
        return self.buffers[at % BUFFERS][: like.nbytes].view(like.dtype)
