"""`dist-llm data build` and `dist-llm data preview`: text to token shards, and a look at what a model will be given."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_llm import faults
from dist_llm.cli.data_files import clean, export
from dist_llm.cli.network import allow_hub
from dist_llm.config.load import load_config
from dist_llm.errors import UsageError, plain
from dist_llm.train.base import read_base

if TYPE_CHECKING:
    from dist_llm.data.batches import MicroBatch
    from dist_llm.data.prepare import Prepared

PAGE_ROWS = 24  # conversations that a page shows at least, where a step has so many

app = typer.Typer(help="Text to token shards, and a look at them.", no_args_is_help=True)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=v]...", help="Values that replace those of the file.")]
BadLinesAllowed = Annotated[int | None, typer.Option("--max-bad-lines", min=0, help="data.max_bad_lines: JSON lines that may be skipped.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]


@app.command()
def build(config_path: ConfigPath, overrides: Overrides = None, max_bad_lines: BadLinesAllowed = None, as_json: AsJson = False) -> None:
    """Build the tokenizer and the token shards that a config asks for, or find them again and compare every byte with its hash."""
    from dist_llm.data.prepare import prepare

    config = load_config(config_path, overrides or [], base=read_base).config
    faults.arm(os.environ.get("DIST_LLM_FAULT"))  # tests alone set it
    allow_hub(config.data, lambda text: print(plain(text), file=sys.stderr))
    started = time.monotonic()
    with live_progress() as progress:
        prepared = prepare(config.data, seed=config.runtime.seed, progress=progress, max_bad_lines=max_bad_lines, verify=True)
    longest = config.data.sequence + (prepared.template is not None)  # the last token of a conversation takes no place
    summary = summarise(prepared, sequence=longest, seconds=time.monotonic() - started)
    if as_json:
        typer.echo(json.dumps(summary))
        return
    for note in prepared.notes:
        typer.echo(f"note: {plain(note)}")
    verb, vocab = "built" if prepared.built else "found again", prepared.tokenizer.vocab_size
    typer.echo(f"{verb} in {summary['seconds']:.1f} s; tokenizer of {vocab:,} tokens")
    for store in summary["stores"]:
        words = f"{store['tokens']:>13,} tokens  {store['documents']:>9,} documents"
        words += f"  {store['bytes_per_token']:.2f} bytes per token" if store["bytes_per_token"] is not None else ""
        typer.echo(f"  {store['split']:<10} {words}  {plain(store['folder'])}")
        if longer := store["longer_than_sequence"]:
            fate = "they go on in the next" if prepared.template is None else f"data.chat.too_long is {config.data.chat.too_long}"
            typer.echo(f"  {'':<10} {longer:>13,} documents are longer than a sequence of {config.data.sequence}: {fate}")


@app.command()
def preview(
    config_path: ConfigPath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=1, max=64, help="Sequences to show.")] = 2,
    tokens: Annotated[int, typer.Option("--tokens", min=2, max=4096, help="Tokens of each sequence to show.")] = 64,
    step: Annotated[int, typer.Option("--step", min=0, help="The step whose batch is shown.")] = 0,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Of conversations: write a page that shows more.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the first sequences of a step: documents, token boundaries, labels and what is masked; of conversations, what is trained."""
    from dist_llm.cli.data_chat import chat_preview, print_chat, write_html
    from dist_llm.data.batches import training_batches
    from dist_llm.data.packing import PackedBatches
    from dist_llm.data.prepare import prepare

    config = load_config(config_path, overrides or [], base=read_base).config
    if html is not None and config.data.chat.format is None:
        what, way = "the page shows conversations, data.chat is off", "the same command without --html"
        raise UsageError(what, where="--html", expected="data.chat.format=auto", found="data.chat.format=null", next=way)
    with live_progress() as progress:
        prepared = prepare(config.data, seed=config.runtime.seed, progress=progress)
    batches = training_batches(prepared, config.data, global_batch=config.batch.global_, seed=config.runtime.seed)
    if isinstance(batches, PackedBatches):
        found = chat_preview(config, prepared, batches, step=step, rows=rows, tokens=tokens)
        if html is not None:
            write_html(chat_preview(config, prepared, batches, step=step, rows=max(rows, PAGE_ROWS), tokens=4096), Path(html))
        if as_json:
            typer.echo(json.dumps({key: value for key, value in found.items() if key != "template_text"}))
            return
        for note in prepared.notes:
            typer.echo(f"note: {plain(note)}")
        print_chat(found)
        if html is not None:
            typer.echo(f"\nwritten: {plain(html)}")
        return
    (batch,) = batches.micro_batches(step, dp_rank=0, dp_size=1, micro=config.batch.global_)
    samples = batches.sample_ids(step).tolist()
    shown = [_row(prepared, batch, row, samples[row], tokens) for row in range(min(rows, len(samples)))]
    if as_json:
        sizes = {"step": step, "sequence": config.data.sequence, "target_tokens": batches.targets(step)}
        typer.echo(json.dumps({"version": 1, **sizes, "rows": shown}))
        return
    typer.echo(f"step {step}: {len(samples)} sequences of {config.data.sequence} tokens, {batches.targets(step):,} of them with a label")
    for number, row in enumerate(shown):
        typer.echo(f"\nrow {number}, sample {row['sample']}, {len(set(row['documents']))} document(s) in what is shown")
        _print_row(row)


