"""What the ranks of test_preference.py do: the engine's loss of pairs beside transformers and the formulas of the papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config, changed
from dist_llm.train.proof import MadeUp
from dist_llm.train.setup import make_engine, make_mesh
from dist_llm.train.trainer import Trainer
from tests.family_oracles import nothing_narrowed, our_tensors, parameters_of, theirs_of

RULES: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.1},
    "wrong labels": {"beta": 0.7, "label_smoothing": 0.2},
    "ipo": {"loss": "ipo", "beta": 0.4},
    "hinge": {"loss": "hinge", "beta": 0.3},
    "a token": {"beta": 2.0, "length_normalised": True},
    "with sft": {"beta": 0.1, "sft": 1.5, "label_smoothing": 0.05},
}
PAIRS: dict[str, Any] = {
    "model": {"family": "llama", "layers": 2, "dim": 24, "heads": 4, "kv_heads": 2, "ffn": 36, "vocab": 53, "tied": False},
    "data": {"source": "skills", "sequence": 24, "tokenizer": {"kind": "file", "path": "none"}},
    "batch": {"global": 4, "micro": 2},
    "preference": {"beta": 0.1},
    "runtime": {"device": "cpu"},
}


def by_the_papers(logps: Tensor, reference: Tensor, lengths: Tensor, rule: dict[str, Any]) -> Tensor:
    """The mean loss of pairs from (P, 2) each: Rafailov et al. 2023 (7), Mitchell 2023 (3), Azar et al. 2023 (17), Zhao et al. 2023,
    and the negative log likelihood of Pang et al. 2024 (1), as trl writes them."""
    beta, eps = rule.get("beta", 0.1), rule.get("label_smoothing", 0.0)
    if rule.get("length_normalised"):
        pi, ref = logps / lengths, reference / lengths
    else:
        pi, ref = logps, reference
    logits = (pi[:, 0] - pi[:, 1]) - (ref[:, 0] - ref[:, 1])
    kind = rule.get("loss", "sigmoid")
    if kind == "sigmoid":
        losses = -torch.log(torch.sigmoid(beta * logits)) * (1 - eps) - torch.log(torch.sigmoid(-beta * logits)) * eps
    else:
        losses = (logits - 1 / (2 * beta)) ** 2 if kind == "ipo" else torch.clamp(1 - beta * logits, min=0)
    return (losses + rule.get("sft", 0.0) * -logps[:, 0] / lengths[:, 0]).mean()


def against_transformers(rank: int, world: int, say: Callable) -> dict[str, dict[str, float]]:
    """Of each rule the largest relative differences of loss and gradients, and the figures; sides alone there, packed here."""
    torch.set_num_threads(1)
    config = Config.model_validate(PAIRS)
    order = MadeUp(config.model.vocab, config.data.sequence, 4, seed=3, weighted=True, pairs=True)
    theirs = theirs_of(config.model, torch.float64)
    weights = our_tensors({name: tensor.data for name, tensor in parameters_of(theirs).items()}, config.model)
    with nothing_narrowed():
        logps, lengths, reference = _sides_alone(theirs, order)
    found = {}
    for name, rule in RULES.items():
        expected = by_the_papers(logps, reference, lengths, rule)
        theirs.zero_grad()
        expected.backward(retain_graph=True)
        slopes = our_tensors({key: tensor.grad for key, tensor in parameters_of(theirs).items()}, config.model)
        settings = changed(config, {"preference": rule})
        mesh = make_mesh(settings, Layout(), 0)
        engine = make_engine(settings, mesh, device=torch.device("cpu"), dtype=torch.float64)
        _load(engine, weights)
        taken = Trainer(settings, mesh, engine, order).gradients(0)
        ours = {item.piece.slot.name: item.values.clone() for item in engine.state() if item.kind == "gradient"}
        assert ours.keys() == slopes.keys()
        worst = max(float((ours[key] - slope.flatten()).abs().max() / slope.abs().max()) for key, slope in slopes.items())
        found[name] = {"loss": abs(taken.loss / float(expected.detach()) - 1), "gradient": worst, **taken.figures}
        logps_here = logps.detach()
        gains = (logps_here - reference) / (lengths if rule.get("length_normalised") else 1.0)
        means = (rule["beta"] * gains).mean(0).tolist()
        right = float((gains[:, 0] > gains[:, 1]).double().mean())
        wanted = {"reward_chosen": means[0], "reward_rejected": means[1], "reward_margin": means[0] - means[1], "accuracy": right}
        wanted |= {"logp_chosen": float(logps_here[:, 0].mean()), "logp_rejected": float(logps_here[:, 1].mean())}
        found[name]["figures"] = max(abs(taken.figures[key] - value) / max(1.0, abs(value)) for key, value in wanted.items())
    return found


def _load(engine: Any, weights: dict[str, Tensor]) -> None:
    """Gives an engine whole weights."""

    def read(kind: str, name: str, box: Any, start: int, stop: int) -> Tensor:
        return weights[name].flatten()[start:stop] if kind == "weight" else torch.zeros(stop - start, dtype=torch.float64)

    engine.load_state(read, count=0)


def _sides_alone(theirs: Any, order: MadeUp) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities, lengths and reference (P, 2) of a batch's pairs, each side run through the model by itself."""
    (batch,) = order.micro_batches(0, dp_rank=0, dp_size=1, micro=4)
    assert batch.pairs is not None and batch.weights is not None and batch.reference is not None
    logps, lengths = [], []
    for row, pairs in enumerate(batch.pairs.tolist()):
        for side in range(2 * pairs):
            here = (batch.documents[row] == side).nonzero()[:, 0]
            labels, counts = batch.labels[row, here], batch.weights[row, here]
            each = theirs(input_ids=batch.tokens[row, here][None]).logits[0].log_softmax(-1)
            picked = each.gather(1, labels.clamp(min=0)[:, None])[:, 0]
            logps.append((picked * counts * (labels >= 0)).sum())
            lengths.append((counts * (labels >= 0)).sum())
    assert len(set(batch.pairs.tolist())) > 1, "rows of one pair and of two"
    return torch.stack(logps).view(-1, 2), torch.stack(lengths).view(-1, 2), batch.reference


