"""What each token's loss counts: the same under every layout and engine, and what plain torch makes of it."""

from __future__ import annotations

import pytest

from dist_llm.train.proof import Run, judge
from tests.engine_cases import config, prove
from tests.ranks import Ranks

CASE = "tests.family_oracles:weighted_proof"


@pytest.fixture(scope="module")
def reference(ranks: Ranks) -> Run:
    """One process."""
    return prove(ranks, config(), "dp=1", work=CASE)


@pytest.mark.parametrize("text", ["tp=2", "dp=2,zero=3", "tp=2,pp=2,sp=off", "dp=2,engine=ddp", "dp=2,zero=3,engine=fsdp2"])
def test_every_layout_and_engine_weighs_alike(ranks: Ranks, reference: Run, text: str) -> None:
    verdict = judge(reference, prove(ranks, config(), text, work=CASE))
    assert verdict.equal, verdict.first


def test_weights_change_the_run(ranks: Ranks, reference: Run) -> None:
    """The proof would see them forgotten."""
    assert not judge(reference, prove(ranks, config(), "dp=1")).equal


def test_a_weighted_batch_is_plain_torch_on_the_logits(ranks: Ranks) -> None:
    """Every gradient of the model from the weighted loss, against autograd through whole logits."""
    loss, gradient = ranks.run(1, "tests.family_oracles:weighted_by_torch")[0]
    assert loss < 1e-12 and gradient < 1e-12
