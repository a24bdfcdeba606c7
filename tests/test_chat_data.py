"""Conversations from JSON lines to weights in a store: shapes, faults, what is trained, what is damaged, what is shown."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import pytest
from pydantic import ValidationError

from dist_llm.cli import main as cli
from dist_llm.config.load import load_text
from dist_llm.config.schema import Config, DataConfig
from dist_llm.data import build as building
from dist_llm.data import chat, journal, shards, skills
from dist_llm.data.batches import training_batches, validation_batches
from dist_llm.data.build import build_store
from dist_llm.data.corpora import open_corpus
from dist_llm.data.encoding import ChatEncoder
from dist_llm.data.packing import PackedBatches
from dist_llm.data.prepare import Prepared, prepare
from dist_llm.data.readers import BadLines, parse_line
from dist_llm.data.store import TokenStore
from dist_llm.data.template_files import load_template
from dist_llm.data.tokenizer import bytes_tokenizer
from dist_llm.errors import DataError, UsageError
from tests.chat_oracle import judge
from tests.test_store import snapshot

ROUND = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LINES: dict[str, dict[str, Any]] = {  # the same conversation in each shape
    "messages": {"messages": ROUND, "id": 7},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is an instruction ..."},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "text": {"text": "Hi Hello"},
}


def written(path: Path, *records: Any) -> str:
    """A file of JSON lines."""
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in records))
    return str(path)


def data_of(tmp_path: Path, source: Any, **more: Any) -> DataConfig:
    """A data section of conversations."""
    chat_keys = {"format": "auto", "template": "chatml", **more.pop("chat", {})}
    rest = {"validation": 0.0, "sequence": 64, "tokenizer": {"kind": "bytes"}, **more}
    return DataConfig.model_validate({"source": source, "dir": str(tmp_path / "data"), "chat": chat_keys, **rest})


def trained_text(prepared: Prepared, number: int = 0) -> str:
    """The trained tokens of a document as text."""
    store = prepared.train[0]
    assert store.weights is not None
    start, stop = map(int, store.document_starts[number : number + 2])
    weights = store.weights.read(start, stop - start)
    return prepared.tokenizer.decode(store.document(number)[weights > 0].tolist())


@pytest.mark.parametrize("shape", LINES)
def test_shapes_are_found_and_shown(tmp_path: Path, shape: str) -> None:
    prepared = prepare(data_of(tmp_path, written(tmp_path / "a.jsonl", LINES[shape], LINES[shape])), seed=0)
    assert prepared.shapes == (shape,) and any(f"of the shape {shape}, as its first object says" in note for note in prepared.notes)
    assert prepared.train[0].manifest.documents == 2
    assert trained_text(prepared) == ("i Hello<|endoftext|>" if shape == "text" else "Hello<|im_end|>")
    named = prepare(data_of(tmp_path, str(tmp_path / "a.jsonl"), chat={"format": shape}), seed=0)
    assert named.fingerprint == prepared.fingerprint


def test_alpaca_inputs_and_systems(tmp_path: Path) -> None:
    take = chat.taker("alpaca", train_on="assistant")
    text, why = take({"instruction": "Add", "input": "1 2", "output": "3", "system": "You add."})
    assert not why and [m["content"] for m in chat.messages_of(text)] == ["You add.", "Add\n\n1 2", "3"]


def test_a_shape_that_is_not_clear_is_refused(tmp_path: Path) -> None:
    for record, words in (
        ({"question": "Hi", "answer": "Hello"}, "is not known"),
        ({**LINES["messages"], **LINES["alpaca"]}, "more than one shape"),
        ({}, "is not known"),
    ):
        with pytest.raises(DataError, match=words) as failure:
            prepare(data_of(tmp_path, written(tmp_path / "a.jsonl", record)), seed=0)
        assert failure.value.where == f"{tmp_path}/a.jsonl:1"
    both = written(tmp_path / "b.jsonl", {**LINES["messages"], **LINES["alpaca"]})
    assert prepare(data_of(tmp_path, both, chat={"format": "messages"}), seed=0).shapes == ("messages",)
    (tmp_path / "c.txt").write_text("Hi")
    with pytest.raises(UsageError, match="are read from JSON lines"):
        prepare(data_of(tmp_path, str(tmp_path / "c.txt")), seed=0)
    for line, words in (
        (b"[1]", "expected an object, found an array: [1]"),
        (json.dumps(LINES["messages"]).encode() + b"\r", "ends in CRLF, expected LF"),
        (json.dumps(LINES["messages"]).encode("utf-16"), "starts with a byte order mark"),
        (b'{"text": 1, "text": 2}', "holds the key text twice"),
        (b'{"text": NaN}', "NaN is not JSON"),
    ):
        with pytest.raises(DataError, match="no sound JSON object") as failure:
            prepare(data_of(tmp_path, written(tmp_path / "d.jsonl", b"", line, line)), seed=0)
        assert failure.value.where == f"{tmp_path}/d.jsonl:2" and words in failure.value.details[0] and failure.value.next
        assert len(failure.value.details) >= 2
    with pytest.raises(DataError, match="no sound JSON object") as failure:
        prepare(data_of(tmp_path, written(tmp_path / "e.jsonl", b"", b" ")), seed=0)
    assert failure.value.details == ["nothing but empty lines"]


FAULTS: list[tuple[Any, str]] = [
    ({"messages": [*ROUND, ROUND[1]]}, "two assistant turns in a row, 2 and 3"),
    ({"messages": [ROUND[0], *ROUND]}, "two user turns in a row, 1 and 2"),
    ({"messages": ROUND[1:]}, "the assistant speaks first, expected the user"),
    ({"messages": ROUND[:1]}, "no assistant turn"),
    ({"messages": []}, "'messages' has 0 turns, expected 1 to 10000"),
    ({"messages": {}}, "'messages' must be an array, found an object"),
    ({"messages": [*ROUND, {"role": "tool", "content": "x"}]}, "turn 3 is what a tool says, and turn 2 calls none"),
    ({"messages": [{"role": "tool", "content": "x"}, *ROUND]}, "a tool speaks first, expected the user"),
    ({"messages": [*ROUND, {"role": "function", "content": "x"}]}, "turn 3 has the role 'function': a call is written under"),
    ({"messages": [*ROUND, {"role": "critic", "content": "x"}]}, "turn 3 has the unknown role 'critic'; known are user, assistant, system"),
    (
        {"messages": [ROUND[0], {**ROUND[1], "tool_calls": [{"function": {"name": "f"}}]}]},
        "call 1 of turn 2 has no arguments: {} says that it takes none",
    ),
    (
        {"messages": [ROUND[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "call 1 of turn 2 has no name",
    ),
    ({"messages": ROUND, "tools": [{"type": "function"}]}, "tool 1 has no name"),
    ({"messages": ROUND, "tools": [{"name": "f"}]}, "the template chatml does not show tool 1; data.chat.template=qwen shows tools"),
    ({"messages": ROUND, "functions": [{"name": "f"}]}, "the object has 'functions': write them under 'tools'"),
    ({"messages": [ROUND[0], {**ROUND[1], "function_call": {"name": "f"}}]}, "turn 2 has 'function_call': a call is written under"),
    ({"messages": [ROUND[0], {**ROUND[1], "tools": [{"name": "f"}]}]}, "turn 2 has 'tools': tools belong to the whole conversation"),
    (
        {"messages": [ROUND[0], {**ROUND[1], "reasoning_content": "Hm"}]},
        "the template chatml does not show the reasoning of turn 2; data.chat.template=model does",
    ),
    (
        {"messages": ROUND, "chat_template_kwargs": {"enable_thinking": False}},
        "the object has 'chat_template_kwargs': a template gets",
    ),
    ({"messages": ROUND, "images": ["a.png"]}, "the object has 'images': only text is trained"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ROUND[1]]}, "turn 1 has a part of the type 'image'"),
    ({"messages": [{"role": "user", "content": ["Hi"]}, ROUND[1]]}, "turn 1 has a part without a type"),
    ({"messages": [{"role": "user", "content": []}, ROUND[1]]}, "turn 1 is empty"),
    ({"messages": [*ROUND, {"role": 3, "content": "x"}]}, "turn 3 has the unknown role a number"),
    ({"messages": [*ROUND, {"role": "system", "content": "x"}]}, "turn 3 is a system turn, expected at the beginning alone"),
    ({"messages": [ROUND[0], {"role": "assistant", "content": " \n"}]}, "turn 2 is empty"),
    ({"messages": [ROUND[0], {"role": "assistant", "content": None}]}, "turn 2 must be a string, found null"),
    ({"messages": [ROUND[0], {"role": "assistant"}]}, "turn 2 has no key 'content' (it has role)"),
    ({"messages": [ROUND[0], "Hello"]}, "turn 2 must be an object, found a string"),
    ({"messages": [ROUND[0], {**ROUND[1], "weight": -1}]}, "turn 2: weight must be from 0 to 1000, found -1"),
    ({"messages": [ROUND[0], {**ROUND[1], "weight": 10**400}]}, "turn 2: weight must be from 0 to 1000, found 1000"),
    ({"messages": [ROUND[0], {**ROUND[1], "weight": "1"}]}, "turn 2: weight must be a number, found a string"),
    ({"messages": [ROUND[0], {**ROUND[1], "weight": True}]}, "turn 2: weight must be a number, found true or false"),
    ({"messages": [ROUND[0], {**ROUND[1], "train": 1}]}, "turn 2: train must be true or false, found a number"),
    ({"messages": [ROUND[0], {**ROUND[1], "train": True, "weight": 1}]}, "turn 2 has both weight and train"),
    ({"messages": [{**ROUND[0], "weight": 1}, ROUND[1]]}, "turn 1 of the user has a weight, and train_on=assistant never trains it"),
    ({"messages": [ROUND[0], {**ROUND[1], "train": False}]}, "no token of the conversation is trained"),
    ({"messages": [{"role": "user", "content": "a\x00b"}, ROUND[1]]}, "turn 1 holds a NUL character"),
    (LINES["sharegpt"], "expected messages, found no key 'messages'; it looks like sharegpt"),
    ({"x": 1}, "expected messages, found no key 'messages'"),
    (b'{"messages": [', "not JSON"),
    (b'{"messages": 1, "messages": 2}', "holds the key messages twice"),
    (b"[1, 2]", "expected an object, found an array"),
]


def test_faults_are_told_with_their_places(tmp_path: Path) -> None:
    """Each with file and line and an excerpt, 20 of them at once; as many as are allowed are skipped, listed, and found again."""
    file = written(tmp_path / "a.jsonl", LINES["messages"], *(record for record, _ in FAULTS), LINES["messages"])
    bad = BadLines(allowed=len(FAULTS))
    corpus = open_corpus(file, seed=0, bad=bad, reading=chat.Reading())
    template = load_template("chatml", end="<|endoftext|>")
    encoder = ChatEncoder(template, template.fit(bytes_tokenizer()), train_on="assistant", bad=bad)
    for number, (record, words) in enumerate(FAULTS, start=2):
        with pytest.raises(DataError) as failure:
            one = written(tmp_path / "one.jsonl", LINES["messages"], record)
            prepare(data_of(tmp_path, one), seed=0)
        assert failure.value.where == f"{tmp_path}/one.jsonl:2" and words in failure.value.details[0], failure.value.details
        assert failure.value.expected == chat.EXPECTED, number
    build_store(corpus, encoder, tmp_path / "home", validation=0.0)
    assert bad.places == {f"{file}:{number}" for number in range(2, 2 + len(FAULTS))}
    assert TokenStore(tmp_path / "home/train").manifest.documents == 2
    with pytest.raises(DataError, match="at least 20 lines cannot be read"):
        prepare(data_of(tmp_path, file), seed=0)
    skipped = prepare(data_of(tmp_path, file, max_bad_lines=len(FAULTS)), seed=0)
    assert f"{len(FAULTS)} bad lines were skipped" in skipped.notes and skipped.built
    again = prepare(data_of(tmp_path, file, max_bad_lines=len(FAULTS)), seed=0)
    assert not again.built and any(f"{len(FAULTS)} bad lines of a were skipped when it was built" in note for note in again.notes)


# --- fuzz ------------------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, 2, 1000, 1001, 1e308, "", " ", "\n", "x", "a\x00b", "\ud83d", "😀", [], {}, ["x"], {"role": "user"},
    "user", "assistant", "system", "human", "gpt", "tool", "User", "developer", [{"type": "text", "text": "part"}],
    [{"type": "text", "text": "of"}, {"type": "text", "text": " two"}], [{"role": "user", "content": "listed"}],
    [{"name": "f", "arguments": "{}"}], '{"name": "f", "arguments": {"a": [1e400]}}', '[{"name": "f"}]', "{}",
    {"name": "f", "arguments": {}},
    [{"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"b": 1, "a": "x"}', "strict": True}}],
    "<|im_end|>", "\x1b[2J", "\u202e", "y" * 300, float("nan"), 10**400,
)  # fmt: skip
KEYS = (
    "role",
    "content",
    "from",
    "value",
    "weight",
    "train",
    "system",
    "input",
    "text",
    "messages",
    "conversations",
    "prompt",
    "output",
    "x",
    "completion",
    "type",
    "tools",
    "tool_calls",
    "reasoning_content",
    "thinking",
    "images",
    "function",
    "arguments",
    "name",
    "tool_call_id",
    "chat_template_kwargs",
)


def mutated(record: Any, dice: random.Random) -> Any:
    """A record with something of it changed, added, moved, or gone."""
    record = json.loads(json.dumps(record))
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3))):
        places: list[Any] = [record]
        for one in places:
            places += [child for child in (one.values() if isinstance(one, dict) else one) if isinstance(child, dict | list)]
        at = dice.choice(places)
        if isinstance(at, dict):
            keys = [*at, dice.choice(KEYS)]
            key = dice.choice(keys)
            if dice.random() < 0.25:
                at.pop(key, None)
            else:
                at[key] = copy.deepcopy(dice.choice(VALUES))
        elif at and dice.random() < 0.7:
            what = dice.randrange(4)
            if what == 0:
                at.insert(dice.randrange(len(at) + 1), copy.deepcopy(dice.choice(at)))
            elif what == 1:
                at.pop(dice.randrange(len(at)))
            elif what == 2:
                dice.shuffle(at)
            else:
                at[dice.randrange(len(at))] = copy.deepcopy(dice.choice(VALUES))
        else:
            at.append(copy.deepcopy(dice.choice(VALUES)))
    return record


def grown(shape: str, dice: random.Random) -> dict[str, Any]:
    """A sound record of a shape."""
    listed = shape == "prompt_completion" and dice.random() < 0.6
    if shape not in ("messages", "sharegpt") and not listed:
        return dict(LINES[shape])
    names = ("from", "value") if shape == "sharegpt" and dice.random() < 0.7 else ("role", "content")
    pair = ("human", "gpt") if shape == "sharegpt" else ("user", "assistant")
    turns: list[dict[str, Any]] = [{names[0]: role, names[1]: f"{role} {at}"} for at in range(dice.randint(1, 3)) for role in pair]
    if dice.random() < 0.2:
        turns[0][names[1]] = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
    if dice.random() < 0.4:
        turns[1:1] = called(names, dice, shape)
    said = dice.choice(("be kind", "be kind", "", " \n"))
    system = [{names[0]: dice.choice(("system", "developer")), names[1]: said}] if dice.random() < 0.3 else []
    told = {"system": dice.choice(("be kind", "be good", "", " "))} if dice.random() < 0.2 else {}
    if listed:
        return {"prompt": [*system, *turns[:-1]], "completion": dice.choice((turns[-1:], turns[-1]["content"])), **told}
    tools = {"tools": dice.choice(([{"name": "f"}], '[{"function": {"name": "f"}}]', "", []))} if dice.random() < 0.3 else {}
    return {"messages" if shape == "messages" else "conversations": system + turns, **tools, **told}


def called(names: tuple[str, str], dice: random.Random, shape: str) -> list[dict[str, Any]]:
    """A call and what came of it, for the place after a question."""
    made = {"name": "f", "arguments": dice.choice(({"a": 1}, '{"a": 1}', "", None))}
    if shape == "sharegpt" and dice.random() < 0.5:
        first: dict[str, Any] = {"from": "function_call", "value": json.dumps(dice.choice((made, [made, made])))}
        return [first, *({"from": "observation", "value": "3"} for _ in range(dice.randint(1, 2)))]
    role = "gpt" if names[0] == "from" else "assistant"
    first = {names[0]: role, names[1]: dice.choice(("", None, "let me see")), "tool_calls": [dice.choice((made, {"function": made}))]}
    if dice.random() < 0.3:
        first["reasoning_content"] = "hm"
    return [first, *({names[0]: "tool", names[1]: dice.choice(("3", "")), "name": "f"} for _ in range(dice.randint(1, 2)))]


def as_judged(text: str) -> list[list[Any]]:
    """A conversation as the oracle tells it."""
    messages, tools = chat.conversation_of(text)
    rows = []
    for message in messages:
        more = {key: value for key, value in message.items() if key not in ("role", "content", "weight")}
        rows.append([message["role"], message["content"], message.get("weight"), *([more] if more else [])])
    return rows + ([["tools", tools]] if tools else [])


@pytest.mark.parametrize("shape", LINES)
def test_mutated_conversations_are_judged_as_the_oracle_judges(shape: str) -> None:
    """400 of each of the five shapes: the same messages, or refused by both; a refusal says why, on one clean line."""
    dice, accepted = random.Random(len(shape)), 0
    for _ in range(400):
        train_on = dice.choice(("assistant", "last", "all"))
        line = json.dumps(mutated(grown(shape, dice), dice), ensure_ascii=dice.random() < 0.9)
        try:
            raw = line.encode()
        except UnicodeEncodeError:
            raw, line = (line := json.dumps(json.loads(line))).encode(), line
        text, why = parse_line(raw + b"\n", take=chat.taker(shape, train_on=train_on))  # type: ignore[arg-type]
        expected = judge(line, shape, train_on)
        found = as_judged(text) if text else None
        assert found == expected, (line, why, expected)
        assert bool(why) == (expected is None) and why.isprintable() and len(why) < 400, why
        accepted += expected is not None
    assert 60 < accepted < 340, accepted


# --- the store -------------------------------------------------------------------------------------------------------------


def weighted_lines(count: int) -> list[dict[str, Any]]:
    """Conversations whose turns have weights."""
    dice, found = random.Random(3), []
    for number in range(count):
        turns: list[dict[str, Any]] = []
        for at in range(dice.randint(1, 3)):
            turns += [{"role": "user", "content": f"What is {number} + {at}?"}, {"role": "assistant", "content": f"{number + at}"}]
            if dice.random() < 0.6:
                turns[-1]["weight"] = dice.choice((0, 0.25, 0.3, 1, 3))
        turns[-1].pop("weight", None)
        found.append({"messages": turns})
    return found


def test_weights_reach_the_store_and_the_batch(tmp_path: Path) -> None:
    lines = weighted_lines(200)
    data = data_of(tmp_path, written(tmp_path / "a.jsonl", *lines), sequence=128)
    prepared = prepare(data, seed=0)
    store = prepared.train[0]
    assert store.weights is not None and set(store.weights.table) == {0.0, 0.25, 0.3, 1.0, 3.0}
    for number, line in enumerate(lines):
        start, stop = map(int, store.document_starts[number : number + 2])
        weights = store.weights.read(start, stop - start)
        expected = [float(turn.get("weight", 1.0)) for turn in line["messages"] if turn["role"] == "assistant"]
        sizes = [len(turn["content"]) + 1 for turn in line["messages"] if turn["role"] == "assistant"]  # and the end of the turn
        assert sum(size * weight for size, weight in zip(sizes, expected, strict=True)) == pytest.approx(weights.sum(), rel=1e-14)
        assert store.weights.targets[number].tolist() == [pytest.approx(weights.sum(), rel=1e-14), np.count_nonzero(weights)]
    order = training_batches(prepared, data, global_batch=4, seed=1)
    (batch,) = order.micro_batches(0, dp_rank=0, dp_size=1, micro=4)
    assert batch.weights is not None and set(batch.weights.unique().tolist()) <= {0.0, 0.25, 0.3, 1.0, 3.0}


def test_answers_that_are_all_cut_are_refused(tmp_path: Path) -> None:
    """Truncated before the token that ends a turn in every conversation: the model would never stop."""
    said = [{"messages": [ROUND[0], {"role": "assistant", "content": "y" * (60 + number)}]} for number in range(20)]
    file = written(tmp_path / "a.jsonl", *said)
    data = data_of(tmp_path, file, sequence=40, chat={"too_long": "truncate"})
    with pytest.raises(DataError, match="all conversations are cut before an answer ends"):
        training_batches(prepare(data, seed=0), data, global_batch=1, seed=0)
    written(tmp_path / "a.jsonl", *said, LINES["messages"])
    order = training_batches(prepare(data, seed=0), data, global_batch=1, seed=0)
    assert isinstance(order, PackedBatches) and order.statistics()["cut"] == 20 and "20 were cut before the end" in order.sentence()


def test_every_bit_of_a_store_is_watched(tmp_path: Path) -> None:
    """A flipped bit of any file of conversations, weights and their index among them, is refused with the file named."""
    data = data_of(tmp_path, written(tmp_path / "a.jsonl", *weighted_lines(20)))
    home = prepare(data, seed=0).train[0].folder
    names = {path.name for path in home.iterdir()}
    assert names == {"manifest.json", "documents.bin", "targets.bin", "tokens-00000.bin", "weights-00000.bin"}
    dice = random.Random(1)
    for name in sorted(names):
        whole = (home / name).read_bytes()
        for _ in range(8):
            flipped = bytearray(whole)
            flipped[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
            (home / name).write_bytes(flipped)
            shards._verified.clear()
            with pytest.raises(DataError) as failure:
                prepare(data, seed=0)
            assert name in str(failure.value.where), name
        for content in (whole[:-1], whole + b"\0", b""):
            (home / name).write_bytes(content)
            with pytest.raises(DataError):
                prepare(data, seed=0)
        (home / name).write_bytes(whole)
    shards._verified.clear()
    assert not prepare(data, seed=0).built


def test_a_killed_build_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two notes, the next build gives the bytes of one that nobody stopped, and skips the same lines."""
    monkeypatch.setattr(journal, "KEPT_EVERY", 400)
    monkeypatch.setattr(building, "ENCODED_AT_ONCE", 600)
    lines = weighted_lines(60)
    for at in (5, 30, 50):
        lines.insert(at, {"messages": [ROUND[0], {**ROUND[1], "train": False}]})
    file = written(tmp_path / "a.jsonl", *lines)

    def run(home: str) -> bytes:
        prepared = prepare(data_of(tmp_path / home, file, max_bad_lines=3, validation=0.2), seed=0)
        return json.dumps([prepared.fingerprint, *(note for note in prepared.notes if "interrupted" not in note)]).encode()

    told = run("whole")
    for turn in (1, 2, 4):
        pid = os.fork()
        if pid == 0:  # killed when its note number `turn` is there
            keep, count = journal.Stores.keep, iter(range(100))

            def killed(self: journal.Stores, keep: Callable = keep, count: Any = count, turn: int = turn) -> None:
                before = self._notes
                keep(self)
                if self._notes > before and next(count) + 1 == turn:
                    os._exit(9)

            journal.Stores.keep = killed  # type: ignore[method-assign]
            run(f"killed-{turn}")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, "it was killed on the way"
        assert run(f"killed-{turn}") == told
        assert snapshot(tmp_path / f"killed-{turn}") == snapshot(tmp_path / "whole")


