"""The scripts of launch/, and that README and docs say what is there."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from dist_llm.cli import main
from dist_llm.config.load import KNOWN, flat
from dist_llm.config.rules import NOT_AVAILABLE
from dist_llm.config.schema import Config
from dist_llm.config.yaml_file import flow
from dist_llm.errors import Code

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for path in [*(ROOT / "launch").iterdir(), ROOT / ".ci/run"] if path.is_file())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BASH = shutil.which("bash") or "bash"


# --- scripts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run([BASH, "-n", script], check=True)
    if script.name != "lib.sh":
        assert os.access(script, os.X_OK) and script.read_text().startswith("#!/usr/bin/env bash\n")


def test_ci_runs_the_tests() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[-1] == "exec ./launch/test" and "set -eu" in lines


def test_quickstart_explains_itself_and_refuses_what_it_does_not_know() -> None:
    told = subprocess.run([ROOT / "launch/quickstart", "--help"], capture_output=True, text=True, check=True)
    assert told.stdout.startswith("usage: ./launch/quickstart") and not told.stderr
    refused = subprocess.run([ROOT / "launch/quickstart", "--fast"], capture_output=True, text=True)
    assert refused.returncode == Code.USAGE and "usage:" in refused.stderr


@pytest.mark.parametrize("script", ["torchrun-one-node", "torchrun-many-nodes"])
def test_recipes_say_what_they_take(script: str) -> None:
    told = subprocess.run([ROOT / "launch" / script], capture_output=True, text=True)
    assert told.returncode == Code.USAGE and told.stderr.startswith(f"usage: ./launch/{script}")


def test_many_nodes_gives_torchrun_its_words(tmp_path: Path) -> None:
    home = tmp_path / "repository"
    (home / "launch").mkdir(parents=True)
    (home / ".venv/bin").mkdir(parents=True)
    shutil.copy(ROOT / "launch/torchrun-many-nodes", home / "launch")
    _stub(home / ".venv/bin/torchrun", 'echo "$@"')
    call = [home / "launch/torchrun-many-nodes", "4", "node0", "a.yaml", "--layout", "tp=2"]
    told = subprocess.run(call, capture_output=True, text=True, check=True, env={**os.environ, "RANKS": "8", "JOB": "7"})
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id 7"
    assert told.stdout.strip() == f"--nnodes 4 --nproc-per-node 8 {rendezvous} -m dist_llm train a.yaml --layout tp=2"


# --- lib.sh, with a Python that only writes down what it is asked ---------------------------------------------------------

STUB = """echo "$*" >> calls
case "$*" in
  -) exit "${HAS_TORCH:-1}" ;;
  *"pip index versions torch"*) echo "Available versions: $OFFERED" ;;
  *--index-url*) exit "${NO_CPU_INDEX:-0}" ;;
