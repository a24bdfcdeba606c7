"""Resume: the run itself, to the bit, wherever it was cut; the same state and samples under any layout; killed in any phase of a save."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm import faults
from dist_llm.config.layout import Layout, parse_layout, resolve, world_of
from dist_llm.config.load import config_tree, load_config
from dist_llm.config.schema import Config, changed
from dist_llm.data.batches import training_batches
from dist_llm.data.prepare import prepare
from dist_llm.errors import PeerError
from dist_llm.train import run
from dist_llm.train.checkpoint import KINDS
from dist_llm.train.folder import Checkpoint, open_checkpoint, step_folders
from dist_llm.train.setup import choose_dtype, make_engine, make_mesh
from dist_llm.train.trainer import Trainer
from tests.commands import Commands
from tests.ranks import Ranks
from tests.small_checkpoints import reseal

STEPS, CUTS = 6, (2, 4)
LAYOUTS = ("dp=1", "dp=2,zero=0", "dp=2,zero=1", "dp=2,zero=3", "tp=2", "pp=2", "dp=1,tp=2,pp=2", "dp=2,tp=2,zero=2")


def concrete(text: str) -> Layout:
    wanted = parse_layout(text)
    return resolve(wanted, world_of(wanted))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """configs/tiny.yaml in float32 as people train, with its data built."""
    home = tmp_path_factory.mktemp("tiny")
    overrides = [f"data.dir={home}", "runtime.dtype=float32", f"schedule.steps={STEPS}", "save.every=2", "save.keep=0", "model.dropout=0.1"]
    config = load_config("configs/tiny.yaml", [*overrides, "data.max_tokens=20_000", "data.validation=0", "batch.micro=4"]).config
    prepare(config.data, seed=config.runtime.seed)
    return config


def one_rank(rank: int, world: int, say: Callable, fault: str | None, *arguments: Any) -> dict[str, Any]:
    """A rank of a run, with a fault armed."""
    faults.arm(fault)
    return run.train_rank(rank, world, say, *arguments)


def train(
    ranks: Ranks, config: Config, layout: str, folder: Path, *, resume: str | None = None, fault: str | None = None
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    shape, paths = concrete(layout), [str(path) for path in run.candidates(folder, resume)]
    return ranks.run(shape.world, "tests.test_resume:one_rank", fault, config_tree(config), asdict(shape), str(folder), paths)[0]


def losses(folder: Path) -> list[tuple[int, str, str]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss_hex"], float(line["grad_norm"]).hex()) for line in lines]


def digest(opened: Checkpoint) -> str:
    """One hash of everything in a checkpoint, however it is cut into files."""
    opened.verify()
    found = sha256()
    for kind in KINDS:
        for name in sorted(opened.shapes):
            found.update(f"{kind}/{name}".encode() + opened.parts.whole(name, kind).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def calm(tiny: Config, ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the run that nothing happens to, for a layout."""
    known: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in known:
            known[layout] = tmp_path_factory.mktemp("calm") / "run"
            train(ranks, tiny, layout, known[layout])
        return known[layout]

    return of


# --- the same layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_cut_at_either_place_is_the_run(layout: str, tiny: Config, ranks: Ranks, calm: Callable[[str], Path], tmp_path: Path) -> None:
    """Every loss and norm to the bit, and every weight and moment at the end; the run goes on from what was saved in the background."""
    whole = losses(calm(layout))
    assert [step for step, *_ in whole] == list(range(1, STEPS + 1))
    for cut in CUTS:
        folder = tmp_path / str(cut)
        train(ranks, tiny, layout, folder, resume=str(calm(layout) / f"checkpoints/step-{cut:08d}"))
        assert losses(folder) == whole[cut:], cut
        assert digest(open_checkpoint(folder)) == digest(open_checkpoint(calm(layout)))


# --- any other layout ----------------------------------------------------------------------------------------------------------

PAIRS = [  # (saved under, taken up under): worlds 1 to 4
    ("dp=2,zero=3", "tp=2"), ("tp=2", "pp=2"), ("pp=2", "dp=1"), ("dp=1", "dp=2,zero=1"), ("dp=2,zero=1", "tp=2,pp=2,sp=off"),
    ("tp=2,pp=2,sp=off", "dp=2,tp=2,zero=2"), ("dp=2,tp=2,zero=2", "dp=4,zero=3"), ("dp=4,zero=3", "tp=4"), ("tp=4", "dp=2,pp=2,zero=3"),
    ("dp=2,pp=2,zero=3", "dp=3,zero=3"), ("dp=3,zero=3", "dp=4,zero=3,shard=2"), ("dp=4,zero=3,shard=2", "dp=2,zero=2"),
    ("dp=2,zero=2", "dp=2,pp=2,zero=1,shard=1"),
]  # fmt: skip


