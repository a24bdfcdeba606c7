"""Compiled blocks under adapters: registered operations, one graph, and the numbers of blocks that are not compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from dist_llm.config.layout import Layout
from dist_llm.config.schema import ModelConfig
from dist_llm.mesh import build_mesh
from dist_llm.model.table import table
from dist_llm.model.transformer import Block, Context, build_unit, make_context
from dist_llm.parallel import compiled_adapted
from dist_llm.parallel.adapted import AdaptedRoles
from dist_llm.parallel.compiled import keep_little
from dist_llm.parallel.compiled_adapted import CompiledAdaptedRoles
from dist_llm.parallel.tensor import TensorRoles
from dist_llm.train.proof import judge, proof_rank
from tests.engine_cases import build, config, layout_of, replaced
from tests.layouts import concrete, config_of, for_layout
from tests.ranks import Ranks
from tests.test_parity import Prover

DIM, VOCAB = 16, 11
MODELS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"rank": 3, "alpha": 5.0}},
    "rslora, biases": {"qkv_bias": True, "mlp_bias": True, "out_bias": True, "adapter": {"rank": 4, "alpha": 7.0, "rank_stabilized": True}},
    "some targets": {"adapter": {"rank": 2, "targets": ["q", "v", "down"]}},
    "attention alone, noisy": {"neftune": 5.0, "adapter": {"rank": 2, "targets": ["o"]}},
    "dora": {"adapter": {"rank": 2, "dora": True}},
    "dora, gpt2": {"family": "gpt2", "adapter": {"rank": 2, "dora": True, "targets": ["q", "o", "up"]}},
    "dropped": {"adapter": {"rank": 2, "dropout": 0.3, "targets": ["k", "o", "gate", "down"]}},
    "dora, dropped": {"dropout": 0.2, "adapter": {"rank": 2, "dropout": 0.3, "dora": True}},
}
RUNS = [  # models and layouts of tests/layouts.py
    ("dora", "tp=2"),
    ("lora", "tp=2,sp=off"),
    ("nf4 dora", "dp=2,zero=3"),
    ("dora dropped", "tp=2"),  # masks are drawn by the places of tokens, which stay in their order for it
    ("llama", "tp=2"),  # without an adapter they come as the ranks keep them
    *(
        pytest.param(*pair, marks=pytest.mark.long)
        for pair in (
            ("lora", "tp=2"),
            ("dora dropped", "tp=2,sp=off"),
            ("nf4", "dp=2,zero=3"),
            ("lora on some", "dp=2,zero=2"),
            ("lora and ends", "dp=2,zero=1,recompute=full"),
            ("nf4", "pp=2,recompute=full"),
            ("int8", "dp=2,tp=2,zero=3,unshard=step"),
            ("nf4 dora", "tp=4"),
            ("nf4 dora", "tp=2,pp=2"),
            ("dora and table", "tp=2,pp=2"),
            ("lora pairs", "tp=2,zero=0"),
            ("dora dropped", "dp=2,zero=3"),
            ("halved lora", "pp=2,recompute=full"),
            ("halved", "pp=2"),  # nothing is on its weights: gradients by them go where products add them
            ("halved", "tp=2,pp=2,recompute=full"),
        )
    ),
]


def block_of(changes: dict[str, Any], roles: type[TensorRoles]) -> tuple[ModelConfig, Block]:
    """A block on one rank; the same weights every time, of which the table's trained ones collect gradients."""
    given = {"family": "llama", "layers": 1, "dim": DIM, "heads": 4, "kv_heads": 2, "ffn": 24, "vocab": VOCAB, **changes}
    model, source = ModelConfig(**given), torch.Generator().manual_seed(0)
    weights = {}
    for row in table(model):  # of a size that leaves the softmax its digits
        values = torch.randn(row.shape, generator=source, dtype=torch.float64) * (0.3 if len(row.shape) == 2 else 1.0)
        weights[row.name] = torch.nn.Parameter(values, requires_grad=row.trained)
    unit = build_unit("blocks.0", model, weights.get, roles(build_mesh(Layout(), 0).tp, sp=False, vocab=VOCAB, first=0))
    assert isinstance(unit, Block)
    return model, unit


def context_of(model: ModelConfig, step: int = 0, *, training: bool = True) -> Context:
    """Two sequences of eight tokens."""
    tokens = torch.arange(16).view(2, 8) % VOCAB
    return make_context(model, tokens, tokens, dtype=torch.float64, step=step, training=training)


