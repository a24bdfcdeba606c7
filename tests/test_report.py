"""The report page: complete in itself, safe against hostile data, tolerant of missing keys, and true to the numbers it was given."""

from __future__ import annotations

import base64
import copy
import hashlib
import http.server
import io
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.cli.report import find_source, read_comparison, report
from dist_llm.errors import DataError, UsageError
from dist_llm.report import page
from dist_llm.report.figures import comparison_figures, difference_figure
from dist_llm.report.gantt import spans_figure
from dist_llm.report.page import embedded, inline, write_comparison_page, write_run_page
from dist_llm.report.run import read_run, run_figures, run_sentence, running_mean, thinned
from dist_llm.report.text import plain_table, table, verdict
from dist_llm.report.units import byte_ticks, show_bytes, show_count, show_difference, show_fraction, show_seconds, shown

EXAMPLE = json.loads((Path(__file__).parent / "data" / "comparison-example.json").read_text(encoding="utf-8"))
OWNED = "document.title='owned'"
HOSTILE = f'</script><img src=x onerror="{OWNED}"><script>{OWNED}</script>\'"&lt;\x1b[31m\x00\u202e\u2028{{{{7*7}}}}'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """A parsed page: every start tag with its attributes, the text of scripts and styles, the text outside them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.words = ""
        self.inside: tuple[str, dict[str, str | None]] | None = None
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.raw.append((*self.inside, data))
        else:
            self.words += data

    def policy(self) -> str:
        return next(attrs["content"] or "" for tag, attrs in self.tags if attrs.get("http-equiv") == "Content-Security-Policy")

    def data(self) -> Any:
        return json.loads(next(text for tag, attrs, text in self.raw if attrs.get("id") == "figures"))


def failing() -> dict[str, Any]:
    """The example with one layout that differs, one that could not run and one that was not proved."""
    comparison = copy.deepcopy(EXAMPLE)
    rows = comparison["layouts"]
    first = {"kind": "gradient", "name": "layers.2.attention.wk.weight", "step": 1, "rank": 1, "difference": 3.4e-3}
    first["hint"] = "kv heads summed twice"
    rows[2] |= {"equal": False, "max_gradient_difference": 3.4e-3, "first_difference": first}
    rows[4] |= {"equal": None, "error": "no such schedule", "step_seconds": None, "peak_memory_bytes": None, "spans": None}
    rows[5] |= {"equal": None}
    return comparison


def hostile(value: Any) -> Any:
    """`value` with every string, and every key of free objects, made hostile."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()} | {HOSTILE: HOSTILE}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


@pytest.fixture(scope="module")
def example_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_comparison_page(EXAMPLE, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    return Page(path)


def test_page_is_complete_in_itself(example_page: Page) -> None:
    for tag, attrs in example_page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "video", "audio", "source"), tag
        assert not {"src", "href", "srcset", "action", "style"} & set(attrs), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
    styles = "".join(text for tag, _, text in example_page.raw if tag == "style")
    assert "url(" not in styles and "@import" not in styles
    assert len(re.findall(r"^\* plotly\.js v\d", example_page.source, flags=re.MULTILINE)) == 1
    assert example_page.source.count(inline(page.plotly_source())) == 1


