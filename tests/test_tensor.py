"""The tensor-parallel operations against plain linear algebra in float64, their registration, and compiled blocks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.config.layout import Layout
from dist_llm.config.rules import problems
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.mesh import build_mesh
from dist_llm.model.kernels import activate
from dist_llm.model.loss import CHUNK, Counted, Slice
from dist_llm.model.parts import Norm, Projection, Projections
from dist_llm.model.sums import add_rows, gathered_by_row, known_slope, summing, sums_of
from dist_llm.model.table import table
from dist_llm.model.transformer import Context, build_unit, make_context
from dist_llm.parallel import compiled, tensor
from dist_llm.parallel.across import Across, across
from dist_llm.parallel.compiled import CompiledRoles
from dist_llm.parallel.tensor import Split, TensorRoles
from dist_llm.train.memory import LiveMemory
from tests.engine_cases import build, config, layout_of
from tests.ranks import Ranks

WORLDS = [(1, False), (2, False), (2, True), (3, False), (3, True), (4, False), (4, True)]
over_ranks = pytest.mark.parametrize(("tp", "sp"), WORLDS, ids=[f"tp={tp},sp={sp}" for tp, sp in WORLDS])


@over_ranks
@pytest.mark.parametrize(("biased", "joined"), [(False, False), (True, False), (False, True), (True, True)])
def test_columns(ranks: Ranks, tp: int, sp: bool, biased: bool, joined: bool) -> None:
    ranks.run(tp, "tests.cases:tensor_columns", sp, biased, joined)


@over_ranks
@pytest.mark.parametrize("activation", ["none", "swiglu", "gelu", "gelu_tanh"])
def test_row(ranks: Ranks, tp: int, sp: bool, activation: str) -> None:
    """traps 8 and 10"""
    ranks.run(tp, "tests.cases:tensor_row", sp, activation)


@over_ranks
def test_tokens_of_a_feed_forward_come_as_ranks_keep_them(ranks: Ranks, tp: int, sp: bool) -> None:
    ranks.run(tp, "tests.cases:tensor_feed_forward", sp)


@over_ranks
@pytest.mark.parametrize("vocab", [12, 13, 23])
def test_embed(ranks: Ranks, tp: int, sp: bool, vocab: int) -> None:
    ranks.run(tp, "tests.cases:tensor_embed", sp, vocab)


@over_ranks
@pytest.mark.parametrize(("vocab", "smoothing", "all_ignored"), [(12, 0.0, False), (13, 0.1, False), (23, 0.3, False), (13, 0.1, True)])
def test_loss(ranks: Ranks, tp: int, sp: bool, vocab: int, smoothing: float, all_ignored: bool) -> None:
    """trap 19; every token counts the same, then by weights of their own"""
    for weighted in (False, True):
        ranks.run(tp, "tests.cases:tensor_loss", sp, vocab, smoothing, all_ignored, weighted)


@pytest.mark.parametrize("sp", [False, True])
def test_one_reduction_per_block_input(ranks: Ranks, sp: bool) -> None:
    """tp=2: an all_reduce of V bytes sends V, a gather or a scatter V/2. Projections of one input share theirs."""
    whole = 2 * 12 * 6 * 8  # (B, S, D) in float64
    half = {"tp": whole // 2}
    sent = ranks.run(2, "tests.cases:tensor_bytes", sp)[0]
    if sp:
        assert sent == {"columns": half, "columns backward": {"tp": whole}, "row": half, "row backward": half}
    else:
        assert sent == {"columns": {}, "columns backward": {"tp": whole}, "row": {"tp": whole}, "row backward": {}}


def test_sequence_slices_do_not_hold_the_whole_sequence(ranks: Ranks) -> None:
    """The result of a reduce-scatter with one sequence in the micro-batch: S/tp tokens in memory, not S."""
    for behind, needed in ranks.run(2, "tests.cases:tensor_memory"):
        assert behind == needed


# --- registration ----------------------------------------------------------------------------------------------------


def single() -> Split:
    """A group of one rank."""
    return Split(build_mesh(Layout(), 0).tp, sp=False)


def leaves_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Normal numbers that collect gradients."""
    return [torch.randn(*shape).to(dtype).requires_grad_() for shape in shapes]


