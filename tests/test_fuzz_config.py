"""Configs that nobody sane writes: run by ours if and only if an oracle that was written apart would run them (config_oracle.py).

A refusal is one UsageError, each line of it with a place; nothing ends in a traceback, nothing takes long. What is taken
comes back equal from its own dump. Each find is a kept case.
"""

from __future__ import annotations

import gc
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist_llm.config.load import dump_config, load_text
from dist_llm.config.rules import check
from dist_llm.config.yaml_file import MAX_BYTES, dump
from dist_llm.errors import MAX_LINES, UsageError, render
from tests import config_oracle as oracle
from tests.commands import Commands

CASES, LONG_CASES, SHELL_CASES = 2000, 100_000, 200
SECONDS = 2.0  # for one config, a thousand times what a usual one takes
ROOT = Path(__file__).parent.parent
PLACE = re.compile(r"[^:]*:\d+:\d+: ")

# --- what is mutated -----------------------------------------------------------------------------------------------------

BASES = (
    (ROOT / "configs/tiny.yaml").read_text(),
    "model: {layers: 2, dim: 64, heads: 8, kv_heads: 2, vocab: 300}\ndata: {sequence: 64, tokenizer: {kind: bytes}}\n"
    "batch: {global: 16, micro: 2}\nlayout: {tp: 2, pp: 2, zero: 1}\nruntime: {dtype: float32}\n",
    "# a comment\nmodel:\n  preset: gpt2-124m\n  dropout: 0.1\nlayout: \"dp=2,zero=3,shard=2\"\nsave: {every: 10, async: off}\n",
    "model: {family: qwen3, bias: on, tied: true}\noptimizer: {kind: sgd, lr: 1e-1, momentum: .9, nesterov: true, clip: null}\n"
    "schedule: {kind: wsd, warmup: 10, steps: 100, decay: 0.5}\ndata:\n  mix:\n  - {source: python, weight: 2}\n  - source: skills\n",
    "layout: {pp: 2, chunks: 2, schedule: interleaved, recompute: full}\nmodel: {layers: 8}\nbatch: {global: 32}\n",
    "layout: {engine: deepspeed, zero: 2, dp: 2, offload: optimizer}\nmodel: {}\ntrack:\nruntime: {threads: 2, compile: false}\n",
    "layout: {engine: fsdp2, zero: 3}\nruntime: {fp8: off, cuda_graph: false, device: cpu, peak_tflops: 1_000}\n",
    "runtime: {fp8: rowwise, dtype: bfloat16, device: cuda}\nmodel: {dim: 128, heads: 4, ffn: 512}\nlayout: {tp: 2}\n",
    "data: {source: skills, packing: best_fit, chat: {format: auto, template: chatml, train_on: last, too_long: drop},\n"
    "  tokenizer: {kind: file, path: a}}\n",
    "data: {source: skills, skills: {tasks: [copy, add], length: [2, 5], apart: true}}\ntrack: {questions: 4}\n",
    "data: {source: [skills, a.jsonl], document_mask: true, chat: {template: model}, packing: none}\n",
    "model: {family: llama}\ndata: {source: skills, chat: {train_on: last}, packing: none}\n"
    "preference: {loss: sigmoid, beta: 0.2, label_smoothing: 0.1, length_normalised: on, sft: 1}\n",
    "model: {adapter: {name: a.b, rank: 4, alpha: 8, rank_stabilized: on, targets: [q, v], modules_to_save: [embedding, head]}}\n"
    "base: a\nruntime: {fp8: off, compile: false}\n",
    "model: {dim: 64, heads: 4, ffn: 128, adapter: {rank: 2, dora: true, dropout: 0.1, quantize: nf4, block: 8}}\nlayout: {tp: 2}\n",
)  # fmt: skip
SCALARS = (
    *("null", "~", "yes", "no", "on", "off", "True", "tRue", "0", "1", "-1", "2", "3", "4", "5", "6", "8", "16", "31", "64", "257"),
    *("1_000", "1__0", "_1", "0x10", "0o17", "017", "+5", "1e-4", "1e3", "1.0", "0.5", "1.", ".5", "-.5", "1e400", "1e-400", ".inf"),
    *("-.inf", ".nan", "1e", "0.0", "-0.0", "1099511627776", "1099511627777", "9223372036854775807", "9223372036854775808"),
    *("9" * 40, "9" * 41, "9" * 101, "'2'", '"2"', "two", "1e-4x", "2001-01-01", "12:30:45", "!!int 3", "!!python/object:os.system x"),
    *("&a 3", "*a", "[]", "{}", "[1, 2]", "[0.9, 0.95]", "{a: 1}", "[[[[[[[[[[[[[1]]]]]]]]]]]]]", "'a\tb'", '"a\\tb"'),
    *("[9, 8]", "[1, 65]", "[copy, copy]", "[copy, walk]", "[q, up]", "[q, x]", "[head]", "nf4", "int8", ".a", "a" + "b" * 64),
    *('"\\u202e"', '"\\e[2J"'),
    *('"\\ud83d\\ude00"', '"\\ud83d"', "😀", "é", "\u00a0", "a\u200bb", "|\n   text", "python", "skills", "a: b", "- x", "#x"),
    *("bytes", "bpe", "best_fit", "concat", "none", "messages", "text", "all"),
    *("llama", "gpt2", "sgd", "adamw", "native", "ddp", "fsdp2", "deepspeed", "interleaved", "gpipe", "float64", "bfloat16", "cpu", "nccl"),
    *("full", "selective", "optimizer", "all", "step", "micro_batch", "wsd", "learned", "rotary", "swiglu", "gelu", "tensorwise", "dp=2"),
    *("tp=2,pp=2", "dp=2,dp=2", "tp=x", "''", "https://user:word@host/x", "https://host/x", "hf_" + "a" * 34, "../../etc/passwd"),
)  # fmt: skip
BYTES = (
    *map(chr, range(0, 256, 7)),
    *":,-[]{}&*!|>'\"%@`? \n\t#~=.",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x00",
    "\x1b",
    "---\n",
    "...\n",
    "%YAML 1.1\n",
)
EDGES = ("null", "true", "on", "-1", "0", "1", "4", "0.5", "0.51", "1.0", "1.01", "1e308", ".inf", ".nan", "text", "1.", "-0.0")
FAR_EDGES = ("4096", "4097", "100000", "100001", "10000000", "10000001", "1099511627776", "1099511627777", str(2**63 - 1), str(2**63))
LARGE = (
    "x" * MAX_BYTES, "#" * MAX_BYTES, "[" * MAX_BYTES, "{a: " * 200_000, "- " * 400_000, "? " * 400_000, "a:\n" * 300_000,
    "'" + "x\n" * 400_000,
    '"' + "\\x41" * 250_000, "model: [" + "1," * 400_000, "a: &a [x]\n" + "".join(f"b{n}: &b{n} [*a, *a]\n" for n in range(40_000)),
    "model: {layers: " + "9" * 900_000 + "}", "k" * 900_000 + ": 1", "model: {" + ",".join(f"k{n}: {n}" for n in range(9_000)) + "}",
    "\t" * MAX_BYTES, " " * MAX_BYTES, "\n" * MAX_BYTES, "!" * MAX_BYTES, "&" * MAX_BYTES, "%" * MAX_BYTES, "a: |\n" + " x\n" * 300_000,
    "data: {source: [" + "a, " * 19_900 + "b]}", "layout: " + "dp=2," * 200_000, "\n".join(" " * n + f"k{n}:" for n in range(1400)),
)  # fmt: skip


