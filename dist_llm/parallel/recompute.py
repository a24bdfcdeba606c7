"""Selective recomputation: keep what is dear to compute, compute the rest again in backward (arXiv:2205.05198).

Kept are the outputs of matrix products, attention and the tensor-parallel operations, so that nothing is communicated
twice; norms, activations, rotary products and residual sums are computed again. Recompute `full` is a line in the walk
of `pipeline.py`. Dropout masks are addressed, so there is no random state to restore.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def _policy(_, operation: Any, *args, **kwargs) -> CheckpointPolicy:
    ours = operation.namespace == "dist_llm"
    return CheckpointPolicy.MUST_SAVE if ours or operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def run_selective(module: nn.Module, *inputs: Any) -> Tensor:
    """The module's output, with only the dear intermediates kept for backward."""

    def contexts() -> tuple[Any, Any]:
        return create_selective_checkpoint_contexts(_policy)

    return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)
