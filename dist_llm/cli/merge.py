"""`dist-llm merge BASE ADAPTER... DIR`: a base and an adapter, or several, as one model."""

from __future__ import annotations

import json
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from dist_llm.cli import flags
from dist_llm.cli.export import DTYPES, read_size
from dist_llm.errors import UsageError, plain
from dist_llm.sidefiles import MERGED


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="What the adapter was trained on: a run folder, or a Hugging Face folder.")],
    adapters: Annotated[
        list[Path], typer.Argument(metavar="ADAPTER", help="Run folders of adapters, their newest checkpoints; or PEFT's folders.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The Hugging Face folder to make.")],
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W", help="What each adapter's change of the base counts; 1 when left out.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float64, float32, bfloat16 or float16; else the base's.")] = None,
    shard_size: Annotated[str, typer.Option("--shard-size", help="Bytes of a file, at most: 5GB, 200MB.")] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Merge adapters into their base, with a receipt: the hashes of all, the result's, and the largest drift of the logits."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError("no such dtype to write", where="--dtype", expected=", ".join(DTYPES), found=dtype)
    limit, counts = read_size(shard_size), read_weights(weights, len(adapters))
    import torch

    from dist_llm.interop.merging import merge as merge_models

    to = None if dtype is None else getattr(torch, dtype)
    paths = [path.expanduser() for path in adapters]
    made = merge_models(base.expanduser(), paths, target.expanduser(), weights=counts, dtype=to, shard_size=limit)
    for note in made.notes:
        flags.note(note)
    if as_json:
        typer.echo(json.dumps({**asdict(made), "folder": str(target)}))
        return
    typer.echo(f"base        {plain(made.base)}, {made.base_identity[:16]}")
    for one in made.adapters:
        typer.echo(
            f"adapter     {plain(one['path'])}, {one['identity'][:16]}" + ("" if one["weight"] == 1 else f", times {one['weight']:g}")
        )
    typer.echo(f"merged      {plain(target)}: {made.parameters:,} parameters in {made.dtype}, {made.result[:16]}")
    typer.echo(f"drift       {made.drift:.1e} of the largest logit, computed in {made.drift_dtype}; the receipt is {MERGED}")


def read_weights(text: str | None, count: int) -> list[float]:
    """`0.7,0.3` for two adapters; 1 for each where there is none. Raises UsageError."""
    if text is None:
        return [1.0] * count
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if len(found) != count or not all(isfinite(weight) for weight in found):
        raise UsageError("that is not a weight for each adapter", where="--weights", expected=f"{count} numbers, as 0.7,0.3", found=text)
    return found
