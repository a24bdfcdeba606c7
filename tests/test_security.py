"""What a file, a name or an environment may not do: run code, lead elsewhere, command a terminal, leak a secret, take all memory.

Each hostile thing is put wherever a verb reads, and the verb is run in this process by its own entry.
"""

from __future__ import annotations

import ast
import html
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dist_llm.cli import main as cli
from dist_llm.cli.loopback import TRANSPORTS, stay_on_loopback
from dist_llm.config.load import load_config
from dist_llm.config.schema import Config
from dist_llm.data import sandbox
from dist_llm.data.prepare import prepare
from dist_llm.data.store import TokenStore
from dist_llm.errors import CheckpointError, DataError, holds_secret, plain, redacted
from dist_llm.train.durable import Disk
from dist_llm.train.folder import open_checkpoint, tidy
from dist_llm.train.metrics import keep_until
from dist_llm.train.storage import RunFolder, write_config
from tests.ports import LOOPBACK, family, lan_address, listening
from tests.small_checkpoints import reseal, rows_of, save_small, seal, take_up
from tests.test_report import CHROMIUM, EXAMPLE, Page

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "dist_llm").rglob("*.py"))
TINY = str(ROOT / "configs/tiny.yaml")
NEVER = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # kinds of characters that a terminal may act on
COMMANDS = "\x1b[2J\x1b]0;owned\x07\r\x08\u202e\u2066\u200b\u2028\x9b31m\x7f[bold red]"
MARKUP = "</script></code><script>document.title='owned'</script>\"'><img src=http://owned.invalid/x onerror=document.title='owned'>"
MARKUP += " javascript:alert(1) {{7*7}}"


def verb(*words: str) -> int:
    return cli.run(list(words))


def clean(text: str) -> bool:
    """Whether a terminal shows it as it is."""
    return not any(category(letter) in NEVER for letter in text if letter not in "\n\t")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[str]]:
    """Small tokens on disk, and the overrides that find them."""
    words = [f"data.dir={tmp_path_factory.mktemp('data')}", "data.max_tokens=20_000"]
    config = load_config(TINY, words).config
    prepare(config.data, seed=config.runtime.seed)
    return config, words


# --- nothing runs what it reads --------------------------------------------------------------------------------------------

DYNAMIC = {("cli/main.py", "get_command"), ("cli/bench.py", "_suite"), ("train/setup.py", "make_engine")}  # names from tables of ours
CONSTANT = re.compile(r"""import_module\((['"])[\w.]+\1\)$""")  # a name that stands in the source is no data
FORBIDDEN = re.compile(
    r"(eval|exec|compile|__import__|execfile|input)$|(pickle|cPickle|dill|marshal|shelve|joblib|cloudpickle)\.|torch\.(load|save|hub)\b|"
    r"np\.load$|numpy\.load$|os\.(system|popen|exec\w*|spawn\w*)$|runpy\.|code\.|yaml\.(load|unsafe_load|full_load)$|ctypes\.(PyDLL|pythonapi)"
)


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """(function it stands in, call) of a file."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef) else name
            if isinstance(child, ast.Call):
                yield name, child
            yield from walk(child, inner)

    yield from walk(ast.parse(file.read_text()), "")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_call_could_run_data(file: Path) -> None:
    place = str(file.relative_to(ROOT / "dist_llm"))
    for function, call in calls(file):
        name, words = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
        at = f"{place}:{call.lineno} {name}"
        assert not FORBIDDEN.match(name), at
        assert not {"shell", "allow_pickle", "trust_remote_code"} & words.keys(), at
        assert "import_module" not in name or (place, function) in DYNAMIC or CONSTANT.match(ast.unparse(call)), at
        assert name != "YAML" or words.get("typ") == "'safe'", at
        if (place, name) == ("data/sandbox.py", "_Environment"):  # what a chat template makes is no HTML
            assert issubclass(sandbox._Environment, ImmutableSandboxedEnvironment)
        else:
            assert not name.endswith("Environment") or words.get("autoescape") == "True", at
        if name.startswith("subprocess.") and call.args:
            assert not isinstance(call.args[0], (ast.Constant, ast.JoinedStr)), f"{at}: a list of words"


class Marker:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


@contextmanager
def no_marker(folder: Path) -> Iterator[list[bytes]]:
    """Hostile contents; fails where one of them was run inside."""
    marker = folder / "owned"
    thing = Marker(marker)
    zipped = folder / "weights.pt"
    torch.save({"weight": thing}, zipped)
    yaml = f"!!python/object/apply:builtins.open ['{marker}', 'w']".encode()
    contents = [pickle.dumps(thing), pickle.dumps(thing, protocol=0), zipped.read_bytes(), yaml]
    yield contents
    assert not marker.exists()
    pickle.loads(contents[0])
    assert marker.exists(), "the weapon is loaded"
    marker.unlink()


def test_a_pickle_in_the_place_of_a_file_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with true hashes, so that it is opened."""
    folder = save_small(tmp_path / "run")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with no_marker(tmp_path) as contents:
        for name in files:
            for content in contents:
                (folder / name).write_bytes(content)
                assert verb("verify", str(folder)) == 4
                if name == "manifest.json":
                    seal(folder, content)
                elif name != "COMMIT":
                    reseal(folder, {name: content})
                assert name.startswith("tokenizer") or verb("sample", str(folder), "--tokens", "1") in (3, 4)
                if name.startswith("rank"):
                    with pytest.raises(CheckpointError):
                        take_up(folder, rows_of(8))
                for other, bytes_before in files.items():
                    (folder / other).write_bytes(bytes_before)
    assert "Traceback" not in capsys.readouterr().err


