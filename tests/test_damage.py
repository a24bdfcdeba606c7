"""Damage to checkpoints: whatever byte is changed, whatever file is lost or exchanged, a resume refuses it and no weight is touched."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from dist_llm.errors import CheckpointError
from dist_llm.train import folder as folder_module
from dist_llm.train.durable import BLOCK
from dist_llm.train.folder import open_checkpoint
from tests.small_checkpoints import rows_of, save_small, take_up

SMALL, LARGE = 8, 24_000  # the width of the model: 4 KB and 770 KB of checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("large") / "run", width=LARGE)


def refused(folder: Path, width: int) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        take_up(folder, rows_of(width))
    return caught.value


def flip_each(places: list[tuple[Path, int]], chance: random.Random, refused: Callable[[Path], object]) -> None:
    """One byte after the other is changed, refused, and put back."""
    for path, at in places:
        with path.open("rb+") as handle:
            handle.seek(at)
            (byte,) = handle.read(1)
            handle.seek(at)
            handle.write(bytes([byte ^ chance.randrange(1, 256)]))
            handle.flush()
            refused(path)
            handle.seek(at)
            handle.write(bytes([byte]))


def flip_each_of(folder: Path, width: int, places: list[tuple[Path, int]], chance: random.Random) -> None:
    """The same, of a checkpoint that is sound afterwards."""
    flip_each(places, chance, lambda path: refused(folder, width))
    take_up(folder, rows_of(width))


def places_of(folder: Path) -> list[tuple[Path, int]]:
    return [(path, at) for path in sorted(folder.iterdir()) for at in range(path.stat().st_size)]


def test_what_was_saved_is_taken_up(small: Path, large: Path) -> None:
    for folder, width in ((small, SMALL), (large, LARGE)):
        engine = take_up(folder, rows_of(width))
        parts = open_checkpoint(folder).parts
        assert engine.changed and len(engine.values) == 4
        for (kind, name), values in engine.values.items():
            assert torch.equal(values, parts.whole(name, kind).reshape(-1)) and values.abs().sum() > 0
    assert max(path.stat().st_size for path in large.iterdir()) > BLOCK


def test_every_byte_of_a_small_checkpoint(small: Path) -> None:
    places = places_of(small)
    assert 3500 < len(places) < 6000
    flip_each_of(small, SMALL, places, random.Random(1))


def test_two_thousand_bytes_of_a_larger_one(large: Path) -> None:
    chance = random.Random(2)
    flip_each_of(large, LARGE, chance.sample(places_of(large), 2000), chance)


@pytest.mark.long
@pytest.mark.parametrize("eighth", range(8))
def test_every_byte_of_256_kilobytes(memory: Path, monkeypatch: pytest.MonkeyPatch, eighth: int) -> None:
    """Every eighth from here on. A manifest is read once for each of its texts: that of nearly all is the same."""
    monkeypatch.setattr(folder_module, "read_manifest", cache(folder_module.read_manifest))
    folder = save_small(memory / f"eighth-{eighth}", width=8_000)
    places = places_of(folder)
    assert len(places) > 256_000
    flip_each_of(folder, 8_000, places[eighth::8], random.Random(eighth))


# --- the kinds of damage ---------------------------------------------------------------------------------------------------

Damage = Callable[[bytes], bytes]


def exchange(content: bytes) -> bytes:
    """Two pieces of a file in each other's place."""
    third = len(content) // 3
    return content[-third:] + content[third:-third] + content[:third]


CONTENTS: dict[str, Damage] = {
    "a bit flipped": lambda content: content[:-3] + bytes([content[-3] ^ 8]) + content[-2:],
    "bytes zeroed": lambda content: content[: len(content) // 2] + bytes(8) + content[len(content) // 2 + 8 :],
    "bytes set": lambda content: content[: len(content) // 2] + b"\xff" * 8 + content[len(content) // 2 + 8 :],
    "the last byte cut": lambda content: content[:-1],
    "half of it cut": lambda content: content[: len(content) // 2],
    "all of it cut": lambda content: b"",
    "a byte appended": lambda content: content + b"\0",
    "a byte put in": lambda content: content[:9] + b" " + content[9:],
    "a byte taken out": lambda content: content[:9] + content[10:],
    "pieces exchanged": exchange,
}
FILES = ("a file deleted", "two files exchanged", "a file of another save")
assert len(CONTENTS) + len(FILES) == 13


def spoil(folder: Path, name: str, kind: str, *, other: Path) -> None:
    path = folder / name
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind](path.read_bytes()))
    elif kind == "a file deleted":
        path.unlink()
    elif kind == "a file of another save":
        shutil.copy(other / name, path)
    else:
        names = sorted(file.name for file in folder.iterdir())
        twin = folder / {"0": name.replace("00000", "00001"), "1": name.replace("00001", "00000")}.get(name[9:10], "")
        twin = twin if name.startswith("rank") else folder / names[names.index(name) - 1]
        mine, theirs = path.read_bytes(), twin.read_bytes()
        path.write_bytes(theirs)
        twin.write_bytes(mine)


def test_thirteen_kinds_of_damage_to_every_file(small: Path, tmp_path: Path) -> None:
    other = save_small(tmp_path / "other", seed=1)
    names = sorted(path.name for path in small.iterdir())
    assert len(names) == 8
    for name in names:
        for kind in (*CONTENTS, *FILES):
            folder = tmp_path / "run/checkpoints/step-00000003"
            shutil.copytree(small, folder)
            spoil(folder, name, kind, other=other)
            assert any((small / one).read_bytes() != (folder / one).read_bytes() for one in names if (folder / one).exists()) or kind == (
                "a file deleted"
            )
            error = refused(folder, SMALL)
            assert error.code == 4 and str(folder) in str(error.where), (name, kind)
            if name.startswith(("rank", "tokenizer")) and kind in CONTENTS:
                assert error.where == str(folder / name) and error.expected and error.found, (name, kind)
            shutil.rmtree(folder)


def test_a_folder_or_a_link_in_the_place_of_a_file(small: Path, tmp_path: Path) -> None:
    for name in sorted(path.name for path in small.iterdir()):
        folder = tmp_path / name
        shutil.copytree(small, folder)
        (folder / name).unlink()
        (folder / name).mkdir()
        refused(folder, SMALL)
        (folder / name).rmdir()
        (folder / name).symlink_to(folder / "nothing")
        refused(folder, SMALL)


def test_what_nobody_keeps_is_verified_too(tmp_path: Path) -> None:
    """A run without moments takes up a checkpoint that has them: their bytes are compared all the same."""
    folder = save_small(tmp_path / "run", width=LARGE)
    assert take_up(folder, rows_of(LARGE), kinds=("weight",)).changed
    path = folder / "rank-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        take_up(folder, rows_of(LARGE), kinds=("weight",))
