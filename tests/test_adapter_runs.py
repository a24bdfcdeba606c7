"""Runs of adapters through the command: base, resume under other layouts, PEFT's folders out and in, merging, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from dist_llm.cli import main as cli
from tests.commands import Commands, Result
from tests.small_checkpoints import save_small_adapter
from tests.test_messages import golden, normal, theirs
from tests.told import well_made

pytestmark = pytest.mark.usefixtures("with_transformers")
DATA = ["data.source=skills", "data.sequence=32", "data.max_tokens=20000", "data.validation=0.05"]
STEPS = ["batch.global=4", "batch.micro=2", "schedule.kind=constant", "track.validate_batches=2"]
ADAPTER = ["model.adapter.rank=4", "optimizer.lr=0.02"]
ENDS = ["model.adapter.modules_to_save=[embedding, head]"]
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


@pytest.fixture(scope="module")
def several(home: Path, commands: Commands) -> Path:
    """Two more adapters on the base: DoRA with dropout, which has a name, and a LoRA of another rank on two projections."""
    words = ["model.adapter.rank=2", "model.adapter.dora=true", "model.adapter.dropout=0.2", "model.adapter.name=lengths"]
    words += ["schedule.steps=3", "optimizer.lr=0.05", "model.neftune=5"]
    ok(train(commands, home, "adapter", "dora", *STEPS, *words, "--layout", "zero=3", "--nproc", "2"))
    words = ["model.adapter.rank=3", "model.adapter.targets=[v, down]", "schedule.steps=3", "optimizer.lr=0.1"]
    ok(train(commands, home, "adapter", "second", *STEPS, *words))
    for run in ("dora", "second"):
        ok(commands.run("export", str(home / run), str(home / f"peft-{run}")))
    return home


def test_lengths_and_sums_are_those_of_peft(several: Path, commands: Commands, ranks: Any) -> None:
    """DoRA under PEFT and merged; two adapters merged with weights and PEFT's add_weighted_adapter with `cat`; and what is refused."""
    home, base = several, str(several / "base")
    ok(commands.run("merge", base, str(home / "peft-dora"), str(home / "merged-dora")))
    pair = (str(home / "lora"), str(home / "peft-second"))
    ok(commands.run("merge", base, *pair, str(home / "merged-two"), "--weights", "0.7,-0.4"))
    receipt = json.loads((home / "merged-two/merge.json").read_text())
    assert [one["weight"] for one in receipt["adapters"]] == [0.7, -0.4] and receipt["drift"] < 1e-5
    if not (home / "peft").exists():
        ok(commands.run("export", str(home / "lora"), str(home / "peft")))
    (found,) = ranks.run(1, "tests.test_adapter_runs:lengths_and_sums", str(home), timeout_seconds=120)
    assert found["lengths"] < 1e-6 and found["sum"] < 1e-6, found
    ok(commands.run("import", str(home / "peft-dora"), str(home / "imported-dora"), "--base", base))
    manifest = json.loads((home / "imported-dora/checkpoints/step-00000000/manifest.json").read_text())
    kept = manifest["config"]["model"]["adapter"]
    assert kept["dora"] and kept["name"] == "lengths" and kept["dropout"] == 0.2
    assert "a weight for each adapter" in refused(commands.run("merge", base, *pair, str(home / "x"), "--weights", "1"))


