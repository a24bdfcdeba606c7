"""Tables as text: what a JSON file of the same texts gives, every bad row told with its place, damage told in one message."""

from __future__ import annotations

import builtins
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_llm.config.schema import DataConfig
from dist_llm.data import prepare as preparing
from dist_llm.data.corpora import open_corpus
from dist_llm.data.parquet import read_rows
from dist_llm.data.prepare import Prepared, prepare
from dist_llm.data.readers import BadLines
from dist_llm.errors import DataError, Failure, UsageError, render
from tests.commands import Commands

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
feather = pytest.importorskip("pyarrow.feather")

TEXTS = [f"text {number} " + "word " * (number % 60) + "grün 😀\u2028" * (number % 3) for number in range(700)]
KINDS = ("parquet", "parquet-zstd", "large", "view", "dictionary", "feather", "arrow-file", "arrow-stream")


def table_of(texts: list[Any], kind: Any = None, name: str = "text") -> Any:
    columns = {"id": pa.array(range(len(texts))), name: pa.array(texts, type=kind or pa.string()), "other": pa.array(["x"] * len(texts))}
    return pa.table(columns)


def write(path: Path, table: Any, kind: str = "parquet") -> Path:
    if kind == "feather":
        feather.write_feather(table, path)
    elif kind.startswith("arrow"):
        make = pa.ipc.new_file if kind == "arrow-file" else pa.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=97)
    else:
        pq.write_table(table, path, row_group_size=150, compression="zstd" if kind.endswith("zstd") else "snappy", write_page_checksum=True)
    return path


def of_kind(folder: Path, kind: str, texts: list[Any]) -> Path:
    types = {"large": pa.large_string(), "view": pa.string_view(), "dictionary": pa.dictionary(pa.int32(), pa.string())}
    suffix = "feather" if kind == "feather" else "arrow" if kind.startswith("arrow") else "parquet"
    table = table_of(texts, types.get(kind))
    if kind == "view":  # the writer of Parquet files takes none: as Arrow
        return write(folder / "x.arrow", table, "arrow-file")
    return write(folder / f"x.{suffix}", table, kind)


def build(source: object, folder: Path, **more: Any) -> Prepared:
    settings: dict[str, Any] = {"tokenizer": {"kind": "bytes"}, "validation": 0.1, "dir": str(folder / "data"), **more}
    return prepare(DataConfig(source=str(source), **settings), seed=0)


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_gives_what_the_same_lines_give(tmp_path: Path, kind: str) -> None:
    calm = build(lines(tmp_path / "x.jsonl", TEXTS), tmp_path)
    found = build(of_kind(tmp_path, kind, TEXTS), tmp_path)
    assert found.fingerprint == calm.fingerprint and not found.notes
    for one, other in zip((*found.train, *found.validation), (*calm.train, *calm.validation), strict=True):
        assert [shard.sha256 for shard in one.manifest.shards] == [shard.sha256 for shard in other.manifest.shards]
        assert one.manifest.index == other.manifest.index and one.manifest.text_bytes == other.manifest.text_bytes
    bpe = {"tokenizer": {"kind": "bpe", "vocab": 300}}
    assert build(tmp_path / "x.jsonl", tmp_path, **bpe).fingerprint == build(of_kind(tmp_path, kind, TEXTS), tmp_path, **bpe).fingerprint


def test_globs_folders_and_lists(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"part-{number}.parquet", table_of([f"{number} {text}" for text in TEXTS[:40]]))
    names = [document.name for document in open_corpus(str(tmp_path / "part-*.parquet"), seed=0).documents()]
    assert names[:2] == [f"{tmp_path}/part-0.parquet:1", f"{tmp_path}/part-0.parquet:2"] and len(names) == 120
    lines(tmp_path / "more.jsonl", ["a line"])
    assert len(list(open_corpus(str(tmp_path), seed=0).documents())) == 121, "a folder is searched for tables too"
    places = [document.place for document in open_corpus(str(tmp_path), seed=0).documents()]
    assert places == sorted(places) and places[-1] <= 1


