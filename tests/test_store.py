"""Token stores: the same bytes each time, nothing half-built, nothing damaged accepted; and what `prepare` makes of a config."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dist_llm.cli.data import app
from dist_llm.config.schema import DataConfig
from dist_llm.data import build as building
from dist_llm.data import sealed, shards
from dist_llm.data import store as storing
from dist_llm.data.build import build_store, encode
from dist_llm.data.corpora import Corpus, open_corpus
from dist_llm.data.entropy import entropy_rate
from dist_llm.data.prepare import prepare
from dist_llm.data.readers import Document
from dist_llm.data.store import StoreWriter, TokenStore
from dist_llm.data.tokenizer import bytes_tokenizer
from dist_llm.errors import DataError, SpaceError, UsageError

BYTES = bytes_tokenizer()


def corpus_of(texts: Sequence[str], name: str = "texts") -> Corpus:
    return Corpus(name, ("texts", *texts), lambda: (Document(text, f"text:{i}", i / len(texts)) for i, text in enumerate(texts)), 1000)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def words(number: int) -> str:
    return " ".join(hashlib.sha256(f"{number}/{turn}".encode()).hexdigest()[: 3 + turn % 5] for turn in range(5 + number % 40))


TEXTS = [words(number) for number in range(300)]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A store of several shards."""
    build_store(corpus_of(TEXTS), BYTES, tmp_path / "home", validation=0.1, shard_tokens=5000)
    return tmp_path / "home" / "train"


def test_the_tokens_are_the_documents(small: Path) -> None:
    store, other = TokenStore(small, tokenizer=BYTES.hash), TokenStore(small.parent / "validation")
    manifest = store.manifest
    assert len(manifest.shards) > 3 and manifest.dtype == "uint16" and manifest.documents + other.manifest.documents == len(TEXTS)
    texts = {
        name: [BYTES.decode(one.document(i)[:-1]) for i in range(one.manifest.documents)]
        for name, one in (("train", store), ("held", other))
    }
    assert sorted(texts["train"] + texts["held"]) == sorted(TEXTS)
    assert texts["train"] == [text for text in TEXTS if text in set(texts["train"])], "in the order of the corpus"
    assert 10 < other.manifest.documents < 60
    assert manifest.text_bytes == sum(len(text) for text in texts["train"]) == manifest.tokens - manifest.documents
    assert store.document_starts[-1] == len(store) and store.document(0)[-1] == store.manifest.end_id == 256


def test_reading_crosses_the_edges_of_shards(small: Path) -> None:
    store = TokenStore(small)
    whole = np.concatenate([np.fromfile(small / shard.file, "<u2") for shard in store.manifest.shards])
    assert len(whole) == len(store)
    for start, count in [(0, len(whole)), (4999, 2), (4990, 5020), (9999, 1), (10_000, 1), (len(whole) - 3, 3), (7, 0)]:
        out = np.empty(count, dtype=np.int64)
        store.read(start, out)
        assert np.array_equal(out, whole[start : start + count])
    with pytest.raises(AssertionError):
        store.read(len(whole) - 1, np.empty(2, dtype=np.int64))


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    config = {"source": "skills", "tokenizer": {"kind": "bpe", "vocab": 300}, "max_tokens": 20_000}
    for name in ("a", "b"):
        prepare(DataConfig(dir=str(tmp_path / name), **config), seed=3)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b") and len(snapshot(tmp_path / "a")) == 12
    prepare(DataConfig(dir=str(tmp_path / "c"), **config), seed=4)
    assert snapshot(tmp_path / "c") != snapshot(tmp_path / "a")


def test_the_split_goes_by_the_text_alone(tmp_path: Path) -> None:
    texts = TEXTS[:200]
    for name, order in (("a", texts), ("b", texts[::-1]), ("c", texts[50:] + ["another"])):
        build_store(corpus_of(order), BYTES, tmp_path / name, validation=0.2)
    held = {}
    for name in "abc":
        store = TokenStore(tmp_path / name / "validation")
        held[name] = {BYTES.decode(store.document(i)[:-1]) for i in range(store.manifest.documents)}
    assert held["a"] == held["b"] and held["c"] - {"another"} == held["a"] & set(texts[50:])


