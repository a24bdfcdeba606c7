"""The benchmark suite: its statistics on known inputs, what it refuses, and a run of everything in miniature."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binom

from benchmarks import text
from benchmarks.command import QUESTIONS, chosen, keep, listed, merged
from benchmarks.harness import Contestant, Row, _refuse_other_numbers, interval_of
from benchmarks.interval import Figure, Interval, decided, faster, median_interval, not_slower, verdict
from benchmarks.page import made, write
from benchmarks.plain import plain_model
from benchmarks.rivals import bring, transformers_name
from benchmarks.setting import Setting, Tokens, initial_weights
from benchmarks.writing import Ours, Transformers, WritingSetting
from dist_llm.cli import bench as bench_verb
from dist_llm.errors import Code, NumericError, UsageError
from dist_llm.model.table import num_parameters
from dist_llm.train.memory import LiveMemory, tensors_of

ROOT = Path(__file__).parent.parent

# --- the interval and the verdict ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 61))
def test_the_interval_covers_the_median_as_the_binomial_says(count: int) -> None:
    """Ranks k and n + 1 - k hold the median with 1 - 2 P(Binomial(n, 1/2) < k); k is the largest that keeps 95 %."""
    found = median_interval([float(value) for value in range(count, 0, -1)])
    k = int(found.low)
    assert found.high == count + 1 - k and found.median == (count + 1) / 2
    assert found.coverage == pytest.approx(1 - 2 * binom.cdf(k - 1, count, 0.5))
    if count >= 6:
        assert found.coverage >= 0.95 and (2 * (k + 1) > count + 1 or 1 - 2 * binom.cdf(k, count, 0.5) < 0.95)
    else:
        assert k == 1 and found.coverage < 0.95


def test_an_outlier_has_one_vote() -> None:
    calm = [0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98]
    assert median_interval([*calm[:-1], 50.0]).median == median_interval(calm).median == 0.94


def of(median: float, low: float, high: float, coverage: float = 0.95) -> Interval:
    """An interval as if it had been measured."""
    return Interval(median, low, high, coverage)


@pytest.mark.parametrize(
    ("found", "figure", "judged", "ends"),
    [
        (of(1.00, 0.97, 1.05), not_slower(), "met", True),
        (of(1.02, 0.99, 1.06), not_slower(), "undecided", False),
        (of(1.08, 1.06, 1.10), not_slower(), "missed", True),
        (of(0.70, 0.60, 0.80, 0.94), not_slower(), "undecided", False),  # too few rounds for any verdict
        (of(0.85, 0.82, 0.88), faster(0.9), "met", True),
        (of(0.90, 0.88, 0.95), faster(0.9), "met", False),  # the median is there, the interval would move it yet
        (of(0.89, 0.80, 1.00), faster(0.9), "undecided", False),  # does not lie below 1
        (of(0.91, 0.88, 0.95), faster(0.9), "undecided", False),
        (of(0.95, 0.93, 0.97), faster(0.9), "missed", True),
    ],
)
def test_the_rule(found: Interval, figure: Figure, judged: str, ends: bool) -> None:
    assert (verdict(found, figure), decided(found, figure)) == (judged, ends)


def test_ratios_are_taken_within_a_round() -> None:
    """A round that was slow for both says nothing; the slowest rank is the step's time."""

    def rounds(*seconds: tuple[float, float]) -> Contestant:
        return Contestant("", "", rounds=[[{"seconds": one, "cpu": 0.0} for one in ranks] for ranks in seconds])

    found = interval_of(rounds((1.0, 0.9), (8.0, 1.0), (1.0, 1.0)), rounds((2.0, 1.0), (1.0, 16.0), (0.1, 2.0)))
    assert (found.low, found.median, found.high) == (0.5, 0.5, 0.5)


# --- the same numbers ----------------------------------------------------------------------------------------------------


def with_numbers(*steps: tuple[float, float | None], label: str = "rival") -> Contestant:
    """A contestant of two ranks, the loss shared between them."""
    return Contestant(label, label, warm=[[{"loss": loss / 4, "norm": norm}, {"loss": loss * 3 / 4, "norm": norm}] for loss, norm in steps])


