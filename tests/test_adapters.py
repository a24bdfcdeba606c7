"""Adapters: LoRA against PEFT over transformers, its names and configs, quantized weights under it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_llm.config.rules import problems
from dist_llm.config.schema import AdapterConfig, Config, ModelConfig
from dist_llm.data.batches import MicroBatch
from dist_llm.errors import CheckpointError, UsageError
from dist_llm.interop.adapters import adapter_keys, read_adapter_config, write_adapter_config
from dist_llm.interop.joined import parts_of
from dist_llm.interop.peft_folder import RECEIPT, PeftFolder, write_adapter
from dist_llm.model import quantize as quantize_module
from dist_llm.model.quantize import NF4, code_bytes, dequantize, quantize
from dist_llm.model.roles import Roles
from dist_llm.model.table import table
from dist_llm.model.transformer import Embedding, make_context
from dist_llm.train.sample import with_whole_weights
from dist_llm.train.trainer import context_of
from tests.adapter_oracles import ADAPTED, ALL, SAVED, Given, bare, model_of
from tests.engine_cases import build, config, layout_of
from tests.family_oracles import SMALL
from tests.ranks import Ranks

pytestmark = pytest.mark.usefixtures("with_transformers")


@pytest.fixture(scope="module")
def differences(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """All models in one process: PEFT takes seconds to import."""
    return ranks.run(1, "tests.adapter_oracles:against_peft", str(tmp_path_factory.mktemp("peft")), timeout_seconds=180)[0]


@pytest.mark.parametrize("name", ADAPTED)
def test_loss_and_gradients_are_those_of_peft(differences: dict[str, dict[str, Any]], name: str) -> None:
    """float64, random A and B: logits, loss, every gradient; and nothing else has one. With modules trained whole: folders both ways."""
    found = differences[name]
    assert found["trained"]
    assert found["logits"] < 1e-10 and found["loss"] < 1e-10 and found["folders"] < 1e-10 and found["gradient"][0] < 1e-9, found


@pytest.mark.parametrize("name", ADAPTED)
def test_a_config_of_peft_is_read_back(differences: dict[str, dict[str, Any]], name: str) -> None:
    adapter = model_of(name).adapter
    targets = {target for target in adapter.targets if any(f".{target}." in row.name for row in table(model_of(name)) if row.trained)}
    found = differences[name]["read back"]
    ends = {"modules_to_save": {*found["modules_to_save"]}}
    assert {**found, "targets": {*found["targets"]}, **ends} == {
        **adapter.model_dump(),
        "targets": targets,
        "modules_to_save": {*adapter.modules_to_save},
    }


def test_what_peft_cannot_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="rows of a whole matrix"):
        adapter_keys(ModelConfig(family="gpt2", adapter={"rank": 2, "dora": True, "targets": ["q"]}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "no LoRA"),
        ({"rank_pattern": {"q_proj": 3}}, "of their own"),
        ({"alpha_pattern": {"q_proj": 3}}, "of their own"),
        ({"rank_pattern": ["q_proj"]}, "of their own"),
        ({"init_lora_weights": "pissa"}, "not done here"),
        ({"bias": "all"}, "not done here"),
        ({"lora_dropout": 1.0}, "dropout"),
        ({"r": 0}, "no rank"),
        ({"r": True}, "no rank"),
        ({"lora_alpha": "8"}, "no rank"),
        ({"target_modules": ["w1"]}, "does not name"),
        ({"target_modules": []}, "does not name"),
    ],
)
def test_configs_that_change_the_numbers_are_refused(change: dict[str, Any], says: str) -> None:
    model = model_of("llama")
    written = {**write_adapter_config(model, base="x"), **change}
    with pytest.raises((UsageError, CheckpointError)) as caught:
        read_adapter_config(written, bare(model), where="adapter_config.json", tensors=adapter_keys(model).values())
    assert says in caught.value.what, caught.value


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that PEFT has written, by the names of SAVED."""
    home = tmp_path_factory.mktemp("saved")
    ranks.run(1, "tests.adapter_oracles:save_with_peft", str(home), timeout_seconds=180)
    return home


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("all-linear", ALL),
        ("pattern", ("q", "k")),
        ("whole names", ("v", "down")),
        ("gpt2, all-linear", ("q", "k", "v", "o", "up", "down")),
        ("gpt2, joined", ("q", "k", "v")),
    ],
)
def test_modules_are_those_that_have_matrices(saved: Path, name: str, targets: tuple[str, ...]) -> None:
    """Folders as PEFT saves them; a matrix of GPT-2's q, k and v is one adapter on each, with the same A."""
    family = SAVED[name][0]
    found = opened_on(saved / name, bare(model_of(family)))
    assert found.model.adapter.targets == targets
    theirs = load_file(saved / name / "adapter_model.safetensors")
    if family == "gpt2":
        key = "base_model.model.transformer.h.1.attn.c_attn.lora_"
        ours = [found.whole(f"blocks.1.attention.{part}.lora_b") for part in "qkv"]
        assert torch.equal(torch.cat(ours), theirs[f"{key}B.weight"]), "its rows"
        assert all(torch.equal(found.whole(f"blocks.1.attention.{part}.lora_a"), theirs[f"{key}A.weight"]) for part in "qkv")
    else:
        assert len(theirs) == 2 * len(targets) * bare(model_of(family)).layers == len(found.tensors)


