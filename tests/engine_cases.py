"""Runs of the engine on ranks, and how the tests ask for them. Nothing at import may run a torch operator."""

from __future__ import annotations

import gc
import hashlib
import tempfile
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_llm import comm
from dist_llm.config.layout import Layout, parse_layout, resolve, world_of
from dist_llm.config.schema import Config
from dist_llm.engines import offload
from dist_llm.engines.native import NativeEngine
from dist_llm.engines.offload import Ferry, Lane
from dist_llm.engines.optim import Optimizer
from dist_llm.errors import NumericError
from dist_llm.model.init import initialise
from dist_llm.parallel.zero import FlatUnit
from dist_llm.train import trainer as trainer_module
from dist_llm.train.proof import MadeUp, Run, proof_rank, read_run
from dist_llm.train.setup import DTYPES, make_engine, make_mesh
from dist_llm.train.trainer import Trainer
from tests.ranks import Ranks

Say = Callable[..., None]
MODEL: dict[str, Any] = {"family": "llama", "layers": 4, "dim": 16, "heads": 4, "kv_heads": 2, "ffn": 24, "vocab": 31}


def config(
    *,
    micro: int = 1,
    batch: int = 4,
    sequence: int = 8,
    document_mask: bool = False,
    optimizer: dict[str, Any] | None = None,
    preference: dict[str, Any] | None = None,
    **model: Any,
) -> dict[str, Any]:
    """A small run as a dict: clipping, weight decay and accumulation are on."""
    masks = {"document_mask": document_mask} if preference is None else {}
    given = {
        "model": {**MODEL, **model},
        "data": {"source": "skills", "tokenizer": {"kind": "bpe", "vocab": 31}, "sequence": sequence, **masks},
        "preference": preference or {},
        "batch": {"global": batch, "micro": micro},
        "optimizer": {"lr": 1e-2, "clip": 0.5, "weight_decay": 0.1, **(optimizer or {})},
        "schedule": {"kind": "cosine", "warmup": 2, "steps": 6},
    }
    return Config.model_validate(given).model_dump(by_alias=True, mode="json")


def layout_of(text: str) -> Layout:
    """`dp=2,zero=1` as a concrete layout on its own product of ranks."""
    given = parse_layout(text)
    return resolve(given, world_of(given))


def prove(ranks: Ranks, given: dict[str, Any], text: str, *, dtype: str = "float64", steps: int = 3, work: str = "", **options: Any) -> Run:
    """A proof run of a layout: all losses, norms, gradients, weights and moments. work: another case with the same arguments."""
    layout = layout_of(text)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        job = {"config": given, "steps": steps, "dtype": dtype, **options}
        records = ranks.run(layout.world, work or "dist_llm.train.proof:proof_rank", job, vars(layout), folder)
        assert all(record["losses"] == records[0]["losses"] for record in records), "trap 3: all ranks log the same loss"
        assert all(record["norms"] == records[0]["norms"] for record in records)
        return read_run(Path(folder))


def different(a: Run, b: Run) -> list[str]:
    """Everything in which two runs differ by a bit."""
    found = [f"loss {step}" for step, (x, y) in enumerate(zip(a.record.losses, b.record.losses, strict=True)) if x.hex() != y.hex()]
    found += [f"norm {step}" for step, (x, y) in enumerate(zip(a.record.norms, b.record.norms, strict=True)) if x.hex() != y.hex()]
    assert a.tensors.keys() == b.tensors.keys()
    return found + [str(where) for where in a.tensors if a.tensors[where].tobytes() != b.tensors[where].tobytes()]


def build(given: dict[str, Any], layout: dict[str, Any], rank: int, dtype: str) -> tuple[Config, NativeEngine, Trainer]:
    """One rank's engine and trainer over made-up batches."""
    torch.set_num_threads(1)
    settings = Config.model_validate(given)
    mesh = make_mesh(settings, Layout(**layout), rank)
    engine = make_engine(settings, mesh, device=torch.device("cpu"), dtype=DTYPES[dtype])
    sizes, pairs = (settings.model.vocab, settings.data.sequence, settings.batch.global_), settings.preference.loss is not None
    order = MadeUp(*sizes, settings.runtime.seed, pairs=pairs)
    return settings, engine, Trainer(settings, mesh, engine, order)


def snapshot(engine: NativeEngine) -> list[torch.Tensor]:
    """Copies of this rank's weights (stage 3: of its shard) and optimizer state, on the device or the host."""
    return [tensor.clone() for name in ("weights", "optimizer", "host") for tensor in engine.persistent()[name]]


