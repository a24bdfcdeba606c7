"""Traps of composed parallelism (docs/traps.md) that no other file shows, and a check that the judge sees bugs put in on purpose."""

from __future__ import annotations

from functools import cache
from math import fsum, sqrt
from typing import Any

import numpy as np
import pytest

from dist_llm.config.schema import Config
from dist_llm.errors import Code
from dist_llm.model.table import num_parameters
from dist_llm.train.proof import MadeUp, Run, judge
from tests.engine_cases import config, different, layout_of, prove
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def run(ranks: Ranks) -> Any:
    """A float64 proof run, made once."""

    @cache
    def known(text: str, model: tuple, options: tuple) -> Run:
        return prove(ranks, config(**dict(model)), text, **{"steps": 2, **dict(options)})

    return lambda text, options=None, **model: known(text, tuple(model.items()), tuple((options or {}).items()))


# --- traps 1 and 3: unequal tokens -----------------------------------------------------------------------------------


def test_made_up_batches_are_very_unequal() -> None:
    """The premise of every proof: ranks, micro-batches and steps differ in their number of target tokens."""
    order = MadeUp(31, 24, 16, 7)
    counts = [[micro.targets for micro in order.micro_batches(0, dp_rank=rank, dp_size=2, micro=2)] for rank in (0, 1)]
    assert max(map(max, counts)) > 2 * min(map(min, counts)) and sum(counts[0]) != sum(counts[1])
    whole = order.micro_batches(0, dp_rank=0, dp_size=1, micro=16)[0]
    assert whole.targets == order.targets(0) == sum(map(sum, counts))
    for rank in (0, 1):
        for at, micro in enumerate(order.micro_batches(0, dp_rank=rank, dp_size=2, micro=2)):
            assert (micro.labels == whole.labels[rank * 8 + at * 2 : rank * 8 + at * 2 + 2]).all()


def test_labels_are_the_next_tokens_of_the_whole_sequence() -> None:
    """trap 18: shifted before anything slices, so the last label of a slice is the first token of the next one."""
    micro = MadeUp(31, 24, 4, 7).micro_batches(0, dp_rank=0, dp_size=1, micro=4)[0]
    kept = micro.labels[:, :-1] >= 0
    assert (micro.labels[:, :-1] == micro.tokens[:, 1:])[kept].all() and kept[:, 11].any()


@pytest.mark.parametrize("text", ["dp=2", "dp=4,zero=1", "dp=2,pp=2"])
def test_the_logged_loss_is_the_mean_over_all_target_tokens(run: Any, text: str) -> None:
    """traps 1 and 3: not the mean of the means of ranks or micro-batches. `prove` also checks that every rank logs it."""
    reference, other = run("dp=1"), run(text)
    assert other.record.losses == pytest.approx(reference.record.losses, rel=1e-12)


# --- traps 4 to 7: the norm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "model", "dtype"),
    [
        ("dp=2,zero=2", {"tied": True}, "float32"),
        ("dp=2,zero=1", {"tied": True}, "bfloat16"),
        ("tp=2", {"tied": True, "kv_heads": 1}, "float32"),
        ("tp=2,sp=off", {"family": "gpt2"}, "float64"),
        ("tp=4", {"family": "qwen3", "kv_heads": 2}, "float64"),
        ("pp=2", {"tied": True}, "float64"),
        ("tp=2,pp=2", {"tied": True, "kv_heads": 1}, "float32"),
        ("dp=4,zero=3,shard=2", {"tied": True}, "float32"),
        ("dp=2,pp=2,zero=1,shard=1", {"tied": True}, "float32"),
    ],
    ids=str,
)
def test_the_norm_counts_every_element_once(run: Any, text: str, model: dict[str, Any], dtype: str) -> None:
    """The norm that a layout reports is that of its own gradients, gathered under global names and summed exactly.

    trap 7: to 13 digits whatever the dtype, because the sums are float64.
    """
    found = run(text, {"dtype": dtype}, **model)
    for step, norm in enumerate(found.record.norms):
        gradients = [tensor.ravel().astype(float) for (at, kind, _), tensor in found.tensors.items() if (at, kind) == (step, "gradient")]
        squares = np.square(np.concatenate(gradients))
        assert len(squares) == num_parameters(Config.model_validate(config(**model)).model)
        assert norm == pytest.approx(sqrt(fsum(squares)), rel=1e-13)


