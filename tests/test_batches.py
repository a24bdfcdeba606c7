"""The order of samples: pure in (seed, step), the same for every world, exact in mixtures; windows, labels, masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.schema import Config, DataConfig
from dist_llm.data.batches import IGNORED, PADDING, Batches, MicroBatch, training_batches, validation_batches
from dist_llm.data.prepare import prepare
from dist_llm.data.store import StoreWriter, TokenStore
from dist_llm.errors import DataError
from dist_llm.train.run import prepare_data
from tests.commands import Commands
from tests.engine_cases import build, config, layout_of

END = 0


def store_of(folder: Path, documents: Sequence[Sequence[int]], *, shard_tokens: int = 1 << 20) -> TokenStore:
    writer = StoreWriter(folder, vocab=60_000, end_id=END, shard_tokens=shard_tokens)
    writer.add(documents, digests=b"", text_bytes=0)
    writer.close(split="train", source="made", tokenizer="t")
    return TokenStore(folder)


def counting(folder: Path, tokens: int, *, length: int = 37, base: int = 1) -> TokenStore:
    """A store where token number n of the stream is base + n, but for the ends."""
    stream = [END if (n + 1) % length == 0 or n == tokens - 1 else base + n for n in range(tokens)]
    documents, document = [], []
    for token in stream:
        if token == END:
            documents.append(document)
            document = []
        else:
            document.append(token)
    return store_of(folder, [document for document in documents if document], shard_tokens=333)


def stream_of(store: TokenStore) -> np.ndarray:
    out = np.empty(len(store), dtype=np.int64)
    store.read(0, out)
    return out


def joined(parts: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
    names = ("tokens", "labels", "positions", "documents", "rows")
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return counting(tmp_path / "store", 2000)


def test_every_sample_once_an_epoch_in_another_order_each_time(store: TokenStore) -> None:
    batches = Batches(store, sequence=16, global_batch=7, seed=1)
    samples = batches.num_samples
    assert samples == (2000 - 1) // 16 == 124
    order = torch.cat([batches.sample_ids(step) for step in range(60)])
    epochs = [order[start : start + samples].tolist() for start in (0, samples, 2 * samples)]
    assert all(sorted(epoch) == list(range(samples)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert torch.equal(batches.sample_ids(41), Batches(store, sequence=16, global_batch=7, seed=1).sample_ids(41)), "no state"
    assert not torch.equal(batches.sample_ids(0), Batches(store, sequence=16, global_batch=7, seed=2).sample_ids(0))
    wider = Batches(store, sequence=16, global_batch=14, seed=1)
    assert torch.equal(torch.cat([wider.sample_ids(step) for step in range(30)]), order), "the order does not depend on the batch size"


@pytest.mark.parametrize("mask", [False, True])
def test_the_global_batch_is_the_same_for_every_world_and_micro_batch(store: TokenStore, mask: bool) -> None:
    batches = Batches(store, sequence=24, global_batch=8, seed=3, document_mask=mask, reset_positions=mask)
    for step in (0, 9, 10, 23):
        whole = joined(batches.micro_batches(step, dp_rank=0, dp_size=1, micro=8))
        assert whole["rows"].tolist() == list(range(8))
        for dp, micro in ((1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (8, 1)):
            parts = [part for rank in range(dp) for part in batches.micro_batches(step, dp_rank=rank, dp_size=dp, micro=micro)]
            assert all(part.tokens.shape == (micro, 24) and part.tokens.dtype == torch.int64 for part in parts)
            assert all(torch.equal(tensor, whole[name]) for name, tensor in joined(parts).items()), (dp, micro)
            assert sum(part.targets for part in parts) == batches.targets(step)
    with pytest.raises(AssertionError):
        batches.micro_batches(0, dp_rank=0, dp_size=3, micro=1)


def test_windows_are_cut_first_and_shifted_then(store: TokenStore) -> None:
    batches, stream = Batches(store, sequence=16, global_batch=4, seed=5), stream_of(store)
    for step in range(31):
        (batch,) = batches.micro_batches(step, dp_rank=0, dp_size=1, micro=4)
        for row, sample in enumerate(batches.sample_ids(step).tolist()):
            assert batch.tokens[row].tolist() == stream[sample * 16 : sample * 16 + 16].tolist()
            assert batch.labels[row].tolist() == stream[sample * 16 + 1 : sample * 16 + 17].tolist()
        assert batch.positions.tolist() == [list(range(16))] * 4 and batch.targets == 64 == batches.targets(step)


def test_masks_by_hand(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [[11, 12, 13], [21], [31, 32, 33, 34, 35, 36]])
    # stream: 11 12 13 0 | 21 0 | 31 32 33 34 35 36 0
    (batch,) = Batches(store, sequence=6, global_batch=2, seed=0, sequential=True, document_mask=True, reset_positions=True).micro_batches(
        0, dp_rank=0, dp_size=1, micro=2
    )
    assert batch.tokens.tolist() == [[11, 12, 13, 0, 21, 0], [31, 32, 33, 34, 35, 36]]
    assert batch.labels.tolist() == [[12, 13, 0, -100, 0, -100], [32, 33, 34, 35, 36, 0]]
    assert batch.documents.tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]]
    assert batch.rows.tolist() == [0, 1] and batch.targets == 10
    (open_,) = Batches(store, sequence=6, global_batch=2, seed=0, sequential=True).micro_batches(0, dp_rank=0, dp_size=1, micro=2)
    assert open_.labels.tolist() == [[12, 13, 0, 21, 0, 31], [32, 33, 34, 35, 36, 0]] and open_.targets == 12
    assert open_.positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    # a row that begins inside a document, and one whose first token ends a document
    (inner,) = Batches(store, sequence=3, global_batch=4, seed=0, sequential=True, document_mask=True, reset_positions=True).micro_batches(
        0, dp_rank=0, dp_size=1, micro=4
    )
    assert inner.tokens.tolist() == [[11, 12, 13], [0, 21, 0], [31, 32, 33], [34, 35, 36]]
    assert inner.labels.tolist() == [[12, 13, 0], [-100, 0, -100], [32, 33, 34], [35, 36, 0]]
    assert inner.documents.tolist() == [[0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert inner.positions.tolist() == [[0, 1, 2], [0, 0, 1], [0, 1, 2], [0, 1, 2]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=30), st.integers(2, 9), st.integers(0, 5))
def test_masks_agree_with_the_index(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence: int, step: int) -> None:
    store = store_of(tmp_path_factory.mktemp("s") / "s", [[7] * length for length in lengths], shard_tokens=11)
    if len(store) - 1 < 2 * sequence:
        return
    batches = Batches(store, sequence=sequence, global_batch=2, seed=1, document_mask=True, reset_positions=True)
    (batch,) = batches.micro_batches(step, dp_rank=0, dp_size=1, micro=2)
    starts = np.array(store.document_starts[:-1], dtype=np.int64)
    for row, sample in enumerate(batches.sample_ids(step).tolist()):
        places = np.arange(sample * sequence, (sample + 1) * sequence)
        document = np.searchsorted(starts, places, side="right") - 1
        assert batch.documents[row].tolist() == (document - document[0]).tolist()
        assert batch.positions[row].tolist() == (places - np.maximum(starts[document], places[0])).tolist()
        following = np.searchsorted(starts, places + 1, side="right") - 1
        assert ((batch.labels[row] == IGNORED).numpy() == (following != document)).all()
    assert batch.targets == batches.targets(step) > 0


# ---------------------------------------------------------------- mixtures


def test_a_mixture_takes_each_source_by_its_weight_and_walks_each_in_its_own_epochs(tmp_path: Path) -> None:
    stores = [counting(tmp_path / "a", 400), counting(tmp_path / "b", 2500, base=1000), counting(tmp_path / "c", 900, base=20_000)]
    batches = Batches(stores, weights=[5, 3, 2], sequence=8, global_batch=6, seed=2)
    counts = [(len(store) - 1) // 8 for store in stores]
    assert batches.num_samples == sum(counts)
    order = torch.cat([batches.sample_ids(step) for step in range(300)]).numpy()
    edges = np.cumsum([0, *counts])
    sources = np.searchsorted(edges, order, side="right") - 1
    for source, weight in enumerate((5, 3, 2)):
        taken = np.cumsum(sources == source)
        assert np.all(np.abs(taken - weight / 10 * np.arange(1, len(order) + 1)) < 1)
        own = order[sources == source] - edges[source]
        for start in range(0, len(own) - counts[source], counts[source]):
            assert sorted(own[start : start + counts[source]]) == list(range(counts[source])), "each epoch holds every sample once"
    (batch,) = batches.micro_batches(4, dp_rank=0, dp_size=1, micro=6)
    for row, sample in enumerate(batches.sample_ids(4).tolist()):
        source = int(np.searchsorted(edges, sample, side="right") - 1)
        place = (sample - int(edges[source])) * 8
        assert batch.tokens[row].tolist() == stream_of(stores[source])[place : place + 8].tolist()


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize("weights", [[1, 1], [3, 1]])
def test_validation_takes_every_sample_once_and_fills_up(tmp_path: Path, weights: list[int]) -> None:
    stores = [counting(tmp_path / "a", 100), counting(tmp_path / "b", 300)]
    batches = Batches(stores, weights=weights, sequence=8, global_batch=12, seed=9, sequential=True, document_mask=True)
    samples = batches.num_samples
    ids = torch.cat([batches.sample_ids(step) for step in range(batches.num_batches)]).tolist()
    assert samples == 12 + 37 and batches.num_batches == 5
    assert sorted(ids[:samples]) == list(range(samples)) and ids[samples:] == [PADDING] * (60 - samples)
    assert [one for one in ids[:samples] if one < 12] == list(range(12)), "each source in its own order"
    assert sum(one < 12 for one in ids[:8]) == 8 * weights[0] // sum(weights)
    targets = 0
    for step in range(batches.num_batches):
        for dp in (1, 2, 4):
            parts = [part for rank in range(dp) for part in batches.micro_batches(step, dp_rank=rank, dp_size=dp, micro=3)]
            assert sum(part.targets for part in parts) == batches.targets(step)
            assert all(part.tokens.min() >= 0 for part in parts)
        targets += batches.targets(step)
    assert all((part.labels == IGNORED).all() for part in batches.micro_batches(4, dp_rank=1, dp_size=2, micro=6)), "only filling"
    seen = [np.array(stream_of(one)[: 8 * ((len(one) - 1) // 8)]) for one in stores]
    assert targets == samples * 8 - sum(int((part == END).sum()) for part in seen)


# ---------------------------------------------------------------- too little (F20)


def test_too_little_text_is_a_data_error(tmp_path: Path) -> None:
    store = counting(tmp_path / "s", 100)
    assert Batches(store, sequence=11, global_batch=9, seed=0).num_samples == 9
    with pytest.raises(DataError, match="one global batch") as caught:
        Batches(store, sequence=11, global_batch=10, seed=0)
    assert caught.value.code == 3 and "10 x 11 + 1 = 111 tokens" in str(caught.value.expected) and "100 tokens" in str(caught.value.found)
    with pytest.raises(DataError, match="one sequence"):
        Batches(store, sequence=100, global_batch=1, seed=0)
    assert Batches(store, sequence=99, global_batch=1, seed=0).num_samples == 1
    with pytest.raises(DataError, match="one sequence") as caught:
        Batches([store, counting(tmp_path / "t", 20)], sequence=30, global_batch=2, seed=0)
    assert caught.value.where == str(tmp_path / "t")
    with pytest.raises(DataError) as caught:
        Batches(store, sequence=200, global_batch=1, seed=0, sequential=True)
    assert "data.validation" in str(caught.value.next)


def test_epochs_are_what_goes_by(tmp_path: Path) -> None:
    """Of each source of a mixture as often as its samples come up."""
    stores = [counting(tmp_path / "a", 900), counting(tmp_path / "b", 4000)]
    order = Batches(stores, sequence=30, global_batch=4, seed=0, weights=[3, 1])
    ids = np.concatenate([order.sample_ids(step).numpy() for step in range(50)])
    seen = [np.count_nonzero(ids < order.offsets[1]), np.count_nonzero(ids >= order.offsets[1])]
    assert order.epochs(50) == [pytest.approx(count / each) for count, each in zip(seen, order.counts, strict=True)]


def test_a_run_says_how_many_epochs_it_is(tmp_path: Path) -> None:
    made = Config.model_validate(
        {
            "model": {"vocab": 300},
            "data": {"source": "skills", "tokenizer": {"kind": "bytes"}, "max_tokens": 3000, "dir": str(tmp_path), "sequence": 32},
            "batch": {"global": 4},
            "schedule": {"steps": 50},
        }
    )
    told: list[Any] = []
    prepared = prepare_data(made, tell=told.append)
    samples = (len(prepared.train[0]) - 1) // 32
    assert {"note": f"50 steps x 4 sequences, of {samples} there are: {200 / samples:.3g} epochs"} in told


def test_from_a_config_to_batches(tmp_path: Path) -> None:
    data = DataConfig(
        source="skills", tokenizer={"kind": "bytes"}, dir=str(tmp_path), sequence=32, max_tokens=6000, validation=0.2, document_mask=True
    )
    prepared = prepare(data, seed=7)
    training, validation = training_batches(prepared, data, global_batch=4, seed=7), validation_batches(prepared, data, global_batch=4)
    assert validation is not None and validation.num_samples == (len(prepared.validation[0]) - 1) // 32
    (batch,) = training.micro_batches(0, dp_rank=0, dp_size=1, micro=4)
    text = prepared.tokenizer.decode(batch.tokens[0].tolist())
    assert len(text.encode()) >= 32 and set(text) <= set(map(chr, range(32, 127))) | {"\n"}
    assert not torch.equal(training.sample_ids(0), training_batches(prepared, data, global_batch=4, seed=8).sample_ids(0))
    assert training.epochs(10) == [40 / training.num_samples]
    fixed = data.model_copy(update={"seed": 7})
    assert torch.equal(training.sample_ids(0), training_batches(prepared, fixed, global_batch=4, seed=8).sample_ids(0))
    nothing = data.model_copy(update={"validation": 0.0})
    assert validation_batches(prepare(nothing, seed=7), nothing, global_batch=4) is None


def test_a_run_with_too_little_text_ends_before_its_ranks_meet(commands: Commands, tmp_path: Path) -> None:
    """Through the shell: exit 3, one message, and only the process that prepares the data was there."""
    (tmp_path / "x.jsonl").write_text('{"text": "short"}\n')
    words = ["train", "configs/tiny.yaml", f"data.source={tmp_path / 'x.jsonl'}", f"data.dir={tmp_path / 'data'}", "--nproc", "2"]
    done = commands.run(*words, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 3 and "too little text" in done.stderr and "1 x 64 + 1 = 65 tokens" in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert [path.name for path in (tmp_path / "run/logs").iterdir()] == ["rank-0.log"] and not (tmp_path / "run/metrics.jsonl").exists()


# ---------------------------------------------------------------- longer than a sequence, nothing to learn (F21)


def test_documents_longer_than_a_sequence_go_on_in_the_next(tmp_path: Path) -> None:
    """Nothing is dropped but the tokens after the last whole sequence; the count is told by `data build`."""
    documents = [[document * 100 + place for place in range(1, length + 1)] for document, length in enumerate((40, 7, 8, 3, 95), start=1)]
    store = store_of(tmp_path / "s", documents)
    assert store.longer_than(8) == 3 and store.longer_than(7) == 4 and store.longer_than(96) == 0
    batches = Batches(store, sequence=8, global_batch=1, seed=0, sequential=True)
    first = [batches.micro_batches(step, dp_rank=0, dp_size=1, micro=1)[0].tokens[0].tolist() for step in range(batches.num_batches)]
    seen = [token for row in first for token in row]
    assert seen == stream_of(store)[: len(seen)].tolist() and len(seen) == 8 * ((len(store) - 1) // 8)


@pytest.mark.parametrize("sequence", [2, 3, 5])
def test_every_row_of_shortest_documents_has_a_label(tmp_path: Path, sequence: int) -> None:
    """A document has one token at least, so the end tokens, whose labels are masked, never stand side by side."""
    store = store_of(tmp_path / "s", [[7]] * 40)
    batches = Batches(store, sequence=sequence, global_batch=1, seed=0, document_mask=True)
    assert {batches.targets(step) >= sequence // 2 for step in range(60)} == {True}


def test_a_step_without_a_label_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever gives such a step, the update is not made, and the samples are named."""
    _, _, trainer = build(config(tied=True), vars(layout_of("dp=1")), 0, "float32")
    monkeypatch.setattr(type(trainer.order), "targets", lambda order, step: 0)
    monkeypatch.setattr(trainer.engine, "step", lambda *_, **__: pytest.fail("an update"))
    monkeypatch.setattr(type(trainer.order), "sample_ids", lambda order, step: np.arange(step, step + 12), raising=False)
    with pytest.raises(DataError, match="without a single target token") as caught:
        trainer.step(3)
    assert caught.value.code == 3 and caught.value.where == "step 4" and caught.value.found == "samples 3, 4, 5, 6, 7, 8, 9, 10 and 4 more"


def test_a_step_without_a_label_is_refused_before_the_first(tmp_path: Path) -> None:
    """Documents of an end token alone, as token files may hold: where a whole step is made of them, the data alone tells it."""
    documents = [list(range(1, 9))] * 3 + [[]] * 50 + [[5, 6, 7]] * 3
    store = store_of(tmp_path / "s", documents)
    for sequence, batch, steps in [(4, 1, 40), (4, 2, 40), (4, 4, 60), (50, 1, 9), (3, 1, 5)]:
        for mask in (True, False):
            batches = Batches(store, sequence=sequence, global_batch=batch, seed=1, document_mask=mask)
            first = next((step for step in range(steps) if batches.targets(step) == 0), None)
            if first is None:
                batches.require_targets(steps)
                continue
            assert mask
            with pytest.raises(DataError) as caught:
                batches.require_targets(steps)
            assert caught.value.where == f"step {first + 1}" and f"--step {first}" in str(caught.value.next)
            batches.require_targets(first)
    batches = Batches(store, sequence=4, global_batch=1, seed=1, document_mask=True)
    assert any(batches.targets(step) == 0 for step in range(40))
