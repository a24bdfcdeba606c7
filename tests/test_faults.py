"""A rank is killed, stopped or told to stop, anywhere: the run that goes on equals the calm one to the bit, and nothing is left behind.

Nine points of a step or a save x kill -9, SIGTERM, SIGSTOP; layouts and ranks in rotation here, all of them behind `long`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_llm.cli.job import Run
from dist_llm.cli.train import _run_local
from dist_llm.config.layout import Layout
from dist_llm.config.load import load_config
from dist_llm.errors import PeerError, UsageError
from dist_llm.mesh import whole_world
from dist_llm.train import run
from dist_llm.train.console import Console
from dist_llm.train.folder import open_checkpoint, step_folders, step_of
from tests.commands import Commands, Job, Result
from tests.ranks import Ranks

STEPS, FAULT = 8, 6  # steps of a run, and the one that is disturbed; every second one is saved
TIMEOUT = 4.0  # runtime.timeout_seconds
STEP = ("step.data", "step.forward", "step.backward", "step.reduce", "step.update", "step.validate")
SAVE = ("save.write", "save.commit", "retain.delete")
PAIRS = ("dp=2,zero=1", "tp=2", "pp=2", "dp=2,zero=3", "dp=2,zero=2,shard=2", "dp=2,zero=0")
LAYOUTS = (*PAIRS, "dp=2,tp=2", "dp=2,pp=2,zero=1", "dp=4,zero=3")
SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP")
CASES = [
    (point, name, PAIRS[(at + 2 * turn) % len(PAIRS)], (at + turn) % 2 if point in (*STEP, "save.write") else 0)
    for at, point in enumerate((*STEP, *SAVE))
    for turn, name in enumerate(SIGNALS)
]
WORLDS = [2] * len(PAIRS) + [4, 4, 4]
ALL = [
    (point, name, layout, rank)
    for point in (*STEP, *SAVE)
    for name in SIGNALS
    for layout, world in zip(LAYOUTS, WORLDS, strict=True)
    for rank in (range(world) if point in (*STEP, "save.write") else [0])
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def words(home: Path, folder: Path, layout: str) -> list[str]:
    """A short run that saves and validates every second step."""
    settings = ["data.max_tokens=20_000", "schedule.steps=8", "save.keep=1", "track.validate_every=2", "track.validate_batches=1"]
    settings += [f"data.dir={home}/data", "runtime.device=cpu", "runtime.dtype=float32", "model.dropout=0.1"]
    settings += [f"batch.micro={2 if 'dp=4' in layout or 'dp=2,pp=2' in layout else 4}"]
    flags = ["--layout", layout, "--run-dir", str(folder), "--save-every", "2"]
    return ["train", "configs/tiny.yaml", *flags, *settings, f"runtime.timeout_seconds={TIMEOUT}"]


def losses(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(record["step"], record["loss_hex"]) for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def calm(commands: Commands, home: Path) -> Callable[[str], list[tuple[int, str]]]:
    """The losses of a run that nothing happens to, by layout."""
    known: dict[str, list[tuple[int, str]]] = {}

    def of(layout: str) -> list[tuple[int, str]]:
        if layout not in known:
            folder = home / f"calm-{len(known)}"
            result = commands.run(*words(home, folder, layout))
            assert result.returncode == 0, result.stderr
            known[layout] = losses(folder)
            assert len(known[layout]) == STEPS
        return known[layout]

    return of


def goes_on(commands: Commands, folder: Path, first: list[str]) -> Result:
    """The run after it was disturbed, from its newest checkpoint."""
    return commands.run(*first, "--resume", "auto")


def nothing_left(job: Job, shared: set[str]) -> None:
    """No process, nothing in shared memory, no half checkpoint that counts."""
    deadline = time.monotonic() + 2
    while job.left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not job.left()
    assert in_shared_memory() <= shared


def in_shared_memory() -> set[str]:
    """Names in shared memory, but for the folders that other tests make there (tempfile's names: training makes none)."""
    return {name for name in os.listdir("/dev/shm") if not re.fullmatch(r"tmp\w{8}", name)}


def disturbed(commands: Commands, home: Path, folder: Path, calm: Callable, point: str, name: str, layout: str, rank: int) -> None:
    """One disturbance, what the user is told, and the run that goes on."""
    shared, first = in_shared_memory(), words(home, folder, layout)
    calm(layout)  # not on this run's time
    begun = time.monotonic()
    job = commands.start(*first, DIST_LLM_FAULT=f"{point}:{rank}:{FAULT}:{name}")
    result = job.wait()
    seconds = time.monotonic() - begun
    nothing_left(job, shared)
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) <= 12, result.stderr
    saved = step_of(step_folders(folder)[0])
    open_checkpoint(folder).verify()
    if name == "SIGTERM":
        done = point in SAVE and saved == STEPS  # a save in the background may end with the run
        assert result.returncode == (0 if done else 75) and not result.stderr, (result.returncode, result.stderr)
        assert saved == losses(folder)[-1][0] >= FAULT, "every step that was made is saved"
    else:
        assert result.returncode == 5, (result.returncode, result.stdout, result.stderr)
        assert f"rank {rank}" in result.stderr and name in result.stderr, result.stderr
        if point in STEP:
            assert f"step {FAULT}, {point[5:]}" in result.stderr, result.stderr
        assert saved >= FAULT - 4, "committed before"
        assert result.stderr.count(f"last good: step {saved}") == 1
        assert result.stderr.splitlines()[-1].startswith("  next:     dist-llm train")
    if name == "SIGSTOP":
        assert seconds < TIMEOUT + 5 + 8, seconds  # what comes before and after the stop took less than 8 s
    assert goes_on(commands, folder, first).returncode == 0
    assert losses(folder) == calm(layout)
    assert open_checkpoint(folder).step == STEPS


