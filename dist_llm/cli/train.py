"""`dist-llm train CONFIG [a.b=v ...]`: train on local ranks, or as one of torchrun's."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm import faults
from dist_llm.config import explain
from dist_llm.config.layout import Layout, world_of
from dist_llm.config.load import Loaded, config_tree, load_config
from dist_llm.config.rules import check as check_rules
from dist_llm.errors import CheckpointError, DataError, Failure, NumericError, PeerError, SpaceError, UsageError, plain
from dist_llm.model.table import num_parameters
from dist_llm.train.console import Console

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def train(
    config_path: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=v]...", help="Values that replace those of the file.")] = None,
    nproc: Annotated[int | None, typer.Option("--nproc", min=1, help="Local ranks to start; else the layout's own number.")] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="dp=2,tp=2,pp=2,zero=1,schedule=1f1b ...")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="schedule.steps")] = None,
    save_every: Annotated[int | None, typer.Option("--save-every", min=0, help="save.every")] = None,
    run_dir: Annotated[str | None, typer.Option("--run-dir", help="save.dir: where everything of this run goes.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", metavar="auto|CKPT", help="Go on from a checkpoint of any layout.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float64, float32 or bfloat16")] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="PATH", help="data.source: text to train on.")] = None,
    profile: Annotated[str | None, typer.Option("--profile", metavar="FIRST:LAST", help="Steps to trace, into the run's logs/.")] = None,
) -> None:
    """Train a model from a config, on local ranks (--nproc) or under torchrun.

    What is written: RUN/metrics.jsonl, checkpoints/, samples.jsonl, config.yaml, report.html and logs/.
    """
    short = {"layout": layout, "schedule.steps": steps, "save.every": save_every, "save.dir": run_dir, "runtime.dtype": dtype}
    loaded = load_config(config_path, [*(overrides or []), *short_overrides(short, data)])
    faults.arm(os.environ.get("DIST_LLM_FAULT"))  # tests alone set it
    place = torchrun_place()
    if place is not None and nproc is not None:
        raise UsageError("torchrun has started the ranks", where="--nproc", next="leave --nproc out")
    world = place[1] if place else nproc or world_of(loaded.config.layout)
    concrete = check_rules(loaded.config, world)
    window = None if profile is None else profile_window(profile, steps=loaded.config.schedule.steps)
    if place is None:
        _train_here(loaded, concrete, resume, window)
    else:
        _train_under_torchrun(loaded, concrete, resume, window, rank=place[0], local_rank=place[2])


def short_overrides(values: dict[str, Any], data: str | None) -> list[str]:
    """Short flags as overrides `a.b=v`; they come after those on the command line, so they win."""
    given = {key: value for key, value in values.items() if value is not None}
    texts = [f"{key}={value if key == 'layout' else json.dumps(value)}" for key, value in given.items()]
    return texts if data is None else [*texts, f"data.source={json.dumps(data)}", "data.mix=null"]


def profile_window(text: str, *, steps: int) -> tuple[int, int]:
    """`10:13` as (10, 13), `10` as (10, 10): the first and the last step, as metrics.jsonl counts. Raises UsageError."""
    first, _, last = text.partition(":")
    numbers = [int(part) for part in (first, last or first) if part.isascii() and part.isdigit()]
    if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1] <= steps:
        expected = f"FIRST:LAST, two steps from 1 to {steps}"
        raise UsageError("no such steps to profile", where="--profile", expected=expected, found=text)
    return numbers[0], numbers[1]


def torchrun_place() -> tuple[int, int, int] | None:
    """(rank, world, local rank) as torchrun gives them, None when it did not start us."""
    if not all(name in os.environ for name in TORCHRUN):
        return None
    rank, world, local_rank = (int(os.environ[name]) for name in TORCHRUN)
    return rank, world, local_rank


def _train_here(loaded: Loaded, layout: Layout, resume: str | None, profile: tuple[int, int] | None) -> None:
    """Starts local ranks, and shows what they do."""
    with Console(steps=loaded.config.schedule.steps) as console:
        _introduce(loaded, layout, console)
        from dist_llm.train import run  # torch: seconds, after there is something to read
        from dist_llm.train.storage import RunFolder

        folder = RunFolder(Path(loaded.config.save.dir).expanduser())
        found: dict[str, Any] = {"candidates": run.candidates(folder.path, resume), "profile": profile}
        folder.write_config(loaded.config)
        result = run.run_local(loaded.config, layout, folder.path, **found, tell=console.take)
        _conclude(loaded, folder.path, result, console)


def _train_under_torchrun(
    loaded: Loaded, layout: Layout, resume: str | None, profile: tuple[int, int] | None, *, rank: int, local_rank: int
) -> None:
    """Joins torchrun's ranks as one of them; rank 0 shows what they do."""
    path = Path(loaded.config.save.dir).expanduser()
    try:
        with Console(steps=loaded.config.schedule.steps) as console:
            result = _join(loaded, layout, resume, profile, path, console, rank=rank, local_rank=local_rank)
            if rank == 0:
                _conclude(loaded, path, result, console)
    except Exception as error:
        from dist_llm.ranks import known_failure

        failure = error if isinstance(error, Failure) else known_failure(error)
        keep_traceback(error, path / "logs" / f"rank-{rank}.log")
        if failure is None:
            raise
        if not told_by(failure, rank=rank, local_rank=local_rank):
            raise typer.Exit(int(failure.code)) from None
        raise failure from None


