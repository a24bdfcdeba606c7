"""Everybody who takes part: each as its users use it, all with the same weights, tokens, optimizer and clipping.

A rival is made by its key in every rank of its world and takes steps. Libraries are imported inside, so that a rank
holds what its rival needs and nothing else; ours are, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.plain import Llama, WithLoss, adamw, decay_groups, load_initial, loss_of, plain_model
from benchmarks.setting import Setting, Tokens, initial_weights, layout_of
from dist_llm.engines.deepspeed_package import load_package  # sets its environment and keeps stdout clean
from dist_llm.errors import UsageError


@dataclass(frozen=True)
class Taken:
    """What a step did. loss: this rank's share, the ranks' shares add up to the mean loss; norm: of the global gradient."""

    loss: float
    norm: float | None = None


class Rival(Protocol):
    """One contestant in one rank."""

    def step(self, step: int) -> Taken:
        """One optimizer step (0-based) on that step's global batch."""

    def booked(self) -> dict[str, float]:
        """Bytes sent since the last call by its own books, per axis; empty where it keeps none."""


Make = Callable[[Any, str, int, int], Rival]  # setting, argument of the key, rank, world
MAKERS: dict[str, Make] = {}


BRINGS: dict[str, tuple[str, ...]] = {}  # the modules of each


def rival(name: str, *modules: str) -> Callable[[Make], Make]:
    """Enters a maker under a name, with the modules that it needs."""

    def enter(make: Make) -> Make:
        MAKERS[name], BRINGS[name] = make, modules
        return make

    return enter


def bring(key: str) -> None:
    """Imports what a rival needs, so that its memory can be told from its library's code. Raises UsageError where that is not installed."""
    if key.startswith("deepspeed:") or "engine=deepspeed" in key:
        load_package(torch.device("cpu"))
    for module in BRINGS[key.partition(":")[0]]:
        try:
            import_module(module)
        except ImportError as error:
            package = module.partition(".")[0]
            extra = {"transformers": "test", "datasets": "hf", "pyarrow": "hf"}.get(package)
            advice = f"pip install 'dist-llm[{extra}]'" if extra else f"pip install {package}"
            raise UsageError(f"this row needs {package}", where=f"rival {key}", found=str(error), next=advice) from error


def make_rival(key: str, setting: Any, rank: int, world: int) -> Rival:
    """The rival of a key `name` or `name:argument`, here in this rank."""
    name, _, argument = key.partition(":")
    return MAKERS[name](setting, argument, rank, world)


# --- ours ------------------------------------------------------------------------------------------------------------


class Ours:
    """An engine of ours behind our trainer."""

    def __init__(self, setting: Setting, layout: str, rank: int, *, shared_memory: bool = True) -> None:
        from dist_llm.config.schema import changed
        from dist_llm.train.setup import choose_dtype, make_engine, make_mesh, settle_rank
        from dist_llm.train.trainer import Trainer

        concrete = layout_of(layout)
        config = changed(setting.config(dp=concrete.dp), {"runtime.shared_memory": shared_memory})
        settle_rank(config.runtime)
        mesh, device = make_mesh(config, concrete, rank), torch.device("cpu")
        self.engine = make_engine(config, mesh, device=device, dtype=choose_dtype(config.runtime, device))
        self.trainer, self.rank = Trainer(config, mesh, self.engine, Tokens(setting)), rank

    def step(self, step: int) -> Taken:
        """One step, whole: others step next, while nothing of ours may travel. Every rank knows the whole loss, so one reports it."""
        taken = self.trainer.step(step)
        if hasattr(self.engine, "arrive"):
            self.engine.arrive()
        return Taken(taken.loss if self.rank == 0 else 0.0, taken.norm)

    def booked(self) -> dict[str, float]:
        """From the ledger of `comm`."""
        from dist_llm import comm

        return comm.ledger.take()


@rival("ours", "dist_llm.train.setup", "dist_llm.train.trainer", "dist_llm.engines.native")
def _ours(setting: Setting, layout: str, rank: int, world: int) -> Rival:
    return Ours(setting, layout, rank)


@rival("ours-sockets", "dist_llm.train.setup", "dist_llm.train.trainer", "dist_llm.engines.native")
def _ours_through_sockets(setting: Setting, layout: str, rank: int, world: int) -> Rival:
    return Ours(setting, layout, rank, shared_memory=False)


# --- one process -----------------------------------------------------------------------------------------------------


