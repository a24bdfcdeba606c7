"""`dist-llm doctor`: what this machine has, and what is missing for what."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from dist_llm.errors import plain

GIB = 1 << 30
EXTRAS = {
    "deepspeed": ("deepspeed",),
    "hf": ("datasets", "huggingface_hub", "pyarrow"),
    "gpu": ("liger-kernel", "torchao", "bitsandbytes"),
    "track": ("tensorboard", "wandb"),
}
# Asked in a process of its own: importing torch takes seconds, and a broken driver may end the process that does it.
TORCH_PROBE = """
import json, torch
from torch import distributed as d
from dist_llm.shm import possible
cuda = torch.cuda.is_available()
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
on = d.is_available()
gloo, nccl = on and d.is_gloo_available(), on and d.is_nccl_available()
print(json.dumps({"cuda": torch.version.cuda, "devices": names, "gloo": gloo, "nccl": nccl, "shared": possible()}))
"""


@dataclass(frozen=True)
class Row:
    """One finding: ok, warn (works, with a limit) or none (absent, and optional)."""

    name: str
    status: Literal["ok", "warn", "none"]
    value: str
    hint: str = ""


def doctor(
    deep: Annotated[bool, typer.Option("--deep", help="Import torch too: devices by name, gloo and nccl.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Say what this machine has: Python, torch, devices, cores, memory, disk, optional packages."""
    rows = list(findings(deep=deep))
    if as_json:
        typer.echo(json.dumps({"version": 1, "rows": [asdict(row) for row in rows]}))
        return
    _print(rows)


def findings(*, deep: bool) -> Iterator[Row]:
    """Every row; `deep` starts one more Python to import torch in it (seconds)."""
    yield _python()
    yield _torch()
    yield from _torch_parts() if deep else _devices()
    yield _cores()
    yield _memory()
    yield _disk()
    yield _shared_memory()
    for extra, packages in EXTRAS.items():
        yield from (_package(package, extra) for package in packages)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Row:
    system = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    good = sys.version_info >= (3, 11)
    return Row("python", "ok" if good else "warn", system, "" if good else "dist-llm needs 3.11 or newer")


def _torch() -> Row:
    version = _version("torch")
    if version is None:
        return Row("torch", "warn", "not installed", "pip install torch")
    numbers = version.split("+")[0].split(".")
    old = tuple(int(part) for part in numbers[:2] if part.isdigit()) < (2, 11)
    return Row("torch", "warn" if old else "ok", version, "dist-llm needs 2.11 or newer" if old else "")


def _devices() -> Iterator[Row]:
    """What can be known without importing torch: the kernel's list of NVIDIA devices and the libraries installed beside torch."""
    listed = Path("/proc/driver/nvidia/gpus")
    count = len(list(listed.iterdir())) if listed.is_dir() else 0
    tool = shutil.which("nvidia-smi")
    found = f"{count} NVIDIA" if count else "NVIDIA driver present" if tool else "no NVIDIA device: the CPU is used"
    yield Row("devices", "ok" if count or tool else "none", found, "--deep asks torch")
    libraries = (f"nvidia-nccl-cu{cuda}" for cuda in (13, 12))
    nccl = next((version for name in libraries if (version := _version(name))), None)
    note = "" if nccl else "ranks on GPUs need it, ranks on CPUs use gloo"
    yield Row("nccl", "ok" if nccl else "none", nccl or "no package of its own", note)


def _torch_parts() -> Iterator[Row]:
    command = [sys.executable, "-c", TORCH_PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        yield Row("torch import", "warn", "failed", last[0] if last else "")
        return
    devices = ", ".join(found["devices"]) or "no CUDA device: the CPU is used"
    yield Row("devices", "ok" if found["devices"] else "none", devices, f"CUDA {found['cuda'] or 'not built in'}")
    yield Row("gloo", "ok", "available") if found["gloo"] else Row("gloo", "warn", "missing", "no ranks on CPUs")
    shared, sockets = Row("shared memory", "ok", "between CPU ranks"), "CPU ranks here send through sockets; it wants Linux and glibc 2.30"
    yield shared if found["shared"] else Row("shared memory", "warn", "missing", sockets)
    yield Row("nccl", "ok", "available") if found["nccl"] else Row("nccl", "none", "missing", "no ranks on GPUs")


def _cores() -> Row:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _first_line("/sys/fs/cgroup/cpu.max").split()
    limit = int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() else None
    shown = f"{count}" if limit is None or limit >= count else f"{count}, limited to {limit:g}"
    threads = os.environ.get("OMP_NUM_THREADS")
    return Row("cores", "ok" if count > 1 else "warn", shown, f"OMP_NUM_THREADS={threads}" if threads else "")


def _memory() -> Row:
    lines = _lines("/proc/meminfo")
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) >= 2 and line.split()[1].isdigit()}
    if "MemTotal" not in values:
        return Row("memory", "none", "unknown")
    total, free = values["MemTotal"], values.get("MemAvailable", 0)
    limit = _first_line("/sys/fs/cgroup/memory.max")
    if limit.isdigit() and int(limit) < total:
        used = _first_line("/sys/fs/cgroup/memory.current")
        total = int(limit)
        free = min(free, total - int(used) if used.isdigit() else free)
    low = free < 2 * GIB
    value = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    return Row("memory", "warn" if low else "ok", value, "the quickstart wants 2 GiB" if low else "")


def _disk() -> Row:
    usage = shutil.disk_usage(".")
    low = usage.free < 5 * GIB
    value = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} here"
    return Row("disk", "warn" if low else "ok", value, "runs and checkpoints go to save.dir" if low else "")


def _shared_memory() -> Row:
    if not os.path.isdir("/dev/shm"):
        return Row("/dev/shm", "none", "absent")
    usage = shutil.disk_usage("/dev/shm")
    low = usage.free < 64 << 20 or not os.access("/dev/shm", os.W_OK)
    return Row("/dev/shm", "warn" if low else "ok", f"{usage.free / GIB:.2f} GiB free", "NCCL and data workers want 1 GiB" if low else "")


def _package(package: str, extra: str) -> Row:
    version = _version(package)
    return Row(package, "ok" if version else "none", version or "not installed", "" if version else f"pip install 'dist-llm[{extra}]'")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _first_line(path: str) -> str:
    return next(iter(_lines(path)), "")


def _print(rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warn": "yellow", "none": "dim"}
    table = Table("", "what", "found", "note", box=box.SIMPLE)
    for row in rows:
        mark = Text(row.status if row.status != "none" else "-", style=colours[row.status])
        table.add_row(mark, row.name, Text(plain(row.value)), Text(plain(row.hint)))
    Console(width=None if Console().is_terminal else 140).print(table)
