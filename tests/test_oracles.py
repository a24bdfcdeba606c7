"""Against implementations that nobody here wrote: transformers, torch's optimizers, DDP, FSDP2, pipelining, DTensor; DeepSpeed.

Each difference is a maximum over all tensors compared, relative to each tensor (see oracles.py). The bound is the
project's, 1e-10 in float64; what is measured lies near 1e-15 (docs/oracles.md).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_llm.config.layout import Layout, concrete, parse_layout
from dist_llm.engines.deepspeed import claim_disk
from dist_llm.engines.deepspeed_package import load_package
from dist_llm.errors import UsageError
from dist_llm.train.proof import Run, Verdict, judge, read_run
from tests.oracles import MODELS, OPTIMIZERS, config_of, worst
from tests.ranks import Ranks

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-10
SGD = {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "clip": 0.5}
PLAIN = {"sequence": 16, "tokenizer": {"kind": "bpe", "vocab": None}}  # one document, positions counted on
TWICE = {"global": 8, "micro": 2}  # two micro-batches on each of two ranks
ADAMW = {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.1, "clip": 0.5}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A helper of this file alone: it imports once what every rank would import anew."""
    helper = Ranks()
    helper.prepare("tests.hugging_face_cases:bring")
    yield helper
    helper.close()


@pytest.fixture(scope="module")
def with_deepspeed(ranks: Ranks) -> None:
    """DeepSpeed in that helper, from the first test on that needs it."""
    ranks.prepare("tests.oracles:with_deepspeed")


def layout(text: str) -> dict[str, Any]:
    """A layout text, made concrete."""
    given = parse_layout(text)
    return vars(concrete(given, given.dp or 1))


def job(model: dict[str, Any] | None = None, *, dtype: str = "float64", steps: int = 3, **sections: Any) -> dict[str, Any]:
    """A proof job: 12 sequences, micro-batches of 2, unequal masks, AdamW then SGD, clipping."""
    small = {"family": "llama", "dim": 24, "heads": 4, "kv_heads": 2, "ffn": 37, **(model or {})}
    schedule = {"kind": "constant", "steps": 8, "warmup": 2}
    config = config_of(small, **{"batch": {"global": 12, "micro": 2}, "schedule": schedule, "optimizer": ADAMW, **sections})
    return {"config": config.model_dump(by_alias=True), "steps": steps, "dtype": dtype, "optimizers": [ADAMW, SGD]}


def run_all(
    ranks: Ranks, work: dict[str, Any], texts: list[str], folder: Path, *, case: str = "proofs", seconds: float = 120
) -> dict[str, Run]:
    """Proof runs of layouts of one world, in one set of ranks, by a case of oracles.py."""
    rows = [(layout(text), str(folder / f"{work['dtype']}-{at}-{text}")) for at, text in enumerate(texts)]
    ranks.run(Layout(**rows[0][0]).world, f"tests.oracles:{case}", work, rows, timeout_seconds=seconds)
    return {text: read_run(Path(place)) for text, (_, place) in zip(texts, rows, strict=True)}


