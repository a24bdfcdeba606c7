"""`dist-llm compare`: the contract of comparison.json, exact bytes, what is refused, baselines, two runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dist_llm.cli import main
from dist_llm.cli.compare import _judge
from dist_llm.compare.prove import LARGEST, Prover, subject
from dist_llm.compare.run import Comparison, against_baseline, read_layouts
from dist_llm.config.layout import Layout
from dist_llm.config.load import load_config
from dist_llm.config.schema import Config
from dist_llm.errors import NumericError, UsageError
from dist_llm.model.table import num_parameters
from dist_llm.train.proof import Record, Run, Verdict
from tests.commands import Commands, Result
from tests.layouts import concrete

ROOT = Path(__file__).parent.parent
LAYOUTS = ["dp=2", "tp=2", "pp=2,schedule=gpipe", "dp=2,tp=2,zero=3"]
KEYS = {"layout", "given", "engine", "world", "equal", "error", "proof", "loss", "max_loss_difference", "max_gradient_difference",
        "max_parameter_difference", "max_moment_difference", "first_difference", "step_seconds", "cpu_seconds", "tokens_per_second",
        "peak_memory_bytes", "peak_rss_bytes", "sent_bytes_per_step", "bubble_fraction", "predicted"}  # fmt: skip


def compare(commands: Commands, *words: str) -> Result:
    """Runs the command."""
    return commands.run("compare", *words, timeout=300)


@pytest.fixture(scope="module")
def finished(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, Result]:
    """One comparison of the tiny config."""
    folder = tmp_path_factory.mktemp("compare")
    words = ["configs/tiny.yaml", *LAYOUTS, "--steps", "2", "--run-dir", str(folder), f"data.dir={folder}/data", "--json"]
    done = compare(commands, *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder, done


def test_contract(finished) -> None:
    """Every promised key is there, the reference comes first, and what was typed is kept."""
    found, folder, done = finished
    assert found["version"] == 1 and found["reference"] == "dp=1"
    assert [row["given"] for row in found["layouts"]] == ["dp=1", *LAYOUTS]
    assert [row["world"] for row in found["layouts"]] == [1, 2, 2, 2, 4]
    for row in found["layouts"]:
        assert KEYS - row.keys() == set(), row["given"]
        assert row["equal"] is True and row["error"] is None and row["first_difference"] is None
        assert row["proof"]["tolerance"] == 1e-10 and row["proof"]["steps"] == 3 and len(row["loss"]) == 3
        assert len(row["peak_memory_bytes"]) == len(row["peak_rss_bytes"]) == row["world"]
    assert json.loads((folder / "comparison.json").read_text()) == found
    assert (folder / "report.html").stat().st_size > 100_000
    assert json.loads((folder / "traces" / "dp=1,pp=2,schedule=gpipe.json").read_text())["traceEvents"]
    assert "dp=2,tp=2,zero=3" in done.stderr  # live progress


def test_bytes_are_the_closed_form(finished) -> None:
    """On every axis of every layout, to the byte and on every rank."""
    for row in finished[0]["layouts"]:
        assert row["bytes_exact"], row["given"]
        assert row["sent_bytes_per_step"] == pytest.approx(row["predicted"]["sent_bytes_per_step"], abs=0.5)


def test_peak_memory_is_as_predicted(finished) -> None:
    """Of the fullest rank, on real text; the model is tiny, so that tensors of a number per token show."""
    for row in finished[0]["layouts"]:
        assert max(row["peak_memory_bytes"]) == pytest.approx(row["predicted"]["memory_bytes"]["total"], rel=0.03), row["given"]


@pytest.mark.long
def test_offloading_is_proved_for_deepspeed_and_ours(commands: Commands, tmp_path: Path) -> None:
    """DeepSpeed against float32's own rounding, ours against 1e-10; what lies in host memory is a part of its own."""
    texts = ["dp=2,zero=2,offload=optimizer,engine=deepspeed", "dp=2,zero=2,offload=optimizer"]
    done = compare(commands, "configs/tiny.yaml", *texts, "--steps", "1", "--run-dir", str(tmp_path), f"data.dir={tmp_path}/data", "--json")
    assert done.returncode == 0, done.stderr
    _, theirs, ours = json.loads(done.stdout)["layouts"]
    assert theirs["equal"] and theirs["proof"]["dtype"] == "float32" and 1e-10 < theirs["proof"]["tolerance"] < 1e-2
    assert ours["equal"] and ours["proof"]["dtype"] == "float64" and ours["bytes_exact"]
    memory = ours["predicted"]["memory_bytes"]
    assert memory["optimizer"] == 0 and memory["host"] > 1.5 * memory["weights"]  # half of masters and two moments


