"""Schedules: every list is complete, paired and free of deadlock, and its simulated cost is the published closed form."""

from __future__ import annotations

import ast
import csv
import itertools
import json
import operator
import os
import random
import re
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.schema import ModelConfig
from dist_llm.errors import UsageError
from dist_llm.model.cost import forward_flops
from dist_llm.model.stages import halves_of, stage_units
from dist_llm.model.table import half_names, unit_names
from dist_llm.schedule.actions import ALL, COMPUTE, RECVS, SENDS, Action, Kind, Span, channel, gives, needs, owners, parse, partner
from dist_llm.schedule.cut import cut
from dist_llm.schedule.draw import grid, svg, trace
from dist_llm.schedule.generate import SCHEDULES, generate, limits, rank_of, stages_of
from dist_llm.schedule.lower import lower
from dist_llm.schedule.simulate import in_flight, simulate, summary
from dist_llm.schedule.validate import ScheduleError, validate

HERE = Path(__file__).parent
ROWS = {row["row_id"]: row for row in csv.DictReader((HERE / "data" / "schedules.csv").open())}
SIZES = [
    (name, p, m, v)
    for name in SCHEDULES
    for p in range(1, 9)
    for v in (range(1, 5) if SCHEDULES[name].chunked else [1])
    for m in sorted({m for m in (1, 2, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 3 * p) if 1 <= m <= 24})
]


@st.composite
def sizes(draw: st.DrawFn, largest: int = 24) -> tuple[str, int, int, int]:
    name = draw(st.sampled_from(list(SCHEDULES)))
    chunks = draw(st.integers(1, 4)) if SCHEDULES[name].chunked else 1
    return name, draw(st.integers(1, 8)), draw(st.integers(1, largest)), chunks


def lowered(name: str, p: int, m: int, v: int, reduce: str = "step") -> list[list[Action]]:
    return lower(generate(name, ranks=p, micro_batches=m, chunks=v), reduce=reduce)


def read(*lines: str) -> list[list[Action]]:
    return [[parse(word) for word in line.split()] for line in lines]


def published(row_id: str, **values: float) -> float:
    """The value of a closed form of tests/data/schedules.csv (its text up to the first word of prose)."""
    text = re.split(r" at | micro-batch", ROWS[row_id]["formula"])[0]
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.expr) -> float:
        match node:
            case ast.BinOp():
                return operators[type(node.op)](value(node.left), value(node.right))
            case ast.Call(func=ast.Name(id="min")):
                return min(value(argument) for argument in node.args)
            case ast.Name():
                return values[node.id]
            case ast.Constant():
                return node.value
        raise AssertionError(ast.dump(node))

    return value(ast.parse(text, mode="eval").body)


def execute(lists: list[list[Action]], seed: int) -> None:
    """Run lists as ranks would, in a random order of events: first-in first-out channels carry (kind, stage, micro-batch)."""
    owner, draw = owners(lists), random.Random(seed)
    pipes: dict[tuple, deque] = defaultdict(deque)
    posted: dict[tuple, deque] = defaultdict(deque)
    values: dict[Action, Action] = {}  # RECV -> what came, or the hand-over inside a rank
    heads = [0] * len(lists)

    def step(rank: int) -> bool:
        action = lists[rank][heads[rank]]
        if action.kind in SENDS:
            pipes[channel(action, owner)].append(action)
        elif action.kind in RECVS:
            posted[channel(action, owner)].append(action)
        elif action.kind in COMPUTE and (recv := needs(action)) and partner(recv).stage in owner:
            line = channel(recv, owner)
            while recv not in values and pipes[line] and posted[line]:
                values[posted[line].popleft()] = pipes[line].popleft()
            if recv not in values:
                return False
            assert values.pop(recv) == partner(recv), f"{action} got the wrong input"
        if action.kind in COMPUTE and (send := gives(action)) and owner.get(partner(send).stage) == rank:
            values[partner(send)] = send
        heads[rank] += 1
        return True

    waiting: set[int] = set()
    while running := [rank for rank in range(len(lists)) if heads[rank] < len(lists[rank])]:
        assert waiting < set(running), f"deadlock of ranks {running}"
        rank = draw.choice([rank for rank in running if rank not in waiting])
        waiting = set() if step(rank) else waiting | {rank}


