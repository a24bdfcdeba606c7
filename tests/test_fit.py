"""The run around the steps: what is measured, validated, written and shown."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.config.layout import Layout, parse_layout, resolve, world_of
from dist_llm.config.load import config_tree, load_config
from dist_llm.config.schema import Config, ScheduleConfig, changed
from dist_llm.data.batches import IGNORED, validation_batches
from dist_llm.data.prepare import Prepared, prepare
from dist_llm.data.tokenizer import bytes_tokenizer, train_bpe
from dist_llm.errors import NumericError, SpaceError
from dist_llm.mesh import build_mesh
from dist_llm.model.cost import step_flops_per_token
from dist_llm.train import sample
from dist_llm.train.console import Console, duration, one_line, printable
from dist_llm.train.evaluate import Validation, token_bytes
from dist_llm.train.fit import fit
from dist_llm.train.hardware import PEAKS, mfu, peak_flops
from dist_llm.train.learning_rate import learning_rate
from dist_llm.train.metrics import Lines, Meter, keep_until
from dist_llm.train.setup import make_engine
from dist_llm.train.storage import RunFolder, make_folders
from dist_llm.train.trainer import Trainer
from dist_llm.use.load import load_here, open_sound
from tests.crash import Effect, Recorder
from tests.ranks import Ranks

CONTRACT = {"step", "loss", "loss_hex", "grad_norm", "learning_rate", "tokens", "target_tokens", "step_seconds", "tokens_per_second"}
CONTRACT |= {"mfu", "peak_memory_bytes", "sent_bytes", "data_wait_seconds"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Prepared]:
    home = tmp_path_factory.mktemp("tiny")
    overrides = [f"data.dir={home}", "data.max_tokens=40_000", "schedule.steps=4", "data.document_mask=true", "runtime.dtype=float64"]
    config = load_config("configs/tiny.yaml", overrides).config
    return config, prepare(config.data, seed=config.runtime.seed)


def trainer_of(config: Config, prepared: Prepared) -> Trainer:
    """One process, here."""
    from dist_llm.data.batches import training_batches

    mesh = build_mesh(Layout(), 0, tied=config.model.tied)
    engine = make_engine(config, mesh, device=torch.device("cpu"), dtype=torch.float64)
    order = training_batches(prepared, config.data, global_batch=config.batch.global_, seed=config.runtime.seed)
    return Trainer(config, mesh, engine, order)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_what_other_programs_read(tiny: tuple[Config, Prepared], tmp_path: Path) -> None:
    config = changed(tiny[0], {"track.sample_every": 3, "track.validate_every": 2, "save.every": 3, "runtime.peak_tflops": 0.5})
    told: list[dict[str, Any]] = []
    result = fit(trainer_of(config, tiny[1]), tiny[1], folder=tmp_path, start=0, tell=told.append)
    records = lines(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4] and records[-1] == result["last"]
    for record in records:
        assert record.keys() >= CONTRACT
        assert float.fromhex(record["loss_hex"]) == record["loss"] and record["tokens"] == 512 * record["step"]
        assert 0 < record["target_tokens"] < 512, "the document mask takes some away"
        if record["step"] == 2:  # memory was watched, which makes a step slow
            assert record["tokens_per_second"] is record["mfu"] is record["mfu_causal"] is None
        else:
            assert math.isclose(record["tokens_per_second"], 512 / record["step_seconds"])
            per_token = step_flops_per_token(config.model, 64)
            assert math.isclose(record["mfu"], record["tokens_per_second"] * per_token / 0.5e12) and record["mfu_causal"] < record["mfu"]
        assert record["sent_bytes"] == {}, "one process sends nothing"
        assert 0 <= record["data_wait_seconds"] < record["step_seconds"]
    assert records[0]["peak_memory_bytes"] is None
    peaks = {record["peak_memory_bytes"] for record in records[1:]}
    persistent = 31424 * 8 * 4
    assert len(peaks) == 1 and persistent < peaks.pop() < 3 * persistent
    assert [record["learning_rate"] for record in records] == [1.5e-3, 3e-3, 3e-3, 3e-3]
    assert ["validation_loss" in record for record in records] == [False, True, False, True]
    samples = lines(tmp_path / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 0, 3, 3, 4, 4] and all({"prompt", "text"} < sample.keys() for sample in samples)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]
    kinds = [next(iter(message)) for message in told if "sample" not in message]
    assert sorted(kinds) == ["checkpoint"] * 2 + ["step"] * 4 and kinds[:3] == ["step"] * 3 and kinds[-1] == "checkpoint"


def test_validation_by_hand(tiny: tuple[Config, Prepared]) -> None:
    """Loss, perplexity and bits per byte against the model asked token by token."""
    config, prepared = tiny
    trainer = trainer_of(config, prepared)
    validation = Validation(trainer, prepared)
    found = validation.measure()
    batches = validation_batches(prepared, config.data, global_batch=8)
    assert batches is not None and validation.count == config.track.validate_batches == 2 < batches.num_batches
    total, targets, text = 0.0, 0, 0
    units = [unit.module for stage in trainer.engine.stages for unit in stage.units]
    for number in range(2):
        for batch in batches.micro_batches(number, dp_rank=0, dp_size=1, micro=1):
            context = trainer.context(batch, step=0, training=False)
            with torch.no_grad():
                x = units[0](context)
                for block in units[1:-1]:
                    x = block(x, context)
                likely = units[-1].logits(x).log_softmax(-1)[0]
            kept = batch.labels[0] != IGNORED
            total -= float(likely[kept].gather(1, batch.labels[0][kept, None]).sum())
            targets += int(kept.sum())
            text += sum(int(token) < 256 for token in batch.labels[0][kept])
    assert math.isclose(found["validation_loss"], total / targets, rel_tol=1e-10)
    assert math.isclose(found["validation_perplexity"], math.exp(total / targets), rel_tol=1e-10)
    assert math.isclose(found["validation_bits_per_byte"], total / math.log(2) / text, rel_tol=1e-10)
    assert validation.measure() == found, "the same text every time"
    before = trainer.step(0).loss
    assert validation.measure()["validation_loss"] != found["validation_loss"] and before > 0


def test_validation_without_text(tiny: tuple[Config, Prepared], tmp_path: Path) -> None:
    config = changed(tiny[0], {"data.validation": 0.0, "data.dir": str(tmp_path)})
    prepared = prepare(config.data, seed=7)
    assert set(Validation(trainer_of(config, prepared), prepared).measure().values()) == {None}


def test_bytes_of_every_token() -> None:
    text = "The naïve 日本 fox 🎈\n\n  jumps over\tit. " * 30
    for tokenizer in (bytes_tokenizer(), train_bpe([text], vocab=400)):
        widths = token_bytes(tokenizer)
        assert widths is not None and len(widths) == tokenizer.vocab_size
        ids = tokenizer.encode(text)
        assert int(widths[torch.tensor(ids)].sum()) == len(text.encode())
        assert int(widths[tokenizer.end_id]) == 0
    import tokenizers
    from tokenizers import decoders, models

    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[SEP]": 1}, unk_token="a"))
    words.decoder = decoders.WordPiece()
    from dist_llm.data.tokenizer import Tokenizer

    assert token_bytes(Tokenizer(words, end="[SEP]")) is None


def test_every_layout_writes_the_same_numbers(tiny: tuple[Config, Prepared], ranks: Ranks, tmp_path: Path) -> None:
    config = changed(tiny[0], {"schedule.steps": 3})
    found = {}
    for text in ("dp=1", "dp=2,zero=2", "tp=2,pp=2"):
        shape = resolve(parse_layout(text), world_of(parse_layout(text)))
        folder = tmp_path / text
        folder.mkdir()
        ranks.run(shape.world, "dist_llm.train.run:train_rank", config_tree(config), asdict(shape), str(folder), [])
        found[text] = lines(folder / "metrics.jsonl")
        sent = found[text][2]["sent_bytes"]
        assert set(sent) == {"dp=1": set(), "dp=2,zero=2": {"control", "dp"}, "tp=2,pp=2": {"control", "tp", "pp"}}[text]
    for text in ("dp=2,zero=2", "tp=2,pp=2"):
        for one, two in zip(found["dp=1"], found[text], strict=True):
            for key in ("loss", "grad_norm", "target_tokens", "tokens"):
                assert math.isclose(one[key], two[key], rel_tol=1e-10), (text, key)
        for key in ("validation_loss", "validation_perplexity", "validation_bits_per_byte"):
            assert math.isclose(found["dp=1"][-1][key], found[text][-1][key], rel_tol=1e-10)
        assert found[text][-1]["peak_memory_bytes"] < 1.5 * found["dp=1"][-1]["peak_memory_bytes"]


def test_a_number_that_is_not_finite_is_never_saved(tiny: tuple[Config, Prepared], tmp_path: Path) -> None:
    config = changed(tiny[0], {"optimizer.lr": 1e40, "optimizer.clip": 0.0, "save.every": 1})
    with pytest.raises(NumericError) as caught:
        fit(trainer_of(config, tiny[1]), tiny[1], folder=tmp_path, start=0, tell=lambda message: None)
    assert caught.value.code == 6
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(saved) == len(lines(tmp_path / "metrics.jsonl")) < 4


def test_samples_of_a_padded_vocabulary_are_tokens(tiny: tuple[Config, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it trains, and from its checkpoint."""
    config = changed(tiny[0], {"model.vocab": 400, "track.sample_every": 1, "schedule.steps": 1})
    models: list[Any] = []
    monkeypatch.setattr(sample, "follow", lambda model, *_, **__: models.append(model) or iter([65]))
    fit(trainer_of(config, tiny[1]), tiny[1], folder=tmp_path, start=0, tell=lambda message: None)
    models.append(load_here(*open_sound(tmp_path)))
    assert len(models) == 5 and all(model.absent.tolist() == list(range(257, 400)) for model in models)