@pytest.mark.parametrize(
    ("name", "says"),
    [("head", "lm_head"), ("embedding", "model.embed_tokens"), ("one block", "q in 1 of them, the first 1")],
)
def test_modules_that_take_none_are_named(saved: Path, name: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        opened_on(saved / name, bare(model_of(SAVED[name][0])))
    assert says in str(caught.value.found) and "no such" not in caught.value.what, caught.value


# --- DoRA, dropout, noise ------------------------------------------------------------------------------------------------


def beginning(rank: int, world: int, say: Callable, given: dict[str, Any], layout: dict[str, Any], folder: str) -> float | None:
    """The largest difference of a magnitude before the first step from the length of its row; None where another rank looks."""
    _, engine, _ = build(given, layout, rank, "float32")
    found: list[float] = []

    def compare(weights: Any) -> None:
        for row in table(engine.model):
            if row.name.endswith(".lora_m"):
                lengths = torch.linalg.vector_norm(weights.whole(row.name.replace(".lora_m", ".weight")), dim=1, dtype=torch.float64)
                found.append(float((weights.whole(row.name) - lengths).abs().max() / lengths.max()))

    with_whole_weights(engine, engine.model, Path(folder), compare)
    return max(found, default=None)


@pytest.mark.parametrize("text", ["dp=1", "tp=2"])
def test_magnitudes_begin_at_the_lengths_of_the_rows(ranks: Ranks, tmp_path: Path, text: str) -> None:
    """So the model before the first step is the base; the last digit of float32 is what a sum over ranks may leave."""
    layout, adapter = layout_of(text), {"rank": 2, "dora": True}
    given = config(dim=32, ffn=36, adapter=adapter)
    (found, *_) = ranks.run(layout.world, "tests.test_adapters:beginning", given, vars(layout), str(tmp_path / "whole"))
    assert found is not None and found < 1.2e-7


def first_loss(rank: int, world: int, say: Callable, given: dict[str, Any], layout: dict[str, Any], dtype: str) -> float:
    """That of the first step."""
    return build(given, layout, rank, dtype)[2].step(0).loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_model_is_the_base(ranks: Ranks, dtype: str) -> None:
    """To the bit, as with LoRA, whose B is zero."""
    work, layout = "tests.test_adapters:first_loss", vars(layout_of("dp=1"))
    losses = [ranks.run(1, work, config(dim=32, ffn=36, adapter={"rank": 2, "dora": dora}), layout, dtype) for dora in (False, True)]
    assert losses[0] == losses[1] and losses[0][0] > 0


def test_noise_is_as_large_as_its_sample_is_short() -> None:
    """Uniform up to alpha / sqrt(L D), whatever shares the sequence; other noise in every step and place; none in evaluation."""
    model = model_of("llama").model_copy(update={"neftune": 5.0, "dim": 64, "adapter": AdapterConfig()})
    tokens = torch.zeros(2, 40, dtype=torch.int64)
    samples = torch.tensor([[0] * 10 + [1] * 30, [0] * 40])
    made = {step: make_context(model, tokens, tokens, dtype=torch.float64, samples=samples, step=step) for step in (0, 1)}
    most = made[0].noise
    assert most is not None and made[0].key is not None and made[1].key is not None
    for row, span, length in ((0, slice(0, 10), 10), (0, slice(10, 40), 30), (1, slice(0, 40), 40)):
        assert torch.allclose(most[row, span], torch.tensor(5.0 / (length * 64) ** 0.5, dtype=torch.float64), rtol=1e-14)
    assert torch.allclose(make_context(model, tokens, tokens, dtype=torch.float64).noise, torch.tensor(5.0 / (40 * 64) ** 0.5).double())
    assert make_context(model, tokens, tokens, dtype=torch.float64, training=False).noise is None
    weight = torch.zeros(model.vocab, 64, dtype=torch.float64)
    embedding = Embedding({"embedding.weight": weight}.get, model, Roles())
    noise = [embedding(made[step]) / most[..., None] for step in (0, 1)]
    assert all(float(one.abs().max()) <= 1 and abs(float(one.mean())) < 0.03 and abs(float(one.std()) - 3**-0.5) < 0.01 for one in noise)
    assert len(torch.cat([one.flatten() for one in noise]).unique()) == 2 * 2 * 40 * 64


@pytest.mark.parametrize(
    ("data", "lengths"),
    [
        ({"packing": "best_fit", "chat": {"format": "messages"}}, [2, 2, 3, 3, 3, 3, 3, 3]),
        ({"packing": "none", "chat": {"format": "messages"}}, [2, 2, 3, 3, 3, 3, 3, 3]),
        ({"document_mask": True}, [2, 2, 3, 3, 3, 3, 3, 3]),
        ({}, [8] * 8),
    ],
)
def test_what_a_sample_is(data: dict[str, Any], lengths: list[int]) -> None:
    """Packed conversations and documents that see themselves alone are samples; text cut wherever a sequence ends is one a sequence."""
    whole = {"model": {"family": "llama", "neftune": 1.0, "vocab": 300}, "data": {"source": "skills", "sequence": 8, **data}}
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2]])
    batch = MicroBatch(documents, documents, documents, documents, torch.zeros(1, dtype=torch.int64))
    made = Config.model_validate(whole)
    context = context_of(batch, made, device=torch.device("cpu"), dtype=torch.float64, training=True)
    assert context.noise is not None
    assert (1 / (context.noise[0] ** 2 * made.model.dim)).round().tolist() == lengths


