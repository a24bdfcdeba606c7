"""`dist-llm verify CKPT`: check every byte of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dist_llm.errors import plain


def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A step folder, or a run folder: its newest.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Hash every file of a checkpoint; exit 4 names the first damaged one."""
    from dist_llm.train.folder import open_checkpoint

    opened = open_checkpoint(checkpoint)
    opened.verify()
    size = sum(about["bytes"] for about in opened.manifest["files"].values())
    if as_json:
        typer.echo(
            json.dumps({"version": 1, "checkpoint": str(opened.path), "step": opened.step, "files": len(opened.files), "bytes": size})
        )
        return
    typer.echo(f"sound: {plain(opened.path)}, step {opened.step}, {len(opened.files)} files, {size:,} bytes")
