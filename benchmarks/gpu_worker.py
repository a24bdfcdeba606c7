"""The processes of `benchmarks.gpu`, both ends: each part has one, which imports what it needs while the part before it runs.

A process gets ready, waits without touching the device, begins when it is given the time, answers with one line of JSON, and is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import Part

ROOT = Path(__file__).parents[1]


class Worker:
    """The process of a part, seen from outside."""

    def __init__(self, part: Part, device: str, quick: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu_worker", json.dumps(asdict(part)), device, *(["quick"] if quick else [])]
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, cwd=ROOT, start_new_session=True
        )

    def begin(self) -> None:
        """Its turn has come."""
        self.asked = time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `answer` says of what
            self.process.stdin.write(f"{self.asked}\n".encode())
            self.process.stdin.flush()

    def answer(self, limit: float) -> dict[str, Any]:
        """Its result, or in `error` what went wrong, at most `limit` seconds after it began. Either way the process is gone then."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, self.asked + limit - time.monotonic()))
        line = self.process.stdout.readline() if ready else b""
        seconds = round(time.monotonic() - self.asked, 1)
        if ready and not line:  # it ends by itself: with its own exit code
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5.0)
        self.end()
        self.stderr.seek(0)
        said = self.stderr.read().decode(errors="replace")
        self.stderr.close()
        if line:
            return json.loads(line)
        if not ready:
            return {"seconds": seconds, "error": f"not done after {limit:.0f} s", "stderr": said[-4000:]}
        last = said.strip().splitlines()[-1:] or [f"exit code {self.process.returncode}"]
        return {"seconds": seconds, "error": last[0][:500], "stderr": said[-4000:]}

    def end(self) -> None:
        """Kills it and what it started, and waits until its memory is free."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


class Workers:
    """Those that are ready or running; all are killed at the end of the `with`."""

    def __init__(self, device: str, quick: bool) -> None:
        self.device, self.quick = device, quick
        self.ready: dict[Part, Worker] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.ready.values():
            worker.end()

    def prepare(self, parts: Sequence[Part]) -> None:
        """Starts the processes that are not there yet."""
        for part in parts:
            if part not in self.ready:
                self.ready[part] = Worker(part, self.device, self.quick)

    def run(self, turn: Sequence[Part], limit: float, then: Sequence[Part] = ()) -> list[dict[str, Any]]:
        """Does the parts of a turn at once, none longer than its own limit and this one, while the processes of `then` get ready."""
        self.prepare(turn)
        self.prepare(then)
        for part in turn:
            self.ready[part].begin()
        found = [self.ready[part].answer(min(part.limit, limit)) for part in turn]
        for part in turn:
            del self.ready[part]
        return found


def serve(part: Part, device_name: str, quick: bool) -> None:
    """The process of a part, from inside."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    from benchmarks import gpu_work

    gpu_work.bring(part.what, compiled=part.compiled and not quick)
    ready = time.monotonic()
    asked = float(sys.stdin.readline())
    found = {"waited": round(max(0.0, ready - asked), 1), "result": gpu_work.as_tensor_free(work(part, device_name, quick))}
    print(json.dumps({"seconds": round(time.monotonic() - asked, 1), **found}), file=answers, flush=True)


def work(part: Part, device_name: str, quick: bool) -> dict[str, Any]:
    """A part, here."""
    from benchmarks import gpu_titan, gpu_work

    device = gpu_work.on(device_name)
    if part.what in ("ceiling", "stages", "shared"):
        return getattr(gpu_work, part.what)(device, quick)
    runtime = tuple(pair for pair in part.runtime if not quick or device_name == "cuda" or pair[0] == "fp8")
    job = gpu_work.Job(part.preset, part.sequence, part.micro, depth=part.depth, vocab=part.vocab, runtime=runtime, quick=quick)
    job = replace(job, sequence=64) if quick else job
    if part.what == "ends":
        return gpu_work.ends(device, job)
    if part.what == "ours":
        found = gpu_work.train_ours(device, job)
    else:
        rival = gpu_titan.train_torchtitan if part.what.startswith("torchtitan") else gpu_work.train_transformers
        found = rival(device, job, compiled=part.compiled and not quick)
    return {"losses": found["losses"]} if part.first else found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    serve(Part(**{**given, "runtime": tuple(map(tuple, given["runtime"]))}), sys.argv[2], "quick" in sys.argv[3:])
