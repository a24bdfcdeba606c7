"""Where ranks that were not forked by us meet. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Meeting:
    """A store's address. served: torchrun serves it, else rank 0 does. attempt: how often torchrun has started the ranks anew."""

    host: str
    port: int
    served: bool
    attempt: int
