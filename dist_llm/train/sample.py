"""Text from a model: the whole model on one process, whatever layout its weights come from.

Each token is chosen with a uniform number addressed by (seed, position), so the same weights, prompt and seed give the
same text. Keys and values of earlier tokens are kept; when the window of the training sequence is full, the model
reads the newer half again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_llm.config.schema import Config, ModelConfig
from dist_llm.data.prepare import Prepared
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.engines.native import NativeEngine
from dist_llm.model.attention import attend, look_back
from dist_llm.model.roles import Roles
from dist_llm.model.table import table, unit_names
from dist_llm.model.transformer import Attention, build_unit, make_context
from dist_llm.random import key_of, uniform
from dist_llm.train.durable import Disk
from dist_llm.train.parts import Parts, part_of, write_part
from dist_llm.train.storage import together

PROMPT_TOKENS = 16
SAMPLE_TOKENS = 96
NUM_PROMPTS = 2


class Weights(Protocol):
    """Whole tensors by global name."""

    def whole(self, name: str) -> Tensor:
        """A whole weight, on the CPU."""


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen. temperature 0: the likeliest. top_k, top_p: among the likeliest k, or those that make up p."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class Model:
    """A whole model on one device for inference. tokens: the ids that its tokenizer has; rows of a padded vocabulary are never chosen."""

    def __init__(
        self, weights: Weights, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, tokens: Iterable[int] | None = None
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        absent = [] if tokens is None else sorted(set(range(config.vocab)).difference(tokens))
        self.absent = torch.tensor(absent, dtype=torch.int64, device=device)
        names = {row.name for row in table(config)}
        made: dict[str, nn.Parameter] = {}

        def make(name: str) -> nn.Parameter | None:
            if name in names and name not in made:  # a tied weight is one parameter
                made[name] = nn.Parameter(weights.whole(name).to(device, dtype), requires_grad=False)
            return made.get(name)

        self.units: list[Any] = [build_unit(name, config, make, Roles()) for name in unit_names(config)]

    @torch.no_grad()
    def logits(self, tokens: Sequence[int], *, first: int = 0) -> Tensor:
        """The logits (V,) after the last of some tokens of one sequence, the first of which is number `first` in it; -inf: no token."""
        line = torch.tensor([list(tokens)], device=self.device)
        positions = torch.arange(first, first + len(tokens), device=self.device)[None]
        context = make_context(self.config, line, line, dtype=self.dtype, positions=positions, training=False)
        embedding, *blocks, head = self.units
        x = embedding(context)
        for block in blocks:
            x = block(x, context)
        return head.logits(x[:, -1:])[0, 0].index_fill(0, self.absent, -torch.inf)

    def remember(self) -> None:
        """Starts a new sequence: from here on, keys and values of the tokens given to `logits` are kept."""
        for unit in self.units:
            for module in unit.modules():
                if isinstance(module, Attention):
                    module.attend = Memory(module.window)


class Memory:
    """Causal attention that keeps the keys and values of earlier calls, (1, K, S, E) each, and no more than a window of them.

    window: tokens that a token sees, itself included; 0: all.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float) -> Tensor:
        """q (1, H, S, E), k and v (1, K, S, E) -> (1, H, S, E). S is 1 but in the first call, whose mask knows the window."""
        if self.keys is None or self.values is None:
            self.keys, self.values = self._recent(k), self._recent(v)
            return attend(q, k, v, mask, scale, softcap)
        assert q.shape[2] == 1
        self.keys = self._recent(torch.cat((self.keys, k), dim=2))
        self.values = self._recent(torch.cat((self.values, v), dim=2))
        return look_back(q, self.keys, self.values, scale, softcap)

    def _recent(self, x: Tensor) -> Tensor:
        return x[:, :, -self.window :] if self.window else x


