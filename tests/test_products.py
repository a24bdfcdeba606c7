"""8-bit products: errors against float32, the same casts under every layout, refusals, and a run that follows bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from dist_llm.config.layout import parse_layout, resolve, world_of
from dist_llm.config.rules import problems
from dist_llm.config.schema import Config, changed
from dist_llm.errors import UsageError
from dist_llm.model.products import E4M3, E5M2, Products, cast, largest, scaled_product
from dist_llm.plan.predict import shape_of
from dist_llm.plan.traffic import sent_bytes
from dist_llm.train.proof import MadeUp, Run
from dist_llm.train.setup import refuse_fp8
from tests.engine_cases import build, config, layout_of, prove
from tests.ranks import Ranks

KINDS = ("tensorwise", "rowwise")
STEP = {E4M3: 2**-4, E5M2: 2**-3}  # the largest relative rounding error of a number
WIDE = {"dim": 64, "heads": 4, "kv_heads": 2, "ffn": 128, "layers": 2, "vocab": 31}


def random(*shape: int, seed: int) -> torch.Tensor:
    """Normal bfloat16 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def given(fp8: str, **more: Any) -> dict[str, Any]:
    """A small run whose sizes 8-bit products take."""
    found = config(sequence=32, **{**WIDE, **more})
    found["runtime"]["fp8"] = fp8
    return found


# --- the cast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("power", [True, False])
def test_a_cast_loses_what_its_digits_allow(dtype: torch.dtype, whole: bool, power: bool) -> None:
    x = random(32, 48, seed=0) * torch.logspace(-3, 3, 32)[:, None].bfloat16()
    small, back = cast(x, largest(x, whole=whole), dtype, power=power)
    found, normal = small.float() * back, torch.finfo(dtype).smallest_normal * back
    assert small.dtype == dtype and small.is_contiguous()
    error = (found - x.float()).abs()
    assert (error <= torch.maximum(STEP[dtype] * x.float().abs(), normal)).all()
    if power:
        assert torch.equal(torch.log2(back), torch.log2(back).round())


def test_zeros_and_what_is_not_finite() -> None:
    zeros = torch.zeros(16, 16, dtype=torch.bfloat16)
    small, back = cast(zeros, largest(zeros, whole=True), E4M3, power=False)
    assert torch.isfinite(back).all() and not small.float().any()
    for bad in (float("nan"), float("inf")):
        x = random(16, 16, seed=0)
        x[3, 4] = bad
        for kind in KINDS:
            assert not torch.isfinite(Products(kind).forward(x, random(16, 16, seed=1))).all(), "the step is refused, not trained on"


# --- the products ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E5M2, E4M3)], ids=str)
@pytest.mark.parametrize("whole", [True, False])
def test_a_cpu_multiplies_as_torch_does(dtypes: tuple[torch.dtype, torch.dtype], whole: bool) -> None:
    """To the last bfloat16 digit, what `torch._scaled_mm` gives; that takes a CPU hundreds of times as long."""
    operands = (random(48, 64, seed=0), random(32, 64, seed=1))
    each = zip(operands, dtypes, strict=True)
    (a, back_a), (b, back_b) = (cast(x, largest(x, whole=whole), dtype, power=not whole) for x, dtype in each)
    found = scaled_product(a, back_a, b, back_b)
    theirs = torch._scaled_mm(a, b.T, scale_a=back_a, scale_b=back_b.T, out_dtype=torch.bfloat16)
    assert found.dtype == theirs.dtype and found.shape == theirs.shape
    assert ((found.float() - theirs.float()).abs() <= 2**-7 * theirs.float().abs()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["forward", "by_input", "by_weight"])
def test_products_are_near_those_of_float32(kind: str, name: str) -> None:
    x, weight, slope = random(96, 64, seed=0), random(48, 64, seed=1), random(96, 48, seed=2)
    operands = {"forward": (x, weight), "by_input": (slope, weight), "by_weight": (slope, x)}[name]
    exact = getattr(Products(), name)(*(operand.float() for operand in operands))
    found = getattr(Products(kind), name)(*operands)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    error = (found.float() - exact).norm() / exact.norm()
    bound = 2**-7 if (kind, name) == ("rowwise", "by_weight") else 0.08 if kind == "tensorwise" else 0.05
    assert error < bound
    if bound > 2**-7:
        assert error > 1e-3, "it is 8 bits that were multiplied"


