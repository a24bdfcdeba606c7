"""What the ranks of test_families.py do: models of transformers, made from our `write_config`, beside ours with their weights.

transformers is imported inside the cases: the ranks are forked from a process that must stay light.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.schema import ModelConfig
from dist_llm.engines.whole import Whole
from dist_llm.infer.choose import Choice
from dist_llm.infer.model import Model
from dist_llm.infer.write import follow
from dist_llm.interop.families import place, read_config, write_config
from dist_llm.model.table import table
from dist_llm.model.transformer import Context, make_context
from dist_llm.random import key_of, uniform
from dist_llm.train import trainer as trainer_module
from dist_llm.train.proof import proof_rank
from tests.oracles import CPU, batch, worst

Say = Callable[..., None]
Tensors = dict[str, Tensor]

# Odd shapes: fewer kv heads than heads, heads that are not dim / heads wide, tied and untied, biases, an odd vocabulary.
SMALL: dict[str, Any] = {"layers": 3, "dim": 24, "heads": 6, "kv_heads": 2, "ffn": 37, "vocab": 61, "max_positions": 64}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "dim": 20, "heads": 5, "kv_heads": 5, "ffn": 50, "max_positions": 19},
    "gpt2, untied": {"family": "gpt2", "dim": 20, "heads": 5, "kv_heads": 5, "ffn": 33, "tied": False, "activation": "gelu"},
    "llama": {"family": "llama", "rope_theta": 5000.0},
    "llama, tied, wide heads": {"family": "llama", "dim": 21, "heads": 3, "kv_heads": 1, "head_dim": 10, "tied": True},
    "llama, biases": {"family": "llama", "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "mistral": {"family": "mistral", "head_dim": 6, "sliding_window": 0},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen2, wide heads": {"family": "qwen2", "head_dim": 6},
    "llama, stretched": {
        "family": "llama",
        "head_dim": 16,
        "rope_scaling": "llama3",
        "rope_factor": 8.0,
        "rope_theta": 500.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_positions": 32,
    },
    "llama, linear": {"family": "llama", "rope_scaling": "linear", "rope_factor": 3.0},
    "qwen2, yarn": {
        "family": "qwen2",
        "head_dim": 16,
        "rope_scaling": "yarn",
        "rope_factor": 4.0,
        "rope_theta": 200.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 8.0,
        "rope_original_positions": 30,
    },
    "mistral, window": {"family": "mistral", "sliding_window": 5},
    "qwen3, windows": {"family": "qwen3", "head_dim": 6, "sliding_window": 4, "full_every": 2, "qkv_bias": True, "out_bias": True},
    "olmo2": {"family": "olmo2", "rope_theta": 3000.0},
    "olmo2, tied, wide heads": {"family": "olmo2", "kv_heads": 1, "head_dim": 6, "tied": True},
    "gemma2": {"family": "gemma2", "head_dim": 10, "query_scale": 7.0, "sliding_window": 6, "attention_softcap": 2.0, "logit_softcap": 3.0},
    "gemma2, no caps": {"family": "gemma2", "attention_softcap": 0.0, "logit_softcap": 0.0, "sliding_window": 4, "tied": False},
    "gemma3": {
        "family": "gemma3",
        "head_dim": 10,
        "query_scale": 9.0,
        "sliding_window": 4,
        "full_every": 3,
        "rope_theta": 90000.0,
        "rope_local_theta": 50.0,
        "logit_softcap": 4.0,
        "rope_scaling": "linear",
        "rope_factor": 8.0,
    },
    "gemma3, one kv head": {"family": "gemma3", "kv_heads": 1, "sliding_window": 7, "layers": 7},
    "qwen3": {"family": "qwen3", "head_dim": 10, "rope_theta": 30000.0},
}


def model_of(name: str) -> ModelConfig:
    """One of the models."""
    return ModelConfig(**{**SMALL, **MODELS[name]})


def theirs_of(model: ModelConfig, dtype: torch.dtype, *, seed: int = 11) -> nn.Module:
    """The transformers model of a config, with random weights: norms and biases too."""
    import transformers

    written = write_config(model)
    kind = getattr(transformers, written["architectures"][0])
    made = kind._from_config(kind.config_class(**written), attn_implementation="eager", dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return made.eval()


@contextmanager
def nothing_narrowed() -> Iterator[None]:
    """transformers takes norms and the softmax of attention in float32 whatever the dtype of the model; here they keep float64."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    kinds = (Gemma2RMSNorm, Gemma3RMSNorm, LlamaRMSNorm, MistralRMSNorm, Olmo2RMSNorm, Qwen2RMSNorm, Qwen3RMSNorm)
    originals, softmax = [(kind, kind.forward) for kind in kinds], F.softmax

    def wrapped(original: Callable) -> Callable:
        def forward(self: nn.Module, x: Tensor) -> Tensor:
            """Their own lines, while a float64 tensor cannot be made narrower."""
            to, narrow = Tensor.to, Tensor.float
            Tensor.to = lambda self, *a, **k: self if self.dtype == torch.float64 and a == (torch.float32,) else to(self, *a, **k)  # type: ignore[method-assign]
            Tensor.float = lambda self: self if self.dtype == torch.float64 else narrow(self)  # type: ignore[method-assign]
            try:
                return original(self, x)
            finally:
                Tensor.to, Tensor.float = to, narrow  # type: ignore[method-assign]

        return forward

    def kept(x: Tensor, dim: int, dtype: torch.dtype | None = None, **more: Any) -> Tensor:
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype, **more)

    F.softmax = kept  # type: ignore[assignment]
    for kind, original in originals:
        kind.forward = wrapped(original)
    try:
        yield
    finally:
        F.softmax = softmax
        for kind, original in originals:
            kind.forward = original


