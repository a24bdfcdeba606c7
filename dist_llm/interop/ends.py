"""Which tokens end a text: what came along with the weights says so, and the template that answers were trained with."""

from __future__ import annotations

from contextlib import suppress

from dist_llm.data.template_files import choose_template
from dist_llm.data.tokenizer import Tokenizer, load
from dist_llm.errors import Failure
from dist_llm.strict import strict_json
from dist_llm.train.folder import Checkpoint

GENERATION = "generation_config.json"


def named_ends(values: object) -> list[int]:
    """The ids that a generation_config.json names: one, a list, or none."""
    ends = values.get("eos_token_id") if isinstance(values, dict) else None
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]


def kept_ends(opened: Checkpoint, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text by the generation_config.json that came along with the weights, as far as the tokenizer has them."""
    with suppress(ValueError, RecursionError):  # of a checkpoint that was made by others
        return tuple(end for end in named_ends(strict_json(opened.beside.get(GENERATION, b"{}"))) if end in tokenizer.ids)
    return ()


def ends_of_answers(opened: Checkpoint) -> tuple[int, ...]:
    """The ids that end an answer under the template that a checkpoint was trained with, that of a document first; none without one."""
    if opened.config.data.chat.format is None:
        return ()
    tokenizer = load(opened.path)
    try:
        template = choose_template("auto", end=tokenizer.end, begin=tokenizer.begin_names, tokenizer=opened.path)
        return tuple(sorted(template.stop_ids(tokenizer), key=lambda token: token != tokenizer.end_id))
    except Failure:
        return ()
