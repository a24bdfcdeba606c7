"""ZeRO stages and pipelines: equal to the bit in float32, memory exact to the byte, weights freed between uses."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest

from dist_llm.config.schema import Config
from dist_llm.model.table import table
from dist_llm.parallel.flat import pack
from dist_llm.plan.memory import persistent_bytes
from dist_llm.plan.predict import shape_of
from dist_llm.train.proof import Run
from tests.engine_cases import config, different, layout_of, prove
from tests.ranks import Ranks

# --- to the bit ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(ranks: Ranks) -> Any:
    """A float32 proof run of a layout, made once."""

    @cache
    def known(text: str, dtype: str, model: tuple, sizes: tuple) -> Run:
        return prove(ranks, config(**dict(sizes), **dict(model)), text, dtype=dtype)

    def get(text: str, *, dtype: str = "float32", sizes: dict[str, Any] | None = None, **model: Any) -> Run:
        return known(text, dtype, tuple(model.items()), tuple((sizes or {}).items()))

    return get


@pytest.mark.parametrize("reduce", ["step", "micro_batch"])
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("model", [{"tied": True}, {"family": "gpt2", "tied": False}], ids=str)
def test_stages_are_equal_to_the_bit(run: Any, model: dict[str, Any], zero: int, reduce: str) -> None:
    """At equal `reduce`: losses, norms, every gradient, weight and moment of three steps."""
    assert (
        different(run(f"dp=2,zero=0,reduce={reduce}", **model), run(f"dp=2,zero={zero},reduce={reduce},unshard=micro_batch", **model)) == []
    )


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_stages_are_equal_to_the_bit_on_three_ranks(run: Any, zero: int) -> None:
    """Shard boundaries fall inside parameters, and the sum of three is not the same in any order."""
    sizes = {"batch": 6, "sequence": 4}
    assert different(run("dp=3,zero=0", sizes=sizes, tied=True), run(f"dp=3,zero={zero},reduce=step", sizes=sizes, tied=True)) == []


@pytest.mark.parametrize("zero", [1, 3])
def test_stages_are_equal_to_the_bit_beside_tensor_parallelism(run: Any, zero: int) -> None:
    assert different(run("dp=2,tp=2,zero=0", kv_heads=1), run(f"dp=2,tp=2,zero={zero},reduce=step", kv_heads=1)) == []


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_one_rank_is_the_same_in_every_stage(run: Any, zero: int) -> None:
    """trap 15: a group of one."""
    assert different(run("dp=1,zero=0", tied=True), run(f"dp=1,zero={zero},reduce=step", tied=True)) == []


def test_keeping_gathered_weights_changes_nothing(run: Any) -> None:
    kept, freed = (run(f"dp=2,zero=3,reduce=step,unshard={when}", tied=True) for when in ("step", "micro_batch"))
    assert different(kept, freed) == []


@pytest.mark.parametrize("zero", [1, 3])
def test_bfloat16_stages_are_equal_to_the_bit(run: Any, zero: int) -> None:
    reference = run("dp=2,zero=0", dtype="bfloat16", tied=True)
    assert different(reference, run(f"dp=2,zero={zero},reduce=step", dtype="bfloat16", tied=True)) == []


SHARDED: list[Any] = [("dp=4", "shard=2", {"tied": True}), ("dp=3", "shard=1", {})]
SHARDED += [pytest.param("dp=2,tp=2", "shard=1", {"kv_heads": 1}, marks=pytest.mark.long)]


@pytest.mark.parametrize("reduce", ["step", "micro_batch"])
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize(("axes", "shard", "model"), SHARDED, ids=str)
def test_stages_are_equal_to_the_bit_at_equal_shard(run: Any, axes: str, shard: str, model: dict[str, Any], zero: int, reduce: str) -> None:
    """At equal `shard` and `reduce`: the same sums inside the group, and the same over the replicas."""
    sizes = {"batch": 12, "sequence": 4}
    first, other = (f"{axes},zero={stage},{shard},reduce={reduce}" for stage in (1, zero))
    assert different(run(first, sizes=sizes, **model), run(other, sizes=sizes, **model)) == []


def test_a_shard_of_all_ranks_is_the_default(run: Any) -> None:
    assert layout_of("dp=2,zero=3,shard=2") == layout_of("dp=2,zero=3")


@pytest.mark.parametrize("order", ["fixed", "fast"])
@pytest.mark.parametrize("text", ["dp=4,zero=3,shard=2", "dp=4,zero=1,shard=2", "dp=3,zero=2,shard=1", "dp=4,zero=2,shard=1,reduce=step"])
def test_replicas_stay_equal_to_the_bit(ranks: Ranks, text: str, order: str) -> None:
    """Ranks with the same shard hold the same gradients, weights and moments, in whatever order the backend adds."""
    layout = layout_of(text)
    given = {**config(tied=True, batch=12), "runtime": {"reduce_order": order}}
    found = ranks.run(layout.world, "tests.engine_cases:held", given, vars(layout))
    for rank, held in enumerate(found):
        assert held == found[rank % layout.shard]
    assert layout.shard == 1 or found[0]["gradient"] != found[1]["gradient"]


def test_replicas_of_both_ends_of_a_pipeline_share_a_tied_weight(ranks: Ranks) -> None:
    """In whatever order the backend adds, first and last stage keep one tied weight."""
    layout = layout_of("dp=2,pp=2,zero=2,shard=1")
    found = ranks.run(4, "tests.engine_cases:held", {**config(tied=True), "runtime": {"reduce_order": "fast"}}, vars(layout))
    assert found[0] == found[1] and found[2] == found[3]
    first, last = ({*held["weights"]} for held in (found[0], found[2]))
    assert len(first & last) == 1


PIPELINES = [
    *(f"pp={pp},schedule={schedule}" for pp in (2, 4) for schedule in ("gpipe", "1f1b")),
    "pp=2,schedule=interleaved,chunks=2",
]


DROPPED = [("pp=2,schedule=1f1b", {"family": "gpt2", "dropout": 0.2})]


@pytest.mark.parametrize(("text", "model"), [*((text, {"tied": tied}) for text in PIPELINES for tied in (True, False)), *DROPPED], ids=str)
def test_pipelines_are_equal_to_one_process_to_the_bit(run: Any, text: str, model: dict[str, Any]) -> None:
    """traps 2, 13 and 24: the same micro-batches in the same order, sums over uses and micro-batches taken alike, names global."""
    assert different(run("dp=1", **model), run(text, **model)) == []


@pytest.mark.parametrize("text", ["pp=4,schedule=interleaved,chunks=2", "pp=2,schedule=interleaved,chunks=4"])
def test_deep_interleaving_is_equal_to_one_process_to_the_bit(run: Any, text: str) -> None:
    sizes = {"batch": 5}  # a number of micro-batches that rounds do not divide
    assert different(run("dp=1", sizes=sizes, layers=8, tied=True), run(text, sizes=sizes, layers=8, tied=True)) == []


def test_one_process_with_two_stages_of_its_own_is_equal_to_the_bit(run: Any) -> None:
    """Both uses of the tied weight live on one rank, in different stages."""
    assert different(run("dp=1", tied=True), run("pp=1,schedule=interleaved,chunks=2", tied=True)) == []


@pytest.mark.parametrize("text", ["dp=2,pp=2,schedule=gpipe,zero=1", "dp=2,pp=2,zero=3"])
def test_pipelines_beside_data_parallelism_are_equal_to_the_bit(run: Any, text: str) -> None:
    """Untied: a tied weight sums over ranks and uses in another order."""
    assert different(run("dp=2,reduce=step"), run(text)) == []


@pytest.mark.parametrize(("text", "recompute"), [("dp=1", "full"), ("dp=1", "selective"), ("dp=2,zero=3", "full")])
def test_recomputing_is_equal_to_the_bit(run: Any, text: str, recompute: str) -> None:
    """trap 26: dropout masks are addressed, so there is no random state to restore."""
    assert different(run(text, dropout=0.2, tied=True), run(f"{text},recompute={recompute}", dropout=0.2, tied=True)) == []


# --- memory ----------------------------------------------------------------------------------------------------------

STAGES = ["zero=0", "zero=1", "zero=2", "zero=3", "zero=0,reduce=micro_batch", "zero=3,reduce=step,unshard=step",
          *(f"zero={zero},offload=optimizer" for zero in range(4))]  # fmt: skip


HELD = [(1, "bfloat16", False), (1, "float32", True), (2, "bfloat16", True), (2, "float32", False), (4, "bfloat16", False)]
HELD_LATER = [case for case in itertools.product((1, 2, 4), ("bfloat16", "float32"), (False, True)) if case not in HELD]


@pytest.mark.parametrize(
    ("world", "dtype", "tied"), [*HELD, *(pytest.param(*case, marks=pytest.mark.long) for case in HELD_LATER)], ids=str
)
def test_persistent_bytes_are_exact(ranks: Ranks, world: int, dtype: str, tied: bool) -> None:
    """Per parameter bf16 2 + 4 + 12 and fp32 4 + 4 + 8, the padding included, split as the stage says; nothing else stays alive.

    Gradients are there from backward to the update, and not between steps.
    """
    given = config(tied=tied, layers=2)
    sharded = [f"zero={zero},shard={world // 2}" for zero in (1, 2, 3)] if world > 1 else []
    layouts = [layout_of(f"dp={world},{stage}") for stage in STAGES + sharded]
    found = ranks.run(world, "tests.engine_cases:persistent_bytes", given, [vars(layout) for layout in layouts], dtype)
    settings = Config.model_validate(given)
    rows = table(settings.model)
    element, state = (2, 12) if dtype == "bfloat16" else (4, 8)
    for rank in range(world):
        for layout, kept in zip(layouts, found[rank], strict=True):
            updated = "host" if layout.offload == "optimizer" else "optimizer"
            expected = {"weights": 0, "gradients": 0, "optimizer": 0, "host": 0, updated: 4}  # the count of updates
            split, largest = {"shards": layout.shard, "replicas": world // layout.shard}, 0
            for unit in dict.fromkeys(row.unit for row in rows):
                plan = pack([row for row in rows if row.unit == unit], unit=unit, tp=1, sp=False, coordinate=0, **split)
                expected["weights"] += element * (plan.shard_size if layout.zero == 3 else plan.padded)
                owned = plan.shard_size if layout.zero else plan.padded
                expected["gradients"] += 4 * owned
                expected[updated] += owned * (12 if updated == "host" else state)  # there the master weights are always apart
                largest = max(largest, owned)
            expected["host"] += 3 * 4 * largest if updated == "host" else 0  # what goes down and up goes round in three buffers
            before, after = kept.pop("alive before"), kept.pop("alive after")
            assert kept == expected == persistent_bytes(shape_of(settings, layout, dtype=dtype)), layout
            most = sum(expected.values()) - 4
            assert before == most, f"{before - most} bytes more are alive before the update, {layout}"
            assert after == most - expected["gradients"], f"{after - most} bytes more are alive after it, {layout}"


def test_padding_is_small(ranks: Ranks) -> None:
    """Of the quickstart's model over 64 ranks less than 2 % is padding."""
    rows = table(Config.model_validate({"model": {"family": "llama", "dim": 160, "ffn": 432, "kv_heads": 2, "tied": True}}).model)
    units = dict.fromkeys(row.unit for row in rows)
    plans = [pack([row for row in rows if row.unit == unit], unit=unit, tp=1, sp=False, coordinate=0, shards=64) for unit in units]
    assert sum(plan.padded for plan in plans) < 1.02 * sum(row.numel for row in rows)


