"""A step as one CUDA graph (`runtime.cuda_graph`): its kernels are recorded once and replayed, so that the host launches one thing.

Recorded is everything between the batch and the numbers that the host reads: forward, backward, reductions, the sums for
the norm. The update stays outside: it needs the norm. A graph reads and writes the same memory every time, so the batch is
copied into contexts that stay, and what the step leaves (gradients, sums) is taken from where the recording left it.

Legal where memory and calls are the same in every step: see `config/rules.py`. The first steps run as they are: they compile,
choose kernels and open communicators. Elsewhere the engine calls the same work without a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_llm import comm
from dist_llm.model.transformer import Context
from dist_llm.parallel.zero import FlatUnit

WARM = 2  # steps before the recording
Work = Callable[[Sequence[Context]], Tensor]


class Recorder(Protocol):
    """Records device work once and repeats it in place."""

    def warm(self, work: Callable[[], Tensor]) -> Tensor:
        """Runs the work as it is, where it will be recorded."""

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """Records the work without running it; its result is there after each `replay`."""

    def replay(self) -> None:
        """Begins the recorded work on the same memory."""


class CudaRecorder:
    """A CUDA graph and the stream on which it is made."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.graph = device, torch.cuda.Stream(device), torch.cuda.CUDAGraph()

    def warm(self, work: Callable[[], Tensor]) -> Tensor:
        """On the recording's stream, between what was given to the device before and what comes after."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            out = work()
        current.wait_stream(self.stream)
        return out

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        """thread_local: NCCL's watchdog may ask for its events meanwhile."""
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """Behind what the device has been given so far."""
        self.graph.replay()


class StepGraph:
    """The recorded step of an engine. `run` takes what an engine's run takes; all steps have equally many contexts of equal shapes."""

    def __init__(self, flats: Sequence[FlatUnit], recorder: Recorder) -> None:
        self.flats, self.recorder = flats, recorder
        self.inputs: list[Context] = []
        self.steps = 0
        self.result: Tensor | None = None
        self.gradients: list[Tensor | None] = []
        self.sent: dict[str, float] = {}  # bytes of a step, by axis: the calls that book them are not made again

    def run(self, contexts: Sequence[Context], work: Work) -> Tensor:
        """work(contexts), recorded after the first steps; its result and the gradients are valid until the next run."""
        self._take(contexts)
        self.steps += 1
        if self.steps <= WARM:
            return self.recorder.warm(lambda: work(self.inputs))
        if self.result is None:
            before = comm.ledger.sent.copy()
            self.result = self.recorder.record(lambda: work(self.inputs))
            self.sent = {axis: sent - before.get(axis, 0.0) for axis, sent in comm.ledger.sent.items()}
            self.gradients = [flat.gradient for flat in self.flats]
        else:
            for axis, sent in self.sent.items():
                comm.ledger.book(axis, sent)
        self.recorder.replay()
        for flat, gradient in zip(self.flats, self.gradients, strict=True):
            flat.gradient = gradient
        return self.result

    def _take(self, contexts: Sequence[Context]) -> None:
        """Copies a step's contexts into those that stay."""
        for at in range(len(contexts)):
            context = contexts[at]
            if at == len(self.inputs):
                self.inputs.append(_map(context, torch.clone))
            for kept, given in zip(_tensors(self.inputs[at]), _tensors(context), strict=True):
                assert kept.shape == given.shape, (kept.shape, given.shape)
                kept.copy_(given)


def _tensors(context: Context) -> list[Tensor]:
    """The tensors of a context, in the order of its fields."""
    values = (getattr(context, field.name) for field in fields(context))
    parts = (part for value in values for part in (value if isinstance(value, tuple) else (value,)))
    return [part for part in parts if isinstance(part, Tensor)]


def _map(context: Context, change: Callable[[Tensor], Tensor]) -> Context:
    """The context with every tensor changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(change, value))
        return change(value) if isinstance(value, Tensor) else value

    return replace(context, **{field.name: changed(getattr(context, field.name)) for field in fields(context)})