def test_small_corpora_still_hold_something_out(tmp_path: Path) -> None:
    assert build_store(corpus_of(TEXTS[:3]), BYTES, tmp_path / "three", validation=1e-9) == []
    assert TokenStore(tmp_path / "three" / "validation").manifest.documents == 1
    assert TokenStore(tmp_path / "three" / "train").manifest.documents == 2
    (note,) = build_store(corpus_of(TEXTS[:1]), BYTES, tmp_path / "one", validation=0.5)
    assert "nothing is held out" in note and not (tmp_path / "one" / "validation").exists()
    assert build_store(corpus_of(TEXTS[:1]), BYTES, tmp_path / "none", validation=0.0) == []
    assert TokenStore(tmp_path / "one" / "train").manifest == TokenStore(tmp_path / "none" / "train").manifest


@pytest.mark.parametrize("limit", [2, 3, 1000, 4096])
def test_max_tokens_is_exact(tmp_path: Path, limit: int) -> None:
    build_store(corpus_of(TEXTS), BYTES, tmp_path / "home", validation=0.0, max_tokens=limit)
    store = TokenStore(tmp_path / "home" / "train")
    assert len(store) in (limit, limit - 1) and store.document(store.manifest.documents - 1)[-1] == 256
    assert sum(len(one.ids) + 1 for batch in encode(open_corpus("entropy", seed=1), BYTES, max_tokens=limit) for one in batch) == limit


def test_a_document_may_be_an_end_token_alone(tmp_path: Path) -> None:
    """Token files of others hold such; text never gives one."""
    writer = StoreWriter(tmp_path / "x", vocab=9, end_id=8)
    writer.add([[], [1, 2], []], digests=b"", text_bytes=0)
    writer.close(split="train", source="x", tokenizer="t")
    store = TokenStore(tmp_path / "x")
    assert [store.document(number).tolist() for number in range(3)] == [[8], [1, 2, 8], [8]] and store.shortest == 1


def test_wide_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    for vocab, dtype in ((65_536, "uint16"), (65_537, "uint32")):
        writer = StoreWriter(tmp_path / dtype, vocab=vocab, end_id=0)
        writer.add([[vocab - 1, 1], [7]], digests=b"", text_bytes=3)
        writer.close(split="train", source="x", tokenizer="t")
        store = TokenStore(tmp_path / dtype)
        assert store.manifest.dtype == dtype and store.document(0).tolist() == [vocab - 1, 1, 0]
    for wrong in ([[257]], [[-1]], [[3, 256]]):
        with pytest.raises(AssertionError):
            StoreWriter(tmp_path / str(wrong), vocab=257, end_id=256).add(wrong, digests=b"", text_bytes=0)


# ---------------------------------------------------------------- damage (F18, F24)


def refused(folder: Path, file: str) -> DataError:
    shards._verified.clear()
    with pytest.raises(DataError) as caught:
        TokenStore(folder)
    assert caught.value.code == 3 and caught.value.where == str(folder / file)
    return caught.value


def test_every_byte_of_the_manifest_counts(small: Path) -> None:
    file = small / "manifest.json"
    sound = file.read_bytes()
    for place in range(len(sound)):
        for change in (0x01, 0x20, 0x80):
            file.write_bytes(sound[:place] + bytes([sound[place] ^ change]) + sound[place + 1 :])
            refused(small, "manifest.json")
    for broken in (b"", sound[:-1], sound + b"\n", b" " + sound, sound.replace(b",", b", ", 1), b"[]", b"null", b"[" * 100_000, b"\xff"):
        file.write_bytes(broken)
        refused(small, "manifest.json")
    file.unlink()
    assert "there is no token store" in refused(small, "manifest.json").what
    file.write_bytes(sound)
    TokenStore(small)


def test_a_flipped_byte_in_a_shard_or_the_index_is_refused(small: Path) -> None:
    files = [small / "documents.bin", *sorted(small.glob("tokens-*.bin"))]
    draw = random.Random(0)
    for _ in range(200):
        file = draw.choice(files)
        sound = file.read_bytes()
        place, bit = draw.randrange(len(sound)), 1 << draw.randrange(8)
        file.write_bytes(sound[:place] + bytes([sound[place] ^ bit]) + sound[place + 1 :])
        failure = refused(small, file.name)
        assert failure.expected and failure.found and failure.expected != failure.found and "data build" in str(failure.next)
        file.write_bytes(sound)
    TokenStore(small)


