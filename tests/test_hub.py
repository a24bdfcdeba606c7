"""Data sets of the hub: named, pinned, streamed by the verbs that say so, and nothing of them ever run.

There is no network in these tests. `datasets` itself reads local folders here, through the lines that read the hub: what is put in its
place is where a name leads to, and the answer to which commit is the newest.
"""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_llm.cli import main as cli
from dist_llm.config.hub import Reference, parse
from dist_llm.config.schema import DataConfig
from dist_llm.data import hub
from dist_llm.data.prepare import Prepared, prepare
from dist_llm.errors import DataError, UsageError, render

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
huggingface_hub = pytest.importorskip("huggingface_hub")

OLD, NEW = "a" * 40, "b" * 40
TEXTS = [f"text {number} of the hub" for number in range(50)]
SECRET = "hf_" + "x" * 34


class Hub:
    """A hub of local folders: what is asked of it is noted. commits: a folder for each commit of owner/name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.newest, self.asked = folder, OLD, []
        self.commits = {OLD: folder / "old", NEW: folder / "new"}
        self.failure: Exception | None = None

    def dataset_info(self, api: Any, repo: str, *, revision: str | None = None, timeout: float) -> Any:
        self.asked.append(("newest", repo, revision, api.token))
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(sha=self.newest)

    def builder(self, path: str, name: str | None = None, *, revision: str, token: Any) -> Any:
        self.asked.append(("read", path, revision, token))
        if self.failure is not None:
            raise self.failure
        return self.load(str(self.commits[revision]), name)

    load = staticmethod(datasets.load_dataset_builder)


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub with a data set of two commits, which this process may ask."""
    found = Hub(tmp_path / "hub")
    for commit, texts in ((OLD, TEXTS), (NEW, [text.upper() for text in TEXTS])):
        folder = found.commits[commit]
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"text": texts, "n": list(range(50))}), folder / "train-00000.parquet")
        pq.write_table(pa.table({"text": ["held"], "n": [0]}), folder / "test-00000.parquet")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda api, *words, **more: found.dataset_info(api, *words, **more))
    monkeypatch.setattr(datasets, "load_dataset_builder", found.builder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "_access", hub.Access(allowed=True, token=SECRET))
    return found


def build(folder: Path, source: str = "hub:owner/name", **more: Any) -> Prepared:
    settings: dict[str, Any] = {"tokenizer": {"kind": "bytes"}, "validation": 0.1, "dir": str(folder / "data"), **more}
    return prepare(DataConfig(source=source, **settings), seed=0)


def refused(folder: Path, source: str = "hub:owner/name", **more: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        build(folder, source, **more)
    assert caught.value.code == 3 and SECRET not in render(caught.value) and len(render(caught.value).splitlines()) <= 12
    return caught.value


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("hub:owner/name", Reference("owner/name")),
        ("hub:owner/name/20231101.en", Reference("owner/name", "20231101.en")),
        ("hub:owner/name:test", Reference("owner/name", split="test")),
        ("hub:o/n/c:s@refs/convert/parquet", Reference("o/n", "c", "s", "refs/convert/parquet")),
        (f"hub:o/n@{OLD}", Reference("o/n", revision=OLD)),
        *((wrong, None) for wrong in ("hub:", "hub:name", "hub:../name", "hub:/etc/passwd", "hub:a/b/c/d", "hub:a/..", "hub:a/b@")),
        *((wrong, None) for wrong in ("hub:a/b:", "hub:a/b@../x", "hub:a b/c", "hub:-a/b", "hub:a/b\n", "hub:https://x/y")),
    ],
)  # fmt: skip
def test_names(text: str, reference: Reference | None) -> None:
    assert parse(text) == reference
    assert reference is None or parse(str(reference)) == reference