esac
"""


def _stub(path: Path, body: str) -> None:
    path.write_text(f"#!{BASH}\n{body}\n")
    path.chmod(0o755)


def _install_torch(home: Path, *, nvidia: bool = False, **variables: str) -> tuple[str, list[str]]:
    """(what lib.sh says, pip install calls) of one install_torch."""
    (home / ".venv/bin").mkdir(parents=True)
    (home / "constraints.txt").write_text("numpy==2\ntorch==9.8.7\n")
    _stub(home / ".venv/bin/python", STUB)
    script = f". {ROOT / 'launch/lib.sh'}; has_nvidia() {{ {'true' if nvidia else 'false'}; }}; set -euo pipefail; install_torch"
    environment = {"PATH": os.environ["PATH"], "OFFERED": "9.9.0, 9.8.7, 9.8.6", **variables}
    done = subprocess.run([BASH, "-c", script], cwd=home, env=environment, capture_output=True, text=True, check=True)
    calls = (home / "calls").read_text().splitlines()
    return done.stdout, [call for call in calls if "pip install" in call]


def test_torch_that_is_there_is_left_alone(tmp_path: Path) -> None:
    assert _install_torch(tmp_path, HAS_TORCH="0") == ("", [])


def test_a_cpu_build_that_pip_can_find_is_taken(tmp_path: Path) -> None:
    said, calls = _install_torch(tmp_path, OFFERED="9.9.0, 9.8.7+cpu, 9.8.7")
    assert calls == ["-m pip install -qq torch==9.8.7+cpu"] and "GB" not in said


def test_a_cpu_build_of_another_version_is_not_taken(tmp_path: Path) -> None:
    _, calls = _install_torch(tmp_path, OFFERED="19.8.7+cpu, 9.8.71+cpu, 9.8.7")
    assert not any("+cpu" in call for call in calls)


def test_the_cpu_index_is_asked_first_and_not_for_long(tmp_path: Path) -> None:
    _, calls = _install_torch(tmp_path)
    (call,) = calls
    assert call.startswith("-m pip install -qq --index-url https://download.pytorch.org/whl/cpu --timeout 5 --retries 0 torch==9.8.7")


def test_the_size_is_said_before_gigabytes_come(tmp_path: Path) -> None:
    said, calls = _install_torch(tmp_path, NO_CPU_INDEX="1")
    assert calls[-1] == "-m pip install -qq torch==9.8.7" and len(calls) == 2
    assert "2 to 3 GB to download" in said.splitlines()[-1]


def test_with_an_nvidia_device_cuda_is_installed(tmp_path: Path) -> None:
    said, calls = _install_torch(tmp_path, nvidia=True)
    assert calls == ["-m pip install -qq torch==9.8.7"] and "2 to 3 GB to download" in said


def test_no_new_python_ends_in_one_message(tmp_path: Path) -> None:
    _stub(tmp_path / "python3", "exit 1")
    os.symlink(shutil.which("uname") or "/bin/uname", tmp_path / "uname")
    script = f". {ROOT / 'launch/lib.sh'}; find_python"
    told = subprocess.run([BASH, "-c", script], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert told.returncode == Code.USAGE
    assert told.stderr.splitlines()[0] == "error: no Python 3.11 or newer was found"
    assert "PYTHON=" in told.stderr


def test_constraints_cover_what_the_project_needs() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    sections = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M), re.search(r"^test = \[(.*?)\]", text, re.M)
    wanted = {name.lower() for found in sections if found for name in re.findall(r'"([A-Za-z0-9_.-]+)', found[1])}
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"torch", "pytest"} <= wanted <= pinned


# --- pages ---------------------------------------------------------------------------------------------------------------


def _commands() -> list[tuple[str, str]]:
    """(page, command) of every line in a bash block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line) for line in lines if line.strip() and not line.startswith("#")]
    return found


