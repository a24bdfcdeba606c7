"""The command line in milliseconds: a helper process imports torch and our command once, and forks a process for every command.

The forked process is as a user's: own session, own output, `sys.argv`, `main()` and its exit code. Tests of imports and of the first
start use a real `python -m dist_llm` instead.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MAIN = "dist_llm.__main__:main"


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


class Job:
    """A command that runs; its process leads a session of its own."""

    def __init__(self, commands: Commands, pid: int, out: Path, err: Path) -> None:
        self.commands, self.pid, self.out, self.err = commands, pid, out, err

    def send(self, number: int) -> None:
        """Sends a signal to its process."""
        os.kill(self.pid, number)

    def wait(self, *, timeout: float = 120.0) -> Result:
        """Waits until it has ended; raises TimeoutError, with everything of it killed."""
        code = self.commands.ask({"wait": self.pid, "timeout": timeout})["code"]
        if code is None:
            for pid in self.left():
                os.kill(pid, signal.SIGKILL)
            raise TimeoutError(f"{self.out.read_text()}\n{self.err.read_text()}")
        return Result(code, self.out.read_text(), self.err.read_text())

    @property
    def running(self) -> bool:
        """Whether its own process lives."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[0] not in (b"Z", b"X")
        except OSError:
            return False

    def ranks(self) -> list[int]:
        """The processes that it has forked, oldest first."""
        return [pid for pid in self.left() if pid != self.pid]

    def left(self) -> list[int]:
        """The living processes of its session."""
        found = []
        for place in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = place.read_bytes().rsplit(b")", 1)[1].split()[:4]
            except (OSError, ValueError):
                continue
            if int(session) == self.pid and state not in (b"Z", b"X"):
                found.append(int(place.parent.name))
        return sorted(found)


class Commands:
    """The helper process."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, cwd=ROOT, **pipes)
        self.folder = tempfile.TemporaryDirectory(prefix="dist-llm-commands-")
        self.count = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request to the helper, and its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, *words: str, stdin: str | Path = os.devnull, main: str = MAIN, **environment: str) -> Job:
        """Starts `dist-llm WORDS` with these variables besides. stdin: the path of what it reads; a terminal becomes its own.

        main: another `module:function` in the place of the command.
        """
        self.count += 1
        out, err = (Path(self.folder.name) / f"{self.count}.{name}" for name in ("out", "err"))
        for path in (out, err):
            path.touch()
        request = {"main": main, "words": words, "environment": environment, "stdin": str(stdin), "out": str(out), "err": str(err)}
        answer = self.ask(request)
        return Job(self, answer["pid"], out, err)

    def run(self, *words: str, timeout: float = 120.0, stdin: str | Path = os.devnull, **environment: str) -> Result:
        """`start` and `wait`."""
        return self.start(*words, stdin=stdin, **environment).wait(timeout=timeout)

    def prepare(self, work: str) -> None:
        """Calls `module:function` in the helper: what it imports, no command that is forked later imports again."""
        self.ask({"prepare": work})

    def close(self) -> None:
        """Ends the helper."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.folder.cleanup()


def serve() -> None:
    """The helper: reads requests from stdin, one a line, and answers each on its own stdout line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT))
    import numpy.ma  # noqa: F401  the first order of samples asks for it
    import torch.fx.experimental.symbolic_shapes  # noqa: F401

    import dist_llm.__main__
    import dist_llm.cli.main  # noqa: F401  as a command does once it hears signals
    import dist_llm.report.page
    import dist_llm.train.run  # noqa: F401  imports torch and everything a run uses

    for verb in pkgutil.iter_modules(dist_llm.cli.__path__):
        importlib.import_module(f"dist_llm.cli.{verb.name}")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer: dict[str, Any] = {"code": ended(request["wait"], request["timeout"])}
        elif "prepare" in request:
            named(request["prepare"])()
            answer = {}
        else:
            pid = os.fork()
            if pid == 0:
                become(request)
            answer = {"pid": pid}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # to take all that was imported apart would take a second


def ended(pid: int, timeout: float) -> int | None:
    """The exit code of a child, as the shell has it; None when it still runs after the time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.005)
    return None


def named(work: str) -> Callable[[], None]:
    """The function of `module:function`."""
    module, function = work.split(":")
    return getattr(importlib.import_module(module), function)


def become(request: dict[str, Any]) -> None:
    """Turns a forked process into the command; never returns."""
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for place, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(request[place], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
        os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.update(request["environment"])
        sys.argv = ["dist-llm", *request["words"]]
        named(request["main"])()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
