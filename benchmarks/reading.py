"""Contestants of the data question: readers of batches, and builders of token files. Without a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rivals import Rival, Taken, rival
from dist_llm.config.schema import Config
from dist_llm.data.batches import training_batches
from dist_llm.data.build import build_store
from dist_llm.data.corpora import open_corpus
from dist_llm.data.prepare import Prepared, prepare
from dist_llm.data.tokenizer import Tokenizer

FOLDER = Path(__file__).parent.parent / "runs/benchmarks"
SEED = 7


@dataclass(frozen=True)
class DataSetting:
    """What is read: about `tokens` tokens of the default corpus; a step is `batches` global batches, or one build of the whole."""

    tokens: int = 1_000_000
    vocab: int = 2048
    sequence: int = 256
    batch: int = 16
    batches: int = 200
    source: str = "python"
    threads: int = 1

    def quick(self) -> DataSetting:
        """In miniature, for tests."""
        return replace(self, tokens=20_000, vocab=300, sequence=32, batches=4, source="skills")

    def described(self) -> dict[str, Any]:
        """As the results keep it."""
        return asdict(self)

    @cached_property
    def config(self) -> Config:
        """As a config of ours."""
        kind = {"kind": "bpe", "vocab": self.vocab}
        data = {"source": self.source, "sequence": self.sequence, "max_tokens": self.tokens, "dir": str(FOLDER), "tokenizer": kind}
        return Config.model_validate({"model": {"vocab": self.vocab}, "data": data, "batch": {"global": self.batch, "micro": self.batch}})

    def prepared(self) -> Prepared:
        """The token shards; built by whoever comes first, the others wait."""
        return prepare(self.config.data, seed=SEED)

    def tokens_as_one(self) -> np.ndarray:
        """All training tokens as one file, mapped: what a simple reader has."""
        path = FOLDER / f"{self.prepared().fingerprint[:12]}.bin"
        if not path.exists():
            store = self.prepared().train[0]
            whole = np.empty(len(store), dtype=np.int64)
            store.read(0, whole)
            partial = path.with_suffix(f".{id(self)}")
            whole.astype(np.uint16).tofile(partial)
            partial.rename(path)
        return np.memmap(path, dtype=np.uint16, mode="r")

    def text(self) -> Path:
        """The documents as JSON lines."""
        path = FOLDER / f"{self.prepared().fingerprint[:12]}.jsonl"
        if not path.exists():
            store, tokenizer = self.prepared().train[0], self.prepared().tokenizer
            partial = path.with_suffix(f".{id(self)}")
            with partial.open("w") as file:
                for number in range(store.manifest.documents):
                    text = tokenizer.decode(store.document(number).tolist()[:-1])
                    file.write(json.dumps({"text": text}) + "\n")
            partial.rename(path)
        return path


class Silent:
    """A contestant that sends nothing."""

    def booked(self) -> dict[str, float]:
        """Nothing."""
        return {}


# --- reading ---------------------------------------------------------------------------------------------------------


class Reader(Silent):
    """Takes `batches` global batches from an iterator of (tokens, labels)."""

    def __init__(self, setting: DataSetting, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.count, self.batches = setting.batches, batches

    def step(self, step: int) -> Taken:
        """The number of tokens read is what all must agree on."""
        total = 0
        for _ in range(self.count):
            tokens, labels = next(self.batches)
            assert tokens.shape == labels.shape and tokens.dtype == torch.int64
            total += tokens.numel()
        return Taken(float(total))


@rival("read-ours")
def _read_ours(setting: Any, argument: str, rank: int, world: int) -> Rival:
    order = training_batches(setting.prepared(), setting.config.data, global_batch=setting.batch, seed=SEED)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        step = 0
        while True:
            for part in order.micro_batches(step, dp_rank=0, dp_size=1, micro=setting.batch):
                yield part.tokens, part.labels
            step += 1

    return Reader(setting, batches())


@rival("read-simple")
def _read_simple(setting: Any, argument: str, rank: int, world: int) -> Rival:
    """As nanoGPT does: random places in a mapped file."""
    data, length = setting.tokens_as_one(), setting.sequence
    generator = torch.Generator().manual_seed(SEED)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            places = torch.randint(len(data) - length, (setting.batch,), generator=generator).tolist()
            tokens = torch.stack([torch.from_numpy(data[at : at + length].astype(np.int64)) for at in places])
            labels = torch.stack([torch.from_numpy(data[at + 1 : at + 1 + length].astype(np.int64)) for at in places])
            yield tokens, labels

    return Reader(setting, batches())


@rival("read-datasets", "datasets", "pyarrow")
def _read_datasets(setting: Any, argument: str, rank: int, world: int) -> Rival:
    """Rows of sequence + 1 tokens in a Parquet file, shuffled by torch's DataLoader."""
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from torch.utils.data import DataLoader

    data, width, home = setting.tokens_as_one(), setting.sequence + 1, FOLDER / f"datasets-{setting.sequence}"
    rows = data[: len(data) // width * width].reshape(-1, width).astype(np.int64)
    home.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"window": list(rows)}), home / "windows.parquet")
    dataset = Dataset.from_parquet(str(home / "windows.parquet"), cache_dir=str(home)).with_format("torch")
    loader = DataLoader(dataset, batch_size=setting.batch, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(SEED))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            for batch in loader:
                yield batch["window"][:, :-1], batch["window"][:, 1:]

    return Reader(setting, batches())


