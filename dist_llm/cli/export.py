"""`dist-llm export CKPT DIR`: a checkpoint of any layout as a Hugging Face folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_llm.cli import flags
from dist_llm.errors import MAX_COMMAND, UsageError, plain
from dist_llm.report.units import show_bytes

if TYPE_CHECKING:
    from dist_llm.interop.logits import Compared
    from dist_llm.train.folder import Checkpoint

DTYPES = ("float64", "float32", "bfloat16", "float16")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SMALLEST, LARGEST = 1000, 10**13  # bytes of a shard


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A step folder, or a run folder: its newest.")],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    dtype: Annotated[str | None, typer.Option("--dtype", help="float64, float32, bfloat16 or float16; else as they are.")] = None,
    shard_size: Annotated[str | None, typer.Option("--shard-size", help="Bytes of a file, at most: 5GB, 200MB; else 5GB.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Load it with transformers and compare logits; exit 6 if they differ.")] = False,
    base_path: Annotated[
        str | None, typer.Option("--base-path", metavar="PATH", help="Of an adapter: where PEFT finds the base; else where it lies here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Write a checkpoint of any layout as a Hugging Face folder: safetensors, config, tokenizer, chat template; an adapter as PEFT's."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError("no such dtype to export", where="--dtype", expected=", ".join(DTYPES), found=dtype)
    limit = read_size(shard_size or "5GB")
    import torch

    from dist_llm.interop.exporting import export_checkpoint
    from dist_llm.interop.logits import Cast, compare_logits, prompts_for
    from dist_llm.train.folder import open_checkpoint

    opened = open_checkpoint(checkpoint.expanduser())
    cast = None if dtype is None else getattr(torch, dtype)
    if opened.config.model.adapter.rank:
        if shard_size is not None:
            raise UsageError("an adapter is one file in PEFT's form", where="--shard-size", found=shard_size, next="leave it out")
        _export_adapter(opened, target.expanduser(), base_path=base_path, dtype=cast, verify=verify, as_json=as_json)
        return
    if base_path is not None:
        raise UsageError("a whole model lies beside no base", where="--base-path", expected="an adapter", found=str(opened.path))
    found: list[Compared] = []

    def check(folder: Path) -> None:
        model = opened.config.model
        found.append(compare_logits(folder, Cast(opened.parts, cast), model, prompts=prompts_for(model, opened.path)))

    options: dict[str, Any] = {"dtype": cast, "shard_size": limit} | ({"check": check} if verify else {})
    made = export_checkpoint(opened, target.expanduser(), **options)
    opened.parts.close()
    if as_json:
        about: dict[str, Any] = {"family": made.family, "parameters": made.parameters, "bytes": made.bytes, "files": made.files}
        about["logits"] = vars(found[0]) if found else None
        typer.echo(json.dumps({"version": 1, "checkpoint": str(opened.path), "folder": str(made.path), **about}))
        return
    typer.echo(f"exported    {plain(opened.path)}: {made.family}, {made.parameters:,} parameters, {show_bytes(made.bytes)}")
    typer.echo(f"folder      {plain(made.path)}, {made.files} files")
    for one in found:
        typer.echo(_verified("transformers", one))


def _verified(who: str, one: Compared) -> str:
    words = f"largest difference {one.difference:.1e} in {one.dtype}, at most {one.tolerance:.0e} allowed"
    return f"verified    {who} computes the same logits: {words}, {one.prompts} prompts"


def _export_adapter(opened: Checkpoint, target: Path, *, base_path: str | None, as_json: bool, **options: Any) -> None:
    """An adapter in PEFT's form."""
    from dist_llm.interop.exporting_adapter import export_adapter
    from dist_llm.train.overlay import base_of

    base, model = base_of(opened), opened.config.model
    size, compared = export_adapter(opened, base, target, named=base_path or str(base.path), **options)
    base.close()
    opened.parts.close()
    if base_path is None and base.checkpoint is not None:
        way = f"dist-llm export {base.path} {target}-base writes it, and --base-path {target}-base names it here"
        flags.note(f"PEFT reads a base in Hugging Face's form, which {base.path} is not: {way}", width=MAX_COMMAND)
    if as_json:
        about: dict[str, Any] = {"adapter": True, "bytes": size, "base": base_path or str(base.path)}
        about["logits"] = None if compared is None else vars(compared)
        typer.echo(json.dumps({"version": 1, "checkpoint": str(opened.path), "folder": str(target), **about}))
        return
    typer.echo(f"exported    {plain(opened.path)}: an adapter of rank {model.adapter.rank} in PEFT's form, {show_bytes(size)}")
    typer.echo(f"folder      {plain(target)}")
    if compared is not None:
        typer.echo(_verified("PEFT", compared))
    typer.echo(f"next        dist-llm merge {plain(base.path)} {plain(target)} {plain(target)}-merged")


def read_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1000000`. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMG]i?B|B|)", text.strip(), re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if not SMALLEST <= size <= LARGEST:
        raise UsageError("no such size of a shard", where="--shard-size", expected="from 1KB to 10000GB, such as 5GB", found=text)
    return size
