"""Projections that PEFT has in one matrix (GPT-2's q, k and v): their adapters as one, and the one as theirs.

    A   (n R, in)    the A of each, one below the other
    B   (3 D, n R)   the B of each, in its rows and in the columns of its A; zeros elsewhere
    m   (3 D,)       the lengths of all rows

So B A is the same matrix, row by row. One of PEFT's own has one A under all of them: it is each one's, with the rows of B that are its.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

Rows = Mapping[str, tuple[int, int]]  # of each projection, in order: where its rows begin and end


def join(tensors: Mapping[str, Tensor], last: str, rows: Rows) -> Tensor:
    """One matrix of the adapters that there are, by their projections. last: lora_a, lora_b or lora_m."""
    if last != "lora_b":
        return torch.cat(list(tensors.values()))
    first = next(iter(tensors.values()))
    made = first.new_zeros(max(stop for _, stop in rows.values()), sum(tensor.shape[1] for tensor in tensors.values()))
    at = 0
    for part, tensor in tensors.items():
        made[slice(*rows[part]), at : at + tensor.shape[1]] = tensor
        at += tensor.shape[1]
    return made


def split(tensor: Tensor, last: str, parts: Sequence[str], rows: Rows, *, rank: int) -> dict[str, Tensor]:
    """The matrices of some projections out of theirs. rank: of each; where the matrix has no other, all share it."""
    found = {}
    for at, part in enumerate(parts):
        shared = rank == tensor.shape[0 if last == "lora_a" else -1]
        columns = slice(0, rank) if shared else slice(at * rank, (at + 1) * rank)
        found[part] = tensor[columns] if last == "lora_a" else tensor[slice(*rows[part])]
        found[part] = (found[part][:, columns] if last == "lora_b" else found[part]).contiguous()
    return found


def parts_of(matrices: Sequence[Tensor], rows: Rows, *, rank: int, all_of_them: bool) -> tuple[str, ...] | None:
    """Whose adapters the B of all blocks hold, each of a rank: the rows of some projections in columns of their own, or all in the same.

    None where neither is so. all_of_them: not of some alone, because all have a length.
    """
    count = matrices[0].shape[1] // rank
    learned = any(bool(one.any()) for one in matrices)
    for parts in combinations(rows, count):
        if len(parts) < len(rows) and (all_of_them or not learned):  # zeros say nothing; PEFT's own, before a step, is on all of them
            continue
        if all(torch.equal(join(split(one, "lora_b", parts, rows, rank=rank), "lora_b", rows), one) for one in matrices):
            return parts
    return tuple(rows) if count == 1 else None
