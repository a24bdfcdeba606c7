"""Replicas are compared to the bit, and a flipped one is named (F28); losses that jump, steps that are left out, what is never saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.engines.native import NativeEngine
from dist_llm.errors import Failure, NumericError
from dist_llm.train.digest import Digests, checksum, held
from dist_llm.train.nonfinite import bad_state
from dist_llm.train.spike import WINDOW, Spikes, examine
from tests.engine_cases import build, config, layout_of
from tests.ranks import Ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("start", "count"), [(0, 64), (1, 33), (3, 1)])
def test_any_flipped_bit_changes_the_sum(dtype: torch.dtype, start: int, count: int) -> None:
    values = torch.randn(100).to(dtype)[start : start + count]
    before, raw = int(checksum(values)), values.view(torch.uint8)
    for at in range(0, raw.numel(), max(1, raw.numel() // 40)):
        for bit in (0, 3, 7):
            raw[at] ^= 1 << bit
            assert int(checksum(values)) != before, (at, bit)
            raw[at] ^= 1 << bit
    assert int(checksum(values)) == before


def flipped(
    rank: int, world: int, say: Callable, given: dict[str, Any], layout: dict[str, Any], victim: int, place: int, trained: bool = True
) -> dict[str, Any]:
    """Two steps, a bit of what one rank holds flipped, a comparison: the failure of each rank, and the name of what was flipped.

    trained: of all that it holds; False: of weights that are not trained.
    """
    _, engine, trainer = build(given, layout, rank, "float32")
    digests = Digests(engine, every=1)
    trainer.step(0)
    digests.compare(1)
    digests.check(2)
    trainer.step(1)
    shared = [one for one in held(engine) if one.group.size > 1 and (trained or not one.flat.trained)]
    target = shared[place % len(shared)]
    if rank == victim:
        target.values.view(torch.uint8)[13] ^= 4
    names = list(target.by_name())
    try:
        digests.compare(2)
    except NumericError as failure:
        return {"failure": failure.as_dict(), "names": names, "group": list(target.group.ranks)}
    return {"failure": None, "names": names, "group": list(target.group.ranks)}


FLIPS = [
    *((text, victim, place) for text in ("dp=2,zero=0", "dp=2,zero=1", "tp=2", "dp=2,tp=2,zero=2") for victim, place in ((1, 0), (0, 7))),
    ("dp=3", 2, 2),
    ("dp=4,zero=3,shard=2", 3, 1),
    ("pp=2", 1, 0),  # the tied weight
]


@pytest.mark.parametrize(("text", "victim", "place"), FLIPS)
def test_a_flipped_bit_of_a_replica_is_named(ranks: Ranks, text: str, victim: int, place: int) -> None:
    layout = layout_of(text)
    given = config(tied=True, batch=3 if layout.dp == 3 else 4)
    found = ranks.run(layout.world, "tests.test_digest:flipped", given, vars(layout), victim, place)
    names = {name.split(" ", 1)[1] if " " in name else name for name in found[victim]["names"]}
    for one in found:
        assert one["failure"] is not None, "not found"
        assert one["failure"]["what"] == "replicas of a tensor differ" and "after step 2" in one["failure"]["where"]
        assert one["failure"]["safe"] == "all were equal after step 1"
        text_of = " ".join([one["failure"]["where"], *one["failure"]["details"]])
        assert any(name.rsplit(" ", 1)[-1] in text_of for name in names), (names, one["failure"])
    _require_odd(found, victim)


def _require_odd(found: list[dict[str, Any]], victim: int) -> None:
    if len(found[victim]["group"]) > 2:
        assert f"rank {victim} of" in found[0]["failure"]["where"], "the odd one out"


UNDER = {"rank": 2, "dora": True}


@pytest.mark.parametrize(
    ("text", "adapter", "place"), [("dp=2", UNDER, 1), ("dp=2,zero=1", {**UNDER, "quantize": "nf4", "block": 8}, 2), ("tp=2", UNDER, 0)]
)
def test_a_flipped_bit_of_a_weight_that_is_not_trained_is_named(ranks: Ranks, text: str, adapter: dict[str, Any], place: int) -> None:
    """Nothing updates it: what differs once differs for ever, in every loss that comes."""
    layout, given = layout_of(text), config(batch=4, dim=32, ffn=32, adapter=adapter)
    found = ranks.run(layout.world, "tests.test_digest:flipped", given, vars(layout), 1, place, False)
    for one in found:
        assert one["failure"] is not None and one["failure"]["what"] == "replicas of a tensor differ", one
        said = " ".join([one["failure"]["where"], *one["failure"]["details"]])
        assert any(name in said for name in found[1]["names"]) and "lora" not in said, (found[1]["names"], said)


def alone(rank: int, world: int, say: Callable, given: dict[str, Any], layout: dict[str, Any], victim: int) -> dict[str, Any] | None:
    """A bit of what one rank alone holds flipped between two steps."""
    _, engine, trainer = build(given, layout, rank, "float32")
    digests = Digests(engine, every=1)
    trainer.step(0)
    digests.compare(1)
    if rank == victim:
        next(one for one in held(engine) if one.group.size == 1).values.view(torch.uint8)[6] ^= 1
    try:
        digests.check(2)
    except NumericError as failure:
        return failure.as_dict()
    return None


@pytest.mark.parametrize("text", ["dp=1", "dp=2,zero=1", "dp=2,zero=3", "tp=2", "pp=2"])
def test_a_flipped_bit_of_what_one_rank_holds_is_found_at_the_next_step(ranks: Ranks, text: str) -> None:
    layout = layout_of(text)
    victim = layout.world - 1
    found = ranks.run(layout.world, "tests.test_digest:alone", config(tied=True), vars(layout), victim)
    assert all(one and one["where"].startswith(f"rank {victim}, before step 2") for one in found), found


def calm_digests(rank: int, world: int, say: Callable, given: dict[str, Any], layout: dict[str, Any], dtype: str) -> int:
    """Steps with a comparison after each: none fails."""
    _, engine, trainer = build(given, layout, rank, dtype)
    digests = Digests(engine, every=1)
    for step in range(3):
        digests.check(step + 1)
        trainer.step(step)
        digests.compare(step + 1)
    return digests.equal_at


@pytest.mark.parametrize(
    "text",
    [
        "dp=2,zero=0",
        "dp=2,zero=3",
        "tp=2",
        "tp=4,sp=off",
        "pp=2",
        "dp=2,tp=2,zero=1",
        "dp=4,zero=2,shard=2",
        "pp=2,chunks=2,schedule=interleaved",
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_calm_run_has_equal_replicas(ranks: Ranks, text: str, dtype: str) -> None:
    layout = layout_of(text)
    found = ranks.run(layout.world, "tests.test_digest:calm_digests", config(tied=True, kv_heads=2), vars(layout), dtype)
    assert found == [3] * layout.world


def test_the_cost_is_small() -> None:
    """Hashing all weights and moments takes less than a tenth of one pass of AdamW over them: once in a hundred steps, nothing."""
    values = torch.randn(4_000_000)
    checksum(values)
    hashed = min(timed(lambda: checksum(values)) for _ in range(5))
    updated = min(timed(lambda: values.mul(0.9).add_(values).sqrt_()) for _ in range(5))
    assert hashed < updated, (hashed, updated)


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# --- steps that are left out ------------------------------------------------------------------------------------------


def skipping(rank: int, world: int, say: Callable, given: dict[str, Any], layout: dict[str, Any], bad: list[int]) -> dict[str, Any]:
    """Six steps, the losses of some not finite on the last rank; which were skipped, and what they changed."""
    _, engine, trainer = build(given, layout, rank, "float32")
    body, now = engine.pipeline.run, 0

    def run(*args: Any, **options: Any) -> torch.Tensor:
        loss = body(*args, **options)
        return loss + float("nan") if rank == world - 1 and now in bad else loss

    engine.pipeline.run = run
    skipped, changed = [], []
    for now in range(6):
        before = [flat.master.clone() for flat in engine.flats]
        try:
            skipped.append(trainer.step(now).skipped)
        except NumericError:
            return {"stopped": now, "skipped": skipped}
        changed.append(any(not torch.equal(flat.master, old) for flat, old in zip(engine.flats, before, strict=True)))
    return {"stopped": None, "skipped": skipped, "changed": changed, "count": int(engine.optimizer.count)}


@pytest.mark.parametrize("text", ["dp=2,zero=1", "pp=2"])
@pytest.mark.parametrize(("bad", "budget", "stopped"), [([2], 0, 2), ([1, 3, 4], 2, None), ([1, 2, 3], 2, 3)])
def test_a_budget_of_steps_that_are_left_out(ranks: Ranks, text: str, bad: list[int], budget: int, stopped: int | None) -> None:
    """So many in a row change nothing, on all ranks alike; one more ends the run. They count, so that the count is the step."""
    given, layout = config(optimizer={"skip_non_finite": budget}), layout_of(text)
    found = ranks.run(layout.world, "tests.test_digest:skipping", given, vars(layout), bad)
    for one in found:
        assert one["stopped"] == stopped
        if stopped is None:
            assert one["skipped"] == [step in bad for step in range(6)] and one["count"] == 6
            assert one["changed"] == [step not in bad for step in range(6)]


# --- a loss that jumps -------------------------------------------------------------------------------------------------


def test_what_is_usual_and_what_is_not() -> None:
    spikes = Spikes()
    falling = [5.0 - 0.02 * step + 0.01 * (step % 3) for step in range(60)]
    assert all(spikes.usual(loss, step) is None for step, loss in enumerate(falling))
    assert spikes.usual(falling[-1] + 2.0, 60) == pytest.approx(sorted(falling)[8], abs=0.05)
    assert spikes.usual(falling[-1] + 2.0, 61) is None, "one notice is enough for a while"
    assert spikes.usual(falling[-1], 62) is None
    fresh = Spikes()
    assert all(fresh.usual(100.0 * (step % 2), step) is None for step in range(WINDOW)), "too few to know"


def examined(rank: int, world: int, say: Callable, given: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """Three steps, and the batch of the last one computed again."""
    _, _, trainer = build(given, layout, rank, "float64")
    for step in range(3):
        trainer.step(step)
    return examine(trainer, 2)


@pytest.mark.parametrize("text", ["dp=2,zero=3", "dp=4", "tp=2", "pp=2", "dp=2,tp=2"])
def test_a_batch_is_computed_again(ranks: Ranks, text: str) -> None:
    """The mean over the batch and the sample that stands out are those of one process, under every layout and on each rank."""
    job = "tests.test_digest:examined", config(batch=4)
    (one,) = ranks.run(1, *job, vars(layout_of("dp=1")))
    layout = layout_of(text)
    for found in ranks.run(layout.world, *job, vars(layout)):
        assert found["replayed"] == pytest.approx(one["replayed"], rel=1e-12) and found["worst"] == pytest.approx(one["worst"], rel=1e-12)
        assert found["samples"] == one["samples"] == [found["data_rank"] * 4 // layout.dp + found["micro_batch"]]


# --- never saved, never loaded -----------------------------------------------------------------------------------------


def unsaved(rank: int, world: int, say: Callable, given: dict[str, Any], layout: dict[str, Any], folder: str, kind: str) -> dict[str, Any]:
    """A moment that is not finite when a checkpoint is made."""
    from types import SimpleNamespace

    from dist_llm.train.checkpoint import Saver

    settings, engine, trainer = build(given, layout, rank, "float32")
    trainer.step(0)
    assert isinstance(engine, NativeEngine)
    engine.arrive()
    if rank == world - 1:
        place = engine.moments[1].second if kind == "second_moment" else engine.flats[1].master
        assert place is not None
        place[0] = float("inf")
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
    prepared: Any = SimpleNamespace(tokenizer=SimpleNamespace(kept=files, hash="0" * 64), fingerprint="0" * 64, base=None, beside={})
    saver = Saver(Path(folder), engine, config=settings, prepared=prepared)
    try:
        saver.start(1)
        saver.finish()
    except Failure as failure:
        return failure.as_dict() | {"bad": bad_state(engine.state())}
    return {}


@pytest.mark.parametrize("kind", ["weight", "second_moment"])
def test_what_is_not_finite_is_never_saved(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    layout = layout_of("dp=2,zero=1")
    (tmp_path / "run").mkdir()
    found = ranks.run(2, "tests.test_digest:unsaved", config(), vars(layout), str(tmp_path / "run"), kind)
    for one in found:
        assert one["code"] == 6 and "rank 1, after step 1" in one["where"] and kind.replace("_", " ") in one["what"], one
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert found[1]["bad"] and not found[0]["bad"]