@pytest.mark.parametrize("kind", ["off", *KINDS])
def test_products_add_to_what_is_there(kind: str) -> None:
    """by weight into float32 sums, by input into the slopes of other projections."""
    x, weight, slope, products = random(32, 64, seed=0), random(48, 64, seed=1), random(32, 48, seed=2), Products(kind)
    total = torch.ones(48, 64)
    assert products.by_weight(slope, x, total=total) is total
    assert torch.equal(total, 1.0 + products.by_weight(slope, x).float())
    other = torch.ones(32, 64, dtype=torch.bfloat16)
    assert products.by_input(slope, weight, total=other) is other
    torch.testing.assert_close(other.float(), 1.0 + products.by_input(slope, weight).float(), rtol=2**-7, atol=2**-7)
    bias = random(48, seed=3)
    torch.testing.assert_close(products.forward(x, weight, bias), products.forward(x, weight) + bias, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["input", "output"])
def test_parts_are_cast_as_the_whole_is(kind: str, cut: str) -> None:
    """Two halves of the features, with shared magnitudes: joined they are the one product, but for the order of its sums."""
    x, weight, slope = random(64, 64, seed=0), random(96, 64, seed=1), random(64, 96, seed=2)
    weight[:, :32] *= 30.0
    weight[:48] *= 7.0
    slope[:, 50:] *= 40.0
    x[:, 40:] *= 9.0
    alone = Products(kind, cut)  # type: ignore[arg-type]
    halves = [_half(at, kind, cut, x, weight, slope) for at in (0, 1)]
    y, by_x, by_w = zip(*halves, strict=True)
    if cut == "output":
        joined = torch.cat(y, 1), by_x[0] + by_x[1], torch.cat(by_w)
    else:
        joined = y[0] + y[1], torch.cat(by_x, 1), torch.cat(by_w, 1)
    for found, expected in zip(joined, (alone.forward(x, weight), alone.by_input(slope, weight), alone.by_weight(slope, x)), strict=True):
        error = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error < 2**-7, "the rounding of bfloat16 sums, not that of 8 bits"


