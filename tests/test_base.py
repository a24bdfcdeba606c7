"""Training that begins with weights: of a Hugging Face folder, an import, a run of another layout; under every layout and engine."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from dist_llm.cli import main
from dist_llm.config.layout import Layout, parse_layout, resolve, world_of
from dist_llm.config.load import load_text
from dist_llm.config.schema import Config
from dist_llm.data.template_files import load_template
from dist_llm.data.tokenizer import load
from dist_llm.errors import CheckpointError, NumericError, UsageError
from dist_llm.interop.hugging_face import HuggingFaceFolder
from dist_llm.interop.importing import import_folder
from dist_llm.interop.slices import Slices
from dist_llm.model.table import table
from dist_llm.train.base import Base, read_base
from dist_llm.train.begin import take_base
from dist_llm.train.durable import Disk
from dist_llm.train.folder import open_checkpoint
from dist_llm.train.parts import Parts, part_of, write_part
from dist_llm.train.proof import Run, judge, read_run
from dist_llm.train.setup import DTYPES, make_engine, make_mesh
from tests.commands import Commands
from tests.hugging_face_cases import save_theirs, their_model
from tests.ranks import Ranks

LAYOUTS = ("dp=2,zero=3", "dp=2,zero=1", "dp=3,zero=2", "tp=2", "pp=2", "tp=2,pp=2", "dp=2,tp=2,zero=3,sp=off")
LATER = [pytest.param(f"dp=2,{text}", marks=pytest.mark.long) for text in ("engine=ddp", "zero=3,engine=deepspeed")]
ENGINES = ("dp=2,zero=3,engine=fsdp2", *LATER)
DATA = "data: {source: skills, sequence: 32, max_tokens: 20_000, dir: %s}\nbatch: {global: 12, micro: 1}\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: llama (tied, bfloat16), gpt2 (float32), wide (untied, float64); each also as a run folder of ours."""
    folder = tmp_path_factory.mktemp("base")
    for name, kind, dtype in (("llama", "llama, tied", "bfloat16"), ("gpt2", "gpt2", "float32"), ("wide", "llama", "float64")):
        save_theirs(their_model(kind), folder / name, dtype=dtype, shard="30KB")
        import_folder(folder / name, folder / f"ours-{name}")
    return folder


def concrete(text: str) -> Layout:
    wanted = parse_layout(text)
    return resolve(wanted, world_of(wanted))


def config_of(base: Path, **changes: Any) -> Config:
    text = f"base: {base}\n" + DATA % (base.parent / "data")
    return load_text(text, [f"{key}={value}" for key, value in changes.items()], name="run.yaml", base=read_base).config


def tree_of(base: Path) -> dict[str, Any]:
    return config_of(base).model_dump(by_alias=True)


def begun(rank: int, world: int, say: Callable, config: dict, layout: dict, dtype: str, folder: str) -> dict[str, Any]:
    """A rank that takes its base and leaves its weights; what it read, and the least that it could read."""
    settings = Config.model_validate(config)
    engine = make_engine(settings, make_mesh(settings, Layout(**layout), rank), device=torch.device("cpu"), dtype=DTYPES[dtype], base=False)
    base = Base(str(settings.base))
    wide = {row.name: base.folder.sources[row.name].stored.width if base.folder else 0 for row in table(base.model)}
    runs = {(want.name, want.box): 0 for want in engine.wanted() if want.kind == "weight"}
    for want in engine.wanted():
        if want.kind == "weight":
            runs[want.name, want.box] = max(runs[want.name, want.box], want.stop - want.start)
    read = take_base(engine, base)
    moments = max((float(item.values.abs().max()) for item in engine.state() if item.kind not in ("weight", "gradient")), default=0.0)
    write_part(Disk(), Path(folder), rank, part_of(item for item in engine.state() if item.kind == "weight"))
    need = sum(count * wide[name] for (name, _), count in runs.items())
    return {"read": read, "need": need, "moments": moments}


def begin(ranks: Ranks, base: Path, layout: str, target: Path, *, dtype: str = "float64") -> tuple[Parts, list[dict[str, Any]]]:
    target.mkdir()
    shape = concrete(layout)
    told = ranks.run(shape.world, "tests.test_base:begun", tree_of(base), asdict(shape), dtype, str(target))
    shapes = {row.name: row.shape for row in table(config_of(base).model)}
    return Parts(target, shape.world, shapes), told