def numbers(verdict: Verdict) -> dict[str, float]:
    """The largest differences, by kind."""
    return {kind: getattr(verdict, kind) for kind in ("loss", "norm", "gradient", "parameter", "moment")}


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_says(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """All models in one process: transformers takes seconds to import."""
    return ranks.run(1, "tests.oracles:hugging_face", timeout_seconds=120)[0]


@pytest.mark.parametrize("model", MODELS)
def test_logits_loss_and_gradients_are_those_of_transformers(transformers_says: dict[str, dict[str, Any]], model: str) -> None:
    """Odd shapes, packed documents, ignored labels; as a plain module, and through the engine in two micro-batches."""
    found = transformers_says[model]
    assert found["logits"] < TOLERANCE
    assert found["loss"] < TOLERANCE and found["engine loss"] < TOLERANCE and found["engine norm"] < TOLERANCE
    assert found["gradient"][0] < TOLERANCE, found["gradient"]
    assert found["engine gradient"][0] < TOLERANCE, found["engine gradient"]


# --- torch's optimizers and clipping ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_says(ranks: Ranks) -> dict[str, dict[str, float]]:
    """All optimizers in one process."""
    return ranks.run(1, "tests.oracles:optimizers", timeout_seconds=60)[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_torch(torch_says: dict[str, dict[str, float]], name: str) -> None:
    """Four steps of AdamW or SGD with weight-decay groups and clip_grad_norm_, from the same gradients."""
    for kind, difference in torch_says[name].items():
        assert difference < 1e-12, (kind, difference)


# --- data parallelism ------------------------------------------------------------------------------------------------


# Weights that stay gathered until the backward, that are gathered anew for it, that stay for the step; in host memory.
FSDP2 = ["zero=2", "zero=3", "zero=3,reduce=step", "zero=3,unshard=step", "zero=2,offload=all", "zero=3,offload=all"]


TIED_AND_DROPPED = {"family": "gpt2", "kv_heads": 4, "dropout": 0.1, "max_positions": 17}


@pytest.mark.parametrize("model", [{}, pytest.param(TIED_AND_DROPPED, marks=pytest.mark.long)], ids=["llama", "gpt2-tied-dropout"])
def test_ddp_and_fsdp2_train_as_we_do(ranks: Ranks, tmp_path: Path, model: dict[str, Any]) -> None:
    """Gradients, weights and moments of 3 steps, under AdamW and SGD: DDP is the reference, our ZeRO stages must follow it."""
    ours = ["dp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3"]
    theirs = ["dp=2,engine=ddp", "dp=2,reduce=micro_batch,engine=ddp", *(f"dp=2,{keys},engine=fsdp2" for keys in FSDP2)]
    runs = run_all(ranks, job(model, batch=TWICE), ours + theirs, tmp_path)
    for text in ours + theirs[1:]:
        verdict = judge(runs[theirs[0]], runs[text], tolerance=TOLERANCE)
        assert verdict.equal, (text, verdict)


@pytest.mark.long
def test_hybrid_sharding_of_fsdp2(ranks: Ranks, tmp_path: Path) -> None:
    """Four ranks: shards over neighbours, replicas across; its weights gathered again in backward, or kept."""
    texts = ["dp=4,zero=3,shard=2", "dp=4,zero=3,shard=2,engine=fsdp2", "dp=4,zero=2,shard=2,engine=fsdp2"]
    runs = run_all(ranks, job(batch={"global": 16, "micro": 2}), texts, tmp_path)
    for text in texts[1:]:
        verdict = judge(runs[texts[0]], runs[text], tolerance=TOLERANCE)
        assert verdict.equal, (text, verdict)


def test_uneven_shards_of_fsdp2(ranks: Ranks, tmp_path: Path) -> None:
    """Three ranks: no dimension of the model divides."""
    runs = run_all(ranks, job(), ["dp=3,zero=3", "dp=3,zero=3,engine=fsdp2"], tmp_path)
    verdict = judge(*runs.values(), tolerance=TOLERANCE)
    assert verdict.equal, verdict


# --- pipelines -------------------------------------------------------------------------------------------------------


def test_torch_pipelining_has_our_loss_and_gradients(ranks: Ranks, tmp_path: Path) -> None:
    """torch's GPipe and 1F1B on two stages against ours, 6 micro-batches, untied (torch's cannot tie)."""
    work = job({"layers": 5}, steps=1, data=PLAIN)
    losses = ranks.run(2, "tests.oracles:torch_pipeline", work, str(tmp_path), timeout_seconds=60)[1]
    ours = run_all(ranks, work, ["pp=2,schedule=gpipe", "pp=2,schedule=1f1b"], tmp_path)
    for run, name in zip(ours.values(), ("ScheduleGPipe", "Schedule1F1B"), strict=True):
        assert abs(run.record.losses[0] / losses[name] - 1) < TOLERANCE
        parts = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1)]
        theirs = {key.split("/")[1]: tensor for part in parts for key, tensor in part.items()}
        difference = worst(tensors(run, 0, "gradient"), theirs)
        assert difference[0] < TOLERANCE, (name, difference)


def tensors(run: Run, step: int, kind: str) -> dict[str, Any]:
    """The tensors of a kind after a step."""
    return {name: torch.from_numpy(tensor) for (at, what, name), tensor in run.tensors.items() if (at, what) == (step, kind)}


# --- tensor parallelism ----------------------------------------------------------------------------------------------


def test_torch_tensor_parallelism_has_our_loss_and_gradients(ranks: Ranks, tmp_path: Path) -> None:
    """transformers' Llama cut by torch's DTensor plan, from the same weights, without and with sequence parallelism.

    Even shapes: DTensor cannot cut 37 features between two ranks.
    """
    work = job({"vocab": 62, "ffn": 38}, steps=1, data=PLAIN)
    losses = ranks.run(2, "tests.oracles:torch_tensor_parallel", work, str(tmp_path), timeout_seconds=120)[0]
    runs = run_all(ranks, work, ["tp=2,sp=off", "tp=2,sp=on"], tmp_path)
    for (text, run), loss, sp in zip(runs.items(), losses, (False, True), strict=True):
        assert abs(run.record.losses[0] / loss - 1) < TOLERANCE, text
        difference = worst(tensors(run, 0, "gradient"), load_file(tmp_path / f"sp-{sp}.safetensors"))
        assert difference[0] < TOLERANCE, (text, difference)