def numbers(run: Any, block: Block, context: Context) -> dict[str, torch.Tensor]:
    """What a block leaves, and the gradients of what goes in and of what is trained."""
    x = torch.randn(2, 8, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    leaves = {"x": x, **{name: leaf for name, leaf in block.named_parameters() if leaf.requires_grad}}
    y = run(x, context)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y.square().sum(), leaves.values()), strict=True))}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], room: float) -> None:
    """Relative to the largest element of each tensor."""
    assert found.keys() == expected.keys()
    for name, b in expected.items():
        assert (found[name] - b).abs().max() <= room * b.abs().max(), name


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_block_is_the_block(name: str) -> None:
    """One graph forward and backward. Norms, rotary and SwiGLU are other formulas; without those, not compiled, equal to the bit."""
    (model, block), (_, plain) = (block_of(MODELS[name], roles) for roles in (CompiledAdaptedRoles, AdaptedRoles))
    torch._dynamo.reset()
    graph = torch.compile(block, backend="aot_eager", fullgraph=True)
    for context in (context_of(model), context_of(model, training=False)):
        expected = numbers(plain, plain, context)
        assert {part for part in expected if "lora" in part} and all(bool(value.any()) for value in expected.values())
        same(numbers(graph, block, context), expected, 1e-12)
        same(numbers(block, block, context), expected, 0.0 if model.family == "gpt2" else 1e-13)


def kept_bytes(run: Callable[..., torch.Tensor], block: Block, x: torch.Tensor, context: Context) -> int:
    """Bytes that autograd keeps for a backward, beside parameters and what comes with the batch."""
    given = [*block.parameters(), *vars(context).values(), *(context.rotary or ())]
    known = {tensor.untyped_storage().data_ptr() for tensor in given if isinstance(tensor, torch.Tensor)}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x, context)
    return sum(size for place, size in storages.items() if place not in known)


@pytest.mark.parametrize("name", ["lora", "some targets", "dora", "dropped", "dora, dropped"])
def test_a_compiled_block_keeps_no_more_than_the_block(name: str) -> None:
    """Lengths of rows, which a block keeps out of autograd's sight, are allowed for."""
    keep_little()
    changes = {"ffn": 32, **MODELS[name]}
    (model, block), (_, plain) = (block_of(changes, roles) for roles in (CompiledAdaptedRoles, AdaptedRoles))
    context = context_of(model)
    torch._dynamo.reset()
    graph = torch.compile(block, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 8, DIM, dtype=torch.float64, requires_grad=True)
    graph(x, context)  # compiled
    lengths = sum(leaf.nbytes for part, leaf in block.named_parameters() if part.endswith("lora_m"))
    found, expected = kept_bytes(graph, block, x, context), kept_bytes(plain, plain, x, context)
    assert expected > 4 * x.nbytes and found <= expected + lengths + x.nbytes / 2, (found / x.nbytes, expected / x.nbytes)


# --- as torch wants them -----------------------------------------------------------------------------------------------


def operations() -> dict[str, tuple[Any, tuple]]:
    """Every operation with arguments for one rank: LoRA beside nothing, DoRA with dropout, both with biases."""
    key, parts = build_mesh(Layout(), 0).tp.key, torch.Generator().manual_seed(0)

    def made(*shape: int, trained: bool = False) -> torch.Tensor:
        return torch.randn(shape, generator=parts).requires_grad_(trained)

    x, trained = made(2, 4, 6, trained=True), [made(2, 6, trained=True), made(5, 2, trained=True), made(5, trained=True)]
    masks = [torch.arange(8).view(2, 4), torch.tensor([3, 4]), torch.tensor([5, 6])]
    lora, dora = [2.0, 0.5, 0.0, 6.0], [3.0, 0.5, 0.25, 6.0]
    one, y = (x, made(5, 6)), made(2, 4, 5)
    return {
        "column": (compiled_adapted.column, (x, [made(5, 6), made(4, 6)], [], trained[:2], [], [*lora, *[0.0] * 4], key, 0, "off")),
        "column, dora": (compiled_adapted.column, (x, [made(5, 6)], [made(5)], trained, [made(5).abs(), *masks], dora, key, 0, "off")),
        "column, nothing": (compiled_adapted.column, (x, [made(5, 6)], [], [], [], [0.0] * 4, key, 0, "off")),
        "column back": (
            compiled_adapted.column_backward,
            ([y], *one[:1], [one[1]], trained, [made(5).abs(), *masks], dora, key, 0, "off"),
        ),
        "row back": (compiled_adapted.row_backward, (y, *one, trained, [made(5).abs(), *masks], dora, key, 0, "off")),
        "row": (compiled_adapted.row, (*one, trained[:2], [], lora, key, 0, "off")),
        "row, dora": (compiled_adapted.row, (*one, trained, [made(5).abs(), *masks], dora, key, 0, "off")),
        "lengths": (compiled_adapted.lengths, (made(5, 6), made(2, 6), made(5, 2), 0.5, "")),
    }


