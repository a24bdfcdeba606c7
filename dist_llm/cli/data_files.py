"""`dist-llm data export` and `dist-llm data clean`: tokens for other trainers, and what interrupted builds have left."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from dist_llm.config.load import load_config
from dist_llm.errors import SpaceError, UsageError, plain
from dist_llm.report.units import show_bytes

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=v]...", help="Values that replace those of the file.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]


def export(
    config_path: ConfigPath,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option("--format", metavar="megatron|nanogpt|llm.c", help="What the files are to be.")] = "megatron",
    as_json: AsJson = False,
) -> None:
    """Write the tokens that a config asks for as files that other trainers read, with the tokenizer beside them."""
    from dist_llm.cli.data import live_progress
    from dist_llm.data.export import FORMATS
    from dist_llm.data.export import export as write
    from dist_llm.data.prepare import prepare
    from dist_llm.data.publish import require_new

    if kind not in FORMATS:
        raise UsageError("no such format", where="--format", expected=", ".join(FORMATS), found=kind)
    config = load_config(config_path, overrides or []).config
    require_new(folder)
    with live_progress() as progress:
        prepared = prepare(config.data, seed=config.runtime.seed, progress=progress, verify=True)
        made = write(prepared, folder, kind=kind)
    if as_json:
        stores = [
            {"split": one.split, "files": list(map(str, one.files)), "tokens": one.tokens, "documents": one.documents, "share": one.share}
            for one in made
        ]
        found = {"version": 1, "format": kind, "stores": stores, "fingerprint": prepared.fingerprint}
        typer.echo(json.dumps({**found, "tokenizer": {"hash": prepared.tokenizer.hash, "vocab": prepared.tokenizer.vocab_size}}))
        return
    for one in made:
        typer.echo(f"  {one.split:<10} {one.tokens:>13,} tokens  {one.documents:>9,} documents  {plain(' '.join(map(str, one.files)))}")
    again = f"data.source={made[0].files[-1]} data.tokenizer.kind=file data.tokenizer.path={folder}"
    typer.echo(f"read them back with {plain(again, width=4000)}")


def clean(config_path: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Remove what interrupted builds have left in the data folder of a config, except what a living process holds.

    A build that was to be gone on with begins anew then. What is complete stays.
    """
    from dist_llm.data.publish import discard, leftovers

    home = Path(load_config(config_path, overrides or []).config.data.dir).expanduser()
    removed: list[str] = []
    kept: list[str] = []
    freed = 0
    try:
        for workshop in leftovers(home):
            size = sum(entry.lstat().st_size for entry in workshop.rglob("*"))
            (removed if discard(workshop) else kept).append(str(workshop))
            freed += size if removed[-1:] == [str(workshop)] else 0
    except OSError as error:
        raise SpaceError("the data folder cannot be cleaned", where=str(home), found=error.strerror or os.fspath(home)) from error
    if as_json:
        typer.echo(json.dumps({"version": 1, "folder": str(home), "removed": removed, "in_use": kept, "freed_bytes": freed}))
        return
    for path in kept:
        typer.echo(f"in use, left alone: {plain(path)}")
    for path in removed:
        typer.echo(f"removed {plain(path)}")
    typer.echo(f"{len(removed)} interrupted builds removed from {plain(home)}, {show_bytes(freed)} freed")