def test_wrong_names_are_refused_before_anything(tmp_path: Path, there: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parent.parent / "configs/tiny.yaml"
    assert cli.run(["check", str(config), "data.source=hub:../x"]) == 2
    assert "names no data set of the hub" in capsys.readouterr().err
    with pytest.raises(UsageError):
        build(tmp_path, "hub:../x")
    assert not there.asked
    assert cli.run(["check", str(config), "data.source=hub:a/b"]) == 0
    assert "over the network" in capsys.readouterr().out


def test_the_same_tokens_as_from_a_file(tmp_path: Path, there: Hub) -> None:
    found = build(tmp_path)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert found.fingerprint == build(tmp_path, str(tmp_path / "x.jsonl")).fingerprint
    assert found.notes == (f"hub:owner/name:train was read at commit {OLD}",)
    assert there.asked == [("newest", "owner/name", None, SECRET), ("read", "owner/name", OLD, SECRET)]
    assert OLD[:8] in str(found.train[0].folder), "the commit is in the name of the tokens"
    written = b"".join(path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file())
    assert SECRET.encode() not in written


def test_a_name_keeps_the_commit_that_it_first_meant(tmp_path: Path, there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(tmp_path)
    there.newest = NEW
    there.asked.clear()
    monkeypatch.setattr(hub, "_access", hub.Access())  # as every rank and every other verb
    again = build(tmp_path)
    assert again.fingerprint == first.fingerprint and not again.built and not there.asked
    monkeypatch.setattr(hub, "_access", hub.Access(allowed=True))
    other = build(tmp_path, f"hub:owner/name@{NEW}")
    assert other.fingerprint != first.fingerprint and there.asked == [("read", "owner/name", NEW, False)], "no token of the machine's"
    branch = build(tmp_path, "hub:owner/name@main")
    assert branch.fingerprint == other.fingerprint and not branch.built
    (pin,) = [path for path in (tmp_path / "data").glob("hub-*.json") if OLD.encode() in path.read_bytes()]
    pin.unlink()
    assert build(tmp_path).fingerprint == other.fingerprint, "without the note the newest is taken"


def test_a_damaged_note_is_refused(tmp_path: Path, there: Hub) -> None:
    build(tmp_path)
    (pin,) = (tmp_path / "data").glob("hub-*.json")
    whole = pin.read_bytes()
    for number in range(0, len(whole), 7):
        pin.write_bytes(whole[:number] + bytes([whole[number] ^ 1]) + whole[number + 1 :])
        assert refused(tmp_path).where == str(pin)
    pin.unlink()
    os.mkfifo(pin)
    assert refused(tmp_path).where == str(pin)


def test_splits_and_columns(tmp_path: Path, there: Hub) -> None:
    held = build(tmp_path, "hub:owner/name:test", validation=0.0)
    assert held.train[0].manifest.documents == 1
    wrong = refused(tmp_path, "hub:owner/name:dev")
    assert "split" in wrong.what or "split" in str(wrong.found)
    assert "there is no column 'body'" in refused(tmp_path, text_key="body").what
    numbers = refused(tmp_path, text_key="n")
    assert numbers.what == "at least 20 rows cannot be read" and numbers.where == "hub:owner/name:train:1"
    skipped = build(tmp_path, text_key="text", max_bad_lines=3)
    assert skipped.train


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
def test_other_kinds_of_files(tmp_path: Path, there: Hub, kind: str) -> None:
    folder = there.commits[OLD]
    for path in folder.iterdir():
        path.unlink()
    texts = ["one", "two", "three"]
    content = {"jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts), "csv": "text,n\none,1\ntwo,2\nthree,3\n"}
    (folder / f"train.{kind}").write_text(content.get(kind, "one\ntwo\nthree\n"))
    store = build(tmp_path, validation=0.0).train[0]
    assert bytes(token for n in range(3) for token in store.document(n)[:-1]) == b"onetwothree"


def test_bad_rows_are_told(tmp_path: Path, there: Hub) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b\x00", "", "c"]}), there.commits[OLD] / "train-00000.parquet")
    failure = refused(tmp_path)
    assert failure.what == "2 rows cannot be read" and failure.where == "hub:owner/name:train:2"
    prepared = build(tmp_path, max_bad_lines=2, validation=0.0)
    assert prepared.train[0].manifest.documents == 2 and prepared.notes[1] == "2 bad rows were skipped"


def test_nothing_of_a_data_set_is_run(tmp_path: Path, there: Hub) -> None:
    """A script beside the files, a pickle, and a builder of another kind."""
    mark = tmp_path / "was-run"
    folder = there.commits[OLD]
    for name in ("name.py", "old.py", "hub.py", "conftest.py"):
        (folder / name).write_text(f"open({str(mark)!r}, 'w').close()\n")
    assert refused(tmp_path).what == "the data set is a program, and none is ever run" and not mark.exists()
    (folder / "old.py").unlink()
    build(tmp_path)
    assert not mark.exists()
    for path in folder.glob("*.parquet"):
        path.unlink()
    (folder / "train.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.")
    failure = refused(tmp_path / "again")
    assert failure.where == "hub:owner/name:train" and not mark.exists()
    (folder / "train.pkl").unlink()
    (folder / "image.png").write_bytes(b"\x89PNG")
    assert refused(tmp_path / "third").what == "the data set is of a kind that is not read" and not mark.exists()


FAULTS: list[tuple[Any, str]] = [
    (ConnectionError(f"no route with {SECRET}"), "the hub cannot be reached"),
    (TimeoutError("timed out"), "the hub cannot be reached"),
    (RuntimeError("\x1b[31mred"), "the hub cannot be reached"),
    (huggingface_hub.errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
    (datasets.exceptions.DatasetNotFoundError("owner/name"), "there is no such data set"),
    (ValueError("BuilderConfig 'x' not found"), "the data set cannot be read"),
]


@pytest.mark.parametrize(("error", "what"), FAULTS, ids=[type(error).__name__ for error, _ in FAULTS])
def test_what_libraries_say_is_one_message(tmp_path: Path, there: Hub, error: Exception, what: str) -> None:
    there.failure = error
    asking = refused(tmp_path)
    assert what in asking.what and asking.next
    there.failure = None
    hub.resolve("hub:owner/name", home=tmp_path / "data")
    there.failure = error
    assert what in refused(tmp_path).what
    assert not [path for path in (tmp_path / "data").iterdir() if path.name.endswith(".partial")], "nothing half-built is left"


def test_a_stream_that_breaks_off(tmp_path: Path, there: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        column_names = None

        def __iter__(self) -> Any:
            yield {"text": "first"}
            yield {"text": "second"}
            raise ConnectionResetError("gone")

    monkeypatch.setattr(hub, "_stream", lambda reference, commit: Broken())
    failure = refused(tmp_path)
    assert failure.where == "hub:owner/name:train, after row 2" and "gone" in str(failure.found)


def test_only_verbs_that_say_so_use_the_network(tmp_path: Path, there: Hub, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    config = str(Path(__file__).parent.parent / "configs/tiny.yaml")
    words = ["data.source=hub:owner/name", f"data.dir={tmp_path}/d", "data.tokenizer={kind: bytes}", "model.vocab=257", "data.sequence=16",
             "batch.global=4", "batch.micro=4"]  # fmt: skip
    monkeypatch.setattr(hub, "_access", hub.Access())
    for verb in (["data", "preview", config, *words], ["data", "export", config, str(tmp_path / "out"), *words]):
        assert cli.run(verb) == 3
        err = capsys.readouterr().err
        assert "this command does not use the network" in err and re.search("next: +dist-llm data build .*data.source=hub:", err)
    assert cli.run(["tokenizer", "report", "bytes", "--source", "hub:owner/name"]) == 3
    assert not there.asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.run(["data", "build", config, *words]) == 3
    err = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in err and not there.asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert cli.run(["data", "build", config, *words]) == 0
    out, err = capsys.readouterr()
    assert "network     hub:owner/name: read from huggingface.co" in err and there.asked[0][3] == SECRET and SECRET not in out + err
    monkeypatch.setattr(hub, "_access", hub.Access())
    assert cli.run(["data", "preview", config, *words]) == 0, "what was built needs no network"


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The real libraries, where no address can be looked up or reached."""

    def refuse(*words: Any, **more: Any) -> Any:
        raise OSError("no network in this test")

    monkeypatch.setattr(hub, "_access", hub.Access(allowed=True))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for source in ("hub:owner/name", f"hub:owner/name@{OLD}"):
        failure = refused(tmp_path, source)
        assert str(failure.where).startswith("hub:owner/name:train") and failure.next
    assert capfd.readouterr().err == "", "the message is the only one"
