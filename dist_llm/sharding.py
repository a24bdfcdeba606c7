"""Where each parameter lives: every parameter carries a Sharding, and everything else follows from it.

Initialisation, gradient sums, the norm (each element counted once), packing, checkpoints and byte counts read the
Sharding, so strategies compose without importing each other. Torch-free.

A box is (start, stop) per dimension of the global tensor. A ZeRO shard is (box, flat range inside the box).
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.model.table import Row

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sharding:
    """How one parameter is cut over the tensor-parallel axis.

    cuts: for each tp coordinate the (start, stop) it holds of dimension `dim`; None where every rank holds all of it.
    partial: the gradient of a rank is only a part of the sum, to be added over `replicas` (the ranks with its box).
    """

    shape: tuple[int, ...]
    dim: int
    cuts: tuple[tuple[int, int], ...]
    partial: bool

    def box(self, tp: int) -> Box:
        """The global box that tp coordinate `tp` holds."""
        whole = [(0, extent) for extent in self.shape]
        whole[self.dim] = self.cuts[tp]
        return tuple(whole)

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """The shape of the local tensor at tp coordinate `tp`."""
        return tuple(stop - start for start, stop in self.box(tp))

    def replicas(self, tp: int) -> tuple[int, ...]:
        """The tp coordinates that hold the same box, this one among them."""
        return tuple(other for other, cut in enumerate(self.cuts) if cut == self.cuts[tp])

    def owner(self, tp: int) -> bool:
        """True on the one replica that counts these elements (in norms) and writes them (in checkpoints)."""
        return self.replicas(tp)[0] == tp


def shard(row: Row, *, tp: int, sp: bool) -> Sharding:
    """The Sharding of a row over `tp` ranks, activations outside the blocks split by sequence if `sp`.

    Gradients are partial sums over tp: of q and k norms (each rank saw its own heads), of kv heads that several
    ranks share, and with sequence parallelism of everything that sees a slice of the sequence.
    """
    if row.role in ("outside", "inside"):
        whole = (0, row.shape[0])
        return Sharding(row.shape, 0, (whole,) * tp, partial=tp > 1 and (row.role == "inside" or sp))
    dim = 1 if row.role == "row" else 0
    width, rest = divmod(row.shape[dim], row.parts)
    assert rest == 0, row
    cuts = tuple((start * width, stop * width) for start, stop in split_parts(row.parts, tp))
    return Sharding(row.shape, dim, cuts, partial=row.parts < tp)


def split_parts(parts: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of the parts each rank holds: even as possible, or, with fewer parts than ranks, one each, shared."""
    if parts < ranks:
        assert ranks % parts == 0, (parts, ranks)
        return tuple((rank * parts // ranks, rank * parts // ranks + 1) for rank in range(ranks))
    return tuple((rank * parts // ranks, (rank + 1) * parts // ranks) for rank in range(ranks))
