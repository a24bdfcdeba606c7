"""What the ranks of the tests do: `case(rank, world, say, *arguments)`, run by the harness of tests/ranks.py.

Nothing at import may run a torch operator: the ranks are forked from the process that imports this file.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_llm import comm, mesh
from dist_llm.config.layout import Layout
from dist_llm.errors import DataError, Failure, SpaceError
from dist_llm.mesh import Group, build_mesh
from dist_llm.model.parts import Norm, Projection, Projections
from dist_llm.model.roles import Roles
from dist_llm.model.sums import summing
from dist_llm.parallel.tensor import TensorRoles, by_rank
from dist_llm.ranks import run_ranks
from dist_llm.sharding import split_parts

Say = Callable[..., None]
CPU = torch.device("cpu")
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "int64", "uint8")}
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


def line(rank: int, world: int) -> Group:
    """All ranks as one data-parallel group."""
    torch.set_num_threads(1)
    return build_mesh(Layout(dp=world), rank).data


def part_of(rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings to a collective: the same numbers whoever asks."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(1000 + rank), dtype=torch.float64)
    return (values * 8).to(dtype) if dtype.is_floating_point else (values * 8).long().abs().remainder(20).to(dtype)


# --- mesh ------------------------------------------------------------------------------------------------------------


def mesh_groups(rank: int, world: int, say: Say, layout: dict[str, Any], tied: bool, kv_heads: int | None) -> dict[str, Any]:
    """The ranks of each group as a real reduction over it finds them, and the messages of each channel."""
    torch.set_num_threads(1)
    mesh = build_mesh(Layout(**layout), rank, tied=tied, kv_heads=kv_heads)
    found: dict[str, Any] = {}
    for name in ("tp", "pp", "data", "shard", "replica", "tied", "kv", "world"):
        group: Group = getattr(mesh, name)
        here = comm.all_reduce(torch.nn.functional.one_hot(torch.tensor(rank), world), group)
        assert here.nonzero().flatten().tolist() == sorted(group.ranks), (name, here, group)
        found[name] = [*group.ranks, group.index]
    sends = [comm.start_send(torch.tensor([rank, target]), group) for (source, target, _), group in mesh.channels.items() if source == rank]
    for (source, target, _), group in mesh.channels.items():
        if target == rank:
            assert comm.start_recv(torch.empty(2, dtype=torch.int64), group).finish().tolist() == [source, rank]
    for pending in sends:
        pending.finish()
    found["channels"] = sorted(map(list, mesh.channels))
    return found


# --- comm ------------------------------------------------------------------------------------------------------------


def near(summed: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Whether a sum in any order and in the dtype of the parts could have given `summed`."""
    exact = torch.stack([part.double() for part in parts]).sum(0)
    step = torch.finfo(summed.dtype).eps if summed.dtype.is_floating_point else 0.0
    room = step * len(parts) * torch.stack([part.double().abs() for part in parts]).sum(0)
    return bool(((summed.double() - exact).abs() <= room).all())