@pytest.mark.parametrize(("point", "name", "layout", "rank"), CASES)
def test_a_disturbed_run_goes_on(
    commands: Commands, home: Path, tmp_path: Path, calm: Callable, point: str, name: str, layout: str, rank: int
) -> None:
    disturbed(commands, home, tmp_path / "run", calm, point, name, layout, rank)


@pytest.mark.long
@pytest.mark.parametrize(("point", "name", "layout", "rank"), ALL)
def test_every_rank_and_layout(
    commands: Commands, home: Path, tmp_path: Path, calm: Callable, point: str, name: str, layout: str, rank: int
) -> None:
    disturbed(commands, home, tmp_path / "run", calm, point, name, layout, rank)


def wait_for(job: Job, text: str) -> None:
    """Until a command has said something."""
    deadline = time.monotonic() + 60
    while text not in job.out.read_text():
        assert time.monotonic() < deadline and job.running, job.err.read_text()
        time.sleep(0.01)


def whom(job: Job, who: str) -> list[int]:
    """The processes that get the signal."""
    return {"launcher": [job.pid], "one rank": job.ranks()[-1:], "all": job.left()}[who]


@pytest.mark.parametrize(
    ("number", "who", "times"),
    [(signal.SIGTERM, "launcher", 1), (signal.SIGUSR1, "launcher", 1), (signal.SIGTERM, "all", 2), (signal.SIGUSR1, "one rank", 3)],
)
def test_told_to_stop(commands: Commands, home: Path, tmp_path: Path, calm: Callable, number: int, who: str, times: int) -> None:
    """By a scheduler, to whomever and however often: saved at a step boundary, exit 75, nothing lost; the next command goes on."""
    folder, layout = tmp_path / "run", "dp=2,zero=1"
    first = [*words(home, folder, layout), "schedule.steps=400", "save.every=0"]
    shared, job = in_shared_memory(), commands.start(*first)
    wait_for(job, "step   1/400")
    for _ in range(times):
        for pid in whom(job, who):
            os.kill(pid, number)
    result = job.wait()
    assert result.returncode == 75 and not result.stderr, (result.stdout, result.stderr)
    nothing_left(job, shared)
    made = losses(folder)
    assert 1 <= made[-1][0] < 400 and made[:STEPS] == calm(layout)[: len(made[:STEPS])]
    assert open_checkpoint(folder).step == made[-1][0]
    next_words = shlex.split(result.stdout.splitlines()[-1].removeprefix("next"))
    assert next_words[:2] == ["dist-llm", "train"]
    more = commands.run(*next_words[1:], f"schedule.steps={made[-1][0] + 2}")
    assert more.returncode == 0 and f"going on from step {made[-1][0]}" in more.stdout, more.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_before_the_first_step(commands: Commands, home: Path, tmp_path: Path, number: int) -> None:
    """While ranks are being made: one step and its checkpoint, or the end by the signal with nothing saved; never a silent death."""
    shared, job = in_shared_memory(), commands.start(*words(home, tmp_path / "run", "dp=2,zero=1"), "schedule.steps=400")
    wait_for(job, "layout dp=2")
    job.send(number)
    result = job.wait()
    assert result.returncode in (75, 143), (result.returncode, result.stderr)
    assert (result.returncode == 75) == bool(step_folders(tmp_path / "run"))
    nothing_left(job, shared)


