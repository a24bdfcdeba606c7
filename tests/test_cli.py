"""The command line: what it imports, its exit codes, and what every failure looks like."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from dist_llm.cli import main as cli
from dist_llm.cli.place import Place, torchrun_place
from dist_llm.cli.torchrun import told_by
from dist_llm.cli.train import short_overrides
from dist_llm.errors import CheckpointError, DataError, Failure, MemoryFailure, NumericError, PeerError, UsageError
from dist_llm.meeting import Meeting
from tests.commands import Commands

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs/tiny.yaml")
COMMAND = [sys.executable, "-m", "dist_llm"]
QUIET = {**{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}, "OMP_NUM_THREADS": "1"}


def start(*words: str, **settings: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *words], cwd=ROOT, text=True, start_new_session=True, **{"env": QUIET, **pipes, **settings})


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """Runs a command in this process that must fail; returns its one block."""
    assert cli.run(list(words)) == code
    out, err = capsys.readouterr()
    assert err.count("error:") == 1 and err.startswith("error: ") and len(err.splitlines()) <= 12 and "Traceback" not in err
    assert not out or "--json" in words
    return err


# --- no torch, no delay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["train", "--help"], ["train", TINY, "model.x=2"], ["check", TINY], ["doctor"], ["data", "--help"], ["x"]],
)
def test_what_needs_no_torch_imports_none(words: list[str]) -> None:
    code = f"""