def test_a_pickle_in_the_place_of_any_other_file(
    data: tuple[Config, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(str(data[0].data.dir), tmp_path / "data")
    own = [f"data.dir={tmp_path / 'data'}", data[1][1]]
    run, other = tmp_path / "run", tmp_path / "other"
    with no_marker(tmp_path) as contents:
        for content in contents:
            for name in ("x.yaml", "tokenizer.json", "text.txt", "text.jsonl", "text.gz", "comparison.json"):
                (tmp_path / name).write_bytes(content)
            for folder in (run, other):
                folder.mkdir(exist_ok=True)
                for name in ("metrics.jsonl", "config.yaml", "samples.jsonl"):
                    (folder / name).write_bytes(content)
            tokenizer = f"data.tokenizer={{kind: file, path: {tmp_path / 'tokenizer.json'}}}"
            assert verb("check", str(tmp_path / "x.yaml")) == verb("train", str(tmp_path / "x.yaml")) == 2
            assert verb("check", TINY, tokenizer) == verb("tokenizer", "report", str(tmp_path / "tokenizer.json")) == 3
            for name in ("text.jsonl", "text.gz"):
                assert verb("data", "build", TINY, f"data.source={tmp_path / name}", *own) == 3
            assert verb("data", "build", TINY, f"data.source={tmp_path / 'text.txt'}", *own, "data.validation=0") in (0, 3)  # it is text
            assert verb("report", str(tmp_path / "comparison.json")) == 3
            assert verb("compare", TINY, "dp=1", "--baseline", str(tmp_path / "comparison.json")) == 2
            assert verb("compare", str(run), str(other)) == 3
            assert verb("report", str(run)) == 0, "what cannot be read is counted"
        for path in (tmp_path / "data").rglob("*.*"):
            before = path.read_bytes()
            path.write_bytes(contents[0])
            used = any(part.startswith("skills-") for part in path.relative_to(tmp_path).parts)  # all of it is sealed
            assert verb("data", "preview", TINY, *own) == (3 if used else 0), path
            path.write_bytes(before)
    assert "Traceback" not in capsys.readouterr().err


# --- names lead nowhere else -----------------------------------------------------------------------------------------------

NAMES = ("../x", "/etc/passwd", "a\nb", "..", ".", "", "rank-00000.safetensors/../../x", "rank-00000.safetensors\x00", "rank-٠٠٠٠٠.json")


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_in_a_manifest_are_those_of_its_files(tmp_path: Path, name: str) -> None:
    folder = save_small(tmp_path / "run")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for old in ("rank-00000.safetensors", "tokenizer.json"):
        files = {name if key == old else key: about for key, about in manifest["files"].items()}
        seal(folder, {**manifest, "files": files})
        with pytest.raises(CheckpointError, match="contradicts itself"):
            open_checkpoint(folder)
    (row, shape), *rest = manifest["rows"]
    seal(folder, {**manifest, "rows": [[name if "/" in name or not name.strip(".") else f"{row}/{name}", shape], *rest]})
    if name not in ("..", "."):  # words of a name, and never of a path
        with pytest.raises(CheckpointError):
            open_checkpoint(folder).parts.whole(row)


def test_links_in_a_run_folder_are_never_followed_to_be_written_or_emptied(tmp_path: Path) -> None:
    """A run folder that somebody else has packed."""
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_text("gold")
    run = tmp_path / "run"
    save_small(run)
    (run / "checkpoints/.step-00000009.partial").symlink_to(treasure)
    (run / "checkpoints/.step-00000008.old").symlink_to(treasure / "gold")
    (run / ".config.yaml").symlink_to(treasure / "gold")
    (run / ".metrics.jsonl.kept").symlink_to(treasure / "gold")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (run / f".report.html.{os.getpid()}").symlink_to(treasure / "gold")
    (run / "report.html").symlink_to(treasure / "gold")
    tidy(Disk(), run)
    RunFolder(run)
    write_config(run, load_config(TINY).config)
    keep_until(run / "metrics.jsonl", 1)
    assert verb("report", str(run)) == 0
    assert (treasure / "gold").read_text() == "gold" and [path.name for path in treasure.iterdir()] == ["gold"]
    assert not list((run / "checkpoints").glob(".step-*")) and not (run / "report.html").is_symlink()


def test_names_of_texts_stay_inside_the_data_folder(tmp_path: Path) -> None:
    text = "a line of text that is long enough to be some tokens\n" * 200
    for name in ("..;.txt", "a\nb.txt", "-rf.txt", f"{COMMANDS}.txt".replace("/", ""), "$(touch x).txt", "' or '.txt", "...txt"):
        (tmp_path / name).write_text(text)
        config = load_config(TINY, [f"data.dir={tmp_path / 'data'}", "data.validation=0"]).config
        source = config.data.model_copy(update={"source": str(tmp_path / name)})
        prepared = prepare(source, seed=1)
        (store,) = prepared.train
        assert re.fullmatch(r"[a-z0-9-]+", store.folder.parent.name) and store.folder.parent.parent == tmp_path / "data"
    assert all(re.fullmatch(r"[a-z0-9-]+|\.lock", path.name) for path in (tmp_path / "data").iterdir())


def forged(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another manifest of a token store, with a true checksum."""
    body = json.loads((folder / "manifest.json").read_bytes())
    del body["checksum"]
    change(body)

    def spell(tree: dict[str, Any]) -> bytes:
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    (folder / "manifest.json").write_bytes(spell({**body, "checksum": sha256(spell(body)).hexdigest()}))


@pytest.mark.parametrize("name", [*NAMES, "tokens-00000.bin\n"], ids=repr)
def test_names_in_a_token_store_are_those_of_its_files(data: tuple[Config, list[str]], tmp_path: Path, name: str) -> None:
    shutil.copytree(next(Path(data[0].data.dir).glob("skills-*/train")), tmp_path / "train")
    forged(tmp_path / "train", lambda body: body["shards"][0].update(file=name))
    with pytest.raises(DataError, match="contradicts itself"):
        TokenStore(tmp_path / "train")


# --- nothing takes all memory or all time ------------------------------------------------------------------------------------


@contextmanager
def frugal(seconds: float = 2.0, megabytes: int = 200) -> Iterator[None]:
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - begun < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


def test_a_config_of_a_hundred_megabytes_and_aliases_without_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large, laughs, deep = tmp_path / "large.yaml", tmp_path / "laughs.yaml", tmp_path / "deep.yaml"
    with large.open("wb") as file:
        file.truncate(100 << 20)
    laughs.write_text("a: &a [x]\n" + "".join(f"b{n}: &b{n} [{', '.join(['*a' if n == 0 else f'*b{n - 1}'] * 9)}]\n" for n in range(9)))
    deep.write_text("[ " * 100_000)
    for path, told in ((large, "too large"), (laughs, "alias *a"), (deep, "nested deeper")):
        with frugal():
            assert verb("check", str(path)) == 2
        assert told in capsys.readouterr().err


def test_a_claim_of_an_exabyte_is_compared_before_it_is_believed(data: tuple[Config, list[str]], tmp_path: Path) -> None:
    folder, huge = save_small(tmp_path / "run"), 2**60
    tensors = (folder / "rank-00000.safetensors").read_bytes()
    index = json.loads((folder / "rank-00000.json").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_bytes())
    name = next(iter(index["runs"]))
    header = json.dumps({name: {"dtype": "F32", "shape": [huge // 4], "data_offsets": [0, huge]}}).encode()
    claims: list[dict[str, bytes]] = [
        {"rank-00000.safetensors": huge.to_bytes(8, "little") + tensors[8:]},
        {"rank-00000.safetensors": len(header).to_bytes(8, "little") + header},
        {"rank-00000.json": json.dumps(index | {"runs": {name: {"box": [[0, huge]], "start": 0, "stop": huge}}}).encode()},
    ]
    with frugal():
        for claim in claims:
            reseal(folder, claim)
            with pytest.raises(CheckpointError):
                take_up(folder, rows_of(8))
            save_small_again(folder, tensors, index, manifest)
        for change in ({"world": 2**40}, {"rows": [["a.weight", [2**40, 2**40]]]}, {"step": huge}):
            seal(folder, {**manifest, **change})
            with pytest.raises(CheckpointError):
                open_checkpoint(folder)
        shutil.copytree(next(Path(data[0].data.dir).glob("skills-*/train")), tmp_path / "train")
        for key in ("tokens", "documents", "vocab", "text_bytes"):
            forged(tmp_path / "train", lambda body, key=key: body.update({key: huge}))
            if key != "text_bytes":  # a number for the page alone
                with pytest.raises(DataError):
                    TokenStore(tmp_path / "train")


def save_small_again(folder: Path, tensors: bytes, index: dict[str, Any], manifest: dict[str, Any]) -> None:
    (folder / "rank-00000.safetensors").write_bytes(tensors)
    (folder / "rank-00000.json").write_text(json.dumps(index))
    seal(folder, manifest)


@pytest.mark.parametrize(
    "words",
    [
        ("batch.global=1099511627776",),
        ("batch.global=1099511627776", "layout.pp=2", "--draw"),
        ("data.sequence=1099511627776",),
        ("model.layers=20000",),
        ("model.vocab=1099511627776", "model.dim=1099511627776"),
        ("batch.global=720720", "model.heads=720720", "model.dim=720720", "layout.tp=7", "--world", "720720"),
    ],
    ids=lambda words: words[0],
)
def test_check_refuses_in_seconds(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with frugal(seconds=15, megabytes=1500):
        assert verb("check", TINY, *words) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_small(tmp_path / "run")
    for name in ("COMMIT", "manifest.json", "rank-00000.json", "tokenizer.json"):
        before = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        signal.alarm(20)
        assert verb("verify", str(folder)) == verb("sample", str(folder)) == 4
        signal.alarm(0)
        (folder / name).unlink()
        (folder / name).write_bytes(before)
    os.mkfifo(tmp_path / "pipe")
    signal.alarm(20)
    assert verb("check", str(tmp_path / "pipe")) == verb("report", str(tmp_path / "pipe")) == 2
    assert verb("compare", TINY, "dp=1", "--baseline", str(tmp_path / "pipe")) == 2
    signal.alarm(0)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [("verify",), ("sample",), ("report",), ("check",), ("compare", "x"), ("train", TINY, "--resume")])
def test_a_name_that_is_too_long_is_no_bug(words: tuple[str, ...], tmp_path: Path) -> None:
    long = "n" * 5000
    words = (words[0], long, *words[1:]) if words[0] != "train" else (*words, long, "--run-dir", str(tmp_path / "run"))
    assert verb(*words) in (2, 4)


# --- terminals ---------------------------------------------------------------------------------------------------------------


def hostile_commands(home: Path, data: list[str]) -> list[tuple[str, ...]]:
    """Every way by which text of others comes to the terminal."""
    name = home / f"n{COMMANDS}"
    name.mkdir()
    (name / "run.yaml").write_text((ROOT / "configs/tiny.yaml").read_text())
    run, config, bad = name / "run", home / "bad.yaml", name / "bad.jsonl"
    save_small(run)
    escaped = json.dumps(COMMANDS)
    config.write_text(f"{escaped}: 1\nmodel: {{{escaped}: 2, family: {escaped}}}\nsave: {{dir: {escaped}}}\nlayout: {escaped}\n")
    line = {"step": 1, "loss_hex": COMMANDS, "loss": COMMANDS}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n" + COMMANDS + "\n")
    (run / "config.yaml").write_text(COMMANDS)
    bad.write_bytes(COMMANDS.encode() + b"\n" + json.dumps({COMMANDS: 1}).encode() + b"\n")
    broken = home / "comparison.json"
    broken.write_text(json.dumps({"layouts": [{"given": COMMANDS}]}))
    (home / "tokenizer.json").write_text(json.dumps({COMMANDS: COMMANDS}))
    return [
        ("check", str(name / "run.yaml"), "--explain", "--draw-to", str(name / "x.svg"), "layout.pp=2"),
        ("check", str(name / "run.yaml"), "--draw-to", str(name / "no" / "x.svg")),
        ("check", str(config)), ("check", str(name)), ("check", str(name / "absent")), ("check", TINY, "--layout", COMMANDS),
        ("check", TINY, f"{COMMANDS}=1"), ("check", TINY, f"model.family={COMMANDS}"), ("check", TINY, f"data.source={COMMANDS}"),
        ("check", TINY, f"data.tokenizer={{kind: file, path: {home / 'tokenizer.json'}}}"),
        (COMMANDS,), ("train", TINY, f"--{COMMANDS}"), ("check", TINY, "--world", COMMANDS), ("data", COMMANDS),
        ("train", str(config)), ("train", TINY, "--resume", str(name / "no")),
        ("train", TINY, "--resume", "auto", "--run-dir", str(home / "no")),
        ("train", TINY, "--profile", COMMANDS), ("data", "build", TINY, f"data.source={home / '*' / '*.jsonl'}", data[0]),
        ("verify", str(run)), ("verify", str(name)), ("sample", str(name)), ("sample", str(run), "--prompt", COMMANDS),
        ("report", str(run)), ("report", str(name)), ("report", str(broken)), ("report", str(name / "bad.jsonl")),
        ("compare", str(run), str(run)), ("compare", TINY, COMMANDS), ("compare", TINY, "dp=1", "--baseline", str(bad)),
        ("compare", TINY, "dp=1", "--reference", COMMANDS), ("tokenizer", "report", str(name)), ("bench", COMMANDS),
        ("tokenizer", "train", str(bad), "--out", str(name / "out")), ("doctor",),
    ]  # fmt: skip


def test_terminals_get_no_command(data: tuple[Config, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in hostile_commands(tmp_path, data[1]):
        code = verb(*words)
        out, err = capsys.readouterr()
        assert clean(out) and clean(err), (words, out, err)
        assert len(err.splitlines()) <= 12 and "Traceback" not in err and code != 1, (words, code, err)


def test_progress_and_baselines_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    from dist_llm.cli import bench, compare

    for progress in (compare.Progress(False), bench.Progress(False)):
        with progress:
            progress.say(f"data: reading {COMMANDS}[/nonsense]")
    found = {"layouts": [], "reference": "dp=1"}
    _, notes = compare._held_against({"layouts": [{"layout": COMMANDS, "given": COMMANDS, "equal": True}]}, found, Path("x"))
    compare._show(found, Path(COMMANDS), notes, as_json=False)
    out, err = capsys.readouterr()
    assert clean(out) and clean(err) and "[/nonsense]" in err and "not in the baseline" in out


# --- pages -------------------------------------------------------------------------------------------------------------------


def hostile_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    steps = [
        {"step": n, "loss": 3 - n / 9, "grad_norm": MARKUP, "tokens": MARKUP, MARKUP: MARKUP, "step_seconds": [MARKUP]} for n in range(1, 9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (folder / "config.yaml").write_text(f"save: {{dir: {json.dumps(MARKUP)}}}\n")
    samples = [{"step": MARKUP, "prompt": MARKUP, "text": MARKUP + " and more"}, {"step": 2, "prompt": "", "text": COMMANDS}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def assert_inert(page: Page) -> None:
    """Only tags of ours, no way out, and a policy under which no request can be made."""
    assert not {"img", "iframe", "link", "object", "embed", "base", "form", "a", "svg"} & {tag for tag, _ in page.tags}
    assert not any(
        name.startswith("on") or name in ("src", "href", "srcset", "style", "action") for _, attrs in page.tags for name in attrs
    )
    rules = {rule.split()[0]: rule.split()[1:] for rule in page.policy().split(";")}
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"] and "connect-src" not in rules
    assert all(source.startswith("'sha256-") for source in rules["script-src"]) and "http" not in page.policy()


def test_a_run_page_shows_what_others_wrote_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hostile_run(tmp_path / MARKUP.replace("/", "∕"))
    assert verb("report", str(folder)) == 0
    page = Page(folder / "report.html")
    assert_inert(page)
    assert page.words.count(MARKUP) >= 2 and json.dumps(MARKUP) in page.words and folder.name in page.words and "49" not in page.words
    assert clean(re.sub("<script>.*</script>", "", page.source, flags=re.DOTALL)), "control characters"
    assert sum(tag == "script" for tag, _ in page.tags) == 3


def test_a_comparison_page_shows_what_others_wrote_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = EXAMPLE["layouts"][1] | {"layout": MARKUP, "given": MARKUP, "engine": MARKUP, "error": MARKUP, "equal": False}
    proof = {"model": MARKUP, "dtype": MARKUP, "steps": MARKUP, "reference": MARKUP}
    found = {**EXAMPLE, "reference": MARKUP, "command": MARKUP, "when": MARKUP, "environment": {MARKUP: MARKUP}}
    (tmp_path / "comparison.json").write_text(json.dumps({**found, "layouts": [row | {"proof": proof}, EXAMPLE["layouts"][0]]}))
    assert verb("report", str(tmp_path)) == 0
    page = Page(tmp_path / "report.html")
    assert_inert(page)
    assert page.words.count(MARKUP) >= 4 and "49" not in re.sub(r"\d\d\d+", "", page.words.split("How to reproduce")[1])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the pages are checked as text alone")
def test_a_browser_shows_it_as_text_and_asks_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = hostile_run(tmp_path / "run")
    assert verb("report", str(folder)) == 0
    log = tmp_path / "net.json"
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-gpu"]
    quiet += ["--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--virtual-time-budget=500"]
    command = [str(CHROMIUM), "--headless", *quiet, "--dump-dom", (folder / "report.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>Training run run</title>" in dom and dom.count("js-plotly-plot") >= 1
    assert dom.count(html.escape(MARKUP, quote=False)) >= 2 and "<img" not in dom
    assert log.stat().st_size > 10_000 and "owned.invalid" not in log.read_text(), "a request"


# --- secrets -----------------------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_" + "Q7" * 17,
    "WANDB_API_KEY": "0badc0de" * 5,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI" + "K7MDENGbPxRfiCY" * 2,
    "PASSWORD_IN_URL": "correct-horse-battery",
}
LEAKS = (
    (f"data.source=https://me:{SECRETS['PASSWORD_IN_URL']}@example.org/x",),
    ("--data", f"https://me:{SECRETS['PASSWORD_IN_URL']}@example.org/x"),
    ("--run-dir", SECRETS["HF_TOKEN"]),
    (f"track.hf_token={SECRETS['HF_TOKEN']}",),
    (f"track.wandb_api_key={SECRETS['WANDB_API_KEY']}",),
    (f"aws_secret_access_key={SECRETS['AWS_SECRET_ACCESS_KEY']}",),
    (f"track={{wandb: true, api_key: {SECRETS['WANDB_API_KEY']}}}",),
    ("--resume", f"https://me:{SECRETS['PASSWORD_IN_URL']}@example.org/run"),
)


def test_a_secret_in_a_word_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for words in LEAKS:
        for rest in ((), ("--json",)) if "--" not in words[0] else ((),):
            assert verb("check" if "--" not in words[0] else "train", TINY, *words, *rest) in (2, 4), words
        out, err = capsys.readouterr()
        assert not [name for name, value in SECRETS.items() if value in out + err], (words, out, err)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []
    for text in (
        "data.tokenizer: hash 12ab",
        "tokens=3",
        "8 heads over tp=3",
        "s3://bucket/key@v1",
        "https://host:80/x",
        "no key 'secret'",
    ):
        assert redacted(text) == text and not holds_secret(text)
    assert plain("x" * 20 + f" hf_{'a' * 34}").endswith(" ***")


@pytest.fixture(scope="module")
def watched(data: tuple[Config, list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, set[str]]:
    """(folder, what was said, addresses at which it listened) of a run of two ranks with secrets around it.

    Where it can be, the machine's name leads to an address that others could reach, as it does on most servers.
    """
    home = tmp_path_factory.mktemp("watched")
    words = ["--nproc", "2", "--steps", "6", "--save-every", "3", "--run-dir", str(home / "run"), "track.sample_every=3", *data[1]]
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**kept, **SECRETS, "OMP_NUM_THREADS": "1", "TMPDIR": str(home)}
    command = [sys.executable, "-m", "dist_llm", "train", TINY, *words]
    if address := lan_address():
        command = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', address, *command]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process, addresses, most = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes), set[str](), 0
    while process.poll() is None:
        here = family(process.pid)
        addresses, most = addresses | listening(here), max(most, len(here))
        time.sleep(0.02)
    said = process.stdout.read() if process.stdout else b""
    assert process.returncode == 0 and most >= 3, said
    return home, said, addresses


def test_a_run_leaks_no_secret(watched: tuple[Path, bytes, set[str]]) -> None:
    """Neither in what it says nor in what it leaves."""
    home, said, _ = watched
    paths = [path for path in home.rglob("*") if path.is_file()]
    assert len(paths) > 10
    for path in paths:
        assert not [name for name, value in SECRETS.items() if value.encode() in path.read_bytes()], path
    assert not [name for name, value in SECRETS.items() if value.encode() in said]


def test_local_ranks_open_no_port_to_others(watched: tuple[Path, bytes, set[str]]) -> None:
    assert watched[2] <= set(LOOPBACK), watched[2]


def test_local_ranks_are_told_to_stay_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TRANSPORTS:
        monkeypatch.delenv(name, raising=False)
    stay_on_loopback()
    assert {os.environ[name] for name in TRANSPORTS} <= {"lo", "lo0"}
    monkeypatch.setenv(TRANSPORTS[0], "eth7")
    stay_on_loopback()
    assert os.environ[TRANSPORTS[0]] == "eth7"
    for name in TRANSPORTS:
        monkeypatch.delenv(name, raising=False)
