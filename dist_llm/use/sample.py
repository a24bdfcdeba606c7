"""`dist-llm sample`: what some prompts are followed by, on one process or on tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_llm.config.layout import Layout
from dist_llm.infer.choose import Choice
from dist_llm.infer.text import Text
from dist_llm.infer.write import Writer
from dist_llm.mesh import build_mesh
from dist_llm.train.setup import settle_rank
from dist_llm.use.load import Hear, Place, load_here, open_sound


@dataclass(frozen=True)
class Request:
    """Prompts as ids, and how they go on. batch: lines that are written at once, a prompt's samples together."""

    checkpoint: str
    prompts: list[list[int]]
    choice: Choice
    count: int = 128
    samples: int = 1
    batch: int = 8
    stops: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    place: Place = Place()
    adapters: tuple[tuple[str, str], ...] = ()  # (name, path): each writes all texts, in their order

    def groups(self) -> Iterator[list[int]]:
        """Numbers of the prompts that are written at once."""
        size = max(1, self.batch // self.samples)
        for first in range(0, len(self.prompts), size):
            yield list(range(first, min(first + size, len(self.prompts))))


def write_rank(rank: int, world: int, say: Hear, given: dict[str, Any]) -> dict[str, Any]:
    """One rank of `sample`. Rank 0 says {"piece": text} as text comes, and {"line": ...} when a line is done.

    A line: `prompt` and `sample` (their numbers), `text`, `tokens`, and `finish`: stop (a string or token), or length; `adapter`
    where there are some.
    """
    place, choice = Place(**given["place"]), Choice(**given["choice"])
    request = Request(**{**given, "place": place, "choice": choice})
    opened, tokenizer = open_sound(Path(request.checkpoint), whole=False)
    tell: Hear = say if rank == 0 else lambda message: None
    if world > 1:
        settle_rank(opened.config.runtime)
    shared_memory, kv_heads = opened.config.runtime.shared_memory, opened.config.model.kv_heads
    mesh = build_mesh(Layout(tp=world), rank, kv_heads=kv_heads, shared_memory=shared_memory)
    model = load_here(opened, tokenizer, place, rank=rank, group=mesh.tp, adapters=request.adapters)
    ends = {tokenizer.end_id, *request.stop_tokens}
    settings: dict[str, Any] = {"count": request.count, "choice": choice, "window": opened.config.data.sequence, "samples": request.samples}
    names: list[str | None] = [name for name, _ in request.adapters]
    names = names or [None]
    for name, numbers in ((name, numbers) for name in names for numbers in request.groups()):
        model.use(name)
        about = {} if name is None else {"adapter": name}
        writer = Writer(model, [request.prompts[number] for number in numbers], ends=ends, **settings)
        texts = [{**about, "prompt": number, "sample": sample} for number in numbers for sample in range(request.samples)]
        befores = [request.prompts[number] for number in numbers for _ in range(request.samples)]
        lines = [
            _Line(one, Text(tokenizer, stops=request.stops, silent=ends, after=before), tell)
            for one, before in zip(texts, befores, strict=True)
        ]
        for tokens in writer:
            for at, token in tokens.items():
                if lines[at].add(token) or len(lines[at].tokens) == request.count:
                    lines[at].finish()
                    writer.stop(at)
    return {"device": str(model.device.type), "dtype": str(model.dtype).removeprefix("torch."), "step": opened.step}


@dataclass
class _Line:
    """One text while it is written. names: what its line says of it first."""

    names: dict[str, Any]
    text: Text
    tell: Hear
    tokens: list[int] = field(default_factory=list)

    def add(self, token: int) -> bool:
        """Takes a token; returns whether the text has ended."""
        self.tokens.append(token)
        self._show(self.text.add(token))
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether a stop string or a stop token has come."""
        return self.text.stopped is not None or self.tokens[-1] in self.text.silent

    def finish(self) -> None:
        """Says what is left of the text, and the line."""
        self._show(self.text.finish())
        about = {"text": self.text.shown, "tokens": self.tokens, "finish": "stop" if self.ended else "length"}
        self.tell({"line": {**self.names, **about}})

    def _show(self, piece: str) -> None:
        if piece:
            self.tell({"piece": piece})


def as_request(request: Request) -> dict[str, Any]:
    """A request as JSON."""
    return asdict(request)
