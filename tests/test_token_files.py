"""Token files of other trainers: read as another reader reads them, refused where it refuses, and written back to the bit.

The oracle below reads whole files with `struct`, one number at a time, from the published descriptions of the formats; it shares no
line with the product. (Megatron's own IndexedDataset, megatron-core 0.16.1, was compared once: docs/foreign-data.md.)
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_llm.config.schema import DataConfig
from dist_llm.data import megatron, token_files, token_stream
from dist_llm.data.prepare import Prepared, prepare
from dist_llm.data.store import TokenStore
from dist_llm.data.token_files import TokenFiles
from dist_llm.data.tokenizer import Tokenizer, bytes_tokenizer, ids_tokenizer
from dist_llm.errors import DataError, UsageError, render
from tests.commands import Commands

VOCAB, END = 1000, 999
IDS = ids_tokenizer(VOCAB, end=END)
WIDTHS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


# --- the oracle --------------------------------------------------------------------------------------------------------------


class RefusedError(Exception):
    """The oracle does not take the file."""


def need(holds: Any) -> None:
    if not holds:
        raise RefusedError


def oracle_megatron(index: bytes, data: bytes, vocab: int = VOCAB) -> list[list[int]]:
    """The documents of a Megatron data set, end tokens and all."""
    need(len(index) >= 34 and index[:9] == b"MMIDIDX\0\0")
    version, code, sequences, entries = struct.unpack_from("<QBQQ", index, 9)
    need(version == 1 and code in WIDTHS and entries >= 1)
    need(len(index) - 34 in (12 * sequences + 8 * entries, 13 * sequences + 8 * entries))
    lengths = struct.unpack_from(f"<{sequences}i", index, 34)
    places = struct.unpack_from(f"<{sequences}q", index, 34 + 4 * sequences)
    edges = struct.unpack_from(f"<{entries}q", index, 34 + 12 * sequences)
    need(not any(index[34 + 12 * sequences + 8 * entries :]))
    kind, place, parts = WIDTHS[code], 0, []
    for length, start in zip(lengths, places, strict=True):
        need(length >= 0 and start == place)
        place = start + length * struct.calcsize(kind)
        need(place <= len(data))
        parts.append(list(struct.unpack_from(f"<{length}{kind}", data, start)))
    need(place == len(data) and all(0 <= token < vocab for part in parts for token in part))
    need(edges[0] == 0 and edges[-1] == sequences and all(a <= b for a, b in zip(edges, edges[1:], strict=False)))
    return [[token for part in parts[a:b] for token in part] for a, b in zip(edges, edges[1:], strict=False)]


def oracle_stream(content: bytes, vocab: int = VOCAB) -> tuple[bool, list[int]]:
    """Whether there is a head, and the ids of a file that is one line of them."""
    words = struct.unpack(f"<{len(content) // 4}i", content[: len(content) // 4 * 4])
    known = {20240520: (1, "H"), 20240801: (7, "I")}
    if words and words[0] in known:
        version, kind = known[words[0]]
        need(len(words) >= 256 and words[1] == version and not any(words[3:256]))
        need(words[2] >= 0 and len(content) == 1024 + words[2] * struct.calcsize(kind))
        ids = struct.unpack(f"<{words[2]}{kind}", content[1024:])
    else:
        need(len(words) < 256 or any(words[3:256]) or not any(words[:3]))
        halves = struct.unpack(f"<{len(content[:65536]) // 4 * 2}H", content[: len(content[:65536]) // 4 * 4])
        kind = "I" if vocab > 65536 or (not any(halves[1::2]) and any(halves[::2])) else "H"
        need(len(content) % struct.calcsize(kind) == 0)
        ids = struct.unpack(f"<{len(content) // struct.calcsize(kind)}{kind}", content)
    need(all(token < vocab for token in ids))
    return bool(words) and words[0] in known, list(ids)


def split_at_ends(ids: list[int], end: int = END) -> list[list[int]]:
    """Documents without their ends; what follows the last end is one too, if there is anything."""
    found: list[list[int]] = [[]]
    for token in ids:
        if token == end:
            found.append([])
        else:
            found[-1].append(token)
    return found if found[-1] else found[:-1]


# --- writing by hand ---------------------------------------------------------------------------------------------------------


def megatron_bytes(documents: list[list[list[int]]], *, code: int = 8, modes: bytes = b"") -> tuple[bytes, bytes]:
    """Index and ids of documents, each a list of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    kind = WIDTHS[code]
    places = [sum(map(len, sequences[:n])) * struct.calcsize(kind) for n in range(len(sequences))]
    edges = [sum(map(len, documents[:n])) for n in range(len(documents) + 1)]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(edges))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(places)}q", *places)
    return index + struct.pack(f"<{len(edges)}q", *edges) + modes, b"".join(struct.pack(f"<{len(one)}{kind}", *one) for one in sequences)


