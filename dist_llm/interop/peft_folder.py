"""PEFT's adapter folders, read and written (adapters.py has the names). Tensors are read whole: none is larger than an embedding.

What PEFT trains whole may be a part of what we do: an output matrix without the last norm. The rest is the base's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dist_llm.config.schema import ModelConfig
from dist_llm.data.publish import publish, require_new
from dist_llm.errors import CheckpointError, UsageError
from dist_llm.interop.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapter_keys,
    joined,
    joined_rank,
    read_adapter_config,
    saved_modules,
    tied_key,
    write_adapter_config,
)
from dist_llm.interop.families import place
from dist_llm.interop.joined import Rows, join, parts_of, split
from dist_llm.interop.safe_file import SafeFile, unsound
from dist_llm.interop.slices import TORCH
from dist_llm.model.table import table
from dist_llm.sharding import Box
from dist_llm.strict import first_line, read_bounded, strict_json
from dist_llm.train.durable import Disk
from dist_llm.train.parts import Source
from dist_llm.train.storage import storing

RECEIPT = "dist_llm.json"  # beside their files: the identity of the base, the adapter's name, the hashes of these files, and its own
LARGEST = 1 << 20  # bytes of their config
TABLE = "embedding.weight"


def is_adapter(folder: Path) -> bool:
    """Whether a folder is one of PEFT's adapters."""
    return (folder / CONFIG).is_file()


@dataclass(frozen=True)
class Receipt:
    """What lies beside PEFT's files. base, base_weights: the identities of the base, as it lay and in any form; name: of the adapter."""

    base: str | None = None
    base_weights: str | None = None
    name: str | None = None

    def text(self, files: object) -> bytes:
        """Its file. files: name -> sha256 of those beside it."""
        said = {key: value for key, value in vars(self).items() if value is not None}
        body = {"version": 1, "base": None, **said, "files": files}
        own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps({**body, "sha256": own}, indent=2).encode() + b"\n"