# --- trap 12: initial weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts",
    [["dp=2", "dp=2,zero=3"], ["tp=2", "pp=2", "pp=2,schedule=interleaved"], ["tp=4", "dp=2,tp=2,zero=3", "dp=4,zero=3,shard=2"]],
)
def test_initial_weights_are_slices_of_the_same_tensors(ranks: Ranks, texts: list[str]) -> None:
    given = config(tied=True, kv_heads=1, vocab=31)
    layouts = [layout_of(text) for text in texts]
    counts = ranks.run(layouts[0].world, "tests.engine_cases:initial_weights", given, [vars(layout) for layout in layouts], "float32")
    assert sum(counts) == len(layouts) * num_parameters(Config.model_validate(given).model)


def test_initial_master_weights_are_not_rounded(ranks: Ranks) -> None:
    """bfloat16 in every stage of ours starts from the float32 weights from which FSDP2 starts."""
    given = config(tied=True, kv_heads=1, vocab=31)
    texts = ["dp=2", "dp=2,zero=1", "dp=2,zero=2,offload=optimizer", "dp=2,zero=3", "dp=2,zero=3,engine=fsdp2"]
    layouts = [vars(layout_of(text)) for text in texts]
    counts = ranks.run(2, "tests.engine_cases:initial_weights", given, layouts, "bfloat16")
    assert sum(counts) == len(layouts) * num_parameters(Config.model_validate(given).model)


# --- trap 23: transfers under way ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["dp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3", "dp=2,zero=3,unshard=step,reduce=step", "dp=2,tp=2,zero=3"]
    + ["dp=4,zero=2,shard=2", "dp=4,zero=3,shard=2,reduce=step", "dp=4,zero=1,shard=1"],
)
def test_no_buffer_is_read_or_written_while_its_transfer_is_under_way(run: Any, text: str) -> None:
    late = run(text, {"work": "tests.engine_cases:slowest_rank", "dtype": "float32"}, tied=True)
    assert different(run(text, {"dtype": "float32"}, tied=True), late) == []


# --- trap 25: padding ------------------------------------------------------------------------------------------------


def test_padding_stays_zero(ranks: Ranks) -> None:
    texts = ("dp=3,zero=0", "dp=3,zero=1", "dp=3,zero=2", "dp=3,zero=3", "dp=3,zero=2,shard=1", "tp=3,sp=off")
    layouts = [vars(layout_of(text)) for text in texts]
    given = config(heads=3, kv_heads=3, dim=15, head_dim=4, vocab=31, batch=3, optimizer={"weight_decay": 0.5})
    assert all(count > 0 for count in ranks.run(3, "tests.engine_cases:padding_stays_zero", given, layouts))


# --- trap 28: numbers that are not finite ----------------------------------------------------------------------------

POISONS = [
    *((f"dp=2,zero={zero}", {"name": "blocks.1.mlp.up.weight", "rank": 1}, "nan") for zero in range(4)),
    ("dp=2,zero=3,shard=1", {"name": "blocks.1.mlp.up.weight", "rank": 1}, "nan"),
    ("dp=2", {"name": "blocks.3.attention_norm.weight", "rank": 0}, "inf"),
    ("tp=2", {"name": "blocks.0.attention.q.weight", "rank": 1}, "nan"),
    ("tp=2", {"name": "blocks.2.mlp_norm.weight", "rank": 1}, "-inf"),
    ("tp=2,sp=off", {"name": "blocks.2.mlp_norm.weight", "rank": 1}, "nan"),  # a replica that the norm does not count
    ("pp=2", {"name": "blocks.0.mlp.down.weight", "rank": 0}, "nan"),
    ("pp=2", {"name": "norm.weight", "rank": 1}, "nan"),
    ("pp=2", {"name": "embedding.weight", "rank": 1}, "nan"),
    ("dp=2", {"name": "loss", "rank": 1}, "nan"),
    ("pp=2", {"name": "loss", "rank": 1}, "inf"),
]


