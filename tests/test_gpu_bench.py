"""benchmarks/gpu.py: parts that fail, budgets, calls that go on where another ended, and the whole of it in miniature on a CPU."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import gpu, gpu_titan, gpu_work
from benchmarks.gpu import LEAST, RESULTS, joined, measure
from benchmarks.gpu_parts import PARTS, Part, lacking, named, plan, turns, with_blocks
from benchmarks.gpu_worker import Workers
from dist_llm.config.layout import Layout
from dist_llm.config.rules import problems
from dist_llm.config.schema import ModelConfig
from dist_llm.engines import graph

(H100,) = RESULTS.glob("gpu-nvidia-h100-80gb-hbm3-*.json")
(H200,) = RESULTS.glob("gpu-nvidia-h200-*.json")
NAMES = [part.name for part in PARTS]


def part_of(name: str, limit: float = 60.0, what: str = "") -> Part:
    """One without work."""
    return Part(name, limit, 1.0, what)


def apart(part: Part) -> dict[str, Any]:
    """What its process answers, in miniature on a CPU."""
    with Workers("cpu", True) as workers:
        return workers.run([replace(part, limit=120.0)], 120.0)[0]


# --- one call --------------------------------------------------------------------------------------------------------


def measured(parts: Sequence[Part], run: Callable[..., Any], *, seconds: float) -> list[list[dict[str, Any]]]:
    """The entries that were noted, turn by turn."""
    found: list[list[dict[str, Any]]] = []
    measure(turns(parts), run, end=time.monotonic() + seconds, note=lambda entries: found.append(list(entries)), say=lambda text: None)
    return found


def test_a_part_that_fails_is_noted_and_the_next_one_runs() -> None:
    outcomes = {"a": {"error": "out of memory"}, "b": {"result": {"x": 1}}}
    found = measured([part_of("a"), part_of("b")], lambda turn, left, then: [outcomes[part.name] for part in turn], seconds=100.0)
    assert found == [[{"name": "a", "error": "out of memory"}], [{"name": "b", "result": {"x": 1}}]]


def test_layouts_that_fail_are_said_and_measured_again() -> None:
    refused = {"name": "shared", "result": {"rows": {"tp=2": {"error": "no"}, "pp=2": {"equal": True}, "dp=2": {"equal": False}}}}
    said: list[str] = []
    measure([[part_of("shared", what="shared")]], lambda *_: [refused], end=time.monotonic() + 99.0, note=lambda _: None, say=said.append)
    assert [line.strip() for line in said[1:]] == ["shared: tp=2: no", "shared: dp=2: not equal"]
    good = {"name": "stages", "result": {"losses": {"zero=0": [4.6], "zero=1": [4.6]}}}
    bad = {"name": "8b ends", "error": "not begun"}
    assert [part.name for part in lacking(PARTS[-3:], [refused, good, bad])] == ["8b ends", "shared"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ranks_that_share_a_device_are_asked_for_over_gloo(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("dist_llm.ranks.run_ranks", lambda world, work, job, *_, **__: asked.append(job["config"]["runtime"]))
    monkeypatch.setattr("dist_llm.train.proof.read_run", lambda folder: folder)
    monkeypatch.setattr(gpu_work, "_judged", lambda *_: gpu_work.small_config(torch.device(device), "gloo")["runtime"])
    found = gpu_work.shared(torch.device(device), True)
    assert asked == [*found["rows"].values(), asked[0]] and asked[0]["backend"] == "gloo" and asked[0]["device"] == device


def test_a_turn_has_the_time_that_is_left_and_the_next_one_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[float, list[str]]] = []
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def run(turn: Sequence[Part], left: float, then: Sequence[Part]) -> list[dict[str, Any]]:
        given.append((left, [part.name for part in then]))
        now[0] += 10.0
        return [{}]

    found = measured([part_of("a"), part_of("b"), part_of("c")], run, seconds=LEAST + 19.0)
    assert given == [(LEAST + 19.0, ["b"]), (LEAST + 9.0, ["c"])]
    assert found[2][0]["error"].startswith("not begun")


def test_no_time_is_taken_of_what_runs_side_by_side() -> None:
    parts = [replace(part_of(name), first=True) for name in "ab"] + [part_of("c", what="ours"), part_of("d", what="ours")]
    parts += [part_of("e", what="stages"), part_of("f", what="shared")]
    assert [[part.name for part in turn] for turn in turns(parts)] == [["a", "b"], ["c"], ["d"], ["e", "f"]]


def test_a_process_that_dies_or_hangs_ends_alone() -> None:
    good, bad, slow = (replace(named("8b ends")[0], name=name) for name in ("good", "bad", "slow"))
    with Workers("cpu", True) as workers:
        found = workers.run(
            [replace(slow, limit=0.05), replace(bad, what="ours", runtime=(("fp8", "nobody's"),)), replace(good, limit=120.0)], 120.0
        )
    assert found[0]["error"] == "not done after 0 s"
    assert "nobody's" in found[1]["stderr"] and "Traceback" in found[1]["stderr"] and found[1]["error"]
    assert found[2]["result"]["tokens"] > 0 and found[2]["seconds"] >= found[2]["waited"]


def test_the_next_process_gets_ready_while_one_runs_and_waits_for_its_turn() -> None:
    first, second, never = (replace(named("8b ends")[0], name=name) for name in ("first", "second", "never"))
    with Workers("cpu", True) as workers:
        workers.run([first], 120.0, [second])
        waiting = workers.ready[second].process
        time.sleep(0.5)
        assert waiting.poll() is None and list(workers.ready) == [second]
        (found,) = workers.run([second], 120.0, [never])
        unused = workers.ready[never].process
        assert "result" in found and waiting.returncode is not None and unused.poll() is None
    assert unused.returncode is not None


@pytest.mark.parametrize(
    ("lengths", "least", "timed"),
    [([5.0] * 5, 3, 3), ([1.0, 1.02, 1.0, 1.0], 3, 5), ([1.0, 1.0, 1.0, 9.0], 3, 3), ([1.0, 2.0] * 10, 20, 20)],
    ids=["steady", "scattered", "steady at first", "a fixed number"],
)
def test_as_many_steps_are_timed_as_their_spread_asks_for(
    lengths: list[float], least: int, timed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, rest = [0.0], iter([100.0] * gpu_work.WARM + lengths + [1.0] * 9)

    def step() -> None:
        now[0] += next(rest)

    monkeypatch.setattr(gpu_work.time, "perf_counter", lambda: now[0])
    found = gpu_work.seconds_of(step, torch.device("cpu"), least=least)
    assert len(found) == timed and max(found) < 100.0


# --- the plan --------------------------------------------------------------------------------------------------------


def test_one_call_stays_under_eight_minutes() -> None:
    """Whatever the parts do, it is bounded by the call's own seconds; and they should all fit."""
    assert gpu.TOTAL + 5 < 480 and len(set(NAMES)) == len(PARTS)
    lines, total = plan(with_blocks(PARTS), ())
    assert plan(with_blocks(PARTS), json.loads(H200.read_text())["parts"])[1] <= total < gpu.TOTAL
    assert len(lines) == len(turns(with_blocks(PARTS)))
    assert all(part.expected < part.limit for part in with_blocks(PARTS))


