"""What protection costs: the code itself is timed, for a difference of two noisy runs shows nothing."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from threading import Event, get_ident
from typing import Any

import pytest
import torch

from dist_llm import flight
from dist_llm.config.schema import Config
from dist_llm.mesh import whole_world
from dist_llm.train import durable
from dist_llm.train.digest import Digests
from dist_llm.train.durable import LARGE, Bytes, Digest, Disk
from dist_llm.train.fit import spike
from dist_llm.train.run import make_room, require_equal
from dist_llm.watch import LOOK_SECONDS, Watchdog
from tests.engine_cases import build, layout_of
from tests.ranks import Ranks

MODEL = {"family": "llama", "dim": 256, "layers": 6, "heads": 8, "vocab": 2048}  # as the benchmarks have it
STEPS = 3


def setting() -> dict[str, Any]:
    given = {
        "model": MODEL,
        "data": {"source": "skills", "tokenizer": {"kind": "bpe", "vocab": 2048}, "sequence": 256},
        "batch": {"global": 16, "micro": 8},
        "schedule": {"steps": 10},
    }
    return Config.model_validate(given).model_dump(by_alias=True, mode="json")


def protected_steps(rank: int, world: int, say: Callable, given: dict[str, Any], layout: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step, and of those what the flight recorder, the watch of the loss and a comparison of replicas take."""
    _, engine, trainer = build(given, layout, rank, "float32")
    spent, digests, spikes = {"records": 0.0}, Digests(engine, every=100), spike.Spikes()

    def timed(body: Callable) -> Callable:
        @wraps(body)
        def inner(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return body(*args, **options)
            finally:
                spent["records"] += time.perf_counter() - start

        return inner

    for name in ("enter", "begin_step", "begin", "wait", "done"):
        setattr(flight.Flight, name, timed(getattr(flight.Flight, name)))
    trainer.step(0)
    spent["records"] = 0.0
    start = time.perf_counter()
    for step in range(1, STEPS + 1):
        flight.begin_step(step)
        trainer.step(step)
    seconds = (time.perf_counter() - start) / STEPS
    start = time.perf_counter()
    for step in range(1000):
        spikes.usual(3.0 + 0.01 * (step % 7), step)
    watched = (time.perf_counter() - start) / 1000
    digests.compare(1)
    start = time.perf_counter()
    digests.compare(2)
    digests.check(3)
    return {"step": seconds, "records": spent["records"] / STEPS, "loss": watched, "digests": (time.perf_counter() - start) / 100}


def test_protection_costs_less_than_a_hundredth_of_a_step(ranks: Ranks) -> None:
    """5.8 M parameters on two ranks: records, digests (spread over the 100 steps between two of them), the watch of the loss."""
    layout = layout_of("dp=2,zero=1")
    for one in ranks.run(2, "tests.test_protection:protected_steps", setting(), vars(layout)):
        share = (one["records"] + one["loss"] + one["digests"]) / one["step"]
        print({name: f"{1e3 * value:.3f} ms" for name, value in one.items()}, f"{share:.3%}")
        assert share < 0.01, one


def test_the_launcher_looks_for_little() -> None:
    """Eight ranks with full records."""
    buffers = [flight.make() for _ in range(8)]
    for rank, buffer in enumerate(buffers):
        record = flight.Flight(buffer, rank=rank, pid=1)
        record.begin_step(1)
        for _ in range(flight.RING):
            record.done(record.begin("all_reduce", "dp of ranks 0,1,2,3,4,5,6,7", "float32", (1024,)), 0.0)
    watchdog = Watchdog(buffers, timeout_seconds=60.0, note=None)
    best = float("inf")
    for _ in range(3):
        watchdog.looked_at = 0.0
        start = time.process_time()
        assert watchdog.look() is None
        best = min(best, time.process_time() - start)
    print(f"{1e3 * best:.2f} ms each {LOOK_SECONDS} s")
    assert best < 0.04 * LOOK_SECONDS


def protected_start(rank: int, world: int, say: Callable, given: dict[str, Any], layout: dict[str, Any], run: str) -> float:
    """Seconds of what a start does for safety alone: hashes of code and settings compared over ranks, leftovers and room looked at."""
    config, group = Config.model_validate(given), whole_world(rank, world)
    start = time.perf_counter()
    require_equal(group, torch.device("cpu"), config=given, layout=layout, data="0" * 64)
    make_room(Path(run), config, dtype=torch.float32, world=world)
    return time.perf_counter() - start


def test_a_safe_start_takes_less_than_two_seconds_more(ranks: Ranks, tmp_path: Path) -> None:
    """With the hashing of 256 MiB of text, the most that a start waits for (a store that is larger is hashed as it is read)."""
    layout = layout_of("dp=2,zero=1")
    taken = max(ranks.run(2, "tests.test_protection:protected_start", setting(), vars(layout), str(tmp_path)))
    text = bytes(16 << 20)
    start = time.perf_counter()
    hashlib.sha256(text).hexdigest()
    hashed = (time.perf_counter() - start) * 16  # of 256 MiB
    print(f"{1e3 * taken:.0f} ms and {1e3 * hashed:.0f} ms")
    assert taken + hashed < 2.0


class Unhashed(Digest):
    """Sizes without hashes."""

    def update(self, data: Bytes) -> None:
        self.size += memoryview(data).nbytes


def test_a_large_piece_is_hashed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that waits for the hashing of its own piece to begin still ends; a small piece needs no second thread."""
    begun, threads = Event(), set()

    class Seen(Digest):
        def update(self, data: Bytes) -> None:
            if len(data):
                begun.set()
                threads.add(get_ident())
            super().update(data)

    def write_all(handle: Any, chunk: Bytes) -> None:
        assert len(chunk) < LARGE or begun.wait(60)
        handle.write(chunk)

    monkeypatch.setattr(durable, "Digest", Seen)
    monkeypatch.setattr(durable, "_write_all", write_all)
    small, large = os.urandom(LARGE - 1), os.urandom(LARGE)
    whole = Disk().write(tmp_path / "large", [large])
    assert get_ident() not in threads
    assert Disk().write(tmp_path / "both", [small, large]).blocks == Digest(small + large).blocks and get_ident() in threads
    assert whole.blocks == Digest(large).blocks and (tmp_path / "both").read_bytes() == small + large


@pytest.mark.long
def test_hashing_costs_a_save_less_than_fifteen_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB in 4 MiB pieces, written and flushed with hashes and without, in turn: the quickest of each, until they tell."""
    content, disk, path = memoryview(os.urandom(64 << 20)), Disk(), tmp_path / "file"
    best = {Digest: float("inf"), Unhashed: float("inf")}
    for number in range(60):
        for kind in best:
            monkeypatch.setattr(durable, "Digest", kind)
            start = time.perf_counter()
            disk.write(path, [content[at : at + (4 << 20)] for at in range(0, len(content), 4 << 20)])
            disk.sync(path)
            best[kind] = min(best[kind], time.perf_counter() - start)
            path.unlink()
        ratio = best[Digest] / best[Unhashed]
        if number >= 5 and ratio < 1.15:
            break
    print(f"{ratio:.3f} after {number + 1} rounds")
    assert ratio < 1.15, best
