"""From a checkpoint of any layout to a model that can be used, whole or one rank's slices of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_llm.config.schema import ModelConfig, RuntimeConfig
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.data.tokenizer import load as load_tokenizer
from dist_llm.errors import Code, Failure, UsageError
from dist_llm.train.folder import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    import torch

    from dist_llm.infer.model import Model
    from dist_llm.mesh import Group

Hear = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Place:
    """Where a model is held, as flags say it: device (auto, cpu, cuda), dtype (auto, float64, float32, bfloat16; None: the run's own)."""

    device: str = "auto"
    dtype: str | None = "auto"

    def runtime(self, runtime: RuntimeConfig) -> RuntimeConfig:
        """A run's own settings with these in their place."""
        return runtime.model_copy(update={"device": self.device, "dtype": self.dtype or runtime.dtype, "backend": "auto"})


def open_sound(path: Path, *, whole: bool = True) -> tuple[Checkpoint, Tokenizer]:
    """A checkpoint and its tokenizer. whole: every byte is compared with its hash now; else that of tensors when it is read.

    Raises CheckpointError, DataError where the tokenizer cannot be read, UsageError where it is not the model's.
    """
    opened = open_checkpoint(path)
    opened.verify(None if whole else [name for name in opened.files if name.startswith("tokenizer")])
    tokenizer = load_tokenizer(opened.path)
    if tokenizer.rows() > opened.config.model.vocab:
        expected, found = f"at most {opened.config.model.vocab}, model.vocab of the checkpoint", f"{tokenizer.rows()} tokens"
        raise UsageError("the tokenizer has more tokens than the model", where=str(opened.path), expected=expected, found=found)
    return opened, tokenizer


def require_split(model: ModelConfig, ranks: int) -> None:
    """Raises UsageError where a model cannot be split over so many tensor-parallel ranks, with the numbers that can."""

    def fits(number: int) -> bool:
        return model.heads % number == 0 and (model.kv_heads % number == 0 or number % model.kv_heads == 0)

    if not fits(ranks):
        expected = "one of " + ", ".join(str(number) for number in range(1, model.heads + 1) if fits(number))
        found = f"{model.heads} heads and {model.kv_heads} kv heads over {ranks} ranks"
        raise UsageError("the model cannot be split over so many ranks", where="--nproc", expected=expected, found=found)


Named = Sequence[Sequence[str]]  # (name, path) of adapters
BASE = "base"  # no adapter's name: the model without one


def load_model(
    opened: Checkpoint,
    tokenizer: Tokenizer,
    *,
    device: torch.device,
    dtype: torch.dtype,
    group: Group | None = None,
    adapters: Named = (),
) -> Model:
    """The model of a checkpoint; with a group this rank's slices alone are read, and no moments. adapters: loaded beside it, none on yet.

    Raises UsageError where an adapter was trained on another base, or beside differently quantized weights.
    """
    from dist_llm.infer.model import Model
    from dist_llm.train.overlay import weights_of

    if adapters:
        return _load_adapted(opened, adapters, device=device, dtype=dtype, tokens=tokenizer.ids, group=group)
    weights = weights_of(opened)
    try:
        return Model(weights, opened.config.model, dtype=dtype, device=device, tokens=tokenizer.ids, group=group)
    finally:
        weights.close()


def _load_adapted(opened: Checkpoint, adapters: Named, **options: Any) -> Model:
    """A base, quantized as it was under its adapters, and the adapters."""
    from dist_llm.infer.model import Model
    from dist_llm.interop.given import Given, open_adapter, require_alike, require_apart, require_tokens
    from dist_llm.train.base import Base
    from dist_llm.train.overlay import overlay

    base, found = Base(opened.path), list[Given]()
    try:
        for _, path in adapters:
            found.append(open_adapter(Path(path), base))
            require_alike(found[0].model, found[-1].model, where=path)
            require_tokens(found[-1], base, where=path)
            require_apart(found[-1], base, where=path, way="the same command without --adapter, or a base that it is not in")
        model = Model(overlay(base, found[0].model, over=found[0].matrices).beneath, base.model, **options)
        for (name, _), given in zip(adapters, found, strict=True):
            model.add(name, given.model, given.matrices)
        return model
    finally:
        for given in found:
            given.close()
        base.close()


def load_here(
    opened: Checkpoint,
    tokenizer: Tokenizer,
    place: Place | None = None,
    *,
    rank: int = 0,
    group: Group | None = None,
    adapters: Named = (),
) -> Model:
    """`load_model` on the device and in the dtype of a place: this process alone, or rank `rank` of a group."""
    from dist_llm.train.setup import choose_device, choose_dtype

    runtime = (place or Place()).runtime(opened.config.runtime)
    device = choose_device(runtime, local_rank=rank)
    return load_model(opened, tokenizer, device=device, dtype=choose_dtype(runtime, device), group=group, adapters=adapters)


def on_ranks(work: Callable[..., Any], request: dict[str, Any], *, nproc: int, runtime: RuntimeConfig, hear: Hear) -> list[Any]:
    """Runs `work(rank, world, say, request)` here, or on `nproc` local ranks, whose messages `hear` gets.

    Raises what the ranks raise: PeerError where one is lost, MemoryFailure where memory is short.
    """
    from dist_llm.ranks import known_failure, run_ranks

    if nproc == 1:
        try:
            return [work(0, 1, hear, request)]
        except RuntimeError as error:
            failure = known_failure(error)
            if failure is None:
                raise
            raise failure from error
    logs, known = Path(tempfile.mkdtemp(prefix="dist-llm-ranks-")), True
    try:
        settings: dict[str, Any] = {"timeout_seconds": runtime.timeout_seconds, "log_dir": logs}
        (backend,) = run_ranks(1, look_rank, {"runtime": runtime.model_dump()}, nproc, **settings)
        return run_ranks(nproc, work, request, backend=backend, on_message=lambda rank, message: hear(message), **settings)
    except Failure as failure:
        known = failure.code not in (Code.BUG, Code.PEER)
        raise
    finally:
        if known:  # else the message names them
            shutil.rmtree(logs, ignore_errors=True)


def look_rank(rank: int, world: int, say: Hear, request: dict[str, Any], ranks: int) -> str:
    """The backend for some ranks, from a process of its own: the parent must stay fit to fork. Raises UsageError without devices."""
    from dist_llm.train.setup import backend_name, choose_device

    runtime = RuntimeConfig.model_validate(request["runtime"])
    choose_device(runtime, local_rank=ranks - 1)
    return backend_name(runtime)
