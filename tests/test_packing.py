"""Packing: best fit as a plain search finds it, packed loss equal to unpacked loss, and the gradients of transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.layout import Layout
from dist_llm.config.schema import Config
from dist_llm.data.batches import IGNORED, MicroBatch
from dist_llm.data.packing import PackedBatches, fit, pack
from dist_llm.data.store import StoreWriter, TokenStore
from dist_llm.engines.whole import Whole
from dist_llm.errors import DataError
from dist_llm.model.transformer import make_context
from dist_llm.train.setup import make_engine, make_mesh
from dist_llm.train.trainer import Trainer
from tests.oracles import CPU, WIDE, collected, norms_in_float64, our_names, theirs_of, worst
from tests.ranks import Ranks

VOCAB, END = 61, 0
Chat = tuple[list[int], list[float]]


def chats(count: int, *, seed: int, longest: int = 22, weights: tuple[float, ...] = (0.0, 0.25, 1.0, 2.0)) -> list[Chat]:
    """Conversations of random tokens, the end token among them, with weights by turns; each has a trained token."""
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        ids = [dice.randrange(VOCAB) for _ in range(dice.randint(2, longest))]
        counts = [0.0] + [dice.choice(weights) for _ in ids[1:]]
        counts[-1] = counts[-1] or 1.0
        found.append((ids, counts))
    return found


def store_of(folder: Path, some: list[Chat], *, shard_tokens: int = 50) -> TokenStore:
    """A store of conversations in several small shards."""
    writer = StoreWriter(folder, vocab=VOCAB, end_id=END, shard_tokens=shard_tokens, weighted=True)
    for ids, weights in some:
        writer.add([ids], digests=bytes(16), text_bytes=len(ids), weights=[weights])
    writer.close(split="train", source="made up", tokenizer="none")
    return TokenStore(folder)


def test_the_first_held_out_batches_speak_for_all(tmp_path: Path) -> None:
    """Best fit puts the longest first; a validation on the first batches once measured those alone."""
    some = chats(600, seed=5, longest=40)
    order = PackedBatches(store_of(tmp_path / "s", some), sequence=64, global_batch=8, seed=0, sequential=True)
    every = sorted(int(number) for step in range(order.num_batches) for number in order.sample_ids(step) if number >= 0)
    assert every == list(range(order.num_samples)) and order.num_batches > 12, "each sequence once"
    lengths = [len(ids) for step in range(3) for _, ids, _ in order.conversations(step)]
    assert abs(np.mean(lengths) / np.mean([len(ids) for ids, _ in some]) - 1) < 0.15, np.mean(lengths)
    again = PackedBatches(TokenStore(tmp_path / "s"), sequence=64, global_batch=4, seed=9, sequential=True)
    assert torch.equal(torch.cat([again.sample_ids(0), again.sample_ids(1)]), order.sample_ids(0)), "whatever the batch and the seed"


def slow_fit(sizes: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing by trying every bin."""
    bins: list[list[int]] = []
    changed: list[int] = []  # when a bin last changed
    for moment, item in enumerate(sorted(range(len(sizes)), key=lambda item: (-sizes[item], item))):
        left = [room - sum(sizes[one] for one in each) for each in bins]
        able = [at for at in range(len(bins)) if left[at] >= sizes[item]]
        if able:
            best = min(able, key=lambda at: (left[at], -changed[at]))
            bins[best].append(item)
            changed[best] = moment
        else:
            bins.append([item])
            changed.append(moment)
    return bins


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=60))))
def test_best_fit_is_what_a_plain_search_finds(case: tuple[int, list[int]]) -> None:
    room, sizes = case
    bins = fit(np.array(sizes, dtype=np.int64), room=room)
    assert bins == slow_fit(sizes, room)
    assert sorted(item for each in bins for item in each) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in each) <= room for each in bins)


def test_best_fit_of_many_is_quick_and_tight() -> None:
    sizes = np.random.default_rng(1).integers(1, 4096, 100_000)
    bins = fit(sizes, room=4096)
    assert sizes.sum() / (len(bins) * 4096) > 0.99


