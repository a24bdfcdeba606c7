"""Tokenizers and templates as models on the hub have them, made by the tokenizers library; their folder opens with transformers too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = ["All the data of a model, of many models: the last line of a text. User and assistant repeat: table, paper, wintergreen."] * 9
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TULU = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% else %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


def sentencepiece(*, first: str = "prepend") -> tokenizers.Tokenizer:
    """As Llama 2's and Mistral's: a space is a letter, one is put before a text, other letters are bytes, `<s>` begins.

    first: how the space is put: prepend (before every part between special tokens), metaspace (before the first), none (Gemma's).
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learned = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learned.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=len(pieces) + 120, special_tokens=pieces, show_progress=False))
    inner = tokenizers.Tokenizer.from_str(
        json.dumps({**json.loads(learned.to_str()), "added_tokens": []})  # the bytes are no special tokens
    )
    inner.add_special_tokens(pieces[:3])
    inner.normalizer = None
    if first == "prepend":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif first == "metaspace":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        inner.normalizer = normalizers.Replace(" ", "▁")
    strip = [] if first == "none" else [decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return inner


def save(inner: tokenizers.Tokenizer, folder: Path, *, template: str | None = None, **names: str) -> Any:
    """Writes a tokenizer as transformers does, and gives it back as AutoTokenizer opens it. names: `eos_token`, `bos_token`."""
    import transformers

    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **{"eos_token": "</s>", "bos_token": "<s>", **names})
    fast.chat_template = template
    fast.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)
