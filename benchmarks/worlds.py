"""Rivals alive at once: each in ranks of its own, all waiting on a line from the conductor, which lets them step in turn.

A rival has processes to itself, so that nobody runs under another's allocator settings, imports or monkey patches, and
its memory can be read off its own ranks. They are forked from one light process; a rival that fails ends alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_llm.errors import Failure, PeerError, from_dict
from dist_llm.ranks import PR_SET_PDEATHSIG, run_ranks

PATIENCE = 240.0  # seconds until a silent rank is given up


class World:
    """One rival's ranks. `ask` sends them all a request and returns their answers in rank order."""

    def __init__(self, world: int, work: Callable[..., Callable[[dict], Any]], *arguments: Any) -> None:
        """Forks the ranks; each makes its `answer(request)` by `work(rank, world, *arguments)` and serves."""
        self.ends: list[socket.socket] = []
        self.logs = Path(tempfile.mkdtemp(prefix="dist-llm-bench-"))
        theirs, (self.report, report) = [], os.pipe()
        for _ in range(world):
            mine, its = socket.socketpair()
            mine.settimeout(PATIENCE)
            self.ends.append(mine)
            theirs.append(its)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for end in self.ends:
                end.close()
            _manage(world, theirs, report, self.logs, work, arguments)
        for its in theirs:
            its.close()
        os.close(report)
        self.lines = [end.makefile("r", encoding="utf-8") for end in self.ends]

    def ask(self, request: dict[str, Any]) -> list[Any]:
        """Every rank's answer; raises the Failure that stopped the world."""
        try:
            for end in self.ends:
                end.sendall(json.dumps(request).encode() + b"\n")
            texts = [lines.readline() for lines in self.lines]
        except TimeoutError as error:
            raise PeerError("a rival does not answer", where=str(request), found=f"silent for {PATIENCE:g} s") from error
        except (BrokenPipeError, ConnectionResetError):
            texts = [""]
        if not all(texts):
            raise self._failure()
        return [json.loads(text) for text in texts]

    def _failure(self) -> Failure:
        """What the ranks' launcher told before it ended."""
        with os.fdopen(os.dup(self.report)) as file:
            told = file.read()
        return from_dict(json.loads(told)) if told else PeerError("a rival's ranks died", where=str(self.logs))

    def close(self) -> None:
        """Ends the ranks: the launcher's death is theirs."""
        for end, lines in zip(self.ends, self.lines, strict=True):
            lines.close()
            end.close()
        for _ in range(500):  # a step under way is finished first
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                break
            time.sleep(0.02)
        else:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.report)
        shutil.rmtree(self.logs, ignore_errors=True)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *details: Any) -> None:
        self.close()


def _manage(world: int, ends: list[socket.socket], report: int, logs: Path, work: Callable, arguments: tuple) -> None:
    """The launcher of one rival's ranks; never returns."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(2, 1)  # stdout belongs to the results
    try:
        run_ranks(world, _serve, ends, work, arguments, log_dir=logs, timeout_seconds=PATIENCE)
    except Failure as failure:
        notes = getattr(failure, "__notes__", [""])[0].strip().splitlines()[-8:]
        os.write(report, json.dumps({**failure.as_dict(), "details": [*failure.details, *notes]}).encode())
    finally:
        os._exit(0)


def _serve(rank: int, world: int, say: Callable, ends: list[socket.socket], work: Callable, arguments: tuple) -> None:
    """One rank: an answer to each line until there are no more."""
    mine = ends[rank]
    for end in ends:
        if end is not mine:
            end.close()
    answer = work(rank, world, *arguments)
    for line in mine.makefile("r", encoding="utf-8"):
        mine.sendall(json.dumps(answer(json.loads(line))).encode() + b"\n")
