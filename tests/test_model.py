"""The decoder as plain single-device code: its table, its attention, masks, positions, dropout and initial weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dist_llm.config.presets import FAMILIES, PRESETS
from dist_llm.config.schema import AdapterConfig, ModelConfig
from dist_llm.model.cost import forward_flops, step_flops_per_token
from dist_llm.model.init import initialise
from dist_llm.model.kernels import rotated
from dist_llm.model.loss import IGNORED
from dist_llm.model.parts import Norm
from dist_llm.model.roles import Roles
from dist_llm.model.table import HALVES, Row, half_names, num_parameters, rows_of, table, unit_names, uses
from dist_llm.model.transformer import Attention, Context, Dropout, attend, build_unit, make_context, rotary_table

SIZES: dict[str, Any] = {"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 53, "max_positions": 24}
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "llama-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "smollm2-135m": 134_515_008,
    "olmo2-1b": 1_484_916_736,
    "gemma2-2b": 2_614_341_888,
    "gemma3-1b": 999_885_952,
}
VARIANTS: list[dict[str, Any]] = [
    *({"family": family} for family in FAMILIES),
    *({"family": family, "tied": tied} for family in FAMILIES for tied in (True, False)),
    {"family": "custom", "norm": "layer", "activation": "gelu", "qk_norm": True, "bias": True},
    {"family": "custom", "positions": "learned", "qkv_bias": True, "head_dim": 10},
    {"family": "llama", "out_bias": True, "mlp_bias": True, "kv_heads": 1},
]


def config(**changes: Any) -> ModelConfig:
    """A small model."""
    return ModelConfig(**{"family": "llama", **SIZES, **changes})


class Plain:
    """The whole model in one process with plain roles: parameters by global name, and a forward."""

    def __init__(self, model: ModelConfig, *, seed: int = 5, smoothing: float = 0.0) -> None:
        self.model, self.rows = model, {row.name: row for row in table(model)}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, row in self.rows.items():
            values = torch.empty(row.numel, dtype=torch.float64)
            initialise(values, row, tuple((0, extent) for extent in row.shape), seed=seed)
            self.parameters[name] = nn.Parameter(values.view(row.shape))
        self.units = [build_unit(name, model, self.parameters.get, Roles(smoothing=smoothing)) for name in unit_names(model)]

    def hidden(self, context: Context) -> torch.Tensor:
        """What enters the head: (B, S, D)."""
        x = self.units[0](context)
        for block in self.units[1:-1]:
            x = block(x, context)
        return x

    def logits(self, context: Context) -> torch.Tensor:
        """(B, S, V)."""
        return self.units[-1].logits(self.hidden(context))

    def loss(self, context: Context) -> torch.Tensor:
        """The summed loss."""
        return self.units[-1](self.hidden(context), context)


def text(rows: int = 2, length: int = 12, *, vocab: int = 53, seed: int = 0) -> torch.Tensor:
    """Tokens (B, S)."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def context(model: ModelConfig, tokens: torch.Tensor, **options: Any) -> Context:
    """A context whose labels are the next tokens."""
    labels = options.pop("labels", torch.cat([tokens[:, 1:], tokens.new_full((len(tokens), 1), IGNORED)], 1))
    return make_context(model, tokens, labels, dtype=torch.float64, **options)


def sharpen(plain: Plain) -> Plain:
    """Weights large enough that attention and norms matter."""
    with torch.no_grad():
        for name, parameter in plain.parameters.items():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
            parameter.add_(0.3 * noise)
    return plain


# --- the table -------------------------------------------------------------------------------------------------------


