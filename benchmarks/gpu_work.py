"""The parts of `benchmarks.gpu`: each runs in a process of its own on one device and returns what it measured as JSON.

All trainers multiply in bfloat16 and keep float32 weights, gradients and both moments; clipping at 1.0. Ours keeps bfloat16
weights beside its masters, transformers (here) and torchtitan (`gpu_titan`) float32 weights that autocast casts. Tokens are random:
only time and memory are asked.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.config.layout import Layout, parse_layout, resolve, world_of
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.data.batches import MicroBatch
from dist_llm.engines import graph
from dist_llm.model.cost import step_flops_per_token
from dist_llm.model.products import E4M3, Products, cast, largest
from dist_llm.model.table import num_parameters, table
from dist_llm.train.hardware import peak_flops
from dist_llm.train.setup import make_engine, make_mesh, settle_rank
from dist_llm.train.trainer import Trainer

WARM = 2  # steps before the clock starts; a graph is recorded in a third one
LEAST, MOST, SPREAD = 3, 5, 0.01  # steps timed: more than the least while they lie further apart than this part of their median
STATE = 18  # bytes of a parameter: bfloat16 weight; float32 gradient, master and two moments
KEPT = 16  # tensors of (tokens, dim) that a block keeps, about (docs/performance.md), with its feed-forward's width counted in
SPARE = 12 * 2**30  # bytes left for logits, buffers and the compiler
MINIATURE = {"layers": 2, "dim": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128, "vocab": 128, "preset": None}


@dataclass(frozen=True)
class Job:
    """A model, a batch, and how ours runs it. depth: layers, the preset's when left out; 0: as many as fit beside their state."""

    preset: str
    sequence: int
    micro: int
    micro_batches: int = 4
    depth: int | None = None
    vocab: int | None = None
    runtime: tuple[tuple[str, Any], ...] = ()
    quick: bool = False

    def model(self) -> ModelConfig:
        """The model, in miniature when quick."""
        changes: dict[str, Any] = {"layers": self.depth or 1} if self.depth is not None else {}
        changes |= {} if self.vocab is None else {"vocab": self.vocab, "tied": False}
        return ModelConfig.model_validate({"family": "llama", "preset": self.preset, **changes, **(MINIATURE if self.quick else {})})

    def config(self, device: torch.device, model: ModelConfig) -> Config:
        """As a config of ours. The tokenizer's file is not read."""
        sections: dict[str, Any] = {
            "model": model.model_dump(),
            "data": {"sequence": self.sequence, "tokenizer": {"kind": "file", "path": "tokenizer.json"}},
            "batch": {"global": self.micro * self.micro_batches, "micro": self.micro},
            "schedule": {"kind": "constant", "steps": 100},
            "runtime": {"device": device.type, "dtype": "bfloat16", **dict(self.runtime)},
        }
        return Config.model_validate(sections)