# ---- actions


@given(st.integers(0, 99), st.sampled_from(list(Kind)), st.integers(0, 99))
def test_text_form_reads_back(stage: int, kind: Kind, micro: int) -> None:
    assert parse(str(Action(stage, kind, micro))) == Action(stage, kind, micro)


def test_text_forms() -> None:
    words = "2F0 2B0 2I0 2W0 2SF0 2RF0 2SB0 2RB0 2R3 2R"
    assert " ".join(map(str, read(words)[0])) == words
    assert parse("2R") == Action(2, Kind.REDUCE, ALL)
    for text in ("", "F0", "2F", "2X0", "2F-1", "2F0 ", "-2F0", "2SF", "２F0"):
        with pytest.raises(ValueError, match="not an action"):
            parse(text)


def test_partners() -> None:
    for one, other in (("2SF0", "3RF0"), ("2SB0", "1RB0")):
        assert partner(parse(one)) == parse(other) and partner(parse(other)) == parse(one)


# ---- generate


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_once_on_its_rank_with_backwards_in_rising_order(name: str) -> None:
    for _, p, m, v in (size for size in SIZES if size[0] == name):
        lists = generate(name, ranks=p, micro_batches=m, chunks=v)
        found = Counter(action for actions in lists for action in actions)
        assert found == Counter(Action(s, kind, i) for s in range(p * v) for kind in (Kind.F, Kind.B) for i in range(m))
        for rank, actions in enumerate(lists):
            assert {action.stage for action in actions} == set(stages_of(rank, p, v)), "a stage on the wrong rank"
            for stage in stages_of(rank, p, v):
                assert rank_of(stage, p) == rank and stage % p == rank
                assert [a.micro for a in actions if a.stage == stage and a.kind is Kind.B] == list(range(m)), "gradients add in this order"


@pytest.mark.parametrize("name", SCHEDULES)
def test_alone_without_chunks_it_is_the_plain_loop(name: str) -> None:
    assert generate(name, ranks=1, micro_batches=3) == read("0F0 0B0 0F1 0B1 0F2 0B2")


def test_known_orders() -> None:
    assert generate("gpipe", ranks=2, micro_batches=2) == read("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1")
    assert generate("1f1b", ranks=2, micro_batches=3) == read("0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2")
    assert generate("interleaved", ranks=2, micro_batches=2, chunks=2) == read(
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1", "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1"
    )


def test_interleaved_rounds_are_as_equal_as_can_be() -> None:
    for p, m, rounds in ((4, 8, [4, 4]), (4, 10, [5, 5]), (4, 11, [6, 5]), (4, 3, [3]), (1, 2, [1, 1])):
        forwards = [action.stage for action in generate("interleaved", ranks=p, micro_batches=m, chunks=2)[0] if action.kind is Kind.F]
        assert [len(list(group)) for _, group in itertools.groupby(forwards)] == [size for size in rounds for _ in range(2)]


def test_limits_carry_the_arithmetic() -> None:
    assert limits("1f1b", ranks=4, micro_batches=1) == []
    assert limits("interleaved", ranks=4, micro_batches=7, chunks=3) == []
    assert "chunks = 3" in limits("1f1b", ranks=4, micro_batches=8, chunks=3)[0]
    assert "micro-batches = 0" in limits("gpipe", ranks=4, micro_batches=0)[0]
    assert "gpipe, 1f1b, interleaved" in limits("2f2b", ranks=4, micro_batches=8)[0]
    with pytest.raises(UsageError) as refused:
        generate("gpipe", ranks=2, micro_batches=2, chunks=2)
    assert refused.value.details == limits("gpipe", ranks=2, micro_batches=2, chunks=2)


# ---- lower and validate


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_is_proved(name: str) -> None:
    for _, p, m, v in (size for size in SIZES if size[0] == name):
        validate(lowered(name, p, m, v), num_stages=p * v, micro_batches=m, reduce="step")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes(), st.sampled_from(["step", "micro_batch"]), st.integers(0, 9))
