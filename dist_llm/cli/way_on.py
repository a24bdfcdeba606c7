"""The way on that a failure names, as a command that can be pasted: with the config and the flags that were typed.

What raises a failure knows no command line. It writes `dist-llm data build CONFIG`, `CKPT` or `the same command again`, which are
put here from the words that were typed; and whoever names no place or no way on gets those of the command.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_llm.errors import Code, Failure

AGAIN = "the same command again"
AGAIN_WITH = "the same command with"
# Short flags as the keys that other verbs take; those of `compare` are of its own, but for two.
_KEYS = {"layout": "layout", "steps": "schedule.steps", "save_every": "save.every", "run_dir": "save.dir", "dtype": "runtime.dtype"}
_KEYS |= {"max_bad_lines": "data.max_bad_lines", "data": "data.source"}
_SHORT = {"train": tuple(_KEYS), "check": ("layout",), "data build": ("max_bad_lines",), "compare": ("dtype", "data")}
BARE = ("--no-text",)  # flags without a value that a message says to leave out
_RANKS = ("--layout", "--nproc", "--world")


@dataclass(frozen=True)
class Typed:
    """A command line: its words, its verb, and what its words are by the names of the verb's parameters."""

    words: tuple[str, ...]
    verb: str
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def again(self) -> str:
        """The whole command."""
        return shlex.join(["dist-llm", *self.words])

    @property
    def config(self) -> str | None:
        """The config that was named."""
        path = self.values.get("config_path")
        return None if path is None or os.path.isdir(path) else path

    @property
    def overrides(self) -> list[str]:
        """What replaces values of the config, short flags too."""
        given = list(self.values.get("overrides") or self.values.get("words") or ())
        if self.verb == "compare":
            given = [word for word in given if "." in word.split("=")[0] or word.startswith("base=")]
        short = {_KEYS[name]: self.values.get(name) for name in _SHORT.get(self.verb, ())}
        return [*given, *(f"{key}={value}" for key, value in short.items() if value is not None)]


def read_words(command: Any, arguments: Sequence[str]) -> Typed:
    """A command line by its parts, as far as they can be told: it may be the very thing that is wrong."""
    words, names = list(arguments), []
    try:
        context = command.context_class(command, info_name="dist-llm")
        while words and hasattr(command, "get_command") and (below := command.get_command(context, words[0])) is not None:
            names.append(words.pop(0))
            command, context = below, below.context_class(below, info_name=names[-1], parent=context)
        if not names or hasattr(command, "get_command"):
            return Typed(tuple(arguments), " ".join(names))
        return Typed(
            tuple(arguments), " ".join(names), command.make_context(names[-1], words, context.parent, resilient_parsing=True).params
        )
    except Exception:
        return Typed(tuple(arguments), " ".join(names))


def complete(failure: Failure, typed: Typed) -> Failure:
    """The failure with a place and a way on, and with what was typed in the place of CONFIG and CKPT."""
    if failure.where is None:
        failure.where = typed.config or f"dist-llm {typed.verb}".strip()
    failure.next = filled(failure.next or _usual(failure, typed), failure.where, typed)
    return failure


def _usual(failure: Failure, typed: Typed) -> str:
    """The way on where the failure names none: what to mend by its place, and the command again."""
    where = str(failure.where)
    if where.startswith("--"):
        return f"dist-llm {typed.verb} --help"
    keys = re.findall(r"(?:^|(?<=, ))([a-z]+(?:\.[a-z_0-9]+)+)(?=: |,|$| \()", where)
    if keys and not os.path.exists(keys[0]):
        changed = f"{AGAIN_WITH} {' '.join(f'{key}=VALUE' for key in keys)}"
        given = [word.partition("=")[0] for word in typed.overrides]
        return changed if set(keys) <= {*given} or not typed.config else f"change {', '.join(keys)} in {typed.config}, or {changed}"
    path = re.sub(r"(:\d+)*( or after)?(, byte .*)?$", "", where)
    if failure.code in (Code.DATA, Code.CHECKPOINT) and failure.where != typed.config:
        return f"{'mend' if os.path.exists(path) else 'bring'} {path} or name another, then {AGAIN}"
    if failure.code == Code.SPACE:
        return f"make room there, or a place that can be written, then {AGAIN}"
    return f"{AGAIN}, once that is mended"


