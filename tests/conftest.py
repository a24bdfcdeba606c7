"""Fixtures: one helper for ranks and one for commands in the whole test run."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import Commands
from tests.ranks import Ranks

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a shell's background job: what tests start would not hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def with_transformers(ranks: Ranks, commands: Commands) -> None:
    """transformers and PEFT in both helpers: importing them takes each rank or command three seconds."""
    for helper in (ranks, commands):
        helper.prepare("tests.hugging_face_cases:bring")


@pytest.fixture(scope="session")
def small_run(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small model that was trained on `skills` a little, saved by two ranks."""
    home = tmp_path_factory.mktemp("small")
    words = ["--steps", "6", "--run-dir", str(home / "run"), f"data.dir={home / 'data'}", "data.max_tokens=40_000", "--nproc", "2"]
    words += ["batch.micro=4"]
    done = commands.run("train", str(Path(__file__).parent.parent / "configs/tiny.yaml"), *words, "--layout", "tp=2", "data.validation=0.1")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return home / "run"


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder in memory, where there is one: writing many small files takes a tenth of the time there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as home:
        yield Path(home)


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """A case that plays a rank in this process must not leave the processor flushing denormals for the tests after it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
