"""Conversations with tools and reasoning from JSON to the store: what is understood, what is wrong, what tells two of them apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dist_llm.cli import main as cli
from dist_llm.data import chat, preferences
from dist_llm.data.prepare import prepare
from dist_llm.data.readers import parse_line
from dist_llm.data.templates import Template
from dist_llm.data.tokenizer import bytes_tokenizer
from dist_llm.errors import DataError
from tests.test_chat_data import Page, as_judged, data_of, trained_text, written
from tests.tool_cases import CLOCK, MARKED, ONE, THOUGHT, TWO, WEATHER, call, calls, copied, result, says, user

WRAPPED = call("f", a=1, b={"z": None, "c": "é"})
SPELLED = json.dumps(WRAPPED["function"])
BARE = {"name": "f", "arguments": json.dumps(WRAPPED["function"]["arguments"])}


def read(record: Any, shape: str = "messages", train_on: str = "assistant") -> tuple[str, str]:
    return parse_line(json.dumps(record).encode() + b"\n", take=chat.taker(shape, train_on=train_on))  # type: ignore[arg-type]


# Ways to write one conversation: a question, a call with a content or none, what came of it, an answer.
SAME: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": [user("x"), calls(WRAPPED), result("3"), says("y")], "tools": [CLOCK]}),
    ("messages", {"messages": [user("x"), {"role": "assistant", "tool_calls": [WRAPPED]}, result("3"), says("y")], "tools": [CLOCK]}),
    ("messages", {"messages": [user("x"), {**calls(BARE), "content": None}, result("3"), says("y")], "tools": json.dumps([CLOCK])}),
    ("messages", {"messages": [user("x"), {**calls(WRAPPED), "content": " "}, result([{"type": "text", "text": "3"}]), says("y")],  # type: ignore[arg-type]
                  "tools": [CLOCK], "functions": []}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": SPELLED},
                                    {"from": "observation", "value": "3"}, {"from": "gpt", "value": "y"}], "tools": json.dumps([CLOCK])}),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": f"[{SPELLED}]"},
                                    {"from": "tool", "value": "3"}, {"from": "gpt", "value": "y"}], "tools": [CLOCK]}),
    ("sharegpt", {"conversations": [user("x"), calls(WRAPPED), result("3"), says("y")], "tools": [CLOCK]}),
    ("prompt_completion", {"prompt": [user("x")], "completion": [calls(WRAPPED), result("3"), says("y")], "tools": [CLOCK]}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(SAME)))
def test_ways_to_write_a_call(number: int) -> None:
    """Arguments become an object and keep their order, whether they are one or a text that spells it."""
    shape, record = SAME[number]
    text, why = read(record, shape)
    rows = [["user", "x", None], ["assistant", "", None, {"tool_calls": [WRAPPED]}], ["tool", "3", None], ["assistant", "y", None]]
    assert not why and as_judged(text) == [*rows, ["tools", [CLOCK]]], why
    assert list(chat.messages_of(text)[1]["tool_calls"][0]["function"]["arguments"]["b"]) == ["z", "c"]
    assert chat.key_of(text) == chat.key_of(read(SAME[0][1])[0])


def test_arguments_that_are_none() -> None:
    """Null and an empty text as well as an object without keys; tools that are none are none."""
    for none in ({}, None, "", " ", "{}", "null"):
        text, why = read({"messages": [user("x"), calls({"name": "f", "arguments": none})], "tools": none if none != {} else []})
        assert why == ("" if none != "{}" else "'tools' must be an array, found an object")
        assert why or as_judged(text)[1:] == [["assistant", "", None, {"tool_calls": [call("f")]}]]


def test_a_prompt_may_end_with_what_a_tool_says() -> None:
    text, why = read({"prompt": ONE[:3], "completion": "3 °C.", "tools": [WEATHER]}, "prompt_completion")
    assert not why and [message.get("weight") for message in chat.messages_of(text)] == [None, 0.0, None, None]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": [user("x"), calls("f")]}, "call 1 of turn 2 must be an object, found a string"),  # type: ignore[arg-type]
    ({"messages": [user("x"), {**calls(), "tool_calls": {"name": "f"}}]}, "the calls of turn 2 must be an array, found an object"),
    ({"messages": [user("x"), calls({"type": "code", "function": {}})]}, "call 1 of turn 2 is of the type 'code', known is 'function'"),
    ({"messages": [user("x"), calls({"function": "f"})]}, "the function of call 1 of turn 2 must be an object, found a string"),
    ({"messages": [user("x"), calls({"name": 3, "arguments": {}})]}, "the name of call 1 of turn 2 must be a string, found a number"),
    (
        {"messages": [user("x"), calls({"name": "f", "arguments": [1]})]},
        "the arguments of call 1 of turn 2 must be an object, found an array",
    ),
    (
        {"messages": [user("x"), calls({"name": "f", "arguments": "{a: 1}"})]},
        "turn 2 are a text and must spell an object in JSON: not JSON",
    ),
    (
        {"messages": [user("x"), calls({"name": "f", "arguments": '{"a": 1, "a": 2}'})]},
        "must spell an object in JSON: holds the key a twice",
    ),
    (
        {"messages": [user("x"), calls({"name": "f", "arguments": '{"a": NaN}'})]},
        "must spell an object in JSON: not JSON (NaN is not JSON)",
    ),
    ({"messages": [user("x"), calls({"name": "f", "arguments": '{"a": 1e999}'})]}, "call 1 of turn 2 holds a number that is too large"),
    ({"messages": [user("x"), calls({"name": "f", "arguments": "[" * 99})]}, "nested deeper than 64"),
    ({"messages": [user("x"), calls(call("f", a=["\x00"]))]}, "call 1 of turn 2 holds a NUL character"),
    ({"messages": [user("x"), calls(call("f", **{"\ud83d": 1}))]}, "call 1 of turn 2 holds half of a surrogate pair"),
    ({"messages": [user("x"), says("y", tool_calls=[], reasoning_content=["z"])]}, "'reasoning_content' of turn 2 must be a string"),
    (
        {"messages": [user("x"), says("y", thinking="a", reasoning="b")]},
        "different texts under 'thinking' and 'reasoning', which are names of",
    ),
    ({"messages": [{**user("x"), "reasoning": "a"}, says("y")]}, "turn 1 of the user has 'reasoning': only the assistant's"),
    ({"messages": [{**user("x"), "tool_calls": [WRAPPED]}, says("y")]}, "turn 1 of the user has 'tool_calls': the assistant alone"),
    ({"messages": [user("x"), says("", reasoning_content="z")]}, "turn 2 is empty"),
    ({"messages": [*ONE[:3], user("x")]}, "turn 4 of the user comes after what a tool says, expected the assistant"),
    ({"messages": [*ONE[:2], says("y")]}, "two assistant turns in a row, 2 and 3"),
    ({"messages": [user("x"), result("3"), says("y")]}, "turn 2 is what a tool says, and turn 1 calls none; a call is written under"),
    ({"messages": [*ONE[:2], result("3", weight=1)]}, "turn 3 of the tool has a weight, and train_on=assistant never trains it"),
    ({"messages": [*ONE[:2], result("3", name=3)]}, "'name' of turn 3 must be a string, found a number"),
    ({"messages": [*ONE[:2], result(None)]}, "turn 3 must be a string, found null"),  # type: ignore[arg-type]
    ({"messages": ONE, "tools": {"name": "f"}}, "'tools' must be an array, found an object"),
    ({"messages": ONE, "tools": "weather"}, "'tools' is a text and must spell a list in JSON: not JSON"),
    ({"messages": ONE, "tools": ["weather"]}, "tool 1 must be an object that defines a function, found a string"),
    ({"messages": ONE, "tools": [CLOCK, {"function": {"description": "x"}}]}, "tool 2 has no name"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_is_wrong_is_told(number: int) -> None:
    record, words = WRONG[number]
    text, why = read(record)
    assert not text and words in why and why.isprintable(), why


def test_shapes_that_carry_no_tools() -> None:
    """Refused, and the words are true."""
    for take, record in (
        (chat.taker("alpaca", train_on="assistant"), {"instruction": "a", "output": "b"}),
        (preferences.taker(train_on="assistant"), {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ):
        why = take({**record, "tools": [CLOCK]})[1]
        assert why == "the object has 'tools': conversations of the formats messages, sharegpt and prompt_completion alone carry tools"
    pair = {"chosen": [user("a"), says("b", reasoning_content="c")], "rejected": [user("a"), says("d")]}
    why = preferences.taker(train_on="assistant")(pair)[1]
    assert why == "turn 2 has 'reasoning_content': pairs of answers are trained by their contents alone"
    asked = {"prompt": [*ONE[:1], result("3")], "chosen": [says("b")], "rejected": [says("d")]}
    assert "turn 2 has the role 'tool'" in preferences.taker(train_on="assistant")(asked)[1]


def test_names_of_reasoning() -> None:
    """Templates read it as transformers gives it: under reasoning_content and thinking, and as data has it."""
    for name in ("reasoning_content", "thinking", "reasoning"):
        text, why = read({"messages": [user("x"), says("y", **{name: "so"})]})
        assert not why and chat.key_of(text) == chat.key_of(read({"messages": [user("x"), says("y", thinking="so")]})[0])
        for key in ("reasoning_content", "thinking", name):
            form = Template(
                "own", f"{{% for m in messages %}}{{{{ (m.{key} or '') + m.content }}}}<|im_end|>{{% endfor %}}", eos="", trusted=True
            )
            assert form.render(chat.messages_of(text)) == "x<|im_end|>soy<|im_end|>"
            form.encode(chat.messages_of(text), form.fit(bytes_tokenizer()))


def test_what_tells_two_conversations_apart() -> None:
    """Tools, calls and reasoning are what was said; ids of calls, weights, and how arguments are written are not."""
    first = chat.key_of(read({"messages": ONE, "tools": [WEATHER]})[0])
    alike = [
        {
            "messages": [ONE[0], calls({**call("weather", at={"hour": 9}, place="Oslo", unit=None), "id": "7"}), *ONE[2:]],
            "tools": [WEATHER],
        },
        {"messages": [*ONE[:2], result('{"t": 3}', tool_call_id="7"), {**ONE[3], "weight": 0.5}], "tools": json.dumps([WEATHER])},
    ]
    others = [
        {"messages": ONE, "tools": [WEATHER, CLOCK]},
        {"messages": ONE},
        {"messages": [ONE[0], calls(call("weather", place="Ås")), *ONE[2:]], "tools": [WEATHER]},
        {"messages": [ONE[0], {**ONE[1], "reasoning_content": "Hm"}, *ONE[2:]], "tools": [WEATHER]},
    ]
    assert {chat.key_of(read(one)[0]) for one in alike} == {first}
    assert len({first, *(chat.key_of(read(one)[0]) for one in others)}) == 5
    plain = read({"messages": [user("x"), says("y")]})[0]
    assert chat.key_of(plain) == '[["user", "x"], ["assistant", "y"]]' and plain == (
        '[{"content":"x","role":"user"},{"content":"y","role":"assistant"}]'
    ), "as they were before there were tools: the split of plain conversations stays"


def test_a_tokenizer_is_trained_on_all_that_is_said() -> None:
    text = read({"messages": THOUGHT, "tools": [WEATHER]})[0]
    assert all(part in chat.spoken(text) for part in ("I need the weather.", '"place": "Oslo"', "0 to 23", "3 °C.", "It is three."))
    assert chat.spoken(read({"messages": [user("x"), says("y")]})[0]) == "x\ny"


# --- the store -----------------------------------------------------------------------------------------------------------


def own_template(folder: Path, kind: str) -> str:
    (folder / "own.jinja").write_text(MARKED[kind])
    return str(folder / "own.jinja")


def lines(count: int) -> list[dict[str, Any]]:
    """Conversations about numbers, which differ in their tools alone from their neighbour."""
    found = []
    for number in range(count):
        asked = [user(f"What is {number // 2}?"), calls(call("f", n=number // 2)), result(f"{number // 2}"), says("It is that.")]
        found.append({"messages": asked, "tools": [CLOCK, WEATHER][: 1 + number % 2]})
    return found


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_store_of_calls(tmp_path: Path, form: str) -> None:
    """Built-in, and a stranger's template in its process; JSON lines, and a table in which missing and null are one."""
    records = [*lines(40), {"messages": [user("Hi"), says("Hello")], "tools": [CLOCK]}]
    file = written(tmp_path / "a.jsonl", *records)
    if form == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        texts = copied(records)
        for record in texts:
            record["tools"] = json.dumps(record["tools"])
        parquet.write_table(pyarrow.Table.from_pylist(texts), file := str(tmp_path / "a.parquet"))
    for template in ("qwen", own_template(tmp_path, "qwen2.5")):
        data = data_of(tmp_path, file, chat={"template": template}, validation=0.2, sequence=4096)
        prepared = prepare(data, seed=0)
        stores = (*prepared.train, *prepared.validation)
        assert sum(store.manifest.documents for store in stores) == 41 and 2 < stores[1].manifest.documents < 20
        shown = [prepared.tokenizer.decode(store.document(at).tolist()) for store in stores for at in range(store.manifest.documents)]
        assert len(set(shown)) == 41, "those that differ in their tools are two"
        assert prepared.template is not None
        assert all(prepared.template.render(one["messages"], tools=one["tools"]) in shown for one in records)
        said = trained_text(prepared)
        assert (
            said.endswith("</tool_call><|im_end|>It is that.<|im_end|>") and said.startswith("<tool_call>") and "tool_response" not in said
        )
        assert prepare(data, seed=0).fingerprint == prepared.fingerprint and not prepare(data, seed=0).built


