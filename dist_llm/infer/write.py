"""Text goes on: the tokens that follow some prompts, all lines at once, each as it would be alone.

When a line is as long as the window, the model reads its newer half again from position 0 on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from dist_llm.infer.cache import Cache
from dist_llm.infer.choose import Choice, choose, penalised, points
from dist_llm.infer.model import Model


class Writer:
    """Lines that a model goes on with: `samples` of each prompt, neighbours of each other.

    prompts: at least one token each; of a longer one than the window (tokens that the model can see) the end counts.
    count: at most so many tokens a line. ends: tokens that end a line, and are its last. cache: holds the first tokens of each
    prompt already, as many as its lengths say, and keeps what is read (one sample then).
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        choice: Choice,
        window: int,
        ends: Iterable[int] = (),
        samples: int = 1,
        cache: Cache | None = None,
    ) -> None:
        assert prompts and all(prompts) and count >= 1 and samples >= 1 and window >= 2
        assert cache is None or samples == 1
        self.model, self.count, self.choice, self.window, self.ends = model, count, choice, window, frozenset(ends)
        self.prompts, self.samples, self.given = [list(prompt)[-window:] for prompt in prompts], samples, cache
        self.seen = [list(prompt) for prompt in self.prompts for _ in range(samples)]  # by line
        self.live = list(range(len(self.seen)))  # lines that go on, in the order of the cache's
        self._stopped: set[int] = set()

    def stop(self, line: int) -> None:
        """Ends a line after what it has."""
        self._stopped.add(line)

    def __iter__(self) -> Iterator[dict[int, int]]:
        """The next token of each line that goes on, by line."""
        logits = self._begin()
        for position in range(self.count):
            seen = [self.seen[line] for line in self.live]
            numbers = points(self.choice, [line % self.samples for line in self.live], position)
            tokens = choose(penalised(logits, seen, self.choice.repetition_penalty), self.choice, numbers).tolist()
            yield dict(zip(self.live, tokens, strict=True))
            for line, token in zip(self.live, tokens, strict=True):
                self.seen[line].append(token)
            self._let_go(tokens)
            if not self.live or position == self.count - 1:
                return
            logits = self._go_on()

    def _begin(self) -> Tensor:
        """Reads the prompts, each once: logits (lines, V)."""
        longest = max(map(len, self.prompts))
        capacity = min(self.window, longest + self.count)
        self.cache = self.model.cache(lines=len(self.prompts), capacity=capacity) if self.given is None else self.given
        fresh = [prompt[held:] for prompt, held in zip(self.prompts, self.cache.lengths, strict=True)]
        logits = self.model.read(self.cache, fresh)
        if self.samples > 1:
            self.cache.keep([prompt for prompt in range(len(self.prompts)) for _ in range(self.samples)])
            logits = logits.repeat_interleave(self.samples, dim=0)
        return logits

    def _let_go(self, tokens: Sequence[int]) -> None:
        """Drops the lines that have ended."""
        ended = {line for line, token in zip(self.live, tokens, strict=True) if token in self.ends} | self._stopped
        going = [at for at, line in enumerate(self.live) if line not in ended]
        if len(going) < len(self.live):
            self.live = [self.live[at] for at in going]
            if going:
                self.cache.keep(going)

    def _go_on(self) -> Tensor:
        """Reads the last token of each line: logits (lines, V)."""
        full = [at for at, length in enumerate(self.cache.lengths) if length == self.window]
        if full:
            half = [self.seen[self.live[at]][-max(1, self.window // 2) :] for at in full]
            again = self.model.cache(lines=len(full), capacity=len(half[0]))
            if len(half[0]) > 1:
                self.model.read(again, [tokens[:-1] for tokens in half])
            self.cache.put(full, again)
        return self.model.read(self.cache, [[self.seen[line][-1]] for line in self.live])


def follow(
    model: Model, prompt: Sequence[int], *, count: int, choice: Choice, window: int, ends: Iterable[int] = (), cache: Cache | None = None
) -> Iterator[int]:
    """The tokens that follow one prompt, as they are chosen."""
    for tokens in Writer(model, [prompt], count=count, choice=choice, window=window, ends=ends, cache=cache):
        yield tokens[0]
