"""What every message of a failure keeps to, and the commands that it names."""

from __future__ import annotations

import re
import shlex

from dist_llm.errors import MAX_LINES

NEXT = {"CONFIG": "run.yaml", "LAYOUT": "dp=1", "SOURCE": "skills", "DIR": "made", "PATH": "skills", "RUN_FOLDER": "run", "CKPT": "run"}


def well_made(text: str) -> None:
    """One block of at most twelve lines, in the order of the contract, without jargon of ours or of Python."""
    told = text.splitlines()
    assert told[0].startswith("error: ") and text.count("error: ") == 1 and len(told) <= MAX_LINES
    labels = [line.split(":")[0].strip() for line in told[1:] if re.match(r"  \w+: ", line)]
    assert labels == sorted(labels, key=["where", "expected", "found", "safe", "next"].index), labels
    assert {"where", "next"} <= {*labels}, text
    listed = any(line.startswith("  - ") for line in told)
    assert listed or {"expected", "found"} <= {*labels}, text
    assert not re.search(r"Traceback|Errno|pydantic|ruamel|click|NoneType|<class|0x[0-9a-f]{6,}|\bself\b", text), text


def commands(text: str) -> list[list[str]]:
    """The commands of ours in the last line, with words for their placeholders."""
    found = re.search(r"^  next: +(.*)$", text, flags=re.MULTILINE)
    told = "makes one|takes the newest|in the|lists every|names another|trains them|writes one|begins a|on another"
    ends = rf"; |, then |, or |, with | (?:{told})|$"
    texts = re.findall(rf"dist-llm (?!that)(.*?)(?={ends})", found[1]) if found else []
    return [[NEXT.get(word, re.sub(r"=PATH$", "=skills", word)) for word in shlex.split(text)] for text in texts]
