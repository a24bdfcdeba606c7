"""The flight recorder and what is read out of it: who hangs, who differs, who is slow, and what a record costs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm import comm, flight
from dist_llm.errors import Code, PeerError
from dist_llm.flight import Call, Flight, Snapshot
from dist_llm.mesh import whole_world
from dist_llm.train.checkpoint import Background
from dist_llm.train.durable import Disk
from dist_llm.watch import SLOW_STEPS, Watchdog, culprit, end_failure, ended, hang_failure, mismatch, process_states, slow_rank
from tests.ranks import Ranks

GROUP = "dp of ranks 0,1"


def recorded(*, rank: int = 0) -> tuple[Any, Flight]:
    buffer = flight.make()
    return buffer, Flight(buffer, rank=rank, pid=os.getpid())


def snapshot(rank: int, *, calls: int = 0, awaited: int | None = None, age: float = 1.0, seconds: float = 0.1, **change: Any) -> Snapshot:
    made = [Call(n, n, 3, GROUP, "zero.py:7", "all_reduce", "float32", (4,), flight.DONE) for n in range(calls)]
    waits = None if awaited is None else Call(awaited, awaited, 3, GROUP, "zero.py:7", "all_reduce", "float32", (4,), flight.WAITED_FOR)
    fields = {"rank": rank, "host": "here", "pid": 1, "step": 3, "phase": "backward", "changed_at": 100.0 - age, "calls": made}
    return Snapshot(**{**fields, "awaited": waits, "seconds": [seconds] * SLOW_STEPS, **change})


def test_a_record_is_read_as_it_was_written() -> None:
    buffer, record = recorded(rank=3)
    assert flight.read(flight.make()) is None, "nobody has begun this one"
    record.begin_step(7)
    record.enter("backward")
    number = record.begin("all_reduce", GROUP, "float32", (2, 3))
    record.wait(number)
    seen = flight.read(buffer)
    assert seen is not None and (seen.rank, seen.step, seen.phase, seen.pid) == (3, 7, "backward", os.getpid())
    assert seen.awaited is not None and seen.awaited == seen.calls[-1]
    call = seen.awaited
    assert (call.group, call.kind, call.dtype, call.shape, call.state) == (GROUP, "all_reduce", "float32", (2, 3), flight.WAITED_FOR)
    assert call.site.startswith("tests/test_watch.py:") or call.site.startswith("test_watch.py"), call.site
    record.done(number, 0.5)
    seen = flight.read(buffer)
    assert seen is not None and seen.awaited is None and seen.calls[-1].state == flight.DONE


def test_a_rank_that_ends_says_so_and_has_gone_on_no_further() -> None:
    buffer, record = recorded()
    before = flight.read(buffer)
    record.leave(Code.PEER)
    after = flight.read(buffer)
    assert before is not None and after is not None and (before.code, after.code) == (None, Code.PEER)
    assert after.changed_at == before.changed_at, "of ranks that are equally far the last to come is to blame"


def test_who_has_ended() -> None:
    """One that has died or failed; never one that gave up waiting for another, or was done."""
    ranks = [snapshot(0), snapshot(1, code=Code.PEER), snapshot(2, code=Code.DONE), snapshot(3, age=1.0), snapshot(4, age=2.0, code=8)]
    assert ended(ranks, {}) is None, "on other machines"
    assert ended(ranks, {0: "S", 1: "Z", 2: "X", 3: "T"}) is None
    assert ended(ranks, {1: "Z", 3: "X"}) == ranks[3]
    assert ended(ranks, dict.fromkeys(range(1, 5), "X")) == ranks[4], "the first"
    assert "exit code 8" in str(end_failure(ranks[4]).found) and end_failure(ranks[3]).what == "rank 3 died"


def test_a_killed_process_is_known() -> None:
    """As a zombie, and when its parent has taken its status."""
    child = subprocess.Popen(["sleep", "60"])
    found = [snapshot(1, pid=child.pid, host=socket.gethostname())]
    assert process_states(found)[1] not in "ZX"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_states(found) == {1: "Z"}
    child.wait()
    assert process_states(found) == {1: "X"}


def test_a_record_that_is_being_written_is_never_half_read() -> None:
    """A head of which half was there once read as "silent since the machine was started", and ended a sound run."""
    buffer, began = flight.make(), time.monotonic()
    record = Flight(buffer, rank=0, pid=os.getpid())
    record.begin_step(1)
    writer = os.fork()
    if writer == 0:
        while True:
            record.enter("save")
    try:
        for _ in range(20_000):
            seen = flight.read(buffer)
            assert seen is not None and (seen.step, seen.rank) == (1, 0) and began < seen.changed_at <= time.monotonic()
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


def test_a_rank_that_stops_in_the_middle_of_a_word_is_read_by_the_one_before() -> None:
    buffer, record = recorded(rank=2)
    record.begin_step(5)
    before = flight.read(buffer)
    newest = record.written % 2 * flight._SLOT
    record.enter("reduce")
    other = record.written % 2 * flight._SLOT
    assert other != newest
    for size in range(flight._HEAD.size):
        spoiled = bytearray(buffer[other : other + flight._SLOT])
        buffer[other : other + size] = bytes(size)
        seen = flight.read(buffer)
        assert size == 0 or seen == before, size
        buffer[other : other + flight._SLOT] = bytes(spoiled)


def test_the_ring_keeps_the_last_calls_and_places_go_on() -> None:
    buffer, record = recorded()
    for _ in range(3 * flight.RING):
        record.done(record.begin("send", GROUP, "bfloat16", (1, 2, 3, 4, 5, 6)), 0.0)
    seen = flight.read(buffer)
    assert seen is not None and flight.RING - 8 <= len(seen.calls) <= flight.RING
    assert [call.place for call in seen.calls] == list(range(3 * flight.RING - len(seen.calls), 3 * flight.RING))


def test_own_work_is_what_is_not_waiting() -> None:
    buffer, record = recorded()
    record.begin_step(1)
    time.sleep(0.05)
    record.done(record.begin("all_reduce", GROUP, "float32", ()), 0.04)
    record.begin_step(2)
    seen = flight.read(buffer)
    assert seen is not None and len(seen.seconds) == 1 and 0.009 <= seen.seconds[0] <= 0.045


def test_who_hangs() -> None:
    """A stopped process; else who waits for nothing; else who is least far."""
    waiting, working = snapshot(0, calls=5, awaited=4), snapshot(1, calls=4, age=9.0)
    assert culprit([waiting, working], {}).rank == 1
    assert culprit([snapshot(0, calls=5, awaited=4), snapshot(1, calls=5, awaited=4)], {1: "T", 0: "S"}).rank == 1
    assert culprit([snapshot(0, calls=7, awaited=6), snapshot(1, calls=5, awaited=4), snapshot(2, calls=7, awaited=6)], {}).rank == 1
    late = [snapshot(0, calls=5, awaited=4, age=0.5), snapshot(1, calls=5, awaited=4, age=6.0)]
    assert culprit(late, {}).rank == 0, "when it came, rank 1 was about to give up"
    message = hang_failure([waiting, working], {1: "T"}, now=100.0)
    assert message.rank == 1 and "rank 1 hangs" in message.what and "stopped" in str(message.found) and "9 s" in str(message.found)
    assert "rank 0 waits for all_reduce 5" in str(message.expected) and "zero.py:7" in str(message.expected)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"kind": "all_gather"}, {"shape": (5,)}])
def test_collectives_that_differ_are_found(change: dict[str, Any]) -> None:
    left, right = snapshot(0, calls=4), snapshot(1, calls=4)
    assert mismatch([left, right]) is None
    fields = {**{name: getattr(right.calls[2], name) for name in Call.__dataclass_fields__}, **change}
    right.calls[2] = Call(**fields)
    found = mismatch([left, right])
    assert found is not None and found.ranks == (0, 1) and found.calls[1] == right.calls[2]


def test_a_send_and_its_receive_are_one_thing() -> None:
    send = Call(0, 0, 3, "pp F from rank 0 to 1", "a:1", "send", "float32", (4,), flight.DONE)
    receive = Call(0, 0, 3, "pp F from rank 0 to 1", "a:2", "recv", "float32", (4,), flight.DONE)
    assert mismatch([snapshot(0, calls=0), snapshot(1)]) is None
    left, right = snapshot(0), snapshot(1)
    left.calls.append(send)
    right.calls.append(receive)
    assert mismatch([left, right]) is None


def test_a_slow_rank_is_found() -> None:
    assert slow_rank([snapshot(0), snapshot(1, seconds=0.3), snapshot(2)]) == (1, pytest.approx(3.0))
    assert slow_rank([snapshot(0), snapshot(1, seconds=0.15)]) is None, "not slow enough"
    assert slow_rank([snapshot(0, seconds=0.001), snapshot(1, seconds=0.004)]) is None, "too short to say"


def test_a_watchdog_speaks_after_the_timeout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, record = recorded()
    watchdog = Watchdog([buffer], timeout_seconds=5.0, note=None)
    now = time.monotonic()
    record.begin_step(1)
    for after, found in ((1.0, False), (5.5, False), (6.5, True)):
        monkeypatch.setattr("dist_llm.watch.time.monotonic", lambda after=after: now + after)
        watchdog.looked_at = 0.0
        assert (watchdog.look() is not None) == found, after


@pytest.fixture
def other() -> Iterator[int]:
    """A process that does nothing."""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    yield pid
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_before_the_first_step_a_stopped_process_hangs_and_a_silent_one_does_not(other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading text and building a model may take any time without a word, but not a process that is stopped."""
    buffer = flight.make()
    Flight(buffer, rank=0, pid=other).enter("data")
    watchdog, now = Watchdog([buffer], timeout_seconds=5.0, note=None), time.monotonic()

    def look(after: float) -> Any:
        monkeypatch.setattr("dist_llm.watch.time.monotonic", lambda: now + after)
        return watchdog.look()

    def send(number: int, state: str) -> None:
        os.kill(other, number)
        while process_states(watchdog.snapshots()) != {0: state}:
            pass

    assert look(1000.0) is None
    send(signal.SIGSTOP, "T")
    assert look(1001.0) is None and look(1006.5) is None
    send(signal.SIGCONT, "S")
    assert look(1007.5) is None
    send(signal.SIGSTOP, "T")
    assert look(1009.0) is None and look(1014.5) is None
    found = look(1015.5)
    assert found is not None and found.what == "rank 0 hangs" and "stopped (SIGSTOP)" in found.found
    assert f"process {other}" in found.where and found.where.endswith("before the first step, data")


