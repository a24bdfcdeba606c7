"""The mesh: ranks and coordinates, groups that partition the world, made in the same order everywhere."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm import mesh as mesh_module
from dist_llm.config.layout import Layout
from dist_llm.mesh import AXES, Coordinate, Mesh, build_mesh, coordinate, rank_of
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
                group=SimpleNamespace(WORLD="world"), new_group=lambda ranks, calls=calls: calls.append(list(ranks)) or "g"
            )
            monkeypatch.setattr(mesh_module, "dist", fake)
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


@pytest.mark.parametrize("layout", GRID, ids=str)
def test_groups_partition_the_world(meshes: Callable, layout: Layout) -> None:
    found, _ = meshes(layout, tied=True, kv_heads=2)
    for name, size in (("tp", layout.tp), ("pp", layout.pp), ("data", layout.dp * layout.cp), ("world", layout.world)):
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
    moving = {"tp": {"tp"}, "pp": {"pp"}, "data": {"dp", "cp"}, "kv": {"tp"}, "tied": {"pp"}}
    for mesh in found:
        for name, axes in moving.items():
            places = [vars(coordinate(rank, layout)) for rank in getattr(mesh, name).ranks]
            assert all(len({place[axis] for place in places}) == 1 for axis in set(AXES) - axes), (name, places)


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
    assert all(getattr(mesh, name).handle is None for name in ("tp", "pp", "data", "tied", "kv", "world")) and mesh.channels == {}


REAL = [
    ({"dp": 2, "tp": 2}, False, 1),
    ({"tp": 2, "pp": 2}, True, 2),
    ({"dp": 2, "pp": 2}, True, None),
    ({"tp": 4}, False, 2),
    ({"pp": 4}, True, None),
]


@pytest.mark.parametrize(("layout", "tied", "kv_heads"), REAL, ids=str)
def test_real_groups_reach_their_ranks(ranks: Ranks, layout: dict[str, int], tied: bool, kv_heads: int | None) -> None:
    found = ranks.run(4, "tests.cases:mesh_groups", layout, tied, kv_heads)
    assert [item["world"] for item in found] == [[0, 1, 2, 3, rank] for rank in range(4)]
