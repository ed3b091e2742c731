"""Subjects and files under another name: whatever is written names them by a hash, salted anew for each folder."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable
from pathlib import Path

HASH_LENGTH = 16
SALT_BYTES = 32
SALT_NAME = "salt"
"""The file of a folder that keeps its salt."""


def read_or_create_salt(path: Path) -> bytes:
    """Return the salt of a folder, made on first use and readable by its owner alone.

    Args:
        path: The file that keeps it, as hexadecimal digits.

    Raises:
        ValueError: Where the file does not hold a salt.
    """
    try:
        # O_EXCL: a salt is never written over, or the hashes of the folder would mean nothing any more.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_salt(path)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        salt = secrets.token_bytes(SALT_BYTES)
        file.write(salt.hex() + "\n")
    return salt


def name_hasher(salt: bytes) -> Callable[[str], str]:
    """Return the function that names a subject or a file by its hash.

    Args:
        salt: Kept secret, since names can be guessed.
    """

    def name_hash(name: str) -> str:
        return hmac.new(salt, name.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:HASH_LENGTH]

    return name_hash


def _read_salt(path: Path) -> bytes:
    text = path.read_text(encoding="ascii").strip()
    if len(text) != 2 * SALT_BYTES:
        raise ValueError(f"{path}: holds {len(text)} digits where a salt has {2 * SALT_BYTES}")
    return bytes.fromhex(text)
