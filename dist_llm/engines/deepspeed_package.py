"""The import of DeepSpeed: what must be set before it, and what it brings that must not happen. Imports nothing else of an engine."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from typing import Any

import torch

from dist_llm.errors import UsageError


def prepare_environment(device: torch.device) -> None:
    """Writes what DeepSpeed reads from the environment: before its first import. Nothing of ours reads it."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)


def load_package(device: torch.device) -> Any:
    """The deepspeed package, ready for a device. Raises UsageError where it is not installed."""
    prepare_environment(device)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # its logger keeps the stdout that it finds now
            import deepspeed
    except ImportError as error:
        what, install = "engine=deepspeed needs the deepspeed package", "pip install 'dist-llm[deepspeed]'"
        raise UsageError(what, where="layout.engine", found=str(error), next=install) from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)  # it calls the old names
    return deepspeed
