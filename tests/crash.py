"""A crash simulator, without torch: the effects of a save are recorded, and every state a crash can leave is made again.

After a crash, bytes are there for certain that `sync` has flushed, and names that `sync_folder` has. Other bytes of a file may
be there, be lost, be cut or be zeros; of other changes of a folder's names any may be there and any may not.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_llm.train.durable import Bytes, Digest, Disk

FATES = ("whole", "lost", "cut", "zeros")  # of bytes that were not flushed
MANY = 5  # unflushed changes of names of which every subset is tried


@dataclass(frozen=True)
class Effect:
    """One effect: make, write (a chunk), sync, sync_folder, rename, remove; `done` only marks that a step is committed."""

    kind: str
    path: Path
    more: Any = None


class Recorder(Disk):
    """Does what a Disk does, and keeps a list of it."""

    def __init__(self, effects: list[Effect]) -> None:
        super().__init__()
        self.effects = effects

    def note(self, kind: str, path: Path, more: Any = None) -> None:
        self.effects.append(Effect(kind, path, more))

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.note("make", path)

    def write(self, path: Path, chunks: Iterable[Bytes]) -> Digest:
        kept = [bytes(chunk) for chunk in chunks]
        digest = super().write(path, kept)
        self.note("make", path, "file")
        for chunk in kept:
            self.note("write", path, chunk)
        return digest

    def sync(self, path: Path) -> None:
        super().sync(path)
        self.note("sync", path)

    def sync_folder(self, path: Path) -> None:
        super().sync_folder(path)
        self.note("sync_folder", path)

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        self.note("rename", old, new)

    def remove(self, path: Path) -> None:
        super().remove(path)
        self.note("remove", path)

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self.note("remove", path)


@dataclass
class Node:
    """A file or a folder, whatever its name. names: changes of a folder's names, in order, flushed ones first in `kept`."""

    is_file: bool
    content: bytes = b""
    flushed: int = 0  # bytes
    names: dict[str, Node] = field(default_factory=dict)  # as a process sees them
    kept: dict[str, Node] = field(default_factory=dict)  # as the disk has them for certain
    pending: list[dict[str, Node | None]] = field(default_factory=list)

    def change(self, **names: Node | None) -> None:
        """Gives and takes names at once."""
        _apply(self.names, names)
        self.pending.append(names)


def _apply(names: dict[str, Node], change: dict[str, Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class World:
    """The file system under `root` after some effects."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Node(is_file=False)
        self.folders = [self.top]
        self.files: list[Node] = []

    def at(self, path: Path) -> Node:
        """The node a path means now."""
        node = self.top
        for part in path.relative_to(self.root).parts:
            node = node.names[part]
        return node

    def take(self, effect: Effect) -> None:
        """One more effect."""
        path = effect.path
        match effect.kind:
            case "make":
                node = Node(is_file=effect.more == "file")
                (self.files if node.is_file else self.folders).append(node)
                self.at(path.parent).change(**{path.name: node})
            case "write":
                self.at(path).content += effect.more
            case "sync":
                self.at(path).flushed = len(self.at(path).content)
            case "sync_folder":
                folder = self.at(path)
                folder.kept, folder.pending = dict(folder.names), []
            case "rename":
                self.at(path.parent).change(**{path.name: None, effect.more.name: self.at(path)})
            case "remove":
                self.at(path.parent).change(**{path.name: None})

    def crashes(self, chance: random.Random) -> Iterator[dict[str, bytes | None]]:
        """Trees that a crash may leave now: path -> content, None for a folder."""
        loose = [(folder, number) for folder in self.folders for number in range(len(folder.pending))]
        for fate in FATES:
            for chosen in _subsets(len(loose), chance, few=fate != "whole"):
                there = {(id(folder), number) for (folder, number), is_there in zip(loose, chosen, strict=True) if is_there}
                yield dict(self._tree(self.top, "", fate, there))

    def live(self) -> dict[str, bytes | None]:
        """The tree as processes see it, after one was killed and the machine goes on."""
        every = {(id(folder), number) for folder in self.folders for number in range(len(folder.pending))}
        return dict(self._tree(self.top, "", "whole", every))

    def _tree(self, folder: Node, prefix: str, fate: str, there: set[tuple[int, int]]) -> Iterator[tuple[str, bytes | None]]:
        names = dict(folder.kept)
        for number, change in enumerate(folder.pending):
            if (id(folder), number) in there:
                _apply(names, change)
        for name, node in sorted(names.items()):
            if node.is_file:
                yield prefix + name, _left(node, fate)
            else:
                yield prefix + name, None
                yield from self._tree(node, f"{prefix}{name}/", fate, there)


def _left(node: Node, fate: str) -> bytes:
    sure, loose = node.content[: node.flushed], node.content[node.flushed :]
    return sure + {"whole": loose, "lost": b"", "cut": loose[: len(loose) // 2], "zeros": bytes(len(loose))}[fate]


def _subsets(count: int, chance: random.Random, *, few: bool) -> Iterator[tuple[bool, ...]]:
    """Which of `count` changes are there: all subsets of a small number; else none, all, each one alone or missing, and some by chance."""
    if count <= MANY and not few:
        yield from itertools.product((False, True), repeat=count)
        return
    yield (False,) * count
    yield (True,) * count
    for number in range(0 if few else count):
        yield tuple(at == number for at in range(count))
        yield tuple(at != number for at in range(count))
    for _ in range(2 if few else 6):
        yield tuple(chance.random() < 0.5 for _ in range(count))


def put(tree: dict[str, bytes | None], root: Path) -> None:
    """Makes a tree on the real disk."""
    for name, content in tree.items():
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
