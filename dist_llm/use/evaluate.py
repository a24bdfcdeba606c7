"""`dist-llm eval`: the loss of a checkpoint on text it has not seen, and its answers to questions; over data-parallel ranks.

A batch's loss is computed by one rank, as training computes it on one process, and the batches are added in their order:
the numbers are the same to the bit on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_llm import comm
from dist_llm.config.schema import Config, TokenizerConfig
from dist_llm.data.batches import Batches, validation_batches
from dist_llm.data.pairs import PairBatches
from dist_llm.data.prepare import Prepared, prepare
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import DataError, UsageError
from dist_llm.infer.exam import answered, asked, grouped, marks, questions
from dist_llm.infer.model import Model
from dist_llm.mesh import whole_world
from dist_llm.train.evaluate import figures, text_bytes
from dist_llm.train.folder import Checkpoint
from dist_llm.train.reference import FILE, find
from dist_llm.train.setup import settle_rank
from dist_llm.train.trainer import context_of, pair_figures
from dist_llm.use.conversation import choose_template
from dist_llm.use.load import Hear, Place, load_here, open_sound


@dataclass(frozen=True)
class Exam:
    """What is measured. text: the loss; data: on this text, None: on what the run holds out; batches: so many, 0: all.

    skills: questions of each of the `tasks`; seed: of their draw; batch: answers that are written at once.
    """

    checkpoint: str
    text: bool = True
    data: str | None = None
    batches: int = 0
    skills: int = 0
    tasks: tuple[str, ...] = ()
    template: str | None = None
    seed: int = 0
    batch: int = 32
    place: Place = Place()
    adapters: tuple[tuple[str, str], ...] = ()  # (name, path): each is measured, beside the checkpoint without one


def evaluate_rank(rank: int, world: int, say: Hear, given: dict[str, Any]) -> dict[str, Any]:
    """One rank of `eval`: {"text": ..., "skills": ...}, the same on all; of each adapter in "adapters", by name.

    Rank 0 says {"progress": [what, done, of]}, and {"note": text} for what else is to be known.
    """
    exam = Exam(**{**given, "place": Place(**given["place"]), "tasks": tuple(given["tasks"])})
    opened, tokenizer = open_sound(Path(exam.checkpoint), whole=False)
    settle_rank(opened.config.runtime)
    model = load_here(opened, tokenizer, exam.place, rank=rank, adapters=exam.adapters)
    share = _Share(rank, world, model.device, say if rank == 0 else lambda message: None)
    needs_text = exam.text or (exam.skills > 0 and not opened.config.data.validation)
    prepared = _prepared(opened, tokenizer, exam.data if exam.text else None, share) if needs_text else None
    found: dict[str | None, dict[str, Any]] = {}
    for name in (None, *(name for name, _ in exam.adapters)):
        model.use(name)
        text = measure_text(model, opened.config, prepared, tokenizer, exam, share) if exam.text and prepared is not None else None
        skills = measure_skills(model, opened, tokenizer, prepared, exam, share) if exam.skills else None
        found[name] = {"text": text, "skills": skills}
    device, dtype, plain = model.device.type, str(model.dtype).removeprefix("torch."), found.pop(None)
    return {"step": opened.step, "device": device, "dtype": dtype, **plain, **({"adapters": found} if found else {})}


@dataclass(frozen=True)
class _Share:
    """What this rank does of a row of pieces of work: every world-th."""

    rank: int
    world: int
    device: torch.device
    tell: Hear

    def mine(self, count: int, what: str) -> Iterator[int]:
        """The numbers of this rank's pieces."""
        for number in range(self.rank, count, self.world):
            self.tell({"progress": [what, number, count]})
            yield number
        self.tell({"progress": [what, count, count]})

    def together(self, mine: dict[int, Any], count: int) -> list[Any]:
        """All pieces in their order, on all ranks."""
        gathered = comm.gather_json(
            [[number, value] for number, value in mine.items()], whole_world(self.rank, self.world), device=self.device
        )
        whole = {number: value for part in gathered for number, value in part}
        return [whole[number] for number in range(count)]


# --- text ----------------------------------------------------------------------------------------------------------------


