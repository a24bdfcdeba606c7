"""A checkpoint as a model of lm-evaluation-harness (the extra `eval`), which is imported when this is called and not before.

import lm_eval
from dist_llm.use.lm_eval_adapter import lm_eval_model

lm_eval.simple_evaluate(model=lm_eval_model("runs/quickstart"), tasks=["lambada_openai"])
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_llm.errors import UsageError
from dist_llm.interop.ends import ends_of_answers, kept_ends
from dist_llm.use.conversation import choose_template
from dist_llm.use.load import Place, load_here, open_sound
from dist_llm.use.score import Scorer


def lm_eval_model(checkpoint: str | Path, *, device: str = "auto", dtype: str = "auto", batch: int = 8) -> Any:
    """An `lm_eval.api.model.LM` of a checkpoint of any layout.

    Raises UsageError where lm-eval is not installed, CheckpointError where the checkpoint is not sound.
    """
    opened, tokenizer = open_sound(Path(checkpoint))
    notes: list[str] = []
    template, tokenizer = choose_template(None, opened, tokenizer, tell=notes.append)
    model = load_here(opened, tokenizer, Place(device, dtype))
    sequence, ends = opened.config.data.sequence, {*kept_ends(opened, tokenizer), *ends_of_answers(opened)}
    return lm_eval_class()(Scorer(model, tokenizer, window=sequence, batch=batch, ends=ends, template=template), notes)


def lm_eval_class() -> Any:
    """The subclass of `lm_eval.api.model.LM` around a Scorer. Raises UsageError where lm-eval is not installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        needs = "the extra eval: pip install 'dist-llm[eval]'"
        raise UsageError("lm-eval is not installed", where="lm_eval", expected=needs, found=str(error)) from error

    class DistLlm(LM):
        """Answers the harness' three kinds of request; an instance's `args` are what is asked."""

        def __init__(self, scorer: Scorer, notes: Sequence[str] = ()) -> None:
            super().__init__()
            self.scorer, self.notes = scorer, notes  # notes: on the template, said when it is asked for

        @property
        def tokenizer_name(self) -> str:
            """Names the tokenizer in the harness' caches."""
            return self.scorer.tokenizer.hash

        def chat_template(self, chat_template: bool | str = False) -> str:
            """The text of the checkpoint's template, which is the only one; empty where none is asked for."""
            self.scorer.talks = bool(chat_template)
            for note in self.notes if chat_template else ():
                logging.getLogger(__name__).warning(note)
            return self.scorer.template.text if chat_template and self.scorer.template is not None else ""

        def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
            """A conversation as a context."""
            return self.scorer.chat(chat_history, answer=add_generation_prompt)

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            """(context, continuation) -> (log probability, greedy or not)."""
            return self.scorer.likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            """(text,) -> its log probability."""
            return self.scorer.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """(context, settings) -> the text that follows."""
            return self.scorer.until([request.args for request in requests])

    return DistLlm