def test_proved_lists_run_and_lose_no_compute(size: tuple, reduce: str, seed: int) -> None:
    name, p, m, v = size
    compute = generate(name, ranks=p, micro_batches=m, chunks=v)
    lists = lower(compute, reduce=reduce)
    validate(lists, num_stages=p * v, micro_batches=m, reduce=reduce)
    execute(lists, seed)
    assert [[a for a in actions if a.kind in COMPUTE] for actions in lists] == compute
    sent = sum(action.kind in SENDS for actions in lists for action in actions)
    assert sent == (2 * (p * v - 1) * m if p > 1 else 0)


@pytest.mark.parametrize("size", [("gpipe", 4, 8, 1), ("1f1b", 4, 8, 1), ("interleaved", 4, 10, 3), ("interleaved", 2, 3, 2)])
def test_recvs_are_posted_a_compute_action_ahead(size: tuple) -> None:
    for actions in lowered(*size):
        posted, ran = {}, 0
        for action in actions:
            if action.kind in RECVS:
                posted[action] = ran
            elif action.kind in COMPUTE:
                assert needs(action) not in posted or posted[needs(action)] <= max(0, ran - 1), f"{action} posts its input too late"
                ran += 1


def test_a_lowered_list() -> None:
    assert lowered("1f1b", 2, 2, 1) == read(
        "0F0 0RB0 0SF0 0F1 0RB1 0SF1 0B0 0B1 0R",
        "1RF0 1RF1 1F0 1B0 1SB0 1F1 1B1 1SB1 1R",
    )
    assert lowered("1f1b", 1, 2, 1, "micro_batch") == read("0F0 0B0 0R0 0F1 0B1 0R1")


def test_split_backwards_and_a_v_of_stages_lower_too() -> None:
    """What the schedules to come need: I hands on, W finishes, neighbouring stages may share a rank."""
    lists = lower(read("0F0 3F0 3I0 0I0 3W0 0W0", "1F0 2F0 2I0 1I0 2W0 1W0"), reduce="micro_batch")
    validate(lists, num_stages=4, micro_batches=1, reduce="micro_batch")
    execute(lists, 0)
    texts = [[str(action) for action in actions] for actions in lists]
    assert "1SF0" not in texts[1] and "2SB0" not in texts[1], "stages 1 and 2 share a rank"
    assert texts[0][-4:] == ["3W0", "3R0", "0W0", "0R0"] and texts[0].index("3SB0") == texts[0].index("3I0") + 1


def refused(lists: list[list[Action]], p: int, m: int, v: int, reduce: str) -> bool:
    try:
        validate(lists, num_stages=p * v, micro_batches=m, reduce=reduce)
    except ScheduleError:
        return True
    return False


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes(largest=6), st.sampled_from(["step", "micro_batch"]), st.randoms(use_true_random=False))
def test_the_validator_sees_every_lost_doubled_or_misplaced_action(size: tuple, reduce: str, draw: random.Random) -> None:
    name, p, m, v = size
    lists = lowered(name, p, m, v, reduce)
    rank = draw.randrange(p)
    at = draw.randrange(len(lists[rank]))
    action, to = lists[rank][at], draw.randrange(p)

    def changed(change) -> bool:
        copy = [list(actions) for actions in lists]
        change(copy)
        return refused(copy, p, m, v, reduce)

    assert not changed(lambda copy: None)
    assert changed(lambda copy: copy[rank].pop(at)), f"lost {action}"
    assert changed(lambda copy: copy[to].insert(draw.randrange(len(copy[to]) + 1), action)), f"doubled {action}"
    assert changed(lambda copy: copy[rank].__setitem__(at, action._replace(micro=m))), f"{action} for a micro-batch that is not there"
    assert changed(lambda copy: copy[rank].__setitem__(at, action._replace(stage=p * v))), f"{action} for a stage that is not there"
    if to != rank:
        assert changed(lambda copy: copy[to].append(copy[rank].pop(at))), f"{action} moved to rank {to}"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes(largest=6), st.randoms(use_true_random=False))
