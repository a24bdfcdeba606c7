"""A base and adapters become one model: W + w (W' - W) summed over them, on the weights that they were trained on.

W' is what an adapter makes of W: W + s B A, with DoRA the same with its rows brought to their lengths, or what was trained in the place
of W; w is its weight. That is the sum of
differences itself, as PEFT's add_weighted_adapter has it with `cat`; its `linear`, which adds up A and B apart, approximates it.

Where the base was quantized in training, W is what its codes stand for: merged onto the weights that were never seen, the adapter would
correct errors that are not there. What comes out is a Hugging Face folder, with a receipt: which base, which adapter, what was
made, and how far the logits of the merged weights, rounded to their dtype, are from those of base and adapter side by side; of several
adapters, from those of the sum before it is rounded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.config.schema import AdapterConfig, ModelConfig
from dist_llm.errors import UsageError
from dist_llm.infer.model import Model
from dist_llm.interop.ends import ends_of_answers
from dist_llm.interop.exporting import Subject, Weights, export_model
from dist_llm.interop.given import Given, file_hash, grown, merged_before, open_adapter, require_alike, require_apart
from dist_llm.interop.logits import Cast, all_logits, prompts_for
from dist_llm.model.table import num_parameters, table
from dist_llm.sharding import Box
from dist_llm.sidefiles import MERGED
from dist_llm.train.base import Base
from dist_llm.train.durable import Disk
from dist_llm.train.overlay import Overlay, adapted, overlay


class Merged:
    """The merged weights; the last one asked for is kept, because it is asked for in pieces.

    adapters: overlays on one base, each with its scale s and its weight w. exact: not rounded to the dtype of the base.
    """

    def __init__(self, adapters: Sequence[tuple[Overlay, float, float]], under: Weights, *, exact: bool = False) -> None:
        self.adapters, self.under, self.exact = adapters, under, exact
        self.base = adapters[0][0].beneath  # as it was in training
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def whole(self, name: str) -> Tensor:
        """A whole weight in the dtype of the base, its sum taken in float32 at least."""
        if self._last[0] != name:
            values = self.base.whole(name)
            wide = torch.float64 if values.dtype == torch.float64 else torch.float32
            made = [(adapted(beside, name, values.to(wide), scale), weight) for beside, scale, weight in self.adapters]
            found = [(one, weight) for one, weight in made if one is not None]
            if len(found) == 1 and found[0][1] == 1.0:
                total = found[0][0]
            elif found:
                total = values.to(wide, copy=True)
                for one, weight in found:
                    total.add_(one.sub_(values), alpha=weight)
            else:
                total = values
            self._last = (name, total if self.exact else total.to(values.dtype))
        return self._last[1]

    def read(self, kind: str, name: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of a weight, (stop - start,)."""
        return self.whole(name)[tuple(slice(low, high) for low, high in box)].flatten()[start:stop]

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """That of the base."""
        return self.under.dtype(kind, name)


@dataclass(frozen=True)
class Receipt:
    """What was merged, and how well. adapters: path, identity, hash of its numbers and weight of each; before: the same of those that were
    in the base already; drift: the largest difference of logits, relative to the largest of them; notes: what a user should know.
    """

    base: str
    base_identity: str
    adapters: list[dict[str, Any]]
    result: str  # sha256 over the names and hashes of the weights' files
    drift: float
    drift_dtype: str
    dtype: str
    parameters: int
    before: list[dict[str, Any]]
    notes: list[str]
    version: int = 3