@pytest.mark.parametrize(("page", "command"), _commands(), ids=lambda text: text[:60])
def test_commands_of_the_pages_exist(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    for word in words:
        if re.match(r"(\./launch|launch|configs|docker|tests)/", word):
            assert (ROOT / word).exists(), word
    starts = [at for at, word in enumerate(words) if word.split("/")[-1] in ("dist-llm", "dist_llm") and (at == 0 or words[at - 1] == "-m")]
    for at in starts:
        verb, *rest = words[at + 1 :]
        command_object = _verb(verb)
        if hasattr(command_object, "commands"):
            command_object = command_object.commands[rest[0]]
        flags = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert flags <= _flags(command_object) | {"--debug", "--help"}, flags


def test_what_a_reader_types_first_runs_with_any_number_of_gpus() -> None:
    """A reader with one GPU has two CPU ranks too: NCCL would refuse to share it."""
    lines = [command for page, command in _commands() if page in ("README.md", "quickstart.md")]
    lines += (ROOT / "launch/quickstart").read_text().splitlines()
    several = [line for line in lines if re.search(r"dist.llm\S* (compare \S*(quickstart.yaml|CONFIG)|train .*--nproc 2)", line)]
    assert len(several) >= 5 and all("runtime.device=cpu" in line for line in several), several


def _verb(name: str):
    assert name in main.VERBS, name
    group = typer.main.get_command(main.app)
    return group.get_command(None, name)


def _flags(command) -> set[str]:
    return {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}


def _reference() -> str:
    return (ROOT / "docs/reference.md").read_text()


@pytest.mark.parametrize("verb", main.VERBS)
def test_every_flag_is_in_the_reference(verb: str) -> None:
    command = _verb(verb)
    parts = {f"{verb} {name}": part for name, part in command.commands.items()} if hasattr(command, "commands") else {verb: command}
    for name, part in parts.items():
        row = re.search(rf"^\| `{name}` \|(.*--.*)$", _reference(), re.M)
        assert row, name
        told = {flag for flag in re.findall(r"--[a-z-]+", row[1]) if flag != "--"}
        assert told == _flags(part) - {"--help"}


def test_every_config_key_is_in_the_reference_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(base|[a-z]+\.[a-z0-9_.]+)` \| `([^`]*)` \|", _reference(), re.M))
    values = flat(Config.model_validate({"model": {}}))
    assert set(rows) == set(KNOWN)
    assert rows == {name: flow(value).strip('"') for name, value in values.items()}


def test_every_exit_code_is_in_the_reference() -> None:
    section = _reference().split("## Exit codes")[1].split("\n## ")[0]
    told = {int(number) for cell in re.findall(r"^\| ([\d, ]+) \|", section, re.M) for number in cell.split(",")}
    assert told == {int(code) for code in Code}


def test_what_is_not_available_is_on_the_layouts_page() -> None:
    section = (ROOT / "docs/layouts.md").read_text().split("## Not in this version")[1].split("\n## ")[0]
    told = {line[2:] for line in section.splitlines() if line.startswith("- ")}
    assert told == {name for key, _, name in NOT_AVAILABLE if key.startswith("layout.")}


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https:"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_pages_name_exist(page: Path) -> None:
    for path in re.findall(r"`((?:dist_llm|launch|configs|tests|docs|docker)/[\w./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


# --- the whole thing -----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_quickstart_from_a_fresh_copy(tmp_path: Path) -> None:
    """Needs what a fresh machine needs: packages. Ends with a table in which every row is equal."""
    home = tmp_path / "fresh"
    left_out = shutil.ignore_patterns(".venv", "runs", ".git", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, home, ignore=left_out)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([home / "launch/quickstart"], env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    comparison = json.loads((home / "runs/quickstart/compare/comparison.json").read_text())
    assert len(comparison["layouts"]) >= 10 and all(row["equal"] for row in comparison["layouts"])
    assert all(row["bytes_exact"] for row in comparison["layouts"] if row["engine"] == "native")
    assert "sample at step 0:" in done.stdout and "sample at step 280:" in done.stdout
    assert (home / "runs/quickstart/compare/report.html").stat().st_size > 100_000
    assert done.stdout.splitlines()[-3].startswith("next ")
    before, after = (answers_of(done.stdout, step) for step in (0, 3000))
    assert set(before) == set(after) == {"copy", "reverse", "brackets", "sort", "add", "all"} and before["all"] < 0.05
    learned = [after[task] for task in ("copy", "reverse", "brackets", "sort")]
    assert min(learned) >= 0.8 and sum(learned) / 4 >= 0.9, after


def answers_of(told: str, step: int) -> dict[str, float]:
    """The share of right answers by task, as the terminal shows them."""
    table = told.split(f"right answers at step {step},", 1)[1].split("\n", 1)[1]
    rows = (re.match(r"  (\w+) +(\d+) of (\d+) ", line) for line in table.splitlines())
    return {row[1]: int(row[2]) / int(row[3]) for row in itertools.takewhile(bool, rows) if row}
