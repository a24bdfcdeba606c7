"""Which tokens each rank sees at each step: a pure function of (seed, step), the same for every world size.

Letters: G sequences of a global batch, B of a micro-batch, S tokens of a sequence.

A source's documents, each ended by the end token, form one long line of tokens. Sample i of a source is the S + 1
tokens from i * S on: the whole window is cut first, then shifted against itself to give the labels. Samples are counted
through the run; the pattern of the mixture says which source sample number c belongs to, and a keyed permutation,
another one in every epoch of that source, which of its samples it is. So the whole state is one number, the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dist_llm.data.mixture import pattern
from dist_llm.data.store import TokenStore
from dist_llm.errors import DataError
from dist_llm.random import key_of, permute

if TYPE_CHECKING:
    from dist_llm.config.schema import DataConfig
    from dist_llm.data.prepare import Prepared

IGNORED = -100  # the label of a position that gives no loss
BLOCK = 4096  # samples whose order is worked out together, in whole steps: permuting few numbers costs as much as permuting many
EPOCHS = 8  # permutations that this may take: fewer samples at a time where the sources are tiny
PADDING = -1  # the sample id of a row that only fills up the last validation batch


@dataclass(frozen=True)
class MicroBatch:
    """Sequences for one forward pass, int64 on the CPU but for the weights.

    tokens, labels, positions, documents: (B, S). labels: the next token, or -100. positions: place in the sequence, or
    in the document. documents: number of the document within the row, for masks. rows: (B,), place in the global batch.
    weights: (B, S) float64, what the loss of each label counts; None where every one counts 1, in the whole run.
    pairs: (B,), how many pairs a row holds; of pair p its documents 2p and 2p + 1 are the chosen and the rejected side. reference:
    (pairs, 2) float64, the log probabilities of the sides before training; None where they are not known.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor
    rows: Tensor
    weights: Tensor | None = None
    pairs: Tensor | None = None
    reference: Tensor | None = None

    @property
    def weight(self) -> float:
        """What the loss is divided by, added up over a global batch: what the labels count together, or the number of pairs."""
        if self.pairs is not None:
            return float(self.pairs.sum())
        return float(self.targets) if self.weights is None else float(self.weights[self.labels >= 0].sum())

    @property
    def targets(self) -> int:
        """How many labels count."""
        return int((self.labels >= 0).sum())


