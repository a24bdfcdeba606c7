"""Addressed randomness: frozen values, freedom from chunk, box and order, and the statistics of what comes out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dist_llm import random as addressed
from dist_llm.random import GOLDEN, MIX_1, MIX_2, bits, fill_normal, halves, keep_mask, key_of, permute, uniform

KEY = key_of(7, "init", "blocks.0.attention.q.weight")
MANY = 1 << 18
WORD = (1 << 64) - 1


def whole_normal(shape: tuple[int, ...], key: int, **options: object) -> torch.Tensor:
    """The normal tensor of a shape, made in one piece."""
    out = torch.empty(math.prod(shape), dtype=torch.float64)
    return fill_normal(out, key, std=1.0, shape=shape, box=tuple((0, extent) for extent in shape), **options).view(shape)


# --- frozen values ---------------------------------------------------------------------------------------------------


def test_golden_bits() -> None:
    assert KEY == 0xCB15F8B8A7ABD31D151EA58111D74831
    expected = [0x4AF58F2D38A7C9E9, 0x032EAB2AD121BFB6, 0x07A1F10B224F8AA7, 0x0000466289BD97A9]
    assert [value & WORD for value in bits(torch.arange(4), KEY).tolist()] == expected


def test_golden_weights() -> None:
    """Initial weights, as float32 stores them: a change here is a change of every run ever recorded."""
    out = fill_normal(torch.empty(6), KEY, std=0.02, shape=(2, 3), box=((0, 2), (0, 3)))
    expected = ["-0x1.654cacp-7", "-0x1.6f9516p-5", "-0x1.3498acp-5", "-0x1.6cf378p-4", "0x1.2a24e0p-6", "0x1.474e38p-5"]
    assert out.tolist() == [float.fromhex(text) for text in expected]


def test_golden_order() -> None:
    assert permute(torch.arange(10), 10, KEY).tolist() == [6, 3, 7, 5, 1, 8, 4, 2, 9, 0]
    assert permute(torch.tensor([0, 1, 2**40 - 1]), 2**40, KEY).tolist() == [461161656175, 466214940884, 1067931904599]


def test_keys_name_seed_purpose_name_and_step() -> None:
    names = [
        (1, "init", "x", 0),
        (2, "init", "x", 0),
        (1, "dropout", "x", 0),
        (1, "init", "y", 0),
        (1, "init", "x", 1),
        (11, "init", "x", 0),
    ]
    assert len({key_of(*name) for name in names}) == len(names)
    assert key_of(1, "ab", "c") != key_of(1, "a", "bc")  # parts do not run into each other


# --- against plain integers ------------------------------------------------------------------------------------------


def mixed(x: int) -> int:
    """The SplitMix64 finaliser in Python's unbounded integers."""
    x = (x ^ (x >> 30)) * MIX_1 & WORD
    x = (x ^ (x >> 27)) * MIX_2 & WORD
    return x ^ (x >> 31)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**128 - 1))
@settings(max_examples=200, deadline=None)
def test_bits_are_the_arithmetic_modulo_2_64(index: int, key: int) -> None:
    expected = mixed(mixed((index * GOLDEN + key) & WORD) ^ (key >> 64 & WORD))
    assert int(bits(torch.tensor([index]), key)) & WORD == expected


def element_of(value: int, key: int) -> int:
    """The element whose bits are `value`: the mixing turned round."""

    def unshift(x: int, shift: int) -> int:
        found = x
        for _ in range(64 // shift + 1):
            found = x ^ (found >> shift)
        return found

    def unmixed(x: int) -> int:
        x = unshift(x, 31) * pow(MIX_2, -1, 1 << 64) & WORD
        return unshift(unshift(x, 27) * pow(MIX_1, -1, 1 << 64) & WORD, 30)

    index = (unmixed(unmixed(value) ^ (key >> 64 & WORD)) - key) * pow(GOLDEN, -1, 1 << 64) & WORD
    return index - (1 << 64) if index >> 63 else index


@pytest.mark.parametrize("value", [0, WORD, 1 << 63, WORD >> 1])
def test_uniforms_stay_inside_the_open_interval(value: int) -> None:
    """The extreme bits too: a uniform of 1 would be an infinite weight."""
    index = torch.tensor([element_of(value, KEY)])
    assert int(bits(index, KEY)) & WORD == value
    drawn = uniform(index, KEY)
    assert 0.0 < float(drawn) < 1.0
    assert bool(torch.special.ndtri(drawn).isfinite())


# --- freedom from the order in which numbers are made ----------------------------------------------------------------


def test_any_box_equals_the_slice_of_the_whole() -> None:
    shape = (6, 7, 5)
    whole = whole_normal(shape, KEY)
    for box in itertools.product([(0, 6), (2, 5)], [(0, 7), (3, 4), (1, 7)], [(0, 5), (4, 5)]):
        extents = [stop - start for start, stop in box]
        part = fill_normal(torch.empty(math.prod(extents), dtype=torch.float64), KEY, std=1.0, shape=shape, box=box)
        assert torch.equal(part.view(extents), whole[tuple(slice(*range_) for range_ in box)])


def test_any_start_equals_the_run_of_the_box() -> None:
    shape, box = (9, 8), ((2, 9), (1, 6))
    whole = whole_normal(shape, KEY)[2:9, 1:6].flatten()
    for start, stop in [(0, 35), (1, 2), (7, 30), (34, 35)]:
        part = fill_normal(torch.empty(stop - start, dtype=torch.float64), KEY, std=1.0, shape=shape, box=box, start=start)
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_size_of_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    whole = whole_normal((13, 11), KEY)
    monkeypatch.setattr(addressed, "CHUNK", chunk)
    assert torch.equal(whole_normal((13, 11), KEY), whole)


def test_order_and_shape_of_the_index_change_nothing() -> None:
    index = torch.arange(60)
    turned = permute(index, 60, 1)
    assert torch.equal(uniform(index, KEY)[turned], uniform(turned, KEY))
    assert torch.equal(uniform(index.view(3, 4, 5), KEY).flatten(), uniform(index, KEY))


def test_bfloat16_is_the_rounded_float32() -> None:
    """So bfloat16 weights are their float32 masters, rounded. Rounding float64 once instead would differ in some of a million."""
    shape, box = (1000, 1000), ((0, 1000), (0, 1000))
    low, high = (torch.empty(1_000_000, dtype=kind) for kind in (torch.bfloat16, torch.float32))
    for out in (low, high):
        fill_normal(out, KEY, std=1.0, shape=shape, box=box)
    assert torch.equal(low, high.bfloat16())


def test_lower_dtypes_are_the_rounded_float64_values() -> None:
    exact = whole_normal((50, 40), KEY)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(2000, dtype=dtype)
        assert torch.equal(fill_normal(out, KEY, std=1.0, shape=(50, 40), box=((0, 50), (0, 40))), exact.flatten().to(dtype))


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, 0, 1, WORD, key_of(0, "dropout", "embedding", 3)])
def test_uniforms_are_uniform(key: int) -> None:
    drawn = uniform(torch.arange(MANY), key).numpy()
    assert abs(drawn.mean() - 0.5) < 5 * math.sqrt(1 / 12 / MANY)
    assert abs(drawn.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / MANY)
    assert stats.kstest(drawn, "uniform").pvalue > 1e-4


