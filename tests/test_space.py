"""Room on the disk: asked for before the first step with the arithmetic; a disk that is full in a save costs that save alone."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm import flight
from dist_llm.config.load import config_tree, load_config
from dist_llm.config.schema import Config, ModelConfig, OptimizerConfig, changed
from dist_llm.data.prepare import prepare
from dist_llm.engines.native import Item
from dist_llm.errors import SpaceError
from dist_llm.train import preflight, run
from dist_llm.train.durable import Disk
from dist_llm.train.folder import open_checkpoint, step_folders
from dist_llm.train.parts import part_of, write_part
from dist_llm.train.preflight import checkpoint_bytes, copies_to_come, require_space
from tests.ranks import Ranks
from tests.test_checkpoint import CUTS, MODELS, concrete, cut

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    home = tmp_path_factory.mktemp("tiny")
    overrides = [f"data.dir={home}", "runtime.dtype=float32", "schedule.steps=6", "save.every=2", "save.keep=2", "data.validation=0"]
    config = load_config("configs/tiny.yaml", [*overrides, "data.max_tokens=20_000", "batch.micro=4"]).config
    prepare(config.data, seed=config.runtime.seed)
    return config


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kinds", [("weight", "first_moment", "second_moment"), ("weight",)])
def test_the_closed_form_is_what_is_written(name: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    """Tensors to the byte, and no more of the rest than allowed for, under any cut."""
    model = ModelConfig.model_validate(MODELS[name])
    optimizer = OptimizerConfig(kind="adamw" if len(kinds) == 3 else "sgd")
    for writers in CUTS:
        folder = tmp_path / str(writers)
        folder.mkdir()
        ranks, tensors = cut(model, *writers), 0
        for rank, pieces in enumerate(ranks):
            runs = [(piece, torch.zeros(piece.stop - piece.start)) for piece, owner in pieces if owner]
            part = part_of([Item(kind, piece, values) for kind in kinds for piece, values in runs])
            tensors += sum(tensor.nbytes for tensor in part.tensors)
            write_part(Disk(), folder, rank, part)
        expected, rest = checkpoint_bytes(model, optimizer, dtype="float32", world=len(ranks))
        written = sum(path.stat().st_size for path in folder.iterdir())
        assert tensors == expected and expected < written < expected + rest - (1 << 16)
        assert checkpoint_bytes(model, optimizer, dtype="float64", world=len(ranks))[0] == 2 * expected


@pytest.mark.parametrize(
    ("every", "steps", "keep", "held", "copies"),
    [
        (0, 100, 3, 0, 1),
        (10, 100, 3, 0, 4),
        (10, 20, 3, 0, 2),
        (10, 100, 3, 3, 1),
        (10, 100, 3, 1, 3),
        (10, 100, 0, 0, 10),
        (10, 100, 0, 4, 6),
    ],
)
def test_how_many_there_will_be_at_a_time(every: int, steps: int, keep: int, held: int, copies: int, tiny: Config) -> None:
    config = changed(tiny, {"save.every": every, "schedule.steps": steps, "save.keep": keep})
    assert copies_to_come(config, held=held) == copies


def test_a_disk_too_small_is_refused_with_the_arithmetic(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, rest = checkpoint_bytes(tiny.model, tiny.optimizer, dtype="float32", world=2)
    need = 3 * (tensors + rest)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(need, 1, need - 1))
    with pytest.raises(SpaceError, match="no room") as caught:
        require_space(tmp_path, tiny, dtype="float32", world=2)
    error = caught.value
    assert error.code == 7 and error.found == f"{need - 1:,} bytes free" and f"{need:,} bytes = 3 checkpoints" in str(error.expected)
    assert "x 12 bytes" in str(error.expected)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(need, 0, need))
    require_space(tmp_path, tiny, dtype="float32", world=2)
    for step in (2, 4):  # a damaged one takes no place of those to come: nothing deletes it
        (tmp_path / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    require_space(tmp_path, tiny, dtype="float32", world=2)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: Usage(need, 1, need - 1))
    with pytest.raises(SpaceError, match="no room"):
        require_space(tmp_path, tiny, dtype="float32", world=2)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SpaceError, match="cannot be written here"):
        require_space(tmp_path, tiny, dtype="float32", world=2)


def limited(rank: int, world: int, say: Callable, victim: int, most: int, *arguments: Any) -> dict[str, Any]:
    """A rank of a run; one of them cannot make files larger than `most` bytes, as on a full disk."""
    if rank == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return run.train_rank(rank, world, say, *arguments)


def start(ranks: Ranks, config: Config, layout: str, folder: Path, *, victim: int, most: int, resume: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    shape, paths = concrete(layout), [str(path) for path in run.candidates(folder, resume)]
    ranks.run(shape.world, "tests.test_space:limited", victim, most, config_tree(config), asdict(shape), str(folder), paths)


@pytest.mark.parametrize(("layout", "victim", "background"), [("dp=2,zero=1", 1, True), ("tp=2", 0, False), ("dp=1", 0, True)])
def test_a_save_that_fails_costs_that_save(layout: str, victim: int, background: bool, tiny: Config, ranks: Ranks, tmp_path: Path) -> None:
    """All ranks end with one message and exit 7, also where the save ran in the background; the former checkpoint is what is left."""
    config, folder = changed(tiny, {"save.async": background}), tmp_path / "run"
    start(ranks, changed(config, {"schedule.steps": 2}), layout, folder, victim=-1, most=0)
    with pytest.raises(SpaceError) as caught:
        start(ranks, config, layout, folder, victim=victim, most=50_000, resume="auto")
    error = caught.value
    assert error.code == 7 and f"rank-{victim:05d}.safetensors" in str(error.where) and "File too large" in str(error.found)
    assert error.safe == "the checkpoints before step 4 are untouched"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    open_checkpoint(folder).verify()
    start(ranks, config, layout, folder, victim=-1, most=0, resume="auto")
    assert [path.name for path in step_folders(folder)] == ["step-00000006", "step-00000004"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if not mount or not unmount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run([unmount, place], check=True)


def test_a_record_has_its_room_from_the_start(small_disk: Path) -> None:
    """A page of a record that finds no room later would kill its rank with SIGBUS, which no message explains."""
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free - 16_384))
    with pytest.raises(OSError, match="No space left"):
        flight.make_file(small_disk / "rank-0.flight")


def careless(rank: int, world: int, say: Callable, *arguments: Any) -> dict[str, Any]:
    """A rank of a run that did not look how much room there is."""
    run.make_room = lambda *_, **__: None  # type: ignore[assignment]
    return run.train_rank(rank, world, say, *arguments)


def test_a_disk_that_others_fill(tiny: Config, ranks: Ranks, small_disk: Path) -> None:
    """Refused before the first step where it is too small from the start; else the save that finds it full ends the run."""
    folder = small_disk / "run"
    with pytest.raises(SpaceError, match="no room"):
        start(ranks, tiny, "dp=2", folder, victim=-1, most=0)
    assert not (folder / "metrics.jsonl").exists()
    once = changed(tiny, {"save.keep": 1, "schedule.steps": 2})
    start(ranks, once, "dp=2", folder, victim=-1, most=0)
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    more = changed(once, {"schedule.steps": 4})
    with pytest.raises(SpaceError, match="no room"):
        start(ranks, more, "dp=2", folder, victim=-1, most=0, resume="auto")
    shape, paths = concrete("dp=2"), [str(path) for path in run.candidates(folder, "auto")]
    with pytest.raises(SpaceError, match="cannot be read or written") as caught:
        ranks.run(2, "tests.test_space:careless", config_tree(more), asdict(shape), str(folder), paths)
    assert "No space left" in str(caught.value.found) and "step-00000004" in str(caught.value.where)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    open_checkpoint(folder).verify()
