"""What the numbers were taken on, and what else the machine was doing meanwhile."""

from __future__ import annotations

import os
import platform
import socket
import struct
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
TCP_BYTES_SENT = 200  # offset of tcpi_bytes_sent in the kernel's struct tcp_info (Linux 4.19)
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy", "torchtitan")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * PAGE,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """Installed versions of what takes part."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@dataclass(frozen=True)
class Clock:
    """The machine's CPU counters at a moment: seconds, over all cores."""

    at: float
    busy: float
    stolen: float

    @classmethod
    def now(cls) -> Clock:
        """Reads them; zeros where the system has none."""
        try:
            user, nice, system, _, _, irq, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
        except (OSError, ValueError):
            return cls(time.time(), 0.0, 0.0)
        return cls(time.time(), (user + nice + system + irq + soft) / TICK, stolen / TICK)

    def until(self, end: Clock, *, own: float) -> dict[str, Any]:
        """What happened from this moment to `end`. own: CPU seconds of ours; the rest was somebody else's."""
        room = max(1e-9, (end.at - self.at) * len(os.sched_getaffinity(0)))
        return {
            "seconds": round(end.at - self.at, 1),
            "stolen_fraction": round((end.stolen - self.stolen) / room, 4),
            "others_fraction": round(max(0.0, end.busy - self.busy - own) / room, 3),
            "load_average": [round(load, 2) for load in os.getloadavg()],
        }


def sent_bytes() -> int:
    """Payload bytes that this process has sent through its open TCP sockets, what gloo puts on the wire, and through memory ranks share.

    Of sockets read from the kernel's account of each, so that other processes' traffic on the interface is not in it.
    """
    from dist_llm.mesh import segments

    total = sum(segment.sent for segment in segments.values() if segment is not None)
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as end:
                if end.type == socket.SOCK_STREAM and end.family in (socket.AF_INET, socket.AF_INET6):
                    total += struct.unpack_from("Q", end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512), TCP_BYTES_SENT)[0]
        except (OSError, struct.error):
            continue
    return total


def read_bytes() -> int:
    """Bytes that this process has asked files and sockets for so far, out of the system's memory or from a disk."""
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar


def resident() -> int:
    """Resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak_resident() -> int:
    """The most resident bytes this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
