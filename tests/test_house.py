"""The house: which room may know which, what may be imported where, and how large a file may grow."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.engine_cases import build, config, layout_of

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "dist_llm").rglob("*.py"))

# From what everybody may use to what uses everything. A module knows its own room and the rooms of the lines above it,
# never another room of its own line. The longest name that fits a module is its room.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "flight", "stop", "strict", "__version__"),
    ("faults", "meeting", "watch", "sidefiles"),
    ("config", "schedule"),
    ("model.table",),
    ("model.cost", "sharding", "interop.kinds", "interop.safe_file"),
    ("model.stages", "parallel.flat", "interop.families"),
    ("interop.hugging_face",),  # to here: no torch
    ("staging", "shm", "random"),
    ("mesh",),
    ("comm", "ranks"),
    ("model",),
    ("parallel", "data", "interop.slices"),
    ("engines", "infer"),
    ("train",),
    ("interop",),
    ("plan", "report", "use"),
    ("compare",),
    ("cli",),
    ("__main__",),
)
# Inside parallel/: strategies never import each other, only compose knows all.
STRATEGIES: tuple[tuple[str, ...], ...] = (
    ("flat", "operation"),
    ("across", "weights"),
    ("tensor", "zero", "quantized", "recompute", "correction"),
    ("adapted", "compiled", "pipeline", "magnitudes"),
    ("compiled_adapted",),
    ("compose",),
)
DISTRIBUTED = {"mesh.py", "comm.py", "engines/ddp.py", "engines/fsdp2.py", "engines/deepspeed.py", "engines/whole.py"}
WITHOUT_TORCH = (
    "errors",
    "flight",
    "meeting",
    "stop",
    "faults",
    "watch",
    "config",
    "schedule",
    "model.table",
    "model.cost",
    "sharding",
    "parallel.flat",
    "strict",
    "sidefiles",
    "interop.kinds",
    "interop.families",
    "interop.safe_file",
    "interop.hugging_face",
    "train.base",
    "train.durable",
    "train.folder",
    "train.preflight",
    "plan",
    "report",
    "cli.main",
    "cli.check",
)
# The road from the command line to optimizer.step (docs/architecture.md), and what lies beside it.
ROAD = (
    "cli/train.py", "train/run.py", "train/fit.py", "train/trainer.py", "engines/native.py", "parallel/pipeline.py", "parallel/zero.py",
    "comm.py", "engines/optim.py",
)  # fmt: skip
LAUNCH = {"cli/main.py", "ranks.py"}  # how a verb is found and ranks are forked: no part of a step
BESIDE = {
    "the model": {
        *("model/transformer.py", "model/parts.py", "model/kernels.py", "model/products.py", "model/loss.py", "model/roles.py"),
        *("model/fused.py", "model/attention.py", "model/rotary.py", "parallel/tensor.py"),
    },
    "the batch": {"data/batches.py", "train/proof.py", "random.py"},
    "what is noted": {"flight.py", "train/nonfinite.py"},
    "small tables": {
        "model/table.py",
        "mesh.py",
        "config/layout.py",
        "sharding.py",
        "parallel/flat.py",
        "schedule/actions.py",
        "train/learning_rate.py",
    },
    "weights and gradients that a unit holds": {"parallel/weights.py", "model/sums.py"},
}


@cache
def tree(file: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(file.read_text())


def module_of(file: Path) -> str:
    """`config.layout` for dist_llm/config/layout.py."""
    return ".".join(file.relative_to(ROOT / "dist_llm").with_suffix("").parts)


MODULES = {module_of(file).removesuffix(".__init__"): file for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """Every module a file imports anywhere, ours by their names inside the package."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("dist_llm.") in (*MODULES, "__version__") else str(node.module)


def room(module: str) -> tuple[int, str]:
    """(layer, room) of a module."""
    fits = [
        (len(name), layer, name) for layer, names in enumerate(LAYERS) for name in names if module == name or module.startswith(name + ".")
    ]
    assert fits, f"{module} has no place in LAYERS"
    return max(fits)[1:]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_dependencies_point_one_way(file: Path) -> None:
    module = module_of(file)
    if module == "__init__":
        assert not any(name.startswith("dist_llm") for name in imports(file))
        return
    layer, mine = room(module.removesuffix(".__init__"))
    for name in imports(file):
        if not name.startswith("dist_llm."):
            continue
        other_layer, other = room(name.removeprefix("dist_llm."))
        assert other == mine or other_layer < layer, f"{module} ({mine}) imports {name} ({other})"


def test_strategies_do_not_know_each_other() -> None:
    for layer, names in enumerate(STRATEGIES):
        for name in names:
            known = {
                module.rsplit(".", 1)[1] for module in imports(ROOT / f"dist_llm/parallel/{name}.py") if "dist_llm.parallel." in module
            }
            assert known <= {lower for group in STRATEGIES[:layer] for lower in group}, (name, known)
    assert {name for group in STRATEGIES for name in group} == {file.stem for file in (ROOT / "dist_llm/parallel").glob("*.py")} - {
        "__init__"
    }


