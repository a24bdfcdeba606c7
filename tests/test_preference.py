"""Preferences: their loss against the papers and transformers, their pairs from a file to a batch, and runs of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_llm.config.schema import Config, DataConfig
from dist_llm.data import preferences, skills
from dist_llm.data.batches import training_batches, validation_batches
from dist_llm.data.pairs import PairBatches
from dist_llm.data.prepare import Prepared, prepare
from dist_llm.errors import DataError, UsageError
from tests.commands import Commands, Result
from tests.preference_cases import RULES
from tests.ranks import Ranks

ASKED, GOOD, BAD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "Go"}
TEXTS = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
SHAPES: dict[str, dict[str, Any]] = {  # the same pair in each shape
    "texts": TEXTS,
    "with a prompt of messages": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "conversations": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "as UltraFeedback": {"prompt": "Hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "messages": [ASKED, GOOD], "score_chosen": 8.0},
    "answers as messages": {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
}
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "one side alone": ({"prompt": "Hi", "chosen": "Hello"}, "expected preference, found no key 'rejected'"),
    "no side": ({"messages": [ASKED, GOOD]}, "found no key 'chosen'; it looks like messages"),
    "no prompt": ({"chosen": "Hello", "rejected": "Go"}, "found no key 'prompt'"),
    "the same": ({**TEXTS, "rejected": "Hello"}, "'chosen' and 'rejected' are the same"),
    "the same messages": ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}, "'chosen' and 'rejected' are the same"),
    "other prompts": ({"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "Ho"}, BAD]}, "the prompts differ at turn 1"),
    "other questions": (
        {"chosen": [ASKED, GOOD, ASKED, GOOD], "rejected": [ASKED, GOOD, {**ASKED, "content": "Ho"}, BAD]},
        "the prompts differ at turn 3",
    ),
    "a beginning": ({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]}, "the beginning of 'rejected'"),
    "of two kinds": ({"prompt": "Hi", "chosen": "Hello", "rejected": [BAD]}, "must be of one kind, found a string and an array"),
    "an empty side": ({**TEXTS, "rejected": " "}, "'rejected' is empty"),
    "a null side": ({**TEXTS, "rejected": None}, "must be of one kind, found a string and null"),
    "no answer": ({"prompt": [ASKED], "chosen": [ASKED], "rejected": [BAD]}, "'chosen': two user turns in a row"),
    "another prompt": ({"prompt": "Ho", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "'prompt' is not what the messages begin with"),
    "an answered prompt": ({"prompt": [ASKED, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "two assistant turns in a row"),
    "an unknown role": ({"prompt": "Hi", "chosen": [{**GOOD, "role": "bot"}], "rejected": [BAD]}, "the unknown role 'bot'"),
}


def data_of(tmp_path: Path, source: Any, **more: Any) -> DataConfig:
    """A data section of pairs, bytes as tokens."""
    chat = {"format": "preference", "template": "chatml", **more.pop("chat", {})}
    rest = {"validation": 0.0, "sequence": 96, "tokenizer": {"kind": "bytes"}, **more}
    return DataConfig.model_validate({"source": source, "dir": str(tmp_path / "data"), "chat": chat, **rest})


def written(path: Path, records: list[dict[str, Any]]) -> str:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def said(prepared: Prepared, number: int) -> tuple[str, str]:
    """A document of the store as text, and what is trained of it."""
    (store, *_) = prepared.train
    ids, start = store.document(number), int(store.document_starts[number])
    assert store.weights is not None
    weights = store.weights.read(start, len(ids))
    return prepared.tokenizer.decode(ids.tolist()), prepared.tokenizer.decode(ids[weights > 0].tolist())


# --- the loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("with_transformers")
def test_against_transformers(ranks: Ranks) -> None:
    """Loss, every gradient and the figures of each kind of loss, in float64: sides alone there, packed in micro-batches here."""
    (found,) = ranks.run(1, "tests.preference_cases:against_transformers", timeout_seconds=120)
    assert found.keys() == RULES.keys()
    for name, one in found.items():
        assert one["loss"] < 1e-12 and one["gradient"] < 1e-9 and one["figures"] < 1e-12, (name, one)
    assert 0.0 < found["hinge"]["accuracy"] < 1.0, "pairs of both kinds"


def test_at_the_start_nothing_has_gained(ranks: Ranks) -> None:
    """With the log probabilities of the weights themselves as reference the loss is log 2 and half of the ties are right."""
    (found,) = ranks.run(1, "tests.preference_cases:reference_of_the_start")
    assert found[0] == pytest.approx(math.log(2), rel=1e-12) and found[1:4] == [0.0, 0.0, 0.5]


def test_one_pass_or_two_give_the_gradients_of_whole_logits(ranks: Ranks) -> None:
    (found,) = ranks.run(1, "tests.preference_cases:made_twice")
    assert all(far < 1e-12 for far in found.values()), found


# --- data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_pair(tmp_path: Path, shape: str) -> None:
    """Rendered by the same template; of each side its answer is trained, and what ends it, and nothing of the prompt."""
    prepared = prepare(data_of(tmp_path, written(tmp_path / "pairs.jsonl", [SHAPES[shape]])), seed=0)
    whole = [said(prepared, number) for number in range(2)]
    begin = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert whole == [(begin + "Hello<|im_end|>\n", "Hello<|im_end|>"), (begin + "Go<|im_end|>\n", "Go<|im_end|>")]
    assert prepared.shapes == ("preference",)


def test_of_a_long_prompt_its_own_answers_are_not_trained(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be"}, ASKED, GOOD, {**ASKED, "content": "More"}]
    ends = [[GOOD, ASKED, BAD], [BAD]]
    record = {"chosen": turns + ends[0], "rejected": turns + ends[1]}
    prepared = prepare(data_of(tmp_path, written(tmp_path / "pairs.jsonl", [record])), seed=0)
    assert [said(prepared, number)[1] for number in range(2)] == ["Hello<|im_end|>Go<|im_end|>", "Go<|im_end|>"]
    last = prepare(data_of(tmp_path, written(tmp_path / "pairs.jsonl", [record]), chat={"train_on": "last"}), seed=0)
    assert [said(last, number)[1] for number in range(2)] == ["Go<|im_end|>"] * 2


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_pair_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    record, why = FAULTS[name]
    path = written(tmp_path / "pairs.jsonl", [TEXTS, record])
    with pytest.raises(DataError) as caught:
        prepare(data_of(tmp_path, path), seed=0)
    assert caught.value.where == f"{path}:2" and why in caught.value.details[0] and "max_bad_lines" in (caught.value.next or "")
    assert prepare(data_of(tmp_path, path, max_bad_lines=1), seed=0).train[0].manifest.documents == 2


def test_a_side_that_the_template_leaves_untrained_takes_the_pair_with_it(tmp_path: Path) -> None:
    """Neither side is in the store then; turns of weight 0 leave nothing to train."""
    record = {"prompt": "Hi", "chosen": [GOOD], "rejected": [{**BAD, "train": False}]}
    path = written(tmp_path / "pairs.jsonl", [TEXTS, record, TEXTS])
    with pytest.raises(DataError, match="1 line cannot be read") as caught:
        prepare(data_of(tmp_path, path), seed=0)
    assert caught.value.where == f"{path}:2" and "'rejected': no token of the conversation is trained" in caught.value.details[0]
    assert prepare(data_of(tmp_path, path, max_bad_lines=1), seed=0).train[0].manifest.documents == 4


def test_pairs_and_conversations_are_not_taken_for_each_other(tmp_path: Path) -> None:
    path = written(tmp_path / "pairs.jsonl", [TEXTS])
    with pytest.raises(UsageError, match="holds preferences") as caught:
        prepare(data_of(tmp_path, path, chat={"format": "auto"}), seed=0)
    assert "preference.loss=sigmoid" in (caught.value.next or "")


def test_both_sides_share_a_sequence_and_each_pair_comes_once(tmp_path: Path) -> None:
    """Whatever the number of ranks: documents 2p and 2p + 1 of a row are the sides of a pair, chosen first."""
    prepared = prepare(data_of(tmp_path, "skills", max_tokens=6000, sequence=256, validation=0.1), seed=4)
    batches = training_batches(prepared, data_of(tmp_path, "skills", sequence=256), global_batch=4, seed=4)
    assert isinstance(batches, PairBatches)
    seen = [int(pair) for number in range(batches.num_samples) for pair in batches.pairs(number)]
    assert sorted(seen) == list(range(prepared.train[0].manifest.documents // 2))
    (whole,) = batches.micro_batches(1, dp_rank=0, dp_size=1, micro=4)
    parts = [batch for rank in range(2) for batch in batches.micro_batches(1, dp_rank=rank, dp_size=2, micro=1)]
    assert whole.pairs is not None and whole.reference is None and batches.weight(1) == float(whole.pairs.sum()) == whole.weight
    assert [int(batch.pairs.sum()) for batch in parts if batch.pairs is not None] == whole.pairs.tolist()
    assert all((batch.tokens[0] == whole.tokens[row]).all() for row, batch in enumerate(parts))
    row = int(batches.sample_ids(1)[0])
    texts = [prepared.tokenizer.decode(whole.tokens[0][whole.documents[0] == side].tolist()) for side in range(2)]
    assert [said(prepared, 2 * int(batches.pairs(row)[0]) + side)[0].startswith(texts[side]) for side in range(2)] == [True, True]
    held_out = validation_batches(prepared, data_of(tmp_path, "skills", sequence=256), global_batch=4)
    assert isinstance(held_out, PairBatches) and sum(held_out.weight(at) for at in range(held_out.num_batches)) >= 1


def test_pairs_of_one_prompt_are_held_out_together(tmp_path: Path) -> None:
    """What is asked decides: nothing that is validated was asked in training."""
    records = [{**TEXTS, "prompt": f"Hi {number % 40}", "rejected": f"Go {number}"} for number in range(120)]
    prepared = prepare(data_of(tmp_path, written(tmp_path / "pairs.jsonl", records), validation=0.3), seed=0)
    asked = [
        {prepared.tokenizer.decode(store.document(number).tolist()).split("<|im_end|>")[0] for number in range(store.manifest.documents)}
        for store in (*prepared.train, *prepared.validation)
    ]
    assert len(asked) == 2 and not asked[0] & asked[1] and len(asked[0] | asked[1]) == 40


def test_too_long_is_of_both_sides_together(tmp_path: Path) -> None:
    long, short = "x" * 40, "y"
    records = [{**TEXTS, "chosen": long}, {**TEXTS, "chosen": long + "1", "rejected": long + "2"}, {**TEXTS, "chosen": short}]
    path = written(tmp_path / "pairs.jsonl", records)
    prepared = prepare(data_of(tmp_path, path), seed=0)
    sizes = np.diff(prepared.train[0].document_starts).reshape(-1, 2)
    room = int(sizes[0].sum()) - 2  # what the first pair takes exactly
    with pytest.raises(DataError, match="1 of 3 pairs is longer than a sequence") as caught:
        training_batches(prepared, data_of(tmp_path, path, sequence=room), global_batch=1, seed=0)
    assert f"data.sequence={int(sizes[1].sum()) - 2} takes them all" in (caught.value.next or "")
    drop = training_batches(prepared, data_of(tmp_path, path, sequence=room, chat={"too_long": "drop"}), global_batch=1, seed=0)
    cut = training_batches(prepared, data_of(tmp_path, path, sequence=room, chat={"too_long": "truncate"}), global_batch=1, seed=0)
    assert isinstance(drop, PairBatches) and isinstance(cut, PairBatches)
    assert drop.statistics()["samples"] == 2 and drop.statistics()["left_out"] == 1
    less = training_batches(prepared, data_of(tmp_path, path, sequence=room - 2, chat={"too_long": "truncate"}), global_batch=1, seed=0)
    assert isinstance(less, PairBatches) and less.statistics()["cut"] == 1 and "1 were cut" in less.sentence()
    kept = cut.packings[0].places.reshape(-1, 2)
    assert kept[0].tolist() == (sizes[0] - 1).tolist() and kept[1].tolist() == [0, 0], "the sides differ in their last letter alone"
    assert cut.statistics()["emptied"] == 1


def test_a_wrong_answer_is_wrong_and_always_the_same() -> None:
    for index in range(400):
        asked, wrong = skills.pair(3, index), skills.wrong(3, index)
        assert wrong == skills.wrong(3, index) and wrong.strip() and not skills.check(asked.prompt, wrong)


def test_a_text_of_a_pair_names_its_prompt_once() -> None:
    silent = {"role": "system", "content": ""}
    text, why = preferences.taker(train_on="assistant")({"chosen": [silent, ASKED, GOOD], "rejected": [silent, ASKED, BAD]})
    assert not why and text == preferences.taker(train_on="assistant")({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]})[0]
    text, why = preferences.taker(train_on="assistant")({"chosen": [ASKED, {**GOOD, "tool_calls": [{}]}], "rejected": [ASKED, BAD]})
    assert not text and "turn 2 has 'tool_calls'" in why
    text, why = preferences.taker(train_on="assistant")({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "tools": [{}]})
    assert not text and "the object has 'tools'" in why
    text, why = preferences.taker(train_on="assistant")({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "prompt": None})
    assert not why and json.loads(text)["asked"] == 1


def test_a_system_stands_beside_every_kind_of_pair() -> None:
    take, system = preferences.taker(train_on="assistant"), {"role": "system", "content": "Be"}
    whole = take({"chosen": [system, ASKED, GOOD], "rejected": [system, ASKED, BAD]})[0]
    assert whole and json.loads(whole)["asked"] == 2
    for record in (
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [system, ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [system, ASKED, GOOD], "rejected": [{**system, "content": ""}, ASKED, BAD]},
        {"prompt": "Hi", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    ):
        text, why = take({**record, "system": "Be"})
        assert not why and text == whole, (record, why)
    listed = {"prompt": [system, ASKED], "chosen": [GOOD], "rejected": [BAD]}
    for record in ({"chosen": [system, ASKED, GOOD], "rejected": [ASKED, BAD]}, listed):
        assert "says something else" in take({**record, "system": "Do"})[1]
    assert "there is no prompt" in take({"chosen": [GOOD], "rejected": [BAD]})[1]
    assert "the assistant speaks first" in take({"system": "Be", "chosen": [GOOD], "rejected": [BAD]})[1]


# --- configs -------------------------------------------------------------------------------------------------------------


def test_a_key_turns_it_on() -> None:
    model = {"family": "llama"}
    on = Config.model_validate({"model": model, "data": {"source": "skills"}, "preference": {"beta": 0.3}})
    assert (on.preference.loss, on.data.chat.format, on.data.packing, on.data.document_mask) == ("sigmoid", "preference", "best_fit", True)
    assert Config.model_validate(on.model_dump(by_alias=True)) == on
    off = Config.model_validate({"model": model})
    assert (off.preference.loss, off.data.chat.format) == (None, None)
    padded = Config.model_validate({"model": model, "data": {"source": "skills", "packing": "none"}, "preference": {"loss": "ipo"}})
    assert padded.data.document_mask and padded.data.reset_positions, "both sides lie in one sequence"


# --- runs ----------------------------------------------------------------------------------------------------------------

MODEL = "model: {family: llama, layers: 2, dim: 32, heads: 4, kv_heads: 2, ffn: 64, tied: false}\n"
BASE = ["data.source=skills", "data.tokenizer.kind=bytes", "data.chat.format=auto", "data.sequence=128", "data.max_tokens=12000"]
FEW = ["data.source=skills", "data.sequence=256", "data.max_tokens=3500", "data.validation=0.1", "track.validate_batches=1"]
STEPS = ["batch.global=4", "batch.micro=2", "schedule.kind=constant", "optimizer.lr=0.01"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Path:
    """A base of ten steps of fine-tuning, and a config that prefers from there."""
    home = tmp_path_factory.mktemp("preference")
    (home / "base.yaml").write_text(MODEL)
    (home / "prefer.yaml").write_text(f"base: {home}/base\npreference: {{beta: 0.3}}\n")
    ok(train(commands, home, "base", "base", *BASE, *STEPS, "schedule.steps=10"))
    return home


def train(commands: Commands, home: Path, config: str, run: str, *words: str) -> Result:
    return commands.run("train", str(home / f"{config}.yaml"), f"data.dir={home}/data", "--run-dir", str(home / run), *words)


def ok(result: Result) -> Result:
    assert result.returncode == 0, (result.stdout, result.stderr)
    return result


def metrics(run: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["step"]]  # step 0: what the base says of the held-out split


def test_the_margin_grows_and_more_pairs_are_right(commands: Commands, home: Path) -> None:
    result = ok(train(commands, home, "prefer", "grows", *FEW, *STEPS, "schedule.steps=24", "track.validate_every=12"))
    steps = metrics(home / "grows")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[0]["accuracy"] == 0.5 and steps[0]["reward_margin"] == 0.0
    last = steps[-4:]
    assert sum(one["accuracy"] for one in last) / 4 > 0.9 and sum(one["reward_margin"] for one in last) / 4 > 1.0
    assert steps[-1]["reward_margin"] == pytest.approx(steps[-1]["reward_chosen"] - steps[-1]["reward_rejected"])
    assert 0 <= steps[-1]["validation_accuracy"] <= 1 and steps[-1]["validation_perplexity"] is None
    assert "margin" in result.stdout and "of the pairs right" in result.stdout
    page = (home / "grows/report.html").read_text()
    assert "reward margin" in page and "pairs right" in page


def known(path: Path) -> dict[int, float]:
    """The numbers of a reference by their place, as far as somebody has asked for them."""
    numbers = np.frombuffer(path.read_bytes().partition(b"\n")[2], "<f8")
    return {at: value for at, value in enumerate(numbers.tolist()) if value == value}


@pytest.mark.parametrize(
    "adapter", [pytest.param([], id="whole"), pytest.param(["model.adapter.rank=4"], id="adapter", marks=pytest.mark.long)]
)
def test_it_goes_on_under_other_layouts_with_the_same_reference(commands: Commands, home: Path, adapter: list[str]) -> None:
    """As the run that was not cut; the reference is read again, the base gives what more steps ask for, and all of it where it was lost."""
    words = [*FEW, *STEPS, *adapter, "--dtype", "float64", "--nproc", "2"]
    calm, cut = (f"{name}-{len(adapter)}" for name in ("calm", "cut"))
    ok(train(commands, home, "prefer", calm, *words, "schedule.steps=4", "--layout", "zero=3"))
    ok(train(commands, home, "prefer", cut, *words, "schedule.steps=2", "--layout", "tp=2"))
    kept = home / cut / "reference.bin"
    first = known(kept)
    ok(train(commands, home, "prefer", cut, *words, "schedule.steps=3", "--layout", "pp=2", "--resume", "auto"))
    more = known(kept)
    assert len(more) > len(first) and {at: more[at] for at in first} == first, "to the bit"
    kept.write_bytes(kept.read_bytes()[:-1])
    ok(train(commands, home, "prefer", cut, *words, "schedule.steps=4", "--layout", "zero=1", "--resume", "auto"))
    ours, theirs = ([float.fromhex(one["loss_hex"]) for one in metrics(home / run)] for run in (cut, calm))
    assert len(ours) == 4 and all(abs(a / b - 1) < 1e-10 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_what_is_refused_before_it_starts(commands: Commands, home: Path) -> None:
    words = [*FEW, *STEPS, "schedule.steps=2"]

    def refused(*more: str, config: str = "prefer", code: int = 2) -> str:
        result = train(commands, home, config, "refused", *words, *more)
        assert result.returncode == code and "Traceback" not in result.stderr, (result.returncode, result.stderr)
        return result.stderr

    assert "data.chat.format: a preference is learned from pairs" in refused("data.chat.format=messages")
    assert "engine=native" in refused("--layout", "engine=ddp")
    assert "train_on: a preference is between answers" in refused("data.chat.train_on=all")
    assert "train_on: each makes a sample of every turn" in refused("data.chat.train_on=each")
    assert "preference.label_smoothing: 0.1 says" in refused("preference.loss=hinge", "preference.label_smoothing=0.1")
    assert "optimizer.label_smoothing" in refused("optimizer.label_smoothing=0.1")
    assert "preference.loss: pairs are trained by" in refused("preference.loss=null", "data.chat.format=preference")
    ok(commands.run("export", str(home / "base"), str(home / "hf")))
    ok(commands.run("import", str(home / "hf"), str(home / "imported")))
    assert "have no reference beside them" in refused("--resume", str(home / "imported"))


def test_preview_shows_both_sides(commands: Commands, home: Path) -> None:
    page = home / "preview.html"
    words = [*STEPS, f"data.dir={home}/data", "--rows", "1", "--tokens", "400"]
    result = ok(commands.run("data", "preview", str(home / "prefer.yaml"), *FEW, *words, "--html", str(page)))
    assert "sequence 0, chosen: of" in result.stdout and "sequence 0, rejected: of" in result.stdout and " pairs, " in result.stdout
    assert page.read_text().count("chosen") >= 1
    found = json.loads(ok(commands.run("data", "preview", str(home / "prefer.yaml"), *FEW, *words, "--json")).stdout)
    assert [row["side"] for row in found["rows"]] == ["chosen", "rejected"] and found["noun"] == "pairs"


@pytest.mark.long
def test_compare_takes_pairs(commands: Commands, home: Path) -> None:
    words = [*FEW, "batch.global=4", "batch.micro=2", f"data.dir={home}/data", "--run-dir", str(home / "compared"), "--steps", "1"]
    result = ok(commands.run("compare", str(home / "prefer.yaml"), *words, "dp=2,zero=3", "tp=2", timeout=300))
    found = json.loads((home / "compared/comparison.json").read_text())
    assert all(row["equal"] and row["bytes_exact"] for row in found["layouts"]), result.stdout


@pytest.mark.long
def test_pairs_out_of_a_table(tmp_path: Path) -> None:
    """As from JSON lines, null cells left out."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [SHAPES["as UltraFeedback"], {**SHAPES["as UltraFeedback"], "score_chosen": None}]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "pairs.parquet")
    prepared = prepare(data_of(tmp_path, str(tmp_path / "pairs.parquet")), seed=0)
    assert prepared.train[0].manifest.documents == 4 and said(prepared, 1)[1] == "Go<|im_end|>"
