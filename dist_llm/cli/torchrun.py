"""`dist-llm train` as one of torchrun's ranks: it joins them, watches over them on this machine, and begins again with them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from dist_llm import flight
from dist_llm.cli.job import Run, conclude, go_on, introduce, sound_steps, starting_point
from dist_llm.cli.network import allow_hub
from dist_llm.cli.place import Place
from dist_llm.config.load import config_tree
from dist_llm.errors import CheckpointError, Code, DataError, Failure, NumericError, PeerError, SpaceError, UsageError, plain
from dist_llm.meeting import MeetingError
from dist_llm.train.console import Console
from dist_llm.watch import HangError, Watchdog


def train_under_torchrun(run: Run, place: Place) -> None:
    """Joins torchrun's ranks as one of them; rank 0 shows what they do."""
    try:
        with Console(steps=run.loaded.config.schedule.steps) as console:
            result = _join(run, place, console)
            flight.leave(Code.DONE)
            conclude(run, result, console if place.rank == 0 else None)
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
    start = starting_point(sound_steps(run.path) if Begun(run).is_known() else [])
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
        introduce(run, console)
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
    again = "auto" if place.meeting.attempt and sound_steps(run.path) and begun.is_known() else run.resume
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
