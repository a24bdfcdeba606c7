"""Local ranks: results, the one failure that counts, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dist_llm.errors import Code, DataError, Failure, MemoryFailure, PeerError
from dist_llm.ranks import known_failure, memory_kills, run_ranks
from tests.commands import Commands, Job
from tests.ranks import Ranks


def traces(folder: Path, world: int, seconds: float = 20.0) -> list[dict[str, Any]]:
    """What `cases.leave_traces` wrote, once all ranks have."""
    files = [folder / f"{rank}.json" for rank in range(world)]
    end = time.monotonic() + seconds
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, "the ranks did not start"
        time.sleep(0.02)
    return [json.loads(file.read_text()) for file in files]


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def nothing_left(folder: Path, world: int) -> None:
    """No process of the ranks, and no meeting place: it never had a name on any file system."""
    for trace in traces(folder, world):
        assert not running(trace["pid"])
        assert not trace["store"] or trace["store"].startswith("/proc/self/fd/")


def fail(
    ranks: Ranks, folder: Path, how: str, *, world: int = 3, who: int = 1, others: str = "collective", timeout: float = 60.0
) -> Failure:
    """The failure of a world in which rank `who` ends as `how` says."""
    start = time.monotonic()
    with pytest.raises(Failure) as caught:
        ranks.run(world, "tests.cases:rank_dies", str(folder), how, who, others, timeout_seconds=timeout)
    assert time.monotonic() - start < 15, "the others were not stopped"
    nothing_left(folder, world)
    return caught.value


@pytest.mark.parametrize("others", ["collective", "compute"])
@pytest.mark.parametrize("who", [0, 2])
def test_a_failure_arrives_whole_and_stops_the_others(ranks: Ranks, tmp_path: Path, others: str, who: int) -> None:
    failure = fail(ranks, tmp_path, "failure", who=who, others=others)
    assert type(failure) is DataError and failure.code == Code.DATA
    assert (failure.what, failure.where, failure.found, failure.next) == ("line 7 is no JSON", "a.jsonl:7", "{", "look at it")
    assert failure.details[:2] == ["one", "two"]


def test_a_killed_rank_is_named_with_its_signal(ranks: Ranks, tmp_path: Path) -> None:
    """Not the peers, which only noticed that their connection closed."""
    failure = fail(ranks, tmp_path, "kill", who=1)
    assert type(failure) is PeerError and failure.code == Code.PEER
    assert (failure.where, failure.found) == ("rank 1", "SIGKILL")


def test_a_rank_that_leaves_without_a_word_is_named(ranks: Ranks, tmp_path: Path) -> None:
    failure = fail(ranks, tmp_path, "exit", who=0, others="compute")
    assert type(failure) is PeerError and (failure.where, failure.found) == ("rank 0", "exit code 3")


def test_a_rank_that_leaves_with_code_0_has_not_died(ranks: Ranks, tmp_path: Path) -> None:
    failure = fail(ranks, tmp_path, "leave", who=1)
    assert type(failure) is PeerError and failure.what == "a rank ended before its work was done"
    assert (failure.where, failure.found) == ("rank 1", "exit code 0")


def test_an_unknown_error_is_our_bug_with_a_traceback(ranks: Ranks, tmp_path: Path) -> None:
    failure = fail(ranks, tmp_path, "error")
    assert type(failure) is Failure and failure.code == Code.BUG
    assert failure.where == "rank 1" and failure.found == "ZeroDivisionError: seven over nothing"
    assert "rank_dies" in "\n".join(failure.details)


def test_a_result_that_is_no_json_is_our_bug(ranks: Ranks, tmp_path: Path) -> None:
    failure = fail(ranks, tmp_path, "not json")
    assert failure.code == Code.BUG and "not JSON serializable" in str(failure.found)


def test_memory_that_is_short_has_its_own_code(ranks: Ranks, tmp_path: Path) -> None:
    assert type(fail(ranks, tmp_path, "memory")) is MemoryFailure


@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("0::/job/7", "sys/fs/cgroup/job/7/memory.events"),
        ("5:cpu,memory:/job\n0::/", "sys/fs/cgroup/memory/job/memory.oom_control"),
        ("0::/seen/from/outside", "sys/fs/cgroup/memory.events"),
        ("4:memory:/seen/from/outside", "sys/fs/cgroup/memory/memory.oom_control"),
        ("4:cpu,memoryless:/job", "proc/vmstat"),
        (None, "proc/vmstat"),
    ],
)
def test_where_the_kernel_counts_its_kills(tmp_path: Path, group: str | None, file: str) -> None:
    """In the group of this process, of control groups of both versions and in containers; else on the whole machine (F31)."""
    assert memory_kills(tmp_path) == 0
    written = {"proc/vmstat": "pgfault 12\noom_kill 9\n", "sys/fs/cgroup/memory/job/memory.stat": "oom_kill 8\n"}
    written[file] = "under_oom 0\noom 5\noom_kill 3\noom_group_kill 4\n"
    if group is not None:
        written["proc/self/cgroup"] = group + "\n"
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_kills(tmp_path) == 3
    (tmp_path / file).write_text("oom_kill_disable 0\nunder_oom 0\n")  # of an older kernel
    assert memory_kills(tmp_path) == (0 if file == "proc/vmstat" else 9)


def test_a_kill_of_the_kernel_is_a_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([3, 4])
    monkeypatch.setattr("dist_llm.ranks.memory_kills", lambda: next(counts))
    with pytest.raises(MemoryFailure, match="a rank died") as caught:
        run_ranks(1, killed)
    assert (caught.value.where, caught.value.found) == ("rank 0", "SIGKILL")


def killed(rank: int, world: int, say: Any) -> None:
    """A rank that is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_only_what_says_that_a_rank_is_gone_is_a_lost_rank() -> None:
    """NCCL reports its own misuse and failures of the device in the same words."""
    lost = "NCCL error in: x.cpp:77, remote process exited or there was a network error, NCCL version 2.27\nncclRemoteError: A call failed"
    assert type(known_failure(RuntimeError(lost))) is PeerError
    assert type(known_failure(RuntimeError("[1] Connection closed by peer [127.0.0.1]:1"))) is PeerError
    for text in (
        "NCCL error in: x.cpp:77, invalid usage (run with NCCL_DEBUG=WARN for details)\nncclInvalidUsage: Duplicate GPU detected",
        "NCCL error in: x.cpp:77, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.",
    ):
        assert known_failure(RuntimeError(text)) is None
    assert type(known_failure(RuntimeError("NCCL error in: x.cpp:77\nFailed to CUDA calloc: out of memory"))) is MemoryFailure


