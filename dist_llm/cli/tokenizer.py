"""`dist-llm tokenizer train` and `dist-llm tokenizer report`: make a byte-level BPE, and see how a tokenizer fits a text."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from dist_llm.errors import plain

app = typer.Typer(help="Make a tokenizer, and see how it fits a text.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="python, skills, entropy, or a file, folder or glob.")]
TextKey = Annotated[str, typer.Option("--text-key", help="The field of a JSON line that holds the text.")]
Megabytes = Annotated[float, typer.Option("--megabytes", min=0.01, max=4096, help="How much of the text to read.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the generated sources.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]


@app.command()
def train(
    source: Source,
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    vocab: Annotated[int, typer.Option("--vocab", help="Tokens in the vocabulary.")] = 2048,
    text_key: TextKey = "text",
    megabytes: Megabytes = 4.0,
    seed: Seed = 7,
    as_json: AsJson = False,
) -> None:
    """Train a byte-level BPE on a text and write its tokenizer.json."""
    from dist_llm.data import tokenizer as tokens
    from dist_llm.data.publish import publish, require_new

    require_new(out, where=f"--out {out}")
    texts = _texts(source, text_key=text_key, megabytes=megabytes, seed=seed)
    if not publish(out, lambda folder: tokens.train_bpe(texts, vocab=vocab).save(folder)):
        require_new(out, where=f"--out {out}")
    made = tokens.load(out)
    if as_json:
        typer.echo(json.dumps({"version": 1, "path": str(out / "tokenizer.json"), "vocab": made.vocab_size, "hash": made.hash}))
        return
    typer.echo(f"{made.vocab_size:,} tokens in {plain(out / 'tokenizer.json')}, hash {made.hash[:16]}")
    typer.echo(f"next: dist-llm tokenizer report {plain(out)} --source {plain(source)}")


@app.command()
def report(
    path: Annotated[str, typer.Argument(metavar="TOKENIZER", help="A tokenizer.json, the folder that holds one, or bytes.")],
    source: Annotated[str, typer.Option("--source", help="python, skills, entropy, or a file, folder or glob.")] = "python",
    text_key: TextKey = "text",
    megabytes: Megabytes = 1.0,
    seed: Seed = 7,
    as_json: AsJson = False,
) -> None:
    """Compression, vocabulary in use, round trip, and examples of how a tokenizer cuts a text."""
    from dist_llm.data import tokenizer as tokens

    loaded = tokens.bytes_tokenizer() if path == "bytes" else tokens.load(Path(path))
    result = tokens.report(loaded, _texts(source, text_key=text_key, megabytes=megabytes, seed=seed))
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"vocabulary        {result['vocab']:,} tokens, {result['used_vocab']:.1%} of them in use")
    typer.echo(f"bytes per token   {result['bytes_per_token']:.3f}")
    typer.echo(f"tokens per word   {result['tokens_per_word']:.3f}")
    typer.echo(f"round trip        {result['roundtrip']} of {result['texts']} texts come back as they were")
    for example in result["examples"]:
        typer.echo("  " + "|".join(plain(piece.replace("\n", "⏎").replace("\t", "⇥")) for piece in example))


def _texts(source: str, *, text_key: str, megabytes: float, seed: int) -> list[str]:
    """A fair sample of the source's documents, at most 200,000 of them."""
    from dist_llm.data.build import sample
    from dist_llm.data.corpora import open_corpus

    corpus = open_corpus(source, seed=seed, text_key=text_key)
    return [document.text for document in islice(sample(corpus, int(megabytes * 1e6)), 200_000)]