def lengths_and_sums(rank: int, world: int, say: Callable, home: str) -> dict[str, float]:
    """The largest differences of logits: DoRA under PEFT and our merged folder; a weighted sum of two adapters and ours."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    tokens = torch.arange(40)[None] * 5 % 250

    def plain(folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(f"{home}/{folder}", **options)

    def difference(ours: Any, theirs: Any) -> float:
        return float((ours - theirs).abs().max() / theirs.abs().max())

    with torch.no_grad():
        dora = PeftModel.from_pretrained(plain("hf"), f"{home}/peft-dora")(input_ids=tokens).logits
        both = PeftModel.from_pretrained(plain("hf"), f"{home}/peft", adapter_name="one")
        both.load_adapter(f"{home}/peft-second", adapter_name="two")
        both.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", combination_type="cat")
        both.set_adapter("sum")
        merged = {name: plain(name)(input_ids=tokens).logits for name in ("hf", "merged-dora", "merged-two")}
        summed = both(input_ids=tokens).logits
    assert difference(dora, merged["hf"]) > 1e-4 < difference(summed, merged["hf"]), "adapters do something"
    return {"lengths": difference(merged["merged-dora"], dora), "sum": difference(merged["merged-two"], summed)}


def test_several_adapters_on_one_base(several: Path, commands: Commands) -> None:
    """Chosen by name: text, scores and answers are those of each adapter's own run."""
    home, base = several, str(several / "base")
    asked = ("--json", "--prompt", "ab", "--tokens", "8", "--temperature", "0")
    alone = {run: json.loads(ok(commands.run("sample", str(home / run), *asked)).stdout)["text"] for run in ("base", "lora", "dora")}
    given = ("--adapter", f"one={home}/lora", "--adapter", f"{home}/peft-dora")
    lines = json.loads(ok(commands.run("sample", base, *asked, *given)).stdout)["samples"]
    assert [(line["adapter"], line["text"]) for line in lines] == [("one", alone["lora"]), ("lengths", alone["dora"])]

    measured = json.loads(ok(commands.run("eval", base, "--json", "--skills", "0", "--batches", "1", *given)).stdout)
    own = json.loads(ok(commands.run("eval", str(home / "dora"), "--json", "--skills", "0", "--batches", "1")).stdout)
    assert measured["adapters"]["lengths"]["text"]["loss_hex"] == own["text"]["loss_hex"] != measured["text"]["loss_hex"]
    assert list(measured["adapters"]) == ["one", "lengths"]

    said = home / "said.txt"
    said.write_text("/adapter\nab\n/adapter lengths\n/reset\nab\n/adapter base\n/adapter none\n")
    words = ("--json", "--tokens", "4", "--temperature", "0", *given)
    told = [json.loads(line) for line in ok(commands.run("chat", base, *words, stdin=said)).stdout.splitlines()]
    notes, answers = [line["note"] for line in told if "note" in line], [line for line in told if "text" in line]
    assert [line["adapter"] for line in answers] == ["one", "lengths"] and notes[0] == "one answers; there are one, lengths, base"
    assert notes[-1].startswith("there is no adapter none")
    first, second = (answer["read"] - len(answer["tokens"]) for answer in answers)
    assert first == second, "what the other adapter has read is read again"

    assert "no name of its own" in refused(commands.run("sample", base, "--adapter", f"a={home}/lora", "--adapter", f"a={home}/dora"))
    assert "no adapter" in refused(commands.run("sample", base, "--adapter", f"a={home}/base", *asked))


def test_another_base_is_refused(commands: Commands, home: Path) -> None:
    """F30: an adapter on another base, merged twice, or a base that is an adapter."""
    merged = home / "once"
    ok(commands.run("merge", str(home / "base"), str(home / "lora"), str(merged)))
    assert "another base" in refused(commands.run("merge", str(merged), str(home / "lora"), str(home / "twice")))
    ok(commands.run("export", str(home / "base"), str(home / "rounded"), "--dtype", "bfloat16"))
    assert "another base" in refused(commands.run("merge", str(home / "rounded"), str(home / "lora"), str(home / "twice")))
    assert "no adapter" in refused(commands.run("merge", str(home / "base"), str(home / "base"), str(home / "twice")))
    assert not (home / "twice").exists()
    (home / "of-adapter.yaml").write_text(f"base: {home}/lora\n")
    assert "is an adapter" in refused(train(commands, home, "of-adapter", "x", *STEPS, *ADAPTER, "schedule.steps=2"))


def test_weights_are_the_same_in_any_form(commands: Commands, home: Path) -> None:
    """An adapter on a run is one on its export and on the import of that, and the reverse; in PEFT's form too."""
    ok(commands.run("import", str(home / "hf"), str(home / "hf-imported")))
    (home / "on-hf.yaml").write_text(f"base: {home}/hf\n")
    ok(train(commands, home, "on-hf", "on-hf", *STEPS, *ADAPTER, "schedule.steps=2"))
    ok(commands.run("export", str(home / "on-hf"), str(home / "on-hf-peft")))
    asked = ("--json", "--prompt", "ab", "--tokens", "8", "--temperature", "0")
    for adapter in ("lora", "on-hf", "on-hf-peft"):
        texts = set()
        for at, base in enumerate(("base", "hf-imported")):
            said = ok(commands.run("sample", str(home / base), *asked, "--adapter", f"{home}/{adapter}"))
            texts.add(json.loads(said.stdout)["samples"][0]["text"])
            ok(commands.run("merge", str(home / base), str(home / adapter), str(home / f"same-{adapter}-{at}")))
        ok(commands.run("merge", str(home / "hf"), str(home / adapter), str(home / f"same-{adapter}-2")))
        made = {json.loads((home / f"same-{adapter}-{at}/merge.json").read_text())["result"] for at in range(3)}
        assert len(texts) == len(made) == 1