def asked(model: ModelConfig, units: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, list[tuple[str, torch.Size]]]]:
    """On the meta device: the names that each unit's module asks for, and the parameters that it then has."""
    rows = {row.name: row for row in table(model)}
    wanted: dict[str, list[str]] = {}
    held: dict[str, list[tuple[str, torch.Size]]] = {}
    for unit in units:
        names = wanted[unit] = []

        def make(name: str, names: list[str] = names) -> nn.Parameter | None:
            names.append(name)
            return nn.Parameter(torch.empty(rows[name].shape, device="meta")) if name in rows else None

        module = build_unit(unit, model, make, Roles())
        held[unit] = [(name, parameter.shape) for name, parameter in module.named_parameters()]
    return wanted, held


@pytest.mark.parametrize("model", [{"preset": name} for name in PRESETS] + [{**SIZES, **changes} for changes in VARIANTS], ids=str)
def test_the_table_and_the_modules_agree(model: dict[str, Any]) -> None:
    config = ModelConfig(**model)
    rows = {row.name: row for row in table(config)}
    wanted, held = asked(config, (*unit_names(config), *half_names(config)))
    for unit in wanted:
        expected = [row.name for part in uses(config, unit) for row in rows_of(config, part)]
        assert sorted(name for name in wanted[unit] if name in rows) == sorted(expected)
        prefix = ".".join([*unit.split(".")[:2], ""]) if unit.startswith("blocks.") else ""
        shared = {"head.weight": "embedding.weight"} if config.tied else {}
        own = {shared.get(name, prefix + name): shape for name, shape in held[unit]}
        assert own == {name: torch.Size(rows[name].shape) for name in expected}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    assert num_parameters(ModelConfig(preset=preset)) == PUBLISHED[preset]


ADAPTED: list[dict[str, Any]] = [
    {"adapter": {"rank": 2, "targets": ["q", "v"]}},
    {"adapter": {"rank": 2, "targets": ["down"], "quantize": "int8", "block": 16, "modules_to_save": ["head"]}},
]


@pytest.mark.parametrize("changes", [*VARIANTS, *ADAPTED], ids=str)
def test_rows_are_unique_and_in_units(changes: dict[str, Any]) -> None:
    model = config(**changes)
    names = [row.name for row in table(model)]
    assert len(set(names)) == len(names)
    units = list(dict.fromkeys(row.unit for row in table(model)))
    assert set(units) == {unit for walk in unit_names(model) for unit in uses(model, walk)}
    assert [row.unit for row in table(model)] == [unit for unit in units for row in table(model) if row.unit == unit]  # no unit is torn
    for walk in unit_names(model):
        for unit in uses(model, walk):
            assert rows_of(model, unit) == tuple(row for row in table(model) if row.unit == unit)
    for layer in range(model.layers):  # the halves of a block's units, each once, in the table's order
        halves = [rows_of(model, unit) for half in HALVES for unit in uses(model, f"blocks.{layer}.{half}")]
        whole = [rows_of(model, unit) for unit in uses(model, f"blocks.{layer}")]
        assert all(halves) and sorted(row.name for rows in halves for row in rows) == sorted(row.name for rows in whole for row in rows)
        assert all(
            {row.unit for row in rows} <= {unit[0].unit for unit in whole} and len({row.unit for row in rows}) == 1 for rows in halves
        )


def test_decay_goes_to_matrices_alone() -> None:
    for row in table(config(family="gpt2", qk_norm=True)):
        assert row.decay == (len(row.shape) == 2), row


def test_layers_are_numbered_over_the_whole_model() -> None:
    """trap 24: names hold the global layer, whichever stage it is on."""
    rows = table(config(layers=12))
    assert sorted({row.unit for row in rows if row.unit.startswith("blocks")}, key=lambda unit: int(unit[7:])) == [
        f"blocks.{layer}" for layer in range(12)
    ]
    assert all(row.name.startswith(row.unit + ".") for row in rows if row.unit.startswith("blocks"))


# --- initial weights -------------------------------------------------------------------------------------------------


