"""What fine-tuning begins with and ends with: the held-out loss, and questions with one right answer; the same under every layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dist_llm.report.page import write_run_page
from dist_llm.report.run import read_run, run_answers
from tests.commands import Commands, Result

TASKS = ["copy", "last", "count"]
WORDS = [
    *("data.source=skills", f"data.skills.tasks=[{','.join(TASKS)}]", "data.skills.length=[1, 3]", "data.skills.apart=true"),
    *("data.chat.template=plain", "data.sequence=64", "data.max_tokens=20000", "data.validation=0.2"),
    *("track.questions=4", "track.validate_batches=2", "batch.global=4", "batch.micro=2", "schedule.steps=3", "schedule.kind=constant"),
    *("optimizer.lr=0.02", "runtime.device=cpu"),
]


def tuned(commands: Commands, base: Path, home: Path, run: str, *words: str) -> Result:
    config = home / "tune.yaml"
    config.write_text(f"base: {base}\n")
    return commands.run("train", str(config), *WORDS, f"data.dir={home}/data", "--run-dir", str(home / run), "--dtype", "float64", *words)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("adapter", [(), ("model.adapter.rank=4",)], ids=["all weights", "adapter"])
def test_before_and_after_under_every_layout(adapter: tuple[str, ...], commands: Commands, small_run: Path, tmp_path: Path) -> None:
    """Step 0 is the base, measured; the last line is the result; layouts agree in every answer. A reader sees both."""
    found = []
    for layout in ("dp=1", "dp=2,zero=3", "tp=2", "pp=2"):
        ranks = "1" if layout == "dp=1" else "2"
        done = tuned(commands, small_run, tmp_path, layout, *adapter, "--nproc", ranks, "--layout", layout)
        assert done.returncode == 0, done.stderr
        lines = metrics(tmp_path / layout)
        assert [line["step"] for line in lines] == [0, 1, 2, 3] and "loss" not in lines[0] and "answers" not in lines[1]
        found.append([(line["validation_loss"], line["answers"]) for line in (lines[0], lines[3])])
    for other in found[1:]:
        for (loss, answers), (same_loss, same_answers) in zip(found[0], other, strict=True):
            assert loss == pytest.approx(same_loss, rel=1e-10) and answers == same_answers
    (before, asked), (after, _) = found[0]
    assert after < before and list(asked) == [*TASKS, "all"] and asked["all"]["count"] == sum(asked[task]["count"] for task in TASKS) >= 8
    assert "right answers at step 0" in done.stdout and "right answers at step 3, of questions held out (before)" in done.stdout
    assert f"next        dist-llm chat {tmp_path / 'pp=2'}" in done.stdout
    headings, rows = run_answers(read_run(tmp_path / "pp=2"))
    assert headings == ["step 0", "step 3"] and [row[0] for row in rows] == [*TASKS, "all"]
    assert all(" of " in cell for _, *row in rows for cell in row)
    write_run_page(tmp_path / "pp=2", tmp_path / "page.html")
    assert re.search(r"<h2>Right answers</h2>.*<td class=\"text\">last</td>", (tmp_path / "page.html").read_text(), re.DOTALL)


def test_a_run_that_goes_on_keeps_what_it_began_with(commands: Commands, small_run: Path, tmp_path: Path) -> None:
    """And asks each task once, however often it is drawn."""
    often = "data.skills.tasks=[copy, count, copy]"
    assert tuned(commands, small_run, tmp_path, "run", often, "schedule.steps=2").returncode == 0
    first = metrics(tmp_path / "run")[0]
    assert list(first["answers"]) == ["copy", "count", "all"]
    assert first["answers"]["all"]["count"] == sum(first["answers"][task]["count"] for task in ("copy", "count"))
    assert tuned(commands, small_run, tmp_path, "run", often, "--resume", "auto").returncode == 0
    lines = metrics(tmp_path / "run")
    assert lines[0] == first and [line["step"] for line in lines] == [0, 1, 2, 3] and "answers" in lines[3]


def test_questions_and_mixtures_need_their_source(commands: Commands, small_run: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("data: {source: python}\nmodel: {vocab: 300}\n")
    refused = commands.run("check", str(config), "track.questions=3", "data.skills.apart=true", "data.skills.tasks=[copy]")
    assert refused.returncode == 2 and "track.questions: " in refused.stderr and "data.skills: " in refused.stderr, refused.stderr
    refused = commands.run("check", str(config), "data.source=skills", "data.skills.length=[5, 2]")
    assert refused.returncode == 2 and "data.skills.length" in refused.stderr and "[5, 2]" in refused.stderr, refused.stderr
