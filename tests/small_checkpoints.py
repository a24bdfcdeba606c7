"""Checkpoints of a few kilobytes without a run behind them, and an engine that only notes whether its weights were changed."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dist_llm.config.layout import Layout
from dist_llm.config.load import config_tree, load_config
from dist_llm.engines.native import Item, Wanted
from dist_llm.errors import UsageError
from dist_llm.mesh import build_mesh
from dist_llm.model.table import Row
from dist_llm.parallel.flat import pack
from dist_llm.train.checkpoint import load
from dist_llm.train.durable import Digest, Disk
from dist_llm.train.folder import COMMIT, MANIFEST, VERSION, Checkpoint, begin, commit, flush
from dist_llm.train.parts import part_of, write_part

KINDS = ("weight", "first_moment")
CONFIG = config_tree(load_config(Path(__file__).parent.parent / "configs/tiny.yaml", []).config)


class SmallEngine:
    """One rank that keeps all of a few tensors. changed: whether `load_state` was called."""

    def __init__(self, rows: list[Row], kinds: tuple[str, ...] = KINDS) -> None:
        self.mesh, self.device, self.rows, self.kinds = build_mesh(Layout(), 0), torch.device("cpu"), rows, kinds
        self.changed, self.values = False, dict[tuple[str, str], Tensor]()

    def wanted(self) -> list[Wanted]:
        boxes = {row.name: tuple((0, extent) for extent in row.shape) for row in self.rows}
        return [Wanted(kind, row.name, boxes[row.name], 0, row.numel) for kind in self.kinds for row in self.rows]

    def load_state(self, read: Any, *, count: int) -> None:
        self.changed = True
        for want in self.wanted():
            self.values[want.kind, want.name] = read(want.kind, want.name, want.box, want.start, want.stop)


def rows_of(width: int) -> list[Row]:
    """The rows of a model of two tensors in one unit."""
    return [
        Row(name="a.weight", shape=(4, width), role="column", unit="a", parts=4),
        Row(name="a.norm", shape=(6,), role="outside", unit="a", parts=1),
    ]


def save_small(run: Path, *, width: int = 8, step: int = 3, seed: int = 0) -> Path:
    """A checkpoint of two ranks, of random numbers; `width` decides its size. Returns the step folder."""
    run.mkdir(exist_ok=True)
    disk, generator = Disk(), torch.Generator().manual_seed(seed)
    save_id = random.Random(seed).randbytes(8).hex()
    partial = begin(disk, run, step, save_id)
    rows, files = rows_of(width), dict[str, Any]()
    for rank in range(2):
        pieces = pack(rows, unit="a", tp=1, sp=False, coordinate=0, shards=2).pieces(rank)
        items = [Item(kind, piece, torch.randn(piece.stop - piece.start, generator=generator)) for kind in KINDS for piece in pieces]
        written: dict[str, Digest] = write_part(disk, partial, rank, part_of(items))
        if rank == 0:
            names = ("tokenizer.json", "tokenizer_config.json")
            written |= {name: disk.write(partial / name, [f"{name} {seed}".encode()]) for name in names}
        flush(disk, partial, written)
        files |= {name: digest.about for name, digest in written.items()}
    about = {"version": VERSION, "save_id": save_id, "step": step, "world": 2, "layout": asdict(Layout(dp=2, zero=1)), "config": CONFIG}
    about |= {"rows": [[row.name, row.shape] for row in rows], "tokenizer": "a" * 64, "data": "b" * 64, "seed": 7, "files": files}
    return commit(disk, partial, about)


def take_up(folder: Path, rows: list[Row], *, kinds: tuple[str, ...] = KINDS) -> SmallEngine:
    """An engine that has taken up a checkpoint as a resumed run does. Raises what that raises; nothing was changed then."""
    engine = SmallEngine(rows, kinds)
    shapes = {row.name: row.shape for row in rows}

    def accept(found: Checkpoint) -> None:
        if found.shapes != shapes:
            raise UsageError("the checkpoint is of another run")

    try:
        load([folder], engine, accept=accept)  # type: ignore[arg-type]
    except BaseException:
        assert not engine.changed
        raise
    return engine


def seal(folder: Path, manifest: dict[str, Any] | bytes) -> None:
    """Another manifest with a true COMMIT."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest, sort_keys=True).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / COMMIT).write_text(sha256(text).hexdigest() + "\n")


def reseal(folder: Path, contents: dict[str, bytes]) -> None:
    """Other files with true sizes and hashes, also of the blocks of tensors."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for name, content in list(contents.items()):
        index = name.replace(".safetensors", ".json")
        if name != index and index not in contents:
            digest = Digest()
            digest.update(content)
            contents[index] = json.dumps(json.loads((folder / index).read_bytes()) | {"blocks": digest.blocks}).encode()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        manifest["files"][name] = Digest(content).about
    seal(folder, manifest)


def save_small_adapter(folder: Path, *, dim: int = 8, rank: int = 2) -> None:
    """PEFT's folder of ones on q and v of one block, as it lies on the hub: without a receipt of ours."""
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "theirs"}
    names = [f"base_model.model.model.layers.0.self_attn.{part}_proj.lora_{side}.weight" for part in "qv" for side in "AB"]
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(about))
    save_file({name: torch.ones((rank, dim) if "_A" in name else (dim, rank)) for name in names}, folder / "adapter_model.safetensors")
