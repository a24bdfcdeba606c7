"""One GPU in one call of under eight minutes: `python -m benchmarks.gpu`.

A Llama of 1.2 B whole and blocks of the 8B shape at the depth that fits beside their whole state, sequences of 4096 and 8192:
ours eager, compiled, as a graph and in 8 bits, against transformers and torchtitan. Beside them, in the same call: what the device
reaches in products and attention alone; every engine and stage on one rank; ranks that share the device.

Each part is a process of its own with its own time: one that fails or takes too long is noted, and the next one begins. The result is
written after every turn, and `--continue FILE` measures what that file lacks. `--plan` says how long it should take.
`--quick` runs miniatures, on a CPU too (`--device cpu`), and keeps nothing unless `--out` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import PARTS, Part, failures, lacking, named, plan, turns, with_blocks
from benchmarks.gpu_worker import ROOT, Workers

VERSION = 1
TOTAL = 470.0  # seconds of the whole call
LEAST = 15.0  # a turn with less is not begun
RESULTS = Path(__file__).parent / "results"
NAME = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
Entry = dict[str, Any]
Run = Callable[[Sequence[Part], float, Sequence[Part]], list[Entry]]


def main(words: Sequence[str] | None = None) -> int:
    """Runs the parts and keeps what they found."""
    end = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: miniatures only")
    parser.add_argument("--quick", action="store_true", help="miniatures: does it run?")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="of the whole call")
    parser.add_argument("--out", type=Path, help="folder of the results; by default that of --continue, else benchmarks/results")
    parser.add_argument("--only", default="", help="the part of this name, else those whose name holds it")
    parser.add_argument("--continue", type=Path, dest="earlier", metavar="FILE", help="measure what this result lacks, and join both")
    parser.add_argument("--again", action="store_true", help="with --continue: afterwards the other parts too")
    parser.add_argument("--plan", action="store_true", help="only say how long each part should take")
    given = parser.parse_args(words)
    end += given.seconds
    quick, earlier = given.quick or given.device == "cpu", None
    if not named(given.only):
        parser.error(f"no part's name holds {given.only!r}; there are: {'; '.join(part.name for part in PARTS)}")
    if given.earlier is not None:
        earlier = read(given.earlier)
        if earlier is None:
            why = "is no result of this benchmark" if given.earlier.exists() else "is not there"
            parser.error(f"{given.earlier} {why}; results are in {RESULTS}")
    parts = with_blocks(lacking(named(given.only), earlier["parts"] if earlier else (), again=given.again))
    if given.plan:
        print(planned(parts, earlier or newest(RESULTS)))
        return 0
    with Workers(given.device, quick) as workers:
        workers.prepare(turns(parts)[0] if parts else ())  # while the device is asked for its name
        head = {"version": VERSION, "question": "gpu", "quick": quick, **facts(given.device)}
        if not head["device"]:
            parser.error("there is no CUDA device here; --device cpu runs miniatures")
        for reason in differences(earlier, head) if earlier else ():
            parser.error(f"{given.earlier} cannot be continued here: {reason}")
        folder = given.out or (None if quick else given.earlier.parent if earlier else RESULTS)
        path = folder / (given.earlier.name if earlier else file_name(head["device"])) if folder else None
        result = joined(earlier, head, ())

        def note(entries: Sequence[Entry]) -> None:
            nonlocal result
            result = joined(result, head, entries)
            if path is not None:
                keep(result, path)

        measure(turns(parts), workers.run, end=end, note=note)
    show(result["parts"])
    if path is not None:
        print(f"results: {path}")
    return 0


def measure(
    some: Sequence[Sequence[Part]], run: Run, *, end: float, note: Callable[[Sequence[Entry]], None], say: Callable[[str], None] = print
) -> None:
    """One turn after the other until the moment `end`; `note` hears of each turn's parts, `error` says what went wrong."""
    begun = time.monotonic()
    for at, turn in enumerate(some):
        now = time.monotonic()
        say(f"[{now - begun:5.0f} s] {' | '.join(part.name for part in turn)}")
        if end - now < LEAST:
            found = [{"seconds": 0.0, "error": f"not begun: {max(0.0, end - now):.0f} s are left"} for _ in turn]
        else:
            found = run(turn, end - now, some[at + 1] if at + 1 < len(some) else ())
        entries = [{"name": part.name, **one} for part, one in zip(turn, found, strict=True)]
        for entry in entries:
            for failure in failures(entry):
                say(f"          {entry['name']}: {failure}")
        note(entries)