# --- the same weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*LAYOUTS, *ENGINES])
def test_every_rank_begins_with_its_slices(layout: str, home: Path, ranks: Ranks, tmp_path: Path) -> None:
    """To the bit the numbers of the file; moments zero; no rank reads more than 1.1 times what it holds."""
    dtype = "float32" if "deepspeed" in layout else "float64"
    own, foreign = ("llama", "gpt2") if layout in LAYOUTS[::2] else ("gpt2", "llama")
    for base in (home / foreign, home / f"ours-{own}")[: 2 if layout in LAYOUTS else 1]:
        folder = HuggingFaceFolder(home / base.name.removeprefix("ours-"))
        theirs = Slices(folder)
        parts, told = begin(ranks, base, layout, tmp_path / base.name, dtype=dtype)
        for row in table(folder.model):
            assert torch.equal(parts.whole(row.name), theirs.whole(row.name).to(DTYPES[dtype])), (base.name, row.name)
        assert all(rank["moments"] == 0.0 for rank in told)
        if base == home / foreign:
            assert all(rank["need"] <= rank["read"][at] <= 1.1 * rank["need"] for at, rank in enumerate(told)), told
        folder.close()


def test_bfloat16_weights_are_read_once_for_them_and_their_masters(home: Path, ranks: Ranks, tmp_path: Path) -> None:
    _, told = begin(ranks, home / "wide", "dp=2,zero=3", tmp_path / "a", dtype="bfloat16")
    assert all(rank["read"][at] <= 1.1 * rank["need"] for at, rank in enumerate(told)), told


def proof(ranks: Ranks, base: Path, layout: str, folder: Path) -> Run:
    folder.mkdir()
    shape = concrete(layout)
    job = {"config": tree_of(base), "steps": 3, "dtype": "float64"}
    ranks.run(shape.world, "dist_llm.train.proof:proof_rank", job, asdict(shape), str(folder))
    return read_run(folder)