def test_baseline(finished) -> None:
    """Lost equality, more bytes and more memory are regressions; time is only noted."""
    found = finished[0]
    assert against_baseline(found, found)[0] == []
    worse = copy.deepcopy(found)
    worse["layouts"][1] |= {"equal": False, "step_seconds": 100.0}
    worse["layouts"][2]["sent_bytes_per_step"]["tp"] += 4
    worse["layouts"][3]["peak_memory_bytes"][0] *= 2
    said, notes = against_baseline(worse, found)
    assert [line.split(":")[0] for line in said] == LAYOUTS[:3]
    assert any("step time" in note for note in notes)
    fewer = {**found, "layouts": found["layouts"][:2] + found["layouts"][3:]}
    assert against_baseline(fewer, found)[0] == ["tp=2: in the baseline, not compared now"]
    assert against_baseline(found, fewer)[0] == []


@pytest.mark.parametrize(("steps", "timed", "proved"), [(None, 5, 3), (1, 1, 3), (7, 7, 7)])
def test_steps_are_those_of_both_passes(tmp_path: Path, steps: int | None, timed: int, proved: int) -> None:
    config = load_config(ROOT / "configs/tiny.yaml").config
    (entry,) = read_layouts(config, ["dp=1"], nproc=None)
    made = Comparison(config, [entry], entry, steps=steps, run_dir=tmp_path, say=print)
    assert (made.steps, made.subject.steps) == (timed, proved)


