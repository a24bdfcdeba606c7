"""One GPU in one call of under eight minutes: `python -m benchmarks.gpu`.

A Llama of 1.2 B whole and blocks of the 8B shape at the depth that fits beside their whole state, sequences of 4096 and 8192:
ours eager, compiled, as a graph and in 8 bits, against transformers and torchtitan. Beside them, in the same call: what the device
reaches in products and attention alone; every engine and stage on one rank; ranks that share the device.

Each part is a process of its own with its own time: one that fails or takes too long is noted, and the next one begins.
`--quick` runs miniatures, on a CPU too (`--device cpu`), and keeps nothing unless `--out` is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

VERSION = 1
TOTAL = 470.0  # seconds of the whole call
LEAST = 15.0  # a part with less is not begun
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
COMPILED = (("compile", True),)


@dataclass(frozen=True)
class Part:
    """Something to measure, and the seconds that it may take. what: `work(device, quick)` in `gpu_work`, or how a Job is trained."""

    name: str
    seconds: float
    what: str
    preset: str = "llama-1b"
    sequence: int = 4096
    micro: int = 2
    runtime: tuple[tuple[str, Any], ...] = ()
    depth: int | None = None
    vocab: int | None = None


LLAMA_8B: dict[str, Any] = {"preset": "llama3-8b", "depth": 0, "vocab": 2048}
LONG: dict[str, Any] = {"sequence": 8192, "micro": 1}
PARTS = (
    Part("ceiling", 40, "ceiling"),
    Part("1b, ours, compiled", 60, "ours", runtime=COMPILED),
    Part("1b, transformers, compiled", 120, "transformers-compiled"),
    Part("1b, torchtitan, compiled", 60, "torchtitan-compiled"),
    Part("8b blocks, ours, compiled", 60, "ours", **LLAMA_8B, runtime=COMPILED),
    Part("8b blocks, ours, tensorwise", 60, "ours", **LLAMA_8B, runtime=(*COMPILED, ("fp8", "tensorwise"))),
    Part("8b blocks, ours, tensorwise, graph", 60, "ours", **LLAMA_8B, runtime=(*COMPILED, ("fp8", "tensorwise"), ("cuda_graph", True))),
    Part("8b blocks, ours, rowwise", 60, "ours", **LLAMA_8B, runtime=(*COMPILED, ("fp8", "rowwise"))),
    Part("8b blocks, torchtitan, compiled", 60, "torchtitan-compiled", **LLAMA_8B),
    Part("8b ends", 25, "ends", preset="llama3-8b"),
    Part("1b, ours, eager", 40, "ours"),
    Part("1b, transformers, eager", 40, "transformers"),
    Part("8b blocks, ours, compiled, 8192", 60, "ours", **LLAMA_8B, **LONG, runtime=COMPILED),
    Part("1b, ours, compiled, 8192", 60, "ours", **LONG, runtime=COMPILED),
    Part("1b, transformers, compiled, 8192", 120, "transformers-compiled", **LONG),
    Part("8b blocks, ours, tensorwise, 8192", 60, "ours", **LLAMA_8B, **LONG, runtime=(*COMPILED, ("fp8", "tensorwise"))),
    Part("1b, ours, graph", 60, "ours", runtime=(*COMPILED, ("cuda_graph", True))),
    Part("stages", 45, "stages"),
    Part("shared", 75, "shared"),
)
Run = Callable[[Part, float], dict[str, Any]]


def main(words: Sequence[str] | None = None) -> int:
    """Runs the parts, or with `--part` one of them here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: miniatures only")
    parser.add_argument("--quick", action="store_true", help="miniatures: does it run?")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="of the whole call")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results by default")
    parser.add_argument("--only", default="", help="the part of this name, else those whose name holds it")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    quick = given.quick or given.device == "cpu"
    if given.part is not None:
        print(json.dumps(work(next(part for part in PARTS if part.name == given.part), given.device, quick)))
        return 0
    chosen = [part for part in PARTS if part.name == given.only] or [part for part in PARTS if given.only in part.name]
    if not chosen:
        parser.error(f"no part's name holds {given.only!r}; there are: {'; '.join(part.name for part in PARTS)}")
    if given.device == "cuda" and not has_device():
        parser.error("there is no CUDA device here; --device cpu runs miniatures")
    parts = measure(chosen, lambda part, seconds: apart(part, seconds, given.device, quick), seconds=given.seconds)
    result = {"version": VERSION, "question": "gpu", "quick": quick, **facts(given.device), "parts": parts}
    show(parts)
    folder = given.out or (None if quick else RESULTS)
    if folder is not None:
        print(f"results: {keep(result, folder)}")
    return 0