class Batches:
    """The order of a run over the stores of one or more sources, in proportion to whole-number weights.

    document_mask: labels that belong to the next document are ignored. reset_positions: positions start again in each
    document. sequential: for validation; every sample once, unshuffled, sources interleaved by weight, the last batch
    filled up with rows that have no labels. Raises DataError when there are fewer samples than one global batch
    (sequential: than one).
    """

    def __init__(
        self,
        stores: TokenStore | Sequence[TokenStore],
        *,
        sequence: int,
        global_batch: int,
        seed: int,
        weights: Sequence[int] | None = None,
        document_mask: bool = False,
        reset_positions: bool = False,
        sequential: bool = False,
    ) -> None:
        self.stores = [stores] if isinstance(stores, TokenStore) else list(stores)
        self.sequence, self.global_batch, self.seed = sequence, global_batch, seed
        self.end_id = self.stores[0].manifest.end_id
        assert all(store.manifest.tokenizer == self.stores[0].manifest.tokenizer for store in self.stores), "stores of several tokenizers"
        self.document_mask, self.reset_positions = document_mask, reset_positions
        self.counts = np.array([self._samples(store) for store in self.stores], dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.counts)])  # sample ids of source i: offsets[i] .. offsets[i + 1] - 1
        self._require_samples(1 if sequential else global_batch, each=not sequential)
        self.pattern = pattern(list(weights) if weights is not None else [1] * len(self.stores))
        self._share = np.bincount(self.pattern, minlength=len(self.stores))
        self._turn = np.zeros_like(self.pattern)  # how often a place's source came up earlier in the pattern
        for source in range(len(self.stores)):
            self._turn[self.pattern == source] = np.arange(self._share[source])
        self._fixed = self._interleaved() if sequential else None
        epochs = float((self._share / np.maximum(1, self.counts)).sum()) / len(self.pattern)  # that go by in a sample
        self._steps = max(1, int(min(BLOCK, EPOCHS / epochs)) // global_batch)  # whose order is worked out together
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))  # the last block asked for

    def _samples(self, store: TokenStore) -> int:
        """How many samples a store gives."""
        return max(0, len(store) - 1) // self.sequence

    @property
    def num_samples(self) -> int:
        """Samples of all the sources together."""
        return int(self.offsets[-1])

    @property
    def num_batches(self) -> int:
        """Global batches that hold every sample once; the last may be filled up."""
        return -(-self.num_samples // self.global_batch)

    def epochs(self, steps: int) -> list[float]:
        """How often each source is gone through in so many steps."""
        turns = steps * self.global_batch / len(self.pattern)
        return (turns * self._share / np.maximum(1, self.counts)).tolist()

    def sample_ids(self, step: int) -> Tensor:
        """The samples of a step's global batch, in order: int64 (G,), -1 for a row that only fills up."""
        block, inside = divmod(step, self._steps)
        if self._block[0] != block:
            samples = self._steps * self.global_batch
            counter = np.arange(block * samples, (block + 1) * samples, dtype=np.int64)
            self._block = (block, self._shuffled(counter) if self._fixed is None else self._filled(counter))
        return torch.from_numpy(self._block[1][inside * self.global_batch : (inside + 1) * self.global_batch].copy())

    def _filled(self, counter: np.ndarray) -> np.ndarray:
        """The fixed order, and after its end the id that only fills up."""
        assert self._fixed is not None
        inside = counter < self.num_samples
        return np.where(inside, self._fixed[np.where(inside, counter, 0)], PADDING)

    def _shuffled(self, counter: np.ndarray) -> np.ndarray:
        """The sample of each number in the run's count: a pure function."""
        turns, place = np.divmod(counter, len(self.pattern))
        source = self.pattern[place]
        epoch, index = np.divmod(turns * self._share[source] + self._turn[place], self.counts[source])
        ids = np.empty_like(counter)
        for one, number in np.unique(np.stack([source, epoch]), axis=1).T.tolist():
            rows = (source == one) & (epoch == number)
            key = key_of(self.seed, "shuffle", str(one), number)
            ids[rows] = self.offsets[one] + permute(torch.from_numpy(index[rows]), int(self.counts[one]), key).numpy()
        return ids

    def targets(self, step: int) -> int:
        """Target tokens of the whole global batch: counted from the index alone, the same on every rank, without communication."""
        ids = self.sample_ids(step).numpy()
        ids = ids[ids != PADDING]
        total = len(ids) * self.sequence
        if self.document_mask:
            for source in range(len(self.stores)):
                start = (ids[self._source(ids) == source] - self.offsets[source]) * self.sequence
                ends = self.stores[source].document_starts[1:]  # a document's end token lies just before
                total -= int((np.searchsorted(ends, start + self.sequence, "right") - np.searchsorted(ends, start, "right")).sum())
        return total

    def require_targets(self, steps: int) -> None:
        """Raises DataError where one of the steps to come has nothing to learn from; looks at each where that can be at all."""
        if not self.document_mask:
            return
        labels = []
        for store, count in zip(self.stores, self.counts.tolist(), strict=True):
            ends = store.document_starts[1:]
            edges = np.arange(count + 1) * self.sequence
            masked = np.diff(np.searchsorted(ends, edges, "right")) if store.shortest == 1 else np.zeros(count, np.int64)
            labels.append(self.sequence - masked)  # a document of an end token alone gives none
        each = np.concatenate(labels)
        if each.min() > 0:
            return
        for step in range(steps):
            ids = self.sample_ids(step)
            if not each[ids.numpy()].any():
                raise no_targets(step, ids)

    def weight(self, step: int) -> float:
        """What the target tokens of the whole global batch count together: their number, where each counts 1."""
        return float(self.targets(step))

    def micro_batches(self, step: int, *, dp_rank: int, dp_size: int, micro: int) -> list[MicroBatch]:
        """What one data-parallel rank computes in a step: its contiguous block of the global batch, made whole, then cut."""
        return self.cut(self.sample_ids(step).numpy(), dp_rank=dp_rank, dp_size=dp_size, micro=micro)

    def cut(self, ids: np.ndarray, *, dp_rank: int, dp_size: int, micro: int) -> list[MicroBatch]:
        """As `micro_batches`, of a global batch of these samples (G,)."""
        assert self.global_batch % (dp_size * micro) == 0, (self.global_batch, dp_size, micro)
        size = self.global_batch // dp_size
        rows = np.arange(dp_rank * size, (dp_rank + 1) * size)
        tokens, labels, positions, documents, *weights = self._sequences(ids[rows])
        arrays = (tokens, labels, positions, documents, rows, *weights)
        return [MicroBatch(*(torch.from_numpy(array[at : at + micro]) for array in arrays)) for at in range(0, size, micro)]

    def _sequences(self, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """Tokens, labels, positions and documents of some samples, as a MicroBatch has them, (B, S) each; then weights, if any."""
        windows = self._windows(ids)
        tokens, labels = windows[:, :-1].copy(), windows[:, 1:].copy()
        labels[ids == PADDING] = IGNORED
        ends = tokens == self.end_id
        documents = np.zeros_like(tokens)
        np.cumsum(ends[:, :-1], axis=1, out=documents[:, 1:])  # an end token still belongs to the document it ends
        if self.document_mask:
            labels[ends] = IGNORED
        positions = np.tile(np.arange(self.sequence), (len(ids), 1))
        if self.reset_positions:
            positions -= _document_start(ends)
        return tokens, labels, positions, documents

    def _windows(self, ids: np.ndarray) -> np.ndarray:
        """The S + 1 tokens of each sample: int64 (B, S + 1), zeros in rows that only fill up; read row by row from the mapped shards."""
        windows = np.zeros((len(ids), self.sequence + 1), dtype=np.int64)
        sources = self._source(ids)
        starts = (ids - self.offsets[sources]) * self.sequence
        for window, start, source in zip(windows, starts.tolist(), sources.tolist(), strict=True):
            if source >= 0:
                self.stores[source].read(start, window)
        return windows

    def _source(self, ids: np.ndarray) -> np.ndarray:
        """The source of each sample; -1 for one that only fills up."""
        return np.searchsorted(self.offsets, ids, side="right") - 1

    def _interleaved(self) -> np.ndarray:
        """Every sample once: the pattern's order, going on with the others when a source has no more."""
        moments = []
        for source, count in enumerate(self.counts):
            turns, rest = np.divmod(np.arange(count), self._share[source])
            moments.append(turns * len(self.pattern) + np.flatnonzero(self.pattern == source)[rest])
        return np.argsort(np.concatenate(moments), kind="stable")

    def _require_samples(self, needed: int, *, each: bool) -> None:
        short = [store for store, count in zip(self.stores, self.counts, strict=True) if each and count < 1]
        if short or self.num_samples < needed:
            store = short[0] if short else self.stores[0]
            needs = 1 if short else needed
            advice = "use more text, or a smaller data.sequence" + ("" if needs == 1 else " or batch.global")
            advice = advice if each else "raise data.validation, or set it to 0"
            raise DataError(
                "there is too little text for one sequence" if needs == 1 else "there is too little text for one global batch",
                where=str(store.folder),
                expected=f"at least {needs} x {self.sequence} + 1 = {needs * self.sequence + 1} tokens",
                found=f"{len(store) if short else sum(map(len, self.stores))} tokens in {store.manifest.documents} documents",
                next=advice,
            )


def training_batches(prepared: Prepared, data: DataConfig, *, global_batch: int, seed: int) -> Batches:
    """The order in which a run trains on prepared data; `seed` gives way to data.seed. Raises DataError: too little, too long."""
    settings: dict[str, Any] = {"global_batch": global_batch, "seed": seed if data.seed is None else data.seed}
    if prepared.template is not None and set(prepared.shapes) != {"text"}:  # texts have no answer that ends
        settings["ends"] = prepared.template.stop_ids(prepared.tokenizer)
    return _order(prepared.train, data, weights=prepared.weights, **settings)


def validation_batches(prepared: Prepared, data: DataConfig, *, global_batch: int) -> Batches | None:
    """Every held-out sequence once, in a fixed order; None when nothing is held out."""
    if not prepared.validation:
        return None
    weights = prepared.validation_weights
    return _order(prepared.validation, data, weights=weights, global_batch=global_batch, seed=0, sequential=True)


def _order(stores: Sequence[TokenStore], data: DataConfig, **settings: Any) -> Batches:
    """The order over stores of text or of conversations."""
    if data.chat.format is None:
        masks: dict[str, Any] = {"document_mask": data.document_mask, "reset_positions": data.reset_positions}
        return Batches(stores, sequence=data.sequence, **masks, **settings)
    from dist_llm.data.packing import PackedBatches  # they are made of the class above
    from dist_llm.data.pairs import PairBatches

    kind = PairBatches if data.chat.format == "preference" else PackedBatches
    return kind(stores, sequence=data.sequence, best_fit=data.packing == "best_fit", too_long=data.chat.too_long, **settings)


def no_targets(step: int, samples: Iterable[int]) -> DataError:
    """The failure of a step (from 0) in which no label counts; it is told before anything was changed by it."""
    ids = [int(number) for number in samples]
    found = f"samples {', '.join(map(str, ids[:8]))}" + (f" and {len(ids) - 8} more" if len(ids) > 8 else "") if ids else None
    what, expected = "a batch without a single target token", "at least one label to learn from"
    way = f"dist-llm data preview CONFIG --step {step} shows it"
    return DataError(what, where=f"step {step + 1}", expected=expected, found=found, next=way)


def _document_start(ends: np.ndarray) -> np.ndarray:
    """Where the document of each position starts in its row: (B, S) from (B, S) marks of end tokens."""
    starts = np.zeros(ends.shape, dtype=np.int64)
    starts[:, 1:] = np.where(ends[:, :-1], np.arange(1, ends.shape[1]), 0)
    return np.maximum.accumulate(starts, axis=1)
