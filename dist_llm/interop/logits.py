"""Does an exported folder compute what its checkpoint computes? transformers reads the folder, we read the checkpoint.

Compared in float64 where the model is small enough for it, else in float32. transformers takes some norms in float32 whatever the
dtype of the model; in a float64 comparison they keep float64, so that the difference is ours alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dist_llm.config.schema import ModelConfig
from dist_llm.data.tokenizer import load
from dist_llm.errors import NumericError, UsageError
from dist_llm.infer.model import Model, Weights
from dist_llm.model.table import num_parameters
from dist_llm.model.transformer import make_context
from dist_llm.random import key_of, uniform
from dist_llm.sharding import Box

LARGEST_WIDE = 300_000_000  # parameters that are compared in float64: 2.4 GB, twice
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
LENGTHS = (1, 7, 33, 128)  # tokens of the prompts


@dataclass(frozen=True)
class Compared:
    """The largest difference of logits, relative to the largest of theirs in the same prompt."""

    difference: float
    tolerance: float
    dtype: str
    prompts: int


class Cast:
    """The weights of a checkpoint as they were exported: rounded to `dtype` first, where it is given. Who gave them closes them."""

    def __init__(self, weights: Weights, dtype: torch.dtype | None) -> None:
        self.weights, self.dtype = weights, dtype

    def close(self) -> None:
        """Lets nothing go."""

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a weight, on the CPU."""
        values = self.weights.read(kind, name, box, start, stop)
        return values if self.dtype is None else values.to(self.dtype)


def compare_logits(
    folder: Path, weights: Weights, model: ModelConfig, *, prompts: Sequence[list[int]], adapter: Path | None = None
) -> Compared:
    """Compares the logits of a Hugging Face folder, under an adapter of PEFT's, with ours.

    Raises NumericError where they differ, UsageError where transformers or PEFT is not installed or cannot read its folder.
    """
    dtype = torch.float64 if num_parameters(model) <= LARGEST_WIDE else torch.float32
    theirs = their_logits(folder, prompts, dtype, adapter=adapter)
    ours = Model(weights, model, dtype=dtype, device=torch.device("cpu"))
    worst = 0.0
    for prompt, their in zip(prompts, theirs, strict=True):
        if their.shape[-1] != model.vocab:
            raise NumericError(
                "transformers reads another vocabulary", where=str(folder), expected=f"{model.vocab}", found=f"{their.shape[-1]}"
            )
        difference = float((all_logits(ours, prompt) - their).abs().max() / their.abs().max())
        worst = max(worst, difference) if difference == difference else float("inf")
    found = Compared(worst, TOLERANCE[dtype], str(dtype).removeprefix("torch."), len(prompts))
    if worst > found.tolerance:
        expected, seen = f"a difference of at most {found.tolerance:.0e} in {found.dtype}", f"{worst:.2e}"
        what = f"{'transformers computes' if adapter is None else 'PEFT computes'} other logits from the export"
        raise NumericError(what, where=str(adapter or folder), expected=expected, found=seen)
    return found


def prompts_for(model: ModelConfig, tokenizer: Path) -> list[list[int]]:
    """Prompts of the tokens that the model has a row for, drawn by their number: the same ones every time."""
    tokens = sorted(token for token in load(tokenizer).ids if token < model.vocab)
    lengths = [length for length in LENGTHS if length <= model.max_positions]
    places = [uniform(torch.arange(length), key_of(0, "export", str(number))) * len(tokens) for number, length in enumerate(lengths)]
    return [[tokens[int(place)] for place in prompt] for prompt in places]


@torch.no_grad()
def all_logits(model: Model, tokens: Sequence[int]) -> Tensor:
    """Tokens (S,) -> the logits after each of them (S, V)."""
    line = torch.tensor([list(tokens)])
    context = make_context(model.config, line, line, dtype=model.dtype, training=False)
    embedding, *blocks, head = model.units
    x = embedding(context)
    for block in blocks:
        x = block(x, context)
    return head.logits(x)[0]


def their_logits(folder: Path, prompts: Sequence[list[int]], dtype: torch.dtype, *, adapter: Path | None = None) -> list[Tensor]:
    """transformers' logits (S, V) of each prompt, weights in `dtype`, under an adapter of PEFT's.

    Raises UsageError where it is not installed, or cannot read.
    """
    try:
        import transformers

        if adapter is not None:
            import peft
    except ImportError as error:
        name = "peft" if error.name == "peft" else "transformers"
        way = f"pip install {name}, or export without --verify"
        expected = f"the package {name}"
        raise UsageError(f"--verify needs {name}", where="--verify", expected=expected, found="it is not installed", next=way) from None
    with _quiet():
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
        options |= {"attn_implementation": "eager", "dtype": dtype}  # eager: it knows every family's scores
        try:
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
            if adapter is not None:
                loaded = peft.PeftModel.from_pretrained(loaded, str(adapter))
                for parameter in loaded.parameters():  # rotary frequencies, which are none, stay as they were made
                    parameter.data = parameter.data.to(dtype)
        except Exception as error:  # whatever the library cannot read
            what = f"{'transformers' if adapter is None else 'PEFT'} cannot read the export"
            raise UsageError(what, where=str(adapter or folder), found=str(error).splitlines()[0][:200]) from error
        loaded.eval()
        with torch.no_grad(), KeepFloat64():
            return [loaded(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]


class KeepFloat64(TorchFunctionMode):
    """What is float64 is not rounded to float32 by a module that always computes in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leaves such a cast out; every other call is as it was."""
        kwargs = kwargs or {}
        if func is torch.nn.functional.softmax and kwargs.get("dtype") == torch.float32 and args[0].dtype == torch.float64:
            kwargs = {**kwargs, "dtype": torch.float64}
        casts = func is torch.Tensor.float or (func is torch.Tensor.to and torch.float32 in (*args[1:], *kwargs.values()))
        if casts and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks, warnings and progress bars."""
    import transformers

    logger = logging.getLogger("transformers")
    before, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()
