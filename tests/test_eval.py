"""`eval`: the loss that training logs, to the bit; questions that were never seen; what lm-eval asks of a model."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.cli import main as cli
from dist_llm.cli.eval import table
from dist_llm.config.load import load_config
from dist_llm.data import skills
from dist_llm.data.prepare import prepare
from dist_llm.data.template_files import load_template
from dist_llm.data.tokenizer import bytes_tokenizer, train_bpe
from dist_llm.errors import UsageError
from dist_llm.infer import exam
from dist_llm.infer.choose import Choice
from dist_llm.infer.exam import Asked, answer, asked, marks, questions, wilson
from dist_llm.infer.text import texts_of
from dist_llm.infer.write import Writer, follow
from dist_llm.train.folder import open_checkpoint
from dist_llm.use import evaluate as evaluation
from dist_llm.use.lm_eval_adapter import lm_eval_class, lm_eval_model
from dist_llm.use.load import load_here, open_sound
from dist_llm.use.score import Scorer
from tests.commands import Commands
from tests.small_checkpoints import seal
from tests.test_infer import LLAMA, build, drawn, forward
from tests.told import well_made

TINY = str(Path(__file__).parent.parent / "configs/tiny.yaml")


@pytest.fixture(scope="module")
def run(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process in float32 with masks, several micro-batches and a padded last batch."""
    home = tmp_path_factory.mktemp("eval")
    words = ["--steps", "8", "--run-dir", str(home / "run"), f"data.dir={home / 'data'}", "data.max_tokens=30_000", "data.validation=0.1"]
    more = ["batch.micro=2", "track.validate_batches=5", "data.document_mask=true", "data.reset_positions=true"]
    done = commands.run("train", TINY, *words, *more)
    assert done.returncode == 0, done.stderr
    return home / "run"


