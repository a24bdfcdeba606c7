"""A folder as Hugging Face lays it out, opened and judged before a weight is read. Torch-free.

    config.json                       the model                                (families.py)
    model.safetensors                 its tensors; or model.safetensors.index.json and the files that it names
    tokenizer.json and others         what is carried along                    (sidefiles.py)

Every tensor that our table needs must be there in its shape, and nothing else but what is known to mean nothing.
Weights in pickles are refused: reading them can run code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_llm.config.schema import ModelConfig
from dist_llm.errors import CheckpointError, UsageError
from dist_llm.interop.families import Place, place, read_config
from dist_llm.interop.safe_file import SafeFile, Stored, unsound
from dist_llm.model.table import Row, table
from dist_llm.sidefiles import read_beside
from dist_llm.strict import first_line, read_bounded, strict_json

CONFIG, ONE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
LARGEST_INDEX = 64 << 20  # bytes
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\.safetensors", re.ASCII)
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = ("F64", "F32", "BF16", "F16")
# Buffers that are computed, not learned: rotary frequencies, causal masks, position numbers.
IGNORED = re.compile(r"(.*\.)?(rotary_emb\.(original_)?inv_freq|h\.\d+\.attn\.(masked_)?bias|position_ids)")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
SAMPLE = 4096  # bytes of every tensor that its folder is known by
PIECE = 8 << 20  # bytes compared at a time


@dataclass(frozen=True)
class Source:
    """Where one of our tensors lies: rows [place.first, ...) of a tensor of a file, after transposing where it is transposed."""

    file: SafeFile
    stored: Stored
    place: Place
    shape: tuple[int, ...]  # ours


class HuggingFaceFolder:
    """An opened folder. model: as config.json has it; sources: by our names; beside: the files that are carried along.

    Raises UsageError for a model that ours is not, CheckpointError for files that are not sound or do not fit each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = _read_json(path / CONFIG)
        self.model = ModelConfig.model_validate(read_config(self.values, where=str(path / CONFIG)))
        self.files: dict[str, SafeFile] = {}
        try:
            found = self._tensors()
            self.sources = self._placed(found)
            self._refuse_others(found)
            self.beside = read_beside(path)
        except BaseException:
            self.close()
            raise

    @property
    def bytes_read(self) -> int:
        """Bytes read of the weights' files so far, headers among them."""
        return sum(file.bytes_read for file in self.files.values())

    def identity(self) -> str:
        """A hash of the config, and of each file's header, size and the first bytes of each of its tensors.

        Not of all bytes: a rank that holds a part of a large model reads no more than its part.
        """
        total = hashlib.sha256((self.path / CONFIG).read_bytes())
        for name, file in sorted(self.files.items()):
            total.update(f"{name} {file.size} ".encode() + file.header)
            for one in sorted(file.tensors.values(), key=lambda one: one.start):
                total.update(file.read(one.start, one.start + min(SAMPLE, one.bytes)))
        return total.hexdigest()

    def close(self) -> None:
        """Lets the files go."""
        for file in self.files.values():
            file.close()
        self.files.clear()

    def _tensors(self) -> dict[str, tuple[SafeFile, Stored]]:
        """key -> (file, place in it) of every tensor of every file."""
        index = self._index()
        for name in sorted(set(index.values())) if index is not None else [ONE]:
            if not (self.path / name).exists():
                expected = f"a file that {INDEX} names" if index is not None else f"{ONE}, or {INDEX} and the files that it names"
                raise unsound("a file of weights is missing", self.path / name, expected=expected, found="no such file")
            self.files[name] = SafeFile(self.path / name)
        found: dict[str, tuple[SafeFile, Stored]] = {}
        for name, file in self.files.items():
            for key, stored in file.tensors.items():
                if key in found:
                    also = f"{key}, also in {found[key][0].path.name}"
                    raise unsound("a tensor is in two files", file.path, expected="each tensor once", found=also)
                if index is not None and index.get(key) != name:
                    says = f"{key}: {INDEX} " + (f"puts it into {index[key]}" if key in index else "does not name it")
                    raise unsound("a file of weights does not fit its index", file.path, expected="the tensors of the index", found=says)
                found[key] = file, stored
        for key, name in (index or {}).items():
            if key not in found:
                raise unsound("a file of weights does not fit its index", self.path / name, expected=key, found="no such tensor")
        return found

    def _index(self) -> dict[str, str] | None:
        """key -> file name of an index, None where all lies in one file. No name leads out of the folder."""
        if (self.path / ONE).exists():
            return None
        if not (self.path / INDEX).exists():
            _refuse_pickles(self.path)
            return None
        path = self.path / INDEX
        names = _read_json(path).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise unsound("the index of the weights is not sound", path, expected="weight_map: a table of tensors and files")
        for key, name in names.items():
            if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
                expected = "the name of a safetensors file in the same folder"
                raise unsound("the index of the weights leads elsewhere", path, expected=expected, found=f"{key}: {name!r}")
        return names

    def _placed(self, found: dict[str, tuple[SafeFile, Stored]]) -> dict[str, Source]:
        """Our tensors in theirs. Raises CheckpointError where one is missing, or has another shape or dtype."""
        rows, places = table(self.model), places_of(self.model)
        wanted = stored_shapes(rows, places)
        if missing := [key for key in wanted if key not in found]:
            bare = {key: key.split(".", 1)[-1] for key in wanted}
            if not any(bare[key] in found for key in missing):
                raise self._misses(missing, wanted)
            places = {name: replace(one, key=one.key if one.key in found else bare[one.key]) for name, one in places.items()}
            wanted = stored_shapes(rows, places)
            if missing := [key for key in wanted if key not in found]:
                raise self._misses(missing, wanted)
        for key, shape in wanted.items():
            file, stored = found[key]
            if stored.shape != shape:
                expected = f"{key}: {list(shape)}"
                raise unsound("a tensor has another shape than its model", file.path, expected=expected, found=f"{list(stored.shape)}")
            if stored.dtype not in DTYPES:
                expected = f"{key}: {' or '.join(DTYPES)}"
                raise unsound("a tensor has a dtype that cannot be trained", file.path, expected=expected, found=stored.dtype)
        return {row.name: Source(*found[places[row.name].key], places[row.name], row.shape) for row in rows}

    def _misses(self, missing: list[str], wanted: dict[str, tuple[int, ...]]) -> CheckpointError:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        expected = f"{missing[0]} {list(wanted[missing[0]])}{more}"
        where = ", ".join(sorted(self.files)[:3]) + (", ..." if len(self.files) > 3 else "")
        return unsound("the folder lacks tensors of its model", self.path / where, expected=expected, found="no such tensor")

    def _refuse_others(self, found: dict[str, tuple[SafeFile, Stored]]) -> None:
        """Raises CheckpointError for a tensor that the model does not have, or a tied one that is given twice and not alike."""
        used, head = {source.place.key for source in self.sources.values()}, _tied_head(self.model)
        for key in found.keys() - used:
            if IGNORED.fullmatch(key):
                continue
            file, stored = found[key]
            if key != head:
                expected, seen = f"the tensors of {self.values['model_type']} as {CONFIG} describes it", f"{key} {list(stored.shape)}"
                raise unsound("the folder has a tensor that its model does not", file.path, expected=expected, found=seen)
            table_of = self.sources["embedding.weight"]
            given, tied = (f"{one.dtype} {list(one.shape)}" for one in (stored, table_of.stored))
            if given != tied or not _equal(file, stored, table_of.file, table_of.stored):
                expected = f"{key} equal to {table_of.place.key}, as tie_word_embeddings says"
                seen = "other numbers" if given == tied else f"{given} beside {tied}"
                way = f"where the head was trained apart, tie_word_embeddings: false in {self.path / CONFIG}"
                raise unsound("a tied weight is given twice, and differs", file.path, expected=expected, found=seen, next=way)