@pytest.mark.parametrize("when", ["data", "model"])
def test_stopped_before_the_first_step(commands: Commands, home: Path, tmp_path: Path, when: str) -> None:
    """The process that prepares the data, or a rank alone that builds its model: nobody waits for it, and the run hung for ever (F9)."""
    fault = {"DIST_LLM_FAULT": "step.data:0:0:SIGSTOP"} if when == "data" else {}
    shared, job = in_shared_memory(), commands.start(*words(home, tmp_path / "run", "dp=1"), **fault)
    if when == "model":
        wait_for(job, "device:")
        while not job.ranks():
            assert job.running
        os.kill(job.ranks()[0], signal.SIGSTOP)
    begun = time.monotonic()
    result = job.wait(timeout=40)
    assert time.monotonic() - begun < TIMEOUT + 5 + 8, "8 s for what comes before and after the stop"
    assert result.returncode == 5 and "rank 0 hangs" in result.stderr and "SIGSTOP" in result.stderr, result.stderr
    assert when != "data" or "before the first step, data" in result.stderr
    nothing_left(job, shared)


def test_restart_after_a_lost_rank(commands: Commands, home: Path, tmp_path: Path, calm: Callable) -> None:
    """--max-restarts: the launcher goes on by itself, and says so."""
    folder, layout = tmp_path / "run", "dp=2,zero=1"
    result = commands.run(*words(home, folder, layout), "--max-restarts", "1", DIST_LLM_FAULT=f"step.backward:1:{FAULT}")
    assert result.returncode == 0, result.stderr
    assert "restart 1 of 1, from step" in result.stdout and f"step {FAULT}, backward" in result.stdout
    assert losses(folder) == calm(layout)


def test_restart_before_anything_is_saved(commands: Commands, home: Path, tmp_path: Path, calm: Callable) -> None:
    folder, layout = tmp_path / "run", "dp=2,zero=1"
    result = commands.run(*words(home, folder, layout), "--max-restarts", "2", DIST_LLM_FAULT="step.forward:0:1")
    assert result.returncode == 0 and "nothing was saved yet" in result.stdout, result.stderr
    assert losses(folder) == calm(layout)


