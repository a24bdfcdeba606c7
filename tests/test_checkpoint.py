"""Checkpoints: saved under one layout and loaded under another to the bit; nothing damaged is ever loaded; resumed runs go on alike."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_llm.config.layout import Layout, parse_layout, resolve, world_of
from dist_llm.config.load import config_tree, load_config
from dist_llm.config.schema import Config, ModelConfig, changed
from dist_llm.data.prepare import prepare
from dist_llm.engines.native import Item, Wanted
from dist_llm.errors import CheckpointError, SpaceError, UsageError
from dist_llm.model.table import table
from dist_llm.parallel.flat import pack
from dist_llm.train import run
from dist_llm.train.checkpoint import KINDS, Saver
from dist_llm.train.durable import Disk
from dist_llm.train.folder import Checkpoint, open_checkpoint, retain, step_folders, step_of
from dist_llm.train.parts import Parts, part_of, write_part
from dist_llm.train.setup import choose_dtype, make_engine, make_mesh
from dist_llm.train.trainer import Trainer
from tests.ranks import Ranks

STEPS = 6


def concrete(text: str) -> Layout:
    wanted = parse_layout(text)
    return resolve(wanted, world_of(wanted))


# --- the key space: any cut of a model's tensors, read under any other ---------------------------------------------------

MODELS = {
    "llama": {"family": "llama", "layers": 1, "dim": 24, "heads": 4, "kv_heads": 2, "head_dim": 6, "ffn": 37, "vocab": 61, "tied": True},
    "gpt2": {"family": "gpt2", "layers": 1, "dim": 16, "heads": 4, "vocab": 53, "max_positions": 9, "bias": True},
}
CUTS = [(1, False, 1), (1, False, 3), (2, True, 1), (2, False, 2), (4, True, 1), (4, True, 4)]  # tp, sp, shards


def numbered(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Every element of the model is another number."""
    tensors, at = {}, 0
    for row in table(model):
        tensors[row.name] = torch.arange(at, at + row.numel, dtype=torch.float64).view(row.shape)
        at += row.numel
    return tensors


def cut(model: ModelConfig, tp: int, sp: bool, shards: int) -> list[list]:
    """The pieces that each rank holds of each tensor, and whether it answers for them."""
    units = {row.unit: [other for other in table(model) if other.unit == row.unit] for row in table(model)}
    ranks = []
    for coordinate in range(tp):
        plans = [pack(rows, unit=unit, tp=tp, sp=sp, coordinate=coordinate, shards=shards) for unit, rows in units.items()]
        for shard in range(shards):
            pieces = [piece for plan in plans for piece in plan.pieces(shard)]
            ranks.append([(piece, piece.slot.sharding.owner(coordinate)) for piece in pieces])
    return ranks


@pytest.mark.parametrize("name", MODELS)
def test_any_cut_reads_any_other(name: str, tmp_path: Path) -> None:
    model = ModelConfig.model_validate(MODELS[name])
    whole, shapes = numbered(model), {row.name: row.shape for row in table(model)}

    def run_of(piece: Any) -> torch.Tensor:
        box = tuple(slice(low, high) for low, high in piece.slot.box)
        return whole[piece.slot.name][box].reshape(-1)[piece.start : piece.stop]

    for writers in CUTS:
        folder = tmp_path / str(writers)
        folder.mkdir()
        written = 0
        ranks = cut(model, *writers)
        for rank, pieces in enumerate(ranks):
            items = [Item("weight", piece, run_of(piece)) for piece, owner in pieces if owner]
            written += sum(item.values.numel() for item in items)
            write_part(Disk(), folder, rank, part_of(items))
        assert written == sum(tensor.numel() for tensor in whole.values()), "every element once"
        parts = Parts(folder, len(ranks), shapes)
        assert all(torch.equal(parts.whole(row), tensor) for row, tensor in whole.items())
        for readers in CUTS:
            for pieces in cut(model, *readers):
                for piece, _ in pieces:
                    found = parts.read("weight", piece.slot.name, piece.slot.box, piece.start, piece.stop)
                    assert torch.equal(found, run_of(piece)), (writers, readers, piece)
        lost = next(iter(whole))
        parts.runs["weight", lost].pop()
        with pytest.raises(CheckpointError, match="does not hold all of weight"):
            parts.whole(lost)