def measure(parts: Sequence[Part], run: Run, *, seconds: float, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Each part in turn, as long as there is time; what went wrong stands in `error` of its entry."""
    begun, found = time.monotonic(), []
    for part in parts:
        left = seconds - (time.monotonic() - begun)
        say(f"[{time.monotonic() - begun:5.0f} s] {part.name}")
        start = time.monotonic()
        outcome = {"error": f"not begun: {max(0.0, left):.0f} s are left"} if left < LEAST else run(part, min(part.seconds, left))
        found.append({"name": part.name, "seconds": round(time.monotonic() - start, 1), **outcome})
        if "error" in outcome:
            say(f"          {outcome['error']}")
    return found


def apart(part: Part, seconds: float, device: str, quick: bool) -> dict[str, Any]:
    """A part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part.name, "--device", device, *(["--quick"] if quick else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    if done.returncode == 0 and done.stdout.strip():
        return {"result": json.loads(done.stdout.strip().splitlines()[-1])}
    last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    return {"error": last[0][:500], "stderr": done.stderr[-4000:]}


def work(part: Part, device_name: str, quick: bool) -> dict[str, Any]:
    """A part, here."""
    from benchmarks import gpu_titan, gpu_work

    device = gpu_work.on(device_name)
    if part.what in ("ceiling", "stages", "shared"):
        return gpu_work.as_tensor_free(getattr(gpu_work, part.what)(device, quick))
    job = gpu_work.Job(part.preset, part.sequence, part.micro, depth=part.depth, vocab=part.vocab, runtime=part.runtime, quick=quick)
    if quick:
        job = replace(job, sequence=64, runtime=tuple(pair for pair in job.runtime if device_name == "cuda" or pair[0] == "fp8"))
    if part.what == "ours":
        found = gpu_work.train_ours(device, job)
    elif part.what == "ends":
        found = gpu_work.ends(device, job)
    else:
        compiled = part.what.endswith("compiled") and not quick
        rival = gpu_titan.train_torchtitan if part.what.startswith("torchtitan") else gpu_work.train_transformers
        found = rival(device, job, compiled=compiled)
    return gpu_work.as_tensor_free(found)


def has_device() -> bool:
    """Whether there is a CUDA device; takes no memory on it, which belongs to the parts."""
    import torch

    return torch.cuda.is_available()


def facts(device: str) -> dict[str, Any]:
    """When, where and on what."""
    from benchmarks.machine import machine, versions

    name = "cpu"
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name(0)
    return {"when": time.strftime("%Y-%m-%d %H:%M"), "device": name, "machine": machine(), "versions": versions()}


def show(parts: Sequence[dict[str, Any]]) -> None:
    """A line for each part that trained: tokens a second, both MFUs, the part of the measured ceiling, peak memory."""
    known = next((part["result"]["products"]["bfloat16"] for part in parts if part["name"] == "ceiling" and "result" in part), None)
    for part in parts:
        result = part.get("result", {})
        if "tokens_per_second" not in result:
            continue
        shares = [f"MFU {kind} {share:.1%}" for kind, share in result["mfu"].items() if share is not None]
        if isinstance(known, float):
            shares.append(f"{result['model_flops']['full'] / known:.1%} of the ceiling")
        if result["peak_memory_bytes"]:
            shares.append(f"{result['peak_memory_bytes'] / 2**30:.1f} GiB")
        print(f"{part['name']}: {result['layers']} layers, {result['tokens_per_second']:,.0f} tokens/s, {', '.join(shares)}")


def keep(result: dict[str, Any], folder: Path) -> Path:
    """Writes gpu-DEVICE-DATE.json."""
    folder.mkdir(parents=True, exist_ok=True)
    name = result["device"].lower().replace(" ", "-").replace("/", "-")
    path = folder / f"gpu-{name}-{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