def merge(
    base_path: Path,
    paths: Sequence[Path],
    target: Path,
    *,
    weights: Sequence[float] = (),
    dtype: torch.dtype | None = None,
    shard_size: int = 5 * 10**9,
) -> Receipt:
    """Writes the merged model as the Hugging Face folder `target`, with its receipt merge.json.

    paths: adapters, run or step folders of ours, or PEFT's folders; weights: of each, else 1. Raises UsageError where an adapter was
    trained on another base or is in it already (F30), where they were trained on differently quantized weights, or where two of them
    have another matrix in the place of the same one.
    """
    base, opened = Base(base_path), list[Given]()
    try:
        for path in paths:
            opened.append(open_adapter(path, base))
            require_alike(opened[0].model, opened[-1].model, where=str(path))
            require_apart(opened[-1], base, where=str(path), way="a base that it is not in")
        held = base.beside_files()
        earlier = merged_before(held.get(MERGED, b"{}"), where=base.path / MERGED)
        _refuse_named_twice(paths, opened)
        weights = list(weights) or [1.0] * len(opened)
        under: Any = base.source()
        _refuse_two_in_one_place(paths, opened)
        overlays = [overlay(base, one.model, over=one.matrices) for one in opened]
        parts = [(beside, one.model.adapter.scale, weight) for beside, one, weight in zip(overlays, opened, weights, strict=True)]
        merged, plain = Merged(parts, under), opened[0].model.model_copy(update={"adapter": AdapterConfig()})
        spoken = [found for found in (grown(one, base) for one in opened) if found is not None]
        if len({found.manifest["tokenizer"] for found in spoken}) > 1:
            raise UsageError("the adapters were trained with different new tokens", where=str(paths[-1]), next="one at a time")
        alone = opened[0].checkpoint if len(opened) == 1 else None  # its files have the template that it was trained with
        speaks = spoken[0] if spoken else alone
        tokenizer, beside = (speaks.path, speaks.beside) if speaks else (base.path, held)
        sequence = max(base.sequence, *(one.checkpoint.config.data.sequence for one in opened if one.checkpoint is not None), 0)
        ends = ends_of_answers(speaks) if speaks else ()
        subject = Subject(tokenizer, plain, merged, {name: beside[name] for name in beside if name != MERGED}, sequence, ends)
        found: list[Receipt] = []

        def check(folder: Path) -> None:
            side_by_side = weights == [1.0]
            before: Any = overlays[0] if side_by_side else Merged(parts, under, exact=True)
            drift, wide = _drift(before, opened[0].model if side_by_side else plain, Cast(merged, dtype), plain, base.path)
            files = sorted(folder.glob("*.safetensors"))
            result = hashlib.sha256("".join(f"{path.name} {file_hash(path)}\n" for path in files).encode()).hexdigest()
            stored = str(dtype or merged.dtype("weight", "embedding.weight")).removeprefix("torch.")
            who = [
                {"path": str(path), "identity": one.identity, "content": one.content, "weight": weight}
                for path, one, weight in zip(paths, opened, weights, strict=True)
            ]
            numbers = (result, drift, wide, stored, num_parameters(plain))
            notes = [one.note for one in opened if one.note is not None]
            found.append(Receipt(str(base.path), base.identity, who, *numbers, earlier, notes))
            Disk().write(folder / MERGED, [json.dumps(asdict(found[0]), indent=2).encode() + b"\n"])

        export_model(subject, target, dtype=dtype, shard_size=shard_size, check=check)
        return found[0]
    finally:
        for one in opened:
            one.close()
        base.close()


def _refuse_named_twice(paths: Sequence[Path], opened: Sequence[Given]) -> None:
    """Raises UsageError where one adapter is named twice, under whatever names (F30)."""
    named: dict[str, Path] = {}
    for path, one in zip(paths, opened, strict=True):
        if one.content in named:
            what, found = "the adapter would be merged twice", f"named twice, also as {named[one.content]}"
            raise UsageError(what, where=str(path), expected="each once", found=found, next="--weights makes one count for more")
        named[one.content] = path


def _refuse_two_in_one_place(paths: Sequence[Path], opened: Sequence[Given]) -> None:
    """Raises UsageError where a matrix of the base was trained whole under two adapters: half of each is neither of them."""
    first: dict[str, int] = {}
    for at, one in enumerate(opened):
        for row in table(one.model):
            if row.trained and not row.beside and first.setdefault(row.name, at) != at:
                what, expected = "two adapters have trained the same matrix whole", "model.adapter.modules_to_save of one of them at most"
                raise UsageError(
                    what, where=str(paths[at]), expected=expected, found=f"{row.name}, as {paths[first[row.name]]}", next="one at a time"
                )


def _drift(beside: Any, model: ModelConfig, merged: Cast, plain: ModelConfig, tokenizer: Path) -> tuple[float, str]:
    """The largest difference of logits over drawn prompts, and the dtype in which both were computed."""
    dtype = torch.float64 if num_parameters(plain) <= 50_000_000 else torch.float32
    prompts = prompts_for(plain, tokenizer)
    before = Model(beside, model, dtype=dtype, device=torch.device("cpu"))
    expected = [all_logits(before, prompt) for prompt in prompts]
    after = Model(merged, plain, dtype=dtype, device=torch.device("cpu"))
    differences = [
        float((all_logits(after, prompt) - one).abs().max() / one.abs().max()) for prompt, one in zip(prompts, expected, strict=True)
    ]
    return max(differences), str(dtype).removeprefix("torch.")
