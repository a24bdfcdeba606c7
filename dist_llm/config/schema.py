"""The config of a run: every section, key, type and bound.

Objects are frozen, unknown keys are refused, and after validation a model has every number filled in. What one key alone can break is
refused here; what needs two sections or the layout is refused in `rules.py`. Torch-free.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

from dist_llm.config.presets import SMALL, fill_model
from dist_llm.errors import holds_secret

Family = Literal["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3", "gpt2", "custom"]
Preset = Literal[
    "gpt2-124m", "llama-1b", "llama3-8b", "llama3-70b", "llama3-405b", "mistral-7b", "qwen2-0.5b", "qwen3-0.6b", "qwen3-8b",
    "smollm2-135m", "olmo2-1b", "gemma2-2b", "gemma3-1b",
]  # fmt: skip
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "dualpipe-v", "auto"]
EngineName = Literal["native", "ddp", "fsdp2", "deepspeed"]
When = Literal["micro_batch", "step"]
Offload = Literal["none", "optimizer", "all"]

BYTES = 257  # tokens of the bytes tokenizer, and the fewest of a bpe: every byte, and the end of a document
LARGEST = 2**40  # a bound on every count, so that no product of a few of them grows without end
LARGEST_BPE = 2**24  # tokens that can be learned: the trainer makes room for all of them before it starts
LARGEST_IDS = 2**22  # numbers without a text: each gets a name


def _on_off(value: Any) -> Any:
    """YAML 1.2 reads `on` and `off` as text; people write them for switches."""
    return {"on": True, "off": False}.get(value, value) if isinstance(value, str) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


AdapterTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]
ALL_LINEAR: tuple[AdapterTarget, ...] = ("q", "k", "v", "o", "gate", "up", "down")


def _targets(value: Any) -> Any:
    """PEFT's word for all of them is taken."""
    return ALL_LINEAR if value in ("all-linear", ["all-linear"]) else _tuple(value)


def _visible(value: str) -> str:
    """Names and paths only: a control character in one is a mistake, or an attempt to write over somebody's terminal.

    A config is kept in run folders, checkpoints and reports, so that it holds no secret.
    """
    if not value.isprintable():
        raise PydanticCustomError("text", "expected text without control characters")
    if holds_secret(value):
        raise PydanticCustomError("text", "expected text without a password or key; a config is copied into checkpoints and reports")
    return value


