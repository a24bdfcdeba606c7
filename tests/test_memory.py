"""The peak of memory: predicted from table and layout, and measured as the live tensors of the real engine's step."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks.gpu import RESULTS
from benchmarks.gpu_work import Job
from dist_llm.config.schema import Config
from dist_llm.engines import offload
from dist_llm.mesh import coordinate
from dist_llm.model import kernels, loss, quantize
from dist_llm.parallel import correction, pipeline
from dist_llm.plan import memory, residency, traffic, units
from dist_llm.plan.memory import PARTS, peak_bytes, persistent_bytes
from dist_llm.plan.predict import predicted, shape_of
from tests.engine_cases import config, layout_of
from tests.ranks import Ranks

WITHIN = 0.01  # of the measured peak; what is left out are tensors of a number per token or feature
SIZES: dict[str, Any] = {"layers": 3, "dim": 128, "heads": 4, "kv_heads": 4, "ffn": 344, "vocab": 512}
Case = tuple[str, str, dict[str, Any]]  # layout, dtype, changes to the run


def run_of(**changes: Any) -> dict[str, Any]:
    """A config large enough that its tensors outweigh the small ones: 128 tokens, two micro-batches and more."""
    runtime = changes.pop("runtime", {})
    given = config(**{"micro": 2, "batch": 4, "sequence": 128, **SIZES, **changes})
    return {**given, "runtime": {**given["runtime"], **runtime}}


CASES: list[Case] = [
    ("dp=1", "float32", {}),
    ("dp=1", "float32", {"batch": 2}),
    ("dp=1", "bfloat16", {"sequence": 64, "layers": 2}),
    ("dp=1", "float64", {"sequence": 64}),
    ("dp=1", "float32", {"kv_heads": 2, "qk_norm": True, "tied": True}),
    ("dp=1", "float32", {"family": "gpt2"}),
    ("dp=1", "float32", {"family": "gpt2", "dropout": 0.1}),
    ("dp=1,recompute=selective", "float32", {"family": "gpt2", "dropout": 0.1}),
    ("dp=1,recompute=full", "float32", {"family": "gpt2", "dropout": 0.1}),
    ("dp=1", "float32", {"document_mask": True}),
    ("dp=1", "float32", {"vocab": 4096, "micro": 12, "batch": 12, "layers": 1}),  # the head, more than one chunk
    ("dp=1,recompute=full", "float32", {"layers": 6}),
    ("dp=1,recompute=selective", "float32", {}),
    ("dp=1,offload=optimizer", "float32", {"optimizer": {"kind": "sgd", "momentum": 0.9}}),
    ("dp=1", "float32", {"family": "olmo2", "kv_heads": 2}),
    ("dp=1,recompute=selective", "float32", {"family": "olmo2", "dropout": 0.1}),
    ("tp=2", "float32", {"family": "olmo2"}),
    ("dp=1", "float32", {"family": "gemma3", "kv_heads": 2, "sliding_window": 32, "full_every": 2}),
    ("dp=1,recompute=full", "float32", {"family": "gemma2", "sliding_window": 32, "attention_softcap": 0.0}),
    ("dp=1", "float32", {"family": "gemma2", "attention_softcap": 0.0, "vocab": 4096, "micro": 12, "batch": 12, "layers": 1}),
    ("dp=1", "float32", {"family": "gpt2", "max_positions": 2048, "layers": 1, "sequence": 64, "micro": 1, "batch": 1}),
    ("dp=1", "bfloat16", {"family": "gpt2", "max_positions": 1024, "layers": 1, "sequence": 64, "micro": 1, "batch": 2}),
    ("tp=2", "bfloat16", {"sequence": 64, "layers": 1, "vocab": 128}),
    ("dp=2", "float32", {}),
    ("dp=2,zero=0,reduce=micro_batch", "float32", {"batch": 8}),
    ("dp=2,zero=1", "float32", {"tied": True, "batch": 8}),
    ("dp=2,zero=1", "float32", {"runtime": {"reduce_order": "fast"}}),
    ("dp=2,zero=2", "bfloat16", {"sequence": 64, "layers": 2}),
    ("dp=2,zero=2,reduce=step", "float32", {"micro": 1, "batch": 8}),
    ("dp=2,zero=3", "float32", {"micro": 1, "layers": 6, "sequence": 64}),
    ("dp=2,zero=3,unshard=step,offload=optimizer", "float32", {"micro": 1}),
    ("tp=2,sp=off", "float32", {"kv_heads": 1}),
    ("tp=2", "float32", {}),
    ("tp=2,recompute=selective", "float32", {"family": "gpt2"}),
    ("tp=2,recompute=full", "bfloat16", {"sequence": 64, "layers": 2, "micro": 1}),
    ("pp=2", "float32", {"batch": 8, "tied": True}),
    ("pp=2,schedule=gpipe,reduce=micro_batch", "float32", {"batch": 6}),
    ("pp=2,schedule=interleaved", "float32", {"layers": 4, "batch": 8}),
    ("pp=4", "float32", {"layers": 6, "batch": 8}),
    ("dp=2,pp=2,zero=3", "float32", {"micro": 1}),
    ("pp=2,recompute=selective", "float32", {"layers": 5, "dropout": 0.1}),  # five blocks: each stage has half of the third
    ("pp=2,recompute=full", "float32", {"layers": 1, "vocab": 128}),  # one block: half of it beside each end
    ("pp=2", "bfloat16", {"layers": 1, "sequence": 64}),
    ("pp=2", "float32", {"layers": 5, "family": "olmo2"}),
    ("tp=2,pp=2", "float32", {"layers": 1, "adapter": {"rank": 8, "targets": ["q", "v", "up"]}}),
    ("dp=2,tp=2,zero=2", "float32", {}),
    ("tp=2,pp=2,recompute=full", "float32", {"layers": 4}),
    ("dp=1", "float32", {"adapter": {"rank": 8}}),
    ("dp=1", "bfloat16", {"sequence": 64, "layers": 2, "adapter": {"rank": 4, "targets": ["q", "v"]}}),
    ("dp=2,zero=2", "float32", {"adapter": {"rank": 8}}),
    ("dp=2,zero=3", "float32", {"adapter": {"rank": 16}, "micro": 1, "layers": 6, "sequence": 64}),
    ("tp=2", "float32", {"adapter": {"rank": 8}}),
    ("pp=2", "float32", {"adapter": {"rank": 8}, "batch": 8}),
    ("dp=1", "float32", {"ffn": 384, "adapter": {"rank": 8, "quantize": "nf4"}}),
    ("dp=2,zero=3", "float32", {"ffn": 384, "adapter": {"rank": 8, "quantize": "nf4"}, "layers": 6, "micro": 1}),
    ("tp=2", "float32", {"ffn": 384, "adapter": {"rank": 8, "quantize": "int8", "block": 32}}),
    ("dp=1", "float32", {"adapter": {"rank": 8, "dora": True}}),
    ("tp=2,recompute=full", "bfloat16", {"sequence": 64, "adapter": {"rank": 4, "dora": True, "targets": ["v", "down"]}}),
    ("dp=2,zero=3", "float32", {"ffn": 384, "adapter": {"rank": 8, "quantize": "nf4", "dora": True}, "layers": 6, "micro": 1}),
    ("dp=1", "float32", {"adapter": {"rank": 8, "dropout": 0.1}}),
    ("tp=2", "float32", {"adapter": {"rank": 8, "dropout": 0.1, "dora": True}, "micro": 8, "batch": 16, "layers": 2}),
    ("dp=2,zero=2", "float32", {"adapter": {"rank": 8, "modules_to_save": ["embedding", "head"]}}),
    ("tp=2", "bfloat16", {"sequence": 64, "tied": True, "adapter": {"rank": 4, "modules_to_save": ["embedding"]}}),
    ("tp=2", "float32", {"neftune": 5.0, "layers": 1}),
    ("tp=2", "float32", {"neftune": 5.0, "adapter": {"rank": 8}, "layers": 1}),
    ("tp=4", "float32", {"family": "gpt2", "dropout": 0.1}),
    ("dp=1", "float32", {"preference": {"beta": 0.1}, "vocab": 2048}),
    ("tp=2", "float32", {"preference": {"beta": 0.1}, "adapter": {"rank": 8}}),
    ("dp=4,zero=3,shard=2", "float32", {"micro": 1, "sequence": 64}),
    ("dp=4,zero=2,shard=2,reduce=step", "float32", {"micro": 1, "sequence": 64}),
]


def check(ranks: Ranks, case: Case) -> None:
    """Every rank's measured peak against the prediction; the parts add up to it."""
    text, dtype, changes = case
    layout, given = layout_of(text), run_of(**changes)
    shape = shape_of(Config.model_validate(given), layout, dtype=dtype)
    places = [coordinate(rank, layout) for rank in range(layout.world)]
    parts = [peak_bytes(shape, pp=at.pp, tp=at.tp) for at in places]
    wanted = pytest.approx([found["total"] for found in parts], rel=WITHIN)
    assert all(found["total"] == sum(found[name] for name in PARTS) + found["host"] for found in parts)  # the CPU is host and device
    measured = ranks.run(layout.world, "tests.memory_cases:peaks", given, vars(layout), dtype)
    assert measured == wanted, parts


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]} {' '.join(map(str, case[2].values()))}".strip())
def test_the_peak_is_as_predicted(ranks: Ranks, case: Case) -> None:
    check(ranks, case)


