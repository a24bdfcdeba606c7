"""Initial weights by global name and element: the same model under every layout, each rank making what it holds."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_llm.model.table import Row
from dist_llm.random import fill_normal, key_of
from dist_llm.sharding import Box


@torch.no_grad()
def initialise(out: Tensor, row: Row, box: Box, *, seed: int, start: int = 0) -> Tensor:
    """Fills the 1-D `out` with elements [start, start + len) of the slice `box` of the row's initial tensor.

    Matrices are N(0, std), norm weights ones (zeros where 1 is added to them), biases and matrices with std 0 zeros.
    """
    if row.std == 0:
        return out.zero_()
    if row.std is not None:
        return fill_normal(out, key_of(seed, "init", row.name), std=row.std, shape=row.shape, box=box, start=start)
    return out.fill_(0.0 if row.zeros or row.name.endswith(".bias") else 1.0)