@pytest.mark.parametrize(
    ("rival", "wrong"),
    [
        (with_numbers((5.0, 1.0), (4.0, 2.0)), None),
        (with_numbers((5.0003, None), (4.0, None)), None),
        (with_numbers((5.0, 1.0), (4.001, 2.0)), "step 1, loss"),
        (with_numbers((5.0, 0.5), (4.0, 2.0)), "step 0, norm"),  # AdamW hides a gradient that is wrong by a factor
    ],
)
def test_a_rival_that_trains_other_numbers_is_refused(rival: Contestant, wrong: str | None) -> None:
    row, ours = Row("a row", "ours", (), Setting()), with_numbers((5.0, 1.0), (4.0, 2.0), label="ours")
    if wrong is None:
        _refuse_other_numbers([ours, rival], row)
        return
    with pytest.raises(NumericError) as refused:
        _refuse_other_numbers([ours, rival], row)
    assert wrong in str(refused.value.where)


def test_other_tokens_are_refused_however_near() -> None:
    """A digest of what was written is compared to the last bit."""
    row, ours = Row("a row", "ours", (), Setting(), numbers="same"), with_numbers((5.0, 2.0**47), label="ours")
    _refuse_other_numbers([ours, with_numbers((5.0, 2.0**47))], row)
    with pytest.raises(NumericError):
        _refuse_other_numbers([ours, with_numbers((5.0, 2.0**47 + 1))], row)


def test_a_loss_that_stands_still_proves_nothing() -> None:
    same = with_numbers((5.0, 1.0), (5.0001, 1.0))
    with pytest.raises(NumericError):
        _refuse_other_numbers([same, same], Row("a row", "ours", (), Setting()))


# --- setting -------------------------------------------------------------------------------------------------------------


def test_the_model_of_the_figures() -> None:
    setting = Setting()
    assert setting.parameters == num_parameters(setting.model) and round(setting.parameters / 1e6, 1) == 5.8
    assert sum(parameter.numel() for parameter in plain_model(setting.quick()).parameters()) == setting.quick().parameters


def test_rivals_get_the_same_tokens_and_weights() -> None:
    setting = Setting().quick()
    tokens = Tokens(setting)
    whole, parts = tokens.batch(5)[0], [tokens.batch(5, part=part, parts=4)[0] for part in range(4)]
    assert torch.equal(torch.cat(parts), whole) and torch.equal(tokens.batch(1)[0], whole)
    ours = [batch for part in range(2) for batch in tokens.micro_batches(5, dp_rank=part, dp_size=2, micro=4)]
    assert torch.equal(torch.cat([batch.tokens for batch in ours]), whole)
    assert torch.cat([batch.rows for batch in ours]).tolist() == list(range(setting.batch))
    model = dict(plain_model(setting).named_parameters())
    assert all(torch.equal(model[name], values) for name, values in initial_weights(setting))
    assert transformers_name("blocks.3.attention.q.weight") == "model.layers.3.self_attn.q_proj.weight"


# --- memory of anybody ---------------------------------------------------------------------------------------------------


def test_memory_sees_storages_that_are_emptied_and_filled_again() -> None:
    """As FSDP2 and ZeRO-3 do; also those that were there before."""
    before = torch.ones(1000)
    with LiveMemory(before) as live:
        assert live.now == 4000
        before.untyped_storage().resize_(0)
        assert live.now == 0 and live.peak == 4000
        made = torch.empty(500)
        before.untyped_storage().resize_(4000)
        assert live.now == live.peak == 6000
        del made
        assert live.now == 4000
        live.restart()
        assert live.peak == 4000
    before.untyped_storage().resize_(0)  # unseen: the method is as it was
    assert live.now == 4000 and "resize_" not in vars(torch.UntypedStorage)


def test_memory_finds_what_modules_and_optimizers_keep() -> None:
    layer = torch.nn.Linear(10, 10, bias=False)
    layer.register_buffer("table", torch.zeros(7))
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    with LiveMemory(layer, [optimizer]) as live:
        pass
    assert live.kept == 4 * (4 * 100 + 7 + 1)  # weight, gradient, two moments; buffer; count
    assert len(list(tensors_of({"a": [layer], "b": (layer.weight,)}))) == 4


# --- results and page ----------------------------------------------------------------------------------------------------


