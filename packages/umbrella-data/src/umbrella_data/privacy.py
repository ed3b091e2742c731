"""Pseudonyms: output files name subjects and scans by a salted hash; a table next to the salt has the names.

The salt and the table are readable by their owner only. Nothing copies them into a report or a tracker.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from umbrella_data.errors import UmbrellaDataError

HASH_LENGTH = 16
SALT_BYTES = 32
SALT_NAME = "salt"
"""File of a folder with the salt of its hashes."""
TABLE_NAME = "names.jsonl"
"""File of a folder with a line `[hash, name]` for each name that was hashed, for `umbrella-data whois`."""

_MIN_DIGITS = 4
_HASH = re.compile(rf"(?<![^\W_])[0-9a-f]{{{HASH_LENGTH}}}(?![^\W_])")
_MAX_REMEMBERED = 1 << 16


class UnknownHashError(UmbrellaDataError):
    """No name has the hash, or several have."""


def pseudonyms(folder: Path) -> Callable[[str], str]:
    """The function that hashes names for the files of a folder, and adds each to the folder's table of names.

    Args:
        folder: The folder; created if it is missing.

    Raises:
        ValueError: If the file of the salt does not contain one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name_hash = name_hasher(read_or_create_salt(folder / SALT_NAME))

    @lru_cache(_MAX_REMEMBERED)  # a name that was forgotten is added once more
    def add(name: str) -> str:
        pseudonym = name_hash(name)
        # One write with O_APPEND: lines of several processes do not interleave.
        descriptor = os.open(folder / TABLE_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, (json.dumps([pseudonym, name]) + "\n").encode())
        finally:
            os.close(descriptor)
        return pseudonym

    return add


def who_is(hash_text: str, *, folders: Sequence[Path]) -> tuple[str, Path]:
    """Find a name by its hash.

    Args:
        hash_text: The hash, or its first digits if they are unique in a folder.
        folders: Folders whose files may have the hash, searched in this order.

    Returns:
        The subject, or the path of the scan or manifest; and the folder whose table has it.

    Raises:
        UnknownHashError: If it is no hash, or no table has it, or several hashes in one table start with it.
    """
    wanted = hash_text.lower()
    if not _MIN_DIGITS <= len(wanted) <= HASH_LENGTH or set(wanted) - set("0123456789abcdef"):
        raise UnknownHashError(
            f"{hash_text!r} is not a hash: hashes have {HASH_LENGTH} hexadecimal digits; give {_MIN_DIGITS} or more"
        )
    for folder in folders:
        found = _find(folder / TABLE_NAME, wanted)
        if len(found) > 1:
            raise UnknownHashError(f"{folder / TABLE_NAME}: {hash_text} starts {len(found)} hashes; give more digits")
        if found:
            return found.pop(), folder
    searched = ", ".join(str(folder / TABLE_NAME) for folder in folders) or f"no folder with a {TABLE_NAME} found"
    raise UnknownHashError(f"{hash_text} is in no table of names ({searched}); name the folder with --in")


def names_by_hash(folders: Iterable[Path]) -> dict[str, str]:
    """All names in the tables of some folders, by their hashes; a folder without a table adds none."""
    return {pseudonym: name for folder in folders for pseudonym, name in _rows(folder / TABLE_NAME)}


def replace_hashes(value: Any, *, by: Callable[[str], str]) -> Any:
    """A JSON value with the hashes in its texts replaced.

    Args:
        value: A text, or lists and objects of them; other values are returned as they are.
        by: Returns what replaces a hash. It is also called with other texts that look like one.
    """
    if isinstance(value, str):
        return _HASH.sub(lambda match: by(match[0]), value)
    if isinstance(value, Mapping):
        return {key: replace_hashes(item, by=by) for key, item in value.items()}
    return [replace_hashes(item, by=by) for item in value] if isinstance(value, list | tuple) else value


def folders_with_names(top: Path) -> list[Path]:
    """Folders with a table of names: `top`, those in it and in its `runs`, and their folds, the newest first."""
    places = ("", "*/", "*/fold-*/", "runs/*/", "runs/*/fold-*/")
    tables = [path for pattern in places for path in top.glob(f"{pattern}{TABLE_NAME}")]
    return [path.parent for path in sorted(tables, key=lambda path: path.stat().st_mtime_ns, reverse=True)]


def read_or_create_salt(path: Path) -> bytes:
    """The salt of a folder, created on first use and readable by its owner only.

    Args:
        path: The file, with hexadecimal digits.

    Raises:
        ValueError: If the file does not contain a salt.
    """
    try:
        # O_EXCL: a salt is never overwritten, which would invalidate the hashes of the folder.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_salt(path)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        salt = secrets.token_bytes(SALT_BYTES)
        file.write(salt.hex() + "\n")
    return salt


def name_hasher(salt: bytes) -> Callable[[str], str]:
    """The function that hashes the name of a subject or a file.

    Args:
        salt: Kept secret, since names can be guessed.
    """

    def name_hash(name: str) -> str:
        return hmac.new(salt, name.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:HASH_LENGTH]

    return name_hash


def _read_salt(path: Path) -> bytes:
    text = path.read_text(encoding="ascii").strip()
    if len(text) != 2 * SALT_BYTES:
        raise ValueError(f"{path}: has {len(text)} digits, but a salt has {2 * SALT_BYTES}")
    return bytes.fromhex(text)


def _find(table: Path, wanted: str) -> set[str]:
    """The names in a table whose hashes start with some digits."""
    return {name for pseudonym, name in _rows(table) if pseudonym.startswith(wanted)}


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """The hashes and names of a table, if there is one; a line cut off by a crash is skipped."""
    if not table.is_file():
        return
    with table.open("rb") as file:
        for line in file:
            try:
                pseudonym, name = json.loads(line)
            except (ValueError, TypeError):
                continue
            yield str(pseudonym), str(name)
