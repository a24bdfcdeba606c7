"""What a flat unit holds in the moments of a step, as `parallel/zero.py` moves it; and the count of what is alive. Torch-free.

Legend: P padded elements of a unit, N ranks of its shard group, r replicas of a shard.
"""

from __future__ import annotations

from dist_llm.parallel.flat import FlatPlan
from dist_llm.plan.traffic import Shape

PIECE, PIECE_CUDA = 1 << 18, 1 << 24  # elements of codes that are made float32 at once (model/quantize.py)
FLOAT32 = {"nf4": 6, "int8": 4, "none": 0}  # bytes an element there: two codes as an int32, and what they stand for


class Tally:
    """Bytes alive now, by part, and the parts of the fullest moment so far."""

    def __init__(self) -> None:
        self.now: dict[str, int] = {"gradients": 0, "activations": 0, "buffers": 0}
        self.fullest, self.most = dict(self.now), 0

    def hold(self, part: str, size: int) -> None:
        """Tensors of `size` bytes are made."""
        self.now[part] += size
        self.moment()

    def free(self, part: str, size: int) -> None:
        """They are gone."""
        self.now[part] -= size
        assert self.now[part] >= 0, part

    def move(self, source: str, target: str, size: int) -> None:
        """They serve as something else from now on."""
        self.now[source] -= size
        self.now[target] += size

    def moment(self, buffers: int = 0) -> None:
        """For a moment, `buffers` more are alive."""
        total = sum(self.now.values()) + buffers
        if total > self.most:
            self.most, self.fullest = total, {**self.now, "buffers": self.now["buffers"] + buffers}


class Residency:
    """The gradients of a flat unit by use, (P,) each while whole and (P / N,) reduced, and its whole weights in stage 3.

    A group of one rank reduces nothing: its sums are the whole gradients.
    """

    def __init__(self, plan: FlatPlan, shape: Shape, tally: Tally) -> None:
        layout, wide = shape.layout, shape.widths
        self.trained = plan.trained
        self.elements, self.float32 = plan.padded, FLOAT32[shape.model.adapter.quantize]
        self.piece = PIECE if shape.device == "cpu" else PIECE_CUDA
        self.tally, self.stage, self.keep = tally, layout.zero, layout.unshard == "step"
        self.by_step, self.alone = layout.reduce == "step", layout.shard == 1
        self.weights, self.quantized = plan.padded * wide.weight, plan.block > 0
        self.codes = shape.kept_bytes(plan, plan.padded)
        self.gradient, self.shard = plan.padded * wide.gradient, plan.shard_size * wide.gradient
        here = shape.fixed and not shape.shared  # the others' parts are added here, from a buffer
        self.parts = self.gradient if here and not self.alone else 0
        self.crossing_parts = self.shard if here and shape.replicas > 1 else 0
        self.sharded = self.stage == 3 and not self.alone
        self.here, self.coming = not (self.sharded or self.quantized), False
        self.whole: set[int] = set()
        self.sums: set[int] = set()
        self.reducing: set[int] = set()
        self.crossing = False
        partial = [slot for slot in plan.slots if slot.sharding.partial]
        self.joined = sum(slot.numel for slot in partial) * wide.gradient  # side by side for their sum over tp

    def start_gather(self) -> None:
        """The whole weights come, or their codes."""
        if not self.here and not self.coming and self.sharded:
            self.tally.hold("buffers", self.codes)
            self.coming = True

    def finish_gather(self) -> None:
        """They are there; codes are made weights, a piece in float32 at a time, and go."""
        if self.here:
            return
        if self.quantized:
            self.tally.hold("buffers", self.weights)
            self.tally.moment(min(self.elements, self.piece) * self.float32)
            self.tally.free("buffers", self.codes if self.sharded else 0)
        self.here, self.coming = True, False

    def release(self) -> None:
        """They go, unless `unshard=step` keeps what was gathered."""
        if self.here and (self.quantized or self.sharded) and not (self.sharded and self.keep):
            self.tally.free("buffers", self.weights)
            self.here = False

    def begin_backward(self, use: int) -> None:
        """A use's gradients get their place at its first backward."""
        if use not in self.whole:
            self.whole.add(use)
            self.tally.hold("gradients", self.gradient)

    @property
    def in_place(self) -> bool:
        """Stage 0 reduces once a step into the whole gradient, which it gathers again."""
        return self.stage == 0 and self.by_step

    def start_reduce(self, use: int) -> None:
        """Takes the others' parts (P,), and the shard (P / N,) that they are added to."""
        if self.by_step:
            self.tally.free("gradients", self.gradient * len(self.whole - {use}))
            self.whole &= {use}
        self.tally.moment(self.joined)
        self.reducing.add(use)
        if not self.alone:
            self.tally.hold("gradients", 0 if self.in_place else self.shard)
            self.tally.hold("buffers", self.parts)

    def collect(self) -> None:
        """The parts go, and the whole gradient; the shard is a sum, or is added to the one that is there."""
        for use in self.reducing:
            self.tally.free("buffers", self.parts)
            self.tally.free("gradients", self.shard if use in self.sums and not self.in_place else 0)
            self.sums.add(use)
            if not self.in_place:
                self.whole.remove(use)
                self.tally.free("gradients", 0 if self.alone else self.gradient)
            if self.by_step:
                self._cross()
        self.reducing.clear()

    def _cross(self) -> None:
        self.crossing = True
        self.tally.hold("buffers", self.crossing_parts)

    def start_crossing(self) -> None:
        """The sum over replicas takes their parts (P / N,)."""
        self.collect()
        if not self.crossing:
            self.tally.free("gradients", self.shard * (len(self.sums) - 1))
            self.sums = {0}
            self._cross()

    def start_finish(self) -> None:
        """Parts of replicas go; stage 0 gathers the whole gradient, into a new one if it had given the old one up."""
        self.tally.free("buffers", self.crossing_parts)
        if self.stage == 0 and not self.by_step and not self.alone:
            self.tally.hold("gradients", self.gradient)
