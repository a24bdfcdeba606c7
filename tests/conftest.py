"""Fixtures: one rank helper for the whole test run."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Worlds of real processes; see tests/ranks.py."""
    helper = Ranks()
    yield helper
    helper.close()


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """A case that plays a rank in this process must not leave the processor flushing denormals for the tests after it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
