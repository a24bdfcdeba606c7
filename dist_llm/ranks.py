"""Local ranks: starts them, listens to them, and ends them together.

Ranks are forked from a process that has imported torch but run no operator (59 ms for two ranks; a spawn imports
torch anew, about 2 s each). They meet through a file store in memory that has no name, so no port is opened and nothing
is left of it, however they end. Each sends its result, or the failure that stopped it, as one JSON line; when one fails
the others are stopped, and the parent raises that failure once. A rank dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import resource
import selectors
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_llm import flight, stop
from dist_llm.errors import Code, Failure, MemoryFailure, PeerError, SpaceError, from_dict
from dist_llm.watch import Watchdog, place_of

GRACE_SECONDS = 2.0  # between the first failure and the end of the other ranks
PR_SET_PDEATHSIG = 1
# What gloo and NCCL say of a rank that is gone or does not come.
LOST = (
    *("Connection closed by peer", "Connection closed by remote peer", "Connection reset", "Broken pipe"),
    *("Timed out waiting", "Socket Timeout", "Application timeout", "ncclRemoteError"),
)


def run_ranks(
    world: int,
    work: Callable[..., Any],
    *arguments: Any,
    backend: str = "gloo",
    timeout_seconds: float = 600.0,
    log_dir: Path | None = None,
    on_message: Callable[[int, Any], None] | None = None,
    note: Callable[[str], None] | None = None,
    stoppable: bool = False,
) -> list[Any]:
    """Runs `work(rank, world, say, *arguments)` on `world` forked ranks; returns their JSON results in rank order.

    `say(value)` sends a JSON value to `on_message(rank, value)` here. log_dir: what the ranks print to stderr goes to
    `rank-N.log` there. note: hears of a rank that is slow. stoppable: a wish to stop (stop.py) that this process gets goes to the ranks.
    Raises the first rank's Failure; PeerError (exit 5) for a rank that died without a word, or hangs, or is stopped for timeout_seconds;
    MemoryFailure (exit 8) when it was killed as the kernel does when memory is short.
    """
    import torch.fx.experimental.symbolic_shapes  # noqa: F401  the first backward imports it (0.9 s): once here, not in every rank

    if log_dir is not None:  # told here: a rank that has no log would tell it to the terminal
        for rank in range(world):
            os.close(open_log(log_dir / f"rank-{rank}.log"))
    sys.stdout.flush()
    sys.stderr.flush()
    meeting = os.memfd_create("dist-llm-store")  # every rank has inherited it, and opens it by its number
    place = {"world": world, "backend": backend, "timeout_seconds": timeout_seconds, "store_path": f"/proc/self/fd/{meeting}"}
    children: dict[int, tuple[int, int]] = {}  # rank -> (pid, read end of its pipe)
    records = [flight.make() for _ in range(world)]
    watchdog = Watchdog(records, timeout_seconds=timeout_seconds, logs=log_dir, note=note)
    kills = memory_kills()
    try:
        with _handing_on(stop.SIGNALS if stoppable else (), children):
            for rank in range(world):
                (read, write), (noted, noting) = os.pipe(), os.pipe()
                pid = os.fork()
                if pid == 0:
                    os.close(read)
                    os.close(noting)
                    os.read(noted, 1)  # ends when its record is begun: one that is stopped in its first moment is known
                    os.close(noted)
                    flight.start(records[rank], rank=rank, pid=os.getpid())
                    if stoppable:
                        stop.listen()
                    _child(rank, write, place, log_dir, work, arguments)
                flight.Flight(records[rank], rank=rank, pid=pid)
                for end in (write, noted, noting):
                    os.close(end)
                children[rank] = (pid, read)
            if stoppable and stop.asked():  # before there was anyone to hand it on to
                os.kill(os.getpid(), stop.SIGNALS[0])
            return _Listener(children, log_dir, on_message, kills, watchdog).listen()
    finally:
        os.close(meeting)
        for pid, read in children.values():
            _end(pid)
            os.close(read)


def open_log(path: Path) -> int:
    """A file to append to, as a descriptor. Raises SpaceError for a link, a pipe or a device: a log is never written through one."""
    what, way = "a log of the run cannot be written", f"remove {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        found = "a link" if path.is_symlink() else error.strerror or str(error)
        raise SpaceError(what, where=str(path), expected="a file", found=found, next=way) from None
    if stat.S_ISREG(os.fstat(log).st_mode):
        return log
    os.close(log)
    raise SpaceError(what, where=str(path), expected="a file", found="a pipe or a device", next=way)


def stacks_into(log: int) -> None:
    """From now on this process writes the stacks of its threads to a descriptor when it is asked to: when ranks hang (watch.py)."""
    faulthandler.register(signal.SIGUSR2, file=log, all_threads=True)


class _Log(io.FileIO):
    """The stderr of a rank: what finds no room on the disk is lost, and changes nothing else."""

    def write(self, data: Any) -> int:
        """Writes what can be written."""
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


@contextlib.contextmanager
def _handing_on(signals: tuple[signal.Signals, ...], children: dict[int, tuple[int, int]]) -> Iterator[None]:
    """Inside, signals of these numbers to this process go to every rank."""
    owner = os.getpid()

    def hand_on(number: int, frame: Any) -> None:
        stop.ask()
        if os.getpid() != owner:  # a rank that has just been forked
            return
        for pid, _ in children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, hand_on) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _child(rank: int, write: int, place: dict[str, Any], log_dir: Path | None, work: Callable, arguments: tuple) -> None:
    """The life of one rank; never returns."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(Code.PEER)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and ends us

    def say(value: Any, kind: str = "message") -> None:
        _send_all(write, json.dumps({kind: value}).encode() + b"\n")

    sys.stderr = io.TextIOWrapper(_Log(2, "w", closefd=False), errors="backslashreplace", write_through=True)
    code: int = Code.DONE
    try:
        if log_dir is not None:
            log = open_log(log_dir / f"rank-{rank}.log")
            os.dup2(log, 2)
            stacks_into(log)
        from dist_llm import mesh

        if place["world"] > 1:
            mesh.connect(rank=rank, **place)
        _send_all(write, json.dumps({"result": work(rank, place["world"], say, *arguments)}).encode() + b"\n")
        mesh.disconnect()
    except BaseException as error:
        failure = error if isinstance(error, Failure) else known_failure(error) or _bug(error, rank)
        code = failure.code
        traceback.print_exc()
        say({**failure.as_dict(), "traceback": traceback.format_exc()}, "failure")
    finally:
        flight.leave(code)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def _bug(error: BaseException, rank: int) -> Failure:
    """An unknown exception as a failure."""
    found = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    return Failure("a bug in dist-llm, or a fault it does not know", where=f"rank {rank}", found=found)