# --- DeepSpeed -------------------------------------------------------------------------------------------------------

DEEPSPEED_OFFLOADED = [f"dp=2,zero={stage},offload=optimizer,engine=deepspeed" for stage in (1, 2, 3)]
DEEPSPEED_OFFLOADED += ["dp=2,zero=3,offload=all,engine=deepspeed"]
BFLOAT16 = ["dp=2,zero=3,reduce=step,offload=all,engine=fsdp2", "dp=2,zero=2,engine=deepspeed"]
BFLOAT16_LATER = [*(f"dp=2,zero={stage},engine=deepspeed" for stage in (1, 3)), *DEEPSPEED_OFFLOADED]
STEEP = {"tied": True, "init_std": 0.3}  # gradients larger than 1


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.parametrize("offloaded", [DEEPSPEED_OFFLOADED[-1:], pytest.param(DEEPSPEED_OFFLOADED[:-1], marks=pytest.mark.long)], ids=len)
def test_deepspeed_trains_as_we_do(ranks: Ranks, tmp_path: Path, offloaded: list[str]) -> None:
    """ZeRO 0-3, AdamW and SGD, float32: within 10 x the distance between our own float32 and float64 runs, kind by kind."""
    works = {dtype: job({"tied": True}, dtype=dtype, batch=TWICE) for dtype in ("float64", "float32")}
    wide, narrow = (run_all(ranks, work, ["dp=1"], tmp_path)["dp=1"] for work in works.values())
    bounds = {kind: 10 * distance for kind, distance in numbers(judge(wide, narrow)).items()}
    texts = [f"dp=2,zero={stage},engine=deepspeed" for stage in range(4)] + offloaded
    for text, run in run_all(ranks, works["float32"], texts, tmp_path).items():
        for kind, difference in numbers(judge(wide, run)).items():
            assert difference < bounds[kind], (text, kind, difference, bounds[kind])


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.long
def test_deepspeed_clips_as_the_config_says(ranks: Ranks, tmp_path: Path) -> None:
    """With clip 0 it does not, although it clips at 1.0 where nothing is said. Gradients and SGD show the factor, AdamW hides it."""
    rules = [{"kind": "adamw", "lr": 3e-3, "weight_decay": 0.0, "clip": 0.0}, {"kind": "sgd", "lr": 0.1, "weight_decay": 0.0, "clip": 0.0}]
    works = {dtype: {**job(STEEP, dtype=dtype, steps=1), "optimizers": rules} for dtype in ("float64", "float32")}
    wide, narrow = (run_all(ranks, work, ["dp=1"], tmp_path)["dp=1"] for work in works.values())
    assert min(wide.record.norms) > 2, "a clip value of 1 would not show"
    texts = ["dp=2,zero=0,engine=deepspeed", "dp=2,zero=2,engine=deepspeed", "dp=2,zero=3,offload=optimizer,engine=deepspeed"]
    told, silent = (run_all(ranks, works["float32"], texts, tmp_path, case=case) for case in ("proofs", "clipped_by_default"))
    for text in texts:
        for step, kind in [(0, "gradient"), (0, "weight"), (1, "gradient"), (1, "weight")]:  # AdamW, then SGD
            runs = (narrow, told[text], silent[text])
            rounding, gap, wrong = (worst(tensors(run, step, kind), tensors(wide, step, kind))[0] for run in runs)
            assert gap < 10 * rounding, (text, step, kind)
            if kind == "gradient":
                assert wrong < 10 * rounding  # taken before clipping
            else:
                assert wrong < 1e-4 if step == 0 else wrong > 1e-2, (text, step, wrong)


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.parametrize("others", [BFLOAT16, pytest.param(BFLOAT16_LATER, marks=pytest.mark.long)], ids=["plain", "the rest"])
def test_bfloat16_gradients_are_summed_and_reduced_in_float32(ranks: Ranks, tmp_path: Path, others: list[str]) -> None:
    """trap 14: every engine takes the same bfloat16 gradients of its micro-batches and ranks; rounding their sums would show."""
    first = "dp=2,zero=3,engine=fsdp2"
    runs = run_all(ranks, job({"tied": True}, dtype="bfloat16", steps=1), [first, *others], tmp_path)
    for text in others:
        difference = worst(tensors(runs[text], 0, "gradient"), tensors(runs[first], 0, "gradient"))
        assert difference[0] < 1e-5, (text, difference)