def tree(chance: random.Random) -> dict[str, Any]:
    """A tree of likely values, near the edges of the rules that tie one section to another."""
    pick, calm = chance.choice, chance.random() < 0.7
    found: dict[str, dict[str, Any]] = {
        "model": {
            "layers": pick((4, 8)) if calm else pick((1, 2, 3, 8)),
            "heads": pick((4, 8)) if calm else pick((1, 3, 6)),
            "dim": pick((48, 64, 96)),
        },
        "layout": {
            axis: size for axis in ("dp", "tp", "pp") if (size := pick((None, 1, 1, 2, 2, 4, 4) if calm else (1, 2, 3, 5))) is not None
        },
        "batch": {"global": pick((16, 32)) if calm else pick((4, 12, 24)), "micro": pick((1, 2, 4)) if calm else pick((1, 3))},
        "data": {"sequence": pick((16, 64, 96) if calm else (8, 63)), "tokenizer": {"kind": pick(("bytes", "bytes", "bpe"))}},
        "runtime": {},
        "optimizer": {},
        "schedule": {},
    }
    some: dict[str, dict[str, tuple]] = {
        "model": {"kv_heads": (1, 2, 3, 4), "ffn": (1, 2, 32, 37, 48), "vocab": (2, 256, 257, 300), "head_dim": (7, 8, 16),
                  "family": ("llama", "gpt2", "qwen3"), "max_positions": (16, 63, 64, 96), "positions": ("rotary", "learned"),
                  "adapter": ({"rank": 2}, {"rank": 2, "quantize": "nf4", "block": 8}, {"rank": 2, "quantize": "int8", "block": 24},
                              {"rank": 2, "dora": True}, {"dropout": 0.1}, {"rank": 0, "modules_to_save": ["head"]})},
        "layout": {"zero": (0, 1, 2, 3), "sp": (True, False), "cp": (1, 2), "ep": (1, 2), "shard": (1, 2, 3, 4), "chunks": (1, 2, 3),
                   "schedule": ("gpipe", "1f1b", "interleaved", "zb-h1", "auto"), "engine": ("native", "ddp", "fsdp2", "deepspeed"),
                   "reduce": ("micro_batch", "step"), "unshard": ("micro_batch", "step"), "recompute": ("none", "full", "selective"),
                   "offload": ("none", "optimizer", "all")},
        "runtime": {"dtype": ("auto", "float32", "bfloat16"), "device": ("auto", "cpu", "cuda"),
                    "compile": (True, False), "offload_dir": ("/x",),
                    "fp8": ("off", "off", "tensorwise", "rowwise"), "cuda_graph": (True, False), "backend": ("auto", "gloo", "nccl")},
        "optimizer": {"kind": ("sgd", "adamw"), "momentum": (0, 0.9), "nesterov": (True, False)},
        "schedule": {"kind": ("wsd", "cosine"), "warmup": (0, 8, 50, 200, 201), "decay": (0, 0.2, 0.75, 1)},
    }  # fmt: skip
    for name, keys in some.items():
        for key, values in keys.items():
            if chance.random() < (0.02 if calm and chance.random() < 0.6 else 0.12):
                found[name][key] = pick(values)
    return found


