"""The `python` corpus: real English and code without a download, read in place from what is installed.

The sources of the core standard library, the topics of `pydoc`, and the docstrings of NumPy, torch and the rest of
the standard library. Files are parsed, never imported, and nothing is copied out of the installation but tokens.
What a slim Python lacks is left out and said. The text differs between versions: no number may be keyed to it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_llm.data.duplicates import Duplicates
from dist_llm.data.readers import Document

DOCSTRINGS_ONLY = ("tkinter", "idlelib", "lib2to3", "distutils", "turtledemo", "ensurepip")  # of the standard library
LEFT_OUT = frozenset(("test", "tests", "testing", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "__phello__"))
SHORTEST = 64  # characters of a document worth a place
DOC_CALLS = ("add_docstr", "_add_docstr", "add_newdoc")  # how NumPy and torch document what is compiled

Kind = Literal["source", "docstrings", "topics"]


@dataclass(frozen=True)
class Item:
    """A file to read: what is taken from it, its global name, and its size in bytes."""

    kind: Kind
    name: str
    path: Path
    size: int


def inventory() -> tuple[list[Item], list[str]]:
    """The files of the corpus, shuffled by the hash of their name so that any beginning is a fair sample; and what is lacking."""
    library = Path(sysconfig.get_paths()["stdlib"])
    groups = {
        "the sources of the standard library": [*_library_files(library)],
        "the topics of pydoc": _listed("topics", library, [library / "pydoc_data" / "topics.py"], "python"),
        "NumPy": _package_files("numpy"),
        "torch": _package_files("torch"),
    }
    items = [item for group in groups.values() for item in group]
    lacking = [name for name, group in groups.items() if not group]
    return sorted(items, key=lambda item: hashlib.sha256(f"{item.kind}/{item.name}".encode()).digest()), lacking


def documents(items: list[Item]) -> Iterator[Document]:
    """The documents of the files in order, without duplicates and near-duplicates; files that do not parse are left out."""
    seen = Duplicates()
    total, done = max(1, sum(map(effort, items))), 0
    for item in items:
        done += effort(item)
        for name, text in _texts(item):
            if len(text) >= SHORTEST and not seen.seen(text):
                yield Document(text, name, done / total)


def docstrings(tree: ast.Module, module: str) -> str:
    """The docstrings of a module, its classes and its functions, each under its dotted name."""
    parts = [f"{module}\n\n{text}" for text in [ast.get_docstring(tree)] if text]
    parts += [f"{name}\n\n{text}" for name, text in _inner_docstrings(tree.body, module)]
    return "\n\n\n".join(parts) + "\n" if parts else ""


def effort(item: Item) -> int:
    """How many bytes of a file become text, roughly; for progress."""
    return item.size if item.kind != "docstrings" else item.size // 5


def _texts(item: Item) -> list[tuple[str, str]]:
    """The named documents of one file; none when it cannot be read or parsed."""
    try:
        with tokenize.open(item.path) as handle:
            text = handle.read()
        if item.kind == "source":
            return [(item.name, text)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
        if item.kind == "docstrings":
            return [(item.name, docstrings(tree, item.name))]
        return [(f"topics/{key}", topic) for key, topic in _topics(tree)]
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _topics(tree: ast.Module) -> list[tuple[str, str]]:
    """The texts of the one dictionary in `pydoc_data/topics.py`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return sorted((key, topic) for key, topic in topics.items() if isinstance(key, str) and isinstance(topic, str))
    return []


def _inner_docstrings(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}.{node.name}"
            if text := ast.get_docstring(node):
                yield name, text
            if isinstance(node, ast.ClassDef):
                yield from _inner_docstrings(node.body, name)
        elif isinstance(node, ast.If | ast.Try):
            yield from _inner_docstrings(node.body, prefix)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _called(node.value) in DOC_CALLS:
            texts = [part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            yield prefix, max(texts, key=len, default="").strip()


def _called(call: ast.Call) -> str:
    """The last name of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _library_files(library: Path) -> list[Item]:
    files = [path for path in _modules(library) if not path.name.startswith("_sysconfigdata")]
    minor = {path for path in files if path.relative_to(library).parts[0] in DOCSTRINGS_ONLY}
    sources = _listed("source", library, [path for path in files if path not in minor], "python")
    return sources + _listed("docstrings", library, [path for path in files if path in minor], "python")


def _package_files(package: str) -> list[Item]:
    """The public modules of an installed package, found without importing it; none when it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        return []
    root = Path(spec.origin).parent
    return _listed("docstrings", root, list(_modules(root, private=False)), package)


def _modules(root: Path, *, private: bool = True) -> Iterator[Path]:
    """Every module below a folder, but not below the folders that are left out."""
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in LEFT_OUT and (private or name == "_core" or not name.startswith("_"))]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _listed(kind: Kind, root: Path, paths: list[Path], package: str) -> list[Item]:
    """Items for those of the files below `root` that are there."""
    items = []
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        if path.is_file():
            name = "/".join((package, *parts)) + ".py" if kind == "source" else ".".join((package, *parts)).removesuffix(".__init__")
            items.append(Item(kind, name, path, path.stat().st_size))
    return items