def sent_in_a_step(rank: int, world: int, say: Say, given: dict[str, Any], layout: dict[str, Any], dtype: str) -> dict[str, float]:
    """Bytes that this rank sends in its second step, per axis."""
    _, _, trainer = build(given, layout, rank, dtype)
    trainer.step(0)
    comm.ledger.take()
    trainer.step(1)
    return comm.ledger.take()


# --- through host memory -----------------------------------------------------------------------------------------------


def staged_rank(rank: int, world: int, say: Say, job: dict[str, Any], layout: dict[str, Any], folder: str) -> dict[str, Any]:
    """A proof run in which every transfer goes through copies, as those of a device's memory do on gloo."""
    comm._through_host = lambda x, group: True  # type: ignore[assignment]
    return proof_rank(rank, world, say, job, layout, folder)


# --- memory ----------------------------------------------------------------------------------------------------------


def persistent_bytes(
    rank: int, world: int, say: Say, given: dict[str, Any], layouts: list[dict[str, Any]], dtype: str
) -> list[dict[str, int]]:
    """Under each layout what the engine says it keeps before the update; and the bytes of all tensors alive then and after it."""
    found = []
    gc.freeze()  # what was there before is not ours, and costs seconds to look through
    for layout in layouts:
        _, engine, trainer = build(given, layout, rank, dtype)
        taken = trainer.gradients(0)
        kept = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in engine.persistent().items()}
        kept["alive before"] = min(alive() for _ in range(4))  # a thread of the backend may hold a transfer's buffer a moment longer
        engine.step(taken.learning_rate)
        kept["alive after"] = min(alive() for _ in range(4))
        found.append(kept)
        del engine, trainer
    return found