app.command()(export)
app.command()(clean)


def summarise(prepared: Prepared, *, sequence: int, seconds: float) -> dict[str, Any]:
    """What was built, as data. sequence: tokens of one; documents that are longer are counted, they are cut and go on in the next."""
    stores = [
        {
            "split": store.manifest.split,
            "source": store.manifest.source,
            "folder": str(store.folder),
            "tokens": len(store),
            "documents": store.manifest.documents,
            "longer_than_sequence": store.longer_than(sequence),
            "bytes_per_token": store.manifest.text_bytes / max(1, len(store)) if store.manifest.text_bytes else None,
            "sha256": [shard.sha256 for shard in store.manifest.shards],
        }
        for store in (*prepared.train, *prepared.validation)
    ]
    tokenizer = {"hash": prepared.tokenizer.hash, "vocab": prepared.tokenizer.vocab_size}
    rest = {"fingerprint": prepared.fingerprint, "entropy_rate": prepared.entropy_rate, "notes": list(prepared.notes)}
    return {"version": 1, "built": prepared.built, "seconds": seconds, "tokenizer": tokenizer, "stores": stores, **rest}


@contextmanager
def live_progress() -> Iterator[Callable[[str, float], None]]:
    """A progress function: a live bar on a terminal, otherwise a line every few seconds; on stderr, so that stdout stays clean."""
    if not sys.stderr.isatty():
        yield _plain_progress()
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=1.0)
        yield lambda message, fraction: bar.update(task, description=escape(plain(message)), completed=fraction)


def _plain_progress(every: float = 2.0) -> Callable[[str, float], None]:
    last = time.monotonic()

    def tell(message: str, fraction: float) -> None:
        nonlocal last
        if time.monotonic() - last >= every:
            last = time.monotonic()
            print(f"{fraction:4.0%} {plain(message)}", file=sys.stderr, flush=True)

    return tell


def _row(prepared: Prepared, batch: MicroBatch, row: int, sample: int, tokens: int) -> dict[str, Any]:
    """The first tokens of one sequence, as data. `pieces` is the text of each token."""
    ids, labels = batch.tokens[row, :tokens].tolist(), batch.labels[row, :tokens].tolist()
    places = {"documents": batch.documents[row, :tokens].tolist(), "positions": batch.positions[row, :tokens].tolist()}
    return {"sample": sample, "tokens": ids, "pieces": prepared.tokenizer.pieces(ids), "labels": labels, **places}


def _print_row(row: dict[str, Any]) -> None:
    """A colour for each document and a shade for every other token on a terminal; `|` between tokens elsewhere."""
    pieces = [_visible(piece) for piece in row["pieces"]]
    masked = [place for place, label in enumerate(row["labels"]) if label < 0]
    if not sys.stdout.isatty():
        typer.echo("  " + "|".join(pieces))
    else:
        from rich.console import Console
        from rich.text import Text

        colours = ("cyan", "yellow", "green", "magenta")
        text = Text("  ")
        for place, (piece, document) in enumerate(zip(pieces, row["documents"], strict=True)):
            text.append(piece, style=f"{colours[document % 4]}{' reverse' if place % 2 else ''}")
        Console().print(text)
    typer.echo(f"  positions {row['positions'][0]} to {row['positions'][-1]}; labels ignored at {masked or 'no place'}")


def _visible(piece: str) -> str:
    return plain(piece.replace("\n", "⏎").replace("\t", "⇥"))