def test_another_column(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", table_of(TEXTS[:5], name="meta.content"))
    assert [document.text for document in open_corpus(str(path), seed=0, text_key="meta.content").documents()] == TEXTS[:5]


BAD: list[Any] = ["good", None, "nul \x00", "", " \t", "good too", None, "x" * ((8 << 20) + 1), "last"]


@pytest.mark.parametrize("kind", ["parquet", "arrow-stream"])
def test_bad_rows_are_told_with_their_place(tmp_path: Path, kind: str) -> None:
    path = of_kind(tmp_path, kind, BAD)
    with pytest.raises(DataError) as caught:
        build(path, tmp_path)
    shown = render(caught.value)
    assert caught.value.what == "4 rows cannot be read" and caught.value.where == f"{path}:2" and caught.value.code == 3
    for row, why in ((2, "must be a string, found null"), (3, "holds a NUL character"), (7, "found null"), (8, "longer than 8 MiB")):
        assert f"{path}:{row}: " in shown and any(f":{row}: " in line and why in line for line in shown.splitlines()), shown
    prepared = build(path, tmp_path, max_bad_lines=4)
    assert prepared.notes[0] == "4 bad rows were skipped" and prepared.notes[-1] == "2 rows without text were left out"
    assert sum(store.manifest.documents for store in (*prepared.train, *prepared.validation)) == 3
    again = build(path, tmp_path, max_bad_lines=4)
    assert any("4 bad rows of x were skipped when it was built" in note for note in again.notes)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"bad \xff\xfe", b"good too"], type=pa.binary())
    text = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    write(tmp_path / "x.parquet", pa.table({"text": text}))
    with pytest.raises(DataError) as caught:
        build(tmp_path / "x.parquet", tmp_path)
    assert caught.value.where == f"{tmp_path}/x.parquet:2" and "0xff at byte 5" in caught.value.details[0]
    write(tmp_path / "x.arrow", pa.table({"text": text}), "arrow-file")
    with pytest.raises(DataError, match="the table is damaged"):  # such a file is compared as a whole
        build(tmp_path / "x.arrow", tmp_path)


def test_columns_that_hold_no_text(tmp_path: Path) -> None:
    cases = [
        (pa.table({"text": [1, 2]}), "holds no text", "int64"),
        (pa.table({"text": [["a"], ["b"]]}), "holds no text", "list"),
        (pa.table({"text": pa.array([b"a"])}), "holds no text", "binary"),
        (pa.table({"body": ["a"], "title": ["b"]}), "there is no column 'text'", "body, title"),
        (pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), "more than one column", "text, text"),
        (pa.table({}), "there is no column", "no columns"),
    ]
    for number, (table, what, found) in enumerate(cases):
        path = tmp_path / f"{number}.parquet"
        pq.write_table(table, path)
        with pytest.raises(DataError) as caught:
            build(path, tmp_path)
        assert what in caught.value.what and found in str(caught.value.found) and caught.value.where == str(path)
    pq.write_table(table_of([]), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="there is no text"):
        build(tmp_path / "none.parquet", tmp_path)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = write(tmp_path / "x.parquet", table_of(TEXTS[:3])), builtins.__import__

    def lacking(name: str, *words: Any, **more: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *words, **more)

    monkeypatch.setattr(builtins, "__import__", lacking)
    with pytest.raises(UsageError) as caught:
        build(path, tmp_path)
    assert caught.value.next == "pip install 'dist-llm[hf]'" and caught.value.where == str(path)


def test_rows_for_other_readers(tmp_path: Path) -> None:
    """The seam on which conversations stand: whole rows as plain values, each with its place."""
    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None]
    pq.write_table(pa.table({"messages": messages, "n": [1, 2]}), tmp_path / "x.parquet")
    rows = list(read_rows(tmp_path / "x.parquet"))
    assert [row.values for row in rows] == [{"messages": messages[0], "n": 1}, {"messages": None, "n": 2}]
    assert [row.place for row in rows] == [f"{tmp_path}/x.parquet:1", f"{tmp_path}/x.parquet:2"] and rows[-1].done == 1.0
    assert [row.values for row in read_rows(tmp_path / "x.parquet", columns=("messages", "n"))] == [row.values for row in rows]