def test_what_is_expected_is_what_an_h200_took() -> None:
    """From its turn on, of processes that were ready; a slower machine's seconds are in its own result, which a plan takes."""
    taken = {entry["name"]: entry["seconds"] for entry in json.loads(H200.read_text())["parts"] if "waited" in entry}
    for part in with_blocks(PARTS):
        assert taken[part.name] <= part.expected <= (1.5 * taken[part.name] + 5.0 if not part.first else 60.0), part.name
    assert graph.WARM == gpu_work.WARM


def test_a_plan_takes_what_is_known_from_processes_that_were_ready() -> None:
    known = [{"name": NAMES[0], "seconds": 3.0, "waited": 0.0, "result": {}}, {"name": NAMES[1], "seconds": 4.0, "result": {}}]
    known += [{"name": NAMES[2], "seconds": 5.0, "waited": 0.0, "error": "x"}]
    _, total = plan(PARTS[:3], known)
    assert total == 3.0 + PARTS[1].expected + PARTS[2].expected


def test_a_plan_is_shown_and_nothing_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what an earlier result lacks."""
    monkeypatch.setattr(gpu, "Workers", None)
    earlier = {**json.loads(H100.read_text()), "parts": [{"name": "1b, ours, eager", "seconds": 9.0, "waited": 0.0, "result": {}}]}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(earlier))
    assert gpu.main(["--plan", "--continue", str(path)]) == 0
    said = capsys.readouterr().out
    assert "stages | shared" in said and "1b, ours, eager" not in said and said.rstrip().endswith("of 470, as on NVIDIA H100 80GB HBM3")
    assert gpu.main(["--plan", "--continue", str(path), "--again"]) == 0
    assert "    9 s  1b, ours, eager" in capsys.readouterr().out


# --- calls that go on ------------------------------------------------------------------------------------------------

RESULT = {"products": {"bfloat16": 1e15}}  # of a ceiling
HEAD = {
    "version": 1,
    "question": "gpu",
    "quick": True,
    "when": "2026-11-27 10:00",
    "device": "cpu",
    "machine": {},
    "versions": {"torch": "2"},
}


class Faked:
    """Workers of whom the named fail; the names of the parts that they did."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.done = failing, list[str]()

    def __call__(self, device: str, quick: bool) -> Faked:
        return self

    def __enter__(self) -> Faked:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def prepare(self, parts: Sequence[Part]) -> None:
        pass

    def run(self, turn: Sequence[Part], left: float, then: Sequence[Part] = ()) -> list[dict[str, Any]]:
        self.done += [part.name for part in turn]
        good = {"seconds": 1.0, "waited": 0.0, "result": RESULT}
        return [{"seconds": 2.0, "error": "bad"} if part.name in self.failing else good for part in turn]


