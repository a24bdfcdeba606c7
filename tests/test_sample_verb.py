"""`sample` as a command: prompts, flags, ranks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_llm.cli import main as cli
from tests.commands import Commands
from tests.told import well_made


@pytest.fixture
def sampled(small_run: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The JSON of a `sample` in this process."""

    def run(*words: str) -> dict[str, Any]:
        assert cli.run(["sample", str(small_run), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_prompts_of_flags_and_files_go_on_together(sampled: Any, tmp_path: Path) -> None:
    """Each as it would alone, whatever the batch; in their order."""
    plain, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("Question: Add\nRepeat\n")
    objects.write_text('{"prompt": "two\\nlines", "other": 1}\n')
    words = ("--tokens", "12", "--dtype", "float64", "--samples", "2", "--seed", "5")
    expected = ["first", "Question: Add", "Repeat"]
    for batch in ("1", "4", "50"):
        found = sampled("--prompt", "first", "--prompts", str(plain), "--batch", batch, *words)
        assert [line["prompt"] for line in found["samples"]] == [text for text in expected for _ in range(2)]
        assert [line["sample"] for line in found["samples"]] == [0, 1] * 3
        for text in expected:
            alone = sampled("--prompt", text, *words)["samples"]
            assert alone == [line for line in found["samples"] if line["prompt"] == text]
    two = sampled("--prompts", str(objects), *words[:4])
    assert two["prompt"] == "two\nlines" and two["dtype"] == "float64" and two["finish"] in ("stop", "length") and two["step"] == 6
    assert two["text"] == two["samples"][0]["text"] and "text" not in found
    new = sampled("--tokens", "3")
    assert new["prompt"] == "" and 1 <= len(new["tokens"]) <= 3


def test_ranks_give_the_text_of_one_process(commands: Commands, small_run: Path, tmp_path: Path) -> None:
    """The same seed, the same text, on one process and on two ranks that share the model; prompts come from stdin."""
    given = tmp_path / "stdin"
    given.write_text("Question: Repeat: tas\nThe\n")
    words = ["sample", str(small_run), "--prompts", "-", "--tokens", "16", "--dtype", "float64", "--json", "--samples", "2"]
    words += ["--top-p", "0.9"]
    one, two = (json.loads(commands.run(*words, "--nproc", n, stdin=given).stdout) for n in ("1", "2"))
    assert one["samples"] == two["samples"] and (one["ranks"], two["ranks"]) == (1, 2) and len(one["samples"]) == 4
    shown = commands.run("sample", str(small_run), "--prompt", "Question: ", "--tokens", "8", "--nproc", "2", "--seed", "3")
    assert shown.returncode == 0 and shown.stderr == "" and shown.stdout.startswith("Question: ") and len(shown.stdout) > 12
    assert shown.stdout == commands.run("sample", str(small_run), "--prompt", "Question: ", "--tokens", "8", "--seed", "3").stdout


def test_a_text_ends_before_a_stop_string_and_at_a_stop_token(sampled: Any) -> None:
    words = ("--prompt", "Question: ", "--tokens", "40", "--seed", "2", "--temperature", "1.5")
    whole = sampled(*words)
    text = whole["text"]
    stop = text[10:13]
    cut = sampled(*words, "--stop", stop, "--stop", "never there")
    assert cut["text"] == text[: text.index(stop)] and cut["finish"] == "stop" and stop not in cut["text"]
    token = whole["tokens"][7]
    ended = sampled(*words, "--stop-token", str(token))
    first = whole["tokens"].index(token)
    assert ended["tokens"] == whole["tokens"][: first + 1] and ended["finish"] == "stop"
    greedy = [sampled("--prompt", "a", "--tokens", "30", "--temperature", "0", *more) for more in ((), ("--seed", "9"), ("--min-p", "1"))]
    assert greedy[0]["tokens"] == greedy[1]["tokens"] == greedy[2]["tokens"]
    assert sampled("--prompt", "a", "--tokens", "30", "--temperature", "0", "--repetition-penalty", "2")["tokens"] != greedy[0]["tokens"]


def test_a_text_ends_where_its_generation_config_says(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `generate` of transformers would; what is no token of the tokenizer counts for nothing."""
    folder, again = tmp_path / "folder", tmp_path / "again"
    assert cli.run(["export", str(small_run), str(folder)]) == 0
    words = ["--prompt", "Question: ", "--tokens", "40", "--seed", "2", "--temperature", "1.5", "--json"]

    def tokens(run: Path) -> list[int]:
        capsys.readouterr()
        assert cli.run(["sample", str(run), *words]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    whole = tokens(small_run)
    end = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, whole[7], 10**6, "x", None]}))
    assert cli.run(["import", str(folder), str(again)]) == 0
    assert tokens(again) == whole[: whole.index(whole[7]) + 1]


def test_several_texts_are_shown_whole_and_safe(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "a\x1b[2J", "--samples", "2", "--tokens", "4"]
    assert cli.run(["sample", str(small_run), *words]) == 0
    out = capsys.readouterr().out
    assert out.count("--- prompt 1, sample ") == 2 and out.count("a?[2J") == 2 and "\x1b" not in out
    assert cli.run(["sample", str(small_run), "--prompt", "x" * 100, "--tokens", "2"]) == 0
    assert "note: prompt 1 has 100 tokens; the model sees the last 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "above 0, at most 1"),
        (["--min-p", "1.5", "--repetition-penalty", "0"], "2 flags are out of their range"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompts", "none.txt"], "there is no file of prompts"),
        (["--stop", ""], "a stop string is empty"),
        (["--stop-token", "<|nothing|>"], "no such token"),
        (["--stop-token", "99999"], "no such token"),
        (["--dtype", "float16"], "bfloat16"),
        (["--device", "tpu"], "auto, cpu, cuda"),
        (["--nproc", "3"], "4 heads and 2 kv heads over 3 ranks"),
        (["--prompt", "\udcff"], "not UTF-8"),
    ],
)
def test_what_is_refused(small_run: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["sample", str(small_run), *words]) == 2
    found = capsys.readouterr().err
    well_made(found)
    assert told in found


def test_bad_files_of_prompts(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "fine"}\n{"prompt": 3}\n{"text": "x"}\nno json\n{"prompt": ""}\n\xff\n{"prompt": "\\ud800"}\n')
    assert cli.run(["sample", str(small_run), "--prompts", str(file)]) in (2, 3)
    file.write_bytes(b'{"prompt": "fine"}\n{"prompt": 3}\n{"text": "x"}\nno json\n{"prompt": ""}\n\xff\n[]\n')
    capsys.readouterr()
    assert cli.run(["sample", str(small_run), "--prompts", str(file)]) == 3
    found = capsys.readouterr().err
    well_made(found)
    assert all(f"prompts.jsonl:{number}: " in found for number in (2, 3, 4, 5, 6, 7)) and "prompts.jsonl:1:" not in found
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert cli.run(["sample", str(small_run), "--prompts", str(empty)]) == 3


def test_a_tokenizer_of_another_model_is_refused(small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint whose tokenizer has more tokens than its model (F24), with true hashes."""
    import shutil

    from dist_llm.data.tokenizer import train_bpe
    from tests.small_checkpoints import reseal

    folder = tmp_path / "checkpoints" / "step-00000006"
    shutil.copytree(next((small_run / "checkpoints").glob("step-*")), folder)
    files = train_bpe(["some words of a text " * 50], vocab=300).extended([f"<|more{number}|>" for number in range(40)]).files
    reseal(folder, files)
    for verb in ("sample", "chat", "eval"):
        assert cli.run([verb, str(folder)]) == 2
        found = capsys.readouterr().err
        well_made(found)
        assert "the tokenizer has more tokens than the model" in found
