"""Transfers through host copies: the same results in the same order, forced here on CPU tensors; what streams do is in test_cuda."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from dist_llm import staging
from dist_llm.errors import Failure
from dist_llm.staging import HostCopies, Lane
from tests.engine_cases import config, different, prove
from tests.ranks import Ranks

CPU = torch.device("cpu")


class Done:
    """A transfer that is done, or fails, when it is waited for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def wait(self) -> None:
        if self.error:
            raise self.error


def test_what_is_read_is_what_was_there_at_the_start() -> None:
    """And nothing is written before the transfer ends."""
    gate, lane = threading.Event(), Lane(CPU)
    x, out = torch.arange(4.0), torch.zeros(4)

    def call(host: list[torch.Tensor]) -> Done:
        gate.wait()
        host[1].copy_(host[0] * 2)
        return Done()

    transfer = lane.start(call, reads=[x], writes=[out])
    x.zero_()
    assert not out.any()
    gate.set()
    transfer.wait()
    assert out.tolist() == [0.0, 2.0, 4.0, 6.0]


def test_a_lane_keeps_its_order_and_lanes_do_not_wait_for_each_other() -> None:
    gate, events = threading.Event(), list[str]()
    first, second = Lane(CPU), Lane(CPU)

    def call(name: str, *, held: bool) -> Any:
        def run(host: list[torch.Tensor]) -> Done:
            if held:
                gate.wait()
            events.append(name)
            return Done()

        return run

    x = torch.zeros(1)
    slow, after = (first.start(call(name, held=name == "slow"), reads=[x], writes=[]) for name in ("slow", "after"))
    second.start(call("beside", held=False), reads=[x], writes=[]).wait()
    assert events == ["beside"]
    gate.set()
    after.wait()
    slow.wait()
    assert events == ["beside", "slow", "after"]


def test_what_the_backend_says_is_raised_where_it_is_waited_for() -> None:
    transfer = Lane(CPU).start(lambda host: Done(RuntimeError("Connection closed by peer")), reads=[], writes=[torch.zeros(1)])
    with pytest.raises(RuntimeError, match="Connection closed"):
        transfer.wait()


def test_lanes_go_by_process_group() -> None:
    """Two groups of ours may be the same ranks on one handle: one order."""
    one, other = object(), object()
    assert staging.lane(one, CPU) is staging.lane(one, CPU) is not staging.lane(other, CPU)
    staging.close()
    assert not staging._lanes


def test_the_calls_are_those_of_torch_distributed() -> None:
    seen: list[tuple] = []

    class Calls:
        def __getattr__(self, name: str) -> Any:
            def call(*given: Any, **how: Any) -> Done:
                seen.append((name, [one.shape if isinstance(one, torch.Tensor) else one for one in given], how))
                return Done()

            return call

    copies, x, out = HostCopies(Calls(), CPU), torch.zeros(6), torch.zeros(2)
    for transfer in (
        copies.all_reduce(x, op="max", group="g", async_op=True),
        copies.all_gather_single(x, out, group="g", async_op=True),
        copies.reduce_scatter_single(out, x, group="g", async_op=True),
        copies.all_to_all_single(x, x.clone(), [2, 4], [3, 3], group="g", async_op=True),
        copies.isend(x, dst=1, group="g"),
        copies.irecv(out, src=0, group="g"),
    ):
        transfer.wait()
    staging.close()
    six, two, how = torch.Size([6]), torch.Size([2]), {"group": "g", "async_op": True}
    assert seen == [
        ("all_reduce", [six], {"op": "max", **how}),
        ("all_gather_single", [six, two], how),
        ("reduce_scatter_single", [two, six], how),
        ("all_to_all_single", [six, six, [2, 4], [3, 3]], how),
        ("isend", [six], {"dst": 1, "group": "g"}),
        ("irecv", [two], {"src": 0, "group": "g"}),
    ]


@pytest.mark.parametrize("case", ["collectives", "two_in_flight", "booked_bytes", "channels", "gathered_json"])
@pytest.mark.parametrize("world", [2, 3])
def test_collectives_through_copies(ranks: Ranks, case: str, world: int) -> None:
    """The cases of test_comm, every one of them."""
    ranks.run(world, "tests.cases:through_copies", case, *(["float32"] if case == "collectives" else []))


@pytest.mark.parametrize("text", ["dp=2,zero=1", "dp=2,zero=3", "tp=2", "pp=2", "dp=2,pp=2,zero=2", "dp=4,zero=3,shard=2"])
def test_layouts_through_copies_are_equal_to_the_bit(ranks: Ranks, text: str) -> None:
    given = config(tied=True)
    direct, staged = (prove(ranks, given, text, dtype="float32", work=work) for work in ("", "tests.engine_cases:staged_rank"))
    assert different(direct, staged) == []


def test_a_lost_rank_is_told(ranks: Ranks) -> None:
    """Not a hang: the other's transfer fails on its thread, and that is raised."""
    start = time.monotonic()
    with pytest.raises(Failure):
        ranks.run(2, "tests.cases:lost_behind_copies", timeout_seconds=5.0)
    assert time.monotonic() - start < 20.0


def test_a_transfer_on_the_cpu_waits_for_no_device() -> None:
    done: Future = Future()
    done.set_result(None)
    staging.Transfer(done, None).wait()
