"""Tables as text: Parquet, Arrow and Feather files, a batch of rows at a time.

Memory is bounded by a page of a column (Parquet) or by a record batch (the others, mapped), whatever the size of the file. Rows are as
strict as lines of JSON: each holds a string under the text key, or is told with file and row, counted from 1. The same texts as JSON
lines give the same documents. Everything that the library cannot read, checksums of pages that are wrong included, is one message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_llm.data.chat import way_of
from dist_llm.data.readers import MAX_LINE, BadLines, Document, Take, size_of, text_of
from dist_llm.errors import DataError, UsageError, plain

OTHER = "the same command with data.text_key=NAME, another column"
ROWS = 256  # that are turned into Python objects together


@dataclass(frozen=True)
class Row:
    """One row as plain values by column. place: `file:row`; fault: why it cannot be read: its values are empty then.

    done: how much of the file was read, 0 to 1.
    """

    values: dict[str, Any]
    place: str
    fault: str = ""
    done: float = 0.0


def read_rows(path: Path, *, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a table, in order; `columns` alone where they are named, all of them where None.

    Raises UsageError without pyarrow, DataError where a column is not there or the file is damaged.
    """
    pyarrow = _pyarrow(path)
    number = 0
    try:
        for batch, done in _batches(path, columns):
            for first in range(0, batch.num_rows, ROWS):
                for values, fault in _values(batch.slice(first, ROWS)):
                    number += 1
                    yield Row(values, f"{path}:{number}", fault, done)
    except (pyarrow.ArrowException, OSError, ValueError, RuntimeError) as error:
        found = plain(str(error).splitlines()[0] if str(error) else type(error).__name__)[:160]
        what, where = "the table is damaged, or of a kind that is not known", f"{path}, after row {number}" if number else str(path)
        raise DataError(what, where=where, expected=f"a sound {path.suffix} file", found=found) from error


def read_table(path: Path, *, text_key: str, bad: BadLines, take: Take | None = None) -> Iterator[tuple[Document, int]]:
    """The documents of a table, one a row, each with the bytes of the file taken so far; `bad` counts the rows skipped.

    take: makes texts of whole rows; what is null in them counts as left out.
    """
    size, rows = size_of(path), read_rows(path, columns=(text_key,) if take is None else None)
    for document, row in documents_of(rows, str(path), text_key=text_key, bad=bad, take=take):
        yield document, int(row.done * size)


def documents_of(
    rows: Iterable[Row], where: str, *, text_key: str, bad: BadLines, take: Take | None = None
) -> Iterator[tuple[Document, Row]]:
    """The documents of a table's rows, each with its row; `bad` counts the rows skipped. Raises DataError for too many of them."""
    blank = 0
    for row in rows:
        text, why = taken(row, text_key=text_key, take=take)
        if why:
            bad.add(row.place, why, excerpt(row, text_key))
        elif text.strip():
            yield Document(text, row.place), row
        else:
            blank += 1
            bad.blank[where] = max(blank, bad.blank.get(where, 0))
    bad.check()


def taken(row: Row, *, text_key: str, take: Take | None) -> tuple[str, str]:
    """The text of a row, and what is wrong with it (empty when nothing is)."""
    if row.fault:
        return "", row.fault
    text, why = text_of(row.values, text_key=text_key) if take is None else take(without_nulls(row.values))
    if not why and len(text) * 4 > MAX_LINE and len(text.encode()) > MAX_LINE:
        why = f"longer than {MAX_LINE >> 20} MiB"
    return ("", why) if why else (text, "")


def without_nulls(value: Any) -> Any:
    """A row without the fields that are null: in a table every object has the fields of all."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def excerpt(row: Row, column: str) -> bytes:
    """The beginning of what a bad row holds; empty where that is nothing."""
    value = row.values.get(column)
    return b"" if value is None else str(value)[:200].encode("utf-8", "replace")


def _pyarrow(path: Path) -> Any:
    """The library. Raises UsageError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        what, expected = "this file needs the package pyarrow, which is not installed", "the extra hf of dist-llm"
        raise UsageError(what, where=str(path), expected=expected, found="no pyarrow", next="pip install 'dist-llm[hf]'") from error
    return pyarrow


def column_names(path: Path) -> list[str]:
    """The columns of a table. Raises UsageError without pyarrow, DataError where the file is damaged."""
    pyarrow = _pyarrow(path)
    try:
        if path.suffix.lower() == ".parquet":
            return list(pyarrow.parquet.read_schema(path).names)
        with _arrow(path) as (_, reader, _):
            return list(reader.schema.names)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError("the table cannot be read", where=str(path), found=plain(error)[:160]) from error


@contextmanager
def _arrow(path: Path) -> Iterator[tuple[Any, Any, bool]]:
    """The mapped file, its reader, and whether that knows where each batch is; a stream of batches has no such list."""
    from pyarrow import ipc, memory_map

    with memory_map(str(path)) as source:
        whole = source.read(6) == b"ARROW1"
        source.seek(0)
        yield source, (ipc.open_file if whole else ipc.open_stream)(source), whole


def _batches(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[Any, float]]:
    """Record batches, and how much of the file is read after each."""
    from pyarrow import parquet

    if path.suffix.lower() == ".parquet":
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True) as file:
            _require_columns(file.schema_arrow, columns, path)
            done, total = 0, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=ROWS, columns=None if columns is None else list(columns), use_threads=False):
                done += batch.num_rows
                yield batch, min(1.0, done / total)
        return
    with _arrow(path) as (source, reader, whole):
        _require_columns(reader.schema, columns, path)
        batches = (reader.get_batch(n) for n in range(reader.num_record_batches)) if whole else iter(reader)
        for number, batch in enumerate(batches):
            batch.validate(full=True)  # offsets out of their buffer would be followed
            done = (number + 1) / reader.num_record_batches if whole else source.tell() / max(1, source.size())
            yield batch if columns is None else batch.select(list(columns)), done


def _require_columns(schema: Any, columns: Sequence[str] | None, path: Path) -> None:
    """Raises DataError unless the file has each of the columns once, and a column alone holds text."""
    names = list(schema.names)
    texts = [name for name in names if _is_text(schema.field(names.index(name)).type) and re.fullmatch(r"[A-Za-z_]\w*", name)]
    another = f"the same command with data.text_key={texts[0]}" if texts else "the same command with data.source=PATH"
    for column in columns or ():
        if names.count(column) != 1:
            what = f"there is no column {column!r}" if column not in names else f"there is more than one column {column!r}"
            looks = way_of(names)
            way = f"{looks}; or {another}" if looks else another
            if column in names:
                way = f"rename one of the columns of {path}, then the same command again"
            found = ", ".join(map(str, names[:12])) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
            raise DataError(what, where=str(path), expected=f"one column {column!r}", found=found or "no columns", next=way)
    if columns is not None and len(columns) == 1 and not _is_text(schema.field(columns[0]).type):
        kind, way = plain(schema.field(columns[0]).type)[:160], another
        what, expected = f"the column {columns[0]!r} holds no text", "string or large_string"
        raise DataError(what, where=str(path), expected=expected, found=kind, next=way)


def _is_text(kind: Any) -> bool:
    """Whether the values of a column of this type are strings, or nothing at all."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def _values(batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a batch as plain values, each with its fault."""
    try:
        yield from ((row, "") for row in batch.to_pylist())
        return
    except UnicodeDecodeError:
        pass  # in one of the rows: the library does not say in which
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0], ""
        except UnicodeDecodeError as error:
            yield {}, f"not UTF-8 (byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the text)"
