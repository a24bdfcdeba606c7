"""Cases run on ranks: in which order things are begun and waited for. Each returns the list of events it saw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_llm.config.schema import Config
from dist_llm.parallel import tensor
from dist_llm.parallel.pipeline import Unit
from dist_llm.parallel.zero import FlatUnit
from dist_llm.train.proof import MadeUp
from dist_llm.train.setup import make_engine, make_mesh
from dist_llm.train.trainer import Trainer
from tests.layouts import concrete, config_of


def zero_events(rank: int, world: int, say: Any, layout: str, model: str = "llama") -> list[str]:
    """One training step; events of weight gathers, unit forwards, unit backwards and gradient reductions, by unit."""
    events: list[str] = []

    def watch(name: str, label: str) -> None:
        original = getattr(FlatUnit, name)

        def watched(self: FlatUnit, *rest: Any) -> Any:
            started = name == "start_gather" and (self.here or self.gathering is not None)
            if not started:
                events.append(f"{label} {self.plan.unit}")
            return original(self, *rest)

        setattr(FlatUnit, name, watched)

    for name, label in (("start_gather", "gather"), ("begin_backward", "backward"), ("start_reduce", "reduce"), ("collect", "collect")):
        watch(name, label)
    watch("_start_sum_of_replicas", "cross")
    watch("_start_spread", "spread")
    trainer = _trainer(config_of(model), layout, rank)
    for stage in trainer.engine.stages:
        for unit in stage.units:
            unit.module.register_forward_pre_hook(lambda *_, unit=unit: events.append(f"forward {unit.name}"))
    trainer.step(0)
    return events


def arrivals(rank: int, world: int, say: Any, layout: str) -> list[str]:
    """Of a second step: where updated weights are waited for, and the forwards of units."""
    events: list[str] = []
    trainer = _trainer(config_of("llama"), layout, rank)
    trainer.step(0)
    assert all(flat.gathering is not None for flat in trainer.engine.flats)
    for stage in trainer.engine.stages:
        for unit in stage.units:
            unit.module.register_forward_pre_hook(lambda *_, unit=unit: events.append(f"forward {unit.name}"))
    for flat in trainer.engine.flats:

        def wait(flat: FlatUnit = flat, finish: Any = flat.finish_gather) -> None:
            if flat.gathering is not None:
                events.append(f"arrive {flat.plan.unit}")
            finish()

        flat.finish_gather = wait
    trainer.step(1)
    return events


def _trainer(config: Config, layout: str, rank: int) -> Trainer:
    mesh = make_mesh(config, concrete(layout), rank)
    engine = make_engine(config, mesh, device=torch.device("cpu"), dtype=torch.float64)
    assert all(isinstance(unit, Unit) for stage in engine.stages for unit in stage.units)
    return Trainer(config, mesh, engine, MadeUp(config.model.vocab, config.data.sequence, config.batch.global_, 7))


class _Products(TorchDispatchMode):
    """Notes every matrix product."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            self.events.append("product")
        return function(*args, **(kwargs or {}))


def column_events(rank: int, world: int, say: Any, sp: bool) -> list[str]:
    """The backward of three projections of one input: matrix products, and when the input's gradient is on its way."""
    events: list[str] = []
    mesh = make_mesh(config_of("llama"), concrete("tp=2"), rank)
    start = tensor.start_reduce

    def begun(*rest: Any) -> Any:
        events.append("start")
        pending = start(*rest)
        return SimpleNamespace(finish=lambda: (events.append("finish"), pending.finish())[1])

    tensor.start_reduce = begun
    x, weights = torch.randn(2, 4 if sp else 8, 6), [torch.randn(5, 6) for _ in range(3)]
    slopes = [torch.randn(2, 8, 5) for _ in range(3)]
    with _Products(events):
        tensor.columns_backward([slope.flatten(0, 1) for slope in slopes], x, weights, tensor.Split(mesh.tp, sp))
    return events
