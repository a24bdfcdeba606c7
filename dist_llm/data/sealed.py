"""JSON that carries its own hash, files that are on the disk when they are written, and folders whose files are all known.

    seal.json   what the folder was made for, and bytes and sha256 of its files; those that a manifest lists are left to it

Such JSON has one spelling (sorted keys, no spaces, one line) and the sha256 of the rest of itself, so that a change of any
byte of it is noticed, even of a blank. There are no times or paths in it: equal input gives equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError

VERSION = 1
SEAL = "seal.json"
MANIFEST = "manifest.json"  # of a token store (store.py)
BUILD = "build the data again: dist-llm data build CONFIG"
FILE_NAME = re.compile(r"((train|validation)/)?[a-z_]+\.json")


def spell(body: Any) -> bytes:
    """The one spelling of some JSON."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def with_checksum(body: dict[str, Any]) -> bytes:
    """The spelling of an object, with its own sha256 inside."""
    return spell({**body, "checksum": hashlib.sha256(spell(body)).hexdigest()})


def checked(raw: bytes) -> dict[str, Any] | None:
    """The object that `with_checksum` has spelled; None when any byte is another."""
    try:
        body = json.loads(raw)
        checksum = body.pop("checksum")
        sound = raw == spell({**body, "checksum": checksum}) and checksum == hashlib.sha256(spell(body)).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return body if sound else None


def seal(folder: Path, *, key: str) -> None:
    """Lists the files of a folder in its seal. key: what the folder was made for."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL and (path.name == MANIFEST or not (path.parent / MANIFEST).is_file()):
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    write_durably(folder / SEAL, with_checksum({"version": VERSION, "key": key, "files": files}))


def check_seal(folder: Path, *, key: str) -> frozenset[str]:
    """The names of the files that the seal lists, all compared with it. Raises DataError that names the first that is not as it was."""
    path = folder / SEAL
    body = checked(read_file(path, home=folder))
    if body is None:
        raise damaged(
            "the list of files of the data is damaged", path, home=folder, expected="JSON with its own checksum", found="other bytes"
        )
    if body.get("version") != VERSION:
        raise DataError(
            "the data has another format",
            where=str(path),
            expected=f"version {VERSION}",
            found=f"version {body.get('version')}",
            next=remove(folder),
        )
    if body.get("key") != key:
        expected, found = f"key {key}", f"key {body.get('key')}"
        raise damaged("this is other data than the config asks for", path, home=folder, expected=expected, found=found)
    try:
        listed = [(str(name), int(file["bytes"]), str(file["sha256"])) for name, file in body["files"].items()]
        assert all(FILE_NAME.fullmatch(name) for name, _, _ in listed), "a file name"
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise damaged("the list of files of the data contradicts itself", path, home=folder, found=str(error)) from error
    for name, size, digest in listed:
        compare(folder / name, size=size, sha256=digest, home=folder)
    return frozenset(name for name, _, _ in listed)


def compare(path: Path, *, size: int, sha256: str, home: Path) -> None:
    """Raises DataError when a file has not the size or the sha256 that it should have. home: what is to be removed then."""
    compare_size(path, size=size, home=home)
    try:
        found = hash_file(path)
    except OSError as error:
        raise damaged("a file of the data cannot be read", path, home=home, found=error.strerror) from error
    if found != sha256:
        raise damaged("a file of the data is damaged", path, home=home, expected=f"sha256 {sha256}", found=f"sha256 {found}")


def compare_size(path: Path, *, size: int, home: Path) -> None:
    """Raises DataError when a file is not there or has another size."""
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        shown = "no such file" if found is None else f"{found} bytes"
        raise damaged("a file of the data is missing or has another size", path, home=home, expected=f"{size} bytes", found=shown)


def read_file(path: Path, *, home: Path) -> bytes:
    """The bytes of a file that must be there. Raises DataError."""
    try:
        content = read_small(path)
    except OSError as error:
        raise damaged("a file of the data cannot be read", path, home=home, found=error.strerror) from error
    if content is None:
        raise damaged("a file of the data cannot be read", path, home=home, expected="a regular file", found="something else, or too large")
    return content


def read_small(path: Path, *, most: int = 64 << 20) -> bytes | None:
    """The bytes of a regular file of at most `most` bytes; None for anything else: a pipe or a device is not waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        state = os.fstat(handle)
        return file.read(most) if stat.S_ISREG(state.st_mode) and state.st_size <= most else None


def damaged(what: str, path: Path, *, home: Path, expected: str | None = None, found: str | None = None) -> DataError:
    """The failure of data that is not as it was written. home: the folder to be removed."""
    return DataError(what, where=str(path), expected=expected, found=found, next=remove(home))


def remove(home: Path) -> str:
    """What to do about damaged data."""
    return f"remove {home}, then {BUILD}"


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
