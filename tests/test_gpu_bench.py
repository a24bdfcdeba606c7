"""benchmarks/gpu.py: parts that fail, budgets, and the whole of it in miniature on a CPU."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_titan, gpu_work
from benchmarks.gpu import LEAST, PARTS, Part, apart, measure
from dist_llm.config.layout import Layout
from dist_llm.config.rules import problems
from dist_llm.config.schema import ModelConfig

QUIET: dict[str, Any] = {"say": lambda text: None}


def test_a_part_that_fails_is_noted_and_the_next_one_runs() -> None:
    outcomes = {"a": {"error": "out of memory"}, "b": {"result": {"x": 1}}}
    found = measure([Part("a", 9, ""), Part("b", 9, "")], lambda part, seconds: outcomes[part.name], seconds=100.0, **QUIET)
    assert [(one["name"], one.get("error"), one.get("result")) for one in found] == [("a", "out of memory", None), ("b", None, {"x": 1})]


def test_parts_get_their_own_time_and_no_more_than_is_left() -> None:
    given: list[float] = []

    def run(part: Part, seconds: float) -> dict[str, Any]:
        given.append(seconds)
        time.sleep(0.02)
        return {}

    found = measure([Part(str(at), 30, "") for at in range(3)], run, seconds=LEAST + 0.03, **QUIET)
    assert len(given) == 2 and all(seconds <= LEAST + 0.03 for seconds in given)
    assert found[2]["error"].startswith("not begun")
    measure([Part("short", 5, "")], run, seconds=100.0, **QUIET)
    assert given[-1] == 5


def test_one_call_stays_under_eight_minutes() -> None:
    """Whatever the parts do: their sum is bounded by the call's own seconds."""
    assert gpu.TOTAL + 5 < 480 and len({part.name for part in PARTS}) == len(PARTS)


def test_a_process_that_dies_or_hangs() -> None:
    found = apart(Part("no such part", 20, ""), 60.0, "cpu", True)
    assert "StopIteration" in found["error"] and "Traceback" in found["stderr"]
    assert apart(PARTS[0], 0.05, "cpu", True)["error"] == "not done after 0 s"


@pytest.mark.parametrize("part", [part for part in PARTS if part.what == "ours"], ids=lambda part: part.name)
def test_our_configs_are_legal(part: Part) -> None:
    job = gpu_work.Job(part.preset, part.sequence, part.micro, depth=part.depth, vocab=part.vocab, runtime=part.runtime)
    config = job.config(torch.device("cuda"), job.model())
    assert problems(config, Layout()) == []
    assert config.model.dim == {"llama-1b": 2048, "llama3-8b": 4096}[part.preset]


def test_depth_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """8B blocks of 218 M parameters beside 18 bytes of state each."""
    job = gpu_work.Job("llama3-8b", 4096, 2, depth=0, vocab=2048)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 2**30, 80 * 2**30))
    depth = gpu_work.fitting_depth(job.model(), 8192, torch.device("cuda"))
    assert depth * (218_112_000 * 18 + 16 * 8192 * 4096 * 2) < 79 * 2**30 - gpu_work.SPARE and 12 <= depth <= 18
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 80 * 2**30))
    assert gpu_work.fitting_depth(job.model(), 8192, torch.device("cuda")) == 1


def test_the_same_lines_in_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ours in bfloat16 and in 8 bits, one after the other, each in its process; the result is kept."""
    for only in ("1b, ours, eager", "8b blocks, ours, tensorwise"):
        assert gpu.main(["--device", "cpu", "--only", only, "--out", str(tmp_path / only[:2])]) == 0
        (path,) = (tmp_path / only[:2]).iterdir()
        result = json.loads(path.read_text())
        part = result["parts"][0]
        assert result["device"] == "cpu" and result["quick"] and part["name"] == only, part
        assert part["result"]["tokens_per_second"] > 0 and part["result"]["losses"][-1] < part["result"]["losses"][0]
    assert "tokens/s" in capsys.readouterr().out


def test_torchtitan_in_miniature_or_named_as_missing() -> None:
    """Where it is installed, its model has as many weights as ours counts, and learns; elsewhere the entry says what is missing."""
    found = apart(next(part for part in PARTS if part.name == "8b blocks, torchtitan, compiled"), 120.0, "cpu", True)
    if find_spec("torchtitan") is None:
        assert found["error"].startswith("ModuleNotFoundError: torchtitan is not installed"), found
        return
    result = found["result"]
    assert result["weights"] == result["parameters"] and result["cut"] == [] and result["tokens_per_second"] > 0, found
    assert result["losses"][-1] < result["losses"][0]


def test_torchtitan_has_fewer_blocks_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A depth that was to fit shrinks by a quarter; one that was asked for stays, and the error passes."""

    def train(device: torch.device, job: gpu_work.Job, model: ModelConfig, *, compiled: bool) -> dict[str, Any]:
        if model.layers > 8:
            raise torch.OutOfMemoryError("no memory")
        return {"layers": model.layers}

    monkeypatch.setattr(gpu_titan, "_open_packages", lambda: None)
    monkeypatch.setattr(gpu_titan, "_train", train)
    job = gpu_work.Job("llama3-8b", 4096, 2, depth=0, vocab=2048)
    monkeypatch.setattr(gpu_titan, "fitted", lambda job, device: replace(job, depth=14).model())
    found = gpu_titan.train_torchtitan(torch.device("cpu"), job, compiled=False)
    assert (found["layers"], found["cut"]) == (7, [14, 10])
    with pytest.raises(torch.OutOfMemoryError):
        gpu_titan.train_torchtitan(torch.device("cpu"), replace(job, depth=14), compiled=False)


@pytest.mark.long
@pytest.mark.parametrize("name", ["ceiling", "8b ends", "stages", "shared", "1b, transformers, eager"])
def test_the_other_parts_in_miniature(name: str) -> None:
    part = next(part for part in PARTS if part.name == name)
    found = apart(part, 120.0, "cpu", True)
    assert "result" in found, found
    if name == "shared":
        assert all(row["equal"] for row in found["result"]["rows"].values()), found


@pytest.mark.parametrize(("words", "said"), [([], "no CUDA device here"), (["--device", "cpu", "--only", "9b"], "'9b'")])
def test_what_cannot_be_measured_is_refused_and_leaves_no_result(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "has_device", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([*words, "--out", str(tmp_path)])
    assert ended.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())
