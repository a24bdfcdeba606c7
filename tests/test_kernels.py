"""Norms, activations and rotary positions by hand against autograd in float64, and what a block keeps for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dist_llm.config.layout import Layout
from dist_llm.config.schema import ModelConfig
from dist_llm.mesh import build_mesh
from dist_llm.model import kernels
from dist_llm.model.kernels import Normed, RotateInPlace, activate, activate_backward, norm, norm_backward, rotated
from dist_llm.model.table import table
from dist_llm.model.transformer import Block, build_unit, make_context, rotary_table
from dist_llm.parallel.flat import pack
from dist_llm.parallel.tensor import TensorRoles


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers that ask for a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def close(found: torch.Tensor, expected: torch.Tensor, *, within: float = 1e-14) -> None:
    """Relative to the largest element."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= within * expected.abs().max()


@pytest.mark.parametrize(("kind", "shifted"), [("rms", False), ("layer", True), ("layer", False)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_norms_and_their_gradients_are_those_of_torch(kind: str, shifted: bool, offset: float) -> None:
    """offset: a mean far from zero, which LayerNorm takes away and RMSNorm does not."""
    x, weight = (random(3, 5, 16) + offset).detach().requires_grad_(), random(16, seed=1)
    bias, slope = random(16, seed=2) if shifted else None, (random(3, 5, 16, seed=3) + offset).detach()
    expected = F.rms_norm(x, (16,), weight, 1e-5) if kind == "rms" else F.layer_norm(x, (16,), weight, bias, 1e-5)
    given = [x, weight, *([] if bias is None else [bias])]
    close(norm(x.detach(), weight.detach(), None if bias is None else bias.detach(), kind=kind, eps=1e-5), expected.detach())
    by = torch.autograd.grad(expected, given, slope)
    for a, b in zip(norm_backward(slope, x.detach(), weight.detach(), bias, kind=kind, eps=1e-5), by, strict=True):
        close(a, b, within=1e-13)
    mine = torch.autograd.grad(Normed.apply(x, weight, bias, kind, 1e-5), given, slope)
    for a, b in zip(mine, by, strict=True):
        close(a, b, within=1e-13)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_take_their_sums_in_float32(kind: str) -> None:
    """A gradient by the weight over 4096 bfloat16 tokens: a bfloat16 sum would stop growing at 256."""
    x, weight = random(4096, 8, dtype=torch.bfloat16).detach(), torch.ones(8, dtype=torch.bfloat16)
    bias = torch.zeros(8, dtype=torch.bfloat16) if kind == "layer" else None
    by_x, by_weight, *_ = norm_backward(x.abs() * x.sign(), x, weight, bias, kind=kind, eps=1e-5)
    exact = norm_backward(x.double(), x.double(), weight.double(), None if bias is None else bias.double(), kind=kind, eps=1e-5)
    assert by_x.dtype == by_weight.dtype == torch.bfloat16
    close(by_weight.double(), exact[1], within=2**-8)


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "gelu_tanh"])
def test_activations_and_their_gradients_are_those_of_torch(kind: str) -> None:
    parts = [random(7, 12, seed=seed) for seed in range(2 if kind == "swiglu" else 1)]
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    expected = F.silu(parts[0]) * parts[1] if kind == "swiglu" else F.gelu(parts[0], approximate=approximate)
    slope, plain = random(7, 12, seed=5).detach(), [part.detach() for part in parts]
    close(activate(parts, kind=kind).detach(), expected.detach())
    out = [part.clone() for part in plain]
    with torch.no_grad():
        again = activate_backward(slope.clone(), out, kind=kind)
    close(again, expected.detach())
    for a, b in zip(out, torch.autograd.grad(expected, parts, slope), strict=True):
        close(a, b)