def test_a_reader_reads_what_it_needs(tmp_path: Path) -> None:
    """Cut alike, or over another number of shards: at most a tenth more bytes than the rank keeps, indices and heads among them."""
    model = ModelConfig(family="llama", layers=1, dim=512, heads=4, kv_heads=2, ffn=2048, vocab=8192, tied=False)  # type: ignore[call-arg]
    shapes = {row.name: row.shape for row in table(model)}
    for writers, readers in [((1, False, 3),) * 2, ((2, True, 2),) * 2, ((1, False, 1), (1, False, 3)), ((1, False, 4), (1, False, 2))]:
        folder = tmp_path / f"{writers}-{readers}"
        folder.mkdir()
        ranks = cut(model, *writers)
        for rank, pieces in enumerate(ranks):
            held = [piece for piece, owner in pieces if owner]
            write_part(Disk(), folder, rank, part_of(Item("weight", piece, torch.zeros(piece.stop - piece.start)) for piece in held))
        for pieces in cut(model, *readers):
            parts = Parts(folder, len(ranks), shapes)
            needed = sum(4 * (piece.stop - piece.start) for piece, _ in pieces)
            for piece, _ in pieces:
                parts.read("weight", piece.slot.name, piece.slot.box, piece.start, piece.stop)
            assert needed <= parts.bytes_read < 1.1 * needed, (writers, readers, parts.bytes_read / needed)


def test_an_engine_takes_what_it_said_it_wants(tiny: Config, ranks: Ranks) -> None:
    for layout in ("dp=2,zero=1", "dp=2,zero=3", "tp=2", "pp=2", "dp=2,engine=ddp", "dp=2,zero=3,engine=fsdp2"):
        shape = concrete(layout)
        told = ranks.run(shape.world, "tests.test_checkpoint:wants", config_tree(tiny), asdict(shape))
        assert min(told) > 10, layout


def wants(rank: int, world: int, say: Callable, config: dict, layout: dict) -> int:
    """How many runs an engine asks for: all of them, and no others, lie in those that it says it wants."""
    settings, device = Config.model_validate(config), torch.device("cpu")
    engine = make_engine(settings, make_mesh(settings, Layout(**layout), rank), device=device, dtype=torch.float64)
    wanted, asked = set(engine.wanted()), set[Wanted]()

    def read(*place: Any) -> torch.Tensor:
        asked.add(Wanted(*place))
        return torch.zeros(place[-1] - place[-2], dtype=torch.float64)

    engine.load_state(read, count=3)
    assert wanted == asked
    return len(asked)


# --- real runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """configs/tiny.yaml in float64, with its data built."""
    home = tmp_path_factory.mktemp("tiny")
    overrides = [
        f"data.dir={home}",
        "runtime.dtype=float64",
        f"schedule.steps={STEPS}",
        "save.every=3",
        "save.keep=0",
        "data.max_tokens=20_000",
        "batch.micro=2",
    ]
    config = load_config("configs/tiny.yaml", overrides).config
    prepare(config.data, seed=config.runtime.seed)
    return config


def train(ranks: Ranks, config: Config, layout: str, folder: Path, *, resume: str | None = None, **changes: Any) -> dict[str, Any]:
    """A run of `fit` on real ranks."""
    folder.mkdir(exist_ok=True)
    shape, wanted = concrete(layout), changed(config, {key.replace("__", "."): value for key, value in changes.items()})
    paths = [str(path) for path in run.candidates(folder, resume)]
    return ranks.run(shape.world, "dist_llm.train.run:train_rank", config_tree(wanted), asdict(shape), str(folder), paths)[0]


def resave(rank: int, world: int, say: Callable, config: dict, layout: dict, source: str, target: str) -> int:
    """Takes up a checkpoint under a layout and saves it again, without a step between."""
    settings = Config.model_validate(config)
    device = torch.device("cpu")
    mesh = make_mesh(settings, Layout(**layout), rank)
    prepared = prepare(settings.data, seed=settings.runtime.seed)
    trainer = Trainer(settings, mesh, make_engine(settings, mesh, device=device, dtype=choose_dtype(settings.runtime, device)), None)  # type: ignore[arg-type]
    step = run.resume(trainer, prepared, [Path(source)], run=Path(target), tell=lambda message: None)
    Path(target).mkdir(exist_ok=True)
    with Saver(Path(target), trainer.engine, config=settings, prepared=prepared) as saver:
        saver.start(step)
    return step