def test_nothing_is_dropped_in_evaluation() -> None:
    model, tokens = model_of("llama, dropped"), torch.zeros(1, 4, dtype=torch.int64)
    assert make_context(model, tokens, tokens, dtype=torch.float64).draw is not None
    assert make_context(model, tokens, tokens, dtype=torch.float64, training=False).draw is None


@pytest.mark.parametrize(
    ("model", "runtime", "says"),
    [
        ({"adapter": {"dora": True}}, {}, "model.adapter.dora: is part of an adapter"),
        ({"adapter": {"dropout": 0.1}}, {}, "model.adapter.dropout: is part of an adapter"),
        ({"adapter": {"modules_to_save": ["head"]}}, {}, "model.adapter.modules_to_save: is part of an adapter"),
        ({"adapter": {"rank": 2, "dora": True}}, {"fp8": "rowwise", "dtype": "bfloat16"}, "runtime.fp8: model.adapter.dora makes products"),
    ],
)
def test_what_does_not_go_together_is_said(model: dict[str, Any], runtime: dict[str, Any], says: str) -> None:
    found = problems(Config.model_validate({"model": {"family": "llama", **model}, "runtime": runtime}), layout_of("dp=1"))
    assert any(str(one).startswith(says) for one in found), found


# --- PEFT's folders --------------------------------------------------------------------------------------------------------


def opened_on(folder: Path, model: ModelConfig) -> PeftFolder:
    """A folder on a base of sevens."""
    return PeftFolder.open(folder, model, Given({row.name: torch.full(row.shape, 7.0) for row in table(model)}))


