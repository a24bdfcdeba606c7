"""What only a CUDA device can show. `pytest -m cuda tests/test_cuda.py`; each is skipped where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_parts import named
from benchmarks.gpu_worker import ROOT, Workers
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.model.fused import fuse
from dist_llm.model.kernels import norm_backward
from dist_llm.model.loss import loss_and_gradients, scale_by, whole
from dist_llm.model.products import Products, add_product, wide_product
from dist_llm.model.quantize import dequantize, quantize
from dist_llm.model.sums import add_rows
from dist_llm.parallel import compiled
from dist_llm.plan.predict import predicted, shape_of
from dist_llm.staging import Lane
from dist_llm.train.profile import Profile
from dist_llm.train.proof import MadeUp, judge
from dist_llm.train.setup import DTYPES, make_engine, make_mesh
from dist_llm.train.trainer import Trainer
from tests.engine_cases import config, layout_of, prove
from tests.ranks import Ranks

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda", 0)
WIDE = {"dim": 128, "heads": 4, "kv_heads": 2, "ffn": 256, "layers": 2, "vocab": 97}
ROWS = ["dp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3", "tp=2", "tp=2,sp=off", "tp=4", "pp=2", "pp=2,schedule=interleaved"]
ROWS += ["dp=2,tp=2,zero=2", "dp=2,pp=2,zero=1", "tp=2,pp=2", "dp=4,zero=3,shard=2"]
ROWS += ["dp=2,zero=3,recompute=full", "dp=2,zero=2,offload=optimizer"]


LONG = 2048  # tokens of a sequence, two of which in a micro-batch are beyond what torch's small kernels of an embedding take


def built(dtype: str, *, text: str = "dp=1", sequence: int = 64, **runtime: Any) -> tuple[NativeEngine, Trainer]:
    """An engine on the device and its trainer, over made-up batches."""
    given = config(micro=2, sequence=sequence, **WIDE)
    given["runtime"] |= {"device": DEVICE.type, **runtime}
    settings = Config.model_validate(given)
    mesh = make_mesh(settings, layout_of(text), 0)
    engine = make_engine(settings, mesh, device=DEVICE, dtype=DTYPES[dtype])
    return engine, Trainer(settings, mesh, engine, MadeUp(97, sequence, settings.batch.global_, 7))


def losses(dtype: str, *, steps: int = 6, **runtime: Any) -> list[float]:
    """Of some steps."""
    _, trainer = built(dtype, **runtime)
    return [trainer.step(step).loss for step in range(steps)]


@pytest.mark.parametrize("text", ROWS)
def test_ranks_that_share_the_device_equal_one(ranks: Ranks, text: str) -> None:
    """Every gradient, weight and moment in float64; transfers through pinned copies over gloo, prefetch and streams on."""
    given = {**config(tied=True, batch=8, micro=2), "runtime": {"device": DEVICE.type, "backend": "gloo"}}
    verdict = judge(prove(ranks, given, "dp=1"), prove(ranks, given, text), layout=layout_of(text))
    assert verdict.equal, verdict.first


def test_every_engine_and_stage_on_one_rank_with_nccl() -> None:
    with Workers(DEVICE.type, False) as workers:
        (found,) = workers.run([replace(part, limit=300.0) for part in named("stages")], 300.0)
    assert "result" in found, found
    runs = found["result"]["losses"]
    for text, run in runs.items():
        missing = isinstance(run, dict) and "deepspeed" in text  # where it is not installed
        assert missing or run == pytest.approx(runs["zero=0"], rel=1e-5), (text, run)


@pytest.mark.parametrize("what", ["ours", "transformers-compiled", "shared"])
def test_a_benchmark_s_process_gets_ready_without_the_device(what: str) -> None:
    """It does so while another one is measured there."""
    lines = "import torch; from benchmarks import gpu_work; gpu_work.bring('{}', compiled={}); print(torch.cuda.is_initialized())"
    command = [sys.executable, "-c", lines.format(what, what != "shared")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("narrow", [compiled.NARROW, 64])
@pytest.mark.parametrize(("dtype", "room"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_compiled_blocks_follow_eager_ones(dtype: str, room: float, narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """narrow: features up to which neighbours are one product; with 64 gate and up are two."""
    monkeypatch.setattr(compiled, "NARROW", narrow)
    assert losses(dtype, compile=True) == pytest.approx(losses(dtype), rel=room)


def test_bfloat16_follows_float32() -> None:
    assert losses("bfloat16") == pytest.approx(losses("float32"), rel=1e-2)


@pytest.mark.parametrize("blocks", ["eager", "compiled", "compiled, gate and up apart"])
@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_8_bit_products(kind: str, blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's kernels against float32, and a run against bfloat16."""
    monkeypatch.setattr(compiled, "NARROW", 64 if "apart" in blocks else compiled.NARROW)
    assert losses("bfloat16", fp8=kind, compile=blocks != "eager") == pytest.approx(losses("bfloat16"), rel=0.03)
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, weight, slope = (torch.randn(*size, generator=generator, device=DEVICE).bfloat16() for size in ((256, 128), (64, 128), (256, 64)))
    for name, operands in (("forward", (x, weight)), ("by_input", (slope, weight)), ("by_weight", (slope, x))):
        exact = getattr(Products(), name)(*(one.float() for one in operands))
        found = getattr(Products(kind), name)(*operands)
        assert (found.float() - exact).norm() / exact.norm() < 0.08, name
    whole = torch.cat(Products(kind).forward_apart(x, weight, [48, 16]), dim=1).float()
    found = Products(kind).forward(x, weight).float()
    assert (whole - found).norm() / found.norm() < 1e-2  # other widths may have other kernels


