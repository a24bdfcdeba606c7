"""Manifests, indices and headers that were never written by us, with true hashes: refused in one message or sound by another's rules.

The other is the oracle below: the safetensors library for headers, a count of every element for indices, a schema of its own
for manifests. Each find is a kept case.
"""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from xxhash import xxh3_128_hexdigest

from dist_llm.config.schema import Config, LayoutConfig
from dist_llm.errors import CheckpointError, UsageError
from dist_llm.strict import strict_json
from dist_llm.train.durable import BLOCK
from dist_llm.train.folder import open_checkpoint
from tests.small_checkpoints import reseal, rows_of, save_small, seal, take_up

WIDTH, CASES, LONG_CASES = 8, 2000, 100_000
MANIFEST, INDEX, DATA = "manifest.json", "rank-00001.json", "rank-00001.safetensors"
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 5, 7, -1, 0.0, 1.5, 1e308, 2**31, 2**40, 2**63, 2**70, -(2**63), "", "x", "a" * 64, "A" * 64),
    *("0" * 16, "../../etc/passwd", "/etc/passwd", "a.weight", "F32", "F64", "BF16", "I8", "\x00", "\x1b[2J", "\u202e", "\ud800", "é"),
    *("1", "weight/a.norm/0", [], {}, [[]], [0], [0, 1], [1, 0], [-1, 4], [[0, 4], [0, 4]], {"x": 1}, [None], ["a"], [1.0, 2.0]),
    *([True, True], [[0, 2**40]]),
)
TEXTS = (
    *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 5000, b"NaN", b"1" * 5000),
    b'{"version": 2, "version": 2}',
)


# --- mutation --------------------------------------------------------------------------------------------------------------


def spots(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The place of every value of a JSON tree."""
    yield path
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield from spots(value, (*path, key))


def mutated(tree: Any, chance: random.Random) -> Any:
    """One to three strange values, lost keys, new keys, exchanged values or lists of another length."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        *path, last = chance.choice([spot for spot in spots(tree) if spot])
        node = tree
        for key in path:
            node = node[key]
        match chance.randrange(7):
            case 0:
                del node[last]
            case 1 if isinstance(node, dict):
                node[chance.choice([*map(str, STRANGE), *node])] = node.pop(last)
            case 2 if isinstance(node, list):
                node.insert(chance.randrange(len(node) + 1), copy.deepcopy(node[last]))
            case 3 if isinstance(node[last], int):
                node[last] += chance.choice((-2, -1, 1, 2, 64))
            case 4:
                other = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
                node[last], node[other] = node[other], node[last]
            case _:
                node[last] = copy.deepcopy(chance.choice(STRANGE))
        if not [spot for spot in spots(tree) if spot]:
            break
    return tree


def text_of(tree: Any, chance: random.Random) -> bytes:
    """A tree as text; now and then the text itself is spoilt."""
    text = bytearray(json.dumps(tree).encode())
    kind = chance.randrange(12)
    if kind == 0:
        text[chance.randrange(len(text))] = chance.randrange(256)
    elif kind == 1:
        at = chance.randrange(len(text))
        del text[at : at + chance.randrange(1, 20)]
    elif kind == 2:
        at = chance.randrange(len(text))
        text[at:at] = text[at : at + chance.randrange(1, 40)]
    elif kind == 3 and chance.random() < 0.2:
        text = bytearray(chance.choice(TEXTS))
    return bytes(text)


# --- the oracle: what a sound checkpoint is, in other words ------------------------------------------------------------------


class NotSound(Exception):
    """The oracle's reason."""


def need(condition: Any, what: str) -> None:
    if not condition:
        raise NotSound(what)


def parsed(text: bytes) -> dict[str, Any]:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len({key for key, _ in found}) == len(found), "twice")
        return dict(found)

    try:
        tree = json.loads(str(text, "utf-8"), object_pairs_hook=pairs, parse_constant=lambda word: need(False, word))
    except (ValueError, RecursionError) as error:
        raise NotSound(str(error)) from None
    need(isinstance(tree, dict), "an object")
    return tree


