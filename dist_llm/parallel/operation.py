"""Registers the operations of compiled blocks with torch.library, fake and autograd included.

The low-level `Library` is used because `torch.library.custom_op` imports torch._dynamo at the first call
(1.7 s and 67 MB in every rank) and adds a wrapper to each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("dist_llm", "DEF")


def operation(schema: str, *, fake: Callable) -> Callable[[Callable], Any]:
    """Decorates the body of an operation: `schema` as in native_functions.yaml, `fake` gives the outputs' shapes."""
    name = schema.split("(")[0]

    def register(body: Callable) -> Any:
        _library.define(schema)
        _library.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dist_llm::{name}", fake, lib=_library)
        return getattr(torch.ops.dist_llm, name)

    return register


def differentiable(name: str, *, backward: Callable, setup: Callable) -> None:
    """Gives an operation its backward: `setup(ctx, inputs, output)` keeps what `backward(ctx, *slopes)` needs."""
    torch.library.register_autograd(f"dist_llm::{name}", backward, setup_context=setup, lib=_library)