def take_up(rank: int, world: int, say: Callable, config: dict, layout: dict, source: str, target: str) -> dict[str, Any]:
    """Takes up a checkpoint under a layout and saves it again; says what was read, and which samples come next."""
    from dist_llm.train.checkpoint import Saver

    settings, device = Config.model_validate(config), torch.device("cpu")
    mesh = make_mesh(settings, Layout(**layout), rank)
    prepared = prepare(settings.data, seed=settings.runtime.seed)
    engine = make_engine(settings, mesh, device=device, dtype=choose_dtype(settings.runtime, device))
    order = training_batches(prepared, settings.data, global_batch=settings.batch.global_, seed=settings.runtime.seed)
    trainer = Trainer(settings, mesh, engine, order)
    Path(target).mkdir(exist_ok=True)
    step = run.resume(trainer, prepared, [Path(source)], run=Path(target), tell=lambda message: None)
    with Saver(Path(target), engine, config=settings, prepared=prepared) as saver:
        saver.start(step)
    batches = order.micro_batches(step, dp_rank=mesh.at.dp, dp_size=mesh.layout.dp, micro=settings.batch.micro)
    pairs = [pair for batch in batches for pair in zip(batch.rows.tolist(), batch.tokens, strict=True)]
    samples = {str(row): sha256(tokens.numpy().tobytes()).hexdigest() for row, tokens in pairs}
    return {"step": step, "samples": samples}


def test_thirteen_pairs_of_layouts_have_the_same_state_and_samples(tiny: Config, ranks: Ranks, tmp_path: Path) -> None:
    wide = changed(tiny, {"batch.global": 12, "batch.micro": 1})
    prepare(wide.data, seed=wide.runtime.seed)
    train(ranks, changed(wide, {"schedule.steps": 2}), PAIRS[0][0], tmp_path / "0")
    expected, samples = digest(open_checkpoint(tmp_path / "0")), None
    for number, (saved, taken) in enumerate(PAIRS):
        shape, source = concrete(taken), tmp_path / f"{number}/checkpoints/step-00000002"
        assert open_checkpoint(source).manifest["layout"] == asdict(concrete(saved))
        words = (config_tree(wide), asdict(shape), str(source), str(tmp_path / str(number + 1)))
        told = ranks.run(shape.world, "tests.test_resume:take_up", *words)
        assert {rank["step"] for rank in told} == {2}
        assert digest(open_checkpoint(tmp_path / str(number + 1))) == expected, (saved, taken)
        mine: dict[str, str] = {}
        for rank in told:
            assert all(mine.setdefault(row, tokens) == tokens for row, tokens in rank["samples"].items())
        assert len(mine) == 12 and (samples is None or mine == samples), (saved, taken)
        samples = mine
    assert {concrete(layout).world for pair in PAIRS for layout in pair} == {1, 2, 3, 4}


# --- killed in a save ------------------------------------------------------------------------------------------------------------

SAVING = [point for point in faults.POINTS if point.startswith(("save.", "retain."))]
KILLS = [(point, True) for point in SAVING] + [("save.write", False), ("save.commit", False), ("retain.delete", False)]


LATER = {(point, False) for point in ("save.commit", "retain.delete")}
MARKED = [pytest.param(*kill, marks=pytest.mark.long) if kill in LATER else kill for kill in KILLS]


@pytest.mark.parametrize(("point", "background"), MARKED)
def test_killed_in_every_phase_of_a_save(
    point: str, background: bool, tiny: Config, ranks: Ranks, calm: Callable[[str], Path], tmp_path: Path
) -> None:
    """kill -9: what was committed before is the newest or newer, opens, and the run that goes on is the calm one."""
    number = KILLS.index((point, background))
    layout = ("dp=2,zero=1", "tp=2", "dp=1", "pp=2")[number % 4]
    config, folder = changed(tiny, {"save.async": background, "save.keep": 1}), tmp_path / "run"
    everywhere = point in ("save.copy", "save.write", "save.sync", "save.verify")
    victim = number % concrete(layout).world if everywhere else 0  # the rest is rank 0's work
    if point == "save.replace":  # there is something of that name already, which is no checkpoint
        train(ranks, changed(config, {"schedule.steps": 2}), layout, folder)
        (folder / "checkpoints/step-00000004").write_text("somebody's")
    with pytest.raises(PeerError, match="died") as caught:
        train(ranks, config, layout, folder, resume="auto" if step_folders(folder) else None, fault=f"{point}:{victim}:4")
    assert f"rank {victim}" in str(caught.value.where) and caught.value.found == "SIGKILL"
    there = open_checkpoint(folder)
    there.verify()
    assert there.step == (4 if point in ("save.rename", "retain.rename", "retain.delete") else 2), step_folders(folder)
    train(ranks, config, layout, folder, resume="auto")
    assert losses(folder) == losses(calm(layout))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"]


# --- through the command line ------------------------------------------------------------------------------------------------------


