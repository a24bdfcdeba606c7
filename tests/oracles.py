"""What the ranks of test_oracles.py do: the same computation by us and by an implementation that nobody here wrote.

transformers and deepspeed are imported inside the cases: the ranks are forked from a process that must stay light.

difference of a tensor = max|ours - theirs| / max(max|theirs|, 1e-3 x the largest |theirs| of all the tensors compared)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_llm import comm
from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.engines.whole import Whole
from dist_llm.mesh import Mesh
from dist_llm.model.table import table
from dist_llm.model.transformer import Context, make_context
from dist_llm.schedule.cut import cut
from dist_llm.train.proof import FLOOR, MadeUp, proof_rank
from dist_llm.train.setup import make_engine, make_mesh
from dist_llm.train.trainer import Trainer

Say = Callable[..., None]
Tensors = dict[str, Tensor]
CPU, WIDE = torch.device("cpu"), torch.float64


def worst(ours: Tensors, theirs: Tensors) -> tuple[float, str]:
    """The largest difference over tensors of the same names, and whose it is."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    ours, theirs = ({name: tensor.detach() for name, tensor in tensors.items()} for tensors in (ours, theirs))
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    found = [
        (float((ours[name] - tensor).abs().max()) / max(float(tensor.abs().max()), FLOOR * largest), name)
        for name, tensor in theirs.items()
    ]
    return max(found)


def collected(engine: Any, kind: str) -> Tensors:
    """The whole tensors of a kind, from an engine on one rank."""
    found: dict[str, Tensor] = {}
    for item in engine.state():
        if item.kind == kind:
            whole = found.setdefault(item.piece.slot.name, torch.full((item.piece.slot.numel,), float("nan"), dtype=item.values.dtype))
            whole[item.piece.start : item.piece.stop] = item.values
    return found


# --- transformers ----------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "dim": 24, "heads": 6, "kv_heads": 2, "ffn": 37, "rope_theta": 5000.0},
    "llama, tied, wide heads": {"family": "llama", "dim": 21, "heads": 3, "kv_heads": 1, "head_dim": 10, "ffn": 31, "tied": True},
    "qwen3": {"family": "qwen3", "dim": 24, "heads": 4, "kv_heads": 2, "head_dim": 10, "ffn": 37, "rope_theta": 30000.0},
    "gpt2": {"family": "gpt2", "dim": 20, "heads": 5, "ffn": 50, "max_positions": 19},
}
SEQUENCE = 17


def config_of(model: dict[str, Any], **sections: Any) -> Config:
    """A run of a small model of odd shape: 4 sequences in 2 micro-batches."""
    data = {"sequence": SEQUENCE, "tokenizer": {"kind": "bpe", "vocab": None}, "document_mask": True, "reset_positions": True}
    whole = {"model": {"layers": 3, "vocab": 61, **model}, "data": data, "batch": {"global": 4, "micro": 2}, **sections}
    return Config.model_validate(whole)


