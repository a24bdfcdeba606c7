"""Golden messages: what a user reads when something is wrong, word for word, and that the command it names is one.

tests/messages/<area>.txt holds each case as its command, its exit code and its whole text. After a wanted change of words:

    DIST_LLM_WRITE_GOLDEN=1 pytest tests/test_messages.py        then read the difference

Every case runs in a folder of its own with `run.yaml`, a config; numbers that vary from machine to machine are normalised.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import re
import shlex
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from dist_llm.cli import main as cli
from dist_llm.cli.way_on import Typed, complete, read_words
from dist_llm.errors import Code, Failure, UsageError
from tests.small_checkpoints import rows_of, save_small, seal, take_up
from tests.told import commands, well_made
from tests.tool_cases import NOT_SHOWN

HOME = Path(__file__).parent / "messages"
WRITE = bool(os.environ.get("DIST_LLM_WRITE_GOLDEN"))
RUN = """\
model: {family: llama, layers: 2, dim: 32, heads: 4, kv_heads: 2, ffn: 88, tied: true}
data:
  source: skills
  tokenizer: {kind: bytes}
  sequence: 64
  max_tokens: 20_000
  dir: data
batch: {global: 8, micro: 1}
optimizer: {kind: adamw, lr: 3e-3}
schedule: {kind: constant, warmup: 2, steps: 10}
save: {dir: run}
"""
FAST = ("check", "doctor", "data build", "verify", "report", "--help", "tokenizer report")  # verbs that are run; others are only read
PACKED = gzip.compress(b"a\n" * 999)

TYPED = Typed(("train", "run.yaml"), "train", {"config_path": "run.yaml"})  # what was typed where a fault is met inside a run
ELSEWHERE = ("hub without a network",)  # whose way on needs what a test does not have


@dataclass(frozen=True)
class Case:
    """A fault: how it is made (in the case's folder), the command, its exit code."""

    name: str
    words: str
    code: int = 2
    make: Callable[[], object] = lambda: None


# --- how faults are made ---------------------------------------------------------------------------------------------------


def put(name: str, content: str | bytes) -> Callable[[], object]:
    def make() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def config(old: str = "", new: str = "", *, more: str = "") -> Callable[[], object]:
    """run.yaml with a text exchanged, and more after it."""
    return put("run.yaml", RUN.replace(old, new) + more)


def spoil(name: str, *, at: int = 10, cut: int = 0) -> None:
    """One bit of a file turned over, or its end cut off."""
    content = bytearray(Path(name).read_bytes())
    content[at] ^= 1
    Path(name).write_bytes(content[: len(content) - cut] if cut else content)


def saved(change: Callable[[Path], object] = lambda folder: None, *, steps: tuple[int, ...] = (3,)) -> Callable[[], object]:
    """`run` with small checkpoints, the newest of which is changed."""

    def make() -> None:
        for step in steps:
            folder = save_small(Path("run"), step=step)
        Path("run/config.yaml").write_text(RUN)
        change(folder)

    return make


def manifest(**change: Any) -> Callable[[Path], object]:
    return lambda folder: seal(folder, json.loads((folder / "manifest.json").read_bytes()) | change)


def built(change: Callable[[Path], object]) -> Callable[[], object]:
    """The data of run.yaml, with its tokens changed."""

    def make() -> None:
        assert cli.run(["data", "build", "run.yaml"]) == 0
        change(next(Path("data").glob("skills-*/train")))

    return make


def lines(*texts: str) -> Callable[[], object]:
    return put("text.jsonl", "".join(text + "\n" for text in texts))


def chats(*texts: str, first: bool = True, own: str = "") -> Callable[[], object]:
    """A run over conversations: a sound one first, and a template of the user's own."""
    sound = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'

    def make() -> None:
        lines(*([sound] if first else []), *texts)()
        config("source: skills", "source: text.jsonl\n  validation: 0\n  chat: {template: chatml}")()
        if own:
            Path("own.jinja").write_text(own)

    return make


def tokenizer(change: dict[str, Any]) -> Callable[[], object]:
    """A small tokenizer.json, changed."""

    def make() -> None:
        from dist_llm.data.tokenizer import bytes_tokenizer

        bytes_tokenizer().save(Path("words"))
        tree = json.loads(Path("words/tokenizer.json").read_bytes())
        Path("words/tokenizer.json").write_text(json.dumps(tree | change))
        Path("words/tokenizer_config.json").unlink()

    return make


def parquet(column: str, values: list[Any]) -> Callable[[], object]:
    """x.parquet with one column."""

    def make() -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({column: values}), "x.parquet")

    return make