def collectives(rank: int, world: int, say: Say, dtype_name: str) -> None:
    """Every collective against the same thing worked out here, in any dtype."""
    group, dtype, size = line(rank, world), DTYPES[dtype_name], 6 * world
    parts = [part_of(other, size, dtype) for other in range(world)]
    in_order = parts[0].clone()
    for other in parts[1:]:
        in_order.add_(other)

    mine = parts[rank].clone()
    summed = comm.all_reduce(mine, group)
    assert summed is mine and near(summed, parts)
    assert torch.equal(comm.all_reduce(parts[rank].clone(), group, op="max"), torch.stack(parts).amax(0))

    gathered = comm.all_gather(parts[rank].view(-1, 3), group)
    assert torch.equal(gathered, torch.cat([part.view(-1, 3) for part in parts]))
    whole = torch.empty(size * world, dtype=dtype)
    assert comm.start_all_gather(parts[rank], group, out=whole).finish() is whole and torch.equal(whole, torch.cat(parts))

    rows = [part.view(2, -1) for part in parts]  # (2, 3 world): dim 1 is cut
    assert torch.equal(comm.start_all_gather_inner(rows[rank], group).finish(), torch.cat(rows, dim=1))
    summed = comm.start_reduce_scatter_inner(rows[rank].clone(), group).finish()
    assert torch.equal(summed, in_order.view(2, world, 3)[:, rank])

    here = slice(rank * 6, rank * 6 + 6)
    scattered = comm.reduce_scatter(parts[rank].clone(), group)
    assert torch.equal(scattered, in_order[here]), "rank order, to the bit"
    buffer = parts[rank].clone()
    comm.start_reduce_scatter(buffer, group, out=buffer[here]).finish()  # into its own place, as the flat buffers do
    assert torch.equal(buffer[here], in_order[here])
    if dtype != torch.uint8:
        fast = comm.reduce_scatter(parts[rank].clone(), group, fixed=False)
        assert near(fast, [part[here] for part in parts])

    buffer = torch.zeros(size, dtype=dtype)
    buffer[here] = parts[rank][here]
    comm.start_all_gather(buffer[here], group, out=buffer).finish()  # out of its own place
    assert torch.equal(buffer, torch.cat([parts[other][other * 6 : other * 6 + 6] for other in range(world)]))


def group_of_one(rank: int, world: int, say: Say) -> None:
    """trap 15: one rank reduces nothing into itself, and sends nothing."""
    group = line(rank, world)
    comm.ledger.take()
    x = torch.arange(6.0)
    for given in (
        comm.all_reduce(x, group),
        comm.all_reduce(x, group, op="max"),
        comm.all_gather(x, group),
        comm.reduce_scatter(x, group),
        comm.reduce_scatter(x, group, fixed=False),
        comm.start_reduce_scatter(x, group, out=x[0:6]).finish(),
        comm.start_all_gather(x, group, out=x).finish(),
        comm.start_all_gather_inner(x.view(2, 3), group).finish().view(-1),
        comm.start_reduce_scatter_inner(x.view(2, 3), group).finish().view(-1),
    ):
        assert torch.equal(given, torch.arange(6.0)) and given.data_ptr() == x.data_ptr()
    other = torch.zeros(6)
    assert comm.start_reduce_scatter(x, group, out=other).finish() is other and torch.equal(other, x)
    assert comm.start_all_gather(x, group, out=other.zero_()).finish() is other and torch.equal(other, x)
    assert comm.gather_json({"a": 1}, group, device=CPU) == [{"a": 1}]
    comm.barrier(group)
    assert comm.ledger.take() == {}


def two_in_flight(rank: int, world: int, say: Say) -> None:
    """Transfers that are begun together end with the right contents, in whatever order they are finished."""
    group = line(rank, world)
    buffers = [part_of(rank, 4000 * world, torch.float64) * (turn + 1) for turn in range(4)]
    sums = [sum(part_of(other, 4000 * world, torch.float64) * (turn + 1) for other in range(world)) for turn in range(4)]
    pending = [
        comm.start_reduce_scatter(buffers[0], group),
        comm.start_all_gather(buffers[1], group),
        comm.start_all_reduce(buffers[2], group),
        comm.start_reduce_scatter(buffers[3], group),
    ]
    here = slice(rank * 4000, rank * 4000 + 4000)
    assert torch.allclose(pending[3].finish(), sums[3][here])
    assert torch.equal(pending[1].finish(), torch.cat([part_of(other, 4000 * world, torch.float64) * 2 for other in range(world)]))
    assert torch.allclose(pending[0].finish(), sums[0][here])
    assert torch.allclose(pending[2].finish(), sums[2])