def test_no_conversation_is_in_both(tmp_path: Path) -> None:
    """The split goes by what is said, whatever weights it has."""
    lines = weighted_lines(150)
    plain = [{"messages": [{key: value for key, value in turn.items() if key != "weight"} for turn in line["messages"]]} for line in lines]
    data = data_of(tmp_path, written(tmp_path / "a.jsonl", *lines, *plain, *lines), validation=0.2, sequence=256)
    prepared = prepare(data, seed=0)
    said = [
        {prepared.tokenizer.decode(store.document(number).tolist()) for number in range(store.manifest.documents)}
        for store in (prepared.train[0], prepared.validation[0])
    ]
    assert not said[0] & said[1] and len(said[0] | said[1]) == 150 and 10 < len(said[1]) < 60
    order = validation_batches(prepared, data, global_batch=4)
    assert order is not None
    assert sum(order.targets(step) for step in range(order.num_batches)) == int(prepared.validation[0].weights.targets[:, 1].sum())  # type: ignore[union-attr]


def test_skills_are_conversations(tmp_path: Path) -> None:
    """Learned with the template's tokens inside the vocabulary; what is trained is the right answer and the end."""
    data = data_of(tmp_path, "skills", tokenizer={"kind": "bpe", "vocab": 320}, max_tokens=5000, validation=0.1)
    prepared = prepare(data, seed=3)
    assert prepared.tokenizer.vocab_size == 320 and len(prepared.train[0]) + len(prepared.validation[0]) <= 5000
    assert prepared.train[0].weights is not None and len(prepared.train[0].weights.table) == 2
    answers = {skills.pair(3, index).answer + "<|im_end|>" for index in range(400)}
    assert all(trained_text(prepared, number) in answers for number in range(prepared.train[0].manifest.documents))
    assert prepare(data, seed=3).fingerprint == prepared.fingerprint != prepare(data, seed=4).fingerprint
    mixed = {"mix": [{"source": "skills"}, {"source": written(tmp_path / "a.jsonl", *weighted_lines(30)), "weight": 2.0}]}
    both = prepare(data_of(tmp_path, "skills", max_tokens=9000, **mixed), seed=3)
    assert both.shapes == ("messages", "messages") and len(both.train) == 2


