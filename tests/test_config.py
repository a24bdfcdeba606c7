"""The config: files and overrides to a Config, golden messages, round trips, and random text that must never surprise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_llm.config import yaml_file
from dist_llm.config.load import KNOWN, OTHER_NAMES, SAID_OTHERWISE, Loaded, dump_config, flat, load_config, load_text
from dist_llm.config.presets import FAMILIES
from dist_llm.config.schema import BatchConfig, Config, LayoutConfig, ModelConfig, changed
from dist_llm.errors import UsageError, render

CONFIGS = Path(__file__).parent.parent / "configs"


def read(text: str, *overrides: str) -> Loaded:
    return load_text(text, overrides, name="run.yaml")


def refused(text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load_text(text, overrides, name="run.yaml")
    assert caught.value.code == 2
    return caught.value.details


# -- what a config becomes ------------------------------------------------------------------------------------------------------------


def parameters(m: ModelConfig) -> int:
    """Counted by hand from the architecture, apart from the model table."""
    query, keys = m.heads * m.head_dim, m.kv_heads * m.head_dim
    up = m.dim * m.ffn * (2 if m.activation == "swiglu" else 1)
    attention = m.dim * query + 2 * m.dim * keys + query * m.dim
    attention += (query + 2 * keys) * m.qkv_bias + m.dim * m.out_bias + 2 * m.head_dim * m.qk_norm
    norm = m.dim * (2 if m.norm == "layer" else 1)
    layer = attention + up + m.ffn * m.dim + (m.ffn + m.dim) * m.mlp_bias + 2 * norm
    ends = m.vocab * m.dim * (1 if m.tied else 2) + norm + m.max_positions * m.dim * (m.positions == "learned")
    return m.layers * layer + ends


@pytest.mark.parametrize(
    "preset, count",
    [
        ("gpt2-124m", 124_439_808),
        ("llama-1b", 1_235_814_400),
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3-405b", 405_853_388_800),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
    ],
)
def test_presets_have_the_published_size(preset: str, count: int) -> None:
    assert parameters(read(f"model: {{preset: {preset}}}").config.model) == count
    assert (CONFIGS / "models" / f"{preset}.yaml").is_file()


def test_families_fill_every_field() -> None:
    llama = ModelConfig(dim=96, heads=4)
    assert (llama.norm, llama.positions, llama.activation) == ("rms", "rotary", "swiglu")
    assert (llama.tied, llama.kv_heads, llama.head_dim) == (False, 4, 24)
    assert llama.ffn == 256 and ModelConfig(dim=100, heads=4).ffn == 272  # 8/3 x 100 = 266.7, up to a multiple of 8
    gpt2 = ModelConfig(family="gpt2", dim=96, heads=4)
    assert (gpt2.norm, gpt2.norm_eps, gpt2.positions, gpt2.activation, gpt2.ffn) == ("layer", 1e-5, "learned", "gelu_tanh", 384)
    assert gpt2.tied and gpt2.qkv_bias and gpt2.out_bias and gpt2.mlp_bias
    qwen3 = ModelConfig(family="qwen3")
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.norm_eps == 1e-6
    for model in (llama, gpt2, qwen3):
        assert [name for name, value in model.model_dump().items() if value is None] == ["preset"]


def test_bias_is_a_shorthand_that_single_keys_overrule() -> None:
    model = read("model: {family: gpt2, bias: false, out_bias: true}").config.model
    assert (model.qkv_bias, model.out_bias, model.mlp_bias) == (False, True, False)


def test_sections_fill_each_other() -> None:
    config = read("model: {family: gpt2, vocab: 3000}\ndata: {sequence: 96}").config
    assert config.model.max_positions == 96 and config.data.tokenizer.vocab == 3000
    assert read("data: {tokenizer: {vocab: 500}}").config.model.vocab == 500
    assert read("data: {tokenizer: {kind: bytes}}").config.model.vocab == 257
    preset = read("model: {preset: gpt2-124m}\ndata: {sequence: 64}").config
    assert preset.model.max_positions == 1024 and preset.data.tokenizer.vocab == 50257


def test_a_config_is_frozen_and_closed() -> None:
    config = Config(model=ModelConfig())
    with pytest.raises(ValidationError):
        config.batch = BatchConfig()  # type: ignore[misc]
    with pytest.raises(ValidationError):
        LayoutConfig(tpp=2)  # type: ignore[call-arg]
    assert hash(config) == hash(Config(model=ModelConfig()))


def test_changed_checks_again() -> None:
    config = read("batch: {global: 8, micro: 2}").config
    other = changed(config, {"schedule.steps": 3, "batch.global": 4, "layout": LayoutConfig(tp=2)})
    assert (other.schedule.steps, other.batch.global_, other.layout.tp, config.schedule.steps) == (3, 4, 2, 200)
    with pytest.raises(ValidationError):
        changed(config, {"schedule.steps": -1})


def test_clip_null_and_zero_mean_none() -> None:
    assert read("optimizer: {clip: null}").config.optimizer.clip == read("optimizer: {clip: 0}").config.optimizer.clip == 0.0


def test_an_empty_file_is_the_default_run() -> None:
    assert read("") == read("# nothing\n") and read("model:").config == read("").config == Config(model=ModelConfig(max_positions=256))


def test_overrides_win_and_use_yaml() -> None:
    config = read(
        "model: {layers: 2}\noptimizer:\n  lr: 1e-3\n",
        *("model.layers=6", "optimizer.lr=3e-4", "optimizer.betas=[0.8, 0.9]", "data.source=[a.txt, b.txt]", "layout.sp=off"),
        *("data.mix=[{source: python, weight: 2}, {source: skills}]", "optimizer.clip=null", "runtime.compile=true"),
    ).config
    assert (config.model.layers, config.optimizer.lr, config.optimizer.betas, config.optimizer.clip) == (6, 3e-4, (0.8, 0.9), 0.0)
    assert config.data.source == ("a.txt", "b.txt") and config.layout.sp is False and config.runtime.compile is True
    assert config.data.mix is not None and [item.weight for item in config.data.mix] == [2.0, 1.0]


def test_layout_as_text_replaces_the_section() -> None:
    for loaded in (read("layout: {pp: 4}", "layout=dp=2,tp=2,zero=1"), read('layout: "dp=2,tp=2,zero=1"')):
        assert loaded.config.layout == LayoutConfig(dp=2, tp=2, zero=1)


def test_origins_name_file_override_preset_family_rule_and_default() -> None:
    loaded = read("model:\n  preset: gpt2-124m\n  layers: 2\n\nbatch: {micro: 2}\n", "model.heads=6", "layout=tp=2")
    expected = {
        "model.layers": "run.yaml:3",
        "batch.micro": "run.yaml:5",
        "model.heads": "override model.heads=6",
        "layout.tp": "override layout=tp=2",
        "model.dim": "preset gpt2-124m",
        "model.norm": "family gpt2",
        "model.kv_heads": "= heads",
        "data.tokenizer.vocab": "= model.vocab",
        "batch.global": "default",
        "model.dropout": "default",
    }
    assert {name: loaded.origins[name] for name in expected} == expected
    assert tuple(loaded.origins) == KNOWN == tuple(flat(loaded.config))


# -- what is refused, and how ---------------------------------------------------------------------------------------------------------

PLAIN = "a config holds plain values only"
GOLDEN = [
    ("model: {layer: 2}", ["run.yaml:1:9: unknown key 'model.layer'; did you mean 'layers'?"]),
    ("modle: {layers: 2}", ["run.yaml:1:1: unknown key 'modle'; did you mean 'model'?"]),
    ("lr: 1e-3", ["run.yaml:1:1: unknown key 'lr': it belongs at optimizer.lr"]),
    ("optimizer:\n  learning_rate: 1", ["run.yaml:2:3: unknown key 'optimizer.learning_rate': it is called optimizer.lr here"]),
    ("batch: {micro: 2, global: 4, micro: 2}", ["run.yaml:1:30: duplicate key 'micro', first at line 1"]),
    ("model:\n  dim: '64'", ["run.yaml:2:3: model.dim: expected a whole number, found '64'"]),
    ("model: {dim: 1e2}", ["run.yaml:1:9: model.dim: expected a whole number, found 100.0 (write 100)"]),
    ("model: {layers: true}", ["run.yaml:1:9: model.layers: expected a whole number, found true"]),
    ("model: {tied: 1}", ["run.yaml:1:9: model.tied: expected true or false, found 1"]),
    ("model: {layers: 0}", ["run.yaml:1:9: model.layers: expected at least 1, found 0"]),
    ("model: {dropout: 1}", ["run.yaml:1:9: model.dropout: expected less than 1, found 1"]),
    ("model: {dim: 130}", ["run.yaml:1:9: model.dim: dim 130 over 4 heads leaves 2; change one of them, or give head_dim"]),
    ("model: {preset: 70b}", None),
    ("optimizer: {kind: adam}", ["run.yaml:1:13: optimizer.kind: expected one of adamw, sgd, found 'adam'; did you mean 'adamw'?"]),
    (
        "preference: {loss: dpo}",
        ["run.yaml:1:14: preference.loss: expected one of sigmoid, ipo, hinge, found 'dpo': it is called sigmoid here"],
    ),
    ("optimizer: {lr: .nan}", None),
    ("optimizer: {betas: 0.9}", ["run.yaml:1:13: optimizer.betas: expected a list, found 0.9"]),
    ("optimizer: {betas: [0.9]}", ["run.yaml:1:13: optimizer.betas: expected 2 values"]),
    ("data: {mix: [{weight: 1}]}", ["run.yaml:1:14: data.mix.0: source is missing"]),
    ("data: {mix: [{source: a, wieght: 1}]}", ["run.yaml:1:26: unknown key 'data.mix.0.wieght'; did you mean 'weight'?"]),
    ("data: {mix: []}", ["run.yaml:1:8: data.mix: expected at least one entry, found a list"]),
    ("data: {source: 3}", ["run.yaml:1:8: data.source: expected a corpus name, a path, or a list of them, found 3"]),
    ('data: {dir: "a\\nb"}', ["run.yaml:1:8: data.dir: expected text without control characters"]),
    ("track: 3", ["run.yaml:1:1: track: expected a section of keys, found 3"]),
    ("layout: tp=2,tpp=3", ["run.yaml:1:1: layout: unknown key 'tpp'; did you mean 'tp'?"]),
    ("[1, 2]", ["run.yaml:1:1: expected sections such as model and data, found a list"]),
    ("model: &a {layers: 1}\nbatch: *a", None),
    ("model: !!python/object:os.system {}", ["run.yaml:1:8: tag tag:yaml.org,2002:python/object:os.system: " + PLAIN]),
    ("model: {layers: 2", None),
    ("a: 1\n---\nb: 2", ["run.yaml:2:1: a second document; a config is one", "run.yaml:1:1: unknown key 'a'"]),
    ("? {a: 1}\n: 2", ["run.yaml:1:3: a key must be a word"]),
]


@pytest.mark.parametrize("text, lines", GOLDEN, ids=[text[:24] for text, _ in GOLDEN])
def test_golden_messages(text: str, lines: list[str] | None) -> None:
    found = refused(text)
    assert found and all(line.startswith("run.yaml:") for line in found)
    if lines is not None:
        assert sorted(found) == sorted(lines)


def test_every_error_at_once_in_the_order_of_the_file() -> None:
    found = refused("data:\n  seq_len: 5\nmodel: {layers: x, dim: 0, heds: 2}\nlr: 1\nlr: 2\n", "batch.micro=a", "foo", "save.evry=3")
    assert found == [
        "run.yaml:2:3: unknown key 'data.seq_len': it is called data.sequence here",
        "run.yaml:3:9: model.layers: expected a whole number, found 'x'",
        "run.yaml:3:20: model.dim: expected at least 1, found 0",
        "run.yaml:3:28: unknown key 'model.heds'; did you mean 'heads'?",
        "run.yaml:4:1: unknown key 'lr': it belongs at optimizer.lr",
        "run.yaml:5:1: duplicate key 'lr', first at line 4",
        "override foo: expected a.b=value",
        "override save.evry=3: unknown key 'save.evry'; did you mean 'every'?",
        "override batch.micro=a: batch.micro: expected a whole number, found 'a'",
    ]


@pytest.mark.parametrize(
    "override, line",
    [
        ("model.layers=[1", "override model.layers=[1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("=3", "override =3: expected a.b=value"),
        ("optimizer.lr.x=3", "override optimizer.lr.x=3: lr is not a section"),
        ("zero_stage=1", "override zero_stage=1: unknown key 'zero_stage': it is called layout.zero here"),
        ("model.adapter.r=8", "override model.adapter.r=8: unknown key 'model.adapter.r': it is called model.adapter.rank here"),
        ("lora_alpha=8", "override lora_alpha=8: unknown key 'lora_alpha': it is called model.adapter.alpha here"),
        (
            "per_device_train_batch_size=8",
            "override per_device_train_batch_size=8: unknown key 'per_device_train_batch_size': it is called batch.micro here",
        ),
        ("load_in_4bit=true", "override load_in_4bit=true: unknown key 'load_in_4bit': model.adapter.quantize: nf4 says it here"),
        ("num_train_epochs=3", "override num_train_epochs=3: unknown key 'num_train_epochs': schedule.steps says it here, in steps"),
        ("layout=tp=x", "override layout=tp=x: layout: tp=x: expected a whole number from 1"),
    ],
)
def test_golden_override_messages(override: str, line: str) -> None:
    assert refused("optimizer: {lr: 1}", override) == [line]


@pytest.mark.parametrize(
    ("override", "way"),
    [
        ("optimizer.kind=adam", "the same command with optimizer.kind=adamw"),
        ("preference.loss=dpo", "the same command with preference.loss=sigmoid"),
        ("model.layers=many", "the same command with model.layers=VALUE"),
        ("model.dim=[", "the same command with model.dim=VALUE"),
        ("model.adapter.targets=[qq]", "the same command with model.adapter.targets=VALUE"),  # q is one of a list
        ("layout=dp=2,tq=2", "the same command with layout=VALUE"),
        ("model.layres=3", "dist-llm check run.yaml --explain lists every key"),
        ("layout.tp=2", "dist-llm check run.yaml --explain lists every key"),  # no value of it goes with layout as text
    ],
)
def test_the_remedy_of_an_override(override: str, way: str) -> None:
    """The value that mends it, where one does."""
    with pytest.raises(UsageError) as caught:
        load_text("layout: dp=2", [override], name="run.yaml")
    assert caught.value.next == way


def test_all_linear_is_all_targets() -> None:
    whole = ("q", "k", "v", "o", "gate", "up", "down")
    for word in ("all-linear", "[all-linear]"):
        assert read("model: {}", f"model.adapter.targets={word}").config.model.adapter.targets == whole
    assert "model.adapter.targets" in refused("model: {}", "model.adapter.targets=all")[0]


def test_renames_lead_to_keys_that_exist() -> None:
    assert set(OTHER_NAMES) <= set(KNOWN)
    old = [name for names in OTHER_NAMES.values() for name in names.split()]
    old += SAID_OTHERWISE
    assert len(old) == len(set(old)) and not set(old) & {known.split(".")[-1] for known in KNOWN}


def test_the_message_fits_its_block() -> None:
    with pytest.raises(UsageError) as caught:
        read("\n".join(f"key{i}: \x41" for i in range(40)))
    lines = render(caught.value).splitlines()
    assert lines[0] == "error: 40 errors in run.yaml" and len(lines) == 12 and lines[-2].endswith("and 32 more")


def test_bytes_that_are_no_text() -> None:
    assert refused(b"model:\n  dim: \xff\n") == ["run.yaml:2:8: not UTF-8: byte 0xff"]
    assert refused("model: {}\nx: \x01") == ["run.yaml:2:4: a character that YAML does not allow"]
    assert read("\ufeffmodel: {layers: 2}".encode().decode("utf-8-sig")).config.model.layers == 2  # type: ignore[arg-type]
    assert load_text(b"\xef\xbb\xbfmodel: {layers: 2}\r\n", name="bom").config.model.layers == 2


def test_bombs_and_depth_end_fast() -> None:
    bomb = "a: &a [x, x]\n" + "\n".join(f"b{i}: &b{i} [*{'a' if i == 0 else f'b{i - 1}'}, *a]" for i in range(30))
    assert any("alias *a" in line for line in refused(bomb))
    assert "nested deeper" in refused("model: " + "[" * 100_000)[0]
    assert refused("model: [" + "1," * 100_000 + "]")[0].endswith("more than 20000 values")
    assert "nested deeper" in refused("\n".join(" " * i + f"k{i}:" for i in range(200)))[0]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * ((1 << 20) + 1))
    cases = ((tmp_path / "none.yaml", "cannot be read"), (tmp_path, "not a file"), (large, "too large"), ("a\0b", "cannot be read"))
    for path, what in cases:
        with pytest.raises(UsageError, match=what):
            load_config(path)


# -- round trips and random text ------------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=12)
fractions = st.floats(0, 1, allow_nan=False, exclude_max=True)
positive = st.floats(1e-12, 1e6, allow_nan=False)
counts = st.integers(1, 4096)
scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | words | st.text(max_size=20)


@st.composite
def trees(draw: st.DrawFn) -> dict:
    heads = draw(st.integers(1, 8))
    pick = st.sampled_from
    return {
        "model": {"family": draw(pick(list(FAMILIES))), "heads": heads, "dim": heads * draw(st.integers(1, 64)),
                  "layers": draw(counts), "dropout": draw(fractions), "norm_eps": draw(positive), "tied": draw(st.booleans())},
        "data": {"source": draw(words | st.lists(words, min_size=1, max_size=3)), "dir": draw(words), "sequence": draw(counts) + 1,
                 "tokenizer": {"kind": draw(pick(["bpe", "bytes", "file"])), "path": draw(st.none() | words)},
                 "mix": draw(st.none() | st.lists(st.fixed_dictionaries({"source": words, "weight": positive}), min_size=1, max_size=3))},
        "batch": {"global": draw(counts), "micro": draw(counts)},
        "optimizer": {"lr": draw(positive), "betas": [draw(fractions), draw(fractions)], "clip": draw(st.none() | positive)},
        "layout": {"sp": draw(st.none() | st.booleans()), "schedule": draw(pick(["gpipe", "1f1b"])), "zero": draw(st.integers(0, 3))},
        "save": {"dir": draw(words | pick(["null", "~", "1e3", "0x1F", "1_000", "on", "true", "a: b", "#x", "- y", "{", "1.5", ".nan"]))},
    }  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(trees())
def test_a_dump_loads_back_equal(tree: dict) -> None:
    config = Config.model_validate(tree)
    text = dump_config(config)
    again = load_text(text, name="dump").config
    assert again == config and dump_config(again) == text
    assert load_text(yaml_file.dump(tree), name="tree").config == config


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.binary(max_size=60) | st.text("abl:,-[]{}&*!|>'\"#%@`? \n\t019._~=", max_size=40), st.text(max_size=20))
def test_random_text_is_read_or_refused(text: str | bytes, override: str) -> None:
    try:
        load_text(text, [override], name="fuzz")
    except UsageError as error:
        assert error.details and len(render(error).splitlines()) <= 12


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.text(st.characters(codec="utf-8"), max_size=3), st.integers(0, 6))
def test_damaged_configs_are_read_or_refused(at: int, put: str, cut: int) -> None:
    text = (CONFIGS / "quickstart.yaml").read_text()
    at %= len(text)
    try:
        load_text(text[:at] + put + text[at + cut :], name="fuzz")
    except UsageError as error:
        assert all(re.match(r"fuzz:\d+:\d+: |the config: ", line) for line in error.details)


@settings(max_examples=300, deadline=None)
@given(scalars | st.lists(st.integers(0, 9) | words, max_size=3))
def test_any_value_is_read_back(value: object) -> None:
    root, faults = yaml_file.read(yaml_file.dump({"key": value}), name="x")
    node = root.value["key"].value
    assert not faults and (node == value if not isinstance(node, list) else [item.value for item in node] == value)