def many() -> list[Case]:
    """Layouts x models, a few hundred."""
    models: list[dict[str, Any]] = [
        {"kv_heads": 2, "tied": True}, {"family": "gpt2"}, {"qk_norm": True, "document_mask": True}, {"vocab": 4096, "layers": 2},
        {"layers": 6, "micro": 1}, {"sequence": 256, "family": "gpt2", "dropout": 0.2},
    ]  # fmt: skip
    data = [f"zero={stage},reduce={when}" for stage in range(4) for when in ("micro_batch", "step")]
    data += ["zero=3,unshard=step", "zero=1,offload=optimizer", "zero=3,recompute=full", "zero=2,recompute=selective"]
    pipes = [f"pp=2,schedule={name}" for name in ("gpipe", "1f1b", "interleaved")]
    texts = [f"dp=2,{keys}" for keys in data] + ["tp=2", "tp=2,sp=off", "tp=2,recompute=full", "tp=4", *pipes]
    texts += [f"dp=2,{pipe},zero={stage}" for pipe in pipes for stage in (1, 3)] + ["tp=2,pp=2", "dp=2,tp=2,zero=3", "pp=4,schedule=gpipe"]
    texts += [f"dp=4,zero={stage},shard=2,reduce={when}" for stage in (1, 2, 3) for when in ("micro_batch", "step")]
    return [(text, "float32", {"batch": 8, "layers": 4, **model}) for text in texts for model in models]


