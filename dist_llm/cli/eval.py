"""`dist-llm eval CKPT`: perplexity on held-out text, and exact answers to questions that were never seen."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm.cli import flags
from dist_llm.errors import DataError, SpaceError, UsageError, plain

DEFAULT_QUESTIONS = 50  # of each task, where the run has trained on skills
QUIET_SECONDS = 10.0  # between lines of progress where there is no terminal


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A step folder, or a run folder: its newest.")],
    data: Annotated[str | None, typer.Option("--data", metavar="PATH", help="Another text than the run's own held-out one.")] = None,
    batches: Annotated[int, typer.Option("--batches", min=0, help="The first N global batches of the text; 0: all.")] = 0,
    no_text: Annotated[bool, typer.Option("--no-text", help="Questions alone.")] = False,
    skills: Annotated[
        int | None, typer.Option("--skills", min=0, max=10_000, help="Questions of each task; 50 for a run on skills, else 0.")
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", metavar="A,B", help="copy, reverse, sort, brackets, add ...; else all.")] = None,
    template: Annotated[str | None, typer.Option("--template", help="The chat template of questions; else the run's own.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=10_000, help="Answers that are written at once.")] = 32,
    seed: Annotated[int, typer.Option("--seed", min=0, max=flags.LARGEST_SEED, help="Of the draw of questions.")] = 0,
    nproc: Annotated[int, typer.Option("--nproc", min=1, max=4096, help="Local ranks that share the work; the numbers stay the same.")] = 1,
    adapter: flags.Adapters = None,
    device: flags.Device = "auto",
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, float64, float32 or bfloat16; else the run's own.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the JSON there, too.")] = None,
    as_json: flags.Json = False,
) -> None:
    """Measure a checkpoint: loss, perplexity and bits per byte on text it has not seen; exact answers to questions, by task."""
    place = flags.place_of(device, dtype)

    from dist_llm.infer.exam import TASKS, uses_skills
    from dist_llm.use.evaluate import Exam, evaluate_rank
    from dist_llm.use.load import on_ranks, open_sound

    chosen = _tasks(tasks, TASKS)
    if no_text and data is not None:
        raise UsageError(
            "--no-text leaves no text to measure",
            where="--data",
            expected="one of the two",
            found=f"--no-text and --data {data}",
            next="the same command without --no-text",
        )
    opened, _ = open_sound(checkpoint)
    count = skills if skills is not None else DEFAULT_QUESTIONS if uses_skills(opened.config) else 0
    if no_text and not count:
        raise UsageError("there is nothing to measure", where="--no-text", expected="--skills N", found="neither text nor questions")
    named = flags.named_adapters(adapter or ())
    exam = Exam(str(opened.path), not no_text, data, batches, count, chosen, template, seed, batch, place, named)
    runtime, began = place.runtime(opened.config.runtime), time.monotonic()
    with _Progress() as progress:
        found = on_ranks(evaluate_rank, asdict(exam), nproc=nproc, runtime=runtime, hear=progress.take)[0]
    if not no_text and found["text"] is None and not count:
        raise DataError(
            "nothing is held out",
            where=str(opened.path),
            expected="data.validation above 0",
            found="0",
            next="dist-llm eval CKPT --data PATH",
        )
    whole = {"version": 1, "checkpoint": str(opened.path), **found, "seconds": time.monotonic() - began}
    if out is not None:
        _write(out, whole)
    if as_json:
        typer.echo(json.dumps(whole))
        return
    for line in table(whole):
        typer.echo(plain(line))


def table(found: dict[str, Any]) -> list[str]:
    """The lines that a reader sees."""
    text, skills = found["text"], found["skills"]
    lines = [f"checkpoint  {found['checkpoint']}"]
    if text is not None:
        over = f"{text['targets']:,} tokens, {text['batches']} of {text['of_batches']} batches, {text['source']}"
        lines += [f"text        {over}", f"loss        {text['loss']:.4f}"]
        lines += [f"perplexity  {text['perplexity']:.3f}"] if text["perplexity"] is not None else []
        lines += [f"pairs right {text['accuracy']:.1%}, margin {text['reward_margin']:.4f}"] if "accuracy" in text else []
        lines += [f"bits/byte   {text['bits_per_byte']:.4f}"] if text["bits_per_byte"] is not None else []
    elif skills is not None:
        lines.append("text        not measured")
    if skills is not None:
        lines += ["", f"{'task':<10}  {'right':>11}  {'share':>6}  95 %"]
        for task, one in skills.items():
            share = "-" if one["share"] is None else f"{100 * one['share']:.1f}"
            lines.append(
                f"{task:<10}  {one['right']:>4} / {one['count']:>4}  {share:>6}  {100 * one['low']:.1f} to {100 * one['high']:.1f}"
            )
    return lines + _beside(found)


def _beside(found: dict[str, Any]) -> list[str]:
    """A row for the checkpoint, and one for each adapter on it; nothing where there are none."""
    rows = {"base": found, **found["adapters"]} if "adapters" in found else {}
    columns = {"loss": 4, "perplexity": 3, "bits_per_byte": 4}
    lines = ["", f"{'adapter':<16}  {'loss':>8}  {'perplexity':>10}  {'bits/byte':>9}  right"] if rows else []
    for name, one in rows.items():
        values = {key: (one["text"] or {}).get(key) for key in columns}
        loss, perplexity, bits = ("-" if values[key] is None else f"{values[key]:.{digits}f}" for key, digits in columns.items())
        right = "-" if one["skills"] is None else f"{one['skills']['all']['right']} / {one['skills']['all']['count']}"
        lines.append(f"{name:<16}  {loss:>8}  {perplexity:>10}  {bits:>9}  {right}")
    return lines


def _tasks(given: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The tasks of a list. Raises UsageError for one that there is not."""
    if given is None:
        return known
    names = tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in names:
        if name not in known:
            raise UsageError("there is no such task", where="--tasks", expected=", ".join(known), found=name)
    return names


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n")
    except OSError as error:
        raise SpaceError(
            "the result cannot be written", where=str(path), expected="a file that can be written", found=error.strerror
        ) from error


class _Progress:
    """How far it is, on stderr: one line that moves on a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        self.moves, self.told, self.width = sys.stderr.isatty(), time.monotonic(), 0
        self.notes: set[str] = set()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def _clear(self) -> None:
        if self.width:
            print("\r" + " " * self.width + "\r", end="", file=sys.stderr, flush=True)

    def take(self, message: dict[str, Any]) -> None:
        """{"progress": [what, done, of]}, or {"note": text}, which is said once."""
        if "note" in message:
            if message["note"] not in self.notes:
                self.notes.add(message["note"])
                self._clear()
                flags.note(message["note"])
            return
        what, done, of = message["progress"]
        now, text = time.monotonic(), f"{plain(what, width=60)}: {done} of {of}"
        if self.moves:
            print("\r" + text.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = max(self.width, len(text))
        elif now - self.told > QUIET_SECONDS:
            self.told = now
            print(text, file=sys.stderr, flush=True)
