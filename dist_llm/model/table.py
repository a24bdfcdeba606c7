"""The model as a table, without torch: one row per parameter.

The module is built from the table's shapes, and the sharding, the initialisation, the planner, the checker and the
checkpoints all read the same rows. `tests/test_model.py` checks that the table and the module agree.

Legend: L layers, D dim, H heads, K kv_heads, E head_dim, F ffn, V vocab, P max_positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod, sqrt
from typing import Literal

from dist_llm.config.presets import GATED
from dist_llm.config.schema import AdapterConfig, ModelConfig, SavedModule

# How a parameter meets the tensor-parallel axis:
#   column   output features are split (dim 0)        row      input features are split (dim 1)
#   vocab    vocabulary rows are split, unevenly if need be (dim 0)
#   outside  whole, used where activations are whole or split by sequence
#   inside   whole, used where activations are split by head (q and k norms)
Role = Literal["column", "row", "vocab", "outside", "inside"]
ADAPTER = ".adapter"  # ends the names of the units that lie beside a block's own
HALVES = ("attention", "mlp")  # of a block, each around the residual stream: the end of a stage may lie between them
# The units of the two ends of a model, by what `model.adapter.modules_to_save` calls them: all of a unit is trained, or none of it.
ENDS = {"tied": "embedding", "embedding": "embedding", "head": "head"}


@dataclass(frozen=True)
class Row:
    """One parameter. `parts`: how many indivisible blocks the split dimension has (heads, ffn features, tokens)."""

    name: str
    shape: tuple[int, ...]
    role: Role
    unit: str
    parts: int = 1
    std: float | None = None  # None: ones for norm weights, zeros for biases and where `zeros` says so
    decay: bool = True  # takes weight decay: matrices do, norms and biases do not
    trained: bool = True  # False: as it came, under an adapter
    block: int = 0  # elements along dim 1 that share a scale, where it is kept in 4 or 8 bits; all rows of a unit are alike in both
    zeros: bool = False

    @property
    def beside(self) -> bool:
        """Whether it is an adapter's own matrix, which no base has."""
        return self.unit.endswith(ADAPTER)

    @property
    def numel(self) -> int:
        """Number of elements of the global tensor."""
        return prod(self.shape)

    @property
    def half(self) -> str:
        """The half of its unit that it belongs to, in a block; elsewhere the unit."""
        if not self.unit.startswith("blocks."):
            return self.unit
        block, layer, part, *_ = self.name.split(".")  # part: attention, mlp_norm, ...
        at = f"{block}.{layer}"
        return f"{at}.{part.partition('_')[0]}{self.unit.removeprefix(at)}"


def table(model: ModelConfig) -> tuple[Row, ...]:
    """All parameters of the model in their canonical order, grouped by unit."""
    rows = _embedding_rows(model)
    for layer in range(model.layers):
        rows += _block_rows(model, layer)
    rows += _head_rows(model)
    if not model.adapter.rank:
        return tuple(rows)
    return (*(_as_it_came(row, model.adapter) for row in rows), *adapter_rows(model, model.adapter, rows))


def unit_names(model: ModelConfig) -> tuple[str, ...]:
    """The units of the forward walk, in order: embedding, blocks, head."""
    return ("embedding", *(f"blocks.{layer}" for layer in range(model.layers)), "head")


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model; a tied weight counts once."""
    return sum(row.numel for row in table(model))


def num_trained(model: ModelConfig) -> int:
    """Parameters that are trained: all, or an adapter's and what is trained whole beside it."""
    return sum(row.numel for row in table(model) if row.trained)


def table_trained(model: ModelConfig, end: SavedModule) -> bool:
    """Whether the table of tokens (embedding) or the output matrix (head) has a gradient; where they are tied it is one."""
    return not model.adapter.rank or ("embedding" if model.tied else end) in model.adapter.modules_to_save


