"""`dist-llm train CONFIG [a.b=v ...]`: train on local ranks, or as one of torchrun's."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm import faults, flight
from dist_llm.cli.loopback import stay_on_loopback
from dist_llm.cli.network import allow_hub
from dist_llm.config import explain
from dist_llm.config.layout import Layout, world_of
from dist_llm.config.load import Loaded, config_tree, load_config
from dist_llm.config.rules import check as check_rules
from dist_llm.errors import MAX_COMMAND, CheckpointError, Code, DataError, Failure, NumericError, PeerError, SpaceError, UsageError, plain
from dist_llm.meeting import Meeting, MeetingError
from dist_llm.model.table import num_parameters, num_trained
from dist_llm.report.units import show_bytes
from dist_llm.train.base import OTHER_BASE, read_base
from dist_llm.train.console import Console
from dist_llm.train.folder import ANOTHER, newest, open_checkpoint, step_folders, step_of
from dist_llm.watch import HangError, Watchdog

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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
            _train_under_torchrun(run, place)
    except Failure as failure:
        if failure.code == Code.MEMORY:
            _advise(failure, run)
        if failure.next == ANOTHER:
            failure.next = _another(run)
        raise with_last_good(failure, run.path, sys.argv[1:]) from failure.__cause__


@dataclass(frozen=True)
class Place:
    """This process among torchrun's. restarts: how often torchrun starts the ranks anew at most."""

    rank: int
    world: int
    local_rank: int
    meeting: Meeting
    restarts: int = 0


@dataclass(frozen=True)
class Run:
    """What is to be trained. profile: the first and the last step to trace. read: the config again, for a run that goes on."""

    loaded: Loaded
    layout: Layout
    path: Path
    resume: str | None
    profile: tuple[int, int] | None
    read: Callable[[str | None], Loaded]


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


def torchrun_place() -> Place | None:
    """Where torchrun has put this process; None when it did not start us. Raises UsageError where its variables make no sense."""
    if not all(name in os.environ for name in TORCHRUN):
        return None
    host = os.environ["MASTER_ADDR"]
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        rank, world, local_rank, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"))
        attempt, restarts = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    except ValueError as error:
        raise UsageError("torchrun's variables are no numbers", where=", ".join(TORCHRUN), found=str(error)) from None
    if not (0 <= rank < world and local_rank >= 0 and 0 < port < 1 << 16):
        found = f"RANK={rank} WORLD_SIZE={world} LOCAL_RANK={local_rank} MASTER_PORT={port}"
        raise UsageError("torchrun's variables contradict each other", expected="0 <= RANK < WORLD_SIZE, a port", found=found)
    return Place(rank, world, local_rank, Meeting(host, port, served, attempt), restarts)


def with_last_good(failure: Failure, path: Path, words: list[str]) -> Failure:
    """The failure of a run that had begun, with what of it is safe and how to go on."""
    if failure.code not in (Code.PEER, Code.NUMERIC, Code.SPACE, Code.MEMORY) or failure.next is not None:
        return failure
    saved = [found for found in saved_steps(path) if _opens(found)]
    if saved:
        good = f"last good: step {step_of(saved[0])}, verified ({saved[0]})"
        failure.safe = f"{failure.safe}; {good}" if failure.safe else good
    elif failure.safe is None:
        failure.safe = "nothing was saved yet"
    failure.next = go_on(words) if saved else "the same command again, once the cause is gone"
    return failure


def _another(run: Run) -> str:
    """What to do where none of the checkpoints that were tried is sound, or the base is not."""
    if run.resume is None:
        return OTHER_BASE
    tried = saved_steps(run.path) if run.resume == "auto" else [newest(Path(str(run.resume)))]
    if any(_opens(step) for step in saved_steps(run.path) if step.resolve() not in [one.resolve() for one in tried]):
        return go_on(sys.argv[1:])
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
    """The checkpoints of a run folder, newest first; none where it cannot be read."""
    with contextlib.suppress(OSError):
        return step_folders(path)
    return []


def go_on(words: list[str]) -> str:
    """The command that goes on with a run, from the words of this one."""
    kept = [word for at, word in enumerate(words) if word != "--resume" and words[at - 1 : at] != ["--resume"] and word[:9] != "--resume="]
    command = shlex.join(["dist-llm", *kept, "--resume", "auto"])
    return command if torchrun_place() is None else f"torchrun as before with {command}"


