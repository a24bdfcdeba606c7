"""Live tensor memory on CPU: the peak of all storages alive at once, byte by byte, seen by a dispatch mode.

A CPU allocator keeps no such count. The mode sees the result of every operation and remembers its storage until that
dies; it looks inside our own operations, and reads anew the size of buffers that are freed and taken back (ZeRO-3).
It slows a step down, so it runs in a step of its own.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dist_llm.engines.native import NativeEngine
from dist_llm.parallel.operation import bodies


class LiveMemory(TorchDispatchMode):
    """Context: `peak` is the largest number of bytes alive at once on this device, what the engine keeps among them."""

    def __init__(self, engine: NativeEngine) -> None:
        super().__init__()
        self.live: dict[int, int] = {}  # storage -> bytes
        self.now = 0
        self.changing = [flat.weights.untyped_storage() for flat in getattr(engine, "flats", ()) if flat.sharded]
        self._skip = {storage._cdata for storage in self.changing}
        for tensors in engine.persistent().values():
            for tensor in tensors:
                self._see(tensor)
        self.kept = self.now
        self.peak = self.now

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and asking would import torch._dynamo (1 s and 67 MB)."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Runs the operation, then counts what is alive."""
        body = bodies.get(function._schema.name)
        if body is not None:
            with self:
                out = body(*args, **(kwargs or {}))
        else:
            out = function(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._see(value)
        self.peak = max(self.peak, self.now + sum(storage.nbytes() for storage in self.changing))
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self._skip or tensor.device.type == "meta":
            return
        self.live[key] = storage.nbytes()
        self.now += self.live[key]
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)