def test_initial_weights_have_their_spread() -> None:
    """trap 12: by name and element, std from the model and not from the slice; o and down shrink with depth."""
    model = config(layers=8, dim=64, ffn=128, vocab=500)
    plain = Plain(model)
    for name, row in plain.rows.items():
        values = plain.parameters[name]
        if row.std is None:
            assert torch.equal(values, torch.full_like(values, 0.0 if name.endswith("bias") else 1.0))
        else:
            deep = name.endswith(("o.weight", "down.weight"))
            assert row.std == pytest.approx(0.02 / (4.0 if deep else 1.0))
            assert abs(values.std().item() / row.std - 1) < 5 / (2 * row.numel) ** 0.5


def test_initial_weights_depend_on_name_and_seed() -> None:
    first, again, other = Plain(config(), seed=1), Plain(config(), seed=1), Plain(config(), seed=2)
    matrices = [name for name, row in first.rows.items() if row.std is not None]
    assert all(torch.equal(first.parameters[name], again.parameters[name]) for name in first.rows)
    assert not any(torch.equal(first.parameters[name], other.parameters[name]) for name in matrices)
    starts = {tuple(first.parameters[name].flatten()[:4].tolist()) for name in matrices}
    assert len(starts) == len(matrices)


@pytest.mark.parametrize("box", [((0, 8), (0, 6)), ((2, 5), (0, 6)), ((0, 8), (1, 2)), ((3, 8), (2, 6))])
def test_a_slice_is_initialised_as_the_slice_of_the_whole(box: Any) -> None:
    row = Row("w", (8, 6), "column", "u", std=0.02)
    whole = initialise(torch.empty(48), row, ((0, 8), (0, 6)), seed=3).view(8, 6)
    part = whole[tuple(slice(*side) for side in box)].flatten()
    made = initialise(torch.empty(part.numel()), row, box, seed=3)
    assert torch.equal(made, part)
    assert torch.equal(initialise(torch.empty(part.numel() - 2), row, box, seed=3, start=2), part[2:])


# --- attention -------------------------------------------------------------------------------------------------------


def test_grouped_attention_is_attention_with_repeated_heads() -> None:
    few, many = sharpen(Plain(config(kv_heads=2))), Plain(config(kv_heads=4))
    with torch.no_grad():
        for name, parameter in many.parameters.items():
            source = few.parameters[name]
            if ".k." in name or ".v." in name:
                source = source.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32)
            parameter.copy_(source)
    tokens = text()
    torch.testing.assert_close(few.logits(context(few.model, tokens)), many.logits(context(many.model, tokens)), rtol=1e-12, atol=1e-12)


def test_attention_is_causal_softmax() -> None:
    q, k, v = (torch.randn(2, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2))
    scores = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) / 8**0.5
    scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(attend(q, k, v, None), scores.softmax(-1) @ v.repeat_interleave(2, 1), rtol=1e-12, atol=1e-12)


def test_the_future_is_not_seen() -> None:
    plain, tokens = sharpen(Plain(config())), text()
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 53
    before, after = plain.logits(context(plain.model, tokens)), plain.logits(context(plain.model, changed))
    assert torch.equal(before[:, :8], after[:, :8]) and not torch.allclose(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_masked_documents_are_separate_documents(family: str) -> None:
    """With a document mask and positions reset, three documents in one row are three rows."""
    plain = sharpen(Plain(config(family=family)))
    sizes = [5, 1, 6]
    tokens, ids = text(1, 12), torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))[None]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    together = plain.logits(context(plain.model, tokens, documents=ids, positions=positions))
    apart = [plain.logits(context(plain.model, part)) for part in tokens.split(sizes, dim=1)]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=1e-10, atol=1e-10)


