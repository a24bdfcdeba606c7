"""Proof that a layout trains as one process does: every tensor of every step, compared under global names.

A run of a few steps (unequal masks, accumulation, clipping, weight decay) leaves, per step, the loss, the gradient
norm, and every gradient, weight and optimizer moment; two such runs are compared tensor by tensor. `compare` and
the tests use the same functions. In nearly all published parallelism bugs the loss looked fine.

difference of a tensor = max|a - b| / max(max|reference|, 1e-3 x the largest |reference| of that kind of tensor)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file

from dist_llm import comm
from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config, changed
from dist_llm.data.batches import IGNORED, MicroBatch
from dist_llm.mesh import Mesh
from dist_llm.random import bits, key_of, uniform
from dist_llm.train.setup import DTYPES, choose_device, make_engine, make_mesh, settle_rank
from dist_llm.train.trainer import Trainer

TOLERANCE = 1e-10  # float64
FLOOR = 1e-3  # of the largest reference value of a kind: below it a tensor counts as zero (a key bias has no gradient)
WHOLE = 3  # steps of a run whose tensors are all kept, and those of its last step: each is the whole model several times
GROUPS = ("loss", "norm", "gradient", "parameter", "moment")
KINDS = {"gradient": "gradient", "weight": "parameter", "first_moment": "moment", "second_moment": "moment"}


@dataclass(frozen=True)
class MadeUp:
    """Batches of addressed random tokens with very unequal masks: row r of the global batch keeps 5 to 100 % of its labels.

    vocab: tokens that can occur, fewer than the model's where its vocabulary is padded. weighted: the labels count unequally, as in
    conversations. pairs: a row holds one or two pairs, of sides of unequal length.
    """

    vocab: int
    sequence: int
    global_batch: int
    seed: int
    weighted: bool = False
    pairs: bool = False

    def micro_batches(self, step: int, *, dp_rank: int, dp_size: int, micro: int) -> list[MicroBatch]:
        """As `Batches.micro_batches`."""
        size = self.global_batch // dp_size
        rows = torch.arange(dp_rank * size, (dp_rank + 1) * size)
        place = rows[:, None] * (self.sequence + 1) + torch.arange(self.sequence + 1)  # (rows, S + 1)
        text = bits(place, key_of(self.seed, "proof tokens", step=step)).remainder(self.vocab)
        keep = (
            uniform(place[:, 1:], key_of(self.seed, "proof masks", step=step))
            < 0.05 + 0.95 * uniform(rows, key_of(self.seed, "rows"))[:, None]
        )
        labels = text[:, 1:].where(keep, IGNORED)
        ends = text[:, :-1] == 0
        documents = ends.cumsum(1) - ends.long()
        line = torch.arange(self.sequence).expand_as(labels)
        starts = torch.where(ends, line + 1, 0).roll(1, 1)
        starts[:, 0] = 0
        positions = line - starts.cummax(1).values
        parts: dict[str, torch.Tensor] = {"tokens": text[:, :-1], "labels": labels, "positions": positions, "documents": documents}
        parts["rows"] = rows
        if self.pairs:
            parts |= self._paired(text, keep, rows, step)
        if self.weighted:
            counts = 2.0 * uniform(place[:, 1:], key_of(self.seed, "proof weights", step=step)).double()
            parts["weights"] = counts * (parts["labels"] != IGNORED)
        found = []
        for at in range(0, size, micro):
            batch = MicroBatch(**{name: part[at : at + micro].contiguous() for name, part in parts.items()})
            found.append(replace(batch, reference=self._reference(batch, step)) if batch.pairs is not None else batch)
        return found

    def _paired(self, text: torch.Tensor, keep: torch.Tensor, rows: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
        """Labels, positions and documents of rows cut into sides, and how many pairs each row holds; its end is padding."""
        pairs = 1 + bits(rows, key_of(self.seed, "proof pairs", step=step)).remainder(2)  # (rows,)
        line = torch.arange(self.sequence).expand(len(rows), -1)
        number = torch.arange(4)
        parts = 1.0 + uniform(4 * rows[:, None] + number, key_of(self.seed, "proof sides", step=step)).double()  # (rows, 4)
        parts = parts.where(number < 2 * pairs[:, None], 0.0).cumsum(1) / parts.where(number < 2 * pairs[:, None], 0.0).sum(1, keepdim=True)
        ends = (parts * (self.sequence - 3)).long()  # where each side stops
        documents = (line[..., None] >= ends[:, None, :]).sum(-1).minimum(2 * pairs[:, None])
        starts = torch.cat([torch.zeros_like(ends[:, :1]), ends], 1).gather(1, documents)
        positions = line - starts
        labels = text[:, 1:].where((keep | (positions == 0)) & (documents < 2 * pairs[:, None]), IGNORED)  # each side has one at least
        return {"labels": labels, "positions": positions, "documents": documents, "pairs": pairs}

    def _reference(self, batch: MicroBatch, step: int) -> torch.Tensor:
        """Made-up log probabilities of the sides, about as large as those of untrained weights."""
        assert batch.pairs is not None
        pairs = torch.cat([4 * row + torch.arange(2 * int(count)) for row, count in zip(batch.rows, batch.pairs, strict=True)])
        nats = 0.5 + uniform(pairs, key_of(self.seed, "proof reference", step=step)).double()
        return -torch.log(torch.tensor(self.vocab)).double() * (nats * self.sequence / 4).view(-1, 2)

    def targets(self, step: int) -> int:
        """As `Batches.targets`."""
        (whole,) = self.micro_batches(step, dp_rank=0, dp_size=1, micro=self.global_batch)
        return whole.targets

    def weight(self, step: int) -> float:
        """As `Batches.weight`."""
        (whole,) = self.micro_batches(step, dp_rank=0, dp_size=1, micro=self.global_batch)
        return whole.weight


@dataclass(frozen=True)
class Record:
    """The numbers of one proof run: per step the loss, the gradient norm and what this rank sent."""

    losses: list[float]
    norms: list[float]
    sent: list[dict[str, float]] = field(default_factory=list)


def proof_rank(rank: int, world: int, say: Callable, job: dict[str, Any], layout: dict[str, Any], folder: str) -> dict[str, Any]:
    """One rank of a proof run: trains `job["steps"]` steps and leaves its part of every tensor in `folder`.

    job: {"config", "steps", "dtype"} and perhaps "optimizers", optimizer sections that each get a run of their own from the
    initial weights (default: the config's own); their steps are counted on. Of a long run the tensors of the first steps and
    of the last one are left. Returns a Record as a dict.
    """
    settings, shape = Config.model_validate(job["config"]), Layout(**layout)
    settle_rank(settings.runtime)
    device = choose_device(settings.runtime, local_rank=rank)
    mesh = make_mesh(settings, shape, rank)
    kept = _Kept(record=Record([], []))
    for at, optimizer in enumerate(job.get("optimizers") or [None]):
        config = changed(settings, {"optimizer": optimizer}) if optimizer else settings
        _train(config, mesh, device, DTYPES[job["dtype"]], job["steps"], kept, first=at * job["steps"])
    save_file(kept.tensors, Path(folder) / f"rank-{rank}.safetensors")
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps({"record": asdict(kept.record), "boxes": kept.boxes}))
    return asdict(kept.record)


@dataclass
class _Kept:
    """What a rank leaves behind."""

    record: Record
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    boxes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def take(self, engine: Any, step: int, kinds: set[str]) -> None:
        """Copies the runs of these kinds that the rank answers for."""
        for item in engine.state():
            if item.kind in kinds:
                key = f"{step}/{item.kind}/{item.piece.slot.name}/{item.piece.start}"
                self.tensors[key] = item.values.detach().to("cpu", copy=True)
                self.boxes[key] = {"shape": item.piece.slot.row.shape, "box": item.piece.slot.box}


def _train(config: Config, mesh: Mesh, device: torch.device, dtype: torch.dtype, steps: int, kept: _Kept, *, first: int) -> None:
    """A run of `steps` steps from the initial weights; its tensors are kept from step number `first` on."""
    engine = make_engine(config, mesh, device=device, dtype=dtype)
    vocab = min(config.model.vocab, config.data.tokenizer.vocab or config.model.vocab)
    kinds = {"weighted": config.data.chat.format is not None, "pairs": config.preference.loss is not None}
    order = MadeUp(vocab, config.data.sequence, config.batch.global_, config.runtime.seed, **kinds)
    trainer = Trainer(config, mesh, engine, order)
    comm.ledger.take()
    for step in range(steps):
        taken, whole = trainer.gradients(step), step < WHOLE or step + 1 == steps
        kept.take(engine, first + step, {"gradient"} if whole else set())
        engine.step(taken.learning_rate)
        kept.take(engine, first + step, {"weight", "first_moment", "second_moment"} if whole else set())
        kept.record.losses.append(taken.loss)
        kept.record.norms.append(taken.norm)
        kept.record.sent.append(comm.ledger.take())


@dataclass
class Run:
    """A finished proof run: its record and all tensors by (step, kind, name), whole, with the rank of each piece."""

    record: Record
    tensors: dict[tuple[int, str, str], np.ndarray]
    ranks: dict[tuple[int, str, str], list[tuple[int, tuple]]]


def read_run(folder: Path) -> Run:
    """Puts the parts that the ranks left together under global names; each element must be there exactly once."""
    tensors: dict[tuple[int, str, str], np.ndarray] = {}
    ranks: dict[tuple[int, str, str], list[tuple[int, tuple]]] = {}
    seen: dict[tuple[int, str, str], int] = {}
    record = None
    for index in sorted(folder.glob("rank-*.json"), key=lambda path: int(path.stem[5:])):
        content, rank = json.loads(index.read_text()), int(index.stem[5:])
        record = record or Record(**content["record"])
        for key, values in load_file(index.with_suffix(".safetensors")).items():
            step, kind, name, start = key.split("/")
            where, about = (int(step), kind, name), content["boxes"][key]
            whole = tensors.setdefault(where, np.full(about["shape"], np.nan, values.dtype))
            _put(whole, about["box"], int(start), values)
            ranks.setdefault(where, []).append((rank, tuple(map(tuple, about["box"]))))
            seen[where] = seen.get(where, 0) + values.size
    assert record is not None, folder
    for where, tensor in tensors.items():
        assert seen[where] == tensor.size, f"{where}: {seen[where]} of {tensor.size} elements"
    return Run(record, tensors, ranks)


def _put(whole: np.ndarray, box: list[list[int]], start: int, values: np.ndarray) -> None:
    """Writes a flat run of a box into the whole tensor."""
    extents = [high - low for low, high in box]
    if prod(extents) == values.size:
        whole[tuple(slice(low, high) for low, high in box)] = values.reshape(extents)
        return
    places = np.unravel_index(np.arange(start, start + values.size), extents)
    whole[tuple(place + low for place, (low, _) in zip(places, box, strict=True))] = values


@dataclass(frozen=True)
class First:
    """The first tensor that differs, and what the numbers suggest. step: from 1, as metrics count."""

    kind: str
    name: str
    step: int
    rank: int | None
    difference: float
    hint: str


@dataclass(frozen=True)
class Verdict:
    """The largest differences of a run from the reference, by kind; `first` is None when all lie under the tolerance."""

    loss: float
    norm: float
    gradient: float
    parameter: float
    moment: float
    first: First | None

    @property
    def equal(self) -> bool:
        """Whether every number lay under the tolerance."""
        return self.first is None


def judge(reference: Run, run: Run, *, tolerance: float | dict[str, float] = TOLERANCE, layout: Layout | None = None) -> Verdict:
    """Compares a run with the reference, in the order in which training makes the numbers.

    tolerance: one for all, or one for each of loss, norm, gradient, parameter and moment.
    """
    allowed = tolerance if isinstance(tolerance, dict) else dict.fromkeys(GROUPS, tolerance)
    worst = dict.fromkeys(GROUPS, 0.0)
    first: First | None = None
    for kind, name, step, difference in _differences(reference, run):
        group = KINDS.get(kind, kind)
        worst[group] = max(worst[group], difference) if difference == difference else difference
        if first is None and not difference < allowed[group]:
            where = (step, kind, name)
            hint = likely_cause(kind, name, reference, run, step, layout)
            first = First(kind, name, step + 1, _worst_rank(reference, run, where), difference, hint)
    return Verdict(**worst, first=first)


def _differences(reference: Run, run: Run) -> Iterator[tuple[str, str, int, float]]:
    assert reference.tensors.keys() == run.tensors.keys(), reference.tensors.keys() ^ run.tensors.keys()
    for step, (ours, theirs) in enumerate(zip(reference.record.losses, run.record.losses, strict=True)):
        yield "loss", "loss", step, abs(ours - theirs) / abs(ours)
        for kind in KINDS:
            if kind == "weight":  # after the gradients, before what follows from them
                norm = reference.record.norms[step]
                yield "norm", "gradient norm", step, abs(norm - run.record.norms[step]) / norm
            names = [name for at, which, name in reference.tensors if (at, which) == (step, kind)]
            largest = max((float(np.abs(reference.tensors[step, kind, name]).max()) for name in names), default=0.0)
            for name in names:
                a, b = reference.tensors[step, kind, name], run.tensors[step, kind, name]
                scale = max(float(np.abs(a).max()), FLOOR * largest)
                yield kind, name, step, float(np.abs(a - b).max()) / scale if scale else float(np.abs(b).max())


def _worst_rank(reference: Run, run: Run, where: tuple[int, str, str]) -> int | None:
    """The rank that answers for the element that differs most."""
    if where not in run.tensors:
        return None
    gap = np.nan_to_num(np.abs(reference.tensors[where] - run.tensors[where]), nan=np.inf)
    place = np.unravel_index(int(gap.argmax()), gap.shape)
    holders = [rank for rank, box in run.ranks[where] if all(low <= at < high for at, (low, high) in zip(place, box, strict=True))]
    return holders[0] if holders else None


def likely_cause(kind: str, name: str, reference: Run, run: Run, step: int, layout: Layout | None) -> str:
    """What a difference of this shape usually comes from (docs/traps.md), in a few words."""
    if kind == "loss" and step:
        return "the weights that this step used: not shared after the update before, or stale (traps 23, 25)"
    if kind == "loss":
        return "initial weights, data order or the count of target tokens (traps 1, 3, 12)"
    gradients = [name for at, which, name in reference.tensors if (at, which) == (step, "gradient")]
    ratios = {n: _ratio(reference.tensors[step, "gradient", n], run.tensors[step, "gradient", n]) for n in gradients}
    values = [ratio for ratio in ratios.values() if ratio is not None]
    if ratios and len(values) == len(ratios) and max(values) - min(values) < 1e-6 and abs(values[0] - 1) > 1e-6:
        return f"all gradients are {values[0]:.4g} times the reference: scaled twice or not at all (traps 1, 2, 15)"
    if kind == "norm":
        return "the gradients agree with each other: parameters counted twice or not at all in the norm (traps 4, 5, 7)"
    if name == "embedding.weight" and layout is not None and layout.pp > 1:
        return "a weight tied over pipeline stages: both uses must be summed once (trap 13)"
    if "norm" in name and layout is not None and layout.tp > 1:
        return "norm weights see a slice of sequence or heads: sum over tp before the data-parallel reduce (traps 8, 9)"
    if (".k." in name or ".v." in name) and layout is not None and layout.tp > 1:
        return "key and value heads shared by several tp ranks: their gradient is partial (trap 9)"
    if name.endswith("bias"):
        return "a bias added on more than one rank (trap 10)"
    if kind in ("weight", "first_moment", "second_moment"):
        return "gradients agree, the update does not: clipping, weight decay groups or step count (traps 7, 25, 28)"
    return "only this parameter differs: its reduction or its shard boundaries (traps 22, 23, 25)"


def _ratio(a: np.ndarray, b: np.ndarray) -> float | None:
    """b / a where it is the same for all elements that matter, else None."""
    matter = np.abs(a) > 0.1 * np.abs(a).max()
    if not matter.any():
        return None
    quotients = b[matter] / a[matter]
    return float(np.median(quotients)) if np.ptp(quotients) < 1e-6 * max(1.0, abs(float(np.median(quotients)))) else None