def test_a_restart_begins_where_it_was_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --resume an earlier step: a rank lost before that is taken up is no reason to take the newest."""
    early, late = (tmp_path / "checkpoints" / f"step-{step:08d}" for step in (2, 6))
    tried: list[list[Path]] = []

    def run_local(*_: Any, candidates: list[Path], tell: Callable, **__: Any) -> dict[str, Any]:
        tried.append(candidates)
        if len(tried) == 2:
            tell({"resumed": {"step": 2, "path": str(early)}})  # the later one is set aside by then
        if len(tried) < 4:
            raise PeerError("a rank died", where="rank 1")
        return {}

    monkeypatch.setattr("dist_llm.train.run.run_local", run_local)
    for name in ("saved_steps", "sound_steps"):
        monkeypatch.setattr(f"dist_llm.cli.train.{name}", lambda path: [late, early] if len(tried) < 2 else [early])
    loaded = load_config("configs/tiny.yaml", [])
    started = Run(loaded, Layout(), tmp_path, str(early), None, lambda resume: loaded)
    _run_local(started, [early], Console(steps=8), 3)
    assert tried == [[early]] * 4
    tried.clear()
    for sound, taken in ((early, [late, early]), (None, [])):  # damaged ones are told of on the way to a sound one, or there is no way
        tried.clear()
        monkeypatch.setattr("dist_llm.cli.train.saved_steps", lambda path: [late, early])
        monkeypatch.setattr("dist_llm.cli.train.sound_steps", lambda path, sound=sound: [sound] if sound else [])
        _run_local(started, [], Console(steps=8), 3)
        assert tried == [[], *[taken] * 3]


def test_restart_by_torchrun(home: Path, tmp_path: Path, calm: Callable) -> None:
    """torchrun --max-restarts: all ranks come again and take up the newest checkpoint."""
    folder, layout = tmp_path / "run", "dp=2,zero=1"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = {**os.environ, "DIST_LLM_FAULT": f"step.backward:1:{FAULT}", "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "dist_llm", *words(home, folder, layout), "runtime.timeout_seconds=60"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "going on from step" in result.stdout
    assert losses(folder) == calm(layout)
    (note,) = [line for line in result.stdout.splitlines() if "torchrun's restart" in line]
    assert re.fullmatch(r"note: rank 1 died \(rank 1 .*, step 6, backward\): torchrun's restart 1 of 1, from step [24]", note), note
    assert "error:" not in result.stderr, "the job has gone on"


def test_an_error_that_torchrun_restarts_after_is_a_note(commands: Commands, home: Path, tmp_path: Path) -> None:
    """As long as there are restarts left, and not once there are none."""
    first = [*words(home, tmp_path / "run", "dp=1"), f"data.source={home}/none.txt"]
    restarts = {**place(0, 1, free_port()), "TORCHELASTIC_MAX_RESTARTS": "2"}
    early, late = (commands.run(*first, **restarts, TORCHELASTIC_RESTART_COUNT=count) for count in ("1", "2"))
    assert early.returncode == late.returncode == 2, late.stderr
    assert "torchrun's restart 2 of 2, from where it began" in early.stdout and not early.stderr, early
    assert late.stderr.startswith("error:") and "restart" not in late.stdout, late


def test_a_restart_by_torchrun_begins_where_it_was_told_to(commands: Commands, home: Path, tmp_path: Path) -> None:
    """torchrun's ranks come again with `--resume` an earlier step: the folder's newest is theirs only once that was taken up."""
    folder, port = tmp_path / "run", free_port()
    first = [*words(home, folder, "dp=1"), "schedule.steps=4", "save.keep=2"]

    def again(attempt: int) -> str:
        early = str(folder / "checkpoints/step-00000002")
        result = commands.run(*first, "--resume", early, **place(0, 1, port), TORCHELASTIC_RESTART_COUNT=str(attempt))
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert commands.run(*first).returncode == 0
    assert "going on from step 2" in again(1), "lost before anything was taken up"
    assert "going on from step 4" in again(2), "taken up: the newest is its own"
    assert "going on from step 2" in again(0), "another job"
    (folder / "logs/resumed").write_text('[null, "elsewhere"]')
    assert "going on from step 2" in again(1), "the note is of another beginning"


def test_told_to_stop_under_torchrun(home: Path, tmp_path: Path, calm: Callable) -> None:
    """As a scheduler stops it: torchrun hands the signal on, and the step that was made is saved."""
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dist_llm"]
    settings = ["schedule.steps=4000", "save.every=0", "runtime.timeout_seconds=60"]
    process = subprocess.Popen([*torchrun, *words(home, folder, "dp=2,zero=1"), *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or not losses(folder):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert b"stopped     as asked" in out and open_checkpoint(folder).step == losses(folder)[-1][0] < 4000
    assert not (folder / "logs/rank-1.log").read_text(), "no failure, so no traceback"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_of_torchrun_is_named(commands: Commands, home: Path, tmp_path: Path, rank: int) -> None:
    """By rank 0, or by rank 1 where rank 0 is the one: asked for its stack, the teller died without a word once (F9)."""
    folder, port = tmp_path / "run", free_port()
    fault = {"DIST_LLM_FAULT": f"step.forward:{rank}:3:SIGSTOP"}
    jobs = [commands.start(*words(home, folder, "dp=2,zero=1"), **place(one, 2, port), **fault) for one in range(2)]
    result = jobs[1 - rank].wait()
    jobs[rank].send(signal.SIGKILL)  # as torchrun does
    jobs[rank].wait()
    assert result.returncode == 5 and "Traceback" not in result.stderr, result.stderr
    assert f"rank {rank} hangs" in result.stderr and "step 3, forward" in result.stderr and "SIGSTOP" in result.stderr, result.stderr
    assert "most recent call first" in (folder / f"logs/rank-{1 - rank}.log").read_text(), "its stack"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_of_torchrun_is_named(commands: Commands, home: Path, tmp_path: Path, rank: int) -> None:
    """It has died and does not hang, which the other knows from its process; only torchrun knows the signal (F3)."""
    folder, port = tmp_path / "run", free_port()
    fault = {"DIST_LLM_FAULT": f"step.reduce:{rank}:5"}
    jobs = [commands.start(*words(home, folder, "dp=2,zero=1"), **place(one, 2, port), **fault) for one in range(2)]
    result = jobs[1 - rank].wait()
    assert jobs[rank].wait().returncode == 128 + signal.SIGKILL
    lines = result.stderr.splitlines()
    assert result.returncode == 5 and lines[0] == f"error: rank {rank} died" and len(lines) <= 12, result.stderr
    assert "step 5, reduce" in lines[1] and "torchrun's own report" in result.stderr and "silent" not in result.stderr, result.stderr
    assert lines[-1].startswith("  next:     torchrun as before with dist-llm train") and lines[-1].endswith("--resume auto"), lines[-1]


def test_a_rank_of_torchrun_that_fails_is_no_hang(commands: Commands, home: Path, tmp_path: Path) -> None:
    """It says itself what has happened, and the first rank with which code it left."""
    port, fault = free_port(), {"DIST_LLM_FAULT": "step.backward:1:3:MEMORY"}
    jobs = [commands.start(*words(home, tmp_path / "run", "dp=2"), **place(rank, 2, port), **fault) for rank in range(2)]
    first, second = [job.wait() for job in jobs]
    assert second.returncode == 8 and second.stderr.startswith("error: out of memory"), second.stderr
    assert first.returncode == 5 and first.stderr.startswith("error: rank 1 failed") and "exit code 8" in first.stderr, first.stderr


def test_what_rank_0_of_torchrun_says_of_itself_is_said_once(commands: Commands, home: Path, tmp_path: Path) -> None:
    """The other one once added that rank 0 hangs."""
    port, fault = free_port(), {"DIST_LLM_FAULT": "step.backward:0:3:MEMORY"}
    jobs = [commands.start(*words(home, tmp_path / "run", "dp=2"), **place(rank, 2, port), **fault) for rank in range(2)]
    first, second = [job.wait() for job in jobs]
    assert first.returncode == 8 and first.stderr.startswith("error: out of memory"), first.stderr
    assert second.returncode == 5 and not second.stderr, second.stderr


def test_a_slow_rank_is_named(commands: Commands, home: Path, tmp_path: Path) -> None:
    """Ten times slower from step 2 on: one note within 20 steps (F10)."""
    first = [*words(home, tmp_path / "run", "dp=2"), "schedule.steps=24", "save.every=0", "track.validate_every=0", "batch.micro=1"]
    result = commands.run(*first, DIST_LLM_FAULT="step.forward:1:2:SLOW")
    assert result.returncode == 0, result.stderr
    (note,) = [line for line in result.stdout.splitlines() if "is slow" in line]
    found = re.fullmatch(r"note: rank 1 is slow: its own work takes ([\d.]+) times .* before step (\d+)\)", note)
    assert found and float(found[1]) >= 2.0 and int(found[2]) <= 22, note


def test_out_of_memory_says_what_would_fit(commands: Commands, home: Path, tmp_path: Path) -> None:
    """Exit 8: the rank and its phase, the peak so far and the predicted one, three changes; each of them is a legal run (F31)."""
    first = words(home, tmp_path / "run", "dp=2")
    result = commands.run(*first, "batch.micro=2", DIST_LLM_FAULT="step.backward:1:3:MEMORY")
    assert result.returncode == 8 and "Traceback" not in result.stderr, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) <= 12 and "rank 1" in lines[1] and "step 3, backward" in lines[1] and "predicted" in result.stderr, lines
    assert "bytes of memory at most so far" in result.stderr
    changes = [line.split(" needs ")[0].removeprefix("  - ").split() for line in lines if " needs " in line]
    assert len(changes) == 3, lines
    for change in changes:  # added to the command they are what they say
        explained = commands.run("check", "configs/tiny.yaml", "--layout", "dp=2", "batch.micro=2", *change, "--json")
        assert explained.returncode == 0 and change[-1].split("=", 1)[1] in explained.stdout, (change, explained)


# --- ranks that do not meet, or are not the same --------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def place(rank: int, world: int, port: int, host: str = "127.0.0.1") -> dict[str, str]:
    """torchrun's variables for one of its ranks."""
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": host, "MASTER_PORT": str(port)}


