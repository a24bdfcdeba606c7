"""How a data set of a hub is named in a config: `hub:owner/name[/config][:split][@revision]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

MARK = "hub:"
FORM = "hub:owner/name[/config][:split][@revision]"
_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,95}"
_REFERENCE = re.compile(
    rf"hub:(?P<repo>{_WORD}/{_WORD})(?:/(?P<config>{_WORD}))?(?::(?P<split>{_WORD}))?(?:@(?P<revision>{_WORD}(?:/{_WORD})*))?"
)


@dataclass(frozen=True)
class Reference:
    """A data set: `owner/name`, its configuration, split, and branch, tag or commit; None where not named."""

    repo: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    @property
    def commit(self) -> str | None:
        """The revision, where it is a commit and so can never mean anything else."""
        return self.revision if self.revision and re.fullmatch(r"[0-9a-f]{40}", self.revision) else None

    def __str__(self) -> str:
        config, revision = (f"{mark}{part}" if part else "" for mark, part in (("/", self.config), ("@", self.revision)))
        return f"{MARK}{self.repo}{config}:{self.split}{revision}"


def parse(text: str) -> Reference | None:
    """The reference that a text is; None where it is none."""
    found = _REFERENCE.fullmatch(text)
    if found is None or ".." in text:
        return None
    return Reference(found["repo"], found["config"], found["split"] or "train", found["revision"])