def test_a_path_means_the_same_as_in_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--data takes the place of a mixture, and a path may hold what YAML reads as a comment."""
    mixed = tmp_path / "mix.yaml"
    mix = "mix: [{source: skills}, {source: entropy}]\n  source: skills "
    mixed.write_text((ROOT / "configs/tiny.yaml").read_text().replace("source: skills ", mix))
    seen: list[Any] = []
    monkeypatch.setattr("dist_llm.cli.compare._compare", lambda loaded, *_, **__: seen.append(loaded.config) or {"layouts": []})
    monkeypatch.setattr("dist_llm.cli.compare._show", lambda *_: None)
    assert load_config(mixed).config.data.mix
    assert main.run(["compare", str(mixed), "dp=2", "--data", "/tmp/my text #1.txt"]) == 0
    assert (seen[0].data.source, seen[0].data.mix) == ("/tmp/my text #1.txt", None)


def test_all_bad_layouts_are_refused_at_once(commands: Commands) -> None:
    """Exit 2 before anything starts, each fault with its layout."""
    done = compare(commands, "configs/tiny.yaml", "tq=2", "tp=3", "pp=64", "dp=2,engine=fastest")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for word in ("'tq'", "tp=3", "pp=64", "engine=fastest"):
        assert word in done.stderr
    with pytest.raises(UsageError, match="cannot run"):
        read_layouts(load_config(ROOT / "configs/tiny.yaml").config, ["dp=4"], nproc=2)
    with pytest.raises(UsageError) as refused:
        read_layouts(load_config(ROOT / "configs/tiny.yaml").config, ["tp=x", "dp=2,zero=7"], nproc=None)
    whole = "expected a whole number from"
    assert refused.value.details == [f"tp=x: {whole} 1", f"dp=2,zero=7: zero=7: {whole} 0 to 3"], "each layout once"


def test_a_difference_ends_in_exit_6(finished) -> None:
    """The message names tensor, step, rank, size and likely cause."""
    found = copy.deepcopy(finished[0])
    first = {"kind": "gradient", "name": "blocks.0.mlp_norm.weight", "step": 1, "rank": 3, "difference": 0.5, "hint": "traps 8, 9"}
    found["layouts"][2] |= {"equal": False, "first_difference": first}
    with pytest.raises(NumericError) as caught:
        _judge(found, [], Path("somewhere"))
    said = " ".join(caught.value.details)
    assert caught.value.code == 6
    assert all(word in said for word in ("tp=2", "blocks.0.mlp_norm.weight", "step 1", "rank 3", "5.00e-01", "traps 8, 9"))


def test_a_large_model_is_proved_by_a_twin() -> None:
    """Same family, axes and switches; odd shapes; small."""
    config = Config.model_validate({"model": {"preset": "qwen3-8b"}, "data": {"tokenizer": {"kind": "file", "path": "t.json"}}})
    small = subject(config, [concrete("tp=4"), concrete("pp=2,schedule=interleaved")], steps=3)
    model = small.config.model
    assert small.model.startswith("twin") and num_parameters(model) < LARGEST / 10
    assert (model.family, model.qk_norm, model.tied) == ("qwen3", True, False)
    assert model.heads % 4 == 0 and model.layers >= 4 and model.vocab % 2 == 1 and model.kv_heads < model.heads


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_compiled_is_proved_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: bool) -> None:
    """Against one process that is not, the reference's own row too."""
    ran: list[tuple[str, bool]] = []
    verdict = Verdict(0.0, 0.0, 0.0, 0.0, 0.0, None)

    def noting(world: int, work: Any, job: dict[str, Any], layout: dict[str, Any], *rest: Any, **options: Any) -> None:
        ran.append((str(Layout(**layout)), job["config"]["runtime"]["compile"]))

    monkeypatch.setattr("dist_llm.compare.prove.run_ranks", noting)
    monkeypatch.setattr("dist_llm.compare.prove.read_run", lambda folder: Run(Record([], []), {}, {}))
    monkeypatch.setattr("dist_llm.compare.prove.judge", lambda *_, **__: verdict)
    config = load_config(ROOT / "configs/tiny.yaml", [f"runtime.compile={str(compiled).lower()}"]).config
    layouts = [concrete("dp=1"), concrete("tp=2")]
    options: dict[str, Any] = {"backend": "gloo", "timeout_seconds": 9.0, "log_dir": tmp_path}
    prover = Prover(subject(config, layouts, steps=3), layouts[0], **options)
    assert [prover.prove(layout)[1]["compile"] for layout in layouts] == [compiled, compiled]
    assert ran == [("dp=1", False), *([("dp=1", True)] if compiled else []), ("dp=1,tp=2", compiled)]


def test_two_runs(commands: Commands, tmp_path: Path) -> None:
    """The first step whose loss differs, to the bit; folders without metrics are refused."""
    for name, losses in (("a", [1.0, 0.5, 0.25]), ("b", [1.0, 0.5000000001, 0.25])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "loss": loss, "loss_hex": loss.hex()}) for step, loss in enumerate(losses, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    done = compare(commands, str(tmp_path / "a"), str(tmp_path / "b"), "--json")
    found = json.loads(done.stdout)
    assert (found["first_step"], found["steps"], found["tensor"]) == (2, 3, None)
    assert found["max_relative"] == pytest.approx(2e-10)
    assert "every loss equal to the bit" in compare(commands, str(tmp_path / "a"), str(tmp_path / "a")).stdout
    assert compare(commands, str(tmp_path / "a"), str(tmp_path)).returncode == 3