def half_names(model: ModelConfig) -> tuple[str, ...]:
    """The forward walk in the smallest parts that a stage may have: blocks as `blocks.3.attention` and `blocks.3.mlp`."""
    halves = (f"blocks.{layer}.{half}" for layer in range(model.layers) for half in HALVES)
    return ("embedding", *halves, "head")


def uses(model: ModelConfig, walk_unit: str) -> tuple[str, ...]:
    """The parameter units that a walk unit reads: its own and, where weights are tied, the shared one. Half a block has half its units."""
    if walk_unit.startswith("blocks."):
        units = (walk_unit, *_units_beside(walk_unit, model.adapter))
        return tuple(unit for unit in units if rows_of(model, unit))  # an adapter may lie on one half alone
    tied = ("tied",) if model.tied and walk_unit in ("embedding", "head") else ()
    own = walk_unit != "embedding" or not model.tied or model.positions == "learned"
    return (*tied, walk_unit) if own else tied


def rows_of(model: ModelConfig, unit: str) -> tuple[Row, ...]:
    """The rows of a parameter unit, or of half of one (`blocks.3.mlp`, `blocks.3.mlp.adapter`), in the table's order."""
    return _rows_by_unit(model).get(unit, ())


@lru_cache(maxsize=16)
def _rows_by_unit(model: ModelConfig) -> dict[str, tuple[Row, ...]]:
    found: dict[str, tuple[Row, ...]] = {}
    for row in table(model):
        for unit in dict.fromkeys((row.unit, row.half)):
            found[unit] = (*found.get(unit, ()), row)
    return found


def _units_beside(block: str, adapter: AdapterConfig) -> tuple[str, ...]:
    """The units of a block beside its own: its matrices where they are quantized, and its adapter."""
    quantized = (f"{block}.quantized",) if adapter.quantize != "none" else ()
    return (*quantized, f"{block}{ADAPTER}") if adapter.rank else ()


def _as_it_came(row: Row, adapter: AdapterConfig) -> Row:
    """A row of a model under an adapter; matrices of blocks in a unit of their own where they are quantized."""
    if ENDS.get(row.unit) in adapter.modules_to_save:
        return row
    if adapter.quantize == "none" or not row.unit.startswith("blocks.") or len(row.shape) != 2:
        return replace(row, trained=False)
    return replace(row, trained=False, unit=f"{row.unit}.quantized", block=adapter.block)


def adapter_rows(m: ModelConfig, adapter: AdapterConfig, rows: Sequence[Row]) -> list[Row]:
    """A and B of each target among the rows of a model, block by block, and with DoRA the magnitudes m (out,).

    A (rank, in) starts with the variance that PEFT gives it, 1 / (3 in), of the whole input whatever part of it a rank has; B (out,
    rank) with zeros. Of a column target each rank has all of A and its rows of B and m; of a row target its columns of A and all of B
    and m. Magnitudes are lengths: weight decay would shrink the model.
    """
    found: list[Row] = []
    for row in rows:
        *_, target, last = row.name.split(".")
        if last != "weight" or target not in adapter.targets or row.role not in ("column", "row"):
            continue
        (out, into), unit, name = row.shape, f"{row.unit}{ADAPTER}", row.name.removesuffix(".weight")
        whole: dict[Role, tuple[Role, Role]] = {"column": ("inside", "column"), "row": ("row", "inside")}
        (role_a, role_b), std = whole[row.role], 1 / sqrt(3 * into)
        found.append(Row(f"{name}.lora_a", (adapter.rank, into), role_a, unit, row.parts if role_a == "row" else 1, std))
        cut = row.parts if role_b == "column" else 1
        found.append(Row(f"{name}.lora_b", (out, adapter.rank), role_b, unit, cut, 0.0))
        if adapter.dora:
            found.append(Row(f"{name}.lora_m", (out,), role_b, unit, cut, decay=False))
    return found


def is_windowed(model: ModelConfig, layer: int) -> bool:
    """Whether a layer sees no more than the window."""
    return model.sliding_window > 0 and not (model.full_every and (layer + 1) % model.full_every == 0)


