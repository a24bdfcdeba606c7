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
from dist_llm.infer.choose import Choice, choose, penalised, points, ranked
from dist_llm.infer.model import Model
from dist_llm.infer.text import Text, stream
from dist_llm.infer.write import Writer, follow
from dist_llm.mesh import build_mesh
from dist_llm.model.init import initialise
from dist_llm.model.table import table
from dist_llm.model.transformer import make_context
from dist_llm.train.sample import with_whole_weights
from dist_llm.train.setup import make_engine, make_mesh
from tests.ranks import Ranks

LLAMA = {"family": "llama", "layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "ffn": 88, "vocab": 257, "tied": True, "init_std": 0.3}
GPT2 = {"family": "gpt2", "layers": 2, "dim": 32, "heads": 4, "vocab": 97, "max_positions": 24, "init_std": 0.3, "dropout": 0.3}
QWEN = {"family": "qwen3", "layers": 2, "dim": 32, "heads": 4, "kv_heads": 4, "head_dim": 16, "ffn": 64, "vocab": 61, "init_std": 0.3}


class Initial:
    """The initial weights of a model, whole."""

    def __init__(self, model: ModelConfig) -> None:
        self.rows = {row.name: row for row in table(model)}
        self.read_elements = 0

    def read(self, kind: str, name: str, box: Any, start: int, stop: int) -> torch.Tensor:
        row = self.rows[name]
        out = torch.empty(stop - start, dtype=torch.float64)
        initialise(out, row, tuple(tuple(side) for side in box), seed=5)
        self.read_elements += stop - start
        return out


def build(given: dict[str, Any]) -> Model:
    config = ModelConfig.model_validate(given)
    return Model(Initial(config), config, dtype=torch.float64, device=torch.device("cpu"))


def forward(model: Model, tokens: list[int]) -> torch.Tensor:
    """Logits (S, V) of a whole sequence at once, as training computes them."""
    line = torch.tensor([tokens])
    context = make_context(model.config, line, line, dtype=torch.float64, training=False)
    return model._whole(model._walk(context, None))[0]


GEMMA = {
    "family": "gemma2",
    "layers": 4,
    "dim": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "ffn": 48,
    "vocab": 67,
    "sliding_window": 5,
    "init_std": 0.3,
}
LATER = {**GEMMA, "family": "gemma3", "full_every": 3, "rope_local_theta": 100.0}
OLMO = {"family": "olmo2", "layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 61, "init_std": 0.3}
MISTRAL = {**LLAMA, "family": "mistral", "sliding_window": 4, "tied": False}
MODELS = {"llama": LLAMA, "gpt2": GPT2, "qwen3": QWEN, "gemma2": GEMMA, "gemma3": LATER, "olmo2": OLMO, "mistral": MISTRAL}
FAMILIES = pytest.mark.parametrize("given", MODELS.values(), ids=MODELS.keys())


def drawn(model: Model, count: int, seed: int = 1) -> list[int]:
    return torch.randint(model.config.vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def written(model: Model, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """The tokens of each line."""
    writer = Writer(model, prompts, **settings)
    lines: list[list[int]] = [[] for _ in writer.seen]
    for tokens in writer:
        for line, token in tokens.items():
            lines[line].append(token)
    return lines


@FAMILIES
def test_what_is_read_in_parts_is_the_whole_sequence(given: dict[str, Any]) -> None:
    """A prompt, one token at a time, and several at once, over one cache."""
    model = build(given)
    tokens = drawn(model, 20)
    expected = forward(model, tokens)
    cache = model.cache(lines=1, capacity=20)
    found = {6: model.read(cache, [tokens[:7]])[0], 7: model.read(cache, [tokens[7:8]])[0], 12: model.read(cache, [tokens[8:13]])[0]}
    found |= {at: model.read(cache, [[tokens[at]]])[0] for at in range(13, 20)}
    for at, logits in found.items():
        torch.testing.assert_close(logits, expected[at], rtol=1e-10, atol=1e-10)


@FAMILIES
def test_lines_of_any_length_are_read_as_each_alone(given: dict[str, Any]) -> None:
    """Prompts of different lengths in one pass, then a token each; then fewer lines, doubled ones, and other ones in their place."""
    model = build(given)
    lines = [drawn(model, size, seed=size) for size in (3, 11, 1, 7)]
    cache = model.cache(lines=4, capacity=16)

    def check(found: torch.Tensor) -> None:
        for logits, line in zip(found, lines, strict=True):
            torch.testing.assert_close(logits, forward(model, line)[-1], rtol=1e-10, atol=1e-10)

    def one_more(seed: int) -> None:
        for line, token in zip(lines, drawn(model, len(lines), seed=seed), strict=True):
            line.append(token)
        check(model.read(cache, [line[-1:] for line in lines]))

    check(model.read(cache, lines))
    one_more(21)
    one_more(22)
    cache.keep([3, 1, 1])
    lines = [lines[3], lines[1], list(lines[1])]
    one_more(23)
    other = model.cache(lines=2, capacity=5)
    lines[2], lines[0] = drawn(model, 5, seed=31), drawn(model, 4, seed=32)
    model.read(other, [lines[2], lines[0]])
    cache.put([2, 0], other)
    one_more(24)


@FAMILIES
def test_generation_against_a_model_that_reads_all_anew(given: dict[str, Any]) -> None:
    """Also past the window, where the newer half is read again from position 0; several lines give what each gives alone."""
    model, window, choice = build(given), 12, Choice(temperature=1.3, repetition_penalty=1.1, seed=3)
    prompts = [drawn(model, size, seed=size) for size in (5, 30, 1, 12)]
    expected = [[] for _ in prompts]
    for prompt, line in zip(prompts, expected, strict=True):
        seen, whole = prompt[-window:], prompt[-window:]
        for position in range(20):
            logits = penalised(forward(model, seen)[-1:], [whole], 1.1)
            line.append(int(choose(logits, choice, points(choice, [0], position))))
            whole = [*whole, line[-1]]
            seen = [*seen, line[-1]]
            if len(seen) > window:
                seen = seen[-window // 2 :]
    found = written(model, prompts, count=20, choice=choice, window=window)
    assert found == expected and len(set(found[0])) > 5
    assert [list(follow(model, prompt, count=20, choice=choice, window=window)) for prompt in prompts] == expected


def test_samples_of_a_prompt_are_apart_and_do_not_depend_on_others() -> None:
    model, prompts = build(LLAMA), [[1, 2, 3], [9, 8, 7, 6, 5]]
    settings: dict[str, Any] = {"count": 12, "choice": Choice(temperature=2.0, seed=4), "window": 32}
    both = written(model, prompts, samples=3, **settings)
    assert both[:3] == written(model, prompts[:1], samples=3, **settings) and both[3:4] == written(model, prompts[1:], **settings)
    assert len({tuple(line) for line in both}) == 6


def test_the_same_seed_gives_the_same_text_and_the_end_ends_it() -> None:
    model = build(LLAMA)

    def text(**changes: Any) -> list[int]:
        return list(follow(model, [1, 2, 3], count=30, choice=Choice(**changes), window=64))

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(temperature=0.0, seed=1) == text(temperature=0.0, seed=2) == text(top_k=1, seed=3) == text(top_p=1e-9, seed=4)
    assert text(min_p=1.0, seed=5) == text(temperature=0.0)
    whole = text(seed=1)
    ended = list(follow(model, [1, 2, 3], count=30, choice=Choice(seed=1), window=64, ends={whole[10]}))
    assert ended == whole[: whole.index(whole[10]) + 1]
    assert list(follow(model, list(range(200)), count=3, choice=Choice(seed=1), window=8))  # a prompt longer than the window


def test_lines_end_one_by_one_and_the_others_do_not_notice() -> None:
    model, prompts = build(LLAMA), [[1, 2, 3], [9, 8], [7], [40, 41, 42, 43]]
    settings: dict[str, Any] = {"count": 20, "choice": Choice(temperature=2.0, seed=4), "window": 12}
    whole = written(model, prompts, **settings)
    end = whole[1][5]
    for found, line in zip(written(model, prompts, ends={end}, **settings), whole, strict=True):
        assert found == (line[: line.index(end) + 1] if end in line else line)
    writer, found = Writer(model, prompts, **settings), []
    for number, tokens in enumerate(writer):
        found.append(set(tokens))
        if number < 3:
            writer.stop((2, 0, 3)[number])
    assert found == [{0, 1, 2, 3}, {0, 1, 3}, {1, 3}, *[{1}] * 17]


def test_a_row_without_a_token_is_never_chosen() -> None:
    """The model's vocabulary is larger than its tokenizer's: rows that were never trained towards a token stay silent."""
    config, known = ModelConfig.model_validate({**LLAMA, "vocab": 300}), set(range(10, 200)) | {256}
    settings: dict[str, Any] = {"dtype": torch.float64, "device": torch.device("cpu")}
    free, padded = Model(Initial(config), config, **settings), Model(Initial(config), config, **settings, tokens=known)
    for changes in ({"seed": 2}, {"temperature": 0.0}, {"top_k": 250}, {"top_p": 1.0}, {"repetition_penalty": 1.5}):
        choice = Choice(**{"temperature": 3.0, **changes})
        assert set(follow(padded, [12, 13], count=80, choice=choice, window=16)) <= known
    assert not set(follow(free, [12, 13], count=80, choice=Choice(temperature=3.0, seed=2), window=16)) <= known
    assert bytes_tokenizer().ids == set(range(257))


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, 3.0]], dtype=torch.float64)
    number = 1500

    def shares(**changes: Any) -> torch.Tensor:
        choice = Choice(**{"temperature": 1.0, "seed": 11, **changes})
        numbers = torch.cat([points(choice, [0], position) for position in range(number)])
        return torch.bincount(choose(logits.expand(number, -1), choice, numbers), minlength=6) / number

    def check(found: torch.Tensor, kept: torch.Tensor, temperature: float = 1.0) -> None:
        expected = torch.softmax(torch.where(kept, logits[0] / temperature, -torch.inf), 0)
        assert bool((found[expected == 0] == 0).all())
        assert float((found - expected).abs().max()) < 4 * (0.25 / number) ** 0.5

    check(shares(), logits[0] > -9)
    check(shares(temperature=0.5), logits[0] > -9, 0.5)
    check(shares(top_k=3), logits[0] >= 1.0)
    # 3.0 has 0.61 of the mass and 2.0 has 0.23: two of them make up 0.8, one makes up 0.6
    check(shares(top_p=0.8), logits[0] >= 2.0)
    check(shares(top_p=0.6), logits[0] >= 3.0)
    check(shares(min_p=0.1), logits[0] >= 1.0)  # exp(-2) = 0.135


def test_the_rules_are_those_of_transformers() -> None:
    """On logits with large and small values: the same tokens are left, with the same probabilities."""
    generation = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(3)
    seen = torch.randint(60, (5, 9), generator=generator)
    logits = 3 * torch.randn(5, 60, dtype=torch.float64, generator=generator)
    for changes in (
        {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.05}, {"repetition_penalty": 1.7}, {"temperature": 0.6, "top_k": 20, "top_p": 0.9},
        {"temperature": 2.5, "top_p": 0.95, "min_p": 0.1},
        {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 0.8},
    ):  # fmt: skip
        choice = Choice(**{"temperature": 1.0, **changes})
        expected = generation.RepetitionPenaltyLogitsProcessor(choice.repetition_penalty)(seen, logits.clone())
        expected = generation.TemperatureLogitsWarper(choice.temperature)(seen, expected)
        if choice.top_k:
            expected = generation.TopKLogitsWarper(choice.top_k)(seen, expected)
        if choice.top_p:
            expected = generation.TopPLogitsWarper(choice.top_p)(seen, expected)
        if choice.min_p:
            expected = generation.MinPLogitsWarper(choice.min_p)(seen, expected)
        values, tokens = ranked(penalised(logits, seen.tolist(), choice.repetition_penalty), choice)
        found = torch.zeros_like(logits).scatter(1, tokens, torch.softmax(values, -1))
        torch.testing.assert_close(found, torch.softmax(expected, -1), rtol=1e-12, atol=1e-12)
        assert torch.equal(found > 0, torch.isfinite(expected))


def test_greedy_text_is_that_of_transformers() -> None:
    """A Llama of theirs with our weights, several prompts each alone: the tokens of generate, and the logits of a whole pass."""
    transformers = pytest.importorskip("transformers")
    model = build({**LLAMA, "tied": False})
    config = model.config
    settings = {"hidden_size": config.dim, "intermediate_size": config.ffn, "num_hidden_layers": config.layers, "vocab_size": config.vocab}
    settings |= {"num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "rms_norm_eps": config.norm_eps}
    settings |= {
        "rope_theta": config.rope_theta,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, attn_implementation="eager")).double().eval()
    theirs.load_state_dict({theirs_name(name): value for name, value in parameters(model).items()}, strict=True)
    prompts = [drawn(model, size, seed=size) for size in (4, 9, 2)]
    found = written(model, prompts, count=20, choice=Choice(temperature=0.0), window=64)
    for prompt, line in zip(prompts, found, strict=True):
        given = torch.tensor([prompt])
        made = theirs.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=20, do_sample=False)
        assert made[0, len(prompt) :].tolist() == line
    penalty = written(model, prompts[:1], count=20, choice=Choice(temperature=0.0, repetition_penalty=1.4), window=64)[0]
    made = theirs.generate(torch.tensor(prompts[:1]), max_new_tokens=20, do_sample=False, repetition_penalty=1.4)
    assert made[0, 4:].tolist() == penalty != found[0]


@FAMILIES
def test_scores_are_those_of_the_whole_logits(given: dict[str, Any]) -> None:
    """Also where a line is shorter than the others, and over more tokens than are looked at together."""
    model = build(given)
    lines = [drawn(model, size, seed=size) for size in (24, 7, 15)]
    tokens, labels = torch.zeros(3, 23, dtype=torch.int64), torch.full((3, 23), -100)
    for row, line in enumerate(lines):
        tokens[row, : len(line) - 1], labels[row, : len(line) - 1] = torch.tensor(line[:-1]), torch.tensor(line[1:])
    labels[0, :5] = -100
    found, likeliest = model.scores(tokens, labels)
    for row, line in enumerate(lines):
        logits = forward(model, line[:-1])
        wanted = torch.tensor(line[1:])
        expected, first = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0], logits.argmax(-1) == wanted
        start = 5 if row == 0 else 0
        torch.testing.assert_close(found[row, start : len(line) - 1], expected[start:], rtol=1e-10, atol=1e-10)
        assert torch.equal(likeliest[row, start : len(line) - 1], first[start:])
        assert bool((found[row, len(line) - 1 :] == 0).all())
    assert bool((found[0, :5] == 0).all())


