"""Devices of ranks: one each under NCCL, refused in the same words by every verb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.compare import run as compare_run
from dist_llm.compare.measure import prepare_rank
from dist_llm.compare.run import Comparison, read_layouts
from dist_llm.config.load import load_config
from dist_llm.errors import UsageError
from dist_llm.train.run import prepare_here
from dist_llm.train.setup import choose_device

TINY = "configs/tiny.yaml"


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with one GPU, as far as anyone asks; the devices that were taken."""
    taken: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def settings(tmp_path: Path, *words: str) -> Any:
    return load_config(TINY, [f"data.dir={tmp_path}", "data.max_tokens=20_000", *words]).config


def test_train_and_compare_refuse_more_ranks_than_gpus_in_the_same_words(one_gpu: list[Any], tmp_path: Path) -> None:
    config = settings(tmp_path, "runtime.backend=nccl")
    told = []
    for call in (
        lambda: prepare_here(config, local_ranks=2, tell=lambda message: None),
        lambda: prepare_rank(0, 1, lambda message: None, config.model_dump(by_alias=True), 2),
        lambda: choose_device(config.runtime, local_rank=1),
    ):
        with pytest.raises(UsageError, match="more ranks than GPUs") as caught:
            call()
        told.append(caught.value.as_dict())
    assert told[0] == told[1] == told[2] and told[0]["found"] == "2 ranks, 1 GPU" and "runtime.device=cpu" in told[0]["next"]
    assert one_gpu == [] and not list(tmp_path.iterdir()), "before anything is built"
    assert choose_device(config.runtime, local_rank=0) == torch.device("cuda", 0)


def test_ranks_share_a_gpu_with_gloo_alone_and_the_cpu_is_for_any_number(one_gpu: list[Any], tmp_path: Path) -> None:
    assert choose_device(settings(tmp_path, "runtime.backend=gloo").runtime, local_rank=3) == torch.device("cuda", 0)
    assert choose_device(settings(tmp_path, "runtime.device=cpu").runtime, local_rank=3) == torch.device("cpu")


def test_compare_asks_for_the_ranks_of_its_largest_layout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def no_ranks(world: int, work: Any, config: Any, ranks: int, **options: Any) -> Any:
        asked.append(ranks)
        raise UsageError("enough")

    monkeypatch.setattr(compare_run, "run_ranks", no_ranks)
    config = settings(tmp_path)
    entries, (reference,) = read_layouts(config, ["tp=2", "dp=2,pp=2"], nproc=None), read_layouts(config, ["dp=1"], nproc=None)
    with pytest.raises(UsageError, match="enough"):
        Comparison(config, entries, reference, steps=None, run_dir=tmp_path, say=lambda text: None).run()
    assert asked == [4]
