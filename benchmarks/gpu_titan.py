"""torchtitan on one GPU: its Llama 3 blocks, per-block torch.compile, compiled cross-entropy and clipping in a loop as its trainer's.

Written for torchtitan 0.2.2: 0.3.0 imports what torch 2.11 has not. Only model, compile, loss and clipping are imported, so that of
what it depends on tokenizers and tyro are enough (benchmarks/README.md has the command).
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

import torch

from benchmarks.gpu_work import Job, RandomTokens, fitted, rates, seconds_of
from dist_llm.config.schema import ModelConfig

SHORTER = 0.75  # of the blocks, where memory ran out
ABSENT = "torchtitan is not installed (benchmarks/README.md says which wheels it needs)"


def train_torchtitan(device: torch.device, job: Job, *, compiled: bool) -> dict[str, Any]:
    """Steps of torchtitan: float32 weights, gradients and moments under autocast, as it trains without FSDP; torch's fused AdamW.

    A depth that was to fit is cut by a quarter whenever memory runs out: `layers` says what ran, `cut` the depths that did not.
    Raises ModuleNotFoundError where torchtitan is not installed.
    """
    _open_packages()
    model, cut = fitted(job, device), list[int]()
    while (found := _tried(device, job, model, compiled=compiled)) is None:
        cut.append(model.layers)
        model = replace(job, depth=int(model.layers * SHORTER)).model()
    return {**found, "cut": cut, "differs": _differences(model)}


def _tried(device: torch.device, job: Job, model: ModelConfig, *, compiled: bool) -> dict[str, Any] | None:
    """What `_train` found, or None where memory ran out and the depth is ours to choose; all memory is free again then."""
    try:
        return _train(device, job, model, compiled=compiled)
    except torch.OutOfMemoryError:
        if job.depth != 0 or model.layers == 1:
            raise
    gc.collect()  # after the except clause, whose error holds the frames and their tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return None


def _train(device: torch.device, job: Job, model: ModelConfig, *, compiled: bool) -> dict[str, Any]:
    """As `Trainer.train_step` of torchtitan/train.py on one rank."""
    config = import_module("torchtitan.config").JobConfig()
    config.compile.enable = compiled
    module = _module(device, job, model)
    if compiled:
        import_module("torchtitan.models.llama3.infra.parallelize").apply_compile(module, config.compile)
    loss_of = import_module("torchtitan.components.loss").build_cross_entropy_loss(config)
    clip = partial(import_module("torchtitan.distributed.utils").clip_grad_norm_, max_norm=1.0, foreach=True)
    weights = list(module.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    windows = RandomTokens(job, model.vocab).windows.to(device)
    targets = windows[:, :, 1:].numel()
    losses: list[float] = []

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for some in windows:
            with torch.autocast(device.type, torch.bfloat16):
                logits = module(some[:, :-1].contiguous())
                loss = loss_of(logits, some[:, 1:].contiguous()) / targets
            del logits  # it need not outlive the loss
            loss.backward()
            total += loss.detach()
        clip(weights)
        optimizer.step()
        losses.append(float(total))

    times = seconds_of(step, device)
    return {**rates(times, job, model, device), "losses": losses, "weights": sum(weight.numel() for weight in weights)}


def _module(device: torch.device, job: Job, model: ModelConfig) -> Any:
    """torchtitan's Transformer of our shape. One table for both ends is tied as its Qwen3 ties it: its Llama 3 has no such option."""
    source = import_module("torchtitan.models.llama3.model.model")
    shape: dict[str, Any] = {"dim": model.dim, "n_layers": model.layers, "n_heads": model.heads, "n_kv_heads": model.kv_heads}
    shape |= {"vocab_size": model.vocab, "norm_eps": model.norm_eps, "rope_theta": model.rope_theta, "max_seq_len": job.sequence}
    shape |= {"multiple_of": 1, "ffn_dim_multiplier": (model.ffn + 0.5) / int(8 * model.dim / 3)}  # it rounds down to ffn
    shape |= {"rope_scaling_args": source.RoPEScalingArgs(scaling_factor=1.0)}  # none
    assert model.head_dim * model.heads == model.dim, "torchtitan's heads share dim among them"
    with device:
        module = source.Transformer(source.TransformerModelArgs(**shape))
        if model.tied:
            module.output.weight = module.tok_embeddings.weight
        with torch.no_grad():
            module.init_weights()
    return module.train()


def _differences(model: ModelConfig) -> list[str]:
    """From ours, beyond what both are."""
    found = ["float32 weights that autocast casts, and a float32 residual stream", "final norm and head are not compiled"]
    return [*found, "embedding and head tied by us, as its Qwen3 does"] if model.tied else found


def _open_packages() -> None:
    """Lets modules of torchtitan be imported without the __init__ of the packages above them, and without what a trainer is made of.

    These import its readers of data sets (`datasets`, `torchdata`) and its 8-bit experts (`triton`), which are not asked for here.
    """
    for name in ("torchtitan", "torchtitan.models.llama3"):
        found = find_spec(name)
        if found is None:
            raise ModuleNotFoundError(ABSENT)
        sys.modules[name] = module_from_spec(found)
    parts = ModuleType("torchtitan.protocols.train_spec")  # of it the model takes its base class alone
    sys.modules[parts.__name__] = parts
    parts.__dict__["ModelProtocol"] = import_module("torchtitan.protocols.model").ModelProtocol
