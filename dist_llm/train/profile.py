"""Profiles of a few steps on request (`train --profile 10:13`): where the time goes, and on CUDA the memory.

Every rank writes `trace-rank-N.json` to the run's logs, a Chrome trace for https://ui.perfetto.dev, and on CUDA
`memory-rank-N.html` (`memory_page.py`). Steps that are watched take longer; their lines in metrics.jsonl say so by their time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dist_llm.train.memory_page import memory_page
from dist_llm.train.storage import storing

EVENTS = 1_000_000  # of the allocator that are remembered: a step of a large model makes some thousands


class Profile:
    """Watches the steps of a window, (first, last) as metrics.jsonl counts; None: none."""

    def __init__(self, window: tuple[int, int] | None, *, folder: Path, rank: int, device: torch.device) -> None:
        self.window, self.folder, self.rank = window, folder, rank
        self.on_cuda = device.type == "cuda"
        self.watching: Any = None

    @contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Around step `done` (from 1): begins to watch before the first of the window, writes after the last."""
        if self.window is None or not self.window[0] <= done <= self.window[1]:
            yield
            return
        if self.watching is None:
            self._start()
        with torch.profiler.record_function(f"step {done}"):
            yield
        if done == self.window[1]:
            self._write()

    def _start(self) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if self.on_cuda else [])]
        if self.on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=EVENTS, stacks="python")
        self.watching = torch.profiler.profile(activities=kinds)
        self.watching.start()

    def _write(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()
        self.watching.stop()
        with storing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.watching.export_chrome_trace(str(self._fresh(f"trace-rank-{self.rank}.json")))
            if self.on_cuda:
                page = memory_page(torch.cuda.memory._snapshot(), title=f"Memory of rank {self.rank}")
                self._fresh(f"memory-rank-{self.rank}.html").write_text(page, encoding="utf-8")
        if self.on_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
        self.watching = None

    def _fresh(self, name: str) -> Path:
        """A path in the folder with nothing there: a link in its place would be written through."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        return path
