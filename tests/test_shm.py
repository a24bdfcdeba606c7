"""Collectives through shared memory: what they give for any size, their bytes, their ends, and when ranks cannot share it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm import shm
from dist_llm.errors import PeerError
from dist_llm.shm import CARD, Lane, Offer, Segment
from tests.engine_cases import config, different, prove
from tests.ranks import Ranks

SLOT = 1024  # small, so that small tensors take many turns
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8]


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Segment]]]:
    """Makes the segments of a group whose ranks are threads here."""
    made: list[Segment] = []

    def make(size: int, *, slot: int = SLOT, patience: float = 20.0) -> list[Segment]:
        monkeypatch.setattr(shm, "SLOT", slot)
        offers = [Offer(index, size) for index in range(size)]
        found = [offer.join([one.card for one in offers], patience=patience) for offer in offers]
        for offer in offers:
            offer.close()
        assert all(found)
        made.extend(found)  # type: ignore[arg-type]
        return found  # type: ignore[return-value]

    yield make
    for segment in made:
        segment.close()


def on_ranks(work: Callable[[int], Any], size: int) -> list[Any]:
    """work(rank) on a thread for each rank; what they return, or the first error."""
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def drawn(count: int, dtype: torch.dtype, *seed: int) -> torch.Tensor:
    """Numbers that are exact in every dtype, sums of four of them too."""
    values = torch.randint(0, 32, (count,), generator=torch.Generator().manual_seed(hash(seed) % 2**31))
    return values.to(dtype)


def expected(kind: str, parts: list[torch.Tensor], rank: int) -> torch.Tensor:
    """What a collective gives a rank, of what all bring."""
    size = len(parts)
    if kind in ("sum", "max"):
        stacked = torch.stack(parts)
        return stacked.amax(0) if kind == "max" else stacked.double().sum(0).to(parts[0].dtype)
    if kind == "gather":
        return torch.cat(parts)
    return torch.stack([part.view(size, -1)[rank] for part in parts]).double().sum(0).to(parts[0].dtype)


def begin(segment: Segment, kind: str, x: torch.Tensor) -> tuple[shm.Transfer, torch.Tensor]:
    """Begins a collective on a copy of x; the transfer and where its result will be."""
    x, size = x.clone(), segment.size
    if kind in ("sum", "max"):
        return segment.all_reduce(x, op=kind), x
    if kind == "gather":
        out = x.new_empty(size * len(x))
        return segment.all_gather_single(out, x), out
    out = x.view(size, -1)[segment.index]
    return segment.reduce_scatter_single(out, x), out  # into its own place, as the flat buffers do


KINDS = ("sum", "max", "gather", "scatter")


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_collective_of_any_size(segments: Callable, size: int, dtype: torch.dtype) -> None:
    """Empty, one element, fewer than ranks, at the edges of a slot and over several; waited for at once, or after others were begun."""
    group, edge, choose = segments(size), SLOT // dtype.itemsize, random.Random(size)
    counts = [0, 1, size - 1, size + 1, edge - 1, edge, edge + 1, 2 * edge, 5 * edge + 3, 7]
    calls = [(kind, count if kind in ("sum", "max", "gather") else count * size) for count in counts for kind in KINDS]
    choose.shuffle(calls)
    held = [choose.random() < 0.5 for _ in calls]

    def work(rank: int) -> None:
        under_way = []
        for number, ((kind, count), later) in enumerate(zip(calls, held, strict=True)):
            parts = [drawn(count, dtype, number, other) for other in range(size)]
            under_way.append((*begin(group[rank], kind, parts[rank]), expected(kind, parts, rank), (kind, count)))
            if not later:
                while under_way:
                    transfer, out, wanted, what = under_way.pop()  # the last one first
                    transfer.wait()
                    assert torch.equal(out, wanted), (what, rank)
        for transfer, *_ in under_way:
            transfer.wait()

    on_ranks(work, size)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_sums_are_in_rank_order(segments: Callable, size: int) -> None:
    """To the bit, and the same on every rank: of parts in place, out of place, and of the whole."""
    group = segments(size)
    parts = [torch.randn(size * 300, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (3 * rank) for rank in range(size)]
    wanted = parts[0].clone()
    for part in parts[1:]:
        wanted.add_(part)

    def work(rank: int) -> None:
        for kind in ("scatter", "sum"):
            transfer, out = begin(group[rank], kind, parts[rank])
            transfer.wait()
            assert torch.equal(out, wanted if kind == "sum" else wanted.view(size, -1)[rank]), kind
        apart = torch.empty(300)
        group[rank].reduce_scatter_single(apart, parts[rank]).wait()
        assert torch.equal(apart, wanted.view(size, -1)[rank])

    on_ranks(work, size)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_agree_on_every_bit(segments: Callable, size: int) -> None:
    """Also of zeros and NaNs with different signs, where the order of two operands tells."""
    group = segments(size)
    plus, minus = torch.tensor([0.0, float("nan"), 1.0]), torch.tensor([-0.0, -float("nan"), -1.0])
    for op in ("sum", "max"):
        for flip in (False, True):
            outs = [(plus if (rank == 0) != flip else minus).clone() for rank in range(size)]
            on_ranks(lambda rank, op=op, outs=outs: group[rank].all_reduce(outs[rank], op=op).wait(), size)
            assert len({out.numpy().tobytes() for out in outs}) == 1, (op, flip)


def test_what_does_not_fit_is_refused_before_anything_is_written(segments: Callable) -> None:
    segment, x = segments(2)[0], torch.ones(8)
    for call in (
        lambda: segment.all_gather_single(torch.empty(15), x),
        lambda: segment.all_gather_single(torch.empty(16, dtype=torch.bfloat16), x),
        lambda: segment.reduce_scatter_single(torch.empty(3), x),
        lambda: segment.all_reduce(torch.ones(4, 4).T, op="sum"),
    ):
        with pytest.raises(AssertionError):
            call()


def test_no_lane_starts_threads_of_its_own() -> None:
    """With several threads a rank, torch would start as many for every group that adds."""
    code = """
