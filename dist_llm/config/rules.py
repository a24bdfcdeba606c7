"""Everything that two sections, or a section and the layout, can break: refused on one process, with the arithmetic.

`problems` is a list of plain rules; `nearest_layouts` looks for layouts of the same number of ranks that break none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import isqrt, log2

from dist_llm.config import hub
from dist_llm.config.layout import Layout, canonical, concrete, resolve
from dist_llm.config.schema import BYTES, LARGEST_BPE, LARGEST_IDS, Config, SkillsConfig, sources_of
from dist_llm.errors import UsageError

MAX_WORLD = 1_000_000
MOST_TRIED = 6  # numbers of ranks on either side of one that does not work
FP8_MULTIPLE = 16  # of features and tokens: what the kernels of 8-bit products take


@dataclass(frozen=True)
class Problem:
    """A broken rule: the key to change first, and the arithmetic."""

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


def problems(config: Config, layout: Layout) -> list[Problem]:
    """Every rule that `config` breaks under `layout`; empty when it can run."""
    shape = (_not_available, _axes, _width, _depth, _batch, _schedule, _engine, _adapter, _offload)
    rules = (*shape, _fp8, _graph, _numbers, _text, _chat, _skills, _preference, _machine)
    return [problem for rule in rules for problem in rule(config, layout)]


# What this version does not do yet: (key, is it asked for, what to say).
NOT_AVAILABLE = (
    ("layout.cp", lambda layout: layout.cp > 1, "context parallelism (cp > 1)"),
    ("layout.ep", lambda layout: layout.ep > 1, "expert parallelism (ep > 1)"),
    ("layout.schedule", lambda layout: layout.schedule == "zb-h1", "schedule=zb-h1"),
    ("layout.schedule", lambda layout: layout.schedule == "zb-v", "schedule=zb-v"),
    ("layout.schedule", lambda layout: layout.schedule == "dualpipe-v", "schedule=dualpipe-v"),
    ("layout.schedule", lambda layout: layout.schedule == "auto", "schedule=auto"),
)


def _not_available(config: Config, layout: Layout) -> Iterator[Problem]:
    for key, asked, name in NOT_AVAILABLE:
        if asked(layout):
            yield Problem(key, f"{name} is not available in this version")


def _axes(config: Config, layout: Layout) -> Iterator[Problem]:
    data = layout.dp * layout.cp
    for key, size in (("ep", layout.ep), ("shard", layout.shard)):
        if data % size:
            yield Problem(f"layout.{key}", f"dp {layout.dp} x cp {layout.cp} = {data} over {key}={size} leaves {data % size}")
    if layout.zero == 0 and layout.shard != data:
        text = f"shard={layout.shard} says over how many ranks ZeRO splits, zero=0 splits nothing; zero=1, 2 or 3, or leave shard out"
        yield Problem("layout.shard", text)
    if layout.world > MAX_WORLD:
        yield Problem("layout", f"{layout.world} ranks; at most {MAX_WORLD}")


def _width(config: Config, layout: Layout) -> Iterator[Problem]:
    """What tensor and sequence parallelism divide."""
    model, tp = config.model, layout.tp
    if model.heads % model.kv_heads:
        left = model.heads % model.kv_heads
        yield Problem("model.kv_heads", f"{model.heads} heads over {model.kv_heads} kv heads leaves {left}")
    if model.heads % tp:
        yield Problem("layout.tp", f"{model.heads} heads over tp={tp} leaves {model.heads % tp}")
    if model.kv_heads % tp and tp % model.kv_heads:
        large, small = max(model.kv_heads, tp), min(model.kv_heads, tp)
        text = f"{model.kv_heads} kv heads and tp={tp}: one must divide the other, {large} over {small} leaves {large % small}"
        yield Problem("layout.tp", text)
    for name, size in (("vocab", model.vocab), ("ffn", model.ffn)):
        if size < tp:
            yield Problem("layout.tp", f"{name} {size} over tp={tp} leaves ranks with nothing")
    sequence, parts = config.data.sequence, layout.cp * (tp if layout.sp else 1)
    if sequence % parts:
        axes = " x ".join(f"{axis} {size}" for axis, size in (("cp", layout.cp), ("tp", tp)) if size > 1 and (axis == "cp" or layout.sp))
        yield Problem("layout.sp" if layout.sp else "layout.cp", f"sequence {sequence} over {axes} leaves {sequence % parts}")


def _depth(config: Config, layout: Layout) -> Iterator[Problem]:
    """What the pipeline cuts: at least as many layers as stages. The cut goes by cost, so the head may be a stage of its own."""
    if config.model.layers < layout.stages:
        stages = f"pp {layout.pp} x chunks {layout.chunks} = {layout.stages} stages"
        yield Problem("layout.pp", f"{config.model.layers} layers are fewer than {stages}")


def _batch(config: Config, layout: Layout) -> Iterator[Problem]:
    total, step = config.batch.global_, layout.dp * config.batch.micro
    if total % step:
        near = " or ".join(str(size) for size in (total // step * step, (total // step + 1) * step) if size)
        parts = f"dp {layout.dp} x micro {config.batch.micro} = {step}"
        yield Problem("batch.global", f"{total} sequences over {parts} leaves {total % step}; {near} would fit")


def _schedule(config: Config, layout: Layout) -> Iterator[Problem]:
    name, chunks = layout.schedule, layout.chunks
    if name in ("gpipe", "1f1b", "zb-h1") and chunks > 1:
        yield Problem("layout.chunks", f"schedule={name} has one stage per rank, chunks={chunks} asks for {chunks}; interleaved has more")
    if name in ("zb-v", "dualpipe-v") and chunks != 2:
        yield Problem("layout.chunks", f"schedule={name} has two stages per rank, chunks={chunks}")


def _engine(config: Config, layout: Layout) -> Iterator[Problem]:
    """Foreign engines split the batch alone. Selective recompute runs autograd inside a block, which no compiler can trace."""
    if config.runtime.compile and layout.recompute == "selective":
        yield Problem("layout.recompute", "selective does not go with runtime.compile; full or none do")
    if layout.engine == "native":
        return
    if config.model.adapter.rank:
        yield Problem("layout.engine", f"engine={layout.engine} trains all weights of a model; with an adapter it is engine=native")
    for axis in ("tp", "cp", "pp", "ep"):
        if getattr(layout, axis) > 1:
            yield Problem("layout.engine", f"engine={layout.engine} runs {axis}=1 only, {axis}={getattr(layout, axis)}")
    if layout.engine == "deepspeed" and layout.shard != layout.dp * layout.cp:
        yield Problem("layout.shard", f"engine=deepspeed splits over all of dp {layout.dp}, shard={layout.shard}; native and fsdp2 take it")
    stages = {"ddp": (0,), "fsdp2": (2, 3), "deepspeed": (0, 1, 2, 3)}[layout.engine]
    if layout.zero not in stages:
        yield Problem("layout.zero", f"engine={layout.engine} has zero={' or '.join(map(str, stages))}, zero={layout.zero}")
    if layout.engine == "deepspeed" and layout.reduce != (reduces := "micro_batch" if layout.zero >= 2 else "step"):
        yield Problem("layout.reduce", f"engine=deepspeed with zero={layout.zero} has reduce={reduces}, reduce={layout.reduce}")
    if layout.engine == "deepspeed" and layout.zero == 3 and layout.unshard != "micro_batch":
        yield Problem("layout.unshard", f"engine=deepspeed has unshard=micro_batch, unshard={layout.unshard}; native and fsdp2 take it")
    if layout.recompute != "none":
        yield Problem("layout.recompute", f"engine={layout.engine} recomputes nothing, recompute={layout.recompute}")
    if config.runtime.compile:
        yield Problem("runtime.compile", f"engine={layout.engine} compiles nothing; set it to false")
    if config.runtime.dtype == "bfloat16" and layout.zero == 0:
        yield Problem("runtime.dtype", f"engine={layout.engine} with zero=0 keeps no float32 masters beside bfloat16")


def _adapter(config: Config, layout: Layout) -> Iterator[Problem]:
    """Blocks of a scale lie inside rows, and inside what a rank has of them."""
    model, adapter = config.model, config.model.adapter
    for name in ("dora", "dropout", "modules_to_save"):
        if getattr(adapter, name) and not adapter.rank:
            yield Problem(f"model.adapter.{name}", "is part of an adapter: it needs model.adapter.rank above 0")
    if (adapter.dora or adapter.dropout) and config.runtime.fp8 != "off":
        name = "dora" if adapter.dora else "dropout"
        yield Problem(
            "runtime.fp8", f"model.adapter.{name} makes products of some tokens at a time, whose scales are not those of all; off"
        )
    if adapter.quantize == "none":
        return
    if not adapter.rank:
        yield Problem("model.adapter.quantize", f"{adapter.quantize} weights are not trained: it needs model.adapter.rank above 0")
    cuts = {
        "dim": model.dim,
        "heads x head_dim": model.heads // layout.tp * model.head_dim,
        "ffn": _uneven_cut(model.ffn, layout.tp, adapter.block),
    }
    for name, cut in cuts.items():
        if cut % adapter.block:
            text = f"{name} is cut at {cut} (tp={layout.tp}), which over blocks of {adapter.block} leaves {cut % adapter.block}"
            yield Problem("model.adapter.block", text)


def _uneven_cut(whole: int, parts: int, block: int) -> int:
    """The first of the cuts r x whole // parts that is no multiple of a block, else the first of all."""
    size, over = divmod(whole, parts)
    first_larger = -(-parts // over) if over else 1  # pieces are of `size` elements, and of one more from here on
    return size if size % block else first_larger * whole // parts


OFFLOADS: dict[str, tuple[tuple[str, ...], ...]] = {  # what each engine can keep in host memory, by ZeRO stage
    "native": (("optimizer",),) * 4,
    "ddp": ((),) * 4,
    "fsdp2": (("all",),) * 4,
    "deepspeed": ((), ("optimizer",), ("optimizer",), ("optimizer", "all")),
}


def _offload(config: Config, layout: Layout) -> Iterator[Problem]:
    """What lies in host memory, or on a disk: DeepSpeed's ZeRO-3 alone uses one, its other stages pass over the path without a word."""
    if layout.offload == "none":
        return
    able = OFFLOADS[layout.engine][layout.zero]
    if layout.offload not in able:
        does = f"takes offload={' or '.join(able)}" if able else "offloads nothing"
        yield Problem("layout.offload", f"engine={layout.engine} with zero={layout.zero} {does}, offload={layout.offload}")
    if config.runtime.offload_dir is not None and (layout.engine, layout.zero) != ("deepspeed", 3):
        found = f"engine={layout.engine} with zero={layout.zero} offloads to host memory"
        yield Problem("runtime.offload_dir", f"serves engine=deepspeed with zero=3 alone; {found}: leave it out")


def _fp8(config: Config, layout: Layout) -> Iterator[Problem]:
    """8-bit products: of bfloat16 blocks of our own, whose sizes on a rank the kernels take."""
    model, runtime, tp = config.model, config.runtime, layout.tp
    if runtime.fp8 == "off":
        return
    if runtime.dtype in ("float32", "float64") or (runtime.dtype == "auto" and runtime.device == "cpu"):
        dtype = runtime.dtype if runtime.dtype != "auto" else "float32, as auto is on a CPU"
        yield Problem("runtime.fp8", f"8-bit products belong to bfloat16 blocks, dtype is {dtype}")
    if layout.engine != "native":
        yield Problem("runtime.fp8", f"engine={layout.engine} makes its own products; native has 8-bit ones")
    widths = {"dim": (model.dim, 1), "queries": (model.heads * model.head_dim, tp), "ffn": (model.ffn, tp)}
    widths["keys"] = (model.kv_heads * model.head_dim, min(tp, model.kv_heads))
    for name, (width, parts) in widths.items():
        if left := width % (FP8_MULTIPLE * parts):
            over = f" over tp={parts}" if parts > 1 else ""
            yield Problem("runtime.fp8", f"{name} {width}{over} must be a multiple of {FP8_MULTIPLE} on each rank, {left} are left")
    tokens = config.batch.micro * config.data.sequence
    if runtime.fp8 == "tensorwise" and tokens % FP8_MULTIPLE:
        text = f"micro {config.batch.micro} x sequence {config.data.sequence} = {tokens} tokens, not a multiple of {FP8_MULTIPLE}"
        yield Problem("runtime.fp8", f"{text}; rowwise takes them")


def _graph(config: Config, layout: Layout) -> Iterator[Problem]:
    """A CUDA graph repeats the same calls on the same memory; what the host decides or moves in between cannot be in it."""
    runtime, key = config.runtime, "runtime.cuda_graph"
    if not runtime.cuda_graph:
        return
    if runtime.device == "cpu":
        yield Problem(key, "a CPU has no graphs, device is cpu")
    if layout.engine != "native":
        yield Problem(key, f"engine={layout.engine} calls its own library in between; native has graphs")
    if layout.pp > 1:
        yield Problem(key, f"pp={layout.pp}: the host posts the messages between stages; pp=1 has none")
    if layout.zero == 3:
        yield Problem(key, "zero=3 gives weights new memory whenever they are gathered; zero=0, 1 or 2 keep theirs")
    if layout.offload != "none":
        yield Problem(key, f"offload={layout.offload}: the host paces the copies; offload=none has none")
    if layout.world > 1 and runtime.backend == "gloo":
        yield Problem(key, "gloo's transfers pass through the host; nccl's are kernels")


def _numbers(config: Config, layout: Layout) -> Iterator[Problem]:
    model, schedule, optimizer = config.model, config.schedule, config.optimizer
    if model.positions == "rotary" and model.head_dim % 2:
        yield Problem("model.head_dim", f"rotary positions turn pairs, head_dim {model.head_dim} is odd")
    if model.positions == "learned" and model.max_positions < config.data.sequence:
        yield Problem("model.max_positions", f"{model.max_positions} learned positions for sequence {config.data.sequence}")
    if not model.sliding_window and model.full_every:
        yield Problem("model.full_every", f"each {model.full_every}-th layer sees all, but no layer has a window: sliding_window 0")
    if not model.sliding_window and model.rope_local_theta != model.rope_theta:
        found = f"{model.rope_local_theta:g} beside rope_theta {model.rope_theta:g}"
        yield Problem("model.rope_local_theta", f"{found}: it is of windowed layers, and sliding_window is 0")
    if model.rope_scaling == "none" and model.rope_factor != 1:
        yield Problem("model.rope_factor", f"{model.rope_factor:g} stretches nothing: rope_scaling is none")
    if model.rope_scaling in ("llama3", "yarn") and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        found = f"{model.rope_low_freq_factor:g} is not below rope_high_freq_factor {model.rope_high_freq_factor:g}"
        yield Problem("model.rope_low_freq_factor", found)
    if schedule.warmup > schedule.steps:
        yield Problem("schedule.warmup", f"{schedule.warmup} warmup steps of {schedule.steps} steps in all")
    elif schedule.kind == "wsd" and schedule.warmup + schedule.decay * schedule.steps > schedule.steps:
        parts = f"warmup {schedule.warmup} + decay {schedule.decay:g} x {schedule.steps}"
        yield Problem("schedule.decay", f"{parts} = {schedule.warmup + schedule.decay * schedule.steps:g} steps of {schedule.steps} in all")
    if optimizer.nesterov and not (optimizer.kind == "sgd" and optimizer.momentum > 0):
        yield Problem("optimizer.nesterov", f"needs sgd with momentum above 0, kind {optimizer.kind}, momentum {optimizer.momentum:g}")


def _text(config: Config, layout: Layout) -> Iterator[Problem]:
    tokenizer, vocab, data = config.data.tokenizer, config.model.vocab, config.data
    named = [item.source for item in data.mix] if data.mix else [data.source] if isinstance(data.source, str) else data.source
    for source in named:
        if source.startswith(hub.MARK) and hub.parse(source) is None:
            yield Problem("data.mix" if data.mix else "data.source", f"{source!r} names no data set of the hub, expected {hub.FORM}")
    if tokenizer.vocab is not None and tokenizer.vocab > vocab:
        yield Problem("model.vocab", f"the tokenizer has {tokenizer.vocab} tokens, the model {vocab}")
    if tokenizer.kind == "bytes" and tokenizer.vocab != BYTES:
        yield Problem("data.tokenizer.vocab", f"bytes are {BYTES} tokens with the end of a document, not {tokenizer.vocab}")
    if tokenizer.kind == "bpe" and tokenizer.vocab is not None and tokenizer.vocab < BYTES:
        text = f"bpe has at least {BYTES} tokens, every byte and the end of a document, found {tokenizer.vocab}"
        yield Problem("data.tokenizer.vocab", text)
    if tokenizer.kind == "bpe" and tokenizer.vocab is not None and tokenizer.vocab > LARGEST_BPE:
        yield Problem("data.tokenizer.vocab", f"a bpe of at most {LARGEST_BPE} tokens can be learned, found {tokenizer.vocab}")
    if tokenizer.kind == "file" and tokenizer.path is None:
        yield Problem("data.tokenizer.path", "kind file needs the path of a tokenizer.json")
    if tokenizer.kind == "ids":
        yield from _ids(tokenizer.vocab, tokenizer.end)
    elif tokenizer.end is not None:
        yield Problem("data.tokenizer.end", f"goes with kind ids alone, the kind is {tokenizer.kind}")


def _ids(vocab: int | None, end: int | None) -> Iterator[Problem]:
    """What numbers without a text need."""
    if vocab is None:
        yield Problem("data.tokenizer.vocab", "kind ids needs the number of ids, such as 50257")
    elif vocab > LARGEST_IDS:
        yield Problem("data.tokenizer.vocab", f"kind ids has at most {LARGEST_IDS} ids, found {vocab}")
    if end is None:
        text = "kind ids needs the id that ends a document, such as 50256; where the files have none, one id more than they use"
        yield Problem("data.tokenizer.end", text)
    elif vocab is not None and end >= vocab:
        yield Problem("data.tokenizer.end", f"{end} is not below data.tokenizer.vocab {vocab}")


def _chat(config: Config, layout: Layout) -> Iterator[Problem]:
    """Conversations are packed whole, and are read from where there are some."""
    data = config.data
    if data.chat.format is None:
        if data.packing != "concat":
            yield Problem("data.packing", f"{data.packing} keeps conversations whole, data.chat is off; concat is for text")
        return
    if data.packing == "concat":
        yield Problem("data.packing", "concat cuts conversations wherever a sequence ends; best_fit keeps them whole, none pads each")
    for key in ("document_mask", "reset_positions"):
        if (data.packing == "best_fit" or data.chat.format == "preference") and not getattr(data, key):
            by = "best_fit" if data.packing == "best_fit" else "preference"
            yield Problem(f"data.{key}", f"conversations that share a sequence would see each other; leave it out, {by} turns it on")
    for source in sources_of(data):
        if source in ("python", "entropy"):
            yield Problem("data.source", f"{source} holds no conversations; skills and JSON lines do")
    if data.chat.template == "model" and data.tokenizer.kind != "file":
        yield Problem("data.chat.template", f"a model's own lies beside its tokenizer's file, tokenizer.kind is {data.tokenizer.kind}")


def _skills(config: Config, layout: Layout) -> Iterator[Problem]:
    """What asks for pairs needs their source."""
    if "skills" in sources_of(config.data):
        return
    if config.data.skills != SkillsConfig():
        yield Problem("data.skills", "says which pairs source=skills draws, the source is another; leave it out, or data.source=skills")
    if config.track.questions:
        yield Problem("track.questions", "questions with a known answer are those of data.source=skills; 0 for another source")


def _preference(config: Config, layout: Layout) -> Iterator[Problem]:
    """Pairs and the loss that is made for them need each other; it lives in the head of our own engine."""
    preference, chat = config.preference, config.data.chat
    if preference.loss is None:
        if chat.format == "preference":
            yield Problem("preference.loss", "pairs are trained by a preference's loss, which is off; preference.loss=sigmoid turns it on")
        return
    if chat.format != "preference":
        yield Problem("data.chat.format", f"a preference is learned from pairs, the format is {chat.format}; leave it out")
    if chat.train_on == "all":
        yield Problem("data.chat.train_on", "a preference is between answers, all trains what was asked too; assistant or last")
    if chat.train_on == "each":
        yield Problem("data.chat.train_on", "each makes a sample of every turn, a preference is between two answers; assistant or last")
    if preference.label_smoothing and preference.loss != "sigmoid":
        text = f"{preference.label_smoothing:g} says how many pairs are wrong to loss=sigmoid alone, loss is {preference.loss}"
        yield Problem("preference.label_smoothing", text)
    if config.optimizer.label_smoothing:
        text = f"{config.optimizer.label_smoothing:g} is of tokens, a preference's log probabilities have none; set it to 0"
        yield Problem("optimizer.label_smoothing", text)
    if layout.engine != "native":
        yield Problem("layout.engine", f"engine={layout.engine} trains on tokens alone; with preference it is engine=native")
    if config.runtime.cuda_graph:
        yield Problem("runtime.cuda_graph", "batches have more or fewer pairs, and a graph repeats one shape; set it to false")


def _machine(config: Config, layout: Layout) -> Iterator[Problem]:
    if config.runtime.backend == "nccl" and config.runtime.device == "cpu":
        yield Problem("runtime.backend", "nccl moves device memory only, device is cpu; gloo serves the CPU")
    for key in ("tensorboard", "wandb"):
        if getattr(config.track, key):
            yield Problem(f"track.{key}", "not available in this version; metrics.jsonl and report.html hold the numbers")


def nearest_layouts(config: Config, layout: Layout, n: int = 3, *, world: int | None = None) -> list[Layout]:
    """Up to `n` layouts of the same world (or of `world` ranks) that break no rule, the fewest and smallest changes first."""
    world = layout.world if world is None else world
    if not 1 <= world <= MAX_WORLD:
        return []
    best: dict[tuple[int, int], tuple[float, str, Layout]] = {}  # one per tp and pp, so that the list shows different ways
    for tp, pp in product(_divisors(world, config.model.heads), _divisors(world, config.model.layers)):
        if world % (tp * pp) or config.model.heads % tp:
            continue
        for candidate in _variants(layout, dp=world // (tp * pp), tp=tp, pp=pp):
            if not problems(config, candidate):
                entry = (_distance(layout, candidate), canonical(candidate), candidate)
                best[tp, pp] = min(best.get((tp, pp), entry), entry, key=lambda item: item[:2])
    return [candidate for _, _, candidate in sorted(best.values(), key=lambda item: item[:2])[:n]]


def nearest_worlds(config: Config, layout: Layout, *, world: int) -> list[Layout]:
    """A layout of the next smaller number of ranks that works, and one of the next larger, as far as there are any.

    dp x micro divides the batch, tp the heads, and pp has at most as many stages as layers: few numbers are left to be tried.
    """
    total, micro = config.batch.global_, config.batch.micro
    sequences, heads = (0 if total % micro else total // micro), config.model.heads
    shares = {dp * tp for dp, tp in product(_divisors_up_to(sequences), _divisors_up_to(heads)) if dp * tp <= MAX_WORLD}
    below = {share * min(config.model.layers, (min(world, MAX_WORLD + 1) - 1) // share) for share in shares}
    above = {share * (world // share + 1) for share in shares if world // share < config.model.layers}
    sides = sorted(below - {0}, reverse=True), sorted(size for size in above if size <= MAX_WORLD)
    both = [next((one[0] for size in side[:MOST_TRIED] if (one := nearest_layouts(config, layout, 1, world=size))), None) for side in sides]
    return [one for one in both if one is not None]


def _divisors_up_to(number: int) -> list[int]:
    return [size for size in range(1, min(number, MAX_WORLD) + 1) if number % size == 0]


def _divisors(number: int, most: int) -> list[int]:
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted(size for size in {*small, *(number // size for size in small)} if size <= most)


def _variants(layout: Layout, *, dp: int, tp: int, pp: int) -> Iterator[Layout]:
    """The same wishes on other axes, then with one or more of the optional ones given up."""
    plain = ("1f1b", 1)
    pairs = dict.fromkeys(((layout.schedule, layout.chunks), plain))
    offloaded = {"none"} if layout.offload == "none" else {layout.offload, "optimizer", "all", "none"}
    switches = product(pairs, {layout.sp or layout.tp == 1, False}, {layout.engine, "native"}, offloaded)
    for (schedule, chunks), sp, engine, offload in switches:
        base = replace(layout, dp=dp, tp=tp, pp=pp, cp=1, ep=1, shard=0, offload=offload)
        for zero, shard in _shards(layout, dp):
            yield replace(base, sp=sp and tp > 1, schedule=schedule, chunks=chunks, engine=engine, zero=zero, shard=shard)


def _shards(layout: Layout, dp: int) -> set[tuple[int, int]]:
    """(zero, shard) near those of a layout on `dp` ranks: shard=0 where all of them split, as where nothing else was asked for."""
    if layout.shard == layout.dp * layout.cp:
        return {(layout.zero, 0)}
    divisors = _divisors(dp, dp)
    near = {max(size for size in divisors if size <= layout.shard), min((size for size in divisors if size >= layout.shard), default=0)}
    return {(layout.zero, 0), *((layout.zero or 1, size) for size in near)}


def _distance(given: Layout, other: Layout) -> float:
    """Doublings and halvings of the axes and of a shard that was asked for, and half a step for every other key that changed."""
    sizes = ("dp", "tp", "cp", "pp", "ep") if given.shard == given.dp * given.cp else ("dp", "tp", "cp", "pp", "ep", "shard")
    axes = sum(abs(log2(getattr(given, axis) / getattr(other, axis))) for axis in sizes)
    given_up = 0.5 if other.offload == "none" != given.offload else 0.0  # another offload is nearer than none
    keys = ("sp", "schedule", "chunks", "engine", "zero", "offload")
    return axes + given_up + sum(0.5 for key in keys if getattr(given, key) != getattr(other, key))


def check(config: Config, world: int) -> Layout:
    """The layout of `config` on `world` ranks. Raises UsageError (exit 2) with every broken rule and the nearest layouts that work."""
    rest = config.layout.cp * config.layout.tp * config.layout.pp
    try:
        layout = resolve(config.layout, world)
        broken, given = problems(config, layout), canonical(layout)
    except UsageError as error:
        layout = concrete(config.layout, dp=config.layout.dp or max(1, world // rest))
        given = canonical(config.layout)
        mismatch = Problem("layout", f"{error.found}, expected {error.expected}")
        broken = [mismatch, *(problem for problem in problems(config, layout) if problem.key != "batch.global")]
    if not broken:
        return layout
    details = list(dict.fromkeys(str(problem) for problem in broken))
    if len(details) > 7:
        details = [*details[:6], f"... and {len(details) - 6} more"]
    near, ranks = nearest_layouts(config, layout, world=world), "1 rank" if world == 1 else f"{world} ranks"
    where = ", ".join([*dict.fromkeys(problem.key for problem in broken)][:6])
    if near:
        details.append(f"these work on {ranks}: {'  '.join(map(canonical, near))}")
    elif any(problem.key.startswith(("layout", "batch", "model")) for problem in broken):
        near = nearest_worlds(config, layout, world=world)
        told = ", ".join(f"{canonical(other)} on {other.world}" for other in near)
        details.append(f"no layout of {ranks} works with this config" + (f"; the nearest that do: {told}" if near else ""))
    way = f"the same command with --layout {canonical(near[0])}" if near else None
    raise UsageError(f"this config cannot run on {ranks}", where=where, found=f"layout {given}", details=details, next=way)
