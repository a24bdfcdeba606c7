"""Weights in 4 or 8 bits, in blocks of neighbours along a row that share a scale; plain torch, the same on every device.

| kind | code of an element                                  | scale of a block   | bytes an element, blocks of 64 |
|------|-----------------------------------------------------|--------------------|--------------------------------|
| nf4  | the nearest of 16 quantiles of N(0, 1), arXiv:2305.14314 | largest magnitude | 1/2 + 4/64                     |
| int8 | round(127 x / scale)                                | largest magnitude  | 1 + 4/64                       |

Two nf4 codes share a byte, the first one in the high half, as bitsandbytes has it, whose kernel makes weights of them on a GPU where
it is installed. Scales are float32. A block never crosses a row
or a cut between ranks (config/rules.py sees to it), so that the numbers are those of one process under every layout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

# The quantiles of appendix E of arXiv:2305.14314: 0 is among them, and -1 and 1 are the ends.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
INT8 = 127
PIECE, PIECE_CUDA = 1 << 18, 1 << 24  # elements that are made float32 at once, on a CPU and on a GPU
Kernel = Callable[[Tensor, Tensor, int, Tensor], None]  # codes, scales, block, out


def code_bytes(count: int, kind: str) -> int:
    """Bytes of the codes of `count` elements, an even number."""
    assert count % 2 == 0, count
    return count // 2 if kind == "nf4" else count


def quantize(values: Tensor, *, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Values (n,), n a multiple of `block` -> (codes uint8 (n / 2 or n,), scales float32 (n / block,)). A block of zeros stays zeros."""
    rows = values.float().view(-1, block)
    scales = rows.abs().amax(1)
    scaled = rows / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if kind == "int8":
        return scaled.mul_(INT8).round_().to(torch.int8).view(torch.uint8).flatten(), scales
    table = torch.tensor(NF4, device=values.device)
    codes = torch.bucketize(scaled.flatten(), (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return codes[::2] * 16 + codes[1::2], scales


def dequantize(codes: Tensor, scales: Tensor, out: Tensor, *, kind: str, block: int) -> Tensor:
    """What `quantize` gave -> `out` (n,), in its dtype: products in float32, rounded once.

    A piece at a time, so that the float32 of one is all it takes; or by a kernel of bitsandbytes, which takes nothing.
    """
    if codes.is_cuda and kind == "nf4" and (kernel := kernel_of(codes.device, block, out.dtype)) is not None:
        kernel(codes, scales, block, out)
        return out
    return in_pieces(codes, scales, out, kind=kind, block=block)


def in_pieces(codes: Tensor, scales: Tensor, out: Tensor, *, kind: str, block: int) -> Tensor:
    """As `dequantize`, in plain torch."""
    table, some_blocks = _pairs(codes.device), max(1, (PIECE_CUDA if codes.is_cuda else PIECE) // block)
    for at in range(0, len(scales), some_blocks):
        here = slice(at, at + some_blocks)
        some = codes[code_bytes(at * block, kind) : code_bytes(min(here.stop, len(scales)) * block, kind)]
        values = some.view(torch.int8).float().div_(INT8) if kind == "int8" else F.embedding(some.int(), table)
        out.view(-1, block)[here].copy_(values.view(-1, block).mul_(scales[here, None]))
    return out


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two numbers of each byte of nf4 codes, (256, 2)."""
    return torch.tensor([(NF4[code >> 4], NF4[code & 15]) for code in range(256)], device=device)


@cache
def kernel_of(device: torch.device, block: int, dtype: torch.dtype) -> Kernel | None:
    """bitsandbytes' kernel, once it has given our numbers to the bit on this device; None where it is not there or gives others."""
    codes, scales = quantize(torch.linspace(-3, 5, 4 * block, device=device), kind="nf4", block=block)
    ours, theirs = (torch.empty(4 * block, dtype=dtype, device=device) for _ in range(2))
    try:
        import_module("bitsandbytes")
        _bitsandbytes(codes, scales, block, theirs)
    except (ImportError, OSError, RuntimeError, ValueError, AttributeError, NotImplementedError):
        return None
    return _bitsandbytes if torch.equal(in_pieces(codes, scales, ours, kind="nf4", block=block), theirs) else None


def _bitsandbytes(codes: Tensor, scales: Tensor, block: int, out: Tensor) -> None:
    torch.ops.bitsandbytes.dequantize_4bit.out(codes, scales, block, "nf4", list(out.shape), out.dtype, out)