import os, torch
from dist_llm.shm import Offer
torch.set_num_threads(2)
torch.ones(1 << 22) + 1  # its own team is there
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
for _ in range(3):
    offers = [Offer(index, 2) for index in range(2)]
    group = [offer.join([one.card for one in offers], patience=20.0) for offer in offers]
    begun = [segment.all_reduce(torch.ones(1 << 20), op="sum") for segment in group]
    for transfer in begun:
        transfer.helps = False
        transfer.wait()
print(count() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) == 6, "one for each lane"


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("runs", "length"), [(1, 5), (3, 1), (3, 0), (5, 40), (2, SLOT // 4), (3, SLOT // 4 + 1), (40, 7)])
def test_parts_of_an_inner_dimension(segments: Callable, size: int, runs: int, length: int) -> None:
    """(runs, n) -> (runs, size n), and back with a sum, in rank order: short runs, some in a slot, and longer than one."""
    group = segments(size)
    shards = [torch.randn(runs, length, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]
    wholes = [torch.randn(runs, size * length, generator=torch.Generator().manual_seed(9 + rank)) for rank in range(size)]
    summed = wholes[0].clone()
    for whole in wholes[1:]:
        summed.add_(whole)

    def work(rank: int) -> None:
        out, part = torch.empty(runs, size * length), torch.empty(runs, length)
        gathering = group[rank].all_gather_single(out, shards[rank], runs=runs)
        group[rank].reduce_scatter_single(part, wholes[rank], runs=runs).wait()
        gathering.wait()
        assert torch.equal(out, torch.cat(shards, dim=1))
        assert torch.equal(part, summed.view(runs, size, length)[:, rank])

    on_ranks(work, size)
    assert sum(segment.sent for segment in group) == 2 * 4 * size * (size - 1) * runs * length


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_are_those_of_the_ring(segments: Callable, size: int) -> None:
    """Exactly, however a tensor is cut: summed over ranks where it does not divide."""
    group, count = segments(size), 12 * 700 + 1
    for kind, times in (("sum", 2 * (size - 1)), ("gather", size * (size - 1)), ("scatter", size - 1)):
        whole = count if kind in ("sum", "gather") else count * size
        before = [segment.sent for segment in group]
        on_ranks(lambda rank, kind=kind, whole=whole: begin(group[rank], kind, torch.ones(whole))[0].wait(), size)
        sent = [segment.sent - start for segment, start in zip(group, before, strict=True)]
        assert sum(sent) == times * 4 * whole, kind
        assert kind == "sum" or len(set(sent)) == 1


def test_messages_go_one_way_and_wait_for_nobody_while_there_is_room(segments: Callable) -> None:
    sender, receiver = segments(2)
    for number in range(shm.SLOTS):
        sender.isend(torch.full((3,), float(number))).wait()
    third = sender.isend(torch.full((4 * SLOT,), 9.0))
    for number in range(shm.SLOTS):
        out = torch.empty(3)
        receiver.irecv(out).wait()
        assert out.tolist() == [number] * 3
    out = torch.empty(4 * SLOT)
    receiver.irecv(out).wait()
    third.wait()
    assert out.eq(9.0).all() and (sender.sent, receiver.sent) == (2 * 12 + 16 * SLOT, 0)


# --- who moves the bytes -------------------------------------------------------------------------------------------------


def test_who_waits_does_what_the_thread_has_not_begun() -> None:
    """In order; and what was done is not done again."""
    lane, gate, done = Lane(), threading.Event(), list[tuple[str, str]]()

    def move(name: str, *, held: bool = False) -> None:
        if held:
            gate.wait()
        done.append((name, threading.current_thread().name))

    first = lane.begin(lambda: move("first", held=True))
    while not lane.turn.locked():  # the thread is about it
        time.sleep(0.001)
    second, third = lane.begin(lambda: move("second")), lane.begin(lambda: move("third"))
    threading.Timer(0.05, gate.set).start()
    third.wait()
    second.wait()
    first.wait()
    assert [name for name, _ in done] == ["first", "second", "third"] and done[0][1] == "shared memory"
    lane.turn.acquire()
    fourth, fifth = lane.begin(lambda: move("fourth")), lane.begin(lambda: move("fifth"))
    lane.turn.release()
    assert not lane.run(until=first) or len(done) >= 3
    fifth.wait()
    fourth.wait()
    assert [name for name, _ in done[3:]] == ["fourth", "fifth"]
    lane.close()
    assert lane.thread is not None
    lane.thread.join(timeout=5)
    assert not lane.thread.is_alive()


def test_one_that_may_not_help_leaves_it_to_the_thread() -> None:
    """Where tensors are counted: a sum made here would be seen."""
    lane, where = Lane(), list[str]()
    for _ in range(20):
        transfer = lane.begin(lambda: where.append(threading.current_thread().name))
        transfer.helps = False
        transfer.wait()
    assert where == ["shared memory"] * 20
    lane.close()


def test_what_stops_a_transfer_is_raised_where_it_is_waited_for_and_each_time() -> None:
    lane = Lane()

    def fail() -> None:
        raise RuntimeError("Connection closed by peer")

    transfer, after = lane.begin(fail), lane.begin(lambda: None)
    for one in (transfer, transfer, after, lane.begin(lambda: None)):
        with pytest.raises(RuntimeError, match="closed by peer"):
            one.wait()
    lane.close()


def test_after_one_that_failed_nothing_is_moved(segments: Callable) -> None:
    """What the other rank has put into the slots for it is never taken for a later one's; and the time is waited for once."""
    first, second = segments(2, patience=0.4)
    start = time.monotonic()
    begun = [first.all_reduce(torch.ones(2) * at, op="sum") for at in range(6)]
    with pytest.raises(RuntimeError, match="Timed out"):
        begun[-1].wait()
    assert time.monotonic() - start < 0.4 + 5 * shm.LOOK_SECONDS
    late = second.all_reduce(torch.ones(2), op="sum")
    late.wait()  # what the first had written before it gave up
    x = torch.full((2,), 10.0)
    with pytest.raises(RuntimeError, match="Timed out"):
        first.all_reduce(x, op="sum").wait()
    assert x.tolist() == [10.0, 10.0]


def test_what_interrupts_who_waits_is_not_lost() -> None:
    """An exception of a signal's handler, say: it comes out here, and nobody waits for ever."""
    lane = Lane()

    def interrupted() -> None:
        raise KeyboardInterrupt

    lane.turn.acquire()
    transfer = lane.begin(interrupted)
    lane.turn.release()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            transfer.wait()
    lane.close()


def test_tensors_are_let_go_with_the_end(segments: Callable) -> None:
    first, second = segments(2)
    x = torch.ones(3)
    transfer = first.isend(x)
    second.irecv(torch.empty(3)).wait()
    transfer.wait()
    assert not hasattr(transfer, "tensors")


# --- ranks that are gone, late, or interrupted -----------------------------------------------------------------------------


def test_a_rank_that_has_ended_is_told_soon_and_what_it_gave_before_counts(segments: Callable) -> None:
    first, second = segments(2)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.close(second.peers[0])
    second.peers[0] = os.pidfd_open(child)
    first.isend(torch.ones(2)).wait()
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # ended, and not yet taken note of by its parent
    out = torch.empty(2)
    second.irecv(out).wait()
    assert out.tolist() == [1.0, 1.0]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        second.irecv(out).wait()
    assert time.monotonic() - start < 5 * shm.LOOK_SECONDS
    os.waitpid(child, 0)


def test_a_rank_that_does_not_come_is_given_up(segments: Callable) -> None:
    _, second = segments(2, patience=0.3)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out waiting 0.3 s"):
        second.irecv(torch.empty(2)).wait()
    assert 0.3 <= time.monotonic() - start < 0.3 + 5 * shm.LOOK_SECONDS


def test_patience_begins_with_the_wait(segments: Callable) -> None:
    """A receive that is posted early, while this rank and the other have long work to do, is not given up."""
    first, second = segments(2, patience=0.4)
    out = torch.empty(2)
    posted = second.irecv(out)
    time.sleep(1.0)
    threading.Timer(0.2, lambda: first.isend(torch.ones(2)).wait()).start()
    posted.wait()
    assert out.tolist() == [1.0, 1.0]


def test_signals_do_not_hide_that_a_rank_has_ended(segments: Callable) -> None:
    """However often they come."""
    _, second = segments(2, patience=20.0)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    os.close(second.peers[0])
    second.peers[0] = os.pidfd_open(child)
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    start = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match="closed by peer"):
            second._receive(torch.empty(2))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        os.waitpid(child, 0)
    assert time.monotonic() - start < 2.0


def test_a_process_that_ends_while_it_adds_ends_with_its_own_code(tmp_path: Any) -> None:
    """As a rank under torchrun does that has failed elsewhere: not by SIGABRT."""
    words = [sys.executable, "-c", ENDING, str(tmp_path / "store")]
    both = [subprocess.Popen([*words, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    said = [one.communicate(timeout=60)[1] for one in both]
    assert both[0].returncode == 6, said


ENDING = """
import os, sys, time
import torch
from dist_llm import comm, mesh, shm
from dist_llm.config.layout import Layout
rank = int(sys.argv[2])
mesh.connect(rank=rank, world=2, backend="gloo", timeout_seconds=30.0, store_path=sys.argv[1])
group = mesh.build_mesh(Layout(dp=2), rank).data
assert mesh.segments[group.handle] is not None
shm._joined = lambda *words: torch.ones(1 << 21).sort()  # long, inside of torch
pending = [comm.start_all_reduce(torch.ones(4), group) for _ in range(20)]
time.sleep(0.1)
if rank == 0:
    sys.exit(6)
try:
    for one in pending:
        one.finish()
except RuntimeError:
    os._exit(5)
"""


def test_a_signal_does_not_end_the_wait(segments: Callable) -> None:
    first, second = segments(2)
    heard: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        threading.Timer(0.3, lambda: first.isend(torch.ones(2)).wait()).start()
        out = torch.empty(2)
        second._receive(out)  # here, where the signals come
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert out.tolist() == [1.0, 1.0] and len(heard) > 2


@pytest.mark.parametrize(("kind", "words"), [("lost", "Connection closed by peer"), ("late", "Timed out waiting")])
def test_the_launcher_tells_of_it(ranks: Ranks, kind: str, words: str) -> None:
    """Exit 5 in time; a rank that was killed is named by the launcher itself."""
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        ranks.run(2, "tests.shm_cases:lost_or_late", kind, timeout_seconds=2.0)
    assert time.monotonic() - start < 10.0
    told = f"{caught.value.what} {caught.value.where} {caught.value.found}"
    assert ("rank 1" in told) if kind == "lost" else (words in told or "rank 1 hangs" in told), told


def test_collectives_that_differ_are_named(ranks: Ranks) -> None:
    """One rank brings more than the other: no hang until the time is up."""
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        ranks.run(2, "tests.shm_cases:unequal", timeout_seconds=30.0)
    assert time.monotonic() - start < 10.0 and "shm_cases.py" in f"{caught.value.expected} {caught.value.found}"


# --- whether it can be had -------------------------------------------------------------------------------------------------


def memories() -> int:
    """How many segments this process has open."""
    return sum("dist-llm-group" in os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink())


def test_nothing_is_left(segments: Callable) -> None:
    assert shm.possible()
    gc.collect()  # what a failed transfer of another test holds goes when it likes
    before, names, had = len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm")), memories()
    offers = [Offer(index, 2) for index in range(2)]
    found = [offer.join([one.card for one in offers], patience=1.0) for offer in offers]
    for offer in offers:
        offer.close()
    assert memories() == had + 2
    for segment in found:
        assert segment is not None
        segment.close()
    del found, segment
    assert len(os.listdir("/proc/self/fd")) == before and set(os.listdir("/dev/shm")) == names
    assert memories() == had


def refused(cards: list[list[int]], offers: list[Offer]) -> bool:
    """Whether every rank declines, and leaves nothing open."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    found = [offer.join(cards, patience=1.0) for offer in offers]
    return found == [None] * len(offers) and len(os.listdir("/proc/self/fd")) == before


def test_what_is_not_the_memory_is_never_taken_for_it(tmp_path: Any) -> None:
    """Another machine, a process that is gone, another file or a pipe under that number, one of another length, another word in it."""
    offers = [Offer(index, 2) for index in range(2)]
    cards = [offer.card for offer in offers]
    machine, process, made, word = cards[0]
    read, write = os.pipe()
    short = os.memfd_create("short")
    other = os.memfd_create("other")
    os.ftruncate(other, offers[0].length)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert refused([cards[0], [machine + 1, *cards[1][1:]]], offers)
    assert refused([[machine, child, made, word], cards[1]], offers)
    assert refused([cards[0], [machine, child, *cards[1][2:]]], offers)
    for descriptor in (read, short, other, 10_000):
        assert refused([[machine, process, descriptor, word], cards[1]], offers), descriptor
    assert refused([[machine, process, made, word + 1], cards[1]], offers)
    for one in (read, write, short, other):
        os.close(one)
    for offer in offers:
        offer.close()


@pytest.mark.parametrize("lacking", ["memfd_create", "pidfd_open", "sem_clockwait", "boot_id"])
def test_a_system_that_lacks_a_part_of_it_says_so(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    def no(*words: Any) -> Any:
        raise OSError(38, "Function not implemented")

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    if lacking == "sem_clockwait":
        monkeypatch.setattr(shm, "_c", object())
    elif lacking == "boot_id":
        monkeypatch.setattr(shm, "_machine", no)
    elif lacking == "pidfd_open":
        monkeypatch.delattr(os, lacking)
    else:
        monkeypatch.setattr(os, lacking, no)
    assert not shm.possible()
    offer = Offer(0, 2)
    assert offer.card == [0] * CARD and offer.join([offer.card, offer.card], patience=1.0) is None
    offer.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [2, 3, 64])
def test_semaphores_and_slots_lie_apart(size: int) -> None:
    places = [shm._semaphore(size, *divmod(at, size), free=free) for free in (False, True) for at in range(size * size)]
    assert len(set(places)) == 2 * size**2 and min(places) >= shm.CELL >= 32 and all(place % shm.CELL == 0 for place in places)
    assert shm._slots_at(size) >= max(places) + shm.CELL and shm._slots_at(size) % mmap.PAGESIZE == 0
    assert ctypes.sizeof(shm._Moment) == 16


@pytest.mark.parametrize("kind", ["asked off", "off again", "one cannot"])
def test_ranks_agree_and_sockets_serve(ranks: Ranks, kind: str) -> None:
    """All of them or none."""
    assert ranks.run(3, "tests.shm_cases:without", kind) == [[False, 3.0]] * 3


@pytest.mark.parametrize("world", [2, 4])
def test_every_group_of_a_mesh_shares_its_own(ranks: Ranks, world: int) -> None:
    """Groups and channels; bytes in the books are those that went through the memory; nothing is open after the job."""
    ranks.run(world, "tests.shm_cases:every_group")


@pytest.mark.parametrize("text", ["dp=2,zero=1", "dp=2,zero=3", "tp=2,sp=off", "tp=2,sp=on", "pp=2", "dp=2,pp=2,zero=2"])
def test_layouts_are_equal_to_the_bit_through_either(ranks: Ranks, text: str) -> None:
    """Two ranks add the same two numbers; so do shards in rank order."""
    given = config(tied=True)
    through, sockets = (
        prove(ranks, {**given, "runtime": {**given.get("runtime", {}), "shared_memory": shared}}, text, dtype="float32")
        for shared in (True, False)
    )
    assert different(through, sockets) == []


def test_memory_is_counted_without_it(ranks: Ranks) -> None:
    """What is summed there is no tensor of the step."""
    ranks.run(2, "tests.shm_cases:counted")