def headed(ids: list[int], *, magic: int = 20240520, version: int = 1, kind: str = "H") -> bytes:
    return struct.pack("<256i", magic, version, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}{kind}", *ids)


def drawn(seed: int, count: int = 40, vocab: int = VOCAB, end: int = END) -> list[list[int]]:
    """Documents without their ends."""
    chance = random.Random(seed)
    return [[chance.randrange(vocab - 1) if end == vocab - 1 else chance.randrange(1, vocab) for _ in range(chance.randrange(60))]
            for _ in range(count)]  # fmt: skip


def put(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


def texts_of(files: TokenFiles, tokenizer: Tokenizer = IDS) -> list[list[int]]:
    return [document.ids.tolist() for document in files.documents(tokenizer) if document.ids is not None]


def stored(store: TokenStore) -> list[list[int]]:
    return [store.document(number).tolist() for number in range(store.manifest.documents)]


def build(source: object, folder: Path, *, validation: float = 0.0, vocab: int = VOCAB, end: int = END, **more: Any) -> Prepared:
    tokenizer = {"kind": "ids", "vocab": vocab, "end": end}
    source = [str(one) for one in source] if isinstance(source, list) else str(source)
    return prepare(DataConfig(source=source, dir=str(folder / "data"), tokenizer=tokenizer, validation=validation, **more), seed=0)


# --- reading -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(WIDTHS))
def test_megatron_is_read_as_the_oracle_reads_it(tmp_path: Path, code: int) -> None:
    vocab, end = (100, 99) if code in (1, 2) else (VOCAB, END)
    whole = [[*one, end] for one in drawn(1, vocab=vocab, end=end)]
    index, data = megatron_bytes([[one[:3], one[3:]] if len(one) > 5 else [one] for one in whole], code=code)
    put(tmp_path, x_idx=index, x_bin=data)
    assert oracle_megatron(index, data, vocab) == whole
    for source in ("x.idx", "x.bin", "x.*"):
        prepared = build(tmp_path / source, tmp_path, vocab=vocab, end=end)
        assert stored(prepared.train[0]) == whole and not prepared.notes
    prepared = build(tmp_path / "x.idx", tmp_path, vocab=vocab, end=end, validation=0.2)
    held = stored(prepared.validation[0])
    assert sorted(held + stored(prepared.train[0])) == sorted(whole) and 1 <= len(held) < 20


def test_documents_of_megatron_that_do_not_end_as_a_store_needs(tmp_path: Path) -> None:
    documents = [[[1, 2, END]], [[3, 4]], [[5, END, 6], [END]], [], [[]], [[END]], [[7, END, 8]]]
    index, data = megatron_bytes(documents, modes=bytes(7))
    put(tmp_path, x_idx=index, x_bin=data)
    assert oracle_megatron(index, data) == [[token for part in one for token in part] for one in documents]
    prepared = build(tmp_path / "x.idx", tmp_path)
    assert stored(prepared.train[0]) == [[1, 2, END], [3, 4, END], [5, END], [6, END], [END], [7, END], [8, END]]
    assert sorted(note.split(": ", 1)[1].split(" ", 1)[0] for note in prepared.notes) == ["1", "2", "2"]
    assert any("2 documents did not end" in note for note in prepared.notes)


@pytest.mark.parametrize("kind", ["H", "I"])
def test_a_stream_without_a_head(tmp_path: Path, kind: str) -> None:
    ids = [token for one in drawn(2) for token in (*one, END)]
    content = struct.pack(f"<{len(ids)}{kind}", *ids)
    put(tmp_path, x_bin=content)
    assert oracle_stream(content) == (False, ids)
    prepared = build(tmp_path / "x.bin", tmp_path)
    assert [token for one in stored(prepared.train[0]) for token in one] == ids and not prepared.notes
    put(tmp_path, x_bin=content[: -len(struct.pack(kind, 0))])
    (note,) = build(tmp_path / "x.bin", tmp_path).notes
    assert "1 documents did not end" in note


@pytest.mark.parametrize(("magic", "version", "kind"), [(20240520, 1, "H"), (20240801, 7, "I")])
def test_shards_with_heads_are_one_line(tmp_path: Path, magic: int, version: int, kind: str) -> None:
    """The end token stands before each document, and a document goes on in the next shard."""
    documents = [one or [1] for one in drawn(3)]
    ids = [token for one in documents for token in (END, *one)]
    shards = [ids[:400], ids[400:401], ids[401:]]
    for number, part in enumerate(shards):
        content = headed(part, magic=magic, version=version, kind=kind)
        assert oracle_stream(content) == (True, part)
        put(tmp_path, **{f"x-{number}_bin": content})
    prepared = build(tmp_path / "x-*.bin", tmp_path)
    assert stored(prepared.train[0]) == [[*one, END] for one in documents] and not prepared.notes
    assert split_at_ends(ids)[1:] == documents


def test_ids_without_documents_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "PIECE", 256)
    ids = [token % 500 for token in range(1000)]
    put(tmp_path, x_bin=struct.pack("<1000H", *ids))
    prepared = build(tmp_path / "x.bin", tmp_path, validation=0.3)
    whole = sorted([*stored(prepared.train[0]), *stored(prepared.validation[0])], key=len)
    assert [len(one) for one in whole] == [1000 - 3 * 256 + 1, 257, 257, 257]
    assert any("cut into 4 documents" in note for note in prepared.notes)


