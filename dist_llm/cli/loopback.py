"""Local ranks speak to each other over the loopback interface alone: nobody outside this machine can reach their ports."""

from __future__ import annotations

import os
import socket

TRANSPORTS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def stay_on_loopback() -> None:
    """Call before local ranks are started. Without it gloo listens at the address that this machine's name has.

    What the user has set stays. Under torchrun ranks may be on other machines: then nothing may be set.
    """
    name = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    for variable in TRANSPORTS if name else ():
        os.environ.setdefault(variable, str(name))
