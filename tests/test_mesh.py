"""The mesh: ranks and coordinates, groups that partition the world, made in the same order everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm import mesh as mesh_module
from dist_llm.config.layout import Layout
from dist_llm.errors import PeerError
from dist_llm.mesh import AXES, Coordinate, Mesh, build_mesh, coordinate, rank_of
from tests.layouts import concrete, config_of
from tests.ranks import Ranks

sizes = st.integers(1, 4)
layouts = st.builds(lambda dp, tp, cp, pp: Layout(dp=dp, tp=tp, cp=cp, pp=pp), sizes, sizes, st.integers(1, 2), sizes)


@given(layouts)
@settings(deadline=None)
def test_ranks_and_coordinates_are_a_bijection(layout: Layout) -> None:
    places = [coordinate(rank, layout) for rank in range(layout.world)]
    assert [rank_of(place, layout) for place in places] == list(range(layout.world))
    assert len(set(places)) == layout.world
    assert all(0 <= getattr(place, axis) < getattr(layout, axis) for place in places for axis in AXES)


def test_tp_is_fastest_then_cp_dp_pp() -> None:
    layout = Layout(tp=2, cp=3, dp=5, pp=7)
    assert rank_of(Coordinate(pp=0, dp=0, cp=0, tp=1), layout) == 1
    assert rank_of(Coordinate(pp=0, dp=0, cp=1, tp=0), layout) == 2
    assert rank_of(Coordinate(pp=0, dp=1, cp=0, tp=0), layout) == 2 * 3
    assert rank_of(Coordinate(pp=1, dp=0, cp=0, tp=0), layout) == 2 * 3 * 5
    assert coordinate(layout.world - 1, layout) == Coordinate(pp=6, dp=4, cp=2, tp=1)


@pytest.fixture
def meshes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Mesh], list[list[Any]]]]:
    """Builds the mesh of every rank without processes; gives them and the groups that each rank asked for, in order."""

    def build(layout: Layout, **options: Any) -> tuple[list[Mesh], list[list[Any]]]:
        found, asked = [], []
        for rank in range(layout.world):
            calls: list[Any] = []
            fake = SimpleNamespace(
                group=SimpleNamespace(WORLD="world"),
                new_group=lambda ranks, timeout, calls=calls: calls.append(list(ranks)) or "g",
                get_backend=lambda: "gloo",
                **dict.fromkeys(("all_reduce", "send", "recv"), lambda *words, **more: None),
            )
            monkeypatch.setattr(mesh_module, "dist", fake)
            monkeypatch.setattr(mesh_module, "_share", lambda handle, index, size: None)
            found.append(build_mesh(layout, rank, **options))
            asked.append(calls)
        return found, asked

    return build


GRID = [
    Layout(dp=dp, tp=tp, cp=cp, pp=pp)
    for dp in (1, 2, 3)
    for tp in (1, 2, 4)
    for cp in (1, 2)
    for pp in (1, 2, 3)
    if dp * tp * cp * pp <= 24
]
HYBRID = [Layout(dp=4, shard=2), Layout(dp=4, tp=2, shard=1), Layout(dp=2, cp=2, pp=2, shard=2), Layout(dp=3, cp=2, tp=2, shard=3)]
GRID += [Layout(**{**vars(layout), "zero": 1}) for layout in HYBRID]


@pytest.mark.parametrize("layout", GRID, ids=str)
def test_groups_partition_the_world(meshes: Callable, layout: Layout) -> None:
    found, _ = meshes(layout, tied=True, kv_heads=2)
    data = layout.dp * layout.cp
    sizes = {"tp": layout.tp, "pp": layout.pp, "data": data, "shard": layout.shard, "replica": data // layout.shard, "world": layout.world}
    for name, size in sizes.items():
        groups = [getattr(mesh, name) for mesh in found]
        assert {group.size for group in groups} == {size}
        for mesh, group in zip(found, groups, strict=True):
            assert group.ranks[group.index] == mesh.rank
            assert all(getattr(found[other], name).ranks == group.ranks for other in group.ranks)
            assert (group.handle is None) == (group.size == 1)
        assert sorted(rank for ranks in {group.ranks for group in groups} for rank in ranks) == list(range(layout.world))


@pytest.mark.parametrize("layout", GRID, ids=str)
def test_all_ranks_make_the_same_groups_in_the_same_order(meshes: Callable, layout: Layout) -> None:
    """new_group waits for all ranks: a rank that makes another group first hangs the job."""
    _, asked = meshes(layout, tied=True, kv_heads=1)
    assert all(calls == asked[0] for calls in asked)
    assert all(len(ranks) > 1 for ranks in asked[0])


@pytest.mark.parametrize("layout", GRID, ids=str)
def test_members_of_a_group_differ_in_their_axis_alone(meshes: Callable, layout: Layout) -> None:
    found, _ = meshes(layout, tied=True, kv_heads=2)
    moving = {"tp": {"tp"}, "pp": {"pp"}, "kv": {"tp"}, "tied": {"pp"}} | dict.fromkeys(("data", "shard", "replica"), {"dp", "cp"})
    for mesh in found:
        for name, axes in moving.items():
            places = [vars(coordinate(rank, layout)) for rank in getattr(mesh, name).ranks]
            assert all(len({place[axis] for place in places}) == 1 for axis in set(AXES) - axes), (name, places)


def test_shards_are_neighbours_and_replicas_stand_across(meshes: Callable) -> None:
    found, _ = meshes(Layout(dp=4, tp=2, zero=1, shard=2))
    assert found[0].data.ranks == (0, 2, 4, 6)
    assert [mesh.shard.ranks for mesh in found] == [(0, 2), (1, 3)] * 2 + [(4, 6), (5, 7)] * 2
    assert [mesh.replica.ranks for mesh in found] == [(0, 4), (1, 5), (2, 6), (3, 7)] * 2
    assert all(mesh.shard.axis == mesh.replica.axis == "dp" for mesh in found)


@pytest.mark.parametrize("layout", GRID, ids=str)
def test_groups_of_the_same_ranks_are_made_once(meshes: Callable, layout: Layout) -> None:
    """Process groups cost memory and start-up: shard and replica are the data group, or of one rank, unless `shard` says otherwise."""
    found, asked = meshes(layout, tied=True, kv_heads=2)
    channels = {frozenset(pair[:2]) for mesh in found for pair in mesh.channels}
    once = [tuple(ranks) for ranks in asked[0] if frozenset(ranks) not in channels]
    assert len(once) == len(set(once))
    if layout.shard in (1, layout.dp * layout.cp):
        assert all({mesh.shard.ranks, mesh.replica.ranks} == {mesh.data.ranks, (mesh.rank,)} for mesh in found)
    for mesh in found:
        assert mesh.rank == 0 or (mesh.shard.handle is None) == (layout.shard == 1)


def test_tied_groups_join_first_and_last_stage(meshes: Callable) -> None:
    found, _ = meshes(Layout(dp=2, tp=2, pp=3), tied=True)
    for mesh in found:
        ends = (mesh.rank % 4, 8 + mesh.rank % 4)
        assert mesh.tied.ranks == (ends if mesh.at.pp != 1 else (mesh.rank,))
    untied, _ = meshes(Layout(dp=2, tp=2, pp=3), tied=False)
    assert all(mesh.tied.size == 1 for mesh in untied)
    single, _ = meshes(Layout(dp=4), tied=True)
    assert all(mesh.tied.size == 1 for mesh in single)


@pytest.mark.parametrize(
    ("kv_heads", "sets"), [(1, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]]), (4, [[0], [1], [2], [3]]), (8, [[0], [1], [2], [3]])]
)
def test_kv_groups_hold_the_ranks_of_the_same_heads(meshes: Callable, kv_heads: int, sets: list[list[int]]) -> None:
    found, _ = meshes(Layout(dp=2, tp=4), kv_heads=kv_heads)
    assert [list(mesh.kv.ranks) for mesh in found[:4]] == [group for group in sets for _ in group]
    assert [[rank - 4 for rank in mesh.kv.ranks] for mesh in found[4:]] == [group for group in sets for _ in group]


def test_channels_are_a_group_each(meshes: Callable) -> None:
    """Neighbours, one channel for each direction; no two channels share a group, or their messages would queue together."""
    found, asked = meshes(Layout(dp=2, pp=3))
    for mesh in found:
        ranks, at = mesh.pp.ranks, mesh.at.pp
        needed = {(ranks[at], ranks[at + 1], "F"), (ranks[at + 1], ranks[at], "B")} if at < 2 else set()
        needed |= {(ranks[at - 1], ranks[at], "F"), (ranks[at], ranks[at - 1], "B")} if at else set()
        assert needed <= set(mesh.channels)
        assert all(mesh.rank in key[:2] and set(group.ranks) == set(key[:2]) for key, group in mesh.channels.items())
    pairs = [ranks for ranks in asked[0] if len(ranks) == 2]
    assert len(pairs) >= 2 * 2 * 2 + 2  # 2 lines x 2 neighbours x 2 directions, and data groups


def test_one_rank_needs_no_process_group() -> None:
    mesh = build_mesh(Layout(), 0, tied=True, kv_heads=1)
    names = ("tp", "pp", "data", "shard", "replica", "tied", "kv", "world")
    assert all(getattr(mesh, name).handle is None for name in names) and mesh.channels == {}


REAL = [
    ({"dp": 2, "tp": 2}, False, 1),
    ({"tp": 2, "pp": 2}, True, 2),
    ({"dp": 2, "pp": 2}, True, None),
    ({"tp": 4}, False, 2),
    ({"pp": 4}, True, None),
    ({"dp": 4, "zero": 1, "shard": 2}, False, None),
]


@pytest.mark.parametrize("layout", ["pp=2", "pp=2,schedule=interleaved", "pp=4,schedule=gpipe", "dp=2,pp=2,zero=3"])
def test_nothing_waits_for_the_first_use_of_a_group(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    """On a transport that connects at the first use and holds up every rank of the group until then, as NCCL does."""
    shape = concrete(layout)
    job = {"config": config_of("tied").model_dump(by_alias=True), "steps": 1, "dtype": "float32"}
    words = (job, asdict(shape), str(tmp_path))
    found = ranks.run(shape.world, "tests.first_use:proof_where_first_use_waits", *words, timeout_seconds=8.0)
    assert len(found) == shape.world and min(found) >= 2, "groups used for the first time in the mesh, none of them later"


@pytest.mark.parametrize("which", ["tp", "channel"])
def test_a_hang_inside_a_part_of_the_world_ends_in_the_timeout(ranks: Ranks, which: str) -> None:
    """Groups wait as long as the config says, not torch's half an hour."""
    start = time.monotonic()
    with pytest.raises(PeerError):
        ranks.run(4, "tests.first_use:one_rank_stays_away", which, timeout_seconds=2.0)
    assert time.monotonic() - start < 2.0 + 5.0


@pytest.mark.parametrize(("layout", "tied", "kv_heads"), REAL, ids=str)
def test_real_groups_reach_their_ranks(ranks: Ranks, layout: dict[str, int], tied: bool, kv_heads: int | None) -> None:
    found = ranks.run(4, "tests.cases:mesh_groups", layout, tied, kv_heads)
    assert [item["world"] for item in found] == [[0, 1, 2, 3, rank] for rank in range(4)]