def state(opened: Checkpoint) -> dict[tuple[str, str], np.ndarray]:
    opened.verify()
    return {(kind, name): opened.parts.whole(name, kind).numpy() for kind in KINDS for name in opened.shapes}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(tiny: Config, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run under dp=2,zero=3 with checkpoints at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("first") / "run"
    train(ranks, tiny, "dp=2,zero=3", folder)
    return folder


def test_every_layout_takes_up_every_other_to_the_bit(tiny: Config, ranks: Ranks, first: Path, tmp_path: Path) -> None:
    before = state(open_checkpoint(first / "checkpoints/step-00000003"))
    assert all(np.isfinite(values).all() and values.any() for (kind, name), values in before.items())
    source = first / "checkpoints/step-00000003"
    chain = ["tp=2", "pp=2", "dp=1", "dp=2,zero=1", "dp=1,tp=2,pp=2,sp=off", "dp=2,tp=2,zero=2", "tp=4", "dp=2,pp=2,zero=3", "dp=2"]
    chain += ["dp=4,zero=3,shard=2", "dp=2,zero=2,offload=optimizer", "dp=2,pp=2,zero=1,shard=1"]
    for number, layout in enumerate(chain):
        shape, target = concrete(layout), tmp_path / str(number)
        assert (
            ranks.run(shape.world, "tests.test_checkpoint:resave", config_tree(tiny), asdict(shape), str(source), str(target))
            == [3] * shape.world
        )
        source = target / "checkpoints/step-00000003"
        opened = open_checkpoint(target)
        assert opened.step == 3 and opened.manifest["layout"]["tp"] == shape.tp
        after = state(opened)
        assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before), layout


def test_a_resumed_run_is_the_run(tiny: Config, ranks: Ranks, first: Path, tmp_path: Path) -> None:
    """Same layout: every loss to the bit, the same metrics file line by line. Another layout: 1e-10, the same samples."""
    folder = tmp_path / "again"
    shutil.copytree(first, folder)
    shutil.rmtree(folder / "checkpoints/step-00000006")
    train(ranks, tiny, "dp=2,zero=3", folder, resume="auto")
    exact = ("step", "loss_hex", "grad_norm", "learning_rate", "tokens", "target_tokens", "validation_loss", "validation_bits_per_byte")
    one, two = metrics(first), metrics(folder)
    assert [[line.get(key) for key in exact] for line in one] == [[line.get(key) for key in exact] for line in two]
    assert [line["step"] for line in two] == [1, 2, 3, 4, 5, 6]
    ends = [state(open_checkpoint(path / "checkpoints/step-00000006")) for path in (first, folder)]
    assert all(np.array_equal(ends[0][key], ends[1][key]) for key in ends[0])
    other = tmp_path / "other"
    train(ranks, tiny, "tp=2,pp=2", other, resume=str(first / "checkpoints/step-00000003"))
    three = metrics(other)
    assert [line["step"] for line in three] == [4, 5, 6]
    for a, b in zip(one[3:], three, strict=True):
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-10) and math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-10)
    assert math.isclose(one[-1]["validation_loss"], three[-1]["validation_loss"], rel_tol=1e-10)


def test_sgd_and_no_moment(tiny: Config, ranks: Ranks, tmp_path: Path) -> None:
    """An optimizer without moments leaves none behind, and a resumed run goes on alike."""
    plain = {"optimizer__kind": "sgd", "optimizer__momentum": 0.0}
    train(ranks, tiny, "tp=2", tmp_path / "a", **plain)
    opened = open_checkpoint(tmp_path / "a")
    assert {kind for kind, _ in opened.parts.runs} == {"weight"}
    train(ranks, tiny, "tp=2", tmp_path / "b", resume=str(tmp_path / "a/checkpoints/step-00000003"), **plain)
    assert [line["loss_hex"] for line in metrics(tmp_path / "a")[3:]] == [line["loss_hex"] for line in metrics(tmp_path / "b")]


# --- damage ----------------------------------------------------------------------------------------------------------------


