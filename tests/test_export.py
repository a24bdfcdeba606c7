"""A Hugging Face folder out: from a checkpoint of any layout, bit for bit what came in, readable by transformers, complete or not there."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from dist_llm.config.layout import parse_layout, resolve, world_of
from dist_llm.config.load import config_tree, load_config
from dist_llm.data.prepare import prepare
from dist_llm.data.template_files import load_template
from dist_llm.data.tokenizer import load, train_bpe
from dist_llm.errors import CheckpointError, NumericError, UsageError
from dist_llm.interop.ends import ends_of_answers
from dist_llm.interop.exporting import Subject, cut, export_checkpoint, export_model, planned, rounded
from dist_llm.interop.exporting_texts import generation
from dist_llm.interop.families import read_config
from dist_llm.interop.hugging_face import HuggingFaceFolder
from dist_llm.interop.importing import import_folder
from dist_llm.interop.logits import compare_logits
from dist_llm.train.folder import open_checkpoint
from tests.commands import Commands
from tests.hugging_face_cases import SHAPES, save_theirs, tensors_of, their_model
from tests.ranks import Ranks

TEXTS = ("Hello, world!\n", "naïve café → 東京 😀\x00\t", "  def f(x):\n    return x", "", "a" * 300, "\u202e\ufeff")
BIG = 10**12


# --- what came in ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", SHAPES)
def test_in_and_out_is_the_same_to_the_bit(kind: str, dtype: str, tmp_path: Path) -> None:
    """Every tensor's bytes, from one file and from shards, into one and into shards; every other file too."""
    shard, out_limit = ("20KB", BIG) if dtype == "bfloat16" else ("5GB", 20_000)
    save_theirs(their_model(kind), tmp_path / "in", dtype=dtype, shard=shard)
    made = import_folder(tmp_path / "in", tmp_path / "run")
    export_checkpoint(open_checkpoint(made.path), tmp_path / "out", shard_size=out_limit)
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, values in before.items():
        assert values.dtype == after[key].dtype and torch.equal(values.view(torch.uint8), after[key].view(torch.uint8)), key
    for path in (tmp_path / "in").iterdir():
        if "safetensors" not in path.name and path.name != "config.json":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
    said, says = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("in", "out"))
    assert said == says
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 1 if out_limit == BIG else len(files) > 1
    assert all(path.stat().st_size < 20_000 + 20_000 or out_limit == BIG for path in (tmp_path / "out").glob("*.safetensors"))


def test_shards_are_neighbours_and_within_their_size() -> None:
    model = load_config("configs/tiny.yaml").config.model
    wholes = planned(model, dtype_of=lambda name: torch.float32)
    for limit in (1, 5_000, 20_000, BIG):
        shards = cut(wholes, limit)
        assert [one.key for shard in shards for one in shard] == [one.key for one in wholes]
        assert all(sum(one.bytes for one in shard) <= limit or len(shard) == 1 for shard in shards)
    assert len(cut(wholes, BIG)) == 1


# --- what was trained here -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` and `split`: two steps of configs/tiny.yaml with a learned tokenizer, from one process and from four ranks."""
    home = tmp_path_factory.mktemp("runs")
    words = [f"data.dir={home / 'data'}", "data.tokenizer={kind: bpe, vocab: 300}", "data.max_tokens=20_000", "schedule.steps=2"]
    config = load_config("configs/tiny.yaml", [*words, "data.validation=0"]).config
    prepare(config.data, seed=config.runtime.seed)
    for name, text in (("whole", "dp=1"), ("split", "dp=2,tp=2,zero=3,sp=off")):
        (home / name).mkdir()
        wanted = parse_layout(text)
        layout = resolve(wanted, world_of(wanted))
        ranks.run(layout.world, "dist_llm.train.run:train_rank", config_tree(config), asdict(layout), str(home / name), [])
    return home


