"""What the engines around other libraries share: the whole model as one module, and the parts of a step that are ours.

DDP, FSDP2 and DeepSpeed each wrap one `nn.Module`; they split nothing but the batch, and what ZeRO splits. Initial
weights, data, the scale of the loss, the clip value, the learning rate and the weight-decay groups come from us. They
average gradients over the data-parallel ranks: the loss is scaled up by that number first, so that sums come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_llm import comm, flight
from dist_llm.config.schema import ModelConfig, OptimizerConfig
from dist_llm.engines.native import Item, Read, Totals, Wanted
from dist_llm.errors import UsageError
from dist_llm.mesh import Group, Mesh, default_backend
from dist_llm.model.init import initialise
from dist_llm.model.table import table, unit_names
from dist_llm.model.transformer import Block, Context, Embedding, Head, build_unit
from dist_llm.parallel.adapted import AdaptedRoles
from dist_llm.parallel.compose import Options
from dist_llm.parallel.flat import Piece, Slot
from dist_llm.parallel.tensor import TensorRoles
from dist_llm.sharding import shard


class Whole(nn.Module):
    """The model on one device: all units in a row, a tied weight as one parameter with two uses."""

    def __init__(self, model: ModelConfig, *, dtype: torch.dtype, device: torch.device, seed: int = 0, smoothing: float = 0.0) -> None:
        """Every parameter whole, with its initial weights."""
        super().__init__()
        self.slots: dict[str, Slot] = {}  # by global name: the whole tensor
        self.by_name: dict[str, nn.Parameter] = {}
        for row in table(model):
            sharding = shard(row, tp=1, sp=False)
            self.slots[row.name] = Slot(row, sharding, sharding.box(0), 0)
            self.by_name[row.name] = nn.Parameter(torch.empty(row.shape, dtype=dtype, device=device), requires_grad=row.trained)
            initialise(self.by_name[row.name].data.view(-1), row, sharding.box(0), seed=seed)
        # The native engine's own operations, on a group of one rank: what an engine is compared in is how it splits the work.
        kind = AdaptedRoles if model.adapter.rank else TensorRoles
        roles = kind(Group("tp", (0,), 0), sp=False, vocab=model.vocab, first=0, smoothing=smoothing)
        self.units = nn.ModuleList(build_unit(name, model, self.by_name.get, roles) for name in unit_names(model))

    @property
    def blocks(self) -> list[Block]:
        """The middle units."""
        return [unit for unit in self.units if isinstance(unit, Block)]

    def forward(self, context: Context) -> Tensor:
        """The context's tokens and labels (B, S) -> the summed loss, a float64 scalar."""
        return self._walk(context, lambda head, x: head(x, context))

    def logits(self, context: Context) -> Tensor:
        """The context's tokens (B, S) -> (B, S, V)."""
        return self._walk(context, lambda head, x: head.logits(x))

    def _walk(self, context: Context, end: Callable[[Head, Tensor], Tensor]) -> Tensor:
        embedding, *blocks, head = self.units
        assert isinstance(embedding, Embedding) and isinstance(head, Head)
        x = embedding(context)
        for block in blocks:
            x = block(x, context)
        return end(head, x)


def decay_groups(whole: Whole, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Two groups of parameters: matrices take weight decay, norms and biases do not."""
    groups: list[dict[str, Any]] = []
    for decay in (True, False):
        chosen = [whole.by_name[name] for name, slot in whole.slots.items() if slot.row.decay == decay]
        groups.append({"params": chosen, "weight_decay": config.weight_decay if decay else 0.0})
    return groups


def torch_optimizer(whole: Whole, config: OptimizerConfig, *, offload: bool) -> torch.optim.Optimizer:
    """torch's own AdamW or SGD; AdamW on the host fused, because there its default makes a dozen passes over the numbers."""
    groups = decay_groups(whole, config)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True if offload else None)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def moment_keys(config: OptimizerConfig) -> dict[str, str]:
    """Our names of an optimizer's moments and torch's."""
    if config.kind == "adamw":
        return {"first_moment": "exp_avg", "second_moment": "exp_avg_sq"}
    return {"first_moment": "momentum_buffer"} if config.momentum else {}


