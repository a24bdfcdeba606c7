"""Profiles on request: the window, the traces of a real run, and the page of the allocator's record."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.cli.train import profile_window
from dist_llm.errors import UsageError
from dist_llm.train.memory_page import BEFORE, POINTS, memory_page, place, timeline
from dist_llm.train.profile import Profile
from tests.commands import Commands

MIB = 2**20


@pytest.mark.parametrize(("text", "window"), [("10:13", (10, 13)), ("10", (10, 10)), ("1:20", (1, 20)), ("20", (20, 20))])
def test_windows(text: str, window: tuple[int, int]) -> None:
    assert profile_window(text, steps=20) == window


@pytest.mark.parametrize("text", ["", ":", "0:3", "5:4", "1:21", "a:b", "1:2:3", "-1:2", "1.5", "²"])
def test_windows_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="no such steps") as caught:
        profile_window(text, steps=20)
    assert "from 1 to 20" in str(caught.value.expected)


def test_every_rank_of_a_run_writes_its_trace(commands: Commands, tmp_path: Path) -> None:
    words = ["configs/tiny.yaml", "--layout", "dp=2,zero=2", "--steps", "4", "--profile", "2:3", "--run-dir", str(tmp_path / "run")]
    words += ["runtime.device=cpu", f"data.dir={tmp_path / 'data'}", "data.max_tokens=20_000"]
    done = commands.run("train", *words, "batch.micro=4")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        names = {event.get("name") for event in json.loads((tmp_path / f"run/logs/trace-rank-{rank}.json").read_text())["traceEvents"]}
        assert {"step 2", "step 3", "Column", "RowBackward"} <= names
        assert not {"step 1", "step 4"} & names
    assert not list((tmp_path / "run/logs").glob("memory-*"))


def test_steps_outside_the_window_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(torch.profiler, "profile", lambda **options: begun.append(options))
    for window in (None, (5, 6)):
        profile = Profile(window, folder=tmp_path, rank=0, device=torch.device("cpu"))
        for done in (1, 2, 3, 4):
            with profile.step(done):
                pass
    assert not begun and not list(tmp_path.iterdir())


# --- the page of the memory ------------------------------------------------------------------------------------------


def frame(file: str, line: int, name: str) -> dict[str, Any]:
    return {"filename": file, "line": line, "name": name}


KERNELS = [frame("/usr/lib/torch/functional.py", 5, "norm"), frame("/home/dist_llm/model/kernels.py", 33, "norm"), frame("/x.py", 1, "x")]


def event(action: str, addr: int, size: int, frames: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size, "frames": frames or [], "time_us": 1}


EVENTS = [
    event("segment_alloc", 0, 100 * MIB),
    event("alloc", 1, 4 * MIB, KERNELS),
    event("free_requested", 99, 2 * MIB),  # made before
    event("alloc", 2, 8 * MIB, KERNELS),
    event("alloc", 3, 1 * MIB, [frame("<script>.py", 1, "b")]),  # the top: 13 and what is left of before
    event("free_requested", 1, 4 * MIB),
    event("free_completed", 1, 4 * MIB),
    event("alloc", 1, 3 * MIB),
    event("free_requested", 2, 8 * MIB),
]


def test_the_curve_and_what_was_alive_at_its_top() -> None:
    found = timeline(EVENTS, end=14 * MIB)  # 10 of them from before
    assert [size // MIB for size in found.live] == [12, 16, 14, 22, 23, 19, 22, 14]
    kernels = "dist_llm/model/kernels.py:33 norm"
    assert found.at_peak == {kernels: (12 * MIB, 2), "<script>.py:1 b": (MIB, 1), BEFORE: (10 * MIB, 1)}
    assert sum(size for size, _ in found.at_peak.values()) == max(found.live)
    assert place([]) == "unknown" and place(KERNELS) == kernels
    assert timeline([], end=5).live == [5]


class Tags(HTMLParser):
    """The tags of a page, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]


def test_the_page_is_a_file_by_itself() -> None:
    many = [event("alloc", at, MIB, KERNELS) for at in range(3 * POINTS)]
    blocks = [{"size": MIB, "state": "active_allocated"}] * (3 * POINTS) + [{"size": MIB, "state": "inactive"}]
    segments = [{"device": 1, "blocks": blocks}, {"device": 0, "blocks": blocks}]
    page = memory_page({"device_traces": [[], many], "segments": segments}, title="Memory of <rank> 0")
    tags = Tags()
    tags.feed(page)
    assert not tags.loads and "script" not in tags.seen and {"svg", "polyline", "table"} <= set(tags.seen)
    assert "Memory of &lt;rank&gt; 0" in page and f"{3 * POINTS:,.1f} MiB at most" in page
    assert page.split('points="')[1].split('"')[0].count(",") <= POINTS
    assert "&lt;script&gt;.py:1 b" in memory_page({"device_traces": [EVENTS], "segments": []}, title="x")
    assert "0 events" in memory_page({"device_traces": [], "segments": []}, title="no device")
