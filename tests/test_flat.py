"""Flat buffers: every slot is there once over all shards, padding is small and aligned, decay runs are right."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.schema import ModelConfig
from dist_llm.model.table import Row, table
from dist_llm.parallel.flat import ALIGN, FlatPlan, pack

sizes = st.one_of(st.integers(1, 3), st.integers(4, 200))


@st.composite
def plans(draw: st.DrawFn) -> FlatPlan:
    """A unit of a few rows, with and without decay, on some tp coordinate and with some number of shards."""
    tp, shards = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 9))
    rows = []
    for number in range(draw(st.integers(1, 6))):
        parts = draw(st.integers(tp, 50))
        shape = (parts, draw(st.integers(1, 5))) if draw(st.booleans()) else (parts,)
        role = draw(st.sampled_from(["column", "vocab", "outside", "inside"]))
        split = parts if role in ("column", "vocab") else 1
        rows.append(Row(f"row {number}", shape, role, "unit", parts=split, decay=draw(st.booleans())))
    return pack(rows, unit="unit", tp=tp, sp=draw(st.booleans()), coordinate=draw(st.integers(0, tp - 1)), shards=shards)


@given(plans())
@settings(max_examples=200, deadline=None)
def test_pieces_cover_every_slot_exactly_once(plan: FlatPlan) -> None:
    buffer = np.zeros(plan.padded, dtype=int)
    by_slot = {slot.name: np.zeros(slot.numel, dtype=int) for slot in plan.slots}
    for shard in range(plan.shards):
        start, stop = plan.range(shard)
        for piece in plan.pieces(shard):
            assert piece.at >= 0 and piece.at + piece.stop - piece.start <= stop - start
            at = start + piece.at
            assert at == piece.slot.offset + piece.start  # the run in the shard is the run in the slot
            buffer[at : at + piece.stop - piece.start] += 1
            by_slot[piece.slot.name][piece.start : piece.stop] += 1
    assert all((count == 1).all() for count in by_slot.values())
    assert buffer.sum() == sum(slot.numel for slot in plan.slots) and buffer.max() == 1


@given(plans())
@settings(max_examples=200, deadline=None)
def test_shards_are_equal_aligned_and_hardly_padded(plan: FlatPlan) -> None:
    assert [plan.range(shard) for shard in range(plan.shards)] == [
        (shard * plan.shard_size, (shard + 1) * plan.shard_size) for shard in range(plan.shards)
    ]
    assert plan.shard_size * plan.shards == plan.padded and plan.shard_size % ALIGN == 0
    assert all(slot.offset % ALIGN == 0 for slot in plan.slots)
    elements = sum(slot.numel for slot in plan.slots)
    assert elements <= plan.used <= plan.padded < elements + ALIGN * (len(plan.slots) + plan.shards)


@given(plans())
@settings(max_examples=200, deadline=None)
def test_decay_segments_hold_their_slots_and_no_others(plan: FlatPlan) -> None:
    decays = np.full(plan.padded, -1)
    for shard in range(plan.shards):
        segments = plan.segments(shard)
        assert len(segments) <= 2  # one call of the optimizer's kernel for each
        for start, stop, decay in segments:
            assert plan.range(shard)[0] <= start < stop <= plan.range(shard)[1]
            assert (decays[start:stop] == -1).all()
            decays[start:stop] = decay
    for slot in plan.slots:
        assert (decays[slot.offset : slot.offset + slot.numel] == slot.row.decay).all()
    assert (decays[plan.used :] == -1).all()  # the padding at the end is never updated


def test_slots_keep_the_order_of_the_table_within_a_decay_group() -> None:
    """q, k, v and gate, up are neighbours, so that one view can hold them."""
    model = ModelConfig(family="llama", layers=1, dim=16, heads=4, kv_heads=2, ffn=24, vocab=32)
    rows = [row for row in table(model) if row.unit == "blocks.0"]
    plan = pack(rows, unit="blocks.0", tp=2, sp=True, coordinate=1, shards=3)
    names = [slot.name.split(".", 2)[2] for slot in plan.slots]
    projections = ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"]
    assert names == [f"{name}.weight" for name in (*projections, "attention_norm", "mlp_norm")]
    offsets = {name: slot.offset for name, slot in zip(names, plan.slots, strict=True)}
    assert offsets["attention.k.weight"] == offsets["attention.q.weight"] + 8 * 16


@pytest.mark.parametrize("shards", [1, 2, 7, 64])
def test_tiny_units_shard_too(shards: int) -> None:
    """trap 25: one norm weight of 3 elements over 64 ranks: 61 of the shards hold nothing but padding."""
    plan = pack([Row("norm.weight", (3,), "outside", "head", decay=False)], unit="head", tp=1, sp=False, coordinate=0, shards=shards)
    assert (plan.used, plan.padded, plan.decayed) == (3, ALIGN * shards, 0)
    assert [len(plan.pieces(shard)) for shard in range(shards)] == [1] + [0] * (shards - 1)
    assert plan.segments(0) == [(0, 3, False)] and not any(plan.segments(shard) for shard in range(1, shards))


@pytest.mark.parametrize(("shards", "replicas"), [(1, 3), (2, 2), (4, 5)])
def test_shards_divide_by_their_replicas(shards: int, replicas: int) -> None:
    """Replicas sum equal, aligned parts of a shard; the buffer is as long as if all their ranks split it."""
    sizes = {"unit": "u", "tp": 1, "sp": False, "coordinate": 0}
    plan = pack([Row("w", (7, 13), "outside", "u")], **sizes, shards=shards, replicas=replicas)
    assert plan.shards == shards and plan.shard_size % (ALIGN * replicas) == 0
    assert plan.padded == pack([Row("w", (7, 13), "outside", "u")], **sizes, shards=shards * replicas).padded


def test_slots_have_the_local_shape() -> None:
    row = Row("e", (257, 3), "vocab", "u", parts=257)
    slots = [pack([row], unit="u", tp=4, sp=True, coordinate=tp, shards=2).slots[0] for tp in range(4)]
    assert [slot.shape for slot in slots] == [(64, 3), (64, 3), (64, 3), (65, 3)]
    assert [slot.numel for slot in slots] == [prod(slot.shape) for slot in slots]
    assert {slot.name for slot in slots} == {"e"}
