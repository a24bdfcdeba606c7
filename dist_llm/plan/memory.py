"""The peak of a rank's live tensor bytes in a step of the native engine, from the table and the layout alone: nothing is run.

The rank's lowered list of actions is walked as `parallel/pipeline.py` walks it, and what is alive is counted: weights and
optimizer; gradients as `parallel/zero.py` makes and reduces them (residency.py); what units keep, and what they hold for a
moment (units.py); contexts, messages and gathered units. The peak is the largest moment, with its parts:

    weights      this rank's weights between uses: whole, in stage 3 a shard
    optimizer    master weights and moments, where the device holds them
    gradients    whole until they are reduced, then what is owned
    activations  inputs of units, what units keep for backward, batches and contexts
    buffers      messages and slopes, gathered units, reductions under way, and what a unit holds for a moment
    host         with `offload=optimizer`: master weights, moments and the buffers of their way. Not in `total`, but on a CPU
    total        all that the device holds
"""

from __future__ import annotations

from collections import defaultdict

from dist_llm.model.table import uses
from dist_llm.plan.residency import Residency, Tally
from dist_llm.plan.traffic import KEPT_UNITS, Shape
from dist_llm.plan.units import unit_holds
from dist_llm.schedule.actions import RECVS, SENDS, Action, Kind

PARTS = ("weights", "gradients", "optimizer", "activations", "buffers")
HOST_BUFFERS = 3  # as large as the largest gradient, between device and host (engines/offload.py)
MESSAGES = 4  # sent and kept alive at once (parallel/pipeline.py: SENDS)
IN_FLIGHT = 1  # flat units under reduction beside the backward of the next (parallel/pipeline.py: IN_FLIGHT)
NUMBER = 8  # bytes of a token, a label, a position


def persistent_bytes(shape: Shape, *, pp: int = 0, tp: int = 0) -> dict[str, int]:
    """Bytes that a rank keeps: weights and optimizer (masters and moments) always, gradients from the end of backward to the update.

    Padding included. The optimizer's float32 count of updates is 4 bytes.
    host: with `offload=optimizer` masters, moments and count, and the buffers between device and host; else 0.
    """
    layout, wide, plans = shape.layout, shape.widths, shape.flat_plans(pp, tp).values()
    offload = layout.offload == "optimizer"
    updated = "host" if offload else "optimizer"
    found = {"weights": 0, "gradients": 0, "optimizer": 0, "host": 0}
    found[updated] = 4
    if offload:
        largest = max((plan.shard_size if layout.zero else plan.padded for plan, _ in shape.trained_plans(pp, tp)), default=0)
        found["host"] += HOST_BUFFERS * wide.gradient * largest
    for plan, _ in plans:
        sharded = layout.zero == 3 and layout.shard > 1
        owned = plan.shard_size if layout.zero else plan.padded
        found["weights"] += shape.kept_bytes(plan, plan.shard_size if sharded else plan.padded)
        if not plan.trained:
            continue
        found["gradients"] += owned * wide.gradient
        masters = wide.gradient if offload or wide.gradient != wide.weight else 0
        found[updated] += owned * (masters + shape.moments * wide.gradient)
    return found


def peak_bytes(shape: Shape, *, pp: int = 0, tp: int = 0) -> dict[str, int]:
    """The parts of the fullest moment of a step, of the rank at pipeline and tensor coordinates (pp, tp); `total` is their sum."""
    kept = persistent_bytes(shape, pp=pp, tp=tp)
    found = Walk(shape, pp=pp, tp=tp).peak()
    parts = {"weights": kept["weights"], "optimizer": kept["optimizer"], **found}
    host = kept["host"] if shape.device == "cpu" else 0
    return {**{name: parts[name] for name in PARTS}, "host": kept["host"], "total": sum(parts.values()) + host}


