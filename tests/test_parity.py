"""Every strategy alone and in legal combination equals one process: loss, norm, every gradient, weight and moment.

Float64, three steps of AdamW and three of SGD with momentum, very unequal masks, accumulation, clipping, weight decay.
The tolerance is 1e-10 (docs/measuring.md). Bytes are held against their closed form in the same runs.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config
from dist_llm.mesh import coordinate
from dist_llm.model.stages import stage_units
from dist_llm.plan.traffic import Shape, sent_bytes
from dist_llm.train.proof import Run, judge, read_run
from dist_llm.train.setup import num_micro_batches
from tests.layouts import HALVED_ROWS, LATER, NAMED, WIDER, concrete, config_of, distinct, drawn, for_layout
from tests.ranks import Ranks

STEPS = 3
SGD = {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "clip": 0.5}
DRAWN = list(itertools.islice(drawn(seed=20, largest=4), 22)) + list(itertools.islice(drawn(seed=21, largest=8), 6))
SWEEP = list(itertools.islice(distinct(drawn(seed=2026)), 300))
SWEEP_WIDER = list(itertools.islice(drawn(seed=2027, models=WIDER), 60))


class Prover:
    """Runs cases on ranks and keeps the references. work: what each rank does, in so many seconds; sgd: with a second run of SGD."""

    def __init__(
        self, ranks: Ranks, folder: Path, work: str = "dist_llm.train.proof:proof_rank", *, sgd: bool = True, seconds: float = 60.0
    ) -> None:
        self.ranks, self.folder, self.work, self.references = ranks, folder, work, dict[str, Run]()
        self.sgd, self.seconds = [SGD] if sgd else [], seconds
        self.count = itertools.count()

    def run(self, config: Config, layout: Layout) -> Run:
        """Three steps under AdamW and three under SGD; every rank's bytes must be those of the closed form."""
        folder = self.folder / f"run-{next(self.count)}"
        folder.mkdir()
        tree = config.model_dump(by_alias=True)
        job = {"config": tree, "steps": STEPS, "dtype": "float64", "optimizers": [tree["optimizer"], *self.sgd]}
        records = self.ranks.run(layout.world, self.work, job, asdict(layout), str(folder), timeout_seconds=self.seconds)
        shape = Shape(config.model, layout, config.data.sequence, config.batch.micro, num_micro_batches(config, layout), "float64",
                      config.optimizer.label_smoothing > 0, pairs=config.preference.loss is not None)  # fmt: skip
        for rank, record in enumerate(records):
            at = coordinate(rank, layout)
            expected = sent_bytes(shape, pp=at.pp, tp=at.tp)
            for sent in record["sent"][:STEPS]:
                _same_bytes(sent, expected, smoothed=shape.smoothing)
        return read_run(folder)

    def reference(self, config: Config) -> Run:
        """One process on the same config."""
        key = config.model_dump_json()
        if key not in self.references:
            self.references[key] = self.run(config, concrete("dp=1"))
        return self.references[key]


def _same_bytes(sent: dict[str, float], expected: dict[str, float], *, smoothed: bool) -> None:
    """Every axis equal to the byte; the SGD half of a run has no label smoothing, so that half is not passed in here."""
    assert sent.keys() == expected.keys(), (sent, expected, smoothed)
    for axis in sent:
        assert abs(sent[axis] - expected[axis]) < 1e-6 * max(1.0, expected[axis]), (axis, sent, expected)