def refusal(path: Path) -> CheckpointError:
    """The error of opening and verifying a checkpoint."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path).verify()
    assert caught.value.code == 4
    return caught.value


def test_every_damage_to_every_file_is_refused(first: Path, tmp_path: Path) -> None:
    source = first / "checkpoints/step-00000006"
    names = sorted(path.name for path in source.iterdir())
    assert len(names) == 8
    opened = open_checkpoint(source)
    for name in names:
        for kind in ("flip", "last", "zero", "cut", "append", "delete", "empty"):
            folder = tmp_path / f"{name}-{kind}"
            shutil.copytree(source, folder)
            file = folder / name
            content = bytearray(file.read_bytes())
            if kind == "flip":
                content[len(content) // 2] ^= 4
            elif kind == "last":
                content[-1] ^= 1
            elif kind == "zero":
                content[len(content) // 3] = 0
            elif kind == "cut":
                content.pop()
            elif kind == "append":
                content += b"\0"
            else:
                content.clear()
            if bytes(content) == file.read_bytes():
                continue
            file.write_bytes(content) if kind != "delete" else file.unlink()
            error = refusal(folder)
            if name not in ("COMMIT", "manifest.json"):
                assert error.where == str(file)
            if name in opened.files and kind == "flip":
                assert error.expected == f"xxh128 {opened.manifest['files'][name]['xxh128']}" and str(error.found).startswith("xxh128 ")
            shutil.rmtree(folder)


def test_parts_of_two_saves_do_not_mix(tiny: Config, ranks: Ranks, first: Path, tmp_path: Path) -> None:
    one, two = first / "checkpoints/step-00000003", first / "checkpoints/step-00000006"
    for name in ("rank-00001.safetensors", "manifest.json", "COMMIT"):
        folder = tmp_path / name
        shutil.copytree(two, folder)
        shutil.copy(one / name, folder / name)
        refusal(folder)
    folder = tmp_path / "swapped"
    shutil.copytree(two, folder)
    (folder / "rank-00000.safetensors").rename(folder / "spare")
    (folder / "rank-00001.safetensors").rename(folder / "rank-00000.safetensors")
    (folder / "spare").rename(folder / "rank-00001.safetensors")
    refusal(folder)


def rewrite(folder: Path, **changes: Any) -> None:
    """Another manifest with a true COMMIT."""
    import hashlib

    text = json.dumps({**json.loads((folder / "manifest.json").read_text()), **changes}).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMMIT").write_text(hashlib.sha256(text).hexdigest() + "\n")


def test_a_newer_format_and_a_lying_manifest(first: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"version": 4},
        {"version": None},
        {"files": {"../../evil.json": {"bytes": 1, "xxh128": "0"}}},
        {"files": None},
        {"step": -1},
        {"step": "3"},
        {"world": 1000},
        {"rows": [["embedding.weight", [1 << 20, 1 << 20]]]},
    ]
    for number, change in enumerate(changes):
        folder = tmp_path / str(number)
        shutil.copytree(first / "checkpoints/step-00000003", folder)
        rewrite(folder, **change)
        error = refusal(folder)
        if number == 0:
            assert "a newer format" in error.what and error.found == "version 4"


def test_resume_auto_takes_the_newest_sound_one(tiny: Config, ranks: Ranks, first: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(first, folder)
    damaged = folder / "checkpoints/step-00000006/rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as caught:  # asked for by name: refused
        train(ranks, tiny, "dp=1", tmp_path / "new", resume=str(damaged.parent))
    assert caught.value.code == 4 and caught.value.where == str(damaged)
    assert not (tmp_path / "new/metrics.jsonl").exists(), "nothing was trained"
    result = train(ranks, tiny, "tp=2", folder, resume="auto")
    assert result["checkpoint"] == str(folder / "checkpoints/step-00000006") and [line["step"] for line in metrics(folder)] == list(
        range(1, 7)
    )
    open_checkpoint(folder).verify()
    aside = [path.name for path in (folder / "checkpoints").iterdir() if path.name.endswith(".set-aside")]
    assert len(aside) == 1 and aside[0].startswith("step-00000006."), "the damaged one is kept, under another name"
    for path in step_folders(folder):
        (path / "rank-00000.json").write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        train(ranks, tiny, "dp=2", folder, resume="auto")
    assert len(caught.value.details) == 1 and "step-00000003" in caught.value.details[0], "all that were seen are named"


def test_where_a_run_may_start(first: Path, tmp_path: Path) -> None:
    newest, older = step_folders(first)
    assert run.candidates(first, "auto") == [newest, older] and run.candidates(first, str(older)) == [older]
    assert run.candidates(tmp_path, str(first)) == [newest] and run.candidates(tmp_path, None) == []
    for resume in (None, str(shutil.copytree(older, tmp_path / "step-00000003"))):
        with pytest.raises(UsageError, match="already holds a run") as caught:
            run.candidates(first, resume)
        assert "--resume auto" in str(caught.value.next)
    for folder, resume in ((tmp_path, "auto"), (tmp_path, str(tmp_path / "none")), (tmp_path / "none", "auto")):
        with pytest.raises(CheckpointError) as missing:
            run.candidates(folder, resume)
        assert missing.value.code == 4
    left = tmp_path / "run/checkpoints/step-00000009"
    left.mkdir(parents=True)
    assert run.candidates(tmp_path / "run", "auto") == [left], "one that lost its COMMIT is refused by name, not passed by"
    assert "not complete" in refusal(left).what
    with pytest.raises(UsageError, match="already holds a run"):
        run.candidates(tmp_path / "run", None)


def test_another_run_is_refused(tiny: Config, ranks: Ranks, first: Path, tmp_path: Path) -> None:
    """A changed model, seed, batch or text cannot go on from a checkpoint; every difference is told at once."""
    wanted = {"model__ffn": 96, "runtime__seed": 8, "batch__global": 16, "data__sequence": 32}
    with pytest.raises(UsageError, match="another run") as caught:
        train(ranks, tiny, "dp=1", tmp_path / "a", resume=str(first), **wanted)
    told = "\n".join(caught.value.details)
    for word in ("gate.weight", "runtime.seed: 7", "batch.global: 8", "data.sequence: 64", "text:"):
        assert word in told, told
    result = train(ranks, tiny, "dp=1", tmp_path / "b", resume=str(first), optimizer__lr=1e-4, schedule__steps=7, model__dropout=0.2)
    assert result["last"]["step"] == 7 and result["last"]["learning_rate"] == 1e-4


# --- saving ----------------------------------------------------------------------------------------------------------------


def limited(rank: int, world: int, say: Callable, config: dict, layout: dict, folder: str, source: str) -> str:
    """Tries to save where files may not grow past 20 kB, as on a full disk."""
    import resource

    settings = Config.model_validate(config)
    mesh = make_mesh(settings, Layout(**layout), rank)
    prepared = prepare(settings.data, seed=settings.runtime.seed)
    engine = make_engine(settings, mesh, device=torch.device("cpu"), dtype=torch.float64)
    if rank == world - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        with Saver(Path(folder), engine, config=changed(settings, {"save.keep": 1}), prepared=prepared) as saver:
            saver.start(9)
    except SpaceError as error:
        return f"{error.where} {error.found} {error.safe}"
    return "saved"


def test_a_full_disk_leaves_the_former_checkpoints(tiny: Config, ranks: Ranks, first: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(first, folder)
    for layout in ("dp=1", "dp=2,zero=1"):
        shape = concrete(layout)
        told = ranks.run(shape.world, "tests.test_checkpoint:limited", config_tree(tiny), asdict(shape), str(folder), "")
        assert len(set(told)) == 1 and "too large" in told[0], told
        assert f"rank-{shape.world - 1:05d}.safetensors" in told[0] and "untouched" in told[0], told
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    open_checkpoint(folder).verify()


def test_retention_and_what_a_killed_save_leaves(first: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(first, folder)
    home = folder / "checkpoints"
    newest = Path(shutil.copytree(home / "step-00000006", home / "step-00000012"))
    (home / ".step-00000015.0011.partial").mkdir()
    (home / "step-00000020").mkdir()  # without COMMIT: counts for nothing here, and is told of by who would take it
    retain(Disk(), folder, 0, verified=newest)
    assert [step_of(path) for path in step_folders(folder)] == [20, 12, 6, 3]
    retain(Disk(), folder, 2, verified=newest)
    assert sorted(path.name for path in home.iterdir()) == ["step-00000006", "step-00000012", "step-00000020"]
    retain(Disk(), folder, 5, verified=newest)
    assert len(step_folders(folder)) == 3
    retain(Disk(), folder, 1, verified=home / "step-00000006")  # not the newest, and the only one that is known to be sound
    retain(Disk(), folder, 1, verified=home / "step-00000020")  # none of them is
    assert len(step_folders(folder)) == 3


def test_there_is_no_pickle_and_no_path_of_this_machine(first: Path) -> None:
    folder = first / "checkpoints/step-00000003"
    for path in folder.iterdir():
        content = path.read_bytes()
        assert b"cpickle" not in content.lower() and b"__reduce__" not in content
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == 3 and manifest["step"] == 3 and len(manifest["save_id"]) == 16
    assert manifest["layout"]["zero"] == 3 and manifest["config"]["model"]["dim"] == 32 and len(manifest["files"]) == 6
