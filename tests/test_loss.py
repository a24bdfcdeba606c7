"""The chunked cross-entropy against torch's own in float64, over whole and split vocabularies, and what it allocates."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dist_llm.model import loss as module
from dist_llm.model.loss import CHUNK, IGNORED, ChunkedCrossEntropy, Slice, Statistics, cross_entropy, loss_and_gradients
from dist_llm.model.roles import Roles


def case(
    tokens: int, *, dim: int = 8, vocab: int = 37, dtype: torch.dtype = torch.float64, ignore: float = 0.3
) -> tuple[torch.Tensor, ...]:
    """x (T, D), weight (V, D), labels (T,), a share of them ignored."""
    source = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, dim, generator=source, dtype=torch.float64) * 2).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, dim, generator=source, dtype=torch.float64) * 2).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=source)
    return x, weight, labels.masked_fill(torch.rand(tokens, generator=source) < ignore, IGNORED)


def slopes(loss: torch.Tensor, *tensors: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
    """The gradients of scale x loss."""
    return list(torch.autograd.grad(loss * scale, tensors))


def oracle(x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """torch's own, summed."""
    return F.cross_entropy(x @ weight.T, labels, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("tokens", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3])
def test_equals_torch_at_every_chunk_boundary(tokens: int, smoothing: float) -> None:
    x, weight, labels = case(tokens)
    ours, theirs = ChunkedCrossEntropy.apply(x, weight, labels, smoothing), oracle(x, weight, labels, smoothing)
    assert ours.dtype == torch.float64 and ours.shape == ()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0.0)
    for a, b in zip(slopes(ours, x, weight, scale=0.37), slopes(theirs, x, weight, scale=0.37), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_chunk_changes_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, labels = case(100)
    whole = ChunkedCrossEntropy.apply(x, weight, labels, 0.1)
    first = slopes(whole, x, weight)
    monkeypatch.setattr(module, "CHUNK", 7)
    parts = ChunkedCrossEntropy.apply(x, weight, labels, 0.1)
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0.0)
    for a, b in zip(slopes(parts, x, weight), first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [7, CHUNK + 3])