def _join(
    loaded: Loaded,
    layout: Layout,
    resume: str | None,
    profile: tuple[int, int] | None,
    path: Path,
    console: Console,
    *,
    rank: int,
    local_rank: int,
) -> dict[str, Any]:
    config, tell = loaded.config, console.take if rank == 0 else lambda message: None
    if rank == 0:
        _introduce(loaded, layout, console)
    from dist_llm import mesh
    from dist_llm.train import run
    from dist_llm.train.storage import RunFolder

    folder = RunFolder(path) if rank == 0 else None
    candidates = run.candidates(path, resume)  # every rank finds the same
    if folder is not None:
        folder.write_config(config)
    ready = run.prepare_here(config, local_ranks=local_rank + 1, tell=tell)
    tell({"data": ready})
    mesh.connect(rank=rank, world=layout.world, backend=ready["backend"], timeout_seconds=config.runtime.timeout_seconds)
    places = [str(one) for one in candidates]
    result = run.train_rank(rank, layout.world, tell, config_tree(config), asdict(layout), str(path), places, local_rank, profile)
    mesh.disconnect()
    return result


def told_by(failure: Failure, *, rank: int, local_rank: int) -> bool:
    """Whether this one of torchrun's ranks shows the failure: what all ranks meet alike is told once."""
    if isinstance(failure, DataError):
        return local_rank == 0  # the text of a machine is the same for its ranks
    return rank == 0 or not isinstance(failure, (UsageError, CheckpointError, NumericError, SpaceError, PeerError))


def keep_traceback(error: BaseException, log: Path) -> None:
    """Appends a traceback to a log of the run, if it can be written."""
    with contextlib.suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write("".join(traceback.format_exception(error)))


def _introduce(loaded: Loaded, layout: Layout, console: Console) -> None:
    """What is about to run, in numbers."""
    console.line(explain.model_line(loaded.config, num_parameters(loaded.config.model)))
    for line in explain.equations(loaded.config, layout):
        console.line(line)
    console.line(f"layout {layout}; run folder {plain(loaded.config.save.dir)}")


def _conclude(loaded: Loaded, path: Path, result: dict[str, Any], console: Console) -> None:
    """Writes the page, and says where everything is and what to type next."""
    from dist_llm.report.page import write_run_page

    console.close()
    if not result["last"]:
        console.line(f"nothing left to do: {loaded.config.schedule.steps} steps were made before; --steps asks for more")
    write_run_page(path, path / "report.html")
    console.line(f"report      {plain(path / 'report.html')}")
    if result["checkpoint"]:
        console.line(f"checkpoint  {plain(result['checkpoint'])}")
    console.line(f"next        dist-llm sample {plain(path)} --prompt 'def '")
