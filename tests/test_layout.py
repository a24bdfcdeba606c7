"""Layouts: the text form, its one canonical spelling, and what it means on a number of ranks."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config import layout as layouts
from dist_llm.config.layout import KEYS, Layout, canonical, equation, parse_layout, resolve, world_of
from dist_llm.config.schema import LayoutConfig
from dist_llm.errors import UsageError


def concrete(text: str, world: int) -> Layout:
    return resolve(parse_layout(text), world)


def test_parse_reads_every_key() -> None:
    text = "dp=2,tp=4,sp=off,cp=2,cp_kind=ulysses,pp=2,ep=2,zero=3,shard=2,schedule=interleaved,chunks=3,reduce=step,unshard=step"
    layout = parse_layout(f"{text},recompute=full,offload=all,engine=fsdp2")
    assert layout == LayoutConfig(
        dp=2,
        tp=4,
        sp=False,
        cp=2,
        cp_kind="ulysses",
        pp=2,
        ep=2,
        zero=3,
        shard=2,
        schedule="interleaved",
        chunks=3,
        reduce="step",
        unshard="step",
        recompute="full",
        offload="all",
        engine="fsdp2",
    )
    assert set(layout.model_fields_set) == set(KEYS)
    assert parse_layout(" dp = 2 , tp=2 ") == LayoutConfig(dp=2, tp=2) and parse_layout("") == LayoutConfig()


def test_every_fault_of_a_text_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        parse_layout("tpp=2,tp=2,tp=3,zero=5,schedule=1fb,foo,engine=x,sp=maybe,dp=0,pp=-1,cp=1e3,ep=")
    assert caught.value.code == 2 and caught.value.details == [
        "unknown key 'tpp'; did you mean 'tp'?",
        "tp is given twice: 2 and 3",
        "zero=5: expected a whole number from 0 to 3",
        "schedule=1fb: expected one of gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipe-v, auto; did you mean '1f1b'?",
        "'foo' is not key=value",
        "engine=x: expected one of native, ddp, fsdp2, deepspeed",
        "sp=maybe: expected on or off",
        "dp=0: expected a whole number from 1",
        "pp=-1: expected a whole number from 1",
        "cp=1e3: expected a whole number from 1",
        "ep=: expected a whole number from 1",
    ]


def test_dp_fills_what_is_left() -> None:
    assert concrete("tp=2,pp=2", 8).dp == 2 and concrete("", 1) == Layout() and concrete("cp=2", 6).shard == 6
    with pytest.raises(UsageError) as caught:
        concrete("tp=3", 8)
    assert caught.value.found == "8 ranks: 8 over 3 leaves 2"
    with pytest.raises(UsageError) as caught:
        concrete("dp=2,tp=2", 8)
    assert caught.value.expected == "dp 2 x cp 1 x tp 2 x pp 1 = 4 ranks" and caught.value.found == "8 ranks"


def test_sequence_parallelism_follows_tp() -> None:
    assert concrete("tp=2", 2).sp and not concrete("tp=2,sp=off", 2).sp
    assert not concrete("", 2).sp and not concrete("sp=on", 2).sp


@pytest.mark.parametrize(
    "text, reduce, unshard",
    [
        ("zero=0", "step", "step"),
        ("zero=1", "step", "step"),
        ("zero=2", "micro_batch", "step"),
        ("zero=3", "micro_batch", "micro_batch"),
        ("zero=2,pp=2", "step", "step"),
        ("zero=3,pp=2", "step", "step"),
        ("zero=3,pp=2,reduce=micro_batch", "micro_batch", "step"),
        ("zero=3,unshard=step", "micro_batch", "step"),
        ("zero=1,reduce=micro_batch,unshard=micro_batch", "micro_batch", "step"),  # weights are whole: unshard says nothing
    ],
)
def test_reduce_and_unshard_follow_zero_and_the_pipeline(text: str, reduce: str, unshard: str) -> None:
    layout = concrete(text, 4)
    assert (layout.reduce, layout.unshard) == (reduce, unshard)


def test_chunks_follow_the_schedule() -> None:
    chunks = {"1f1b": 1, "gpipe": 1, "interleaved": 2, "zb-v": 2, "dualpipe-v": 2}
    assert {name: concrete(f"pp=2,schedule={name}", 2).chunks for name in chunks} == chunks
    assert concrete("pp=4,schedule=interleaved,chunks=3", 4).stages == 12


@pytest.mark.parametrize(
    "text, world, expected",
    [
        ("", 1, "dp=1"),
        ("tp=2", 8, "dp=4,tp=2"),
        ("tp=2,dp=1,sp=on", 2, "dp=1,tp=2"),
        ("sp=off,tp=2", 2, "dp=1,tp=2,sp=off"),
        ("pp=2,schedule=1f1b", 2, "dp=1,pp=2"),
        ("schedule=gpipe,pp=2,zero=0", 4, "dp=2,pp=2,schedule=gpipe"),
        ("pp=2,schedule=interleaved,chunks=2", 2, "dp=1,pp=2,schedule=interleaved"),
        ("zero=3,reduce=micro_batch", 2, "dp=2,zero=3"),
        ("zero=3,pp=2,reduce=micro_batch,shard=1", 4, "dp=2,pp=2,zero=3,shard=1,reduce=micro_batch"),
        ("zero=1,unshard=micro_batch", 2, "dp=2,zero=1"),
        ("engine=ddp,shard=2", 2, "dp=2,engine=ddp"),
    ],
)
def test_canonical_text(text: str, world: int, expected: str) -> None:
    layout = concrete(text, world)
    assert canonical(layout) == str(layout) == expected


def test_canonical_of_a_layout_without_dp_leaves_it_out() -> None:
    assert canonical(parse_layout("zero=1,tp=2")) == "tp=2,zero=1"
    assert canonical(parse_layout("dp=1")) == "dp=1" and canonical(parse_layout("")) == ""


layout_values = st.fixed_dictionaries(
    {},
    optional={
        **{axis: st.integers(1, 8) for axis in ("tp", "cp", "pp", "ep", "shard", "chunks")},
        "dp": st.none() | st.integers(1, 8),
        "sp": st.none() | st.booleans(),
        "zero": st.integers(0, 3),
        "cp_kind": st.sampled_from(["ring", "ulysses"]),
        "schedule": st.sampled_from(["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v", "auto"]),
        "reduce": st.sampled_from([None, "micro_batch", "step"]),
        "unshard": st.sampled_from([None, "micro_batch", "step"]),
        "recompute": st.sampled_from(["none", "full", "selective"]),
        "engine": st.sampled_from(["native", "ddp", "fsdp2", "deepspeed"]),
    },
)


@settings(max_examples=300, deadline=None)
@given(layout_values, st.integers(1, 4))
def test_canonical_is_read_back(values: dict, dp: int) -> None:
    layout = LayoutConfig(**values)
    world = (layout.dp or dp) * layout.cp * layout.tp * layout.pp
    full = resolve(layout, world)
    assert full.world == world
    assert resolve(parse_layout(canonical(full)), world) == full
    assert canonical(parse_layout(canonical(full))) == canonical(full)  # one spelling
    assert resolve(parse_layout(canonical(layout)), world) == full


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.lists(st.sampled_from([*KEYS, "=", ",", "2", "on", " ", "x"]), max_size=12).map("".join))
def test_random_text_is_read_or_refused(text: str) -> None:
    try:
        parse_layout(text)
    except UsageError as error:
        assert error.details


def test_world_of_a_layout_in_a_comparison() -> None:
    assert world_of(parse_layout("dp=2,tp=2"), 8) == 4  # names dp: its own product
    assert world_of(parse_layout("tp=2"), 8) == 8  # dp fills up to nproc
    assert world_of(parse_layout("tp=2,pp=2")) == 4  # no nproc: dp = 1


def test_equation_and_examples() -> None:
    assert equation(concrete("tp=4,pp=4", 64)) == "64 ranks = dp 4 x pp 4 x cp 1 x tp 4"
    assert equation(Layout()) == "1 rank = dp 1 x pp 1 x cp 1 x tp 1"
    assert doctest.testmod(layouts).failed == 0