def parameters(model: Model) -> dict[str, torch.Tensor]:
    """The weights of a whole model by our names."""
    return {name: parameter.data for name, parameter in model.named.items()}


def theirs_name(name: str) -> str:
    """The name that transformers' Llama has for a weight of ours."""
    ends = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    if name in ends:
        return ends[name]
    _, layer, *rest = name.split(".")
    inside = ".".join(rest)
    for ours, other in (
        ("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"),
        ("attention.", "self_attn."), ("mlp.", "mlp."),
    ):  # fmt: skip
        if inside.startswith(ours):
            inside = inside.replace(ours, other, 1)
            break
    part = inside.split(".")[-2]
    return f"model.layers.{layer}.{inside.replace(f'.{part}.', f'.{part}_proj.') if '.' in inside.removesuffix('.weight') else inside}"


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
        seen.append(list(follow(model, [1, 2, 3], count=12, choice=Choice(seed=1), window=32)))

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
        first, *others = ranks.run(shape.world, "tests.test_infer:weights_case", tree, asdict(shape), str(tmp_path / "w"))
        assert all(other == [] for other in others) and first[:2] == first[2:]
        found[text] = json.dumps(first)
    assert len(set(found.values())) == 1, found


def test_a_tied_weight_is_read_once() -> None:
    calls: list[str] = []
    config = ModelConfig.model_validate(LLAMA)
    initial = Initial(config)
    weights = SimpleNamespace(read=lambda kind, name, *rest: calls.append(name) or initial.read(kind, name, *rest))
    model = Model(weights, config, dtype=torch.float32, device=torch.device("cpu"))
    assert sorted(calls) == sorted(row.name for row in table(config))
    assert model.units[0].embedding.weight is model.units[-1].head.weight
    assert model.nbytes == 4 * sum(row.numel for row in table(config))