def test_from_any_layout_transformers_computes_what_we_do(runs: Path, commands: Commands, tmp_path: Path) -> None:
    import transformers

    for name, more in (("split", []), ("whole", ["--dtype", "bfloat16", "--shard-size", "30KB"])):
        target = tmp_path / name
        done = commands.run("export", str(runs / name), str(target), "--verify", "--json", *more)
        answer = json.loads(done.stdout)
        assert done.returncode == 0 and answer["logits"]["difference"] < 1e-10 and answer["logits"]["dtype"] == "float64", done.stderr
        loaded = transformers.AutoModelForCausalLM.from_pretrained(target)
        assert str(loaded.dtype).removeprefix("torch.") == ("bfloat16" if more else "float32")
        assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == 0
    done = commands.run("export", str(runs / "whole"), str(tmp_path / "again"), "--verify")
    assert "largest difference" in done.stdout


def test_the_tokenizer_is_the_same_in_transformers(runs: Path, tmp_path: Path) -> None:
    """Ids and text of a learned tokenizer and of bytes, through AutoTokenizer."""
    import transformers

    export_checkpoint(open_checkpoint(runs / "whole"), tmp_path / "out", shard_size=BIG)
    ours, theirs = load(open_checkpoint(runs / "whole").path), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = ours.encode(text)
        for other in (theirs, fast):
            assert other(text)["input_ids"] == other.encode(text, add_special_tokens=False) == ids, text
            assert other.decode(ids) == ours.decode(ids) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_id and len(theirs) == ours.vocab_size


def trained(commands: Commands, home: Path, name: str, *words: str, config: Path = Path("configs/tiny.yaml")) -> Path:
    """Two steps of a config with other values, exported."""
    words = ("data.max_tokens=20_000", "schedule.steps=2", f"data.dir={home / 'data'}", "track.validate_batches=1", *words)
    run, out = str(home / name), home / f"{name}-out"
    for verb in (("train", str(config), "--run-dir", run, *words), ("export", run, str(out))):
        done = commands.run(*verb)
        assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3"]
)  # transformers makes tokenizers of their own of these, where a folder names no class
def test_a_run_on_conversations_speaks_the_same_in_transformers(family: str, commands: Commands, tmp_path: Path) -> None:
    """Ids and conversations through AutoTokenizer; `generate` stops where an answer ends; all of it again after an import."""
    import transformers

    words = (f"model={{family: {family}, layers: 2, dim: 32, heads: 4, ffn: 88}}", "data.tokenizer={kind: bpe, vocab: 400}")
    first = trained(commands, tmp_path, "chat", *words, "data.chat={template: chatml, too_long: drop}")
    assert commands.run("import", str(first), str(tmp_path / "again")).returncode == 0
    assert commands.run("export", str(tmp_path / "again"), str(tmp_path / "second")).returncode == 0
    said = [{"role": "user", "content": "What is  it?\n\n"}, {"role": "assistant", "content": "It's this."}]
    for folder in (first, tmp_path / "second"):
        ours, theirs = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            assert theirs(text)["input_ids"] == ours.encode(text), text
        template = load_template("chatml", end=ours.end)
        found = theirs.apply_chat_template(said, return_dict=True, return_assistant_tokens_mask=True)
        ids, weights = template.encode(said, ours)
        assert (found["input_ids"], found["assistant_masks"]) == (ids, [int(weight) for weight in weights])
        stops = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        assert set(stops) == set(template.stop_ids(ours)) and len(stops) == 2
        assert ends_of_answers(open_checkpoint(tmp_path / "chat")) == tuple(stops), "what lm-eval is told"
        assert theirs.eos_token_id == transformers.AutoConfig.from_pretrained(folder).eos_token_id == ours.end_id == stops[0]


