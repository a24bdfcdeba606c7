"""`dist-llm merge BASE ADAPTER DIR`: a base and an adapter as one model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dist_llm.cli.export import DTYPES, read_size
from dist_llm.errors import UsageError, plain


def merge(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="What the adapter was trained on: a run folder, or a Hugging Face folder.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A run folder of an adapter, its newest checkpoint; or PEFT's folder.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The Hugging Face folder to make.")],
    dtype: Annotated[str | None, typer.Option("--dtype", help="float64, float32, bfloat16 or float16; else the base's.")] = None,
    shard_size: Annotated[str, typer.Option("--shard-size", help="Bytes of a file, at most: 5GB, 200MB.")] = "5GB",
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Merge an adapter into its base, with a receipt: both hashes, the result's, and the largest drift of the logits."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError("no such dtype to write", where="--dtype", expected=", ".join(DTYPES), found=dtype)
    limit = read_size(shard_size)
    import torch

    from dist_llm.interop.merging import RECEIPT
    from dist_llm.interop.merging import merge as merge_models

    to = None if dtype is None else getattr(torch, dtype)
    made = merge_models(base.expanduser(), adapter.expanduser(), target.expanduser(), dtype=to, shard_size=limit)
    if as_json:
        typer.echo(json.dumps({**asdict(made), "folder": str(target)}))
        return
    typer.echo(f"base        {plain(made.base)}, {made.base_identity[:16]}")
    typer.echo(f"adapter     {plain(made.adapter)}, {made.adapter_identity[:16]}")
    typer.echo(f"merged      {plain(target)}: {made.parameters:,} parameters in {made.dtype}, {made.result[:16]}")
    typer.echo(f"drift       {made.drift:.1e} of the largest logit, computed in {made.drift_dtype}; the receipt is {RECEIPT}")