@pytest.mark.parametrize("kind", ["parquet", "arrow-stream"])
@pytest.mark.parametrize("shape", ["auto", "messages"])
def test_conversations_in_tables_are_those_of_lines(tmp_path: Path, kind: str, shape: str) -> None:
    """Fields that an object does not have are null in a table, and count as left out."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"q {n}"},
                {"role": "assistant", "content": f"a {n}", **({"weight": 2.0} if n % 3 else {})},
            ]
        }
        for n in range(40)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(one) + "\n" for one in chats))
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    write(path, pa.Table.from_pylist(chats), kind)
    settings: dict[str, Any] = {"chat": {"format": shape}, "packing": "best_fit"}
    lines_of, rows_of = (build(source, tmp_path, **settings) for source in (tmp_path / "x.jsonl", path))
    assert lines_of.fingerprint == rows_of.fingerprint
    for one, other in zip((*lines_of.train, *lines_of.validation), (*rows_of.train, *rows_of.validation), strict=True):
        assert one.manifest.shards == other.manifest.shards and one.manifest.weights == other.manifest.weights
    broken = [*chats, {"messages": None}, {"messages": [{"role": "assistant", "content": "first"}]}]
    write(path, pa.Table.from_pylist(broken), kind)
    with pytest.raises(DataError) as caught:
        build(path, tmp_path, **settings)
    assert caught.value.what == "2 rows cannot be read" and caught.value.where == f"{path}:41"


MEMORY = """
import sys
from pathlib import Path
import pyarrow
from dist_llm.data.parquet import read_table
from dist_llm.data.readers import BadLines
count = sum(len(document.text) for document, _ in read_table(Path(sys.argv[1]), text_key="text", bad=BadLines()))
print(count, pyarrow.default_memory_pool().max_memory())
"""


@pytest.mark.parametrize("kind", ["parquet", "arrow-file"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    """One row group of 15 and of 60 MB, read a page at a time: the same peak."""
    chance, peaks = random.Random(1), []
    texts = [chance.randbytes(2500).hex() for _ in range(12_000)]
    for rows in (3000, 12_000):
        table, path = pa.table({"text": texts[:rows]}), tmp_path / f"{rows}.{kind.split('-')[0]}"
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=10**6, use_dictionary=False)
        else:
            write(path, table, kind)
        done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True, timeout=60)
        count, peak = map(int, done.stdout.split())
        assert count == rows * 5000
        peaks.append(peak)
    assert peaks[1] < 1.1 * peaks[0] + 100_000 and peaks[1] < 20_000_000, peaks


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow-stream"])
def test_damaged_tables_are_one_message(tmp_path: Path, kind: str) -> None:
    """Bytes changed, cut, added: refused in one message, or the same texts as before, where the byte says nothing. Never a crash.

    Arrow files have no checksums: other texts may come out of them, as with any file of plain text.
    """
    texts = TEXTS[:60]
    whole = of_kind(tmp_path, kind, texts).read_bytes()
    path, chance, refused = next(tmp_path.glob("x.*")), random.Random(3), 0
    for number in range(400):
        content = bytearray(whole)
        at = chance.randrange(len(content))
        match number % 4:
            case 0 | 1:
                content[at] ^= 1 << chance.randrange(8)
            case 2:
                del content[at : at + chance.choice((1, 4, 100, 10**6))]
            case 3:
                content[at:at] = chance.randbytes(chance.choice((1, 4, 16)))
        path.write_bytes(content)
        bad = BadLines(allowed=10**9)
        try:
            found = [document.text for document in open_corpus(str(path), seed=0, bad=bad).documents()]
        except Failure as failure:
            assert failure.code == 3 and str(path) in str(failure.where), failure.as_dict()
            refused += 1
            continue
        assert kind != "parquet" or set(found) <= set(texts) or bad.count, (number, at)
    assert refused > 200, refused


def test_through_the_command(tmp_path: Path, commands: Commands) -> None:
    config = Path(__file__).parent.parent / "configs/tiny.yaml"
    write(tmp_path / "x.parquet", table_of(TEXTS))
    words = [f"data.source={tmp_path}/x.parquet", "data.tokenizer={kind: bytes}", "model.vocab=257", f"data.dir={tmp_path}/data"]
    done = commands.run("train", str(config), *words, "--steps", "2", "--run-dir", str(tmp_path / "run"), "runtime.device=cpu")
    assert done.returncode == 0, done.stderr
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "x.parquet")
    done = commands.run("data", "build", str(config), *words)
    assert done.returncode == 3 and "there is no column 'text'" in done.stderr and "Traceback" not in done.stderr


def test_no_table_is_read_where_the_tokens_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", table_of(TEXTS))
    before = build(path, tmp_path)
    monkeypatch.setattr(preparing, "build_store", lambda *words, **more: pytest.fail("built again"))
    assert build(path, tmp_path).fingerprint == before.fingerprint


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow-file", "arrow-stream"])
def test_tables_of_conversations_that_are_read_as_text(tmp_path: Path, kind: str) -> None:
    """What reads them comes first where there is no text; beside a text a note says it."""
    suffix = {"parquet": "parquet", "feather": "feather"}.get(kind, "arrow")
    for names, words in (
        (("instruction", "output"), "the same command with data.chat.format=alpaca trains"),
        (("a", "b"), "the same command with"),
    ):
        file = tmp_path / f"x-{names[0]}.{suffix}"
        write(file, pa.table({name: ["x", "y"] for name in names}), kind)
        with pytest.raises(DataError, match="no column 'text'") as failure:
            list(open_corpus(str(file), seed=0).documents())
        assert str(failure.value.next).startswith(words) and f"data.text_key={names[0]}" in str(failure.value.next)
    write(file, pa.table({name: ["x", "y"] for name in ("instruction", "output", "text")}), kind)
    (note,) = open_corpus(str(file), seed=0).notes
    assert "data.chat.format=alpaca" in note
