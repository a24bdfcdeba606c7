"""Builds that are killed: nothing under the final name, the next one goes on from there, and the bytes are those of a calm one (F7)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dist_llm import faults
from dist_llm.data import build as building
from dist_llm.data import journal, shards
from dist_llm.data.build import build_store
from dist_llm.data.corpora import Corpus
from dist_llm.data.publish import NOTE, publish
from dist_llm.data.readers import Document
from dist_llm.data.sealed import checked, seal
from dist_llm.data.store import TokenStore
from dist_llm.data.tokenizer import Tokenizer, bytes_tokenizer
from dist_llm.errors import DataError
from tests.commands import Commands, Result
from tests.test_store import snapshot


class Counting(Tokenizer):
    """The bytes of a text, without the library's threads, which a fork does not survive; counts the texts."""

    texts = 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.texts += len(texts)
        return [list(text.encode()) for text in texts]


def words(number: int) -> str:
    return " ".join(hashlib.sha256(f"{number}/{turn}".encode()).hexdigest()[: 3 + turn % 5] for turn in range(5 + number % 40))


TEXTS = [words(number) for number in range(200)]
CORPUS = Corpus("texts", ("texts",), lambda: (Document(text, f"text:{i}", i / 200) for i, text in enumerate(TEXTS)), 20_000)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A note every 4,000 tokens, a list of documents every 1,000 letters."""
    monkeypatch.setattr(building, "ENCODED_AT_ONCE", 1000)
    monkeypatch.setattr(journal, "KEPT_EVERY", 4000)
    yield
    faults.arm(None)


class Build:
    """One data set: how many texts it encoded, what it told and noted."""

    def __init__(self, home: Path, corpus: Corpus = CORPUS, **settings: Any) -> None:
        self.home, self.corpus, self.settings = home, corpus, {"validation": 0.1, "shard_tokens": 3000, **settings}
        self.tokenizer = Counting(bytes_tokenizer().inner)
        self.told: list[str] = []
        self.notes: list[str] = []

    def __call__(self, *, waiting: Callable[[], object] = lambda: None) -> bool:
        return publish(self.home, self.make, waiting=waiting)

    def make(self, made: Path) -> None:
        progress, note = (lambda message, place: self.told.append(message)), made.parent / NOTE
        self.notes = build_store(self.corpus, self.tokenizer, made, progress=progress, note=note, **self.settings)
        self.tokenizer.save(made)
        seal(made, key="texts")

    @property
    def workshop(self) -> Path:
        return self.home.parent / f".{self.home.name}.partial"

    @property
    def kept(self) -> dict[str, Any]:
        """What the note says."""
        path = self.workshop / NOTE
        return (checked(path.read_bytes()) if path.exists() else None) or {"documents": 0, "tokens": 0}


@pytest.fixture
def calm(tmp_path: Path) -> dict[str, bytes]:
    """The bytes of a build that nobody disturbs."""
    build = Build(tmp_path / "calm")
    assert build() and build.tokenizer.texts == len(TEXTS) and not build.notes and os.listdir(tmp_path) == ["calm"]
    assert len(TokenStore(build.home / "train").manifest.shards) == 9 and TokenStore(build.home / "validation").manifest.documents > 10
    return snapshot(build.home)


def forked(work: Callable[[], object]) -> int:
    """The number of a process that does some work and ends with 10, or 11 when that was true."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 10 + (work() is True)
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(build: Build, point: str) -> None:
    """Has a process killed that builds."""

    def work() -> None:
        faults.arm(point)
        build()

    assert ended(forked(work)) == -signal.SIGKILL, point
    assert not build.home.exists() and build.workshop.is_dir(), "nothing under the final name"


POINTS = (
    *("data.shard:0:0", "data.shard:0:2", "data.shard:0:5", "data.shard:0:8", "data.note:0:0", "data.note:0:1", "data.note:0:3"),
    *("data.index:0:0", "data.rename:0:0"),
)


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_build_is_gone_on_with(tmp_path: Path, calm: dict[str, bytes], point: str) -> None:
    build = Build(tmp_path / "home")
    kill_at(build, point)
    kept = build.kept
    assert build() and build.tokenizer.texts == len(TEXTS) - kept["documents"], "what was kept is not encoded again"
    assert snapshot(build.home) == calm and sorted(os.listdir(tmp_path)) == ["calm", "home"]
    if kept["tokens"]:
        words = f"{kept['tokens']:,} tokens"
        assert build.notes == [f"an interrupted build of texts was gone on with: {words} were there"]
        assert build.told[0] == f"texts: {words} taken up from an interrupted build"
    assert bool(kept["tokens"]) == (point not in ("data.shard:0:0", "data.note:0:0"))