def starting_point(saved: list[Path]) -> str:
    """Where a restart begins."""
    return f"from step {step_of(saved[0])}" if saved else "from where it began, nothing was saved yet"


def _train_here(run: Run, restarts: int) -> None:
    """Starts local ranks, and shows what they do."""
    stay_on_loopback()
    with Console(steps=run.loaded.config.schedule.steps) as console:
        _introduce(run, console)
        from dist_llm.train.run import candidates  # torch: seconds, after there is something to read
        from dist_llm.train.storage import RunFolder

        RunFolder(run.path)  # held until the process ends
        found = candidates(run.path, run.resume, go_on=go_on(sys.argv[1:]))
        _conclude(run, _run_local(run, found, console, restarts), console)


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
            own = saved_steps(run.path) if begun else []
            if own and config.base is not None:
                config = run.read("auto").config  # with the base gone, its tokenizer is in a checkpoint that may be gone by now
            candidates = own or candidates
            console.line(f"note: {plain(lost.what)} ({plain(lost.where)}): restart {attempt} of {restarts}, {starting_point(own)}")
    return run_local(config, run.layout, run.path, candidates=candidates, tell=tell, profile=run.profile)


def _train_under_torchrun(run: Run, place: Place) -> None:
    """Joins torchrun's ranks as one of them; rank 0 shows what they do."""
    try:
        with Console(steps=run.loaded.config.schedule.steps) as console:
            result = _join(run, place, console)
            flight.leave(Code.DONE)
            _conclude(run, result, console if place.rank == 0 else None)
    except typer.Exit:
        raise
    except Exception as error:
        from dist_llm.ranks import known_failure

        failure = error if isinstance(error, Failure) else known_failure(error)
        flight.leave(Code.BUG if failure is None else failure.code)
        keep_traceback(error, run.path / "logs" / f"rank-{place.rank}.log")
        teller = 0
        if isinstance(failure, MeetingError):
            teller = place.rank if failure.teller is None else failure.teller
        elif isinstance(failure, PeerError) and (explained := _records(run, place).explain()) is not None:
            silent = isinstance(explained, HangError) and explained.rank == 0 and not explained.spoke
            failure, teller = explained, int(silent)  # rank 0, but for what it cannot say itself
        if failure is None:
            raise
        if not told_by(failure, rank=place.rank, local_rank=place.local_rank, teller=teller):
            raise typer.Exit(int(failure.code)) from None
        if place.meeting.attempt < place.restarts:
            _note_restart(run, place, failure)
            raise typer.Exit(int(failure.code)) from None
        raise failure from None


def _note_restart(run: Run, place: Place, failure: Failure) -> None:
    """One line: torchrun starts its ranks anew after any failure, so this one does not end the job."""
    where = f" ({plain(failure.where)})" if failure.where else ""
    start = starting_point(saved_steps(run.path) if Begun(run).is_known() else [])
    print(f"note: {plain(failure.what)}{where}: torchrun's restart {place.meeting.attempt + 1} of {place.restarts}, {start}", flush=True)


def _records(run: Run, place: Place, note: Callable[[str], None] | None = None) -> Watchdog:
    """A watch over the flight records of torchrun's ranks, as far as they share this folder."""
    logs, timeout = run.path / "logs", run.loaded.config.runtime.timeout_seconds
    records = [flight.open_file(logs / f"rank-{rank}.flight") for rank in range(place.world)]
    return Watchdog(records, timeout_seconds=timeout, logs=logs, note=note)