def filled(text: str, where: str, typed: Typed) -> str:
    """A way on with the words that were typed."""
    if typed.words:
        text = re.sub(rf"{AGAIN_WITH} (--[\w-]+) (\S+)", lambda found: _with_flag(found[1], found[2], typed), text)
        text = re.sub(rf"{AGAIN_WITH} (\S+\.ya?ml)$", lambda found: _with_file(found[1], typed), text)
        text = re.sub(rf"{AGAIN_WITH} ((?:[\w.]+=[^\s;,:]+ ?)*[\w.]+=[^\s;,:]+)", lambda found: _with_values(found[1].split(), typed), text)
        text = re.sub(
            r"the same command without (--[\w-]+)", lambda found: shlex.join(["dist-llm", *_without(typed.words, (found[1],))]), text
        )
        text = re.sub(rf"(, )?then {AGAIN}", lambda found: f"{found[1] or ''}then: {typed.again}", text)
        text = re.sub(rf"{AGAIN}, (once [\w ]+)", lambda found: f"{found[1]}: {typed.again}", text)
        text = text.replace(AGAIN, typed.again)
    config = typed.config or _kept_config(where)
    if config is not None:
        text = re.sub(
            r"dist-llm ([a-z ]+) CONFIG((?: [\w.]+=[^\s;,]+)*)", lambda found: _with_config(found[1], found[2].split(), config, typed), text
        )
    if (checkpoint := typed.values.get("checkpoint")) is not None:
        text = re.sub(r"\bCKPT\b", lambda _: shlex.quote(str(checkpoint)), text)
    return text


def _with_config(verb: str, overrides: list[str], config: str, typed: Typed) -> str:
    """`dist-llm VERB run.yaml a.b=v ...`; `train` keeps all that was said to it but --resume."""
    changed = tuple(word.partition("=")[0] + "=" for word in overrides)
    if verb == typed.verb == "train":
        return shlex.join(["dist-llm", *_without(typed.words, ("--resume",)), *overrides])
    kept = [word for word in typed.overrides if not word.startswith(changed)] if typed.config else []
    return shlex.join(["dist-llm", *verb.split(), config, *kept, *overrides])


def _with_flag(flag: str, value: str, typed: Typed) -> str:
    """The command with another value of a flag; the number of ranks goes with a layout."""
    ranks = flag == "--layout"
    kept = [word for word in _without(typed.words, _RANKS if ranks else (flag,)) if not (ranks and re.match(r"layout[.=]", word))]
    return shlex.join(["dist-llm", *kept, flag, value])


def _with_values(overrides: list[str], typed: Typed) -> str:
    """The command with other values of keys, also of those that a short flag stands for; its help where it takes none."""
    if typed.config is None:
        return f"dist-llm {typed.verb} --help"
    keys = [word.partition("=")[0] for word in overrides]
    flags = tuple(f"--{name.replace('_', '-')}" for name in _SHORT.get(typed.verb, ()) if _KEYS[name] in keys)
    kept = [word for word in _without(typed.words, flags) if word.partition("=")[0] not in keys]
    return shlex.join(["dist-llm", *kept, *overrides])


def _with_file(config: str, typed: Typed) -> str:
    """The command with another config."""
    config = shlex.split(config)[0]
    at = typed.words.index(typed.config) if typed.config in typed.words else len(typed.words)
    return shlex.join(["dist-llm", *typed.words[:at], config, *typed.words[at + 1 :]])


def _without(words: Sequence[str], flags: tuple[str, ...]) -> list[str]:
    """The words without flags and their values."""
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] not in flags:
            kept.append(word)
        skip = not skip and word in flags and word not in BARE
    return kept


def _kept_config(where: str) -> str | None:
    """The config that lies in the run folder which holds `where`."""
    for folder in [Path(where), *Path(where).parents][:4]:
        if (str(folder) == where or os.path.isdir(folder / "checkpoints")) and os.path.isfile(folder / "config.yaml"):
            return str(folder / "config.yaml")
    return None
