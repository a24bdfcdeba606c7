"""Live tensor memory on CPU: the peak of all storages alive at once, byte by byte, seen by a dispatch mode.

A CPU allocator keeps no such count. The mode sees the result of every operation and remembers its storage until that
dies; it looks inside tensors made of tensors (DTensor), and it hears of storages that are emptied and filled again
(ZeRO-3 here, FSDP2 elsewhere). What a transfer still holds when it is finished depends on the load of the machine, so
transfers only borrow tensors meanwhile (`comm.Ledger.lending`). It slows a step down, so it runs in a step of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dist_llm import comm


class LiveMemory(TorchDispatchMode):
    """Context: `peak` is the largest number of bytes alive at once on this rank, what `things` keep among them.

    things: engines (by their `persistent`), modules, optimizers and tensors that were there before. What is made inside
    the context is seen without being named.
    """

    def __init__(self, *things: Any) -> None:
        super().__init__()
        self.live: dict[int, int] = {}  # storage -> bytes
        self.now = self.peak = 0
        self._depth = 0
        self._engines = [thing for thing in things if hasattr(thing, "arrive")]
        for tensor in tensors_of(things):
            self._see(tensor)
        self.kept = self.peak = self.now

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and asking would import torch._dynamo (1 s and 67 MB)."""
        return False

    def __enter__(self) -> LiveMemory:
        self._depth += 1
        if self._depth == 1:
            live, resize = self, torch.UntypedStorage.resize_  # its base's method

            def told(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
                out = resize(storage, size)
                live._count(storage)
                return out

            torch.UntypedStorage.resize_ = told  # type: ignore[method-assign, assignment]
            comm.ledger.lending = True
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            if details[0] is None:
                for engine in self._engines:  # what is on its way was only lent, and nobody else holds it
                    engine.arrive()
            del torch.UntypedStorage.resize_  # the method of its base is there again
            comm.ledger.lending = False
        super().__exit__(*details)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the operation, then counts what is alive."""
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor made of tensors: it runs first, and what it does to its parts comes here
        out = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            return out  # of what was lent to a transfer: memory that is counted already
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._see(value)
        return out

    def restart(self) -> None:
        """Counts the peak anew from what is alive now."""
        self.peak = self.now

    def _see(self, tensor: Tensor) -> None:
        if not hasattr(tensor, "__tensor_flatten__"):
            self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Takes note of a storage, or of its new size."""
        if storage.device.type == "meta":
            return
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            weakref.finalize(storage, self._gone, key)
        self.now += size - self.live.get(key, 0)
        self.live[key] = size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


def tensors_of(thing: Any) -> Iterator[Tensor]:
    """Every tensor that an engine, a module, an optimizer, a tensor or a nest of them keeps; of a DTensor what this rank holds."""
    if isinstance(thing, Tensor):
        thing = thing.detach()
        yield thing.to_local() if hasattr(thing, "to_local") else thing
    elif isinstance(thing, dict):
        yield from tensors_of(list(thing.values()))
    elif isinstance(thing, list | tuple | set):
        for part in thing:
            yield from tensors_of(part)
    elif isinstance(thing, nn.Module):
        parameters = list(thing.parameters())
        yield from tensors_of([*parameters, *(p.grad for p in parameters), *thing.buffers()])
    elif isinstance(thing, torch.optim.Optimizer):
        yield from tensors_of([*(group["params"] for group in thing.param_groups), thing.state])
    elif hasattr(thing, "persistent"):
        yield from tensors_of(thing.persistent())
