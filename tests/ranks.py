"""The rank harness: worlds of real processes on gloo, started in milliseconds.

A helper process imports torch once, runs no operator, and forks the ranks of every case. Cases are functions
`module:function(rank, world, say, *arguments)` whose arguments and results are JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dist_llm.errors import from_dict


class Ranks:
    """The helper process; `run` starts a world and returns its results in rank order."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"  # its imports are on no test's time

    def run(self, world: int, work: str, *arguments: Any, timeout_seconds: float = 60.0) -> list[Any]:
        """Runs `module:function` on `world` ranks; raises the Failure that stopped them."""
        return self.ask({"world": world, "work": work, "arguments": arguments, "timeout_seconds": timeout_seconds})

    def prepare(self, work: str) -> None:
        """Calls `module:function` in the helper: what it imports, no rank that is forked later imports again."""
        self.ask({"world": 0, "work": work})

    def ask(self, request: dict[str, Any]) -> Any:
        """One request to the helper, and its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "failure" in answer:
            failure = from_dict(answer["failure"])
            failure.details = [*failure.details, *answer["notes"]]
            raise failure
        return answer["results"]

    def close(self) -> None:
        """Ends the helper."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=10)


def serve() -> None:
    """The helper: reads requests from stdin, one a line, and answers each on its own stdout line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import numpy.ma  # noqa: F401  the first order of samples asks for it
    import torch._dynamo  # noqa: F401  with it what torch's engines, optimizers and compiler import at their first use (1.4 s)

    import dist_llm.train.proof  # noqa: F401  imports torch and everything the ranks use
    from dist_llm.errors import Failure
    from dist_llm.ranks import run_ranks

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        module, function = request["work"].split(":")
        work, world = getattr(importlib.import_module(module), function), request["world"]
        try:
            results = run_ranks(world, work, *request["arguments"], timeout_seconds=request["timeout_seconds"]) if world else work()
            answer: dict[str, Any] = {"results": results}
        except Failure as failure:
            answer = {"failure": failure.as_dict(), "notes": getattr(failure, "__notes__", [])}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # to take all that was imported apart would take a second


if __name__ == "__main__":
    serve()
