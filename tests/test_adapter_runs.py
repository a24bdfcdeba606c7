"""Runs of adapters through the command: base, resume under other layouts, PEFT's folders out and in, merging, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.commands import Commands, Result

DATA = ["data.source=skills", "data.sequence=32", "data.max_tokens=20000", "data.validation=0.05"]
STEPS = ["batch.global=4", "batch.micro=1", "schedule.kind=constant", "track.validate_batches=2"]
ADAPTER = ["model.adapter.rank=4", "optimizer.lr=0.02"]
MODEL = "model: {family: llama, layers: 2, dim: 32, heads: 4, kv_heads: 2, ffn: 64, tied: false}\ndata: {tokenizer: {kind: bytes}}\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Path:
    """A base of ten steps, its Hugging Face form, and an adapter of four steps."""
    home = tmp_path_factory.mktemp("adapters")
    (home / "base.yaml").write_text(MODEL)
    (home / "adapter.yaml").write_text(f"base: {home}/base\n")
    ok(train(commands, home, "base", "base", *STEPS, "schedule.steps=10", "optimizer.lr=0.01"))
    ok(commands.run("export", str(home / "base"), str(home / "hf")))
    ok(train(commands, home, "adapter", "lora", *STEPS, *ADAPTER, "schedule.steps=4", "--layout", "zero=2", "--nproc", "2"))
    return home


def train(commands: Commands, home: Path, config: str, run: str, *words: str) -> Result:
    return commands.run("train", str(home / f"{config}.yaml"), *DATA, f"data.dir={home}/data", "--run-dir", str(home / run), *words)


def ok(result: Result) -> Result:
    assert result.returncode == 0, (result.stdout, result.stderr)
    return result


def refused(result: Result, code: int = 2) -> str:
    assert result.returncode == code and "Traceback" not in result.stderr, (result.returncode, result.stderr)
    return result.stderr


def losses(run: Path) -> list[str]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss_hex"] for record in records if record["step"]]  # step 0: what the base says of the held-out split


def test_a_checkpoint_holds_the_adapter_alone(home: Path) -> None:
    def size(run: str, step: int) -> int:
        folder = home / run / "checkpoints" / f"step-{step:08d}"
        return sum(path.stat().st_size for path in folder.glob("rank-*.safetensors"))

    manifest = json.loads((home / "lora/checkpoints/step-00000004/manifest.json").read_text())
    assert all(name.endswith((".lora_a", ".lora_b")) for name, _ in manifest["rows"]) and len(manifest["base"]) == 64
    assert size("lora", 4) < size("base", 10) / 2


def test_it_goes_on_under_other_layouts(commands: Commands, home: Path) -> None:
    """As the run that was not cut, to the digits of float64; every start reads the base anew."""
    words = [*STEPS, *ADAPTER, "--dtype", "float64", "--nproc", "2"]
    ok(train(commands, home, "adapter", "calm", *words, "schedule.steps=4", "--layout", "zero=1"))
    ok(train(commands, home, "adapter", "cut", *words, "schedule.steps=2", "--layout", "zero=3"))
    ok(train(commands, home, "adapter", "cut", *words, "schedule.steps=3", "--layout", "tp=2", "--resume", "auto"))
    ok(train(commands, home, "adapter", "cut", *words, "schedule.steps=4", "--layout", "pp=2", "--resume", "auto"))
    ours, theirs = ([float.fromhex(loss) for loss in losses(home / run)] for run in ("cut", "calm"))
    assert len(ours) == 4 and all(abs(a / b - 1) < 1e-10 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_under_any_layout(commands: Commands, home: Path, kind: str) -> None:
    words = [*STEPS, *ADAPTER, "--dtype", "float64", "schedule.steps=3", f"model.adapter.quantize={kind}", "model.adapter.block=16"]
    found = []
    for at, layout in enumerate((["--nproc", "1"], ["--nproc", "2", "--layout", "zero=3"], ["--nproc", "2", "--layout", "tp=2"])):
        ok(train(commands, home, "adapter", f"{kind}-{at}", *words, *layout))
        found.append([float.fromhex(loss) for loss in losses(home / f"{kind}-{at}")])
    assert all(abs(a / b - 1) < 1e-10 for other in found[1:] for a, b in zip(found[0], other, strict=True))
    merged = home / f"merged-{kind}"
    ok(commands.run("merge", str(home / "base"), str(home / f"{kind}-1"), str(merged)))
    assert json.loads((merged / "merge.json").read_text())["drift"] < 1e-5


def test_peft_reads_what_we_write_and_the_reverse(commands: Commands, home: Path, ranks: Any) -> None:
    """The same logits as transformers with PEFT, and as our merge; an adapter that PEFT has saved is imported and sampled from."""
    ok(commands.run("export", str(home / "lora"), str(home / "peft")))
    ok(commands.run("merge", str(home / "base"), str(home / "peft"), str(home / "merged-ours")))
    assert "beside its base" in refused(commands.run("import", str(home / "peft"), str(home / "y")))
    (found,) = ranks.run(1, "tests.test_adapter_runs:in_peft", str(home), timeout_seconds=120)
    assert found < 1e-6
    ok(commands.run("import", str(home / "peft-saved"), str(home / "imported"), "--base", str(home / "base")))
    ok(commands.run("export", str(home / "imported"), str(home / "again")))
    first, again = (load_file(home / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert first.keys() == again.keys() and all((first[key] == again[key]).all() for key in first)
    asked = ("--json", "--prompt", "ab", "--tokens", "12", "--temperature", "0")
    one, two = (json.loads(ok(commands.run("sample", str(home / run), *asked)).stdout) for run in ("lora", "imported"))
    assert one["text"] == two["text"]


def in_peft(rank: int, world: int, say: Callable, home: str) -> float:
    """Logits of transformers with the exported adapter against those of the merged folder; PEFT saves the adapter again."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    tokens = torch.arange(40)[None] * 5 % 250
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{home}/hf", **options), f"{home}/peft")
        expected = adapted(input_ids=tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(f"{home}/merged-ours", **options)(input_ids=tokens).logits
        without = AutoModelForCausalLM.from_pretrained(f"{home}/hf", **options)(input_ids=tokens).logits
    assert float((without - expected).abs().max()) > 1e-3, "the adapter does something"
    adapted.save_pretrained(f"{home}/peft-saved")
    return float((merged - expected).abs().max() / expected.abs().max())


def test_another_base_is_refused(commands: Commands, home: Path) -> None:
    """F30: an adapter on another base, merged twice, or a base that is an adapter."""
    merged = home / "once"
    ok(commands.run("merge", str(home / "base"), str(home / "lora"), str(merged)))
    assert "another base" in refused(commands.run("merge", str(merged), str(home / "lora"), str(home / "twice")))
    assert "another base" in refused(commands.run("merge", str(home / "hf"), str(home / "lora"), str(home / "twice")))
    assert "no adapter" in refused(commands.run("merge", str(home / "base"), str(home / "base"), str(home / "twice")))
    assert not (home / "twice").exists()
    (home / "of-adapter.yaml").write_text(f"base: {home}/lora\n")
    assert "is an adapter" in refused(train(commands, home, "of-adapter", "x", *STEPS, *ADAPTER, "schedule.steps=2"))


def test_what_is_refused_before_it_starts(commands: Commands, home: Path) -> None:
    (home / "alone.yaml").write_text(MODEL)
    assert "nothing to lie beside" in refused(train(commands, home, "alone", "x", *STEPS, *ADAPTER, "schedule.steps=2"))
    assert "engine=native" in refused(train(commands, home, "adapter", "x", *STEPS, *ADAPTER, "--layout", "engine=ddp"))
    said = refused(train(commands, home, "adapter", "x", *STEPS, *ADAPTER, "model.adapter.quantize=nf4", "model.adapter.block=40"))
    assert "model.adapter.block: dim is cut at 32" in said
    assert "model.adapter.rank above 0" in refused(train(commands, home, "adapter", "x", *STEPS, "model.adapter.quantize=nf4"))