def test_killed_again_and_again(tmp_path: Path, calm: dict[str, bytes]) -> None:
    build = Build(tmp_path / "home")
    for point in ("data.note:0:1", "data.note:0:1", "data.shard:0:4", "data.note:0:1", "data.index:0:0", "data.rename:0:0"):
        before = build.kept["documents"]
        kill_at(build, point)
        assert build.kept["documents"] >= before
    assert build() and snapshot(build.home) == calm
    assert build.tokenizer.texts < len(TEXTS) / 4


EFFECTS = ((shards.HashedFile, "write"), (shards.HashedFile, "sync"), (Path, "replace"), (Path, "rename"), (Path, "unlink"), (os, "fsync"))


def kill_before(count: int) -> list[int]:
    """Kills this process before effect number `count` on the disk; the list's one number says how many there were."""
    seen = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            seen[0] += 1
            if seen[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return counting

    for owner, name in EFFECTS:
        setattr(owner, name, counted(getattr(owner, name)))
    return seen


def effects_of(build: Build) -> int:
    """How many effects a calm build has."""
    reader, writer = os.pipe()

    def work() -> None:
        seen = kill_before(0)
        build()
        os.write(writer, str(seen[0]).encode())

    assert ended(forked(work)) == 10
    shutil.rmtree(build.home)
    return int(os.read(reader, 20))


def kill_everywhere(tmp_path: Path, calm: dict[str, bytes], every: int) -> None:
    total = effects_of(Build(tmp_path / "home"))
    assert total > 200
    for count in range(1, total + 1, every):
        build = Build(tmp_path / "home")

        def work(build: Build = build, count: int = count) -> None:
            kill_before(count)
            build()

        assert ended(forked(work)) == -signal.SIGKILL, count
        assert build.home.exists() <= (count > total - 5), "named only when all is done"
        build()
        assert snapshot(build.home) == calm and not build.workshop.exists(), count
        shutil.rmtree(build.home)


def test_killed_before_any_effect_on_the_disk(tmp_path: Path, calm: dict[str, bytes]) -> None:
    kill_everywhere(tmp_path, calm, 23)


@pytest.mark.long
def test_killed_before_every_effect_on_the_disk(tmp_path: Path, calm: dict[str, bytes]) -> None:
    kill_everywhere(tmp_path, calm, 1)


def test_what_was_left_is_damaged_and_so_not_taken_up(tmp_path: Path, calm: dict[str, bytes]) -> None:
    build = Build(tmp_path / "home")
    kill_at(build, "data.note:0:3")
    files = [path for path in build.workshop.rglob("*") if path.is_file() and path.name not in ("lock", "note.new")]
    assert len(files) > 8
    left, keep = {path: path.read_bytes() for path in files}, tmp_path / "keep"
    shutil.copytree(build.workshop, keep)
    for path in files:
        for broken in (bytes([left[path][0] ^ 1]) + left[path][1:], left[path][:1], None):
            again = Build(tmp_path / "home")
            shutil.rmtree(again.workshop, ignore_errors=True)
            shutil.copytree(keep, again.workshop)
            path.unlink() if broken is None else path.write_bytes(broken)
            assert again() and snapshot(again.home) == calm, path
            assert again.tokenizer.texts == len(TEXTS) or "tokens-" in path.name, path  # a shard that came after the note is not looked at
            shutil.rmtree(again.home)


def test_other_settings_do_not_go_on_with_it(tmp_path: Path) -> None:
    settings = {"shard_tokens": 2000, "max_tokens": 15_000, "validation": 0.2}
    Build(tmp_path / "calm", **settings)()
    build = Build(tmp_path / "home")
    kill_at(build, "data.note:0:2")
    other = Build(tmp_path / "home", **settings)
    assert other() and not other.notes and snapshot(other.home) == snapshot(tmp_path / "calm")


def test_a_text_that_has_become_shorter(tmp_path: Path) -> None:
    build = Build(tmp_path / "home")
    kill_at(build, "data.note:0:3")
    documents = build.kept["documents"]
    short = Corpus("texts", CORPUS.identity, lambda: (Document(text, "x") for text in TEXTS[: documents - 1]), 1)
    with pytest.raises(DataError, match="not what it was"):
        Build(tmp_path / "home", short)()
    assert not os.listdir(tmp_path), "nothing to go on with: the next build begins anew"


def test_an_interrupt_leaves_what_can_be_gone_on_with(tmp_path: Path, calm: dict[str, bytes]) -> None:
    for after, left in ((10, False), (150, True)):

        def documents(after: int = after) -> Iterator[Document]:
            for number, document in enumerate(CORPUS.documents()):
                if number == after:
                    raise KeyboardInterrupt
                yield document

        build = Build(tmp_path / "home", Corpus("texts", CORPUS.identity, documents, 20_000))
        with pytest.raises(KeyboardInterrupt):
            build()
        assert not build.home.exists() and build.workshop.exists() == left
    build = Build(tmp_path / "home")
    assert build() and snapshot(build.home) == calm and build.tokenizer.texts < 120


# ---------------------------------------------------------------- at once


def test_one_waits_and_goes_on_when_the_other_is_killed(tmp_path: Path, calm: dict[str, bytes]) -> None:
    first, second, third = Build(tmp_path / "home"), Build(tmp_path / "home"), Build(tmp_path / "other")

    def stopped() -> None:
        faults.arm("data.note:0:2:SIGSTOP")
        first()

    holder = forked(stopped)
    assert os.WIFSTOPPED(os.waitpid(holder, os.WUNTRACED)[1])
    assert third() and snapshot(third.home) == calm, "another data set is built meanwhile"
    reader, writer = os.pipe()
    waiter = forked(lambda: second(waiting=lambda: os.write(writer, b"waits")) and second.tokenizer.texts < 150)
    assert os.read(reader, 9) == b"waits" and not first.home.exists()
    os.kill(holder, signal.SIGKILL)
    assert ended(holder) == -signal.SIGKILL and ended(waiter) == 11
    assert snapshot(first.home) == calm and not first.workshop.exists()


def test_many_at_once_make_one(tmp_path: Path, calm: dict[str, bytes]) -> None:
    for _ in range(5):
        children = [forked(Build(tmp_path / "home")) for _ in range(6)]
        assert sorted(map(ended, children)) == [10] * 5 + [11]
        assert snapshot(tmp_path / "home") == calm and sorted(os.listdir(tmp_path)) == ["calm", "home"]
        shutil.rmtree(tmp_path / "home")


# ---------------------------------------------------------------- through the shell


def shell(commands: Commands, folder: Path, fault: str = "") -> Result:
    where = ["configs/tiny.yaml", "data.source=skills", f"data.dir={folder}", "data.max_tokens=20_000"]
    return commands.run("data", "build", *where, **({"DIST_LLM_FAULT": fault} if fault else {}))


def test_killed_through_the_shell(commands: Commands, tmp_path: Path) -> None:
    assert shell(commands, tmp_path / "data", "data.shard:0:0").returncode == 128 + signal.SIGKILL
    (left,) = (tmp_path / "data").iterdir()
    assert left.name.startswith(".skills-") and left.name.endswith(".partial"), "nothing under the final name"
    for folder in ("data", "calm"):
        done = shell(commands, tmp_path / folder)
        assert done.returncode == 0, done.stderr
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "calm")


