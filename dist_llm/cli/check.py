"""`dist-llm check CONFIG [a.b=v ...] --world N`: everything that can be refused, refused in seconds on one process."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_llm.cli.network import sources_of
from dist_llm.config import explain as explained
from dist_llm.config.hub import MARK
from dist_llm.config.layout import Layout, world_of
from dist_llm.config.load import Loaded, load_config
from dist_llm.config.rules import check as check_rules
from dist_llm.errors import Failure, SpaceError, UsageError, plain
from dist_llm.model.table import num_parameters, num_trained
from dist_llm.plan.memory import PARTS
from dist_llm.plan.predict import predicted, shape_of, timeline
from dist_llm.report.units import show_bytes
from dist_llm.train.base import Base, read_base

if TYPE_CHECKING:
    from dist_llm.data.tokenizer import Tokenizer

CORPORA = ("python", "skills", "entropy")
MOST_ACTIONS = 200_000  # of a step's schedule that is laid out for a prediction or a drawing: a few seconds


def check(
    config_path: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=v]...", help="Values that replace those of the file.")] = None,
    world: Annotated[int | None, typer.Option("--world", min=1, help="Number of ranks; else the layout's own.")] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="Replaces the layout of the file: dp=2,tp=2,zero=1.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Every value and where it comes from.")] = False,
    draw: Annotated[bool, typer.Option("--draw", help="The pipeline schedule as text: ranks down, time to the right.")] = False,
    draw_to: Annotated[Path | None, typer.Option("--draw-to", help="The same as a picture (.svg) or a Perfetto trace (.json).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON alone on stdout.")] = False,
) -> None:
    """Check a config and its layout on one process; say what it comes to, or every reason why it cannot run (exit 2)."""
    replaced = [*(overrides or []), *([f"layout={layout}"] if layout is not None else [])]
    loaded = load_config(config_path, replaced, base=read_base)
    ranks = world_of(loaded.config.layout) if world is None else world
    concrete = check_rules(loaded.config, ranks)
    tokenizer = _tokenizer_here(loaded)
    _check_tokenizer(loaded, tokenizer)
    _check_base(loaded, tokenizer)
    added, notes = _check_template(loaded, tokenizer)
    parameters = num_parameters(loaded.config.model)
    if as_json:
        typer.echo(json.dumps(explained.as_data(loaded, concrete, parameters=parameters, explain=explain)))
        return
    typer.echo(f"{plain(loaded.path)} can run on {ranks} {'rank' if ranks == 1 else 'ranks'} as {concrete}")
    equations = explained.equations(loaded.config, concrete)
    model = explained.model_line(loaded.config, parameters, num_trained(loaded.config.model))
    for line in [model, *equations, *_predictions(loaded, concrete)]:
        typer.echo(f"  {line}")
    notes = [*notes, *explained.new_rows(loaded.config.model, added), *explained.long_sequences(loaded.config)]
    for line in [*_missing_here(loaded), *notes]:
        typer.echo(f"  note: {plain(line)}")
    if draw or draw_to is not None:
        _draw(loaded, concrete, draw_to)
    if explain:
        _print_origins(loaded)


def _predictions(loaded: Loaded, layout: Layout) -> list[str]:
    """What the fullest rank will hold and the busiest send, from the table and the layout (plan/memory.py, plan/traffic.py)."""
    if layout.engine != "native":
        return []
    if (actions := _num_actions(loaded, layout)) > MOST_ACTIONS:
        return [f"no prediction: a step is {actions:,} actions, and at most {MOST_ACTIONS:,} are laid out here"]
    given = loaded.config.runtime.dtype
    dtype, where = (given, "") if given != "auto" else ("bfloat16", ", as on CUDA")
    device = "cpu" if loaded.config.runtime.device == "cpu" else "cuda"
    found = predicted(shape_of(loaded.config, layout, dtype=dtype, device=device))
    memory, sent = found["memory_bytes"], found["sent_bytes_per_step"]
    parts = ", ".join(f"{name} {show_bytes(memory[name])}" for name in PARTS)
    host = f"; host memory {show_bytes(memory['host'])}" if memory["host"] else ""
    lines = [f"in {dtype}{where}, the fullest rank holds {show_bytes(memory['total'])} at its peak ({parts}{host})"]
    if sent:
        lines.append(f"a rank sends at most {', '.join(f'{show_bytes(count)} over {axis}' for axis, count in sent.items())} a step")
    if layout.pp > 1:
        lines.append(f"{layout.schedule} leaves {found['bubble_fraction']:.1%} of the pipeline idle (stages weighed by their FLOP)")
    return lines


def _num_actions(loaded: Loaded, layout: Layout) -> int:
    """Forwards and backwards of a step, over all blocks."""
    micro_batches = explained.sizes(loaded.config, layout)["micro_batches"]
    return 2 * micro_batches * max(layout.stages, loaded.config.model.layers)


def _draw(loaded: Loaded, layout: Layout, target: Path | None) -> None:
    """The schedule that would run, from the same lists."""
    from dist_llm.schedule import draw

    if (actions := _num_actions(loaded, layout)) > MOST_ACTIONS:
        expected, found = f"at most {MOST_ACTIONS:,} actions in a step", f"{actions:,}"
        raise UsageError(
            "this schedule is too long to draw",
            where="--draw",
            expected=expected,
            found=found,
            next="the same command with batch.global=64",
        )
    spans = timeline(shape_of(loaded.config, layout, dtype="bfloat16")).spans
    if target is None:
        typer.echo("\n".join(draw.grid(spans, ranks=layout.pp).splitlines()[:-1]))  # the last line is in seconds: these are units
    elif target.suffix == ".svg":
        _write(target, draw.svg(spans, ranks=layout.pp, title=str(layout)))
        typer.echo(f"drawn in {plain(target)}")
    elif target.suffix == ".json":
        _write(target, json.dumps(draw.trace(spans)))
        typer.echo(f"drawn in {plain(target)}; open it at https://ui.perfetto.dev")
    else:
        raise UsageError("no such kind of drawing", where="--draw-to", expected="a name that ends in .svg or .json", found=str(target))


def _write(target: Path, text: str) -> None:
    try:
        target.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        found, expected = getattr(error, "strerror", None) or str(error), "a file in a folder that is there"
        way = f"the same command with --draw-to {shlex.quote(target.name)}"
        raise SpaceError("the drawing cannot be written", where=f"--draw-to {target}", expected=expected, found=found, next=way) from None


def _print_origins(loaded: Loaded) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("key", "value", "origin", box=box.SIMPLE)
    for row in explained.rows(loaded):
        table.add_row(*(Text(plain(cell), overflow="fold") for cell in row))
    Console(width=None if Console().is_terminal else 160).print(table)


def _missing_here(loaded: Loaded) -> list[str]:
    """Files that the config names and this machine lacks: no fault, a config may be checked far from its cluster."""
    from dist_llm.data.readers import find_files

    data, origins = loaded.config.data, loaded.origins
    missing = []
    for source in sources_of(data):
        try:
            if source.startswith(MARK):
                missing.append(f"{source}: data build and train read it over the network, where it is not in data.dir yet")
            elif source not in CORPORA:
                find_files(source)
        except Failure:
            missing.append(f"no text at {source} on this machine (data.{'mix' if data.mix else 'source'}: {origins['data.source']})")
    if data.tokenizer.kind == "file" and data.tokenizer.path and not os.path.exists(os.path.expanduser(data.tokenizer.path)):
        missing.append(f"no tokenizer at {data.tokenizer.path} on this machine (data.tokenizer.path: {origins['data.tokenizer.path']})")
    if data.chat.format is not None and _is_path(data.chat.template) and not os.path.exists(os.path.expanduser(data.chat.template)):
        missing.append(f"no chat template at {data.chat.template} on this machine (data.chat.template: {origins['data.chat.template']})")
    return missing


def _tokenizer_here(loaded: Loaded) -> Tokenizer | None:
    """The tokenizer of the file that the config names, where that is on this machine."""
    wanted = loaded.config.data.tokenizer
    if wanted.kind != "file" or wanted.path is None or not os.path.exists(os.path.expanduser(wanted.path)):
        return None
    from dist_llm.data.tokenizer import load

    return load(Path(wanted.path).expanduser())


def _check_base(loaded: Loaded, tokenizer: Tokenizer | None) -> None:
    """A tokenizer that is known already must be the base's. Raises UsageError."""
    config, wanted = loaded.config, loaded.config.data.tokenizer
    if config.base is None or wanted.kind == "bpe":
        return
    from dist_llm.data.tokenizer import bytes_tokenizer, load

    base = Base(config.base)
    base.close()
    if base.folder is not None and wanted.path == base.facts().tokenizer:
        return  # the very file
    found = bytes_tokenizer() if wanted.kind == "bytes" else tokenizer or load(Path(str(wanted.path)).expanduser())
    base.require_tokenizer(found.hash, where=f"data.tokenizer ({loaded.origins['data.tokenizer.kind']})")