def test_weighted_tokens_equal_torch(tokens: int, smoothing: float) -> None:
    """The sum of weight x loss over what has a label; an ignored token's weight counts for nothing, weight 0 is as good as ignored."""
    x, weight, labels = case(tokens)
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) * 3  # float32, as data gives them
    weights[::5] = 0.0
    ours = ChunkedCrossEntropy.apply(x, weight, labels, smoothing, weights)
    each = F.cross_entropy(x @ weight.T, labels, ignore_index=IGNORED, label_smoothing=smoothing, reduction="none")
    theirs = (each * weights.double()).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0.0)
    for a, b in zip(slopes(ours, x, weight, scale=0.37), slopes(theirs, x, weight, scale=0.37), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        alone = cross_entropy(x, weight, labels, smoothing=smoothing, weights=weights)
    assert torch.equal(alone, ours.detach())
    ones = ChunkedCrossEntropy.apply(x, weight, labels, smoothing, torch.ones(tokens))
    assert torch.equal(ones, ChunkedCrossEntropy.apply(x, weight, labels, smoothing))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("smoothing", "softcap"), [(0.0, 0.0), (0.1, 0.0), (0.0, 3.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_scaled_and_added_on_the_way(weighted: bool, smoothing: float, softcap: float, dtype: torch.dtype) -> None:
    """With a slope that is known before: over three chunks, into a sum that is there already; the loss is as without."""
    tokens, exact = 2 * CHUNK + 5, module.wide(dtype)
    x, weight, labels = (each.detach() for each in case(tokens, dtype=dtype))
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(1)) if weighted else None
    part, slope = module.whole(weight, smoothing, softcap), torch.tensor(0.37, dtype=torch.float64)
    expected, by_x, by_weight = loss_and_gradients(x, weight, labels, part, weights)
    total = torch.ones(weight.shape, dtype=exact)
    loss, scaled, none = loss_and_gradients(x, weight, labels, part, weights, slope=slope, total=total)
    assert none is None and by_weight is not None and torch.equal(loss, expected)
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close(scaled, by_x * slope.to(dtype), **close)
    torch.testing.assert_close(total - 1.0, by_weight.to(exact) * slope.to(exact), **close)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_labels_give_no_loss_and_no_gradient(smoothing: float) -> None:
    x, weight, labels = case(50, ignore=0.0)
    labels[:] = IGNORED
    loss = ChunkedCrossEntropy.apply(x, weight, labels, smoothing)
    assert loss.item() == 0.0
    by_x, by_weight = slopes(loss, x, weight)
    assert not by_x.any() and not by_weight.any() and bool(by_x.isfinite().all())


def test_an_ignored_token_has_no_gradient_of_its_own() -> None:
    x, weight, labels = case(40)
    by_x, _ = slopes(ChunkedCrossEntropy.apply(x, weight, labels, 0.1), x, weight)
    assert torch.equal(by_x.any(dim=1), labels >= 0)


def test_huge_logits_do_not_overflow() -> None:
    x, weight, labels = case(20)
    x, weight = (x.detach() * 100).requires_grad_(), (weight.detach() * 100).requires_grad_()  # logits of 1e5
    loss = ChunkedCrossEntropy.apply(x, weight, labels, 0.0)
    torch.testing.assert_close(loss, oracle(x, weight, labels))
    assert all(bool(slope.isfinite().all()) for slope in slopes(loss, x, weight))


def test_gradients_are_those_of_finite_differences() -> None:
    x, weight, labels = case(6, dim=3, vocab=5)
    assert torch.autograd.gradcheck(lambda x, weight: ChunkedCrossEntropy.apply(x, weight, labels, 0.1), (x, weight))


@pytest.mark.parametrize("cuts", [[37], [19, 18], [1, 35, 1], [10, 9, 9, 9]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_slices_of_the_vocabulary_add_up(cuts: list[int], smoothing: float) -> None:
    """What parallel/tensor.py does with two reductions, done here by threads (trap 19: uneven slices, global smoothing)."""
    x, weight, labels = case(60)
    parts, firsts = weight.detach().split(cuts), [sum(cuts[:at]) for at in range(len(cuts))]
    known: list[Any] = [None] * len(cuts)
    met = Barrier(len(cuts))

    def share(at: int, mine: Statistics) -> Statistics:
        known[at] = mine
        met.wait()
        largest = torch.stack([one.largest for one in known]).amax(0)
        exponentials = sum(one.exponentials * (one.largest - largest).exp() for one in known)
        total = sum(one.total for one in known) if smoothing else None
        return Statistics(largest, exponentials, sum(one.label for one in known), total)

    def slice_of(at: int) -> Any:
        part = Slice(firsts[at], 37, smoothing, lambda mine: share(at, mine))
        return loss_and_gradients(x.detach(), parts[at], labels, part)

    with ThreadPoolExecutor(len(cuts)) as pool:
        made = list(pool.map(slice_of, range(len(cuts))))
    expected = oracle(x, weight, labels, smoothing)
    by_x, by_weight = slopes(expected, x, weight)
    for loss, _, _ in made:
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0.0)
    torch.testing.assert_close(sum(one for _, one, _ in made), by_x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([one for _, _, one in made]), by_weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_takes_the_softmax_in_float32(dtype: torch.dtype) -> None:
    """The loss of bfloat16 activations is that of their rounded logits, not of rounded probabilities."""
    x, weight, labels = case(300, dtype=dtype)
    loss = ChunkedCrossEntropy.apply(x, weight, labels, 0.0)
    logits = (x.detach() @ weight.detach().T).double()
    expected = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)


def test_bfloat16_weight_gradients_do_not_decay_with_the_number_of_chunks() -> None:
    """trap 14: one product of all tokens rounds once; a bfloat16 sum over chunks would round at each of them."""
    x, weight, labels = case(64 * CHUNK, dtype=torch.bfloat16, dim=4, vocab=6, ignore=0.0)
    x = x.detach().abs().requires_grad_()  # so that the sum grows in one direction
    labels[:] = 0
    _, ours = slopes(ChunkedCrossEntropy.apply(x, weight, labels, 0.0), x, weight)
    exact = slopes(oracle(x.detach().double().requires_grad_(), w := weight.detach().double().requires_grad_(), labels), w)[0]
    error = ((ours.double() - exact).abs().amax() / exact.abs().amax()).item()
    assert error < 2 * 2.0**-8, f"relative error {error:.4f}"  # bfloat16 keeps 8 bits


class Largest(TorchDispatchMode):
    """The largest number of elements that any operation gave back."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(value.numel() for value in tree_iter(out) if isinstance(value, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_never_holds_all_logits(smoothing: float) -> None:
    tokens, vocab = 4 * CHUNK, 400
    x, weight, labels = case(tokens, vocab=vocab)
    with Largest() as seen:
        loss = Roles(smoothing=smoothing).loss(x[None], lambda x: x, weight, labels[None])
        forward = seen.elements
        slopes(loss, x, weight)
    assert forward == seen.elements == CHUNK * vocab  # a chunk's logits, of (T, V) = 4 x as many


def test_roles_flatten_batches() -> None:
    x, weight, labels = case(60)
    ours = Roles(smoothing=0.1).loss(x.view(3, 20, 8), lambda x: x, weight, labels.view(3, 20))
    torch.testing.assert_close(ours, oracle(x, weight, labels, 0.1))