def test_lines_after_the_start_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    keep_until(path, 3)
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    file = Lines(path, start=2, writes=True)
    file.write({"step": 3, "loss": 1.0})
    assert lines(path)[-1] == {"step": 3, "loss": 1.0} and len(lines(path)) == 3, "written at once"
    file.close()
    Lines(path, start=0, writes=True).close()
    assert path.read_text() == ""
    silent = Lines(tmp_path / "other", start=0, writes=False)
    silent.write({"step": 1})
    silent.close()
    assert not (tmp_path / "other").exists()
    with pytest.raises(SpaceError):
        Lines(tmp_path / "no/folder", start=0, writes=True)


def test_a_crash_leaves_the_old_lines_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "metrics.jsonl", list[str]()
    path.write_text('{"step": 1}\n')
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *words, name=name, real=real: done.append(name) or real(*words))
    keep_until(path, 3)
    assert done == ["fsync", "replace"] and lines(path) == [{"step": 1}]


def test_the_names_of_new_folders_are_on_the_disk(tmp_path: Path) -> None:
    effects: list[Effect] = []
    for _ in range(2):
        make_folders(Recorder(effects), tmp_path / "runs/first")
    assert [(one.kind, one.path.relative_to(tmp_path).as_posix()) for one in effects] == [
        *(("make", "runs"), ("sync_folder", ".")),
        *(("make", "runs/first"), ("sync_folder", "runs")),
    ]


