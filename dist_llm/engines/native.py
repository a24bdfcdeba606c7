"""The native engine: five calls over the composed stages.

build, run, finish_gradients, step, state. The trainer knows nothing else; the engines for DDP, FSDP2 and DeepSpeed
offer the same five.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_llm import comm, flight
from dist_llm.config.preference import FIGURES
from dist_llm.config.schema import ModelConfig, OptimizerConfig
from dist_llm.engines.graph import CudaRecorder, StepGraph
from dist_llm.engines.offload import HOST, Ferry
from dist_llm.engines.optim import Optimizer
from dist_llm.mesh import Mesh
from dist_llm.model.table import table
from dist_llm.model.transformer import Context
from dist_llm.parallel.compose import Options, compose
from dist_llm.parallel.flat import Piece
from dist_llm.parallel.magnitudes import begin_magnitudes
from dist_llm.parallel.pipeline import Pipeline
from dist_llm.parallel.weights import FlatWeights
from dist_llm.parallel.zero import FlatUnit
from dist_llm.schedule.actions import Action, Kind
from dist_llm.schedule.generate import generate
from dist_llm.schedule.lower import lower
from dist_llm.schedule.validate import validate
from dist_llm.sharding import Box

Read = Callable[[str, str, Box, int, int], Tensor]


@dataclass(frozen=True)
class Totals:
    """What all ranks know after a step's gradients are complete: the summed loss, the global norm, and whether a rank is to stop.

    figures: what a loss of pairs has summed beside itself.
    """

    loss: float
    norm: float
    stop: bool = False
    figures: tuple[float, ...] = ()


@dataclass(frozen=True)
class Item:
    """A run of one tensor that this rank answers for: `kind` of global tensor `piece.slot.name`, its box and range."""

    kind: str  # weight, gradient, first_moment, second_moment, frozen (weights that are not trained)
    piece: Piece
    values: Tensor  # (piece.stop - piece.start,)


@dataclass(frozen=True)
class Wanted:
    """Elements [start, stop) of a box of one tensor that this rank keeps, and takes from a checkpoint."""

    kind: str
    name: str
    box: Box
    start: int
    stop: int


class NativeEngine:
    """Data, tensor and pipeline parallelism and ZeRO 0-3 in any legal mix."""

    def __init__(self, model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, options: Options) -> None:
        """Builds this rank's part."""
        layout, device, micro_batches = mesh.layout, options.device, options.micro_batches
        self.model, self.mesh, self.dtype, self.device = model, mesh, options.dtype, device
        self.stages = stages = compose(model, mesh, options)
        lists = lower(self._compute(micro_batches), reduce=layout.reduce)
        validate(lists, num_stages=layout.stages, micro_batches=micro_batches, reduce=layout.reduce)
        self.pipeline = Pipeline(stages, lists, mesh)
        self.boundary = (options.micro, options.sequence // (layout.tp if layout.sp else 1), model.dim)
        flats = {id(flat): flat for stage in stages for unit in stage.units for flat, _ in unit.flats}
        self.flats = [flat for flat in flats.values() if isinstance(flat, FlatUnit)]
        self.frozen: list[FlatWeights] = [flat for flat in flats.values() if not isinstance(flat, FlatUnit)]
        self.seed = options.seed
        self.begin_adapter()
        self.ferry = Ferry(self.flats, device) if layout.offload == "optimizer" else None
        self.optimizer, self.clip = Optimizer(optimizer, HOST if self.ferry else device), optimizer.clip
        self.moments = [self.optimizer.moments(flat.master) for flat in self.flats]
        self.halves = list(dict.fromkeys(row.half for row in table(model)))
        shape = (len(FIGURES),) if options.pairs else ()
        self.loss = torch.zeros(shape, dtype=torch.float64, device=device)
        self.scale = torch.zeros(shape, dtype=torch.float64, device=device)  # the slope of the first number alone
        # What gradients are still to be multiplied by: of bfloat16 backward that slope is a power of two, which rounds nothing.
        self.rest = 1.0
        self.stop = torch.zeros((), dtype=torch.float64, device=device)  # 1 where this rank was told to stop: it travels with the norm
        self.graph = StepGraph(self.flats, CudaRecorder(device)) if options.graph else None
        self.totals: Tensor | None = None  # of a step that has been recorded, until it is read
        self.norm = 0.0

    def _compute(self, micro_batches: int) -> list[list[Action]]:
        layout = self.mesh.layout
        return generate(layout.schedule, ranks=layout.pp, micro_batches=micro_batches, chunks=layout.chunks)

    def _boundary(self) -> Tensor:
        return torch.empty(self.boundary, dtype=self.dtype, device=self.device)

    def run(self, contexts: Sequence[Context], *, targets: float) -> None:
        """Forward and backward of one global batch. targets: what those of all ranks count together: their number, or weight."""
        slope = 1.0 / targets
        if self.dtype == torch.bfloat16:
            part, exponent = math.frexp(slope)
            self.rest, slope = 2.0 * part, math.ldexp(0.5, exponent)
        self.scale.view(-1)[0].fill_(slope)
        if self.graph is not None and not self.pipeline.recording:  # spans are marked by the host
            self.arrive()
            self.totals = self.graph.run(contexts, self._gradients_of)
        else:
            self._walk(contexts)

    def _walk(self, contexts: Sequence[Context]) -> None:
        self.loss = self.pipeline.run(contexts, scale=self.scale, boundary=self._boundary)

    def _gradients_of(self, contexts: Sequence[Context]) -> Tensor:
        """`run` and `finish_gradients` up to where the host reads."""
        self._walk(contexts)
        return self._finish()

    def evaluate(self, contexts: Sequence[Context]) -> float:
        """The summed loss of forward-only micro-batches over all ranks, equal on all ranks.

        Every data-parallel rank brings the same number of contexts, made with `training=False`.
        """
        return float(self.figures(contexts).view(-1)[0])

    def figures(self, contexts: Sequence[Context]) -> Tensor:
        """As `evaluate`, on the host; of pairs all that they make of the losses."""
        with comm.booked_on("control"):
            return comm.all_reduce(self.local_loss(contexts), self.mesh.world).cpu()

    def local_loss(self, contexts: Sequence[Context]) -> Tensor:
        """As `evaluate`, this rank's part of the sum alone, float64, `Context.loss_shape`: zero where the last stage is elsewhere."""
        forward = [[action for action in actions if action.kind == Kind.F] for actions in self._compute(len(contexts))]
        walk = Pipeline(self.stages, lower(forward, reduce="step"), self.mesh)
        scale = torch.zeros(contexts[0].loss_shape, dtype=torch.float64, device=self.device)
        loss = walk.run(contexts, scale=scale, boundary=self._boundary)
        for flat in (*self.flats, *self.frozen):
            flat.end_step()
        return loss if self.mesh.at.tp == 0 else torch.zeros_like(loss)

    def finish_gradients(self) -> Totals:
        """Leaves with global gradients, over `rest`, on the ranks that own them; returns the summed loss and the norm, equal on all ranks.

        Sums of squares are float64 per half of a block and added in the table's order: where one rank
        has all of a unit, no cut into stages changes a bit.
        """
        totals, self.totals = self._finish() if self.totals is None else self.totals, None
        numbers, count = totals.tolist(), len(self.halves)  # the host waits for the device here
        self.norm = self.rest * sum(numbers[:count]) ** 0.5
        return Totals(numbers[count], self.norm, numbers[-1] > 0, tuple(numbers[count + 1 : -1]))

    def _finish(self) -> Tensor:
        """Global gradients, over `rest`, where they are owned -> sums of squares of halves, the loss, ranks that are to stop: float64."""
        flight.enter("reduce")
        for flat in reversed(self.flats):  # as backward has begun them
            flat.start_crossing()
        for flat, pending in [(flat, flat.start_finish()) for flat in self.flats]:
            flat.finish(pending)
        for held in self.frozen:
            held.end_step()
        totals = torch.zeros(len(self.halves) + self.loss.numel() + 1, dtype=torch.float64, device=self.device)
        for flat in self.flats:
            for half, squares in flat.square_sums().items():
                totals[self.halves.index(half)] += squares
        if self.mesh.at.tp == 0:
            totals[len(self.halves) : -1] = self.loss  # the last stage's tensor-parallel ranks all hold the same sum
        totals[-1] = self.stop
        return comm.all_reduce(totals, self.mesh.world)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Clips, updates the owned weights and begins to share them; gradients are gone afterwards."""
        flight.enter("update")
        factor = min(1.0, self.clip / (self.norm + 1e-6)) if self.clip else 1.0
        self.optimizer.count += 1
        for (flat, gradient), moments in zip(self._gradients(self.rest * factor), self.moments, strict=True):
            for run, decay in flat.segments():
                self.optimizer.update([flat.master[run]], [gradient[run]], [moments.part(run)], lr=lr, decay=decay)
            if self.ferry is None:
                flat.publish()
        for flat in self.flats:
            flat.gradient = None
            if self.ferry is not None:  # their weights are back from the host when the last one is
                flat.publish()

    def arrive(self) -> None:
        """Waits for updated weights that are on their way between ranks; without it they are waited for where they are used."""
        for flat in self.flats:
            flat.arrive()

    def skip(self) -> None:
        """Leaves out an update: gradients are gone, weights and moments as they were. It counts as one, so that the count is the step."""
        self.optimizer.count += 1
        for flat in self.flats:
            flat.gradient = None

    def _gradients(self, factor: float) -> Iterator[tuple[FlatUnit, Tensor]]:
        """Each unit's owned gradient times `factor`, where its master weights are."""
        owned = [(flat, flat.gradient) for flat in self.flats if flat.gradient is not None]
        assert len(owned) == len(self.flats), "finish_gradients comes first"
        scaled = iter(owned) if factor == 1.0 else ((flat, gradient.mul_(factor)) for flat, gradient in owned)
        return self.ferry.visit(list(scaled)) if self.ferry else scaled

    def wanted(self) -> Iterator[Wanted]:
        """What `load_state` will ask for, or a part of what is named here."""
        for flat, moments in zip(self.flats, self.moments, strict=True):
            for slot, start, stop in flat.kept():
                yield Wanted("weight", slot.name, slot.box, start, stop)
            for kind, tensor in (("first_moment", moments.first), ("second_moment", moments.second)):
                if tensor is not None:
                    for piece in flat.owned_pieces():
                        yield Wanted(kind, piece.slot.name, piece.slot.box, piece.start, piece.stop)

    @torch.no_grad()
    def load_state(self, read: Read, *, count: int) -> None:
        """Takes weights and moments from `read(kind, name, box, start, stop)`, which gives that run of a global tensor's box.

        count: optimizer updates made so far. Each rank asks for what it holds and nothing else.
        """
        self.arrive()
        for flat, moments in zip(self.flats, self.moments, strict=True):
            flat.load(lambda slot, start, stop: read("weight", slot.name, slot.box, start, stop))
            for kind, tensor in (("first_moment", moments.first), ("second_moment", moments.second)):
                if tensor is not None:
                    for piece in flat.owned_pieces():
                        values = read(kind, piece.slot.name, piece.slot.box, piece.start, piece.stop)
                        tensor[piece.at : piece.at + piece.stop - piece.start].copy_(values)
        self.optimizer.count.fill_(count)

    @torch.no_grad()
    def load_frozen(self, read: Read) -> None:
        """Takes from `read` what a base has of the model: weights that are not trained, and what is trained beside an adapter.

        Moments are zero before the first step; `begin_adapter` follows, on all ranks.
        """
        self.arrive()
        for held in (*self.frozen, *(flat for flat in self.flats if not flat.plan.beside)):
            held.load(lambda slot, start, stop: read("weight", slot.name, slot.box, start, stop))

    def begin_adapter(self) -> None:
        """Gives what lies beside the weights that are not trained its initial values, which with DoRA are theirs."""
        begin_magnitudes((*self.frozen, *self.flats), self.mesh, seed=self.seed)

    def persistent(self) -> dict[str, list[Tensor]]:
        """The tensors that the engine keeps: weights, optimizer (master weights and moments); host: what is offloaded.

        gradients: from the first backward of a step to the update.
        """
        self.arrive()
        kept: dict[str, list[Tensor]] = {"weights": [], "gradients": [], "optimizer": [], "host": []}
        updated = kept["host" if self.ferry else "optimizer"]
        updated += [self.optimizer.count, *(self.ferry.buffers if self.ferry else ())]
        kept["weights"] += [tensor for flat in (*self.flats, *self.frozen) for tensor in flat.kept_tensors()]
        for flat, moments in zip(self.flats, self.moments, strict=True):
            kept["gradients"] += [*flat.whole.values(), *flat.sums.values(), *([] if flat.gradient is None else [flat.gradient])]
            master = [flat.master] if flat.master is not flat.owned_weights else []
            updated += [tensor for tensor in (*master, moments.first, moments.second) if tensor is not None]
        return kept

    def state(self) -> Iterator[Item]:
        """Every run of every tensor this rank answers for, by global name: together the ranks hold each element once.

        Weights are master weights, those that are not trained have a kind of their own, "frozen"; gradients are there between
        `finish_gradients` and `step`, before clipping; of a bfloat16 backward in float64, because they are a product with `rest`.
        """
        self.arrive()
        for held in self.frozen:
            for piece in held.pieces():
                yield Item("frozen", piece, held.shard_run(piece))
        for flat, moments in zip(self.flats, self.moments, strict=True):
            tensors = {"weight": flat.master, "gradient": flat.gradient, "first_moment": moments.first, "second_moment": moments.second}
            for kind, tensor in tensors.items():
                if tensor is not None:
                    for piece in flat.pieces():
                        values = flat.own_run(tensor, piece)
                        over = kind == "gradient" and self.rest != 1.0
                        yield Item(kind, piece, values.double() * self.rest if over else values)