def _join(run: Run, place: Place, console: Console) -> dict[str, Any]:
    """One rank of torchrun's, from its first words to the end of the training."""
    config, first = run.loaded.config, place.rank == 0
    if first:
        _introduce(run, console)
    else:
        allow_hub(config.data, lambda text: None)
    from dist_llm import mesh
    from dist_llm.ranks import open_log, stacks_into
    from dist_llm.train import run as training
    from dist_llm.train.storage import RunFolder

    if first:
        RunFolder(run.path)  # held until the process ends
    begun = Begun(run)
    if first and not place.meeting.attempt:
        begun.forget()
    again = "auto" if place.meeting.attempt and saved_steps(run.path) and begun.is_known() else run.resume
    candidates = training.candidates(run.path, again, go_on=go_on(sys.argv[1:]))  # every rank finds the same
    log = open_log(run.path / "logs" / f"rank-{place.rank}.log")
    stacks_into(log)
    _noise_into(log)
    record = run.path / "logs" / f"rank-{place.rank}.flight"
    try:
        flight.start(flight.make_file(record), rank=place.rank, pid=os.getpid())
    except OSError as error:
        found, way = error.strerror or str(error), f"remove {record}"
        raise SpaceError("the record of a rank cannot be written", where=str(record), expected="a file", found=found, next=way) from None
    watchdog: Watchdog | None = None

    def tell(message: dict[str, Any]) -> None:
        if first:
            if "resumed" in message:
                begun.note()
            console.take(message)
        if watchdog is not None and (failure := watchdog.look()) is not None:
            raise failure

    places = [str(one) for one in candidates]
    ready = training.prepare_here(config, local_ranks=place.local_rank + 1, candidates=places, tell=tell)
    tell({"data": ready})
    where: dict[str, Any] = {"rank": place.rank, "world": place.world, "meeting": place.meeting}
    mesh.connect(backend=ready["backend"], timeout_seconds=config.runtime.timeout_seconds, **where)
    watchdog = _records(run, place, lambda text: tell({"note": text})) if first else None
    arguments = (config_tree(config), asdict(run.layout), str(run.path), places, place.local_rank, run.profile)
    result = training.train_rank(place.rank, place.world, tell, *arguments)
    mesh.disconnect()
    return result


def _noise_into(log: int) -> None:
    """From now on what torch's C++ writes to stderr goes into a log, as that of local ranks; what Python says stays where it was."""
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors=sys.stderr.errors)
    os.dup2(log, 2)


@dataclass(frozen=True)
class Begun:
    """A note in the run's logs that torchrun's job has taken up what `--resume` names: from then on the folder's newest is its own.

    Before that, later checkpoints are of another beginning, and a restart has to start from what was asked for.
    """

    run: Run

    @property
    def _path(self) -> Path:
        return self.run.path / "logs" / "resumed"

    def _words(self) -> str:
        return json.dumps([os.environ.get("TORCHELASTIC_RUN_ID"), self.run.resume])

    def is_known(self) -> bool:
        """Whether nothing but the folder's own was asked for, or that has been taken up."""
        with contextlib.suppress(OSError):
            return self.run.resume in (None, "auto") or self._path.read_text() == self._words()
        return False

    def forget(self) -> None:
        """What an earlier job has noted. Raises SpaceError."""
        self._write("")

    def note(self) -> None:
        """That it is taken up. Raises SpaceError."""
        self._write(self._words())

    def _write(self, words: str) -> None:
        from dist_llm.train.storage import storing

        with storing(self._path):
            self._path.parent.mkdir(exist_ok=True)
            self._path.write_text(words)


def told_by(failure: Failure, *, rank: int, local_rank: int, teller: int = 0) -> bool:
    """Whether this one of torchrun's ranks shows the failure: what all ranks meet alike is told once."""
    if isinstance(failure, DataError):
        return local_rank == 0  # the text of a machine is the same for its ranks
    return rank == teller or not isinstance(failure, (UsageError, CheckpointError, NumericError, SpaceError, PeerError))


def keep_traceback(error: BaseException, log: Path) -> None:
    """Appends a traceback to a log of the run, if it can be written."""
    from dist_llm.ranks import open_log

    with contextlib.suppress(OSError, SpaceError):
        with open(open_log(log), "a") as file:
            file.write("".join(traceback.format_exception(error)))


def _introduce(run: Run, console: Console) -> None:
    """What is about to run, in numbers."""
    config = run.loaded.config
    console.line(explain.model_line(config, num_parameters(config.model), num_trained(config.model)))
    for line in explain.equations(config, run.layout):
        console.line(line)
    console.line(f"layout {run.layout}; run folder {plain(config.save.dir)}")
    allow_hub(config.data, lambda text: console.line(plain(text)))


def _conclude(run: Run, result: dict[str, Any], console: Console | None) -> None:
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