import sys, resource
from dist_llm.cli.main import run
run({words!r})
heavy = [name for name in ("torch", "deepspeed", "tokenizers", "numpy") if name in sys.modules]
assert not heavy, heavy
print("seconds", resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=QUIET, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.0, "of processor time; about a quarter on a quiet machine"


def test_every_verb_is_there(commands: Commands) -> None:
    shown = commands.run("--help").stdout
    assert all(verb in shown for verb in cli.VERBS) and "Exit codes" in shown
    assert commands.run("--version").stdout.startswith("dist-llm ")


# --- words that are wrong --------------------------------------------------------------------------------------------------


def test_a_wrong_word_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean train?" in refused(capsys, "trian") and "--steps" in refused(capsys, "train", TINY, "--stpes", "3")
    assert "did you mean build?" in refused(capsys, "data", "buidl", TINY) and "dist-llm data --help" in refused(capsys, "data", "xyz")
    assert "CONFIG" in refused(capsys, "train") and "--nproc" in refused(capsys, "train", TINY, "--nproc", "zero")
    assert "--nproc" in refused(capsys, "train", TINY, "--nproc", "0")


def test_a_wrong_config_is_refused(commands: Commands, tmp_path: Path) -> None:
    for words, told in (
        (["model.layerz=2"], "did you mean 'layers'"),
        (["--dtype", "float16"], "runtime.dtype"),
        (["--layout", "tp=3"], "4 heads over tp=3 leaves 1"),
        (["--nproc", "3"], "8 sequences over dp 3"),
        (["--layout", "dp=2,tq=2"], "did you mean 'tp'"),
    ):
        began = time.monotonic()
        done = commands.run("train", TINY, *words, "--run-dir", str(tmp_path / "run"))
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert not (tmp_path / "run").exists() and time.monotonic() - began < 20
    assert commands.run("train", str(tmp_path / "none.yaml")).returncode == 2


def test_what_is_not_there_is_told_with_what_to_type(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    for words in (["tokenizer", "report", nothing], ["data", "preview", TINY, f"data.source={nothing}", f"data.dir={tmp_path}"]):
        told = refused(capsys, *words)
        assert nothing in told and told.splitlines()[-1].startswith("  next: "), told


def test_bad_lines_are_skipped_as_the_message_says(commands: Commands, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The command that it names runs, and after it the same `train`, which says what was skipped."""
    text = tmp_path / "x.jsonl"
    text.write_text("".join(json.dumps({"text": f"line number {number} of a small text"}) + "\n" for number in range(90)) + "bad\n" * 2)
    data, run = [f"data.source={text}", f"data.dir={tmp_path / 'data'}", "data.validation=0"], ["--steps", "2", "--run-dir", str(tmp_path)]
    failed = commands.run("train", TINY, *data, *run)
    assert failed.returncode == 3 and "2 lines cannot be read" in failed.stderr
    named = failed.stderr.split("dist-llm ")[-1].split(";")[0].replace("CONFIG", TINY).split()
    assert cli.run([*named, *data]) == 0 and "2 bad lines were skipped" in capsys.readouterr().out
    done = commands.run("train", TINY, *data, *run)
    assert done.returncode == 0 and "note: 2 bad lines of x were skipped when it was built" in done.stdout, done.stderr
    flag = ["data", "build", TINY, data[0], f"data.dir={tmp_path / 'other'}", "data.max_bad_lines=1", "--max-bad-lines"]
    assert cli.run([*flag, "2"]) == 0 and "built" in capsys.readouterr().out
    assert "2 lines cannot be read" in refused(capsys, *flag[:-1], f"data.dir={tmp_path / 'third'}", code=3)


def test_failures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["check", TINY, "--world", "3", "--json"]) == 2
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["version"] == 1 and answer["error"]["code"] == 2 and "3 ranks" in answer["error"]["what"] and err.startswith("error: ")
    assert cli.run(["sample", "/nowhere", "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["error"]["code"] == 4
    assert cli.run(["check", TINY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "dp=1"


def test_our_own_bug_is_one_message_and_a_log(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_llm.cli.check.check_rules", lambda *_: 1 / 0)
    told = refused(capsys, "check", TINY, code=1)
    assert "ZeroDivisionError: division by zero" in told
    log = Path(told.split("the traceback is in ")[1].split()[0])
    assert "Traceback" in log.read_text() and "check_rules" in log.read_text()
    log.unlink()
    assert cli.run(["check", TINY], debug=True) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "error: a bug" in shown
    Path(shown.split("the traceback is in ")[1].split()[0]).unlink()


def test_ctrl_c_and_a_reader_that_leaves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dist_llm.cli.check.check_rules", interrupt)
    assert cli.run(["check", TINY]) == 130
    assert "interrupted" in capsys.readouterr().err
    read, write = os.pipe()
    os.close(read)
    left = start("check", TINY, "--explain", stdout=write)
    os.close(write)
    assert left.stderr is not None and left.stderr.read() == "" and left.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("module", "number", "code", "said"),
    [
        ("typer", signal.SIGINT, 130, "interrupted"),
        ("typer", signal.SIGTERM, 143, "terminated"),
        ("torch", signal.SIGINT, 130, "interrupted"),
        ("torch", signal.SIGTERM, 143, "terminated"),
        ("torch", signal.SIGUSR1, 143, "terminated"),
    ],
)
def test_a_signal_while_something_is_imported(module: str, number: int, code: int, said: str, tmp_path: Path) -> None:
    """One line and the code of the signal, also where the module loses the exception, as extensions do: it once left half a module."""
    swallows = f"import os, time\ntry:\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(5)\nexcept BaseException:\n    pass\n"
    (tmp_path / f"{module}.py").write_text(swallows)
    ended = start("train", TINY, "--run-dir", str(tmp_path / "run"), env={**QUIET, "PYTHONPATH": str(tmp_path)})
    out, err = ended.communicate(timeout=60)
    assert (ended.returncode, err) == (code, f"{said}: nothing was saved after the last checkpoint\n"), (out, err)


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As of a job in a shell's background, which Ctrl-C in that terminal does not mean."""
    lines = "import signal; from dist_llm.cli.signals import end_on_signals; end_on_signals(); print(signal.getsignal(signal.SIGINT).name)"
    ignored = (
        f"import signal, sys, os; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, [sys.executable, '-c', {lines!r}])"
    )
    done = subprocess.run([sys.executable, "-c", ignored], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.strip() == "SIG_IGN", done.stderr


# --- train -----------------------------------------------------------------------------------------------------------------


def test_short_flags_are_overrides() -> None:
    given = {"layout": "dp=2,tp=2", "schedule.steps": 3, "save.dir": "a: b", "runtime.dtype": None}
    assert short_overrides(given, None) == ["layout=dp=2,tp=2", "schedule.steps=3", 'save.dir="a: b"']
    assert short_overrides({}, "my/*.txt") == ['data.source="my/*.txt"', "data.mix=null"]


def test_under_torchrun_a_failure_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def tellers(failure: Failure) -> list[tuple[int, int]]:
        return [(rank, rank % 2) for rank in range(4) if told_by(failure, rank=rank, local_rank=rank % 2)]

    for kind in (UsageError, CheckpointError, NumericError, PeerError):
        assert tellers(kind("x")) == [(0, 0)], "all ranks meet it alike"
    assert tellers(DataError("x")) == [(0, 0), (2, 0)], "once a machine"
    assert len(tellers(MemoryFailure("x"))) == 4, "each rank has its own"
    assert [rank for rank in range(4) if told_by(PeerError("rank 0 hangs"), rank=rank, local_rank=rank, teller=1)] == [1]
    where = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    assert torchrun_place() == Place(3, 4, 1, Meeting("here", 29500, served=False, attempt=0))
    for name, value in (("RANK", "4"), ("WORLD_SIZE", "many"), ("MASTER_PORT", "0")):
        with monkeypatch.context() as patch, pytest.raises(UsageError):
            patch.setenv(name, value)
            torchrun_place()
    monkeypatch.delenv("LOCAL_RANK")
    assert torchrun_place() is None


@pytest.fixture(scope="module")
def trained(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two ranks by the command, and what it showed."""
    home = tmp_path_factory.mktemp("cli")
    words = ["--steps", "3", "--run-dir", str(home / "run"), f"data.dir={home / 'data'}", "data.max_tokens=20_000", "--nproc", "2"]
    done = commands.run("train", TINY, *words, "track.sample_every=3", "--save-every", "2")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return home, done.stdout


def test_train_shows_and_leaves(commands: Commands, trained: tuple[Path, str]) -> None:
    home, shown = trained
    lines = shown.splitlines()
    assert lines[0].startswith("llama: 31,424 parameters") and lines[1] == "2 ranks = dp 2 x pp 1 x cp 1 x tp 1"
    for word in ("step 1/3", "step 3/3", "validation at step 3", "sample at step 0", "report ", "checkpoint ", "saved "):
        assert word in shown, shown
    assert lines[-1].startswith("next        dist-llm sample ")
    run = home / "run"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "samples.jsonl", "report.html", "checkpoints", "logs"}
    assert "<html" in (run / "report.html").read_text()[:2000].lower() and not (run / ".weights").exists()
    assert commands.run("check", str(run / "config.yaml"), "--world", "2").returncode == 0, "the resolved config is a config"


def test_a_second_run_needs_a_word(commands: Commands, trained: tuple[Path, str]) -> None:
    home, _ = trained
    words = ["train", str(home / "run/config.yaml")]
    again = commands.run(*words)
    assert again.returncode == 2 and "already holds a run" in again.stderr and "--resume auto" in again.stderr
    on = commands.run(*words, "--resume", "auto", "--steps", "4", "--layout", "tp=2")
    assert on.returncode == 0 and "going on from step 3" in on.stdout and "step 4/4" in on.stdout, on.stderr
    steps = [json.loads(line)["step"] for line in (home / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_sample_and_verify(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    run = str(trained[0] / "run")
    texts = []
    for seed in ("1", "1", "2"):
        assert cli.run(["sample", run, "--prompt", "Question: ", "--tokens", "20", "--seed", seed, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["prompt"] == "Question: " and answer["checkpoint"].startswith(run) and 1 <= len(answer["tokens"]) <= 20
        texts.append(answer["text"])
    assert texts[0] == texts[1] != texts[2]
    assert cli.run(["sample", run, "--prompt", "a\x1b[2J", "--tokens", "5"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("a?[2J") and "\x1b" not in shown
    assert cli.run(["verify", run, "--json"]) == 0 and json.loads(capsys.readouterr().out)["files"] == 6
    newest = sorted((Path(run) / "checkpoints").glob("step-*"))[-1]
    spoilt = newest / "rank-00000.safetensors"
    content = spoilt.read_bytes()
    try:
        spoilt.write_bytes(content[:-1] + b"!")
        for words in (["verify", run], ["sample", run]):
            assert "xxh128" in refused(capsys, *words, code=4)
    finally:
        spoilt.write_bytes(content)


def test_an_interrupt_leaves_nothing_behind(trained: tuple[Path, str], tmp_path: Path) -> None:
    """Ctrl-C; what SIGTERM does is in test_faults."""
    words = ["--nproc", "2", "--steps", "100000", "--run-dir", str(tmp_path), f"data.dir={trained[0] / 'data'}", "data.max_tokens=20_000"]
    process = start("train", TINY, *words)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 130 and len(err.splitlines()) == 1 and "Traceback" not in err, err
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_failure_of_a_rank_is_told_once(commands: Commands, trained: tuple[Path, str], tmp_path: Path) -> None:
    words = [f"data.dir={trained[0] / 'data'}", "data.max_tokens=20_000", "--nproc", "2", "--run-dir", str(tmp_path)]
    done = commands.run("train", TINY, *words, "optimizer.lr=1e30", "optimizer.clip=null")
    assert done.returncode == 6 and done.stderr.count("error:") == 1 and "not finite" in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "logs/rank-0.log").read_text(), "the traceback is kept"
    assert not list((tmp_path / "checkpoints").glob("*")) if (tmp_path / "checkpoints").exists() else True
    few = commands.run("train", TINY, *words[:1], "data.max_tokens=300", "--run-dir", str(tmp_path / "few"))
    assert few.returncode == 3 and "too little text" in few.stderr


def test_torchrun(trained: tuple[Path, str], tmp_path: Path) -> None:
    """The same run as with --nproc, to the bit, and one failure block."""
    home, _ = trained
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "dist_llm", "train", TINY]
    words = ["--steps", "3", "--run-dir", str(tmp_path / "run"), f"data.dir={home / 'data'}", "data.max_tokens=20_000"]
    done = subprocess.run([*launch, *words], cwd=ROOT, env=QUIET, text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.count("step 3/3") == 1, done.stderr
    losses = [
        [json.loads(line)["loss_hex"] for line in (path / "metrics.jsonl").read_text().splitlines()][:3]
        for path in (home / "run", tmp_path / "run")
    ]
    assert losses[0] == losses[1]


# --- what is wrong with the words of a command -----------------------------------------------------------------------------

VERBS_WITH_FLAGS = [[name] for name, (_, held, _) in cli.VERBS.items() if held != "app"]
VERBS_WITH_FLAGS += [["data", "build"], ["data", "preview"], ["data", "export"], ["tokenizer", "train"], ["tokenizer", "report"]]


def flags_of(verb: list[str]) -> dict[str, tuple[Any, bool]]:
    """Each flag of a verb: its type as typer has it, and whether it needs a value."""
    command = typer.main.get_command(cli.app)
    with command.make_context("dist-llm", [*verb], resilient_parsing=True) as context:
        for name in verb:
            command = command.get_command(context, name)
    return {one.opts[0]: (one, not getattr(one, "is_flag", False)) for one in command.params if one.opts[0].startswith("--")}


@pytest.mark.parametrize("verb", VERBS_WITH_FLAGS, ids=" ".join)
def test_every_flag_says_what_it_takes(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A value that is no number, a missing value, a value too much, an unknown flag: in our words, with the verb and the flag."""
    name, tried = " ".join(["dist-llm", *verb]), 0
    for flag, (_, takes) in flags_of(verb).items():
        if flag == "--help":
            continue
        if not takes:
            err = refused(capsys, *verb, "x", f"{flag}=3")
            assert f"error: {flag} takes no value" in err and f"where:    {name}" in err
            continue
        err = refused(capsys, *verb, flag)
        assert f"error: {flag} needs a value" in err and f"next:     {name} --help" in err
        code = cli.run([*verb, "x", "y", f"{flag}=?x"])
        err = capsys.readouterr().err
        if "a value that cannot be taken" in err:
            assert code == 2 and f"where:    {name} {flag}" in err and "found:    ?x" in err and "number" in err.split("expected:")[1]
            tried += 1
        assert not any(word in err for word in ("Input should", "Invalid value", "valid integer", "Traceback")), err
    err = refused(capsys, *verb, "--no-such-flag")
    assert "there is no such flag" in err and "--no-such-flag" in err and f"where:    {name}" in err


def test_bounds_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected, found in (
        (("check", "x", "--world", "0"), "at least 1", "0"),
        (("data", "preview", "x", "--rows", "1.5"), "a whole number", "1.5"),
        (("tokenizer", "train", "skills", "--out", "x", "--megabytes", "1e99"), "at most 4096", "1e99"),
        (("train", "x", "--nproc", "\x1b[31m"), "a whole number", "?[31m"),
    ):
        err = refused(capsys, *words)
        assert f"expected: {expected}\n" in err and f"found:    {found}\n" in err and "\x1b" not in err


def test_the_command_that_goes_on_is_one(tmp_path: Path, commands: Commands) -> None:
    """`next` of a run folder in use is the very command, with what was typed."""
    (tmp_path / "run/checkpoints/step-00000003").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000003/COMMIT").write_text("x")
    words = ["train", TINY, "--run-dir", str(tmp_path / "run"), "--steps", "5", "optimizer.lr=0.1"]
    done = commands.run(*words)
    assert done.returncode == 2 and f"next:     dist-llm {' '.join(words)} --resume auto\n" in done.stderr


def test_tensors_that_differ_are_said_in_words() -> None:
    from dist_llm.train.run import _other_tensors

    here, there = {"a": (2, 3), "b": (4,)}, {"a": (2, 3), "b": (5,)}
    assert _other_tensors(here, there) == "b has shape (5,) in the checkpoint, (4,) here"
    assert _other_tensors(here, {"a": (2, 3)}) == "the checkpoint has no b, of shape (4,) here"
    assert _other_tensors({"a": (2, 3)}, here) == "the checkpoint has b, which this model has not"
    assert _other_tensors(here, {"c": (1,)}) == "the checkpoint has no a, of shape (2, 3) here; 2 more tensors differ"


# --- logs ------------------------------------------------------------------------------------------------------------------


def in_the_place_of(log: Path, kind: str) -> Path:
    """Something else where a log belongs; the file that must stay as it is."""
    other = log.parent / "other"
    log.parent.mkdir(parents=True, exist_ok=True)
    other.write_text("mine")
    if kind == "pipe":
        os.mkfifo(log)
    elif kind == "folder":
        log.mkdir()
    else:
        log.symlink_to({"link": other, "dangling link": log.parent / "nowhere", "link to a device": Path("/dev/full")}[kind])
    return other


@pytest.mark.parametrize("kind", ["link", "dangling link", "link to a device", "pipe", "folder"])
def test_a_log_is_a_file(tmp_path: Path, kind: str) -> None:
    from dist_llm import flight
    from dist_llm.cli.torchrun import keep_traceback
    from dist_llm.errors import SpaceError
    from dist_llm.ranks import open_log

    log = tmp_path / "rank-0.log"
    other = in_the_place_of(log, kind)
    with pytest.raises(SpaceError) as caught:
        open_log(log)
    assert caught.value.code == 7 and caught.value.where == str(log) and caught.value.next == f"remove {log}"
    keep_traceback(ValueError("x"), log)  # of torchrun's ranks: it goes without
    with pytest.raises(OSError):
        flight.make_file(log)
    assert other.read_text() == "mine" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(("kind", "rank"), [("link", 1), ("pipe", 0)])
def test_a_log_is_never_written_through_a_link(tmp_path: Path, commands: Commands, kind: str, rank: int) -> None:
    log = tmp_path / "run/logs" / f"rank-{rank}.log"
    other = in_the_place_of(log, kind)
    words = ["data.source=skills", "data.max_tokens=20_000", f"data.dir={tmp_path}/data", "runtime.device=cpu", "schedule.warmup=0"]
    words += ["--steps", "1", "--layout", "dp=2", "--run-dir", str(tmp_path / "run")]
    done = commands.run("train", TINY, *words)
    assert done.returncode == 7 and done.stderr.count("error:") == 1, done.stderr
    assert "a log of the run cannot be written" in done.stderr and str(log) in done.stderr and "Traceback" not in done.stderr
    assert other.read_text() == "mine"


def test_traces_go_through_no_link(tmp_path: Path) -> None:
    import torch

    from dist_llm.train.profile import Profile

    (tmp_path / "other").write_text("mine")
    (tmp_path / "trace-rank-0.json").symlink_to(tmp_path / "other")
    profile = Profile((1, 1), folder=tmp_path, rank=0, device=torch.device("cpu"))
    profile.watching = SimpleNamespace(stop=lambda: None, export_chrome_trace=lambda path: Path(path).write_text("trace"))
    profile._write()
    assert (tmp_path / "other").read_text() == "mine" and (tmp_path / "trace-rank-0.json").read_text() == "trace"