class RandomTokens:
    """The same random sequences at every step, as our trainer takes them."""

    def __init__(self, job: Job, vocab: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.windows = torch.randint(vocab, (job.micro_batches, job.micro, job.sequence + 1), generator=generator)

    def micro_batches(self, step: int, **place: int) -> list[MicroBatch]:
        """All of one rank."""
        line = torch.arange(self.windows.shape[2] - 1).expand(self.windows.shape[1], -1)
        rows = torch.arange(self.windows.shape[1])
        pairs = ((some[:, :-1].contiguous(), some[:, 1:].contiguous()) for some in self.windows)
        return [MicroBatch(tokens, labels, line, torch.zeros_like(line), rows) for tokens, labels in pairs]

    def targets(self, step: int) -> int:
        """Every token is one."""
        return self.windows[:, :, 1:].numel()


# --- clocks ----------------------------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any], device: torch.device, *, warm: int = WARM, least: int = LEAST) -> list[float]:
    """Wall seconds of a call that has been warmed up, the device waited for before and after."""
    for _ in range(warm):
        call()
    found: list[float] = []
    while len(found) < least or (len(found) < MOST and max(found) - min(found) > SPREAD * statistics.median(found)):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        found.append(time.perf_counter() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def rates(times: list[float], job: Job, model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Tokens a second, MFU by both conventions, peak memory."""
    tokens, median = job.micro * job.micro_batches * job.sequence, statistics.median(times)
    flops = {kind: step_flops_per_token(model, job.sequence, convention=kind) for kind in ("full", "causal")}
    peak = peak_flops(torch.cuda.get_device_name(device), "bfloat16") if device.type == "cuda" else None
    return {
        "parameters": num_parameters(model),
        "layers": model.layers,
        "job": asdict(job),
        "step_seconds": median,
        "all_step_seconds": times,
        "tokens_per_second": tokens / median,
        "model_flops": {kind: cost * tokens / median for kind, cost in flops.items()},
        "mfu": {kind: cost * tokens / median / peak if peak else None for kind, cost in flops.items()},
        "peak_memory_bytes": _peak(device),
    }


# --- what the device reaches -----------------------------------------------------------------------------------------


def ceiling(device: torch.device, quick: bool) -> dict[str, Any]:
    """FLOP/s of large products alone, in bfloat16 and 8 bits (casts included), and of attention by each backend of torch."""
    rows, inner, columns = (64, 64, 64) if quick else (8192, 4096, 14336)
    x, weight = (torch.randn(size, inner, device=device).bfloat16() for size in (rows, columns))
    flops, found = 2.0 * rows * inner * columns, dict[str, Any](shape=[rows, inner, columns])
    for name, kind in (("bfloat16", "off"), ("tensorwise", "tensorwise"), ("rowwise", "rowwise")):
        found[name] = _noting(lambda kind=kind: _rate(lambda: Products(kind).forward(x, weight), device, flops))
    found["scaled_mm"] = _noting(lambda: _rate(_cast_already(x, weight), device, flops))
    return {"products": found, "attention": {str(size): _attention(device, size) for size in ((64,) if quick else (4096, 8192))}}


def _cast_already(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The tensorwise product alone."""
    (a, back_a), (b, back_b) = (cast(one, largest(one, whole=True), E4M3, power=False) for one in (x, weight))
    return lambda: torch._scaled_mm(a, b.T, scale_a=back_a, scale_b=back_b, out_dtype=torch.bfloat16, use_fast_accum=True)


def _rate(call: Callable[[], Any], device: torch.device, flops: float) -> float:
    return flops / min(seconds_of(call, device, least=20))


def _attention(device: torch.device, sequence: int) -> dict[str, Any]:
    """Forward and backward of causal attention of the 8B shape, FLOP/s counted causally."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads = 32 if sequence > 64 else 4
    flops = 3 * 2.0 * heads * sequence * sequence * 128
    q, k, v = (torch.randn(1, heads, sequence, 128, device=device).bfloat16().requires_grad_() for _ in range(3))

    def both() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).backward(torch.ones_like(q))

    def by(backend: Any) -> float:
        with sdpa_kernel(backend):
            return _rate(both, device, flops)

    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    found = {backend.name.lower(): _noting(lambda backend=backend: by(backend)) for backend in backends}
    return {"chosen": _noting(lambda: _rate(both, device, flops)), **found}


def _noting(work: Callable[[], Any]) -> Any:
    """What the work returns, or in words why it could not."""
    try:
        return work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


# --- training --------------------------------------------------------------------------------------------------------


def fitting_depth(model: ModelConfig, tokens: int, device: torch.device) -> int:
    """Blocks that fit on the device with their whole state and activations, beside the two ends."""
    block = sum(row.numel for row in table(model) if row.unit == "blocks.0")
    ends = num_parameters(model) - block * model.layers
    room = torch.cuda.mem_get_info(device)[1] - SPARE - ends * STATE  # of all its memory, so that every part has as many
    return max(1, int(room // (block * STATE + KEPT * tokens * model.dim * 2)))


def fitted(job: Job, device: torch.device) -> ModelConfig:
    """The job's model, as deep as fits on a GPU where its depth is 0."""
    model = job.model()
    if job.depth != 0 or device.type != "cuda":
        return model
    return replace(job, depth=fitting_depth(model, job.micro * job.sequence, device)).model()


def train_ours(device: torch.device, job: Job) -> dict[str, Any]:
    """Steps of our trainer."""
    model = fitted(job, device)
    config = job.config(device, model)
    settle_rank(config.runtime)
    mesh = make_mesh(config, Layout(), 0)
    engine = make_engine(config, mesh, device=device, dtype=torch.bfloat16)
    trainer, steps = Trainer(config, mesh, engine, RandomTokens(job, model.vocab)), iter(range(10**6))
    losses: list[float] = []
    warm = graph.WARM + 1 if config.runtime.cuda_graph else WARM
    times = seconds_of(lambda: losses.append(trainer.step(next(steps)).loss), device, warm=warm)
    return {**rates(times, job, model, device), "losses": losses}


def train_transformers(device: torch.device, job: Job, *, compiled: bool) -> dict[str, Any]:
    """The same of LlamaForCausalLM under autocast, with torch's fused AdamW. compiled: as torchtitan compiles its own, layers and loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = job.model()
    shape: dict[str, Any] = {"vocab_size": model.vocab, "hidden_size": model.dim, "intermediate_size": model.ffn}
    shape |= {"num_hidden_layers": model.layers, "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads}
    shape |= {"head_dim": model.head_dim, "rms_norm_eps": model.norm_eps}
    shape |= {"tie_word_embeddings": model.tied, "attn_implementation": "sdpa", "use_cache": False, "max_position_embeddings": job.sequence}
    with device:
        module = LlamaForCausalLM(LlamaConfig(**shape))
    module.train()
    if compiled:
        compile_regions(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    windows = RandomTokens(job, model.vocab).windows.to(device)
    losses: list[float] = []

    def step() -> None:
        total = torch.zeros((), device=device)
        for some in windows:
            with torch.autocast(device.type, torch.bfloat16):
                labels = some[:, 1:].contiguous()
                loss = module(input_ids=some[:, :-1].contiguous(), labels=labels, shift_labels=labels, use_cache=False).loss
            (loss / len(windows)).backward()
            total += loss.detach() / len(windows)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total))

    times = seconds_of(step, device)
    return {**rates(times, job, model, device), "losses": losses}


def compile_regions(module: Any) -> None:
    """Each decoder layer, which all share one graph, and the loss of a LlamaForCausalLM. Compiled whole, 16 layers take minutes."""
    for layer in module.model.layers:
        layer.compile(fullgraph=True)
    module.loss_function = torch.compile(module.loss_function)


def ends(device: torch.device, job: Job) -> dict[str, Any]:
    """The embedding, and the head with its loss, of the whole vocabulary: forward and backward of one micro-batch, apart.

    Gradients go to float32 sums, as in training. The head's casts and cross-entropy are eager first, then compiled.
    """
    from dist_llm.model.fused import fuse
    from dist_llm.model.loss import loss_and_gradients, whole
    from dist_llm.model.sums import add_rows

    model, tokens = job.model(), job.micro * job.sequence
    x = torch.randn(tokens, model.dim, device=device).bfloat16()
    weight = (torch.randn(model.vocab, model.dim, device=device) * 0.02).bfloat16()
    labels = torch.randint(model.vocab, (tokens,), device=device)
    sums = {"slope": torch.tensor(1.0 / tokens, dtype=torch.float64, device=device), "total": torch.zeros(weight.shape, device=device)}
    found: dict[str, Any] = {"tokens": tokens}
    for name, compiled in (("eager", False), ("compiled", device.type == "cuda")):
        fuse(compiled)
        found[f"head_{name}_seconds"] = seconds_of(lambda: loss_and_gradients(x, weight, labels, whole(weight, 0.0), **sums), device)
    found["head_flops"] = 6.0 * tokens * prod(weight.shape) / statistics.median(found["head_compiled_seconds"])

    def embedding() -> None:
        torch.nn.functional.embedding(labels, weight)
        add_rows(sums["total"], labels, x)

    return {**found, "embedding_seconds": seconds_of(embedding, device)}


# --- whether it runs, and equals -------------------------------------------------------------------------------------

STAGES = ("zero=0", "zero=1", "zero=2", "zero=3", "zero=2,engine=fsdp2", "zero=3,engine=fsdp2", "engine=ddp",
          *(f"zero={stage},engine=deepspeed" for stage in range(4)))  # fmt: skip
SHARED = ("dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3", "tp=2", "pp=2", "dp=2,tp=2,zero=2", "dp=4,zero=3,shard=2", "dp=2,pp=2,zero=1")
SMALL: dict[str, Any] = {"family": "llama", "layers": 4, "dim": 48, "heads": 8, "kv_heads": 4, "head_dim": 6, "ffn": 88, "vocab": 97}


def small_config(device: torch.device, backend: str = "auto") -> dict[str, Any]:
    """A run of odd shapes, accumulation, clipping and weight decay, as a dict."""
    sections: dict[str, Any] = {"model": SMALL, "data": {"sequence": 24, "tokenizer": {"kind": "file", "path": "tokenizer.json"}}}
    sections |= {"batch": {"global": 8, "micro": 2}, "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "clip": 0.5}}
    sections |= {"schedule": {"kind": "constant", "steps": 4}, "runtime": {"device": device.type, "backend": backend}}
    return Config.model_validate(sections).model_dump(by_alias=True)


def stages(device: torch.device, quick: bool) -> dict[str, Any]:
    """Every engine and stage on one rank with a process group (NCCL on a GPU): the losses of three float32 steps."""
    from dist_llm import mesh as groups
    from dist_llm.train.proof import proof_rank

    with tempfile.TemporaryDirectory() as folder:
        backend = groups.default_backend(device.type)
        groups.connect(rank=0, world=1, backend=backend, timeout_seconds=60.0, store_path=f"{folder}/store")
        job, found = {"config": small_config(device), "steps": 3, "dtype": "float32"}, {}
        for text in STAGES[:4] if quick else STAGES:
            layout = asdict(resolve(parse_layout(text), 1))
            found[text] = _noting(lambda layout=layout: proof_rank(0, 1, lambda *_: None, job, layout, folder)["losses"])
    return {"backend": backend, "losses": found}


def shared(device: torch.device, quick: bool) -> dict[str, Any]:
    """Ranks that share the device over gloo: the largest differences of every loss, gradient, weight and moment from one rank, float64."""
    reference = _proved(device, "dp=1")
    found = {}
    for text in SHARED[:3] if quick else SHARED:
        found[text] = _noting(lambda text=text: _judged(reference, _proved(device, text)))
    return {"rows": found}


def _proved(device: torch.device, text: str) -> Any:
    from dist_llm.ranks import run_ranks
    from dist_llm.train.proof import proof_rank, read_run

    layout = resolve(parse_layout(text), world_of(parse_layout(text)))
    with tempfile.TemporaryDirectory() as folder:
        job = {"config": small_config(device, "gloo"), "steps": 3, "dtype": "float64"}
        run_ranks(layout.world, proof_rank, job, asdict(layout), folder, backend="gloo", timeout_seconds=60.0)
        return read_run(Path(folder))


def _judged(reference: Any, run: Any) -> dict[str, Any]:
    from dist_llm.train.proof import judge

    verdict = judge(reference, run)
    return {**asdict(verdict), "equal": verdict.equal}


def bring(what: str, *, compiled: bool) -> None:
    """Imports the rest of what a part needs, and touches no device. `shared` forks its ranks: no threads may be there before."""
    if compiled:
        import_module("torch._inductor.compile_fx")
    if what.startswith("transformers"):
        import_module("transformers.models.llama.modeling_llama")


def on(device: str) -> torch.device:
    """The device by its type."""
    return torch.device(device, 0) if device == "cuda" else torch.device(device)


def as_tensor_free(value: Any) -> Any:
    """Numbers for JSON: not-a-number and infinities as text."""
    if isinstance(value, dict):
        return {key: as_tensor_free(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_tensor_free(one) for one in value]
    if isinstance(value, Tensor):
        return as_tensor_free(value.tolist())
    return str(value) if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