def test_normals_are_normal() -> None:
    drawn = whole_normal((512, 512), KEY).numpy().ravel()
    assert abs(drawn.mean()) < 5 / math.sqrt(MANY)
    assert abs(drawn.std() - 1.0) < 5 / math.sqrt(2 * MANY)
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    assert 4.0 < abs(drawn).max() < 6.5  # tails are there, and no further than 262,144 draws reach


def test_every_bit_is_fair() -> None:
    words = bits(torch.arange(MANY), KEY).numpy().view(np.uint64)
    for place in range(64):
        ones = int(((words >> np.uint64(place)) & np.uint64(1)).sum())
        assert abs(ones - MANY / 2) < 5 * math.sqrt(MANY / 4), place


@pytest.mark.parametrize("stride", [1, 2, 3, 64, 4096, 1 << 32])
def test_neighbours_are_uncorrelated(stride: int) -> None:
    index = torch.arange(MANY // 2)
    pair = uniform(index, KEY).numpy(), uniform(index + stride, KEY).numpy()
    assert abs(np.corrcoef(*pair)[0, 1]) < 5 / math.sqrt(MANY // 2)


def test_keys_are_uncorrelated() -> None:
    """Names that differ in one character, steps that follow each other, and raw keys that differ in one bit."""
    index = torch.arange(1 << 15)
    keys = [key_of(7, "dropout", f"blocks.{layer}", step) for layer in range(4) for step in range(4)]
    keys += [KEY ^ (1 << place) for place in (0, 1, 63, 64, 65, 127)]
    drawn = np.stack([uniform(index, key).numpy() for key in keys])
    away = np.corrcoef(drawn) - np.eye(len(keys))
    assert abs(away).max() < 5.5 / math.sqrt(len(index))


def test_a_changed_bit_of_the_index_changes_half_of_the_bits() -> None:
    index = torch.arange(4096)
    for place in (0, 1, 5, 20, 40, 62):
        changed = (bits(index, KEY) ^ bits(index ^ (1 << place), KEY)).numpy().view(np.uint64)
        flips = np.unpackbits(changed.view(np.uint8)).mean()
        assert abs(flips - 0.5) < 5 * math.sqrt(0.25 / (4096 * 64)), place


@pytest.mark.parametrize("drop", [0.0, 0.1, 0.5, 0.9])
def test_masks_drop_their_share(drop: float) -> None:
    kept = keep_mask(torch.arange(MANY), torch.tensor(halves(KEY)), torch.tensor([1, 2]), drop=drop).double().mean().item()
    assert abs(kept - (1 - drop)) <= 5 * math.sqrt(drop * (1 - drop) / MANY)


# --- permutations ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(0, 2**128 - 1))
@settings(max_examples=60, deadline=None)
def test_permutations_are_bijections(size: int, key: int) -> None:
    assert torch.equal(permute(torch.arange(size), size, key).sort().values, torch.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 255, 256, 257, 65535, 65537, 100_003])
def test_permutations_of_edge_sizes(size: int) -> None:
    assert torch.equal(permute(torch.arange(size), size, KEY).sort().values, torch.arange(size))


@pytest.mark.parametrize("size", [2**31 + 11, 2**40 + 1, 2**62 - 57])
def test_permutations_of_huge_sizes_stay_inside_and_apart(size: int) -> None:
    index = torch.cat([torch.arange(2000), torch.arange(size - 2000, size)])
    found = permute(index, size, KEY)
    assert 0 <= int(found.min()) <= int(found.max()) < size
    assert len(found.unique()) == len(index)


def test_permutations_move_everything_everywhere() -> None:
    """Over many keys each element visits each place about equally often."""
    size, keys = 12, 1000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permute(torch.arange(size), size, key_of(key, "shuffle")).numpy()] += 1
    statistic = ((counts - keys / size) ** 2 / (keys / size)).sum()
    assert stats.chi2.sf(statistic, (size - 1) ** 2) > 1e-4


def test_a_permutation_is_far_from_the_identity() -> None:
    size = 1000
    found = permute(torch.arange(size), size, KEY).numpy()
    assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.16
    assert (found == np.arange(size)).sum() < 10