def our_tensors(theirs: Tensors, model: ModelConfig) -> Tensors:
    """Weights or gradients of a transformers model under our names and in our shapes, as `place` says."""
    found = {}
    for row in table(model):
        at = place(model, row.name)
        whole = theirs[at.key].T if at.transposed else theirs[at.key]
        found[row.name] = whole[at.first : at.first + row.shape[0]].contiguous()
    return found


def plain_of(model: ModelConfig, weights: Tensors, dtype: torch.dtype) -> Whole:
    """Our model on one device with given weights."""
    plain = Whole(model, dtype=dtype, device=CPU)
    with torch.no_grad():
        for name, parameter in plain.by_name.items():
            parameter.copy_(weights[name])
    return plain


def parameters_of(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """All of them by name; a tied one under both."""
    return dict(theirs.named_parameters(remove_duplicate=False))


def against_transformers(rank: int, world: int, say: Say) -> dict[str, dict[str, Any]]:
    """Of each model: logits, loss and every gradient in float64, logits in float32; and what becomes of its config on the way."""
    torch.set_num_threads(1)
    return {name: _differences(model_of(name)) for name in MODELS}


def _differences(model: ModelConfig) -> dict[str, Any]:
    data = batch(model.vocab)
    data = {name: data[name] for name in ("tokens", "labels")}
    theirs = theirs_of(model, torch.float64)
    with nothing_narrowed():
        logits = theirs(input_ids=data["tokens"], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), data["labels"].flatten(), ignore_index=-100, reduction="sum")
    loss.backward()
    weights = our_tensors({name: parameter.data for name, parameter in parameters_of(theirs).items()}, model)
    gradients = our_tensors({name: parameter.grad for name, parameter in parameters_of(theirs).items()}, model)

    plain = plain_of(model, weights, torch.float64)
    context = make_context(model, **data, dtype=torch.float64)
    ours, summed = plain.logits(context), plain(context)
    summed.backward()
    found = {
        "logits": worst({"logits": ours}, {"logits": logits})[0],
        "loss": abs(float(summed.detach() / loss.detach()) - 1),
        "gradient": worst({name: parameter.grad for name, parameter in plain.by_name.items()}, gradients),
    }

    theirs, narrow = theirs.float(), plain.float()
    with torch.no_grad():
        narrow_logits = narrow.logits(make_context(model, **data, dtype=torch.float32))
        their_narrow_logits = theirs(input_ids=data["tokens"], use_cache=False).logits
    held = {at.key for at in (place(model, row.name) for row in table(model))}
    state = {name for name in theirs.state_dict() if not (model.tied and name == "lm_head.weight")}
    return {
        **found,
        "narrow logits": worst({"logits": narrow_logits}, {"logits": their_narrow_logits})[0],
        "not named": sorted(held ^ state),
        "read back": read_config(theirs.config.to_dict(), where="config.json") == model.model_dump(),
    }


