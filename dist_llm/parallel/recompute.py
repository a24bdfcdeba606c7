"""Selective recomputation: the feed-forward of a block is computed again in backward, attention is kept (arXiv:2205.05198).

Norms and activations are never kept (`model/kernels.py`); of the about 11 tensors of (tokens, dim) that a Llama block
still holds, gate and up are 5, and cheap to make again beside attention. Recompute `full` is a line in the walk of
`pipeline.py`. Dropout masks are addressed, so there is no random state to restore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


def run_again(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), with x alone kept for backward, which runs it a second time."""
    return _Again.apply(run, x) if torch.is_grad_enabled() else run(x)


class _Again(torch.autograd.Function):
    """The second run has a backward of its own, which adds to the weights' gradients where they lie."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Keeps x."""
        ctx.run = run
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Makes the graph and goes back through it."""
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            edge = get_gradient_edge(ctx.run(x))  # the output itself is not needed again
        torch.autograd.backward((edge,), (slope,))
        return None, x.grad