# --- stop strings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["END"], "one two "),
        (["zzz"], "one two END three"),
        (["o END"], "one tw"),
        (["three", "END"], "one two "),
        (["e t"], "on"),
        (["one"], ""),
        (["threes"], "one two END three"),
        (["END three", "D"], "one two EN"),
    ],
)
def test_a_stop_string_ends_the_text_across_tokens(stops: list[str], expected: str) -> None:
    """The same text however it is cut into tokens, and nothing of a stop string is ever shown."""
    tokenizer = bytes_tokenizer()
    text, shown = Text(tokenizer, stops=stops), []
    for token in tokenizer.encode("one two END three"):
        shown.append(text.add(token))
        assert expected.startswith("".join(shown))
    assert "".join(shown) + text.finish() == expected
    assert (text.stopped is not None) == (expected != "one two END three")
    learned = train_bpe(["one two END three " * 20], vocab=300)
    text = Text(learned, stops=stops)
    assert "".join(map(text.add, learned.encode("one two END three"))) + text.finish() == expected


# --- several ranks ---------------------------------------------------------------------------------------------------------


def split_case(rank: int, world: int, say: Callable, given: dict[str, Any]) -> dict[str, Any]:
    """Logits of prompts and of tokens after them, a text, and how much of the weights this rank has read."""
    torch.set_num_threads(1)
    mesh = build_mesh(Layout(tp=world), rank, kv_heads=ModelConfig.model_validate(given).kv_heads)
    config = ModelConfig.model_validate(given)
    weights = Initial(config)
    model = Model(weights, config, dtype=torch.float64, device=torch.device("cpu"), group=mesh.tp)
    prompts = [drawn(model, size, seed=size) for size in (5, 1, 9)]
    cache = model.cache(lines=3, capacity=12)
    logits = [model.read(cache, prompts), model.read(cache, [[1], [2], [3]]), model.read(cache, [[4], [5], [6]])]
    score, _ = model.scores(torch.tensor(prompts[2:])[:, :-1], torch.tensor(prompts[2:])[:, 1:])
    texts = written(model, prompts, count=10, choice=Choice(temperature=1.2, top_p=0.9, seed=2), window=12, samples=2)
    heads = cache.keys[0].shape[1]
    return {"logits": torch.stack(logits).tolist(), "scores": score.tolist(), "texts": texts, "read": weights.read_elements, "heads": heads}


@pytest.mark.parametrize(
    "given",
    [LLAMA, GPT2, LATER, OLMO, {**LLAMA, "kv_heads": 1, "vocab": 259, "layers": 1}],
    ids=["llama", "gpt2", "gemma3", "olmo2", "one kv head"],
)
def test_ranks_share_a_model(ranks: Ranks, given: dict[str, Any]) -> None:
    """Each holds its slices and its heads' cache; logits and texts are those of one process."""
    one = split_case(0, 1, print, given)
    for world in (2, 4) if given.get("kv_heads") == 1 else (2,):
        found = ranks.run(world, "tests.test_infer:split_case", given)
        for other in found:
            for name in ("logits", "scores"):
                torch.testing.assert_close(torch.tensor(other[name]), torch.tensor(one[name]), rtol=1e-10, atol=1e-10)
            assert other["texts"] == one["texts"]
            assert other["heads"] == max(1, one["heads"] // world)
            assert other["read"] < one["read"] * (1 / world + 0.12)