@pytest.mark.parametrize("best_fit", [True, False])
def test_rows_are_whole_conversations(tmp_path: Path, best_fit: bool) -> None:
    """Every conversation once an epoch, its labels its own next tokens, positions from 0, padding apart; targets from the index alone."""
    some = chats(60, seed=1)
    batches = PackedBatches(store_of(tmp_path / "s", some), sequence=24, global_batch=4, seed=3, best_fit=best_fit, sequential=True)
    seen: list[Chat] = []
    for step in range(batches.num_batches):
        (batch,) = batches.micro_batches(step, dp_rank=0, dp_size=1, micro=4)
        assert batch.weights is not None and batches.targets(step) == batch.targets
        assert batches.weight(step) == pytest.approx(batch.weight, rel=1e-15)
        assert ((batch.labels >= 0) == (batch.weights > 0)).all()
        for tokens, labels, positions, documents, weights in zip(
            *(part.tolist() for part in (batch.tokens, batch.labels, batch.positions, batch.documents, batch.weights)), strict=True
        ):
            starts = [at for at in range(24) if at == 0 or documents[at] != documents[at - 1]]
            for start, stop in zip(starts, [*starts[1:], 24], strict=True):
                assert positions[start:stop] == list(range(stop - start))
                if any(label != IGNORED for label in labels[start:stop]):
                    ids = [*tokens[start:stop], 0]
                    seen.append((ids[:-1], weights[start:stop]))
                    assert all(label in (IGNORED, after) for label, after in zip(labels[start : stop - 1], ids[1:-1], strict=True))
                else:
                    assert stop == 24 and set(tokens[start:stop]) == {END}, "padding comes last"
    assert sorted(seen) == sorted((ids[:-1], weights[1:]) for ids, weights in some)
    assert batches.num_samples == (len(fit(np.array([len(ids) - 1 for ids, _ in some]), room=24)) if best_fit else 60)
    rows = batches.conversations(0)
    assert all((ids, weights) in some for _, ids, weights in rows) and {row for row, _, _ in rows} == {0, 1, 2, 3}


def test_the_order_is_the_same_for_every_world(tmp_path: Path) -> None:
    """Sizes 1, 2 and 4 see the same rows; epochs differ; the seed decides."""
    store = store_of(tmp_path / "s", chats(50, seed=2))
    batches = PackedBatches(store, sequence=24, global_batch=4, seed=5)
    for step in range(8):
        (whole,) = batches.micro_batches(step, dp_rank=0, dp_size=1, micro=4)
        for size in (2, 4):
            parts = [one for rank in range(size) for one in batches.micro_batches(step, dp_rank=rank, dp_size=size, micro=1)]
            for name in ("tokens", "labels", "positions", "documents", "rows", "weights"):
                assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
            assert sum(part.weight for part in parts) == pytest.approx(batches.weight(step), rel=1e-15)
    again = PackedBatches(TokenStore(tmp_path / "s"), sequence=24, global_batch=4, seed=5)
    assert all(torch.equal(batches.sample_ids(step), again.sample_ids(step)) for step in range(20))
    other = PackedBatches(store, sequence=24, global_batch=4, seed=6)
    assert any(not torch.equal(batches.sample_ids(step), other.sample_ids(step)) for step in range(4))


def test_plain_weights_need_no_tensor(tmp_path: Path) -> None:
    """Where every label counts 1 there are none; 0.5 and 1.5, whose sum is their number, are not that."""
    plain = PackedBatches(store_of(tmp_path / "a", chats(20, seed=3, weights=(0.0, 1.0))), sequence=24, global_batch=2, seed=0)
    (batch,) = plain.micro_batches(0, dp_rank=0, dp_size=1, micro=2)
    assert batch.weights is None and plain.weight(0) == plain.targets(0) == batch.targets == batch.weight
    uneven = PackedBatches(store_of(tmp_path / "b", [([1, 2, 3], [0.0, 0.5, 1.5])] * 4), sequence=24, global_batch=1, seed=0)
    (batch,) = uneven.micro_batches(0, dp_rank=0, dp_size=1, micro=1)
    assert batch.weights is not None and uneven.weight(0) == uneven.targets(0) == 8