def did_not_meet(result: Result, address: str, said: str) -> None:
    """One block of ours on stderr, and nothing else."""
    lines = result.stderr.splitlines()
    assert result.returncode == 5 and lines and lines[0] == "error: the ranks could not meet" and len(lines) <= 12, result
    assert address in lines[1] and re.search(said, result.stderr), result.stderr
    assert all(line.startswith("  ") for line in lines[1:]), result.stderr


def end_of(job: Job, record: Path) -> Result:
    """How a rank ends that meets nobody: within the timeout and five seconds; the clock starts when it has begun its record."""
    while not record.exists():
        assert job.running
        time.sleep(0.01)
    begun = time.monotonic()
    result = job.wait(timeout=30.0)
    assert time.monotonic() - begun < TIMEOUT + 5 + 2, "2 s for the data"
    return result


NOBODY, ANOTHER = "nobody answers there, where rank 0 should serve the store: ", "what answers there is not torch's store"


@pytest.mark.parametrize(
    ("rank", "host", "said"),
    [(0, "127.0.0.1", "rank 1 did not come"), (1, "127.0.0.1", NOBODY + "Connection refused"), (1, "no-such-host.invalid", NOBODY)],
    ids=["a peer is missing", "no server", "a wrong name"],
)
def test_ranks_that_do_not_meet(commands: Commands, home: Path, tmp_path: Path, rank: int, host: str, said: str) -> None:
    """Exit 5 within the timeout and five seconds, with the place and who is missing; told by whoever meets nobody (F26)."""
    port, folder = free_port(), tmp_path / "run"
    job = commands.start(*words(home, folder, "dp=2"), **place(rank, 2, port, host))
    did_not_meet(end_of(job, folder / f"logs/rank-{rank}.flight"), f"{host}:{port}", said)