TAKEN_OVER = ["dp=2,zero=1", "dp=2,engine=ddp", "dp=2,zero=3,engine=fsdp2", "dp=2,zero=3,engine=deepspeed"]
TAKEN_OVER_LATER = [
    *("dp=2,zero=1", "dp=2,zero=1,offload=optimizer", "dp=2,zero=2,engine=fsdp2", "dp=2,zero=3,offload=all,engine=fsdp2"),
    *(f"dp=2,zero={stage},engine=deepspeed" for stage in range(3)),
    *DEEPSPEED_OFFLOADED,
]


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.parametrize("texts", [TAKEN_OVER, pytest.param(TAKEN_OVER_LATER, marks=pytest.mark.long)], ids=["plain", "the rest"])
def test_an_engine_takes_over_the_state_of_another(ranks: Ranks, texts: list[str]) -> None:
    """load_state and evaluate of the engines around libraries: the next losses are the ones of the engine that went on."""
    rows = [layout(text) for text in texts]
    found, other = ranks.run(2, "tests.oracles:resumed", job(dtype="float32", batch=TWICE), rows, timeout_seconds=120)
    assert found == other  # every rank knows the same losses
    for at, text in enumerate(texts):
        went_on, took_over = found[2 * at : 2 * at + 2]
        assert took_over == pytest.approx(went_on, rel=1e-6), text
        assert went_on == pytest.approx(found[0], rel=1e-5), text


@pytest.mark.parametrize(
    ("text", "dtype", "found"),
    [
        ("dp=2,zero=1,engine=deepspeed", "float64", "float64"),
        ("dp=2,engine=ddp", "bfloat16", "bfloat16"),
        ("dp=1,tp=2,engine=ddp", "float32", "dp=1,tp=2,engine=ddp"),
        ("dp=2,recompute=full,zero=3,engine=fsdp2", "float32", "recompute=full"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(ranks: Ranks, tmp_path: Path, text: str, dtype: str, found: str) -> None:
    """A usage error that says what it found."""
    with pytest.raises(UsageError) as caught:
        run_all(ranks, job(dtype=dtype), [text], tmp_path)
    assert caught.value.found == found


def test_a_missing_package_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    with pytest.raises(UsageError) as caught:
        load_package(torch.device("cpu"))
    assert caught.value.next == "pip install 'dist-llm[deepspeed]'"


def test_training_without_the_package_ends_in_one_short_message(tmp_path: Path) -> None:
    """Exit 2 with place, cause and cure, from ranks in which nothing of that name can be imported."""
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'deepspeed'\", name='deepspeed')")
    command = [sys.executable, "-m", "dist_llm", "train", "configs/tiny.yaml", "--layout", "dp=2,zero=1,engine=deepspeed"]
    command += ["--run-dir", str(tmp_path / "run"), f"data.dir={tmp_path}/data"]
    place = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=place, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for words in ("layout.engine", "No module named 'deepspeed'", "pip install 'dist-llm[deepspeed]'"):
        assert words in done.stderr


def test_a_disk_needs_libaio_and_a_folder_of_its_own(tmp_path: Path) -> None:
    """The message names both ways out; the package here is played by its one question."""

    def package(libaio: bool) -> Any:
        builder = SimpleNamespace(is_compatible=lambda verbose: libaio)
        return SimpleNamespace(ops=SimpleNamespace(op_builder=SimpleNamespace(AsyncIOBuilder=lambda: builder)))

    with pytest.raises(UsageError, match="libaio") as caught:
        claim_disk(package(False), str(tmp_path), rank=0)
    assert caught.value.where == "runtime.offload_dir" and caught.value.next is not None
    assert "libaio-dev" in caught.value.next and "host memory" in caught.value.next
    with claim_disk(package(True), str(tmp_path / "new"), rank=3):
        other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        done = subprocess.run([sys.executable, "-c", other, str(tmp_path / "new" / "rank-3.lock")], capture_output=True, check=False)
        assert b"BlockingIOError" in done.stderr  # what another job runs into
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="offloaded there"):
        claim_disk(package(True), str(tmp_path / "file"), rank=0)


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.long
@pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="needs libaio's header")
@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_deepspeed_on_a_disk_is_deepspeed_in_memory(ranks: Ranks, tmp_path: Path, offload: str) -> None:
    """To the bit; parts below 1 MiB it keeps in memory, so the model is larger. The first start compiles for minutes."""
    model, text = {"dim": 128, "kv_heads": 4, "ffn": 300, "layers": 6, "vocab": 1024}, f"dp=2,zero=3,offload={offload},engine=deepspeed"
    disk = tmp_path / "disk"
    works = [job(model, dtype="float32", steps=2, runtime=runtime) for runtime in ({}, {"offload_dir": str(disk)})]
    memory, onto = (run_all(ranks, work, [text], tmp_path, seconds=600)[text] for work in works)
    assert max(numbers(judge(memory, onto)).values()) == 0.0
    assert any(disk.rglob("exp_avg_sq*"))
