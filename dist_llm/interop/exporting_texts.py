"""The texts of a Hugging Face folder: config.json, the tokenizer's, generation_config.json.

What an import has carried along is kept as it was where it is still true.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dist_llm.config.base import FREE
from dist_llm.config.schema import ModelConfig
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import Failure
from dist_llm.interop.ends import GENERATION, named_ends
from dist_llm.interop.families import read_config
from dist_llm.interop.hugging_face import CONFIG
from dist_llm.strict import strict_json

TOKENIZER = "tokenizer_config.json"
OURS = {"eos_token", "bos_token", "chat_template"}  # all that a tokenizer_config.json of ours says


def texts_of(
    model: ModelConfig,
    beside: Mapping[str, bytes],
    *,
    values: dict[str, Any],
    dtype: str,
    tokenizer: Tokenizer,
    sequence: int,
    ends: Sequence[int],
) -> dict[str, bytes]:
    """name -> content of what lies beside the weights: what was carried along from an import as it was (`beside`), the rest made here.

    values: what a new config.json says of the model; dtype: of most of its weights, as config.json calls it; sequence: tokens it was
    trained to see; ends: the ids that end an answer, where it was trained on conversations.
    """
    texts = {name: content for name, content in beside.items() if name != CONFIG}
    said = strict_json(texts[TOKENIZER])
    begin = _first_token(tokenizer, said)
    longer = model.positions == "rotary" and sequence > model.max_positions
    # A scaling may take the length it was made for from the very number that is to be raised: only a new config says both.
    known = None if longer and model.rope_scaling != "none" else _still_true(beside.get(CONFIG), model)
    if known is not None:
        values = known
    else:
        values = {**values, "bos_token_id": begin, "eos_token_id": tokenizer.end_id}
    if longer:
        values = {**values, "max_position_embeddings": sequence}
    values = {key: value for key, value in values.items() if key != "torch_dtype"} | {"dtype": dtype}
    texts[CONFIG] = as_json(values)
    if said.keys() <= OURS:  # without a class transformers makes a tokenizer of the model's family of it, which cuts text in its own way
        about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.inner.id_to_token(begin)}
        about |= {"eos_token": tokenizer.end, "clean_up_tokenization_spaces": False, "model_max_length": sequence}
        texts[TOKENIZER] = as_json(about | said)
    if (made := generation(texts.get(GENERATION), values, ends, anew=known is None)) is not None:
        texts[GENERATION] = made
    return texts


def _first_token(tokenizer: Tokenizer, said: Mapping[str, Any]) -> int:
    """The id after which texts begin: what the tokenizer's own rule puts there, what its files call BOS, or the end of the text before."""
    named = said.get("bos_token")
    named = named.get("content") if isinstance(named, dict) else named
    found = tokenizer.inner.token_to_id(named) if isinstance(named, str) else None
    return tokenizer.begin[-1] if tokenizer.begin else tokenizer.end_id if found is None else found


def generation(held: bytes | None, config: Mapping[str, Any], ends: Sequence[int], *, anew: bool) -> bytes | None:
    """generation_config.json where it has to be made: a new one, or one that lacks a token which ends the answers that were trained.

    held: the one that was carried along; config: config.json; anew: that was made here.
    """
    values = strict_json(held) if held is not None else {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
    stops = named_ends(values)
    lacking = [token for token in ends if token not in stops]
    if not isinstance(values, dict) or (not lacking and (held is not None or not anew)):
        return None
    stops += lacking
    return as_json({**values, **({"eos_token_id": stops[0] if len(stops) == 1 else stops} if stops else {})})


def _still_true(content: bytes | None, model: ModelConfig) -> dict[str, Any] | None:
    """The config.json that was carried along, where it says of the model what is true of it now."""
    if content is None:
        return None
    try:
        values = strict_json(content)
        said = ModelConfig.model_validate(read_config(values, where=CONFIG))
    except (Failure, ValueError, AttributeError, TypeError):
        return None
    left_out = {*FREE, "family"}
    return values if said.model_dump(exclude=left_out) == model.model_dump(exclude=left_out) else None


def as_json(values: Any) -> bytes:
    """A JSON file's content."""
    return json.dumps(values, indent=2).encode() + b"\n"
