"""Text from the model while it trains: whole weights on one rank, whatever layout the run has."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_llm import flight
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.data.prepare import Prepared
from dist_llm.engines.native import NativeEngine
from dist_llm.infer.choose import Choice
from dist_llm.infer.model import Model, Weights
from dist_llm.infer.text import stream
from dist_llm.infer.write import follow
from dist_llm.model.table import table
from dist_llm.sharding import Box
from dist_llm.train.durable import Disk
from dist_llm.train.parts import Parts, part_of, write_part
from dist_llm.train.storage import together

PROMPT_TOKENS = 16
SAMPLE_TOKENS = 96
NUM_PROMPTS = 2


class Samples:
    """Text from the model while it trains: continuations of the first held-out documents, from weights that all ranks hand over."""

    def __init__(self, engine: NativeEngine, config: Config, prepared: Prepared, folder: Path) -> None:
        self.engine, self.model, self.tokenizer, self.window = engine, config.model, prepared.tokenizer, config.data.sequence
        self.folder = folder / ".weights"
        self.choice = Choice(top_k=50, seed=config.runtime.seed)
        self.begin = self.tokenizer.before_documents
        store = (prepared.validation or prepared.train)[0]
        documents = (store.document(number) for number in range(min(64, store.manifest.documents)))
        long = [document[:PROMPT_TOKENS].tolist() for document in documents if len(document) > PROMPT_TOKENS]
        self.prompts: list[list[int]] = long[:NUM_PROMPTS] or [self.tokenizer.opening]

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
            tokens = follow(model, prompt, count=SAMPLE_TOKENS, choice=self.choice, window=self.window, ends={self.tokenizer.end_id})
            text = "".join(stream(self.tokenizer, _alive(tokens), after=prompt))
            begun = prompt[: len(self.begin)] == self.begin
            texts.append({"prompt": self.tokenizer.decode(prompt[len(self.begin) if begun else 0 :]), "text": text})
        return texts


def _alive(tokens: Iterable[int]) -> Iterator[int]:
    """The tokens; the flight record hears of each."""
    for token in tokens:
        flight.enter("sample")
        yield token


@dataclass(frozen=True)
class Merged:
    """Weights that are trained and those that are not, under their names."""

    parts: Parts
    trained: dict[str, bool]

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a weight, (stop - start,) on the CPU."""
        return self.parts.read(kind if self.trained[name] else "frozen", name, box, start, stop)

    def whole(self, name: str) -> Tensor:
        """A whole weight, on the CPU."""
        return self.parts.whole(name, "weight" if self.trained[name] else "frozen")


def with_whole_weights(engine: NativeEngine, model: ModelConfig, folder: Path, use: Callable[[Weights], Any]) -> None:
    """Every rank writes its weights into `folder`, rank 0 calls `use` on whole tensors, and the folder is gone again."""
    mesh, shapes = engine.mesh, {row.name: row.shape for row in table(model)}
    try:
        together(mesh, engine.device, lambda: _empty(folder) if mesh.rank == 0 else None)
        part = part_of(item for item in engine.state() if item.kind in ("weight", "frozen"))
        together(mesh, engine.device, lambda: write_part(Disk(), folder, mesh.rank, part) and None)
        if mesh.rank == 0:
            use(Merged(Parts(folder, mesh.layout.world, shapes), {row.name: row.trained for row in table(model)}))
    finally:
        if mesh.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    """Makes a folder, without what an interrupted use has left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