def test_cut_grown_missing_and_exchanged_files_are_refused(small: Path) -> None:
    first, second, index = small / "tokens-00000.bin", small / "tokens-00001.bin", small / "documents.bin"
    for file in (first, index):
        sound = file.read_bytes()
        for broken in (sound[:-1], sound + b"\0", b"", sound[:-2]):
            file.write_bytes(broken)
            assert f"{len(sound)} bytes" in str(refused(small, file.name).expected)
        file.unlink()
        assert refused(small, file.name).found == "no such file"
        file.write_bytes(sound)
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    refused(small, first.name)


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest with a right checksum and wrong content."""
    body = json.loads((folder / "manifest.json").read_bytes())
    del body["checksum"]
    change(body)
    (folder / "manifest.json").write_bytes(sealed.with_checksum(body))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(version=2),
        lambda body: body.update(dtype="float64"),
        lambda body: body.update(tokens=body["tokens"] + 1),
        lambda body: body.update(end_id=body["vocab"]),
        lambda body: body.update(documents=-1),
        lambda body: body.update(extra=1),
        lambda body: body.pop("vocab"),
        lambda body: body.update(shards=[]),
        lambda body: body["shards"][0].update(file="../../../etc/passwd"),
        lambda body: body["index"].update(file="/etc/passwd"),
        lambda body: body["shards"][0].update(entries="many"),
    ],
)
def test_a_forged_or_newer_manifest_is_refused(small: Path, change: Callable[[dict[str, Any]], object]) -> None:
    forge(small, change)
    refused(small, "manifest.json")


def test_each_file_is_hashed_once_a_process(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards._verified.clear()
    hashed: list[str] = []
    plain_hash = sealed.hash_file
    monkeypatch.setattr(sealed, "hash_file", lambda path: hashed.append(path.name) or plain_hash(path))
    files = 1 + len(TokenStore(small, verify=False).manifest.shards)
    assert hashed == ["documents.bin"], "the index always"
    for _ in range(3):
        TokenStore(small)
    assert len(hashed) == files
    os.utime(small / "tokens-00000.bin", ns=(1, 1))
    TokenStore(small)
    assert len(hashed) == files + 1, "a changed file is hashed again"


def test_a_shard_of_a_large_store_is_hashed_when_it_is_first_read(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards._verified.clear()
    monkeypatch.setattr(storing, "VERIFIED_ON_OPEN", 10)
    for number in (0, 2):
        file = small / f"tokens-{number:05d}.bin"
        content = file.read_bytes()
        file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(DataError, match="damaged"):
        TokenStore(small, verify=True)
    store, out = TokenStore(small), np.full(20, -7, dtype=np.int64)
    hashed: list[str] = []
    plain_hash = sealed.hash_file
    monkeypatch.setattr(sealed, "hash_file", lambda path: hashed.append(path.name) or plain_hash(path))
    store.read(5000, out)
    store.read(9980, out)
    assert hashed == ["tokens-00001.bin"] and out.min() >= 0
    for start, name in ((9990, "tokens-00002.bin"), (4999, "tokens-00000.bin"), (14_000, "tokens-00002.bin")):
        for _ in range(2):
            out[:] = -7
            with pytest.raises(DataError) as caught:
                store.read(start, out)
            assert caught.value.where == str(small / name) and (out[-5:] == -7).all(), "no token of it was given out"
            with pytest.raises(DataError):
                store.verify()


def test_another_tokenizer_is_refused(small: Path) -> None:
    with pytest.raises(UsageError, match="another tokenizer") as caught:
        TokenStore(small, tokenizer="0" * 64)
    assert caught.value.code == 2


# ---------------------------------------------------------------- building is all or nothing (F7: test_data_build.py; F13)


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"".join(b'{"text": "good %d"}\n' % number for number in range(50)) + b"bad\n")
    config = DataConfig(source=str(tmp_path / "x.jsonl"), dir=str(tmp_path / "data"), tokenizer={"kind": "bytes"})
    with pytest.raises(DataError, match="1 line cannot be read"):
        prepare(config, seed=0)
    assert [path.name for path in (tmp_path / "data").iterdir()] == []
    prepared = prepare(config, seed=0, max_bad_lines=1)
    assert prepared.notes[0] == "1 bad lines were skipped" and f"{tmp_path}/x.jsonl:51" in prepared.notes[1]
    assert prepared.built


def test_what_was_built_with_bad_lines_skipped_is_found_again_and_said(tmp_path: Path) -> None:
    """By a run that allows none, too: its owner has seen the list. Which lines they were is kept beside the tokens."""
    for name, bad in (("x", b"bad\n" * 2), ("y", b"")):
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(b'{"text": "good %d"}\n' % number for number in range(50)) + bad)
    mix = [{"source": str(tmp_path / f"{name}.jsonl")} for name in "xy"]
    config = DataConfig(mix=mix, dir=str(tmp_path / "data"), tokenizer={"kind": "bpe", "vocab": 260}, max_bad_lines=2)
    first, again = prepare(config, seed=0), prepare(config.model_copy(update={"max_bad_lines": 0}), seed=0)
    assert first.built and not again.built and again.fingerprint == first.fingerprint
    (note,) = again.notes
    assert note.startswith("2 bad lines of x were skipped when it was built: ")
    assert json.loads(Path(note.split(": ")[1]).read_text()) == [f"{tmp_path}/x.jsonl:{number}" for number in (51, 52)]


def test_no_room_on_the_disk(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(TEXTS)[:10_000])
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
        try:
            prepare(DataConfig(source=str(file), dir=str(tmp_path / "data"), tokenizer={"kind": "bytes"}), seed=0)
        except SpaceError as failure:
            os._exit(failure.code)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert [path.name for path in (tmp_path / "data").iterdir()] == []


def test_two_at_once_make_one(tmp_path: Path) -> None:
    config = DataConfig(source="entropy", dir=str(tmp_path), tokenizer={"kind": "bytes"}, max_tokens=3000)
    corpus, children = open_corpus("entropy", seed=0), []
    batches = list(encode(corpus, BYTES, max_tokens=3000))
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            building.encode = lambda *_, **__: iter(batches)
            os._exit(10 + prepare(config, seed=0).built)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [10, 10, 10, 11]


# ---------------------------------------------------------------- prepare


def test_prepare_builds_once_and_again_when_something_changed(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"".join(json.dumps({"text": text, "other": "o" + text}).encode() + b"\n" for text in TEXTS))
    told: list[tuple[str, float]] = []

    def run(at: int = 0, /, **changes: Any) -> Any:
        told.clear()
        return prepare(
            DataConfig(**{"source": str(file), "dir": str(tmp_path / "data"), **changes}),
            seed=at,
            progress=lambda *both: told.append(both),
        )

    first = run(tokenizer={"vocab": 300})
    assert first.built and first.tokenizer.vocab_size == 300 and first.weights == (1,) and first.entropy_rate is None
    assert told[0][1] == 0.0 and told[-1][1] == 1.0 and [fraction for _, fraction in told] == sorted(fraction for _, fraction in told)
    again = run(tokenizer={"vocab": 300}, sequence=64, document_mask=True, seed=9)
    assert not again.built and not told and again.fingerprint == first.fingerprint
    for changes in ({"text_key": "other"}, {"validation": 0.3}, {"max_tokens": 500}, {"tokenizer": {"kind": "bytes"}}):
        other = run(**{"tokenizer": {"vocab": 300}, **changes})
        assert other.built and other.fingerprint != first.fingerprint, changes
    file.write_bytes(file.read_bytes() + b'{"text": "one more"}\n')
    assert run(tokenizer={"vocab": 300}).built
    generated: dict[str, Any] = {"source": "skills", "tokenizer": {"kind": "bytes"}, "max_tokens": 900}
    seeds = {run(seed, **generated).fingerprint for seed in (1, 2)}
    assert len(seeds) == 2 and run(5, **{**generated, "seed": 1}).fingerprint in seeds


def test_a_mixture_has_a_store_for_each_source(tmp_path: Path) -> None:
    mix = [{"source": "skills", "weight": 0.75}, {"source": "entropy", "weight": 0.25}]
    prepared = prepare(DataConfig(mix=mix, dir=str(tmp_path), tokenizer={"vocab": 300}, max_tokens=20_000, validation=0.1), seed=1)
    assert prepared.weights == (3, 1) == prepared.validation_weights
    sizes = [len(one) + len(other) for one, other in zip(prepared.train, prepared.validation, strict=True)]
    assert sizes == [15_000, 5_000] and [store.manifest.source for store in prepared.train] == ["skills", "entropy"]


def test_the_rate_is_known_for_entropy_in_bytes(tmp_path: Path) -> None:
    config = {"source": "entropy", "dir": str(tmp_path), "max_tokens": 5000}
    assert prepare(DataConfig(tokenizer={"kind": "bytes"}, **config), seed=4).entropy_rate == entropy_rate(4)
    assert prepare(DataConfig(tokenizer={"kind": "bpe", "vocab": 300}, **config), seed=4).entropy_rate is None


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n', b'{"text": "  "}\n'])
def test_empty_data(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="no text") as caught:
        prepare(DataConfig(source=str(tmp_path / "x.jsonl"), dir=str(tmp_path / "data"), tokenizer={"kind": kind}), seed=0)
    assert [path.name for path in (tmp_path / "data").iterdir()] == []
    assert caught.value.code == 3 and str(tmp_path / "x.jsonl") in str(caught.value.where) and caught.value.next


def test_lines_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n\n{"text": " "}\n{"text": "two"}\n \n')
    config = DataConfig(source=str(tmp_path / "x.jsonl"), dir=str(tmp_path / "data"), tokenizer={"vocab": 260}, validation=0.0)
    prepared = prepare(config, seed=0)
    assert prepared.train[0].manifest.documents == 2 and "3 lines without text were left out" in prepared.notes


def test_tokenizers_that_do_not_fit_are_usage_errors(tmp_path: Path) -> None:
    def run(tokenizer: dict[str, Any]) -> Any:
        return prepare(DataConfig(source="skills", dir=str(tmp_path / "data"), tokenizer=tokenizer, max_tokens=500), seed=0)

    BYTES.save(tmp_path / "tok")
    prepared = run({"kind": "file", "path": str(tmp_path / "tok")})
    assert prepared.tokenizer.hash == BYTES.hash
    for tokenizer in ({"kind": "file"}, {"kind": "bytes", "vocab": 300}, {"kind": "file", "path": str(tmp_path / "none")}):
        with pytest.raises(UsageError):
            run(tokenizer)
    prepared.require_vocab(257)
    with pytest.raises(UsageError, match="vocabulary is smaller"):
        prepared.require_vocab(256)


def test_damaged_data_is_told_and_not_built_anew(tmp_path: Path) -> None:
    config = DataConfig(source="skills", dir=str(tmp_path), tokenizer={"kind": "bytes"}, max_tokens=500)
    shard = prepare(config, seed=0).train[0].folder / "tokens-00000.bin"
    shard.write_bytes(bytes([shard.read_bytes()[0] ^ 1]) + shard.read_bytes()[1:])
    with pytest.raises(DataError, match="damaged") as caught:
        prepare(config, seed=0)
    assert caught.value.where == str(shard)
    shutil.rmtree(str(caught.value.next).split()[1].rstrip(","))
    assert prepare(config, seed=0).built, "the advice works"


def test_the_commands(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {{family: llama, layers: 1, dim: 16, heads: 2}}\nbatch: {{global: 4, micro: 2}}\n"
        f"data: {{source: skills, dir: {tmp_path}/data, tokenizer: {{kind: bytes}}, max_tokens: 3000, sequence: 64, document_mask: true}}\n"
    )
    run = CliRunner()
    built = run.invoke(app, ["build", str(config), "--json"])
    assert built.exit_code == 0, built.output
    stores = json.loads(built.stdout)["stores"]
    assert sum(store["tokens"] for store in stores) == 3000 and json.loads(built.stdout)["built"]
    assert "found again" in run.invoke(app, ["build", str(config)]).stdout
    shown = json.loads(run.invoke(app, ["preview", str(config), "data.sequence=32", "--json", "--tokens", "40", "--rows", "3"]).stdout)
    assert shown["sequence"] == 32 and len(shown["rows"]) == 3
    for row in shown["rows"]:
        assert {len(row[key]) for key in ("tokens", "pieces", "labels", "documents", "positions")} == {32}
        for place, token in enumerate(row["tokens"][:-1]):
            assert row["labels"][place] == (-100 if token == 256 else row["tokens"][place + 1])
    text = run.invoke(app, ["preview", str(config), "--tokens", "16"]).stdout
    assert text.startswith("step 0: 4 sequences of 64 tokens") and "|" in text and "labels ignored at" in text
    assert isinstance(run.invoke(app, ["build", str(config), "data.source=nowhere.txt"]).exception, UsageError)