# --- results of several calls ----------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any] | None:
    """A result of this benchmark, or None where the file holds none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("question") == "gpu" and found.get("version") == VERSION else None


def newest(folder: Path) -> dict[str, Any] | None:
    """The last of the results there."""
    found = [result for path in folder.glob("gpu-*.json") if (result := read(path)) is not None]
    return max(found, key=lambda result: result["when"], default=None)


def differences(earlier: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Why what was measured then and here does not belong together. A package that one of them has not says nothing."""
    pairs = [(key, earlier[key], here[key]) for key in ("device", "quick")]
    then, now = earlier["versions"], here["versions"]
    pairs += [(name, then[name], now[name]) for name in sorted(then.keys() & now.keys()) if then[name] and now[name]]
    return [f"{name} was {before} and is {after}" for name, before, after in pairs if before != after]


def joined(earlier: dict[str, Any] | None, head: dict[str, Any], entries: Iterable[Entry]) -> dict[str, Any]:
    """Both calls' parts in their order, each with its date and device. A result stays where the later try has none, and says so."""
    told = {key: head[key] for key in ("when", "device")}
    parts: dict[str, Entry] = {}
    versions = dict(head["versions"])
    if earlier is not None:
        parts = {one["name"]: {"when": earlier["when"], "device": earlier["device"], **one} for one in earlier["parts"]}
        versions = {name: head["versions"].get(name) or earlier["versions"].get(name) for name in {**earlier["versions"], **versions}}
    for entry in entries:
        kept = parts.get(entry["name"], {})
        if "result" in kept and "error" in entry:
            parts[entry["name"]] = {**kept, "failed_later": {**told, "error": entry["error"]}}
        else:
            parts[entry["name"]] = {"name": entry["name"], **told, **entry}
    order = [part.name for part in with_blocks(PARTS)]
    placed = sorted(parts.values(), key=lambda one: order.index(one["name"]) if one["name"] in order else -1)
    return {**head, "versions": versions, "parts": placed}


def keep(result: dict[str, Any], path: Path) -> None:
    """Writes a result; a reader finds the earlier or the later one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, path)


def file_name(device: str) -> str:
    """gpu-DEVICE-DATE.json."""
    return f"gpu-{device.lower().replace(' ', '-').replace('/', '-')}-{time.strftime('%Y-%m-%d')}.json"


def facts(device: str) -> dict[str, Any]:
    """When, where and on what. The device has no name where there is none."""
    from benchmarks.machine import machine, versions

    return {"when": time.strftime("%Y-%m-%d %H:%M"), "device": device_name(device), "machine": machine(), "versions": versions()}


def device_name(device: str) -> str:
    """Asked by another process, so that this one holds no memory on a device that belongs to the parts."""
    if device == "cpu":
        return "cpu"
    return subprocess.run([sys.executable, "-c", NAME], capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()


# --- what is shown ---------------------------------------------------------------------------------------------------


def planned(parts: Sequence[Part], earlier: dict[str, Any] | None) -> str:
    """How long each turn should take: as in an earlier result where it is known from there."""
    lines, total = plan(parts, earlier["parts"] if earlier else ())
    return "\n".join([*lines, f"{total:5.0f} s  of {TOTAL:.0f}, as on {earlier['device'] if earlier else 'an H200'}"])


def show(parts: Sequence[Entry]) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
