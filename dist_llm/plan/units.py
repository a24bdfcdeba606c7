"""What a unit of the walk holds, tensor by tensor: from its forward to its backward, and for a moment in either. Torch-free.

The sums follow `model/transformer.py`, `model/kernels.py`, `model/loss.py` and `parallel/tensor.py`, eager: each line is a
moment, and each term a tensor that is alive then. Tensors of a number per token (statistics of norms, softmax sums of a
chunk) or per feature are left out. `tests/test_memory.py` holds the sums against the live tensors of the engine.

Legend: B micro, S sequence, S' = S/tp with sequence parallelism, else S; D dim; H, K local query and key heads, E head_dim,
F local ffn, v local vocabulary rows. All in bytes, of one micro-batch on one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dist_llm.config.presets import GATED
from dist_llm.config.schema import SavedModule
from dist_llm.model.table import rows_of, table_trained, uses
from dist_llm.plan.traffic import Shape
from dist_llm.sharding import shard

PIECE = 512  # tokens of an activation at once on a CPU (model/kernels.py: TOKENS)
MEASURED = 1 << 20  # elements of a weight whose rows are measured at once (parallel/correction.py: PIECE)
CHUNK, CHUNK_BYTES = 1024, 2**30  # tokens whose logits exist at once, on a GPU so many as make these bytes (model/loss.py: at_once)
PARTIAL = 3072  # tokens of an embedding beyond which torch adds up parts of ten rows before (EmbeddingBackwardKernel.cu)
DRAWN = 5 * 8  # of an element of a dropout mask while it is drawn: its place and four steps of 64 bits (random.py)


@dataclass(frozen=True)
class Holds:
    """Bytes of a unit beside its input, its slope and its weights.

    out: (B, S', D), what it hands on; 0 for the head. kept: from forward to backward. forward: the most at once in
    forward. made: what backward works with, as much as `kept` unless backward makes the graph itself; then `making` is
    the most at once while it does, else 0. backward: the most at once in it, `made` included.
    """

    out: int
    kept: int
    forward: int
    making: int
    made: int
    backward: int


class Tensors:
    """The tensors that the moments below are sums of."""

    def __init__(self, shape: Shape, *, tp: int) -> None:
        model, layout, wide = shape.model, shape.layout, shape.widths
        self.model, self.layout, self.width, self.exact = model, layout, wide.weight, wide.statistic
        self.pairs = shape.pairs
        self.fp8, self.cpu, self.shared = shape.fp8, shape.device == "cpu", shape.shared
        self.masked = shape.masked or bool(shape.model.sliding_window)
        self.tokens, self.sequence = shape.micro * shape.sequence, shape.sequence
        self.elements = self.tokens // (layout.tp if layout.sp else 1) * model.dim
        self.stream = self.elements * wide.weight  # (B, S', D): the residual stream, a norm's output, a slope
        self.whole = self.tokens * model.dim * wide.weight  # (B, S, D): the same inside a region split by feature
        self.turned = shape.micro > 1 and not shape.shared  # where tokens are ordered (B, S, D) becomes (S, B, D) by a copy
        units = {unit for name in ("embedding", "blocks.0", "head") for unit in uses(model, name)}  # all blocks are alike
        rows = (row for unit in units for row in rows_of(model, unit))
        boxes = ((_inside(row.name), shard(row, tp=layout.tp, sp=layout.sp).box(tp)) for row in rows)
        self.weights = {name: tuple(stop - start for start, stop in box) for name, box in boxes}

    def features(self, *names: str) -> int:
        """(B, S, O) of the outputs of these projections, together."""
        return sum(self.tokens * self.weights[f"{name}.weight"][0] for name in names) * self.width

    def by_weight(self, *names: str) -> int:
        """The gradients by an adapter's matrices on these weights, together; those by weights are added to their sums by the product."""
        found = [self.weights[f"{name}.{end}"] for name in names for end in ("lora_a", "lora_b") if f"{name}.{end}" in self.weights]
        return sum(rows * columns for rows, columns in found) * self.width

    def product(self, *names: str) -> int:
        """The bfloat16 product of these neighbours' gradients, before it goes to float32 sums. A GPU's adds by itself, but in 8 bits."""
        if self.model.adapter.rank or self.exact == self.width or not (self.cpu or self.fp8 == "tensorwise"):
            return 0
        return sum(rows * columns for rows, columns in (self.weights[f"{name}.weight"] for name in names)) * self.width

    @property
    def by_positions(self) -> int:
        """The gradient by learned positions, where they are trained: autograd makes a whole table of it."""
        rows, columns = self.weights.get("positions.weight", (0, 0))
        return rows * columns * self.width if self.table_trained("embedding") else 0

    def table_trained(self, end: SavedModule) -> bool:
        """Whether the table of tokens, or the output matrix, is: its gradient goes to its sum by rows, or by the products of chunks."""
        return table_trained(self.model, end)

    def low(self, *names: str) -> int:
        """(B, S, R) of the adapters on these projections, together."""
        return sum(self.tokens * self.weights[f"{name}.lora_a"][0] for name in names if f"{name}.lora_a" in self.weights) * self.width

    def _adapted(self, names: tuple[str, ...]) -> list[tuple[int, int]]:
        """(O, D) of those projections that have an adapter."""
        found = [name for name in names if f"{name}.lora_a" in self.weights]
        return [(self.weights[f"{name}.lora_b"][0], self.weights[f"{name}.lora_a"][1]) for name in found]

    def measuring(self, *names: str) -> int:
        """With DoRA, while rows of W + s B A are measured: some of them, the same in float64 and their squares."""
        if not self.model.adapter.dora:
            return 0
        wide = self.exact + 8 + (8 if self.exact < 8 else 0)
        return max((min(out, max(1, MEASURED // into)) * into * wide for out, into in self._adapted(names)), default=0)

    def dropping(self, *names: str) -> int:
        """With an adapter's dropout: the masks of some tokens while they are drawn."""
        some = min(PIECE, self.tokens) * DRAWN if self.model.adapter.dropout else 0
        return max((some * into for _, into in self._adapted(names)), default=0)

    def scaling(self, *names: str) -> int:
        """Beside a gradient by input under an adapter: with DoRA the slope times c; with dropout some tokens of all."""
        adapter, some = self.model.adapter, min(PIECE, self.tokens)
        found = []
        for out, into in self._adapted(names):
            if adapter.dropout:
                found.append(some * (into * self.width + max(DRAWN * into, adapter.dora * out * self.width)))
            elif adapter.dora:
                found.append(self.tokens * out * self.width)
        return max(found, default=0)

    def again(self, *names: str) -> int:
        """Beside the gradients by an adapter: some tokens of what went into A and of what came out; the sum of gradients so far."""
        adapter, some, found = self.model.adapter, min(PIECE, self.tokens), []
        for name, (out, into) in zip([name for name in names if f"{name}.lora_a" in self.weights], self._adapted(names), strict=True):
            rows = out * self.width if adapter.dora else 0
            dropped = max(DRAWN * into, into * self.width + rows) if adapter.dropout else rows
            twice = self.by_weight(name) * self.exact // self.width if (adapter.dora or adapter.dropout) and some < self.tokens else 0
            found.append(some * dropped + twice)
        return max(found, default=0)

    # --- (B, S', D) <-> (B, S, D) --------------------------------------------------------------------------------------

    def gathering(self, ordered: bool = False) -> int:
        """Beside (B, S', D), while all of S is fetched: the whole; ordered: also both turned before. Nothing without sp."""
        turned = self.turned * ordered
        return (1 + turned) * self.whole + turned * self.stream if self.layout.sp else 0

    def reducing(self, ordered: bool = False) -> int:
        """Beside partial sums (B, S, D), while they are added: the sum, from sockets the others' parts too; ordered: also both turned."""
        turned, parts = self.turned * ordered, self.whole if self.cpu and not self.shared else 0
        return turned * self.whole + parts + (1 + turned) * self.stream if self.layout.sp else 0

    @property
    def gathered(self) -> int:
        """What `gathering` leaves beside (B, S', D)."""
        return self.whole if self.layout.sp else 0

    # --- norms, dropout ------------------------------------------------------------------------------------------------

    def norm_backward(self, size: int) -> int:
        """Beside the slope (of that size): the gradient by the input; from bfloat16, also input, slope and gradient in float32.

        A GPU's RMSNorm takes bfloat16 as it is.
        """
        direct = self.exact == self.width or (not self.cpu and self.model.norm == "rms")
        return size if direct else (1 + 3 * self.exact // self.width) * size

    @property
    def mask(self) -> int:
        """A dropout mask, a byte an element of (B, S', D)."""
        return self.elements if self.model.dropout else 0

    @property
    def drawing(self) -> int:
        """Beside what is dropped: the mask while it is drawn; the product and its quotient come later and are smaller."""
        return DRAWN * self.elements if self.model.dropout else 0

    @property
    def dropped(self) -> int:
        """The slope behind a dropout, (B, S', D); without one it is the slope that came."""
        return self.stream if self.model.dropout else 0


def _inside(name: str) -> str:
    """A parameter's name inside its block; others as they are."""
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


class Block:
    """A block: attention and feed-forward, each around the residual stream."""

    def __init__(self, t: Tensors) -> None:
        self.t, model = t, t.model
        self.q, self.k = t.features("attention.q"), t.features("attention.k")
        self.qkv = self.q + 2 * self.k
        names = ("mlp.gate", "mlp.up") if model.activation in GATED else ("mlp.up",)
        self.into_mlp, self.into_qkv = names, ("attention.q", "attention.k", "attention.v")
        self.mlp, self.by_mlp = t.features(*names), t.by_weight(*names)
        self.by_qkv = t.by_weight("attention.q", "attention.k", "attention.v")
        self.low_qkv, self.low_mlp = t.low("attention.q", "attention.k", "attention.v"), t.low(*names)
        self.by_o, self.by_down = t.by_weight("attention.o"), t.by_weight("mlp.down")
        heads = self.q // (model.head_dim * t.width)  # B S H
        statistics = heads * t.exact  # log-sum-exp, a number per head and token
        if model.attention_softcap:  # all scores, tanh and softmax of them, beside copies of queries, keys and values for every head
            statistics = heads * t.sequence * (t.width + t.exact + (t.width if t.exact != t.width else 0)) + 3 * self.q
        # A GPU's float32 kernel, and that of masks, want keys and values for every query head (model/attention.py).
        self.repeated = 2 * self.q if not t.cpu and self.q != self.k and (t.masked or t.width == 4) and not model.attention_softcap else 0
        normed = self.q + self.k if model.qk_norm else 0
        self.post = t.stream if model.norm_place != "before" else 0  # what a norm behind a half reads
        kept = self.qkv + self.repeated + normed + self.q + statistics
        self.attention = kept + t.mask + self.post  # its output is as large as the queries
        pieces = min(PIECE, t.tokens) if t.cpu and not model.adapter.rank else t.tokens
        self.piece = self.mlp // len(names) * pieces // t.tokens  # (piece, F)
        self.num_pieces = len(names) + 1  # in backward: the slope, the activation; of a gated one also what it does to the gate

    def holds(self, name: str) -> Holds:
        """Of the whole, or of the half that a walk unit is, as `Layout.recompute` says."""
        half = name.rpartition(".")[2]
        if half == "attention":
            return self._holds(self.attention, self._attention_forward, max(self._attention_backward(0, residual=0)))
        mlp = (0 if self.t.layout.recompute == "selective" else self.mlp + self.post) + self.t.mask
        if half == "mlp":
            return self._holds(mlp, self._mlp_half_forward, max(self._mlp_backward(mlp)))
        made, narrow = self.attention + self.t.stream + mlp, self.t.exact != self.t.width  # with the residual between the halves
        stay = narrow * (self.by_down + self.by_mlp)  # bfloat16 gradients of an adapter, until the unit is done
        backward = max(*self._mlp_backward(made), *self._attention_backward(stay, residual=self.t.stream))
        return self._holds(made, self._forward, backward)

    def _holds(self, made: int, forward: Callable[[bool], int], backward: int) -> Holds:
        """forward: the most at once in it, asked with whether a graph keeps what is left for backward."""
        if self.t.layout.recompute == "full":
            return Holds(self.t.stream, 0, forward(False), forward(True), made, backward)
        return Holds(self.t.stream, made, forward(True), 0, made, backward)

    def _forward(self, kept: bool) -> int:
        """Both halves, one after the other."""
        return max(self._attention_forward(kept), kept * self.attention + self.t.stream + self._mlp_half_forward(kept))

    def _attention_forward(self, kept: bool) -> int:
        """With its dropout and its sum."""
        t, attention = self.t, self.attention - self.t.mask - self.post
        row, after = attention + self._row_forward(t.model.out_bias, "attention.o"), kept * (attention + self.post) + self._sum_forward()
        measured = max(attention + t.measuring("attention.o"), t.measuring(*self.into_qkv))
        return max(self._columns_forward(self.qkv, self.into_qkv), row, after, measured)

    def _mlp_half_forward(self, kept: bool) -> int:
        """With its dropout and its sum."""
        kept_mlp = self.mlp + self.post if kept and self.t.layout.recompute != "selective" else 0
        return max(self._mlp_forward(), kept_mlp + self._sum_forward())

    def _columns_forward(self, outputs: int, names: tuple[str, ...]) -> int:
        """Norm, gather, product."""
        return max(self.t.stream + self.t.gathering(self._ordered(names[0])), self.t.whole + outputs + self.t.dropping(*names))

    def _ordered(self, name: str) -> bool:
        """Whether tokens are in their order in the region of a projection: attention wants it, and an adapter's where something draws."""
        model = self.t.model
        return not name.startswith("mlp") or model.adapter.rank > 0 and max(model.adapter.dropout, model.dropout, model.neftune) > 0

    def _row_forward(self, bias: bool, name: str) -> int:
        """Beside the features: the product and its reduction, then the bias."""
        reducing = self.t.reducing(self._ordered(name))
        return max(self.t.whole + reducing, self.t.whole + self.t.dropping(name), (1 + bias) * self.t.stream)

    def _sum_forward(self) -> int:
        """What a half has made, its mask being drawn; then dropped, and its sum with the residual."""
        return max(self.t.stream + self.t.drawing, self.t.mask + 2 * self.t.stream)

    def _mlp_forward(self) -> int:
        """The feed-forward alone, beside its input."""
        t, down = self.t, "mlp.down"
        row = max(t.whole + self.piece + t.dropping(down), self._row_forward(t.model.mlp_bias, down), t.measuring(down))
        return max(self._columns_forward(self.mlp, self.into_mlp), self.mlp + row, t.measuring(*self.into_mlp))

    def _columns_backward(self, by_weights: int, low: int, product: int, names: tuple[str, ...]) -> int:
        """Beside the slopes of the features, which stay: norm again, gather, both products, reduce; then the norm's own.

        low: what an adapter makes of them. product: the largest gradient by weights on its way to its sum.
        """
        t, ordered = self.t, self._ordered(names[0])
        by_weights += low
        reducing = t.reducing(ordered)
        travels = reducing - t.turned * ordered * t.stream * t.layout.sp  # while the gradients are made its sum is not turned back yet
        gradients = by_weights + max(reducing, travels + product + t.again(*names))
        products = t.stream + t.gathering(ordered) + t.whole + max(gradients, low + t.scaling(*names))
        return max(products, by_weights + t.stream + t.norm_backward(t.stream))

    def _mlp_backward(self, made: int) -> list[int]:
        """Beside what was made so far; a feed-forward that is run again holds its slope."""
        t = self.t
        again = self._mlp_forward() if t.layout.recompute == "selective" else 0
        full = made + (self.mlp + self.post if again else 0)
        slope = self.post or t.dropped  # of the half's output
        inner = full - self.post + slope
        by_down = self.by_down if t.exact != t.width else 0
        return [
            made + 2 * t.dropped,
            made + t.dropped + again,
            full + t.dropped + (t.norm_backward(t.stream) if self.post else 0),
            inner + t.gathering(self._ordered("mlp.down")),
            inner + t.gathered + self._down_backward(),
            full
            - self.post
            + (t.dropped if again else 0)
            + by_down
            + self._columns_backward(self.by_mlp, self.low_mlp, t.product(*self.into_mlp), self.into_mlp),
        ]

    def _down_backward(self) -> int:
        """Beside the slope: that of the activation, the activation, its parts' slopes, which take their places.

        Gradients by weights come last, when the activation alone is left, or under an adapter it and the slope.
        """
        t, pieces, down = self.t, self.num_pieces * self.piece, "mlp.down"
        if not t.model.adapter.rank:
            return max(pieces, self.piece + t.product(down))
        return t.low(down) + max(pieces, 2 * self.piece + self.by_down + t.again(down), self.piece + t.scaling(down))

    def _attention_backward(self, by: int, *, residual: int) -> list[int]:
        """residual: the slope of the residual between the halves, where it was made here; by: gradients by weights that stay."""
        t, whole, o = self.t, residual + self.attention + by, "attention.o"
        held = whole - self.post
        by_o = self.by_o if t.exact != t.width else 0
        turned = self.qkv if t.model.qk_norm else 0  # the products that the norms of queries and keys read
        return [
            whole + 2 * t.dropped,
            whole + t.dropped + (t.norm_backward(t.stream) if self.post else 0),
            held + (self.post or t.dropped) + t.gathering(ordered=True),
            held
            + (self.post or t.dropped)
            + t.gathered
            + self.q
            + max(self.by_o + t.product(o) + t.again(o), t.scaling(o)),  # the slope of attention's output
            held + by_o + self.q + self.repeated + self.qkv,  # and those of queries, keys and values
            residual + by + by_o + turned + self.qkv + self.q + (t.norm_backward(self.q) if turned else 0),
            residual + by + by_o + self.qkv + self._columns_backward(self.by_qkv, self.low_qkv, t.product("attention.q"), self.into_qkv),
        ]


def _embedding(t: Tensors) -> Holds:
    """Tokens to vectors: its backward multiplies the slope by 0 where a token's row is elsewhere."""
    learned = t.stream if t.model.positions == "learned" or t.model.embedding_scale or t.model.neftune else 0
    noise = DRAWN * t.elements if t.model.neftune else 0
    behind = t.stream if t.model.embedding_scale else t.dropped
    row = t.whole * t.exact // t.width  # of the sums, for each token
    gathered = 0 if t.cpu else row + (11 * row // 10 if t.tokens > PARTIAL else 0)  # a GPU adds those of one row first, many in parts
    wider = (t.exact != t.width) * row + gathered if t.table_trained("embedding") else 0
    places = t.by_positions
    forward = max(t.whole + t.reducing(), t.stream + max(learned, t.drawing, noise))
    cleared = t.whole * (t.layout.tp > 1)  # where rows are elsewhere
    rows = behind + max(t.gathered + cleared, max(t.gathered, cleared) + wider) + places * (t.exact != t.width)
    backward = max(2 * t.dropped, t.dropped + behind, behind + places, behind + t.gathering(), rows)
    return Holds(t.stream, t.mask, forward, 0, t.mask, t.mask + backward)


def at_once(tokens: int, rows: int, *, cpu: bool) -> int:
    """Tokens whose logits exist at once, as `model/loss.py` has it."""
    most = CHUNK if cpu else max(CHUNK, 1 << max(1, CHUNK_BYTES // (4 * rows)).bit_length() - 1)
    return min(most, tokens)


def _head(t: Tensors) -> Holds:
    """Norm, output projection and loss: all of it in backward, which makes loss and gradients in one pass."""
    rows, columns = t.weights["embedding.weight" if t.model.tied else "head.weight"]
    narrow, ordered = t.exact != t.width, t.pairs  # whose sides go by the places of tokens
    beside = t.exact if t.model.logit_softcap else t.width if narrow else 0  # the slope of a cap; of a cast, what it was made of
    some = at_once(t.tokens, rows, cpu=t.cpu) * rows
    product = rows * columns * t.width if narrow and t.cpu and t.table_trained("head") else 0  # on its way to its sum, as in `product`
    making = [
        t.stream + t.gathering(ordered),
        2 * t.whole + max(some * (t.exact + beside), some * t.width + product),
        t.whole + t.reducing(ordered),
        t.stream + t.norm_backward(t.stream),
    ]
    return Holds(0, 0, 0, max(making), t.stream, t.stream)


def unit_holds(shape: Shape, *, pp: int, tp: int) -> dict[str, Holds]:
    """Walk unit -> what it holds, of the rank at pipeline and tensor coordinates (pp, tp)."""
    tensors = Tensors(shape, tp=tp)
    names = [name for units in shape.rank_stages(pp).values() for name in units]
    block, ends = Block(tensors), {"embedding": _embedding, "head": _head}
    return {name: ends[name](tensors) if name in ends else block.holds(name) for name in names}