def call(
    monkeypatch: pytest.MonkeyPatch, workers: Faked, *words: str, when: str = "2026-11-27 10:00", torch: str = "2", device: str = "cpu"
) -> int:
    """`python -m benchmarks.gpu` with workers that take no time, on a day, under a version, on a device."""
    monkeypatch.setattr(gpu, "Workers", workers)
    facts = {"when": when, "device": device, "machine": {}, "versions": {"torch": torch, "torchtitan": None}}
    monkeypatch.setattr(gpu, "facts", lambda device: facts)
    return gpu.main(["--device", "cpu", *words])


def test_a_second_call_completes_what_a_first_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = Faked("shared", NAMES[2]), Faked(), Faked()
    assert call(monkeypatch, first, "--out", str(tmp_path)) == 0
    (path,) = tmp_path.iterdir()
    entries = {one["name"]: one for one in json.loads(path.read_text())["parts"]}
    assert {name for name, one in entries.items() if "result" not in one} == {"shared", NAMES[2]}
    assert call(monkeypatch, second, "--continue", str(path), "--out", str(tmp_path), when="2026-11-28 11:00") == 0
    assert second.done == [NAMES[2], "shared"]
    result = json.loads(path.read_text())
    assert [path] == list(tmp_path.iterdir()) and all("result" in one and one["device"] == "cpu" for one in result["parts"])
    for one in result["parts"]:
        assert one["when"] == ("2026-11-28 11:00" if one["name"] in second.done else "2026-11-27 10:00"), one
    assert [one["name"] for one in result["parts"] if one["name"] in NAMES] == NAMES
    assert call(monkeypatch, third, "--continue", str(path), "--out", str(tmp_path)) == 0
    assert third.done == []


