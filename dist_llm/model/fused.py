"""Small pure functions inside our operations, compiled on CUDA with `runtime.compile`.

A compiler fuses what lies between operations, not what is inside them: there the casts of 8-bit products and the
cross-entropy of the head would be rows of small kernels. Eagerly, and on a CPU, the same functions run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_on = False
SHAPES = 64  # of one function, each compiled for itself


def fuse(on: bool) -> None:
    """Whether this process compiles the functions that are marked `fused`."""
    global _on
    _on = on
    if on:  # a model has more shapes of operands than torch allows a function by default; beyond it runs eagerly, and slowly
        torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)


def compiling() -> bool:
    """Whether it does."""
    return _on


def fused(function: Callable) -> Callable:
    """Marks a function of tensors and numbers, without gradients, that is worth one kernel."""
    compiled: Callable | None = None

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal compiled
        if not _on or torch.compiler.is_compiling():
            return function(*arguments, **options)
        compiled = compiled or torch.compile(function, dynamic=False)
        with torch.no_grad():
            return compiled(*arguments, **options)

    return call