def test_one_job_a_folder(tmp_path: Path) -> None:
    held = RunFolder(tmp_path / "run")
    with pytest.raises(SpaceError, match="another job") as caught:
        RunFolder(tmp_path / "run")
    assert caught.value.code == 7 and held.path.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(SpaceError):
        RunFolder(tmp_path / "file/run")


def test_the_first_step_is_watched_when_there_is_no_second(tiny: tuple[Config, Prepared]) -> None:
    trainer = trainer_of(*tiny)
    meter = Meter(trainer, start=0, steps=1)
    with meter.measure(0):
        taken = trainer.step(0)
    assert meter.record(taken)["peak_memory_bytes"] > 0
    assert Meter(trainer_of(*tiny), start=2, steps=4).memory_step == 3


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12 and peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12 and peak_flops("NVIDIA H200", "float64") == 33.5e12
    assert peak_flops("NVIDIA L40S", "bfloat16") == 362e12 and peak_flops("NVIDIA L4", "bfloat16") == 121e12
    assert peak_flops("NVIDIA GB200", "bfloat16") == 2500e12 and peak_flops("NVIDIA A10G", "bfloat16") == 70e12
    assert peak_flops("Some CPU", "float32") is None and mfu(1.0, flops_per_token=1.0, peak=None, devices=1) is None
    assert all(a >= b >= c for a, b, c in PEAKS.values())
    assert math.isclose(mfu(1000.0, flops_per_token=6e9, peak=1e12, devices=8) or 0, 0.75)