def test_too_long(tmp_path: Path) -> None:
    """Refused with the number and the sequence that would do; dropped or cut with counts; what is left without a target is dropped."""
    some = [*chats(10, seed=4, longest=9), ([1] * 14, [0.0] * 13 + [1.0]), ([2] * 12, [0.0] + [1.0] * 11), ([3] * 11, [0.0] + [1.0] * 10)]
    store = store_of(tmp_path / "s", some)
    with pytest.raises(DataError, match="2 of 13 conversations are longer than a sequence") as failure:
        pack(store, sequence=10, best_fit=True, too_long="refuse")
    assert "data.sequence=13" in str(failure.value.next) and "14 tokens" in str(failure.value.found)
    assert len(pack(store, sequence=13, best_fit=True, too_long="refuse").order) == 13
    dropped, cut = (pack(store, sequence=10, best_fit=True, too_long=how) for how in ("drop", "truncate"))  # type: ignore[arg-type]
    assert (dropped.too_long, len(dropped.order), dropped.emptied) == (2, 11, 0) and (cut.too_long, len(cut.order), cut.emptied) == (
        2,
        12,
        1,
    )
    assert cut.places[11] == 10 and cut.sums[11].tolist() == [10.0, 10.0] and cut.places[10] == 0
    batches = PackedBatches(store, sequence=10, global_batch=2, seed=0, too_long="truncate")
    found = batches.statistics()
    assert (found["too_long"], found["left_out"], found["emptied"], found["longest"], found["samples"]) == (2, 1, 1, 14, 12)
    for step in range(batches.num_batches):
        (batch,) = batches.micro_batches(step, dp_rank=0, dp_size=1, micro=2)
        assert batch.weight == pytest.approx(batches.weight(step), rel=1e-15) and batch.targets == batches.targets(step) > 0
    assert found["cut"] == 1 and "1 were cut before the end of what is trained" in batches.sentence()
    with pytest.raises(DataError, match="too few conversations"):
        PackedBatches(store, sequence=100, global_batch=5, seed=0)
    with pytest.raises(DataError, match="no conversation of a source fits"):
        PackedBatches(store_of(tmp_path / "long", [([1] * 30, [0.0] + [1.0] * 29)]), sequence=10, global_batch=1, seed=0, too_long="drop")


def test_an_end_is_kept_somewhere(tmp_path: Path) -> None:
    """Where every answer is cut before its end the model would never stop: refused, but for one that keeps an end of a turn."""
    long = ([1, *[5] * 19, 9], [0.0] + [1.0] * 20)
    rounds = ([1, 5, 9, 1, *[5] * 16, 9], [0.0, 1.0, 1.0, 0.0] + [1.0] * 17)  # the end of its first answer is kept
    how: dict[str, Any] = {"sequence": 10, "global_batch": 1, "seed": 0, "too_long": "truncate", "ends": (9,)}
    with pytest.raises(DataError, match="all conversations are cut before an answer ends") as failure:
        PackedBatches(store_of(tmp_path / "a", [long, long]), **how)
    assert "data.sequence=20" in str(failure.value.next) and failure.value.found == "2 conversations of 21 to 21 tokens"
    read = ([1, 9, *[5] * 18, 9], [0.0, 0.0] + [1.0] * 19)  # an end that is not trained is none
    with pytest.raises(DataError, match="before an answer ends"):
        PackedBatches(store_of(tmp_path / "b", [long, read]), **how)
    for name, more in (("c", rounds), ("d", ([1, 5, 9], [0.0, 1.0, 1.0]))):
        assert PackedBatches(store_of(tmp_path / name, [long, more]), **how).statistics()["cut"] == (2 if name == "c" else 1)
    assert PackedBatches([TokenStore(tmp_path / name) for name in "ac"], **how).statistics()["cut"] == 4
    PackedBatches(TokenStore(tmp_path / "a"), **{**how, "too_long": "truncate", "sequence": 20})


# --- packed = unpacked -----------------------------------------------------------------------------------------------------

LLAMA = {"family": "llama", "layers": 3, "dim": 24, "heads": 6, "kv_heads": 2, "ffn": 37, "vocab": VOCAB, "rope_theta": 5000.0}
GPT2 = {"family": "gpt2", "layers": 2, "dim": 20, "heads": 5, "ffn": 50, "vocab": VOCAB, "max_positions": 64}


def config_of(model: dict[str, Any], *, sequence: int, batch: int, packing: str = "best_fit") -> Config:
    data = {"source": "skills", "chat": {"format": "messages"}, "sequence": sequence, "packing": packing, "tokenizer": {"vocab": None}}
    return Config.model_validate({"model": model, "data": data, "batch": {"global": batch, "micro": 1}, "optimizer": {"clip": 0.0}})


