"""`dist-llm train CONFIG [a.b=v ...]`: train on local ranks, or as one of torchrun's."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm import faults
from dist_llm.cli.job import Run, complete, conclude, go_on, introduce, saved_steps, sound_steps, starting_point
from dist_llm.cli.loopback import stay_on_loopback
from dist_llm.cli.place import torchrun_place
from dist_llm.cli.torchrun import train_under_torchrun
from dist_llm.config.layout import world_of
from dist_llm.config.load import Loaded, load_config
from dist_llm.config.rules import check as check_rules
from dist_llm.errors import Failure, PeerError, UsageError, plain
from dist_llm.train.base import read_base
from dist_llm.train.console import Console


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
    max_bad_lines: Annotated[int | None, typer.Option("--max-bad-lines", min=0, help="data.max_bad_lines")] = None,
    max_restarts: Annotated[int, typer.Option("--max-restarts", min=0, help="Go on so often after a rank was lost.")] = 0,
    profile: Annotated[str | None, typer.Option("--profile", metavar="FIRST:LAST", help="Steps to trace, into the run's logs/.")] = None,
) -> None:
    """Train a model from a config, on local ranks (--nproc) or under torchrun.

    What is written: RUN/metrics.jsonl, checkpoints/, samples.jsonl, config.yaml, report.html and logs/.
    """
    short = {"layout": layout, "schedule.steps": steps, "save.every": save_every, "save.dir": run_dir, "runtime.dtype": dtype}
    short["data.max_bad_lines"] = max_bad_lines
    words = [*(overrides or []), *short_overrides(short, data)]

    def read(resume: str | None) -> Loaded:
        return load_config(config_path, words, base=partial(read_base, resume=resume))

    loaded = read(resume)
    place = torchrun_place()
    if place is not None:
        for flag, given in (("--nproc", nproc), ("--max-restarts", max_restarts)):
            if given:
                raise UsageError("torchrun has started the ranks", where=flag, next=f"leave {flag} out, or give it to torchrun")
    if place is None or not place.meeting.attempt:
        faults.arm(os.environ.get("DIST_LLM_FAULT"))  # tests alone set it
    world = place.world if place else nproc or world_of(loaded.config.layout)
    concrete = check_rules(loaded.config, world)
    window = None if profile is None else profile_window(profile, steps=loaded.config.schedule.steps)
    run = Run(loaded, concrete, Path(loaded.config.save.dir).expanduser(), resume, window, read)
    try:
        if place is None:
            _train_here(run, max_restarts)
        else:
            train_under_torchrun(run, place)
    except Failure as failure:
        raise complete(failure, run, sys.argv[1:]) from failure.__cause__


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


def _train_here(run: Run, restarts: int) -> None:
    """Starts local ranks, and shows what they do."""
    stay_on_loopback()
    with Console(steps=run.loaded.config.schedule.steps) as console:
        introduce(run, console)
        from dist_llm.train.run import candidates  # torch: seconds, after there is something to read
        from dist_llm.train.storage import RunFolder

        RunFolder(run.path)  # held until the process ends
        found = candidates(run.path, run.resume, go_on=go_on(sys.argv[1:]))
        conclude(run, _run_local(run, found, console, restarts), console)


def _run_local(run: Run, candidates: list[Path], console: Console, restarts: int) -> dict[str, Any]:
    """Trains; after a rank was lost goes on from the newest checkpoint, at most so often."""
    from dist_llm.train.run import run_local

    config = run.loaded.config
    begun = not candidates  # else the folder's newest may be of another beginning, until the one that was asked for is taken up

    def tell(message: dict[str, Any]) -> None:
        nonlocal begun
        begun = begun or "resumed" in message
        console.take(message)

    for attempt in range(1, restarts + 1):
        try:
            return run_local(config, run.layout, run.path, candidates=candidates, tell=tell, profile=run.profile)
        except PeerError as lost:
            faults.arm(None)
            own = sound_steps(run.path) if begun else []
            if own and config.base is not None:
                config = run.read("auto").config  # with the base gone, its tokenizer is in a checkpoint that may be gone by now
            candidates = saved_steps(run.path) if own else candidates  # damaged ones too: they are told of and set aside
            console.line(f"note: {plain(lost.what)} ({plain(lost.where)}): restart {attempt} of {restarts}, {starting_point(own)}")
    return run_local(config, run.layout, run.path, candidates=candidates, tell=tell, profile=run.profile)