def test_the_learning_rate_over_a_run() -> None:
    rates = [learning_rate(step, ScheduleConfig(kind="cosine", warmup=4, steps=20, final=0.1), peak=1.0) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and math.isclose(rates[-1], 0.1) and rates[4:] == sorted(rates[4:], reverse=True)


RECORD = {"loss": 5.0, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1234.5, "mfu": None, "step_seconds": 0.01}


def test_plain_lines_are_few_and_safe(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(steps=1000) as console:
        console.take({"progress": ["reading", 0.5]})
        for step in range(1, 1001):
            console.take({"step": {"step": step, **RECORD}})
        console.take({"step": {"step": 1000, **RECORD, "tokens_per_second": None}})
        console.take({"sample": {"step": 7, "prompt": "a\nb", "text": "\x1b[2Jred\u202e" + "x" * 1000}})
        console.take({"step": {"step": 1000, **RECORD, "mfu": 0.5, "validation_loss": 2.0, "validation_bits_per_byte": 1.5}})
    shown = capsys.readouterr().out
    steps = [line for line in shown.splitlines() if line.startswith("step")]
    assert 14 <= len(steps) <= 18 and steps[-1].startswith("step 1000/1000") and "1,234 tokens/s" in steps[0] and "mfu 50.0%" in steps[-1]
    assert "\x1b" not in shown and "\u202e" not in shown and "a⏎b" in shown and max(map(len, shown.splitlines())) < 400
    assert "perplexity 7.39, 1.500 bits per byte" in shown


def test_words() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 200, 3725)] == ["0s", "1m00s", "3m20s", "1h02m"]
    assert printable("a\tb\n\x1b[0m\x07é") == "a\tb\n?[0m?é" and one_line("a\n\tb") == "a⏎ b"


def test_the_bar_of_a_terminal_goes_away(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    ready = {"tokens": 5, "held_out": 0, "vocab": 9, "device": "cpu", "dtype": "float32", "backend": "gloo"}
    with Console(steps=3) as console:
        for message in ({"progress": ["reading [bold]", 0.5]}, {"data": ready}, {"stage": "building"}, {"note": "a [red]note"}):
            console.take(message)
        for step in (1, 2, 3):
            console.take({"step": {"step": step, **RECORD}})
        console.take({"checkpoint": "runs/x/" + "y" * 100})
        console.close()
        console.line("the end")
    shown = capsys.readouterr().out
    assert "a [red]note" in shown and "runs/x/" + "y" * 100 in shown and shown.endswith("the end\n"), "markup is text, paths stay whole"