def test_long_documents_are_cut_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "LONGEST", 100)
    monkeypatch.setattr(token_stream, "BLOCK", 64)
    lengths = [99, 100, 101, 350, 1, 200, 0]
    ids = [token for length in lengths for token in (*range(length), END)]
    whole = [token for length in lengths for token in range(length)]
    put(tmp_path / "s", x_bin=struct.pack(f"<{len(ids)}H", *ids))
    index, data = megatron_bytes([[[*range(length), END]] for length in lengths])
    put(tmp_path / "m", x_idx=index, x_bin=data)
    for name in "sm":
        files = TokenFiles([tmp_path / name / "x.bin"])
        found = texts_of(files)
        assert [token for one in found for token in one] == whole and max(map(len, found)) == 100
        assert [len(one) for one in found] == [99, 100, 100, 1, 100, 100, 100, 50, 1, 100, 100, 0]
        assert files.counts["cut"] == 5


def test_text_and_tokens_in_one_run(tmp_path: Path) -> None:
    """Both in a list and in a mixture, with the tokenizer that has made the tokens."""
    tokenizer = bytes_tokenizer()
    (tmp_path / "a.txt").write_text("plain words\n")
    ids = [*tokenizer.encode("as tokens"), 256]
    put(tmp_path, b_bin=struct.pack(f"<{len(ids)}H", *ids))
    settings: dict[str, Any] = {"dir": str(tmp_path / "data"), "tokenizer": {"kind": "bytes"}, "validation": 0.0}
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.bin")]
    prepared = prepare(DataConfig(source=sources, **settings), seed=0)
    assert [tokenizer.decode(one[:-1]) for one in stored(prepared.train[0])] == ["plain words\n", "as tokens"]
    prepared = prepare(DataConfig(mix=[{"source": source} for source in sources], **settings), seed=0)
    assert [tokenizer.decode(stored(one)[0][:-1]) for one in prepared.train] == ["plain words\n", "as tokens"]