@pytest.mark.parametrize("some", [0, 512, 15, 4])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("shape", [(5, 6, 3 * 8), (5, 6, 3, 8)])
def test_rotary_positions_in_place(shape: tuple[int, ...], own: bool, some: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """some: tokens at once, of all sequences, of two and of a part of one; 0: no pieces. own: each sequence has positions of its own."""
    monkeypatch.setattr(kernels, "TOKENS", some or 512)
    monkeypatch.setattr(kernels, "MANY", 1 if some else 1 << 15)
    wide, slope = random(5, 6, 2 * 24), random(*shape, seed=1).detach()
    positions = torch.arange(30).view(5, 6) if own else torch.arange(6)[None]
    angles = rotary_table(positions, width=8, theta=100.0, dtype=torch.float64)
    expected = rotated(wide[..., :24].view(5, 6, 3, 8), *angles).view(shape)
    made = (wide * 1.0)[..., :24].view(shape)  # as neighbouring projections give it: rows with others' features between them
    found = RotateInPlace.apply(made, *angles)
    assert found.data_ptr() == made.data_ptr()
    close(found.detach(), expected.detach())
    close(torch.autograd.grad(found, wide, slope)[0], torch.autograd.grad(expected, wide, slope)[0])


def flat_block(model: ModelConfig) -> Block:
    """A block on views of one flat buffer, as an engine builds it, on one rank."""
    rows = [row for row in table(model) if row.unit == "blocks.0"]
    plan = pack(rows, unit="blocks.0", tp=1, sp=False, coordinate=0, shards=1)
    buffer = torch.randn(plan.padded, generator=torch.Generator().manual_seed(0)) * 0.02
    views = {slot.name: buffer[slot.offset : slot.offset + slot.numel].view(slot.shape) for slot in plan.slots}
    roles = TensorRoles(build_mesh(Layout(), 0).tp, sp=False, vocab=model.vocab, first=0)
    block = build_unit("blocks.0", model, lambda name: torch.nn.Parameter(views[name].data) if name in views else None, roles)
    assert isinstance(block, Block)
    return block


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 1 + 3 + 1 + 1 + 2 * 688 / 256),  # x; q, k, v; attention's output; the residual; gate and up
        ({"kv_heads": 2}, 1 + 1.5 + 1 + 1 + 2 * 688 / 256),
        ({"family": "gpt2"}, 1 + 3 + 1 + 1 + 688 / 256),  # learned positions, GELU
    ],
)
def test_a_block_keeps_what_is_dear_to_compute(changes: dict[str, Any], kept: float) -> None:
    """In tensors of (tokens, dim), but for the log-sum-exp of attention: one number a head and token."""
    model = ModelConfig(**{"family": "llama", "layers": 1, "dim": 256, "heads": 8, "ffn": 688, "vocab": 64, "max_positions": 64, **changes})
    block, tokens = flat_block(model), torch.zeros(2, 64, dtype=torch.long)
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    context = make_context(model, tokens, tokens, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(random(2, 64, 256, dtype=torch.float32), context)
    size = 2 * 64 * 256 * 4
    angles = sum(tensor.nbytes for tensor in context.rotary or ())
    assert sum(found.values()) - angles == pytest.approx(size * kept, rel=0.04)
    out.sum().backward()


def test_blocks_keep_one_mask_between_them() -> None:
    """Of a boolean mask attention makes numbers, (B, 1, S, S) in every block, and keeps them: the context has them already."""
    model = ModelConfig(family="llama", layers=1, dim=64, heads=4, ffn=96, vocab=64)
    block, tokens, documents = flat_block(model), torch.zeros(2, 48, dtype=torch.long), torch.arange(48).expand(2, -1) // 10
    context = make_context(model, tokens, tokens, dtype=torch.float32, documents=documents)
    found = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[-2:] == (48, 48):
            found.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(block(random(2, 48, 64, dtype=torch.float32), context), context)
    assert context.mask is not None and found == {context.mask.untyped_storage().data_ptr()}


def test_neighbouring_weights_take_part_in_one_product() -> None:
    """q, k, v in one, gate and up in one: four products forward, and eight backward where the slopes are neighbours too."""
    model = ModelConfig(family="llama", layers=1, dim=256, heads=8, ffn=688, vocab=64)
    block, tokens = flat_block(model), torch.zeros(2, 64, dtype=torch.long)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        block(random(2, 64, 256, dtype=torch.float32), make_context(model, tokens, tokens, dtype=torch.float32))
    assert sum(event.count for event in seen.key_averages() if event.key == "aten::mm") == 4