def test_what_a_user_sees(commands: Commands, tiny: Config, tmp_path: Path) -> None:
    """A rank killed in a save: exit 5. A damaged checkpoint: passed over, by name. Nothing sound: exit 4, nothing trained."""
    folder = tmp_path / "run"
    words = ["train", "configs/tiny.yaml", "--layout", "dp=2", "--run-dir", str(folder), "--save-every", "2", "runtime.device=cpu"]
    words += [f"data.dir={tiny.data.dir}", "data.max_tokens=20_000", "data.validation=0", "schedule.steps=6", "batch.micro=4"]
    killed = commands.run(*words, DIST_LLM_FAULT="save.sync:1:6")
    assert killed.returncode == 5 and "a rank died" in killed.stderr and "rank 1" in killed.stderr, killed.stderr
    newest, older = step_folders(folder)
    assert newest.name == "step-00000004"
    (newest / "rank-00000.json").write_text("{}")
    resumed = commands.run(*words, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert f"passed over: {newest}/rank-00000.json" in resumed.stdout and f"going on from step 2: {older}" in resumed.stdout
    assert "a later checkpoint was set aside" in resumed.stdout
    for path in step_folders(folder):
        (path / "COMMIT").write_text("0" * 64 + "\n")
    refused = commands.run(*words, "--resume", "auto")
    assert refused.returncode == 4 and refused.stderr.count("the manifest of the checkpoint is damaged") == 3, refused.stderr
    assert len(refused.stderr.strip().splitlines()) <= 12 and "Traceback" not in refused.stderr


def poisoned(step: Path) -> None:
    """Makes a number of a weight NaN, under true hashes."""
    content = bytearray((step / "rank-00000.safetensors").read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    at = start + next(about["data_offsets"][0] for name, about in header.items() if name.startswith("weight/"))
    content[at : at + 4] = struct.pack("<f", float("nan"))
    reseal(step, {"rank-00000.safetensors": bytes(content)})


def test_what_cannot_be_taken_up_is_told_of_and_kept(commands: Commands, tiny: Config, tmp_path: Path) -> None:
    """A folder without its COMMIT, one with a number that is not finite, settings of another run; nothing is deleted."""
    folder, steps = tmp_path / "run", {number: tmp_path / f"run/checkpoints/step-{number:08d}" for number in (2, 4, 6, 8, 10)}
    words = ["train", "configs/tiny.yaml", "--run-dir", str(folder), "--save-every", "2", "runtime.device=cpu", "save.keep=0"]
    words += [f"data.dir={tiny.data.dir}", "data.max_tokens=20_000", "data.validation=0", "runtime.dtype=float32", "save.async=false"]
    words += ["batch.micro=4"]

    def told(*more: str, code: int) -> str:
        result = commands.run(*words, *more)
        assert result.returncode == code and "Traceback" not in result.stderr, (result.stdout, result.stderr)
        return result.stdout if code == 0 else result.stderr

    told("--steps", "6", code=0)
    config, lines = (folder / "config.yaml").read_text(), (folder / "metrics.jsonl").read_text().splitlines()
    for change in ("model.rope_theta=500.0", "model.heads=2", "data.document_mask=true", "batch.global=16"):
        key = change.partition("=")[0]
        assert f"{key}: " in told("--resume", "auto", "--steps", "8", change, code=2), change
    assert (folder / "config.yaml").read_text() == config
    assert "nothing left to do: 6 steps" in told("--resume", "auto", "--steps", "4", code=0)

    (steps[6] / "COMMIT").unlink()
    verified = commands.run("verify", str(folder))
    assert verified.returncode == 4 and "COMMIT" in verified.stderr, verified.stderr
    assert "already holds a run" in told("--steps", "8", code=2)
    out = told("--resume", "auto", "--steps", "8", "model.dropout=0.1", code=0)
    assert f"passed over: {steps[6]}" in out and "going on from step 4" in out and "a later checkpoint was set aside" in out
    assert len([path for path in (folder / "checkpoints").iterdir() if "step-00000006" in path.name]) == 2
    assert (folder / "metrics.set-aside.jsonl").read_text().splitlines() == lines[4:]

    poisoned(steps[8])
    out = told("--resume", "auto", "--steps", "8", code=0)
    assert f"passed over: {steps[8]}: the checkpoint holds numbers that are not finite" in out and "going on from step 6" in out
    poisoned(steps[8])
    text = told("--resume", str(steps[8]), "--steps", "10", code=6)
    assert "last good" not in text and "no step was made" in text and "--resume CKPT" in text, text

    (steps[8] / "COMMIT").write_bytes(b"")
    text = told("--resume", str(steps[8]), "--steps", "10", code=4)
    assert f"where:    {steps[8]}/COMMIT" in text and text.splitlines()[-1].endswith("--steps 10 --resume auto"), text
    for step in steps.values():
        if step.exists():
            (step / "COMMIT").write_bytes(b"")
    text = told("--resume", "auto", "--steps", "10", code=4)
    assert "--resume auto" not in text and "--run-dir DIR" in text, text
