"""`dist-llm chat`: the model's side of it, on one process or on tensor-parallel ranks that wait for turns."""

from __future__ import annotations

import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dist_llm import comm
from dist_llm.config.layout import Layout
from dist_llm.config.schema import RuntimeConfig
from dist_llm.infer.answer import Answers
from dist_llm.infer.choose import Choice
from dist_llm.mesh import Group, build_mesh
from dist_llm.train.setup import settle_rank
from dist_llm.use.load import Hear, Named, Place, load_here, on_ranks, open_sound

Turns = Generator[dict[str, Any] | None, dict[str, Any], None]  # gives orders, gets messages


class Brake:
    """One byte that this process and ranks forked from it share: whether an answer is to stop."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)

    def pull(self) -> None:
        """The answer is to stop after the next token."""
        self._memory[0] = 1

    def release(self) -> None:
        """The next answer is not to stop."""
        self._memory[0] = 0

    @property
    def pulled(self) -> bool:
        """Whether it is to stop, as this process sees it now."""
        return self._memory[0] != 0


def hold_chat(
    turns: Turns, brake: Brake, *, checkpoint: Path, place: Place, nproc: int, runtime: RuntimeConfig, adapters: Named = ()
) -> None:
    """Loads the model and has `turns` give orders until it ends.

    An order is {"ids", "count", "choice", "ends", "adapter"}, the last a name or None; its answer comes as {"token": id} and
    {"done": {"read": tokens computed}}.
    `turns` gets {"ready": {"device", "dtype"}} first. On several ranks the orders go through pipes: who waits for a user
    waits in no collective.
    """
    pipes = [os.pipe() for _ in range(nproc if nproc > 1 else 0)]
    waiting = deque[dict[str, Any]]()

    def hear(message: dict[str, Any]) -> None:
        try:
            order = turns.send(message)
        except StopIteration:
            order = {"quit": True}
        if order is None:
            return
        waiting.append(order)
        for _, write in pipes:
            with open(write, "wb", closefd=False) as pipe:
                pipe.write(json.dumps(order).encode() + b"\n")

    def work(rank: int, world: int, say: Hear, request: dict[str, Any]) -> None:
        if not pipes:
            return answer_rank(rank, world, say, request, brake, waiting.popleft)
        with open(pipes[rank][0], encoding="utf-8", closefd=False) as orders:
            return answer_rank(rank, world, say, request, brake, lambda: json.loads(orders.readline()))

    next(turns)
    try:
        request = {"checkpoint": str(checkpoint), "place": asdict(place), "adapters": [list(one) for one in adapters]}
        on_ranks(work, request, nproc=nproc, runtime=runtime, hear=hear)
    finally:
        for pipe in pipes:
            for end in pipe:
                os.close(end)


def answer_rank(rank: int, world: int, say: Hear, request: dict[str, Any], brake: Brake, take: Callable[[], dict[str, Any]]) -> None:
    """One rank of a chat: answers the orders that it takes until it is told to quit. Rank 0 says what comes."""
    place, tell = Place(**request["place"]), say if rank == 0 else lambda message: None
    opened, tokenizer = open_sound(Path(request["checkpoint"]), whole=False)
    if world > 1:
        settle_rank(opened.config.runtime)
    shared_memory, kv_heads = opened.config.runtime.shared_memory, opened.config.model.kv_heads
    mesh = build_mesh(Layout(tp=world), rank, kv_heads=kv_heads, shared_memory=shared_memory)
    model = load_here(opened, tokenizer, place, rank=rank, group=mesh.tp, adapters=request["adapters"])
    answers = Answers(model, window=opened.config.data.sequence)
    tell({"ready": {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}})
    while "quit" not in (order := take()):
        before, choice = answers.computed, Choice(**order["choice"])
        if order["adapter"] != model.adapter:
            model.use(order["adapter"])
            answers.forget()
        going = _going(brake, mesh.tp, model.device)
        for token in answers.go_on(order["ids"], count=order["count"], choice=choice, ends=order["ends"], going=going):
            tell({"token": token})
        tell({"done": {"read": answers.computed - before}})


def _going(brake: Brake, group: Group, device: torch.device) -> Callable[[], bool]:
    """Whether an answer goes on: what rank 0 sees, the same on all ranks."""

    def going() -> bool:
        if group.size == 1:
            return not brake.pulled
        pulled = torch.tensor([float(brake.pulled and group.index == 0)], device=device)
        return not comm.all_reduce(pulled, group, op="max").item()

    return going
