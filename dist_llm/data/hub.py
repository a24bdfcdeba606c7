"""Data sets of the Hugging Face hub as text: streamed, pinned to a commit, and read over the network by the verbs that say so alone.

    <data.dir>/hub-<key>.json    the commit that a name without one meant when it was first read; what is built from it keeps to it

Files of known kinds are read (KINDS); nothing of a data set is ever run. Who has built the tokens once needs no network again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_llm.config.hub import FORM, Reference, parse
from dist_llm.data.chat import way_of
from dist_llm.data.parquet import OTHER, Row, documents_of
from dist_llm.data.readers import BadLines, Document, Take
from dist_llm.data.sealed import checked, read_small, with_checksum, write_durably
from dist_llm.errors import HIDDEN, DataError, UsageError, plain

KINDS = ("parquet", "json", "csv", "text", "arrow")  # of files: none of them can hold code
VERSION = 1
PATIENCE = 30.0  # seconds for the answer to what the newest commit is


@dataclass
class Access:
    """Whether this process may use the network, and with what: set once, at the edge."""

    allowed: bool = False
    offline: bool = False
    token: str | None = None


_access = Access()


def allow(*, token: str | None, offline: bool) -> None:
    """From now on this process, and those forked from it, may ask the hub. token: for private data sets; never written down."""
    _access.allowed, _access.offline, _access.token = True, offline, token


def resolve(source: str, *, home: Path | None) -> tuple[Reference, str]:
    """What a config names, and the commit it means: named, kept in the folder `home`, or asked for and kept there.

    Raises UsageError for what is no reference, DataError where the hub has to be asked and cannot be.
    """
    reference = parse(source)
    if reference is None:
        raise UsageError("this names no data set of the hub", where="data.source", expected=FORM, found=source)
    if reference.commit is not None:
        return reference, reference.commit
    pin = None if home is None else home / f"hub-{hashlib.sha256(str(reference).encode()).hexdigest()[:12]}.json"
    if pin is not None and (kept := _kept(pin, reference)) is not None:
        return reference, kept
    commit = _newest(reference)
    if pin is None:
        return reference, commit
    pin.parent.mkdir(parents=True, exist_ok=True)
    body = with_checksum({"version": VERSION, "reference": str(reference), "commit": commit})
    fresh = pin.with_name(f".{pin.name}.{os.getpid()}")
    write_durably(fresh, body)
    try:
        os.link(fresh, pin)  # the first of several processes at once decides
    except FileExistsError:
        commit = _kept(pin, reference) or commit
    finally:
        fresh.unlink()
    return reference, commit


def documents(reference: Reference, commit: str, *, text_key: str, bad: BadLines, take: Take | None = None) -> Iterator[Document]:
    """The documents of a data set, one a row with a text; `bad` counts the rows skipped. Raises DataError.

    take: makes texts of whole rows.
    """
    found = rows(reference, commit, columns=(text_key,) if take is None else None)
    for document, _ in documents_of(found, str(reference), text_key=text_key, bad=bad, take=take):
        yield document


def rows(reference: Reference, commit: str, *, columns: tuple[str, ...] | None = None) -> Iterator[Row]:
    """The rows of a data set, streamed; `columns` alone where they are named. place: `hub:owner/name:split:row`. Raises DataError."""
    _require_network(reference)
    number = 0
    try:
        stream = _stream(reference, commit)
        names = stream.column_names
        if names is not None and columns is not None:
            _require_columns(names, columns, reference)
            stream = stream.select_columns(list(columns))
        for values in stream:
            number += 1
            yield Row(dict(values), f"{reference}:{number}")
    except (DataError, UsageError):
        raise
    except Exception as error:  # of four libraries: their own, those of HTTP, of files and of Arrow
        raise _failed(error, reference, after=number) from error


def _stream(reference: Reference, commit: str) -> Any:
    """The data set as the library streams it."""
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise _without(str(reference), "datasets") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()  # each try of several would be a line
    builder = datasets.load_dataset_builder(reference.repo, reference.config, revision=commit, token=_access.token or False)
    home, _, kind = type(builder).__module__.rpartition(".")
    if home != f"datasets.packaged_modules.{kind}" or kind not in KINDS:
        expected, found = f"files of {', '.join(KINDS)}", plain(type(builder).__name__)
        raise DataError("the data set is of a kind that is not read", where=str(reference), expected=expected, found=found)
    splits = builder.info.splits
    if splits and reference.split not in splits:
        expected = f"one of {', '.join(list(splits)[:12])}"
        raise DataError("the data set has no such split", where=str(reference), expected=expected, found=reference.split)
    return builder.as_streaming_dataset(split=reference.split)


def _newest(reference: Reference) -> str:
    """The commit that a branch, a tag or nothing means now."""
    _require_network(reference)
    try:
        import huggingface_hub
    except ImportError as error:
        raise _without(str(reference), "huggingface_hub") from error
    try:
        hub = huggingface_hub.HfApi(token=_access.token or False)
        info = hub.dataset_info(reference.repo, revision=reference.revision, timeout=PATIENCE)
    except Exception as error:
        raise _failed(error, reference) from error
    commit = str(info.sha)
    if Reference(reference.repo, revision=commit).commit is None:
        raise DataError("the hub names no commit of the data set", where=str(reference), expected="40 hexadecimal digits", found=commit)
    return commit


def _require_network(reference: Reference) -> None:
    """Raises DataError where this verb does not use the network, or the user has said that none does."""
    if not _access.allowed:
        what, expected = "the data set is not here yet, and this command does not use the network", "data build or train"
        raise DataError(what, where=str(reference), expected=expected, found="no copy in data.dir", next="dist-llm data build CONFIG")
    if _access.offline:
        what = "the data set is not here yet, and HF_HUB_OFFLINE is set"
        way = "unset HF_HUB_OFFLINE, or bring data.dir from where it was built"
        expected = "a network, or tokens that were built before"
        raise DataError(what, where=str(reference), expected=expected, found="HF_HUB_OFFLINE is set", next=way)


def _require_columns(names: list[str], columns: tuple[str, ...], reference: Reference) -> None:
    for column in columns:
        if column not in names:
            found, looks = ", ".join(map(str, names[:12])), way_of(names)
            way = looks + ("; or " if looks else "") + OTHER
            raise DataError(f"there is no column {column!r}", where=str(reference), expected=f"a column {column!r}", found=found, next=way)


def _kept(pin: Path, reference: Reference) -> str | None:
    """The commit that was kept; None where nothing was. Raises DataError where it is damaged."""
    if not os.path.lexists(pin):
        return None
    raw = read_small(pin)
    body = None if raw is None else checked(raw)
    if body is None or body.get("reference") != str(reference) or Reference("", revision=str(body.get("commit"))).commit is None:
        what, way = "the note of which commit was read is damaged", f"remove {pin}, then dist-llm data build CONFIG reads the newest"
        raise DataError(what, where=str(pin), expected="a commit as it was noted", found="other text", next=way)
    return str(body["commit"])


def _failed(error: Exception, reference: Reference, *, after: int = 0) -> DataError:
    """What the libraries say, as one message; a token of ours never in it."""
    name, text = type(error).__name__, str(error).strip()
    found = next((line for line in text.splitlines() if line.strip()), name)
    if _access.token:
        found = found.replace(_access.token, HIDDEN)
    where = f"{reference}, after row {after}" if after else str(reference)
    causes = {type(one).__name__ for one in _chain(error)}
    if causes & {"RepositoryNotFoundError", "GatedRepoError", "DatasetNotFoundError"}:
        what = "there is no such data set, or it needs a token that may read it"
        way = "HF_TOKEN in the environment, if it is private or gated"
    elif causes & {"RevisionNotFoundError", "RevisionResolutionError"}:
        what, way = "the data set has no such revision", "leave @revision out, or name a branch, a tag or a commit"
    elif "scripts are no longer supported" in text:
        what, way = "the data set is a program, and none is ever run", "take one of files, or a branch of it: @refs/convert/parquet"
    elif isinstance(error, ValueError) and not isinstance(error, OSError) and not causes & {"OfflineModeIsEnabled"}:
        what, way = "the data set cannot be read", "look at its configurations and splits on huggingface.co"
    else:
        what, way = "the hub cannot be reached, or broke off", "the same command again, or bring data.dir from where it was built"
    return DataError(what, where=where, found=plain(f"{name}: {found}")[:200], next=way)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those behind it."""
    for _ in range(16):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _without(where: str, package: str) -> UsageError:
    what = f"data sets of the hub need the package {package}, which is not installed"
    return UsageError(what, where=where, expected="the extra hf of dist-llm", found="not installed", next="pip install 'dist-llm[hf]'")
