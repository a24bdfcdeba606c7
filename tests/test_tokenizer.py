"""Tokenizers: bytes, trained BPE, any tokenizer.json; what text may not do; the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors
from typer.testing import CliRunner

from dist_llm.cli.tokenizer import app
from dist_llm.data import skills
from dist_llm.data.tokenizer import END, Tokenizer, bytes_tokenizer, load, report, train_bpe
from dist_llm.errors import DataError, UsageError

TEXTS = [skills.pair(1, index).text for index in range(400)]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS, vocab=400)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = bytes_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)
    for text in ("plain", "grün ☃ 𝄞", "".join(map(chr, range(0x250))), "a\nb\t\x00c", "<|endoftext|>", ""):
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_and_never_holds_the_end(text: str, bpe: Tokenizer) -> None:
    for tokenizer in (bpe, bytes_tokenizer()):
        for given_text in (text, text + END + text):
            ids = tokenizer.encode(given_text)
            assert tokenizer.end_id not in ids and tokenizer.decode(ids) == given_text
            assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_a_batch_is_the_same_as_one_by_one(bpe: Tokenizer) -> None:
    texts = [*TEXTS[:50], "", END]
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]
    assert bpe.encode_batch([]) == []
    assert "".join(bpe.pieces(bpe.encode(TEXTS[0]))) == TEXTS[0]


def test_the_same_texts_give_the_same_bpe_whatever_the_threads(bpe: Tokenizer) -> None:
    assert bpe.vocab_size == 400 and bpe.end_id == 0
    code = (
        "from dist_llm.data import skills; from dist_llm.data.tokenizer import train_bpe;"
        "print(train_bpe((skills.pair(1, i).text for i in range(400)), vocab=400).hash)"
    )
    for threads in ("1", "4"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60)
        assert found.stdout.strip() == bpe.hash
    assert train_bpe(TEXTS[:-1], vocab=400).hash != bpe.hash != bytes_tokenizer().hash


def test_small_texts_give_small_vocabularies() -> None:
    assert train_bpe(["abab"], vocab=5000).vocab_size < 300
    with pytest.raises(UsageError, match="too small") as caught:
        train_bpe(["abab"], vocab=256)
    assert caught.value.code == 2


def test_a_saved_tokenizer_is_the_same_one(tmp_path: Path, bpe: Tokenizer) -> None:
    for name, tokenizer in (("bpe", bpe), ("bytes", bytes_tokenizer())):
        file = tokenizer.save(tmp_path / name)
        for path in (file, file.parent):
            again = load(path)
            assert (again.hash, again.vocab_size, again.end_id) == (tokenizer.hash, tokenizer.vocab_size, tokenizer.end_id)
            assert again.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
        assert json.loads((tmp_path / name / "tokenizer_config.json").read_text()) == {"eos_token": END}


def foreign(*, end: str | None) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>"] + ([end] if end else []))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    inner.enable_truncation(2)
    inner.enable_padding(length=9)
    return inner


def test_any_tokenizer_json_without_its_additions(tmp_path: Path) -> None:
    foreign(end="</s>").save(str(tmp_path / "tokenizer.json"))
    tokenizer = load(tmp_path)
    assert (tokenizer.end, tokenizer.end_id, tokenizer.vocab_size) == ("</s>", 4, 5)
    assert tokenizer.encode("hello world hello") == [1, 2, 1], "no start token, not cut, not padded"
    foreign(end="[STOP]").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UsageError, match="no token that ends"):
        load(tmp_path)
    for named in ("[STOP]", {"content": "[STOP]", "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert load(tmp_path).end_id == 4


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"version": "1.0"}', b"[" * 100_000, b'{"model": {"type": "Unknown"}}']
)
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="not a tokenizer") as caught:
        load(tmp_path)
    assert caught.value.where == str(tmp_path / "tokenizer.json")


def test_no_file_and_a_broken_neighbour(tmp_path: Path, bpe: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no tokenizer.json"):
        load(tmp_path / "nowhere")
    bpe.save(tmp_path)
    for content in (b"not json", b"[]", b'{"eos_token": 7}', b"\xff", b"[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        assert load(tmp_path).hash == bpe.hash


def test_the_report_counts_right(bpe: Tokenizer) -> None:
    found = report(bytes_tokenizer(), ["ab ab", "grün"])
    assert (found["bytes"], found["tokens"], found["texts"], found["roundtrip"]) == (10, 10, 2, 2)
    assert found["bytes_per_token"] == 1.0 and found["tokens_per_word"] == 10 / 3 and found["used_vocab"] == 8 / 257
    assert found["examples"][0] == ["a", "b", " ", "a", "b"]
    better = report(bpe, TEXTS)
    assert better["bytes_per_token"] > 1.5 and better["roundtrip"] == len(TEXTS) and 0.3 < better["used_vocab"] <= 1
    assert report(bpe, [])["tokens"] == 0


def test_the_commands(tmp_path: Path) -> None:
    run, out = CliRunner(), tmp_path / "tok"
    made = run.invoke(app, ["train", "skills", "--vocab", "300", "--out", str(out), "--megabytes", "0.05", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["vocab"] == 300 == load(out).vocab_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tok"], "nothing is left beside it"
    shown = run.invoke(app, ["report", str(out), "--source", "skills", "--megabytes", "0.02"])
    assert shown.exit_code == 0 and "bytes per token" in shown.stdout and "Question" in shown.stdout.replace("|", "")
    data = run.invoke(app, ["report", "bytes", "--source", "skills", "--megabytes", "0.02", "--json"])
    assert json.loads(data.stdout)["bytes_per_token"] == 1.0
    refused = run.invoke(app, ["train", "skills", "--out", str(out)])
    assert isinstance(refused.exception, UsageError)
