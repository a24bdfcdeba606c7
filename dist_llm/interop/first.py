"""A checkpoint of step 0 that no run of ours has made: one rank, no moments, which before a first step are zero."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_llm.config.layout import Layout
from dist_llm.config.load import config_tree
from dist_llm.config.schema import Config
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.model.table import table
from dist_llm.sidefiles import SIDE_FILES
from dist_llm.train.durable import Disk
from dist_llm.train.folder import NO_TEXT, VERSION, begin, commit, flush
from dist_llm.train.parts import Part, write_part
from dist_llm.train.storage import RunFolder, storing, write_config


def write_first(
    held: RunFolder, config: Config, part: Part, *, tokenizer: Tokenizer, beside: Mapping[str, bytes], base: tuple[str, str] | None = None
) -> Path:
    """Writes a run folder's checkpoint, which is returned, and its config; nothing of them is left when that fails.

    beside: name -> content of files that are carried along. base: the identities of the weights under an adapter, as they lie and in any
    form.
    """
    disk, save_id, kept = Disk(), secrets.token_hex(8), tokenizer.kept | dict(beside)
    with storing(held.path):
        partial = begin(disk, held.path, 0, save_id)
        try:
            written = write_part(disk, partial, 0, part)
            written |= {name: disk.write(partial / name, [kept[name]]) for name in SIDE_FILES if name in kept}
            flush(disk, partial, written)
            manifest: dict[str, Any] = {"version": VERSION, "save_id": save_id, "step": 0, "world": 1, "layout": asdict(Layout())}
            manifest |= {"config": config_tree(config), "seed": config.runtime.seed, "tokenizer": tokenizer.hash, "data": NO_TEXT}
            manifest |= {"rows": [[row.name, row.shape] for row in table(config.model) if row.trained]}
            manifest |= {} if base is None else {"base": base[0], "base_weights": base[1]}
            final = commit(disk, partial, manifest | {"files": {name: digest.about for name, digest in written.items()}})
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        write_config(held.path, config)
    return final