def test_an_interrupted_build_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_llm.data import build as building
    from dist_llm.data import journal

    index, data = megatron_bytes([[[*one, END]] for one in drawn(5, 400)])
    put(tmp_path, x_idx=index, x_bin=data)
    calm = build(tmp_path / "x.idx", tmp_path / "calm", validation=0.1)
    monkeypatch.setattr(journal, "KEPT_EVERY", 500)
    monkeypatch.setattr(building, "ENCODED_AT_ONCE", 300)
    steps = iter(range(9))

    def interrupt(self: Any) -> None:
        kept(self)
        if next(steps, None) is None:
            raise KeyboardInterrupt

    kept = journal.Stores.keep
    monkeypatch.setattr(journal.Stores, "keep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "x.idx", tmp_path / "cut", validation=0.1)
    monkeypatch.setattr(journal.Stores, "keep", kept)
    again = build(tmp_path / "x.idx", tmp_path / "cut", validation=0.1)
    assert again.fingerprint == calm.fingerprint and any("interrupted" in note for note in again.notes)


# --- writing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1000, 65_499, 65_500, 65_536, 65_537])
def test_round_trips_are_bit_identical(tmp_path: Path, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "BLOCK", 7)
    end = vocab - 1
    documents = [[*one, end] for one in drawn(vocab, vocab=vocab, end=end)]
    ids = [token for one in documents for token in one]
    plain = struct.pack(f"<{len(ids)}{'H' if vocab <= 65_536 else 'I'}", *ids)
    index, data = megatron_bytes([[one] for one in documents], code=8 if vocab < 65_500 else 4)
    large = vocab > 65_536
    head = headed([end, *ids[:-1]], magic=20240801, version=7, kind="I") if large else headed([end, *ids[:-1]])
    put(tmp_path / "given", plain_bin=plain, m_idx=index, m_bin=data, head_bin=head)
    fingerprints = set()
    for name in ("plain.bin", "m.idx", "head.bin"):
        prepared = build(tmp_path / "given" / name, tmp_path, vocab=vocab, end=end)
        fingerprints.add(prepared.fingerprint)
        (out := tmp_path / f"from-{name}").mkdir()
        store = prepared.train[0]
        assert token_stream.write_plain(store, out / "plain.bin").read_bytes() == plain
        assert token_stream.write_headed(store, out / "head.bin").read_bytes() == head
        assert [path.read_bytes() for path in megatron.write_indexed(store, out / "m")] == [data, index]
    assert len(fingerprints) == 1


def test_export_and_back_through_the_command(tmp_path: Path, commands: Commands) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {family: llama, layers: 1, dim: 16, heads: 2, tied: true}\n"
        "data: {source: skills, tokenizer: {kind: bpe, vocab: 300}, sequence: 32, max_tokens: 9000, validation: 0.1, "
        f"dir: {tmp_path}/data}}\n"
        f"save: {{dir: {tmp_path}/run}}\n"
    )
    before = json.loads(commands.run("data", "build", str(config), "--json").stdout)
    for kind in ("megatron", "nanogpt", "llm.c"):
        out = tmp_path / kind
        done = commands.run("data", "export", str(config), str(out), "--format", kind, "--json")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["fingerprint"] == before["fingerprint"] and [one["split"] for one in answer["stores"]] == ["train", "validation"]
        names = sorted(path.name for path in out.iterdir())
        suffixes = (".bin", ".idx") if kind == "megatron" else (".bin",)
        assert names == sorted([*(f"{split}{suffix}" for split in ("train", "validation") for suffix in suffixes),
                                "tokenizer.json", "tokenizer_config.json"])  # fmt: skip
        source = [f"data.source={out}/train.bin", "data.tokenizer.kind=file", f"data.tokenizer.path={out}", "data.validation=0"]
        done = commands.run("data", "build", str(config), *source, "data.max_tokens=null", "data.tokenizer.vocab=null", "--json")
        assert done.returncode == 0, done.stderr
        again = json.loads(done.stdout)["stores"]
        assert [one["tokens"] for one in again] == [before["stores"][0]["tokens"]] and again[0]["sha256"] == before["stores"][0]["sha256"]
    assert not list(tmp_path.glob(".*")), "nothing half-made is left"
    text = commands.run("data", "export", str(config), str(tmp_path / "shown"), "--format", "nanogpt")
    assert f"data.source={tmp_path}/shown/train.bin" in text.stdout
    there = commands.run("data", "export", str(config), str(out))
    assert there.returncode == 2 and "already there" in there.stderr
    wrong = commands.run("data", "export", str(config), str(tmp_path / "x"), "--format", "fairseq")
    assert wrong.returncode == 2 and "megatron, nanogpt, llm.c" in wrong.stderr


