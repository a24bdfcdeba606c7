"""The `dist-llm` command: its verbs, and what every failure of theirs looks like.

A verb's module is imported when the verb is used, so that `--help` and `check` import neither torch nor deepspeed.
Each failure ends in one block on stderr and a documented exit code (errors.py); with `--json` also in {"error": ...} on stdout.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
from typing import Annotated, Any

import typer

from dist_llm import __version__
from dist_llm.cli.misuse import misuse
from dist_llm.cli.signals import tell_end
from dist_llm.cli.way_on import complete, read_words
from dist_llm.errors import Code, Failure, render
from dist_llm.meeting import is_stuck

VERBS = {  # name -> (module, what it holds, one line of help)
    "train": ("train", "train", "Train a model from a config."),
    "compare": ("compare", "compare", "Run one config under several layouts; prove them equal and measure them."),
    "check": ("check", "check", "Check a config and its layout on one process."),
    "doctor": ("doctor", "doctor", "Say what this machine has."),
    "data": ("data", "app", "Text to token shards, and a look at them."),
    "tokenizer": ("tokenizer", "app", "Make a tokenizer, and see how it fits a text."),
    "sample": ("sample", "sample", "Continue a text with a checkpoint of any layout."),
    "chat": ("chat", "chat", "Talk with a checkpoint of any layout."),
    "eval": ("eval", "evaluate", "Measure a checkpoint: perplexity, and exact answers to skills."),
    "verify": ("verify", "verify", "Check every byte of a checkpoint."),
    "import": ("import_folder", "import_", "Read a Hugging Face folder into a run folder of ours."),
    "export": ("export", "export", "Write a checkpoint of any layout as a Hugging Face folder."),
    "merge": ("merge", "merge", "Merge an adapter into its base."),
    "bench": ("bench", "bench", "Measure ours against other libraries."),
    "report": ("report", "report", "Write report.html beside a finished run or comparison."),
}
EXIT_CODES = (
    "Exit codes: 0 done, 1 our bug, 2 usage or config, 3 data, 4 checkpoint, 5 peer lost, 6 numeric, 7 no space or folder in use, "
    "8 memory, 75 stopped as asked and saved, 130 and 143 by a signal with nothing saved since the last checkpoint."
)
COMMAND_ERROR: Any = typer.BadParameter.__mro__[2]  # click's base class, wherever this typer keeps it


class Verbs(typer.core.TyperGroup):
    """The verbs by name; help lists them without importing one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: typer.core.TyperCommand(name, help=line) for name, (_, _, line) in VERBS.items()}
        self._listing = False

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Help from the one-line descriptions alone."""
        self._listing = True
        super().format_help(ctx, formatter)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb's own command, its module imported now."""
        if self._listing or cmd_name not in VERBS:
            return self.commands.get(cmd_name)
        module, name, _ = VERBS[cmd_name]
        held = getattr(importlib.import_module(f"dist_llm.cli.{module}"), name)
        if isinstance(held, typer.Typer):
            group = typer.main.get_group(held)
            for below in group.commands.values():
                below.epilog = EXIT_CODES
            return group
        single = typer.Typer(add_completion=False)
        single.command(cmd_name, epilog=EXIT_CODES)(held)
        return typer.main.get_command(single)


app = typer.Typer(cls=Verbs, add_completion=False, no_args_is_help=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dist-llm {__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="With any verb: the full traceback of a failure.")] = False,
) -> None:
    """Train language models under any layout of ranks, and prove that the layout does not change the run."""


def main() -> None:
    """Runs the command line and ends the process with a documented exit code."""
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    code = run(arguments, debug=len(arguments) < len(sys.argv) - 1)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone: nothing more to say to it, and nothing to complain about
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if is_stuck():
        os._exit(code)
    sys.exit(code)


def run(arguments: list[str], *, debug: bool = False) -> int:
    """Runs one command line; returns the exit code. All failures end here."""
    try:
        command: Any = typer.main.get_command(app)
        with command.make_context("dist-llm", arguments) as context:
            command.invoke(context)
        return Code.DONE
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        tell_end(interrupted=True)
        return Code.INTERRUPTED
    except BrokenPipeError:
        return Code.DONE
    except Failure as failure:
        return _end(failure, arguments, debug=debug)
    except COMMAND_ERROR as error:
        if error.__class__.__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return Code.USAGE
        return _end(misuse(error, _verb(arguments)), arguments, debug=debug)
    except Exception as error:
        return _end(bug(error), arguments, debug=debug)


def _verb(arguments: list[str]) -> str:
    """The verb that a command line names, with the one below it where it has some."""
    words = arguments[: 2 if arguments and VERBS.get(arguments[0], ("", "", ""))[1] == "app" else 1]
    return " ".join(words) if words and words[0] in VERBS else ""


def bug(error: Exception) -> Failure:
    """An unknown exception as a failure; its traceback is kept in a file that the message names."""
    handle, path = tempfile.mkstemp(prefix="dist-llm-", suffix=".log")
    with os.fdopen(handle, "w") as file:
        file.write("".join(traceback.format_exception(error)))
    found = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    what, way = "a bug in dist-llm, or a fault it does not know", f"report it with {path}"
    failure = Failure(what, found=found, details=[f"the traceback is in {path}"], next=way)
    failure.__cause__ = error
    return failure


def _end(failure: Failure, arguments: list[str], *, debug: bool) -> int:
    """Shows a failure once, and returns its exit code."""
    if debug:
        traceback.print_exception(failure)
    complete(failure, read_words(typer.main.get_command(app), arguments))
    if "--json" in arguments:
        print(json.dumps({"version": 1, "error": failure.as_dict()}))
    if not getattr(failure, "told_elsewhere", False):
        print(render(failure), file=sys.stderr, flush=True)
    return int(failure.code)
