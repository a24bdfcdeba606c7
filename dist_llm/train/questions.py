"""Questions with one right answer, none of them trained on, that a run is asked before its first step and after its last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_llm import flight
from dist_llm.config.schema import Config
from dist_llm.data.prepare import Prepared
from dist_llm.engines.native import NativeEngine
from dist_llm.infer.exam import TASKS, answered, asked, grouped, marks, questions
from dist_llm.infer.model import Model, Weights
from dist_llm.train.sample import with_whole_weights

AT_ONCE = 64  # answers that are written together


class Questions:
    """`track.questions` of each task of `skills`, answered greedily by whole weights on one rank, whatever layout the run has."""

    def __init__(self, engine: NativeEngine, config: Config, prepared: Prepared, folder: Path) -> None:
        self.engine, self.config, self.prepared, self.folder = engine, config, prepared, folder / ".weights"
        self.tasks = tuple(dict.fromkeys(config.data.skills.tasks or TASKS))

    def ask(self) -> dict[str, dict[str, Any]] | None:
        """`exam.marks` by task and for `all` on rank 0, None elsewhere and where nothing is asked; every rank calls it."""
        found: list[dict[str, dict[str, Any]]] = []
        if self.config.track.questions:
            with_whole_weights(self.engine, self.config.model, self.folder, lambda weights: found.append(self._marks(weights)))
        return found[0] if found else None

    def _marks(self, weights: Weights) -> dict[str, dict[str, Any]]:
        engine, config, prepared = self.engine, self.config, self.prepared
        model = Model(weights, config.model, dtype=engine.dtype, device=engine.device, tokens=prepared.tokenizer.ids)
        pairs = questions(config, prepared, tasks=self.tasks, each=config.track.questions, seed=config.runtime.seed)
        template = prepared.template if config.data.chat.format is not None else None
        groups = grouped(asked(pairs, prepared.tokenizer, template), AT_ONCE)
        found: list[tuple[str, bool]] = []
        for group in groups:
            flight.enter("sample")
            found += answered(model, prepared.tokenizer, group, template=template, window=config.data.sequence)
        return marks(found, self.tasks)
