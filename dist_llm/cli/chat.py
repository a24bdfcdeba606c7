"""`dist-llm chat CKPT`: talk with a checkpoint of any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dist_llm.cli import flags
from dist_llm.errors import UsageError


def chat(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A step folder, or a run folder: its newest.")],
    template: Annotated[
        str | None, typer.Option("--template", help="chatml, llama3, qwen, plain, model or a .jinja file; else the run's own, or plain.")
    ] = None,
    system: Annotated[str, typer.Option("--system", help="What the model is told first.")] = "",
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=2**31, help="At most so many tokens an answer.")] = 512,
    temperature: flags.Temperature = 0.7,
    top_k: flags.TopK = 50,
    top_p: flags.TopP = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.Penalty = 1.0,
    stop: flags.Stop = None,
    stop_token: flags.StopToken = None,
    seed: flags.Seed = 0,
    nproc: flags.Nproc = 1,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    as_json: flags.Json = False,
) -> None:
    """Talk with a checkpoint of any layout. /help, /reset, /system TEXT, /save FILE, /quit; without a terminal one line a turn."""
    chosen: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    choice = flags.choice_of(**chosen, repetition_penalty=repetition_penalty, seed=seed)
    place, stops = flags.place_of(device, dtype), flags.stop_texts(stop)
    flags.require_text(system, where="--system")

    from dist_llm.use.chat import Brake, hold_chat
    from dist_llm.use.conversation import Conversation, choose_template
    from dist_llm.use.load import open_sound, require_split
    from dist_llm.use.talk import Manner, Talk

    opened, tokenizer = open_sound(checkpoint)
    require_split(opened.config.model, nproc)
    form, window = choose_template(template, opened, tokenizer), opened.config.data.sequence
    if window < 4:
        raise UsageError("the model sees too few tokens for a conversation", where=str(opened.path), found=f"data.sequence {window}")
    ends = tuple(sorted({*form.stop_ids(tokenizer), *flags.stop_ids(tokenizer, stop_token or ())}))
    conversation = Conversation(form, tokenizer, window=window, reserve=max(1, min(tokens, window // 4)), system=system)
    about = {"checkpoint": str(opened.path), "step": opened.step, "template": form.name, "ranks": nproc}
    brake = Brake()
    talk = Talk(conversation, Manner(choice, tokens, stops, ends, as_json, about), brake)
    runtime = place.runtime(opened.config.runtime)
    hold_chat(talk.turns(), brake, checkpoint=opened.path, place=place, nproc=nproc, runtime=runtime)