def test_an_adapter_is_in_a_base_once(commands: Commands, home: Path, tmp_path: Path) -> None:
    """F30: by its numbers, for PEFT's folders name no base; through imports, other merges and other forms of the adapter."""
    base = str(home / "base")
    for run in ("lora", "second"):
        if not (home / run).exists():
            ok(train(commands, home, "adapter", run, *STEPS, *ADAPTER, "schedule.steps=3"))
        ok(commands.run("export", str(home / run), str(tmp_path / run)))
        (tmp_path / run / "dist_llm.json").unlink()
    lora, second = (str(tmp_path / run) for run in ("lora", "second"))
    said = ok(commands.run("merge", base, lora, str(tmp_path / "one")))
    assert "note:" not in said.stderr, "it names this base"
    said = ok(commands.run("merge", str(tmp_path / "one"), second, str(tmp_path / "two")))
    assert f"note: {second} names its base {base}" in said.stderr and "and no hash of it" in said.stderr
    assert json.loads((tmp_path / "two/merge.json").read_text())["before"][0]["path"] == lora
    ok(commands.run("import", str(tmp_path / "two"), str(tmp_path / "run")))
    values = json.loads((tmp_path / "second/adapter_config.json").read_text())
    (tmp_path / "second/adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": "elsewhere"}))
    for held in ("two", "run"):
        for adapter in (lora, second):
            assert "count twice" in refused(commands.run("merge", str(tmp_path / held), adapter, str(tmp_path / "three")))
            for verb in ("sample", "chat", "eval"):
                assert "count twice" in refused(commands.run(verb, str(tmp_path / "run"), "--adapter", adapter)), verb
            assert "count twice" in refused(commands.run("import", adapter, str(tmp_path / "beside"), "--base", str(tmp_path / held)))
    assert not (tmp_path / "beside").exists()
    assert "named twice" in refused(commands.run("merge", base, lora, str(home / "lora"), str(tmp_path / "three")))
    assert not (tmp_path / "three").exists()


