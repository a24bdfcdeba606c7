"""Shardings: the boxes of any row tile its tensor, each element with one owner, uneven or shared cuts included."""

from __future__ import annotations

import itertools
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.schema import ModelConfig
from dist_llm.model.table import Role, Row, table
from dist_llm.sharding import shard, split_parts

SPLIT: tuple[Role, ...] = ("column", "row", "vocab")


@st.composite
def rows(draw: st.DrawFn, tp: int) -> Row:
    """Any row: a role, and parts that divide into or among `tp` ranks, or more parts than ranks cut unevenly."""
    role = draw(st.sampled_from([*SPLIT, "outside", "inside"]))
    shared = [parts for parts in range(1, tp) if tp % parts == 0]
    parts = draw(st.sampled_from(shared) if shared and draw(st.booleans()) else st.integers(tp, 3 * tp + 2))
    split, other = parts * draw(st.integers(1, 4)), draw(st.integers(1, 5))
    shapes = {"row": (other, split), "outside": (other,), "inside": (other,)}
    shape = shapes.get(role, (split, other) if draw(st.booleans()) else (split,))
    return Row("x", shape, role, "unit", parts=parts if role in SPLIT else 1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Row, int, bool]:
    """A row, a number of ranks, sequence parallelism on or off."""
    tp = draw(st.integers(1, 8))
    return draw(rows(tp)), tp, draw(st.booleans())


def count(row: Row, tp: int, sp: bool, *, owners_only: bool) -> np.ndarray:
    """How many ranks hold (or own) each element of the global tensor."""
    held = np.zeros(row.shape, dtype=int)
    sharding = shard(row, tp=tp, sp=sp)
    for rank in range(tp):
        if sharding.owner(rank) or not owners_only:
            held[tuple(slice(*side) for side in sharding.box(rank))] += 1
    return held


@given(cases())
@settings(max_examples=300, deadline=None)
def test_owners_hold_every_element_exactly_once(case: tuple[Row, int, bool]) -> None:
    assert (count(*case, owners_only=True) == 1).all()


@given(cases())
@settings(max_examples=200, deadline=None)
def test_replicas_are_the_ranks_with_the_same_box(case: tuple[Row, int, bool]) -> None:
    row, tp, sp = case
    sharding = shard(row, tp=tp, sp=sp)
    held = count(row, tp, sp, owners_only=False)
    for rank in range(tp):
        replicas = sharding.replicas(rank)
        assert rank in replicas and {sharding.box(other) for other in replicas} == {sharding.box(rank)}
        assert sum(sharding.owner(other) for other in replicas) == 1
        assert (held[tuple(slice(*side) for side in sharding.box(rank))] == len(replicas)).all()


@given(cases())
@settings(max_examples=200, deadline=None)
def test_gradients_are_partial_where_replicas_saw_different_things(case: tuple[Row, int, bool]) -> None:
    """Shared kv heads and q/k norms see other heads on each replica; with sp, whatever is outside sees other tokens."""
    row, tp, sp = case
    sharding = shard(row, tp=tp, sp=sp)
    replicated = len(sharding.replicas(0)) > 1
    expected = replicated and (row.role in ("column", "row", "vocab", "inside") or sp)
    assert sharding.partial == expected


@given(st.integers(1, 64), st.integers(1, 16))
def test_parts_are_split_evenly_and_in_order(parts: int, ranks: int) -> None:
    if parts < ranks and ranks % parts:
        with pytest.raises(AssertionError):
            split_parts(parts, ranks)
        return
    cuts = split_parts(parts, ranks)
    sizes = [stop - start for start, stop in cuts]
    assert len(cuts) == ranks and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    if parts >= ranks:
        assert [side for cut in cuts for side in cut][1:-1:2] == [side for cut in cuts for side in cut][2::2]  # no gap
        assert (cuts[0][0], cuts[-1][1]) == (0, parts)
    else:
        assert [cut[0] for cut in cuts] == [rank * parts // ranks for rank in range(ranks)]


def test_heads_are_cut_whole() -> None:
    """A cut inside a head would mix heads: with 4 heads of 8 over tp=2 each rank has 16 features, two whole heads."""
    sharding = shard(Row("q", (32, 6), "column", "u", parts=4), tp=2, sp=False)
    assert [sharding.box(rank) for rank in (0, 1)] == [((0, 16), (0, 6)), ((16, 32), (0, 6))]
    shared = shard(Row("k", (16, 6), "column", "u", parts=2), tp=4, sp=False)
    assert [shared.box(rank)[0] for rank in range(4)] == [(0, 8), (0, 8), (8, 16), (8, 16)]
    assert shared.partial and [shared.owner(rank) for rank in range(4)] == [True, False, True, False]


def test_an_uneven_vocabulary_leaves_nothing_out() -> None:
    sharding = shard(Row("e", (257, 3), "vocab", "u", parts=257), tp=4, sp=True)
    assert [sharding.local_shape(rank)[0] for rank in range(4)] == [64, 64, 64, 65]
    assert not sharding.partial


def test_kv_heads_follow_their_query_heads() -> None:
    """The kv heads of a rank are those that its query heads read in one process: query head h reads kv head h * K / H."""
    for heads, kv_heads, tp in itertools.product([4, 8, 12, 24], [1, 2, 3, 4, 6, 8, 12], [1, 2, 3, 4, 6, 8]):
        if heads % kv_heads or heads % tp or (kv_heads % tp and tp % kv_heads):
            continue
        queries, keys = split_parts(heads, tp), split_parts(kv_heads, tp)
        for (first, last), (low, high) in zip(queries, keys, strict=True):
            here = [(head - first) * (high - low) // (last - first) + low for head in range(first, last)]
            assert here == [head * kv_heads // heads for head in range(first, last)], (heads, kv_heads, tp)


@pytest.mark.parametrize("changes", [{}, {"family": "gpt2"}, {"family": "qwen3", "tied": True}, {"qkv_bias": True, "out_bias": True}])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_ranks_of_a_model_add_up_to_it(changes: dict[str, Any], tp: int) -> None:
    model = ModelConfig(**{"family": "llama", "layers": 2, "dim": 32, "heads": 8, "kv_heads": 2, "vocab": 61, **changes})
    for row in table(model):
        sharding = shard(row, tp=tp, sp=tp > 1)
        owned = sum(prod(sharding.local_shape(rank)) for rank in range(tp) if sharding.owner(rank))
        assert owned == row.numel, row
