"""AdamW and SGD against torch's own, segment by segment and in whole training runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dist_llm.config.schema import Config, OptimizerConfig
from dist_llm.engines.optim import Moments, Optimizer
from dist_llm.model.transformer import Context
from dist_llm.train.learning_rate import learning_rate
from tests.engine_cases import build, config, layout_of
from tests.test_model import Plain

CPU = torch.device("cpu")
RULES: list[dict[str, Any]] = [
    {"kind": "adamw"},
    {"kind": "adamw", "betas": (0.8, 0.999), "eps": 1e-4, "weight_decay": 0.0},
    {"kind": "sgd", "weight_decay": 0.0},
    {"kind": "sgd", "weight_decay": 0.2},
    {"kind": "sgd", "momentum": 0.9},
    {"kind": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
]


def theirs(rule: OptimizerConfig, groups: Any) -> torch.optim.Optimizer:
    """torch's optimizer of the same rule."""
    if rule.kind == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, betas=rule.betas, eps=rule.eps, weight_decay=rule.weight_decay)
    options = {"momentum": rule.momentum, "nesterov": rule.nesterov, "weight_decay": rule.weight_decay}
    return torch.optim.SGD(groups, lr=1.0, **options)


def numbers(size: int, turn: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random numbers of many magnitudes."""
    source = torch.Generator().manual_seed(turn)
    return (torch.randn(size, generator=source, dtype=torch.float64) * 10 ** torch.randn(size, generator=source)).to(dtype)


@pytest.mark.parametrize("given", RULES, ids=str)
@pytest.mark.parametrize("decay", [True, False])
def test_updates_are_those_of_torch(given: dict[str, Any], decay: bool) -> None:
    rule = OptimizerConfig(**given)
    optimizer, weights = Optimizer(rule, CPU), numbers(101, 0)
    moments = optimizer.moments(weights)
    parameter = nn.Parameter(weights.clone())
    reference = theirs(rule, [{"params": [parameter], **({} if decay else {"weight_decay": 0.0})}])
    for turn in range(1, 6):
        gradient, rate = numbers(101, turn), 0.1 / turn
        optimizer.count += 1
        optimizer.update([weights], [gradient.clone()], [moments], lr=rate, decay=decay)
        parameter.grad = gradient
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        torch.testing.assert_close(weights, parameter.detach(), rtol=1e-12, atol=1e-14)


def test_moments_are_only_those_that_the_rule_needs() -> None:
    weights = torch.zeros(8)
    held = [Optimizer(OptimizerConfig(**given), CPU).moments(weights) for given in RULES]
    assert [(moment.first is not None, moment.second is not None) for moment in held] == [
        (True, True), (True, True), (False, False), (False, False), (True, False), (True, False)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", RULES, ids=str)
def test_a_shard_is_updated_as_the_whole_to_the_bit(given: dict[str, Any], dtype: torch.dtype) -> None:
    """Shards begin at multiples of 8 elements, where the vector loops of the whole begin too."""
    rule = OptimizerConfig(**given)
    cuts = [slice(0, 40), slice(40, 48), slice(48, 104)]
    whole, parts = numbers(104, 0, dtype), [numbers(104, 0, dtype)[cut].clone() for cut in cuts]
    one, other = Optimizer(rule, CPU), Optimizer(rule, CPU)
    whole_moments, part_moments = one.moments(whole), [other.moments(part) for part in parts]
    for turn in range(1, 4):
        gradient = numbers(104, turn, dtype)
        one.count += 1
        other.count += 1
        one.update([whole], [gradient], [whole_moments], lr=0.1, decay=True)
        for part, cut, moments in zip(parts, cuts, part_moments, strict=True):
            other.update([part], [gradient[cut].clone()], [moments], lr=0.1, decay=True)
        assert torch.equal(torch.cat(parts), whole)


def test_nothing_to_update_is_nothing() -> None:
    Optimizer(OptimizerConfig(), CPU).update([], [], [], lr=0.1, decay=True)


def test_moments_have_the_shape_and_dtype_of_the_weights() -> None:
    moments = Optimizer(OptimizerConfig(), CPU).moments(torch.ones(5, dtype=torch.float64))
    assert isinstance(moments, Moments) and moments.first is not None and moments.second is not None
    assert moments.first.dtype == torch.float64 and not moments.first.any() and not moments.second.any()


# --- whole runs ------------------------------------------------------------------------------------------------------


def torch_run(given: dict[str, Any], contexts: list[list[Context]], steps: int) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The same training written with torch alone: mean loss over the batch's targets, clip_grad_norm_, torch's optimizer."""
    settings = Config.model_validate(given)
    plain, rule = Plain(settings.model, seed=settings.runtime.seed), settings.optimizer
    parameters = plain.parameters
    decayed = [parameter for name, parameter in parameters.items() if parameter.dim() == 2]
    others = [parameter for name, parameter in parameters.items() if parameter.dim() == 1]
    optimizer = theirs(rule, [{"params": decayed}, {"params": others, "weight_decay": 0.0}])
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        targets = sum(int((one.labels >= 0).sum()) for one in contexts[step])
        total = torch.zeros((), dtype=torch.float64)
        for one in contexts[step]:
            logits = plain.logits(one).flatten(0, 1)
            loss = F.cross_entropy(logits, one.labels.flatten(), label_smoothing=rule.label_smoothing, reduction="sum") / targets
            loss.backward()
            total += loss.detach()
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), rule.clip or float("inf"))))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.schedule, peak=rule.lr)
        optimizer.step()
        losses.append(float(total))
    return losses, norms, {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        ({"tied": True}, {}),
        ({"family": "gpt2"}, {"label_smoothing": 0.1}),
        ({"family": "qwen3"}, {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ({}, {"clip": 0.0}),
        ({}, {"clip": 1e6}),
    ],
    ids=str,
)
def test_a_run_is_what_torch_alone_would_train(model: dict[str, Any], rule: dict[str, Any]) -> None:
    """traps 1, 2 and 28: the loss is divided once by all targets, accumulated, clipped by the global norm, counted by one."""
    given = config(micro=1, batch=4, sequence=12, optimizer=rule, **model)
    _, engine, trainer = build(given, vars(layout_of("dp=1")), 0, "float64")
    contexts = [
        [trainer.context(micro, step=step, training=True) for micro in trainer.order.micro_batches(step, dp_rank=0, dp_size=1, micro=1)]
        for step in range(4)
    ]
    losses, norms, weights = torch_run(given, contexts, 4)
    taken = [trainer.step(step) for step in range(4)]
    assert [one.loss for one in taken] == pytest.approx(losses, rel=1e-12)
    assert [one.norm for one in taken] == pytest.approx(norms, rel=1e-12)
    for item in engine.state():
        if item.kind == "weight":
            torch.testing.assert_close(item.values.view(item.piece.slot.shape), weights[item.piece.slot.name], rtol=1e-9, atol=1e-12)
    assert float(engine.optimizer.count) == 4


def test_steps_say_what_they_did() -> None:
    given = config(batch=4, sequence=12)
    _, _, trainer = build(given, vars(layout_of("dp=1")), 0, "float64")
    taken = trainer.step(2)
    targets = sum(micro.targets for micro in trainer.order.micro_batches(2, dp_rank=0, dp_size=1, micro=1))
    assert (taken.step, taken.tokens, taken.targets) == (2, 48, targets) and taken.data_wait >= 0
    assert taken.learning_rate == learning_rate(2, Config.model_validate(given).schedule, peak=1e-2)


@pytest.mark.parametrize("text", ["dp=1", "dp=1,zero=2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_the_same_for_any_number_of_targets(dtype: str, text: str) -> None:
    """Times that number. In bfloat16 1 / 30,001 is 0.14 % off, and multiplied by 1 / 32,640 all numbers would be rounded up."""
    _, engine, trainer = build(config(micro=2, sequence=32), vars(layout_of(text)), 0, dtype)
    contexts = [trainer.context(batch, step=0, training=True) for batch in trainer.take(0)]
    found = []
    for targets in (32768, 30001, 32640, 48897, 7.25):
        engine.run(contexts, targets=targets)
        norm = engine.finish_gradients().norm
        gradients = {item.piece.slot.name: item.values.double() * targets for item in engine.state() if item.kind == "gradient"}
        found.append(gradients | {"norm": torch.tensor(norm * targets, dtype=torch.float64)})
    for other in found[1:]:
        for name, exact in found[0].items():
            assert (other[name] - exact).norm() <= (1e-6 if dtype == "bfloat16" else 1e-5) * exact.norm(), name


@pytest.mark.parametrize("text", ["dp=1", "dp=1,offload=optimizer"])
@pytest.mark.parametrize("clip", [0.0, 1e-4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_update_takes_the_gradient_that_is_shown(dtype: str, clip: float, text: str) -> None:
    """Plain SGD shows what AdamW hides: a factor that is left out, or taken twice."""
    given = config(micro=2, sequence=32, optimizer={"kind": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": clip})
    _, engine, trainer = build(given, vars(layout_of(text)), 0, dtype)
    engine.run([trainer.context(batch, step=0, training=True) for batch in trainer.take(0)], targets=48897)
    norm = engine.finish_gradients().norm
    state = {(item.kind, item.piece.slot.name): item.values.double().clone() for item in engine.state()}
    assert norm > 2 * clip
    engine.step(0.5)
    for item in engine.state():
        before, gradient = state["weight", item.piece.slot.name], state["gradient", item.piece.slot.name]
        expected = before - 0.5 * gradient * (clip / (norm + 1e-6) if clip else 1.0)
        moved = (expected - before).norm()
        assert moved > 0 and (item.values - expected).norm() <= 1e-4 * moved + 1e-7 * before.norm(), item.piece.slot.name
