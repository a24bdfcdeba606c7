"""The commit protocol of a save: whatever a crash leaves, the newest committed checkpoint opens and no half state does. Without torch."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_128_hexdigest

from dist_llm.config.layout import Layout
from dist_llm.config.load import config_tree, load_config
from dist_llm.errors import CheckpointError
from dist_llm.train.durable import BLOCK, Digest, Disk
from dist_llm.train.folder import VERSION, begin, commit, flush, open_checkpoint, retain, settle, step_folders
from tests.crash import Effect, Recorder, World, put

ROOT = Path(__file__).parent.parent
CONFIG = config_tree(load_config(ROOT / "configs/tiny.yaml", []).config)
LAYOUT = asdict(Layout(dp=2))
Save = Callable[[int, int], None]


def manifest(step: int, save_id: str, files: dict[str, Any]) -> dict[str, Any]:
    about = {"version": VERSION, "save_id": save_id, "step": step, "world": 2, "layout": LAYOUT, "config": CONFIG, "seed": 7}
    return {**about, "rows": [["w", [8, 4]]], "tokenizer": "a" * 64, "data": "b" * 64, "files": files}


class Simulation:
    """Saves of two ranks into one run folder, recorded."""

    def __init__(self, root: Path, *, seed: int, made: bool = False) -> None:
        self.run, self.chance, self.count = root / "run", random.Random(seed), 0
        self.effects: list[Effect] = []
        self.disk = Recorder(self.effects)
        if not made:
            self.disk.make_folder(self.run)
            self.disk.sync_folder(root)

    def save(self, step: int, *, keep: int) -> None:
        """As checkpoint.Saver does it; the effects of the two ranks come in any order, as those of two threads do."""
        self.count += 1
        save_id = f"{self.count:016x}"
        partial = begin(self.disk, self.run, step, save_id)
        lists: list[list[Effect]] = [[], []]
        files: dict[str, Any] = {}
        for rank, effects in enumerate(lists):
            files |= self._write(Recorder(effects), partial, rank, step)
        self.effects += merged(lists, self.chance)
        final = commit(self.disk, partial, manifest(step, save_id, files))
        self.effects.append(Effect("done", final, step))
        retain(self.disk, self.run, keep, verified=final)

    def _write(self, disk: Recorder, folder: Path, rank: int, step: int) -> dict[str, Any]:
        names = [f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"]
        names += ["tokenizer.json", "tokenizer_config.json"] if rank == 0 else []
        chunks = [f"{name} of step {step}, save {self.count} ".encode() * 3 for name in names]
        written = {name: disk.write(folder / name, [chunk[:20], chunk[20:]]) for name, chunk in zip(names, chunks, strict=True)}
        flush(disk, folder, written)
        return {name: digest.about for name, digest in written.items()}


def merged(lists: list[list[Effect]], chance: random.Random) -> Iterator[Effect]:
    """Two lists as one, each in its order."""
    rest = [list(effects) for effects in lists]
    while any(rest):
        yield chance.choice([effects for effects in rest if effects]).pop(0)


def first_save(simulation: Simulation) -> None:
    simulation.save(3, keep=2)


def later_saves_and_retention(simulation: Simulation) -> None:
    for step in (3, 6, 9, 12):
        simulation.save(step, keep=2)


def a_step_that_exists(simulation: Simulation) -> None:
    simulation.save(3, keep=3)
    simulation.save(6, keep=3)
    simulation.save(6, keep=3)


def the_only_step_again(simulation: Simulation) -> None:
    simulation.save(3, keep=1)
    simulation.save(3, keep=1)
    simulation.save(6, keep=1)


SCENARIOS = [first_save, later_saves_and_retention, a_step_that_exists, the_only_step_again]


def states(effects: list[Effect], root: Path, *, since: int = 0) -> Iterator[tuple[int, int | None, dict[str, bytes | None]]]:
    """(number of effects, newest committed step, tree) of every crash that looks different, after more than `since` effects."""
    chance, world = random.Random(5), World(root)
    seen: set[tuple[int | None, int]] = set()
    committed: int | None = None
    for number, effect in enumerate(effects):
        if effect.kind == "done":
            committed = effect.more
        else:
            world.take(effect)
        for tree in world.crashes(chance) if number >= since else ():
            key = (committed, hash(tuple(tree.items())))
            if key not in seen:
                seen.add(key)
                yield number + 1, committed, tree


def check(home: Path, committed: int | None) -> None:
    """The newest checkpoint is sound and not older than what was committed; whatever opens is whole."""
    found = step_folders(home / "run")
    assert found or committed is None, "the committed checkpoint is gone"
    if found:
        opened = open_checkpoint(home / "run")
        opened.verify()
        assert committed is None or opened.step >= committed
    for path in (home / "run/checkpoints").glob("*"):
        try:
            opened = open_checkpoint(path) if path.is_dir() else None
        except CheckpointError:
            continue
        if opened is not None:
            opened.verify()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_crash_leaves_the_newest_committed_checkpoint(scenario: Callable[[Simulation], None], tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    simulation = Simulation(root, seed=len(scenario.__name__))
    scenario(simulation)
    count = sound_after(simulation.effects, root, tmp_path / "crash")
    assert count >= (100 if scenario is first_save else 250), count
    print(f"{scenario.__name__}: {len(simulation.effects)} effects, {count} states")


def sound_after(effects: list[Effect], root: Path, home: Path, *, since: int = 0) -> int:
    """Checks every crash after more than `since` of these effects; returns how many there were."""
    count = 0
    for number, committed, tree in states(effects, root, since=since):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        put(tree, home)
        try:
            check(home, committed)
        except (CheckpointError, AssertionError) as error:
            raise AssertionError(f"after {number} effects, the last {effects[number - 1]}: {error}\n{list(tree)}") from error
        count += 1
    return count


@pytest.mark.parametrize("scenario", [first_save, the_only_step_again], ids=lambda scenario: scenario.__name__)
def test_killed_anywhere_then_a_crash(scenario: Callable[[Simulation], None], tmp_path: Path) -> None:
    """The machine goes on after a kill, the next run tidies up and saves again, and only then comes the crash.

    Names that the killed one had not flushed were relied on once: the only checkpoint's folder was emptied under its other name.
    """
    root, count = tmp_path / "disk", 0
    root.mkdir()
    simulation = Simulation(root, seed=len(scenario.__name__))
    scenario(simulation)
    renamed = [at + 1 for at, effect in enumerate(simulation.effects) if effect.kind == "rename"]
    for killed in sorted({*range(3, len(simulation.effects), 24), *renamed}):
        before, world = simulation.effects[:killed], World(root)
        for effect in before:
            if effect.kind != "done":
                world.take(effect)
        shutil.rmtree(root)
        root.mkdir()
        put(world.live(), root)
        after = Simulation(root, seed=killed, made=True)
        settle(after.disk, after.run)
        if killed in (3, renamed[0]):
            after.save(9, keep=1)
        count += sound_after([*before, *after.effects], root, tmp_path / "crash", since=killed)
    assert count >= 100, count
    print(f"{scenario.__name__}: {count} states")


def test_the_simulator_finds_protocols_that_are_wrong(tmp_path: Path) -> None:
    """Without a flush of the files, of the folder, or of the names; and with a deletion before the newer one is there."""
    root = tmp_path / "disk"
    root.mkdir()
    simulation = Simulation(root, seed=1)
    later_saves_and_retention(simulation)
    home = simulation.run / "checkpoints"
    first = next(at for at, effect in enumerate(simulation.effects) if effect.kind == "done")

    def found(effects: list[Effect]) -> bool:
        for _, committed, tree in states(effects, root):
            shutil.rmtree(tmp_path / "crash", ignore_errors=True)
            (tmp_path / "crash").mkdir()
            put(tree, tmp_path / "crash")
            try:
                check(tmp_path / "crash", committed)
            except (CheckpointError, AssertionError):
                return True
        return False

    effects = simulation.effects[: first + 1]
    assert not found(effects)
    assert found([effect for effect in effects if effect.kind != "sync"])
    assert found([effect for effect in effects if (effect.kind, effect.path.name[:5]) != ("sync_folder", ".step")])
    assert found([effect for effect in effects if (effect.kind, effect.path) != ("sync_folder", home)])
    assert found([effect for effect in effects if (effect.kind, effect.path) != ("sync_folder", simulation.run)])


def test_blocks_and_whole_are_hashed_alike_however_bytes_come() -> None:
    content = random.Random(3).randbytes(2 * BLOCK + 17)
    for cut in (1 << 12, BLOCK - 1, BLOCK, BLOCK + 1, len(content)):
        digest = Digest()
        for at in range(0, len(content), cut):
            digest.update(content[at : at + cut])
        assert digest.size == len(content) and digest.about == _about(content) and len(digest.blocks) == 3
        assert digest.blocks == [xxh3_128_hexdigest(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)]
    empty = Digest()
    empty.update(b"")
    assert empty.blocks == [] and empty.about == _about(b"")


def _about(content: bytes) -> dict[str, Any]:
    blocks = "".join(xxh3_128_hexdigest(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK))
    return {"bytes": len(content), "xxh128": xxh3_128_hexdigest(blocks.encode())}


class Forgetful(Disk):
    """A disk that loses a bit."""

    def sync(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_what_comes_back_wrong_is_never_committed(tmp_path: Path) -> None:
    written = {"a": Forgetful().write(tmp_path / "a", [b"weights"])}
    with pytest.raises(OSError, match="other bytes") as caught:
        flush(Forgetful(), tmp_path, written)
    assert caught.value.filename == str(tmp_path / "a")


def test_a_checkpoint_is_verified_without_torch(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, seed=0)
    simulation.save(3, keep=0)
    words = "['verify', sys.argv[1], '--json']"
    script = f"import sys; from dist_llm.cli.main import run; code = run({words}); sys.exit(code or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["step"] == 3