def test_what_torch_says_of_it_goes_into_the_log(home: Path, tmp_path: Path) -> None:
    """Its C++ tells of a store that is not there in forty lines, in a process that was not forked."""
    folder, port = tmp_path / "run", free_port()
    command = [sys.executable, "-m", "dist_llm", *words(home, folder, "dp=2")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **place(1, 2, port)}, timeout=120)
    did_not_meet(Result(done.returncode, done.stdout, done.stderr), f"127.0.0.1:{port}", NOBODY)
    assert "c10d" in (folder / "logs/rank-1.log").read_text()


@pytest.mark.parametrize("word", [None, b"HTTP/1.1 400 Bad Request\r\n"], ids=["silent", "speaks otherwise"])
@pytest.mark.parametrize(("rank", "said"), [(0, "EADDRINUSE"), (1, ANOTHER)], ids=["serves", "comes"])
def test_a_port_that_is_taken(commands: Commands, home: Path, tmp_path: Path, rank: int, said: str, word: bytes | None) -> None:
    """By a program that is no store: torch once waited for its answer without end, and no signal was heard."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        if word is not None:
            threading.Thread(target=answer_all, args=(other, word), daemon=True).start()
        port, folder = other.getsockname()[1], tmp_path / "run"
        job = commands.start(*words(home, folder, "dp=2"), **place(rank, 2, port))
        result = end_of(job, folder / f"logs/rank-{rank}.flight")
    did_not_meet(result, f"127.0.0.1:{port}", said)


def answer_all(server: socket.socket, word: bytes) -> None:
    """The same word to everyone who comes."""
    with contextlib.suppress(OSError):  # closed
        while True:
            server.accept()[0].sendall(word)


def test_told_to_stop_while_the_ranks_meet(commands: Commands, home: Path, tmp_path: Path) -> None:
    """SIGTERM is heard while torch waits for the answer of a program that gives none."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        job = commands.start(*words(home, tmp_path / "run", "dp=2"), "runtime.timeout_seconds=60", **place(1, 2, other.getsockname()[1]))
        other.accept()
        job.send(signal.SIGTERM)
        assert job.wait(timeout=10.0).returncode == 143