class Loop:
    """A module that returns the loss, torch's optimizer, and the five lines around them."""

    def __init__(self, setting: Setting, module: Any, optimizer: torch.optim.Optimizer, *, part: int = 0, parts: int = 1) -> None:
        """module: an nn.Module, or DeepSpeed's engine. part of parts: this rank's share of the batch."""
        assert setting.micro_batches == 1, "one micro-batch of every rank"
        self.module, self.optimizer, self.clip = module, optimizer, setting.clip
        self.tokens, self.part, self.parts = Tokens(setting), part, parts

    def step(self, step: int) -> Taken:
        """Forward, backward, clip, update."""
        loss = self.module(*self.tokens.batch(step, part=self.part, parts=self.parts))
        loss.backward()
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(float(loss.detach()) / self.parts, norm)

    def _clip(self) -> float:
        return float(whole(nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)))

    def booked(self) -> dict[str, float]:
        """Nothing."""
        return {}


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's value; any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@rival("plain")
def _plain(setting: Setting, argument: str, rank: int, world: int) -> Rival:
    model = plain_model(setting)
    return Loop(setting, WithLoss(model), adamw(model, setting))


class TransformersLoss(nn.Module):
    """LlamaForCausalLM asked for its own loss, of labels that are shifted already."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Tokens and labels (B, S) -> the mean loss."""
        return self.model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss


@rival("transformers", "transformers.models.llama.modeling_llama")
def _transformers(setting: Setting, argument: str, rank: int, world: int) -> Rival:
    model = transformers_llama(setting, positions=setting.sequence, use_cache=False)
    model.train()
    return Loop(setting, TransformersLoss(model), adamw(model, setting))


def transformers_llama(setting: Setting, *, positions: int, **more: Any) -> Any:
    """LlamaForCausalLM with our initial weights. more: of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"vocab_size": setting.vocab, "hidden_size": setting.dim, "intermediate_size": setting.ffn}
    shape |= {"num_hidden_layers": setting.layers, "num_attention_heads": setting.heads, "num_key_value_heads": setting.heads}
    shape |= {"tie_word_embeddings": False, "attn_implementation": "sdpa", "rms_norm_eps": 1e-5}
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=positions, **more))
    copy_into(model, ((transformers_name(name), values) for name, values in initial_weights(setting)))
    return model


def copy_into(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Puts values into a module's parameters, by their names there."""
    held = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in named:
            held[name].copy_(values)


PARTS = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def transformers_name(name: str) -> str:
    """`blocks.3.attention.q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    part, _, kind = name.rpartition(".")
    if not part.startswith("blocks."):
        return f"{PARTS[part]}.{kind}"
    _, layer, inside = part.split(".", 2)
    return f"model.layers.{layer}.{PARTS[inside]}.{kind}"


# --- data parallel ---------------------------------------------------------------------------------------------------


@rival("ddp", "torch.nn.parallel.distributed")
def _ddp(setting: Setting, argument: str, rank: int, world: int) -> Rival:
    from torch.nn.parallel import DistributedDataParallel

    model = plain_model(setting)
    return Loop(setting, DistributedDataParallel(WithLoss(model)), adamw(model, setting), part=rank, parts=world)


@rival("zero-redundancy", "torch.distributed.optim")
def _zero_redundancy(setting: Setting, argument: str, rank: int, world: int) -> Rival:
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = plain_model(setting)
    module, groups = DistributedDataParallel(WithLoss(model)), decay_groups(model, setting)
    optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=setting.lr, betas=setting.betas, fused=True)
    return Loop(setting, module, optimizer, part=rank, parts=world)


@rival("fsdp2", "torch.distributed.fsdp", "torch.distributed.device_mesh")
def _fsdp2(setting: Setting, argument: str, rank: int, world: int) -> Rival:
    """argument: `reshard` frees the weights after forward (ZeRO-3), `keep` does not (ZeRO-2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = plain_model(setting)
    module, mesh = WithLoss(model), init_device_mesh("cpu", (world,))
    for unit in (*model.blocks.values(), module):
        fully_shard(unit, mesh=mesh, reshard_after_forward=argument == "reshard")
    return Loop(setting, module, adamw(model, setting), part=rank, parts=world)


class DeepSpeed(Loop):
    """`deepspeed.initialize`, then its backward and step."""

    def step(self, step: int) -> Taken:
        """Clipping is in its step."""
        loss = self.module(*self.tokens.batch(step, part=self.part, parts=self.parts))
        self.module.backward(loss)
        self.module.step()
        norm = self.module.get_global_grad_norm()
        return Taken(float(loss.detach()) / self.parts, None if norm is None else float(norm))


@rival("deepspeed")
def _deepspeed(setting: Setting, stage: str, rank: int, world: int) -> Rival:
    deepspeed = load_package(torch.device("cpu"))
    model = plain_model(setting)
    bucket = sum(parameter.numel() for parameter in model.parameters())  # its default is for models of billions
    zero = {"stage": int(stage), "reduce_bucket_size": min(500_000_000, bucket)}
    settings = {
        "train_micro_batch_size_per_gpu": setting.micro(world),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": setting.clip,
        "zero_optimization": zero,
        "steps_per_print": 1 << 30,
    }
    engine, optimizer, *_ = deepspeed.initialize(model=WithLoss(model), optimizer=adamw(model, setting), config=settings)
    return DeepSpeed(setting, engine, optimizer, part=rank, parts=world)


# --- tensor parallel -------------------------------------------------------------------------------------------------


class TensorParallel(Loop):
    """torch's DTensor plan of its tensor-parallel tutorial, the loss split over the vocabulary too."""

    def __init__(self, setting: Setting, model: Llama, optimizer: torch.optim.Optimizer, rank: int) -> None:
        super().__init__(setting, model, optimizer)
        self.rank = rank

    def step(self, step: int) -> Taken:
        """Every rank takes the whole batch."""
        from torch.distributed.tensor.parallel import loss_parallel

        tokens, labels = self.tokens.batch(step)
        with loss_parallel():
            loss = loss_of(self.module(tokens), labels)
            loss.backward()
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mean = float(whole(loss.detach()))
        return Taken(mean if self.rank == 0 else 0.0, norm)

    def _clip(self) -> float:
        """Split and whole gradients do not go into one call."""
        from torch.distributed.tensor import DTensor

        parameters = list(self.module.parameters())
        kinds = [[p for p in parameters if isinstance(p, DTensor) == split] for split in (True, False)]
        kinds = [some for some in kinds if some]
        norms = [whole(nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])) for some in kinds]
        norm = torch.stack(norms).square().sum().sqrt()
        for some in kinds:
            nn.utils.clip_grads_with_norm_(some, self.clip, norm)
        return float(norm)


