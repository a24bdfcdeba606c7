"""Everything that can be refused on one process is, with the arithmetic; the nearest layouts work; nothing heavy is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dist_llm.cli import check as check_verb
from dist_llm.cli import doctor as doctor_verb
from dist_llm.config.layout import canonical, concrete, parse_layout, resolve
from dist_llm.config.load import load_config, load_text
from dist_llm.config.rules import check, nearest_layouts, nearest_worlds, problems
from dist_llm.config.schema import Config
from dist_llm.errors import UsageError, render

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
SMALL = """model: {heads: 8, kv_heads: 2, dim: 64, layers: 4, vocab: 300}
data: {sequence: 64, tokenizer: {kind: bytes}}
batch: {global: 16, micro: 2}
"""
KV_HEADS = "layout.tp: 2 kv heads and tp=3: one must divide the other, 3 over 2 leaves 1"


def config(*overrides: str) -> Config:
    return load_text(SMALL, overrides, name="small.yaml").config


def broken(layout: str, *overrides: str, world: int = 0) -> list[str]:
    given = parse_layout(layout)
    full = resolve(given, world) if world else concrete(given, given.dp or 1)
    return [str(problem) for problem in problems(config(*overrides), full)]


RULES = [
    ("tp=3,sp=off", "", ["layout.tp: 8 heads over tp=3 leaves 2", KV_HEADS]),
    ("tp=4", "model.kv_heads=8", []),
    ("tp=8", "model.kv_heads=2", []),  # each kv head on four ranks
    ("tp=2", "model.kv_heads=3", ["model.kv_heads: 8 heads over 3 kv heads leaves 2", None]),
    ("tp=2", "data.sequence=33", ["layout.sp: sequence 33 over tp 2 leaves 1"]),
    ("tp=2,sp=off", "data.sequence=33", []),
    ("tp=8", "model.ffn=4", ["layout.tp: ffn 4 over tp=8 leaves ranks with nothing"]),
    ("pp=5", "", ["layout.pp: 4 layers are fewer than pp 5 x chunks 1 = 5 stages"]),
    ("pp=4,schedule=interleaved", "", ["layout.pp: 4 layers are fewer than pp 4 x chunks 2 = 8 stages"]),
    ("pp=2,schedule=interleaved", "", []),
    ("pp=2,chunks=2", "", ["layout.chunks: schedule=1f1b has one stage per rank, chunks=2 asks for 2; interleaved has more"]),
    ("dp=3", "", ["batch.global: 16 sequences over dp 3 x micro 2 = 6 leaves 4; 12 or 18 would fit"]),
    ("dp=1", "batch.micro=32", ["batch.global: 16 sequences over dp 1 x micro 32 = 32 leaves 16; 32 would fit"]),
    ("cp=2", "", ["layout.cp: context parallelism (cp > 1) is not available in this version"]),
    ("dp=4,shard=2,zero=1", "", []),
    ("dp=2,shard=1,zero=3", "", []),
    ("dp=4,shard=3,zero=3", "", ["layout.shard: dp 4 x cp 1 = 4 over shard=3 leaves 1"]),
    ("dp=2,shard=4,zero=3", "", ["layout.shard: dp 2 x cp 1 = 2 over shard=4 leaves 2"]),
    (
        "dp=4,shard=2",
        "",
        ["layout.shard: shard=2 says over how many ranks ZeRO splits, zero=0 splits nothing; zero=1, 2 or 3, or leave shard out"],
    ),
    ("dp=2,zero=1,offload=optimizer", "", []),
    ("dp=2,tp=2,pp=2,offload=optimizer", "", []),
    ("dp=2,zero=3,offload=all", "", ["layout.offload: engine=native with zero=3 takes offload=optimizer, offload=all"]),
    ("dp=2,offload=optimizer,engine=ddp", "", ["layout.offload: engine=ddp with zero=0 offloads nothing, offload=optimizer"]),
    ("dp=2,zero=2,offload=all,engine=fsdp2", "", []),
    ("dp=2,zero=3,offload=all,engine=fsdp2", "", []),
    ("dp=2,zero=3,unshard=step,engine=fsdp2", "", []),
    (
        "dp=2,zero=3,offload=optimizer,engine=fsdp2",
        "",
        ["layout.offload: engine=fsdp2 with zero=3 takes offload=all, offload=optimizer"],
    ),
    ("dp=2,zero=1,offload=optimizer,engine=deepspeed", "", []),
    ("dp=2,zero=3,offload=all,engine=deepspeed", "", []),
    ("dp=2,offload=optimizer,engine=deepspeed", "", ["layout.offload: engine=deepspeed with zero=0 offloads nothing, offload=optimizer"]),
    (
        "dp=2,zero=2,offload=all,engine=deepspeed",
        "",
        ["layout.offload: engine=deepspeed with zero=2 takes offload=optimizer, offload=all"],
    ),
    ("dp=2,zero=3,offload=all,engine=deepspeed", "runtime.offload_dir=/fast", []),
    ("dp=2,zero=3,engine=deepspeed", "runtime.offload_dir=/fast", []),  # a comparison's other layouts may have a use for it
    (
        "dp=2,zero=2,offload=optimizer,engine=deepspeed",
        "runtime.offload_dir=/fast",
        [
            "runtime.offload_dir: serves engine=deepspeed with zero=3 alone; "
            "engine=deepspeed with zero=2 offloads to host memory: leave it out"
        ],
    ),
    (
        "dp=2,zero=1,reduce=micro_batch,engine=deepspeed",
        "",
        ["layout.reduce: engine=deepspeed with zero=1 has reduce=step, reduce=micro_batch"],
    ),
    (
        "dp=2,zero=3,unshard=step,engine=deepspeed",
        "",
        ["layout.unshard: engine=deepspeed has unshard=micro_batch, unshard=step; native and fsdp2 take it"],
    ),
    ("dp=1", "model.head_dim=7", ["model.head_dim: rotary positions turn pairs, head_dim 7 is odd"]),
    ("dp=1", "model={family: gpt2, vocab: 300, max_positions: 32}", ["model.max_positions: 32 learned positions for sequence 64"]),
    ("dp=1", "schedule={warmup: 9, steps: 8}", ["schedule.warmup: 9 warmup steps of 8 steps in all"]),
    ("dp=1", "schedule={kind: wsd, warmup: 5, steps: 8, decay: 0.5}", ["schedule.decay: warmup 5 + decay 0.5 x 8 = 9 steps of 8 in all"]),
    ("dp=1", "optimizer={kind: sgd, nesterov: true}", ["optimizer.nesterov: needs sgd with momentum above 0, kind sgd, momentum 0"]),
    ("dp=1", "optimizer={kind: sgd, nesterov: true, momentum: 0.9}", []),
    ("dp=1", "model.vocab=200", ["model.vocab: the tokenizer has 257 tokens, the model 200"]),
    ("dp=1", "data.tokenizer={kind: file}", ["data.tokenizer.path: kind file needs the path of a tokenizer.json"]),
    (
        "dp=1",
        "data.tokenizer={kind: bpe, vocab: 99}",
        ["data.tokenizer.vocab: bpe has at least 257 tokens, every byte and the end of a document, found 99"],
    ),
    (
        "dp=1",
        "runtime={backend: nccl, device: cpu}",
        ["runtime.backend: nccl moves device memory only, device is cpu; gloo serves the CPU"],
    ),
]


@pytest.mark.parametrize("layout, override, lines", RULES, ids=[f"{layout} {override}"[:48] for layout, override, _ in RULES])
def test_a_rule_and_its_arithmetic(layout: str, override: str, lines: list[str | None]) -> None:
    found = broken(layout, *([override] if override else []))
    assert len(found) == len(lines)
    assert all(expected is None or expected in found for expected in lines)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "deepspeed"])
def test_foreign_engines_split_the_batch_alone(engine: str) -> None:
    assert any("runs tp=1 only, tp=2" in line for line in broken(f"dp=2,tp=2,engine={engine}"))
    assert any(line.startswith("layout.zero") for line in broken(f"dp=2,zero=2,engine={engine}")) == (engine == "ddp")
    assert any("recomputes nothing" in line for line in broken(f"dp=2,recompute=full,engine={engine}"))
    sharded = broken(f"dp=4,zero=2,shard=2,engine={engine}")
    refused = "layout.shard: engine=deepspeed splits over all of dp 4, shard=2; native and fsdp2 take it"
    assert (refused in sharded) == (engine == "deepspeed") and (sharded == []) == (engine == "fsdp2")
    assert any("compiles nothing" in line for line in broken(f"dp=2,engine={engine}", "runtime.compile=true"))


def test_check_names_every_broken_rule_and_layouts_that_work() -> None:
    with pytest.raises(UsageError) as caught:
        check(config("layout=tp=3,zero=1", "schedule.warmup=999"), 6)
    assert caught.value.code == 2 and caught.value.details == [
        "layout.tp: 8 heads over tp=3 leaves 2",
        KV_HEADS,
        "layout.sp: sequence 64 over tp 3 leaves 1",
        "schedule.warmup: 999 warmup steps of 200 steps in all",
        "no layout of 6 ranks works with this config",
    ]
    with pytest.raises(UsageError) as caught:
        check(config("layout=tp=3,zero=1"), 12)
    assert caught.value.details[-1] == "these work on 12 ranks: dp=2,tp=2,pp=3,zero=1  dp=4,pp=3,zero=1  dp=1,tp=4,pp=3,zero=1"
    with pytest.raises(UsageError) as caught:
        check(config("layout=dp=2,tp=3,zero=1"), 4)
    assert caught.value.details[0] == "layout: 4 ranks, expected dp 2 x cp 1 x tp 3 x pp 1 = 6 ranks"
    assert caught.value.details[-1] == "these work on 4 ranks: dp=2,tp=2,zero=1  dp=1,tp=4,zero=1  dp=1,tp=2,pp=2,zero=1"
    assert len(render(caught.value).splitlines()) <= 12


@pytest.mark.parametrize(
    ("text", "world", "near"),
    [
        ("dp=8,zero=3,shard=3", 8, "dp=8,zero=3,shard=4  "),
        ("zero=3,shard=16", 8, "dp=8,zero=3  "),
        ("dp=8,shard=4", 8, "dp=8,zero=1,shard=4  "),
        ("dp=4,zero=1,shard=2,engine=deepspeed", 4, "dp=4,zero=1,shard=2  "),
    ],
)
def test_layouts_near_a_shard_keep_it_as_far_as_they_can(text: str, world: int, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(config(f"layout={text}"), world)
    assert caught.value.details[0].startswith("layout.shard")
    assert caught.value.details[-1].startswith(f"these work on {world} ranks: {near}")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("dp=2,zero=3,offload=optimizer,engine=fsdp2", "dp=2,zero=3,offload=all,engine=fsdp2"),
        ("dp=2,zero=1,offload=all", "dp=2,zero=1,offload=optimizer"),
        ("dp=2,zero=2,offload=all,engine=deepspeed", "dp=2,zero=2,offload=optimizer,engine=deepspeed"),
        ("dp=2,offload=optimizer,engine=ddp", "dp=2,offload=optimizer"),
    ],
)
def test_another_offload_is_nearer_than_none(given: str, nearest: str) -> None:
    assert canonical(nearest_layouts(config(), concrete(parse_layout(given), 2))[0]) == nearest


def test_check_returns_the_layout_that_will_run() -> None:
    assert canonical(check(config("layout=tp=2"), 4)) == "dp=2,tp=2"


@pytest.mark.parametrize("text", ["tp=3", "dp=5", "pp=7,zero=1", "dp=16,tp=16", "tp=7,pp=3,sp=off"])
def test_the_nearest_numbers_of_ranks_that_work_are_named(text: str) -> None:
    """Against a search over all numbers of ranks."""
    small = config()
    given = concrete(parse_layout(text), parse_layout(text).dp or 1)
    legal = [size for size in range(1, 600) if nearest_layouts(small, given, 1, world=size)]
    below, above = [size for size in legal if size < given.world], [size for size in legal if size > given.world]
    found = nearest_worlds(small, given, world=given.world)
    assert [layout.world for layout in found] == [*below[-1:], *above[:1]] and not any(problems(small, layout) for layout in found)
    if given.world not in legal:
        with pytest.raises(UsageError) as caught:
            check(config(f"layout={text}"), given.world)
        told = ", ".join(f"{canonical(layout)} on {layout.world}" for layout in found)
        assert caught.value.details[-1].endswith(f"the nearest that do: {told}")
        assert caught.value.next == f"the same command with --layout {canonical(found[0])}"


def test_an_absurd_number_of_ranks_is_answered_at_once() -> None:
    large = config("batch.global=720720", "model.heads=5040", "model.kv_heads=5040", "model.dim=40320", "model.layers=1000")
    began = time.perf_counter()
    for text in ("tp=1099511627776", "dp=999983", "pp=1048577,zero=3,shard=7"):
        with pytest.raises(UsageError) as caught:
            check(large, parse_layout(text).tp * (parse_layout(text).dp or 1) * parse_layout(text).pp)
        assert "no layout of" in caught.value.details[-1]
    assert time.perf_counter() - began < 10


def test_many_broken_rules_keep_the_layouts_that_work_in_sight() -> None:
    wrong = "layout=tp=3,cp=2,ep=3,shard=5,pp=9,chunks=2,engine=ddp,zero=2"
    with pytest.raises(UsageError) as caught:
        check(config(wrong), 8)
    assert "these work on 8 ranks" in render(caught.value)


def test_nearest_layouts_work_and_are_near() -> None:
    """Against a search over everything: what is returned breaks no rule, and nothing legal of the same ranks is missed when it is empty."""
    small = config()
    for world, tp, pp in product((2, 3, 4, 6, 8, 12, 16), (1, 2, 3), (1, 2, 5)):
        given = concrete(parse_layout(f"tp={tp},pp={pp},zero=1"), 1)
        found = nearest_layouts(small, given, world=world)
        assert all(layout.world == world and not problems(small, layout) and layout.zero == 1 for layout in found)
        axes = [(d, t, p) for d, t, p in product(range(1, world + 1), repeat=3) if d * t * p == world]
        legal = [a for a in axes if not problems(small, concrete(parse_layout("dp={},tp={},pp={},sp=off,zero=1".format(*a)), a[0]))]
        assert len(found) == min(3, len(legal))
    assert canonical(nearest_layouts(small, concrete(parse_layout("tp=3"), 1), world=2)[0]) in ("dp=1,tp=2", "dp=2")
    assert nearest_layouts(small, concrete(parse_layout("tp=2"), 1), world=10**9) == []


def test_large_worlds_are_fast() -> None:
    loaded = load_config(CONFIGS / "models" / "llama3-405b.yaml", ["layout.pp=15"])
    with pytest.raises(UsageError, match="16384 ranks"):
        check(loaded.config, 16384)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_config_can_run_on_the_ranks_it_names(path: Path) -> None:
    loaded = load_config(path)
    ranks = re.search(r"^# ranks: (.*)$", path.read_text(), re.MULTILINE)
    assert ranks is not None
    worlds = [int(word) for word in re.findall(r"\d+", re.split(" = | work", ranks[1])[0])]
    for world in worlds:
        layout = check(loaded.config, world)
    if len(worlds) == 1:
        assert ranks[1] == f"{layout.world} = dp {layout.dp} x pp {layout.pp} x cp {layout.cp} x tp {layout.tp}"


def test_schedules_refused_here_are_those_that_cannot_be_generated() -> None:
    limits = pytest.importorskip("dist_llm.schedule.generate").limits
    for name, pp, chunks in product(("gpipe", "1f1b", "interleaved"), (1, 2), (1, 2)):
        found = broken(f"pp={pp},schedule={name},chunks={chunks}")
        assert bool(found) == bool(limits(name, ranks=pp, micro_batches=8, chunks=chunks))


# -- the verbs ------------------------------------------------------------------------------------------------------------------------

app = typer.Typer()
app.command("check")(check_verb.check)
app.command("doctor")(doctor_verb.doctor)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_check_predicts_and_draws(tmp_path: Path) -> None:
    """Persistent bytes are 16 per parameter in fp32 on one rank; the schedule drawn is the one that runs."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    said = run("check", str(path), "runtime.dtype=float32", "--layout", "pp=2,schedule=gpipe", "batch.global=8", "--draw")
    assert "the fullest rank holds" in said and "over pp a step" in said and "of the pipeline idle" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("rank ")]
    assert [[cell for cell in row if cell[0] in "FB"] for row in rows] == [["F0", "F1", "F2", "F3", "B0", "B1", "B2", "B3"]] * 2
    for name, start in (("schedule.svg", "<svg"), ("schedule.json", "{")):
        run("check", str(path), "--layout", "pp=2", "--draw-to", str(tmp_path / name))
        assert (tmp_path / name).read_text().lstrip().startswith(start)
    with pytest.raises(UsageError, match="no such kind of drawing"):
        run("check", str(path), "--layout", "pp=2", "--draw-to", str(tmp_path / "schedule.gif"))