def test_masked_documents_without_reset_differ_in_position_alone() -> None:
    plain, tokens = sharpen(Plain(config(family="gpt2"))), text(1, 8)
    ids = torch.tensor([[0] * 5 + [1] * 3])
    together = plain.logits(context(plain.model, tokens, documents=ids))
    alone = plain.logits(context(plain.model, tokens[:, 5:], positions=torch.tensor([[5, 6, 7]])))
    torch.testing.assert_close(together[:, 5:], alone, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(together, plain.logits(context(plain.model, tokens)))


def test_documents_of_one_row_do_not_look_into_another() -> None:
    plain, tokens = sharpen(Plain(config())), text(2, 8)
    ids = torch.tensor([[0] * 8, [0] * 4 + [1] * 4])
    both = plain.logits(context(plain.model, tokens, documents=ids))
    torch.testing.assert_close(both[0], plain.logits(context(plain.model, tokens[:1]))[0], rtol=1e-10, atol=1e-10)


# --- positions -------------------------------------------------------------------------------------------------------


def test_rotary_products_depend_on_distance_alone() -> None:
    source = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(1, 1, 1, 16, generator=source, dtype=torch.float64), dim=-1) for _ in range(2))

    def product(at: int, to: int) -> float:
        tables = [rotary_table(torch.tensor([[place]]), width=16, theta=100.0, dtype=torch.float64) for place in (at, to)]
        return float((rotated(q, *tables[0]) * rotated(k, *tables[1])).sum())

    assert product(3, 1) == pytest.approx(product(9, 7), abs=1e-6)  # angles are float32
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-3)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-12)


