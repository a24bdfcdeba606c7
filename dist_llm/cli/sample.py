"""`dist-llm sample CKPT --prompt TEXT`: continue a text with a checkpoint of any layout."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_llm.errors import UsageError
from dist_llm.train.console import printable

if TYPE_CHECKING:
    from dist_llm.data.tokenizer import Tokenizer
    from dist_llm.train.folder import Checkpoint
    from dist_llm.train.sample import Model


def sample(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A step folder, or a run folder: its newest.")],
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue; nothing: a new document.")] = "",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Among the likeliest K tokens only.")] = 50,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Among the likeliest that make up P only.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same text.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Continue a text with a checkpoint of any layout; the text appears as it is made."""
    from dist_llm.train.folder import open_checkpoint
    from dist_llm.train.sample import Choice, generate, stream

    _check(prompt, temperature=temperature, top_p=top_p)
    opened = open_checkpoint(checkpoint)
    opened.verify()
    model, tokenizer, window = load(opened)
    choice = Choice(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    ids = tokenizer.encode(prompt) or [tokenizer.end_id]
    made: list[int] = []

    def follow():
        for token in generate(model, ids, count=tokens, choice=choice, window=window, end=tokenizer.end_id):
            made.append(token)
            yield token

    pieces = stream(tokenizer, follow())
    if as_json:
        text = "".join(pieces)
        about = {"step": opened.step, "checkpoint": str(opened.path), "seed": seed, "tokens": made}
        typer.echo(json.dumps({"version": 1, "prompt": prompt, "text": text, **about}))
        return
    typer.echo(printable(prompt), nl=False)
    for piece in pieces:
        typer.echo(printable(piece), nl=False)
    typer.echo()


def _check(prompt: str, *, temperature: float, top_p: float | None) -> None:
    """Raises UsageError for what passes the flags' own bounds and is no text, or no number."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not UTF-8", where="--prompt", expected="text", found=f"character {error.start}") from None
    for flag, value in (("--temperature", temperature), ("--top-p", top_p)):
        if value is not None and not isfinite(value):
            raise UsageError("this is no number to sample with", where=flag, expected="a finite number", found=str(value))


def load(opened: Checkpoint) -> tuple[Model, Tokenizer, int]:
    """The model of a verified checkpoint on one device, its tokenizer, and the tokens it can see. Raises UsageError (F24)."""
    from dist_llm.data.tokenizer import load as load_tokenizer
    from dist_llm.train.overlay import weights_of
    from dist_llm.train.sample import Model
    from dist_llm.train.setup import choose_device, choose_dtype

    config, tokenizer = opened.config, load_tokenizer(opened.path)
    if tokenizer.vocab_size > config.model.vocab:
        found = f"{tokenizer.vocab_size} tokens, model.vocab {config.model.vocab}"
        raise UsageError("the tokenizer has more tokens than the model", where=str(opened.path), found=found)
    device = choose_device(config.runtime.model_copy(update={"device": "auto"}), local_rank=0)
    dtype = choose_dtype(config.runtime.model_copy(update={"dtype": "auto"}), device)
    model = Model(weights_of(opened), config.model, dtype=dtype, device=device, tokens=tokenizer.ids)
    return model, tokenizer, config.data.sequence
