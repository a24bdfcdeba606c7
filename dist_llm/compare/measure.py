"""The speed pass of `compare`: real data, the real model, the run's own dtype; time, memory, bytes and bubble of a layout.

Steps are timed first; live memory and spans are taken in steps of their own, because watching slows a step down.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dist_llm import comm
from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config
from dist_llm.data.batches import training_batches
from dist_llm.data.pairs import PairBatches
from dist_llm.data.prepare import prepare
from dist_llm.mesh import coordinate
from dist_llm.plan.predict import predicted, shape_of
from dist_llm.plan.traffic import Shape, sent_bytes
from dist_llm.schedule.actions import Kind, Span, parse
from dist_llm.schedule.simulate import simulate, summary
from dist_llm.train.memory import LiveMemory
from dist_llm.train.reference import samples_of, work_out
from dist_llm.train.setup import backend_name, choose_device, choose_dtype, make_engine, make_mesh, settle_rank
from dist_llm.train.trainer import Trainer

WARMUP = 1  # steps before the clock starts


def prepare_rank(rank: int, world: int, say: Callable, config: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Builds corpus, tokenizer and token shards, and looks at the devices: returns backend, device and dtype of the ranks.

    ranks: of the largest layout; refused where there are too few devices for them. In a process of its own: where ranks are
    forked there must be no threads, and no CUDA may have been touched.
    """
    settings = Config.model_validate(config)
    device = choose_device(settings.runtime, local_rank=ranks - 1)

    def progress(message: str, part: float) -> None:
        say({"message": message, "fraction": part})

    prepared = prepare(settings.data, seed=settings.runtime.seed, progress=progress)
    prepared.require_vocab(settings.model.vocab, given=settings.base is not None)
    training_batches(prepared, settings.data, global_batch=settings.batch.global_, seed=settings.runtime.seed)
    dtype = str(choose_dtype(settings.runtime, device)).removeprefix("torch.")
    found = {"fingerprint": prepared.fingerprint, "notes": list(prepared.notes)}
    return {**found, "backend": backend_name(settings.runtime), "device": device.type, "dtype": dtype}


def speed_rank(rank: int, world: int, say: Callable, config: dict[str, Any], layout: dict[str, Any], steps: int) -> dict[str, Any]:
    """One rank of the speed pass: trains steps under the clock and returns what it measured."""
    resident = _resident()
    settings, shape = Config.model_validate(config), Layout(**layout)
    settle_rank(settings.runtime)
    device = choose_device(settings.runtime, local_rank=rank)
    prepared = prepare(settings.data, seed=settings.runtime.seed)
    order = training_batches(prepared, settings.data, global_batch=settings.batch.global_, seed=settings.runtime.seed)
    mesh = make_mesh(settings, shape, rank)
    engine = make_engine(settings, mesh, device=device, dtype=choose_dtype(settings.runtime, device))
    trainer = Trainer(settings, mesh, engine, order)
    if isinstance(order, PairBatches):
        work_out(trainer, [(order, samples_of(order, WARMUP + steps + 2))])
    losses = [trainer.step(step).loss for step in range(WARMUP)]
    comm.ledger.take()
    comm.barrier(mesh.world)
    seconds, used = [], time.process_time()
    for step in range(WARMUP, WARMUP + steps):
        start = time.perf_counter()
        losses.append(trainer.step(step).loss)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    cpu = (time.process_time() - used) / steps
    sent = {axis: total / steps for axis, total in comm.ledger.take().items()}
    peak = _peak_memory(trainer, engine, WARMUP + steps, device)
    spans = _spans(trainer, engine, WARMUP + steps + 1) if mesh.at.dp == mesh.at.tp == 0 else trainer.step(WARMUP + steps + 1) and []
    return {
        "losses": losses,
        "step_seconds": statistics.median(seconds),
        "all_step_seconds": seconds,
        "cpu_seconds": cpu,
        "sent": sent,
        "peak_memory_bytes": peak,
        "peak_rss_bytes": _peak_resident() - resident,
        "spans": spans,
    }