def generate(model: Model, prompt: Sequence[int], *, count: int, choice: Choice, window: int, end: int | None = None) -> Iterator[int]:
    """At most `count` tokens that follow a prompt (at least one token); stops after `end`. window: tokens that the model can see."""
    seen = list(prompt)[-window:]
    held, fresh = 0, seen
    for number in range(count):
        if held == 0:
            model.remember()
        token = pick(model.logits(fresh, first=held), choice, position=number)
        yield token
        if token == end:
            return
        held, fresh = held + len(fresh), [token]
        seen.append(token)
        if held == window:
            seen = fresh = seen[-max(1, window // 2) :]
            held = 0


def pick(logits: Tensor, choice: Choice, *, position: int) -> int:
    """One token from logits (V,), by the inverse of the cumulative distribution over tokens in falling order, in float64."""
    values, tokens = logits.detach().to("cpu", torch.float64).sort(descending=True, stable=True)
    if choice.temperature == 0:
        return int(tokens[0])
    kept = len(values) if choice.top_k is None else min(choice.top_k, len(values))
    likely = torch.softmax((values[:kept] - values[0]) / choice.temperature, dim=0).cumsum(0)
    if choice.top_p is not None:
        likely = likely[: int((likely < choice.top_p * likely[-1]).sum()) + 1]
    point = uniform(torch.tensor([position]), key_of(choice.seed, "sample"))[0] * likely[-1]
    return int(tokens[min(int(torch.searchsorted(likely, point)), len(likely) - 1)])


def stream(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as they come; bytes of an unfinished letter wait for the rest. The end token has no text."""
    given: list[int] = []
    shown, late = 0, 0
    for token in tokens:
        if token == tokenizer.end_id:
            break
        given.append(token)
        text, late = tokenizer.decode(given), late + 1
        if not text.endswith("\ufffd") or late > 4:  # no letter has more bytes
            yield text[shown:]
            shown, late = len(text), 0
    if late:
        yield tokenizer.decode(given)[shown:]


class Samples:
    """Text from the model while it trains: continuations of the first held-out documents, from weights that all ranks hand over."""

    def __init__(self, engine: NativeEngine, config: Config, prepared: Prepared, folder: Path) -> None:
        self.engine, self.model, self.tokenizer, self.window = engine, config.model, prepared.tokenizer, config.data.sequence
        self.folder = folder / ".weights"
        self.choice = Choice(top_k=50, seed=config.runtime.seed)
        store = (prepared.validation or prepared.train)[0]
        documents = (store.document(number) for number in range(min(64, store.manifest.documents)))
        long = [document[:PROMPT_TOKENS].tolist() for document in documents if len(document) > PROMPT_TOKENS]
        self.prompts: list[list[int]] = long[:NUM_PROMPTS] or [[store.manifest.end_id]]

    def take(self) -> list[dict[str, str]]:
        """`prompt` and `text` of each sample on rank 0, nothing elsewhere; every rank calls it."""
        taken: list[dict[str, str]] = []
        with_whole_weights(self.engine, self.model, self.folder, lambda weights: taken.extend(self._texts(weights)))
        return taken

    def _texts(self, weights: Weights) -> list[dict[str, str]]:
        engine = self.engine
        model = Model(weights, self.model, dtype=engine.dtype, device=engine.device, tokens=self.tokenizer.ids)
        texts = []
        for prompt in self.prompts:
            tokens = generate(model, prompt, count=SAMPLE_TOKENS, choice=self.choice, window=self.window, end=self.tokenizer.end_id)
            texts.append({"prompt": self.tokenizer.decode(prompt), "text": "".join(stream(self.tokenizer, tokens))})
        return texts


def with_whole_weights(engine: NativeEngine, model: ModelConfig, folder: Path, use: Callable[[Weights], Any]) -> None:
    """Every rank writes its weights into `folder`, rank 0 calls `use` on whole tensors, and the folder is gone again."""
    mesh, shapes = engine.mesh, {row.name: row.shape for row in table(model)}
    try:
        together(mesh, engine.device, lambda: _empty(folder) if mesh.rank == 0 else None)
        part = part_of(item for item in engine.state() if item.kind == "weight")
        together(mesh, engine.device, lambda: write_part(Disk(), folder, mesh.rank, part) and None)
        if mesh.rank == 0:
            use(Parts(folder, mesh.layout.world, shapes))
    finally:
        if mesh.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Makes a folder, without what an interrupted use has left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