def test_torch_distributed_is_imported_in_few_places() -> None:
    users = {
        str(file.relative_to(ROOT / "dist_llm")) for file in FILES if any(name.startswith("torch.distributed") for name in imports(file))
    }
    assert users <= DISTRIBUTED, users - DISTRIBUTED
    for file in FILES:
        hidden = [node for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"]
        assert not hidden, f"{file}: torch.distributed without importing it"


def test_modules_that_promise_it_import_no_torch() -> None:
    names = [f"dist_llm.{module}" for module in MODULES if any(module == name or module.startswith(name + ".") for name in WITHOUT_TORCH)]
    assert len(names) > 25
    script = f"import sys\nfor name in {names!r}: __import__(name)\nprint(sorted({{'torch', 'deepspeed'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_environment_is_read_at_the_edge() -> None:
    """In cli/ and launch/ only. engines/deepspeed_package.py sets what DeepSpeed takes from nowhere else, and reads nothing."""
    for file in FILES:
        place = str(file.relative_to(ROOT / "dist_llm"))
        if place.startswith("cli/"):
            continue
        nodes = list(ast.walk(tree(file)))
        written = [node.value for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)]
        for node in nodes:
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv"):
                assert place == "engines/deepspeed_package.py" and node in written, f"{place}:{node.lineno}"


def test_nothing_runs_what_it_reads() -> None:
    """No pickle, eval, exec, shell, or torch.load."""
    forbidden = {"eval", "exec", "pickle.loads", "pickle.load", "torch.load", "os.system", "os.popen"}
    for file in FILES:
        assert not {"pickle", "cPickle", "dill", "marshal", "shelve"} & set(imports(file)), file
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in forbidden, f"{file}:{node.lineno}"
                assert not any(word.arg == "shell" for word in node.keywords), f"{file}:{node.lineno}"


def test_files_stay_short() -> None:
    paths = [*FILES, *(ROOT / "tests").glob("*.py"), *(file for file in (ROOT / "launch").iterdir() if file.is_file())]
    long = {str(path.relative_to(ROOT)): lines for path in paths if (lines := len(path.read_text().splitlines())) > 600}
    assert not long


def test_packages_have_empty_doors() -> None:
    """An import of one module never brings its neighbours."""
    assert all(not file.read_text().strip() for file in FILES if file.name == "__init__.py" and file.parent != ROOT / "dist_llm")


def test_what_is_public_says_what_it_is() -> None:
    silent = []
    for file in FILES:
        if file.name == "__init__.py" and not file.read_text().strip():
            continue
        silent += [] if ast.get_docstring(tree(file)) else [str(file)]
        tops = [node for node in tree(file).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        inner = [node for top in tops if isinstance(top, ast.ClassDef) and not top.name.startswith("_") for node in top.body]
        for node in [*tops, *inner]:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not silent


def test_ruff_is_clean() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


def test_mypy_is_clean() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


def test_traps_name_tests_that_exist() -> None:
    """docs/traps.md: every test it points to is there."""
    text = (ROOT / "docs/traps.md").read_text()
    named = set(re.findall(r"`(test_\w+)(?:::(\w+))?`", text))
    assert len(named) > 15
    for file, function in named:
        path = ROOT / f"tests/{file}.py"
        assert path.exists(), f"docs/traps.md names {path.name}"
        assert not function or f"def {function}(" in path.read_text(), f"docs/traps.md names {file}::{function}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    lines = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE).splitlines()
    titles = [line.lstrip("#").strip() for line in lines if re.match(r"#{1,6} ", line)]
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    """Files, pictures and headings that a page points to are there."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def files_of_a_step() -> set[str]:
    """The files of ours in which a line runs during one Trainer.step of one process."""
    _, _, trainer = build(config(tied=True), vars(layout_of("dp=1")), 0, "float32")
    trainer.step(0)
    seen: set[str] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> None:
        seen.add(frame.f_code.co_filename)

    sys.settrace(trace)
    try:
        trainer.step(1)
    finally:
        sys.settrace(None)
    ours = ROOT / "dist_llm"
    return {str(Path(name).relative_to(ours)) for name in seen if name.startswith(str(ours))}


STACKS = """
import json, os, sys, traceback
from pathlib import Path
import torch
from dist_llm.cli import main

def noting(where, name):
    call = getattr(where, name)
    def noted(*words, **more):
        stack = [frame.filename for frame in traceback.extract_stack()]
        (Path(sys.argv[1]) / f"{name}-{os.getpid()}.json").write_text(json.dumps(stack))
        return call(*words, **more)
    setattr(where, name, noted)

noting(torch, "_fused_adamw_")
noting(torch.distributed, "all_to_all_single")
sys.exit(main.run(sys.argv[2:]))
"""


def test_the_road_from_the_command_line_is_nine_files(tmp_path: Path) -> None:
    """What is on the stack of a real `train` where gradients leave a rank and where weights are updated."""
    words = ["configs/tiny.yaml", "--layout", "dp=2,zero=2", "--steps", "2", "--run-dir", str(tmp_path / "run")]
    words += ["runtime.shared_memory=false", "runtime.device=cpu", f"data.dir={tmp_path / 'data'}", "data.max_tokens=20_000"]
    command = [sys.executable, "-c", STACKS, str(tmp_path), "train", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    stacks = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(stacks) == 4, "two places on two ranks"
    ours = str(ROOT / "dist_llm") + "/"
    seen = {name.removeprefix(ours) for stack in stacks for name in stack if name.startswith(ours)}
    assert seen == {*ROAD, *LAUNCH}


def test_a_step_is_readable_in_nine_files() -> None:
    """From the command line to optimizer.step: nine files. Every other file that runs is the model, the batch or a small table."""
    run = files_of_a_step()
    assert len(ROAD) == 9 and all((ROOT / "dist_llm" / name).exists() for name in ROAD)
    assert set(ROAD[3:]) <= run  # the first three come before the step
    beside = {name for names in BESIDE.values() for name in names}
    assert run <= set(ROAD) | beside, sorted(run - set(ROAD) - beside)
