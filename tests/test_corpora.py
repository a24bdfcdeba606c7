"""Corpora: strict reading of files, the corpus of the installed Python, the generators with known truth, and mixtures."""

from __future__ import annotations

import ast
import gzip
import itertools
import json
import math
import string
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.schema import SkillsConfig, SkillTask
from dist_llm.data import python_corpus, readers, skills
from dist_llm.data.build import sample
from dist_llm.data.corpora import limited, open_corpus
from dist_llm.data.duplicates import Duplicates
from dist_llm.data.entropy import LETTERS, MarkovSource, entropy_rate
from dist_llm.data.mixture import LONGEST, pattern, whole_weights
from dist_llm.data.readers import BadLines, Document
from dist_llm.errors import DataError, UsageError, render


def read(path: Path | str, *, text_key: str = "text", allowed: int = 0) -> list[str]:
    bad = BadLines(allowed)
    return [document.text for document in open_corpus(str(path), seed=0, text_key=text_key, bad=bad).documents()]


def line(text: str, **more: object) -> bytes:
    return json.dumps({"text": text, **more}).encode() + b"\n"


# ---------------------------------------------------------------- JSON lines (F19)

GOOD = line("one")
BAD_LINES = {
    "bad JSON": (b"{'text': 'no'}\n", "not JSON"),
    "byte order mark": (b"\xef\xbb\xbf" + GOOD, "byte order mark"),
    "CRLF": (GOOD[:-1] + b"\r\n", "CRLF"),
    "not UTF-8": (b'{"text": "caf\xe9 noir"}\n', "not UTF-8 (byte 0xe9"),
    "NUL byte": (b'{"text": "a\x00b"}\n', "NUL"),
    "NUL escape": (b'{"text": "a\\u0000b"}\n', "NUL"),
    "half a pair": (b'{"text": "\\ud800"}\n', "surrogate"),
    "missing key": (b'{"body": "x", "id": 3}\n', "no key 'text' (it has body, id)"),
    "wrong type": (b'{"text": 7}\n', "must be a string, found a number"),
    "null": (b'{"text": null}\n', "found null"),
    "not an object": (b'["text"]\n', "expected an object, found an array"),
    "10 MB line": (line("x" * 10_000_000), "longer than 8 MiB"),
    "deep nesting": (b'{"text": "x", "deep": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", "nested deeper than 64"),
    "deep and never closed": (b'{"text": ' + b'{"a":' * 100_000 + b"\n", "nested deeper than 64"),
    "not a number": (b'{"text": "x", "loss": NaN}\n', "NaN"),
    "huge number": (b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n", "not JSON"),
    "two values": (b'{"text": "x"} {"text": "y"}\n', "Extra data"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_told_with_file_line_and_excerpt(tmp_path: Path, name: str) -> None:
    broken, why = BAD_LINES[name]
    number = 1 if name == "byte order mark" else 3
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD * (number - 1) + broken + GOOD)
    with pytest.raises(DataError) as caught:
        read(file)
    assert caught.value.code == 3
    assert caught.value.where == f"{file}:{number}"
    assert len(caught.value.details) == 1 and why in caught.value.details[0]
    shown = render(caught.value)
    assert len(shown.splitlines()) <= 12 and shown.isprintable() is False and all(one.isprintable() for one in shown.splitlines())
    assert read(file, allowed=1) == ["one"] * number


def test_the_last_line_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    whole = GOOD + '{"text": "grün und gut"}\n'.encode()
    for cut in range(len(GOOD) + 1, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="1 line cannot be read") as caught:
            read(file)
        assert "cut off" in caught.value.details[0], whole[:cut]
    file.write_bytes(whole[:-1])
    assert read(file) == ["one", "grün und gut"], "a missing newline alone cuts nothing"


def test_up_to_twenty_faults_at_once_and_max_bad_lines(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes((GOOD + b"nonsense\n") * 30)
    with pytest.raises(DataError) as caught:
        read(file)
    assert len(caught.value.details) == 20 and caught.value.details[1].startswith(f"{file}:4: ")
    with pytest.raises(DataError, match="30 lines cannot be read and 29 may be skipped"):
        read(file, allowed=29)
    bad = BadLines(30)
    corpus = open_corpus(str(file), seed=0, bad=bad)
    assert [len(list(corpus.documents())) for _ in range(2)] == [30, 30]
    assert bad.count == 30 and len(bad.told) == 20, "a second reading counts no line twice"


def test_an_excerpt_is_safe_for_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\x1b[31m\x07 evil \xe2\x80\xae" + b"x" * 500 + b"\n")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "data.jsonl")
    assert all(detail.isprintable() and len(detail) < 400 for detail in caught.value.details)


@settings(max_examples=120, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_text_or_a_reason(raw: bytes) -> None:
    text, why = readers.parse_line(raw, take=lambda record: readers.text_of(record, text_key="text"))
    assert isinstance(text, str) and (not why or not text)
    text.encode("utf-8")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("text"), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(JSON.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40)), max_size=5),
    st.sampled_from([b"\n", b"\r\n", b""]),
)
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    file.write_bytes(end.join(lines))
    try:
        texts = read(file)
    except DataError as failure:
        assert failure.details and all(one.isprintable() for one in render(failure).splitlines())
    else:
        assert all(text.strip() for text in texts)


# ---------------------------------------------------------------- files, folders, compression


def test_text_and_json_also_compressed(tmp_path: Path) -> None:
    content = line("first") + line("zweites") + b"\n" + line("third")
    packed = zstandard.ZstdCompressor()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.jsonl.zst").write_bytes(packed.compress(content[:20]) + packed.compress(content[20:]))
    (tmp_path / "d.txt.zst").write_bytes(packed.compress("grün\n".encode()))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert read(tmp_path / name) == ["first", "zweites", "third"], name
    assert read(tmp_path / "d.txt.zst") == ["grün\n"]
    assert read(str(tmp_path / "*.jsonl.*")) == ["first", "zweites", "third"] * 2
    assert len(read(tmp_path)) == 10


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_compression_is_refused(tmp_path: Path, suffix: str) -> None:
    content = b"".join(line(f"document {number} {number * 7919}") for number in range(200))
    packed = gzip.compress(content) if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(content)
    file = tmp_path / f"data.jsonl.{suffix}"
    for broken in (packed[:-9], packed[: len(packed) // 2], packed[:3], b"plain text", packed[:100] + b"\x00" * 30 + packed[130:]):
        file.write_bytes(broken)
        with pytest.raises(DataError) as caught:
            read(file)
        assert str(file) in str(caught.value.where)


def test_folders_are_read_sorted_and_hidden_or_unknown_files_are_not(tmp_path: Path) -> None:
    for name, text in {
        "b/2.txt": "two",
        "a/1.md": "one",
        "c.py": "three",
        ".git/x.txt": "no",
        "pic.png": "no",
        "b/.hidden.txt": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == ["one", "two", "three"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no text"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("source", ["nowhere.txt", "none/*.txt", "a\x00b", "x" * 5000, "~nobody-here/x", "[", "**x"])
def test_a_source_that_is_not_there_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        open_corpus(source, seed=0)


def test_names_of_other_programs_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of the hub without `hub:`, and Megatron's, which are named without the end of a file's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words_document.idx").touch()
    for source, way in (("owner/words", "data.source=hub:owner/words,"), ("words_document", "data.source=words_document.idx")):
        with pytest.raises(UsageError, match="does not exist") as caught:
            open_corpus(source, seed=0)
        assert way in str(caught.value.next)


def test_long_texts_are_cut_into_passages_and_separators_end_documents(tmp_path: Path) -> None:
    lines = [f"line {number} of the story\n" if number % 20 else "\n" for number in range(20_000)]
    (tmp_path / "story.txt").write_text("".join(lines))
    passages = read(tmp_path / "story.txt")
    assert "".join(passages) == "".join(lines)
    assert len(passages) > 8 and all(passage.endswith("\n\n") for passage in passages[:-1])
    (tmp_path / "wide.txt").write_text("ß" * 300_000)
    wide = read(tmp_path / "wide.txt")
    assert "".join(wide) == "ß" * 300_000 and max(map(len, wide)) <= 2 * readers.PASSAGE
    (tmp_path / "tales.txt").write_text("\ufeffonce\n<|endoftext|>\n\n<|endoftext|>\ntwice <|endoftext|> here\n")
    assert read(tmp_path / "tales.txt") == ["once\n", "twice <|endoftext|> here\n"]


@pytest.mark.parametrize(("content", "what"), [(b"good\ncaf\xe9\n", "not UTF-8"), (b"ELF\x00\x01", "NUL"), (b"cut \xe2\x82", "not UTF-8")])
def test_a_text_file_that_is_no_text(tmp_path: Path, content: bytes, what: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match=what) as caught:
        read(tmp_path / "x.txt")
    assert str(tmp_path / "x.txt:") in str(caught.value.where)


def test_places_rise_and_several_sources_follow_each_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n\n" * 50_000)
    corpus = open_corpus((str(tmp_path / "a.txt"), str(tmp_path / "b.txt"), "skills"), seed=3)
    places, texts = zip(*((document.place, document.text) for document in itertools.islice(corpus.documents(), 60)), strict=True)
    assert list(places) == sorted(places) and 0 < places[0] < places[-1] <= 1
    order = "".join(text[0] for text in texts)
    assert order == "a" * order.count("a") + "b" * order.count("b") + "Q" * order.count("Q") and order.count("Q") > 40
    assert corpus.name == "a-b-skills" and corpus.identity != open_corpus("skills", seed=3).identity


def test_a_sample_comes_from_all_over(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"".join(line(f"document {number:05d} " + "x" * 100) for number in range(2000)))
    corpus = open_corpus(str(tmp_path / "x.jsonl"), seed=0)
    numbers = [int(document.text.split()[1]) for document in sample(corpus, 20_000)]
    assert 80 < len(numbers) < 250 and numbers == sorted(numbers) and numbers[0] < 100 and numbers[-1] > 1000
    assert [document.text for document in sample(corpus, 20_000)] == [document.text for document in sample(corpus, 20_000)]
    assert len(list(sample(corpus, 10**9))) == 2000


# ---------------------------------------------------------------- the installed Python


@pytest.fixture(scope="module")
def some_python() -> list[Document]:
    items, lacking = python_corpus.inventory()
    assert not lacking and len(items) > 500
    return list(python_corpus.documents(items[:120]))


def test_the_python_corpus_is_deterministic_and_mixed(some_python: list[Document]) -> None:
    items, _ = python_corpus.inventory()
    assert list(python_corpus.documents(items[:120])) == some_python
    kinds = Counter(item.kind for item in items)
    assert kinds["source"] > 200 and kinds["docstrings"] > 200 and kinds["topics"] == 1
    assert {item.name.split(".")[0].split("/")[0] for item in items} == {"python", "numpy", "torch"}
    assert {item.name.split(".")[0].split("/")[0] for item in items[:60]} == {"python", "numpy", "torch"}, "any beginning is a fair sample"
    assert not any({"test", "tests", "idlelib"} & set(item.path.parts) for item in items if item.kind == "source")
    texts = [document.text for document in some_python]
    assert len(set(texts)) == len(texts) and all(len(text) >= 64 for text in texts)


def test_what_a_slim_python_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_corpus.importlib.util, "find_spec", lambda name: None)
    corpus = open_corpus("python", seed=0)
    assert corpus.notes == tuple(f"the python corpus goes without {name}: not installed here" for name in ("NumPy", "torch"))
    monkeypatch.setattr(python_corpus.sysconfig, "get_paths", lambda: {"stdlib": "/nowhere/python.zip"})
    with pytest.raises(DataError, match="carries no sources"):
        open_corpus("python", seed=0)


def test_docstrings_are_read_not_run() -> None:
    code = '''"""Top."""
raise SystemExit
class A:
    """An A."""
    def f(self):
        "Does f."
add_docstr(x, r"""abs(input) -> Tensor""")
'''
    assert (
        python_corpus.docstrings(ast.parse(code), "m")
        == "m\n\nTop.\n\n\nm.A\n\nAn A.\n\n\nm.A.f\n\nDoes f.\n\n\nm\n\nabs(input) -> Tensor\n"
    )
    assert python_corpus.docstrings(ast.parse("x = 1"), "m") == ""


def test_duplicates_and_near_duplicates_are_dropped_but_not_texts_with_a_common_head() -> None:
    seen = Duplicates()
    head = [f"licence line number {number}" for number in range(10)]
    first = head + [f"def function_{number}(argument):" for number in range(40)]
    assert not seen.seen("\n".join(first))
    assert seen.seen("\n".join(first)), "the same"
    assert seen.seen("\n".join([*first, "one line more of it"])), "nearly the same"
    assert seen.seen("\n".join(first[10:40])), "a part of it"
    assert not seen.seen("\n".join(head + [f"class Thing{number}(Base):" for number in range(40)])), "the head alone is common"
    assert not seen.seen("short text") and seen.seen("short text")


# ---------------------------------------------------------------- generators with known truth


def test_skills_are_pure_and_checked_by_their_own_prompt() -> None:
    pairs = [skills.pair(7, index) for index in range(2000)]
    assert pairs == [skills.pair(7, index) for index in range(2000)]
    assert pairs[:50] != [skills.pair(8, index) for index in range(50)]
    counts = Counter(pair.skill for pair in pairs)
    assert set(counts) == {skill.name for skill in skills.SKILLS} and min(counts.values()) > 100
    for pair in pairs:
        assert skills.check(pair.prompt, pair.answer) and skills.check(pair.prompt, f" {pair.answer}\n")
        assert not skills.check(pair.prompt, pair.answer + "x") and not skills.check(pair.prompt, "") and pair.answer
    assert not skills.check("Tell me a joke", "ha") and not skills.check("", "")


def another_reckoning(skill: str, argument: str) -> str:
    words = argument.split(" ")
    answers = {
        "copy": lambda: argument,
        "reverse": lambda: " ".join(reversed(words)) if len(words) > 1 else "".join(reversed(argument)),
        "upper": lambda: "".join(chr(ord(letter) - 32) if letter.isalpha() else letter for letter in argument),
        "add": lambda: str(int(words[0]) + int(words[2])),
        "subtract": lambda: str(int(words[0]) - int(words[2])),
        "count": lambda: str(sum(letter in string.ascii_lowercase for letter in argument)),
        "last": lambda: words[-1],
        "largest": lambda: max(words, key=int),
        "order": lambda: " ".join(sorted(words, key=int)),
        "series": lambda: str(2 * int(words[3]) - int(words[2])),
        "sort": lambda: " ".join(sorted(words)),
    }
    return answers[skill]()


MIXTURES = (
    skills.ALL,
    skills.Mixture(apart=True),
    skills.Mixture(("copy", "reverse", "brackets", "sort", "order", "upper"), (1, 6), apart=True),
    skills.Mixture(("brackets", "reverse", "largest", "count"), (60, 64)),
)


def test_mixtures_hold_the_tasks_and_lengths_that_are_asked_for() -> None:
    section = SkillsConfig(tasks=("add", "copy"), length=(2, 3), apart=True)
    assert skills.mixture_of(section) == skills.Mixture(("add", "copy"), (2, 3), True) and skills.mixture_of(SkillsConfig()) == skills.ALL
    assert set(get_args(SkillTask)) == {skill.name for skill in skills.SKILLS}
    assert {skills.pair(1, index, MIXTURES[2]).skill for index in range(300)} == set(MIXTURES[2].tasks)
    lengths = Counter[int]()
    for index in range(2000):
        one = skills.pair(1, index, MIXTURES[2])
        parts = one.prompt.split(": ", 1)[1].split(" ")
        assert one.skill == "order" or all(len(part) == 1 for part in parts), one
        if one.skill != "brackets":  # to those one more may be added, so that there is something to close
            lengths[len(parts)] += 1
    assert set(lengths) == {1, 2, 3, 4, 5, 6} and min(lengths.values()) > 100
    longest = [skills.pair(3, index, MIXTURES[3]).prompt for index in range(200)]
    assert all(len(set(prompt)) > 4 for prompt in longest), "there are bits enough for each of their letters"
    assert open_corpus("skills", seed=1, mixture=MIXTURES[1]).identity != open_corpus("skills", seed=1).identity


def test_a_task_that_is_named_twice_comes_twice_as_often() -> None:
    drawn = Counter(skills.pair(1, index, skills.Mixture(("brackets", "copy", "brackets"))).skill for index in range(3000))
    assert drawn.keys() == {"brackets", "copy"} and abs(drawn["brackets"] / 3000 - 2 / 3) < 0.03


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_skills_are_right_by_another_reckoning(mixture: skills.Mixture) -> None:
    for index in range(600):
        pair = skills.pair(11, index, mixture)
        assert skills.check(pair.prompt, pair.answer)
        argument = pair.prompt.split(": ", 1)[1]
        if pair.skill == "brackets":
            whole = (argument + pair.answer).replace(" ", "")
            while any(both in whole for both in ("()", "[]", "{}", "<>")):
                for both in ("()", "[]", "{}", "<>"):
                    whole = whole.replace(both, "")
            assert whole == "" and pair.answer
            assert not mixture.apart or all(len(part) == 1 for part in pair.answer.split(" "))
        else:
            assert pair.answer == another_reckoning(pair.skill, argument), pair


@settings(max_examples=120, deadline=None)
@given(st.sampled_from([skill.ask for skill in skills.SKILLS]), st.text(max_size=30), st.text(max_size=10))
def test_check_never_fails_on_what_a_model_may_say(ask: str, argument: str, answer: str) -> None:
    assert skills.check(f"{ask}: {argument}", answer) in (True, False)


def test_the_entropy_rate_is_that_of_the_text() -> None:
    source = MarkovSource(5)
    size = source.alphabet + 1
    assert source.weights.sum(axis=1).tolist() == [65536] * size and source.weights[-1, -1] == 0
    assert np.allclose(source.stationary @ source.weights / 65536, source.stationary, atol=1e-14)
    assert math.isclose(source.stationary.sum(), 1.0, abs_tol=1e-12) and source.rate == entropy_rate(5) != entropy_rate(6)
    states = [number for index in range(400) for number in (*map(LETTERS.index, source.document(index)), source.alphabet)]
    counts = np.zeros((size, size))
    np.add.at(counts, (np.array([source.alphabet, *states[:-1]]), np.array(states)), 1)
    chance = source.weights / 65536
    surprise = -(counts[counts > 0] * np.log(chance[counts > 0])).sum() / counts.sum()
    assert abs(surprise - source.rate) < 0.01, "what a perfect model would lose on this very text"
    assert np.abs(counts.sum(axis=0) / counts.sum() - source.stationary).max() < 0.003
    unigram = -(source.stationary * np.log(source.stationary)).sum()
    assert source.rate < unigram < math.log(size)
    fitted = counts / counts.sum(axis=1, keepdims=True)
    bigram = -(counts[counts > 0] * np.log(fitted[counts > 0])).sum() / counts.sum()
    assert bigram <= surprise and surprise - bigram < 0.01


def test_entropy_documents_are_pure_and_not_empty() -> None:
    one, other = MarkovSource(3), MarkovSource(3)
    texts = [one.document(index) for index in range(100)]
    assert texts == [other.document(index) for index in reversed(range(100))][::-1] and all(texts)
    assert texts[0] != MarkovSource(4).document(0) and 500 < np.mean([len(text) for text in texts]) < 2000
    assert all(weight > 0 for weight in MarkovSource(3, alphabet=62).weights[:-1, :-1].ravel())
    corpus = open_corpus("entropy", seed=3)
    documents = list(limited(corpus.documents(), 5000))
    assert corpus.endless and [document.text for document in documents] == texts[: len(documents)]
    assert sum(len(document.text) for document in documents) >= 5000 and documents[-1].place == 1.0


# ---------------------------------------------------------------- mixtures


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7))
def test_a_mixture_is_exact_within_one_at_every_sample(weights: list[int]) -> None:
    chosen = pattern(weights)
    samples = np.arange(1, len(chosen) + 1)
    for source, weight in enumerate(weights):
        taken = np.cumsum(chosen == source)
        assert taken[-1] == weight and np.all(np.abs(taken * sum(weights) - weight * samples) < sum(weights))


def test_weights_become_whole_numbers() -> None:
    assert whole_weights([0.7, 0.3]) == [7, 3] and whole_weights([1.0]) == [1] and whole_weights([2.0, 2.0, 4.0]) == [1, 1, 2]
    long = whole_weights([0.123456789, 1.0, 1e-9])
    assert sum(long) <= LONGEST and min(long) >= 1 and abs(long[0] / sum(long) - 0.123456789 / 1.123456790) < 3 / LONGEST
    assert pattern([7, 3]).tolist() == pattern([7, 3]).tolist()