def test_the_validator_sees_order(size: tuple, draw: random.Random) -> None:
    """Swaps that break a rule are refused; other swaps may pass, and then the lists really run."""
    name, p, m, v = size
    lists = lowered(name, p, m, v)
    owner, rank = owners(lists), draw.randrange(p)
    place = {action: at for at, action in enumerate(lists[rank])}

    def swapped(one: Action, other: Action) -> list[list[Action]]:
        copy = [list(actions) for actions in lists]
        copy[rank][place[one]], copy[rank][place[other]] = other, one
        return copy

    forward = draw.choice([action for action in place if action.kind is Kind.F])
    assert refused(swapped(forward, forward._replace(kind=Kind.B)), p, m, v, "step")
    last = max(place[action] for action in place if action.kind is Kind.B and action.stage == forward.stage)
    assert refused(swapped(Action(forward.stage, Kind.REDUCE, ALL), lists[rank][last]), p, m, v, "step")
    messages = [action for action in place if action.kind in SENDS | RECVS]
    for one, other in itertools.islice(itertools.combinations(draw.sample(messages, len(messages)), 2), 20):
        if one.kind == other.kind and channel(one, owner) == channel(other, owner):
            assert refused(swapped(one, other), p, m, v, "step"), f"{one} and {other} swapped"
    any_swap = swapped(*draw.sample(list(place), 2))
    if not refused(any_swap, p, m, v, "step"):
        execute(any_swap, draw.randrange(100))


def test_deadlocks_are_named() -> None:
    circle = read("0F0 0SF0 0RB0 0B0 0F1 0SF1 0RB1 0B1 0R", "1RF0 1F0 1RF1 1F1 1B0 1SB0 1B1 1SB1 1R")
    with pytest.raises(ScheduleError, match=r"deadlock with free sends \(rank 0 at 0B0, rank 1 at 1F1\): 0B0 on rank 0"):
        validate(circle, num_stages=2, micro_batches=2, reduce="step")
    late = read("0F0 0SF0 0F1 0SF1 0RB0 0B0 0RB1 0B1 0R", "1RF0 1F0 1B0 1SB0 1RF1 1F1 1B1 1SB1 1R")
    with pytest.raises(ScheduleError, match=r"deadlock with synchronous sends \(rank 0 at 0SF1, rank 1 at 1SB0\)"):
        validate(late, num_stages=2, micro_batches=2, reduce="step")
    with pytest.raises(AssertionError, match="in a circle"):
        lower(read("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"), reduce="step")


def test_a_fault_names_its_action() -> None:
    lists = lowered("1f1b", 2, 2, 1)
    lists[1].remove(parse("1SB1"))
    with pytest.raises(ScheduleError, match="a message is missing: 1SB1 on rank 1") as fault:
        validate(lists, num_stages=2, micro_batches=2, reduce="step")
    late = read("0F0 0SF0 0RB0 0B0 0R", "1F0 1RF0 1B0 1SB0 1R")
    with pytest.raises(ScheduleError, match="computed before 1RF0 is posted: 1F0 on rank 1"):
        validate(late, num_stages=2, micro_batches=1, reduce="step")
    early = read("0RB0 0SF0 0F0 0B0 0R", "1RF0 1F0 1B0 1SB0 1R")
    with pytest.raises(ScheduleError, match="sent before it is computed: 0SF0 on rank 0"):
        validate(early, num_stages=2, micro_batches=1, reduce="step")
    assert fault.value.action == parse("1SB1") and fault.value.rank == 1 and isinstance(fault.value, AssertionError)


# ---- simulate