@pytest.mark.long
@pytest.mark.parametrize("case", many(), ids=lambda case: f"{case[0]} {' '.join(map(str, case[2].values()))}")
def test_the_peak_of_many_layouts_is_as_predicted(ranks: Ranks, case: Case) -> None:
    check(ranks, case)


def test_the_constants_are_the_engines() -> None:
    """plan/ is torch-free, so it repeats them."""
    assert (units.PIECE, units.CHUNK, units.MEASURED) == (kernels.TOKENS, loss.CHUNK, correction.PIECE)
    assert (memory.MESSAGES, memory.IN_FLIGHT, traffic.KEPT_UNITS) == (pipeline.SENDS, pipeline.IN_FLIGHT, pipeline.KEPT_UNITS)
    assert memory.HOST_BUFFERS == offload.BUFFERS
    assert (residency.PIECE, residency.PIECE_CUDA) == (quantize.PIECE, quantize.PIECE_CUDA)


@pytest.mark.parametrize("cpu", [True, False])
def test_a_chunk_of_logits_is_the_engines(cpu: bool) -> None:
    """plan/ repeats the rule, too: tokens below, at and above a chunk, over slices of small and large vocabularies."""
    for rows in (1, 97, 2048, 2**15, 50257, 128256, 2**18 - 1, 2**18, 2**18 + 1, 2**30):
        for tokens in (1, 1023, 1024, 1025, 8192, 2**20, 2**29):
            assert units.at_once(tokens, rows, cpu=cpu) == loss.at_once(tokens, rows, cpu=cpu), (tokens, rows)