def contestant_of(label: str, **more: Any) -> dict[str, Any]:
    """What one contestant measured."""
    measured = {"key": label, "label": label, "step_seconds": 1.0, "cpu_seconds": [0.9, 0.8], "peak_bytes": [3e8, 2e8]}
    return {**measured, "peak_rss_bytes": [4e8, 3e8], "sent_bytes": [23.2e6, 23.2e6], "read_bytes": [35e6, 34e6], "error": None, **more}


def result_of(*, verdict: str = "missed", error: dict | None = None) -> dict[str, Any]:
    """A question's results with one row and one rival."""
    rival = contestant_of("DDP", peak_bytes=[6e8, 6e8], figure="not slower", verdict=verdict, error=error)
    rival["time"] = {"median": 1.25, "low": 1.2, "high": 1.3, "coverage": 0.96}
    rival["cpu"] = {"median": 1.1, "low": 1.09, "high": 1.12, "coverage": 0.96}
    row = {"name": "zero=0", "world": 2, "note": "", "rounds": 9, "ours": contestant_of("ours"), "rivals": [rival]}
    row |= {"when": "2025-01-01 10:00", "command": "dist-llm bench engines", "setting": Setting().described()}
    row |= {"peak": {"figure": 0.6, "ratio": 0.5, "verdict": "met"}, "sent": {"figure": 23.2, "mb": 23.2, "verdict": "met"}}
    row |= {"resident": {"figure": 0.6, "ratio": 0.7, "verdict": "missed"}}
    row |= {"predicted": {"figure": 0.1, "difference": -0.002, "verdict": "met"}}
    row |= {"during": {"stolen_fraction": 0.01, "others_fraction": 0.5, "load_average": [2.0, 1.0, 1.0]}}
    machine = {"cpu": "a cpu", "cores": 2, "memory_bytes": 2**33, "system": "Linux", "python": "3.11"}
    return {"question": "engines", "title": "Engines", "machine": machine, "versions": {"torch": "2", "datasets": None}, "rows": [row]}


def test_a_missed_figure_is_shown_as_missed() -> None:
    result = result_of()
    assert text.verdicts([result])["missed"] == ["zero=0: time against DDP not slower", "zero=0: resident <= 0.6x"]
    assert text.verdicts([result])["met"][:2] == ["zero=0: peak <= 0.6x", "zero=0: sent <= 23.2 MB"]
    assert text.verdicts([result])["met"][2:] == ["zero=0: peak within 10% of the predicted one"]
    line = text.plain_table(result["rows"]).splitlines()[2]
    assert "1.250 [1.200, 1.300], 9 rounds" in line and "missed" in line and "300 / 600 = 0.50" in line
    page = made([result])
    assert "**missed**" in page and "- zero=0: time against DDP not slower" in page and "stolen 1.0%" in page
    assert "peak -0.2% from the predicted one, figure within 10%: met" in page
    assert "read by a rank: ours 35.0 MB, DDP 35.0 MB" in page


def test_a_rival_that_could_not_run_is_named() -> None:
    error = UsageError("this row needs datasets", next="pip install 'dist-llm[hf]'").as_dict()
    result = result_of(error=error, verdict=None)
    assert "could not run" in made([result]) and "pip install 'dist-llm[hf]'" in text.plain_table(result["rows"])


def test_rows_are_kept_by_name_and_the_page_takes_the_newest(tmp_path: Path) -> None:
    assert merged([{"name": "a", "x": 1}, {"name": "b", "x": 1}], [{"name": "a", "x": 2}]) == [{"name": "a", "x": 2}, {"name": "b", "x": 1}]
    with pytest.raises(UsageError):
        write(tmp_path, tmp_path / "page.md")
    (tmp_path / "engines-2020-01-01.json").write_text(json.dumps(result_of(verdict="met")))
    keep(result_of(), tmp_path)
    keep({**result_of(), "rows": []}, tmp_path)  # a row that was not measured again stays
    write(tmp_path, tmp_path / "page.md")
    assert "2 figures missed" in (tmp_path / "page.md").read_text()


# --- the verb ------------------------------------------------------------------------------------------------------------


