"""`dist-llm import DIR CKPT`: a Hugging Face folder as a run folder of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dist_llm.cli import flags
from dist_llm.errors import UsageError, plain
from dist_llm.report.units import show_bytes


def import_(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="The Hugging Face folder: config.json, safetensors, tokenizer.json.")],
    run: Annotated[Path, typer.Argument(metavar="CKPT", help="The run folder to make.")],
    base: Annotated[Path | None, typer.Option("--base", metavar="BASE", help="Where DIR is PEFT's: what it was trained on.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Read a Hugging Face folder, or an adapter of PEFT's, into a run folder with a checkpoint of step 0; weights keep their dtype."""
    from dist_llm.interop.importing import import_folder
    from dist_llm.interop.importing_adapter import import_adapter
    from dist_llm.interop.peft_folder import is_adapter

    if is_adapter(source.expanduser()) != (base is not None):
        what = "an adapter is imported beside its base" if base is None else "the folder is no adapter, and needs no base"
        raise UsageError(what, where=str(source), next=f"dist-llm import {source} {run}{' --base BASE' if base is None else ''}")
    if base is not None:
        made = import_adapter(source.expanduser(), run.expanduser(), base_path=base.expanduser())
    else:
        made = import_folder(source.expanduser(), run.expanduser())
    if made.note is not None:
        flags.note(made.note)
    if as_json:
        about = {"family": made.family, "parameters": made.parameters, "bytes": made.bytes}
        typer.echo(json.dumps({"version": 1, "checkpoint": str(made.path), **about}))
        return
    typer.echo(f"imported    {plain(source)}: {made.family}, {made.parameters:,} parameters, {show_bytes(made.bytes)}")
    typer.echo(f"checkpoint  {plain(made.path)}")
    typer.echo(f"config      {plain(run / 'config.yaml')}: trains on from it")
    typer.echo(f"next        dist-llm sample {plain(run)} --prompt 'def '")
