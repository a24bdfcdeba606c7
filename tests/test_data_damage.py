"""Damage to a built data set: whatever byte is changed, whatever file is lost or exchanged, no token of it is trained on (F18)."""

from __future__ import annotations

import os
import random
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from dist_llm.config.schema import DataConfig
from dist_llm.data import prepare as preparing
from dist_llm.data import shards as storing
from dist_llm.data.build import build_store
from dist_llm.data.journal import Stores
from dist_llm.data.prepare import Prepared, prepare
from dist_llm.data.sealed import check_seal
from dist_llm.data.store import read_manifest
from dist_llm.data.tokenizer import bytes_tokenizer
from dist_llm.errors import DataError, render
from tests.commands import Commands
from tests.test_damage import CONTENTS, FILES, flip_each


class Data:
    """A small data set: a trained tokenizer, two stores of two shards or more each, one line that was left out."""

    def __init__(self, folder: Path, *, salt: str = "", kind: str = "bpe") -> None:
        folder.mkdir()
        self.folder, source = folder / "data", folder / "x.jsonl"
        lines = [f'{{"text": "{salt} the {number * 7919} of {number * 104729}"}}\n' for number in range(30)]
        source.write_text("".join(lines) + "bad\n")
        tokenizer = {"kind": kind, "vocab": 262 if kind == "bpe" else None}
        self.config = DataConfig(source=str(source), dir=str(self.folder), tokenizer=tokenizer, validation=0.3, max_bad_lines=1)
        self.take_up()
        self.files = sorted(path for path in self.folder.rglob("*") if path.is_file())

    def take_up(self) -> Prepared:
        """What every rank does at the start of a run."""
        storing._verified.clear()
        return prepare(self.config, seed=0)

    def refused(self) -> DataError:
        """The failure that names one of the files."""
        homes = {entry.name: entry.inode() for entry in os.scandir(self.folder)}
        with pytest.raises(DataError) as caught:
            self.take_up()
        failure = caught.value
        assert failure.code == 3 and Path(str(failure.where)) in self.files, failure.where
        assert len(render(failure).splitlines()) <= 12 and "then build the data again" in str(failure.next)
        assert Path(str(failure.next).removeprefix("remove ").split(", then")[0]).parent == self.folder, failure.next
        assert homes == {entry.name: entry.inode() for entry in os.scandir(self.folder)}, "nothing was built"
        return failure


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "build_store", partial(build_store, shard_tokens=150))
        return Data(tmp_path_factory.mktemp("damage") / "one")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The same but for some letters: files of the same names and about the same sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "build_store", partial(build_store, shard_tokens=150))
        return Data(tmp_path_factory.mktemp("damage") / "other", salt="a")


def flip_each_of(data: Data, places: list[tuple[Path, int]], chance: random.Random) -> None:
    """One byte after the other is changed, refused with its file, and put back."""

    def refused(path: Path) -> None:
        assert data.refused().where == str(path), path

    flip_each(places, chance, refused)
    data.take_up()


def places_of(paths: list[Path]) -> list[tuple[Path, int]]:
    return [(path, at) for path in paths for at in range(path.stat().st_size)]


def test_what_the_data_set_holds(data: Data) -> None:
    names = [path.name for path in data.files]
    assert len({path.parent for path in data.files}) == 4 and names.count("seal.json") == 2 and names.count("tokenizer.json") == 2
    assert names.count("documents.bin") == names.count("manifest.json") == 2 and "skipped.json" in names
    assert all(len(store.manifest.shards) >= 2 for prepared in [data.take_up()] for store in (*prepared.train, *prepared.validation))


def test_every_byte_of_a_small_data_set(data: Data) -> None:
    """The long tokenizer files: every 29th byte here, each behind `long`."""
    tokenizers = [path for path in data.files if path.name == "tokenizer.json"]
    places = places_of([path for path in data.files if path not in tokenizers])
    assert 3500 < len(places) < 6000
    flip_each_of(data, places + places_of(tokenizers)[::29], random.Random(1))


@pytest.mark.long
def test_every_byte_of_its_tokenizers(data: Data) -> None:
    flip_each_of(data, places_of([path for path in data.files if path.name == "tokenizer.json"]), random.Random(2))


def spoil(path: Path, twin: Path, kind: str, *, other: Path) -> bool:
    """Damages a file; returns whether anything is another now."""
    content = path.read_bytes()
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind](content))
    elif kind == "a file deleted":
        path.unlink()
    elif kind == "a file of another save":
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(twin.read_bytes())
        twin.write_bytes(content)
    return not path.exists() or path.read_bytes() != content