@pytest.mark.parametrize("name", operations())
def test_operations_are_registered_as_torch_wants_them(name: str) -> None:
    operation, arguments = operations()[name]
    tests = ["test_schema", "test_faketensor", *([] if "back" in name else ["test_autograd_registration", "test_aot_dispatch_static"])]
    torch.library.opcheck(operation.default, arguments, test_utils=tests)


@pytest.mark.parametrize("name", operations())
def test_results_share_no_memory(name: str) -> None:
    """With each other or with what goes in."""
    operation, arguments = operations()[name]
    found = operation(*arguments)
    leaves = [found] if isinstance(found, torch.Tensor) else list(found)
    for argument in arguments:
        leaves += [part for part in (argument if isinstance(argument, list) else [argument]) if isinstance(part, torch.Tensor)]
    assert len({leaf.untyped_storage().data_ptr() for leaf in leaves}) == len(leaves)


# --- whole runs ----------------------------------------------------------------------------------------------------------


@contextmanager
def in_graphs() -> Iterator[None]:
    """Modules that are compiled are traced, whole, and run as they were traced."""
    compiled = torch.nn.Module.compile
    with replaced(torch.nn.Module, "compile", lambda module: compiled(module, backend="aot_eager", fullgraph=True)):
        yield


def graph_rank(rank: int, world: int, say: Callable, job: dict[str, Any], layout: dict[str, Any], folder: str) -> dict[str, Any]:
    """A proof run whose blocks are graphs."""
    job["config"]["runtime"]["compile"] = True
    with in_graphs():
        found = proof_rank(rank, world, say, job, layout, folder)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    return found


@pytest.fixture(scope="module")
def provers(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prover, Prover]:
    """As it is, and in graphs."""
    folders = (tmp_path_factory.mktemp(name) for name in ("plain", "graphs"))
    work = "tests.test_compiled_adapters:graph_rank"
    return Prover(ranks, next(folders), sgd=False), Prover(ranks, next(folders), work, sgd=False, seconds=300)


@pytest.mark.parametrize(("model", "text"), RUNS)
def test_compiled_runs_are_those_of_one_process(provers: tuple[Prover, Prover], model: str, text: str) -> None:
    """Loss, norm, every gradient, weight and moment of three steps; and the bytes of the closed form."""
    layout = concrete(text)
    config = for_layout(config_of(model), layout)
    verdict = judge(provers[0].reference(config), provers[1].run(config, layout), layout=layout)
    assert verdict.equal, verdict.first


@pytest.mark.parametrize("adapter", [{}, {"rank": 2, "dropout": 0.3, "dora": True}], ids=str)
def test_all_blocks_and_steps_share_a_graph(adapter: dict[str, Any]) -> None:
    """Whatever is dropped in them: ten blocks, two steps, one graph; torch makes eight at most."""
    given = config(layers=10, dropout=0.2, adapter=adapter)
    given["runtime"]["compile"] = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with in_graphs():
        _, _, trainer = build(given, vars(layout_of("dp=1")), 0, "float64")
        for step in range(2):
            trainer.step(step)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.long
@pytest.mark.parametrize("name", ["lora", "dora, dropped"])
def test_training_with_torch_s_default_compiler(name: str) -> None:
    """The gradients of a step, and the loss of the next ones."""
    gradients, losses = [], []
    for compiling in (False, True):
        given = config(layers=2, adapter=MODELS[name]["adapter"])
        given["runtime"]["compile"] = compiling
        torch._dynamo.reset()
        _, engine, trainer = build(given, vars(layout_of("dp=1")), 0, "float64")
        trainer.step(0)
        taken = trainer.gradients(1)
        gradients.append({item.piece.slot.name: item.values.clone() for item in engine.state() if item.kind == "gradient"})
        engine.step(taken.learning_rate)
        losses.append(trainer.step(2).loss)
    assert gradients[0].keys() == gradients[1].keys() and abs(losses[1] / losses[0] - 1) < 1e-12
    for part, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][part], expected, rtol=1e-10, atol=1e-14, msg=part)