@pytest.mark.parametrize("tied", [False, True])
def test_stage_3_frees_weights_between_uses(ranks: Ranks, tied: bool) -> None:
    """Around a unit at most its own weights and the next one's are whole; between steps none are."""
    layout = layout_of("dp=2,zero=3")
    for found in ranks.run(2, "tests.engine_cases:residency", config(tied=tied, layers=6), vars(layout)):
        assert found["phases"] == {"built": [], "gradients": [], "step": []}
        order = ["embedding", *(f"blocks.{layer}" for layer in range(6)), "head"]
        reads = {unit: ({"tied"} if tied and unit in ("embedding", "head") else set()) | {unit} for unit in order}
        if tied:
            reads["embedding"] = {"tied"}
        for kind, unit, here in found["seen"]:
            at = order.index(unit)
            step = 1 if kind == "F" else -1
            near = order[at + step] if 0 <= at + step < len(order) else unit
            kept = reads[unit] | reads[near]
            if kind == "F":
                kept |= reads[order[at - 1]] if at == len(order) - 1 else set()  # kept for the backward that follows
            assert set(here) <= kept, (kind, unit, here)
            assert kind == "B" and unit == "embedding" or reads[unit] <= set(here)


def test_stage_3_is_never_whole_while_it_is_built(ranks: Ranks) -> None:
    """A model that only fits in shards has to be made in shards: no more than two units are whole at a time."""
    for found in ranks.run(2, "tests.engine_cases:residency", config(layers=6), vars(layout_of("dp=2,zero=3"))):
        assert found["building"] <= found["largest two"] < found["all"] / 2, found


