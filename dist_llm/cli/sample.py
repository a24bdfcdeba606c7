"""`dist-llm sample CKPT`: continue texts with a checkpoint of any layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm.cli import flags
from dist_llm.errors import DataError, UsageError, plain
from dist_llm.train.console import printable

LARGEST_FILE, MOST_PROMPTS = 64 << 20, 100_000  # bytes and lines of a file of prompts


@flags.writing(temperature=0.8)
def sample(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A step folder, or a run folder: its newest.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A text to continue; may be given again. None: a new document.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE|-", help='A prompt a line, or {"prompt": ...} where FILE ends in .jsonl; -: stdin.'),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=2**31, help="At most so many tokens a text.")] = 128,
    samples: Annotated[int, typer.Option("--samples", min=1, max=10_000, help="Texts for each prompt.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, max=10_000, help="Texts that are written at once.")] = 8,
    writing: flags.Writing = flags.WRITTEN,
) -> None:
    """Continue texts with a checkpoint of any layout, or with adapters on it; a single text appears as it is made."""
    texts = _prompts(prompt, prompts)

    from dist_llm.interop.ends import kept_ends
    from dist_llm.use.load import on_ranks, open_sound, require_split
    from dist_llm.use.sample import Request, as_request, write_rank

    opened, tokenizer = open_sound(checkpoint)
    require_split(opened.config.model, writing.nproc)
    ids = [tokenizer.prompt(text) for text in texts]
    stop_tokens = (*kept_ends(opened, tokenizer), *flags.stop_ids(tokenizer, writing.stop_tokens))
    shape, named = (tokens, samples, batch, writing.stops, stop_tokens, writing.place), flags.named_adapters(writing.adapters)
    request = Request(str(opened.path), ids, writing.choice, *shape, named)
    _note_long(ids, opened.config.data.sequence)
    shown = _Shown(texts, samples=samples, adapters=[name for name, _ in named], quiet=writing.as_json)
    runtime = writing.place.runtime(opened.config.runtime)
    about = on_ranks(write_rank, as_request(request), nproc=writing.nproc, runtime=runtime, hear=shown.take)[0]
    if writing.as_json:
        lines = [{**line, "prompt": texts[line["prompt"]]} for line in shown.lines]
        keys = [key for key in ("adapter", "prompt", "text", "tokens", "finish") if len(lines) == 1 and key in lines[0]]
        whole: dict[str, Any] = {"version": 1, "checkpoint": str(opened.path), "seed": writing.choice.seed, "ranks": writing.nproc, **about}
        whole |= {key: lines[0][key] for key in keys}
        whole["samples"] = lines
        typer.echo(json.dumps(whole))
    shown.close()


class _Shown:
    """Shows a single text as it comes, and several one after the other, each whole, in their order."""

    def __init__(self, texts: list[str], *, samples: int, adapters: list[str], quiet: bool) -> None:
        self.texts, self.quiet = texts, quiet
        names: list[str | None] = [*adapters] or [None]
        self.order = [(name, number, sample) for name in names for number in range(len(texts)) for sample in range(samples)]
        self.samples, self.single = samples, len(self.order) == 1
        self.lines: list[dict[str, Any]] = []  # in their order, as far as it goes without a gap
        self.waiting: dict[tuple[str | None, int, int], dict[str, Any]] = {}
        if self.single and not quiet:
            typer.echo(printable(texts[0]), nl=False)

    def take(self, message: dict[str, Any]) -> None:
        """What rank 0 says: a piece of a text, or a line that is done."""
        if "piece" in message:
            if self.single and not self.quiet:
                typer.echo(printable(message["piece"]), nl=False)
                sys.stdout.flush()
            return
        line = message["line"]
        self.waiting[line.get("adapter"), line["prompt"], line["sample"]] = line
        while len(self.lines) < len(self.order) and (line := self.waiting.pop(self.order[len(self.lines)], None)) is not None:
            self.lines.append(line)
            if not self.quiet and not self.single:
                name = f"{line['adapter']}, " if "adapter" in line else ""
                name += f"prompt {line['prompt'] + 1}" + (f", sample {line['sample'] + 1}" if self.samples > 1 else "")
                typer.echo(f"--- {name} ({line['finish']}, {len(line['tokens'])} tokens)")
                typer.echo(printable(self.texts[line["prompt"]] + line["text"]))

    def close(self) -> None:
        """The end of the line of a single text."""
        if self.single and not self.quiet:
            typer.echo()


def _prompts(given: list[str] | None, file: str | None) -> list[str]:
    """All prompts, those of flags first; an empty text for a new document where there is none. Raises UsageError or DataError."""
    texts = [flags.require_text(text, where="--prompt") for text in given or ()]
    if "" in texts:
        raise UsageError(
            "the prompt is empty",
            where="--prompt",
            expected="text",
            found="nothing",
            next="the same command without --prompt begins a new document",
        )
    if file is not None:
        texts += _from_stdin() if file == "-" else _from_file(Path(file).expanduser())
    return texts or [""]


def _from_stdin() -> list[str]:
    return _lines(sys.stdin.buffer.read(LARGEST_FILE + 1), where="stdin", as_json=False)


def _from_file(path: Path) -> list[str]:
    if not path.is_file():
        raise UsageError(
            "there is no file of prompts",
            where=str(path),
            expected="a prompt a line; - reads stdin",
            found="no such file",
            next="dist-llm sample CKPT --prompts -",
        )
    try:
        with path.open("rb") as handle:
            return _lines(handle.read(LARGEST_FILE + 1), where=str(path), as_json=path.suffix == ".jsonl")
    except OSError as error:
        raise DataError(
            "the file of prompts cannot be read", where=str(path), expected="a file that can be read", found=error.strerror
        ) from error


def _lines(content: bytes, *, where: str, as_json: bool) -> list[str]:
    """The prompts of a file. Raises DataError with every line that holds none."""
    if len(content) > LARGEST_FILE or content.count(b"\n") > MOST_PROMPTS:
        raise DataError("there are too many prompts", where=where, expected=f"at most {MOST_PROMPTS:,} lines, {LARGEST_FILE >> 20} MiB")
    found, bad = [], []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            text = line.decode("utf-8")
            if as_json:
                text = json.loads(text)["prompt"]
            if not isinstance(text, str) or not text:
                raise ValueError("an empty prompt" if text == "" else "its prompt is no text")
            found.append(flags.require_text(text, where=f"{where}:{number}"))
        except UnicodeDecodeError:
            bad.append(f"{where}:{number}: not UTF-8")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = error if type(error) is ValueError else 'expected {"prompt": "..."}'
            bad.append(f"{where}:{number}: {plain(reason)}")
    if bad or not found:
        what = "lines of the file hold no prompt" if bad else "there are no prompts"
        raise DataError(what, where=where, expected="a prompt a line", found=None if bad else "an empty file", details=bad)
    return found


def _note_long(ids: list[list[int]], window: int) -> None:
    """Says which prompts are longer than what the model can see."""
    long = [number for number, one in enumerate(ids, 1) if len(one) > window]
    if long:
        which = f"prompt {long[0]} has {len(ids[long[0] - 1])} tokens" if len(long) == 1 else f"{len(long)} prompts are longer"
        flags.note(f"{which}; the model sees the last {window}")