def test_clean_removes_what_nobody_holds(tmp_path: Path, commands: Commands) -> None:
    """Interrupted builds go, one that runs and what is complete stay; nothing outside, nothing through a link."""
    config, home, outside = tmp_path / "run.yaml", tmp_path / "data", tmp_path / "outside"
    config.write_text(
        "model: {family: llama, layers: 1, dim: 16, heads: 2}\n"
        f"data: {{source: skills, tokenizer: {{kind: bytes}}, sequence: 16, max_tokens: 2000, dir: {home}}}\n"
    )
    assert commands.run("data", "build", str(config)).returncode == 0
    complete = snapshot(home)
    outside.mkdir()
    (outside / "kept").write_text("mine")
    for name in ("left-0123456789ab", "held-0123456789ab"):
        (home / f".{name}.partial" / "made" / "train").mkdir(parents=True)
        (home / f".{name}.partial" / "made" / "train" / "tokens-00000.bin").write_bytes(bytes(1000))
    (home / ".left-0123456789ab.partial" / "link").symlink_to(outside)
    (home / ".gone-0123456789ab.partial").symlink_to(outside)
    (home / ".other.partial").mkdir()
    with (home / ".held-0123456789ab.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = json.loads(commands.run("data", "clean", str(config), "--json").stdout)
        assert [Path(path).name for path in answer["removed"]] == [".left-0123456789ab.partial"] and answer["freed_bytes"] > 1000
        assert [Path(path).name for path in answer["in_use"]] == [".held-0123456789ab.partial"]
    assert (outside / "kept").read_text() == "mine"
    assert (home / ".gone-0123456789ab.partial").is_symlink() and (home / ".other.partial").is_dir()
    done = commands.run("data", "clean", str(config))
    assert done.returncode == 0 and "removed" in done.stdout and ".held-" in done.stdout
    assert snapshot(home) == complete
    assert commands.run("data", "clean", str(config), f"data.dir={tmp_path}/nothing").returncode == 0