def test_an_older_result_goes_on_with_what_was_never_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call on an H100, whose entries have no date of their own; its own numbers stay, and with `--again` come last."""
    earlier = {**json.loads(H100.read_text()), "quick": True}
    path, workers = tmp_path / H100.name, Faked("1b, ours, eager")
    path.write_text(json.dumps(earlier))
    left = [part.name for part in lacking(PARTS, earlier["parts"])]
    words = ("--continue", str(path), "--again", "--out", str(tmp_path))
    versions = {"when": "2027-01-01 09:00", "torch": earlier["versions"]["torch"], "device": earlier["device"]}
    assert call(monkeypatch, workers, *words, **versions) == 0
    done = [name for name in workers.done if name in NAMES]
    assert len(left) < len(NAMES) and done == left + [name for name in NAMES if name not in left]
    result = json.loads(path.read_text())
    entries = {one["name"]: one for one in result["parts"]}
    assert all(one["device"] == earlier["device"] for one in entries.values()) and set(NAMES) <= set(entries)
    eager, before = entries["1b, ours, eager"], next(one for one in earlier["parts"] if one["name"] == "1b, ours, eager")
    assert (eager["result"], eager["when"], eager["failed_later"]["error"]) == (
        before["result"],
        before.get("when", earlier["when"]),
        "bad",
    )
    assert entries["8b ends"]["when"] == "2027-01-01 09:00" and result["versions"]["transformers"] == earlier["versions"]["transformers"]


@pytest.mark.parametrize(
    ("other", "said"), [({"torch": "3"}, "torch was 2 and is 3"), ({"device": "H200"}, "device was cpu and is H200"), ({}, "no result")]
)
def test_what_does_not_belong_together_is_not_joined(
    other: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, workers = tmp_path / "gpu-cpu.json", Faked()
    path.write_text(json.dumps({**HEAD, "parts": []} if other else {"question": "engines"}))
    before = path.read_text()
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, workers, "--continue", str(path), "--out", str(tmp_path), **other)
    assert ended.value.code == 2 and said in capsys.readouterr().err and workers.done == [] and path.read_text() == before


def test_what_was_found_is_written_turn_by_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is killed leaves the parts before."""

    class Killed(Faked):
        def run(self, turn: Sequence[Part], left: float, then: Sequence[Part] = ()) -> list[dict[str, Any]]:
            if "ceiling" in [part.name for part in turn]:
                raise KeyboardInterrupt
            return super().run(turn, left, then)

    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, Killed(), "--out", str(tmp_path))
    (path,) = tmp_path.iterdir()
    kept = [one["name"] for one in json.loads(path.read_text())["parts"]]
    assert [name for name in kept if name in NAMES] == NAMES[: NAMES.index("ceiling")]


def test_a_package_that_was_missing_then_may_be_there_now() -> None:
    found = joined({**HEAD, "parts": [], "versions": {"torch": "2", "torchtitan": None}}, {**HEAD, "versions": {"torchtitan": "0.2.2"}}, ())
    assert found["versions"] == {"torch": "2", "torchtitan": "0.2.2"}
    assert gpu.differences({**HEAD, "versions": {"torch": "2", "torchtitan": None}}, {**HEAD, "versions": {"torchtitan": "0.2.2"}}) == []


# --- the parts -------------------------------------------------------------------------------------------------------


def test_each_shape_of_compiled_blocks_is_compiled_once_beforehand() -> None:
    """As many as there are: a graph replays the same kernels. Of fewer than three each part compiles its own."""
    found = [part for part in with_blocks(PARTS) if part.first]
    shapes = {(part.what, part.preset, part.sequence, dict(part.runtime).get("fp8")) for part in PARTS if part.compiled}
    assert len(found) == len(shapes) == 11 and with_blocks(PARTS)[:11] == found
    assert all(part.depth == 1 and "cuda_graph" not in dict(part.runtime) for part in found)
    assert with_blocks(named("1b, ours")) == named("1b, ours") != with_blocks(named("8b blocks, ours"))


def test_compiling_beforehand_leaves_no_figures() -> None:
    found = apart(next(part for part in with_blocks(PARTS) if part.first))
    assert list(found["result"]) == ["losses"] and found["result"]["losses"][0] > 0