@dataclass(frozen=True)
class PeftFolder:
    """An opened adapter of PEFT's for a base. model: the base's with this adapter; receipt: what ours says of its base, where it has one.

    named: the path or the name of the hub under which PEFT looks for the base.
    """

    path: Path
    model: ModelConfig
    receipt: Receipt
    named: str
    tensors: dict[str, Tensor]  # by our names

    @classmethod
    def open(cls, path: Path, base: ModelConfig, under: Source) -> PeftFolder:
        """under: the base's weights. Raises CheckpointError where a file is not sound or does not fit, UsageError where the adapter does
        what is not done here.
        """
        known = receipt_of(path)
        values, where = _json(path / CONFIG), str(path / CONFIG)
        if not (path / WEIGHTS).exists() and any(path.glob("adapter_model.bin")):
            what, way = "the adapter is pickled, and reading it could run code", "save_pretrained(DIR, safe_serialization=True)"
            raise UsageError(what, where=str(path), expected=WEIGHTS, found="adapter_model.bin", next=way)
        file = SafeFile(path / WEIGHTS)
        try:
            adapter = read_adapter_config(values, base, where=where, tensors=file.tensors)
            adapter = adapter if known.name is None else adapter.model_copy(update={"name": known.name})
            model, rank = base.model_copy(update={"adapter": adapter}), joined_rank(values, base, adapter, where=where)
            tensors, parts = _tensors(file, model, saved_modules(values, base, where=where), under, rank=rank)
            targets = tuple(target for target in adapter.targets if target in parts or target not in joined(base))
            model = base.model_copy(update={"adapter": adapter.model_copy(update={"targets": targets})})
            return cls(path, model, known, str(values.get("base_model_name_or_path") or ""), tensors)
        finally:
            file.close()

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a matrix, (stop - start,) on the CPU."""
        return self.whole(name)[tuple(slice(low, high) for low, high in box)].flatten()[start:stop]

    def whole(self, name: str) -> Tensor:
        """A whole matrix, on the CPU."""
        return self.tensors[name]

    def close(self) -> None:
        """Nothing is open: all of it was read."""


def receipt_of(folder: Path) -> Receipt:
    """The receipt; one that says nothing where there is none, as others write adapters. Raises CheckpointError where a byte has changed."""
    path = folder / RECEIPT
    if not path.exists():
        return Receipt()
    receipt = _json(path)
    known = Receipt(receipt.get("base"), receipt.get("base_weights"), receipt.get("name"))
    if path.read_bytes() != known.text(receipt.get("files")):
        raise unsound("the adapter's receipt is damaged", path, expected="its own hash in it")
    for name, expected in receipt["files"].items():
        if name not in (CONFIG, WEIGHTS):
            raise unsound("the adapter's receipt is damaged", path, expected=f"{CONFIG} and {WEIGHTS}", found=str(name)[:80])
        try:
            with (folder / name).open("rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise unsound("a file of the adapter cannot be read", folder / name, found=error.strerror) from None
        if found != expected:
            raise unsound("a file of the adapter is damaged", folder / name, expected=f"sha256 {expected}", found=f"sha256 {found}")
    return known


def _json(path: Path) -> dict[str, Any]:
    """A table in a file."""
    try:
        values = strict_json(read_bounded(path, LARGEST))
    except OSError as error:
        raise CheckpointError("a file cannot be read", where=str(path), found=error.strerror) from None
    except (ValueError, RecursionError) as error:
        raise unsound("a file is no JSON", path, found=first_line(error)) from None
    if not isinstance(values, dict):
        raise unsound("a file holds no table", path, found=type(values).__name__)
    return values


def _tensors(
    file: SafeFile, model: ModelConfig, saved: Collection[str], under: Source, *, rank: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """All that is trained by name, and which projections those are that share a matrix there.

    saved: their modules that the config names; the rest of what we train with them is the base's. rank: of a matrix that is shared.
    """
    rows, every = {row.name: row for row in table(model)}, adapter_keys(model)
    keys = {name: key for name, key in every.items() if rows[name].beside or key.removeprefix(PREFIX).rpartition(".")[0] in saved}
    twice = tied_key(model) if model.tied and TABLE in keys else None
    wanted = {*keys.values(), *([twice] if twice in file.tensors else [])}
    lacking, more = sorted(wanted - {*file.tensors}), sorted({*file.tensors} - wanted)
    if lacking or more:
        what = "the adapter lacks matrices" if lacking else "the adapter has matrices that its config does not name"
        raise unsound(
            what, file.path, expected=f"{len(wanted)} tensors", found=f"{(lacking or more)[0][:120]} and {len(lacking or more) - 1} more"
        )
    shared = _shared(keys, joined(model))
    found = {name: _tensor(file, key, rows[name].shape) for name, key in keys.items() if key not in shared}
    apart, parts = _apart(file, shared, model, rank=rank)
    found |= apart
    if twice is not None and (twice not in wanted or not torch.equal(_tensor(file, twice, rows[TABLE].shape), found[TABLE])):
        what, seen = (
            "the adapter has embedding and output apart, which are one table in the base",
            "others" if twice in wanted else "one of them",
        )
        raise UsageError(
            what, where=str(file.path), expected=f"{keys[TABLE]} and {twice} alike, as ensure_weight_tying leaves them", found=seen
        )
    for name in every.keys() - keys.keys():
        shape = rows[name].shape
        found[name] = under.read("weight", name, tuple((0, extent) for extent in shape), 0, prod(shape)).view(shape)
    return found, parts


def rows_of(model: ModelConfig) -> Rows:
    """Where the rows of each projection begin and end in the matrix that Hugging Face has of several; nothing where there is none."""
    rows, places = {row.name: row for row in table(model)}, {}
    for part in joined(model):
        name = f"blocks.0.attention.{part}.weight"
        first = place(model, name).first
        places[part] = first, first + rows[name].shape[0]
    return places


def _shared(keys: Mapping[str, str], parts: Collection[str]) -> dict[str, tuple[str, str, list[str]]]:
    """Their key -> "blocks.0.attention", "lora_a" and the projections, of matrices of several of ours."""
    found: dict[str, tuple[str, str, list[str]]] = {}
    for name, key in keys.items():
        half, part, last = name.rsplit(".", 2) if name.startswith("blocks.") else ("", "", "")
        if part in parts:
            found.setdefault(key, (half, last, []))[2].append(part)
    return found


def _apart(
    file: SafeFile, shared: Mapping[str, tuple[str, str, list[str]]], model: ModelConfig, *, rank: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The matrices of projections that share one: by our names, and whose they are. rank: of theirs."""
    if not shared:
        return {}, ()
    rows, each, dora = rows_of(model), model.adapter.rank, model.adapter.dora
    out = max(stop for _, stop in rows.values())
    shapes = {"lora_a": (rank, model.dim), "lora_b": (out, rank), "lora_m": (out,)}
    whole = {key: _tensor(file, key, shapes[last]) for key, (_, last, _) in shared.items()}
    parts = parts_of([whole[key] for key, (_, last, _) in shared.items() if last == "lora_b"], rows, rank=each, all_of_them=dora)
    if parts is None:
        what, found_here = "the adapter has a rank of its own for some modules", f"{next(iter(shared))[:120]} of rank {rank}"
        if not any(bool(whole[key].any()) for key, (_, last, _) in shared.items() if last == "lora_b"):
            what, found_here = f"nothing says which of {', '.join(rows)} the adapter is on", f"{found_here}, still zeros"
        expected = f"rank {each}, or {', '.join(rows)} in columns of their own"
        raise UsageError(what, where=str(file.path), expected=expected, found=found_here)
    found = {}
    for key, (half, last, _) in shared.items():
        for part, tensor in split(whole[key], last, parts, rows, rank=each).items():
            found[f"{half}.{part}.{last}"] = tensor
    return found, parts


