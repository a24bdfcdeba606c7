"""A checkpoint of an adapter becomes PEFT's folder; looked at, where that is asked for, by PEFT on the base in Hugging Face's form."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from dist_llm.interop.exporting import Subject, export_model, rounded
from dist_llm.interop.logits import Cast, Compared, compare_logits, prompts_for
from dist_llm.interop.peft_folder import write_adapter
from dist_llm.train.base import Base
from dist_llm.train.folder import Checkpoint
from dist_llm.train.overlay import overlay
from dist_llm.train.storage import storing


def export_adapter(
    opened: Checkpoint, base: Base, target: Path, *, named: str, dtype: torch.dtype | None = None, verify: bool = False
) -> tuple[int, Compared | None]:
    """Writes the folder `target`; returns its bytes, and how far PEFT's logits are from ours. named: where PEFT finds the base.

    dtype: of the matrices; None: each as it is. PEFT's base is not quantized, and so is not what it is compared with. Raises UsageError
    where PEFT has no such adapter or is needed and not there, NumericError where it computes other logits, or a matrix
    is beyond the range of `dtype`.
    """
    model, found = opened.config.model, list[Compared]()
    plain = model.model_copy(update={"adapter": model.adapter.model_copy(update={"quantize": "none"})})
    tensors = {name: opened.parts.whole(name) for name in opened.shapes}
    tensors = tensors if dtype is None else {name: rounded(tensor, dtype, where=name) for name, tensor in tensors.items()}

    def check(folder: Path) -> None:
        ours = overlay(base, plain, over=Cast(opened.parts, dtype))
        with storing(target), tempfile.TemporaryDirectory(prefix=".base-", dir=folder.parent) as beside:
            under = base.path
            if base.checkpoint is not None:
                under = Path(beside) / "base"
                export_model(Subject.of(base.checkpoint), under, shard_size=5 * 10**9)
            found.append(compare_logits(under, ours, plain, prompts=prompts_for(plain, opened.path), adapter=folder))

    identities = {"identity": base.identity, "base_weights": base.weights}
    size = write_adapter(target, model, tensors, base=named, **identities, check=check if verify else lambda folder: None)
    return size, found[0] if found else None