@pytest.mark.parametrize(("text", "where", "value"), POISONS, ids=str)
def test_one_bad_gradient_stops_all_ranks_before_the_update(ranks: Ranks, text: str, where: dict[str, Any], value: str) -> None:
    """Exit 6 everywhere, weights and moments untouched, no step counted."""
    layout = layout_of(text)
    found = ranks.run(layout.world, "tests.engine_cases:poisoned_step", config(tied=True, sequence=4), vars(layout), where, value)
    assert [one["hit"] for one in found] == [rank == where["rank"] for rank in range(layout.world)]
    for one in found:
        assert one["failure"] and one["failure"]["code"] == Code.NUMERIC, found
        assert one["failure"]["where"].startswith("step 2"), "counted as metrics.jsonl does"
        assert one["untouched"] and one["counted"] == 0
        again = "the same batch gave finite numbers when it was computed again: look at the hardware first"
        assert (again in one["failure"]["details"]) == (where["name"] != "loss"), one["failure"]


NAMED = [(text, where, value) for text, where, value in POISONS if (text, where["name"]) != ("pp=2", "embedding.weight")]


@pytest.mark.parametrize(("text", "where", "value"), NAMED[4:], ids=str)
def test_the_rank_the_tensor_and_the_samples_are_named(ranks: Ranks, text: str, where: dict[str, Any], value: str) -> None:
    """What is wrong every time is found where it comes from, before it is summed over ranks: nobody else is accused (F17)."""
    layout = layout_of(text)
    job = (config(tied=True, sequence=4), vars(layout), where | {"again": True}, value)
    found = ranks.run(layout.world, "tests.engine_cases:poisoned_step", *job)
    rank, name = where["rank"], where["name"]
    what = "the loss of its micro-batches" if name == "loss" else f"gradient {name}"
    for one in found:
        assert one["untouched"] and one["failure"]["where"] == f"step 2, rank {rank}", one["failure"]
        first, samples, *_ = one["failure"]["details"]
        assert first == f"rank {rank}: {what}" and samples.startswith(f"rank {rank} had samples "), one["failure"]
        assert not any(line.startswith(f"rank {1 - rank}:") for line in one["failure"]["details"])


# --- the judge sees what is wrong ------------------------------------------------------------------------------------

BUGS: list[tuple[str, str, dict[str, Any], tuple[str, ...], str, str]] = [
    # bug, layout, model, kinds, words of the name, words of the hint
    ("no partial sum over tp", "tp=2", {}, ("gradient",), "norm", "trap"),
    ("no partial sum over tp", "tp=4,sp=off", {"kv_heads": 2}, ("gradient",), ".k.", "trap 9"),
    ("mean instead of sum over dp", "dp=2,zero=2", {}, ("gradient", "norm"), "", "0.5 times"),
    ("mean instead of sum over dp", "dp=2", {"family": "gpt2"}, ("gradient", "norm"), "", "0.5 times"),
    ("norm counted on every rank", "tp=2", {}, ("norm",), "gradient norm", "trap"),
    ("norm counted on every rank", "dp=2,zero=3,shard=1", {}, ("norm",), "gradient norm", "trap"),
    ("replicas not summed", "dp=4,zero=2,shard=2", {}, ("gradient",), "", "trap"),
    ("tied gradients not exchanged", "pp=2", {"tied": True}, ("gradient",), "embedding.weight", "trap 13"),
    ("one micro-batch lost", "dp=2", {}, ("gradient", "norm"), "", "0.875 times"),
    ("another seed on one rank", "dp=2", {}, ("loss",), "loss", "initial weights"),
    ("decay on everything", "dp=2,zero=1", {}, ("weight",), "norm", "weight decay"),
    ("a shard not published", "dp=2,zero=1", {}, ("loss",), "loss", ""),
]


@pytest.mark.parametrize(("bug", "text", "model", "kinds", "name", "hint"), BUGS, ids=[f"{bug}: {text}" for bug, text, *_ in BUGS])
def test_a_bug_put_in_is_found_and_named(
    run: Any, bug: str, text: str, model: dict[str, Any], kinds: tuple[str, ...], name: str, hint: str
) -> None:
    """`judge` names the kind of number and the tensor that went wrong first, with a hint that leads there."""
    broken = run(text, {"work": "tests.engine_cases:mutated_rank", "bug": bug}, **model)
    first = judge(run("dp=1", **model), broken, layout=layout_of(text)).first
    assert first is not None
    assert first.kind in kinds and name in first.name and hint in first.hint, first
    assert not np.isnan(first.difference)


def test_without_a_bug_the_same_machinery_finds_nothing(run: Any) -> None:
    clean = run("tp=2", {"work": "tests.engine_cases:mutated_rank", "bug": ""})
    assert judge(run("dp=1"), clean, layout=layout_of("tp=2")).equal