def reference_of_the_start(rank: int, world: int, say: Callable) -> list[float]:
    """Asked for without a reference, a batch gives the log probability of each side; with those as reference all is as at the start."""
    torch.set_num_threads(1)
    config = Config.model_validate(PAIRS)
    order = MadeUp(config.model.vocab, config.data.sequence, 4, seed=3, pairs=True)
    mesh = make_mesh(config, Layout(), 0)
    engine = make_engine(config, mesh, device=torch.device("cpu"), dtype=torch.float64)
    trainer = Trainer(config, mesh, engine, order)
    (batch,) = order.micro_batches(0, dp_rank=0, dp_size=1, micro=4)
    alone = engine.figures([trainer.context(replace(batch, reference=None), step=0, training=False)])
    again = replace(batch, reference=alone.view(-1, 2))
    return (engine.figures([trainer.context(again, step=0, training=False)]) / batch.weight).tolist()


def made_twice(rank: int, world: int, say: Callable) -> dict[str, float]:
    """The head's gradients by input and by weight, over chunks: in two passes, in one, and by autograd through whole logits."""
    from dist_llm.config.schema import PreferenceConfig
    from dist_llm.model import loss
    from dist_llm.model.preference import Pairs

    source = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(*shape, generator=source, dtype=torch.float64).requires_grad_() for shape in ((40, 6), (17, 6)))
    labels = torch.randint(0, 17, (40,), generator=source).masked_fill(torch.arange(40) % 5 == 0, loss.IGNORED)
    sides = torch.arange(40).div(9, rounding_mode="floor")  # four sides, and four tokens of none
    labels[36:] = loss.IGNORED
    counts = (labels >= 0) * torch.rand(40, generator=source, dtype=torch.float64)
    reference = -10 * torch.rand(2, 2, generator=source, dtype=torch.float64)
    pairs = Pairs(sides, counts, 4, reference, PreferenceConfig.model_validate({"beta": 0.5, "sft": 0.3}))
    losses = F.cross_entropy(x @ weight.T, labels, ignore_index=loss.IGNORED, reduction="none")
    expected = pairs.figures(losses)
    by_x, by_weight = torch.autograd.grad(expected[0], (x, weight))
    loss.CHUNK, part = 7, loss.whole(weight, 0.0)
    with torch.no_grad():
        two, one = (pairs.with_gradients(x, weight, labels, part, trained=trained) for trained in (True, False))
        alone = pairs.alone(x, weight, labels, part)
    assert one[2] is None and two[2] is not None
    far = {"figures": two[0] - expected, "alone": alone - expected, "one": one[0] - expected}
    far |= {"by x": two[1] - by_x, "by x in one": one[1] - by_x, "by weight": two[2] - by_weight}
    return {name: float(tensor.abs().max()) for name, tensor in far.items()}