def last_line(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def evaluated(commands: Commands, *words: str) -> dict[str, Any]:
    done = commands.run("eval", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- text ----------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_what_training_logs_to_the_bit(commands: Commands, run: Path) -> None:
    """On one process and shared by ranks; the same for all batches on any number of them."""
    logged = last_line(run)
    for nproc in ("1", "2", "3"):
        text = evaluated(commands, str(run), "--batches", "5", "--skills", "0", "--nproc", nproc)["text"]
        assert text["loss"] == logged["validation_loss"] == float.fromhex(text["loss_hex"])
        assert text["perplexity"] == logged["validation_perplexity"] and text["bits_per_byte"] == logged["validation_bits_per_byte"]
        assert text["batches"] == 5 < text["of_batches"]
    one, two = (evaluated(commands, str(run), "--skills", "3", "--nproc", n, "--batch", b) for n, b in (("1", "4"), ("2", "7")))
    assert one["text"] == two["text"] and one["skills"] == two["skills"] and one["text"]["batches"] == one["text"]["of_batches"]


def test_another_text_in_the_checkpoints_tokens(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sum of the log probabilities of each window, over the bytes of the text."""
    file, text = tmp_path / "other.txt", "A short text, to be read to its end.\n" * 9
    file.write_text(text)
    words = ["eval", str(run), "--data", str(file), "--skills", "0", "--dtype", "float64", "--out", str(tmp_path / "out.json")]
    assert cli.run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out.json").read_text()) == found and found["text"]["source"] == str(file)
    opened, tokenizer = open_sound(run)
    model = load_here(opened, tokenizer, evaluation.Place("cpu", "float64"))
    ids = [*tokenizer.encode(text), tokenizer.end_id]
    total, targets, window = 0.0, 0, 64
    for first in range(0, len(ids) - window, window):
        line = torch.tensor([ids[first : first + window + 1]])
        values, _ = model.scores(line[:, :-1], line[:, 1:])
        total, targets = total - float(values.sum()), targets + window
    assert found["text"]["targets"] == targets and abs(found["text"]["loss"] - total / targets) < 1e-12
    assert cli.run(words) == 0
    shown = capsys.readouterr().out
    assert f"loss        {total / targets:.4f}" in shown and "bits/byte" in shown and "task" not in shown


# --- skills ----------------------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for right, count in ((0, 5), (5, 5), (1, 3), (45, 50), (970, 1000)):
        expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
        assert wilson(right, count) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(0, 0) == (0.0, 1.0)
    found = marks([("a", True), ("b", False), ("a", False)], ("a", "b", "c"))
    assert found["a"]["share"] == 0.5 and found["c"]["share"] is None and found["all"]["right"] == 1 and found["all"]["count"] == 3


SHORT = ("data.skills.length=[1, 2]", "data.skills.apart=true", "data.validation=0.3")  # the text has nearly all that can be asked
KINDS = {
    "split": (),
    "nothing held out": ("data.validation=0",),
    "chat": ("data.chat.template=plain",),
    "short": SHORT,
    "short chat": (*SHORT, "data.chat.template=plain"),
    "short preference": (*SHORT, "data.chat.template=plain", "preference.beta=0.1"),
}


@pytest.mark.parametrize("more", KINDS.values(), ids=KINDS)
def test_no_question_was_trained_on(tmp_path: Path, more: tuple[str, ...]) -> None:
    """What the run trains on is read as text: no question is in it, and each is there once."""
    config = load_config(TINY, [f"data.dir={tmp_path}", "data.max_tokens=60_000", "data.validation=0.1", *more]).config
    prepared = prepare(config.data, seed=config.runtime.seed)
    tasks = ("copy", "reverse", "last", "count", "add")
    found = questions(config, prepared, tasks=tasks, each=12, seed=0)
    store = prepared.train[0]
    text = "".join(prepared.tokenizer.decode(store.document(number).tolist()) for number in range(store.manifest.documents))
    for task in tasks:
        mine = [pair.prompt for pair in found if pair.skill == task]
        assert len(set(mine)) == len(mine) == 12
        assert not [prompt for prompt in mine if f"{prompt}\n" in text or f"{prompt}<" in text]
    how = skills.mixture_of(config.data.skills)
    assert sum(skills.pair(7, index, how).prompt in text for index in range(50)) > 30, "this is how a question looks that was"


def test_questions_look_as_the_run_has_seen_them() -> None:
    tokenizer, pair = bytes_tokenizer(), skills.pair(1, 2)
    (one,) = asked([pair], tokenizer, None)
    assert one.ids[0] == tokenizer.end_id and tokenizer.decode(one.ids[1:]) == pair.text.removesuffix(f" {pair.answer}\n")
    assert one.length == len(f" {pair.answer}\n")


def test_answers_together_are_the_answers_alone() -> None:
    """Greedy, of any length, each up to its own end."""
    model, tokenizer = build({**LLAMA, "vocab": 257}), bytes_tokenizer()
    group = [Asked(skills.pair(0, at), drawn(model, size, seed=at), 6) for at, size in enumerate((4, 30, 1, 11, 17))]
    settings: dict[str, Any] = {"window": 24, "ends": {256}, "stops": ("\n", "e")}
    together = answer(model, tokenizer, group, **settings)
    assert together == [answer(model, tokenizer, [one], **settings)[0] for one in group] and any(together)


def test_right_answers_count(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def know(model: Any, tokenizer: Any, group: list[Asked], **_: Any) -> list[str]:
        return [f" {one.pair.answer}" if one.pair.skill != "add" else "no idea" for one in group]

    monkeypatch.setattr(exam, "answer", know)
    assert cli.run(["eval", str(run), "--no-text", "--skills", "7", "--tasks", "copy,add,reverse"]) == 0
    shown = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in shown if line and line.split()[0] in ("copy", "add", "reverse", "all")}
    assert rows["copy"][1:5] == ["7", "/", "7", "100.0"] and rows["add"][1:5] == ["0", "/", "7", "0.0"] and rows["all"][1] == "14"
    assert "not measured" in "\n".join(shown)


def test_a_table_without_figures() -> None:
    text = {"targets": 9, "batches": 1, "of_batches": 1, "source": "x", "loss": 800.0, "perplexity": None, "bits_per_byte": None}
    assert len(table({"checkpoint": "c", "text": text, "skills": None})) == 3


# --- refused ---------------------------------------------------------------------------------------------------------------------


def doctored(run: Path, home: Path, **data: Any) -> Path:
    """The checkpoint, said to be of a run with other data."""
    folder = home / "checkpoints" / "step-00000008"
    shutil.copytree(open_checkpoint(run).path, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["config"]["data"] |= {"dir": str(home / "data"), **data}
    seal(folder, manifest)
    return folder


@pytest.mark.parametrize(
    ("data", "words", "code", "told"),
    [
        ({}, ["--tasks", "copy,cpoy"], 2, "there is no such task"),
        ({}, ["--no-text", "--skills", "0"], 2, "there is nothing to measure"),
        ({}, ["--no-text", "--data", "x.txt"], 2, "--no-text leaves no text"),
        ({}, ["--data", "/nowhere/x.txt"], 2, "/nowhere/x.txt"),
        ({}, ["--batches", "1", "--skills", "0", "--out", "/nowhere/x.json"], 7, "the result cannot be written"),
        ({}, ["--template", "chatml", "--no-text", "--skills", "1"], 2, "does not have the tokens of the chat template"),
        ({"validation": 0.0}, ["--skills", "0"], 3, "nothing is held out"),
        ({"tokenizer": {"kind": "bpe", "vocab": 257}}, ["--skills", "0"], 2, "the text has other tokens than the model"),
        ({"source": "/nowhere/gone.txt"}, ["--skills", "0"], 2, "/nowhere/gone.txt"),
    ],
)
def test_what_is_refused(
    run: Path, tmp_path: Path, data: dict[str, Any], words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = doctored(run, tmp_path, **data) if data else run
    assert cli.run(["eval", str(where), *words]) == code
    found = capsys.readouterr().err
    well_made(found)
    assert told in found


# --- what lm-eval asks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(build({**LLAMA, "vocab": 257}), bytes_tokenizer(), window=16, batch=3)


def direct(scorer: Scorer, given: list[int], wanted: list[int]) -> tuple[float, bool]:
    """By the whole logits of one sequence."""
    logits = forward(scorer.model, given + wanted[:-1])[len(given) - 1 :].log_softmax(-1)
    return float(logits.gather(1, torch.tensor(wanted)[:, None]).sum()), logits.argmax(-1).tolist() == wanted


def test_likelihoods_are_the_models(scorer: Scorer) -> None:
    """Blanks move to what follows, an empty context is the end of a document, of a long one the end counts."""
    end = scorer.tokenizer.end_id
    pairs = [("the cat", " sat"), ("", "abc"), ("a ", "b"), ("a context of more than", " one window"), ("x", ""), ("q", "wide")]
    found = scorer.likelihoods(pairs)
    cases = [(list(b"the cat"), list(b" sat")), ([end], list(b"abc")), (list(b"a"), list(b" b")), (list(b"e than"), list(b" one window"))]
    for (value, greedy), (given, wanted) in zip([*found[:4]], cases, strict=True):
        expected = direct(scorer, given, wanted)
        assert abs(value - expected[0]) < 1e-9 and greedy == expected[1]
    assert found[4] == (0.0, True)
    likely = list(follow(scorer.model, list(b"q"), count=3, choice=Choice(temperature=0.0), window=16))
    text = scorer.tokenizer.decode(likely)
    if scorer.tokenizer.encode(text) == likely:
        assert scorer.likelihoods([("q", text)])[0][1]


def test_a_continuation_longer_than_the_window_is_predicted_token_by_token_once(scorer: Scorer) -> None:
    end, text = scorer.tokenizer.end_id, "a text of exactly forty-one bytes, or so."
    ids = [end, *scorer.tokenizer.encode(text)]
    expected = direct(scorer, ids[:1], ids[1:17])[0] + direct(scorer, ids[16:17], ids[17:33])[0]
    expected += direct(scorer, ids[len(ids) - 17 : 33], ids[33:])[0]
    (found,) = scorer.rolling([text])
    assert abs(found - expected) < 1e-9
    short = direct(scorer, [end], list(b"short"))[0]
    assert scorer.rolling([text, "short", ""]) == pytest.approx([expected, short, 0.0], abs=1e-9)
    assert scorer.likelihoods([("", text)])[0][0] == pytest.approx(expected, abs=1e-9)


def test_windows_are_those_of_lm_eval(scorer: Scorer) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for size in (1, 15, 16, 17, 33, 50):
        ids = list(range(100, 100 + size))
        windows = utils.get_rolling_token_windows(token_list=ids, prefix_token=256, max_seq_len=16, context_len=1)
        expected = [utils.make_disjoint_window(window) for window in windows]
        found = [(piece.given, piece.wanted) for piece in scorer._pieces([256], ids)]
        assert found == [(list(given), list(wanted)) for given, wanted in expected]


def test_text_goes_on_until(scorer: Scorer) -> None:
    greedy = list(follow(scorer.model, list(b"once"), count=12, choice=Choice(temperature=0.0), window=16))
    text = scorer.tokenizer.decode(greedy)
    stop = text[3:5]
    settings = {"until": [stop, "\n\n"], "max_gen_toks": 12, "do_sample": False}
    found = scorer.until([("once", settings), ("twice", {"max_gen_toks": 3}), ("once", settings), ("", {"until": "x", "max_gen_toks": 2})])
    assert found[0] == found[2] == text[: text.index(stop)] and len(found) == 4
    warm = [scorer.until([("once", {"temperature": 2.0, "max_gen_toks": 12, "seed": seed})])[0] for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_an_answer_is_as_long_as_the_task_says(scorer: Scorer) -> None:
    """Under each of the names that lm-eval knows; one that leaves no room for its question is refused, as there."""
    (three,) = scorer.until([("once", {"max_gen_toks": 3})])
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert scorer.until([("once", {name: 3, "max_gen_toks": None})]) == [three], name
    assert scorer.until([("once", {"max_gen_toks": 3, "max_new_tokens": 9})]) == [three]
    assert scorer.until([("a question", {})]) == scorer.until([("question", {"max_gen_toks": 8})]), "half the window is for the question"
    for length in (16, 0):
        with pytest.raises(UsageError, match="no room for a question"):
            scorer.until([("once", {"max_gen_toks": length})])


def test_special_tokens_end_answers_and_have_no_text(scorer: Scorer) -> None:
    """As lm-eval's own model decodes them: left out; where an answer ends by its template, or the task names them, it ends."""
    settings = {"max_gen_toks": 12}
    greedy = list(follow(scorer.model, list(b"once"), count=12, choice=Choice(temperature=0.0), window=16))
    tokenizer, mark = bytes_tokenizer(), greedy[4]
    name = str(tokenizer.inner.id_to_token(mark))
    tokenizer.inner.add_special_tokens([name])
    first = greedy.index(mark)
    kept = tokenizer.decode([token for token in greedy if token != mark])
    shown = Scorer(scorer.model, tokenizer, window=16)
    assert shown.until([("once", settings)]) == [kept] and first < 11
    assert shown.until([("once", {**settings, "until": [name]})]) == [tokenizer.decode(greedy[:first])]
    assert Scorer(scorer.model, tokenizer, window=16, ends=[mark]).until([("once", settings)]) == [tokenizer.decode(greedy[:first])]


def test_a_continuation_that_makes_one_token_with_its_context_counts() -> None:
    """Not as nothing, which would be certain."""
    tokenizer = train_bpe(["ab " * 50], vocab=258)
    assert len(tokenizer.encode("ab")) == 1
    found = Scorer(build({**LLAMA, "vocab": 258}), tokenizer, window=16)
    expected = direct(found, tokenizer.encode("a"), tokenizer.encode("b"))
    assert found.likelihoods([("a", "b")])[0] == (pytest.approx(expected[0], abs=1e-9), expected[1])


def test_a_conversation_is_a_context() -> None:
    """It stands for the tokens that the template gives; what is said in it stays letters, and a part of it is refused."""
    template = load_template("chatml", end="<|endoftext|>")
    tokenizer = template.fit(train_bpe(["Hello there. " * 50], vocab=280))
    found = Scorer(build({**LLAMA, "vocab": 320}), tokenizer, window=120, template=template)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello <|im_end|>"}]
    text, ids = found.chat(messages), template.prompt(messages, tokenizer)
    assert text.endswith("<|im_start|>assistant\n") and ids.count(tokenizer.special["<|im_end|>"]) == 2
    expected = direct(found, ids[:-1], tokenizer.encode("\nthere"))
    assert ids[-1:] == tokenizer.encode("\n")
    assert found.likelihoods([(text, "there")])[0] == (pytest.approx(expected[0], abs=1e-9), expected[1])
    writer = Writer(found.model, [ids], count=8, choice=Choice(temperature=0), window=120, ends=found.ends)
    silent = {*found.ends, *tokenizer.special.values()}
    assert found.until([(text, {"max_gen_toks": 8})]) == texts_of(writer, tokenizer, lines=1, silent=silent)
    begun = found.chat([*messages, {"role": "assistant", "content": "the"}], answer=False)
    assert begun == text + "the" and found.tokens(begun, "re") == ([*ids, *tokenizer.encode("the")], tokenizer.encode("re"))
    with pytest.raises(UsageError, match="not what the chat template gave"):
        found.likelihoods([(text.rstrip(), "there")])


def test_the_adapter_answers_instances(scorer: Scorer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a base class in the place of lm-eval's, which need not be installed."""

    class LM:
        def __init__(self) -> None:
            self.ready = True

    module = types.ModuleType("lm_eval.api.model")
    module.LM = LM  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    model = lm_eval_class()(scorer)

    def ask(*arguments: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(args=arguments)

    assert isinstance(model, LM) and model.ready and model.tokenizer_name == scorer.tokenizer.hash
    assert model.loglikelihood([ask("a", "b"), ask("c", "d")]) == scorer.likelihoods([("a", "b"), ("c", "d")])
    assert model.loglikelihood_rolling([ask("abc")]) == scorer.rolling(["abc"])
    assert model.generate_until([ask("a", {"max_gen_toks": 2})]) == scorer.until([("a", {"max_gen_toks": 2})])
    monkeypatch.setattr("dist_llm.use.lm_eval_adapter.ends_of_answers", lambda opened: (7,))
    monkeypatch.setattr("dist_llm.use.lm_eval_adapter.kept_ends", lambda opened, tokenizer: (9,))
    talking = lm_eval_model(run, dtype="float32")
    held = talking.scorer
    assert talking.chat_template() == "" and not held.talks and talking.chat_template(True) == held.template.text and held.talks
    assert talking.apply_chat_template([{"role": "user", "content": "Hi"}]) in held.rendered
    assert held.window == 64 and held.ends == {held.tokenizer.end_id, 7, 9}


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="lm-eval is not installed") as caught:
        lm_eval_class()
    assert "dist-llm[eval]" in str(caught.value.expected)