def test_rotary_angles_are_position_over_theta_powers() -> None:
    cosine, sine = rotary_table(torch.tensor([[0, 5]]), width=8, theta=10000.0, dtype=torch.float64)
    angle = 5 * torch.tensor([10000.0 ** (-2 * pair / 8) for pair in range(4)], dtype=torch.float64)
    torch.testing.assert_close(cosine[0, 1, 0], torch.cat([angle, angle]).cos(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sine[0, 1, 0], torch.cat([angle, angle]).sin(), rtol=1e-5, atol=1e-6)
    assert torch.equal(cosine[0, 0, 0], torch.ones(8, dtype=torch.float64))


def test_learned_positions_are_rows_of_their_table() -> None:
    plain = sharpen(Plain(config(family="gpt2")))
    tokens = text(1, 6)
    embedding = plain.units[0]
    table_rows = plain.parameters["embedding.weight"][tokens] + plain.parameters["positions.weight"][:6]
    torch.testing.assert_close(embedding(context(plain.model, tokens)), table_rows)
    moved = context(plain.model, tokens, positions=torch.arange(3, 9)[None])
    torch.testing.assert_close(embedding(moved), plain.parameters["embedding.weight"][tokens] + plain.parameters["positions.weight"][3:9])


# --- norms and bias --------------------------------------------------------------------------------------------------


def test_norms_are_their_formulas() -> None:
    x, weight, bias = torch.randn(3, 6, dtype=torch.float64), torch.rand(6).double(), torch.rand(6).double()
    known = {"n.weight": nn.Parameter(weight), "n.bias": nn.Parameter(bias)}
    rms = Norm({"n.weight": nn.Parameter(weight)}.get, "n", kind="rms", eps=1e-3)
    torch.testing.assert_close(rms(x), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight)
    layer = Norm(known.get, "n", kind="layer", eps=1e-3)
    away = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(layer(x), away / (away.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias)


def test_query_and_key_norms_work_on_each_head() -> None:
    """Scaling the queries or keys of a head by a factor changes nothing once they are normed."""
    plain = sharpen(Plain(config(family="qwen3", norm_eps=1e-12)))
    tokens = context(plain.model, text())
    before = plain.logits(tokens)
    with torch.no_grad():
        plain.parameters["blocks.0.attention.q.weight"].view(4, 8, 32)[2].mul_(3.0)
        plain.parameters["blocks.1.attention.k.weight"].view(2, 8, 32)[1].mul_(0.2)
    torch.testing.assert_close(plain.logits(tokens), before, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        plain.parameters["blocks.0.attention.q_norm.weight"].mul_(2.0)
    assert not torch.allclose(plain.logits(tokens), before)


def test_key_bias_has_no_gradient_but_the_other_biases_have() -> None:
    plain = sharpen(Plain(config(family="gpt2")))
    plain.loss(context(plain.model, text())).backward()
    sizes = {name: parameter.grad.abs().max().item() for name, parameter in plain.parameters.items() if name.endswith(".bias")}
    assert all((size < 1e-12) == name.endswith("attention.k.bias") for name, size in sizes.items()), sizes


# --- dropout ---------------------------------------------------------------------------------------------------------


class Slice(Roles):
    """Keeps the second third of the tokens outside."""

    def outside(self, per_token: torch.Tensor) -> torch.Tensor:
        length = per_token.shape[1] // 3
        return per_token[:, length : 2 * length]


def test_dropout_masks_do_not_depend_on_batch_micro_batch_or_slice() -> None:
    """trap 11: the mask is addressed by (seed, step, layer, global token, feature)."""
    model = config(dropout=0.4)
    tokens, x = text(4, 12), torch.ones(4, 12, 32, dtype=torch.float64)
    whole = Dropout("blocks.0.mlp", 0.4, Roles())(x, context(model, tokens, seed=3, step=5))
    for row in range(4):
        alone = context(model, tokens[row : row + 1], seed=3, step=5, rows=torch.tensor([row]))
        assert torch.equal(Dropout("blocks.0.mlp", 0.4, Roles())(x[:1], alone)[0], whole[row])
    sliced = Dropout("blocks.0.mlp", 0.4, Slice())(x[:, :4], context(model, tokens, seed=3, step=5))
    assert torch.equal(sliced, whole[:, 4:8])


def test_dropout_masks_change_with_seed_step_place_and_layer() -> None:
    model, tokens, x = config(dropout=0.4), text(2, 12), torch.ones(2, 12, 32, dtype=torch.float64)
    drop, other = Dropout("blocks.0.mlp", 0.4, Roles()), Dropout("blocks.1.mlp", 0.4, Roles())
    base = {"seed": 3, "step": 5, "rows": torch.tensor([0, 1])}
    first = drop(x, context(model, tokens, **base))
    changes = [
        drop(x, context(model, tokens, **{**base, **change})) for change in ({"seed": 4}, {"step": 6}, {"rows": torch.tensor([2, 3])})
    ]
    for mask in [*changes, other(x, context(model, tokens, **base))]:
        agree = (mask == first).double().mean().item()
        assert abs(agree - (0.4**2 + 0.6**2)) < 0.1
    assert torch.equal(first, drop(x, context(model, tokens, **base)))


def test_dropout_keeps_the_mean_and_is_off_outside_training() -> None:
    model, tokens = config(dropout=0.25), text(8, 12)
    x = torch.ones(8, 12, 32, dtype=torch.float64)
    dropped = Dropout("embedding", 0.25, Roles())(x, context(model, tokens))
    assert set(dropped.unique().tolist()) == {0.0, 1.0 / 0.75}
    assert abs(dropped.mean().item() - 1.0) < 5 * (0.25 / 0.75 / x.numel()) ** 0.5
    assert Dropout("embedding", 0.25, Roles())(x, context(model, tokens, training=False)) is x
    plain = Plain(model)
    quiet = plain.logits(context(model, tokens, training=False))
    assert torch.equal(quiet, Plain(config()).logits(context(config(), tokens)))
    assert not torch.allclose(quiet, plain.logits(context(model, tokens)))


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"family": "gpt2"}, {"family": "qwen3", "tied": True}], ids=str)
def test_loss_is_the_cross_entropy_of_the_logits(changes: dict[str, Any]) -> None:
    plain = sharpen(Plain(config(**changes), smoothing=0.1))
    here = context(plain.model, text())
    expected = F.cross_entropy(
        plain.logits(here).flatten(0, 1), here.labels.flatten(), ignore_index=IGNORED, label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(plain.loss(here), expected)


def test_tied_weights_get_both_gradients() -> None:
    """trap 13 in one process: an untied twin's two gradients add up to the tied one."""
    tied, untied = sharpen(Plain(config(tied=True))), Plain(config())
    with torch.no_grad():
        for name, parameter in untied.parameters.items():
            parameter.copy_(tied.parameters["embedding.weight" if name == "head.weight" else name])
    for plain in (tied, untied):
        plain.loss(context(plain.model, text())).backward()
    both = untied.parameters["embedding.weight"].grad + untied.parameters["head.weight"].grad
    torch.testing.assert_close(tied.parameters["embedding.weight"].grad, both)


@pytest.mark.parametrize("changes", [{}, {"family": "gpt2"}, {"family": "qwen3", "head_dim": 12}], ids=str)
def test_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    model = config(**changes)
    plain, here = Plain(model), context(model, text(2, 12))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        plain.loss(here)
    assert counter.get_total_flops() == 2 * 12 * sum(forward_flops(model, 12).values())
    assert step_flops_per_token(model, 12) == 3 * sum(forward_flops(model, 12).values())
    adapted = model.model_copy(update={"adapter": AdapterConfig(rank=4)})
    lora = sum(2 * row.numel for row in table(adapted) if row.trained)
    still = forward_flops(model, 12)  # the products of weights that stay come twice, attention three times, A and B three times
    attention = 4.0 * 12 * model.heads * model.head_dim * model.layers
    assert step_flops_per_token(adapted, 12) == 2 * (sum(still.values()) - attention) + 3 * (attention + lora)
    causal, full = (step_flops_per_token(model, 12, convention=name) for name in ("causal", "full"))
    assert full - causal == 3 * model.layers * 2 * 12 * model.heads * model.head_dim


@pytest.mark.parametrize(
    ("tied", "saved", "times"),
    [
        (False, (), 2),
        (False, ("embedding",), 2),
        (False, ("head",), 3),
        (False, ("embedding", "head"), 3),
        (True, (), 2),
        (True, ("embedding",), 3),
    ],
    ids=str,
)
def test_flops_beside_an_adapter_are_those_counted_by_hand(tied: bool, saved: tuple[str, ...], times: int) -> None:
    """Weights that stay: forward and the slope of what goes in. Trained ones, and attention: a third product. A look-up costs none."""
    rank, sequence, layers, dim, vocab = 3, 12, 2, 24, 50
    sizes = {"layers": layers, "dim": dim, "heads": 4, "kv_heads": 2, "head_dim": 10, "ffn": 36, "vocab": vocab, "tied": tied}
    model = ModelConfig.model_validate({**sizes, "adapter": {"rank": rank, "modules_to_save": list(saved)}})
    shapes = [(24, 40), (24, 20), (24, 20), (40, 24), (24, 36), (24, 36), (36, 24)]  # q, k, v, o, gate, up, down: in, out
    still = sum(wide * high for wide, high in shapes)  # 5,472
    beside = sum(rank * (wide + high) for wide, high in shapes)  # 1,188
    scores = 2 * sequence * 4 * 10  # and values
    block = 2 * (2 * still + 3 * beside + 3 * scores)
    assert step_flops_per_token(model, sequence) == layers * block + 2 * times * vocab * dim


def test_attend_is_an_attribute_that_can_be_replaced() -> None:
    """The seam of context parallelism."""
    plain = sharpen(Plain(config()))
    here, seen = context(plain.model, text()), []
    expected = plain.logits(here)
    for module in plain.units[1].modules():
        if isinstance(module, Attention):
            module.attend = lambda *given: seen.append(copy.copy(given)) or attend(*given)
    assert torch.equal(plain.logits(here), expected) and len(seen) == 1