def test_the_vocabulary_grows_and_says_so(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", LINES["messages"])
    prepared = prepare(data_of(tmp_path, file), seed=0)
    assert any("added 2 special tokens, <|im_end|> <|im_start|>: the vocabulary is 259 now" in note for note in prepared.notes)
    prepared.require_vocab(259)
    with pytest.raises(UsageError) as failure:
        prepared.require_vocab(257)
    assert failure.value.expected == "at least 259" and "template=plain" in str(failure.value.next)
    prepare(data_of(tmp_path, file, chat={"template": "plain"}), seed=0).require_vocab(257)


def test_wrong_configs() -> None:
    """Each with the reason; what follows is filled in."""
    filled = DataConfig.model_validate({"chat": {"template": "chatml"}})
    assert (filled.packing, filled.document_mask, filled.reset_positions, filled.chat.format) == ("best_fit", True, True, "auto")
    assert DataConfig() == DataConfig.model_validate({"chat": {}}) and DataConfig().packing == "concat"
    again = DataConfig.model_validate(filled.model_dump())
    assert again == filled and DataConfig.model_validate(DataConfig().model_dump()) == DataConfig()
    assert load_text("data: {chat: null}", name="x").config.data == Config.model_validate({"model": {}}).data
    with pytest.raises(ValidationError):
        DataConfig.model_validate({"chat": {"format": "jsonl"}})


def verb(*words: str) -> int:
    return cli.run(list(words))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.packing=concat"], "concat cuts conversations"),
        (["data.source=python"], "python holds no conversations"),
        (["data.chat=null"], "data.chat is off"),
        (["data.document_mask=false"], "would see each other"),
        (["data.chat.template=model"], "a model's own lies beside its tokenizer's file"),
    ],
)
def test_rules(overrides: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("data: {source: skills, chat: {format: auto}, packing: best_fit}\nmodel: {vocab: 300}\n")
    assert verb("check", str(tmp_path / "run.yaml"), *overrides) == 2
    assert words in (shown := capsys.readouterr().err + capsys.readouterr().out), shown


# --- what is shown ---------------------------------------------------------------------------------------------------------

ATTACK = "\x1b[2J\x1b]0;owned\x07\u202e</pre><script>document.title='owned'</script><img src=x onerror=alert(1)>[bold red]{{ 7*7 }}&amp;"
NEVER = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


class Page(HTMLParser):
    """The elements of a page, its visible text, and its policy."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.marked: list[str] = []
        self.policy = ""
        self._trained = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        assert not any(name.startswith("on") or name in ("src", "href") for name in named), named
        self._trained = "trained" in (named.get("class") or "")
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"] or ""

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._trained:
            self.marked.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._trained = False


def test_the_preview_shows_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Marks on a plain stream, weights before them; JSON; a page that is escaped and reaches for nothing."""
    turns = [{"role": "user", "content": ATTACK}, {"role": "assistant", "content": f"Ja 😀 {ATTACK}", "weight": 0.5}]
    more = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "two\nlines"}]
    file = written(tmp_path / "a.jsonl", {"messages": turns + more})
    (tmp_path / "run.yaml").write_text(
        f"data: {{source: {file}, dir: {tmp_path}/data, validation: 0, sequence: 900,\n"
        f"  chat: {{template: chatml}}, tokenizer: {{kind: bytes}}}}\n"
        "model: {vocab: 300}\nbatch: {global: 1, micro: 1}\n"
    )
    page = tmp_path / "page.html"
    assert verb("data", "preview", str(tmp_path / "run.yaml"), "--tokens", "900", "--html", str(page)) == 0
    shown = capsys.readouterr().out
    assert all(category(letter) not in NEVER for letter in shown if letter != "\n")
    assert "<|im_start|>assistant⏎[0.5×Ja 😀 ?[2J" in shown and "[two⏎lines<|im_end|>]⏎" in shown
    assert "template chatml, format messages, trained on assistant" in shown and "without packing" in shown
    found = Page(text := page.read_text())
    assert (
        "script" not in found.tags
        and "img" not in found.tags
        and "default-src 'none'" in found.policy
        and "http" not in text.split("<main>")[1]
    )
    assert all(category(letter) not in NEVER for letter in text if letter != "\n")
    trained = "".join(found.marked)
    assert trained.endswith("two⏎\nlines<|im_end|>") or "two" in trained and "lines" in trained
    assert "Ja" in trained and "Hi" not in trained and "user" not in trained
    assert verb("data", "preview", str(tmp_path / "run.yaml"), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["counts"]["samples"] == 1 and told["stops"] == ["<|endoftext|>", "<|im_end|>"] and told["formats"] == ["messages"]
    assert told["target_tokens"] == told["counts"]["trained_tokens"] and told["weight"] < told["target_tokens"]
    assert (
        verb("data", "preview", str(tmp_path / "run.yaml"), "data.chat=null", "data.packing=concat", "data.text_key=x", "--html", "x") != 0
    )