def small_adapter(folder: Path) -> ModelConfig:
    """An adapter of two small matrices in PEFT's form; returns its model."""
    model = ModelConfig(**{**SMALL, "family": "llama", "layers": 1, "adapter": {"rank": 1, "targets": ["k"]}})
    tensors = {row.name: torch.full(row.shape, 0.5) for row in table(model) if row.trained}
    write_adapter(folder, model, tensors, base="base", identity="b" * 64)
    return model


def test_any_changed_byte_of_an_adapter_is_refused(tmp_path: Path) -> None:
    """F11: every byte of each of its files, two values each; a file cut, longer, or gone."""
    folder = tmp_path / "adapter"
    model = bare(small_adapter(folder))
    assert opened_on(folder, model).receipt.base == "b" * 64
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        spoiled = [content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :] for at in range(len(content)) for bit in (1, 0x80)]
        for other in (*spoiled, content[:-1], content + b"x", b""):
            path.write_bytes(other)
            with pytest.raises((CheckpointError, UsageError)):
                opened_on(folder, model)
        path.unlink()
        if path.name != RECEIPT:
            with pytest.raises((CheckpointError, UsageError)):
                opened_on(folder, model)
        path.write_bytes(content)
    assert opened_on(folder, model).receipt.base == "b" * 64


def test_a_folder_without_a_receipt_is_peft_s_own(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    model = bare(small_adapter(folder))
    (folder / RECEIPT).unlink()
    opened = opened_on(folder, model)
    assert opened.receipt.base is None and float(opened.whole("blocks.0.attention.k.lora_a").sum()) == 0.5 * SMALL["dim"]


def test_a_part_of_an_end_is_the_rest_s_base(tmp_path: Path) -> None:
    """PEFT's usual embed_tokens and lm_head leave the last norm out: it is the base's."""
    model = model_of("llama, and ends")
    folder, names = tmp_path / "adapter", [row.name for row in table(model) if row.trained]
    write_adapter(folder, model, {row.name: torch.full(row.shape, 0.5) for row in table(model) if row.trained}, base="x", identity="b" * 64)
    (folder / RECEIPT).unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: value for key, value in tensors.items() if "norm" not in key}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lacks"):
        opened_on(folder, bare(model))
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, "modules_to_save": ["embed_tokens", "lm_head"]}))
    found = opened_on(folder, bare(model))
    assert found.model.adapter.modules_to_save == ("embedding", "head") and found.tensors.keys() == {*names}
    assert {name: float(found.whole(name).unique()) for name in names if "lora" not in name} == {
        "embedding.weight": 0.5,
        "head.weight": 0.5,
        "norm.weight": 7.0,
    }


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llama, and ends", {"modules_to_save": ["norm"]}, "layernorm too"),
        ("llama, and ends", {"modules_to_save": ["score"]}, "score"),
        ("llama, and ends", {"modules_to_save": "lm_head["}, "lm_head["),
    ],
)
def test_modules_that_cannot_be_whole_are_refused(name: str, change: dict[str, Any], says: str) -> None:
    written = {**write_adapter_config(model_of(name), base="x"), **change}
    keys = adapter_keys(model_of(name)).values()
    with pytest.raises(UsageError) as caught:
        read_adapter_config(written, bare(model_of(name)), where="adapter_config.json", tensors=keys)
    assert says in f"{caught.value.expected} {caught.value.found}", caught.value


def test_a_tied_table_is_there_twice_and_alike(tmp_path: Path) -> None:
    """What PEFT trains without `ensure_weight_tying` is two tables, or a new one and the base's."""
    model, folder = model_of("llama, tied, and table"), tmp_path / "adapter"
    write_adapter(folder, model, {row.name: torch.full(row.shape, 0.5) for row in table(model) if row.trained}, base="x", identity="b" * 64)
    (folder / RECEIPT).unlink()
    assert float(opened_on(folder, bare(model)).whole("embedding.weight").unique()) == 0.5
    file, output = folder / "adapter_model.safetensors", "base_model.model.lm_head.weight"
    tensors = load_file(file)
    for spoiled in ({**tensors, output: tensors[output] * 2}, {key: value for key, value in tensors.items() if key != output}):
        save_file(spoiled, file)
        with pytest.raises(UsageError, match="apart"):
            opened_on(folder, bare(model))


