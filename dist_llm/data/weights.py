"""The weight of each token's loss beside the tokens of a store: a byte a token, which points into a table of the weights that occur.

    weights-00000.bin  for each token a byte: the place of its weight in the manifest's table
    targets.bin        for each document two float64: the sum of the weights of its tokens, and how many of them are above 0

The first token of a document has weight 0: nothing comes before it that could predict it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_llm.data.shards import HashedFile, Shard, ShardReader, ShardWriter, mapped
from dist_llm.errors import DataError

TARGETS = "targets.bin"
PREFIX = "weights"
MOST = 256  # distinct weights of a store
LARGEST = 1000.0  # a weight


@dataclass(frozen=True)
class Weights:
    """What a manifest says of them. table: the distinct weights, 0 and 1 first."""

    table: tuple[float, ...]
    index: Shard
    shards: tuple[Shard, ...]

    def check(self, *, documents: int, tokens: int) -> None:
        """Asserts that the numbers agree with each other and with the tokens, and that no name leads out of the folder."""
        assert 2 <= len(self.table) <= MOST and self.table[:2] == (0.0, 1.0) and len(set(self.table)) == len(self.table), "weights"
        assert all(type(weight) is float and 0 <= weight <= LARGEST for weight in self.table), "a weight"
        assert (self.index.file, self.index.entries, self.index.bytes) == (TARGETS, 2 * documents, 16 * documents), "targets"
        for shard in self.shards:
            assert re.fullmatch(rf"{PREFIX}-\d{{5}}\.bin", shard.file) and shard.bytes == shard.entries > 0, f"shard {shard.file}"
        assert sum(shard.entries for shard in self.shards) == tokens, "weights"


def read_weights(body: Any) -> Weights | None:
    """Weights out of a manifest's JSON; None where there are none. Raises KeyError or TypeError."""
    if body is None:
        return None
    return Weights(tuple(body["table"]), Shard(**body["index"]), tuple(Shard(**shard) for shard in body["shards"]))


class WeightWriter:
    """Writes the weights of documents. kept: what `keep` gave, to go on from. Raises DataError when a file is not as it was then."""

    def __init__(self, folder: Path, *, limit: int, kept: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.table: list[float] = list(kept["table"]) if kept else [0.0, 1.0]
        self._shards = ShardWriter(folder, PREFIX, dtype=np.dtype("u1"), limit=limit, kept=kept)
        self._index = HashedFile(folder / TARGETS, kept["index"] if kept else None)

    def add(self, batch: Sequence[Sequence[float]]) -> None:
        """Append the weights of documents. Raises DataError when there are too many distinct ones."""
        flat = np.array([weight for weights in batch for weight in weights], dtype=np.float64)
        assert all(weights[0] == 0 for weights in batch) and np.all((flat >= 0) & (flat <= LARGEST)), "a weight"
        for weight in np.unique(flat).tolist():
            if weight not in self.table:
                self.table.append(weight)
        if len(self.table) > MOST:
            expected, found = f"at most {MOST} different weights", f"{len(self.table)} or more"
            raise DataError("the turns have too many different weights", where=str(self.folder), expected=expected, found=found)
        order = np.argsort(self.table)
        self._shards.write(order[np.searchsorted(np.array(self.table)[order], flat)])
        sums = [[math.fsum(weights), sum(weight > 0 for weight in weights)] for weights in batch]
        self._index.write(np.array(sums, dtype="<f8").ravel())

    def keep(self) -> dict[str, Any]:
        """Wait until all is on the disk; what another process needs to go on from here."""
        return {"table": self.table, **self._shards.keep(), "index": asdict(self._index.sync())}

    def close(self) -> Weights:
        """All that was written, now on the disk."""
        return Weights(tuple(self.table), self._index.close(), self._shards.close())


def kept_names(kept: dict[str, Any] | None) -> list[str]:
    """The files that were there when it was kept."""
    return [TARGETS, *(shard["file"] for shard in (*kept["shards"], *kept["open"]))] if kept else []


class WeightReader:
    """The weights of a store. targets: (documents, 2), the sum of each document's weights and how many tokens have one above 0."""

    def __init__(self, folder: Path, weights: Weights) -> None:
        self.table = np.array(weights.table, dtype=np.float64)
        self.stream = ShardReader(folder, weights.shards, dtype="u1")
        self.targets = mapped(folder / TARGETS, "<f8").reshape(-1, 2)

    def read(self, start: int, count: int) -> np.ndarray:
        """The weights of tokens start .. start + count - 1: float64 (count,). Raises DataError when a file is damaged."""
        places = np.empty(count, dtype=np.uint8)
        self.stream.read(start, places)
        assert not count or places.max() < len(self.table), "a weight that is not in the table"
        return self.table[places]