def test_a_damaged_store_is_not_exported(tmp_path: Path) -> None:
    from dist_llm.data.export import export

    put(tmp_path, x_bin=struct.pack("<9H", *range(8), END))
    prepared = build(tmp_path / "x.bin", tmp_path)
    shard = prepared.train[0].folder / "tokens-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match="damaged"):
        build(tmp_path / "x.bin", tmp_path)
    store = TokenStore(prepared.train[0].folder, verify=False)
    with pytest.raises(DataError, match="damaged"):
        export(Prepared(prepared.tokenizer, (store,), (1,)), tmp_path / "out", kind="megatron")
    assert not (tmp_path / "out").exists()


# --- what is refused ---------------------------------------------------------------------------------------------------------

GOOD = [[[1, 2, 3, END]], [[4, 5], [6, END]], [[END]]]
INDEX, DATA = megatron_bytes(GOOD)


def patched(content: bytes, at: int, form: str, value: int) -> bytes:
    return content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]


# (what, index, ids, the byte that is named, expected, found)
DAMAGE: tuple[tuple[str, bytes, bytes, str, int], ...] = (
    ("magic", b"MMIDIDY" + INDEX[7:], DATA, "idx", 0),
    ("empty index", b"", DATA, "idx", 0),
    ("index of nine bytes", INDEX[:9], DATA, "idx", 9),
    ("version", patched(INDEX, 9, "<Q", 2), DATA, "idx", 9),
    ("kind of id", patched(INDEX, 17, "<B", 9), DATA, "idx", 17),
    ("float ids", patched(INDEX, 17, "<B", 7), DATA, "idx", 17),
    ("wider ids", patched(INDEX, 17, "<B", 4), DATA, "idx", 34 + 4 * 4 + 8),
    ("sequences", patched(INDEX, 18, "<Q", 2**63), DATA, "idx", 18),
    ("no documents", patched(INDEX, 26, "<Q", 0), DATA, "idx", 26),
    ("index cut", INDEX[:-1], DATA, "idx", 18),
    ("index longer", INDEX + b"\0", DATA, "idx", 18),
    ("modes that are no text", INDEX + b"\0\0\1\0", DATA, "idx", len(INDEX) + 2),
    ("negative length", patched(INDEX, 38, "<i", -1), DATA, "idx", 38),
    ("overlap", patched(INDEX, 34 + 16 + 8, "<q", 6), DATA, "idx", 58),
    ("gap", patched(INDEX, 34 + 16 + 16, "<q", 14), DATA, "idx", 66),
    ("place before the file", patched(INDEX, 34 + 16, "<q", -8), DATA, "idx", 50),
    ("first document", patched(INDEX, 82, "<q", 1), DATA, "idx", 82),
    ("falling documents", patched(INDEX, 98, "<q", 0), DATA, "idx", 98),
    ("document outside", patched(INDEX, 90, "<q", 99), DATA, "idx", 90),
    ("last document", patched(INDEX, 106, "<q", 3), DATA, "idx", 106),
    ("ids cut", INDEX, DATA[:-2], "bin", len(DATA) - 2),
    ("half an id", INDEX, DATA[:-1], "bin", len(DATA) - 1),
    ("more ids", INDEX, DATA + b"\0\0", "bin", len(DATA)),
    ("id outside", INDEX, patched(DATA, 8, "<H", VOCAB), "bin", 8),
)


@pytest.mark.parametrize(("what", "index", "data", "file", "byte"), DAMAGE, ids=[case[0] for case in DAMAGE])
def test_damage_to_megatron_files_is_named(tmp_path: Path, what: str, index: bytes, data: bytes, file: str, byte: int) -> None:
    put(tmp_path, x_idx=index, x_bin=data)
    with pytest.raises(RefusedError):
        oracle_megatron(index, data)
    with pytest.raises(DataError) as caught:
        build(tmp_path / "x.idx", tmp_path)
    failure = caught.value
    assert failure.where == f"{tmp_path}/x.{file}, byte {byte}" and failure.expected and failure.found
    assert len(render(failure).splitlines()) <= 5 and not list((tmp_path / "data").iterdir())


