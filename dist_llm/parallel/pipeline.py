"""The walk over a stage's units, and the run of a schedule's lists.

A stage is a list of units with detached boundaries: F walks them forward, B walks them in reverse with one
`autograd.backward` per unit. Gather, prefetch, free, recompute and reduce are plain lines in that walk; there are no
module hooks. Training without a pipeline is the one-stage schedule.

Legend: B micro-batch, S' tokens kept outside split regions (S, or S/tp with sequence parallelism), D dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dist_llm import comm, flight
from dist_llm.mesh import Mesh
from dist_llm.model.sums import summing
from dist_llm.model.transformer import Context
from dist_llm.parallel.weights import FlatWeights
from dist_llm.parallel.zero import FlatUnit
from dist_llm.schedule.actions import Action, Kind, Span, channel, gives, needs, owners, partner

COMPUTE = (Kind.F, Kind.B)
SENDS = 4  # messages on their way at once: each keeps its activations alive
KEPT_UNITS = 2  # units at the end of a stage that keep their weights between a forward and the backward that follows at once
IN_FLIGHT = 1  # units whose gradients may be on the way at once, beside the backward of the next: each holds a buffer


@dataclass
class Unit:
    """One step of the walk: a module and the flat units whose weights it reads, each with the use it makes of them.

    recomputed: F keeps the input alone and B makes the graph again. deferred: F does nothing, B makes the graph for the
    first time: the head, whose loss and gradients come out of one pass over the logits.
    """

    name: str
    module: nn.Module
    flats: list[tuple[FlatWeights, int]]
    recomputed: bool = False
    deferred: bool = False

    @property
    def trained(self) -> list[tuple[FlatUnit, int]]:
        """Those of its flat units that gradients are made for."""
        return [(flat, use) for flat, use in self.flats if isinstance(flat, FlatUnit)]

    def start_gather(self) -> None:
        """Begins to fetch the weights (stage 3)."""
        for flat, _ in self.flats:
            flat.start_gather()

    def finish_gather(self) -> None:
        """Leaves with the weights in memory."""
        for flat, _ in self.flats:
            flat.finish_gather()

    def release(self) -> None:
        """Lets the weights go (stage 3)."""
        for flat, _ in self.flats:
            flat.release()


@dataclass
class Kept:
    """What F leaves for B of one unit: its detached input and where its graph ends (None: to be computed again)."""

    x: Tensor | None
    edge: GradientEdge | None


@dataclass
class Stage:
    """Consecutive units on one rank. `first` reads tokens, `last` ends in the loss, which adds up in `loss`."""

    index: int
    units: list[Unit]
    first: bool
    last: bool
    loss: Tensor | None = None  # summed over the micro-batches since `take_loss`, float64: `Context.loss_shape`
    kept: dict[int, list[Kept]] = field(default_factory=dict)
    reducing: list[FlatUnit] = field(default_factory=list)

    def forward(self, micro: int, x: Tensor | None, context: Context, *, backward_next: bool) -> Tensor:
        """Enters with (B, S', D), or nothing on the first stage; leaves with (B, S', D), of no meaning behind a loss.

        backward_next: B of the same micro-batch follows at once, so the units it begins with keep their weights.
        Outside training nothing is kept.
        """
        kept: list[Kept] = []
        for at, unit in enumerate(self.units):
            x = None if x is None else x.detach().requires_grad_(context.training)  # always: gradients by weights come with the one by x
            if context.training and unit.deferred:
                kept.append(Kept(x, None))
                break
            unit.finish_gather()
            if at + 1 < len(self.units) and (backward_next or not (context.training and self.units[at + 1].deferred)):
                self.units[at + 1].start_gather()  # prefetch: travels while this unit computes
            out = self._run(unit, x, context)
            kept.append(Kept(x, get_gradient_edge(out) if out.requires_grad else None))
            if not (backward_next and at + KEPT_UNITS >= len(self.units)):
                unit.release()
            x = out.detach()
        if context.training:
            self.kept[micro] = kept
        assert x is not None
        return x

    def backward(self, micro: int, slope: Tensor | None, context: Context, *, reduce: bool) -> Tensor | None:
        """Enters with the gradient of what `forward` left; leaves with that of what it entered with (None on the first stage).

        reduce: the weight gradients are complete after this micro-batch, or every micro-batch is reduced.
        """
        kept, by_x = self.kept.pop(micro), None
        assert slope is not None
        for at in reversed(range(len(self.units))):
            unit, (x, edge) = self.units[at], (kept[at].x, kept[at].edge)
            if x is None and not unit.trained:
                unit.release()
                break  # the first unit of the model, with nothing to train in it
            if x is not None:
                unit.finish_gather()
            if at > 1 or (at == 1 and kept[0].x is not None):  # the embedding's backward reads no weights
                self.units[at - 1].start_gather()
            if edge is None and not unit.deferred:
                edge = get_gradient_edge(self._run(unit, x, context, again=True))
            for flat, use in unit.trained:
                flat.begin_backward(use)
            with summing([(flat.weights, flat.whole[use]) for flat, use in unit.trained], slope=slope if unit.deferred else None):
                if edge is None:
                    edge = get_gradient_edge(self._run(unit, x, context, again=True))
                torch.autograd.backward((edge,), (slope,))
            kept[at] = Kept(None, None)
            unit.release()
            self._after_backward(unit, reduce)
            if x is not None:
                assert x.grad is not None
                slope = by_x = x.grad
        return by_x if not self.first else None

    def _run(self, unit: Unit, x: Tensor | None, context: Context, *, again: bool = False) -> Tensor:
        """The unit's forward; a recomputed one leaves no graph the first time, `again` makes it in backward."""
        inputs = (context,) if x is None else (x, context)
        with torch.set_grad_enabled(context.training and (again or not unit.recomputed)):
            out = unit.module(*inputs)
        if self.last and unit is self.units[-1]:
            self.loss = out.detach() if self.loss is None else self.loss + out.detach()
        return out

    def take_loss(self) -> Tensor | None:
        """The loss since the last call; None where the stage has none."""
        loss, self.loss = self.loss, None
        return loss

    def _after_backward(self, unit: Unit, reduce: bool) -> None:
        """Takes over the gradients; starts their reduction when it is time, and finishes the oldest one under way."""
        for flat, use in unit.trained:
            flat.end_backward(use)
            if reduce and (not flat.by_step or use == 0):  # step: use 0 comes last in the walk, with all uses done
                flat.start_reduce(use)
                self.reducing.append(flat)
        while len(self.reducing) > IN_FLIGHT:
            self.reducing.pop(0).collect()

    def finish_reduce(self) -> None:
        """Finishes the reductions under way."""
        while self.reducing:
            self.reducing.pop(0).collect()


