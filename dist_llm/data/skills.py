"""Chat pairs with an answer that can be checked: small tasks a small model can learn.

Pair number `index` of a seed is a pure function of both. The answer is computed from the prompt alone, so that
`check` needs no list of answers: what a trained model says is right or wrong, without a judge.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_llm.config.schema import SkillsConfig

TRIES = 16  # answers that are looked at for one that is wrong
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
LETTERS = CONSONANTS + VOWELS
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}


class Draws:
    """Whole numbers below given bounds, drawn from a name."""

    def __init__(self, *name: object, size: int = 64) -> None:
        self._pool = int.from_bytes(hashlib.shake_128("\x1f".join(map(str, name)).encode()).digest(size), "little")

    def below(self, bound: int) -> int:
        """A number from 0 to bound - 1; the bits of `size` bytes are shared by all the calls."""
        self._pool, value = divmod(self._pool, bound)
        return value

    def pick(self, choices: str) -> str:
        """One letter of a string."""
        return choices[self.below(len(choices))]


@dataclass(frozen=True)
class Mixture:
    """Which pairs are drawn. tasks: their names, one that is named twice twice as often; none: all. length: the fewest and the most parts
    of an argument, where it is not each task's own. apart: letters and brackets stand apart, so that each is a token of its own under
    any tokenizer that splits at spaces.
    """

    tasks: tuple[str, ...] = ()
    length: tuple[int, int] | None = None
    apart: bool = False

    def count(self, draws: Draws, fewest: int, most: int) -> int:
        """How many parts an argument has; fewest, most: the task's own."""
        fewest, most = self.length or (fewest, most)
        return fewest + draws.below(most - fewest + 1)


ALL = Mixture()


def mixture_of(section: SkillsConfig) -> Mixture:
    """The mixture that a config's data.skills asks for."""
    return Mixture(section.tasks or (), section.length, section.apart)


@dataclass(frozen=True)
class Skill:
    """A kind of task: what is asked, how its argument is drawn, and how it is solved."""

    name: str
    ask: str
    draw: Callable[[Draws, Mixture], str]
    solve: Callable[[str], str]


@dataclass(frozen=True)
class Pair:
    """A question with its one right answer."""

    skill: str
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        """The pair as one document."""
        return f"Question: {self.prompt}\nAnswer: {self.answer}\n"


def _word(draws: Draws, how: Mixture) -> str:
    """Syllables and a consonant; letters in any order where their number is given."""
    if how.length or how.apart:
        return (" " if how.apart else "").join(draws.pick(LETTERS) for _ in range(how.count(draws, 3, 7)))
    return "".join(draws.pick(CONSONANTS) + draws.pick(VOWELS) for _ in range(1 + draws.below(3))) + draws.pick(CONSONANTS)


def _words(draws: Draws, how: Mixture) -> str:
    """Words; those of one letter where letters stand apart."""
    if how.apart:
        return _word(draws, how)
    return " ".join(_word(draws, ALL) for _ in range(how.count(draws, 2, 5)))


def _numbers(draws: Draws, how: Mixture) -> str:
    return " ".join(str(draws.below(100)) for _ in range(how.count(draws, 3, 6)))


def _sum(draws: Draws, how: Mixture) -> str:
    return f"{draws.below(1000)} + {draws.below(1000)}"


def _difference(draws: Draws, how: Mixture) -> str:
    larger = draws.below(1000)
    return f"{larger} - {draws.below(larger + 1)}"


def _opening(draws: Draws, how: Mixture) -> str:
    """Brackets some of which are closed again, at least one not."""
    text, opened = "", ""
    for _ in range(how.count(draws, 3, 10)):
        if opened and draws.below(3) == 0:
            text, opened = text + BRACKETS[opened[-1]], opened[:-1]
        else:
            letter = draws.pick("".join(BRACKETS))
            text, opened = text + letter, opened + letter
    text = text if opened else text + draws.pick("".join(BRACKETS))
    return " ".join(text) if how.apart else text


def _close(text: str) -> str:
    opened: list[str] = []
    for letter in text:
        if letter in BRACKETS:
            opened.append(letter)
        elif opened and BRACKETS[opened[-1]] == letter:
            opened.pop()
    return (" " if " " in text else "").join(BRACKETS[letter] for letter in reversed(opened))


def _series(draws: Draws, how: Mixture) -> str:
    start, step = draws.below(50), 1 + draws.below(9)
    return " ".join(str(start + step * turn) for turn in range(4))


def _continue(text: str) -> str:
    numbers = _integers(text)
    return str(numbers[-1] + (numbers[-1] - numbers[-2] if len(numbers) > 1 else 0)) if numbers else ""


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d{1,18}", text, re.ASCII)]


def _subtract(text: str) -> str:
    numbers = _integers(text)
    return str(numbers[0] - sum(numbers[1:])) if numbers else ""


SKILLS = (
    Skill("copy", "Repeat", _words, str),
    Skill("reverse", "Spell backwards", _word, lambda text: text[::-1]),
    Skill("sort", "Sort the words", _words, lambda text: " ".join(sorted(text.split()))),
    Skill("order", "Sort the numbers", _numbers, lambda text: " ".join(map(str, sorted(_integers(text))))),
    Skill("brackets", "Close the brackets", _opening, _close),
    Skill("add", "Add", _sum, lambda text: str(sum(_integers(text)))),
    Skill("subtract", "Subtract", _difference, _subtract),
    Skill("largest", "Find the largest", _numbers, lambda text: str(max(_integers(text), default=""))),
    Skill("count", "Count the letters", _word, lambda text: str(len(text.replace(" ", "")))),
    Skill("upper", "Write in capitals", _words, str.upper),
    Skill("last", "Name the last word", _words, lambda text: (text.split() or [""])[-1]),
    Skill("series", "Continue the series", _series, _continue),
)


def pair(seed: int, index: int, how: Mixture = ALL) -> Pair:
    """Chat pair number `index` of the seed."""
    draws = Draws(seed, "skills", index, size=_size(how))
    chosen = [skill for skill in SKILLS for _ in range(how.tasks.count(skill.name) if how.tasks else 1)]
    skill = chosen[draws.below(len(chosen))]
    argument = skill.draw(draws, how)
    return Pair(skill.name, f"{skill.ask}: {argument}", skill.solve(argument))


def wrong(seed: int, index: int, how: Mixture = ALL) -> str:
    """A wrong answer to that question, of the kind of the right one: the answer to another question of the same skill."""
    right = pair(seed, index, how)
    skill = next(skill for skill in SKILLS if skill.name == right.skill)
    others = (skill.solve(skill.draw(Draws(seed, "wrong", index, attempt, size=_size(how)), how)) for attempt in range(TRIES))
    return next((answer for answer in others if answer not in ("", right.answer)), right.answer + right.answer)


def _size(how: Mixture) -> int:
    """Bytes that the draws of a pair share."""
    return 1024 if how.length else 64


def check(prompt: str, answer: str) -> bool:
    """Whether the answer to a prompt of `pair` is right, outer spaces aside; False for a prompt of another kind."""
    ask, colon, argument = prompt.partition(": ")
    solve = next((skill.solve for skill in SKILLS if colon and skill.ask == ask), None)
    return solve is not None and answer.strip() == solve(argument)