def mutated(text: str, chance: random.Random) -> str:
    """A text with another scalar, a lost, doubled, exchanged or misspelt line or key, or other letters."""
    words = list(re.finditer(r"[A-Za-z_]+(?=:)|[^\s,:{}\[\]]+", text))
    match chance.randrange(8):
        case 0 | 1 | 2 if words:  # another value
            word = chance.choice([w for w in words if text[w.end() : w.end() + 1] != ":"] or words)
            return text[: word.start()] + chance.choice(SCALARS) + text[word.end() :]
        case 3 if words:  # another key
            word = chance.choice([w for w in words if text[w.end() : w.end() + 1] == ":"] or words)
            at = chance.randrange(len(word[0]))
            strange = (word[0][:at] + word[0][at + 1 :], word[0].upper(), word[0] + chance.choice("sx_"), chance.choice(words)[0])
            return text[: word.start()] + chance.choice(strange) + text[word.end() :]
        case 4 if text:  # a line twice, away or elsewhere
            lines = text.splitlines(keepends=True)
            line = lines.pop(chance.randrange(len(lines))) if chance.random() < 0.6 else chance.choice(lines)
            lines.insert(chance.randrange(len(lines) + 1), line if chance.random() < 0.7 else "")
            return "".join(lines)
        case 5:
            at = chance.randrange(len(text) + 1)
            return text[:at] + text[at + chance.randrange(1, 12) :]
        case _:
            at = chance.randrange(len(text) + 1)
            return text[:at] + chance.choice(BYTES) + text[at + chance.randrange(2) :]


