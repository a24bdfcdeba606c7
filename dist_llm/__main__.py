"""`python -m dist_llm` and the command `dist-llm`, also under torchrun: signals are heard before anything large is imported."""

import sys

from dist_llm.cli.signals import end_on_signals, tell_end
from dist_llm.errors import Code


def main() -> None:
    """The command line."""
    end_on_signals()
    try:
        from dist_llm.cli.main import main as command  # typer: a quarter of a second

        command()
    except KeyboardInterrupt:
        tell_end(interrupted=True)
        sys.exit(Code.INTERRUPTED)


if __name__ == "__main__":
    main()
