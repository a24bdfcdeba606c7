"""A run from the command line's side: what it is told at the start and at the end, what of it is safe, and how to go on."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from dist_llm.cli.network import allow_hub
from dist_llm.cli.place import torchrun_place
from dist_llm.config import explain
from dist_llm.config.layout import Layout
from dist_llm.config.load import Loaded
from dist_llm.errors import MAX_COMMAND, CheckpointError, Code, Failure, plain
from dist_llm.model.table import num_parameters, num_trained
from dist_llm.report.units import show_bytes
from dist_llm.train.base import OTHER_BASE
from dist_llm.train.console import Console
from dist_llm.train.folder import ANOTHER, newest, open_checkpoint, step_folders, step_of


@dataclass(frozen=True)
class Run:
    """What is to be trained. profile: the first and the last step to trace. read: the config again, for a run that goes on."""

    loaded: Loaded
    layout: Layout
    path: Path
    resume: str | None
    profile: tuple[int, int] | None
    read: Callable[[str | None], Loaded]


def complete(failure: Failure, run: Run, words: list[str]) -> Failure:
    """The failure of a run that had begun, with all that can be said of it here. words: the command line's."""
    if failure.code == Code.MEMORY:
        _advise(failure, run)
    if failure.next == ANOTHER:
        failure.next = _another(run, words)
    return _with_last_good(failure, run.path, words)


def _with_last_good(failure: Failure, path: Path, words: list[str]) -> Failure:
    """The failure of a run that had begun, with what of it is safe and how to go on."""
    if failure.code not in (Code.PEER, Code.NUMERIC, Code.SPACE, Code.MEMORY) or failure.next is not None:
        return failure
    saved = sound_steps(path)
    if saved:
        good = f"last good: step {step_of(saved[0])}, verified ({saved[0]})"
        failure.safe = f"{failure.safe}; {good}" if failure.safe else good
    elif failure.safe is None:
        failure.safe = "nothing was saved yet"
    failure.next = go_on(words) if saved else "the same command again, once the cause is gone"
    return failure


def _another(run: Run, words: list[str]) -> str:
    """What to do where none of the checkpoints that were tried is sound, or the base is not."""
    if run.resume is None:
        return OTHER_BASE
    tried = saved_steps(run.path) if run.resume == "auto" else [newest(Path(str(run.resume)))]
    if any(step.resolve() not in [one.resolve() for one in tried] for step in sound_steps(run.path)):
        return go_on(words)
    return "a sound copy in its place, or a run from the beginning: --run-dir DIR without --resume"


def _opens(step: Path) -> bool:
    """Whether a step folder has a sound manifest and all of its files; their bytes were read back when it was saved."""
    try:
        open_checkpoint(step)
    except CheckpointError:
        return False
    return True


def _advise(failure: Failure, run: Run) -> None:
    """Adds to a want of memory what was predicted, and three changes that need less."""
    if run.layout.engine != "native":
        return
    import torch

    from dist_llm.plan.relief import peak, reliefs

    config = run.loaded.config
    device = "cuda" if config.runtime.device != "cpu" and torch.cuda.is_available() else "cpu"
    dtype = config.runtime.dtype if config.runtime.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    need = peak(config, run.layout, dtype=dtype, device=device)
    failure.expected = f"{show_bytes(need)} of tensors at the fullest rank's peak, as predicted"
    less = reliefs(config, run.layout, dtype=dtype, device=device)
    failure.details += [f"{one.words} needs {show_bytes(one.bytes)}" for one in less]


def saved_steps(path: Path) -> list[Path]:
    """The checkpoints of a run folder, damaged ones too, newest first; none where it cannot be read."""
    with contextlib.suppress(OSError):
        return step_folders(path)
    return []


def sound_steps(path: Path) -> list[Path]:
    """Those of them that can be opened."""
    return [found for found in saved_steps(path) if _opens(found)]


def go_on(words: list[str]) -> str:
    """The command that goes on with a run, from the words of this one."""
    kept = [word for at, word in enumerate(words) if word != "--resume" and words[at - 1 : at] != ["--resume"] and word[:9] != "--resume="]
    command = shlex.join(["dist-llm", *kept, "--resume", "auto"])
    return command if torchrun_place() is None else f"torchrun as before with {command}"


def starting_point(sound: list[Path]) -> str:
    """Where a restart begins. sound: the checkpoints that it can take up."""
    return f"from step {step_of(sound[0])}" if sound else "from where it began, nothing was saved yet"


def introduce(run: Run, console: Console) -> None:
    """What is about to run, in numbers."""
    config = run.loaded.config
    console.line(explain.model_line(config, num_parameters(config.model), num_trained(config.model)))
    for line in explain.equations(config, run.layout):
        console.line(line)
    console.line(f"layout {run.layout}; run folder {plain(config.save.dir)}")
    allow_hub(config.data, lambda text: console.line(plain(text)))


def conclude(run: Run, result: dict[str, Any], console: Console | None) -> None:
    """Writes the page, and says where everything is and what to type next; a run that was told to stop ends with 75."""
    if console is not None:
        from dist_llm.report.page import write_run_page

        console.close()
        if not result["last"]:
            console.line(f"nothing left to do: {result['start']} steps were made before; --steps asks for more")
        write_run_page(run.path, run.path / "report.html")
        console.line(f"report      {plain(run.path / 'report.html')}")
        if result["checkpoint"]:
            console.line(f"checkpoint  {plain(result['checkpoint'])}")
        if result["stopped"] is not None:
            console.line(f"stopped     as asked, after step {result['stopped']} of {run.loaded.config.schedule.steps}, which is saved")
            console.line(f"next        {plain(go_on(sys.argv[1:]), width=MAX_COMMAND)}")
        else:
            talk = run.loaded.config.data.chat.format is not None
            console.line(f"next        dist-llm {'chat' if talk else 'sample'} {plain(run.path)}" + ("" if talk else " --prompt 'def '"))
    if result["stopped"] is not None:
        raise typer.Exit(int(Code.PREEMPTED))