def test_a_rank_that_hangs_ends_in_the_timeout(ranks: Ranks, tmp_path: Path) -> None:
    """Rank 1 never comes to the collective: its peers give up after the timeout, and rank 1 is stopped."""
    start = time.monotonic()
    failure = fail(ranks, tmp_path, "sleep", timeout=1.0)
    assert type(failure) is PeerError and time.monotonic() - start < 1.0 + 5.0


def test_the_harness_works_after_every_failure(ranks: Ranks) -> None:
    assert ranks.run(2, "tests.cases:gathered_json")[0][1] == [{"rank": 0}, {"rank": 1}]


def start(commands: Commands, work: str, folder: Path, world: int) -> Job:
    """A launcher in a process of its own."""
    return commands.start(work, str(folder), str(world), str(folder / "logs"), main="tests.cases:launch")


def test_results_messages_and_logs(commands: Commands, tmp_path: Path) -> None:
    answer = json.loads(start(commands, "rank_returns", tmp_path, 3).wait().stdout)
    assert [result["rank"] for result in answer["results"]] == [0, 1, 2]
    assert all(len(result["large"]) == 300_000 for result in answer["results"])
    assert answer["results"][2]["numbers"] == [2 / 3, float("inf")]
    for rank in range(3):
        assert [value for sender, value in answer["heard"] if sender == rank] == [{"rank": rank, "turn": turn} for turn in range(3)]
        assert f"a word from rank {rank}" in (tmp_path / "logs" / f"rank-{rank}.log").read_text()
    nothing_left(tmp_path, 3)


@pytest.mark.parametrize("world", [1, 2])
def test_a_log_without_room_changes_nothing_that_is_told(commands: Commands, tmp_path: Path, world: int) -> None:
    """The traceback that found no room in the log once took the place of the failure, and left "exit code 0" as all there was to tell."""
    told = json.loads(start(commands, "rank_without_room", tmp_path, world).wait().stdout)["failure"]
    assert told["code"] == Code.SPACE and told["where"] == "metrics.jsonl" and told["found"] == "No space left on device"
    assert (tmp_path / "logs/rank-0.log").read_text() == ""


def test_a_signal_cuts_no_message(commands: Commands, tmp_path: Path) -> None:
    """As SIGTERM may, while a rank tells the launcher of a long sample."""
    answer = json.loads(start(commands, "rank_says_much", tmp_path, 1).wait().stdout)
    assert [(value["turn"], len(value["text"])) for _, value in answer["heard"]] == [(turn, 1_000_000) for turn in range(20)]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_ranks_end_with_their_parent(commands: Commands, tmp_path: Path, sign: signal.Signals) -> None:
    job = start(commands, "rank_waits", tmp_path, 2)
    known = traces(tmp_path, 2)
    job.send(sign)
    out = job.wait(timeout=20).stdout
    end = time.monotonic() + 5
    while any(running(trace["pid"]) for trace in known):
        assert time.monotonic() < end, "a rank outlived its parent"
        time.sleep(0.02)
    assert out.strip() == ("interrupted" if sign == signal.SIGINT else "")
    nothing_left(tmp_path, 2)


def test_a_rank_that_is_stopped_in_its_first_moment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it has written a word of its own: whoever waits knows its process from the fork on (F9)."""
    fork = os.fork

    def stopped() -> int:
        if (pid := fork()) == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        return pid

    monkeypatch.setattr("dist_llm.ranks.os.fork", stopped)
    began = time.monotonic()
    with pytest.raises(PeerError, match="rank 0 hangs"):
        run_ranks(1, lambda rank, world, say: None, timeout_seconds=0.5)
    assert time.monotonic() - began < 20