def loss_and_gradients(model: Whole, config: Config, batches: list[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss and its gradients, of the plain module."""
    masked, total = config.data.document_mask, 0.0
    for parameter in model.by_name.values():
        parameter.grad = None
    for batch in batches:
        context = make_context(
            config.model, batch.tokens, batch.labels, dtype=WIDE, weights=batch.weights,
            documents=batch.documents if masked else None, positions=batch.positions if config.data.reset_positions else None,
        )  # fmt: skip
        loss = model(context)
        loss.backward()
        total += float(loss)
    return total, {name: parameter.grad.clone() for name, parameter in model.by_name.items() if parameter.grad is not None}


@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_packed_loss_is_unpacked_loss(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Several conversations in a sequence, one a sequence, and each alone without padding: the same sums in float64."""
    torch.set_num_threads(1)
    some = chats(30, seed=7)
    store, found = store_of(tmp_path / "s", some), []
    model = Whole(config_of(shape, sequence=48, batch=1).model, dtype=WIDE, device=CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.by_name.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=WIDE))
    for packing, sequence in (("best_fit", 48), ("best_fit", 31), ("none", 24), ("alone", 0)):
        if packing == "alone":
            config = config_of(shape, sequence=24, batch=1, packing="none")
            parts = [MicroBatch(*(torch.tensor([part]) for part in (
                ids[:-1], [token if weight else IGNORED for token, weight in zip(ids[1:], weights[1:], strict=True)],
                list(range(len(ids) - 1)), [0] * (len(ids) - 1))), torch.tensor([0]), torch.tensor([weights[1:]], dtype=WIDE))
                for ids, weights in some]  # fmt: skip
        else:
            config = config_of(shape, sequence=sequence, batch=1, packing=packing)
            batches = PackedBatches(store, sequence=sequence, global_batch=1, seed=0, best_fit=packing == "best_fit", sequential=True)
            parts = [part for step in range(batches.num_batches) for part in batches.micro_batches(step, dp_rank=0, dp_size=1, micro=1)]
            assert sum(batches.weight(step) for step in range(batches.num_batches)) == pytest.approx(
                sum(sum(weights) for _, weights in some), rel=1e-14
            )
        found.append(loss_and_gradients(model, config, parts))
    (reference, slopes), *others = found[::-1]
    for loss, gradients in others:
        assert abs(loss / reference - 1) < 1e-12, (loss, reference)
        assert worst(gradients, slopes)[0] < 1e-12


def test_nothing_leaks_between_conversations(tmp_path: Path) -> None:
    """Other tokens in one conversation of a sequence leave the losses of the others as they are, to the bit; the padding too."""
    torch.set_num_threads(1)
    some = chats(6, seed=9, longest=7)
    config = config_of(LLAMA, sequence=40, batch=1)
    batches = PackedBatches(store_of(tmp_path / "s", some), sequence=40, global_batch=1, seed=0, sequential=True)
    (batch,) = batches.micro_batches(0, dp_rank=0, dp_size=1, micro=1)
    model = Whole(config.model, dtype=WIDE, device=CPU)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        context = make_context(config.model, tokens, batch.labels, dtype=WIDE, documents=batch.documents, positions=batch.positions)
        return model.logits(context)[0]

    before = logits(batch.tokens)
    for document in range(int(batch.documents.max()) + 1):
        there = batch.documents[0] == document
        after = logits(torch.where(there, (batch.tokens + 7) % VOCAB, batch.tokens))
        assert torch.equal(after[~there], before[~there]) and not torch.equal(after[there], before[there])


@pytest.mark.usefixtures("with_transformers")
def test_sft_is_that_of_transformers(ranks: Ranks, tmp_path: Path) -> None:
    """Loss and every gradient of a step, packed and through the engine, against transformers on each conversation alone."""
    store_of(tmp_path / "s", chats(40, seed=11, weights=(0.0, 0.0, 1.0)))
    (found,) = ranks.run(1, "tests.test_packing:against_transformers", str(tmp_path / "s"))
    assert found["loss"] < 1e-9 and found["gradient"] < 1e-9 and found["conversations"] > 6, found


def against_transformers(rank: int, world: int, say: Any, folder: str) -> dict[str, float]:
    """Labels are -100 where nothing is trained; the sum is divided once."""
    torch.set_num_threads(1)
    config = config_of(LLAMA, sequence=48, batch=4)
    with norms_in_float64():
        theirs = theirs_of(config.model)
        weights = our_names({name: one.data for name, one in theirs.named_parameters(remove_duplicate=False)}, config.model)
        order = PackedBatches(TokenStore(folder), sequence=48, global_batch=4, seed=1)
        some, total = order.conversations(2), torch.zeros((), dtype=WIDE)
        for _, ids, counts in some:
            labels = torch.tensor([token if count else IGNORED for token, count in zip(ids, counts, strict=True)])
            logits = theirs(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum")
        count = sum(weight > 0 for _, _, counts in some for weight in counts)
        (total / count).backward()
        gradients = our_names({name: one.grad for name, one in theirs.named_parameters(remove_duplicate=False)}, config.model)
    engine = make_engine(config, make_mesh(config, Layout(), 0), device=CPU, dtype=WIDE)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    engine.load_state(lambda kind, name, box, a, b: (weights if kind == "weight" else zeros)[name].reshape(-1)[a:b], count=0)
    taken = Trainer(config, engine.mesh, engine, order).gradients(2)
    assert taken.targets == count
    flat = {name: tensor.flatten() for name, tensor in gradients.items()}
    return {
        "loss": abs(taken.loss / float(total.detach() / count) - 1),
        "gradient": worst(collected(engine, "gradient"), flat)[0],
        "conversations": float(len(some)),
    }