def whole(value: Any, low: int = 0, high: int = 2**40) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def manifest_sound(text: bytes, original: dict[str, Any]) -> None:
    """Everything but step, seed, names of hashes, config and layout has one right value here."""
    tree = parsed(text)
    need(set(tree) == set(original), "keys")
    for key in ("version", "world", "rows", "files"):
        need(json.dumps(tree[key], sort_keys=True) == json.dumps(original[key], sort_keys=True) or key == "rows", key)
    need(sorted(map(json.dumps, tree["rows"])) == sorted(map(json.dumps, original["rows"])), "rows")
    need(whole(tree["step"]) and isinstance(tree["seed"], int) and not isinstance(tree["seed"], bool), "step, seed")
    for key, length in (("save_id", 16), ("tokenizer", 64), ("data", 64)):
        need(isinstance(tree[key], str) and len(tree[key]) == length and not set(tree[key]) - set("0123456789abcdef"), key)
    try:
        Config.model_validate(tree["config"])
        layout = LayoutConfig.model_validate(tree["layout"]).model_dump()
    except ValueError as error:
        raise NotSound(str(error)) from None
    need(set(tree["layout"]) == set(original["layout"]), "layout")
    need(prod(layout[axis] for axis in ("dp", "tp", "cp", "pp")) == 2, "layout")


def index_sound(text: bytes, other: dict[str, Any], data: bytes) -> None:
    """Hashes are those of the blocks, and both ranks' runs paint every element once, as `data` has them."""
    tree = parsed(text)
    need(set(tree) == {"blocks", "runs"} and isinstance(tree["runs"], dict), "keys")
    need(tree["blocks"] == [xxh3_128_hexdigest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)], "blocks")
    shapes = {row.name: row.shape for row in rows_of(WIDTH)}
    painted = {(kind, name): np.zeros(shape, int) for name, shape in shapes.items() for kind in ("weight", "first_moment")}
    tensors = dict(safetensors.deserialize(data))
    need(tensors.keys() == tree["runs"].keys(), "tensors")
    for runs, mine in ((tree["runs"], True), (other["runs"], False)):
        for key, run in runs.items():
            need(isinstance(run, dict) and set(run) == {"box", "start", "stop"} and key.count("/") == 2, "a run")
            kind, name, start = key.split("/")
            need((kind, name) in painted or (name in shapes and re.fullmatch(".*", kind)), "a name")
            box, low, high = run["box"], run["start"], run["stop"]
            need(isinstance(box, list) and len(box) == len(shapes[name]), "a box")
            need(all(isinstance(side, list) and len(side) == 2 and whole(side[0]) and whole(side[1]) for side in box), "a box")
            need(all(a < b <= extent for (a, b), extent in zip(box, shapes[name], strict=True)), "a box")
            need(whole(low) and whole(high) and low < high and start == str(low), "a range")
            part = painted.setdefault((kind, name), np.zeros(shapes[name], int))[tuple(slice(a, b) for a, b in box)]
            need(high <= part.size, "a range")
            need(not mine or tensors[key]["shape"] == [high - low], "a shape")
            flat = part.reshape(-1).copy()
            flat[low:high] += 1
            part[...] = flat.reshape(part.shape)
    need(all((counts == 1).all() for counts in painted.values()), "every element once")


def header_sound(data: bytes, runs: dict[str, Any]) -> None:
    """The safetensors library takes it, and it has the tensors of the index."""
    try:
        tensors = dict(safetensors.deserialize(data))
    except Exception as error:  # the library's own type
        raise NotSound(str(error)) from None
    need(tensors.keys() == runs.keys(), "tensors")
    for key, tensor in tensors.items():
        need(tensor["shape"] == [runs[key]["stop"] - runs[key]["start"]], "a shape")
        need(tensor["dtype"] in ("F64", "F32", "F16", "BF16"), "a dtype")


# --- the cases ---------------------------------------------------------------------------------------------------------------


class Target:
    """A checkpoint whose parts are exchanged for others with true hashes."""

    def __init__(self, home: Path) -> None:
        self.folder = save_small(home / "run", width=WIDTH)
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.manifest, self.index = json.loads(self.files[MANIFEST]), json.loads(self.files[INDEX])
        self.other = json.loads(self.files["rank-00000.json"])
        size = int.from_bytes(self.files[DATA][:8], "little")
        self.header, self.tensors = json.loads(self.files[DATA][8 : 8 + size]), self.files[DATA][8 + size :]

    def restore(self) -> None:
        for name, content in self.files.items():
            if (self.folder / name).read_bytes() != content:
                (self.folder / name).write_bytes(content)

    def manifest_case(self, text: bytes) -> Callable[[], None]:
        seal(self.folder, text)
        return lambda: manifest_sound(text, self.manifest)

    def index_case(self, text: bytes) -> Callable[[], None]:
        reseal(self.folder, {INDEX: text})
        return lambda: index_sound(text, self.other, self.files[DATA])

    def header_case(self, text: bytes, length: int | None = None) -> Callable[[], None]:
        data = (len(text) if length is None else length).to_bytes(8, "little") + text + self.tensors
        reseal(self.folder, {DATA: data})
        return lambda: header_sound(data, self.index["runs"])

    def outcome(self, oracle: Callable[[], None]) -> str:
        """`refused`, or `sound` where both say so. Raises AssertionError for anything else."""
        begun = time.monotonic()
        try:
            take_up(self.folder, rows_of(WIDTH))
            open_checkpoint(self.folder).verify()  # a resume compares blocks; this, whole files
        except (CheckpointError, UsageError) as error:
            assert error.code in (4, 2) and error.what and len(str(error.found)) < 1000
            return "refused"
        finally:
            assert time.monotonic() - begun < 20, "a hang"
        oracle()
        return "sound"


