"""What lies beside the weights of a model: its tokenizer, chat template and generation settings, carried along byte for byte. Torch-free.

The names are those of Hugging Face, and there are no others: a name from elsewhere never becomes a path.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dist_llm.errors import CheckpointError
from dist_llm.strict import first_line, read_bounded, strict_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
SLOW_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.model")  # of the same tokenizer in older forms, for other programs
MODEL_FILES = ("config.json", "generation_config.json")
MERGED = "merge.json"  # of ours: which adapters are in the weights
NEEDED = ("tokenizer.json", "tokenizer_config.json")
SIDE_FILES = (*TOKENIZER_FILES, *SLOW_TOKENIZER_FILES, *MODEL_FILES, MERGED)
LARGEST = {"tokenizer.json": 256 << 20, "vocab.json": 64 << 20, "merges.txt": 64 << 20, "tokenizer.model": 64 << 20}  # bytes
LARGEST_OTHER = 16 << 20


def read_beside(folder: Path, names: Iterable[str] = SIDE_FILES) -> dict[str, bytes]:
    """name -> content of those that are there. Raises CheckpointError where one cannot be read, is too large, or is no JSON."""
    found = {}
    for name in names:
        path, most = folder / name, LARGEST.get(name, LARGEST_OTHER)
        if not path.exists():
            continue
        try:
            content = read_bounded(path, most + 1)
            if len(content) > most:
                raise CheckpointError("a file is too large for what it is", where=str(path), expected=f"at most {most >> 20} MiB")
            if name.endswith(".json"):
                strict_json(content)
        except OSError as error:
            raise CheckpointError("a file cannot be read", where=str(path), found=error.strerror) from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError("a file is no JSON", where=str(path), found=first_line(error)) from None
        found[name] = content
    return found