class Walk:
    """One step of one rank, in bytes: the lines of `Pipeline.run`, `Stage.forward` and `Stage.backward` that take or free memory."""

    def __init__(self, shape: Shape, *, pp: int, tp: int) -> None:
        self.shape, self.actions, self.stages = shape, shape.lists()[pp], shape.rank_stages(pp)
        self.tally, self.units = Tally(), unit_holds(shape, pp=pp, tp=tp)
        self.flats = {unit: Residency(plan, shape, self.tally) for unit, (plan, _) in shape.flat_plans(pp, tp).items()}
        self.both = any(num_uses > 1 for _, num_uses in shape.flat_plans(pp, tp).values())  # a tied weight, both ends here
        length = shape.sequence // (shape.layout.tp if shape.layout.sp else 1)
        self.stream = shape.micro * length * shape.model.dim * shape.widths.weight  # (B, S', D)
        self.reducing: dict[int, list[tuple[Residency, int]]] = defaultdict(list)
        self.sent = 0  # messages that are kept alive

    def peak(self) -> dict[str, int]:
        """Gradients, activations and buffers of the fullest moment."""
        compute = [action for action in self.actions if action.kind in (Kind.F, Kind.B)]
        following = dict(zip(compute, compute[1:], strict=False))
        last = {action.micro: action for action in compute}
        first = {action.micro: action for action in reversed(compute)}
        latest = {action.stage: action for action in compute if action.kind == Kind.B}
        self.tally.hold("activations", self.shape.micro_batches * self._batch())
        for action in self.actions:
            if first.get(action.micro) == action:
                self.tally.hold("activations", self._context())
            if action.kind == Kind.F:
                self._forward(action, follows=following.get(action) == Action(action.stage, Kind.B, action.micro))
            elif action.kind == Kind.B:
                self._backward(action, reduce=self.shape.layout.reduce == "micro_batch" or latest[action.stage] == action)
            elif action.kind in SENDS:
                self._send()
            elif action.kind in RECVS:
                self.tally.hold("buffers", self.stream)
            if last.get(action.micro) == action:
                self.tally.free("activations", self._context())
        self._finish()
        return self.tally.fullest

    def _batch(self) -> int:
        """Tokens, labels, positions and documents of a micro-batch, (B, S) each."""
        return 4 * self.shape.micro * self.shape.sequence * NUMBER

    def _context(self) -> int:
        """Places (B, S), masks (B or 1, 1, S, S), cosines and sines (B or 1, S, 1, E): one of each, or another for windowed layers."""
        shape, width = self.shape, self.shape.widths.weight
        places = shape.micro * shape.sequence * NUMBER * (2 if shape.model.neftune else 1)  # with noise, the most of it
        mask = shape.micro * shape.sequence**2 * width if shape.masked else 0
        if 0 < shape.model.sliding_window < shape.sequence:
            mask += (shape.micro if shape.masked else 1) * shape.sequence**2 * width
        rows = (shape.micro if shape.restarting else 1) * shape.sequence
        tables = 4 if shape.model.sliding_window and shape.model.rope_local_theta != shape.model.rope_theta else 2
        return places + mask + (tables * rows * shape.model.head_dim * width if shape.model.positions == "rotary" else 0)

    # --- the pipeline ------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """A message stays until `MESSAGES` others have followed it."""
        if self.sent == MESSAGES:
            self.tally.free("buffers", self.stream)
        else:
            self.sent += 1

    def _finish(self) -> None:
        """The messages are let go; the reductions come to their ends, then weights and gradients are as between backward and update."""
        self.tally.free("buffers", self.sent * self.stream)
        trained = [flat for flat in self.flats.values() if flat.trained]
        for flat in reversed(trained):
            flat.start_crossing()
        for flat in trained:
            flat.start_finish()
        self.tally.moment()

    # --- a stage -----------------------------------------------------------------------------------------------------

    def _flats(self, name: str) -> list[tuple[Residency, int]]:
        """The flat units that a walk unit reads, each with the use it makes of them."""
        return [(self.flats[unit], int(self.both and unit == "tied" and name == "head")) for unit in uses(self.shape.model, name)]

    def _gather(self, name: str, *, ahead: bool = False) -> None:
        for flat, _ in self._flats(name):
            flat.start_gather()
            if not ahead:
                flat.finish_gather()

    def _release(self, name: str) -> None:
        for flat, _ in self._flats(name):
            flat.release()

    def _forward(self, action: Action, *, follows: bool) -> None:
        """Inputs of units are kept; what comes out of a stage is a message."""
        names = self.stages[action.stage]
        if names[0] != "embedding":
            self.tally.move("buffers", "activations", self.stream)
        for at, name in enumerate(names):
            if name == "head":  # runs where its backward begins
                return
            held = self.units[name]
            self._gather(name)
            if at + 1 < len(names) and (follows or names[at + 1] != "head"):
                self._gather(names[at + 1], ahead=True)
            self.tally.moment(held.forward)
            self.tally.hold("activations", held.kept + held.out)
            if not (follows and at + KEPT_UNITS >= len(names)):
                self._release(name)
        self.tally.move("activations", "buffers", self.stream)

    def _backward(self, action: Action, *, reduce: bool) -> None:
        """Slopes are buffers: one comes (but to the head), one goes (but from the embedding)."""
        names, reducing = self.stages[action.stage], self.reducing[action.stage]
        self._collect(reducing, 0)
        for at in reversed(range(len(names))):
            name, held = names[at], self.units[names[at]]
            slope, taken = (0 if name == "head" else self.stream), (0 if name == "embedding" else self.stream)
            if name != "embedding":
                self._gather(name)
            if at > 1 or (at == 1 and names[0] != "embedding"):
                self._gather(names[at - 1], ahead=True)
            trained = [(flat, use) for flat, use in self._flats(name) if flat.trained]
            if name == "head":  # it adds to its sums while it is made
                _begin(trained)
            self.tally.moment(held.making)
            self.tally.hold("activations", held.made - held.kept)
            _begin(trained)
            self.tally.moment(held.backward - held.made)
            self.tally.free("activations", held.made)
            self.tally.hold("buffers", taken)
            self._release(name)
            if reduce:
                self._reduce(name, reducing)
            self.tally.free("buffers", slope)
            self.tally.free("activations", taken)

    def _reduce(self, name: str, reducing: list[tuple[Residency, int]]) -> None:
        """Starts a unit's reduction, and collects the one before it; of a tied weight once a step, with its last use."""
        for flat, use in self._flats(name):
            if not flat.trained:
                continue
            if self.shape.layout.reduce == "micro_batch" or use == 0:
                flat.start_reduce(use)
                reducing.append((flat, use))
        self._collect(reducing, IN_FLIGHT)

    def _collect(self, reducing: list[tuple[Residency, int]], rest: int) -> None:
        while len(reducing) > rest:
            flat, _ = reducing.pop(0)
            flat.collect()


def _begin(trained: list[tuple[Residency, int]]) -> None:
    """Gradients get their places."""
    for flat, use in trained:
        flat.begin_backward(use)