def booked_bytes(rank: int, world: int, say: Say) -> None:
    """The ledger holds the ring formulas: (n-1)/n of the whole, twice that for all_reduce, all of it point to point."""
    mesh = build_mesh(Layout(dp=world), rank)
    group, size = mesh.data, 12 * world
    for dtype in (torch.float64, torch.bfloat16):
        whole = size * dtype.itemsize
        x = torch.zeros(size, dtype=dtype)
        comm.ledger.take()
        for expected, call in (
            (2 * (world - 1) / world * whole, lambda x=x: comm.all_reduce(x, group)),
            ((world - 1) / world * whole, lambda x=x: comm.reduce_scatter(x, group)),
            ((world - 1) / world * whole, lambda x=x: comm.reduce_scatter(x, group, fixed=False)),
            ((world - 1) * whole, lambda x=x: comm.all_gather(x, group)),
        ):
            call()
            assert comm.ledger.take() == {"dp": expected}
    with comm.booked_on("control"):
        comm.all_reduce(torch.zeros(size), group)
    comm.all_reduce(torch.zeros(size), group)
    comm.barrier(group)
    assert comm.ledger.take() == {"control": 8 * (world - 1) * 12, "dp": 8 * (world - 1) * 12}
    comm.gather_json("x" * rank, group, device=CPU)
    assert set(comm.ledger.take()) == {"control"}
    assert comm.ledger.take() == {}
    comm.ledger.recording = True
    comm.all_gather(torch.zeros(4), group)
    ((name, axis, start, end, sent),) = comm.ledger.calls
    assert (name, axis, sent) == ("all_gather", "dp", (world - 1) * 16) and 0 < start <= end


