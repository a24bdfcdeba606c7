"""`dist-llm chat CKPT`: talk with a checkpoint of any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm.cli import flags
from dist_llm.errors import UsageError


@flags.writing(temperature=0.7)
def chat(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A step folder, or a run folder: its newest.")],
    template: Annotated[
        str | None, typer.Option("--template", help="chatml, llama3, qwen, plain, model or a .jinja file; else the run's own, or plain.")
    ] = None,
    system: Annotated[str, typer.Option("--system", help="What the model is told first.")] = "",
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=2**31, help="At most so many tokens an answer.")] = 512,
    writing: flags.Writing = flags.WRITTEN,
) -> None:
    """Talk with a checkpoint of any layout, or with adapters on it. /help says what else there is; without a terminal one line a turn."""
    flags.require_text(system, where="--system")

    from dist_llm.interop.ends import kept_ends
    from dist_llm.use.chat import Brake, hold_chat
    from dist_llm.use.conversation import Conversation, choose_template
    from dist_llm.use.load import open_sound, require_split
    from dist_llm.use.talk import Manner, Talk

    opened, tokenizer = open_sound(checkpoint)
    require_split(opened.config.model, writing.nproc)
    form, tokenizer = choose_template(template, opened, tokenizer, tell=flags.note)
    window = opened.config.data.sequence
    if window < 4:
        raise UsageError("the model sees too few tokens for a conversation", where=str(opened.path), found=f"data.sequence {window}")
    ends = {*form.stop_ids(tokenizer), *kept_ends(opened, tokenizer), *flags.stop_ids(tokenizer, writing.stop_tokens)}
    conversation = Conversation(form, tokenizer, window=window, reserve=max(1, min(tokens, window // 4)), system=system)
    about = {"checkpoint": str(opened.path), "step": opened.step, "template": form.name, "ranks": writing.nproc}
    named, brake = flags.named_adapters(writing.adapters), Brake()
    names = tuple(name for name, _ in named)
    talk = Talk(conversation, Manner(writing.choice, tokens, writing.stops, tuple(sorted(ends)), writing.as_json, about, names), brake)
    shared: dict[str, Any] = {"place": writing.place, "nproc": writing.nproc, "runtime": writing.place.runtime(opened.config.runtime)}
    hold_chat(talk.turns(), brake, checkpoint=opened.path, adapters=named, **shared)
