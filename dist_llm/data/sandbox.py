"""Chat templates as Jinja in an immutable sandbox; run as a program, the place where a stranger's template is rendered.

As a program it reads JSON lines: first `{"template": text}`, then a request `{"messages": ..., "add_generation_prompt": ..., ...}`
a line, and answers each with `{"text": ...}` or `{"error": ..., "kind": ...}`. The processor time of each rendering, memory and
output are bounded; it can write no file and start no process, and ends when its input does or a rendering takes too long.
It imports nothing of ours, so that it starts in a tenth of a second.

What a template is given is what transformers gives: `messages`, `add_generation_prompt`, `bos_token`, `eos_token`, `tools` (none where
there are none), `documents` (none), `raise_exception`, `tojson` without HTML escapes, `break` and `continue`, `{% generation %}`. No
clock: the same conversation gives the same tokens on every day.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

OPEN, CLOSE = "\x00<", "\x00>"  # around what `{% generation %}` marks; no content holds a NUL
# A NUL as JSON and Python write it, which is one of ours: not the letters of it, before which another backslash stands.
ESCAPED, ESCAPED_IN_PYTHON = (re.compile(rf"(?<!\\)((?:\\\\)*)\\{spelled}") for spelled in ("u0000", "x00"))
LARGEST_TEMPLATE = 1 << 20  # characters
LARGEST_OUTPUT = 32 << 20  # characters of one conversation
SECONDS = 5.0  # of processor time for one conversation
MEMORY = 1 << 30  # bytes of address space


class TemplateFault(Exception):
    """Why a conversation was not rendered.

    kind: `refused` by the template itself, else `broken`, `size`, `memory`, `ended` or, where marks did not stay whole, `spelled`.
    """

    def __init__(self, text: str, kind: str) -> None:
        super().__init__(text)
        self.kind = kind


class _RefusedError(Exception):
    """Raised by `raise_exception` in a template."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: leaves marks around what is inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call of `mark` on what it renders."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """The text of the block between marks."""
        return OPEN + caller() + CLOSE


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with arithmetic that cannot take forever in one operation."""

    intercepted_binops = frozenset(["**", "*", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`*` of texts and lists by small numbers alone, `**` of numbers with a small result, `%` of numbers (of a text it pads)."""
        if operator == "%" and isinstance(left, str):
            raise SecurityError("% of a text is not allowed, use format or ~")
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        counts = [side for side in (left, right) if isinstance(side, int)]
        if operator == "*" and sizes and counts and sizes[0] * counts[0] > LARGEST_OUTPUT:
            raise SecurityError("the result of * is too large")
        if operator == "**" and not (isinstance(right, int | float) and abs(right) <= 64):
            raise SecurityError("the power is too large")
        return super().call_binop(context, operator, left, right)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return ESCAPED.sub("\\1\x00", text) if "\\u0000" in text else text


class _Text(str):
    """A text with marks of ours, which stay marks where a template writes it as Python does, inside a list or an object."""

    def __repr__(self) -> str:
        return ESCAPED_IN_PYTHON.sub("\\1\x00", super().__repr__())


def _kept(value: Any) -> Any:
    """A value whose texts with marks keep them, however a template writes it."""
    if isinstance(value, str):
        return _Text(value) if "\x00" in value else value
    if isinstance(value, dict):
        return {_kept(key): _kept(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_kept, value))
    return [_kept(one) for one in value] if isinstance(value, list) else value


def _refuse(message: object = "") -> None:
    raise _RefusedError(str(message))


def compile_template(text: str) -> jinja2.Template:
    """A template ready to render. Raises TemplateFault."""
    if len(text) > LARGEST_TEMPLATE:
        raise TemplateFault(f"longer than {LARGEST_TEMPLATE} characters", "broken")
    if "\x00" in text:
        raise TemplateFault("it holds a NUL character", "broken")
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_kept)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    del environment.globals["lipsum"]  # a maker of long texts that no chat template needs
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateFault(f"line {error.lineno}: {error.message}", "broken") from None
    except (RecursionError, MemoryError, ValueError, OverflowError, AssertionError, SyntaxError) as error:
        raise TemplateFault(type(error).__name__, "broken") from None


def has_generation(text: str) -> bool:
    """Whether a template marks what the assistant says."""
    return "generation" in {word for tag in text.split("{%")[1:] for word in tag[:40].lstrip("-+ \t\r\n").split(maxsplit=1)[:1]}


def render_one(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """The text of one conversation, with marks where the template has `{% generation %}`. Raises TemplateFault."""
    parts: list[str] = []
    size = 0
    try:
        for part in template.generate(**{"tools": None, "documents": None, **_kept(variables)}):
            parts.append(part)
            size += len(part)
            if size > LARGEST_OUTPUT:
                raise TemplateFault(f"more than {LARGEST_OUTPUT} characters of output", "size")
        return "".join(parts)
    except _RefusedError as error:
        raise TemplateFault(str(error)[:300], "refused") from None
    except MemoryError:
        raise TemplateFault("it needs too much memory", "memory") from None
    except TemplateFault:
        raise
    except Exception as error:
        raise TemplateFault(f"{type(error).__name__}: {error}"[:300], "broken") from None


def _confine() -> None:
    """Bounds that hold even where the sandbox should not."""
    for name, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, 0)):
        resource.setrlimit(name, (limit, limit))


def serve(lines: Iterable[str], answer: Callable[[dict[str, Any]], None]) -> None:
    """Compiles the template of the first line and renders a conversation for each line after it."""
    template = None
    for number, line in enumerate(lines):
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time, after which the process ends
        try:
            if number == 0:
                template = compile_template(request["template"])
                answer({"text": ""})
            else:
                assert template is not None
                answer({"text": render_one(template, request)})
        except TemplateFault as error:
            answer({"error": str(error), "kind": error.kind})
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _confine()
    serve(sys.stdin, _answer)
