"""Contestants of the generation question: each goes on with the same prompts over the same weights, with a cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import Rival, Taken, copy_into, rival, transformers_llama, transformers_name
from benchmarks.setting import SEED, Setting, Tokens, initial_weights

ALPHA = 16


@dataclass(frozen=True)
class WritingSetting:
    """`lines` prompts of `prompt` tokens, each gone on with by `count`; a step does all of that. adapter: its rank, 0 for none.

    sampled: by temperature, top-k and top-p, else the likeliest token.
    """

    model: Setting = field(default_factory=Setting)
    lines: int = 1
    prompt: int = 64
    count: int = 128
    adapter: int = 0
    sampled: bool = False

    @property
    def threads(self) -> int:
        """Of a rank."""
        return self.model.threads

    def quick(self) -> WritingSetting:
        """In miniature, for tests."""
        return replace(self, model=self.model.quick(), prompt=8, count=8)

    def described(self) -> dict[str, Any]:
        """As the results keep it."""
        told = {name: getattr(self, name) for name in ("lines", "prompt", "count", "adapter", "sampled")}
        return self.model.described() | told | {"sequence": self.prompt + self.count, "batch": self.lines, "optimizer": None}

    def prompts(self) -> Tensor:
        """(lines, prompt)."""
        tokens = replace(self.model, sequence=self.prompt, batch=self.lines)
        return Tokens(tokens).batch(0)[0]


def taken(tokens: Tensor) -> Taken:
    """48 bits of the hash of what was written, (lines, count), as a number: the same for the same text."""
    return Taken(float(int.from_bytes(hashlib.sha256(tokens.to(torch.int64).numpy().tobytes()).digest()[:6], "big")))


class Writing:
    """One contestant."""

    def __init__(self, setting: WritingSetting) -> None:
        self.setting, self.prompts = setting, setting.prompts()

    def step(self, step: int) -> Taken:
        """The prompts again: what was computed for them before is forgotten."""
        written = self.write()
        assert written.shape == (self.setting.lines, self.setting.count)
        return taken(written)

    def write(self) -> Tensor:
        """Tokens (lines, count)."""
        raise NotImplementedError

    def booked(self) -> dict[str, float]:
        """Nothing."""
        return {}


class Held:
    """Tensors by name, read as a checkpoint is."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        self.named = named

    def read(self, kind: str, name: str, box: Any, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a box."""
        return self.named[name][tuple(slice(*extent) for extent in box)].flatten()[start:stop]


@rival("write-ours", "dist_llm.infer.write")
def _write_ours(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return Ours(setting)


class Ours(Writing):
    """Our cache, our choice."""

    def __init__(self, setting: WritingSetting) -> None:
        from dist_llm.infer.choose import Choice
        from dist_llm.infer.model import Model

        super().__init__(setting)
        plain, adapted = setting.model.model, adapted_model(setting)
        self.model = Model(Held(dict(initial_weights(setting.model))), plain, dtype=torch.float32, device=torch.device("cpu"))
        if setting.adapter:
            self.model.add("one", adapted, Held(adapter_weights(setting)))
            self.model.use("one")
        self.choice = Choice(temperature=0.8, top_k=50, top_p=0.95, seed=SEED) if setting.sampled else Choice(temperature=0)

    def write(self) -> Tensor:
        """By the loop behind `dist-llm sample`."""
        from dist_llm.infer.write import Writer

        setting = self.setting
        writer = Writer(self.model, self.prompts.tolist(), count=setting.count, choice=self.choice, window=setting.prompt + setting.count)
        steps = [[tokens[line] for line in range(setting.lines)] for tokens in writer]
        return torch.tensor(steps).T.contiguous()


@rival("write-transformers", "transformers.models.llama.modeling_llama", "transformers.generation")
def _write_transformers(setting: Any, argument: str, rank: int, world: int) -> Rival:
    return Transformers(setting)


class Transformers(Writing):
    """`generate` of transformers; under an adapter PEFT's modules."""

    def __init__(self, setting: WritingSetting) -> None:
        super().__init__(setting)
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        self.model: Any = transformers_llama(setting.model, positions=setting.prompt + setting.count, **ends)
        if setting.adapter:
            from peft import LoraConfig, get_peft_model

            kind = LoraConfig(r=setting.adapter, lora_alpha=ALPHA, target_modules="all-linear", bias="none")
            self.model = get_peft_model(self.model, kind)
            copy_into(self.model, ((peft_name(name), values) for name, values in adapter_weights(setting).items()))
        self.model.eval()
        self.how: dict[str, Any] = {"do_sample": False}
        if setting.sampled:
            self.how = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}

    def write(self) -> Tensor:
        """With its own cache."""
        shape = {"max_new_tokens": self.setting.count, "min_new_tokens": self.setting.count}
        mask = torch.ones_like(self.prompts)
        with torch.no_grad():
            written = self.model.generate(input_ids=self.prompts, attention_mask=mask, **shape, **self.how)
        return written[:, self.setting.prompt :]


def adapted_model(setting: WritingSetting) -> Any:
    """The model with its adapter."""
    from dist_llm.config.schema import AdapterConfig

    return setting.model.model.model_copy(update={"adapter": AdapterConfig(rank=setting.adapter, alpha=ALPHA)})


def adapter_weights(setting: WritingSetting) -> dict[str, Tensor]:
    """Matrices that change the text, by our names."""
    from dist_llm.model.table import table

    generator = torch.Generator().manual_seed(SEED)
    return {row.name: 0.05 * torch.randn(row.shape, generator=generator) for row in table(adapted_model(setting)) if row.trained}


def peft_name(name: str) -> str:
    """`blocks.0.attention.q.lora_a` -> PEFT's name of it."""
    module, _, matrix = name.rpartition(".")
    plain = transformers_name(f"{module}.weight").removesuffix(".weight")
    return f"base_model.model.{plain}.lora_{matrix[-1].upper()}.default.weight"