def _peak_memory(trainer: Trainer, engine: Any, step: int, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        trainer.step(step)
        return torch.cuda.max_memory_allocated(device)
    with LiveMemory(engine) as live:
        trainer.step(step)
    return live.peak


def _spans(trainer: Trainer, engine: Any, step: int) -> list[list[Any]]:
    """[pipeline rank, action, start, end, bytes] of one step."""
    pipeline = getattr(engine, "pipeline", None)
    if pipeline is None:
        trainer.step(step)
        return []
    pipeline.recording = True
    trainer.step(step)
    pipeline.recording = False
    return [[span.rank, str(span.action), span.start, span.end, span.bytes] for span in pipeline.spans]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident() -> int:
    """Resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _peak_resident() -> int:
    """The most resident bytes this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def speed_row(config: Config, layout: Layout, ranks: list[dict[str, Any]], *, dtype: str, device: str) -> dict[str, Any]:
    """What the ranks measured and what was predicted, as keys of a row of comparison.json. dtype, device (cpu or cuda): of the ranks."""
    slowest = max(rank["step_seconds"] for rank in ranks)
    tokens = config.batch.global_ * config.data.sequence
    axes = sorted({axis for rank in ranks for axis in rank["sent"]})
    spans = _measured([rank["spans"] for rank in ranks])
    row = {
        "losses": ranks[0]["losses"],
        "step_seconds": slowest,
        "all_step_seconds": max(ranks, key=lambda rank: rank["step_seconds"])["all_step_seconds"],
        "cpu_seconds": [rank["cpu_seconds"] for rank in ranks],
        "tokens_per_second": tokens / slowest,
        "peak_memory_bytes": [rank["peak_memory_bytes"] for rank in ranks],
        "peak_rss_bytes": [rank["peak_rss_bytes"] for rank in ranks],
        "sent_bytes_per_step": {axis: max(rank["sent"].get(axis, 0) for rank in ranks) for axis in axes},
        "sent_bytes_by_rank": {axis: [rank["sent"].get(axis, 0) for rank in ranks] for axis in axes},
        "bubble_fraction": summary(spans, ranks=layout.pp).bubble_fraction if spans and layout.pp > 1 else 0.0,
    }
    if layout.engine != "native":
        row |= {"sent_bytes_per_step": {}, "sent_bytes_by_rank": {}}  # what other libraries send is not booked here
    else:
        shape = shape_of(config, layout, dtype=dtype, device=device)
        drawn = {"measured": [_shown(span) for span in spans], "simulated": _simulated(shape, spans)}
        row |= {"predicted": predicted(shape), "spans": drawn, "bytes_exact": _bytes_exact(shape, ranks)}
    return row


def _bytes_exact(shape: Shape, ranks: list[dict[str, Any]]) -> bool:
    """Whether every rank sent exactly what the closed form says, on every axis."""
    for rank, measured in enumerate(ranks):
        at = coordinate(rank, shape.layout)
        wanted = sent_bytes(shape, pp=at.pp, tp=at.tp)
        if any(abs(measured["sent"].get(axis, 0) - wanted.get(axis, 0)) > 0.5 for axis in {*measured["sent"], *wanted}):
            return False
    return True


def _measured(by_rank: list[list[list[Any]]]) -> list[Span]:
    """The ranks' spans on one clock that starts at zero."""
    rows = [row for rows in by_rank for row in rows]
    origin = min((row[2] for row in rows), default=0.0)
    return [Span(rank, parse(text), start - origin, end - origin, sent) for rank, text, start, end, sent in rows]


def _simulated(shape: Shape, spans: list[Span]) -> list[list[Any]]:
    """The schedule run against a clock with the stage costs that were measured."""
    if not spans:
        return []

    def cost(kind: Kind) -> list[float]:
        taken = [[s.end - s.start for s in spans if (s.action.kind, s.action.stage) == (kind, at)] for at in range(shape.layout.stages)]
        return [statistics.fmean(seconds) if seconds else 0.0 for seconds in taken]

    found = simulate(shape.lists(), forward=cost(Kind.F), backward=cost(Kind.B))
    return [_shown(span) for span in found.spans]


def _shown(span: Span) -> list[Any]:
    return [span.rank, str(span.action), span.start, span.end, span.bytes]
