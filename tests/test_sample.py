"""Sampling: the cached model is the model, every choice is addressed, and weights of any layout give the same text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_llm.config.layout import Layout, parse_layout, resolve, world_of
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.data.tokenizer import bytes_tokenizer, train_bpe
from dist_llm.model.init import initialise
from dist_llm.model.table import table
from dist_llm.model.transformer import make_context
from dist_llm.train.sample import Choice, Model, generate, pick, stream, with_whole_weights
from dist_llm.train.setup import make_engine, make_mesh
from tests.ranks import Ranks

LLAMA = {"family": "llama", "layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "ffn": 88, "vocab": 257, "tied": True, "init_std": 0.3}
GPT2 = {"family": "gpt2", "layers": 2, "dim": 32, "heads": 4, "vocab": 97, "max_positions": 24, "init_std": 0.3, "dropout": 0.3}
QWEN = {"family": "qwen3", "layers": 2, "dim": 32, "heads": 4, "kv_heads": 4, "head_dim": 16, "ffn": 64, "vocab": 61, "init_std": 0.3}


class Initial:
    """The initial weights of a model, whole."""

    def __init__(self, model: ModelConfig) -> None:
        self.rows = {row.name: row for row in table(model)}

    def whole(self, name: str) -> torch.Tensor:
        row = self.rows[name]
        out = torch.empty(row.numel, dtype=torch.float64)
        initialise(out, row, tuple((0, extent) for extent in row.shape), seed=5)
        return out.view(row.shape)


def build(given: dict[str, Any]) -> Model:
    config = ModelConfig.model_validate(given)
    return Model(Initial(config), config, dtype=torch.float64, device=torch.device("cpu"))


def forward(model: Model, tokens: list[int]) -> torch.Tensor:
    """Logits (S, V) of a whole sequence at once, as training computes them."""
    line = torch.tensor([tokens])
    context = make_context(model.config, line, line, dtype=torch.float64, training=False)
    x = model.units[0](context)
    for block in model.units[1:-1]:
        x = block(x, context)
    return model.units[-1].logits(x)[0]


@pytest.mark.parametrize("given", [LLAMA, GPT2, QWEN], ids=["llama", "gpt2", "qwen3"])
def test_token_by_token_is_the_whole_sequence(given: dict[str, Any]) -> None:
    model = build(given)
    tokens = torch.randint(model.config.vocab, (20,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = forward(model, tokens)
    model.remember()
    found = [model.logits(tokens[:7])] + [model.logits([tokens[at]], first=at) for at in range(7, 20)]
    torch.testing.assert_close(torch.stack(found), expected[6:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_generation_against_a_model_that_reads_all_anew(given: dict[str, Any]) -> None:
    """Also past the window, where the newer half is read again from position 0."""
    model, window, choice = build(given), 16, Choice(temperature=1.3, seed=3)
    prompt = [5, 9, 11, 2, 60]
    found = list(generate(model, prompt, count=40, choice=choice, window=window))
    seen, expected = list(prompt), []
    model = build(given)
    for position in range(40):
        expected.append(pick(forward(model, seen)[-1], choice, position=position))
        seen.append(expected[-1])
        if len(seen) > window:
            seen = seen[-window // 2 :]
    assert found == expected and len(set(found)) > 5


def test_the_same_seed_gives_the_same_text_and_the_end_ends_it() -> None:
    model = build(LLAMA)

    def text(**changes: Any) -> list[int]:
        return list(generate(model, [1, 2, 3], count=30, choice=Choice(**changes), window=64))

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(temperature=0.0, seed=1) == text(temperature=0.0, seed=2) == text(top_k=1, seed=3) == text(top_p=0.0, seed=4)
    whole = text(seed=1)
    ended = list(generate(model, [1, 2, 3], count=30, choice=Choice(seed=1), window=64, end=whole[10]))
    assert ended == whole[: whole.index(whole[10]) + 1]
    assert list(generate(model, list(range(200)), count=3, choice=Choice(seed=1), window=8))  # a prompt longer than the window


def test_a_row_without_a_token_is_never_chosen() -> None:
    """The model's vocabulary is larger than its tokenizer's: rows that were never trained towards a token stay silent."""
    config, known = ModelConfig.model_validate({**LLAMA, "vocab": 300}), set(range(10, 200)) | {256}
    settings: dict[str, Any] = {"dtype": torch.float64, "device": torch.device("cpu")}
    free, padded = Model(Initial(config), config, **settings), Model(Initial(config), config, **settings, tokens=known)
    for changes in ({"seed": 2}, {"temperature": 0.0}, {"top_k": 250}, {"top_p": 1.0}):
        choice = Choice(**{"temperature": 3.0, **changes})
        assert set(generate(padded, [12, 13], count=80, choice=choice, window=16)) <= known
    assert not set(generate(free, [12, 13], count=80, choice=Choice(temperature=3.0, seed=2), window=16)) <= known
    assert bytes_tokenizer().ids == set(range(257))


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
    number = 1500

    def shares(**changes: Any) -> torch.Tensor:
        choice = Choice(**{"temperature": 1.0, "seed": 11, **changes})
        picked = torch.tensor([pick(logits, choice, position=position) for position in range(number)])
        return torch.bincount(picked, minlength=6) / number

    def check(found: torch.Tensor, expected: torch.Tensor) -> None:
        assert bool((found[expected == 0] == 0).all())
        assert float((found - expected).abs().max()) < 4 * (0.25 / number) ** 0.5

    check(shares(), torch.softmax(logits, 0))
    check(shares(temperature=0.5), torch.softmax(logits / 0.5, 0))
    top = torch.where(logits >= 1.0, logits, -torch.inf)
    check(shares(top_k=3), torch.softmax(top, 0))
    # 3.0 has 0.61 of the mass and 2.0 has 0.23: two of them make up 0.8, one makes up 0.6
    check(shares(top_p=0.8), torch.softmax(torch.where(logits >= 2.0, logits, -torch.inf), 0))
    check(shares(top_p=0.6), torch.softmax(torch.where(logits >= 3.0, logits, -torch.inf), 0))


def test_a_letter_of_several_bytes_comes_whole() -> None:
    tokenizer = bytes_tokenizer()
    text = "naïve 日本 🎈 end"
    pieces = list(stream(tokenizer, iter([*tokenizer.encode(text), tokenizer.end_id, 65])))
    assert "".join(pieces) == text and "🎈" in pieces and all("\ufffd" not in piece for piece in pieces)
    assert "".join(stream(tokenizer, iter([0xF0, 0x9F]))) == "\ufffd", "an unfinished letter is shown at the end"
    assert "".join(stream(tokenizer, iter([255] * 9 + [65]))).endswith("A"), "bytes that are no letter do not stop the text"
    learned = train_bpe(["a quick brown fox über allem 日本 " * 20], vocab=300)
    assert "".join(stream(learned, iter(learned.encode(text)))) == text


def weights_case(rank: int, world: int, say: Callable, config: dict, layout: dict, folder: str) -> list[Any]:
    """Sums of all whole weights as rank 0 sees them, and a text from them."""
    torch.set_num_threads(1)
    settings = Config.model_validate(config)
    mesh = make_mesh(settings, Layout(**layout), rank)
    engine = make_engine(settings, mesh, device=torch.device("cpu"), dtype=torch.float64)
    seen: list[Any] = []

    def use(weights: Any) -> None:
        model = Model(weights, settings.model, dtype=torch.float64, device=torch.device("cpu"))
        seen.append([float(weights.whole(row.name).sum()).hex() for row in table(settings.model)])
        seen.append(list(generate(model, [1, 2, 3], count=12, choice=Choice(seed=1), window=32)))

    for _ in range(2):
        with_whole_weights(engine, settings.model, Path(folder), use)
    assert not Path(folder).exists() or rank
    return seen


def test_every_layout_hands_over_the_same_weights(ranks: Ranks, tmp_path: Path) -> None:
    config = Config.model_validate(
        {"model": LLAMA, "data": {"sequence": 32, "tokenizer": {"kind": "bytes"}}, "batch": {"global": 8, "micro": 1}}
    )
    tree = config.model_dump(by_alias=True)
    found = {}
    for text in ("dp=1", "dp=2,zero=3", "tp=2", "pp=2", "tp=2,pp=2", "dp=2,tp=2,zero=1"):
        shape = resolve(parse_layout(text), world_of(parse_layout(text)))
        first, *others = ranks.run(shape.world, "tests.test_sample:weights_case", tree, asdict(shape), str(tmp_path / "w"))
        assert all(other == [] for other in others) and first[:2] == first[2:]
        found[text] = json.dumps(first)
    assert len(set(found.values())) == 1, found


def test_a_model_of_a_checkpoint_takes_a_tied_weight_once() -> None:
    calls: list[str] = []
    config = ModelConfig.model_validate(LLAMA)
    initial = Initial(config)
    model = Model(
        SimpleNamespace(whole=lambda name: calls.append(name) or initial.whole(name)),
        config,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert sorted(calls) == sorted(row.name for row in table(config))
    assert model.units[0].embedding.weight is model.units[-1].head.weight