@pytest.mark.parametrize("who", ["ours", "ours in 8 bits", "transformers"])
def test_one_block_has_the_graph_of_many(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of any vocabulary. So its kernels are found by the whole model: torch's cache goes by the graph and its inputs."""
    compiler, graphs = torch.compile, list[tuple[str, list]]()

    def kept(module: torch.fx.GraphModule, inputs: list) -> Any:
        code = re.sub(r"'tp#\d+'", "tp", module.code)  # an axis goes by its number in the process, which has one model
        graphs.append((code, [(one.shape, one.stride(), one.dtype) if isinstance(one, torch.Tensor) else one for one in inputs]))
        return module

    monkeypatch.setattr(torch, "compile", lambda function, **options: compiler(function, backend=kept))
    for size in ({"layers": 1, "vocab": 96}, {"layers": 3, "vocab": 128}):
        torch._dynamo.reset()
        for key, value in size.items():
            monkeypatch.setitem(gpu_work.MINIATURE, key, value)
        runtime = (("compile", True), *((("fp8", "tensorwise"),) if who == "ours in 8 bits" else ()))
        job = gpu_work.Job("llama-1b", 64, 2, runtime=runtime, quick=True)
        if who == "transformers":
            gpu_work.train_transformers(torch.device("cpu"), job, compiled=True)
            graphs.pop()  # the loss
        else:
            gpu_work.train_ours(torch.device("cpu"), job)
    assert len(graphs) == 2 and graphs[0] == graphs[1]


def test_transformers_layers_share_one_compiled_graph_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two graphs: a layer's and the loss's."""
    monkeypatch.setitem(gpu_work.MINIATURE, "layers", 4)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    job, losses = gpu_work.Job("llama-1b", 64, 2, quick=True), []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(3)
        losses.append(gpu_work.train_transformers(torch.device("cpu"), job, compiled=compiled)["losses"][:5])
        assert counters["stats"]["unique_graphs"] == (2 if compiled else 0) and not counters["graph_break"]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[0][-1] < losses[0][0] - 0.1


@pytest.mark.parametrize("part", [part for part in PARTS if part.what == "ours"], ids=lambda part: part.name)
def test_our_configs_are_legal(part: Part) -> None:
    job = gpu_work.Job(part.preset, part.sequence, part.micro, depth=part.depth, vocab=part.vocab, runtime=part.runtime)
    config = job.config(torch.device("cuda"), job.model())
    assert problems(config, Layout()) == []
    assert config.model.dim == {"llama-1b": 2048, "llama3-8b": 4096}[part.preset]


def test_depth_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """8B blocks of 218 M parameters beside 18 bytes of state each."""
    job = gpu_work.Job("llama3-8b", 4096, 2, depth=0, vocab=2048)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * 2**30, 79 * 2**30))
    depth = gpu_work.fitting_depth(job.model(), 8192, torch.device("cuda"))
    assert depth * (218_112_000 * 18 + 16 * 8192 * 4096 * 2) < 79 * 2**30 - gpu_work.SPARE and 12 <= depth <= 18
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * 2**30, 79 * 2**30))
    assert gpu_work.fitting_depth(job.model(), 8192, torch.device("cuda")) == depth  # of all parts, whatever is free at the moment
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2 * 2**30))
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
    found = apart(named("8b blocks, torchtitan, compiled")[0])
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
    found = apart(named(name)[0])
    assert "result" in found, found
    if name == "shared":
        assert all(row["equal"] for row in found["result"]["rows"].values()), found


@pytest.mark.parametrize(("words", "said"), [([], "no CUDA device here"), (["--device", "cpu", "--only", "9b"], "'9b'")])
def test_what_cannot_be_measured_is_refused_and_leaves_no_result(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "device_name", lambda device: "")
    with pytest.raises(SystemExit) as ended:
        gpu.main([*words, "--out", str(tmp_path)])
    assert ended.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())