@pytest.mark.parametrize("chunks", [8, 1], ids=["slow", "stuck"])
def test_a_slow_disk_is_no_hang_and_a_stuck_one_is(chunks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that waits for its save was taken to hang once the save took longer than the timeout."""
    buffer, record = recorded()
    monkeypatch.setattr(flight, "current", record)
    monkeypatch.setattr("dist_llm.train.checkpoint.PULSE_SECONDS", 0.05)
    record.begin_step(1)
    watchdog, disk, found = Watchdog([buffer], timeout_seconds=0.5, note=None), Disk(), []

    def content() -> Iterator[bytes]:
        for _ in range(chunks):
            time.sleep(2.4 / chunks)
            yield b"weights"

    def look() -> None:
        while work.running:
            time.sleep(0.05)
            found.append(watchdog.look())

    work = Background(lambda: disk.write(tmp_path / "file", content()))
    looking = Background(look)
    work.wait(disk)
    looking.result()
    assert work.result().size == 7 * chunks
    assert any(one is not None for one in found) == (chunks == 1)


def test_a_record_that_has_not_begun_blames_nobody_else() -> None:
    """Of a rank on another machine, whose writing does not come through, or that has just been started."""
    buffer, record = recorded()
    record.wait(record.begin("all_reduce", GROUP, "float32", (4,)))
    assert Watchdog([buffer], timeout_seconds=5.0, note=None).explain() is not None
    assert Watchdog([buffer, flight.make()], timeout_seconds=5.0, note=None).explain() is None


def test_the_record_of_a_run_that_goes_on_is_not_written_over(tmp_path: Path) -> None:
    """Another job on the same folder is refused, but by its rank 0 alone: the others have begun their records by then."""
    path = tmp_path / "rank-1.flight"
    record = Flight(flight.make_file(path), rank=1, pid=os.getpid())
    record.begin_step(3)
    record.begin("all_reduce", GROUP, "float32", (4,))
    ours, before = flight.open_file(path), flight.read(record.buffer)
    Flight(flight.make_file(path), rank=1, pid=1)
    assert before is not None and before == flight.read(ours) == flight.read(record.buffer)
    assert before.calls[0].group == GROUP and len(flight.signatures(ours)) == 1
    new = flight.read(flight.open_file(path))
    assert new is not None and (new.pid, new.step) == (1, 0)


# --- real ranks ----------------------------------------------------------------------------------------------------------


def all_reduce_of(rank: int, world: int, say: Callable, kind: str) -> None:
    """Rank 1 differs: in the dtype, in the kind, or by coming late."""
    group = whole_world(rank, world)
    flight.begin_step(1)
    for _ in range(3):
        comm.all_reduce(torch.ones(4), group)
    if rank == 1 and kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    dtype = torch.int32 if rank == 1 and kind == "dtype" else torch.float32
    for _ in range(40 if kind == "dtype" else 1):
        comm.all_reduce(torch.ones(4, dtype=dtype), group)
        time.sleep(0.05)


def nothing(rank: int, world: int, say: Callable) -> None:
    """A world that only starts: what the helper imports is not on a test's clock."""


def test_gloo_sums_garbage_without_a_word_and_we_name_it(ranks: Ranks) -> None:
    """float32 beside int32: found while it goes on, within two seconds, with both lines of code (F27)."""
    ranks.run(2, "tests.test_watch:nothing")
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        ranks.run(2, "tests.test_watch:all_reduce_of", "dtype", timeout_seconds=20.0)
    assert time.monotonic() - start < 4.0
    text = f"{caught.value.expected} {caught.value.found}"
    assert "all_reduce 4" in text and "float32 4" in text and "int32 4" in text and "test_watch.py" in text, text


def test_a_stopped_rank_is_named(ranks: Ranks) -> None:
    ranks.run(2, "tests.test_watch:nothing")
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        ranks.run(2, "tests.test_watch:all_reduce_of", "stopped", timeout_seconds=1.5)
    assert time.monotonic() - start < 1.5 + 5
    assert caught.value.what == "rank 1 hangs" and "SIGSTOP" in str(caught.value.found)
    assert "rank 0 waits for all_reduce 4 on control of ranks 0,1" in str(caught.value.expected)


def test_a_record_costs_microseconds() -> None:
    """A collective costs less than 20 us more with its record: a hundred of them in a step of 200 ms are 1 %."""
    _, record = recorded()
    count, best = 200, float("inf")
    for _ in range(100):  # the least time of this thread alone, in short runs: other work on the core is no cost of ours
        start = time.thread_time()
        for _ in range(count):
            number = record.begin("all_reduce", GROUP, "float32", (1024, 256))
            record.wait(number)
            record.done(number, 0.0)
        best = min(best, (time.thread_time() - start) / count)
    assert best < 20e-6, best
    print(f"{best * 1e6:.2f} us")