@pytest.fixture(scope="module")
def prover(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Prover:
    """One for the module."""
    return Prover(ranks, tmp_path_factory.mktemp("parity"))


def check(prover: Prover, model: str, text: str) -> None:
    """Proves a layout of a model equal to one process."""
    layout = concrete(text)
    config = for_layout(config_of(model), layout)
    verdict = judge(prover.reference(config), prover.run(config, layout), layout=layout)
    assert verdict.equal, verdict.first


def named() -> list[Any]:
    """The named rows, some of them behind `long`."""
    assert set(NAMED) >= LATER, LATER - set(NAMED)
    marks = {pair: (pytest.mark.long,) if pair in LATER else () for pair in NAMED}
    return [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}", marks=marks[pair]) for pair in NAMED]


@pytest.mark.parametrize(("model", "text"), named())
def test_named_layout(prover: Prover, model: str, text: str) -> None:
    """Layouts that users type first, and those that had a bug somewhere."""
    check(prover, model, text)


@pytest.mark.parametrize(("model", "text"), DRAWN, ids=[f"{model}-{text}" for model, text in DRAWN])
def test_drawn_layout(prover: Prover, model: str, text: str) -> None:
    """Seeded draws of legal layouts up to 8 ranks."""
    check(prover, model, text)


@pytest.mark.long
@pytest.mark.parametrize(("model", "text"), SWEEP, ids=[f"{model}-{text}" for model, text in SWEEP])
def test_sweep(prover: Prover, model: str, text: str) -> None:
    """Three hundred more."""
    check(prover, model, text)


@pytest.mark.long
@pytest.mark.parametrize(("model", "text"), SWEEP_WIDER, ids=[f"{model}-{text}" for model, text in SWEEP_WIDER])
def test_sweep_of_wider_models(prover: Prover, model: str, text: str) -> None:
    """Sixty of what other families do."""
    check(prover, model, text)


@pytest.mark.parametrize(("model", "text"), HALVED_ROWS, ids=str)
def test_a_stage_ends_inside_a_block(model: str, text: str) -> None:
    """Else the rows of halved blocks prove nothing of them."""
    config, layout = config_of(model), concrete(text)
    ends = [units[-1] for units in stage_units(config.model, config.data.sequence, layout.stages)]
    assert any(name.endswith(".attention") for name in ends), ends


def test_as_many_distinct_layouts_as_said() -> None:
    """More than 60 in the ordinary run, 300 in the sweep; a layout that comes with several models counts once."""
    assert len({str(concrete(pair[1])) for pair in NAMED + DRAWN if pair not in LATER}) >= 70
    assert len({str(concrete(text)) for _, text in SWEEP}) >= 300


def test_padded_rows_of_the_vocabulary_are_ordinary_rows(prover: Prover) -> None:
    """trap 19: no label names them, the softmax counts them; every layout does the same (named rows)."""
    reference = prover.reference(config_of("padded"))
    gradient = reference.tensors[0, "gradient", "embedding.weight"]
    assert (abs(gradient[70:]).max(axis=1) > 0).all() and len(gradient) == 97


def test_of_a_long_run_the_first_tensors_and_the_last_are_compared(ranks: Ranks, tmp_path: Path) -> None:
    """Each is the whole model several times: `compare --steps 100` must not fill the memory. Losses and norms are all there."""
    job = {"config": config_of("llama").model_dump(by_alias=True), "steps": 6, "dtype": "float64"}
    ranks.run(2, "dist_llm.train.proof:proof_rank", job, asdict(concrete("dp=2,zero=1")), str(tmp_path))
    run = read_run(tmp_path)
    assert {step for step, _, _ in run.tensors} == {0, 1, 2, 5} and len(run.record.losses) == len(run.record.norms) == 6
    late = Run(replace(run.record, norms=[*run.record.norms[:4], 9.0, 9.0]), run.tensors, run.ranks)
    assert (first := judge(run, late).first) and (first.kind, first.step) == ("norm", 5)


def test_a_wrong_gradient_is_found_and_named(prover: Prover) -> None:
    """The judge is not blind: one changed element of one gradient fails the proof and is named."""
    config = config_of("llama")
    reference = prover.reference(config)
    broken = Run(reference.record, dict(reference.tensors), reference.ranks)
    place = (1, "gradient", "blocks.2.mlp.up.weight")
    changed = reference.tensors[place].copy()
    changed[3, 4] *= 1 + 1e-7
    changed[3, 5] += 1e-8
    broken.tensors[place] = changed
    first = judge(reference, broken).first
    assert first is not None and (first.kind, first.name, first.step, first.rank) == ("gradient", "blocks.2.mlp.up.weight", 2, 0)
