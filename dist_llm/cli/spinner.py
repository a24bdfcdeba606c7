"""What is going on, on stderr: a spinner on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Self

from dist_llm.errors import plain


class Spinner:
    """Context: `turn` says what is under way, `print` a line that stays. quiet: without the spinner."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.status = self.console.status("starting") if self.console.is_terminal and not quiet else None

    def __enter__(self) -> Self:
        if self.status:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status:
            self.status.stop()

    def turn(self, text: str) -> bool:
        """Puts the text beside the spinner; returns whether there is one."""
        from rich.text import Text

        if self.status:
            self.status.update(Text(plain(text)))
        return self.status is not None

    def print(self, text: str) -> None:
        """A plain line."""
        self.console.print(plain(text), markup=False, highlight=False, soft_wrap=True)