def test_a_chunk_of_logits_on_a_gpu_is_a_gibibyte() -> None:
    assert loss.CHUNK_BYTES == units.CHUNK_BYTES == 2**30
    assert loss.at_once(2**20, 2**18, cpu=False) * 2**18 * 4 == loss.CHUNK_BYTES
    assert loss.at_once(2**20, 128256, cpu=False) == 2048  # the largest power of two below 2**30 / (4 x 128256) = 2093
    assert loss.at_once(2**20, 2**20, cpu=False) == loss.CHUNK  # never fewer
    assert loss.at_once(5, 128256, cpu=False) == 5


@pytest.mark.parametrize(
    ("norm", "device", "tensors"), [("rms", "cuda", 1), ("rms", "cpu", 7), ("layer", "cuda", 7), ("unit_rms", "cuda", 7)]
)
def test_a_gpu_s_norm_of_bfloat16_makes_no_float32_copies(norm: str, device: str, tensors: int) -> None:
    given = Config.model_validate(run_of(norm=norm))
    found = units.Tensors(shape_of(given, layout_of("dp=1"), dtype="bfloat16", device=device), tp=0)
    assert found.norm_backward(found.stream) == tensors * found.stream


def test_the_peak_of_a_gpu_is_as_it_was_measured() -> None:
    """Of 1.24 B parameters in bfloat16, eager; a CPU can hold the prediction against the number that a GPU left."""
    (path,) = RESULTS.glob("gpu-nvidia-h200-*.json")
    result = next(part["result"] for part in json.loads(path.read_text())["parts"] if part["name"] == "1b, ours, eager")
    job = Job(**{**result["job"], "runtime": ()})
    settings = job.config(torch.device("cpu"), job.model())
    need = peak_bytes(shape_of(settings, layout_of("dp=1"), dtype="bfloat16", device="cuda"))["total"]
    assert result["peak_memory_bytes"] == pytest.approx(need, rel=WITHIN)


def test_host_memory_counts_where_the_device_is_the_host() -> None:
    """And on CUDA an activation is made whole, where a CPU makes it in pieces."""
    given, layout = Config.model_validate(run_of(micro=8, batch=8, ffn=1024)), layout_of("dp=1,offload=optimizer")
    cpu, cuda = (peak_bytes(shape_of(given, layout, dtype="bfloat16", device=device)) for device in ("cpu", "cuda"))
    assert cpu["host"] == cuda["host"] == persistent_bytes(shape_of(given, layout, dtype="bfloat16"))["host"] > 0
    assert cpu["total"] == sum(cpu[name] for name in PARTS) + cpu["host"]
    assert cuda["total"] == sum(cuda[name] for name in PARTS) and cuda["buffers"] > cpu["buffers"]


def test_the_fullest_rank_is_told() -> None:
    """In this 1f1b pipeline the second: the first keeps one micro-batch more, but fewer blocks."""
    shape = shape_of(Config.model_validate(run_of(layers=10, batch=16)), layout_of("pp=4"), dtype="float32")
    each = [peak_bytes(shape, pp=pp) for pp in range(4)]
    assert predicted(shape)["memory_bytes"] == each[1] == max(each, key=lambda parts: parts["total"])


def test_a_slope_that_came_as_a_message_is_gone_after_its_first_unit(ranks: Ranks) -> None:
    given, layout = run_of(layers=6, batch=2, sequence=32), layout_of("pp=2")
    first, _ = ranks.run(2, "tests.memory_cases:slope_outlives", given, vars(layout))
    assert len(first) == 1 and first[0].startswith("blocks.")