@pytest.fixture
def target(memory: Path) -> Iterator[Target]:
    home = memory / "target"
    home.mkdir()
    yield Target(home)
    shutil.rmtree(home)


def fuzz(target: Target, count: int, *, seed: int) -> dict[str, int]:
    chance, found = random.Random(seed), {"refused": 0, "sound": 0}
    for number in range(count):
        kind = ("manifest", "index", "header")[number % 3]
        text = text_of(mutated(getattr(target, kind), chance), chance)
        if kind == "header":
            text += b" " * (-len(text) % 8 if chance.random() < 0.9 else 0)
            oracle = target.header_case(text, chance.choice((0, 1, 8, 2**31, 2**63, 2**64 - 1)) if chance.random() < 0.05 else None)
        else:
            oracle = getattr(target, f"{kind}_case")(text)
        try:
            found[target.outcome(oracle)] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed}, {kind}: {text[:2000]!r}") from error
        target.restore()
    return found


def test_two_thousand_mutations(target: Target) -> None:
    found = fuzz(target, CASES, seed=11)
    assert found["refused"] > CASES // 2 and found["sound"] > CASES // 100, found
    print(found)


@pytest.mark.long
@pytest.mark.parametrize("tenth", range(10))
def test_a_hundred_thousand_mutations(target: Target, tenth: int) -> None:
    found = fuzz(target, LONG_CASES // 10, seed=1200 + tenth)
    assert sum(found.values()) == LONG_CASES // 10
    print(found)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_texts_that_are_no_objects(target: Target, text: bytes) -> None:
    for case in (target.manifest_case, target.index_case, target.header_case):
        assert target.outcome(case(text)) == "refused"
        target.restore()


def change(tree: dict[str, Any], path: str, value: Any) -> bytes:
    """The tree with one value exchanged, as text."""
    tree, (*keys, last) = copy.deepcopy(tree), path.split("|")
    node: Any = tree
    for key in keys:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[int(last) if isinstance(node, list) else last] = value
    return json.dumps(tree).encode()


def test_kept_cases(target: Target) -> None:
    """Each was taken for sound, or ended in a traceback, while this was made."""
    key = "weight/a.weight/24"
    assert key in target.index["runs"], list(target.index["runs"])
    for case in (
        lambda: target.index_case(change(target.index, f"runs|{key}|box", [[0, 4], [0, 9]])),  # a box beyond the tensor
        lambda: target.manifest_case(change(target.manifest, "layout|zero", "x")),
        lambda: target.manifest_case(change(target.manifest, "rows|0|1|0", True)),
    ):
        assert target.outcome(case()) == "refused"
        target.restore()


def test_elements_held_twice_in_the_place_of_others(target: Target) -> None:
    """Index and header agree, the count of elements is right, and eight of them would come from nowhere."""
    index, header = copy.deepcopy(target.index), {}
    index["runs"] = {key.replace("a.weight/24", "a.weight/16"): run for key, run in index["runs"].items()}
    for key, run in index["runs"].items():
        run.update({"start": 16, "stop": 24} if "a.weight" in key else {})
    for key, entry in target.header.items():
        header[key.replace("a.weight/24", "a.weight/16")] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + target.tensors
    index["blocks"] = [xxh3_128_hexdigest(data)]
    reseal(target.folder, {DATA: data, INDEX: json.dumps(index).encode()})
    with pytest.raises(CheckpointError, match="every element of weight a.weight once"):
        take_up(target.folder, rows_of(WIDTH))


@pytest.mark.parametrize("word", ["NaN", "-Infinity", "1e999", "-1e999"])
def test_a_number_that_is_not_finite_is_none(word: str) -> None:
    with pytest.raises(ValueError, match="the number"):
        strict_json(f'{{"a": [0.5, {word}]}}'.encode())
    assert strict_json(b"[1e308, -0.0, 1e-400]") == [1e308, 0.0, 0.0]