def test_the_published_examples_are_read_right() -> None:
    for row_id in ("bubble-01", "bubble-02", "bubble-04", "bubble-05", "bubble-07", "bubble-08"):
        values = {key: float(value) for key, value in (pair.split("=") for pair in ROWS[row_id]["example"].split())}
        assert published(row_id, **values) == pytest.approx(float(ROWS[row_id]["example_value"]), rel=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("f, b", [(1.0, 2.0), (0.3, 0.7), (2.0, 1.0)])
def test_time_and_bubble_are_the_closed_forms(name: str, f: float, b: float) -> None:
    for _, p, m, v in (size for size in SIZES if size[0] == name and (size[2] >= size[1] or size[3] == 1) and sum(size[1:]) % 2):
        step = simulate(lowered(name, p, m, v), forward=f / v, backward=b / v)
        values = {"p": p, "m": m, "v": v, "tF": f, "tB": b}
        fraction, ratio, seconds = {
            "gpipe": ("bubble-02", "bubble-01", "bubble-03"),
            "1f1b": ("bubble-04", "bubble-01", "bubble-03"),
            "interleaved": ("bubble-08", "bubble-07", "bubble-06"),
        }[name]
        assert step.bubble_fraction == pytest.approx(published(fraction, **values), abs=1e-12), (p, m, v)
        assert step.idle == pytest.approx([published(seconds, **values)] * p, abs=1e-10), "every rank is idle equally long"
        ideal = step.makespan - step.idle[0]
        assert step.idle[0] / ideal == pytest.approx(published(ratio, **values), abs=1e-12)
        if v == 1:
            assert step.makespan == pytest.approx(published("bubble-05", **values), rel=1e-12)


def test_fewer_micro_batches_than_ranks_wait_for_their_own_way_round() -> None:
    for p, v in itertools.product(range(2, 9), range(1, 5)):
        for m in range(1, p + 1):
            step = simulate(lowered("interleaved", p, m, v), forward=1.0, backward=2.0)
            assert step.makespan == pytest.approx((v * p + m - 1) * 3.0, rel=1e-12), (p, m, v)


@pytest.mark.parametrize("name", SCHEDULES)
def test_activations_in_flight_are_the_closed_forms(name: str) -> None:
    for _, p, m, v in (size for size in SIZES if size[0] == name):
        peaks = [in_flight(actions) for actions in generate(name, ranks=p, micro_batches=m, chunks=v)]
        if name == "gpipe":
            assert peaks == [published("inflight-01", m=m) if p > 1 else 1] * p
        elif v == 1:
            assert peaks == [published("inflight-02", p=p, i=rank, m=m) for rank in range(p)]
        else:
            size = -(-m // max(1, m // p))
            bounds = [min(v * m, 2 * (p - 1 - rank) + (v - 1) * size + 1) for rank in range(p)]
            assert all(peak <= bound for peak, bound in zip(peaks, bounds, strict=True))
            if m % p == 0 or m < p:
                assert peaks == bounds
            if m % p == 0 and m >= 2 * p:
                assert peaks[0] / v == pytest.approx(published("inflight-03", p=p, v=v), rel=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes(largest=12), st.floats(0.0, 3.0), st.floats(0.0, 3.0), st.randoms(use_true_random=False))
def test_simulation_keeps_the_rules_of_time(size: tuple, transfer: float, reduce: float, draw: random.Random) -> None:
    name, p, m, v = size
    forward, backward = ([draw.uniform(0.1, 2.0) for _ in range(p * v)] for _ in range(2))
    lists = lowered(name, p, m, v)
    step = simulate(lists, forward=forward, backward=backward, transfer=transfer, reduce=reduce, transfer_bytes=10, reduce_bytes=7)
    assert Counter((s.rank, s.action) for s in step.spans) == Counter((r, a) for r, actions in enumerate(lists) for a in actions)
    at = {span.action: span for span in step.spans}
    lanes: dict[tuple, list[Span]] = defaultdict(list)
    owner = owners(lists)
    for span in step.spans:
        kind = span.action.kind
        lane = "compute" if kind in COMPUTE else (channel(span.action, owner), kind) if kind in SENDS | RECVS else kind
        lanes[span.rank, lane].append(span)
        if kind in SENDS:
            assert (span.bytes, at[partner(span.action)].bytes) == (10, 0), "a byte is counted where it is sent"
        if kind in COMPUTE and (recv := needs(span.action)) in at:
            assert span.start >= at[recv].end
    for own in lanes.values():
        assert all(one.end <= other.start for one, other in itertools.pairwise(own)), "one thing at a time"
    for rank in range(p):
        work = m * sum(forward[s] + backward[s] for s in stages_of(rank, p, v))
        assert step.makespan - step.idle[rank] == pytest.approx(work)
    assert step.in_flight == tuple(map(in_flight, generate(name, ranks=p, micro_batches=m, chunks=v)))


@pytest.mark.parametrize("p, t", [(2, 1.0), (4, 0.5), (8, 0.25)])
def test_what_transfers_cost(p: int, t: float) -> None:
    """gpipe and interleaved hide transfers but for the way in and out; 1f1b, with as few micro-batches alive as can be, waits for each
    round trip of 2(p-1) messages once per p micro-batches."""

    def paid(name: str, m: int, v: int = 1) -> float:
        bare, slow = (simulate(lowered(name, p, m, v), forward=1.0, backward=1.0, transfer=seconds) for seconds in (0.0, t))
        return slow.makespan - bare.makespan

    assert paid("gpipe", 8 * p) == paid("gpipe", 4 * p) == 2 * (p - 1) * t
    assert paid("interleaved", 8 * p, 2) == paid("interleaved", 4 * p, 2) == (4 * p - 2) * t
    assert paid("1f1b", 8 * p) - paid("1f1b", 4 * p) == pytest.approx(4 * p * 2 * (p - 1) * t / p)


def test_reductions_run_beside_compute() -> None:
    step = simulate(lowered("1f1b", 2, 4, 1), forward=1.0, backward=1.0, reduce=[5.0, 0.5])
    assert step.makespan == 10.0 + 5.0 and step.idle == (7.0, 7.0)
    early = simulate(lowered("1f1b", 2, 4, 1, "micro_batch"), forward=1.0, backward=1.0, reduce=0.5)
    assert early.makespan == 10.5
    lists = lower(read("0F0 0F1 0B0 0B1"), reduce="micro_batch")
    assert simulate(lists, forward=1.0, backward=1.0, reduce=5.0).makespan == 14.0, "the buffers of one backward at a time"


def test_split_backwards_cost_their_halves() -> None:
    lists = lower(read("0F0 0I0 0W0"), reduce="step")
    assert simulate(lists, forward=1.0, backward=2.0).makespan == 3.0
    assert simulate(lists, forward=1.0, backward=2.0, weight_gradient=0.25).makespan == 2.25
    assert simulate(lists, forward=[1.0], backward=[4.0], input_gradient=[0.5]).makespan == 3.5


def test_measured_spans_get_the_same_summary() -> None:
    step = simulate(lowered("1f1b", 4, 8, 1), forward=1.0, backward=2.0)
    later = [Span(s.rank, s.action, s.start + 1000.0, s.end + 1000.0, s.bytes) for s in reversed(step.spans)]
    moved = summary(later, ranks=4)
    assert (moved.makespan, moved.idle, moved.in_flight) == (step.makespan, step.idle, step.in_flight)
    assert summary([], ranks=2).bubble_fraction == 0.0


# ---- draw


def drawn(name: str, p: int, m: int, v: int, **costs: float):
    return simulate(lowered(name, p, m, v), **({"forward": 1.0, "backward": 2.0} | costs))


def test_the_user_page_shows_what_is_built() -> None:
    page = (HERE.parent / "docs" / "schedules.md").read_text()
    shown = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    *grids, cuts = shown
    assert grids == [grid(drawn(*size).spans, ranks=size[1]) for size in (("gpipe", 4, 4, 1), ("1f1b", 4, 4, 1), ("interleaved", 2, 4, 2))]
    letters = {"embedding": "E", "head": "H", "attention": "A", "mlp": "F"}
    found = [" ".join(f"{letters[name.rpartition('.')[2]]}{re.sub('[^0-9]', '', name)}" for name in part) for part in _walked(FIVE, 256, 2)]
    assert f"[{' | '.join(found)}]" in cuts and "dearest stage: 1.06 of an even cut                 1.17" in cuts
    assert [round(_dearest(FIVE, 256, 2, whole=whole), 2) for whole in (False, True)] == [1.06, 1.17]
    for name, preset in (("Llama 3 8B", "llama3-8b"), ("Mistral 7B", "mistral-7b"), ("Qwen3 8B", "qwen3-8b")):
        pairs = [[f"{_dearest({'preset': preset}, 4096, pp, whole=whole):.2f}" for whole in (False, True)] for pp in (4, 8, 16)]
        assert f"| {name} | {' | '.join(', '.join(pair) for pair in pairs)} |" in page


def _walked(model: dict[str, Any], sequence: int, num_stages: int) -> list[list[str]]:
    stages = stage_units(ModelConfig.model_validate(model), sequence, num_stages)
    return [[half for unit in units for half in halves_of(unit)] for units in stages]


def _dearest(model: dict[str, Any], sequence: int, num_stages: int, *, whole: bool) -> float:
    """The cost of the dearest stage as a part of an even share. whole: of blocks that are not cut."""
    costs = forward_flops(ModelConfig.model_validate(model), sequence)
    stages = [sum(costs[half] for half in part) for part in _walked(model, sequence, num_stages)]
    if whole:
        units = [sum(costs[half] for half in halves_of(unit)) for unit in unit_names(ModelConfig.model_validate(model))]
        stages = [sum(units[at] for at in part) for part in cut(units, num_stages)]
    return max(stages) * num_stages / sum(costs.values())


@pytest.mark.parametrize(("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)])
def test_the_pictures_of_the_user_page(name: str, chunks: int) -> None:
    """They are what `svg` draws; DIST_LLM_WRITE_GOLDEN=1 draws them anew."""
    path = HERE.parent / "docs/images" / f"{name}.svg"
    made = svg(drawn(name, 4, 8, chunks, transfer=0.1, reduce=1.0).spans, ranks=4, title=f"{name}, 4 ranks, 8 micro-batches")
    if os.environ.get("DIST_LLM_WRITE_GOLDEN"):
        path.write_text(made)
    assert path.read_text() == made


def test_grid() -> None:
    assert grid(drawn("1f1b", 2, 3, 1).spans, ranks=2) == (
        "rank 0  F0 F1 .  .  B0 -- F2 B1 -- .  B2 --\n"
        "rank 1  .  F0 B0 -- F1 B1 -- F2 B2 -- .  .\n"
        "        one cell 1 s, step 12 s, bubble 25.0 %, micro-batches in flight 2 1\n"
    )
    narrow = grid(drawn("1f1b", 2, 12, 1).spans, ranks=2, columns=60)
    assert narrow.splitlines()[0] == "rank 0  01..aa2bb3cc4dd5ee6ff7gg8hh9ii0jj1aa.bb"
    for size, columns in itertools.product([("interleaved", 8, 24, 3), ("gpipe", 4, 24, 1)], (40, 80, 200)):
        assert max(map(len, grid(drawn(*size).spans, ranks=size[1], columns=columns).splitlines()[:-1])) <= columns + 1
    assert grid([], ranks=2) == "nothing was computed\n"


def test_svg_is_well_formed_and_complete() -> None:
    step = drawn("interleaved", 4, 8, 2, transfer=0.1, reduce=1.0)
    root = ElementTree.fromstring(svg(step.spans, ranks=4, title="a < b & c"))
    names = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert names[0] == "a < b & c"
    hints = Counter(name.split(" ")[0] for name in names[1:])
    assert hints == Counter(str(span.action) for span in step.spans if span.action.kind not in RECVS)
    width = float(root.get("width"))
    boxes = [(float(r.get("x", 0)), float(r.get("width"))) for r in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert all(x >= 0 and x + w <= width for x, w in boxes)
    ElementTree.fromstring(svg([], ranks=1))


def test_trace_is_chrome_json() -> None:
    step = drawn("1f1b", 2, 2, 1, transfer=0.1, reduce=1.0)
    loaded = json.loads(json.dumps(trace(step.spans), allow_nan=False))
    events = [event for event in loaded["traceEvents"] if event["ph"] == "X"]
    assert sorted(event["name"] for event in events) == sorted(str(span.action) for span in step.spans)
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(step.makespan * 1e6)
    named = {(event["pid"], event["tid"]) for event in loaded["traceEvents"] if event["name"] == "thread_name"}
    assert named == {(event["pid"], event["tid"]) for event in events}
    assert [event["args"]["micro_batch"] for event in events if event["name"] == "0R"] == [None]


# ---- cut


def every_cut(units: int, stages: int):
    for inner in itertools.combinations(range(1, units), stages - 1):
        edges = [0, *inner, units]
        yield [range(start, end) for start, end in itertools.pairwise(edges)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_cut_is_the_best_of_all_cuts(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))

    def rank_of_cut(parts: list[range]) -> tuple:
        sums = [sum(costs[i] for i in part) for part in parts]
        return max(sums), sum(s * s for s in sums), [part.stop for part in parts]

    assert cut(costs, stages) == min(every_cut(len(costs), stages), key=rank_of_cut)
    assert cut([cost * 0.1 for cost in costs], stages) == cut([cost * 0.1 * 2**40 for cost in costs], stages), "free of the unit of measure"


def test_cut_counts_embedding_and_head() -> None:
    assert cut([1.0] * 8, 3) == [range(2), range(2, 5), range(5, 8)]
    assert cut([0.1, 1, 1, 1, 1, 3], 2) == [range(4), range(4, 6)], "4 is less than 4.1"
    assert cut([0.1, 1, 1, 1, 1, 4.2], 2) == [range(5), range(5, 6)], "the head has a stage for itself"
    assert cut([0, 1, 1, 1, 1, 0.5], 2) == [range(3), range(3, 6)]
    assert cut([0.1] * 6, 3) == [range(2), range(2, 4), range(4, 6)], "0.1 + 0.1 + 0.1 is not 0.3 in floats"
    assert cut([5, 1, 1, 1, 1, 5], 6) == [range(i, i + 1) for i in range(6)]
    with pytest.raises(UsageError, match="4 parts .* over 6 stages leave 2 stages empty"):
        cut([1.0] * 4, 6)


FIVE = {"family": "llama", "layers": 5, "dim": 256, "heads": 8, "ffn": 688, "vocab": 512, "tied": False}
STAGED = {"family": "llama", "layers": 6, "dim": 256, "heads": 8, "ffn": 688, "vocab": 2048, "tied": False}


def test_a_block_is_cut_where_that_evens_out_the_stages() -> None:
    """And where it is worth it: with six blocks and as large a head it would save 4 % of the dearest stage, with five and less 9 %."""
    model = ModelConfig.model_validate(STAGED)
    assert stage_units(model, 256, 1) == [["embedding", *(f"blocks.{layer}" for layer in range(6)), "head"]]
    assert stage_units(model, 256, 2) == [["embedding", "blocks.0", "blocks.1", "blocks.2"], ["blocks.3", "blocks.4", "blocks.5", "head"]]
    first, second = stage_units(ModelConfig.model_validate(FIVE), 256, 2)
    assert first == ["embedding", "blocks.0", "blocks.1", "blocks.2.attention"]
    assert second == ["blocks.2.mlp", "blocks.3", "blocks.4", "head"]
    assert len(stage_units(ModelConfig.model_validate({**STAGED, "layers": 2}), 256, 5)) == 5, "no whole blocks would do"


@pytest.mark.parametrize("changes", [{}, {"layers": 9, "vocab": 101}, {"layers": 12, "vocab": 50304, "tied": True}], ids=str)
@pytest.mark.parametrize("num_stages", [2, 3, 4, 6])
def test_stages_hold_each_half_once_and_the_dearest_is_the_cheapest_there_is(changes: dict[str, Any], num_stages: int) -> None:
    model = ModelConfig.model_validate({**STAGED, **changes})
    costs = forward_flops(model, 256)
    stages = stage_units(model, 256, num_stages)
    walked = [[half for unit in units for half in halves_of(unit)] for units in stages]
    assert [half for part in walked for half in part] == list(half_names(model)) == list(costs)
    assert all(f"{block}.attention" not in units or f"{block}.mlp" not in units for units in stages for block in map(_block, units))
    names, places = list(half_names(model)), range(1, len(half_names(model)))
    best, whole = (
        min(
            max(sum(costs[name] for name in names[a:b]) for a, b in itertools.pairwise((0, *ends, len(names))))
            for ends in itertools.combinations(some, num_stages - 1)
        )
        for some in (places, places[::2])  # everywhere; before and behind whole blocks
    )
    assert max(sum(costs[half] for half in part) for part in walked) == (best if best <= 0.95 * whole else whole)


def _block(unit: str) -> str:
    return ".".join(unit.split(".")[:2])


def test_cut_of_a_large_model_is_quick_and_covers_it() -> None:
    parts = cut([0.3, *[1.0] * 126, 2.1], 32)
    assert [i for part in parts for i in part] == list(range(128)) and len(parts) == 32