@dataclass
class InTransit:
    """The tensors of one step on their way between actions, by (stage, micro-batch)."""

    inputs: dict[Action, Tensor | None] = field(default_factory=dict)  # what a compute action takes, where it is already here
    coming: dict[Action, comm.Pending] = field(default_factory=dict)  # by RECV action
    going: list[comm.Pending] = field(default_factory=list)
    outputs: dict[Action, Tensor] = field(default_factory=dict)  # by SEND action
    contexts: dict[int, Context] = field(default_factory=dict)  # of the micro-batches in flight


class Clock:
    """When the actions of a step are computed, in seconds of time.perf_counter, which the ranks of a machine share.

    A CUDA device gets its work ahead of time: there a mark is an event on its stream, and its time is known when it has passed.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.zero: Any = None  # the first mark, and its time
        self.start = 0.0

    def mark(self) -> Any:
        """A moment among the work given to the device so far."""
        if self.stream is None:
            return time.perf_counter()
        if self.zero is None:
            self.stream.synchronize()
            self.zero, self.start = self._event(), time.perf_counter()
        return self._event()

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def seconds(self, mark: Any) -> float:
        """The time of a mark, once the device is there."""
        if self.stream is None:
            return mark
        mark.synchronize()
        return self.start + self.zero.elapsed_time(mark) / 1000.0


class Pipeline:
    """Runs the lowered lists of a schedule on this rank's stages."""

    def __init__(self, stages: Sequence[Stage], lists: list[list[Action]], mesh: Mesh) -> None:
        self.stages = {stage.index: stage for stage in stages}
        self.lists, self.mesh, self.actions = lists, mesh, lists[mesh.at.pp]
        self.owners = owners(lists)
        compute = [action for action in self.actions if action.kind in COMPUTE]
        self.following = dict(zip(compute, compute[1:], strict=False))
        self.reduced = _reduced(self.actions)
        self.final = set({action.micro: action for action in compute}.values())  # the last use of each micro-batch here
        self.spans: list[Span] = []
        self.recording = False

    def run(self, contexts: Sequence[Context], *, scale: Tensor, boundary: Callable[[], Tensor]) -> Tensor:
        """One step: all micro-batches through this rank's stages; returns the summed loss (zero where the last stage is elsewhere).

        contexts: each is taken when its micro-batch begins here and dropped when it ends.
        scale: the slope of the summed loss in its shape, 1 / target tokens of the global batch or the power of two in that. boundary:
        an empty tensor (B, S', D).
        """
        state, clock, marks = InTransit(), Clock(scale.device), []
        for action in self.actions:
            if action.kind in COMPUTE:
                self._finish_input(action, state, scale)
                if action.micro not in state.contexts:
                    state.contexts[action.micro] = contexts[action.micro]
            start = clock.mark() if self.recording else None  # waiting for the input is not work
            match action.kind:
                case Kind.F:
                    flight.enter("forward")
                    self._forward(action, state.contexts[action.micro], state)
                case Kind.B:
                    flight.enter("backward")
                    self._backward(action, state.contexts[action.micro], state)
                case Kind.SEND_F | Kind.SEND_B:
                    if len(state.going) == SENDS:  # validate() proves that even sends that wait for their receiver cannot lock
                        state.going.pop(0).finish()
                    state.going.append(comm.start_send(state.outputs.pop(action), self._channel(action)))
                case Kind.RECV_F | Kind.RECV_B:
                    state.coming[action] = comm.start_recv(boundary(), self._channel(action))
                case Kind.REDUCE:
                    pass  # the walk of the backward before it has begun it; it travels beside what comes now
            if action in self.final:
                del state.contexts[action.micro]
            if self.recording:
                marks.append((action, start, clock.mark()))
        for pending in state.going:
            pending.finish()
        self.spans = [Span(self.mesh.at.pp, action, clock.seconds(start), clock.seconds(end)) for action, start, end in marks]
        losses = [loss for stage in self.stages.values() if (loss := stage.take_loss()) is not None]
        return losses[0] if losses else torch.zeros_like(scale)

    def _forward(self, action: Action, context: Context, state: InTransit) -> None:
        stage = self.stages[action.stage]
        backward_next = self.following.get(action) == Action(action.stage, Kind.B, action.micro)
        out = stage.forward(action.micro, state.inputs.pop(action), context, backward_next=backward_next)
        if not stage.last:
            self._output(action, out, state)

    def _backward(self, action: Action, context: Context, state: InTransit) -> None:
        stage = self.stages[action.stage]
        stage.finish_reduce()  # of the micro-batch before: its buffers are free before the first unit makes its own
        # The walk alone holds the slope, and lets it go after its first unit.
        by_x = stage.backward(action.micro, state.inputs.pop(action), context, reduce=action in self.reduced)
        if not stage.first:
            assert by_x is not None
            self._output(action, by_x, state)

    def _finish_input(self, action: Action, state: InTransit, scale: Tensor) -> None:
        """Leaves with what a compute action takes: from the neighbouring stage on this rank, or a message; the ends have their own."""
        stage = self.stages[action.stage]
        if action.kind == Kind.F and stage.first:
            state.inputs[action] = None
        elif action.kind == Kind.B and stage.last:
            state.inputs[action] = scale
        elif action not in state.inputs:
            message = needs(action)
            assert message is not None
            state.inputs[action] = state.coming.pop(message).finish()

    def _output(self, action: Action, out: Tensor, state: InTransit) -> None:
        send = gives(action)
        assert send is not None
        target = Action(partner(send).stage, action.kind, action.micro)
        if self.owners[target.stage] == self.mesh.at.pp:
            state.inputs[target] = out
        else:
            state.outputs[send] = out.contiguous()

    def _channel(self, message: Action):
        """The group of a message: (source rank, target rank, direction) in the world's ranks."""
        source, target, kind = channel(message, self.owners)
        ranks = self.mesh.pp.ranks
        return self.mesh.channels[ranks[source], ranks[target], "F" if kind == Kind.SEND_F else "B"]


def _reduced(actions: Sequence[Action]) -> set[Action]:
    """The backward actions that a REDUCE follows: their walk starts each unit's reduction as soon as it is done."""
    latest: dict[int, Action] = {}
    found = set()
    for action in actions:
        if action.kind == Kind.B:
            latest[action.stage] = action
        elif action.kind == Kind.REDUCE:
            found.add(latest[action.stage])
    return found
