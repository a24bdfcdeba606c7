"""An adapter that a user names, for a base: a checkpoint of ours, or PEFT's folder. Its name, what fits beside what."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dist_llm.config.schema import AdapterConfig, ModelConfig
from dist_llm.errors import CheckpointError, UsageError
from dist_llm.interop.peft_folder import PeftFolder, is_adapter, receipt_of
from dist_llm.interop.slices import PIECE
from dist_llm.model.table import table
from dist_llm.sidefiles import MERGED
from dist_llm.strict import strict_json
from dist_llm.train.base import Base
from dist_llm.train.folder import MANIFEST, Checkpoint, open_checkpoint
from dist_llm.train.overlay import require_base, require_weights
from dist_llm.train.parts import Parts


@dataclass(frozen=True)
class Given:
    """An adapter for a base. model: the base's with the adapter; identity: what tells it from others; checkpoint: of ours.

    note: what a user should know of it.
    """

    model: ModelConfig
    matrices: Parts | PeftFolder
    identity: str
    close: Callable[[], object]
    checkpoint: Checkpoint | None = None
    note: str | None = None

    @cached_property
    def content(self) -> str:
        """A hash of its numbers and scale, whatever form they lie in."""
        total = hashlib.sha256(repr(self.model.adapter.scale).encode())
        for row in table(self.model):
            box = tuple((0, extent) for extent in row.shape)
            for at in range(0, row.numel if row.trained else 0, PIECE):
                values = self.matrices.read("weight", row.name, box, at, min(at + PIECE, row.numel))
                total.update(f"{row.name} {row.shape} {at} ".encode() + values.double().numpy().tobytes())
        return total.hexdigest()


def open_adapter(path: Path, base: Base) -> Given:
    """An adapter for a base: a checkpoint of ours, or PEFT's folder. Raises UsageError where it was trained on another one."""
    if is_adapter(path):
        folder = PeftFolder.open(path, base.model, base.source())
        known, note = folder.receipt, None
        if known.base is not None:
            require_weights(base, known.base, known.base_weights, where=path)
        elif Path(folder.named).expanduser().resolve() != base.path.resolve():
            said = f"names its base {folder.named}, and no hash of it" if folder.named else "does not say what its base is"
            note = f"{path} {said}: whether {base.path} is that one is not known"
        identity = hashlib.sha256(b"".join(file_hash(file).encode() for file in sorted(path.glob("adapter_*")))).hexdigest()
        return Given(folder.model, folder, identity, lambda: None, note=note)
    opened = open_checkpoint(path)
    if not opened.config.model.adapter.rank:
        what, expected = "this is a whole model and no adapter", "a run with model.adapter.rank above 0, or PEFT's folder"
        raise UsageError(what, where=str(opened.path), expected=expected, next="name an adapter in its place")
    require_base(opened, base)
    identity = hashlib.sha256((opened.path / MANIFEST).read_bytes()).hexdigest()
    return Given(opened.config.model, opened.parts, identity, opened.parts.close, opened)


def merged_before(content: bytes, *, where: Path) -> list[dict[str, Any]]:
    """The adapters that a receipt says are in the weights, the oldest first. Raises CheckpointError where it is none."""
    values = strict_json(content)
    try:
        lists = [values.get(key) or [] for key in ("before", "adapters")]
        found = [
            {key: one[key] for key in ("path", "identity", "content", "weight") if isinstance(one.get(key), str | float | int)}
            for one in (*lists[0], *lists[1])
        ]
    except (AttributeError, TypeError, KeyError):
        raise CheckpointError("the receipt of a merge is none", where=str(where), expected=f"{MERGED} as merge writes it") from None
    return found


def already_in(one: Given, before: Sequence[Mapping[str, Any]]) -> str | None:
    """Where an adapter is among those that are in a base's weights: under which path it was merged."""
    known = {merged.get(key): str(merged.get("path")) for merged in before for key in ("identity", "content")} if before else {}
    return (known.get(one.content) or known.get(one.identity)) if known else None


def require_apart(one: Given, base: Base, *, where: str, way: str) -> None:
    """Raises UsageError where an adapter is in the base's weights already and would count twice (F30). way: what can be done."""
    merged = already_in(one, merged_before(base.beside_files().get(MERGED, b"{}"), where=base.path / MERGED))
    if merged is not None:
        what, found = "the adapter would count twice", f"in {base.path} already, merged as {merged}"
        raise UsageError(what, where=where, expected="a base that it is not in", found=found, next=way)


def name_of(path: Path) -> str:
    """What an adapter is called: as it says itself, or where it says nothing as its folder. Raises CheckpointError, UsageError."""
    folder = path.expanduser()
    said = receipt_of(folder).name if is_adapter(folder) else open_checkpoint(folder).config.model.adapter.name
    return folder.resolve().name if said in (None, AdapterConfig().name) else said


def require_alike(first: ModelConfig, other: ModelConfig, *, where: str) -> None:
    """Raises UsageError where two adapters correct differently quantized weights: there is no one base under both."""
    kept = [f"{model.adapter.quantize}, blocks of {model.adapter.block}" for model in (first, other)]
    if first.adapter.quantize != other.adapter.quantize or (first.adapter.quantize != "none" and kept[0] != kept[1]):
        what = "the adapters were trained on differently quantized weights"
        raise UsageError(what, where=where, expected=kept[0], found=kept[1], next="one at a time")


def grown(one: Given, base: Base) -> Checkpoint | None:
    """The adapter's checkpoint, where its tokenizer has tokens that the base's lacks: a template added them."""
    opened = one.checkpoint
    return opened if opened is not None and opened.manifest["tokenizer"] != base.tokenizer else None


def require_tokens(one: Given, base: Base, *, where: str) -> None:
    """Raises UsageError where an adapter was trained with tokens that the base's tokenizer lacks: it would never write them."""
    if grown(one, base) is not None:
        what, expected = "the adapter was trained with tokens that the base's tokenizer lacks", f"the tokenizer of {base.path}"
        raise UsageError(what, where=where, expected=expected, found="tokens that a template added", next=f"name the run itself: {where}")


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