def _tensor(file: SafeFile, key: str, shape: tuple[int, ...]) -> Tensor:
    """A whole matrix of a file, on the CPU."""
    stored = file.tensors[key]
    if stored.shape != shape or stored.dtype not in TORCH:
        seen = f"{stored.dtype} {list(stored.shape)}"
        raise unsound("a matrix of the adapter does not fit the base", file.path, expected=f"{key} {list(shape)}", found=seen)
    values = torch.empty(prod(stored.shape), dtype=TORCH[stored.dtype])
    file.read_into(values.view(torch.uint8).numpy().data, stored.start)
    if not torch.isfinite(values).all():
        raise unsound("a matrix of the adapter is not finite", file.path, expected="finite numbers", found=key)
    return values.view(stored.shape)


def write_adapter(
    target: Path,
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    base: str,
    identity: str,
    base_weights: str | None = None,
    check: Callable[[Path], object] = lambda folder: None,
) -> int:
    """Writes PEFT's folder of an adapter; returns its bytes. base: where PEFT finds the base; identity, base_weights: of the base.

    check: looks at the folder before it gets its name; where it raises there is none. Raises UsageError where PEFT has no such adapter,
    or the target is there.
    """
    keys = adapter_keys(model)
    require_new(target)
    shared = _shared(keys, joined(model))
    stored = {key: tensors[name].contiguous() for name, key in keys.items() if key not in shared}
    for key, (half, last, parts) in shared.items():
        stored[key] = join({part: tensors[f"{half}.{part}.{last}"] for part in parts}, last, rows_of(model))
    if model.tied and TABLE in keys:
        stored[tied_key(model)] = stored[keys[TABLE]].clone()  # PEFT does not load the folder without it
    weights = save(stored, metadata={"format": "pt"})
    texts = {WEIGHTS: weights, CONFIG: json.dumps(write_adapter_config(model, base=base), indent=2).encode() + b"\n"}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in texts.items()}
    texts[RECEIPT] = Receipt(identity, base_weights, model.adapter.name).text(hashes)

    def make(made: Path) -> None:
        for name, content in texts.items():
            Disk().write(made / name, [content])
            Disk().sync(made / name)
        check(made)

    with storing(target):
        publish(target, make)
    return len(weights)