def test_stage_3_keeps_weights_for_the_step_if_asked(ranks: Ranks) -> None:
    layout = layout_of("dp=2,zero=3,unshard=step")
    for found in ranks.run(2, "tests.engine_cases:residency", config(layers=3), vars(layout)):
        assert found["phases"] == {"built": [], "gradients": [], "step": []}
        last = [here for kind, unit, here in found["seen"] if (kind, unit) == ("B", "blocks.0")][-1]
        assert set(last) == {"embedding", "blocks.0", "blocks.1", "blocks.2", "head"}


@pytest.mark.parametrize("text", ["dp=1", "pp=2"])
@pytest.mark.parametrize("kind", ["masks", "messages"])
def test_a_step_holds_what_is_in_flight_and_no_more(ranks: Ranks, text: str, kind: str) -> None:
    """Of 16 micro-batches under 1f1b at most 2 are in flight: neither 16 masks of (S, S) nor 16 sent activations may be alive."""
    layout = layout_of(text)
    found = ranks.run(layout.world, "tests.engine_cases:alive_at_once", config(batch=16, document_mask=True), vars(layout))
    assert all(one[kind] <= 6 for one in found), found


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["dp=1", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3"])
def test_bfloat16_gradients_are_summed_and_reduced_in_float32(ranks: Ranks, text: str) -> None:
    """trap 14: bfloat16 stops counting at 256."""
    layout = layout_of(text)
    found = ranks.run(layout.world, "tests.engine_cases:low_precision_sums", config(), vars(layout))
    assert {value for one in found for value in one["values"]} == {300.0 * layout.world}
    assert all(one["reduced"] == ["torch.float32"] and one["dtype"] == one["master"] == "torch.float32" for one in found)


def test_bfloat16_follows_float32(run: Any) -> None:
    low, high = run("dp=2,zero=1", dtype="bfloat16", tied=True), run("dp=2,zero=1", tied=True)
    assert low.record.losses == pytest.approx(high.record.losses, rel=2e-3)
    assert low.record.norms == pytest.approx(high.record.norms, rel=5e-2)


# --- the other calls of the engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["dp=2,zero=3", "tp=2", "pp=2,schedule=interleaved,chunks=2", "dp=4,zero=3,shard=2"])
def test_evaluation_is_the_same_on_every_layout_and_leaves_no_trace(ranks: Ranks, text: str) -> None:
    given = config(tied=True, dropout=0.2)
    reference = ranks.run(1, "tests.engine_cases:evaluated", given, vars(layout_of("dp=1")), "float64")[0]
    layout = layout_of(text)
    for found in ranks.run(layout.world, "tests.engine_cases:evaluated", given, vars(layout), "float64"):
        assert found == pytest.approx(reference, rel=1e-12)


def test_evaluation_takes_the_plain_cross_entropy(ranks: Ranks) -> None:
    """Label smoothing is of the training loss alone: validation losses of runs with and without it must compare."""
    plain, smoothed = (
        ranks.run(1, "tests.engine_cases:evaluated", config(optimizer={"label_smoothing": value}), vars(layout_of("dp=1")), "float64")[0]
        for value in (0.0, 0.2)
    )
    assert smoothed[0] == pytest.approx(plain[0], rel=1e-12)