@rival("dtensor", "torch.distributed.tensor.parallel", "torch.distributed.device_mesh")
def _dtensor(setting: Setting, argument: str, rank: int, world: int) -> Rival:
    """argument: `sp` splits norms and residuals over the sequence."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    model = plain_model(setting)
    parallelize_module(model, init_device_mesh("cpu", (world,)), tensor_plan(sp=argument == "sp"))
    return TensorParallel(setting, model, adamw(model, setting), rank)


def tensor_plan(*, sp: bool) -> dict[str, Any]:
    """The plan of https://docs.pytorch.org/tutorials/intermediate/TP_tutorial.html."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel

    outside = Shard(1) if sp else Replicate()
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=outside),
        "head": ColwiseParallel(input_layouts=outside, output_layouts=Shard(-1), use_local_output=False),
    }
    block = "blocks.*"
    plan |= {f"{block}.attention.{part}": ColwiseParallel() for part in "qkv"}
    plan |= {f"{block}.mlp.{part}": ColwiseParallel() for part in ("gate", "up")}
    plan |= {f"{block}.{part}": RowwiseParallel(output_layouts=outside) for part in ("attention.o", "mlp.down")}
    if sp:
        plan |= {name: SequenceParallel() for name in ("norm", f"{block}.attention_norm", f"{block}.mlp_norm")}
        split, gathered = (Shard(1), None, None), (Replicate(), None, None)  # the rotary tables stay as they are
        plan[f"{block}.attention"] = PrepareModuleInput(input_layouts=split, desired_input_layouts=gathered)
        plan[f"{block}.mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    return plan


# --- pipeline --------------------------------------------------------------------------------------------------------


class Pipelined:
    """A stage of the plain model under one of torch's schedules."""

    def __init__(self, setting: Setting, schedule: str, rank: int, world: int) -> None:
        from torch.distributed import pipelining

        per_stage, rest = divmod(setting.layers, world)
        assert rest == 0, (setting.layers, world)
        self.rank, self.last, self.clip = rank, rank + 1 == world, setting.clip
        self.model = Llama(setting, blocks=range(rank * per_stage, (rank + 1) * per_stage), first=rank == 0, last=self.last)
        load_initial(self.model, setting)
        self.optimizer, self.tokens = adamw(self.model, setting), Tokens(setting)
        stage = pipelining.PipelineStage(self.model, rank, world, torch.device("cpu"))
        kind = {"1f1b": pipelining.Schedule1F1B, "gpipe": pipelining.ScheduleGPipe}[schedule]
        self.runner = kind(stage, setting.micro_batches, loss_fn=loss_of)

    def step(self, step: int) -> Taken:
        """The micro-batches' mean losses and gradients are averaged by torch."""
        tokens, labels = self.tokens.batch(step)
        losses: list[Tensor] = []
        if self.rank == 0:
            self.runner.step(tokens)
        else:
            self.runner.step(target=labels, losses=losses) if self.last else self.runner.step()
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(float(torch.stack(losses).mean()) if losses else 0.0, norm)

    def _clip(self) -> float:
        """By the norm over all stages."""
        import torch.distributed as dist

        square = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).square()
        dist.all_reduce(square)
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip, norm)
        return float(norm)

    def booked(self) -> dict[str, float]:
        """Nothing."""
        return {}


@rival("torch-pipeline", "torch.distributed.pipelining")
def _torch_pipeline(setting: Setting, schedule: str, rank: int, world: int) -> Rival:
    return Pipelined(setting, schedule, rank, world)