def test_policy_allows_exactly_our_scripts_and_no_request(example_page: Page) -> None:
    def source_hash(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    rules = {rule.split()[0]: rule.split()[1:] for rule in example_page.policy().split(";")}
    executed = [text for tag, attrs, text in example_page.raw if tag == "script" and attrs.get("type") != "application/json"]
    assert len(executed) == 2 and rules["script-src"] == [source_hash(text) for text in executed]
    assert source_hash(next(text for tag, _, text in example_page.raw if tag == "style")) in rules["style-src-elem"]
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"] and rules["img-src"] == ["data:"]
    assert not {"connect-src", "font-src", "frame-src", "style-src"} & set(rules)


def test_page_says_what_the_comparison_says(example_page: Page) -> None:
    assert "10 layouts, all equal to dp=1: 9 within 1e-10 (float64, 3 steps), 1 within 3.1e-6 (float32, 3 steps)" in example_page.words
    headings = ["Loss", "Differences", "Layouts", "Memory per rank", "Bytes sent per step", "One step in time", "How to reproduce"]
    assert re.findall("|".join(headings), example_page.words) == headings
    assert "dist-llm compare configs/quickstart.yaml dp=2 tp=2" in example_page.words and "2.13.0+cpu" in example_page.words
    assert example_page.words.count("✓ equal") == 10 and "189 ms" in example_page.words and "0.55×" in example_page.words
    assert sum(tag == "option" for tag, _ in example_page.tags) == len(example_page.data()["spans"]) == 3


def test_page_is_the_same_bytes_for_the_same_comparison(tmp_path: Path, example_page: Page) -> None:
    write_comparison_page(copy.deepcopy(EXAMPLE), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == example_page.source


def test_hostile_data_is_only_ever_text(tmp_path: Path, example_page: Page) -> None:
    plain_tags = {tag for tag, _ in example_page.tags} | {"ul", "li", "b"}
    write_comparison_page(hostile(failing()), tmp_path / "report.html", title=HOSTILE)
    found = Page(tmp_path / "report.html")
    assert {tag for tag, _ in found.tags} <= plain_tags
    assert sum(tag == "script" for tag, _ in found.tags) == 3 and found.source.count("</script") == 3
    assert not any("onerror" in attrs or "src" in attrs for _, attrs in found.tags)
    assert "{{7*7}}" in found.words and "<img src=x" in found.words
    ours = found.source.replace(inline(page.plotly_source()), "")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2028]", ours)
    drawn = json.dumps(found.data(), ensure_ascii=False)
    assert "onerror" in drawn and "<img" not in drawn and "<script" not in drawn  # plotly is given entities, not tags
    assert "\x1b" not in plain_table(hostile(failing())) and "\x1b" not in drawn


def test_embedded_json_is_inert_and_loses_nothing() -> None:
    data = {"a": ["</script>", "<!--", "&amp;", "é", "\ud800", 1.5, None, True], "b": [math.nan, math.inf]}
    text = embedded(data)
    assert not set("<>&") & set(text) and text.isascii()
    assert json.loads(text) == {"a": ["</script>", "<!--", "&amp;", "é", "?", 1.5, None, True], "b": [None, None]}


def test_inlined_script_cannot_end_its_element() -> None:
    assert inline('a = "</script>";\r\nb = "<!--";') == 'a = "<\\/script>";\nb = "<\\!--";'


def paths_of(value: Any, at: tuple = ()) -> list[tuple]:
    """The paths of all keys and items below `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in [(*at, key), *paths_of(item, (*at, key))]]


SMALL = {**EXAMPLE, "layouts": [EXAMPLE["layouts"][index] for index in (0, 4, 9)]}
PATHS = [path for path in paths_of(SMALL) if len(path) < 6]
WRONG = [None, "text", 3, -1.5, math.nan, [], {}, [None], {"x": None}, True, 10**400]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(["delete", *range(len(WRONG))])), min_size=1, max_size=12))
def test_missing_and_wrong_keys_never_break_anything(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[tuple, Any]]) -> None:
    comparison = copy.deepcopy(SMALL)
    for path, change in changes:
        holder: Any = comparison
        try:
            for key in path[:-1]:
                holder = holder[key]
            if change == "delete":
                del holder[path[-1]]
            else:
                holder[path[-1]] = WRONG[change]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change removed the place
    target = tmp_path_factory.getbasetemp() / "fuzzed.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "plotly_source", lambda: "")
        write_comparison_page(comparison, target)
    assert "How to reproduce" in Page(target).words or not (comparison.get("command") or comparison.get("environment"))
    assert verdict(comparison).sentence in plain_table(comparison)
    table(comparison)


@pytest.mark.parametrize("comparison", [{}, {"layouts": None}, {"layouts": [None, 3, {}]}, {"reference": "dp=1", "layouts": []}])
def test_empty_comparison_has_a_page(tmp_path: Path, comparison: dict[str, Any]) -> None:
    write_comparison_page(comparison, tmp_path / "report.html")
    assert verdict(comparison).sentence in Page(tmp_path / "report.html").words


def rows(*changes: dict[str, Any]) -> dict[str, Any]:
    proof = {"dtype": "float64", "steps": 3, "tolerance": 1e-10}
    layouts = [{"layout": f"dp={place + 2}", "equal": True, "proof": proof} | row for place, row in enumerate(changes)]
    return {"reference": "dp=1", "layouts": layouts}


@pytest.mark.parametrize(
    ("comparison", "state", "sentence"),
    [
        (rows({}), "equal", "dp=2 is equal to dp=1 within 1e-10 (float64, 3 steps)"),
        (rows({}, {}), "equal", "2 layouts, all equal to dp=1 within 1e-10 (float64, 3 steps)"),
        (rows({"layout": "dp=1"}, {}, {}), "equal", "2 layouts, all equal to dp=1 within 1e-10 (float64, 3 steps)"),
        (rows({}, {"equal": False}), "differs", "1 of 2 layouts equal to dp=1 within 1e-10 (float64, 3 steps); 1 differs"),
        (rows({"equal": True, "error": "no"}, {"error": "no"}), "differs", "0 of 2 layouts equal to dp=1; 2 could not run"),
        (rows({}, {"equal": None}), "unknown", "1 of 2 layouts equal to dp=1 within 1e-10 (float64, 3 steps); 1 was not proved"),
        (rows({"equal": 1}), "unknown", "0 of 1 layouts equal to dp=1; 1 was not proved"),
        (
            rows({"layout": "dp=1", "error": "x"}, {}),
            "differs",
            "1 of 2 layouts equal to dp=1 within 1e-10 (float64, 3 steps); 1 could not run",
        ),  # fmt: skip
        (rows(), "unknown", "No layout was compared."),
    ],
)
def test_verdict(comparison: dict[str, Any], state: str, sentence: str) -> None:
    assert (verdict(comparison).state, verdict(comparison).sentence) == (state, sentence)


def test_verdict_names_the_first_differing_tensor() -> None:
    assert verdict(failing()).findings == [
        ("tp=2", "differs first in gradient layers.2.attention.wk.weight, step 1, rank 1: 3.4e-3 (tolerance 1e-10). kv heads summed twice"),
        ("pp=2,schedule=gpipe", "could not run: no such schedule"),
    ]


def test_plain_table_golden() -> None:
    comparison = failing()
    comparison["layouts"] = [comparison["layouts"][index] for index in (0, 1, 2, 4, 5, 8)]
    expected = """\
2 of 5 layouts equal to dp=1 within 1e-10 (float64, 3 steps); 1 differs, 1 could not run, 1 was not proved

layout               equal        max diff       step time  tokens/s  peak memory  bytes/step  bubble
-------------------  -----------  --------  --------------  --------  -----------  ----------  ------
dp=1                 reference           0          341 ms    12,005     29.1 MiB           -   0.0 %
dp=2                 yes           1.8e-14  189 ms (0.55x)    21,638     29.9 MiB    4.01 MiB   0.0 %
tp=2                 NO             3.4e-3  242 ms (0.71x)    16,947     15.4 MiB    16.0 MiB   0.0 %
pp=2,schedule=gpipe  did not run   2.4e-15               -    18,132            -    2.00 MiB  24.3 %
pp=2,schedule=1f1b   -             1.9e-15  221 ms (0.65x)    18,500     18.8 MiB    2.00 MiB  25.6 %
zero=3               yes           2.1e-14  219 ms (0.64x)    18,703     22.7 MiB    14.0 MiB   0.0 %

tp=2: differs first in gradient layers.2.attention.wk.weight, step 1, rank 1: 3.4e-3 (tolerance 1e-10). kv heads summed twice
pp=2,schedule=gpipe: could not run: no such schedule
"""
    assert plain_table(comparison) == expected
    assert plain_table(comparison).isascii()


def test_rich_table_shows_data_and_not_markup() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(rows({"layout": "[bold]dp=2[/bold]", "error": "[/nonsense] \x1b[2J"})))
    shown_text = console.export_text()
    assert "[bold]dp=2[/bold]" in shown_text and "[/nonsense] ?[2J" in shown_text and "did not run" in shown_text


def test_differences_are_drawn_at_their_logarithm_and_zero_at_a_labelled_floor() -> None:
    tiny = {"max_loss_difference": 0.0, "max_gradient_difference": 5e-324, "max_moment_difference": math.nan}
    figure = difference_figure(rows(tiny, {"max_loss_difference": 1e-4})["layouts"])
    assert figure is not None
    points = {trace["name"]: trace for trace in figure["data"] if trace.get("customdata")}
    axis = figure["layout"]["xaxis"]
    names = dict(zip(axis["tickvals"], axis["ticktext"], strict=True))
    assert names[points["loss"]["x"][0]] == "0" and points["loss"]["x"][1] == pytest.approx(-4)
    assert points["loss"]["x"][0] < points["gradient"]["x"][0] == pytest.approx(math.log10(5e-324))
    assert names[points["moment"]["x"][0]] == "NaN" and points["moment"]["customdata"][0][1] == "nan"
    tolerance = next(trace for trace in figure["data"] if trace["name"] == "tolerance")
    assert [x for x in tolerance["x"] if x is not None] == [-10] * 4
    assert all(axis["range"][0] <= x <= axis["range"][1] for trace in points.values() for x in trace["x"])


def test_stacks_add_up_to_the_data() -> None:
    figures = comparison_figures(EXAMPLE)
    for name, predicted_key, measured_key in (("memory", "memory_bytes", None), ("bytes", "sent_bytes_per_step", "sent_bytes_per_step")):
        figure = figures[name]
        totals: dict[tuple[str, float], float] = {}
        for trace in figure["data"]:
            if trace["type"] == "bar" and trace["x"] != [None]:
                for x, y in zip(trace["x"], trace["y"], strict=True):
                    side = "predicted" if "pattern" in trace["marker"] or measured_key is None else "measured"
                    totals[side, round(y)] = totals.get((side, round(y)), 0) + x
        drawn = [row for row in EXAMPLE["layouts"] if row["predicted"][predicted_key]]
        for place, row in enumerate(drawn):
            assert totals["predicted", place] == sum(row["predicted"][predicted_key].values())
            assert measured_key is None or totals["measured", place] == sum(row[measured_key].values())
    marks = next(trace for trace in figures["memory"]["data"] if trace["type"] == "scatter")
    assert marks["x"] == [peak for row in EXAMPLE["layouts"] for peak in row["peak_memory_bytes"]]


def test_curves_that_coincide_are_marked_and_a_departing_one_is_not() -> None:
    comparison = copy.deepcopy(EXAMPLE)
    comparison["layouts"][3]["losses"] = [loss + 0.1 for loss in comparison["layouts"][3]["losses"]]
    comparison["layouts"][7]["losses"] = None
    traces = comparison_figures(comparison)["losses"]["data"]
    assert {trace["meta"]["row"]: trace["meta"]["rope"] for trace in traces} == {row: row != 3 for row in range(11) if row != 7}
    assert traces[3]["y"] == comparison["layouts"][3]["losses"] and traces[3]["x"] == list(range(1, 31))


def test_spans_start_at_zero_and_keep_lengths_ranks_and_unknown_actions() -> None:
    spans = {
        "measured": [
            [0, "0F0", 100.0, 100.25, 0],
            [1, "1F0", 100.25, 100.5, 64],
            [1, "1SF0", 100.5, 100.6],
            [1, "3B0", 100.6, 101.5, 0],
        ],
        "simulated": [[0, "0F0", 0, 0.2, 0], ["bad"], [0, "0B0", 0.4, 0.3, 0], [0, None, None, 1, 2]],
    }
    figure = spans_figure(spans)
    assert figure is not None
    bars = [(trace["name"], trace["xaxis"], *bar) for trace in figure["data"] for bar in zip(trace["x"], trace["base"], strict=True)]
    assert [bar[:2] for bar in bars] == [
        ("forward", "x"), ("forward", "x"), ("backward", "x"), ("send and receive", "x"), ("forward", "x2"),
    ]  # fmt: skip
    assert [bar[2] for bar in bars] == pytest.approx([0.25, 0.25, 0.9, 0.1, 0.2])
    assert [bar[3] for bar in bars] == pytest.approx([0, 0.25, 0.6, 0.5, 0])
    assert next(trace for trace in figure["data"] if trace["name"] == "backward")["marker"]["opacity"] == [0.6]
    assert figure["layout"]["xaxis"]["ticksuffix"] == " s" and figure["layout"]["xaxis2"]["matches"] == "x"


def write_run(folder: Path) -> Path:
    folder.mkdir()
    steps = [{"step": step, "loss": 8 - step / 50, "step_seconds": 0.5, "tokens": 64 * step, "mfu": None} for step in range(1, 101)]
    lines = [json.dumps(step) for step in steps]
    lines[10] = json.dumps({"step": 11, "loss": None, "validation_loss": 7.5, "grad_norm": None, "peak_memory_bytes": [1, 5 * 2**20]})
    lines.insert(20, "garbage")
    again = [json.dumps({"step": step, "loss": 5.0, "tokens": 64 * step}) for step in (99, 100)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, *again]) + '\n{"step": 101, "lo', encoding="utf-8")
    (folder / "config.yaml").write_text(f"model: {{layers: 4}}  # {HOSTILE}\n", encoding="utf-8")
    samples = [{"step": 0, "prompt": "def ", "text": HOSTILE}, {"step": 50, "prompt": "a b", "text": "a b c"}, {"step": None}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return folder


def test_run_page_reads_what_is_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "quickstart")
    run = read_run(folder)
    assert run.unreadable == 1 and [step["step"] for step in run.steps] == list(range(1, 101))
    assert run_sentence(run) == "100 steps: loss 7.980 to 5.000, validation 7.500, 6,400 tokens in 48.5 s"
    figures = run_figures(run)
    assert set(figures) == {"loss", "memory"} and figures["memory"]["data"][0]["y"] == [5 * 2**20]
    write_run_page(folder, folder / "report.html")
    found = Page(folder / "report.html")
    assert "could not be read and are left out: 1." in found.words
    assert found.source.count("</script") == 3 and "onerror" in found.words and "layers: 4" in found.words
    assert "a b c" in found.words and "a ba b" not in found.words


def test_run_page_of_an_empty_folder(tmp_path: Path) -> None:
    write_run_page(tmp_path, tmp_path / "report.html")
    assert "No step with a loss was recorded." in Page(tmp_path / "report.html").words
    assert (tmp_path / "report.html").stat().st_size < 20_000  # nothing to draw: no plotly


def test_thinning_keeps_spikes_and_order_and_the_mean_is_a_mean() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[31_337] = (31_337.0, 99.0)
    points[71_717] = (71_717.0, -99.0)
    kept = thinned(points)
    assert len(kept) <= 1500 and {points[31_337], points[71_717]} <= set(kept) and kept == sorted(kept)
    ramp = [(float(step), float(step)) for step in range(1000)]
    assert running_mean(ramp)[500] == (500.0, pytest.approx(500.0)) and running_mean(ramp[:50]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (show_bytes(0), "0 B"), (show_bytes(1023), "1023 B"), (show_bytes(1536), "1.50 KiB"), (show_bytes(5 * 2**40), "5.00 TiB"),
        (show_bytes(None), "–"), (show_seconds(0.0123), "12.3 ms"), (show_seconds(2.5e-5), "25.0 µs"), (show_seconds(1.5), "1.50 s"),
        (show_seconds(200), "3 min 20 s"), (show_seconds(7500), "2 h 05 min"), (show_seconds(0), "0 s"), (show_seconds("x"), "–"),
        (show_count(5210.4), "5,210"), (show_count(1.234e6), "1.23 M"), (show_count(0.5), "0.500"), (show_count(12, "tok/s"), "12 tok/s"),
        (show_difference(0.0), "0"), (show_difference(1e-10), "1e-10"), (show_difference(3.14e-14), "3.1e-14"),
        (show_difference(math.nan), "nan"),
        (show_fraction(0.125), "12.5 %"), (show_fraction(True), "–"),
        (shown("a\x1b[0m  b\r\nc\u202e" + "x" * 3), "a?[0m  b\nc?xxx"),
    ],
)  # fmt: skip
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected


def test_byte_ticks_are_round_and_reach_past_the_largest() -> None:
    assert byte_ticks(29 * 2**20) == ([index * 5 * 2**20 for index in range(7)], [f"{index * 5} MiB" for index in range(7)])
    for largest in (0, 0.5, 1, 1023, 1024, 3e9, 2.0**70):
        places, _ = byte_ticks(largest)
        assert places[0] == 0 and places[-1] >= largest and len(places) <= 7


def test_report_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run")
    report(folder, json=True)
    assert json.loads(capsys.readouterr().out) == {"version": 1, "kind": "run", "report": str(folder / "report.html")}
    (tmp_path / "comparison.json").write_text(json.dumps(EXAMPLE), encoding="utf-8")
    report(tmp_path, json=False)
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert "10 layouts, all equal" in Page(tmp_path / "report.html").words
    assert find_source(tmp_path / "comparison.json") == ("comparison", tmp_path / "comparison.json")


def test_report_verb_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to report"):
        find_source(tmp_path / "absent")
    path = tmp_path / "comparison.json"
    broken = {b'{"layouts": [}': (":1:14", "Expecting value"), b"\xff\xfe": ("", "codec"), b"[" * 100_000: ("", ""), b"[]": ("", "")}
    for content, (where, found) in broken.items():
        path.write_bytes(content)
        with pytest.raises(DataError) as failure:
            read_comparison(path)
        assert failure.value.where == f"{path}{where}" and found in str(failure.value.found)


def test_terminal_table_imports_nothing_heavy() -> None:
    code = "import sys, dist_llm.report.text, dist_llm.cli.report; print(sorted({'torch', 'plotly', 'jinja2', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


if CHROMIUM:

    @pytest.mark.long
    def test_browser_draws_the_page_and_runs_nothing_else(tmp_path: Path) -> None:
        """Hostile data and even foreign elements put into the finished page neither run nor reach a listening server."""
        requests: list[str] = []

        class Listener(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requests.append(self.path)
                self.send_error(404)

        server = http.server.HTTPServer(("127.0.0.1", 0), Listener)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        path = tmp_path / "report.html"
        write_comparison_page(hostile(failing()), path, title="quiet")
        address = f"http://127.0.0.1:{server.server_port}"
        foreign = f"<script>{OWNED}</script><script src='{address}/a.js'></script><img src='{address}/b.png' onerror=\"{OWNED}\">"
        foreign += f"<link rel=stylesheet href='{address}/c.css'><iframe src='{address}/d'></iframe>"
        path.write_text(path.read_text(encoding="utf-8").replace("<main>", f"<main>{foreign}"), encoding="utf-8")
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
        quiet += ["--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
        command = [str(CHROMIUM), "--headless", *quiet, "--dump-dom"]
        dom = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
        server.shutdown()
        server.server_close()
        assert "<title>quiet</title>" in dom and requests == []
        assert dom.count('class="main-svg"') >= 6 and len(re.findall('class="figure js-plotly-plot"', dom)) == 6
