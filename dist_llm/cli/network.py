"""The one place where a verb is allowed to use the network, and says that it will."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from dist_llm.config.hub import MARK

if TYPE_CHECKING:
    from dist_llm.config.schema import DataConfig


def sources_of(data: DataConfig) -> list[str]:
    """Every source that a data section names."""
    if data.mix:
        return [item.source for item in data.mix]
    return [data.source] if isinstance(data.source, str) else [*data.source]


def allow_hub(data: DataConfig, tell: Callable[[str], object]) -> None:
    """Where the text is to come from the hub: lets this process and its ranks ask it, and tells the user so first.

    The token comes from HF_TOKEN alone; HF_HUB_OFFLINE is respected.
    """
    named = [source for source in sources_of(data) if source.startswith(MARK)]
    if not named:
        return
    for variable in ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_TELEMETRY"):
        os.environ.setdefault(variable, "1")
    from dist_llm.data import hub

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    hub.allow(token=os.environ.get("HF_TOKEN") or None, offline=offline)
    use = "HF_HUB_OFFLINE is set, nothing is read from huggingface.co" if offline else "read from huggingface.co where it is not here yet"
    tell(f"network     {', '.join(named)}: {use}")
