"""A checkpoint of any layout becomes a Hugging Face folder: safetensors shards, and the texts of exporting_texts.py.

Tensors pass through one after the other, each block of the checkpoint compared with its hash on the way; the folder appears complete
or not at all.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_llm.config.schema import ModelConfig
from dist_llm.data.publish import publish, require_new
from dist_llm.data.tokenizer import load
from dist_llm.errors import NumericError
from dist_llm.interop.ends import ends_of_answers
from dist_llm.interop.exporting_texts import as_json, texts_of
from dist_llm.interop.families import Place, write_config
from dist_llm.interop.hugging_face import INDEX, ONE, places_of, stored_shapes
from dist_llm.interop.slices import NAMES, PIECE, TORCH
from dist_llm.model.table import Row, table
from dist_llm.sharding import Box
from dist_llm.train.durable import Bytes, Disk
from dist_llm.train.folder import Checkpoint
from dist_llm.train.nonfinite import finite
from dist_llm.train.storage import storing

WORDS = {TORCH[name]: word for name, word in (("F64", "float64"), ("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16"))}


@dataclass(frozen=True)
class Whole:
    """A tensor as it will be stored: its key, shape and dtype, and our rows that it is made of, in its order."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: tuple[tuple[Row, Place], ...]

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return prod(self.shape) * self.dtype.itemsize


class Weights(Protocol):
    """Weights of which pieces and wholes can be read, and their dtypes."""

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a global tensor, (stop - start,) on the CPU."""

    def whole(self, name: str) -> Tensor:
        """A whole weight, on the CPU."""

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """The dtype in which a tensor is kept."""


@dataclass(frozen=True)
class Subject:
    """What is exported. path: the folder of its tokenizer; beside: files that are carried along; sequence: tokens it was trained to see.

    ends: the ids that end an answer, where it was trained on conversations.
    """

    path: Path
    model: ModelConfig
    weights: Weights
    beside: Mapping[str, bytes]
    sequence: int
    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, opened: Checkpoint) -> Subject:
        """A checkpoint of ours."""
        sequence, ends = opened.config.data.sequence, ends_of_answers(opened)
        return cls(opened.path, opened.config.model, opened.parts, opened.beside, sequence, ends)


@dataclass(frozen=True)
class Exported:
    """What was made."""

    path: Path
    family: str
    parameters: int
    bytes: int
    files: int


def export_checkpoint(opened: Checkpoint, target: Path, **options: Any) -> Exported:
    """`export_model` of a checkpoint of ours."""
    return export_model(Subject.of(opened), target, **options)


def export_model(
    opened: Subject,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_size: int,
    check: Callable[[Path], object] = lambda folder: None,
) -> Exported:
    """Writes the Hugging Face folder `target`. dtype: of all weights; None: each as it is. shard_size: bytes of a file, at most.

    check: looks at the folder before it gets its name; where it raises there is none. Raises UsageError for a model that no
    family of transformers can express, or a target that is there; CheckpointError for a damaged checkpoint; NumericError for a weight
    beyond the range of `dtype`; SpaceError.
    """
    model = opened.model
    values = write_config(model)
    require_new(target)
    wholes = planned(model, dtype_of=lambda name: dtype or opened.weights.dtype("weight", name))
    shards = cut(wholes, shard_size)
    names = [ONE] if len(shards) == 1 else [f"model-{at + 1:05d}-of-{len(shards):05d}.safetensors" for at in range(len(shards))]
    sizes = [sum(one.bytes for one in shard) for shard in shards]
    about: dict[str, Any] = {"values": values, "dtype": _common(wholes), "sequence": opened.sequence, "ends": opened.ends}
    texts = texts_of(model, opened.beside, tokenizer=load(opened.path), **about)
    if len(shards) > 1:
        weight_map = {one.key: name for name, shard in zip(names, shards, strict=True) for one in shard}
        texts[INDEX] = as_json({"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))})

    def make(made: Path) -> None:
        disk = Disk()
        for name, shard in zip(names, shards, strict=True):
            _write(disk, made / name, _chunks(shard, opened))
        for name, content in texts.items():
            _write(disk, made / name, iter([content]))
        check(made)

    with storing(target):
        publish(target, make)
    parameters = sum(prod(one.shape) for one in wholes)
    return Exported(target, values["model_type"], parameters, sum(sizes), len(names) + len(texts))


def planned(model: ModelConfig, *, dtype_of: Callable[[str], torch.dtype]) -> list[Whole]:
    """The tensors of a model's folder in the order of our table."""
    rows, places = table(model), places_of(model)
    found = []
    for key, shape in stored_shapes(rows, places).items():
        own = sorted(((row, places[row.name]) for row in rows if places[row.name].key == key), key=lambda pair: pair[1].first)
        dtype = dtype_of(own[0][0].name)
        for row, _ in own[1:]:
            dtype = torch.promote_types(dtype, dtype_of(row.name))
        found.append(Whole(key, shape, dtype, tuple(own)))
    return found


def cut(wholes: list[Whole], limit: int) -> list[list[Whole]]:
    """Neighbours put into files of at most `limit` bytes; a larger tensor has a file of its own. In a file, wide elements come first."""
    shards: list[list[Whole]] = []
    size = 0
    for one in wholes:
        if not shards or size + one.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += one.bytes
    return [sorted(shard, key=lambda one: -one.dtype.itemsize) for shard in shards]


def _common(wholes: list[Whole]) -> str:
    """The dtype of most of the weights, as config.json calls it."""
    counts: dict[torch.dtype, int] = {}
    for one in wholes:
        counts[one.dtype] = counts.get(one.dtype, 0) + prod(one.shape)
    return WORDS[max(counts, key=lambda dtype: counts[dtype])]


def _chunks(shard: list[Whole], opened: Subject) -> Iterator[Bytes]:
    """The bytes of one safetensors file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for one in shard:
        entries[one.key] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [at, at + one.bytes]}
        at += one.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for one in shard:
        for values in _values(one, opened):
            yield rounded(values, one.dtype, where=one.key).contiguous().view(-1).view(torch.uint8).numpy().data


def rounded(values: Tensor, dtype: torch.dtype, *, where: str) -> Tensor:
    """Weights in another dtype. Raises NumericError for one that is beyond its range."""
    cast = values.to(dtype)
    if dtype != values.dtype and not finite(cast) and finite(values):
        what, expected = f"a weight is too large for {WORDS[dtype]}", f"at most {torch.finfo(dtype).max:g}"
        found, way = f"{float(values.abs().max()):.3g} in {where}", "leave --dtype out, or name one with a wider range: bfloat16"
        raise NumericError(what, where=where, expected=expected, found=found, safe="nothing was written", next=way)
    return cast


def _values(one: Whole, opened: Subject) -> Iterator[Tensor]:
    """The elements of a tensor in its own order: pieces of our rows, or all of it at once where it lies transposed."""
    if any(place.transposed for _, place in one.rows):
        yield torch.cat([opened.weights.whole(row.name) for row, _ in one.rows]).t()
        return
    for row, _ in one.rows:
        box = tuple((0, extent) for extent in row.shape)
        for at in range(0, row.numel, PIECE):
            yield opened.weights.read("weight", row.name, box, at, min(at + PIECE, row.numel))


def _write(disk: Disk, path: Path, chunks: Iterator[Bytes]) -> None:
    """Writes a file, waits until it is on the disk, and reads it back."""
    digest = disk.write(path, chunks)
    disk.sync(path)
    back = disk.read_back(path)
    if (back.size, back.blocks) != (digest.size, digest.blocks):
        raise OSError(errno.EIO, "the disk gives back other bytes than were written", str(path))
