"""Randomness that is addressed, not drawn in order.

One counter-based generator in 64-bit integer torch operations serves initialisation, dropout and shuffling. A number
is named by (seed, purpose, global name, global element), so it does not depend on rank, world size, layout or call
order: every rank makes just the elements it holds. Integers and uniforms are equal to the bit on every device;
normals are the inverse normal distribution function of a uniform, in float64, then cast.

The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with the constants of
Stafford's variant 13, applied twice with two halves of a 128-bit key.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements made at a time: bounds the int64 and float64 temporaries
# As signed 64-bit integers: int64 arithmetic wraps.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


def key_of(seed: int, purpose: str, name: str = "", step: int = 0) -> int:
    """The 128-bit key of one stream of random numbers."""
    text = f"{seed}\x1f{purpose}\x1f{name}\x1f{step}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def bits(index: Tensor, key: int) -> Tensor:
    """64 random bits for each global element: int64 of `index`'s shape."""
    return _bits(index, *halves(key))


def halves(key: int) -> tuple[int, int]:
    """The low and the high 64 bits of a key, as signed integers."""
    return _signed(key), _signed(key >> 64)


def uniform(index: Tensor, key: int) -> Tensor:
    """Float64 uniforms in the open interval (0, 1), one for each element of `index`."""
    return _uniform(bits(index, key))


def place_of(purpose: str, name: str = "", *, device: torch.device | None = None) -> Tensor:
    """(2,) int64: the halves of a key of a place where random numbers are used; a tensor, so that one graph serves all places."""
    return torch.tensor(halves(key_of(0, purpose, name)), device=device)


def keep_mask(index: Tensor, base: Tensor, place: Tensor, *, drop: float) -> Tensor:
    """Boolean mask of `index`'s shape, False with probability `drop`; compiles, because what changes by step or place is a tensor.

    base (2,) int64: the halves of a key of seed and step. place (2,) int64: those of a key of the place where it is used.
    """
    return uniform_at(index, base, place) >= drop


def uniform_at(index: Tensor, base: Tensor, place: Tensor) -> Tensor:
    """As `uniform`, under a key of two parts as `keep_mask` has it."""
    low, high = _mix(base ^ place)
    return _uniform(_bits(index, low, high))


def fill_normal(out: Tensor, key: int, *, std: float, shape: tuple[int, ...], box: tuple[tuple[int, int], ...], start: int = 0) -> Tensor:
    """Fills the 1-D `out` with elements [start, start + len) of the slice `box` of the normal tensor of a global shape.

    box: (start, stop) per dimension of `shape`; elements of the slice are counted row-major.
    """
    for at in range(0, out.numel(), CHUNK):
        local = torch.arange(start + at, start + min(at + CHUNK, out.numel()), device=out.device)
        index = _global_index(local, shape=shape, box=box)
        out[at : at + CHUNK] = torch.special.ndtri(uniform(index, key)).mul_(std).to(out.dtype)
    return out


def permute(index: Tensor, size: int, key: int) -> Tensor:
    """A bijection of [0, size) applied to int64 `index`: a six-round Feistel network with cycle walking.

    Luby and Rackoff 1988 (four rounds suffice for a pseudorandom permutation); values at or past `size` are
    walked on until they fall inside, less than four steps on average.
    """
    assert size >= 1
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = index.clone()
    outside = torch.ones_like(value, dtype=torch.bool)
    while bool(outside.any()):
        walked = value[outside]
        left, right = walked >> half, walked & mask
        for turn in range(6):
            left, right = right, left ^ (bits(right + (turn << 40), key) & mask)
        value[outside] = (left << half) | right
        outside = value >= size
    return value


def _global_index(local: Tensor, *, shape: tuple[int, ...], box: tuple[tuple[int, int], ...]) -> Tensor:
    """Row-major position in the global tensor of each row-major position inside the box."""
    index, stride, rest = torch.zeros_like(local), 1, local
    for extent, (start, stop) in zip(reversed(shape), reversed(box), strict=True):
        index = index + (rest % (stop - start) + start) * stride
        rest, stride = rest // (stop - start), stride * extent
    return index


def _bits(index: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    return _mix(_mix(index * GOLDEN + low) ^ high)


def _uniform(random: Tensor) -> Tensor:
    """52 of the bits and a half: with 53 the largest would round up to 1."""
    top = (random >> 12) & ((1 << 52) - 1)
    return (top.to(torch.float64) + 0.5) * 2.0**-52


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    """The low 64 bits as a signed integer (int64 arithmetic wraps)."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