class WholeEngine:
    """An engine's calls around a wrapped `Whole`; the engine of a library fills in the methods that raise here."""

    name: str  # as the layout calls it
    dtypes: tuple[torch.dtype, ...]
    optimizer: torch.optim.Optimizer

    def __init__(self, model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, options: Options) -> None:
        """As NativeEngine."""
        self.mesh, self.dtype, self.device, self.config = mesh, options.dtype, options.device, optimizer
        self.micro, self.micro_batches, self.offload_dir = options.micro, options.micro_batches, options.offload_dir
        self.offload = mesh.layout.offload != "none"
        self._refuse(options.compiled)
        if not dist.is_initialized():  # one process: the libraries need a group where we do not
            dist.init_process_group(default_backend(self.device.type), rank=0, world_size=1, store=dist.HashStore())
        dtype, seed, smoothing = self._weight_dtype(), options.seed, options.smoothing
        self.whole = Whole(model, dtype=dtype, device=self.device, seed=seed, smoothing=smoothing)
        self.moments = moment_keys(optimizer)
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.stop = torch.zeros((), dtype=torch.float64, device=self.device)
        self.norm = 0.0
        self._wrap()

    def _refuse(self, compiled: bool) -> None:
        layout, where = self.mesh.layout, f"engine={self.name}"
        if layout.world != layout.dp:
            raise UsageError("this engine splits the batch alone", where=where, expected="tp=1, cp=1, pp=1", found=str(layout))
        if self.dtype not in self.dtypes:
            expected, found = (" or ".join(str(dtype)[6:] for dtype in dtypes) for dtypes in (self.dtypes, [self.dtype]))
            raise UsageError(f"{where},zero={layout.zero} has another dtype", where="runtime.dtype", expected=expected, found=found)
        if self.config.skip_non_finite:
            what, found = "this engine leaves no step out", f"optimizer.skip_non_finite={self.config.skip_non_finite}"
            raise UsageError(what, where=where, found=found, next="leave it out, or engine=native")
        if compiled or layout.recompute != "none":
            found = "runtime.compile=true" if compiled else f"recompute={layout.recompute}"
            raise UsageError("this engine neither compiles nor recomputes", where=where, found=found, next="leave it out, or engine=native")

    def _weight_dtype(self) -> torch.dtype:
        """The dtype in which the parameters are handed over."""
        return self.dtype

    def _wrap(self) -> None:
        """Hands module and optimizer to the library."""
        raise NotImplementedError

    def _loss(self, context: Context) -> Tensor:
        """The summed loss of a micro-batch, through the library's module."""
        raise NotImplementedError

    def _micro_batch(self, context: Context, slope: float, *, last: bool) -> Tensor:
        """Adds the gradients of slope x loss and returns the loss; after the last micro-batch they are complete."""
        raise NotImplementedError

    def step(self, lr: float) -> None:
        """Clips, updates the weights and shares them; gradients are gone afterwards."""
        raise NotImplementedError

    def _range(self, name: str) -> tuple[int, int]:
        """The flat (start, stop) of a parameter that this rank updates."""
        raise NotImplementedError

    def _values(self, kind: str, name: str) -> Tensor | None:
        """That run of a tensor, 1-D and writable; None where there is none at this time."""
        raise NotImplementedError

    def _start_moments(self, tensors: Iterable[Tensor]) -> None:
        """Zero moments from the start, as ours, for the tensors that the optimizer updates."""
        for tensor in tensors:
            moments = {key: torch.zeros_like(tensor.data) for key in self.moments.values()}
            self.optimizer.state[tensor] = moments | ({"step": self._count(0)} if self.config.kind == "adamw" else {})

    def _count(self, updates: int) -> Any:
        """A number of updates as the optimizer keeps it."""
        return torch.tensor(float(updates))

    def _set_count(self, updates: int) -> None:
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = self._count(updates)

    def run(self, contexts: Sequence[Context], *, targets: float) -> None:
        """Forward and backward of one global batch. targets: what those of all ranks count together: their number, or weight."""
        assert len(contexts) == self.micro_batches, (len(contexts), self.micro_batches)
        flight.enter("backward")  # forward and backward of each micro-batch in turn
        slope = self.mesh.layout.dp / targets
        losses = [self._micro_batch(context, slope, last=at + 1 == len(contexts)).detach() for at, context in enumerate(contexts)]
        self.loss = torch.stack(losses).sum()

    def evaluate(self, contexts: Sequence[Context]) -> float:
        """The summed loss of forward-only micro-batches over all ranks, equal on all ranks."""
        return float(self.figures(contexts))

    def figures(self, contexts: Sequence[Context]) -> Tensor:
        """As `evaluate`, on the host."""
        with comm.booked_on("control"):
            return comm.all_reduce(self.local_loss(contexts), self.mesh.world).cpu()

    @torch.no_grad()
    def local_loss(self, contexts: Sequence[Context]) -> Tensor:
        """As `evaluate`, this rank's part of the sum alone."""
        return torch.stack([self._loss(context) for context in contexts]).sum()

    def finish_gradients(self) -> Totals:
        """Returns the summed loss and the norm of the global gradient, equal on all ranks."""
        flight.enter("reduce")
        square = torch.zeros_like(self.loss)
        for name in self._answered():
            gradient = self._values("gradient", name)
            assert gradient is not None, name
            square += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        with comm.booked_on("control"):
            total, loss, stop = comm.all_reduce(torch.stack((square, self.loss, self.stop)), self.mesh.world).tolist()
        self.norm = total**0.5
        return Totals(loss, self.norm, stop > 0)

    def _answered(self) -> Iterator[str]:
        """The parameters of which this rank answers for a run; of what all ranks hold whole, the first."""
        for name in self.whole.slots:
            start, stop = self._range(name)
            if start < stop and (self.mesh.layout.zero > 0 or self.mesh.at.dp == 0) and self.mesh.replica.index == 0:
                yield name

    def state(self) -> Iterator[Item]:
        """Every run of every tensor this rank answers for, by global name: together the ranks hold each element once.

        Gradients are there between `finish_gradients` and `step`, before clipping.
        """
        for name in self._answered():
            piece = Piece(self.whole.slots[name], *self._range(name), 0)
            for kind in ("weight", "gradient", *self.moments):
                values = self._values(kind, name)
                if values is not None:
                    yield Item(kind, piece, values)

    def wanted(self) -> Iterator[Wanted]:
        """What `load_state` will ask for."""
        for name, slot in self.whole.slots.items():
            start, stop = self._range(name)
            if start < stop:
                yield from (Wanted(kind, name, slot.box, start, stop) for kind in ("weight", *self.moments))

    @torch.no_grad()
    def load_state(self, read: Read, *, count: int) -> None:
        """Takes weights and moments from `read(kind, name, box, start, stop)`; count: optimizer updates made so far."""
        for name, slot in self.whole.slots.items():
            start, stop = self._range(name)
            for kind in ("weight", *self.moments):
                values = self._values(kind, name)
                if values is not None and start < stop:
                    values.copy_(read(kind, name, slot.box, start, stop))
        self._set_count(count)

    def persistent(self) -> dict[str, list[Tensor]]:
        """The tensors that live between steps: weights, gradients (the library's own buffers are not seen), optimizer; host: offloaded."""
        raise NotImplementedError