Count = Annotated[int, Strict(), Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Strict(), Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Switch = Annotated[bool, BeforeValidator(_on_off), Strict()]
Text = Annotated[str, Strict(), Field(min_length=1, max_length=4096), AfterValidator(_visible)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
Number = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Strict(), Field(ge=0, le=1)]
SkillLength = Annotated[int, Strict(), Field(ge=1, le=64)]
BelowOne = Annotated[float, Strict(), Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the config: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


SavedModule = Literal["embedding", "head"]


class AdapterConfig(Section):
    """Small matrices that are trained instead of the model: W x + alpha / rank B A x for each target (LoRA, arXiv:2106.09685).

    name: how it is called where there are several, in checkpoints and PEFT's folders.
    dora: each row of W + alpha / rank B A has a length of its own, which is trained too (arXiv:2402.09353).
    modules_to_save: trained whole beside it, from the base's values on. embedding: the table of tokens, tied to the output or not, and
    learned positions; head: the last norm, and the output matrix where it is not tied. So does PEFT call it.
    """

    name: Annotated[str, Strict(), Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = "default"
    rank: Whole = 0  # 0: no adapter, the model itself is trained
    alpha: Positive = 16.0
    rank_stabilized: Switch = False  # divided by the root of the rank instead (rsLoRA, arXiv:2312.03732)
    dora: Switch = False
    dropout: BelowOne = 0.0  # of what goes into A, in training
    quantize: Literal["none", "nf4", "int8"] = "none"  # how the matrices under it are kept (QLoRA, arXiv:2305.14314)
    block: Annotated[Count, Field(multiple_of=8)] = 64  # neighbours along a row that share a scale there
    targets: Annotated[tuple[AdapterTarget, ...], Field(min_length=1), BeforeValidator(_targets)] = ALL_LINEAR
    modules_to_save: Annotated[tuple[SavedModule, ...], BeforeValidator(_tuple)] = ()

    @property
    def scale(self) -> float:
        """What B A x is multiplied with; 0 without an adapter."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank) if self.rank else 0.0


def _as_dict(section: Any) -> dict[str, Any]:
    return section.model_dump() if isinstance(section, BaseModel) else section if isinstance(section, dict) else {}


class ModelConfig(Section):
    """The model. Names left out come from the preset, then the family, then a small default; none stays open but `preset`."""

    family: Family
    preset: Preset | None
    layers: Annotated[Count, Field(le=100_000)]
    dim: Count
    heads: Count
    kv_heads: Count  # heads when left out
    head_dim: Count  # dim / heads when left out
    ffn: Count  # width inside the feed-forward: 8/3 dim where it is gated, else 4 dim
    vocab: Count  # in a Config: the tokenizer's, when left out
    tied: Switch  # one table for embedding and output head
    norm: Literal["rms", "unit_rms", "layer"]  # unit_rms: RMSNorm times 1 + weight
    norm_eps: Positive
    norm_place: Literal["before", "after", "both"]  # of attention and of the feed-forward, inside the residual
    positions: Literal["rotary", "learned"]
    rope_theta: Positive
    rope_local_theta: Positive  # of windowed layers; rope_theta when left out
    rope_scaling: Literal["none", "linear", "llama3", "yarn"]
    rope_factor: Annotated[float, Strict(), Field(ge=1, le=1e6)]  # by which positions were stretched
    rope_low_freq_factor: Positive  # llama3 and yarn (beta_slow): turns over the original positions below which all is stretched
    rope_high_freq_factor: Positive  # llama3 and yarn (beta_fast): turns above which nothing is
    rope_original_positions: Count  # positions before stretching
    max_positions: Count  # rows of the learned position table; in a Config: data.sequence, when left out
    activation: Literal["swiglu", "geglu_tanh", "gelu", "gelu_tanh"]
    qk_norm: Switch  # RMSNorm of queries and keys
    qk_norm_over: Literal["head", "all"]  # head_dim of each head, or all heads together
    query_scale: Positive  # scores are divided by its square root; head_dim when left out
    attention_softcap: Number  # c: scores become c tanh(scores / c); 0: they do not
    logit_softcap: Number  # the same of the output's logits
    embedding_scale: Switch  # embeddings times sqrt(dim)
    sliding_window: Whole  # tokens that a token sees, itself included; 0: all before it
    full_every: Whole  # with a window: each so many-th layer sees all; 0: none does
    qkv_bias: Switch
    out_bias: Switch
    mlp_bias: Switch
    dropout: BelowOne
    neftune: Number  # alpha: in training embedded tokens get noise up to alpha / sqrt(tokens of their sample x dim) (arXiv:2310.05914)
    init_std: Number
    residual_scale: Switch  # o and down weights start with init_std / sqrt(2 layers)
    adapter: AdapterConfig = AdapterConfig()  # trained in the place of everything else

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        values, origins = fill_model(given)
        dim, heads = values["dim"], values["heads"]
        if origins.get("head_dim") == "= dim / heads" and type(dim) is type(heads) is int and heads > 0 and dim % heads:
            text = f"dim {dim} over {heads} heads leaves {dim % heads}; change one of them, or give head_dim"
            raise PydanticCustomError("division", "{text}", {"text": text, "key": "dim"})
        return values


class TokenizerConfig(Section):
    """The tokenizer. bpe is trained on the run's own text to `vocab` tokens; file reads a tokenizer.json at `path`.

    ids is for token files whose tokenizer is not at hand: `vocab` numbers, one of which ends a document.
    """

    kind: Literal["bpe", "bytes", "file", "ids"] = "bpe"
    vocab: Count | None = None  # when left out: bytes 257; bpe the model's in a Config, else 2048; file and ids None
    path: Text | None = None
    end: Whole | None = None  # ids: the number that ends a document

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return {**given, "vocab": tokenizer_vocab(given)} if isinstance(given, dict) else given


def tokenizer_vocab(given: dict[str, Any], learned: Any = SMALL["vocab"]) -> Any:
    """The number of tokens of a tokenizer section as written, `learned` where it is still to be trained; None: only its file knows."""
    defaults = {"bpe": learned, "bytes": BYTES}
    kind = given.get("kind", "bpe")
    return given["vocab"] if given.get("vocab") is not None else defaults.get(kind) if isinstance(kind, str) else None


class MixItem(Section):
    """One source of a mixture and its share of the tokens (relative to the sum of weights)."""

    source: Text
    weight: Positive = 1.0


class ChatConfig(Section):
    """Conversations in the place of text. On where any key is given: then a format left out is auto. format null: off."""

    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text", "preference"] | None = None
    template: Text = "auto"  # chatml, llama3, qwen, plain, model, or a path; auto: the model's own where it has one, else plain
    train_on: Literal["assistant", "all", "last", "each"] = "assistant"  # each: every turn in a sample of its own
    too_long: Literal["refuse", "drop", "truncate"] = "refuse"  # what becomes of conversations longer than a sequence

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return {"format": "auto", **given} if isinstance(given, dict) and given else given


SkillTask = Literal["copy", "reverse", "sort", "order", "brackets", "add", "subtract", "largest", "count", "upper", "last", "series"]


class SkillsConfig(Section):
    """Which pairs the source `skills` draws; a task that is named twice comes twice as often."""

    tasks: Annotated[tuple[SkillTask, ...] | None, Field(min_length=1), BeforeValidator(_tuple)] = None  # None: all twelve
    length: Annotated[tuple[SkillLength, SkillLength] | None, BeforeValidator(_tuple)] = None  # fewest and most parts of an argument
    apart: Switch = False  # letters and brackets with spaces between them: each a token of its own

    @model_validator(mode="after")
    def _in_order(self) -> SkillsConfig:
        if self.length and self.length[0] > self.length[1]:
            text = f"the fewest come first, found [{self.length[0]}, {self.length[1]}]"
            raise PydanticCustomError("order", "{text}", {"text": text, "key": "length"})
        return self


class DataConfig(Section):
    """Text, how it becomes tokens and how tokens become sequences."""

    source: Annotated[Text | Texts, BeforeValidator(_tuple)] = "python"  # python, skills, entropy, or paths and globs
    mix: Annotated[Annotated[tuple[MixItem, ...], Field(min_length=1)] | None, BeforeValidator(_tuple)] = None  # replaces source
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence: Annotated[Count, Field(ge=2)] = 256
    chat: ChatConfig = ChatConfig()
    skills: SkillsConfig = SkillsConfig()
    packing: Literal["concat", "best_fit", "none"] = "concat"  # best_fit when left out and chat is on
    document_mask: Switch = False
    reset_positions: Switch = False
    validation: Annotated[float, Strict(), Field(ge=0, le=0.5)] = 0.02  # fraction of the documents held out
    text_key: Text = "text"  # the field of a JSONL line
    max_bad_lines: Whole = 0  # JSON lines that may be skipped; they are listed
    dir: Text = "runs/data"  # token shards live here
    max_tokens: Count | None = None
    seed: Seed | None = None  # None: runtime.seed

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return fill_packing(given) if isinstance(given, dict) else given


def sources_of(data: DataConfig) -> list[str]:
    """Every source that a data section names."""
    named = [item.source for item in data.mix] if data.mix else [data.source]
    return [name for one in named for name in ([one] if isinstance(one, str) else one)]


def fill_packing(given: dict[str, Any]) -> dict[str, Any]:
    """A data section as written and what follows from it: conversations are packed by best fit, and what shares one is kept apart."""
    chat = _as_dict(given.get("chat"))
    packing = given.get("packing", "best_fit" if chat and chat.get("format", "auto") is not None else "concat")
    shares = packing == "best_fit" or chat.get("format") == "preference"  # both sides of a pair lie in one
    apart = {"document_mask": True, "reset_positions": True} if shares else {}
    return {**apart, **given, "packing": packing}


class PreferenceConfig(Section):
    """Answers that are preferred to others (DPO, arXiv:2305.18290). On where any key is given: then a loss left out is sigmoid.

    h is by how much the chosen answer has gained over the rejected one, in log probability, since the run began.
    """

    loss: Literal["sigmoid", "ipo", "hinge"] | None = None  # -log sigmoid(beta h); (h - 1 / (2 beta))^2; max(0, 1 - beta h)
    beta: Positive = 0.1
    label_smoothing: Annotated[float, Strict(), Field(ge=0, lt=0.5)] = 0.0  # sigmoid: the part of pairs that may be the wrong way round
    length_normalised: Switch = False  # log probabilities a trained token, not of the whole answer
    sft: Number = 0.0  # times the chosen answer's loss a token, which is added (arXiv:2404.19733)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        return {"loss": "sigmoid", **given} if isinstance(given, dict) and given else given


class BatchConfig(Section):
    """Sequences per optimizer step (`global`) and per forward pass on one dp rank (`micro`)."""

    global_: Count = Field(default=16, alias="global")
    micro: Count = 4


class OptimizerConfig(Section):
    """The update rule. clip 0 or null: gradients are not clipped."""

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: Number = 1e-3
    betas: Annotated[tuple[BelowOne, BelowOne], BeforeValidator(_tuple)] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Number = 0.1
    momentum: BelowOne = 0.0
    nesterov: Switch = False
    clip: Annotated[Number, BeforeValidator(lambda value: 0.0 if value is None else value)] = 1.0
    label_smoothing: BelowOne = 0.0  # of the training loss
    skip_non_finite: Whole = 0  # steps in a row that may be left out because loss or gradients are not finite


class ScheduleConfig(Section):
    """The learning rate over the steps: warmup from 0, then `kind`, ending at `final` x lr."""

    kind: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "cosine"
    warmup: Whole = 0
    steps: Count = 200
    final: Fraction = 0.1
    decay: Fraction = 0.2  # wsd: the part of the steps in which the rate falls


class LayoutConfig(Section):
    """How ranks share the work, as written; `layout.resolve` makes every field concrete."""

    dp: Count | None = None  # None: world / (cp tp pp)
    tp: Count = 1
    sp: Switch | None = None  # None: on when tp > 1
    cp: Count = 1
    cp_kind: Literal["ring", "ulysses"] = "ring"
    pp: Count = 1
    ep: Count = 1
    zero: Annotated[int, Strict(), Field(ge=0, le=3)] = 0
    shard: Count | None = None  # None: dp x cp
    schedule: ScheduleName = "1f1b"
    chunks: Count | None = None  # None: 2 for schedules that need more than one stage per rank, else 1
    reduce: When | None = None  # None: micro_batch for zero 2 and 3 without a pipeline, else step
    unshard: When | None = None  # zero=3 only; None: micro_batch without a pipeline, else step
    recompute: Literal["none", "full", "selective"] = "none"
    offload: Offload = "none"  # what lies in host memory between uses: master weights and moments, or the weights too
    engine: EngineName = "native"


class RuntimeConfig(Section):
    """Where and how exactly it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float64", "float32", "bfloat16"] = "auto"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    shared_memory: Switch = True  # on gloo, ranks of one machine pass host tensors through memory they share, not through sockets
    compile: Switch = False
    fp8: Literal["off", "tensorwise", "rowwise"] = "off"  # the blocks' matrix products in 8-bit floats
    cuda_graph: Switch = False  # forward and backward of a step as one CUDA graph
    seed: Seed = 7
    timeout_seconds: Annotated[Positive, Field(le=1e7)] = 600.0
    digest_every: Whole = 100  # steps between comparisons of what ranks hold alike; 0: never
    reduce_order: Literal["fixed", "fast"] = "fixed"  # of data-parallel gradients; fixed: in rank order; fast: left to the library
    peak_tflops: Positive | None = None  # of one device, for MFU; None: looked up, or unknown
    threads: Annotated[Count, Field(le=4096)] | None = None  # CPU threads per rank
    offload_dir: Text | None = None  # DeepSpeed's folder on a fast disk for what is offloaded; None: host memory


class SaveConfig(Section):
    """Checkpoints: every so many steps (0: only at the end), the newest `keep` kept (0: all), in the run folder `dir`."""

    every: Whole = 0
    keep: Whole = 3
    async_: Switch = Field(default=True, alias="async")  # written in the background, from a copy in host memory
    dir: Text = "runs/default"


class TrackConfig(Section):
    """What is written and looked at while it trains."""

    tensorboard: Switch = False
    wandb: Switch = False
    sample_every: Whole = 0  # steps; 0: never
    validate_every: Whole = 0  # steps; 0: only at the end
    validate_batches: Count = 8
    questions: Annotated[Whole, Field(le=10_000)] = 0  # of each task of skills, held out: asked at the end, and before a run from a base


class Config(Section):
    """A whole run. Loading the dump of a Config gives an equal Config."""

    base: Text | None = None  # weights to begin with: a run or step folder of ours, or a Hugging Face folder; model and tokenizer are its
    model: ModelConfig
    data: DataConfig = DataConfig()
    preference: PreferenceConfig = PreferenceConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    layout: LayoutConfig = LayoutConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    save: SaveConfig = SaveConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="before")
    @classmethod
    def _across(cls, given: Any) -> Any:
        return fill_across(given)[0] if isinstance(given, dict) else given


def fill_across(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """`given` with the values that one section takes from another, and their origins by dotted key.

    Learned positions need a row for each place of a sequence. A model's vocabulary is its tokenizer's, and a tokenizer still to be trained
    learns as many tokens as the model has. Preferences are learned from pairs. What is given, or fixed by a preset, stays.
    """
    model, data = given.get("model", {}), _as_dict(given.get("data", {}))
    tokenizer = _as_dict(data.get("tokenizer", {}))
    if not isinstance(model, dict):
        return given, {}
    values, origins = fill_model(model)
    known = tokenizer_vocab(tokenizer, learned=None)
    taken = {"max_positions": ("data.sequence", data.get("sequence", 256)), "vocab": ("data.tokenizer.vocab", known)}
    free = {name: pair for name, pair in taken.items() if origins.get(name) == "default" and type(pair[1]) is int and pair[1] > 0}
    filled: dict[str, Any] = {**given, "model": {**model, **{name: value for name, (_, value) in free.items()}}}
    notes = {f"model.{name}": f"= {source}" for name, (source, _) in free.items()}
    if known is None and tokenizer.get("kind", "bpe") == "bpe" and isinstance(given.get("data", {}), dict):
        filled["data"] = {**data, "tokenizer": {**tokenizer, "vocab": values["vocab"]}}
        notes["data.tokenizer.vocab"] = "= model.vocab"
    preference, chat = _as_dict(given.get("preference")), data.get("chat", {})
    on, plain = bool(preference) and preference.get("loss", "sigmoid") is not None, isinstance(given.get("data", {}), dict)
    if on and plain and isinstance(chat, (dict, ChatConfig)) and _as_dict(chat).get("format") in (None, "auto"):
        filled["data"] = {**filled.get("data", {}), "chat": {**_as_dict(chat), "format": "preference"}}
        notes["data.chat.format"] = "= preference"
    return filled, notes


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with the named values replaced and checked again: `changed(config, {"schedule.steps": 3})`.

    Raises pydantic's ValidationError when a value is refused; user input goes through `load_config` instead.
    """
    tree = config.model_dump(by_alias=True)
    for name, value in changes.items():
        *sections, last = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[last] = value.model_dump(by_alias=True) if isinstance(value, BaseModel) else value
    return Config.model_validate(tree)
