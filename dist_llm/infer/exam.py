"""Questions with one right answer that a run has not trained on, and how sure a share of right answers is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from dist_llm.config.schema import Config, sources_of
from dist_llm.data import chat, preferences, skills
from dist_llm.data.encoding import place_of
from dist_llm.data.prepare import Prepared
from dist_llm.data.skills import Pair
from dist_llm.data.templates import Template
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.infer.choose import Choice
from dist_llm.infer.model import Model
from dist_llm.infer.text import texts_of
from dist_llm.infer.write import Writer

NORMAL = 1.959963984540054  # of a 95 % interval
DRAWS = 20_000  # pairs for each question wanted: a task whose questions have run out ends with fewer
MOST_TOKENS = 50_000_000  # of a text that is searched for questions
TASKS = tuple(skill.name for skill in skills.SKILLS)


@dataclass(frozen=True)
class Asked:
    """A question as ids, the texts and tokens that end its answer, and how long the right answer is."""

    pair: Pair
    ids: list[int]
    length: int


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): of 0 of 0 it is all there is."""
    if count == 0:
        return 0.0, 1.0
    share, square = right / count, NORMAL**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    spread = NORMAL * sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def uses_skills(config: Config) -> bool:
    """Whether a run trains on `skills`."""
    return "skills" in sources_of(config.data)


def questions(config: Config, prepared: Prepared | None, *, tasks: Sequence[str], each: int, seed: int) -> list[Pair]:
    """`each` different questions of every task, in the order of tasks, none of which the run has trained on.

    Of a run on `skills` they are those that its split holds out, by their text, whatever is drawn; where nothing is held out, those
    that are not in its text (prepared). Fewer where a task has no more of them.
    """
    found: dict[str, dict[str, Pair]] = {task: {} for task in tasks}
    known = _text(prepared) if uses_skills(config) and not config.data.validation else ""
    wanted, mixture = sum(each for _ in tasks), replace(skills.mixture_of(config.data.skills), tasks=tuple(tasks))
    for index in range(DRAWS * max(1, each)):
        if wanted == 0:
            break
        one = skills.pair(seed, index, mixture)
        held = found.get(one.skill)
        if held is None or len(held) == each or one.prompt in held or not _held_out(one, config) or one.prompt in known:
            continue
        held[one.prompt] = one
        wanted -= 1
    return [pair for task in tasks for pair in found[task].values()]


def _held_out(one: Pair, config: Config) -> bool:
    """Whether the split of a run on `skills` keeps a pair from training: what is said in its document decides."""
    if not config.data.validation or not uses_skills(config):
        return True
    if config.data.chat.format is None:
        key = one.text
    elif config.data.chat.format == "preference":
        key = preferences.key_of([{"role": "user", "content": one.prompt}])
    else:
        key = chat.key_of(chat.of_pair(one.prompt, one.answer))
    return place_of(key) < config.data.validation


def _text(prepared: Prepared | None) -> str:
    """All that a run trains on, as text."""
    if prepared is None:
        return ""
    stores = [store for store in prepared.train if len(store) <= MOST_TOKENS]
    texts = (store.document(number).tolist() for store in stores for number in range(store.manifest.documents))
    return "\n".join(prepared.tokenizer.decode(text) for text in texts)


def asked(pairs: Sequence[Pair], tokenizer: Tokenizer, template: Template | None) -> Iterator[Asked]:
    """Questions as the run has seen such: with a chat template as what the user says, else as the beginning of a document."""
    for pair in pairs:
        if template is not None:
            ids = template.prompt([{"role": "user", "content": pair.prompt}], tokenizer)
        else:
            ids = [*tokenizer.opening, *tokenizer.encode(f"Question: {pair.prompt}\nAnswer:")]
        yield Asked(pair, ids, len(tokenizer.encode(f" {pair.answer}\n")))


def grouped(tests: Iterable[Asked], size: int) -> list[list[Asked]]:
    """Questions in groups of `size` whose answers are alike in length: they are written at once."""
    row = sorted(tests, key=lambda one: (one.length, len(one.ids)))
    return [row[at : at + size] for at in range(0, len(row), size)]


def answered(
    model: Model, tokenizer: Tokenizer, group: Sequence[Asked], *, template: Template | None, window: int
) -> list[tuple[str, bool]]:
    """(task, right or not) of the greedy answer to each question of a group. window: tokens that the model can see."""
    ends = set(template.stop_ids(tokenizer)) if template is not None else {tokenizer.end_id}
    stops = () if template is not None else ("\n",)
    texts = answer(model, tokenizer, group, window=window, ends=ends, stops=stops)
    return [(one.pair.skill, skills.check(one.pair.prompt, text)) for one, text in zip(group, texts, strict=True)]


def answer(model: Model, tokenizer: Tokenizer, group: Sequence[Asked], *, window: int, ends: set[int], stops: tuple[str, ...]) -> list[str]:
    """The greedy answers to some questions, written at once; room for a little more than the right one."""
    count = max(one.length for one in group) + 4
    writer = Writer(model, [one.ids for one in group], count=count, choice=Choice(temperature=0.0), window=window, ends=ends)
    return texts_of(writer, tokenizer, lines=len(group), stops=stops, silent=ends)


def marks(results: Sequence[tuple[str, bool]], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """(task, right or not) of each question -> by task, and for all: `right`, `count`, `share` and its 95 % interval `low`, `high`."""

    def of(values: Sequence[bool]) -> dict[str, Any]:
        low, high = wilson(sum(values), len(values))
        return {
            "right": sum(values),
            "count": len(values),
            "share": sum(values) / len(values) if values else None,
            "low": low,
            "high": high,
        }

    by_task = {task: of([right for name, right in results if name == task]) for task in tasks}
    return {**by_task, "all": of([right for _, right in results])}