def _check_template(loaded: Loaded, here: Tokenizer | None) -> tuple[list[str], list[str]]:
    """The chat template must be there, be rendered, train the end of a turn, and leave the vocabulary within the model's.

    Returns the special tokens that it adds to a base's tokenizer, and notes; neither where its files are not here. Raises UsageError.
    """
    config, wanted, name = loaded.config, loaded.config.data.tokenizer, loaded.config.data.chat.template
    if config.data.chat.format is None or wanted.kind == "ids" or (_is_path(name) and not os.path.exists(os.path.expanduser(name))):
        return [], []
    from dist_llm.data.template_files import BUILT_IN, choose_template
    from dist_llm.data.tokenizer import bytes_tokenizer

    file = Path(wanted.path).expanduser() if wanted.kind == "file" and wanted.path is not None else None
    if wanted.kind == "file" and here is None:
        if name not in (*BUILT_IN, "auto", "model"):
            choose_template(name, end="")
        return [], []
    tokenizer = here or bytes_tokenizer()  # a bpe that is still to be trained gets the same special tokens
    template = choose_template(name, end=tokenizer.end, begin=tokenizer.begin_names, tokenizer=file)
    fitted = template.fit(tokenizer)
    template.require_end(fitted)
    added, vocab = sorted(fitted.added - tokenizer.added), config.model.vocab
    needed = fitted.vocab_size if config.base is None else fitted.rows(template.commands(fitted))
    if wanted.kind != "bpe" and needed > vocab:
        what = "the model's vocabulary is smaller than the tokenizer's with the tokens of the chat template"
        expected, found = f"model.vocab of at least {needed}: {' '.join(added)}", f"{vocab} ({loaded.origins['model.vocab']})"
        way = "of a base model that has no rows to spare, data.chat.template=plain needs no further tokens"
        raise UsageError(what, where=f"data.chat.template: {name}", expected=expected, found=found, next=way)
    fallen = name == "auto" and file is not None and not template.models
    notes = [f"no chat template lies beside the tokenizer: {template.name} is used"] if fallen else []
    return added if config.base is not None else [], notes


def _is_path(template: str) -> bool:
    """Whether a template's name is that of a file, which another machine may have."""
    return template.endswith(".jinja") or os.sep in template


def _check_tokenizer(loaded: Loaded, tokenizer: Tokenizer | None) -> None:
    """A tokenizer that is here must have no more tokens than the model. Raises UsageError."""
    if tokenizer is None:
        return
    path, vocab = str(loaded.config.data.tokenizer.path), loaded.config.model.vocab
    tokens = tokenizer.vocab_size if loaded.config.base is None else tokenizer.rows()
    if tokens > vocab:
        expected, found = f"model.vocab of at least {tokens}", f"model.vocab {vocab} ({loaded.origins['model.vocab']})"
        way = f"the same command with model.vocab={tokens}"
        raise UsageError("the tokenizer has more tokens than the model", where=path, expected=expected, found=found, next=way)
