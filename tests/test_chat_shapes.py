"""Conversations as others write them: shapes, arrays, conversations in the place of text, templates that rewrite earlier turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_llm.config.schema import DataConfig
from dist_llm.data import chat
from dist_llm.data.batches import training_batches
from dist_llm.data.prepare import prepare
from dist_llm.errors import DataError, UsageError
from tests.chat_oracle import judge
from tests.test_chat_data import LINES, ROUND, data_of, trained_text, written

SAME: list[tuple[str, dict[str, Any], list[tuple[str, str, float | None]]]] = [  # a shape, an object, its turns
    ("sharegpt", {"conversations": ROUND}, [("user", "Hi", None), ("assistant", "Hello", None)]),
    ("sharegpt", {"system": " ", **LINES["sharegpt"]}, [("user", "Hi", None), ("assistant", "Hello", None)]),
    ("messages", {"messages": [{"role": "system", "content": ""}, *ROUND]}, [("user", "Hi", None), ("assistant", "Hello", None)]),
    (
        "messages",
        {
            "messages": [
                {"role": "developer", "content": "Be kind"},
                {**ROUND[0], "tool_calls": []},
                {**ROUND[1], "thinking": None},
            ]
        },
        [("system", "Be kind", None), ("user", "Hi", None), ("assistant", "Hello", None)],
    ),
    (
        "messages",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, ROUND[1]],
            "tools": [],
            "chat_template_kwargs": {"enable_thinking": None, "tools": []},
        },
        [("user", "Hi", None), ("assistant", "Hello", None)],
    ),
    (
        "prompt_completion",
        {"prompt": [*ROUND, {"role": "user", "content": "More"}], "completion": [{"role": "assistant", "content": "Yes"}]},
        [("user", "Hi", None), ("assistant", "Hello", 0.0), ("user", "More", None), ("assistant", "Yes", None)],
    ),
    ("prompt_completion", {"prompt": ROUND[:1], "completion": "Hello"}, [("user", "Hi", None), ("assistant", "Hello", None)]),
    *(
        (shape, {"system": "Be kind", **record}, [("system", "Be kind", None), ("user", "Hi", None), ("assistant", "Hello", None)])
        for shape, record in (
            ("messages", {"messages": ROUND}),
            ("messages", {"messages": [{"role": "system", "content": "Be kind"}, *ROUND]}),
            ("messages", {"messages": [{"role": "developer", "content": " "}, *ROUND]}),
            ("sharegpt", {"conversations": [{"from": "system", "value": "Be kind"}, *ROUND]}),
            ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}),
            ("prompt_completion", {"prompt": ROUND[:1], "completion": ROUND[1:]}),
            ("prompt_completion", {"prompt": [{"role": "system", "content": "Be kind"}, ROUND[0]], "completion": "Hello"}),
        )
    ),
]


LONG = [ROUND[0], {**ROUND[1], "content": "Hello" * 90}]


@pytest.mark.parametrize("number", range(len(SAME)))
def test_what_others_write_is_understood(number: int) -> None:
    shape, record, turns = SAME[number]
    text, why = chat.taker(shape, train_on="assistant")(record)  # type: ignore[arg-type]
    assert not why and [(m["role"], m["content"], m.get("weight")) for m in chat.messages_of(text)] == turns, why
    assert judge(json.dumps(record), shape, "assistant") == [list(turn) for turn in turns]


def test_a_system_beside_another_is_refused() -> None:
    """And one that is no text; beside a text that is trained whole it is a key like others."""
    for shape, record in (
        ("messages", {"messages": [{"role": "system", "content": "Be"}, *ROUND]}),
        ("sharegpt", {"conversations": [{"role": "system", "content": "Be"}, *ROUND]}),
        ("prompt_completion", {"prompt": [{"role": "system", "content": "Be"}, ROUND[0]], "completion": "Hello"}),
    ):
        for system, words in (("Be kind", "'system' beside the turns says something else"), (3, "'system' must be a string")):
            told = {"system": system, **record}
            assert words in chat.taker(shape, train_on="assistant")(told)[1]  # type: ignore[arg-type]
            assert judge(json.dumps(told), shape, "assistant") is None
    assert not chat.taker("text", train_on="assistant")({"system": 3, "text": "x"})[1]


def test_a_prompt_of_messages_is_not_trained() -> None:
    asked = [*ROUND, {"role": "user", "content": "More"}]
    take = chat.taker("prompt_completion", train_on="assistant")
    for record, words in (
        ({"prompt": ROUND, "completion": "Yes"}, "'prompt' must end with a turn of the user or a tool"),
        ({"prompt": [ROUND[0], {**ROUND[1], "weight": 2}, asked[2]], "completion": "Yes"}, "a turn of 'prompt' is to be trained"),
        ({"prompt": asked, "completion": [ROUND[1]], "weight": 2}, "the object has a weight and its completion is messages"),
        ({"prompt": asked, "completion": [{"role": "user", "content": "x"}, ROUND[1]]}, "two user turns in a row, 3 and 4"),
    ):
        assert words in take(record)[1]
    whole = chat.messages_of(chat.taker("prompt_completion", train_on="all")({"prompt": asked, "completion": "Yes"})[0])
    assert not any("weight" in message for message in whole)


def test_conversations_that_are_read_as_text_are_told(tmp_path: Path) -> None:
    """A note where a text beside the rest is trained; where there is none, the setting that reads them comes first."""
    plain = {"source": "", "dir": str(tmp_path / "data"), "validation": 0.0, "sequence": 8, "tokenizer": {"kind": "bytes"}}
    for shape, record in LINES.items():
        plain["source"] = written(tmp_path / f"{shape}.jsonl", record, record)
        if shape in ("alpaca", "text"):
            notes = prepare(DataConfig.model_validate(plain), seed=0).notes
            assert any("'text' alone is trained" in note and "data.chat.format=alpaca" in note for note in notes) == (shape == "alpaca")
            continue
        with pytest.raises(DataError, match="2 lines cannot be read") as failure:
            prepare(DataConfig.model_validate(plain), seed=0)
        assert str(failure.value.next).startswith(f"the same command with data.chat.format={shape} "), failure.value.next
    plain["source"] = written(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DataError) as failure:
        prepare(DataConfig.model_validate(plain), seed=0)
    assert str(failure.value.next).startswith("the same command with preference.loss=sigmoid ")
    plain["source"] = written(tmp_path / "bad.jsonl", b"[", LINES["text"])
    with pytest.raises(DataError, match="1 line cannot be read") as failure:
        prepare(DataConfig.model_validate(plain), seed=0)
    assert str(failure.value.next).startswith("mend")
    plain["source"] = [plain["source"], written(tmp_path / "chat.jsonl", LINES["messages"])]  # the way is that of the other file
    with pytest.raises(DataError, match="1 line cannot be read") as failure:
        prepare(DataConfig.model_validate(plain), seed=0)
    assert failure.value.where == f"{tmp_path}/bad.jsonl:1" and str(failure.value.next).startswith("mend")
    plain["source"].reverse()
    with pytest.raises(DataError, match="1 line cannot be read") as failure:
        prepare(DataConfig.model_validate(plain), seed=0)
    assert str(failure.value.next).startswith("the same command with data.chat.format=messages ")


def test_texts_have_no_answer_to_end(tmp_path: Path) -> None:
    """Texts longer than a sequence may all be cut; answers may not, neither alone nor beside texts."""
    text, talk = (written(tmp_path / f"{name}.jsonl", one) for name, one in (("text", {"text": "x" * 400}), ("chat", {"messages": LONG})))
    how = {"too_long": "truncate", "format": "auto"}
    for source, fine in ((text, True), ([text, text], True), (talk, False), ([text, talk], False)):
        data = data_of(tmp_path, source, chat=how, sequence=32)
        prepared = prepare(data, seed=0)
        if fine:
            assert training_batches(prepared, data, global_batch=1, seed=0).num_samples
            continue
        with pytest.raises(DataError, match="cut before an answer ends"):
            training_batches(prepared, data, global_batch=1, seed=0)


def test_an_array_is_read_as_lines_are(tmp_path: Path) -> None:
    """Alpaca as it is published: one array in a `.json` file."""
    records = [{"instruction": f"Say {number}", "input": "", "output": str(number)} for number in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=4))
    whole = prepare(data_of(tmp_path, str(tmp_path / "a.json")), seed=0)
    lines = prepare(data_of(tmp_path, written(tmp_path / "b.jsonl", *records)), seed=0)
    assert whole.shapes == ("alpaca",) and whole.train[0].manifest.documents == 30
    assert whole.fingerprint == lines.fingerprint
    (tmp_path / "c.json").write_text(json.dumps([*records[:3], {"instruction": "x", "output": 3}], indent=1))
    with pytest.raises(DataError) as failure:
        prepare(data_of(tmp_path, str(tmp_path / "c.json")), seed=0)
    assert failure.value.details[0].startswith(f"{tmp_path}/c.json:17, object 4: 'output' must be a string")


# --- templates that rewrite earlier turns ---------------------------------------------------------------------------------

FORGETS = (  # as Qwen3's does: an empty thought before the last answer alone
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_each_turn_is_a_sample_of_its_own(tmp_path: Path) -> None:
    """What is trained is the turn as the template shows it at the end, after the very text that asks for it."""
    (tmp_path / "own.jinja").write_text(FORGETS)
    turns = [{"role": role, "content": f"{role[0]}{at}"} for at in range(3) for role in ("user", "assistant")]
    silent = [*turns[:1], {**turns[1], "train": False}, *turns[2:]]
    file = written(tmp_path / "a.jsonl", {"messages": turns}, {"messages": silent}, {"messages": turns[:2]})
    chat_keys = {"template": str(tmp_path / "own.jinja"), "train_on": "each"}
    with pytest.raises(UsageError, match="rewrites earlier turns") as failure:
        prepare(data_of(tmp_path, file, chat={**chat_keys, "train_on": "assistant"}), seed=0)
    assert str(failure.value.next).startswith("the same command with data.chat.train_on=each")
    prepared = prepare(data_of(tmp_path, file, chat=chat_keys), seed=0)
    store, template = prepared.train[0], prepared.template
    assert template is not None
    ends = (2, 4, 6, 4, 6, 2)  # of the samples, in turns
    assert store.manifest.documents == len(ends)
    for number, end in enumerate(ends):
        assert prepared.tokenizer.decode(store.document(number).tolist()) == template.render(turns[:end])
        assert trained_text(prepared, number) == f"<think>\n\n</think>\n\na{end // 2 - 1}<|im_end|>"
        prompt = template.prompt(turns[: end - 1], prepared.tokenizer)
        assert store.document(number)[: len(prompt)].tolist() == prompt
    nothing = written(tmp_path / "b.jsonl", {"messages": [ROUND[0], {**ROUND[1], "train": False}]})
    with pytest.raises(DataError, match="1 line cannot be read"):
        prepare(data_of(tmp_path, nothing, chat=chat_keys), seed=0)


def test_no_sample_of_a_turn_is_on_both_sides(tmp_path: Path) -> None:
    """Conversations that begin alike, and the samples of one, are held out together."""
    lines = []
    for number in range(80):
        turns = [{"role": role, "content": f"{role[0]}{number}.{at}"} for at in range(3) for role in ("user", "assistant")]
        lines += [{"messages": turns[:stop]} for stop in (2, 4, 6)]
    data = data_of(tmp_path, written(tmp_path / "a.jsonl", *lines), validation=0.2, sequence=256, chat={"train_on": "each"})
    prepared = prepare(data, seed=0)
    asked = [
        {prepared.tokenizer.decode(store.document(number).tolist()).split("<|im_end|>")[0] for number in range(store.manifest.documents)}
        for store in (prepared.train[0], prepared.validation[0])
    ]
    assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 80 and 5 < len(asked[1]) < 40
    assert sum(store.manifest.documents for store in (prepared.train[0], prepared.validation[0])) == 80 * 6
    assert prepare(data, seed=0).fingerprint == prepared.fingerprint