def compiled_operations(key: str) -> dict[str, tuple[Any, tuple]]:
    """Every operation of compiled blocks with arguments for one rank."""
    x, weight, other, bias, back, wide = leaves_of((2, 4, 6), (5, 6), (5, 6), (5,), (6, 4), (2, 4, 4), dtype=torch.float32)
    low_x, low = leaves_of((2, 8, 16), (32, 16), dtype=torch.bfloat16)
    beside = list(torch.randn(10, 6).split(5))
    return {
        "column": (compiled.column.default, (x, [weight, other], [], False, key, 0, "off")),
        "column, biased": (compiled.column.default, (x, [weight], [bias], False, key, 0, "off")),
        "column, joined": (compiled.column.default, (x, beside, [], True, key, 0, "off")),
        "column, fp8": (compiled.column.default, (low_x, [low], [], False, key, 0, "tensorwise")),
        "row": (compiled.row.default, (wide, back, key, 0, "off")),
        "row, fp8": (compiled.row.default, (low_x, low, key, 0, "rowwise")),
    }


@pytest.mark.parametrize("name", compiled_operations(""))
def test_operations_are_registered_as_torch_wants_them(name: str) -> None:
    operation, arguments = compiled_operations(single().group.key)[name]
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


LABELS = torch.tensor([[0, 1, -100, 4], [2, -100, 3, 4]])
SLICE = Slice(0, 5, 0.1, lambda known: known)
RMS, LAYER = tensor.Rule("rms", 1e-5), tensor.Rule("layer", 1e-5)
OPERATIONS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {  # with the shapes of what collects gradients
    "column": (lambda x, g, *w: tensor.Column.apply(x, g, None, RMS, False, 2, single(), *w), [(2, 4, 6), (6,), (5, 6), (3, 6)]),
    "column, biased": (lambda x, g, *w: tensor.Column.apply(x, g, None, RMS, False, 1, single(), *w), [(2, 4, 6), (6,), (5, 6), (5,)]),
    "column, layer": (lambda x, g, s, *w: tensor.Column.apply(x, g, s, LAYER, False, 1, single(), *w), [(2, 4, 6), (6,), (6,), (5, 6)]),
    "row": (lambda x, w: tensor.Row.apply("none", single(), w, x), [(2, 4, 4), (6, 4)]),
    "embed": (lambda w: tensor.Embed.apply(LABELS.clamp(min=0), w, 0, single()), [(5, 6)]),
    "loss": (
        lambda x, g, w: tensor.VocabularyLoss.apply(x, g, None, w, RMS, LABELS, Counted(None), SLICE, True, single()),
        [(2, 4, 6), (6,), (5, 6)],
    ),
    "loss, layer": (
        lambda x, g, s, w: tensor.VocabularyLoss.apply(x, g, s, w, LAYER, LABELS, Counted(None), SLICE, True, single()),
        [(2, 4, 6), (6,), (6,), (5, 6)],
    ),
}
COMPILED: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {  # with the shapes of x, weights and biases
    "column": (
        lambda x, *w: compiled.column(x, list(w), [], False, single().group.key, 0, "off"),
        [(2, 4, 6), (5, 6), (3, 6)],
    ),
    "column, biased": (
        lambda x, w, b: compiled.column(x, [w], [b], False, single().group.key, 0, "off"),
        [(2, 4, 6), (5, 6), (5,)],
    ),
    "row": (lambda x, w: compiled.row(x, w, single().group.key, 0, "off"), [(2, 4, 4), (6, 4)]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    operation, shapes = OPERATIONS[name]
    leaves = leaves_of(*shapes)
    if not name.startswith("loss"):
        assert torch.autograd.gradcheck(operation, leaves)
        return
    out = operation(*leaves)  # its backward uses up what forward kept: once, where gradcheck goes back again and again
    for leaf, found in zip(leaves, torch.autograd.grad(out, leaves, retain_graph=True), strict=True):
        assert torch.allclose(found, by_differences(lambda: operation(*leaves), leaf), atol=1e-8)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaves)


def by_differences(value: Callable[[], torch.Tensor], leaf: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """The gradient of a scalar by every element of a leaf, from two values of it each."""
    gradient, flat = torch.zeros_like(leaf), leaf.detach().view(-1)
    with torch.no_grad():
        for at in range(flat.numel()):
            here = float(flat[at])
            flat[at] = here + step
            above = float(value())
            flat[at] = here - step
            gradient.view(-1)[at] = (above - float(value())) / (2 * step)
            flat[at] = here
    return gradient


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_operations_add_gradients_by_weights_to_their_sums(name: str) -> None:
    """By finite differences; twice, so that the second backward adds to the first. Without a place there is no backward."""
    operation, shapes = COMPILED[name]
    leaves = leaves_of(*shapes)
    outs = operation(*leaves)
    slopes = [torch.randn_like(out) for out in (outs if isinstance(outs, list) else [outs])]

    def value() -> torch.Tensor:
        outs = operation(*leaves)
        return sum(((out * slope).sum() for out, slope in zip(outs if isinstance(outs, list) else [outs], slopes, strict=True)))

    with summed(leaves[1:]) as sums:
        torch.autograd.grad(value(), leaves, allow_unused=True)
        gradients = torch.autograd.grad(value(), leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert (gradient is None) == (leaf in sums)
        found = sums[leaf] / 2 if gradient is None else gradient
        assert torch.allclose(found, by_differences(value, leaf), atol=1e-8)
    with pytest.raises(AssertionError, match="sums of the unit's gradients are not open"):
        torch.autograd.grad(value(), leaves, allow_unused=True)


def test_a_backward_that_fails_leaves_no_sums_behind() -> None:
    """Other weights may come to lie where these were: their gradients would go to a buffer that nobody reads."""
    weights, sums = torch.zeros(12), torch.zeros(12)
    with pytest.raises(MemoryError), summing([(weights, sums)], slope=torch.tensor([3.0, 0.0])):
        place = sums_of(weights[4:10].view(2, 3))
        assert known_slope() == 3.0
        assert place is not None and place.data_ptr() == sums[4:].data_ptr() and place.shape == (2, 3)
        raise MemoryError
    assert sums_of(weights) is None and known_slope() is None


@contextmanager
def summed(parameters: Iterable[torch.Tensor]) -> Iterator[dict[torch.Tensor, torch.Tensor]]:
    """Opens sums for the matrices among parameters, zeros in their own dtype."""
    sums = {parameter: torch.zeros_like(parameter) for parameter in parameters if parameter.dim() == 2}
    with summing(sums.items()):
        yield sums


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "gelu_tanh"])
def test_an_activated_row_goes_back_as_plain_torch_does(kind: str) -> None:
    """Its backward uses up the parts, so that a graph is good for one: finite differences want more."""
    leaves = leaves_of(*[(2, 4, 4)] * (2 if kind == "swiglu" else 1), (6, 4))
    made, weight = [leaf * 1.0 for leaf in leaves[:-1]], leaves[-1]  # as a projection makes them: no leaves
    slope = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = torch.autograd.grad(activate(leaves[:-1], kind=kind) @ weight.T, leaves, slope)
    found = torch.autograd.grad(tensor.Row.apply(kind, single(), weight, *made), leaves, slope)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-14 * b.abs().max()


def block_of(changes: dict[str, Any], roles: type[TensorRoles]) -> tuple[ModelConfig, torch.nn.Module]:
    """A block through the operations on one rank; the same weights every time."""
    model = ModelConfig(**{"family": "llama", "layers": 1, "dim": 16, "heads": 4, "kv_heads": 2, "ffn": 24, "vocab": 11, **changes})
    mesh = build_mesh(Layout(), 0)
    rows = {row.name: row for row in table(model)}
    source = torch.Generator().manual_seed(0)

    def make(name: str) -> torch.nn.Parameter | None:
        values = torch.randn(rows[name].shape, generator=source, dtype=torch.float64) if name in rows else None
        return None if values is None else torch.nn.Parameter(values)

    return model, build_unit("blocks.0", model, make, roles(mesh.tp, sp=False, vocab=model.vocab, first=0))


def outputs(module: Any, block: torch.nn.Module, context: Context, *, added: bool = True) -> list[torch.Tensor]:
    """A block's output and all its gradients; added: those by matrices are where products add them, else autograd's."""
    entry = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    parameters = list(block.parameters())
    with summed(parameters if added else []) as sums:
        out = module(entry, context)
        by_entry, *gradients = torch.autograd.grad(out.square().sum(), [entry, *parameters], allow_unused=added)
    found = [sums.get(parameter, gradient) for parameter, gradient in zip(parameters, gradients, strict=True)]
    return [out, by_entry, *(gradient for gradient in found if gradient is not None)]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Equal but for the rounding of another formula for the norms: relative to the largest element of each tensor."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-13 * b.abs().max()


@pytest.mark.parametrize("changes", [{}, {"family": "gpt2"}], ids=str)
def test_blocks_compile_around_the_operations(changes: dict[str, Any]) -> None:
    """A block under torch.compile: one graph, and the same output and gradients."""
    (model, block), (_, plain) = block_of(changes, CompiledRoles), block_of(changes, TensorRoles)
    tokens = torch.arange(16).view(2, 8) % 11
    context = make_context(model, tokens, tokens, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = outputs(plain, plain, context, added=False)
    assert len(expected) == 2 + len(list(plain.parameters()))
    for found in (outputs(compiled, block, context), outputs(block, block, context), outputs(plain, plain, context)):
        same(found, expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("fp8", ["off", "tensorwise", "rowwise"])
def test_wide_neighbours_are_projected_one_by_one(fp8: str, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a compiler need not put their slopes side by side; the numbers and the sums are the same, in 8 bits to the bit."""
    source = torch.Generator().manual_seed(0)
    flat = torch.randn(48, 16, generator=source).bfloat16()
    made = {f"{name}.weight": torch.nn.Parameter(part) for name, part in zip("ab", flat.split([32, 16]), strict=True)}
    made |= {f"{name}.bias": torch.nn.Parameter(torch.randn(size).bfloat16()) for name, size in zip("ab", (32, 16), strict=True) if biased}
    pair = Projections(*(Projection(made.get, name) for name in "ab"))
    roles = CompiledRoles(build_mesh(Layout(), 0).tp, sp=False, vocab=11, first=0, fp8=fp8)
    x = torch.randn(2, 8, 16, generator=source).bfloat16().requires_grad_()
    slopes = [torch.randn(2, 8, width, generator=source).bfloat16() for width in (32, 16)]
    assert pair.joined
    runs = []
    for narrow, products in ((16, 1), (15, 2)):
        monkeypatch.setattr(compiled, "NARROW", narrow)
        found = roles.columns(x, Norm(made.get, "none", kind="rms", eps=1e-5), pair)
        assert len({part.untyped_storage().data_ptr() for part in found}) == products
        with summing([(flat, sums := torch.zeros(48, 16))]):
            by = torch.autograd.grad(found, [x, *pair.biases], slopes)
        runs.append([torch.cat(found, -1), sums, *by])
    for joined, apart in zip(*runs, strict=True):
        assert torch.equal(joined, apart) if fp8 != "off" else torch.allclose(joined, apart, rtol=0.02, atol=0.1)


def test_rows_are_added_where_they_repeat() -> None:
    total, rows, values = torch.ones(5, 3), torch.tensor([4, 0, 4, 4]), torch.arange(12.0).view(4, 3).bfloat16()
    expected = total.clone()
    for row, value in zip(rows, values, strict=True):
        expected[row] += value.float()
    assert torch.equal(add_rows(total, rows, values), expected) and torch.equal(total, expected)


@pytest.mark.parametrize(("count", "tokens", "most"), [(5, 40, 5), (300, 40, 300), (7, 1, 7), (9, 3000, 2)])
def test_values_of_one_row_are_gathered_before_they_are_added(count: int, tokens: int, most: int) -> None:
    """As a GPU does it: no row has two values that are not zero, so that no order matters."""
    source = torch.Generator().manual_seed(0)
    rows, values = torch.randint(most, (tokens,), generator=source), torch.randn(tokens, 3, generator=source, dtype=torch.float64)
    here, sums = gathered_by_row(rows, values, count)
    with_values = here[sums.any(1)]
    assert len(with_values.unique()) == len(with_values) == len(rows.unique())
    expected = torch.zeros(count, 3, dtype=torch.float64).index_add_(0, rows, values)
    torch.testing.assert_close(torch.zeros_like(expected).index_add_(0, here, sums), expected, rtol=1e-13, atol=1e-13)


def test_blocks_with_dropout_compile_for_all_steps() -> None:
    """The mask is another one at every step, and a changed step is no reason to compile again for ever."""
    (model, block), (_, plain) = (block_of({"dropout": 0.3}, roles) for roles in (CompiledRoles, TensorRoles))
    tokens = torch.arange(16).view(2, 8) % 11
    torch._dynamo.reset()
    compiled, graphs = torch.compile(block, backend="aot_eager"), []
    for step in range(5):
        context = make_context(model, tokens, tokens, dtype=torch.float64, step=step)
        same(outputs(compiled, block, context), outputs(plain, plain, context))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1]


def test_what_is_compiled_and_kept_belongs_to_these_operations(tmp_path: Path) -> None:
    """torch's keys do not know what a backward of ours does: they are told of our sources, once."""
    source = Path(compiled.__file__).parent
    with torch.compiler.config.patch(cache_key_tag="theirs"):
        compiled.tag_caches()
        compiled.tag_caches()
        assert torch.compiler.config.cache_key_tag == f"theirs dist_llm operations {compiled.sources_digest(source)}"
    copy = shutil.copytree(source, tmp_path / "parallel", ignore=shutil.ignore_patterns("__pycache__"))
    assert compiled.sources_digest(copy) == compiled.sources_digest(source)
    with (copy / "tensor.py").open("a") as file:
        file.write("\n")
    assert compiled.sources_digest(copy) != compiled.sources_digest(source)


def test_compiled_blocks_keep_no_more_than_others() -> None:
    """For backward, in bytes; by torch's own rule a compiled block keeps the norms' outputs and the activation besides."""
    compiled.keep_little()
    (model, block), (_, plain) = (block_of({"ffn": 32}, roles) for roles in (CompiledRoles, TensorRoles))
    tokens = torch.arange(16).view(2, 8) % 11
    context, kept = make_context(model, tokens, tokens, dtype=torch.float64), []
    torch._dynamo.reset()
    graph = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, model.dim, dtype=torch.float64, requires_grad=True)
    graph(x, context)  # compiled
    for run in (plain, graph):
        storages: dict[int, int] = {}

        def keep(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(x, context)
        kept.append(sum(storages.values()))
    stream = x.nbytes
    assert kept[1] <= kept[0] + stream / 2, [bytes_ / stream for bytes_ in kept]


@pytest.mark.long
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compiled_training_has_the_same_gradients_whatever_is_recomputed(recompute: str) -> None:
    """With torch's default compiler, for every way to recompute that a compiled run accepts."""
    layout, gradients = layout_of(f"dp=1,recompute={recompute}"), []
    for compiling in (False, True):
        given = config(layers=1)
        given["runtime"]["compile"] = compiling
        if {"runtime.compile", "layout.recompute"} & {problem.key for problem in problems(Config.model_validate(given), layout)}:
            return
        torch._dynamo.reset()
        _, engine, trainer = build(given, vars(layout), 0, "float64")
        trainer.gradients(0)
        gradients.append({item.piece.slot.name: item.values.clone() for item in engine.state() if item.kind == "gradient"})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=1e-14, msg=name)


# --- what is alive at once ---------------------------------------------------------------------------------------------


def beside(given: list[torch.Tensor], call: Callable[[], Any]) -> int:
    """The most bytes alive at once beside what is given."""
    with LiveMemory(given) as live:
        call()
    return live.peak - live.kept


@pytest.mark.parametrize(("dim", "rows"), [(32, 256), (512, 16)])
def test_the_head_holds_one_chunk_of_logits_and_its_gradients_once(dim: int, rows: int) -> None:
    """The normed input, the gradient by it and by the table, and one chunk; they are scaled where they lie."""
    tokens, part = 2 * CHUNK, Slice(0, rows, 0.0, lambda known: known)
    x, weight, gain = leaves_of((1, tokens, dim), (rows, dim), (dim,), dtype=torch.float32)
    labels = torch.randint(rows, (1, tokens))

    def call() -> None:
        loss = tensor.VocabularyLoss.apply(x, gain, None, weight, RMS, labels, Counted(None), part, True, single())
        torch.autograd.backward((torch.autograd.graph.get_gradient_edge(loss),), (torch.tensor(0.5, dtype=torch.float64),))

    most = 2 * x.nbytes + weight.nbytes + CHUNK * rows * 4
    assert beside([x, weight, gain, labels], call) < 1.1 * most


@pytest.mark.parametrize("rule", [RMS, LAYER])
def test_the_normed_input_is_gone_when_its_gradient_goes_through_the_norm(rule: Any) -> None:
    """Beside output and slope two tensors of (tokens, dim) at once, and the gradients by the weights; LayerNorm's output is nobody's."""
    x, gain, *weights = leaves_of((2, 256, 64), (64,), (32, 64), (32, 64), dtype=torch.float32)
    outputs = tensor.Column.apply(x, gain, None, rule, False, 2, single(), *weights)
    slopes = [torch.randn(2, 256, 32) for _ in range(2)]
    given = [x, gain, *weights, *outputs, *slopes]
    assert beside(given, lambda: torch.autograd.backward(outputs, slopes)) < 1.1 * (2 * x.nbytes + sum(weight.nbytes for weight in weights))


@pytest.mark.parametrize("kind", ["rms", "unit_rms"])
def test_norms_over_all_heads_have_the_gradients_of_finite_differences(kind: str) -> None:
    """As a function, and as the operation of compiled blocks."""
    group = single().group
    shapes = [(2, 3, 6), (2, 3, 4), (6,), (4,)]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *x: Across.apply(kind, 1e-5, group, 2, *x), given)
    assert torch.autograd.gradcheck(lambda *x: tuple(across(list(x[:2]), list(x[2:]), kind, 1e-5, group.key)[:2]), given)
