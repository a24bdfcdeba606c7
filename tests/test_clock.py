"""Measured spans: on a CUDA device they show when it worked, not when it was given the work."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dist_llm.parallel.pipeline import Clock


@dataclass
class Device:
    """A stream with work for `busy` seconds at each mark, given to it in no time."""

    busy: float = 0.5
    done: float = 100.0  # on its own clock
    waited: list[str] = field(default_factory=list)

    def synchronize(self) -> None:
        self.waited.append("stream")


@dataclass
class Event:
    """torch.cuda.Event on that stream."""

    enable_timing: bool = False
    at: float = 0.0

    def record(self, stream: Device) -> None:
        assert self.enable_timing
        self.at = stream.done
        stream.done += stream.busy

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1000.0 * (other.at - self.at)


def test_marks_on_cuda_are_times_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock, before = Clock(torch.device("cuda", 0)), time.perf_counter()
    assert device.waited == [], "a step that is not watched is not held up"
    marks: list[Any] = [clock.mark() for _ in range(3)]
    found = [clock.seconds(mark) for mark in marks]
    assert device.waited == ["stream"]
    assert [found[at + 1] - found[at] for at in (0, 1)] == pytest.approx([0.5, 0.5])
    assert 0.5 <= found[0] - before < 5.0, "counted from the host's clock"


def test_marks_on_the_cpu_are_the_clock_itself() -> None:
    clock, before = Clock(torch.device("cpu")), time.perf_counter()
    assert before <= clock.seconds(clock.mark()) <= time.perf_counter()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_kernel_takes_as_long_as_the_device_needs() -> None:
    clock = Clock(torch.device("cuda", 0))
    begun, start = clock.mark(), time.perf_counter()
    torch.cuda._sleep(200_000_000)  # device cycles: about a tenth of a second
    ended, given = clock.mark(), time.perf_counter() - start
    assert clock.seconds(ended) - clock.seconds(begun) > max(0.02, 3 * given)
