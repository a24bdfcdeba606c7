"""Token stores as the files of other trainers, with the tokenizer beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dist_llm.data.megatron import write_indexed
from dist_llm.data.publish import publish, require_new
from dist_llm.data.store import TokenStore
from dist_llm.data.token_stream import write_headed, write_plain
from dist_llm.errors import SpaceError

if TYPE_CHECKING:
    from dist_llm.data.prepare import Prepared

FORMATS: dict[str, Callable[[TokenStore, Path], list[Path]]] = {
    "megatron": write_indexed,
    "nanogpt": lambda store, name: [write_plain(store, name.with_name(f"{name.name}.bin"))],
    "llm.c": lambda store, name: [write_headed(store, name.with_name(f"{name.name}.bin"))],
}


@dataclass(frozen=True)
class Exported:
    """One store as files. share: its part of the mixture, as a whole number."""

    split: str
    files: tuple[Path, ...]
    tokens: int
    documents: int
    share: int


def export(prepared: Prepared, folder: Path, *, kind: str) -> list[Exported]:
    """Writes every store into a new folder: `train` and `validation`, after the number and name of the source where there are several.

    kind: one of FORMATS. The folder appears complete or not at all. Every token was compared with its hash. Raises UsageError
    when the folder is there, DataError when a store is damaged, SpaceError when the files cannot be written.
    """
    require_new(folder)
    splits = [(prepared.train, prepared.weights), (prepared.validation, prepared.validation_weights)]
    stores = [(store, share, number) for split, shares in splits for number, (store, share) in enumerate(zip(split, shares, strict=True))]
    made: list[Exported] = []

    def make(target: Path) -> None:
        for store, share, number in stores:
            manifest = store.manifest
            name = manifest.split if len(prepared.train) == 1 else f"{number}-{manifest.source}-{manifest.split}"
            files = FORMATS[kind](store, target / name)
            made.append(Exported(manifest.split, tuple(folder / file.name for file in files), len(store), manifest.documents, share))
        prepared.tokenizer.save(target)

    try:
        if not publish(folder, make):
            require_new(folder)
    except OSError as error:
        raise SpaceError(
            "the files cannot be written",
            where=str(folder),
            expected="room, and a folder that can be written",
            found=error.strerror or str(error),
        ) from error
    return made