def cases(seed: int, count: int) -> Iterator[str]:
    chance = random.Random(seed)
    for number in range(count):
        if number % 2:
            yield dump(tree(chance)) if number % 4 == 1 else mutated(dump(tree(chance)), chance)
            continue
        text = chance.choice(BASES)
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            text = mutated(text, chance)
        yield text


# --- ours against the oracle -----------------------------------------------------------------------------------------------


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends what takes ten times as long, and fails for what takes longer."""

    def end(number: int, frame: Any) -> None:
        raise TimeoutError("a hang")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
    begun = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - begun < seconds, "it took too long"


def outcome(text: str, world: int) -> str:
    """`taken` or `refused`, as the oracle says too. Raises AssertionError for anything else."""
    with within(SECONDS):
        reasons = oracle.judge(text, world)
    try:
        with within(SECONDS):
            config = load_text(text, name="run.yaml").config
            check(config, world)
    except UsageError as error:
        assert reasons, f"refused, and the oracle would run it: {error} {error.details}"
        told(error)
        return "refused"
    assert not reasons, f"taken, and the oracle would not run it: {reasons}"
    text = dump_config(config)
    again = load_text(text, name="again").config
    assert again == config and dump_config(again) == text
    return "taken"


def told(error: UsageError) -> None:
    """Every line has a place or the key that is wrong, and the block is one."""
    lines = render(error).splitlines()
    assert error.code == 2 and error.details and len(lines) <= MAX_LINES and not any("Traceback" in line for line in lines)
    if error.what.endswith("run.yaml"):
        assert all(PLACE.match(line) for line in error.details), error.details
    else:
        assert error.found and all(re.match(r"[a-z_.0-9]+: |these work on |no layout of |\.\.\. and ", line) for line in error.details), (
            error.details
        )


def fuzz(seed: int, count: int) -> dict[str, int]:
    found, chance = {"taken": 0, "refused": 0}, random.Random(seed)
    for number, text in enumerate(cases(seed, count)):
        world = (oracle.own_world(text) or 1) if chance.random() < 0.9 else chance.choice((1, 2, 3, 4, 6, 8))
        try:
            found[outcome(text, world)] += 1
        except Exception as error:
            raise AssertionError(f"case {number} of seed {seed} on {world} ranks: {text[:2000]!r}") from error
    return found


def test_two_thousand_configs() -> None:
    found = fuzz(21, CASES)
    assert min(found.values()) > CASES // 10, found
    print(found)


def test_every_key_at_its_edges() -> None:
    """One key at a time, with the numbers beside every bound; and every word of every choice of any key."""
    words = ("native", "ddp", "gelu", "layer", "learned", "gpt2", "qwen3-8b", "wsd", "sgd", "file", "full", "all", "fast", "nccl")
    keys = [(name, key) for name, section in oracle.SCHEMA.items() for key in section if key != "mix"]
    inside = [(name, key, part) for name, key in keys if isinstance(oracle.SCHEMA[name][key], dict) for part in oracle.SCHEMA[name][key]]
    for number, (section, key, part) in enumerate(inside):
        for value in (*EDGES, *words[number % 4 :: 4]):
            rank = "rank: 2, " if key == "adapter" and part != "rank" else ""
            outcome(f"{section}: {{{key}: {{{rank}{part}: {value}}}}}", 1)
    for number, (section, key) in enumerate(keys):
        far = FAR_EDGES if key in ("layers", "threads", "timeout_seconds", "vocab", "seed", "lr", "keep", "max_tokens", "shard") else ()
        for value in (*EDGES, *far, *words[number % 4 :: 4]):
            outcome(f"{section}: {{{key}: {value}}}" if key != "tokenizer" else f"data: {{tokenizer: {{vocab: {value}}}}}", 1)


@pytest.mark.long
@pytest.mark.parametrize("tenth", range(10))
def test_a_hundred_thousand_configs(tenth: int) -> None:
    found = fuzz(2200 + tenth, LONG_CASES // 10)
    assert sum(found.values()) == LONG_CASES // 10
    print(found)


@pytest.mark.parametrize("text", LARGE, ids=lambda text: f"{text[:10]!r} x {len(text)}")
def test_large_documents_end_soon(text: str) -> None:
    gc.collect()
    gc.freeze()  # what other tests have left in this process is not looked through on this one's time
    try:
        with within(SECONDS):
            load_text(text[:MAX_BYTES], name="run.yaml")
    except UsageError as error:
        told(error)
    else:
        assert not set(text) - set("#\n ") or text.startswith("data: {source: [a")
    finally:
        gc.unfreeze()


KEPT: tuple[tuple[str, int, str], ...] = (
    # text, ranks, what the first line says ("": it is taken). Each was wrong while this was made.
    ("data: {source: []}", 1, "an empty list"),
    ("model: {bias: 3}", 1, "model.bias: expected true or false, found 3"),
    ('save: {dir: "\\ud83d\\ude00"}', 1, ""),
    ("runtime: {timeout_seconds: 1e300}", 1, "at most 1e+07"),
    ("runtime: {threads: 1099511627776}", 1, "at most 4096"),
    ("model: {vocab: 99999999999}", 1, "a bpe of at most 16777216 tokens"),
    ("data: {source: 'https://user:word@host/x'}", 1, "data.source: expected text without a password or key"),
    ("save: {dir: hf_" + "a" * 34 + "}", 1, "save.dir: expected text without a password or key"),
    ("layout: {tp: 1099511627776}\nmodel: {adapter: {rank: 2, quantize: nf4}}", 1 << 40, "cannot run on 1099511627776 ranks"),  # a hang
)


@pytest.mark.parametrize(("text", "world", "line"), KEPT, ids=[text[:40] for text, _, _ in KEPT])
def test_kept_cases(text: str, world: int, line: str) -> None:
    assert outcome(text, world) == ("refused" if line else "taken")
    if line:
        with pytest.raises(UsageError) as caught:
            check(load_text(text, name="run.yaml").config, world)
        assert line in render(caught.value) and "word" not in render(caught.value).replace("password", "")


OVERRIDES = (
    "optimizer.betas" + ".x" * 5000 + "=1",
    "a" * 100_000 + "=1",
    "model.layers=" + "[" * 5000,
    "=" * 1000,
    "." * 1000 + "=1",
    "layout=" + "tp=2," * 9000,
)


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: text[:24])
def test_strange_overrides(override: str) -> None:
    with within(SECONDS), pytest.raises(UsageError) as caught:
        load_text("", [override], name="run.yaml")
    assert all(line.startswith("override ") for line in caught.value.details) and len(render(caught.value)) < 5000


@pytest.mark.parametrize(("axes", "world"), [("{shard: 7, zero: 3, tp: 7}", 720_720), ("{pp: 3}", 1_000_000), ("{tp: 13}", 10**30)])
def test_the_search_for_a_layout_ends_soon(axes: str, world: int) -> None:
    text = f"model: {{heads: 720720, dim: 1441440, layers: 55440}}\nbatch: {{global: 720720, micro: 1}}\nlayout: {axes}"
    assert outcome(text, world) == "refused"


# --- through the shell -----------------------------------------------------------------------------------------------------


def test_through_the_shell(commands: Commands, tmp_path: Path) -> None:
    """The whole command: exit 0 or 2 as the oracle says, or 4 for want of the base, one short block, and nothing else on stderr."""
    chosen = random.Random(23).sample([(text, 1 + n % 4) for n, text in enumerate(cases(23, 900)) if "\x00" not in text], SHELL_CASES)
    for number, (text, world) in enumerate(chosen):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
        done = commands.run("check", str(path), "--world", str(world), timeout=30)
        refused = bool(oracle.judge(text.removeprefix("\ufeff"), world))
        missing = re.search("^base:", text, re.MULTILINE) is not None and "there is no base here" in done.stderr
        assert done.returncode == (4 if missing else 2 if refused else 0), (text, world, done.stderr)
        lines = done.stderr.splitlines()
        assert len(lines) <= MAX_LINES and "Traceback" not in done.stderr and bool(lines) == (missing or refused), (text, lines)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stderr + done.stdout), text
