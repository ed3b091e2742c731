"""Salts and hashes of subjects."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import pytest

from umbrella_data.privacy import name_hasher, read_or_create_salt


def test_salt_is_kept_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        salt = read_or_create_salt(tmp_path / "salt")
    finally:
        os.umask(old)
    assert (tmp_path / "salt").stat().st_mode & 0o777 == 0o600
    assert read_or_create_salt(tmp_path / "salt") == salt
    assert len(salt) == 32


def test_every_run_has_a_salt_of_its_own(tmp_path: Path) -> None:
    assert read_or_create_salt(tmp_path / "a") != read_or_create_salt(tmp_path / "b")


def test_hash_is_keyed_and_hides_the_subject() -> None:
    name = name_hasher(b"salt")("sub-01")
    assert name == hmac.new(b"salt", b"sub-01", hashlib.sha256).hexdigest()[:16]
    assert name != name_hasher(b"other")("sub-01")
    assert name != name_hasher(b"salt")("sub-02")


def test_damaged_salt_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "salt").write_text("abc")
    with pytest.raises(ValueError, match="3 digits"):
        read_or_create_salt(tmp_path / "salt")