def test_the_first_token_is_the_tokenizers_own(commands: Commands, tmp_path: Path) -> None:
    """Where a rule puts BOS before texts, the configs say so; and the folder comes in and goes out again as it was."""
    import transformers

    inner = train_bpe(["a text " * 9], vocab=300, special=("<first>",)).inner
    inner.post_processor = processors.TemplateProcessing(single="<first> $A", special_tokens=[("<first>", inner.token_to_id("<first>"))])
    inner.save(str(tmp_path / "tokenizer.json"))
    path = f"data.tokenizer={{kind: file, path: {tmp_path / 'tokenizer.json'}}}"
    for name, words in (("text", ()), ("chat", ("data.chat={template: plain, too_long: drop}",))):
        folder = trained(commands, tmp_path, name, path, *words)
        theirs, begin = transformers.AutoTokenizer.from_pretrained(folder), inner.token_to_id("<first>")
        assert theirs("a text")["input_ids"][0] == theirs.bos_token_id == begin != theirs.eos_token_id
        configs = transformers.AutoConfig.from_pretrained(folder), transformers.GenerationConfig.from_pretrained(folder)
        assert [config.bos_token_id for config in configs] == [begin, begin]
        made = import_folder(folder, tmp_path / f"{name}-again")
        export_checkpoint(open_checkpoint(made.path), tmp_path / f"{name}-second", shard_size=BIG)
        for file in folder.iterdir():
            assert file.read_bytes() == (tmp_path / f"{name}-second" / file.name).read_bytes(), file.name


def test_settings_that_came_along_gain_the_end_of_an_answer(commands: Commands, tmp_path: Path) -> None:
    """A base's generation settings stay, but for the token that ends answers under a template that the run has brought."""
    save_theirs(their_model("llama"), tmp_path / "base")
    config = tmp_path / "run.yaml"
    config.write_text(f"base: {tmp_path / 'base'}\ndata: {{source: skills, sequence: 60}}\nbatch: {{global: 4}}\n")
    for template, stops in (("chatml", [256, 258]), ("plain", 256)):
        folder = trained(commands, tmp_path, template, f"data.chat={{template: {template}, too_long: drop}}", config=config)
        said = json.loads((folder / "generation_config.json").read_text())
        assert said == {"eos_token_id": stops, "temperature": 0.6}