@pytest.mark.parametrize(("dtype", "sequence", "room"), [("float32", 64, 1e-4), ("bfloat16", 64, 1e-2), ("bfloat16", LONG, 1e-2)])
@pytest.mark.parametrize("text", ["dp=1", "dp=1,zero=2", "dp=1,recompute=full"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_replayed_step_is_the_step(text: str, compile: bool, dtype: str, sequence: int, room: float) -> None:
    """Attention's backward adds in another order each time."""
    runtime: dict[str, Any] = {"text": text, "sequence": sequence, "compile": compile}
    plain, replayed = (losses(dtype, cuda_graph=graph, **runtime) for graph in (False, True))
    assert replayed == pytest.approx(plain, rel=room)


@pytest.mark.parametrize("text", ["dp=1", "dp=1,recompute=full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_peak_is_as_predicted(dtype: str, text: str) -> None:
    """The allocator's own count, beside what was there already."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(DEVICE)
    given = config(micro=4, sequence=1024, batch=8, dim=1024, heads=16, kv_heads=8, ffn=2816, layers=6, vocab=32000)
    given["runtime"] |= {"device": DEVICE.type}
    settings = Config.model_validate(given)
    mesh = make_mesh(settings, layout_of(text), 0)
    engine = make_engine(settings, mesh, device=DEVICE, dtype=DTYPES[dtype])
    trainer = Trainer(settings, mesh, engine, MadeUp(32000, 1024, 8, 7))
    trainer.step(0)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    trainer.step(1)
    found = torch.cuda.max_memory_allocated(DEVICE) - before
    need = predicted(shape_of(settings, layout_of(text), dtype=dtype, device="cuda"))["memory_bytes"]["total"]
    assert found == pytest.approx(need, rel=0.05), (found, need, found / need)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_codes_become_the_weights_that_a_cpu_makes(dtype: str) -> None:
    """By bitsandbytes' kernel where it is installed, and by ours."""
    values = torch.randn(64 * 5000, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(values, kind="nf4", block=64)
    made = [torch.empty(len(values), dtype=DTYPES[dtype], device=device) for device in ("cpu", DEVICE)]
    for out in made:
        dequantize(codes.to(out.device), scales.to(out.device), out, kind="nf4", block=64)
    assert torch.equal(made[0], made[1].cpu())


def test_products_that_add_up_in_float32() -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    left, right = (torch.randn(*size, generator=generator, device=DEVICE).bfloat16() for size in ((96, 4096), (4096, 160)))
    exact, total = left.double() @ right.double(), torch.randn(96, 160, device=DEVICE)
    scale, before = exact.abs().max(), total.double()
    assert (wide_product(left, right) - exact).abs().max() / scale < 1e-5
    assert (add_product(total, left, right) - (before + exact)).abs().max() / scale < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_a_slope_keeps_its_digits(compiled: bool) -> None:
    """1 / 30,001 in bfloat16 is 0.14 % off."""
    gradient = torch.rand(3000, 2000, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE).bfloat16()
    exact, slope = gradient.double() / 30001, torch.tensor(1 / 30001, dtype=torch.float64, device=DEVICE)
    fuse(compiled)
    try:
        scale_by(gradient, slope)
    finally:
        fuse(False)
    assert float(gradient.double().sum() / exact.sum()) == pytest.approx(1.0, rel=2e-4)  # rounding alone: 2.5e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_keep_the_slope_s_digits(compiled: bool) -> None:
    """Whatever the number of targets, gradients times that number are the same, but for the order in which attention adds."""
    engine, trainer = built("bfloat16", compile=compiled)
    contexts = [trainer.context(batch, step=0, training=True) for batch in trainer.take(0)]
    found = []
    for targets in (32768, 30001, 32640):
        engine.run(contexts, targets=targets)
        engine.finish_gradients()
        found.append({item.piece.slot.name: item.values.double() * targets for item in engine.state() if item.kind == "gradient"})
    for name, exact in found[0].items():
        for other in found[1:]:
            assert float((other[name] * exact).sum() / exact.square().sum()) == pytest.approx(1.0, abs=1e-3), name


@pytest.mark.parametrize("tokens", [1000, 8192])  # torch adds few and many by different kernels
@pytest.mark.parametrize("most", [1, 40, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_added_in_a_fixed_order(dtype: torch.dtype, most: int, tokens: int) -> None:
    """As on a CPU, however often a row comes; and twice the same to the bit."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    rows = torch.randint(most, (tokens,), generator=generator, device=DEVICE)
    values = torch.randn(tokens, 256, generator=generator, device=DEVICE).to(dtype)
    first, second = (add_rows(torch.ones(5000, 256, device=DEVICE), rows, values) for _ in range(2))
    exact = torch.ones(5000, 256, dtype=torch.float64).index_add_(0, rows.cpu(), values.cpu().double())
    assert torch.equal(first, second)
    torch.testing.assert_close(first.cpu().double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(300, 128), (3, 5, 2048), (4096, 4096)])
def test_the_device_s_own_norm_backward(shape: tuple[int, ...]) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, slope = (torch.randn(*shape, generator=generator, device=DEVICE).bfloat16() for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator, device=DEVICE).bfloat16()
    exact = norm_backward(slope.double(), x.double(), weight.double(), None, kind="rms", eps=1e-5)
    for found, wanted in zip(norm_backward(slope, x, weight, None, kind="rms", eps=1e-5), exact, strict=True):
        assert (found.double() - wanted).norm() / wanted.norm() < 5e-3


@pytest.mark.parametrize(("smoothing", "vocab"), [(0.0, 32000), (0.1, 1000)])
def test_the_compiled_cross_entropy(smoothing: float, vocab: int) -> None:
    """Against float64, in bfloat16: the loss, and its gradients within what the operands' digits allow."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator, device=DEVICE).mul(0.1).bfloat16() for size in ((3000, 256), (vocab, 256)))
    labels = torch.randint(-1, vocab, (3000,), generator=generator, device=DEVICE)
    exact = loss_and_gradients(x.double(), weight.double(), labels, whole(weight, smoothing))
    for on in (False, True):
        fuse(on)
        try:
            loss, by_x, by_weight = loss_and_gradients(x, weight, labels, whole(weight, smoothing))
        finally:
            fuse(False)
        assert float(loss) == pytest.approx(float(exact[0]), rel=1e-5)
        for found, wanted in ((by_x, exact[1]), (by_weight, exact[2])):
            assert found is not None and wanted is not None
            assert (found.double() - wanted).norm() / wanted.norm() < 1e-2


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """The command line in bfloat16: saved, read again, and the same losses but for the order in which attention adds."""
    first = run_command(["train", "configs/tiny.yaml", f"save.dir={tmp_path}/run", f"data.dir={tmp_path}/data", "save.every=5"])
    assert first.returncode == 0, first.stderr
    calm = losses_of(tmp_path / "run")
    again = run_command(["train", "configs/tiny.yaml", f"save.dir={tmp_path}/more", f"data.dir={tmp_path}/data", "schedule.steps=10",
                         "--resume", f"{tmp_path}/run/checkpoints/step-00000005"])  # fmt: skip
    assert again.returncode == 0, again.stderr
    found = losses_of(tmp_path / "more")
    assert {step: found[step] for step in range(6, 11)} == pytest.approx({step: calm[step] for step in range(6, 11)}, rel=1e-3)


def test_layouts_that_share_the_device_compare_as_equal(tmp_path: Path) -> None:
    words = ["compare", "configs/tiny.yaml", "dp=2,zero=3", "tp=2", "pp=2", "runtime.device=cuda", "runtime.backend=gloo"]
    done = run_command([*words, f"save.dir={tmp_path}/run", f"data.dir={tmp_path}/data"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal to dp=1" in done.stdout and done.stderr.count(": equal, largest difference") == 3, done.stdout + done.stderr


def run_command(words: list[str]) -> subprocess.CompletedProcess[str]:
    """`dist-llm` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "dist_llm", *words], capture_output=True, text=True, timeout=240, cwd=ROOT, check=False)


def losses_of(folder: Path) -> dict[int, float]:
    """Step -> training loss, of a run folder."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("sequence", [64, LONG])
def test_a_step_waits_for_the_device_once(sequence: int) -> None:
    engine, trainer = built("bfloat16", sequence=sequence)
    trainer.step(0)
    contexts = [trainer.context(batch, step=1, training=True) for batch in trainer.take(1)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.run(contexts, targets=50)
        engine.totals = engine._finish()
        torch.cuda.set_sync_debug_mode("default")
        engine.finish_gradients()
        torch.cuda.set_sync_debug_mode("error")
        engine.step(1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_profile_has_kernels_and_memory(tmp_path: Path) -> None:
    _, trainer = built("bfloat16")
    profile = Profile((2, 3), folder=tmp_path, rank=0, device=DEVICE)
    for done in (1, 2, 3, 4):
        with profile.step(done):
            trainer.step(done - 1)
    events = json.loads((tmp_path / "trace-rank-0.json").read_text())["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    page = (tmp_path / "memory-rank-0.html").read_text()
    assert "Alive at the top" in page and "dist_llm/" in page and "pickle" not in page


def test_transfers_through_pinned_copies() -> None:
    """What is sent is what the device had computed when the transfer began; what comes back is there for what follows."""

    class Doubling:
        def wait(self) -> None:
            pass

    def call(host: list[torch.Tensor]) -> Doubling:
        assert all(tensor.is_pinned() for tensor in host)
        torch.mul(host[0], 2.0, out=host[1])
        return Doubling()

    lane, size = Lane(DEVICE), 1 << 22
    for turn in range(8):
        x, out = torch.zeros(size, device=DEVICE), torch.zeros(size, device=DEVICE)
        torch.cuda._sleep(5_000_000)
        x += turn
        transfer = lane.start(call, reads=[x], writes=[out])
        transfer.wait()
        assert float((out + 1.0).min()) == float((out + 1.0).max()) == 2.0 * turn + 1.0