def loopback_bytes(rank: int, world: int, say: Say, tries: int) -> dict[str, list[float]]:
    """Bytes that the loopback interface carried over bytes booked by all ranks, of 4 MB payloads, a list of tries per collective."""
    group, size = line(rank, world), (1 << 20) // world * world
    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "all_reduce": lambda x: comm.all_reduce(x, group),
        "all_gather": lambda x: comm.all_gather(x[: size // world], group),
        "reduce_scatter": lambda x: comm.reduce_scatter(x, group),
    }
    if world == 2:
        mesh = build_mesh(Layout(pp=2), rank)
        forth, back = mesh.channels[0, 1, "F"], mesh.channels[1, 0, "B"]
        calls["point_to_point"] = lambda x: exchange(rank, x, forth, back)
    found: dict[str, list[float]] = {}
    for name, call in calls.items():
        for _ in range(tries):
            x, idle = torch.ones(size), idle_rate(group)
            comm.ledger.take()
            comm.barrier(group)
            start, before = time.perf_counter(), int(LOOPBACK.read_text())
            call(x)
            comm.barrier(group)
            moved = int(LOOPBACK.read_text()) - before - idle * (time.perf_counter() - start)
            found.setdefault(name, []).append(moved / (sum(comm.ledger.take().values()) * world))
    return found


def idle_rate(group: Group) -> float:
    """Bytes a second that others send over the loopback interface while these ranks are silent."""
    comm.barrier(group)
    start, before = time.perf_counter(), int(LOOPBACK.read_text())
    time.sleep(0.02)
    rate = (int(LOOPBACK.read_text()) - before) / (time.perf_counter() - start)
    comm.barrier(group)
    return rate


def exchange(rank: int, x: torch.Tensor, forth: Group, back: Group) -> None:
    """Rank 0 sends on one channel and receives on the other, rank 1 the other way round."""
    out, into = (forth, back) if rank == 0 else (back, forth)
    sending, receiving = comm.start_send(x, out), comm.start_recv(torch.empty_like(x), into)
    receiving.finish()
    sending.finish()


def channels(rank: int, world: int, say: Say) -> None:
    """Messages of a channel arrive in the order they were sent; the two directions do not wait for each other."""
    mesh = build_mesh(Layout(pp=world, schedule="interleaved", chunks=2), rank)  # looped: the ring of stages is closed
    after, before = (rank + 1) % world, (rank - 1) % world
    count = 20
    waiting = []
    for turn in range(count):
        for kind, target in (("F", after), ("B", before)):
            content = torch.full((300,), 100.0 * rank + turn + (0.5 if kind == "B" else 0.0))
            waiting.append(comm.start_send(content, mesh.channels[rank, target, kind]))
    for kind, source in (("B", after), ("F", before)):  # the other direction first
        for turn in range(count):
            got = comm.start_recv(torch.empty(300), mesh.channels[source, rank, kind]).finish()
            assert got.unique().tolist() == [100.0 * source + turn + (0.5 if kind == "B" else 0.0)]
    for pending in waiting:
        pending.finish()


def gathered_json(rank: int, world: int, say: Say) -> list[Any]:
    """Values of unequal length, gathered on every rank."""
    group = line(rank, world)
    value = [None, {"a": [1, 2.5, True]}, "ä" * 3000, float("inf")][rank % 4]
    return [comm.gather_json(value, group, device=CPU), comm.gather_json({"rank": rank}, group, device=CPU)]


def through_copies(rank: int, world: int, say: Say, case: str, *arguments: Any) -> None:
    """A case of comm in which every transfer goes through host copies, as those of a device's memory do on gloo."""
    comm._through_host = lambda x, group: True  # type: ignore[assignment]
    globals()[case](rank, world, say, *arguments)


def over_sockets(rank: int, world: int, say: Say, case: str, *arguments: Any) -> Any:
    """A case of comm whose ranks do not share memory."""
    mesh._share = lambda handle, index, size: None
    return globals()[case](rank, world, say, *arguments)


def lost_behind_copies(rank: int, world: int, say: Say) -> None:
    """Rank 1 dies while rank 0 waits for it on a thread."""
    comm._through_host = lambda x, group: True  # type: ignore[assignment]
    group = line(rank, world)
    if rank == 1:
        os._exit(3)
    comm.all_reduce(torch.ones(4), group)


# --- tensor ----------------------------------------------------------------------------------------------------------

BATCH, SEQUENCE, DIM = 2, 12, 6


class Pair:
    """The same tensors on one device and as this tensor-parallel rank holds them, with plain roles beside split ones."""

    def __init__(self, rank: int, world: int, *, sp: bool, vocab: int, smoothing: float, batch: int = BATCH) -> None:
        torch.set_num_threads(1)
        self.mesh = build_mesh(Layout(tp=world, sp=sp), rank)
        self.rank, self.world, self.sp, self.vocab, self.batch = rank, world, sp, vocab, batch
        self.rows = split_parts(vocab, world)[rank]
        self.plain = Roles(smoothing=smoothing)
        self.split = TensorRoles(self.mesh.tp, sp=sp, vocab=vocab, first=self.rows[0], smoothing=smoothing)
        self.source = torch.Generator().manual_seed(3)

    def random(self, *shape: int) -> torch.Tensor:
        """The same numbers on every rank."""
        return torch.randn(*shape, generator=self.source, dtype=torch.float64)

    def outside(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens of (B, S, ...)."""
        return x.chunk(self.world, dim=1)[self.rank] if self.sp else x

    def same(self, whole: torch.Tensor, mine: torch.Tensor, what: str) -> None:
        """Equal up to the order of sums in float64."""
        assert whole.shape == mine.shape, (what, whole.shape, mine.shape)
        error = (whole - mine).abs().max().item() / max(whole.abs().max().item(), 1.0)
        assert error < 1e-13, f"{what}: {error:.2e} on rank {self.rank} of {self.world}, sp={self.sp}"


def leaf(x: torch.Tensor) -> torch.Tensor:
    """A copy that collects a gradient."""
    return x.detach().clone().requires_grad_()


def _feeds(gain: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> tuple[Norm, Projections]:
    """An RMSNorm and the projections behind it, of given tensors."""
    norm = Norm({"n.weight": gain}.get, "n", kind="rms", eps=1e-5)
    parts = [Projection({"p.weight": w, "p.bias": b}.get, "p") for w, b in zip(weights, biases or [None] * len(weights), strict=True)]
    return norm, Projections(*parts)


def tensor_columns(rank: int, world: int, say: Say, sp: bool, biased: bool, joined: bool) -> None:
    """Three projections of one input behind its norm, uneven over ranks: outputs, and gradients by input, norm, weights and biases."""
    pair = Pair(rank, world, sp=sp, vocab=13, smoothing=0.0)
    x, gain, widths = pair.random(BATCH, SEQUENCE, DIM), pair.random(DIM), (4 * world, world, 3 * world + 1)
    weights, biases = [pair.random(width, DIM) for width in widths], [pair.random(width) for width in widths]
    slopes = [pair.random(BATCH, SEQUENCE, width) for width in widths]
    cuts = [slice(*split_parts(width, world)[rank]) for width in widths]

    whole = [leaf(x), leaf(gain), *map(leaf, weights), *(map(leaf, biases) if biased else ())]
    local = [w[cut] for w, cut in zip(weights, cuts, strict=True)]
    if joined:
        local = list(torch.cat(local).split([len(part) for part in local]))
    mine = [leaf(pair.outside(x)), leaf(gain), *(part.detach().requires_grad_() for part in local)]
    mine += [leaf(b[cut]) for b, cut in zip(biases, cuts, strict=True)] if biased else []
    split = _feeds(mine[1], mine[2:5], mine[5:])
    assert split[1].joined == joined
    expected, found = pair.plain.columns(whole[0], *_feeds(whole[1], whole[2:5], whole[5:])), pair.split.columns(mine[0], *split)
    for a, b, cut in zip(expected, found, cuts, strict=True):
        pair.same(a[..., cut], b, "columns")
    by_whole = torch.autograd.grad(expected, whole, slopes)
    local_slopes = [slope[..., cut] for slope, cut in zip(slopes, cuts, strict=True)]
    if joined:
        local_slopes = list(torch.cat(local_slopes, dim=-1).split([slope.shape[-1] for slope in local_slopes], dim=-1))
    by_mine = list(torch.autograd.grad(found, mine, local_slopes))
    pair.same(pair.outside(by_whole[0]), by_mine[0], "columns by x")
    summed = comm.all_reduce(by_mine[1].clone(), pair.mesh.tp) if sp else by_mine[1]  # each rank saw its own tokens
    pair.same(by_whole[1], summed, "columns by the norm's weight")
    for a, b, cut in zip(by_whole[2:], by_mine[2:], cuts * 2, strict=False):
        pair.same(a[cut], b, "columns by weight or bias")


def _projection(weight: torch.Tensor, bias: torch.Tensor | None) -> Projection:
    """A projection of tensors that are no parameters."""
    return Projection({"x.weight": weight, "x.bias": bias}.get, "x")


def tensor_row(rank: int, world: int, say: Say, sp: bool, activation: str) -> None:
    """The way back: the activation inside, the bias added once (trap 10), and with sp its gradient is a part of the sum (trap 8)."""
    pair, width = Pair(rank, world, sp=sp, vocab=13, smoothing=0.0), 3 * world + 1
    parts = [pair.random(BATCH, SEQUENCE, width) for _ in range(2 if activation == "swiglu" else 1)]
    weight, bias = pair.random(DIM, width), pair.random(DIM)
    slope, cut = pair.random(BATCH, SEQUENCE, DIM), slice(*split_parts(width, world)[rank])
    whole = [*map(leaf, parts), leaf(weight), leaf(bias)]
    mine = [*(leaf(part[..., cut]) for part in parts), leaf(weight[:, cut]), leaf(bias)]
    expected = pair.plain.row(whole[:-2], activation, _projection(*whole[-2:]))
    found = pair.split.row(mine[:-2], activation, _projection(*mine[-2:]))
    pair.same(pair.outside(expected), found, "row")
    by_whole = torch.autograd.grad(expected, whole, slope)
    by_mine = list(torch.autograd.grad(found, mine, pair.outside(slope)))
    for a, b in zip(by_whole[:-2], by_mine[:-2], strict=True):
        pair.same(a[..., cut], b, "row by its parts")
    pair.same(by_whole[-2][:, cut], by_mine[-2], "row by weight")
    summed = comm.all_reduce(by_mine[-1].clone(), pair.mesh.tp) if sp else by_mine[-1]
    pair.same(by_whole[-1], summed, "row by bias")


def tensor_feed_forward(rank: int, world: int, say: Say, sp: bool) -> None:
    """Into a region and back, its tokens as they are kept on the ranks: the same as in their own order, without a copy of them turned."""
    pair, width = Pair(rank, world, sp=sp, vocab=13, smoothing=0.0), 3 * world + 1
    given = [pair.random(BATCH, SEQUENCE, DIM), pair.random(DIM), pair.random(width, DIM), pair.random(width, DIM), pair.random(DIM, width)]
    slope, cut = pair.random(BATCH, SEQUENCE, DIM), slice(*split_parts(width, world)[rank])
    whole = [leaf(one) for one in given]
    mine = [leaf(one) for one in (pair.outside(given[0]), given[1], given[2][cut], given[3][cut], given[4][:, cut])]

    def both(roles: Roles, x: torch.Tensor, gain: torch.Tensor, *weights: torch.Tensor, **order: bool) -> torch.Tensor:
        parts = roles.columns(x, *_feeds(gain, list(weights[:2]), []), **order)
        return roles.row(parts, "swiglu", _projection(weights[2], None), **order)

    expected = both(pair.plain, *whole)
    by_whole = torch.autograd.grad(expected, whole, slope)
    parts = pair.split.columns(mine[0], *_feeds(mine[1], mine[2:4], []), any_order=True)
    in_order = pair.plain.columns(whole[0], *_feeds(whole[1], whole[2:4], []))
    pair.same(by_rank(in_order[0][..., cut], pair.split.loose), parts[0], "the order inside")
    for order in ({}, {"any_order": True}):
        found = both(pair.split, *mine, **order)
        pair.same(pair.outside(expected), found, "feed-forward")
        by_x, by_gain, *by_weights = torch.autograd.grad(found, mine, pair.outside(slope))
        pair.same(pair.outside(by_whole[0]), by_x, "by x")
        pair.same(by_whole[1], comm.all_reduce(by_gain.clone(), pair.mesh.tp) if sp else by_gain, "by the norm's weight")
        for a, b in zip((by_whole[2][cut], by_whole[3][cut], by_whole[4][:, cut]), by_weights, strict=True):
            pair.same(a, b, "by a weight")


def tensor_embed(rank: int, world: int, say: Say, sp: bool, vocab: int) -> None:
    """Rows of the table over ranks, unevenly; every token, the first and last of each slice among them."""
    pair = Pair(rank, world, sp=sp, vocab=vocab, smoothing=0.0)
    tokens = torch.arange(BATCH * SEQUENCE).remainder(vocab).view(BATCH, SEQUENCE)
    weight, slope, rows = pair.random(vocab, DIM), pair.random(BATCH, SEQUENCE, DIM), slice(*pair.rows)
    whole, mine = leaf(weight), leaf(weight[rows])
    expected, found = pair.plain.embed(tokens, whole), pair.split.embed(tokens, mine)
    pair.same(pair.outside(expected), found, "embed")
    (by_whole,) = torch.autograd.grad(expected, whole, slope)
    (by_mine,) = torch.autograd.grad(found, mine, pair.outside(slope), retain_graph=True)
    pair.same(by_whole[rows], by_mine, "embed by weight")
    with summing([(mine.detach(), sums := torch.ones_like(mine.detach()))]):
        assert torch.autograd.grad(found, mine, pair.outside(slope), allow_unused=True) == (None,)
    pair.same(by_whole[rows] + 1.0, sums, "embed by weight, added")


def tensor_loss(rank: int, world: int, say: Say, sp: bool, vocab: int, smoothing: float, all_ignored: bool, weighted: bool) -> None:
    """trap 19: the loss over a split vocabulary, ignored labels, smoothing over the global vocabulary, and its gradients."""
    pair = Pair(rank, world, sp=sp, vocab=vocab, smoothing=smoothing)
    x, weight, rows = pair.random(BATCH, SEQUENCE, DIM) * 3, pair.random(vocab, DIM), slice(*pair.rows)
    labels = torch.arange(BATCH * SEQUENCE).remainder(vocab + 2).view(BATCH, SEQUENCE)
    labels = labels.masked_fill((labels >= vocab) | torch.tensor(all_ignored), -100)
    gain, weights = pair.random(DIM), pair.random(BATCH, SEQUENCE).abs().float() if weighted else None
    whole, mine = [leaf(x), leaf(gain), leaf(weight)], [leaf(pair.outside(x)), leaf(gain), leaf(weight[rows])]
    expected = pair.plain.loss(whole[0], _feeds(whole[1], [], [])[0], whole[2], labels, weights=weights)
    found = pair.split.loss(mine[0], _feeds(mine[1], [], [])[0], mine[2], labels, weights=weights)
    assert found.dtype == torch.float64 and abs(found - expected) <= 1e-13 * max(1.0, abs(expected.item()))
    same_on_all = comm.all_gather(found.detach()[None], pair.mesh.tp)
    assert len(same_on_all.unique()) == 1
    with torch.no_grad():
        assert torch.equal(pair.split.loss(mine[0], _feeds(mine[1], [], [])[0], mine[2], labels, weights=weights), found.detach())
    by_whole, by_mine = torch.autograd.grad(expected * 0.7, whole), list(torch.autograd.grad(found * 0.7, mine))
    slope, sums = torch.tensor(0.7, dtype=torch.float64), torch.ones_like(mine[2].detach())
    with summing([(mine[2].detach(), sums)], slope=slope):  # known before the forward: the same, added to what is there
        again = pair.split.loss(mine[0], _feeds(mine[1], [], [])[0], mine[2], labels, weights=weights)
        by_added = list(torch.autograd.grad(again, mine, slope, allow_unused=True))
    assert torch.equal(again, found) and by_added.pop() is None
    for by_x, by_gain, by_weight in (by_mine, [*by_added, sums - 1.0]):
        pair.same(pair.outside(by_whole[0]), by_x, "loss by x")
        summed = comm.all_reduce(by_gain.clone(), pair.mesh.tp) if sp else by_gain
        pair.same(by_whole[1], summed, "loss by the norm's weight")
        pair.same(by_whole[2][rows], by_weight, "loss by weight")
    pair.same(pair.plain.logits(x, weight)[..., rows], pair.split.logits(pair.outside(x), weight[rows]), "logits")


def tensor_memory(rank: int, world: int, say: Say) -> list[int]:
    """Bytes behind the output of `row` under sequence parallelism with one sequence, and bytes that the output needs."""
    pair = Pair(rank, world, sp=True, vocab=13, smoothing=0.0, batch=1)
    y = pair.split.row([pair.random(1, SEQUENCE, 8)], "none", _projection(pair.random(DIM, 8), None))
    return [y.untyped_storage().nbytes(), y.nbytes]


def tensor_bytes(rank: int, world: int, say: Say, sp: bool) -> dict[str, Any]:
    """One reduction per block input: what columns, row and their backwards send."""
    pair = Pair(rank, world, sp=sp, vocab=13, smoothing=0.0)
    x, weights = leaf(pair.outside(pair.random(BATCH, SEQUENCE, DIM))), [leaf(pair.random(4, DIM)) for _ in range(3)]
    back, sent = leaf(pair.random(DIM, 4)), {}
    comm.ledger.take()
    outputs = pair.split.columns(x, *_feeds(pair.random(DIM), weights, []))
    sent["columns"] = comm.ledger.take()
    torch.autograd.grad(sum(y.sum() for y in outputs), [x, *weights])
    sent["columns backward"] = comm.ledger.take()
    y = pair.split.row([x := leaf(pair.random(BATCH, SEQUENCE, 4))], "none", _projection(back, None))
    sent["row"] = comm.ledger.take()
    torch.autograd.grad(y.sum(), [x, back])
    sent["row backward"] = comm.ledger.take()
    return sent


# --- ranks -----------------------------------------------------------------------------------------------------------


def leave_traces(rank: int, world: int, folder: str) -> None:
    """Writes this rank's process id and where the ranks meet, so that a test can see that both are gone."""
    store = dist.distributed_c10d._get_default_store() if world > 1 else None
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    path = "" if store is None else store.path
    place = Path(folder) / f"{rank}.part"
    place.write_text(json.dumps({"pid": os.getpid(), "store": path}))
    place.rename(Path(folder) / f"{rank}.json")


def rank_dies(rank: int, world: int, say: Say, folder: str, how: str, who: int, others: str) -> Any:
    """Rank `who` ends as `how` says; the others wait for it in a collective, or elsewhere."""
    leave_traces(rank, world, folder)
    group = line(rank, world)
    comm.barrier(group)
    if rank != who:
        if others == "compute":
            time.sleep(60)
        comm.all_reduce(torch.ones(3), group)
        time.sleep(60)
    match how:
        case "failure":
            raise DataError("line 7 is no JSON", where="a.jsonl:7", found="{", next="look at it", details=["one", "two"])
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "leave":
            os._exit(0)
        case "error":
            raise ZeroDivisionError("seven over nothing\nsecond line")
        case "memory":
            raise MemoryError
        case "sleep":
            time.sleep(60)
        case "not json":
            return object()
    return None


def rank_without_room(rank: int, world: int, say: Say, folder: str) -> None:
    """Rank 0 fails while its log takes no more, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    print(f"a word from rank {rank}", file=sys.stderr)
    if rank == 0:
        raise SpaceError("a file of the run cannot be read or written", where="metrics.jsonl", found="No space left on device")
    time.sleep(60)


def rank_returns(rank: int, world: int, say: Say, folder: str) -> dict[str, Any]:
    """Results in rank order, though the last rank is done first; large ones too."""
    leave_traces(rank, world, folder)
    time.sleep(0.05 * (world - rank))
    for turn in range(3):
        say({"rank": rank, "turn": turn})
    print(f"a word from rank {rank}", file=sys.stderr)
    return {"rank": rank, "large": "x" * 300_000, "numbers": [rank / 3, float("inf")]}


def rank_says_much(rank: int, world: int, say: Say, folder: str) -> None:
    """Says more than a pipe holds, while signals come."""
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    for turn in range(20):
        say({"turn": turn, "text": "x" * 1_000_000})
    signal.setitimer(signal.ITIMER_REAL, 0.0)


def rank_waits(rank: int, world: int, say: Say, folder: str) -> None:
    """Waits to be stopped."""
    leave_traces(rank, world, folder)
    time.sleep(60)


def launch() -> None:
    """A launcher of ranks, told by its words: a case here, a folder, how many ranks, where logs go. Prints what came of it."""
    work, folder, world, logs = sys.argv[1:]
    heard: list[list[Any]] = []
    try:
        results = run_ranks(int(world), globals()[work], folder, log_dir=Path(logs), on_message=lambda *said: heard.append([*said]))
        print(json.dumps({"results": results, "heard": heard}))
    except Failure as failure:
        print(json.dumps({"failure": failure.as_dict()}))
    except KeyboardInterrupt:
        print("interrupted")