def _half(at: int, kind: str, cut: str, x: torch.Tensor, weight: torch.Tensor, slope: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One rank's part; what it shares is met by the other's, taken from a run of the other half."""

    def parts(place: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if cut == "output":
            return x, weight.chunk(2)[place], slope.chunk(2, dim=1)[place]
        return x.chunk(2, dim=1)[place], weight.chunk(2, dim=1)[place], slope

    def run(place: int, share: Any) -> tuple[torch.Tensor, ...]:
        here, products = parts(place), Products(kind, cut, share)  # type: ignore[arg-type]
        return products.forward(here[0], here[1]), products.by_input(here[2], here[1]), products.by_weight(here[2], here[0])

    theirs: list[torch.Tensor] = []
    run(1 - at, lambda found: (theirs.append(found), found)[1])
    waiting = iter(theirs)
    return run(at, lambda found: torch.maximum(found, next(waiting)))


# --- runs ------------------------------------------------------------------------------------------------------------


class Again(MadeUp):
    """The first batch, every step: something that can be learnt by heart."""

    def micro_batches(self, step: int, **place: int) -> list[Any]:
        """Of step 0."""
        return super().micro_batches(0, **place)

    def targets(self, step: int) -> int:
        """Of step 0."""
        return super().targets(0)


def learnt(fp8: str) -> list[float]:
    """The losses of a run of 16 steps on one batch."""
    settings, _, trainer = build(given(fp8, micro=2), vars(layout_of("dp=1")), 0, "bfloat16")
    trainer.order = Again(settings.model.vocab, settings.data.sequence, settings.batch.global_, 7)
    return [trainer.step(step).loss for step in range(16)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_follows_bfloat16(kind: str) -> None:
    plain, found = learnt("off"), learnt(kind)
    assert plain[-1] < plain[0] - 0.3 and found != plain
    assert found == pytest.approx(plain, rel=0.04)


@pytest.fixture(scope="module")
def proved(ranks: Ranks) -> Callable[[str, str], Run]:
    """A proof run of a kind of products and a layout, made once."""
    return cache(lambda kind, text: prove(ranks, given(kind), text, dtype="bfloat16"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["dp=2,zero=3", "dp=4,zero=1", "pp=2"])
def test_layouts_that_split_no_product_are_equal_to_the_bit(proved: Callable[[str, str], Run], kind: str, text: str) -> None:
    alone, found = (proved(kind, layout) for layout in ("dp=1", text))
    assert [loss.hex() for loss in found.record.losses] == [loss.hex() for loss in alone.record.losses]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["tp=2", "tp=2,sp=off", "dp=2,tp=2,zero=1,recompute=full"])
def test_tensor_parallel_ranks_follow_one_process(proved: Callable[[str, str], Run], kind: str, text: str) -> None:
    """A sum of two bfloat16 parts is rounded otherwise than one sum, and a few numbers then fall to the other side of an 8-bit step."""
    alone, found = (proved(kind, layout) for layout in ("dp=1", text))
    assert found.record.losses[0] == pytest.approx(alone.record.losses[0], rel=2e-4)
    assert found.record.norms[0] == pytest.approx(alone.record.norms[0], rel=5e-3)
    assert found.record.losses == pytest.approx(alone.record.losses, rel=5e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["tp=2", "tp=2,sp=off,recompute=full", "dp=2,tp=2,recompute=selective", "tp=2,pp=2"])
def test_bytes_of_scales_are_in_the_closed_form(ranks: Ranks, kind: str, text: str) -> None:
    layout, tree = layout_of(text), given(kind, micro=2)
    sent = ranks.run(layout.world, "tests.engine_cases:sent_in_a_step", tree, vars(layout), "bfloat16")
    shape = shape_of(Config.model_validate(tree), layout, dtype="bfloat16")
    for rank, found in enumerate(sent):
        assert found == pytest.approx(sent_bytes(shape, pp=rank // (layout.world // layout.pp), tp=rank % layout.tp))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["tp=2", "tp=2,sp=off,recompute=selective"])
def test_bytes_of_scales_of_compiled_blocks(ranks: Ranks, kind: str, text: str) -> None:
    """There q, k and v have one slope."""
    layout, tree = layout_of(text), given(kind, micro=2)
    tree["runtime"]["compile"] = True
    sent = ranks.run(layout.world, "tests.engine_cases:sent_in_a_step", tree, vars(layout), "bfloat16")
    shape = shape_of(Config.model_validate(tree), layout, dtype="bfloat16")
    for rank, found in enumerate(sent):
        assert found == pytest.approx(sent_bytes(shape, tp=rank))
        assert found != pytest.approx(sent_bytes(replace(shape, compiled=False), tp=rank))


# --- refusals --------------------------------------------------------------------------------------------------------

REFUSED = [
    ("runtime.dtype", "float32", "dp=1", "bfloat16 blocks, dtype is float32"),
    ("runtime.dtype", "float64", "dp=1", "bfloat16 blocks, dtype is float64"),
    ("runtime.device", "cpu", "dp=1", "auto is on a CPU"),
    ("model.ffn", 120, "dp=1", "ffn 120 must be a multiple of 16 on each rank, 8 are left"),
    ("model.ffn", 144, "tp=2", "ffn 144 over tp=2 must be a multiple of 16"),
    ("runtime.fp8", "tensorwise", "dp=2,engine=ddp", "engine=ddp makes its own products"),
    ("data.sequence", 24, "dp=1", "micro 1 x sequence 24 = 24 tokens"),
]


@pytest.mark.parametrize(("key", "value", "text", "words"), REFUSED)
def test_what_cannot_be_is_refused_with_its_arithmetic(key: str, value: Any, text: str, words: str) -> None:
    wanted = Config.model_validate(given("tensorwise"))
    layout = parse_layout(text)
    found = problems(changed(wanted, {key: value}), resolve(layout, world_of(layout)))
    assert any(problem.key == "runtime.fp8" and words in problem.text for problem in found), found
    assert not any(problem.key == "runtime.fp8" for problem in problems(wanted, layout_of("dp=1")))


def test_the_device_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, device = Config.model_validate(given("rowwise")).runtime, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(UsageError, match="no 8-bit products") as caught:
        refuse_fp8(runtime, device, torch.bfloat16)
    assert caught.value.found == "compute capability 8.9" and "9.0" in str(caught.value.expected)
    with pytest.raises(UsageError, match="bfloat16"):
        refuse_fp8(runtime, torch.device("cpu"), torch.float32)
    refuse_fp8(runtime, torch.device("cpu"), torch.bfloat16)