def metrics(run: str, *losses: str) -> None:
    put(f"{run}/metrics.jsonl", "".join(json.dumps({"step": n + 1, "loss_hex": loss}) + "\n" for n, loss in enumerate(losses)))()


def two_runs() -> None:
    metrics("a", "0x1p+0")
    put("b/metrics.jsonl", json.dumps({"step": 7, "loss_hex": "0x1p+0"}) + "\n")()


FILE = "data.tokenizer.kind=file data.tokenizer.path=words/tokenizer.json"
IDS = "data.tokenizer.kind=ids data.tokenizer.vocab=99 data.tokenizer.end=98"
TEXT = "data.source=text.jsonl data.validation=0"
WRONG = "modle: 1\nlr: 2\nbatch: {micro: x, size: 3}\nmodel: {layers: 0, dim: '64', hidden_size: 3, tied: 1, family: lama}\n"
WRONG += "layout: tp=x,tpp=2\n"


def theirs(
    change: Callable[[Path], object] = lambda home: None, *, tensors: dict[str, Any] | None = None, **values: Any
) -> Callable[[], None]:
    """A Hugging Face folder of a tiny model, changed. tensors: shapes by key, None leaves one out."""

    def make() -> None:
        import torch
        from safetensors.torch import save_file

        from dist_llm.data.tokenizer import bytes_tokenizer

        about = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
        about |= {"vocab_size": 257, "tie_word_embeddings": True, "max_position_embeddings": 64, **values}
        shapes = {f"self_attn.{part}_proj": (8, 8) for part in "qkvo"} | {"mlp.down_proj": (8, 12), "mlp.up_proj": (12, 8)}
        shapes |= {"mlp.gate_proj": (12, 8), "input_layernorm": (8,), "post_attention_layernorm": (8,)}
        found = {f"model.layers.0.{key}.weight": shape for key, shape in shapes.items()}
        found |= {"model.embed_tokens.weight": (257, 8), "model.norm.weight": (8,)} | (tensors or {})
        home = Path("theirs")
        bytes_tokenizer().save(home)
        (home / "config.json").write_text(json.dumps(about))
        save_file({key: torch.ones(shape) for key, shape in found.items() if shape}, home / "model.safetensors")
        change(home)

    return make


def leading_out(home: Path) -> None:
    (home / "model.safetensors").unlink()
    (home / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "../../secret.safetensors"}}')


def pickled(home: Path) -> None:
    (home / "model.safetensors").rename(home / "pytorch_model.bin")


def there() -> None:
    theirs()()
    assert cli.run(["import", "theirs", "run"]) == 0


def other_words() -> None:
    """base.yaml, whose base is theirs, and another tokenizer."""
    theirs()()
    tokenizer({"normalizer": {"type": "Lowercase"}})()
    Path("base.yaml").write_text(f"base: theirs\n{RUN[RUN.index('data:') :]}")