@pytest.mark.parametrize("name", ["wide", pytest.param("gpt2", marks=pytest.mark.long)])
def test_training_from_a_base_is_the_same_run_under_every_layout(name: str, home: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Loss, norm, every gradient, weight and moment of three steps, to 1e-10 (docs/measuring.md)."""
    reference = proof(ranks, home / name, "dp=1", tmp_path / "one")
    initial = config_of(home / name).model_copy(update={"base": None}).model_dump(by_alias=True)
    (tmp_path / "initial").mkdir()
    job = {"config": initial, "steps": 3, "dtype": "float64"}
    ranks.run(1, "dist_llm.train.proof:proof_rank", job, asdict(concrete("dp=1")), str(tmp_path / "initial"))
    assert not judge(reference, read_run(tmp_path / "initial")).equal, "it is the base that it begins with"
    for layout in LAYOUTS[:1] + LAYOUTS[3:6]:
        run = proof(ranks, home / f"ours-{name}", layout, tmp_path / layout)
        verdict = judge(reference, run, layout=concrete(layout))
        assert verdict.equal, (layout, verdict.first)


# --- what a config takes from it -------------------------------------------------------------------------------------------


def test_model_and_tokenizer_are_the_bases(home: Path) -> None:
    for base in (home / "llama", home / "ours-llama"):
        config = config_of(base)
        assert config.model == HuggingFaceFolder(home / "llama").model
        assert config.data.tokenizer.kind == "file" and Path(str(config.data.tokenizer.path)).is_file()
        assert config_of(base, **{"model.layers": 2, "model.dropout": 0.1}).model.dropout == 0.1
    step = home / "ours-llama/checkpoints/step-00000000"
    assert config_of(home / "ours-llama").base == str(step), "pinned: a run folder may move on"
    again = Config.model_validate(config_of(step).model_dump(by_alias=True))
    assert again == config_of(step)


def test_contradictions_are_refused_with_both_values(home: Path) -> None:
    with pytest.raises(UsageError) as caught:
        config_of(home / "llama", **{"model.layers": 3, "model.tied": "false", "model.family": "gpt2", "model.bias": "true"})
    text = "\n".join(caught.value.details)
    for words in ("model.layers: 3 here, 2 in the base", "model.tied: false here, true in the base", "model.family: gpt2 here, llama in"):
        assert words in text
    assert "model.mlp_bias: true here, false in the base" in text
    with pytest.raises(UsageError) as caught:
        config_of(home / "llama", model="{preset: qwen3-0.6b, vocab: 263, layers: 2, head_dim: 10, dim: 24, tied: true}")
    assert any("model.family: qwen3 here, llama in the base" in line for line in caught.value.details), caught.value.details
    with pytest.raises(CheckpointError, match="no base"):
        config_of(home / "nowhere")


@pytest.mark.parametrize("base", ["llama", "ours-llama"])
def test_check_reads_the_tokenizer_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    """A large one takes seconds: the vocabulary, the base and the chat template are held against one reading."""
    data = "data: {source: talks.jsonl, sequence: 32, chat: {format: messages, template: plain}}\nbatch: {global: 12, micro: 1}\n"
    (tmp_path / "run.yaml").write_text(f"base: {home / base}\n{data}")
    read: list[Path] = []
    monkeypatch.setattr("dist_llm.data.tokenizer.load", lambda path: read.append(path) or load(path))
    assert main.run(["check", str(tmp_path / "run.yaml")]) == 0
    assert len(read) == 1


def test_another_tokenizer_is_refused(home: Path, commands: Commands, tmp_path: Path) -> None:
    """F24: where its file is known `check` says so, otherwise the run, before it starts."""
    (tmp_path / "run.yaml").write_text(f"base: {home / 'llama'}\n" + DATA % (home / "data") + f"save: {{dir: {tmp_path / 'run'}}}\n")
    words = (str(tmp_path / "run.yaml"), "data.tokenizer={kind: bpe, vocab: 263}")
    refused = commands.run("train", *words)
    assert refused.returncode == 2 and "the tokenizer is not the one that the base was trained with" in refused.stderr
    assert not list(tmp_path.glob("run/checkpoints/*"))
    spaced = tmp_path / "other"
    from dist_llm.data.tokenizer import train_bpe

    train_bpe(["some text " * 50], vocab=260).save(spaced)
    refused = commands.run("check", words[0], f"data.tokenizer={{kind: file, path: {spaced}}}")
    assert refused.returncode == 2 and "is not the one that the base" in refused.stderr
    (spaced / "tokenizer.json").write_bytes((home / "llama/tokenizer.json").read_bytes())
    assert commands.run("check", words[0], f"data.tokenizer={{kind: file, path: {spaced}}}").returncode == 0, "the same from elsewhere"


# --- a run ---------------------------------------------------------------------------------------------------------------------


def losses(folder: Path) -> list[str]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss_hex"] for record in records if record["step"]]  # step 0: what the base says of the held-out split


def test_a_run_from_a_base_goes_on_and_refuses_another_base(home: Path, commands: Commands, tmp_path: Path) -> None:
    """Resumed it is the run that was not cut; its own config.yaml starts it; its checkpoint is a base and an export again."""
    text = f"base: {home / 'llama'}\n" + DATA % (home / "data") + "schedule: {steps: 4}\nruntime: {dtype: float32}\n"
    (tmp_path / "run.yaml").write_text(text)
    config, calm, cut = str(tmp_path / "run.yaml"), tmp_path / "calm", tmp_path / "cut"
    for words in (("--run-dir", str(calm)), ("--run-dir", str(cut), "--save-every", "2", "--layout", "dp=2,zero=3")):
        done = commands.run("train", config, *words)
        assert done.returncode == 0, done.stderr
    assert "a rank read at most" in done.stdout
    assert abs(float.fromhex(losses(calm)[0]) - float.fromhex(losses(cut)[0])) < 1e-5
    step = cut / "checkpoints/step-00000002"
    done = commands.run(
        "train", str(cut / "config.yaml"), "--run-dir", str(tmp_path / "on"), "--resume", str(step), "--layout", "dp=2,zero=3"
    )
    assert done.returncode == 0 and losses(tmp_path / "on") == losses(cut)[2:], done.stderr
    refused = commands.run("train", config, f"base={home / 'ours-llama'}", "--run-dir", str(cut), "--resume", "auto", "--steps", "6")
    assert refused.returncode == 2 and "base: the run began with" in refused.stderr
    refused = commands.run("train", config, "--resume", str(home / "ours-llama"), "--run-dir", str(tmp_path / "resumed"))
    assert refused.returncode == 0 and losses(tmp_path / "resumed") == losses(calm), "an import is any run's beginning: moments are zero"
    done = commands.run("export", str(cut), str(tmp_path / "out"), "--verify", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["logits"]["difference"] < 1e-10, done.stderr
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (home / "llama" / name).read_bytes(), "carried along through a run"
    assert open_checkpoint(cut).manifest["base"] == Base(home / "llama").identity
    assert Base(cut).model == Base(home / "llama").model


def test_all_weights_learn_the_tokens_that_a_template_adds(commands: Commands, tmp_path: Path) -> None:
    """They take rows that the base has to spare, under any layout, and go with what is exported; a base without such rows is refused."""
    data = f"data: {{source: skills, sequence: 200, max_tokens: 20_000, dir: {tmp_path / 'data'}}}\nbatch: {{global: 4, micro: 2}}\n"
    for name, vocab in (("base", 264), ("full", 257)):
        model = f"model: {{layers: 1, dim: 16, heads: 2, vocab: {vocab}, tied: true}}\nschedule: {{steps: 1}}\n"
        (tmp_path / f"{name}.yaml").write_text(data.replace("200", "200, tokenizer: {kind: bytes}") + model)
        done = commands.run("train", str(tmp_path / f"{name}.yaml"), "--dtype", "float64", "--run-dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        (tmp_path / "run.yaml").write_text(f"base: {tmp_path / name}\n{data}schedule: {{kind: constant, steps: 3}}\n")
        for layout in ("dp=1", "tp=2", "dp=2,zero=3") if name == "base" else ("dp=1",):
            words = ("--dtype", "float64", "--layout", layout, "--run-dir", str(tmp_path / layout if name == "base" else tmp_path / "none"))
            done = commands.run("train", str(tmp_path / "run.yaml"), "data.chat.format=messages", "data.chat.template=chatml", *words)
            assert done.returncode == (0 if name == "base" else 2), done.stderr
    assert "vocabulary is smaller" in done.stderr and "at least 259" in done.stderr and "data.chat.template=plain" in done.stderr
    one, *others = ([float.fromhex(loss) for loss in losses(tmp_path / layout)] for layout in ("dp=1", "tp=2", "dp=2,zero=3"))
    assert all(other == pytest.approx(one, rel=1e-12) for other in others) and one[2] < one[0]
    before, after = (open_checkpoint(tmp_path / run).parts.whole("embedding.weight") for run in ("base", "dp=1"))
    assert (before[257:259] != after[257:259]).all(), "the rows of <|im_end|> and <|im_start|>"
    done = commands.run("export", str(tmp_path / "tp=2"), str(tmp_path / "out"), "--verify")
    assert done.returncode == 0, done.stderr
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load(tmp_path / "out")
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    text = load_template("chatml", end=load(tmp_path / "base/checkpoints/step-00000001").end).render(turns)
    assert theirs.apply_chat_template(turns, tokenize=False) == text
    ids = ours.commanding.encode(text, add_special_tokens=False).ids
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids and {257, 258} <= {*ids}


OTHER_TEXT = [pytest.param([], marks=pytest.mark.long), pytest.param(["data.chat.format=messages"], marks=pytest.mark.long)]


@pytest.mark.parametrize("chat", [*OTHER_TEXT, ["data.chat.template=chatml", "data.chat.format=messages"]], ids=str)
def test_a_run_goes_on_when_the_run_of_its_base_has_moved_on(chat: list[str], commands: Commands, tmp_path: Path) -> None:
    """Its base's run folder may have a newer step, and no more the one it began with: all that it needs is in its own checkpoint."""
    data = f"data: {{source: skills, sequence: 200, max_tokens: 20_000, dir: {tmp_path / 'data'}}}\nbatch: {{global: 4, micro: 2}}\n"
    model = "model: {layers: 1, dim: 16, heads: 2, vocab: 264, tied: true}\n"
    (tmp_path / "base.yaml").write_text(data.replace("200", "200, tokenizer: {kind: bytes}") + model + "schedule: {steps: 1}\n")
    (tmp_path / "run.yaml").write_text(f"base: {tmp_path / 'base'}\n{data}schedule: {{kind: constant, steps: 4}}\n")
    first = ("train", str(tmp_path / "base.yaml"), "save.keep=1", "--run-dir", str(tmp_path / "base"))
    again = ("train", str(tmp_path / "run.yaml"), *chat, "--save-every", "2", "--run-dir")
    for words in (first, (*again, str(tmp_path / "calm")), (*again, str(tmp_path / "cut"), "schedule.steps=2")):
        done = commands.run(*words)
        assert done.returncode == 0, done.stderr
    before = tmp_path / "base/checkpoints/step-00000001"
    done = commands.run(*first, "--resume", "auto", "--steps", "2", "save.keep=2")
    assert done.returncode == 0 and before.exists(), done.stderr
    own = ("train", str(tmp_path / "cut/config.yaml"), "schedule.steps=4", "--run-dir")
    for folder, start in (("newer", again), ("gone", again), ("config", own)):
        shutil.copytree(tmp_path / "cut", tmp_path / folder)
        if folder == "gone":
            done = commands.run(*first, "--resume", "auto", "--steps", "3")
            assert done.returncode == 0 and not before.exists(), done.stderr
        lost = ["--max-restarts", "1", "--save-every", "1", "save.keep=1", "save.async=false"] if folder == "gone" else []
        fault = {"DIST_LLM_FAULT": "step.forward:0:4"} if lost else {}  # by then the checkpoint whose tokenizer it took is deleted
        done = commands.run(*start, str(tmp_path / folder), "--resume", "auto", *lost, **fault)
        assert done.returncode == 0 and ("restart 1 of 1, from step 3" in done.stdout) == bool(lost), done.stderr
        assert losses(tmp_path / folder) == losses(tmp_path / "calm")
        last, calm = (open_checkpoint(tmp_path / name) for name in (folder, "calm"))
        assert last.config.base == str(before) and last.manifest["base"] == calm.manifest["base"]
        assert last.beside == calm.beside
    done = commands.run("eval", str(tmp_path / "gone"), "--skills", "0", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["text"]["loss"] > 0, done.stderr


def test_preferences_go_on_without_their_base_as_long_as_its_judgement_is_kept(commands: Commands, tmp_path: Path) -> None:
    """What pairs were worth before training is in the run's own folder; lost with the base gone, later weights must not stand in for it."""
    text = "model: {layers: 1, dim: 16, heads: 2}\n" + DATA % (tmp_path / "data") + "schedule: {kind: constant, steps: 1}\n"
    text = text.replace("sequence: 32", "sequence: 200, tokenizer: {kind: bytes}").replace("global: 12", "global: 4")
    (tmp_path / "base.yaml").write_text(text)
    plain = text.replace(", tokenizer: {kind: bytes}", "").replace("model: {layers: 1, dim: 16, heads: 2}\n", "")
    (tmp_path / "run.yaml").write_text(f"base: {tmp_path / 'base'}\npreference: {{beta: 0.1}}\n{plain}")
    for name, words in (("base", ()), ("run", ("--steps", "3", "--save-every", "1", "save.keep=0"))):
        done = commands.run("train", str(tmp_path / f"{name}.yaml"), *words, "--run-dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    (tmp_path / "base").rename(tmp_path / "away")
    again = ("train", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"), "--resume")
    whole = losses(tmp_path / "run")
    done = commands.run(*again, str(tmp_path / "run/checkpoints/step-00000002"), "--steps", "3")
    assert done.returncode == 0 and losses(tmp_path / "run") == whole, done.stderr
    (tmp_path / "run/reference.bin").unlink()
    refused = commands.run(*again, "auto", "--steps", "4")
    assert refused.returncode == 4 and "the base is gone, and with it what the pairs were worth before training" in refused.stderr


def test_an_adapter_whose_base_is_gone_says_so(commands: Commands, tmp_path: Path) -> None:
    """No checkpoint of it holds the base's weights; a copy of them takes their place."""
    text = "model: {layers: 1, dim: 16, heads: 2}\n" + DATA % (tmp_path / "data") + "schedule: {steps: 1}\n"
    (tmp_path / "base.yaml").write_text(text.replace("sequence", "tokenizer: {kind: bytes}, sequence"))
    (tmp_path / "run.yaml").write_text(f"base: {tmp_path / 'base'}\n" + text.replace("layers: 1, dim: 16, heads: 2", "adapter: {rank: 2}"))
    for name in ("base", "run"):
        done = commands.run("train", str(tmp_path / f"{name}.yaml"), "--run-dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    (tmp_path / "base").rename(tmp_path / "moved")
    again = ("train", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"), "--resume", "auto", "--steps", "2")
    refused = commands.run(*again)
    assert refused.returncode == 4 and "the base that this adapter lies beside is gone" in refused.stderr
    assert "step-00000001" in refused.stderr and "a copy: base=PATH" in refused.stderr
    refused = commands.run("sample", str(tmp_path / "run"), "--prompt", "a")
    assert refused.returncode == 4 and "the base that this adapter lies beside is gone" in refused.stderr
    done = commands.run(*again, f"base={tmp_path / 'moved'}")
    assert done.returncode == 0 and len(losses(tmp_path / "run")) == 2, done.stderr


def test_the_template_that_a_run_trains_with_goes_with_its_checkpoint(home: Path, commands: Commands, tmp_path: Path) -> None:
    """Also where the base has another one, or none: what is exported speaks as it was trained to; the rest stays as it was."""
    for base in ("llama", "gpt2"):
        text = f"base: {home / base}\n" + DATA % (home / "data") + "schedule: {steps: 1}\nruntime: {dtype: float32}\n"
        (tmp_path / "run.yaml").write_text(text)
        short = ["data.skills.tasks=[copy]", "data.skills.length=[1, 2]", "data.skills.apart=true", "data.sequence=64"]
        more = [*short, "data.chat.template=plain", "track.validate_batches=1", "batch.global=2"]
        done = commands.run("train", str(tmp_path / "run.yaml"), *more, "--run-dir", str(tmp_path / base))
        assert done.returncode == 0, done.stderr
        done = commands.run("export", str(tmp_path / base), str(tmp_path / f"{base}-out"))
        assert done.returncode == 0, done.stderr
        theirs = AutoTokenizer.from_pretrained(tmp_path / f"{base}-out")
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ours = load_template("plain", end=load(home / base).end)
        assert theirs.apply_chat_template(turns, tokenize=False) == ours.render(turns)
        before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (home / base, tmp_path / f"{base}-out"))
        assert {key: value for key, value in after.items() if key != "chat_template"} == {
            key: value for key, value in before.items() if key != "chat_template"
        }


def test_a_base_that_is_not_finite_or_damaged_is_refused(home: Path, ranks: Ranks, tmp_path: Path) -> None:
    model = their_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    save_theirs(model, tmp_path / "nan")
    with pytest.raises(NumericError, match="not finite") as caught:
        begin(ranks, tmp_path / "nan", "dp=2,zero=3", tmp_path / "a")
    assert any("blocks.1.mlp.up.weight" in line for line in caught.value.details)
    import_folder(home / "gpt2", tmp_path / "ours")
    file = tmp_path / "ours/checkpoints/step-00000000/rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        begin(ranks, tmp_path / "ours", "tp=2", tmp_path / "b")


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors"])
def test_a_damaged_base_is_named(name: str, commands: Commands, tmp_path: Path) -> None:
    """Before a step, with what can be done: no checkpoint of the run itself is meant."""
    text = "model: {layers: 1, dim: 16, heads: 2}\n" + DATA % (tmp_path / "data") + "schedule: {steps: 1}\n"
    (tmp_path / "base.yaml").write_text(text.replace("sequence", "tokenizer: {kind: bytes}, sequence"))
    (tmp_path / "run.yaml").write_text(f"base: {tmp_path / 'base'}\n" + text.replace("model: {layers: 1, dim: 16, heads: 2}\n", ""))
    done = commands.run("train", str(tmp_path / "base.yaml"), "--run-dir", str(tmp_path / "base"))
    assert done.returncode == 0, done.stderr
    file = tmp_path / "base/checkpoints/step-00000001" / name
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    refused = commands.run("train", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run"))
    assert refused.returncode == 4 and f"where:    {file}" in refused.stderr, refused.stderr
    assert "base=PATH" in refused.stderr.splitlines()[-1] and "--resume" not in refused.stderr, refused.stderr