HEADED = headed([END, 1, 2, 3])
STREAMS: tuple[tuple[str, bytes, int], ...] = (
    ("version", patched(HEADED, 4, "<i", 7), 4),
    ("count", patched(HEADED, 8, "<i", 5), 8),
    ("negative count", patched(HEADED, 8, "<i", -1), 8),
    ("largest count", patched(HEADED, 8, "<i", 2**31 - 1), 8),
    ("rest of the head", patched(HEADED, 400, "<i", 1), 400),
    ("magic", patched(HEADED, 0, "<i", 20240521), 0),
    ("head cut", HEADED[:1000], 1000),
    ("odd size", HEADED[:-1], 8),
    ("odd size without a head", struct.pack("<5H", 1, 2, 3, 4, END)[:-1], 8),
    ("id outside", patched(HEADED, 1026, "<H", VOCAB), 1026),
    ("id outside without a head", struct.pack("<5H", 1, 2, 3, VOCAB, END), 6),
)


@pytest.mark.parametrize(("what", "content", "byte"), STREAMS, ids=[case[0] for case in STREAMS])
def test_damage_to_streams_is_named(tmp_path: Path, what: str, content: bytes, byte: int) -> None:
    put(tmp_path, x_bin=content)
    with pytest.raises(RefusedError):
        oracle_stream(content)
    with pytest.raises(DataError) as caught:
        build(tmp_path / "x.bin", tmp_path)
    assert caught.value.where == f"{tmp_path}/x.bin, byte {byte}" and caught.value.expected and caught.value.found


def test_an_index_of_the_kind_before_is_named(tmp_path: Path) -> None:
    put(tmp_path, x_idx=b"TNTIDX\0\0" + struct.pack("<4Q", 1, 4, 2, 10), x_bin=b"\0" * 40)
    with pytest.raises(DataError, match="before mmap") as caught:
        build(tmp_path / "x.idx", tmp_path)
    assert caught.value.where == f"{tmp_path}/x.idx, byte 0" and "--dataset-impl mmap" in str(caught.value.next)


def test_what_a_user_can_ask_for_that_cannot_be(tmp_path: Path) -> None:
    put(tmp_path, x_bin=struct.pack("<3H", 1, 2, END), a_txt=b"text", lone_idx=INDEX)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: build(tmp_path / "*", tmp_path), "cannot come from one path"),
        (lambda: build(tmp_path / "lone.idx", tmp_path), "without its ids"),
        (lambda: build(tmp_path / "a.txt", tmp_path), "knows no text"),
        (lambda: prepare(DataConfig(source=str(tmp_path / "x.bin"), dir=str(tmp_path / "d")), seed=0), "the tokenizer that has made them"),
    ]
    (tmp_path / "lone.idx").rename(tmp_path / "y.idx.kept")
    for number, (work, text) in enumerate(cases):
        if number == 1:
            (tmp_path / "y.idx.kept").rename(tmp_path / "lone.idx")
        with pytest.raises(UsageError) as caught:
            work()
        assert text in caught.value.what and caught.value.code == 2
    (tmp_path / "x.bin").unlink()
    put(tmp_path, x_bin=b"")
    with pytest.raises(DataError, match="there is no text"):
        build(tmp_path / "x.bin", tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    put(tmp_path, x_bin=DATA)
    path, begun = tmp_path / "x.idx", time.monotonic()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises((DataError, UsageError)):
        megatron.open_indexed(path, tmp_path / "x.bin")
    assert time.monotonic() - begun < 2


def test_bare_ids_as_a_tokenizer() -> None:
    tokenizer = ids_tokenizer(70_000, end=69_999)
    assert tokenizer.encode("<17><69999> and <5>") == [17, 69_999, 5] and tokenizer.decode([17, 69_999]) == "<17><69999>"
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.hash != ids_tokenizer(70_000, end=0).hash) == (70_000, 69_999, True)


