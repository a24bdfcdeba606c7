"""The proof pass of `compare`: the same few steps under every layout, every tensor compared with the reference.

The model itself is proved on short sequences; a model too large for that is replaced by a reduced twin of the same family
with the same axes and odd shapes. Each layout trains under the config's optimizer and under SGD with momentum, because
AdamW hides a gradient that is wrong by a constant factor. With `runtime.compile` the layouts are compiled and the reference is not.
A proof is float64, so `runtime.fp8` is off in it, and `runtime.cuda_graph` too: three steps are hardly more than its warming up.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, lcm
from pathlib import Path
from typing import Any

from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config, changed
from dist_llm.model.table import num_parameters
from dist_llm.ranks import run_ranks
from dist_llm.train.proof import GROUPS, TOLERANCE, Run, Verdict, judge, proof_rank, read_run

SEQUENCE = 48  # tokens of a proof sequence, about
LARGEST = 8_000_000  # parameters of a model that is proved itself
SGD = {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "clip": 1.0}


@dataclass(frozen=True)
class Subject:
    """What is proved: a config of its own, and how it relates to the user's."""

    config: Config
    model: str  # "the model itself" or the twin in words
    steps: int


def subject(config: Config, layouts: Sequence[Layout], *, steps: int) -> Subject:
    """The config of the proof: the model itself or its twin, on short sequences with as many micro-batches."""
    unit = lcm(*(layout.tp * layout.cp for layout in layouts))
    sequence = min(config.data.sequence, unit * ceil(SEQUENCE / unit))
    micro = min(2, config.batch.micro)
    small = {
        "data.sequence": sequence,
        "batch": {"global": config.batch.global_ // config.batch.micro * micro, "micro": micro},
        "schedule.steps": max(steps, 2),
        "schedule.warmup": 0,
        "data.reset_positions": True,
        "data.document_mask": True,
    }
    if num_parameters(config.model) <= LARGEST:
        return Subject(changed(config, small), "the model itself", steps)
    twin = _twin(config, layouts)
    words = f"twin: {twin['family']} with {twin['layers']} layers, dim {twin['dim']}, vocabulary {twin['vocab']}"
    return Subject(changed(config, {**small, "model": twin, "base": None}), words, steps)


def _twin(config: Config, layouts: Sequence[Layout]) -> dict[str, Any]:
    """A small model of the same kind: as many heads as the axes need, odd vocabulary and feed-forward."""
    model = config.model
    heads = lcm(*(layout.tp for layout in layouts), 2) * 2
    keys = max(1, heads * model.kv_heads // model.heads)
    layers = max(2, *(layout.stages for layout in layouts))
    shape = {"layers": layers, "heads": heads, "kv_heads": keys, "head_dim": 6, "dim": heads * 6, "ffn": heads * 13, "vocab": 293}
    return {**model.model_dump(), **shape, "preset": None, "max_positions": max(model.max_positions, SEQUENCE)}


class Prover:
    """Proves layouts against a reference; runs the reference once per dtype."""

    def __init__(self, subject: Subject, reference: Layout, *, backend: str, timeout_seconds: float, log_dir: Path) -> None:
        self.subject, self.reference = subject, reference
        self.options: dict[str, Any] = {"backend": backend, "timeout_seconds": timeout_seconds, "log_dir": log_dir}
        self.runs: dict[str, Run] = {}

    def run(self, layout: Layout, *, dtype: str, compiled: bool) -> Run:
        """Trains the subject under a layout and returns every tensor of every step."""
        shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
        folder = Path(tempfile.mkdtemp(prefix="dist-llm-proof-", dir=shared))
        runtime = {"runtime.compile": compiled, "runtime.fp8": "off", "runtime.cuda_graph": False}
        tree = changed(self.subject.config, runtime).model_dump(by_alias=True)
        job = {"config": tree, "steps": self.subject.steps, "dtype": dtype, "optimizers": [tree["optimizer"], SGD]}
        try:
            run_ranks(layout.world, proof_rank, job, asdict(layout), str(folder), **self.options)
            return read_run(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def reference_run(self, dtype: str) -> Run:
        """The reference's tensors."""
        if dtype not in self.runs:
            self.runs[dtype] = self.run(self.reference, dtype=dtype, compiled=False)
        return self.runs[dtype]

    def prove(self, layout: Layout) -> tuple[Verdict, dict[str, Any], list[float]]:
        """(verdict, the row's `proof`, losses of the config's optimizer)."""
        dtype, tolerance = "float64", dict.fromkeys(GROUPS, TOLERANCE)
        if layout.engine == "deepspeed":  # it keeps float32 masters: judged against the rounding of float32 itself
            dtype = "float32"
            distance = judge(self.reference_run("float64"), self.reference_run("float32"))
            tolerance = {group: 10 * getattr(distance, group) for group in GROUPS}
        reference, compiled = self.reference_run(dtype), self.subject.config.runtime.compile
        run = reference if layout == self.reference and not compiled else self.run(layout, dtype=dtype, compiled=compiled)
        verdict = judge(reference, run, tolerance=tolerance, layout=layout)
        about = {
            "model": self.subject.model,
            "dtype": dtype,
            "steps": self.subject.steps,
            "reference": str(self.reference),
            "tolerance": max(tolerance.values()),
            "tolerances": tolerance,
            "optimizers": [self.subject.config.optimizer.kind, "sgd"],
            "sequence": self.subject.config.data.sequence,
            "compile": compiled,
        }
        return verdict, about, run.record.losses[: self.subject.steps]
