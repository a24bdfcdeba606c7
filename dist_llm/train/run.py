"""A training run from a config: its data, its ranks, and where it starts."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dist_llm import comm, flight, stop
from dist_llm.config.explain import long_sequences, new_rows
from dist_llm.config.layout import Layout
from dist_llm.config.load import config_tree
from dist_llm.config.schema import Config
from dist_llm.data.batches import training_batches, validation_batches
from dist_llm.data.packing import PackedBatches
from dist_llm.data.prepare import Prepared, prepare
from dist_llm.errors import NumericError, UsageError
from dist_llm.mesh import Group, whole_world
from dist_llm.model.table import table
from dist_llm.ranks import run_ranks
from dist_llm.train import checkpoint, reference
from dist_llm.train.base import Base, kept_of
from dist_llm.train.begin import begin
from dist_llm.train.durable import Disk
from dist_llm.train.fit import fit
from dist_llm.train.folder import Checkpoint, newest, set_aside, settle, step_folders
from dist_llm.train.nonfinite import bad_state
from dist_llm.train.preflight import require_space
from dist_llm.train.setup import backend_name, choose_device, choose_dtype, make_engine, make_mesh, refuse_fp8, refuse_graph, settle_rank
from dist_llm.train.storage import together, write_config
from dist_llm.train.trainer import Trainer

# What the order of samples and the meaning of the state depend on: a resumed run may not change it.
FIXED = (
    *("runtime.seed", "data.seed", "batch.global", "data.sequence", "data.packing", "data.chat", "data.document_mask"),
    *("data.reset_positions", "preference.loss", "optimizer.kind"),
)
# Nor its model, but for names, how it began, what is drawn in training, and what the shapes of its tensors tell anyway.
FREE = {"family", "preset", "init_std", "residual_scale", "dropout", "neftune", "max_positions", "adapter.name", "adapter.dropout"}

Tell = Callable[[dict[str, Any]], None]


def candidates(run: Path, resume: str | None, *, go_on: str = "dist-llm train CONFIG --resume auto") -> list[Path]:
    """The checkpoints that a run in folder `run` may start from, best first; none for a new run.

    resume: `auto` (the folder's own, newest first), or a step or run folder. go_on: the command that goes on with the run that
    is there. Raises UsageError when a new run would mix with an old one, CheckpointError when a resume was asked for and there
    is nothing.
    """
    own = step_folders(run)
    if resume == "auto":
        return own or [newest(run)]
    given = [newest(Path(resume))] if resume is not None else []
    if own and not (given and given[0].resolve().parent == (run / "checkpoints").resolve()):
        found = f"{len(own)} checkpoints, the newest {own[0].name}" if len(own) > 1 else own[0].name
        what, expected = "the run folder already holds a run", "a folder without checkpoints (--run-dir DIR), or --resume auto to go on"
        raise UsageError(what, where=str(run), expected=expected, found=found, next=go_on)
    return given


def run_local(
    config: Config, layout: Layout, folder: Path, *, candidates: list[Path], tell: Tell, profile: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Prepares the data and trains on forked local ranks; returns what `fit` does on rank 0.

    tell: gets what `fit` tells, and before that {"progress": [message, fraction]}, {"note": ...}, {"data": ...}, {"stage": ...}.
    profile: the first and the last step to be profiled.
    Nothing but torch's import may have happened in this process: ranks are forked from it.
    """
    tree, logs = config_tree(config), folder / "logs"

    def hear(rank: int, message: dict[str, Any]) -> None:
        tell(message)

    begun = [str(path) for path in candidates]
    settings: dict[str, Any] = {"timeout_seconds": config.runtime.timeout_seconds, "log_dir": logs, "on_message": hear}
    (ready,) = run_ranks(1, prepare_rank, tree, layout.world, begun, **settings)
    tell({"data": ready})
    settings |= {"backend": ready["backend"], "note": lambda text: tell({"note": text}), "stoppable": True}
    return run_ranks(layout.world, train_rank, tree, asdict(layout), str(folder), begun, None, profile, **settings)[0]


def prepare_rank(rank: int, world: int, say: Tell, config: dict, ranks: int, candidates: list[str]) -> dict[str, Any]:
    """`prepare_here` in a process of its own, so that the parent stays fit to fork ranks."""
    flight.enter("data")
    return prepare_here(Config.model_validate(config), local_ranks=ranks, candidates=candidates, tell=say)


def prepare_here(config: Config, *, local_ranks: int, candidates: Sequence[str] = (), tell: Tell) -> dict[str, Any]:
    """Builds the data, or finds it again, and looks at the devices; refuses what cannot run. Returns what a user wants to know.

    local_ranks: at least so many ranks run on this machine. candidates: the checkpoints that the run may go on from.
    """
    device = choose_device(config.runtime, local_rank=local_ranks - 1)
    on_cuda = device.type == "cuda"
    refuse_fp8(config.runtime, device, choose_dtype(config.runtime, device))
    refuse_graph(config.runtime, device, world=local_ranks)
    if config.model.adapter.rank and config.base is None:
        advice = "base: a run folder of yours, or a Hugging Face folder"
        raise UsageError("an adapter has nothing to lie beside", where="model.adapter.rank", expected="a base", found="none", next=advice)
    prepared = prepare_data(config, kept=kept_of(map(Path, candidates)), tell=tell)
    return {
        "backend": backend_name(config.runtime),
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "dtype": str(choose_dtype(config.runtime, device)).removeprefix("torch."),
        "tokens": sum(len(store) for store in prepared.train),
        "held_out": sum(len(store) for store in prepared.validation),
        "vocab": prepared.tokenizer.vocab_size,
    }


def prepare_data(config: Config, *, kept: Checkpoint | None = None, tell: Tell) -> Prepared:
    """The data of a run, built or found again; raises DataError or UsageError where it cannot feed it."""
    prepared = prepare(config.data, seed=config.runtime.seed, progress=lambda message, fraction: tell({"progress": [message, fraction]}))
    prepared.require_vocab(config.model.vocab, given=config.base is not None)
    order = training_batches(prepared, config.data, global_batch=config.batch.global_, seed=config.runtime.seed)
    order.require_targets(config.schedule.steps)
    validation_batches(prepared, config.data, global_batch=config.batch.global_)
    for note in (*prepared.notes, *([order.sentence()] if isinstance(order, PackedBatches) else [])):
        tell({"note": note})
    steps, each = config.schedule.steps, order.epochs(config.schedule.steps)
    went = "epochs" if len(each) == 1 else "epochs of the sources"
    said = f"{steps} steps x {order.global_batch} sequences, of {order.num_samples:,} there are: {', '.join(f'{one:.3g}' for one in each)}"
    tell({"note": f"{said} {went}"})
    for note in long_sequences(config):
        tell({"note": note})
    if config.base is not None:
        base = Base(config.base, kept=kept)
        base.close()
        base.require_tokenizer(prepared.plain)
        for note in new_rows(config.model, prepared.added):
            tell({"note": note})
    return prepared


def train_rank(
    rank: int,
    world: int,
    say: Tell,
    config: dict,
    layout: dict,
    folder: str,
    candidates: list[str],
    local_rank: int | None = None,
    profile: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """One rank of a run: builds its part, takes up a checkpoint if there is one to, and trains. Rank 0 tells."""
    settings, shape = Config.model_validate(config), Layout(**layout)
    tell: Tell = say if rank == 0 else lambda message: None
    settle_rank(settings.runtime)
    device = choose_device(settings.runtime, local_rank=rank if local_rank is None else local_rank)
    prepared = prepare(settings.data, seed=settings.runtime.seed)
    base = Base(settings.base, kept=kept_of(map(Path, candidates))) if settings.base is not None else None
    prepared = base.beside(prepared) if base else prepared
    require_equal(whole_world(rank, world), device, config=config, layout=layout, data=prepared.fingerprint, base=prepared.base)
    mesh = make_mesh(settings, shape, rank)
    dtype = choose_dtype(settings.runtime, device)
    together(mesh, device, lambda: make_room(Path(folder), settings, dtype=dtype, world=world) if rank == 0 else None)
    tell({"stage": "building the model"})
    engine = make_engine(settings, mesh, device=device, dtype=dtype, base=False)
    order = training_batches(prepared, settings.data, global_batch=settings.batch.global_, seed=settings.runtime.seed)
    stop.listen()
    trainer = Trainer(settings, mesh, engine, order, stop_asked=stop.asked)
    start = 0
    lacking = settings.preference.loss is not None and not has_reference(trainer, prepared, Path(folder), resumed=bool(candidates))
    if base is not None and settings.model.adapter.rank:
        prepared = replace(prepared, base_weights=together(mesh, device, lambda: base.weights if rank == 0 else None)[0])
    if base is not None and (settings.model.adapter.rank or not candidates or lacking):
        start = begin(engine, base, tell=tell)
    if lacking:
        reference.work_out(trainer, reference.asked(settings, prepared), tell=tell)
        reference.keep(Path(folder), trainer, prepared)
    if candidates:
        start = resume(trainer, prepared, [Path(path) for path in candidates], run=Path(folder), tell=tell)
    if base is not None:
        base.close()
    together(mesh, device, lambda: write_config(Path(folder), settings) if rank == 0 else None)
    return fit(trainer, prepared, folder=Path(folder), start=start, tell=tell, profile=profile)


def has_reference(trainer: Trainer, prepared: Prepared, run: Path, *, resumed: bool) -> bool:
    """Whether what the run's pairs were worth at its beginning is known on every rank; every rank calls it."""
    config, engine = trainer.config, trainer.engine

    def look() -> bool:
        found = reference.find(run, config, prepared, dtype=None if resumed else engine.dtype)
        return found and reference.is_complete(reference.asked(config, prepared))

    return all(together(trainer.mesh, engine.device, look))


def make_room(run: Path, config: Config, *, dtype: torch.dtype, world: int) -> None:
    """Deletes what interrupted saves have left, and raises SpaceError where the checkpoints to come have no room."""
    settle(Disk(), run)
    require_space(run, config, dtype=str(dtype).removeprefix("torch."), world=world)


def resume(trainer: Trainer, prepared: Prepared, candidates: list[Path], *, run: Path, tell: Tell) -> int:
    """Takes weights, moments and the step from the first sound checkpoint, under any layout; returns the number of steps done.

    Every byte is compared with its hash by some rank before any weight changes. Raises CheckpointError, UsageError, or where no number
    can be trusted NumericError, on all ranks alike.
    """
    mesh, engine = trainer.mesh, trainer.engine
    if not hasattr(engine, "load_state"):
        name = f"engine={mesh.layout.engine}"
        raise UsageError("this engine cannot take up a checkpoint", where="layout.engine", expected="engine=native", found=name)
    while True:
        found, passed = checkpoint.load(candidates, engine, accept=lambda found: require_same_run(found, trainer.config, prepared))
        for line in passed:
            tell({"note": f"passed over: {line}"})
        bad = together(mesh, engine.device, lambda: bad_state(engine.state())[:3])
        names = {rank: names for rank, names in enumerate(bad) if names}
        if not names:
            break
        what, candidates = "the checkpoint holds numbers that are not finite", candidates[len(passed) + 1 :]
        rank, first = next(iter(names.items()))
        if not candidates:
            way = "another checkpoint: --resume CKPT, or a run from the beginning: --run-dir DIR without --resume"
            safe = "no step was made"
            raise NumericError(what, where=f"{found.path}, rank {rank}", expected="finite numbers", details=first, safe=safe, next=way)
        tell({"note": f"passed over: {found.path}: {what} (rank {rank}, {first[0]})"})
    (aside, *_) = together(mesh, engine.device, lambda: [str(p) for p in set_aside(Disk(), run, found.step)] if mesh.rank == 0 else [])
    for path in aside:
        tell({"note": f"a later checkpoint was set aside: {path}"})
    tell({"resumed": {"step": found.step, "path": str(found.path)}})
    return found.step


def require_same_run(found: Checkpoint, config: Config, prepared: Prepared) -> None:
    """Raises UsageError when the checkpoint is of another model, tokenizer, text or order of samples: each difference is listed."""
    before, differences = found.config, []
    if found.imported and config.preference.loss is not None:
        what, way = "imported weights have no reference beside them", "base: the folder; of an adapter merged first (dist-llm merge)"
        raise UsageError(what, where=str(found.path), expected="a preference that begins with its base", next=way)
    fixed = () if found.imported else FIXED  # before a first step nothing depends on them
    rows = {row.name: row.shape for row in table(config.model) if row.trained}
    if rows != found.shapes:
        differences.append(f"model: {_other_tensors(rows, found.shapes)}")
    old_model, new_model = (flat_tree(one.model.model_dump(mode="json")) for one in (before, config))
    for name in sorted(old_model.keys() - FREE):
        if old_model[name] != new_model[name]:
            differences.append(f"model.{name}: {old_model[name]} in the checkpoint, {new_model[name]} here")
    for key in fixed:
        section, name = key.split(".")
        old, new = (config_tree(one)[section][name] for one in (before, config))
        if old != new:
            differences.append(f"{key}: {old} in the checkpoint, {new} here")
    if prepared.tokenizer.hash != found.manifest["tokenizer"]:
        differences.append(f"tokenizer: {found.manifest['tokenizer'][:16]} in the checkpoint, {prepared.tokenizer.hash[:16]} here")
    if not found.imported and found.manifest.get("base") != prepared.base:
        old, new = (identity[:16] if identity else "initial weights" for identity in (found.manifest.get("base"), prepared.base))
        differences.append(f"base: the run began with {old}, {new} here")
    if not found.imported and prepared.fingerprint != found.manifest["data"]:
        differences.append(f"text: {found.manifest['data'][:16]} in the checkpoint, {prepared.fingerprint[:16]} here")
    if differences:
        again = "give the run's own config and data, or start another run with --run-dir"
        raise UsageError("the checkpoint is of another run", where=str(found.path), details=differences, next=again)


def _other_tensors(here: dict[str, tuple[int, ...]], there: dict[str, tuple[int, ...]]) -> str:
    """The first tensor in which a model and a checkpoint differ, and how many more there are."""
    name, *more = [name for name in dict.fromkeys((*here, *there)) if here.get(name) != there.get(name)]
    if name not in there:
        text = f"the checkpoint has no {name}, of shape {here[name]} here"
    elif name not in here:
        text = f"the checkpoint has {name}, which this model has not"
    else:
        text = f"{name} has shape {there[name]} in the checkpoint, {here[name]} here"
    return text + (f"; {len(more)} more tensor{'' if len(more) == 1 else 's'} differ{'s' if len(more) == 1 else ''}" if more else "")


def require_equal(world: Group, device: torch.device, *, config: dict, layout: dict, data: str, base: str | None = None) -> None:
    """Raises UsageError on all ranks when one of them has another config, layout, text, code, Python or torch: which, and both values."""
    settings = {**flat_tree(config), **{f"layout.{key}": value for key, value in layout.items()}}
    whole = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    mine = {"config": whole, "data": data[:16], "base": str(base)[:16], "code": code_hash()[:16]}
    mine |= {"torch": torch.__version__, "python": sys.version.split()[0]}
    facts = comm.gather_json(mine, world, device=device)
    if any(fact["config"] != whole for fact in facts):  # every rank sees it: which key is it
        facts = comm.gather_json(settings, world, device=device)
    for rank, other in enumerate(facts):
        for field, value in other.items():
            if value != facts[0].get(field):
                found = f"{value} on rank {rank}, {facts[0].get(field)} on rank 0"
                raise UsageError(f"the ranks differ in {field}", where=f"rank {rank}", expected="the same on all ranks", found=found)


def flat_tree(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flat_tree(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def code_hash() -> str:
    """The sha256 of this package's own source."""
    total, home = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(home.rglob("*.py")):
        total.update(f"{file.relative_to(home)}\n".encode() + file.read_bytes())
    return total.hexdigest()
