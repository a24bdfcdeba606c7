"""Fixtures: one rank helper for the whole test run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Worlds of real processes; see tests/ranks.py."""
    helper = Ranks()
    yield helper
    helper.close()
