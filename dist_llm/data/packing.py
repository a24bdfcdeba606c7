"""Conversations in sequences, each of them whole: packed by best fit, or one a sequence.

Letters: G sequences of a global batch, B of a micro-batch, S tokens of a sequence.

A conversation of n tokens takes n - 1 places: at each of them one of its tokens, and as the label the next. Best-fit decreasing
puts the longest conversation first, and each into the sequence in which it leaves the least room; of several such sequences
into the newest, and where there is none into a new one. It depends on lengths alone, so that every rank packs alike. What
stays free is padding: its labels are -100, and it is a document of its own, at which nobody looks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from dist_llm.data.batches import IGNORED, PADDING, Batches
from dist_llm.data.store import TokenStore
from dist_llm.errors import DataError
from dist_llm.random import key_of, permute

TooLong = Literal["refuse", "drop", "truncate"]


@dataclass(frozen=True)
class Packing:
    """How the conversations of a store lie in sequences.

    order: numbers of the documents, sequence after sequence; starts: where each sequence begins in it, (rows + 1,). places:
    how many places each document of the store takes, 0 where it was left out. sums: for each document what its labels count
    together, and their number, (documents, 2). too_long, emptied, cut: how many were longer than a sequence, how many of those
    had no trained token left, and of how many others what is trained was cut before its end.
    ended: how many are known to keep the end of an answer; counted no further than 1 among those that were cut.
    """

    order: np.ndarray
    starts: np.ndarray
    places: np.ndarray
    sums: np.ndarray
    too_long: int
    emptied: int
    cut: int = 0
    ended: int = 1

    @property
    def rows(self) -> int:
        """Sequences."""
        return len(self.starts) - 1

    def documents(self, row: int) -> np.ndarray:
        """The documents of a sequence, in their order."""
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack(store: TokenStore, *, sequence: int, best_fit: bool, too_long: TooLong, ends: Collection[int] = ()) -> Packing:
    """Lays the conversations of a store into sequences of S places.

    ends: the ids that end what the assistant says. Raises DataError when there are longer ones and `too_long` is `refuse`.
    """
    assert store.weights is not None, "a store of text"
    lengths = np.diff(store.document_starts).astype(np.int64)
    places, sums = lengths - 1, np.array(store.weights.targets)
    long = np.flatnonzero(places > sequence)
    if len(long) and too_long == "refuse":
        most = int(places.max())
        raise DataError(
            f"{len(long)} of {len(places)} conversations {'is' if len(long) == 1 else 'are'} longer than a sequence",
            where=str(store.folder),
            expected=f"at most data.sequence + 1 = {sequence + 1} tokens",
            found=f"{most + 1} tokens in the longest",
            next=f"data.sequence={most} takes them all; or data.chat.too_long=drop or truncate",
        )
    emptied, cut, ended = 0, 0, len(places) - len(long)
    for number in long:
        if too_long == "truncate":
            kept, before = store.weights.read(start := int(store.document_starts[number]), sequence + 1), sums[number, 1]
            sums[number] = kept.sum(), np.count_nonzero(kept)
            emptied += not kept.any()
            cut += bool(0 < sums[number, 1] < before)
            if not ended:
                store.read(start, ids := np.empty(sequence + 1, dtype=np.int64))
                ended += bool(np.isin(ids[kept > 0], list(ends)).any())
        else:
            sums[number] = 0.0
    places = np.where(sums[:, 0] > 0, np.minimum(places, sequence), 0)
    kept_numbers = np.flatnonzero(places)
    rows = fit(places[kept_numbers], room=sequence) if best_fit else [[at] for at in range(len(kept_numbers))]
    order = np.array([kept_numbers[at] for row in rows for at in row], dtype=np.int64)
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return Packing(order, starts, places, sums, len(long), emptied, cut, ended)


def fit(sizes: np.ndarray, *, room: int) -> list[list[int]]:
    """Best-fit decreasing: numbers of the items (of sizes from 1 to `room`) in each bin.

    It takes n log n. The bins are numbered as they are opened; items of equal size go by their number.
    """
    bins: list[list[int]] = []
    left: list[list[int]] = [[] for _ in range(room + 1)]  # bins by the room that is left in them
    some = 0  # bit r: there is a bin with room r left
    for item in np.lexsort((np.arange(len(sizes)), -sizes)).tolist():
        size = int(sizes[item])
        above = some >> size
        if above:
            found = size + (above & -above).bit_length() - 1
            number = left[found].pop()
            if not left[found]:
                some ^= 1 << found
        else:
            found, number = room, len(bins)
            bins.append([])
        bins[number].append(item)
        left[found - size].append(number)
        some |= 1 << (found - size)
    return bins


class PackedBatches(Batches):
    """The order of a run over stores of conversations; as `Batches`, but that a sample is a sequence of whole conversations.

    best_fit: several in a sequence, as many as fit; else one. too_long: what becomes of those that are longer than a sequence.
    ends: the ids that end an answer. Raises DataError for longer ones, where no answer would keep its end, or when there are fewer
    sequences than a global batch has.
    """

    noun = "conversations"  # what lies in the sequences
    each = 1  # documents of one

    def __init__(
        self,
        stores: TokenStore | Sequence[TokenStore],
        *,
        sequence: int,
        global_batch: int,
        seed: int,
        best_fit: bool = True,
        too_long: TooLong = "refuse",
        ends: Collection[int] = (),
        weights: Sequence[int] | None = None,
        sequential: bool = False,
    ) -> None:
        each = [stores] if isinstance(stores, TokenStore) else list(stores)
        self.packings = [self._pack(store, sequence=sequence, best_fit=best_fit, too_long=too_long, ends=ends) for store in each]
        if ends and any(one.cut for one in self.packings) and not any(one.ended for one in self.packings):
            raise self._without_end(each, sequence)
        self.best_fit = best_fit
        self.weighted = any(store.weights is not None and len(store.weights.table) > 2 for store in each)  # other than 0 and 1
        settings: dict[str, Any] = {"weights": weights, "sequential": sequential, "document_mask": True, "reset_positions": True}
        super().__init__(each, sequence=sequence, global_batch=global_batch, seed=seed, **settings)

    def _pack(self, store: TokenStore, **how: Any) -> Packing:
        """How the conversations of a store lie in sequences."""
        return pack(store, **how)

    def _without_end(self, stores: Sequence[TokenStore], sequence: int) -> DataError:
        """The failure of answers that are all cut."""
        lengths = np.concatenate([np.diff(store.document_starts) for store in stores])
        return DataError(
            f"all {self.noun} are cut before an answer ends, so that the model would never stop",
            where="data.chat.too_long",
            expected=f"an answer that ends within data.sequence + 1 = {sequence + 1} tokens",
            found=f"{len(lengths)} {self.noun} of {int(lengths.min())} to {int(lengths.max())} tokens",
            next=f"data.sequence={int(lengths.max()) - 1} takes them all",
        )

    def targets(self, step: int) -> int:
        """Trained tokens of the whole global batch: from the index alone."""
        return int(self._sums(step)[1])

    def require_targets(self, steps: int) -> None:
        """Nothing: what has no trained token is in no sequence."""

    def weight(self, step: int) -> float:
        """What they count together: the same number on every rank."""
        return float(self._sums(step)[0])

    def _sums(self, step: int) -> np.ndarray:
        """(weight, count) of a step's labels."""
        numbers = self.sample_ids(step).numpy()
        found = [self._packed(int(number)) for number in numbers if number != PADDING]
        parts = [packing.sums[packing.documents(row)].sum(0) for packing, _, row in found]
        return np.sum(parts, axis=0) if parts else np.zeros(2)

    def _interleaved(self) -> np.ndarray:
        """Best fit opens the sequences of the longest conversations first; mixed, the first batches of the fixed order speak for all."""
        fixed = super()._interleaved()
        if not self.best_fit:
            return fixed
        sources = self._source(fixed)
        for source, count in enumerate(self.counts.tolist()):
            mine, first = sources == source, int(self.offsets[source])
            fixed[mine] = first + permute(torch.from_numpy(fixed[mine] - first), count, key_of(0, "held out", str(source))).numpy()
        return fixed

    def _packed(self, number: int) -> tuple[Packing, TokenStore, int]:
        """The packing, the store and the row there of a sample."""
        source = int(self._source(np.array([number]))[0])
        return self.packings[source], self.stores[source], number - int(self.offsets[source])

    def _samples(self, store: TokenStore) -> int:
        return self.packings[next(at for at, one in enumerate(self.stores) if one is store)].rows

    def _sequences(self, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """Tokens, labels, positions, documents and, where they are not all 1, weights of some samples: (B, S) each."""
        shape = (len(ids), self.sequence)
        tokens, positions = np.full(shape, self.end_id, dtype=np.int64), np.tile(np.arange(self.sequence), (len(ids), 1))
        labels, documents = np.full(shape, IGNORED, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        weights = np.zeros(shape, dtype=np.float64)
        for row, number in enumerate(ids.tolist()):
            if number == PADDING:
                continue
            packing, store, at = self._packed(number)
            assert store.weights is not None
            begin = 0
            for count, document in enumerate(packing.documents(at).tolist()):
                start, places = int(store.document_starts[document]), int(packing.places[document])
                here, whole = slice(begin, begin + places), np.empty(places + 1, dtype=np.int64)
                store.read(start, whole)
                counts = store.weights.read(start, places + 1)[1:]
                tokens[row, here], weights[row, here] = whole[:-1], counts
                labels[row, here] = np.where(counts > 0, whole[1:], IGNORED)
                positions[row, here], documents[row, here] = np.arange(places), count
                begin += places
            documents[row, begin:] = len(packing.documents(at))
            positions[row, begin:] -= begin
        return (tokens, labels, positions, documents, weights) if self.weighted else (tokens, labels, positions, documents)

    def _require_samples(self, needed: int, *, each: bool) -> None:
        short = [store for store, count in zip(self.stores, self.counts, strict=True) if each and count < 1]
        if short or self.num_samples < needed:
            store = short[0] if short else self.stores[0]
            documents = sum(one.manifest.documents for one in self.stores)
            advice = f"more {self.noun}, or a smaller batch.global or data.sequence" if each else "raise data.validation, or set it to 0"
            raise DataError(
                f"there are too few {self.noun} for one global batch" if not short else f"no {self.noun[:-1]} of a source fits",
                where=str(store.folder),
                expected=f"at least {1 if short else needed} sequences of {self.sequence}",
                found=f"{0 if short else self.num_samples} from {documents // self.each} {self.noun}",
                next=advice,
            )

    def conversations(self, step: int) -> list[tuple[int, list[int], list[float]]]:
        """The conversations of a step, as they are trained: (row of the global batch, ids, what the loss of each id counts)."""
        found = []
        for row, number in enumerate(self.sample_ids(step).tolist()):
            if number == PADDING:
                continue
            packing, store, at = self._packed(number)
            for document in packing.documents(at).tolist():
                start, ids = int(store.document_starts[document]), np.empty(int(packing.places[document]) + 1, dtype=np.int64)
                store.read(start, ids)
                assert store.weights is not None
                found.append((row, ids.tolist(), store.weights.read(start, ids.size).tolist()))
        return found

    def sentence(self) -> str:
        """What was packed and what was left out, in words."""
        found = self.statistics()
        room = f"{found['sequences']:,} sequences of {self.sequence}, {found['padding_share']:.1%} padding"
        packed = f"{found['samples']:,} {self.noun} in {room}"
        trained = f"{found['trained_share']:.1%} of {found['tokens']:,} tokens are trained"
        left = f"; {found['too_long']:,} were longer than a sequence, {found['left_out']:,} were left out" if found["too_long"] else ""
        cut = f", {found['cut']:,} were cut before the end of what is trained and do not teach it to stop there" if found["cut"] else ""
        return f"{packed}; {trained}{left}{cut}"

    def statistics(self) -> dict[str, Any]:
        """Counts of what is packed.

        `samples`, `sequences`, `tokens`, `trained_tokens`, `trained_share` (of tokens), `padding_share` (of places),
        `padding_share_unpacked` (with one conversation a sequence), `longest` (tokens), `too_long`, `left_out`, `emptied`,
        `cut` (before the end of what is trained).
        """
        documents = sum(len(packing.order) for packing in self.packings)
        places, samples = sum(int(packing.places.sum()) for packing in self.packings), documents // self.each
        tokens = places + documents
        trained = sum(int(packing.sums[packing.order, 1].sum()) for packing in self.packings)
        room = self.num_samples * self.sequence
        lengths = [np.diff(store.document_starts).reshape(-1, self.each).sum(1) for store in self.stores]
        return {
            "samples": samples,
            "sequences": self.num_samples,
            "tokens": tokens,
            "trained_tokens": trained,
            "trained_share": trained / max(1, tokens),
            "padding_share": 1.0 - places / max(1, room),
            "padding_share_unpacked": 1.0 - places / max(1, samples * self.sequence),
            "longest": max(int(each.max()) for each in lengths),
            "too_long": sum(packing.too_long for packing in self.packings),
            "left_out": sum(len(each) for each in lengths) - samples,
            "emptied": sum(packing.emptied for packing in self.packings),
            "cut": sum(packing.cut for packing in self.packings),
        }
