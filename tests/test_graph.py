"""A step as a graph: what is copied where, when it is recorded, and that a replay needs nothing of the host.

No CUDA device is needed: `CpuRecorder` writes down every operation with its tensors, and repeats them on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_llm import comm
from dist_llm.config.rules import problems
from dist_llm.config.schema import Config, changed
from dist_llm.engines.graph import WARM, StepGraph
from dist_llm.errors import UsageError
from dist_llm.train.setup import refuse_graph
from dist_llm.train.trainer import Trainer
from tests.engine_cases import build, config, layout_of


class CpuRecorder(TorchDispatchMode):
    """Records by doing: the first replay has then been done already. The host may read nothing meanwhile, as in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict[str, Any], Any]] = []
        self.events: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host reads the device"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def warm(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.events.append("warm")
        return work()

    def record(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        self.events.append("record")
        with self:
            return work()

    def replay(self) -> None:
        self.events.append("replay")
        if self.events[-2] == "record":
            return
        with torch.no_grad():
            for function, args, kwargs, kept in self.calls:
                for place, value in zip(tree_leaves(kept), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(value, torch.Tensor) and value.numel() and value.data_ptr() != place.data_ptr():
                        place.detach().copy_(value)


def trained(
    given: dict[str, Any], text: str, *, graph: bool, steps: int = 6, dtype: str = "float32"
) -> tuple[list[str], list[torch.Tensor], Any]:
    """Losses and norms to the bit, the weights after some steps, and the recorder."""
    _, engine, trainer = build(given, vars(layout_of(text)), 0, dtype)
    recorder = CpuRecorder()
    engine.graph = StepGraph(engine.flats, recorder) if graph else None
    taken = [trainer.step(step) for step in range(steps)]
    return [f"{one.loss.hex()} {one.norm.hex()}" for one in taken], [flat.master.clone() for flat in engine.flats], recorder


CASES: list[tuple[str, dict[str, Any]]] = [
    ("dp=1", {}),
    ("dp=1,zero=2", {"tied": True}),
    ("dp=1,reduce=micro_batch", {"tied": True}),
    ("dp=1,recompute=full", {"family": "gpt2", "dropout": 0.2}),
    ("dp=1,recompute=selective", {"family": "qwen3"}),
    ("dp=1,zero=1", {"document_mask": True}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("text", "model"), CASES, ids=str)
def test_replayed_steps_are_equal_to_the_bit(text: str, model: dict[str, Any], dtype: str) -> None:
    """Other tokens, labels, masks and numbers of targets in every step; dropout by a key that is copied in."""
    plain, expected, _ = trained(config(micro=2, **model), text, graph=False, dtype=dtype)
    found, weights, recorder = trained(config(micro=2, **model), text, graph=True, dtype=dtype)
    assert found == plain
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert recorder.events == ["warm"] * WARM + ["record"] + ["replay"] * (6 - WARM)


def test_an_input_that_is_not_copied_is_seen() -> None:
    """The test above is not blind: a graph that keeps its first batch trains on it for ever."""
    plain, _, _ = trained(config(micro=2), "dp=1", graph=False)
    take, StepGraph._take = StepGraph._take, lambda self, contexts: None if self.inputs else take(self, contexts)  # type: ignore[method-assign]
    try:
        found, _, _ = trained(config(micro=2), "dp=1", graph=True)
    finally:
        StepGraph._take = take  # type: ignore[method-assign]
    assert found[1] != plain[1] and found[4] != plain[4]


def test_validation_and_recorded_spans_go_beside_the_graph() -> None:
    _, engine, trainer = build(config(micro=2), vars(layout_of("dp=1")), 0, "float32")
    _, other, plain = build(config(micro=2), vars(layout_of("dp=1")), 0, "float32")
    engine.graph = StepGraph(engine.flats, recorder := CpuRecorder())

    def validated(one: Trainer) -> float:
        batches = one.order.micro_batches(9, dp_rank=0, dp_size=1, micro=2)
        return one.engine.evaluate([one.context(batch, step=0, training=False) for batch in batches])

    for step in range(8):
        engine.pipeline.recording = step == 5
        assert trainer.step(step).loss == plain.step(step).loss
        assert validated(trainer) == validated(plain)
        assert bool(engine.pipeline.spans) == (step >= 5) or step < 5
    assert recorder.events.count("replay") == 8 - WARM - 1


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += function in READS
        return function(*args, **(kwargs or {}))


READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


@pytest.mark.parametrize("fp8", ["off", "tensorwise", "rowwise"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_step_reads_the_norm_and_the_loss_alone(fp8: str, family: str) -> None:
    """On a device every read waits for all work before it."""
    given = config(micro=2, sequence=32, family=family, dim=32, heads=2, kv_heads=2, ffn=64, dropout=0.1, tied=True)
    given["runtime"]["fp8"] = fp8
    _, engine, trainer = build(given, vars(layout_of("dp=1")), 0, "float32" if fp8 == "off" else "bfloat16")
    trainer.step(0)
    contexts = [trainer.context(batch, step=1, training=True) for batch in trainer.take(1)]
    with HostReads() as reads:
        engine.run(contexts, targets=7)
        totals = engine._finish()
    assert reads.count == 0
    engine.totals = totals
    engine.finish_gradients()
    with HostReads() as reads:
        engine.step(1e-3)
        assert reads.count == 0
        float(totals[0])
    assert reads.count == 1, "it sees them"


def test_replays_book_their_bytes() -> None:
    """The calls that book are not made again."""
    graph = StepGraph([], CpuRecorder())

    def work(contexts: Any) -> torch.Tensor:
        comm.ledger.book("tp", 5.0)
        return torch.zeros(1)

    found = []
    for _ in range(5):
        comm.ledger.take()
        comm.ledger.book("dp", 1.0)
        graph.run([], work)
        found.append(comm.ledger.take())
    assert found == [{"dp": 1, "tp": 5}] * 5


REFUSED = [
    ("dp=1", {"runtime.device": "cpu"}, "a CPU has no graphs"),
    ("dp=2,engine=ddp", {}, "engine=ddp calls its own library"),
    ("pp=2", {}, "the host posts the messages"),
    ("dp=2,zero=3", {}, "zero=3 gives weights new memory"),
    ("dp=2,zero=1,offload=optimizer", {}, "offload=optimizer"),
    ("dp=2", {"runtime.backend": "gloo"}, "gloo's transfers pass through the host"),
]


@pytest.mark.parametrize(("text", "changes", "words"), REFUSED)
def test_what_cannot_be_recorded_is_refused(text: str, changes: dict[str, Any], words: str) -> None:
    wanted = changed(Config.model_validate(config()), {"runtime.cuda_graph": True, **changes})
    assert any(words in problem for problem in graph_problems(wanted, text))
    assert not graph_problems(changed(wanted, {"runtime.cuda_graph": False}), text)
    assert not graph_problems(changed(Config.model_validate(config()), {"runtime.cuda_graph": True}), "dp=2,tp=2,zero=2")


def graph_problems(wanted: Config, text: str) -> list[str]:
    """Why a config cannot be recorded."""
    return [problem.text for problem in problems(wanted, layout_of(text)) if problem.key == "runtime.cuda_graph"]


def test_without_a_device_it_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = changed(Config.model_validate(config()), {"runtime.cuda_graph": True}).runtime
    with pytest.raises(UsageError, match="only a CUDA device"):
        refuse_graph(runtime, torch.device("cpu"), world=1)
    with pytest.raises(UsageError, match="cannot be in a graph"):
        refuse_graph(runtime, torch.device("cuda"), world=2)  # this torch has no NCCL
    refuse_graph(runtime, torch.device("cuda"), world=1)