def test_thirteen_kinds_of_damage_to_every_file(data: Data, other: Data, tmp_path: Path) -> None:
    """The file of another build is the one of the same name; the one to be exchanged with is the next of its kind, or of another."""
    keep, done = tmp_path / "keep", 0
    shutil.copytree(data.folder, keep)
    theirs = {
        tuple(path.relative_to(other.folder).parts[1:]): path
        for path in other.files
        if "bpe" not in path.relative_to(other.folder).parts[0]
    }
    for number, path in enumerate(data.files):
        alike = [one for one in data.files if one != path and one.name[:6] == path.name[:6]] or [data.files[number - 1]]
        foreign = theirs.get(path.relative_to(data.folder).parts[1:], other.files[0])
        for kind in (*CONTENTS, *FILES):
            if spoil(path, alike[0], kind, other=foreign):
                failure, done = data.refused(), done + 1
                assert failure.where in (str(path), str(alike[0])), (path, kind, failure.where)
            shutil.rmtree(data.folder)
            shutil.copytree(keep, data.folder)
    assert done >= 13 * len(data.files) - 8  # files of a few bytes that are equal in both builds
    data.take_up()


def test_whole_folders_lost_or_exchanged(data: Data, other: Data, tmp_path: Path) -> None:
    """What a look at single files does not show: a validation set that is not there any more, one set in the place of the other."""
    (home,) = {path.parent.parent for path in data.files if path.name == "documents.bin"}
    (foreign,) = {path.parent.parent for path in other.files if path.name == "documents.bin"}
    keep = tmp_path / "keep"
    shutil.copytree(home, keep)

    def restore() -> None:
        shutil.rmtree(home)
        shutil.copytree(keep, home)

    shutil.rmtree(home / "validation")
    assert data.refused().where == str(home / "validation/manifest.json")
    restore()
    (home / "validation").rename(home / "x")
    (home / "train").rename(home / "validation")
    (home / "x").rename(home / "train")
    assert "manifest.json" in str(data.refused().where)
    restore()
    shutil.rmtree(home / "train")
    shutil.copytree(foreign / "train", home / "train")
    assert data.refused().where == str(home / "train/manifest.json")
    restore()
    shutil.rmtree(home)
    shutil.copytree(foreign, home)
    failure = data.refused()
    assert failure.where == str(home / "seal.json") and "other data than the config asks for" in failure.what
    restore()
    for path in home.rglob("*"):
        if path.is_file():
            path.unlink()
            path.mkdir()
            assert data.refused().where == str(path)
            path.rmdir()
            path.symlink_to(home / "nothing")
            assert data.refused().where == str(path)
            restore()
    data.take_up()


def test_a_run_ends_before_its_first_step(commands: Commands, tmp_path: Path) -> None:
    """Through the shell: exit 3, the shard named, no step and no checkpoint; `data build` says the same."""
    where = ["configs/tiny.yaml", f"data.dir={tmp_path / 'data'}", "data.max_tokens=20_000"]

    assert commands.run("data", "build", *where).returncode == 0
    (shard,) = (tmp_path / "data").glob("*/train/tokens-00000.bin")
    content = shard.read_bytes()
    shard.write_bytes(content[:-5] + bytes([content[-5] ^ 16]) + content[-4:])
    trained = commands.run("train", *where, "--steps", "2", "--run-dir", str(tmp_path / "run"), "--nproc", "2")
    for done in (trained, commands.run("data", "build", *where)):
        assert done.returncode == 3 and str(shard) in done.stderr and "sha256" in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert done.stderr.count("error: ") == 1
    assert "step 1" not in trained.stdout and not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("name", ["manifest.json", "seal.json", "note.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "large"])
def test_what_is_no_file_is_told_at_once(data: Data, tmp_path: Path, name: str, kind: str) -> None:
    """A pipe in the place of a file would be waited for, a device read without end."""
    path = tmp_path / "x" / name
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)
    signal.setitimer(signal.ITIMER_REAL, 20)  # a hang is an error: the signal ends the test
    try:
        if name == "note.json":
            stores = Stores(path.parent, tokenizer=bytes_tokenizer(), terms=1, note=path) if kind != "folder" else None
            assert stores is None or stores.tokens == 0
            return
        with pytest.raises(DataError) as caught:
            read_manifest(path.parent) if name == "manifest.json" else check_seal(path.parent, key="")
        assert caught.value.where == str(path) and caught.value.found
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