@pytest.mark.parametrize("words", ["sample run --adapter peft", "eval run --adapter other=peft", "import peft made --base run"])
def test_what_is_said_of_an_adapter_that_is_in_its_base(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs()()
    save_small_adapter(Path("peft"))
    assert cli.run(["merge", "theirs", "peft", "merged"]) == cli.run(["import", "merged", "run"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["dist-llm", *words.split()])
    code = cli.run(words.split())
    found = normal(capsys.readouterr().err, tmp_path)
    golden("inside", f"adapter that is in its base, {words.split()[0]}", f"$ dist-llm {words}\nexit {code}\n{found}")
    well_made(found)
    assert code == 2 and not Path("made").exists()


def test_an_export_of_an_adapter_takes_its_flags(commands: Commands, home: Path, tmp_path: Path, ranks: Any) -> None:
    """--dtype, --verify and --base-path do what they say; what cannot be done is refused."""
    lora = str(home / "lora")
    said = ok(commands.run("export", lora, str(tmp_path / "a"), "--dtype", "bfloat16", "--verify"))
    assert "PEFT computes the same logits" in said.stdout and list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert f"dist-llm export {home}/base/checkpoints/step-00000010 {tmp_path}/a-base" in said.stderr
    header = (tmp_path / "a/adapter_model.safetensors").read_bytes()[:4000]
    assert b'"BF16"' in header and b'"F32"' not in header
    said = ok(commands.run("export", lora, str(tmp_path / "b"), "--base-path", "me/base", "--json"))
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["base_model_name_or_path"] == "me/base" and not said.stderr
    assert "one file" in refused(commands.run("export", lora, str(tmp_path / "c"), "--shard-size", "1KB"))
    assert "beside no base" in refused(commands.run("export", str(home / "base"), str(tmp_path / "c"), "--base-path", "x"))
    (found,) = ranks.run(1, "tests.test_adapter_runs:verify_another", lora, str(tmp_path / "c"), timeout_seconds=120)
    assert found == "PEFT computes other logits from the export" and not (tmp_path / "c").exists()


def verify_another(rank: int, world: int, say: Callable, run: str, target: str) -> str:
    """What an export says whose config has another alpha than the adapter."""
    from dist_llm.errors import NumericError
    from dist_llm.interop import peft_folder
    from dist_llm.interop.exporting_adapter import export_adapter
    from dist_llm.train.folder import open_checkpoint
    from dist_llm.train.overlay import base_of

    written = peft_folder.write_adapter_config
    peft_folder.write_adapter_config = lambda model, base: {**written(model, base=base), "lora_alpha": 17.0}
    opened = open_checkpoint(Path(run))
    try:
        export_adapter(opened, base_of(opened), Path(target), named="x", verify=True)
    except NumericError as failure:
        return failure.what
    return "nothing"


def test_gpt2_goes_out_whole(commands: Commands, home: Path, tmp_path: Path) -> None:
    """All targets on a GPT-2 under tp, out to PEFT, which computes the same, and in again."""
    (home / "gpt2.yaml").write_text("model: {family: gpt2, layers: 2, dim: 32, heads: 4, ffn: 64}\ndata: {tokenizer: {kind: bytes}}\n")
    ok(train(commands, home, "gpt2", "gpt2", *STEPS, "schedule.steps=2"))
    (home / "on-gpt2.yaml").write_text(f"base: {home}/gpt2\n")
    ok(train(commands, home, "on-gpt2", "on-gpt2", *STEPS, *ADAPTER, "schedule.steps=2", "--nproc", "2", "--layout", "tp=2"))
    assert "same logits" in ok(commands.run("export", str(home / "on-gpt2"), str(tmp_path / "peft"), "--verify")).stdout
    ok(commands.run("import", str(tmp_path / "peft"), str(tmp_path / "run"), "--base", str(home / "gpt2")))
    ok(commands.run("export", str(tmp_path / "run"), str(tmp_path / "again")))
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert first.keys() == again.keys() and all((first[key] == again[key]).all() for key in first)
    assert first["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (12, 32)


def test_sequences_beyond_the_positions_are_said(commands: Commands, home: Path, tmp_path: Path) -> None:
    """By check and train; the export states what was trained."""
    ok(train(commands, home, "base", "short", *STEPS, "schedule.steps=1", "model.max_positions=16", "data.sequence=16"))
    (home / "long.yaml").write_text(f"base: {home}/short\n")
    said = "sequences have 32 tokens, and the base was made for 16"
    assert said in ok(commands.run("check", str(home / "long.yaml"), *DATA, f"data.dir={home}/data", *STEPS)).stdout
    first = ok(train(commands, home, "long", "long", *STEPS, "schedule.steps=1"))
    assert said in " ".join((first.stdout + first.stderr).split())
    ok(train(commands, home, "long", "long-lora", *STEPS, *ADAPTER, "schedule.steps=1"))
    ok(commands.run("export", str(home / "long"), str(tmp_path / "whole")))
    ok(commands.run("merge", str(home / "short"), str(home / "long-lora"), str(tmp_path / "merged")))
    ok(commands.run("export", str(home / "short"), str(tmp_path / "before")))
    found = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "merged", "before")}
    assert [found[name]["max_position_embeddings"] for name in ("whole", "merged", "before")] == [32, 32, 16]
    ok(commands.run("import", str(tmp_path / "before"), str(tmp_path / "ours")))
    assert "made for" not in ok(commands.run("check", str(tmp_path / "ours/config.yaml"))).stdout


def test_folders_of_others_are_told_apart(commands: Commands, home: Path) -> None:
    """What is no run says how it becomes one; a name of the hub, how to get it."""
    said = refused(commands.run("sample", str(home / "hf"), "--prompt", "ab"), 4)
    assert f"dist-llm import {home}/hf runs/hf" in said and "a Hugging Face folder" in said
    (home / "adapter-of-others").mkdir()
    (home / "adapter-of-others/adapter_config.json").write_text("{}")
    said = refused(commands.run("eval", str(home / "adapter-of-others")), 4)
    assert f"dist-llm import {home}/adapter-of-others runs/adapter-of-others --base BASE" in said
    (home / "hub.yaml").write_text("base: Qwen/Qwen3-0.6B\n")
    said = refused(commands.run("check", str(home / "hub.yaml")), 4)
    assert "no model is downloaded here" in said and "hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B" in said
    (home / "hub.yaml").write_text(f"base: {home}/Qwen3\n")
    assert "hub" not in refused(commands.run("check", str(home / "hub.yaml")), 4).replace("hub.yaml", "")


def test_what_is_refused_before_it_starts(commands: Commands, home: Path) -> None:
    (home / "alone.yaml").write_text(MODEL)
    assert "nothing to lie beside" in refused(train(commands, home, "alone", "x", *STEPS, *ADAPTER, "schedule.steps=2"))
    assert "engine=native" in refused(train(commands, home, "adapter", "x", *STEPS, *ADAPTER, "--layout", "engine=ddp"))
    said = refused(train(commands, home, "adapter", "x", *STEPS, *ADAPTER, "model.adapter.quantize=nf4", "model.adapter.block=40"))
    assert "model.adapter.block: dim is cut at 32" in said
    assert "model.adapter.rank above 0" in refused(train(commands, home, "adapter", "x", *STEPS, "model.adapter.quantize=nf4"))


@pytest.fixture(scope="module")
def whole(home: Path, commands: Commands) -> Path:
    """An adapter with both ends of the model trained whole: four steps under one layout, and cut in two under others."""
    words = [*STEPS, *ADAPTER, *ENDS, "--dtype", "float64", "--nproc", "2"]
    ok(train(commands, home, "adapter", "ends", *words, "schedule.steps=4", "--layout", "zero=1"))
    for steps, layout, *resume in ((2, "zero=3"), (4, "tp=2", "--resume", "auto")):
        ok(train(commands, home, "adapter", "ends-cut", *words, f"schedule.steps={steps}", "--layout", layout, *resume))
    return home


def test_what_is_trained_whole_begins_at_the_base(whole: Path, commands: Commands) -> None:
    """Under every layout: the first loss is that of the base; the checkpoint holds the ends, and they have moved."""
    home = whole
    ours, theirs = ([float.fromhex(loss) for loss in losses(home / run)] for run in ("ends-cut", "ends"))
    assert len(ours) == 4 and all(abs(a / b - 1) < 1e-10 for a, b in zip(ours, theirs, strict=True))
    words = [*STEPS, *ADAPTER, "--dtype", "float64", "schedule.steps=1"]
    ok(train(commands, home, "adapter", "without", *words))
    assert abs(float.fromhex(losses(home / "without")[0]) / theirs[0] - 1) < 1e-12, "B is zero: the first loss is the base's"
    manifest = json.loads((home / "ends-cut/checkpoints/step-00000004/manifest.json").read_text())
    assert {name for name, _ in manifest["rows"] if "lora" not in name} == {"embedding.weight", "head.weight", "norm.weight"}
    different = refused(train(commands, home, "adapter", "ends-cut", *words, "--resume", "auto"))
    assert "which this model has not" in different


def test_what_is_trained_whole_is_merged(whole: Path, commands: Commands) -> None:
    """With a weight the ends go a part of the way; two in one place are refused."""
    home, base, table = whole, str(whole / "base"), "model.embed_tokens.weight"
    ok(commands.run("merge", base, str(home / "ends"), str(home / "lora"), str(home / "part"), "--weights", "0.25,1", "--dtype", "float64"))
    ok(commands.run("export", str(home / "ends"), str(home / "peft-ends")))
    part, before = (load_file(home / name / "model.safetensors")[table] for name in ("part", "hf"))
    after = load_file(home / "peft-ends/adapter_model.safetensors")[f"base_model.model.{table}"]
    assert abs(after - before).max() > 1e-3 and abs(part - (before + 0.25 * (after - before))).max() < 1e-6
    said = refused(commands.run("merge", base, str(home / "ends"), str(home / "ends-cut"), str(home / "two wholes")))
    assert "same matrix whole" in said and "embedding.weight" in said and not (home / "two wholes").exists()


@pytest.mark.long
def test_what_is_trained_whole_is_that_of_peft(whole: Path, commands: Commands, ranks: Any) -> None:
    """The merged folder, PEFT on our folder, our own run, and a name beside others; the base beside them is the base."""
    home, base = whole, str(whole / "base")
    if not (home / "peft-ends").exists():
        ok(commands.run("export", str(home / "ends"), str(home / "peft-ends")))
    ok(commands.run("merge", base, str(home / "peft-ends"), str(home / "merged-ends"), "--dtype", "float64"))
    assert json.loads((home / "merged-ends/merge.json").read_text())["drift"] < 1e-6
    (found,) = ranks.run(1, "tests.test_adapter_runs:ends_in_peft", str(home), timeout_seconds=120)
    assert found < 1e-6
    ok(commands.run("import", str(home / "peft-ends"), str(home / "imported-ends"), "--base", base))
    asked = ("--json", "--prompt", "ab", "--tokens", "12", "--temperature", "0", "--dtype", "float64")
    alone = {
        run: json.loads(ok(commands.run("sample", str(home / run), *asked)).stdout)["text"] for run in ("base", "ends", "imported-ends")
    }
    given = ("--adapter", f"ends={home}/ends", "--adapter", f"lora={home}/lora")
    lines = json.loads(ok(commands.run("sample", base, *asked, *given)).stdout)["samples"]
    assert alone["ends"] == alone["imported-ends"] == lines[0]["text"] != alone["base"]
    scores = json.loads(ok(commands.run("eval", base, "--json", "--skills", "0", "--batches", "1", "--dtype", "float64", *given)).stdout)
    own = json.loads(ok(commands.run("eval", base, "--json", "--skills", "0", "--batches", "1", "--dtype", "float64")).stdout)
    assert scores["text"]["loss_hex"] == own["text"]["loss_hex"], "the base beside adapters is the base"


def ends_in_peft(rank: int, world: int, say: Callable, home: str) -> float:
    """The largest difference of logits between PEFT on our folder and the merged one."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    options: dict[str, Any] = {"dtype": torch.float64, "attn_implementation": "eager"}
    tokens = torch.arange(40)[None] * 5 % 250

    def plain(folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(f"{home}/{folder}", **options)

    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain("hf"), f"{home}/peft-ends")(input_ids=tokens).logits
        ours, without = (plain(name)(input_ids=tokens).logits for name in ("merged-ends", "hf"))
    assert float((theirs - without).abs().max()) > 1e-3, "it does something"
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_tokens_that_a_template_adds_have_rows_to_train(commands: Commands, tmp_path: Path) -> None:
    """A base with rows to spare learns a template's tokens; under an adapter that leaves its ends alone this is said, before any work."""
    home, said = tmp_path, "never saw <|im_end|> <|im_start|>, and their rows stay as they are"
    (home / "base.yaml").write_text(MODEL.replace("tied: false", "tied: true, vocab: 272"))
    ok(train(commands, home, "base", "base", *STEPS, "schedule.steps=2"))
    (home / "chat.yaml").write_text(f"base: {home}/base\ndata: {{chat: {{format: messages, template: chatml}}, sequence: 200}}\n")
    words = [*STEPS, *ADAPTER, "schedule.steps=2"]
    data = ["data.source=skills", "data.max_tokens=20000", "data.validation=0.05", f"data.dir={home}/data"]
    config = str(home / "chat.yaml")
    assert said in " ".join(ok(commands.run("check", config, *data, *words)).stdout.split())
    first = ok(commands.run("train", config, *data, *words, "--run-dir", str(home / "frozen")))
    assert said in " ".join((first.stdout + first.stderr).split())
    whole = [*words, "model.adapter.modules_to_save=[embedding]"]
    second = ok(commands.run("train", config, *data, *whole, "--run-dir", str(home / "learned")))
    assert "never saw" not in second.stdout + second.stderr
    assert "never saw" not in ok(commands.run("check", config, *data, *whole)).stdout
    assert "name the run itself" in refused(
        commands.run("sample", str(home / "base"), "--adapter", f"a={home}/learned", "--prompt", "ab", "--tokens", "2")
    )
    ok(commands.run("merge", str(home / "base"), str(home / "learned"), str(home / "merged")))
    for kept in ("learned/checkpoints/step-00000002", "merged"):
        assert "<|im_start|>" in (home / kept / "tokenizer.json").read_text()
        assert "im_start" in (home / kept / "tokenizer_config.json").read_text(), "the template"