def test_each_turn_with_its_reasoning(tmp_path: Path) -> None:
    """Under a template that takes reasoning away from earlier turns: every call and every answer, with what led to it."""
    twice = [*THOUGHT, *copied(THOUGHT)]
    twice[4]["content"] = "And now?"
    for message in twice[4:]:
        message.pop("reasoning_content", None)
    twice[5]["reasoning_content"] = "Again."
    file = written(tmp_path / "a.jsonl", {"messages": twice, "tools": [WEATHER]})
    keys = {"template": own_template(tmp_path, "qwen3"), "train_on": "each"}
    prepared = prepare(data_of(tmp_path, file, chat=keys, sequence=4096), seed=0)
    said = [trained_text(prepared, number) for number in range(prepared.train[0].manifest.documents)]
    assert len(said) == 4 and said[0].startswith("<think>\nI need the weather.\n</think>") and "It is three." in said[1]
    assert said[2].startswith("<think>\nAgain.\n</think>\n\n<tool_call>") and said[3].startswith("<think>\n\n</think>")
    store = prepared.train[0]
    assert all("0 to 23" in prepared.tokenizer.decode(store.document(number).tolist()) for number in range(4)), "each has the tools"
    with pytest.raises(DataError, match="1 line cannot be read") as failure:
        prepare(data_of(tmp_path, file, chat={**keys, "train_on": "assistant"}, sequence=4096), seed=0)
    told = failure.value.details[0]
    assert (
        told.startswith(f"{tmp_path}/a.jsonl:1: the template {tmp_path}/own.jinja does not show the reasoning of turn 2; ")
        and "each" in told
    )