class TorchEngine(WholeEngine):
    """The half that DDP and FSDP2 share: gradients on the parameters, torch's optimizer and torch's clipping."""

    def _make_optimizer(self) -> None:
        self.optimizer = torch_optimizer(self.whole, self.config, offload=self.offload)
        self._start_moments(self.whole.by_name.values())

    def step(self, lr: float) -> None:
        """Clips, updates the weights that this rank owns; gradients are gone afterwards."""
        if self.config.clip:
            self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _clip(self) -> None:
        """Scales the gradients down to the clip value."""
        nn.utils.clip_grad_norm_(self.whole.parameters(), self.config.clip)

    def _tensor(self, kind: str, name: str) -> Tensor | None:
        """A tensor as it lies on its parameter."""
        parameter = self.whole.by_name[name]
        if kind in self.moments:
            return self.optimizer.state[parameter][self.moments[kind]]
        return parameter.grad if kind == "gradient" else parameter.data

    def persistent(self) -> dict[str, list[Tensor]]:
        """The tensors that live between steps; gradients are made anew in each."""
        kept: dict[str, list[Tensor]] = {"weights": [], "gradients": [], "optimizer": [], "host": []}
        for name in self.whole.slots:
            for kind in ("weight", *self.moments):
                values = self._values(kind, name)
                if values is not None:
                    kept["host" if self.offload else "weights" if kind == "weight" else "optimizer"].append(values)
        return kept
