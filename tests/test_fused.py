"""Functions inside our operations, compiled: the same numbers, under autograd and in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dist_llm.model import fused
from dist_llm.model.fused import fuse
from dist_llm.model.loss import Slice, _statistics, loss_and_gradients
from dist_llm.parallel import compose
from tests.engine_cases import build, config, layout_of


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the functions that were compiled, with a compiler that starts at once."""
    names: list[str] = []
    compiler = torch.compile

    def noted(function: Any, **options: Any) -> Any:
        names.append(function.__name__)
        return compiler(function, backend="aot_eager")

    torch._dynamo.reset()
    monkeypatch.setattr(fused.torch, "compile", noted)
    monkeypatch.setattr(compose, "fuse", lambda on: None)
    fuse(True)
    yield names
    fuse(False)


def gradients(fp8: str, smoothing: float) -> dict[str, torch.Tensor]:
    """Of one step of a small model."""
    given = config(micro=2, sequence=32, dim=32, heads=2, kv_heads=2, ffn=64, layers=1, optimizer={"label_smoothing": smoothing})
    given["runtime"]["fp8"] = fp8
    _, engine, trainer = build(given, vars(layout_of("dp=1")), 0, "float32" if fp8 == "off" else "bfloat16")
    trainer.gradients(0)
    found = {item.piece.slot.name: item.values.clone() for item in engine.state() if item.kind == "gradient"}
    return found | {"loss": engine.loss.clone()}


@pytest.mark.parametrize(("fp8", "smoothing"), [("off", 0.0), ("off", 0.1), ("tensorwise", 0.0), ("rowwise", 0.0)])
def test_a_step_has_the_same_gradients(compiling: list[str], fp8: str, smoothing: float) -> None:
    fuse(False)
    expected = gradients(fp8, smoothing)
    fuse(True)
    found = gradients(fp8, smoothing)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-8, msg=name)
    assert set(compiling) <= {"_statistics", "_loss_and_new_slope", "measured", "measured_and_cast"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_the_cross_entropy_keeps_the_digits_of_float64(compiling: list[str], softcap: float, smoothing: float) -> None:
    """A slice of the vocabulary, labels outside it and ignored ones, weighted tokens: the slope made anew is the one made in place."""
    source = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 8, generator=source, dtype=torch.float64) for size in (50, 37))
    labels, weights = torch.randint(-1, 60, (50,), generator=source), torch.rand(50, generator=source, dtype=torch.float64)
    part = Slice(11, 60, smoothing, lambda known: known, softcap)
    found = loss_and_gradients(x, weight, labels, part, weights)
    fuse(False)
    for a, b in zip(found, loss_and_gradients(x, weight, labels, part, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert set(compiling) <= {"_statistics", "_loss_and_new_slope"}


def test_nothing_is_compiled_on_a_cpu() -> None:
    given = config(layers=1)
    given["runtime"]["compile"] = True
    build(given, vars(layout_of("dp=1")), 0, "float32")
    assert not fused._on


@pytest.mark.long
def test_the_compiler_knows_the_statistics_as_a_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it takes the largest logit and the exponentials in one pass, on a GPU. It asks whether it may only where it has found one."""
    from torch._inductor.fx_passes import post_grad

    asked: list[str] = []

    class Asked:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(torch._inductor.config, name)

    monkeypatch.setattr(post_grad, "config", Asked())
    torch._dynamo.reset()
    fuse(True)
    try:
        with torch._inductor.config.patch(force_disable_caches=True):
            _statistics(torch.randn(64, 500), torch.arange(64), 0, False, True)
    finally:
        fuse(False)
    assert "online_softmax" in asked


@pytest.mark.long
def test_the_cross_entropy_with_torch_s_own_compiler() -> None:
    torch._dynamo.reset()
    fuse(True)
    try:
        found = gradients("off", 0.1)
    finally:
        fuse(False)
    torch.testing.assert_close(found["loss"], gradients("off", 0.1)["loss"], rtol=1e-6, atol=0.0)
