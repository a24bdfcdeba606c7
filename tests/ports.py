"""The ports that processes listen at, from /proc, and an address by which others could reach this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def listening(pids: set[int]) -> set[str]:
    """The addresses on which these processes wait for a connection, as /proc writes them."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
            except OSError:
                continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in sockets:
                found.add(words[1].rsplit(":")[0])
    return found


def family(pid: int) -> set[int]:
    """A process and all below it."""
    found = {pid}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            own, parent = int(path.parent.name), int(path.read_text().rsplit(")")[-1].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if parent in found:
            found.add(own)
    return found


def lan_address() -> str | None:
    """An address of this machine that others could reach, where a process may be given a machine name of its own."""
    found = re.findall(r"\|-- (\d+\.\d+\.\d+\.\d+)\n[^\n]*host LOCAL", Path("/proc/net/fib_trie").read_text())
    others = [address for address in found if not address.startswith("127.")]
    able = shutil.which("unshare") and subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode == 0
    return others[0] if able and others else None
