"""What `benchmarks.gpu` measures, in which order, and how long it should take. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

MANY = 3  # shapes of compiled blocks: from as many on they are compiled side by side beforehand
COMPILED = (("compile", True),)
TENSORWISE = (*COMPILED, ("fp8", "tensorwise"))
ROWWISE = (*COMPILED, ("fp8", "rowwise"))
GRAPH = ("cuda_graph", True)
BLOCK: dict[str, Any] = {"limit": 100, "expected": 45, "first": True, "depth": 1, "vocab": 2048}


@dataclass(frozen=True)
class Part:
    """Something to measure in a process of its own.

    limit: seconds after which it is stopped; expected: those that an H200 took from its turn on (docs/gpu.md has the sum). what:
    `work(device, quick)` in `gpu_work`, or how a Job is trained. first: only so that its kernels are in torch's cache.
    """

    name: str
    limit: float
    expected: float
    what: str
    preset: str = "llama-1b"
    sequence: int = 4096
    micro: int = 2
    runtime: tuple[tuple[str, Any], ...] = ()
    depth: int | None = None
    vocab: int | None = None
    first: bool = False

    @property
    def beside(self) -> str:
        """Neighbours that share this run side by side, because no time is taken of them; empty: alone."""
        return "first" if self.first else "proofs" if self.what in ("stages", "shared") else ""

    @property
    def compiled(self) -> bool:
        """Whether anything of it is."""
        return self.what.endswith("compiled") or COMPILED[0] in self.runtime


LLAMA_8B: dict[str, Any] = {"preset": "llama3-8b", "depth": 0, "vocab": 2048}
LONG: dict[str, Any] = {"sequence": 8192, "micro": 1}
# What a stated figure is judged by comes first.
PARTS = (
    Part("1b, ours, compiled", 60, 10, "ours", runtime=COMPILED),
    Part("1b, torchtitan, compiled", 60, 11, "torchtitan-compiled"),
    Part("1b, transformers, compiled", 80, 12, "transformers-compiled"),
    Part("8b blocks, ours, compiled", 60, 27, "ours", **LLAMA_8B, runtime=COMPILED),
    Part("8b blocks, torchtitan, compiled", 60, 16, "torchtitan-compiled", **LLAMA_8B),
    Part("8b blocks, ours, tensorwise", 60, 24, "ours", **LLAMA_8B, runtime=TENSORWISE),
    Part("8b blocks, ours, tensorwise, graph", 60, 22, "ours", **LLAMA_8B, runtime=(*TENSORWISE, GRAPH)),
    Part("8b blocks, ours, rowwise", 60, 22, "ours", **LLAMA_8B, runtime=ROWWISE),
    Part("1b, transformers, eager", 40, 7, "transformers"),
    Part("1b, ours, eager", 40, 7, "ours"),
    Part("ceiling", 40, 4, "ceiling"),
    Part("8b blocks, ours, compiled, 8192", 60, 27, "ours", **LLAMA_8B, **LONG, runtime=COMPILED),
    Part("1b, ours, compiled, 8192", 60, 9, "ours", **LONG, runtime=COMPILED),
    Part("8b blocks, ours, tensorwise, 8192", 60, 26, "ours", **LLAMA_8B, **LONG, runtime=TENSORWISE),
    Part("1b, transformers, compiled, 8192", 80, 9, "transformers-compiled", **LONG),
    Part("1b, ours, graph", 60, 11, "ours", runtime=(*COMPILED, GRAPH)),
    Part("8b ends", 25, 11, "ends", preset="llama3-8b"),
    Part("stages", 60, 18, "stages"),
    Part("shared", 75, 19, "shared"),
)


def named(text: str) -> list[Part]:
    """The part of this name, else those whose name holds the text."""
    return [part for part in PARTS if part.name == text] or [part for part in PARTS if text in part.name]


def lacking(parts: Iterable[Part], entries: Iterable[dict[str, Any]], *, again: bool = False) -> list[Part]:
    """Those without a whole result among the entries of an earlier call, in their order; then, with `again`, the others."""
    done = {entry["name"] for entry in entries if "result" in entry and not failures(entry)}
    parts = list(parts)
    return [part for part in parts if part.name not in done] + [part for part in parts if again and part.name in done]


def failures(entry: dict[str, Any]) -> list[str]:
    """What went wrong in a part: all of it, or some of the layouts that it proves."""
    result = entry.get("result", {})
    rows = {**result.get("losses", {}), **result.get("rows", {})} if entry["name"] in ("stages", "shared") else {}
    bad = {name: row for name, row in rows.items() if isinstance(row, dict) and not row.get("equal")}
    found = [f"{name}: {row.get('error', 'not equal')}" for name, row in bad.items()]
    return [entry["error"], *found] if "error" in entry else found


def with_blocks(parts: Sequence[Part]) -> list[Part]:
    """The parts, and before them one for each shape of compiled blocks, if these are many: it leaves its kernels in torch's cache.

    A whole model's blocks have one graph, so one block is enough, and a small vocabulary; a CUDA graph records the same kernels.
    """
    found = dict[tuple, Part]()
    for part in parts:
        if part.compiled:
            runtime = tuple(pair for pair in part.runtime if pair != GRAPH)
            shape = (part.what, part.preset, part.sequence, part.micro, runtime)
            found.setdefault(shape, replace(part, name=f"blocks of {part.name}", runtime=runtime, **BLOCK))
    return [*(found.values() if len(found) >= MANY else ()), *parts]


def turns(parts: Iterable[Part]) -> list[list[Part]]:
    """What is done at once."""
    found: list[list[Part]] = []
    for part in parts:
        if found and part.beside and part.beside == found[-1][0].beside:
            found[-1].append(part)
        else:
            found.append([part])
    return found


def expected(part: Part, entries: Iterable[dict[str, Any]]) -> float:
    """Seconds from its turn on: those it took, in the entries of a call whose processes were ready when it came; else the part's own."""
    taken = [entry["seconds"] for entry in entries if entry["name"] == part.name and "result" in entry and "waited" in entry]
    return taken[-1] if taken else part.expected


def plan(parts: Sequence[Part], entries: Sequence[dict[str, Any]]) -> tuple[list[str], float]:
    """A line for each turn, and the seconds of them all."""
    lines, total = [], 0.0
    for turn in turns(parts):
        seconds = max(expected(part, entries) for part in turn)
        total += seconds
        lines.append(f"{seconds:5.0f} s  {' | '.join(part.name for part in turn)}")
    return lines, total