CASES: dict[str, tuple[Case, ...]] = {
    "usage": (
        Case("unknown verb", "trian run.yaml"),
        Case("unknown flag", "train run.yaml --stpes 3"),
        Case("flag that is no number", "check run.yaml --world two"),
        Case("flag out of range", "check run.yaml --world 0"),
        Case("nothing given", "check"),
        Case("unknown verb below data", "data buidl run.yaml"),
        Case("nothing to compare", "compare run.yaml data.sequence=32"),
        Case("layouts that cannot run", "compare run.yaml tp=3 dq=2 dp=3"),
        Case("more ranks than given", "compare run.yaml dp=4 --nproc 2"),
        Case("reference that is no layout", "compare run.yaml dp=2 --reference one"),
        Case("baseline is not there", "compare run.yaml dp=1 --baseline before.json"),
        Case("baseline is no comparison", "compare run.yaml dp=1 --baseline before.json", make=put("before.json", '{"a": 1}')),
        Case("three runs", "compare a b c", make=two_runs),
        Case("no run to compare", "compare a b", 3, make=lambda: Path("a").mkdir()),
        Case("runs without a common step", "compare a b", 3, make=two_runs),
        Case("metrics of a run are no numbers", "compare a a", 3, make=put("a/metrics.jsonl", '{"step": 1, "loss_hex": "nan?"}\n')),
        Case("steps to profile", "train run.yaml --profile 5:2"),
        Case("kind of drawing", "check run.yaml --layout pp=2 --draw-to x.gif"),
        Case("drawing into no folder", "check run.yaml --layout pp=2 --draw-to no/x.svg", 7),
        Case("schedule too long to draw", "check run.yaml batch.global=1000000 --layout pp=2 --draw"),
        Case("nothing to report", "report run"),
        Case("comparison is not JSON", "report comparison.json", 3, make=put("comparison.json", '{"layouts": [}')),
        Case("JSON is no comparison", "report comparison.json", 3, make=put("comparison.json", "[]")),
        Case("temperature is no number", "sample run --temperature nan"),
        Case("probability over one", "sample run --top-p 2"),
        Case("temperature below zero", "chat run --temperature -1"),
        Case("several flags out of range", "sample run --min-p 1.5 --repetition-penalty 0"),
        Case("empty prompt", "sample run --prompt ''"),
        Case("no file of prompts", "sample run --prompts prompts.txt"),
        Case("lines without a prompt", "sample run --prompts p.jsonl", 3, make=put("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n3\n')),
        Case("empty stop string", "sample run --stop ''"),
        Case("dtype of a model", "eval run --dtype float16"),
        Case("no such task", "eval run --tasks copy,cpoy"),
        Case("text left out and given", "eval run --no-text --data x.txt"),
        Case("tokenizer folder is there", "tokenizer train skills --out made", make=lambda: Path("made").mkdir()),
        Case("no such benchmark", "bench speeed"),
    ),
    "config": (
        Case("no such file", "train rnu.yaml"),
        Case("a folder", "check ."),
        Case("too large", "check run.yaml", make=put("run.yaml", "#" * (1 << 20) + "\n")),
        Case("not UTF-8", "check run.yaml", make=put("run.yaml", b"model:\n  family: \xff\n")),
        Case("bracket left open", "check run.yaml", make=config("tied: true}", "tied: true")),
        Case("tab for indentation", "check run.yaml", make=put("run.yaml", "model:\n\tlayers: 2\n")),
        Case("misspelt key", "check run.yaml", make=config("layers:", "layerz:")),
        Case("key of another trainer", "check run.yaml", make=config("lr:", "learning_rate:")),
        Case("key in the wrong section", "check run.yaml", make=config("warmup: 2", "lr: 2")),
        Case("key twice", "check run.yaml", make=config(more="batch: {global: 4}\n")),
        Case("text for a number", "check run.yaml", make=config("dim: 32", "dim: '32'")),
        Case("out of bounds", "check run.yaml", make=config("warmup: 2", "warmup: -2, final: 1.5")),
        Case("no such choice", "check run.yaml", make=config("adamw", "adam")),
        Case("shorthand", "check run.yaml model.bias=maybe"),
        Case("width over heads", "check run.yaml model.dim=33"),
        Case("much at once", "check run.yaml", make=put("run.yaml", WRONG + "".join(f"key{n}: 1\n" for n in range(9)))),
        Case("alias", "check run.yaml", make=put("run.yaml", "model: &m {layers: 2}\nbatch: *m\n")),
        Case("tag", "check run.yaml", make=put("run.yaml", "model: !!python/object:os.system {}\n")),
        Case("override without a value", "check run.yaml model.layers"),
        Case("override of no key", "train run.yaml optimizer.learnig_rate=1 --steps 3"),
        Case("empty list of texts", "check run.yaml data.source=[]"),
        Case("layout text", "check run.yaml --layout dp=2,tq=2,zero=4"),
        Case("dtype flag", "train run.yaml --dtype float16"),
        Case("secret", "check run.yaml data.source=https://me:word@example.org/text.jsonl"),
        Case("endless patience", "check run.yaml runtime.timeout_seconds=1e300"),
    ),
    "layout": (
        Case("heads over tp", "check run.yaml --layout tp=3 --world 6"),
        Case("not so many ranks", "check run.yaml --layout dp=2,tp=2 --world 6"),
        Case("batch over dp", "check run.yaml --world 3"),
        Case("batch over micro", "train run.yaml batch.micro=3"),
        Case("sequence over tp", "check run.yaml data.sequence=63 --layout tp=2"),
        Case("layers over pp", "check run.yaml --layout pp=4"),
        Case("chunks", "check run.yaml --layout pp=2,chunks=2"),
        Case("engine", "check run.yaml --layout dp=2,tp=2,engine=ddp,zero=1 --world 4"),
        Case("shard without zero", "check run.yaml --layout dp=4,shard=2"),
        Case("shard does not divide", "check run.yaml --layout dp=4,shard=3,zero=3"),
        Case("not in this version", "check run.yaml --layout cp=2"),
        Case("no layout works", "check run.yaml --layout tp=7 --world 7"),
        Case("offload", "check run.yaml --layout dp=2,zero=1,offload=all"),
        Case("too many ranks", "check run.yaml --world 2000000"),
        Case("graph on a CPU", "check run.yaml runtime.cuda_graph=true runtime.device=cpu"),
        Case("warmup longer than the run", "train run.yaml --steps 1"),
    ),
    "data": (
        Case("no such text", "data build run.yaml data.source=texts/*.txt"),
        Case("folder without text", "data build run.yaml data.source=texts", 3, make=put("texts/x.png", "x")),
        Case("bad lines", f"data build run.yaml {TEXT}", 3, make=lines('{"text": "good"}', '{"text": 3}', "bad", '{"txt": "x"}', "[]")),
        Case("many bad lines", f"data build run.yaml {TEXT}", 3, make=lines(*["bad"] * 20, '{"text": "good"}')),
        Case("last line is cut", f"data build run.yaml {TEXT}", 3, make=put("text.jsonl", '{"text": "good"}\n{"text": "g')),
        Case("empty file", f"data build run.yaml {TEXT}", 3, make=put("text.jsonl", "")),
        Case("too little text", f"data preview run.yaml {TEXT}", 3, make=lines('{"text": "few words"}')),
        Case("no text but bytes", "data build run.yaml data.source=text.txt", 3, make=put("text.txt", b"a\nb\x00c\n")),
        Case("text is not UTF-8", "data build run.yaml data.source=text.txt", 3, make=put("text.txt", b"a\nb\xffc\n")),
        Case("packed text is cut", "data build run.yaml data.source=text.txt.gz", 3, make=put("text.txt.gz", PACKED[:-9])),
        Case("token shard is damaged", "data preview run.yaml", 3, make=built(lambda train: spoil(f"{train}/tokens-00000.bin"))),
        Case("token shard is gone", "data preview run.yaml", 3, make=built(lambda train: (train / "tokens-00000.bin").unlink())),
        Case("manifest is damaged", "data preview run.yaml", 3, make=built(lambda train: spoil(f"{train}/manifest.json"))),
        Case("data folder cannot be made", "data build run.yaml", 7, make=put("data", "a file")),
        Case("no such tokenizer", f"data build run.yaml {FILE}"),
        Case("file is no tokenizer", f"check run.yaml {FILE}", 3, make=put("words/tokenizer.json", "{}")),
        Case("tokenizer without an end", f"data build run.yaml {FILE}", make=tokenizer({"added_tokens": []})),
        Case("tokenizer larger than the model", f"check run.yaml {FILE} model.vocab=99", make=tokenizer({})),
        Case("tokenizer of another size", f"data build run.yaml {FILE} data.tokenizer.vocab=99", make=tokenizer({})),
        Case("ids without numbers", f"check run.yaml {IDS[:23]}"),
        Case("ids and text", f"data build run.yaml {IDS}"),
        Case("token files and a new tokenizer", "data build run.yaml data.source=x.bin data.tokenizer.kind=bpe", make=put("x.bin", b"")),
        Case("token file is cut", f"data build run.yaml data.source=x.bin {IDS}", 3, make=put("x.bin", b"12345")),
        Case("id that is none", f"data build run.yaml data.source=x.bin {IDS}", 3, make=put("x.bin", bytes(9) + b"a")),
        Case("no such index", f"data build run.yaml data.source=x.idx {IDS}", 3, make=lambda: (put("x.idx", b"MM")(), put("x.bin", b"")())),
        Case("index without ids", f"data build run.yaml data.source=x.idx {IDS}", make=put("x.idx", b"MM")),
        Case("no such format of tokens", "data export run.yaml made --format fairseq"),
        Case("exported before", "data export run.yaml made", make=lambda: Path("made").mkdir()),
        Case("table is none", "data build run.yaml data.source=x.parquet", 3, make=put("x.parquet", b"PAR1")),
        Case("no such column", "data build run.yaml data.source=x.parquet", 3, make=parquet("body", ["a"])),
        Case("column of numbers", "data build run.yaml data.source=x.parquet data.text_key=n", 3, make=parquet("n", [1])),
        Case("bad rows", "data build run.yaml data.source=x.parquet data.validation=0", 3, make=parquet("text", ["a", None, "b"])),
        Case("no name of the hub", "check run.yaml data.source=hub:../x"),
        Case("hub without a network", "data preview run.yaml data.source=hub:owner/name", 3),
        Case("vocabulary too small for a bpe", "tokenizer train skills --out made --vocab 99"),
        Case("vocabulary too large for a bpe", "check run.yaml data.tokenizer.kind=bpe model.vocab=99999999"),
    ),
    "interop": (
        Case("no such folder", "import theirs made", 4),
        Case("pickled weights", "import theirs made", make=theirs(pickled)),
        Case("a tensor is missing", "import theirs made", 4, make=theirs(tensors={"model.norm.weight": None})),
        Case("a tensor too many", "import theirs made", 4, make=theirs(tensors={"model.layers.2.mlp.up_proj.weight": (4, 8)})),
        Case("another shape", "import theirs made", 4, make=theirs(tensors={"model.norm.weight": (9,)})),
        Case("weights are cut", "import theirs made", 4, make=theirs(lambda home: spoil(str(home / "model.safetensors"), cut=1))),
        Case("header is not sound", "import theirs made", 4, make=theirs(lambda home: spoil(str(home / "model.safetensors"), at=8))),
        Case("index leads out", "import theirs made", 4, make=theirs(leading_out)),
        Case("unknown kind of model", "import theirs made", make=theirs(model_type="mamba")),
        Case("no fast tokenizer", "import theirs made", make=theirs(lambda home: (home / "tokenizer.json").unlink())),
        Case("run folder is taken", "import theirs run", make=lambda: (theirs()(), saved()())),
        Case("no such base", "check run.yaml base=nowhere", 4),
        Case("base contradicts", "check run.yaml base=theirs model.ffn=99", make=theirs()),
        Case("tokenizer of another base", f"check base.yaml {FILE}", make=other_words),
        Case("nothing to export", "export run made", 4),
        Case("export into a folder that is there", "export run theirs", make=there),
        Case("dtype to export", "export run made --dtype int4"),
        Case("size of a shard", "export run made --shard-size 5XB"),
    ),
    "checkpoint": (
        Case("no such run", "verify run", 4),
        Case("run without a checkpoint", "sample run", 4, make=put("run/config.yaml", RUN)),
        Case("half a checkpoint", "verify run", 4, make=saved(lambda folder: (folder / "COMMIT").unlink())),
        Case("half a step folder", "verify run/checkpoints/step-00000003", 4, make=saved(lambda folder: (folder / "COMMIT").unlink())),
        Case("damaged manifest", "verify run", 4, make=saved(lambda folder: spoil(f"{folder}/manifest.json"))),
        Case("damaged tensors", "verify run", 4, make=saved(lambda folder: spoil(f"{folder}/rank-00000.safetensors", at=-5))),
        Case("cut file", "sample run", 4, make=saved(lambda folder: spoil(f"{folder}/rank-00001.safetensors", cut=1))),
        Case("file is gone", "verify run", 4, make=saved(lambda folder: (folder / "rank-00001.json").unlink())),
        Case("newer format", "verify run", 4, make=saved(manifest(version=9))),
        Case("older format", "sample run", 4, make=saved(manifest(version=1))),
        Case("manifest contradicts itself", "verify run", 4, make=saved(manifest(world=3))),
        Case("tokenizer is none", "sample run", 3, make=saved()),
        Case("chat without a checkpoint", "chat run", 4),
        Case("eval of damaged tensors", "eval run", 4, make=saved(lambda folder: spoil(f"{folder}/rank-00000.safetensors", at=-5))),
        Case("resume of nothing", "train run.yaml --resume auto", 4),
        Case("resume from nowhere", "train run.yaml --resume elsewhere", 4),
        Case("run folder holds a run", "train run.yaml", make=saved(steps=(3, 5))),
        Case("run folder is a file", "train run.yaml", 7, make=put("run", "a file")),
    ),
    "chat": (
        Case("conversations that do not fit", "data build run.yaml", 3, make=chats(
            '{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}',
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
            '{"messages": [{"role": "user", "content": "a"}]}', '{"conversations": [{"from": "human", "value": "a"}]}')),
        Case("tools that a template does not show", "data build run.yaml", 3, make=chats(*NOT_SHOWN)),
        Case("nothing is trained", "data build run.yaml", 3, make=chats(
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": false}]}')),
        Case("shape is not known", "data build run.yaml", 3, make=chats('{"question": "a", "answer": "b"}', first=False)),
        Case("two shapes at once", "data build run.yaml", 3, make=chats('{"prompt": "a", "completion": "b", "messages": []}', first=False)),
        Case("conversation too long", "data preview run.yaml data.sequence=12", 3, make=chats()),
        Case("conversations in a row", "check run.yaml data.packing=concat data.source=python", make=chats()),
        Case("no such template", "data build run.yaml data.chat.template=chatlm", make=chats()),
        Case("template is not Jinja", "data build run.yaml data.chat.template=own.jinja", make=chats(own="{% if %}")),
        Case("end is never trained", "data build run.yaml data.chat.template=own.jinja", make=chats(
            own="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")),
        Case("template rewrites", "data build run.yaml data.chat.template=own.jinja", make=chats(
            own="{% for m in messages %}{{ m.content if loop.last else '' }}<|im_end|>{% endfor %}")),
        Case("page of a text", "data preview run.yaml --html page.html"),
    ),
}  # fmt: skip


# --- the check -------------------------------------------------------------------------------------------------------------


def normal(text: str, folder: Path) -> str:
    """Without what varies: folders, hashes, sizes of this disk, trailing blanks."""
    text = text.replace(str(folder), "HERE").replace(str(folder.resolve()), "HERE")
    text = re.sub(r"\b[0-9a-f]{64}\b", "<sha256>", text)
    text = re.sub(r"\b[0-9a-f]{32}\b", "<xxh128>", text)
    text = re.sub(r"\bhash [0-9a-f]{16}\b", "hash <hash>", text)
    text = re.sub(r"\b(skills|text)-[0-9a-f]{12}\b", r"\1-<key>", text)
    return re.sub(r"[\d,]+ bytes free", "<free> bytes free", text)


def golden(area: str, name: str, found: str) -> None:
    """Compares one message with what is kept, or keeps it."""
    path = HOME / f"{area}.txt"
    kept = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", path.read_text() if path.exists() else "", flags=re.MULTILINE))
    if WRITE:
        kept[name] = found + "\n\n"
        order = [case.name for case in CASES.get(area, ())] or sorted(kept)
        path.write_text("".join(f"## {name}\n{kept[name].strip()}\n\n" for name in order if name in kept))
    assert kept.get(name, "").strip() == found.strip()


def accepted(words: list[str], *, runs: bool) -> None:
    """A command that is named is one: run where it is fast, else read to its last word: where it would train, or after a deed."""
    if "--help" in words or (runs and any(" ".join(words).startswith(verb) for verb in FAST)):
        assert cli.run(words) == 0, words
        return
    command: Any = typer.main.get_command(cli.app)
    context = command.context_class(command, info_name="dist-llm")
    while hasattr(command, "get_command"):
        name, *words = words
        command = command.get_command(context, name)
        context = command.context_class(command, info_name=name, parent=context)
    command.make_context(command.name, words, parent=context.parent)


@pytest.fixture(params=[(area, case) for area, cases in CASES.items() for case in cases], ids=lambda pair: f"{pair[0]}: {pair[1].name}")
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Case]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    Path("run.yaml").write_text(RUN)
    return request.param


def test_a_message_is_as_it_was_and_its_command_is_one(
    case: tuple[str, Case], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    area, fault = case
    fault.make()
    capsys.readouterr()
    typed = shlex.split(fault.words.replace("*", "'*'"))
    monkeypatch.setattr("sys.argv", ["dist-llm", *typed])
    code = cli.run(typed)
    out, err = capsys.readouterr()
    found = normal(err, tmp_path)
    golden(area, fault.name, f"$ dist-llm {fault.words}\nexit {code}\n{found}")
    assert code == fault.code
    well_made(found)
    deed = re.search(
        r"^  next: +(mend |change |name |make |once |bring |rename |in Python|.*=(PATH|NAME|DIR|VALUE))", err, flags=re.MULTILINE
    )
    for words in commands(err):
        mend(fault, words)
        accepted(words, runs=not deed and fault.name not in ELSEWHERE)


def mend(fault: Case, words: list[str]) -> None:
    """What the user does first, where the message says so."""
    if "remove" in fault.name or "damaged" in fault.name or "is gone" in fault.name:
        shutil.rmtree("data", ignore_errors=True)
    if fault.name == "bad rows":
        lines('{"text": "good"}')()  # the same command is tried with lines
    if words[:1] == ["report"]:
        metrics("run", "0x1p+0")


def test_there_are_many() -> None:
    names = [case.name for cases in CASES.values() for case in cases]
    assert len(names) == len(set(names)) > 90 and len(list(HOME.glob("*.txt"))) == len(CASES) + 1


@pytest.mark.parametrize("verb", [[], ["train"], ["check"], ["data", "build"]])
def test_help_lists_every_exit_code(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*verb, "--help"]) == 0
    listed = capsys.readouterr().out.split("Exit codes:")[1]
    assert {*map(int, re.findall(r"\b\d+\b", listed))} == {*map(int, Code)}


@pytest.mark.parametrize(
    ("way", "typed", "filled"),
    [
        ("dist-llm train CONFIG --resume auto", "train a.yaml --resume old --nproc 2", "dist-llm train a.yaml --nproc 2 --resume auto"),
        (
            "dist-llm check CONFIG",
            "train a.yaml b.c=1 --steps 3 --data 'x y'",
            "dist-llm check a.yaml b.c=1 schedule.steps=3 'data.source=x y'",
        ),
        ("the same command with --layout dp=2", "check a.yaml layout.tp=3 --world 3", "dist-llm check a.yaml --layout dp=2"),
        ("the same command with b.c=2, or none", "train a.yaml b.c=1 --steps 3", "dist-llm train a.yaml --steps 3 b.c=2, or none"),
        ("the same command with schedule.steps=2", "train a.yaml --steps=3", "dist-llm train a.yaml schedule.steps=2"),
        ("the same command with b.yaml", "train a.yaml --steps 3", "dist-llm train b.yaml --steps 3"),
        ("mend x, then the same command again", "sample run --seed 3", "mend x, then: dist-llm sample run --seed 3"),
        ("dist-llm eval CKPT --data PATH", "eval run/checkpoints", "dist-llm eval run/checkpoints --data PATH"),
        ("dist-llm train CONFIG", "sample run", "dist-llm train CONFIG"),
        ("the same command again", "", "the same command again"),
    ],
)
def test_a_way_on_has_what_was_typed(way: str, typed: str, filled: str) -> None:
    words = read_words(typer.main.get_command(cli.app), shlex.split(typed))
    assert complete(UsageError("no", where="here", next=way), words).next == filled


# --- faults that are met inside a run ------------------------------------------------------------------------------------------


def told(name: str, failure: Failure, folder: Path, *, code: int) -> None:
    from dist_llm.errors import render

    assert failure.code == code
    found = normal(render(complete(failure, TYPED)), folder)
    golden("inside", name, f"exit {code}\n{found}")
    well_made(found)


def raised(kind: type[Failure], work: Callable[[], object]) -> Failure:
    with pytest.raises(kind) as caught:
        work()
    return caught.value


def test_faults_inside_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_llm.config.load import load_config
    from dist_llm.data.prepare import prepare
    from dist_llm.train import preflight, run
    from dist_llm.train.folder import open_checkpoint
    from dist_llm.train.storage import RunFolder

    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    settings = load_config("run.yaml", []).config
    save_small(Path("run"))
    prepared = prepare(settings.data, seed=7)
    other = raised(Failure, lambda: run.require_same_run(open_checkpoint(Path("run")), settings, prepared))
    told("checkpoint of another run", other, tmp_path, code=2)
    told("tokenizer larger than the model", raised(Failure, lambda: prepared.require_vocab(99)), tmp_path, code=2)
    spoil("run/checkpoints/step-00000003/rank-00000.safetensors", at=-5)
    none = raised(Failure, lambda: take_up(Path("run/checkpoints/step-00000003"), rows_of(8)))
    told("nothing sound to resume from", none, tmp_path, code=4)
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "total used free")(10**6, 9 * 10**5, 10**5))
    room = raised(Failure, lambda: preflight.require_space(Path("run"), settings, dtype="float32", world=1))
    told("no room for checkpoints", room, tmp_path, code=7)
    monkeypatch.setattr("os.access", lambda *words: False)
    closed = raised(Failure, lambda: preflight.require_space(Path("run"), settings, dtype="float32", world=1))
    told("checkpoints cannot be written", closed, tmp_path, code=7)
    with open("run/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told("run folder in use", raised(Failure, lambda: RunFolder(Path("run"))), tmp_path, code=7)


def test_layouts_that_are_not_equal(tmp_path: Path) -> None:
    from dist_llm.cli.compare import _held_against, _judge

    first = {"kind": "gradient", "name": "blocks.1.attention.k.weight", "step": 1, "rank": 1, "difference": 3.4e-3, "hint": "kv heads"}
    rows = [
        {"layout": "dp=1,tp=2", "given": "tp=2", "equal": False, "error": None, "first_difference": first},
        {"layout": "dp=2", "given": "dp=2", "equal": True, "error": None},
    ]
    found = {"reference": "dp=1", "layouts": rows}
    told("layouts that are not equal", raised(Failure, lambda: _judge(found, [], Path("out"))), tmp_path, code=6)
    rows[0] |= {"error": "out of memory; rank 1", "first_difference": None}
    told("layouts that could not run", raised(Failure, lambda: _judge(found, [], Path("out"))), tmp_path, code=6)
    before = {
        "layouts": [
            {"layout": "dp=2", "given": "dp=2", "equal": True, "sent_bytes_per_step": {"dp": 10}},
            {"layout": "pp=2", "given": "pp=2"},
        ]
    }
    rows[:] = [{**rows[1], "sent_bytes_per_step": {"dp": 20}}]
    worse, _ = _held_against(found, before, Path("before.json"))
    told("worse than the baseline", raised(Failure, lambda: _judge(found, worse, Path("out"))), tmp_path, code=6)


def test_our_own_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("dist_llm.cli.check.check_rules", lambda *_: 1 / 0)
    Path("run.yaml").write_text(RUN)
    code = cli.run(["check", "run.yaml"])
    found = re.sub(r"dist-llm-\w+\.log", "dist-llm-<name>.log", normal(capsys.readouterr().err, tmp_path))
    golden("inside", "our own bug", f"exit {code}\n{found}")
    well_made(found)
    assert code == 1 and "check_rules" in next(tmp_path.glob("dist-llm-*.log")).read_text()
