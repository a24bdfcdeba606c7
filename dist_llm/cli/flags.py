"""Flags that `sample`, `chat` and `eval` share, and what is refused of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_llm.errors import MAX_WIDTH, UsageError, plain

if TYPE_CHECKING:
    from dist_llm.data.tokenizer import Tokenizer
    from dist_llm.infer.choose import Choice
    from dist_llm.use.load import Place

LARGEST_SEED = 2**63 - 1

Temperature = Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, help="Among the likeliest K tokens only.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Among the likeliest that make up P only; above 0, at most 1.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Among tokens at least P times as likely as the likeliest; 0 to 1.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: tokens that are there already become less likely.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="The text ends before it; may be given again.")]
StopToken = Annotated[
    list[str] | None, typer.Option("--stop-token", metavar="ID|NAME", help="A token that ends the text; may be given again.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="The same seed gives the same text.")]
Nproc = Annotated[int, typer.Option("--nproc", min=1, max=4096, help="Local ranks that share the model (tensor parallelism).")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (bfloat16 on CUDA, else float32), float64, float32 or bfloat16")]
Json = Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")]


Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="[NAME=]PATH", help="An adapter on CKPT: its run, or PEFT's folder; may be given again."),
]


@dataclass(frozen=True)
class Writing:
    """What the flags that `sample` and `chat` share say of how text is made. stop_tokens and adapters as they were typed."""

    choice: Choice
    place: Place
    stops: tuple[str, ...]
    stop_tokens: tuple[str, ...]
    adapters: tuple[str, ...]
    nproc: int
    as_json: bool


WRITTEN: Any = None  # the default of a verb's last parameter, which `writing` fills in


def writing(*, temperature: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A verb whose last parameter, `writing`, is made of the flags below, which it gets in its place."""

    def read(
        *,
        temperature: Temperature = temperature,
        top_k: TopK = 50,
        top_p: TopP = None,
        min_p: MinP = None,
        repetition_penalty: Penalty = 1.0,
        stop: Stop = None,
        stop_token: StopToken = None,
        adapter: Adapters = None,
        seed: Seed = 0,
        nproc: Nproc = 1,
        device: Device = "auto",
        dtype: Dtype = "auto",
        as_json: Json = False,
    ) -> Writing:
        chosen: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        choice = choice_of(**chosen, repetition_penalty=repetition_penalty, seed=seed)
        given = (tuple(stop_token or ()), tuple(adapter or ()))
        return Writing(choice, place_of(device, dtype), stop_texts(stop), *given, nproc, as_json)

    shared = signature(read, eval_str=True).parameters

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        own = {name: one for name, one in signature(verb, eval_str=True).parameters.items() if name != "writing"}

        @wraps(verb)
        def run(**given: Any) -> None:
            verb(**{name: given[name] for name in own}, writing=read(**{name: given[name] for name in shared}))

        both = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in (*own.values(), *shared.values())]
        run.__signature__ = Signature(both)  # type: ignore[attr-defined]
        del run.__wrapped__  # its flags are others
        run.__annotations__ = {}
        return run

    return decorate


def named_adapters(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(name, path) of `NAME=PATH`, or of a path, whose adapter has a name of its own. Raises UsageError, CheckpointError."""
    from dist_llm.interop.given import name_of
    from dist_llm.use.load import BASE

    found: list[tuple[str, str]] = []
    for text in given:
        name, mark, path = text.partition("=")
        if not mark or "/" in name:
            name, path = "", text
        path = str(Path(path).expanduser())
        name = name or name_of(Path(path))
        if not path or name in (BASE, *(known for known, _ in found)):
            expected = "another name, as NAME=PATH" if path else "NAME=PATH"
            raise UsageError("an adapter has no name of its own", where="--adapter", expected=expected, found=text)
        found.append((name, path))
    return tuple(found)


def choice_of(
    *, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None, repetition_penalty: float, seed: int
) -> Choice:
    """How tokens are chosen. Raises UsageError that names each flag which is out of its range."""
    from dist_llm.infer.choose import Choice

    rules: list[tuple[str, float | None, str, bool]] = [
        ("--temperature", temperature, "a number, 0 or more", temperature >= 0),
        ("--top-p", top_p, "a number above 0, at most 1", top_p is None or 0 < top_p <= 1),
        ("--min-p", min_p, "a number from 0 to 1", min_p is None or 0 <= min_p <= 1),
        ("--repetition-penalty", repetition_penalty, "a number above 0", repetition_penalty > 0),
    ]
    wrong = [rule for rule in rules if rule[1] is not None and not (rule[3] and isfinite(rule[1]))]
    if len(wrong) == 1:
        flag, value, expected, _ = wrong[0]
        raise UsageError("a flag is out of its range", where=flag, expected=expected, found=f"{value:g}")
    if wrong:
        lines = [f"{flag}: {value:g}, expected {expected}" for flag, value, expected, _ in wrong]
        raise UsageError(f"{len(wrong)} flags are out of their range", where=" ".join(rule[0] for rule in wrong), details=lines)
    return Choice(temperature, top_k, top_p, min_p, repetition_penalty, seed)


def place_of(device: str, dtype: str | None) -> Place:
    """Device and dtype. Raises UsageError for another word."""
    from dist_llm.use.load import Place

    known: dict[str, tuple[str | None, tuple[str, ...]]] = {
        "--device": (device, ("auto", "cpu", "cuda")),
        "--dtype": (dtype, ("auto", "float64", "float32", "bfloat16")),
    }
    for flag, (value, words) in known.items():
        if value is not None and value not in words:
            raise UsageError("there is no such choice", where=flag, expected=", ".join(words), found=str(value))
    return Place(device, dtype)


def note(text: str, *, width: int = MAX_WIDTH) -> None:
    """Says on stderr what else is to be known, in so many letters at most."""
    typer.echo(f"note: {plain(text, width=width)}", err=True)


def require_text(text: str, *, where: str) -> str:
    """A text from the command line. Raises UsageError where it is not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("the text is not UTF-8", where=where, expected="text", found=f"character {error.start}") from None
    return text


def stop_ids(tokenizer: Tokenizer, given: Sequence[str]) -> tuple[int, ...]:
    """The ids of stop tokens, given by id or by name. Raises UsageError for one that the tokenizer does not have."""
    found, ids = [], tokenizer.ids
    for word in given:
        number = word.isascii() and word.isdigit() and len(word) < 12
        token = int(word) if number else tokenizer.inner.token_to_id(require_text(word, where="--stop-token"))
        if token not in ids:
            raise UsageError("the tokenizer has no such token", where="--stop-token", expected="an id or a name of it", found=word)
        found.append(token)
    return tuple(found)


def stop_texts(given: Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings. Raises UsageError for an empty one."""
    for text in given or ():
        if not require_text(text, where="--stop"):
            raise UsageError("a stop string is empty", where="--stop", expected="at least one letter", found="none")
    return tuple(given or ())