def alive() -> int:
    """Bytes of all tensor storages in this process, each counted once; scalars left out."""
    time.sleep(0.002)
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.numel() > 1:
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def residency(rank: int, world: int, say: Say, given: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """Which units' whole weights are in memory: at building, around each unit of the walk, and after each phase of a step."""
    building: list[int] = []

    def initialised(flat: FlatUnit, *, seed: int, body: Callable = FlatUnit.initialise) -> None:
        building.append(sum(other.weights.untyped_storage().nbytes() for other in gc.get_objects() if type(other) is FlatUnit))
        body(flat, seed=seed)

    FlatUnit.initialise = initialised
    _, engine, trainer = build(given, layout, rank, "float32")
    seen: list[tuple[str, str, list[str]]] = []

    def here() -> list[str]:
        return [flat.plan.unit for flat in engine.flats if flat.weights.untyped_storage().nbytes()]

    def watch(stage_unit: Any) -> None:
        body = stage_unit.module.forward
        stage_unit.module.forward = lambda *args: (seen.append(("F", stage_unit.name, here())), body(*args))[1]
        for flat, use in stage_unit.flats:
            known = {"use": use, "body": flat.begin_backward}

            def begin(use: int, flat: FlatUnit = flat, known: dict[str, Any] = known) -> None:
                if use == known["use"]:
                    seen.append(("B", stage_unit.name, here()))
                known["body"](use)

            flat.begin_backward = begin

    for stage in engine.stages:
        for unit in stage.units:
            watch(unit)
    phases = {"built": here()}
    taken = trainer.gradients(0)
    phases["gradients"] = here()
    engine.step(taken.learning_rate)
    phases["step"] = here()
    whole = [flat.weights.numel() * flat.weights.element_size() for flat in engine.flats]
    return {"seen": seen, "phases": phases, "building": max(building), "largest two": sum(sorted(whole)[-2:]), "all": sum(whole)}


def alive_at_once(rank: int, world: int, say: Say, given: dict[str, Any], layout: dict[str, Any]) -> dict[str, int]:
    """The most document masks, and the most messages sent, that are in memory at any moment of a step."""
    _, engine, trainer = build(given, layout, rank, "float32")
    alive: dict[str, list[weakref.ref]] = {"masks": [], "messages": []}
    most = {"masks": 0, "messages": 0}

    def note(kind: str, tensor: torch.Tensor) -> None:
        alive[kind] = [*(known for known in alive[kind] if known() is not None), weakref.ref(tensor)]
        most[kind] = max(most[kind], len(alive[kind]))

    context, send = trainer_module.make_context, comm.start_send

    def made(*args: Any, **options: Any) -> Any:
        found = context(*args, **options)
        note("masks", found.mask)
        return found

    def sent(x: torch.Tensor, channel: Any) -> comm.Pending:
        note("messages", x)
        return send(x, channel)

    trainer_module.make_context, comm.start_send = made, sent
    trainer.step(0)
    return most


def low_precision_sums(rank: int, world: int, say: Say, given: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """trap 14: 300 micro-batches of gradient 1 in bfloat16 (which cannot count past 256), and the dtypes that are reduced."""
    _, engine, trainer = build(given, layout, rank, "bfloat16")
    reduced, start = set(), comm.start_reduce_scatter

    def recorded(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        reduced.add(str(x.dtype))
        return start(x, *args, **options)

    comm.start_reduce_scatter = recorded
    trainer.step(0)
    flat = engine.flats[-1]
    slot = flat.plan.slots[0]
    for turn in range(300):
        flat.begin_backward(0)
        flat.parameters[0][slot.name].grad = torch.ones(slot.shape, dtype=torch.bfloat16)
        flat.end_backward(0)
        if not flat.by_step or turn == 299:
            flat.start_reduce(0)
            flat.collect()
    gradient = flat.start_finish().finish()
    piece = next((piece for piece in flat.plan.pieces(flat.group.index) if piece.slot.name == slot.name), None)
    values = flat.own_run(gradient, piece).unique().tolist() if piece else []
    return {"reduced": sorted(reduced), "values": values, "dtype": str(gradient.dtype), "master": str(flat.master.dtype)}


def held(rank: int, world: int, say: Say, given: dict[str, Any], layout: dict[str, Any]) -> dict[str, list[str]]:
    """Fingerprints of what this rank holds of each unit after two steps: weights, optimizer state, and the last gradient."""
    _, engine, trainer = build(given, layout, rank, "float32")
    trainer.step(0)
    taken = trainer.gradients(1)
    found = {"gradient": [flat.gradient.clone() for flat in engine.flats]}
    engine.step(taken.learning_rate)
    found |= {name: engine.persistent()[name] for name in ("weights", "optimizer")}
    return {name: [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors] for name, tensors in found.items()}


# --- what a step does ------------------------------------------------------------------------------------------------


def initial_weights(rank: int, world: int, say: Say, given: dict[str, Any], layouts: list[dict[str, Any]], dtype: str) -> int:
    """trap 12: each rank's first weights are the slices of the global ones, to the bit. Returns the elements it answers for.

    Master weights are float32 beside bfloat16 ones and have lost nothing; the weights that compute are their rounding.
    """
    count = 0
    for layout in layouts:
        settings, engine, _ = build(given, layout, rank, dtype)
        for item in engine.state():
            if item.kind != "weight":
                continue
            row, box = item.piece.slot.row, item.piece.slot.box
            whole = torch.empty(row.numel, dtype=torch.float32)
            initialise(whole, row, tuple((0, extent) for extent in row.shape), seed=settings.runtime.seed)
            part = whole.view(row.shape)[tuple(slice(*side) for side in box)].flatten()[item.piece.start : item.piece.stop]
            assert torch.equal(item.values, part.to(item.values.dtype)), (layout, row.name)
            count += item.values.numel()
        for flat in getattr(engine, "flats", ()):
            assert torch.equal(flat.owned_weights, flat.master.to(DTYPES[dtype])), layout
    return count


def poisoned_step(
    rank: int, world: int, say: Say, given: dict[str, Any], layout: dict[str, Any], where: dict[str, Any], value: str
) -> dict[str, Any]:
    """trap 28: one rank's gradient of one parameter gets a NaN or Inf before it is reduced; what each rank does about it.

    where: {"name", "rank"}; "again": whenever it is computed, not once.
    """
    _, engine, trainer = build(given, layout, rank, "float32")
    trainer.step(0)
    before, count = snapshot(engine), float(engine.optimizer.count)
    hit = False

    def poison(flat: FlatUnit, use: int, body: Callable = FlatUnit.end_backward) -> None:
        nonlocal hit
        body(flat, use)
        for slot in flat.plan.slots:
            if slot.name == where["name"] and (where.get("again") or not hit):
                flat.whole[use][slot.offset + slot.numel - 1] = float(value)
                hit = True

    def poisoned_loss(*args: Any, body: Callable = engine.pipeline.run, **options: Any) -> torch.Tensor:
        nonlocal hit
        hit = True
        return body(*args, **options) + float(value)

    if rank == where["rank"] and where["name"] == "loss":
        engine.pipeline.run = poisoned_loss
    elif rank == where["rank"]:
        FlatUnit.end_backward = poison
    failure: dict[str, Any] = {}
    try:
        trainer.step(1)
    except NumericError as error:
        failure = error.as_dict()
    after = snapshot(engine)
    untouched = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {"failure": failure, "untouched": untouched, "hit": hit, "counted": float(engine.optimizer.count) - count}


def evaluated(rank: int, world: int, say: Say, given: dict[str, Any], layout: dict[str, Any], dtype: str) -> list[float]:
    """The summed loss of two global batches without training, then a step, then the same again, and the step's own loss sum."""
    settings, engine, trainer = build(given, layout, rank, dtype)
    size, micro = settings.batch.global_, settings.batch.micro

    def batches(step: int) -> list[Any]:
        return trainer.order.micro_batches(step, dp_rank=engine.mesh.at.dp, dp_size=engine.mesh.layout.dp, micro=micro)

    def losses() -> float:
        contexts = [trainer.context(batch, step=0, training=False) for step in (0, 1) for batch in batches(step)]
        return engine.evaluate(contexts)

    before = losses()
    assert size and losses() == before
    taken = trainer.step(0)
    return [before, losses(), taken.loss * taken.targets]


def padding_stays_zero(rank: int, world: int, say: Say, given: dict[str, Any], layouts: list[dict[str, Any]]) -> int:
    """trap 25: between the parameters the buffers hold zeros, in weights, gradients and moments, after steps too. Returns their number."""
    found = 0
    for layout in layouts:
        _, engine, trainer = build(given, layout, rank, "float32")
        trainer.step(0)
        taken = trainer.gradients(1)
        gradients = [flat.gradient.clone() for flat in engine.flats]
        engine.step(taken.learning_rate)
        for flat, gradient, moments in zip(engine.flats, gradients, engine.moments, strict=True):
            empty = torch.ones(flat.plan.padded, dtype=torch.bool)
            for slot in flat.plan.slots:
                empty[slot.offset : slot.offset + slot.numel] = False
            mine = empty[slice(*flat.owned)]
            for tensor in (gradient, flat.master, moments.first, moments.second):
                assert not tensor[mine].any(), (layout, flat.plan.unit)
            found += int(mine.sum())
    return found


# --- transfers as slow as they may be --------------------------------------------------------------------------------


def slowest_rank(rank: int, world: int, say: Say, job: dict[str, Any], layout: dict[str, Any], folder: str) -> dict[str, Any]:
    """trap 23: a proof run in which every collective reads its input as late, and clears its output as early, as it may.

    Nothing is sent before `finish`, so a buffer changed in flight sends the change; what is to be gathered is NaN until then.
    """

    def late(start: Callable) -> Callable:
        def begin(x: torch.Tensor, group: Any, **options: Any) -> comm.Pending:
            out = options.get("out")
            if group.size > 1 and start is gather and out is not None:
                parts = out.view(group.size, -1)
                for index in range(group.size):
                    if index != group.index:
                        parts[index].fill_(float("nan"))
            return comm.Pending(None, lambda: start(x, group, **options).finish())

        return begin

    gather = comm.start_all_gather
    comm.start_reduce_scatter, comm.start_all_reduce = late(comm.start_reduce_scatter), late(comm.start_all_reduce)
    comm.start_all_gather = late(gather)
    return proof_rank(rank, world, say, job, layout, folder)


def late_copies(rank: int, world: int, say: Say, job: dict[str, Any], layout: dict[str, Any], folder: str) -> dict[str, Any]:
    """trap 23: a proof run in which copies between device and host are made when somebody waits for them, and not before.

    What is to arrive is not a number until then. job["bug"]: one of the waits left out on purpose.
    """

    class LateLane(Lane):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.begun: list[tuple[torch.Tensor, torch.Tensor]] = []
            self.made = 0

        def start_copy(self, out: torch.Tensor, x: torch.Tensor) -> Callable[[], None]:
            out.fill_(float("nan"))
            self.begun.append((out, x))
            return partial(self.make, len(self.begun))

        def make(self, until: int) -> None:
            for out, x in self.begun[self.made : until]:  # the copies of a lane are made in order
                out.copy_(x)
            self.made = max(self.made, until)

        def lead(self) -> None:
            if job["bug"] != "weights are used before they are up":
                self.make(len(self.begun))

    class Hasty(list):
        """Waits that do not."""

        def __getitem__(self, at: Any) -> Callable[[], None]:
            return lambda: None

    def ferry(self: Ferry, *arguments: Any, body: Callable = Ferry.__init__) -> None:
        body(self, *arguments)
        if job["bug"] == "a buffer is taken before its weights are up":
            self.left = Hasty(self.left)
        if job["bug"] == "a gradient is used before it is down":
            begin = self.down.start_copy
            self.down.start_copy = lambda out, x: (begin(out, x), lambda: None)[1]

    offload.Lane, Ferry.__init__ = LateLane, ferry
    return proof_rank(rank, world, say, job, layout, folder)


def ferried(rank: int, world: int, say: Say, given: dict[str, Any]) -> list[tuple[str, int]]:
    """What an offloaded update does, in order: copies down and up begun, copies up waited for, updates; with the unit's number."""
    events: list[tuple[str, int]] = []

    class Noted(Lane):
        def start_copy(self, out: torch.Tensor, x: torch.Tensor) -> Callable[[], None]:
            at = sum(event[0] == names[self] for event in events)
            events.append((names[self], at))
            super().start_copy(out, x)
            return lambda: events.append(("went up", at)) if names[self] == "up" else None

    def updated(self: Any, *arguments: Any, body: Callable = Optimizer.update, **options: Any) -> None:
        unit = sum(event[0] == "up" for event in events)
        if ("update", unit) not in events:  # a unit has a segment with weight decay and one without
            events.append(("update", unit))
        body(self, *arguments, **options)

    offload.Lane, Optimizer.update = Noted, updated
    _, engine, trainer = build(given, vars(layout_of("dp=1,offload=optimizer")), rank, "float32")
    names = {engine.ferry.down: "down", engine.ferry.up: "up"}
    trainer.step(0)
    return events


# --- known bugs put in on purpose ------------------------------------------------------------------------------------


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute replaced for the length of a block."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, old)


def _mean_over_dp(body: Callable) -> Callable:
    def reduce(x: torch.Tensor, group: Any, **options: Any) -> Any:
        pending = body(x, group, **options)
        result = pending.result
        pending.result = lambda: result().div_(group.size)
        return pending

    return reduce


def _counted_on_every_rank(flat: FlatUnit) -> dict[str, torch.Tensor]:
    found: defaultdict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for piece in flat.plan.pieces(flat.group.index):
        found[piece.slot.row.half] += flat.own_run(flat.gradient, piece).double().square().sum()
    return found


def _own_part(flat: FlatUnit, shard: torch.Tensor) -> comm.Pending:
    return comm.Pending(None, lambda: shard.view(flat.replica.size, -1)[flat.replica.index])


def _without(flat: FlatUnit, name: str, body: Callable) -> Any:
    kept = getattr(flat, name)
    setattr(flat, name, None)
    out = body(flat)
    setattr(flat, name, kept)
    return out


def mutated_rank(rank: int, world: int, say: Say, job: dict[str, Any], layout: dict[str, Any], folder: str) -> dict[str, Any]:
    """A proof run with one known bug, `job["bug"]`, put in on purpose."""
    start_finish, start_reduce, initial = FlatUnit.start_finish, FlatUnit.start_reduce, FlatUnit.initialise
    bugs: dict[str, tuple[Any, str, Any]] = {
        "no partial sum over tp": (FlatUnit, "_sum_partial", lambda flat, buffer: None),
        "mean instead of sum over dp": (comm, "start_reduce_scatter", _mean_over_dp(comm.start_reduce_scatter)),
        "norm counted on every rank": (FlatUnit, "square_sums", _counted_on_every_rank),
        "replicas not summed": (FlatUnit, "_start_sum_of_replicas", _own_part),
        "tied gradients not exchanged": (FlatUnit, "start_finish", lambda flat: _without(flat, "tied", start_finish)),
        "one micro-batch lost": (FlatUnit, "start_reduce", lambda flat, use: (flat.whole[use].mul_(7 / 8), start_reduce(flat, use))[1]),
        "another seed on one rank": (FlatUnit, "initialise", lambda flat, *, seed: initial(flat, seed=seed + rank)),
        "decay on everything": (FlatUnit, "segments", lambda flat: iter([(slice(0, flat.owned[1] - flat.owned[0]), True)])),
        "a shard not published": (FlatUnit, "publish", lambda flat: None),
        "": (FlatUnit, "__doc__", None),
    }
    with replaced(*bugs[job["bug"]]):
        return proof_rank(rank, world, say, job, layout, folder)
