"""Contestants of the data question: readers of batches, and builders of token files. Without a model."""

from __future__ import annotations

import hashlib
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
from dist_llm.data.publish import publish
from dist_llm.data.store import TokenStore
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

    @property
    def mark(self) -> str:
        """Of the tokens, in names of files made from them."""
        return self.prepared().fingerprint[:12]

    def tokens_as_one(self) -> np.ndarray:
        """All training tokens as one file, mapped: what a simple reader has."""
        path = FOLDER / f"{self.mark}.bin"
        if not path.exists():
            partial = path.with_suffix(f".{id(self)}")
            all_tokens(self.prepared().train[0]).tofile(partial)
            partial.rename(path)
        return np.memmap(path, dtype=np.uint16, mode="r")

    def text(self) -> Path:
        """The documents as JSON lines."""
        path = FOLDER / f"{self.mark}.jsonl"
        if not path.exists():
            store, tokenizer = self.prepared().train[0], self.prepared().tokenizer
            partial = path.with_suffix(f".{id(self)}")
            with partial.open("w") as file:
                for number in range(store.manifest.documents):
                    text = tokenizer.decode(store.document(number).tolist()[:-1])
                    file.write(json.dumps({"text": text}) + "\n")
            partial.rename(path)
        return path


def all_tokens(store: TokenStore) -> np.ndarray:
    """The tokens of a store, uint16."""
    whole = np.empty(len(store), dtype=np.uint16)
    store.read(0, whole)
    return whole


class Silent:
    """A contestant that sends nothing."""

    def booked(self) -> dict[str, float]:
        """Nothing."""
        return {}


# --- reading ---------------------------------------------------------------------------------------------------------


class Reader(Silent):
    """Takes `batches` global batches from an iterator of (tokens, labels)."""

    def __init__(self, setting: DataSetting, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.count, self.shape, self.batches = setting.batches, (setting.batch, setting.sequence), batches

    def step(self, step: int) -> Taken:
        """The number of tokens read is what all must agree on; in the step before the clock starts, labels are held against tokens."""
        total = 0
        for _ in range(self.count):
            tokens, labels = next(self.batches)
            assert tokens.shape == labels.shape == self.shape and tokens.dtype == labels.dtype == torch.int64
            assert step or torch.equal(tokens[:, 1:], labels[:, :-1]), "the labels are not the next tokens"
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
def _read_datasets(setting: Any, way: str, rank: int, world: int) -> Rival:
    """Rows of sequence + 1 tokens in a Parquet file, shuffled by torch's DataLoader.

    way: `rows` has the loader collate single rows, as most scripts do; `batches` asks the data set for a batch's rows at
    once, which its manual advises.
    """
    from datasets import Dataset
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    home = FOLDER / f"{setting.mark}-windows-{setting.sequence}"
    publish(home, lambda target: _write_windows(setting, target / "windows.parquet"))
    dataset = Dataset.from_parquet(str(home / "windows.parquet"), cache_dir=str(home / "cache")).with_format("torch")
    order = RandomSampler(dataset, generator=torch.Generator().manual_seed(SEED))
    if way == "rows":
        loader = DataLoader(dataset, batch_size=setting.batch, sampler=order, drop_last=True)
    else:
        loader = DataLoader(dataset, batch_size=None, sampler=BatchSampler(order, setting.batch, drop_last=True))

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            for batch in loader:
                yield batch["window"][:, :-1], batch["window"][:, 1:]

    return Reader(setting, batches())


def _write_windows(setting: DataSetting, path: Path) -> None:
    """The tokens as rows of sequence + 1, int64, each row of one length."""
    import pyarrow
    import pyarrow.parquet

    tokens, width = setting.tokens_as_one(), setting.sequence + 1
    flat = pyarrow.array(tokens[: len(tokens) // width * width].astype(np.int64))
    pyarrow.parquet.write_table(pyarrow.table({"window": pyarrow.FixedSizeListArray.from_arrays(flat, width)}), path)


# --- tokenising ------------------------------------------------------------------------------------------------------


class Builder(Silent):
    """Turns a file of JSON lines into token files, anew in each step."""

    def __init__(self, setting: DataSetting, name: str) -> None:
        self.text, self.target = setting.text(), FOLDER / f".{name}-{setting.vocab}"
        self.tokenizer: Tokenizer = setting.prepared().tokenizer

    def step(self, step: int) -> Taken:
        """All must agree on the number of tokens written, the ends of documents among them; before the clock starts, on the tokens."""
        shutil.rmtree(self.target, ignore_errors=True)
        self.target.mkdir(parents=True)
        total = self.build()
        return Taken(float(total), None if step else _digest(self.written()))

    def build(self) -> int:
        """Writes the tokens and returns their number."""
        raise NotImplementedError

    def written(self) -> np.ndarray:
        """The tokens that the last step wrote, one after the other."""
        raise NotImplementedError


def _digest(tokens: np.ndarray) -> float:
    """48 bits of the sha256 of some tokens as a number."""
    return float(int.from_bytes(hashlib.sha256(tokens.astype("<u2").tobytes()).digest()[:6], "big"))


class OurBuilder(Builder):
    """The builder behind `dist-llm data build`: hashes, index, manifest, flushed to the disk."""

    def build(self) -> int:
        """One store."""
        build_store(open_corpus(str(self.text), seed=SEED), self.tokenizer, self.target, validation=0.0)
        return json.loads((self.target / "train/manifest.json").read_text())["tokens"]

    def written(self) -> np.ndarray:
        """The whole store."""
        return all_tokens(TokenStore(self.target / "train"))


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

    def written(self) -> np.ndarray:
        """The file."""
        return np.fromfile(self.target / "tokens.bin", dtype=np.uint16)


class DatasetsBuilder(Builder):
    """Hugging Face datasets: load the JSON lines, map, save."""

    def build(self) -> int:
        """Nothing of an earlier step is taken from its cache."""
        import pyarrow.compute
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        inner, end = self.tokenizer.inner, self.tokenizer.end_id

        def encode(rows: dict[str, list[str]]) -> dict[str, list]:
            return {"ids": [[*found.ids, end] for found in inner.encode_batch(rows["text"], add_special_tokens=False)]}

        texts = Dataset.from_json(str(self.text), cache_dir=str(self.target / "cache"))
        encoded = texts.map(encode, batched=True, remove_columns=["text"], load_from_cache_file=False)
        encoded.save_to_disk(self.target / "tokens")
        return int(pyarrow.compute.sum(pyarrow.compute.list_value_length(encoded.data["ids"])).as_py())

    def written(self) -> np.ndarray:
        """The column of ids, flattened."""
        import pyarrow.compute
        from datasets import load_from_disk

        return pyarrow.compute.list_flatten(load_from_disk(str(self.target / "tokens")).data["ids"]).to_numpy()


@rival("build-ours")
def _build_ours(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return OurBuilder(setting, "ours")


@rival("build-simple")
def _build_simple(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return SimpleBuilder(setting, "simple")


@rival("build-datasets", "datasets", "pyarrow")
def _build_datasets(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return DatasetsBuilder(setting, "datasets")