# --- tokenising ------------------------------------------------------------------------------------------------------


class Builder(Silent):
    """Turns a file of JSON lines into token files, anew in each step."""

    def __init__(self, setting: DataSetting, name: str) -> None:
        self.text, self.target = setting.text(), FOLDER / f".{name}-{setting.vocab}"
        self.tokenizer: Tokenizer = setting.prepared().tokenizer

    def step(self, step: int) -> Taken:
        """The number of tokens written, the ends of documents among them, is what all must agree on."""
        shutil.rmtree(self.target, ignore_errors=True)
        self.target.mkdir(parents=True)
        return Taken(float(self.build()))

    def build(self) -> int:
        """Writes the tokens and returns their number."""
        raise NotImplementedError


class OurBuilder(Builder):
    """The builder behind `dist-llm data build`: hashes, index, manifest, flushed to the disk."""

    def build(self) -> int:
        """One store."""
        build_store(open_corpus(str(self.text), seed=SEED), self.tokenizer, self.target, validation=0.0)
        return json.loads((self.target / "train/manifest.json").read_text())["tokens"]


class SimpleBuilder(Builder):
    """A script of ten lines: the same tokenizer, one file of uint16."""

    def build(self) -> int:
        """Encodes 1000 documents at a time."""
        inner, end, total = self.tokenizer.inner, self.tokenizer.end_id, 0
        texts = [json.loads(line)["text"] for line in self.text.open()]
        with (self.target / "tokens.bin").open("wb") as file:
            for at in range(0, len(texts), 1000):
                ids = [one for found in inner.encode_batch(texts[at : at + 1000], add_special_tokens=False) for one in (*found.ids, end)]
                file.write(np.array(ids, dtype=np.uint16).tobytes())
                total += len(ids)
        return total


class DatasetsBuilder(Builder):
    """Hugging Face datasets: load the JSON lines, map, save."""

    def build(self) -> int:
        """Nothing of an earlier step is taken from its cache."""
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        inner, end = self.tokenizer.inner, self.tokenizer.end_id

        def encode(rows: dict[str, list[str]]) -> dict[str, list]:
            return {"ids": [[*found.ids, end] for found in inner.encode_batch(rows["text"], add_special_tokens=False)]}

        texts = Dataset.from_json(str(self.text), cache_dir=str(self.target / "cache"))
        encoded = texts.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)
        encoded.save_to_disk(self.target / "tokens")
        return sum(len(ids) for ids in encoded["ids"])


@rival("build-ours")
def _build_ours(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return OurBuilder(setting, "ours")


@rival("build-simple")
def _build_simple(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return SimpleBuilder(setting, "simple")


@rival("build-datasets", "datasets")
def _build_datasets(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return DatasetsBuilder(setting, "datasets")