# --- fuzz --------------------------------------------------------------------------------------------------------------------

EDGES = (0, 1, 2, 3, 5, 8, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(content: bytes, chance: random.Random, fields: tuple[tuple[int, str], ...]) -> bytes:
    """A few changes: a field set to a number from the edges or near its own, bits turned, bytes cut, added, moved."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        turn = chance.randrange(6)
        at = chance.randrange(len(content)) if content else 0
        if turn <= 2 and fields:
            place, form = chance.choice(fields)
            if place + struct.calcsize(form) <= len(content):
                (old,) = struct.unpack_from(form, content, place)
                new = chance.choice((*EDGES, old + 1, old - 1, -old)) % 2 ** (8 * struct.calcsize(form))
                content = patched(content, place, form.upper(), new)
        elif turn == 3 and content:
            content = content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
        elif turn == 4:
            content = content[:at] + content[at + chance.randrange(1, 9) :]
        else:
            content = content[:at] + chance.randbytes(chance.randrange(1, 9)) + content[at:]
    return content


def verdicts(ours: Callable[[], list[list[int]]], oracle: Callable[[], list[list[int]]]) -> tuple[object, object]:
    try:
        mine: object = ours()
    except DataError as failure:
        assert failure.code == 3 and failure.where and failure.expected and failure.found, failure.as_dict()
        mine = None
    try:
        theirs: object = oracle()
    except (RefusedError, struct.error, OverflowError, MemoryError):
        theirs = None
    return mine, theirs


@pytest.mark.parametrize("count", [2000, pytest.param(60_000, marks=pytest.mark.long)])
def test_mutated_files_are_taken_and_refused_as_by_the_oracle(memory: Path, count: int) -> None:
    chance, taken = random.Random(11), 0
    head = ((9, "<q"), (17, "<b"), (18, "<q"), (26, "<q"))
    body = (*((34 + 4 * n, "<i") for n in range(4)), *((50 + 8 * n, "<q") for n in range(8)))
    stream = struct.pack("<40H", *([1, 2, END] * 13), 5)
    home = memory / "mutated"
    put(home)
    try:
        for number in range(count):
            begun = time.monotonic()
            if number % 4 < 2:
                index = mutated(INDEX, chance, head if number % 4 else body)
                data = mutated(DATA, chance, ()) if chance.random() < 0.2 else DATA
                put(home, x_idx=index, x_bin=data)
                mine, theirs = verdicts(
                    lambda: texts_of(TokenFiles([home / "x.idx"])),
                    lambda index=index, data=data: [part for one in oracle_megatron(index, data) for part in split_at_ends(one)],
                )
            else:
                content = mutated(HEADED if number % 4 == 2 else stream, chance, ((0, "<i"), (4, "<i"), (8, "<i"), (12, "<i")))
                put(home, y_bin=content)
                mine, theirs = verdicts(lambda: texts_of(TokenFiles([home / "y.bin"])), lambda content=content: oracle_documents(content))
            taken += mine is not None
            assert mine == theirs, (number, mine, theirs)
            assert time.monotonic() - begun < 2
    finally:
        for path in home.iterdir():
            path.unlink()
        home.rmdir()
    assert count / 20 < taken < count / 2, taken


def oracle_documents(content: bytes) -> list[list[int]]:
    """A stream as documents: without an end token one piece; the end token before documents where a head and the first id say so."""
    with_head, ids = oracle_stream(content)
    if END not in ids:
        return [ids] if ids else []
    if with_head and ids[0] == END:
        found = split_at_ends(ids[1:])
        return [*found, []] if ids[-1] == END else found
    return split_at_ends(ids)


def test_the_oracle_reads_numpy_files_too(tmp_path: Path) -> None:
    """nanoGPT's own writer is numpy's."""
    ids = np.arange(500, dtype=np.uint16)
    ids.tofile(tmp_path / "x.bin")
    assert oracle_stream((tmp_path / "x.bin").read_bytes()) == (False, ids.tolist())
    assert texts_of(TokenFiles([tmp_path / "x.bin"])) == [ids.tolist()]