def test_questions_and_rows_are_chosen_by_name() -> None:
    assert list(chosen([])) == list(QUESTIONS)
    assert [row.name for row in chosen(["pipeline:1F"])["pipeline"]] == ["1F1B"]
    for words in (["nothing"], ["pipeline:nothing"]):
        with pytest.raises(UsageError) as refused:
            chosen(words)
        assert refused.value.next == "dist-llm bench --list"
    names = [f"{one['question']}:{row}" for one in listed() for row in one["rows"]]
    assert len(names) == len(set(names)) and {one["question"] for one in listed()} == set(QUESTIONS)


def test_without_a_checkout_it_says_where_the_suite_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_verb, "ROOT", tmp_path)
    with pytest.raises(UsageError) as refused:
        bench_verb.bench(listing=True)
    assert refused.value.code == Code.USAGE and "checkout" in str(refused.value) and refused.value.next


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.llama.modeling_llama", None)
    with pytest.raises(UsageError) as refused:
        bring("transformers")
    assert refused.value.next == "pip install 'dist-llm[test]'"


def run_python(*words: str) -> Any:
    """What a Python process writes to its stdout as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.long
def test_a_quick_run_of_a_row_that_trains() -> None:
    """Measured and told as JSON alone."""
    found = run_python("-m", "dist_llm", "bench", "pipeline:1F1B", "--quick", "--rounds", "2", "--json")
    ((pipeline,),) = (result["rows"] for result in found["results"])
    (rival,) = pipeline["rivals"]
    assert pipeline["rounds"] == 2 and rival["error"] is None and rival["figure"] is None and pipeline["peak"] is None
    assert rival["time"]["coverage"] == 0.5 and all(len(one["peak_bytes"]) == 2 for one in (pipeline["ours"], rival))


@pytest.mark.long
def test_a_quick_run_of_the_verb() -> None:
    """A row that does not train, measured and told as JSON alone."""
    found = run_python("-m", "dist_llm", "bench", "data:read", "--quick", "--rounds", "2", "--json")
    ((data,),) = (result["rows"] for result in found["results"])
    simple, *datasets = data["rivals"]
    assert simple["losses"] == data["ours"]["losses"] and simple["losses"][0] > 0
    for one in datasets:
        assert one["losses"] == simple["losses"] if one["error"] is None else one["error"]["next"] == "pip install 'dist-llm[hf]'"


@pytest.mark.parametrize("adapter", [0, 4])
def test_contestants_write_the_same_text(adapter: int) -> None:
    """Greedy, ours and transformers', with PEFT's modules where there is an adapter; it changes the text."""
    pytest.importorskip("peft")
    setting = WritingSetting(lines=2, adapter=adapter).quick()
    ours, theirs = Ours(setting).step(0), Transformers(setting).step(0)
    assert ours == theirs and ours != Ours(replace(setting, adapter=4 - adapter)).step(0)


STAGE_3 = """
import json
import torch._dynamo
from benchmarks.harness import Against, Limits, Row, measure
from benchmarks.setting import Setting
row = Row("zero=3", "ours:dp=2,zero=3", (Against("fsdp2:reshard", "FSDP2"),), Setting().quick(), 2)
print(json.dumps(measure(row, Limits(rounds=2), lambda text: None)))
"""


@pytest.mark.long
def test_memory_and_bytes_of_a_rival_are_what_they_must_be() -> None:
    """FSDP2 empties its storages and keeps a half of weights and moments; gloo's reduce_scatter sends twice its payload."""
    row = run_python("-c", STAGE_3)
    (fsdp2,), parameters = row["rivals"], row["setting"]["parameters"]
    half = 3 * 4 * parameters / 2
    assert 0.99 * half < min(fsdp2["kept_bytes"]) and max(fsdp2["kept_bytes"]) < 1.1 * half and min(fsdp2["peak_bytes"]) > 2 * half
    assert min(row["ours"]["kept_bytes"]) >= half and row["predicted"]["verdict"] == "met"
    assert len(row["ours"]["predicted_peak_bytes"]) == len(row["ours"]["peak_bytes"]) == 2
    assert math.isclose(fsdp2["losses"][2], row["ours"]["losses"][2], rel_tol=1e-4)
    whole = 4 * parameters
    assert 2.0 * whole < fsdp2["sent_bytes"][0] < 2.2 * whole  # two gathers of a half each, a reduction of a half twice over
    booked = sum(row["ours"]["booked_bytes"][0].values())
    assert booked <= row["ours"]["sent_bytes"][0] < 1.05 * booked + 4096
