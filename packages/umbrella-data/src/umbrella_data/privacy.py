"""Pseudonyms: files that are written name subjects and scans by a salted hash; a table next to the salt has the names.

The salt and the table are readable by their owner only and never leave the folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

HASH_LENGTH = 16
SALT_BYTES = 32
SALT_NAME = "salt"
"""File of a folder with the salt of its hashes."""
TABLE_NAME = "names.jsonl"
"""File of a folder with a line `[hash, name]` for each name that was hashed, for `umbrella-data whois`."""

_MAX_REMEMBERED = 1 << 16


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
        # One write to a file opened for appending: lines of several processes do not mix.
        descriptor = os.open(folder / TABLE_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, (json.dumps([pseudonym, name]) + "\n").encode())
        finally:
            os.close(descriptor)
        return pseudonym

    return add


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
