"""Master weights and moments in host memory: equal to the bit to those on the device, however late a copy is made.

No CUDA device is needed: on a CPU device the engine runs the same lines, and here a copy between "device" and "host" can be
held back until the very moment at which the code waits for it. What streams do on a real device is in test_on_cuda alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from dist_llm.engines.offload import BUFFERS
from dist_llm.errors import NumericError
from dist_llm.train.proof import Run, judge
from tests.engine_cases import config, different, prove
from tests.ranks import Ranks

SGD = {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "clip": 0.5}
TEXTS = ["dp=1", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3", "dp=2,tp=2,zero=1", "pp=2", "dp=2,pp=2,zero=3", "dp=4,zero=3,shard=2"]


@pytest.fixture(scope="module")
def run(ranks: Ranks) -> Callable[..., Run]:
    """A proof run of a tied model, made once: three steps of AdamW and three of SGD with momentum."""
    given = config(tied=True)

    @cache
    def known(text: str, dtype: str = "float32", **options: Any) -> Run:
        return prove(ranks, given, text, dtype=dtype, optimizers=[given["optimizer"], SGD], **options)

    return known


@pytest.mark.parametrize("text", TEXTS)
def test_offloading_is_equal_to_the_bit(run: Callable[..., Run], text: str) -> None:
    """Losses, norms, every gradient, weight and moment."""
    assert different(run(text), run(f"{text},offload=optimizer")) == []


@pytest.mark.parametrize("text", ["dp=2", "dp=2,zero=3"])
def test_bfloat16_offloading_is_equal_to_the_bit(run: Callable[..., Run], text: str) -> None:
    """Gradients go down as float32, weights come up as bfloat16."""
    assert different(run(text, "bfloat16"), run(f"{text},offload=optimizer", "bfloat16")) == []


LATE = "tests.engine_cases:late_copies"


@pytest.mark.parametrize(("text", "dtype"), [("dp=2,zero=1", "float32"), ("dp=2,zero=3", "float32"), ("dp=2,zero=3", "bfloat16")])
def test_copies_may_be_as_late_as_their_wait(run: Callable[..., Run], text: str, dtype: str) -> None:
    """trap 23, between device and host: nothing touches a buffer while its copy is under way."""
    assert different(run(text, dtype), run(f"{text},offload=optimizer", dtype, work=LATE, bug="")) == []


BUGS = ["a gradient is used before it is down", "a buffer is taken before its weights are up", "weights are used before they are up"]


@pytest.mark.parametrize("bug", BUGS)
def test_late_copies_show_what_is_not_waited_for(run: Callable[..., Run], bug: str) -> None:
    """The test above is not blind."""
    plain = run("dp=2,zero=1")
    try:
        late = run("dp=2,zero=1,offload=optimizer", work=LATE, bug=bug)
    except NumericError:
        return  # not a number, refused
    assert different(plain, late) != []


def test_the_next_gradient_travels_during_an_update(ranks: Ranks) -> None:
    """And weights of the unit before go up meanwhile: each copy begins before the update that it can hide behind."""
    events = ranks.run(1, "tests.engine_cases:ferried", config(layers=3))[0]
    units = 5  # embedding, three blocks, head
    assert [event for event in events if event[0] == "update"] == [["update", unit] for unit in range(units)]
    place = {tuple(event): at for at, event in enumerate(events)}
    for unit in range(units - 1):
        assert place["down", unit + 1] < place["update", unit] < place["up", unit] < place["update", unit + 1]
    for unit in range(BUFFERS, units):  # the buffer of three units ago: waited for, and asked only when it is taken again
        assert place["update", unit - 2] < place["went up", unit - BUFFERS] < place["down", unit]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_cuda(ranks: Ranks, dtype: str) -> None:
    """The kernels of host and device round differently: float32 noise, which a copy out of order would exceed by far."""
    given = {**config(tied=True, batch=8), "runtime": {"device": "cuda"}}
    plain, offloaded = (prove(ranks, given, text, dtype=dtype) for text in ("dp=1", "dp=1,offload=optimizer"))
    bounds = dict.fromkeys(("loss", "norm", "gradient", "parameter", "moment"), 1e-4 if dtype == "float32" else 3e-2)
    assert judge(plain, offloaded, tolerance=bounds).equal
