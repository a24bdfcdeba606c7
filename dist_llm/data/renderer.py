"""Where a chat template is rendered: ours in this process, a stranger's in a confined process that is ended when it takes too long."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from dist_llm.data import sandbox
from dist_llm.data.sandbox import LARGEST_OUTPUT, SECONDS, TemplateFault
from dist_llm.errors import plain

PATIENCE = 12.0  # times the processor time that a rendering may take, by the clock: machines are shared
LARGEST_ANSWER = 6 * LARGEST_OUTPUT + 1024  # bytes: JSON spells a character in six at most

Request = dict[str, Any]  # messages, add_generation_prompt, bos_token, eos_token


class Renderer(Protocol):
    """Renders requests of one template, one after the other."""

    def render(self, requests: Sequence[Request]) -> list[str | TemplateFault]:
        """The text of each request, or why there is none."""


class Here:
    """In this process, for templates that are our own. Raises TemplateFault where the template is none."""

    def __init__(self, text: str) -> None:
        self.template = sandbox.compile_template(text)

    def render(self, requests: Sequence[Request]) -> list[str | TemplateFault]:
        """The text of each request, or why there is none."""
        found: list[str | TemplateFault] = []
        for request in requests:
            try:
                found.append(sandbox.render_one(self.template, request))
            except TemplateFault as fault:
                found.append(fault)
        return found


class Apart:
    """In a process of its own, started with the first request and again when it was ended; it knows no environment of ours.

    seconds: by the clock, after which a rendering is given up.
    """

    def __init__(self, text: str, *, seconds: float = SECONDS * PATIENCE) -> None:
        self.text, self.seconds = text, seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(self, requests: Sequence[Request]) -> list[str | TemplateFault]:
        """The text of each request, or why there is none."""
        with self._lock:
            return [self._one(request) for request in requests]

    def close(self) -> None:
        """Ends the process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def __del__(self) -> None:
        self.close()

    def _one(self, request: Request) -> str | TemplateFault:
        try:
            if self._child is None:
                environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
                command = [sys.executable, "-P", str(Path(sandbox.__file__))]
                self._child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0
                )
                try:
                    self._ask({"template": self.text})  # compiled there: that alone may run parts of it
                except TemplateFault:
                    self.close()
                    raise
            return self._ask(request)
        except TemplateFault as fault:
            if fault.kind == "ended":
                self.close()
            return fault

    def _ask(self, request: Request) -> str:
        """One line to the process and one back. Raises TemplateFault."""
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        deadline, answer = time.monotonic() + self.seconds, bytearray()
        try:
            line = memoryview(json.dumps(request).encode() + b"\n")
            while line:
                line = line[child.stdin.write(line) :]
            while not answer.endswith(b"\n"):
                ready, _, _ = select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))
                content = child.stdout.read(1 << 20) if ready else b""
                answer += content
                if not content or len(answer) > LARGEST_ANSWER:
                    raise TemplateFault("it took too long or too much memory, and was stopped", "ended")
        except OSError:
            raise TemplateFault("its process ended", "ended") from None
        message = json.loads(answer)
        if "error" in message:
            raise TemplateFault(plain(message["error"]), message["kind"])
        return message["text"]