def test_what_was_exported_comes_in_again(runs: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(runs / "split")
    export_checkpoint(opened, tmp_path / "out", shard_size=20_000)
    again = open_checkpoint(import_folder(tmp_path / "out", tmp_path / "run").path)
    assert again.manifest["tokenizer"] == opened.manifest["tokenizer"]
    assert all(torch.equal(again.parts.whole(name), opened.parts.whole(name)) for name in opened.shapes)
    left_out = {"preset", "init_std", "residual_scale", "dropout"}
    assert again.config.model.model_dump(exclude=left_out) == opened.config.model.model_dump(exclude=left_out)


# --- refused -----------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_there_and_words_that_make_no_sense(runs: Path, commands: Commands, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    cases = [((str(tmp_path),), "already there"), ((str(link),), "already there"), ((str(tmp_path / "a"), "--dtype", "int4"), "dtype")]
    cases += [((str(tmp_path / "a"), "--shard-size", size), "size of a shard") for size in ("5XB", "0", "-1GB", "9" * 40, "1.5.5GB")]
    for words, said in cases:
        done = commands.run("export", str(runs / "whole"), *words)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == [link]


def test_a_model_that_transformers_does_not_have_is_refused_with_the_field(runs: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(runs / "whole")
    model = opened.config.model.model_copy(update={"norm": "layer"})
    opened.config = opened.config.model_copy(update={"model": model})
    with pytest.raises(UsageError, match="transformers has no model") as caught:
        export_checkpoint(opened, tmp_path / "out", shard_size=BIG)
    assert any("norm" in line for line in caught.value.details)


def test_other_logits_and_damage_leave_nothing(runs: Path, tmp_path: Path) -> None:
    """Exit 6 where transformers computes something else from the folder, exit 4 for a changed byte; no folder and no workshop is left."""
    opened = open_checkpoint(runs / "whole")
    model, prompts = opened.config.model, [[*range(64)]]

    def other(folder: Path) -> None:
        values: dict[str, Any] = json.loads((folder / "config.json").read_text())
        values["rope_parameters"]["rope_theta"] = 9999.0
        (folder / "config.json").write_text(json.dumps(values))
        compare_logits(folder, opened.parts, model, prompts=prompts)

    with pytest.raises(NumericError, match="other logits") as caught:
        export_checkpoint(opened, tmp_path / "out", shard_size=BIG, check=other)
    assert caught.value.code == 6 and not list(tmp_path.iterdir())
    broken = tmp_path / "broken"
    target = broken / "checkpoints" / opened.path.name
    target.mkdir(parents=True)
    for path in opened.path.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    file = target / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 7] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        export_checkpoint(open_checkpoint(broken), tmp_path / "out", shard_size=BIG)
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_weight_becomes_infinite(kind: str, tmp_path: Path) -> None:
    """One that float16 cannot hold is told by name, exit 6; nothing is left."""
    model = their_model(kind)
    name, weight = next((name, weight) for name, weight in model.named_parameters() if weight.dim() == 2 and "0." in name)
    with torch.no_grad():
        weight[1, 2] = -70000.0
    save_theirs(model, tmp_path / "in")
    opened = open_checkpoint(import_folder(tmp_path / "in", tmp_path / "run").path)
    with pytest.raises(NumericError, match="too large for float16") as caught:
        export_checkpoint(opened, tmp_path / "out", dtype=torch.float16, shard_size=BIG)
    assert caught.value.where == name and not (tmp_path / "out").exists()
    export_checkpoint(opened, tmp_path / "out", dtype=torch.bfloat16, shard_size=BIG)
    held = torch.tensor([1.0, torch.inf])
    assert rounded(held, torch.float16, where="x").isinf().any(), "what was infinite before is not the rounding's"


def test_longer_sequences_leave_the_rotary_scaling(tmp_path: Path) -> None:
    """A config may leave out the length that a scaling was made for: it is the very number that an export of longer sequences raises."""
    save_theirs(their_model("llama"), tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    opened = Subject.of(open_checkpoint(import_folder(tmp_path / "in", tmp_path / "run").path))
    export_model(replace(opened, sequence=256), tmp_path / "out", shard_size=BIG)
    before, after = (read_config(json.loads((tmp_path / name / "config.json").read_text()), where="") for name in ("in", "out"))
    assert (before.pop("max_positions"), after.pop("max_positions")) == (64, 256) and before == after


def test_generation_settings_that_are_none_are_left_alone() -> None:
    assert generation(b"[]", {}, (3,), anew=False) is None and generation(b'{"eos_token_id": null}', {}, (), anew=False) is None
    assert json.loads(generation(b'{"eos_token_id": null, "top_k": 5}', {}, (3,), anew=False) or b"") == {"eos_token_id": 3, "top_k": 5}
    assert json.loads(generation(None, {"bos_token_id": 1, "eos_token_id": None}, (), anew=True) or b"") == {
        "bos_token_id": 1,
        "eos_token_id": None,
    }


def test_an_export_says_the_least_that_is_true(tmp_path: Path) -> None:
    """A model that has changed since its import gets a config of its own, not the one that was carried along."""
    save_theirs(their_model("llama"), tmp_path / "in")
    opened = open_checkpoint(import_folder(tmp_path / "in", tmp_path / "run").path)
    theta = opened.config.model.model_copy(update={"rope_theta": 777.0})
    opened.config = opened.config.model_copy(update={"model": theta})
    export_checkpoint(opened, tmp_path / "out", shard_size=BIG)
    assert HuggingFaceFolder(tmp_path / "out").model.rope_theta == 777.0
