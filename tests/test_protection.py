"""What protection costs: the code itself is timed, for a difference of two noisy runs shows nothing."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from dist_llm import flight
from dist_llm.config.schema import Config
from dist_llm.mesh import whole_world
from dist_llm.train.digest import Digests
from dist_llm.train.durable import Digest
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


def test_hashing_costs_a_save_less_than_fifteen_percent(tmp_path: Path) -> None:
    """64 MiB hashed against 64 MiB written and flushed with nothing else done: the quickest of seven of each."""
    content, path = memoryview(os.urandom(64 << 20)), tmp_path / "plain"
    hashed = written = float("inf")
    for _ in range(7):
        start = time.perf_counter()
        Digest(content)
        hashed = min(hashed, time.perf_counter() - start)
        start = time.perf_counter()
        with path.open("xb", buffering=0) as handle:
            handle.write(content)
            os.fsync(handle.fileno())
        written = min(written, time.perf_counter() - start)
        path.unlink()
    print(f"{hashed / written:.3f}")
    assert hashed < 0.15 * written