def known_failure(error: BaseException) -> Failure | None:
    """The failure behind an exception of torch or the system, where it is a known one.

    Not every error of NCCL is a lost rank: only those that say so.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return MemoryFailure("out of memory", where=_here(), found=f"{text.splitlines()[0]}; {_peak()}")
    if isinstance(error, RuntimeError) and any(word in text for word in LOST):
        return PeerError("another rank was lost", where=_here(), found=text.splitlines()[0])
    return None


def _here() -> str | None:
    """Where this rank is, by its own record."""
    last = None if flight.current is None else flight.read(flight.current.buffer, calls=False)
    return None if last is None else place_of(last)


def _peak() -> str:
    """The most that this process has held so far."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated():,} bytes of the device at most so far"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024:,} bytes of memory at most so far"


def _send_all(write: int, data: bytes) -> None:
    """Writes all of it: a signal that comes while the pipe is full cuts a write short."""
    while data:
        data = data[os.write(write, data) :]


class _Listener:
    """Reads every rank's lines until all have answered or one has failed."""

    def __init__(
        self,
        children: dict[int, tuple[int, int]],
        log_dir: Path | None,
        on_message: Callable[[int, Any], None] | None,
        memory_kills: int,
        watchdog: Watchdog,
    ) -> None:
        self.children, self.log_dir, self.on_message, self.memory_kills = children, log_dir, on_message, memory_kills
        self.watchdog = watchdog
        self.buffers = dict.fromkeys(children, b"")
        self.results: dict[int, Any] = {}
        self.failures: list[tuple[int, dict]] = []
        self.lost: set[int] = set()  # ranks that ended without a word

    def listen(self) -> list[Any]:
        """The results in rank order; raises the most telling failure."""
        deadline = float("inf")
        with selectors.DefaultSelector() as selector:
            for rank, (_, read) in self.children.items():
                selector.register(read, selectors.EVENT_READ, rank)
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(timeout=0.2):
                    data = os.read(key.fd, 1 << 16)
                    if data:
                        self._take(key.data, data)
                    else:
                        selector.unregister(key.fd)
                        self._closed(key.data)
                if self.failures and deadline == float("inf"):
                    deadline = time.monotonic() + GRACE_SECONDS
                if not self.failures and (failure := self.watchdog.look()) is not None:
                    raise failure
        if self.failures:
            raise self._cause()
        return [self.results[rank] for rank in sorted(self.children)]

    def _take(self, rank: int, data: bytes) -> None:
        *lines, self.buffers[rank] = (self.buffers[rank] + data).split(b"\n")
        for line in lines:
            ((kind, value),) = json.loads(line).items()
            if kind == "result":
                self.results[rank] = value
            elif kind == "failure":
                self.failures.append((rank, value))
            elif self.on_message is not None:
                self.on_message(rank, value)

    def _closed(self, rank: int) -> None:
        """A pipe's end: fine after a result or a failure; otherwise the rank is lost."""
        if rank in self.results or any(rank == other for other, _ in self.failures):
            return
        _, status = os.waitpid(self.children[rank][0], 0)
        code = os.waitstatus_to_exitcode(status)
        found = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        kind: type[Failure] = MemoryFailure if found == "SIGKILL" and memory_kills() > self.memory_kills else PeerError
        what = "a rank died" if code else "a rank ended before its work was done"
        log = f"{self.log_dir}/rank-{rank}.log" if self.log_dir else None
        last = next((one for one in self.watchdog.snapshots() if one.rank == rank), None)
        where = place_of(last) if last is not None and last.step else f"rank {rank}"
        failure = kind(what, where=where, found=found, details=[f"its last words: {log}"] if log else None)
        self.failures.append((rank, failure.as_dict()))
        self.lost.add(rank)

    def _cause(self) -> Failure:
        """The failure that came first; one that only reports a lost peer gives way to the peer's own."""
        own = [item for item in self.failures if item[1]["code"] != Code.PEER or item[0] in self.lost]
        rank, message = (own or self.failures)[0]
        if message["code"] == Code.BUG and (differing := self.watchdog.mismatch()) is not None:  # what the backend says of it is no help
            return differing
        if not own and (explained := self.watchdog.explain()) is not None:
            return explained
        failure = from_dict(message)
        failure.where = failure.where or f"rank {rank}"
        if failure.code == Code.BUG:
            failure.safe = failure.safe or (f"the traceback is in {self.log_dir}/rank-{rank}.log" if self.log_dir else None)
            failure.__notes__ = [message.get("traceback", "")]
        return failure


def memory_kills(root: Path = Path("/")) -> int:
    """How many processes the kernel has killed for want of memory: of this control group, else of the machine; 0 where it does not say."""
    for path in (*_counts_of_control_group(root), root / "proc/vmstat"):
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _counts_of_control_group(root: Path) -> Iterator[Path]:
    """Where the kernel may count the kills of this process's control group, version 2 and 1, the most telling first."""
    mounted = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                yield mounted / group.lstrip("/") / "memory.events"
            elif "memory" in controllers.split(","):
                yield mounted / "memory" / group.lstrip("/") / "memory.oom_control"
    yield mounted / "memory.events"  # a container may see its own group here, and not under the name that it has outside
    yield mounted / "memory/memory.oom_control"


def _end(pid: int) -> None:
    """Stops a rank and takes its exit status, so that nothing is left behind."""
    try:
        if os.waitpid(pid, os.WNOHANG)[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    except (ChildProcessError, ProcessLookupError):
        pass