def test_a_store_that_stands_still(commands: Commands, home: Path, tmp_path: Path) -> None:
    """The rank that serves it is stopped while they meet: torch waits without end for what it says of the timeout."""
    port, folder = free_port(), tmp_path / "run"
    jobs = [commands.start(*words(home, folder, "dp=3"), "batch.global=6", "batch.micro=2", **place(rank, 3, port)) for rank in range(2)]
    while not (folder / "logs/rank-1.flight").exists():
        time.sleep(0.01)
    time.sleep(1.0)
    jobs[0].send(signal.SIGSTOP)
    begun = time.monotonic()
    try:
        result = jobs[1].wait(timeout=30.0)
    finally:
        jobs[0].send(signal.SIGKILL)
    assert time.monotonic() - begun < TIMEOUT + 5
    did_not_meet(result, f"127.0.0.1:{port}", f"a rank that had come no longer answers|{ANOTHER}")


def test_the_first_of_those_that_came_tells_who_did_not(commands: Commands, home: Path, tmp_path: Path) -> None:
    """Also where that is not rank 0: torchrun may serve the store."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    served = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    first = [*words(home, tmp_path / "run", "dp=3"), "batch.global=6", "batch.micro=2"]
    jobs = [commands.start(*first, **place(rank, 3, store.port), **served) for rank in (1, 2)]
    one, two = [job.wait() for job in jobs]
    did_not_meet(one, f"127.0.0.1:{store.port}", "rank 0 did not come")
    assert two.returncode == 5 and not two.stderr, two


@pytest.mark.parametrize(
    ("other", "said"),
    [(["runtime.seed=8"], "runtime.seed"), (["optimizer.lr=0.5"], "optimizer.lr"), (["--layout", "tp=2"], "layout.")],
    ids=["seed", "rate", "layout"],
)
def test_ranks_that_were_told_different_things(commands: Commands, home: Path, tmp_path: Path, other: list[str], said: str) -> None:
    """Exit 2 on all of them before a group is made, told once: the key, the rank and both values (F25)."""
    port, first = free_port(), [*words(home, tmp_path / "run", "dp=2"), "runtime.timeout_seconds=20"]
    jobs = [commands.start(*first, *(other if rank else []), **place(rank, 2, port)) for rank in range(2)]
    results = [job.wait() for job in jobs]
    assert [result.returncode for result in results] == [2, 2], [result.stderr for result in results]
    assert f"the ranks differ in {said}" in results[0].stderr and "rank 1" in results[0].stderr, results[0].stderr
    assert "on rank 0" in results[0].stderr and not results[1].stderr


def test_another_code_on_one_rank(ranks: Ranks) -> None:
    with pytest.raises(UsageError) as caught:
        ranks.run(2, "tests.test_faults:another_code")
    assert caught.value.what == "the ranks differ in code" and "on rank 1" in str(caught.value.found)


def another_code(rank: int, world: int, say: Callable) -> None:
    """A rank whose source has changed."""
    if rank == 1:
        run.code_hash = lambda: "f" * 64
    run.require_equal(whole_world(rank, world), torch.device("cpu"), config={"a": {"b": 1}}, layout={}, data="0" * 64)


SOAK_SECONDS, SOAK_PERIOD = 600.0, 30.0  # of steps, and again for the calm run; between two faults


def soak(commands: Commands, home: Path, folder: Path, *, steps: int, period: float) -> int:
    """Runs to its end through a fault every so many seconds; returns how many there were."""
    first = [*words(home, folder, "dp=2,zero=2"), f"schedule.steps={steps}", "save.every=50", "track.validate_every=0", "save.keep=2"]
    draw, faults, shared = random.Random(7), 0, in_shared_memory()
    while True:
        resume = ["--resume", "auto"] if (folder / "checkpoints").is_dir() and step_folders(folder) else []
        job, begun = commands.start(*first, *resume), time.monotonic()
        while job.running and time.monotonic() - begun < period:
            time.sleep(0.05)
        kind = draw.choice(("kill", "stop", "told", "launcher"))
        victims = [job.pid] if kind in ("told", "launcher") else job.ranks()[-2:]
        if victims and job.running:
            faults += 1
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "told": signal.SIGTERM, "launcher": signal.SIGKILL}[kind]
            os.kill(draw.choice(victims), number)
        result = job.wait(timeout=period + 60)
        nothing_left(job, shared)
        if result.returncode == 0:
            return faults
        assert result.returncode in (5, 75, 137, 143) and "Traceback" not in result.stderr, (kind, result)


@pytest.mark.long
def test_a_soak_ends_in_the_state_of_a_calm_run(commands: Commands, home: Path, tmp_path: Path) -> None:
    """A fault every 30 seconds for some ten minutes: the last checkpoint has the calm run's bytes, and metrics its losses."""
    soak(commands, home, tmp_path / "speed", steps=150, period=1e9)
    records = [json.loads(line) for line in (tmp_path / "speed/metrics.jsonl").read_text().splitlines()]
    steps = round(SOAK_SECONDS / median(record["step_seconds"] for record in records))
    faults = soak(commands, home, tmp_path / "soaked", steps=steps, period=SOAK_PERIOD)
    soak(commands, home, tmp_path / "calm", steps=steps, period=1e9)
    print(f"{faults} faults in {steps} steps")
    assert faults >= 10
    assert losses(tmp_path / "soaked") == losses(tmp_path / "calm")
    ends = [open_checkpoint(tmp_path / name).manifest["files"] for name in ("soaked", "calm")]
    assert ends[0] == ends[1]
