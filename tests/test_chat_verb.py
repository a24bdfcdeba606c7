"""`chat`: turns over one cache, templates, commands, a full context, interrupts; on a terminal, through a pipe, over ranks."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.cli import main as cli
from dist_llm.config.schema import ModelConfig
from dist_llm.data.template_files import load_template
from dist_llm.data.tokenizer import bytes_tokenizer
from dist_llm.infer.answer import Answers
from dist_llm.infer.choose import Choice
from dist_llm.infer.model import Model
from dist_llm.infer.write import follow
from dist_llm.use.conversation import Conversation, TooLong
from tests.commands import Commands
from tests.test_infer import GPT2, LATER, LLAMA, Initial, build, drawn
from tests.told import well_made


class Stdin:
    """Lines that come through a pipe."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return False


@pytest.fixture
def talk(small_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Says some bytes to `chat` in this process: (stdout, stderr)."""

    def say(content: str | bytes, *words: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", Stdin(content.encode() if isinstance(content, str) else content))
        assert cli.run(["chat", str(small_run), *words]) == code
        return tuple(capsys.readouterr())

    return say


def as_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- the cache over turns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [LLAMA, GPT2, LATER], ids=["llama", "gpt2", "gemma3"])
def test_turns_over_one_cache_are_turns_read_anew(given: dict[str, Any]) -> None:
    """Only what is new is computed, whatever changes in the middle or is cut short; the tokens are the same."""
    model, choice = build(given), Choice(temperature=1.1, seed=4)
    answers, ids = Answers(model, window=24), drawn(model, 3)
    for turn in range(3):
        before = answers.computed
        made = list(answers.go_on(ids, count=3, choice=replace(choice, seed=turn), ends=()))
        assert made == list(follow(model, ids, count=3, choice=replace(choice, seed=turn), window=24))
        assert answers.computed - before == (3 + 2 if turn == 0 else 1 + 1 + 2)  # the last token made was not read yet
        ids = [*ids, *made, *drawn(model, 1, seed=turn)]
    changed = [*ids[:7], (ids[7] + 1) % model.config.vocab, *ids[8:]]
    before = answers.computed
    assert list(answers.go_on(changed, count=2, choice=choice, ends=())) == list(follow(model, changed, count=2, choice=choice, window=24))
    assert answers.computed - before == len(changed) - 7 + 1
    running = answers.go_on(ids, count=6, choice=choice, ends=())
    first = [next(running), next(running)]
    running.close()  # as an exception would
    again = list(answers.go_on(ids, count=6, choice=choice, ends=()))
    assert again[:2] == first and again == list(follow(model, ids, count=6, choice=choice, window=24))
    stopped = list(answers.go_on(ids, count=6, choice=choice, ends=(), going=iter([True, False]).__next__))
    assert stopped == again[:2]
    assert len(list(answers.go_on(ids, count=99, choice=choice, ends=()))) == 24 - len(ids)


# --- conversations -------------------------------------------------------------------------------------------------------------


def test_the_oldest_turns_go_and_the_system_stays() -> None:
    tokenizer = bytes_tokenizer()
    conversation = Conversation(load_template("plain", end=tokenizer.end), tokenizer, window=80, reserve=8, system="be")
    for turn in range(4):
        ids = conversation.ask(f"say {turn}")
        assert len(ids) <= 72 and tokenizer.decode(ids).startswith("System:\nbe\n") and tokenizer.decode(ids).endswith("Assistant:\n")
        conversation.answered("well")
    assert [message["content"] for message in conversation.messages[::2]] == ["say 2", "say 3"] and conversation.dropped == 2
    held = list(conversation.messages)
    with pytest.raises(TooLong):
        conversation.ask("x" * 90)
    assert conversation.messages == held and conversation.dropped == 2
    conversation.reset()
    assert conversation.messages == [] and conversation.dropped == 0


# --- the command ---------------------------------------------------------------------------------------------------------------


def test_a_line_is_a_turn(talk: Any, tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    text = f"hi\n\n/help\n/system s\nyou\n/reset\n//x\n/save {saved}\n/save {saved}\n/save\n/save /nowhere/x\n/nothing\n/quit\nnever\n"
    out, err = talk(text, "--tokens", "5", "--seed", "3")
    assert out.endswith("\n") and "> " not in err
    for word in ("/save FILE", "system's message is set", "the conversation is forgotten", f"saved {saved}", f"{saved} cannot be written"):
        assert word in err
    assert "a file is needed" in err and "/nowhere/x cannot be written" in err and "there is no command /nothing" in err
    (messages,) = [json.loads(line)["messages"] for line in saved.read_text().splitlines()]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"] and messages[1]["content"] == "/x"


def test_json_for_scripts(talk: Any) -> None:
    """A line of JSON a turn; the same seed says the same; what was read stays read."""
    words = ("--json", "--tokens", "6", "--temperature", "1.2", "--seed", "8", "--template", "plain")
    first, *turns = as_lines(talk("ab\ncd\n/foo\n" + "e" * 90 + "\nf\n", *words)[0])
    assert first["version"] == 1 and first["template"] == "plain" and first["step"] == 6 and first["device"] == "cpu"
    answers = [turn for turn in turns if "turn" in turn]
    notes = [turn["note"] for turn in turns if "note" in turn]
    assert [turn["user"] for turn in answers] == ["ab", "cd", "f"] and [turn["turn"] for turn in answers] == [1, 2, 3]
    assert any("no command /foo" in note for note in notes) and any("too long" in note and "not said" in note for note in notes)
    assert all(turn["finish"] in ("stop", "length", "window") for turn in answers)
    one = answers[0]
    prompt = len(b"User:\nab\nAssistant:\n")
    assert one["read"] == prompt + len(one["tokens"]) - 1 and answers[1]["dropped"] == 0
    # the first turn's answer is closed by the end token, which was read if it was made
    assert answers[1]["read"] <= len(b"xx\nUser:\ncd\nAssistant:\n") + len(answers[1]["tokens"])
    again = as_lines(talk("ab\ncd\nf\n", *words)[0])
    assert [turn["tokens"] for turn in again[1:3]] == [turn["tokens"] for turn in answers[:2]]


def test_a_full_context_is_said(talk: Any) -> None:
    out, err = talk("one question\ntwo questions\n" + "y" * 60 + "\n", "--tokens", "9")
    assert "the context is full: the oldest turn was dropped" in err
    assert "the message is too long, 78 tokens with the template; expected at most 55 tokens of 64: it was not said" in err


def test_nothing_commands_the_terminal(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what the model says nor what is said back to the user of his own line."""
    escape = list(b"ok\x1b[2J\x1b]0;title\x07\r\x9b done")
    monkeypatch.setattr("dist_llm.infer.answer.Answers.go_on", lambda self, ids, **_: iter(escape))
    out, err = talk("hello\n/save \x1b[31mx/y\n/\x1b[2J\n")
    assert "ok?[2J?]0;title??" in out and not {"\x1b", "\x07", "\r", "\x9b"} & set(out + err)


def test_lines_that_are_no_text(talk: Any) -> None:
    out, err = talk(b"fine\n\xff\xfe\n" + b"z" * (1 << 20) + b"zz\nlast", "--tokens", "2", "--json")
    lines = as_lines(out)
    assert [line["user"] for line in lines if "turn" in line] == ["fine", "last"]
    notes = [line["note"] for line in lines if "note" in line]
    assert notes[:2] == ["the line is not UTF-8: it was not said", "the line is too long: it was not said"]


def test_stop_strings_of_answers(talk: Any) -> None:
    words = ("--json", "--tokens", "30", "--temperature", "1.5", "--seed", "2")
    text = as_lines(talk("abc\n", *words)[0])[1]["text"]
    stop = text[3:5]
    cut = as_lines(talk("abc\n", *words, "--stop", stop)[0])[1]
    assert cut["text"] == text[: text.index(stop)] and cut["finish"] == "stop"


def test_ranks_answer_as_one_process(commands: Commands, small_run: Path, tmp_path: Path) -> None:
    given = tmp_path / "stdin"
    given.write_text("hello\n/system be good\nand now\nq\n")
    words = ["chat", str(small_run), "--json", "--tokens", "8", "--dtype", "float64", "--seed", "5"]
    one, two = (commands.run(*words, "--nproc", n, stdin=given) for n in ("1", "2"))
    assert one.returncode == two.returncode == 0 and one.stderr == two.stderr and "plain is used" in two.stderr, two.stderr
    assert as_lines(two.stdout)[1:] == as_lines(one.stdout)[1:]
    assert (as_lines(one.stdout)[0]["ranks"], as_lines(two.stdout)[0]["ranks"]) == (1, 2)


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_an_interrupt_stops_the_answer_alone(commands: Commands, small_run: Path, tmp_path: Path, nproc: str) -> None:
    """The answer would be very long; after the signal the next line is answered, and the end of the pipe ends it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    words = ("--json", "--tokens", "1000000", "--temperature", "0", "--nproc", nproc)
    job = commands.start("chat", str(slow(small_run, tmp_path)), *words, stdin=pipe)
    with pipe.open("w", buffering=1) as lines:  # the likeliest token of so young a model is never the end
        lines.write("hello\n")
        wait_for(lambda: '"ready' in job.err.read_text() or '"version"' in job.out.read_text())
        time.sleep(0.4)
        job.send(signal.SIGINT)
        wait_for(lambda: '"turn": 1' in job.out.read_text())
        lines.write("/help\n")
    done = job.wait()
    first = as_lines(done.stdout)[1]
    assert done.returncode == 0 and first["finish"] == "interrupted" and first["tokens"] and '"note": "/reset' in done.stdout
    assert job.left() == []


def slow(run: Path, home: Path) -> Path:
    """The same model, said to see a long text: an answer that takes minutes."""
    import shutil

    from tests.small_checkpoints import seal

    folder = home / "checkpoints" / "step-00000006"
    shutil.copytree(next((run / "checkpoints").glob("step-*")), folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["config"]["data"]["sequence"] = 100_000
    seal(folder, manifest)
    return folder


def wait_for(what: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_on_a_terminal(commands: Commands, small_run: Path, tmp_path: Path) -> None:
    """Ctrl-C stops an answer, at the prompt it ends nothing, Ctrl-D ends."""
    ours, theirs = pty.openpty()
    job = commands.start("chat", str(slow(small_run, tmp_path)), "--tokens", "1000000", stdin=os.ttyname(theirs))
    wait_for(lambda: "> " in job.out.read_text())
    os.write(ours, b"hello\n")
    wait_for(lambda: len(job.out.read_text()) > 6)
    os.write(ours, b"\x03")
    wait_for(lambda: job.out.read_text().count("> ") >= 2)
    os.write(ours, b"\x03")
    wait_for(lambda: "Ctrl-D or /quit ends" in job.err.read_text())
    os.write(ours, b"\x04")
    done = job.wait()
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0 and "/help says what else there is" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--template", "chatml"], "the tokenizer does not have the tokens of the chat template"),
        (["--template", "none.jinja"], "there is no chat template"),
        (["--temperature", "nan"], "--temperature"),
        (["--nproc", "3"], "cannot be split"),
    ],
)
def test_what_is_refused(talk: Any, words: list[str], told: str) -> None:
    _, err = talk("hello\n", *words, code=2)
    well_made(err)
    assert told in err


def test_a_broken_template_is_not_a_crash(talk: Any, tmp_path: Path) -> None:
    """A file whose template refuses long conversations."""
    file = tmp_path / "odd.jinja"
    refuses = "{% if messages|length > 4 %}{{ raise_exception('no more') }}{% endif %}"
    said = "{{ message.role[:1] + message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
    file.write_text(refuses + "{% for message in messages %}" + said + "{% endfor %}{% if add_generation_prompt %}a{% endif %}")
    out, err = talk("a\nb\nc\n/reset\nd\n", "--template", str(file), "--tokens", "2", "--json")
    lines = as_lines(out)
    assert [line["user"] for line in lines if "turn" in line] == ["a", "b", "d"]
    assert "the chat template refuses the conversation, no more: it was not said" in [line.get("note") for line in lines]


def test_the_cache_has_the_dtype_of_the_model() -> None:
    config = ModelConfig.model_validate(LLAMA)
    model = Model(Initial(config), config, dtype=torch.float32, device=torch.device("cpu"))
    answers = Answers(model, window=16)
    assert answers.cache.keys[0].dtype == torch.float32 and answers.cache.nbytes == 2 * 2 * 2 * 16 * 8 * 4