def theirs_of(model: ModelConfig) -> nn.Module:
    """The transformers model of a config in float64, with random weights: norms and biases too."""
    import transformers

    shape = {"vocab_size": model.vocab, "tie_word_embeddings": model.tied, "attn_implementation": "sdpa", "use_cache": False}
    if model.family == "gpt2":
        shape |= {"n_embd": model.dim, "n_layer": model.layers, "n_head": model.heads, "n_inner": model.ffn}
        shape |= {"n_positions": model.max_positions, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    else:
        shape |= {"hidden_size": model.dim, "intermediate_size": model.ffn, "num_hidden_layers": model.layers}
        shape |= {"num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim}
        shape |= {"rms_norm_eps": model.norm_eps, "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta}}
        kind = "Qwen3" if model.qk_norm else "Llama"
        made = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    made = made.double()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=WIDE)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return made


@contextmanager
def norms_in_float64() -> Iterator[None]:
    """transformers takes its RMS norms in float32 whatever the dtype of the model; here they keep float64."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    kept = [(kind, kind.forward) for kind in (LlamaRMSNorm, Qwen3RMSNorm)]
    for kind, _ in kept:
        kind.forward = forward
    yield
    for kind, original in kept:
        kind.forward = original


def our_names(theirs: Tensors, model: ModelConfig) -> Tensors:
    """Weights or gradients of a transformers model under our names and in our shapes."""
    return {row.name: _one(theirs, row.name, model.family == "gpt2") for row in table(model)}


NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"attention.{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{f"mlp.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
GPT2_NAMES = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    **{f"attention.{part}": "attn.c_attn" for part in "qkv"},
    "attention.o": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def _one(theirs: Tensors, name: str, gpt2: bool) -> Tensor:
    """One tensor: GPT-2 keeps its matrices transposed, and q, k and v in one."""
    part, _, kind = name.rpartition(".")
    block, layer, inside = "", "", part
    if part.startswith("blocks."):
        block, layer, inside = part.split(".", 2)
    prefix = f"{'transformer.h' if gpt2 else 'model.layers'}.{layer}." if block else ""
    found = theirs[f"{prefix}{(GPT2_NAMES if gpt2 else NAMES)[inside]}.{kind}"]
    if not gpt2:
        return found
    if inside in ("attention.q", "attention.k", "attention.v"):
        found = found.chunk(3, dim=-1)["qkv".index(inside[-1])]
    return found.T.contiguous() if block and found.dim() == 2 else found.contiguous()


def batch(vocab: int) -> dict[str, Tensor]:
    """4 sequences with two documents each, labels of which about a third are ignored, one sequence without any."""
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(vocab, (2, 4, SEQUENCE), generator=generator)
    labels = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.3, -100)
    labels[2] = -100
    starts = torch.tensor([[5], [9], [1], [16]])  # of each sequence's second document
    line = torch.arange(SEQUENCE).expand(4, -1)
    return {"tokens": tokens, "labels": labels, "positions": line - starts * (line >= starts), "documents": (line >= starts).long()}


def contexts_of(model: ModelConfig, data: dict[str, Tensor], micro: int) -> list[Context]:
    """The batch in micro-batches."""
    parts = [dict(zip(data, row, strict=True)) for row in zip(*(tensor.split(micro) for tensor in data.values()), strict=True)]
    return [make_context(model, **part, dtype=WIDE) for part in parts]


def hugging_face(rank: int, world: int, say: Say) -> dict[str, dict[str, Any]]:
    """Logits, loss and every gradient of each model: ours as a plain module and through the native engine, against transformers."""
    torch.set_num_threads(1)
    with norms_in_float64():
        return {name: _against_transformers(config_of(model)) for name, model in MODELS.items()}


def _against_transformers(config: Config) -> dict[str, Any]:
    model, data = config.model, batch(config.model.vocab)
    theirs, targets = theirs_of(model), int((data["labels"] >= 0).sum())
    (context,) = contexts_of(model, data, 4)
    out = theirs(input_ids=data["tokens"], position_ids=data["positions"], attention_mask=context.mask, use_cache=False)
    loss = F.cross_entropy(out.logits.flatten(0, 1), data["labels"].flatten(), ignore_index=-100, reduction="sum")
    (loss / targets).backward()
    weights = our_names({name: parameter.data for name, parameter in theirs.named_parameters(remove_duplicate=False)}, model)
    gradients = our_names({name: parameter.grad for name, parameter in theirs.named_parameters(remove_duplicate=False)}, model)

    plain = Whole(model, dtype=WIDE, device=CPU)
    with torch.no_grad():
        for name, parameter in plain.by_name.items():
            parameter.copy_(weights[name])
    logits, summed = plain.logits(context), plain(context)
    (summed / targets).backward()

    engine = make_engine(config, make_mesh(config, Layout(), 0), device=CPU, dtype=WIDE)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    engine.load_state(lambda kind, name, box, a, b: (weights if kind == "weight" else zeros)[name].reshape(-1)[a:b], count=0)
    engine.run(contexts_of(model, data, 2), targets=targets)
    totals = engine.finish_gradients()
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    return {
        "logits": worst({"logits": logits}, {"logits": out.logits})[0],
        "loss": abs(float(summed / loss) - 1),
        "gradient": worst({name: parameter.grad for name, parameter in plain.by_name.items()}, gradients),
        "engine loss": abs(totals.loss / float(loss) - 1),
        "engine norm": abs(totals.norm / float(norm) - 1),
        "engine gradient": worst(collected(engine, "gradient"), {name: tensor.flatten() for name, tensor in gradients.items()}),
    }


# --- torch's optimizers ----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.1, "clip": 0.0},
    "adamw, clipped": {"kind": "adamw", "lr": 3e-3, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.3, "clip": 0.05},
    "sgd": {"kind": "sgd", "lr": 0.1, "weight_decay": 0.0, "clip": 1000.0},
    "sgd, momentum, decay": {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "clip": 0.05},
    "sgd, nesterov, decay": {"kind": "sgd", "lr": 0.1, "momentum": 0.7, "nesterov": True, "weight_decay": 0.2, "clip": 0.05},
}


def optimizers(rank: int, world: int, say: Say) -> dict[str, dict[str, float]]:
    """4 updates of our engine and of torch's optimizer and clipping, each step from the engine's gradients."""
    torch.set_num_threads(1)
    return {name: _against_torch(config_of(MODELS["qwen3"], optimizer=optimizer)) for name, optimizer in OPTIMIZERS.items()}


def _against_torch(config: Config) -> dict[str, float]:
    rule, rows = config.optimizer, table(config.model)
    engine = make_engine(config, make_mesh(config, Layout(), 0), device=CPU, dtype=WIDE)
    theirs = {name: nn.Parameter(values.clone()) for name, values in collected(engine, "weight").items()}
    groups = [[theirs[row.name] for row in rows if row.decay == decay] for decay in (True, False)]
    grouped = [{"params": group, "weight_decay": rule.weight_decay * (not at)} for at, group in enumerate(groups)]
    torch_rule: torch.optim.Optimizer
    if rule.kind == "adamw":
        torch_rule = torch.optim.AdamW(grouped, betas=rule.betas, eps=rule.eps, foreach=False)
    else:
        torch_rule = torch.optim.SGD(grouped, momentum=rule.momentum, nesterov=rule.nesterov, foreach=False)
    keys = {"first_moment": "exp_avg" if rule.kind == "adamw" else "momentum_buffer", "second_moment": "exp_avg_sq"}
    gaps = {"norm": 0.0, "weight": 0.0, "first_moment": 0.0, "second_moment": 0.0}
    data = batch(config.model.vocab)
    for step in range(4):
        targets = int((data["labels"] >= 0).sum())
        engine.run(contexts_of(config.model, data, 2), targets=targets)
        totals = engine.finish_gradients()
        for name, gradient in collected(engine, "gradient").items():
            theirs[name].grad = gradient
        norm = float(nn.utils.clip_grad_norm_(theirs.values(), rule.clip or float("inf")))
        for group in torch_rule.param_groups:
            group["lr"] = rule.lr * (1 + step)
        torch_rule.step()
        engine.step(rule.lr * (1 + step))
        gaps["norm"] = max(gaps["norm"], abs(totals.norm / norm - 1))
        gaps["weight"] = max(gaps["weight"], worst(collected(engine, "weight"), {n: p.data for n, p in theirs.items()})[0])
        for kind, key in keys.items():
            ours = collected(engine, kind)
            if ours:
                gaps[kind] = max(gaps[kind], worst(ours, {name: torch_rule.state[p][key] for name, p in theirs.items()})[0])
    return gaps


# --- torch's pipeline ------------------------------------------------------------------------------------------------


class Part(nn.Module):
    """Some consecutive units of the plain model: from tokens or activations (B, S, D), to activations or logits."""

    def __init__(self, whole: Whole, model: ModelConfig, units: list[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.model, self.first, self.last = model, units[0] is whole.units[0], units[-1] is whole.units[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(B, S) or (B, S, D) -> (B, S, D) or (B, S, V)."""
        tokens = x if self.first else torch.zeros(x.shape[:2], dtype=torch.int64)
        context = make_context(self.model, tokens, tokens, dtype=WIDE)
        for at, unit in enumerate(self.units):
            if self.first and at == 0:
                x = unit(context)
            elif self.last and at + 1 == len(self.units):
                x = unit.logits(x)  # type: ignore[operator]
            else:
                x = unit(x, context)
        return x


def torch_pipeline(rank: int, world: int, say: Say, job: dict[str, Any], folder: str) -> dict[str, float]:
    """One global batch of the proof through torch's GPipe and 1F1B; leaves this rank's gradients, returns the losses."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    torch.set_num_threads(1)
    config = Config.model_validate(job["config"])
    model, data = config.model, config.data
    order = MadeUp(model.vocab, data.sequence, config.batch.global_, config.runtime.seed)
    micro = order.micro_batches(0, dp_rank=0, dp_size=1, micro=config.batch.micro)
    tokens, labels = (torch.cat([getattr(part, key) for part in micro]) for key in ("tokens", "labels"))
    targets = int((labels >= 0).sum())

    def loss_of(logits: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum") / targets

    found: dict[str, float] = {}
    for schedule in (ScheduleGPipe, Schedule1F1B):
        whole = Whole(model, dtype=WIDE, device=CPU, seed=config.runtime.seed)
        names = {id(parameter): name for name, parameter in whole.by_name.items()}
        units = cut([1.0] * len(whole.units), world)[rank]
        part = Part(whole, model, list(whole.units[units.start : units.stop]))
        stage = PipelineStage(part, rank, world, CPU)
        runner = schedule(stage, len(micro), loss_fn=loss_of, scale_grads=False)
        losses: list[Tensor] = []
        if rank == 0:
            runner.step(tokens)
        else:
            runner.step(target=labels, losses=losses)
        found[schedule.__name__] = float(sum(losses))
        gradients = {f"{schedule.__name__}/{names[id(p)]}": p.grad for p in part.parameters()}
        save_file(gradients, Path(folder) / f"{schedule.__name__}-{rank}.safetensors")
    return found


# --- torch's tensor parallelism --------------------------------------------------------------------------------------


def torch_tensor_parallel(rank: int, world: int, say: Say, job: dict[str, Any], folder: str) -> list[float]:
    """One global batch of the proof through transformers' Llama cut by torch's DTensor, without and with sequence parallelism.

    Leaves the gradients, returns the two losses.
    """
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    config = Config.model_validate(job["config"])
    model, losses = config.model, []
    whole = Whole(model, dtype=WIDE, device=CPU, seed=config.runtime.seed)
    for sp in (False, True):
        theirs = theirs_of(model)
        with torch.no_grad(), norms_in_float64():
            for name, parameter in our_names(dict(theirs.named_parameters()), model).items():
                parameter.copy_(whole.by_name[name])
            _parallelize(theirs, world, sp=sp)
            with torch.enable_grad():
                losses.append(_one_batch(theirs, config))
        held = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        gradients = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in held.items()}
        if rank == 0:
            found = {name: tensor.contiguous() for name, tensor in our_names(gradients, model).items()}
            save_file(found, Path(folder) / f"sp-{sp}.safetensors")
    return losses


def _parallelize(theirs: nn.Module, world: int, *, sp: bool) -> None:
    """torch's plan for a Llama. sp: norms and residuals hold a slice of the sequence."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import parallel as torch_tp

    outside, column, row = Shard(1) if sp else Replicate(), torch_tp.ColwiseParallel, torch_tp.RowwiseParallel
    plan: dict[str, Any] = {
        "model.embed_tokens": row(input_layouts=Replicate(), output_layouts=outside),
        "lm_head": column(input_layouts=outside, output_layouts=Replicate()),
    }
    if sp:
        norms = ("norm", *(f"layers.*.{name}_layernorm" for name in ("input", "post_attention")))
        plan |= {f"model.{name}": torch_tp.SequenceParallel() for name in norms}
    block, kwargs = "model.layers.*", ({"hidden_states": outside}, {"hidden_states": Replicate()})
    plan[f"{block}.self_attn"] = torch_tp.PrepareModuleInput(input_kwarg_layouts=kwargs[0], desired_input_kwarg_layouts=kwargs[1])
    plan[f"{block}.mlp"] = torch_tp.PrepareModuleInput(input_layouts=(outside,), desired_input_layouts=(Replicate(),))
    plan |= {f"{block}.self_attn.{part}_proj": column() for part in "qkv"}
    plan |= {f"{block}.mlp.{part}_proj": column() for part in ("gate", "up")}
    plan |= {f"{block}.{part}": row(output_layouts=outside) for part in ("self_attn.o_proj", "mlp.down_proj")}
    torch_tp.parallelize_module(theirs, init_device_mesh("cpu", (world,)), plan)


def _one_batch(theirs: nn.Module, config: Config) -> float:
    """Forward and backward of the proof's first global batch; returns the loss per target."""
    order = MadeUp(config.model.vocab, config.data.sequence, config.batch.global_, config.runtime.seed)
    micro = order.micro_batches(0, dp_rank=0, dp_size=1, micro=config.batch.micro)
    targets, total, line = sum(part.targets for part in micro), 0.0, torch.arange(config.data.sequence)
    # Given from outside: from its split input transformers would take the places within a slice.
    places = {"position_ids": line[None], "attention_mask": (line[:, None] >= line)[None, None]}
    for part in micro:
        logits = theirs(input_ids=part.tokens, use_cache=False, **places).logits
        loss = F.cross_entropy(logits.flatten(0, 1), part.labels.flatten(), ignore_index=-100, reduction="sum") / targets
        loss.backward()
        total += float(loss.detach())
    return total


# --- other engines ---------------------------------------------------------------------------------------------------


def proofs(rank: int, world: int, say: Say, job: dict[str, Any], rows: list[tuple[dict[str, Any], str]]) -> int:
    """Proof runs of several layouts of this world one after the other, so that a library is imported once."""
    for layout, folder in rows:
        Path(folder).mkdir(exist_ok=True)
        proof_rank(rank, world, say, job, layout, folder)
    return len(rows)


def clipped_by_default(rank: int, world: int, say: Say, job: dict[str, Any], rows: list[tuple[dict[str, Any], str]]) -> int:
    """`proofs` by a DeepSpeed that is told nothing about clipping."""
    from dist_llm.engines.deepspeed import DeepSpeedEngine

    told = DeepSpeedEngine._settings
    DeepSpeedEngine._settings = lambda self: {key: value for key, value in told(self).items() if key != "gradient_clipping"}
    return proofs(rank, world, say, job, rows)


def resumed(rank: int, world: int, say: Say, job: dict[str, Any], layouts: list[dict[str, Any]]) -> list[list[float]]:
    """For each layout what `_go_on` returns of an engine after two steps, and of another that took over its state there."""
    torch.set_num_threads(1)
    config, found = Config.model_validate(job["config"]), []
    order = MadeUp(config.model.vocab, config.data.sequence, config.batch.global_, config.runtime.seed)
    for layout in layouts:
        mesh = make_mesh(config, Layout(**layout), rank)
        engines = [make_engine(config, mesh, device=CPU, dtype=getattr(torch, job["dtype"])) for _ in range(2)]
        first, second = (Trainer(config, mesh, engine, order) for engine in engines)
        for step in (0, 1):
            first.step(step)
        kept = _gathered(first.engine, mesh)
        for trainer in (first, second):
            if trainer is second:
                trainer.engine.load_state(lambda kind, name, box, a, b, kept=kept: kept[kind, name][a:b], count=2)
            found.append(_go_on(trainer, order))
    return found


def _go_on(trainer: Trainer, order: MadeUp) -> list[float]:
    """The losses of step 2, of a forward-only pass, of step 3 and of the pass again."""
    place, micro = trainer.mesh.at, trainer.config.batch.micro
    batches = order.micro_batches(9, dp_rank=place.dp, dp_size=trainer.mesh.layout.dp, micro=micro)
    contexts = [trainer.context(batch, step=9, training=False) for batch in batches]
    found = []
    for step in (2, 3):
        found += [trainer.step(step).loss, trainer.engine.evaluate(contexts)]
    return found


def _gathered(engine: Any, mesh: Mesh) -> dict[tuple[str, str], Tensor]:
    """The whole tensors of an engine's state on every rank (no tensor-parallel slices)."""
    pieces = [
        (item.kind, item.piece.slot.name, item.piece.start, prod(item.piece.slot.shape), item.values.tolist())
        for item in engine.state()
        if item.kind != "gradient"
    ]
    found: dict[tuple[str, str], Tensor] = {}
    for rows in comm.gather_json(pieces, mesh.world, device=CPU):
        for kind, name, start, size, values in rows:
            whole = found.setdefault((kind, name), torch.full((size,), float("nan"), dtype=engine.dtype))
            whole[start : start + len(values)] = torch.tensor(values, dtype=engine.dtype)
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found