def no_folder(path: Path) -> tuple[str, str | None]:
    """What is said of a folder that is not there, and where its name is one of the hub the command that makes it."""
    if path.exists() or not HUB_NAME.fullmatch(str(path)) or path.parent.exists():
        return "a file" if path.exists() else "no such folder", None
    return "no such folder; a name of the hub, it seems, and no model is downloaded here", f"hf download {path} --local-dir {path.name}"


def is_hugging_face(path: Path) -> bool:
    """Whether a folder looks like one of Hugging Face's, and not like a run or step of ours."""
    return (path / CONFIG).is_file() and not (path / "checkpoints").exists() and not (path / "manifest.json").exists()


def places_of(model: ModelConfig) -> dict[str, Place]:
    """Our name -> where Hugging Face keeps the tensor, for the whole table."""
    return {row.name: place(model, row.name) for row in table(model)}


def stored_shapes(rows: Iterable[Row], places: dict[str, Place]) -> dict[str, tuple[int, ...]]:
    """key -> shape of every tensor that Hugging Face keeps, in the order of the table; ours cover each of them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row in rows:
        one = places[row.name]
        last = one.first + row.shape[0]
        before = shapes.get(one.key)
        if before is not None:
            last = max(last, before[1] if one.transposed else before[0])
        shapes[one.key] = (*row.shape[1:], last) if one.transposed else (last, *row.shape[1:])
    return shapes


def _tied_head(model: ModelConfig) -> str | None:
    """The name of the output head that a tied model need not have."""
    return place(model.model_copy(update={"tied": False}), "head.weight").key if model.tied else None


def _equal(one: SafeFile, first: Stored, other: SafeFile, second: Stored) -> bool:
    """Whether two tensors hold the same bytes."""
    return all(
        one.read(first.start + at, first.start + stop) == other.read(second.start + at, second.start + stop)
        for at, stop in _pieces(first.bytes)
    )


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    for at in range(0, size, PIECE):
        yield at, min(at + PIECE, size)


def _refuse_pickles(folder: Path) -> None:
    """Raises UsageError where the weights are there, but as pickles."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickles:
        raise UsageError(
            "these weights are pickled: reading them can run any code",
            where=str(folder / pickles[0]),
            expected=f"{ONE}, or {INDEX}",
            found=", ".join(pickles[:3]),
            next=f"where you trust them, in Python: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(OTHER)",
        )


def _read_json(path: Path) -> dict[str, Any]:
    """An object of JSON. Raises CheckpointError."""
    try:
        content = read_bounded(path, LARGEST_INDEX + 1)
        assert len(content) <= LARGEST_INDEX, f"more than {LARGEST_INDEX >> 20} MiB"
        values = strict_json(content)
        assert type(values) is dict, "no table of values"
        return values
    except OSError as error:
        expected = "a folder as Hugging Face lays it out"
        raise unsound("a file cannot be read", path, expected=expected, found=error.strerror) from None
    except (ValueError, AssertionError, RecursionError) as error:
        raise unsound("a file is not sound", path, expected="JSON", found=first_line(error)) from None