# --- what each token's loss counts -------------------------------------------------------------------------------------


def weighted_proof(rank: int, world: int, say: Say, job: dict[str, Any], layout: dict[str, Any], folder: str) -> dict[str, Any]:
    """A proof run in which every token has a weight of its own, addressed by its place in the global batch."""
    make = trainer_module.make_context

    def weighted(*given: Any, **options: Any) -> Context:
        length = given[1].shape[1]
        place = options["rows"][:, None] * length + torch.arange(length)
        return make(*given, **{**options, "weights": 2 * uniform(place, key_of(3, "weights")).float()})

    trainer_module.make_context = weighted
    return proof_rank(rank, world, say, job, layout, folder)


def weighted_by_torch(rank: int, world: int, say: Say) -> list[float]:
    """Differences of the loss and of the worst gradient of one micro-batch."""
    torch.set_num_threads(1)
    model, data = model_of("llama"), batch(61)
    weights = torch.rand(data["labels"].shape, generator=torch.Generator().manual_seed(2))
    context = make_context(model, data["tokens"], data["labels"], dtype=torch.float64, weights=weights)
    plain = Whole(model, dtype=torch.float64, device=CPU)
    loss = plain(context)
    loss.backward()
    ours = {name: parameter.grad for name, parameter in plain.by_name.items()}
    plain.zero_grad()
    each = F.cross_entropy(plain.logits(context).flatten(0, 1), data["labels"].flatten(), ignore_index=-100, reduction="none")
    expected = (each * weights.flatten()).sum()
    expected.backward()
    theirs = {name: parameter.grad for name, parameter in plain.by_name.items()}
    return [abs(float(loss.detach() / expected.detach()) - 1), worst(ours, theirs)[0]]


# --- sampling ------------------------------------------------------------------------------------------------------------

SAMPLED = ("llama, stretched", "mistral, window", "olmo2", "gemma2", "gemma3", "gpt2")


class Given:
    """Whole tensors by global name."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def read(self, kind: str, name: str, box: Any, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box of one of them."""
        return self.tensors[name][tuple(slice(*side) for side in box)].reshape(-1)[start:stop]


def greedy(rank: int, world: int, say: Say) -> dict[str, list[list[int]]]:
    """Of some models [our tokens, their tokens] after a prompt longer than the window, likeliest first, keys and values kept."""
    torch.set_num_threads(1)
    found = {}
    for name in SAMPLED:
        # Untied: a tied output says its input again.
        model, prompt = model_of(name).model_copy(update={"tied": False}), [3, 17, 42, 5, 8, 13, 21, 34, 55]
        theirs = theirs_of(model, torch.float64)
        weights = our_tensors({key: parameter.data for key, parameter in parameters_of(theirs).items()}, model)
        ours = Model(Given(weights), model, dtype=torch.float64, device=CPU)
        taken = list(follow(ours, prompt, count=10, choice=Choice(temperature=0), window=64))
        with nothing_narrowed():
            out = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=10, use_cache=True)
        found[name] = [taken, out[0, len(prompt) :].tolist()]
    return found