def test_check_prints_the_equations(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    assert run("check", str(path), "batch.global=512", "model.layers=8", "--layout", "tp=4,pp=4", "--world", "64").splitlines()[1:5] == [
        "  llama: 391,744 parameters; 8 layers, dim 64, 8 heads over 2 kv heads of 8, ffn 176, vocab 300",
        "  64 ranks = dp 4 x pp 4 x cp 1 x tp 4",
        "  512 sequences = 4 dp x 64 micro x 2",
        "  6,553,600 tokens = 200 steps x 512 sequences x 64",
    ]


def test_check_explains_every_value(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    answer = json.loads(run("check", str(path), "optimizer.lr=0.5", "--explain", "--json"))
    assert (answer["world"], answer["layout"], answer["tokens_per_step"]) == (1, "dp=1", 1024)
    assert answer["values"]["optimizer.lr"] == {"value": 0.5, "origin": "override optimizer.lr=0.5"}
    assert answer["values"]["model.heads"]["origin"] == f"{path}:1"
    table = run("check", str(path), "--explain")
    assert re.search(r"model\.kv_heads +2 ", table) and "default" in table


def test_check_says_what_is_not_on_this_machine() -> None:
    answer = run("check", str(CONFIGS / "models" / "llama3-8b.yaml"), "--world", "8")
    assert "note: no text at data/pretrain/*.jsonl.zst on this machine" in answer and "note: no tokenizer at" in answer


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    tokenizer = pytest.importorskip("dist_llm.data.tokenizer").bytes_tokenizer()
    saved = tokenizer.save(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(f"model: {{vocab: 100}}\ndata: {{tokenizer: {{kind: file, path: {saved}}}}}")
    with pytest.raises(UsageError, match="more tokens than the model") as caught:
        run("check", str(path))
    assert caught.value.expected == "model.vocab of at least 257"
    assert "can run" in run("check", str(path), "model.vocab=257")


def test_doctor_finds_python_and_memory() -> None:
    rows = {row["name"]: row for row in json.loads(run("doctor", "--json"))["rows"]}
    assert rows["python"]["status"] == "ok" and rows["cores"]["value"] and set(rows["torch"]) == {"name", "status", "value", "hint"}
    assert "python" in run("doctor")


def test_doctor_survives_a_torch_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_verb, "TORCH_PROBE", "raise OSError('libcuda is broken')")
    rows = {row.name: row for row in doctor_verb.findings(deep=True)}
    assert rows["torch import"].status == "warn" and "libcuda is broken" in rows["torch import"].hint


def test_check_and_doctor_import_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; from dist_llm.cli import check, doctor\n"
        f"check.check({str(CONFIGS / 'quickstart.yaml')!r}, explain=True)\n"
        "doctor.doctor()\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'deepspeed', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