def test_a_pickled_adapter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    model = bare(small_adapter(folder))
    (folder / RECEIPT).unlink()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UsageError, match="pickled"):
        opened_on(folder, model)


# --- quantized -----------------------------------------------------------------------------------------------------------


def test_nf4_takes_the_nearest_quantile() -> None:
    """By brute force over the 16 of them; the largest magnitude of a block is kept, zeros are zeros."""
    values = torch.randn(64 * 30, generator=torch.Generator().manual_seed(1))
    values[:64] = 0.0
    codes, scales = quantize(values, kind="nf4", block=64)
    assert len(codes) == code_bytes(len(values), "nf4") and codes.dtype == torch.uint8 and len(scales) == 30
    found = dequantize(codes, scales, torch.empty(len(values)), kind="nf4", block=64)
    rows, table16 = values.view(-1, 64), torch.tensor(NF4)
    largest = rows.abs().amax(1, keepdim=True)
    choices = table16 * largest[:, None]  # (30, 1, 16)
    nearest = (rows[..., None] - choices).abs().min(-1).values
    assert torch.allclose((found.view(-1, 64) - rows).abs(), nearest, atol=1e-6)
    assert torch.equal(found.view(-1, 64).abs().amax(1), largest[:, 0]) and not found[:64].any()


@pytest.mark.parametrize(("off", "raised", "believed"), [(0.0, None, True), (1e-3, None, False), (0.0, ImportError, False)])
def test_a_kernel_is_believed_when_it_gives_our_numbers(
    monkeypatch: pytest.MonkeyPatch, off: float, raised: type[Exception] | None, believed: bool
) -> None:
    """bitsandbytes' place is taken by a stand-in that knows the format, or nearly, or is not there."""

    def kernel(codes: torch.Tensor, scales: torch.Tensor, block: int, out: torch.Tensor) -> None:
        if raised:
            raise raised
        quantize_module.in_pieces(codes, scales, out, kind="nf4", block=block).add_(off)

    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setattr(quantize_module, "_bitsandbytes", kernel)
    kernel_of = quantize_module.kernel_of.__wrapped__
    assert (kernel_of(torch.device("cpu"), 64, torch.bfloat16) is kernel) == believed


def test_nf4_is_that_of_bitsandbytes() -> None:
    """What bitsandbytes 0.50.2 makes of these numbers on a CPU (quantize_4bit, blocks of 64, nf4), kept here."""
    values = torch.linspace(-3, 5, 64)
    codes, scales = quantize(values, kind="nf4", block=64)
    assert codes.tolist() == BITSANDBYTES and scales.tolist() == [5.0]


BITSANDBYTES = [
    34,
    34,
    34,
    51,
    51,
    52,
    68,
    69,
    85,
    86,
    102,
    119,
    119,
    136,
    137,
    153,
    170,
    170,
    187,
    188,
    204,
    204,
    221,
    221,
    222,
    238,
    238,
    238,
    238,
    255,
    255,
    255,
]


def test_int8_is_within_half_a_step() -> None:
    values = torch.randn(640, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    codes, scales = quantize(values, kind="int8", block=32)
    found = dequantize(codes, scales, torch.empty(640, dtype=torch.float64), kind="int8", block=32)
    steps = scales.repeat_interleave(32) / 127
    assert ((found - values).abs() <= steps * 0.5001).all()


def test_zeros_say_nothing_of_whose_they_are() -> None:
    """Before a step the B of two adapters is as empty as that of two others: not read as another pair, whose A they would train."""
    rows = {part: (at * 4, at * 4 + 4) for at, part in enumerate("qkv")}
    empty, one = torch.zeros(12, 4), torch.zeros(12, 4)
    one[rows["v"][0], 2] = 1.0
    assert parts_of([empty], rows, rank=2, all_of_them=False) is None
    assert parts_of([empty[:, :2]], rows, rank=2, all_of_them=False) == ("q", "k", "v")
    assert parts_of([empty, one], rows, rank=2, all_of_them=False) in (("q", "v"), ("k", "v")), "learned ones are told by their rows"
