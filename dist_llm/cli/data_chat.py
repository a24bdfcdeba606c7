"""What `dist-llm data preview` shows of conversations: which tokens are trained, on a terminal, as JSON, and as a page."""

from __future__ import annotations

import sys
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dist_llm.config.preference import SIDES
from dist_llm.errors import SpaceError, plain

if TYPE_CHECKING:
    from dist_llm.config.schema import Config
    from dist_llm.data.packing import PackedBatches
    from dist_llm.data.prepare import Prepared
    from dist_llm.data.tokenizer import Tokenizer

LONGEST_CHARACTER = 4  # bytes, and so tokens that may be needed to show one


def chat_preview(config: Config, prepared: Prepared, batches: PackedBatches, *, step: int, rows: int, tokens: int) -> dict[str, Any]:
    """The first `rows` conversations of a step, and counts of all, as data. pieces: the text of the tokens in `ids`, with their weight.

    at: how many tokens stand before them, 0 unless none of the first `tokens` is trained. of: how many there are. Of pairs both sides
    of the first `rows`, each with its name under `side`.
    """
    template, tokenizer = prepared.template, prepared.tokenizer
    assert template is not None
    names = {number: name for name, number in tokenizer.special.items()}
    sides = SIDES if batches.each == 2 else (None,)
    shown = []
    for side, (place, ids, weights) in zip(cycle(sides), batches.conversations(step)[: rows * len(sides)], strict=False):
        at = _beginning(weights, tokens)
        found = _pieces(tokenizer, ids[at : at + tokens], weights[at : at + tokens], first=at == 0)
        shown.append({"row": place, **({"side": side} if side else {}), "at": at, "of": len(ids), **found})
    return {
        "version": 1,
        "title": f"data preview: {config.data.source if isinstance(config.data.source, str) else ', '.join(config.data.source)}",
        "step": step,
        "sequence": config.data.sequence,
        "packing": config.data.packing,
        "noun": batches.noun,
        "target_tokens": batches.targets(step),
        "weight": batches.weight(step),
        "template": template.name,
        "template_text": template.text,
        "formats": list(prepared.shapes),
        "train_on": config.data.chat.train_on,
        "stops": [names.get(number, str(number)) for number in template.stop_ids(tokenizer)],
        "counts": batches.statistics(),
        "rows": shown,
    }


def print_chat(preview: dict[str, Any]) -> None:
    """Trained tokens in colour on a terminal, others dim; in [ ] elsewhere, with a weight other than 1 before them."""
    counts = preview["counts"]
    typer.echo(f"template {plain(preview['template'])}, format {', '.join(preview['formats'])}, trained on {preview['train_on']}")
    typer.echo(f"{counts['samples']:,} {preview['noun']}, {counts['tokens']:,} tokens, {counts['trained_share']:.1%} of them trained")
    packed, alone = counts["padding_share"], counts["padding_share_unpacked"]
    lengths = f"longest {counts['longest']:,} tokens, {counts['too_long']:,} too long, {counts['left_out']:,} left out"
    lengths += f", {counts['cut']:,} cut before the end of what is trained" if counts["cut"] else ""
    typer.echo(f"{counts['sequences']:,} sequences of {preview['sequence']}: padding {packed:.1%}, {alone:.1%} without packing; {lengths}")
    for row in preview["rows"]:
        trained = sum(len(ids) for ids, weight in zip(row["ids"], row["weights"], strict=True) if weight)
        side = f", {row['side']}" if "side" in row else ""
        shown = sum(map(len, row["ids"]))
        part = f" from {row['at'] + 1} on" if row["at"] else ""
        rest = f", of {row['of']}" if shown < row["of"] else ""
        typer.echo(f"\nsequence {row['row']}{side}: of {shown} tokens{part}{rest}, {trained} are trained")
        if sys.stdout.isatty():
            _print_colours(row)
        else:
            typer.echo("  " + _marked(row))


def write_html(preview: dict[str, Any], path: Path) -> None:
    """Write the page. Raises SpaceError."""
    from dist_llm.report.chat import write_chat_page

    try:
        write_chat_page(preview, path)
    except OSError as error:
        raise SpaceError(
            "the page cannot be written", where=str(path), expected="a file that can be written", found=error.strerror or str(error)
        ) from error


def _beginning(weights: list[float], tokens: int) -> int:
    """Where to begin to show `tokens` of a conversation: at its start, or a little before the first one that is trained."""
    first = next((place for place, weight in enumerate(weights) if weight), 0)
    return 0 if first < tokens else first - tokens // 4


def _pieces(tokenizer: Tokenizer, ids: list[int], weights: list[float], *, first: bool = True) -> dict[str, Any]:
    """Texts of tokens, those that only together make a character as one. first: they begin a text."""
    found: dict[str, list[Any]] = {"pieces": [], "ids": [], "weights": []}
    at, begins = 0, first
    while at < len(ids):
        size, first = 1, begins and at == 0
        whole = [size for size in range(1, LONGEST_CHARACTER + 1) if "\ufffd" not in tokenizer.piece(ids[at : at + size], first=first)]
        if whole and len(set(weights[at : at + whole[0]])) == 1:
            size = whole[0]
        found["pieces"].append(tokenizer.piece(ids[at : at + size], first=first))
        found["ids"].append(ids[at : at + size])
        found["weights"].append(weights[at])
        at += size
    return found


def _visible(piece: str) -> str:
    return plain(piece.replace("\n", "⏎").replace("\t", "⇥"))


def _marked(row: dict[str, Any]) -> str:
    """`text [trained text] text`, on one line."""
    parts, before = [], 0.0
    for piece, weight in zip(row["pieces"], row["weights"], strict=True):
        if weight != before:
            parts.append(("]" if before else "") + ("" if not weight else "[" if weight == 1 else f"[{weight:g}×"))
        parts.append(_visible(piece))
        before = weight
    return "".join(parts) + ("]" if before else "")


def _print_colours(row: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text("  ")
    for place, (piece, weight) in enumerate(zip(row["pieces"], row["weights"], strict=True)):
        colour = "dim" if not weight else "bold green" if weight == 1 else "bold yellow" if weight > 1 else "bold cyan"
        text.append(_visible(piece), style=f"{colour}{' underline' if weight and place % 2 else ''}")
        if weight not in (0, 1) and row["weights"][place + 1 : place + 2] != [weight]:
            text.append(f"×{weight:g}", style="yellow")
    Console(highlight=False).print(text)