def _embedding_rows(m: ModelConfig) -> list[Row]:
    unit = "tied" if m.tied else "embedding"
    rows = [Row("embedding.weight", (m.vocab, m.dim), "vocab", unit, parts=m.vocab, std=m.init_std)]
    if m.positions == "learned":
        rows.append(Row("positions.weight", (m.max_positions, m.dim), "outside", "embedding", std=m.init_std))
    return rows


def _head_rows(m: ModelConfig) -> list[Row]:
    rows = _norm_rows("norm", m.dim, m, "head")
    if not m.tied:
        rows.insert(0, Row("head.weight", (m.vocab, m.dim), "vocab", "head", parts=m.vocab, std=m.init_std))
    return rows


def _block_rows(m: ModelConfig, layer: int) -> list[Row]:
    """A block's rows, neighbours in the flat buffer beside each other: q, k, v and gate, up."""
    at, out_std = f"blocks.{layer}", m.init_std / (sqrt(2 * m.layers) if m.residual_scale else 1.0)
    query, keys, std = m.heads * m.head_dim, m.kv_heads * m.head_dim, m.init_std
    attention = [
        Row(f"{at}.attention.q.weight", (query, m.dim), "column", at, m.heads, std),
        Row(f"{at}.attention.k.weight", (keys, m.dim), "column", at, m.kv_heads, std),
        Row(f"{at}.attention.v.weight", (keys, m.dim), "column", at, m.kv_heads, std),
        Row(f"{at}.attention.o.weight", (m.dim, query), "row", at, m.heads, out_std),
    ]
    wide = [("gate", m.ffn), ("up", m.ffn)] if m.activation in GATED else [("up", m.ffn)]
    mlp = [Row(f"{at}.mlp.{name}.weight", (ffn, m.dim), "column", at, ffn, std) for name, ffn in wide]
    mlp.append(Row(f"{at}.mlp.down.weight", (m.dim, m.ffn), "row", at, m.ffn, out_std))
    norms = [name for place, name in (("after", "norm"), ("before", "post_norm")) if m.norm_place != place]
    small = [row for half in ("attention", "mlp") for name in norms for row in _norm_rows(f"{at}.{half}_{name}", m.dim, m, at)]
    if m.qkv_bias:
        for name, width, parts in (("q", query, m.heads), ("k", keys, m.kv_heads), ("v", keys, m.kv_heads)):
            small.append(Row(f"{at}.attention.{name}.bias", (width,), "column", at, parts, decay=False))
    if m.out_bias:
        small.append(Row(f"{at}.attention.o.bias", (m.dim,), "outside", at, decay=False))
    if m.qk_norm:
        small += _head_norm_rows(m, at)
    if m.mlp_bias:
        small += [Row(f"{at}.mlp.{name}.bias", (ffn,), "column", at, ffn, decay=False) for name, ffn in wide]
        small.append(Row(f"{at}.mlp.down.bias", (m.dim,), "outside", at, decay=False))
    return attention + mlp + small


def _head_norm_rows(m: ModelConfig, at: str) -> list[Row]:
    """Norms of queries and keys: one for each head, or cut with the heads."""
    zeros, names = m.norm == "unit_rms", {"q_norm": m.heads, "k_norm": m.kv_heads}
    if m.qk_norm_over == "head":
        return [Row(f"{at}.attention.{name}.weight", (m.head_dim,), "inside", at, decay=False, zeros=zeros) for name in names]
    return [
        Row(f"{at}.attention.{name}.weight", (parts * m.head_dim,), "column", at, parts, decay=False, zeros=zeros)
        for name, parts in names.items()
    ]


def _norm_rows(name: str, width: int, m: ModelConfig, unit: str) -> list[Row]:
    rows = [Row(f"{name}.weight", (width,), "outside", unit, decay=False, zeros=m.norm == "unit_rms")]
    if m.norm == "layer":
        rows.append(Row(f"{name}.bias", (width,), "outside", unit, decay=False))
    return rows