def measure_text(
    model: Model, config: Config, prepared: Prepared, tokenizer: Tokenizer, exam: Exam, share: _Share
) -> dict[str, Any] | None:
    """`loss` in nats per target token, `loss_hex`, `perplexity`, `bits_per_byte`, and over how much; None where nothing is held out."""
    batches = held_out(prepared, config, whole=exam.data is not None)
    if batches is None:
        return None
    count = min(exam.batches or batches.num_batches, batches.num_batches)
    if isinstance(batches, PairBatches) and not (count := judged(batches, count)):
        what, way = "nothing is known of these pairs but what they are worth now", "--no-text --skills N, or beside the run's own folder"
        raise UsageError(what, where=exam.checkpoint, expected=f"{FILE} of the run, and the pairs it holds out", next=way)
    settings: dict[str, Any] = {"device": model.device, "dtype": model.dtype, "training": False}
    mine = {}
    for number in share.mine(count, "text"):
        micro = batches.micro_batches(number, dp_rank=0, dp_size=1, micro=config.batch.micro)
        losses = [model.loss(context_of(batch, config, **settings)) for batch in micro]
        mine[number] = [value.hex() for value in sum(losses[1:], losses[0]).view(-1).tolist()]
    sums = [0.0]
    for values in share.together(mine, count):
        sums = [a + b for a, b in zip_longest(sums, map(float.fromhex, values), fillvalue=0.0)]
    weight = sum(batches.weight(number) for number in range(count))
    if not weight:
        return None
    if len(sums) > 1:  # of pairs, which are no text
        found = {**dict.fromkeys(figures(1.0, 1.0, 0.0)), "loss": sums[0] / weight, **pair_figures(sums[1:], weight)}
    else:
        found = figures(sums[0], weight, text_bytes(batches, count, tokenizer))
    targets = sum(batches.targets(number) for number in range(count))
    about = {"targets": targets, "batches": count, "of_batches": batches.num_batches, "source": exam.data or "held out"}
    return {**found, "loss_hex": float(found["loss"] or 0.0).hex(), **about}


def judged(batches: PairBatches, count: int) -> int:
    """How many of the first batches have pairs whose worth before training is known, all of them."""
    known = (not any(np.isnan(batches.reference(int(one))).any() for one in batches.sample_ids(number)) for number in range(count))
    return next((number for number, good in enumerate(known) if not good), count)


def held_out(prepared: Prepared, config: Config, *, whole: bool) -> Batches | None:
    """The run's validation batches; whole: all of another text, in its order."""
    if whole:
        prepared = Prepared(prepared.tokenizer, prepared.train, prepared.weights, prepared.train, prepared.weights)
    return validation_batches(prepared, config.data, global_batch=config.batch.global_)


def _prepared(opened: Checkpoint, tokenizer: Tokenizer, data: str | None, share: _Share) -> Prepared:
    """The run's text, or another one in the tokens of the checkpoint. Raises UsageError where its tokens are not the model's (F24)."""
    config = opened.config
    settings, seed = config.data, config.runtime.seed
    own = TokenizerConfig(kind="file", path=str(opened.path / "tokenizer.json"))
    if settings.tokenizer.path is not None and not Path(settings.tokenizer.path).expanduser().exists():  # a base's, which may be gone
        settings = settings.model_copy(update={"tokenizer": own})
    if data is not None:
        settings = settings.model_copy(update={"source": data, "mix": None, "tokenizer": own, "validation": 0.0, "max_tokens": None})
    try:
        prepared = prepare(
            settings, seed=seed, progress=lambda message, fraction: share.tell({"progress": [message, round(100 * fraction), 100]})
        )
    except (DataError, UsageError) as failure:
        if data is None and failure.next is None:
            failure.next = "dist-llm eval CKPT --data PATH measures another text"
        raise
    if prepared.tokenizer.hash != tokenizer.hash:
        what, expected = "the text has other tokens than the model", f"tokenizer {tokenizer.hash[:16]}, the checkpoint's"
        way = "dist-llm eval CKPT --data PATH, which takes the checkpoint's tokenizer"
        raise UsageError(what, where=settings.dir, expected=expected, found=f"tokenizer {prepared.tokenizer.hash[:16]}", next=way)
    if config.preference.loss is not None and data is None:
        find(opened.path.parents[1], config, replace(prepared, base=opened.manifest.get("base")), dtype=None)
    return prepared


# --- skills --------------------------------------------------------------------------------------------------------------


def measure_skills(
    model: Model, opened: Checkpoint, tokenizer: Tokenizer, prepared: Prepared | None, exam: Exam, share: _Share
) -> dict[str, Any]:
    """Exact answers to questions that the run has not trained on, by task: exam.marks of greedy answers."""
    chats = exam.template is not None or opened.config.data.chat.format is not None
    template = None
    if chats:
        template, tokenizer = choose_template(exam.template, opened, tokenizer, tell=lambda text: share.tell({"note": text}))
    pairs = questions(opened.config, prepared, tasks=exam.tasks, each=exam.skills, seed=exam.seed)
    groups, window, mine = grouped(asked(pairs, tokenizer, template), exam.batch), opened.config.data.sequence, {}
    for number in share.mine(len(groups), "skills"):
        mine[number] = answered(model, tokenizer, groups[number], template=template, window=window)
    results = [(task, right) for group in share.together(mine, len(groups)) for task, right in group]
    return marks(results, exam.tasks)
