"""Subjects under another name: whatever a run writes names them by a hash, salted anew for each run."""

from __future__ import annotations

from umbrella_data.privacy import HASH_LENGTH, SALT_BYTES, read_or_create_salt
from umbrella_data.privacy import name_hasher as subject_hasher

__all__ = ["HASH_LENGTH", "SALT_BYTES", "read_or_create_salt", "subject_hasher"]
