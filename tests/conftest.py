"""Fixtures: one helper for ranks and one for commands in the whole test run."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.commands import Commands
from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Worlds of real processes; see tests/ranks.py."""
    helper = Ranks()
    yield helper
    helper.close()


@pytest.fixture(scope="session")
def commands() -> Iterator[Commands]:
    """The command line; see tests/commands.py."""
    helper = Commands()
    yield helper
    helper.close()


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """A case that plays a rank in this process must not leave the processor flushing denormals for the tests after it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