def test_what_a_template_leaves_out_is_skipped_where_bad_lines_may_be(tmp_path: Path) -> None:
    file = written(
        tmp_path / "a.jsonl", {"messages": [user("Hi"), says("Hello")]}, {"messages": ONE, "tools": [WEATHER]}, {"messages": TWO}
    )
    with pytest.raises(DataError, match="2 lines cannot be read") as failure:
        prepare(data_of(tmp_path, file), seed=0)
    assert failure.value.where == f"{tmp_path}/a.jsonl:2"
    prepared = prepare(data_of(tmp_path, file, max_bad_lines=2), seed=0)
    assert prepared.train[0].manifest.documents == 1 and "2 bad lines were skipped" in prepared.notes


def test_the_preview_shows_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is trained of them in [ ], as JSON and on the page; what tools say is not."""
    file = written(tmp_path / "a.jsonl", {"messages": ONE, "tools": [WEATHER]})
    (tmp_path / "run.yaml").write_text(
        f"data: {{source: {file}, dir: {tmp_path}/data, validation: 0, sequence: 4000,\n"
        "  chat: {template: qwen}, tokenizer: {kind: bytes}}\n"
        "model: {vocab: 300}\nbatch: {global: 1, micro: 1}\n"
    )
    words = ["data", "preview", str(tmp_path / "run.yaml"), "--tokens", "4096"]
    assert cli.run([*words, "--html", str(tmp_path / "page.html")]) == 0
    shown = capsys.readouterr().out
    assert '<|im_start|>assistant⏎[<tool_call>⏎{"name": "weather", "arguments": {"place": "Oslo"' in shown
    assert '</tool_call><|im_end|>]⏎<|im_start|>user⏎<tool_response>⏎{"t": 3}⏎' in shown and "⏎[3 °C.<|im_end|>]" in shown
    page = Page((tmp_path / "page.html").read_text())
    assert "weather" in "".join(page.marked) and "tool_response" not in "".join(page.marked) and "0 to 23" in "".join(page.words)
    assert cli.run([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    trained = sum(len(ids) for row in told["rows"] for ids, weight in zip(row["ids"], row["weights"], strict=True) if weight)
    assert told["counts"]["trained_tokens"] == told["target_tokens"] == trained
    assert told["rows"][0]["at"] == 0 and told["rows"][0]["of"] == sum(map(len, told["rows"][0]["ids"]))
    capsys.readouterr()
    assert cli.run([*words[:3], "--tokens", "40"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"sequence 0: of 40 tokens from \d{3} on, of \d{3,4}, 30 are trained", shown), "the definitions alone are longer"
    assert "assistant⏎[<tool_call>⏎" in shown
