"""Pairs of answers in sequences: both sides of a pair in one, several pairs where they fit.

A pair takes the places of both its sides, each a document of its own that the other does not see. So a micro-batch of any size holds
whole pairs, whatever the layout, and their order is a pure function of (seed, step). Documents 2p and 2p + 1 of a store are the chosen
and the rejected side of pair p.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dist_llm.data.batches import PADDING, MicroBatch
from dist_llm.data.packing import PackedBatches, Packing, TooLong, fit
from dist_llm.data.store import TokenStore
from dist_llm.errors import DataError


def pack_pairs(store: TokenStore, *, sequence: int, best_fit: bool, too_long: TooLong, ends: Collection[int] = ()) -> Packing:
    """As `packing.pack`, of pairs: both sides of one in the same sequence, the chosen first.

    truncate: a side keeps the beginning of it that half a sequence takes, or what the other leaves. A pair of which a side has no
    trained token left, or whose sides are then the same, is left out. That no side keeps its end
    is not refused: a preference begins from a model that stops.
    """
    assert store.weights is not None and len(store.document_starts) % 2, "a store of pairs"
    places = np.diff(store.document_starts).astype(np.int64).reshape(-1, 2) - 1
    sums = np.array(store.weights.targets).reshape(-1, 2, 2)
    long = np.flatnonzero(places.sum(1) > sequence)
    if len(long) and too_long == "refuse":
        most = int(places.sum(1).max())
        raise DataError(
            f"{len(long)} of {len(places)} pairs {'is' if len(long) == 1 else 'are'} longer than a sequence, which holds both sides",
            where=str(store.folder),
            expected=f"at most data.sequence + 2 = {sequence + 2} tokens",
            found=f"{most + 2} tokens in the longest",
            next=f"data.sequence={most} takes them all; or data.chat.too_long=drop or truncate",
        )
    if too_long == "truncate":
        places[long] = _cut(places[long], sequence)
    emptied = cut = 0
    for number in long:
        if too_long == "truncate":
            before = sums[number, :, 1].copy()
            sums[number], same = _left(store, int(number), places[number])
            emptied += not sums[number, :, 0].all() or same
            sums[number] *= not same
            cut += bool(sums[number, :, 0].all() and (sums[number, :, 1] < before).any())
        else:
            sums[number] = 0.0
    places[~np.all(sums[:, :, 0] > 0, axis=1)] = 0
    kept = np.flatnonzero(places[:, 0])
    rows = fit(places[kept].sum(1), room=sequence) if best_fit else [[at] for at in range(len(kept))]
    order = np.array([side for row in rows for at in row for side in (2 * kept[at], 2 * kept[at] + 1)], dtype=np.int64)
    starts = np.cumsum([0, *(2 * len(row) for row in rows)], dtype=np.int64)
    return Packing(order, starts, places.ravel(), sums.reshape(-1, 2), len(long), emptied, cut)


def _cut(places: np.ndarray, room: int) -> np.ndarray:
    """How many places the sides of pairs (n, 2) keep of `room`: half of it, or what the other side leaves."""
    half = room // 2
    return np.minimum(places, np.maximum(half, room - places[:, ::-1]))


def _left(store: TokenStore, number: int, places: np.ndarray) -> tuple[np.ndarray, bool]:
    """What the labels that are left of a pair's sides count and how many there are, (2, 2), and whether the sides are now the same."""
    assert store.weights is not None
    sums, texts = np.zeros((2, 2)), []
    for side, size in enumerate(places.tolist()):
        start, ids = int(store.document_starts[2 * number + side]), np.empty(size + 1, dtype=np.int64)
        store.read(start, ids)
        counts = store.weights.read(start, size + 1)
        sums[side] = counts.sum(), np.count_nonzero(counts)
        texts.append(ids)
    return sums, np.array_equal(texts[0], texts[1])


class PairBatches(PackedBatches):
    """The order of a run over stores of pairs; as `PackedBatches`, but that a sequence holds whole pairs, and the loss goes by them."""

    noun, each = "pairs", 2

    def _pack(self, store: TokenStore, **how: Any) -> Packing:
        return pack_pairs(store, **how)

    def weight(self, step: int) -> float:
        """The pairs of the whole global batch: the same number on every rank."""
        return float(sum(len(self.pairs(int(number))) for number in self.sample_ids(step)))

    def pairs(self, number: int) -> np.ndarray:
        """The pairs of a sample, as its store numbers them; none of one that only fills up."""
        if number == PADDING:
            return np.empty(0, dtype=np.int64)
        packing, _, row = self._packed(number)
        return packing.documents(row)[::2] // 2

    def cut(self, ids: np.ndarray, *, dp_rank: int, dp_size: int, micro: int) -> list[MicroBatch]:
        """As `Batches.cut`, with the pairs of each row and what is known of them."""
        batches = super().cut(ids, dp_rank=dp_rank, dp_size=dp_size, micro=micro)
        return [self._paired(batch, ids[batch.rows.numpy()].tolist()) for batch in batches]

    def _paired(self, batch: MicroBatch, samples: Sequence[int]) -> MicroBatch:
        counts = torch.tensor([len(self.pairs(number)) for number in samples])
        known = [self.reference(number) for number in samples]
        reference = np.concatenate(known)
        return replace(batch, pairs=counts, reference=None if np.isnan(reference).any() else torch.from_numpy(reference))

    def reference(self, number: int) -> np.ndarray:
        """The log probabilities of a sample's sides before training, (pairs, 2); NaN where they are not known."""
        if number == PADDING:
            return np.empty((0, 2))
        table = self._packed(number)[1].reference
        return np.full((len(self.pairs(number)), 2), np.nan) if table is None else table[self.pairs(number)]

    def note(self, number: int, logps: np.ndarray) -> None:
        """Keeps the log probabilities of a sample's sides, (pairs, 2), with the store."""
        store = self._packed(number)[1]
        if store.reference is None:
            store.reference = np.full((store.manifest.documents // 2, 2), np.nan)
        store.reference[self.pairs(number)] = logps
