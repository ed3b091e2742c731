"""Salts, hashes and the table of names: a hash leads to its name with the table, and to nothing without it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path

import pytest

from umbrella_data.cli import main
from umbrella_data.dataset.bad_scans import LIST_NAME, BadScan, BadScanList
from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.privacy import (
    TABLE_NAME,
    UnknownHashError,
    name_hasher,
    pseudonyms,
    read_or_create_salt,
    replace_hashes,
    who_is,
)


def test_salt_is_created_once_for_each_folder(tmp_path):
    salt = read_or_create_salt(tmp_path / "salt")
    assert read_or_create_salt(tmp_path / "salt") == salt != read_or_create_salt(tmp_path / "other")
    assert len(salt) == 32


def test_damaged_salt_is_rejected(tmp_path):
    (tmp_path / "salt").write_text("abc")
    with pytest.raises(ValueError, match=r"salt: has 3 digits"):
        read_or_create_salt(tmp_path / "salt")


def test_hash_is_keyed_by_the_salt():
    name = name_hasher(b"salt")("sub-01")
    assert name == hmac.new(b"salt", b"sub-01", hashlib.sha256).hexdigest()[:16]
    assert len({name, name_hasher(b"other")("sub-01"), name_hasher(b"salt")("sub-02")}) == 3


def test_salt_and_table_are_readable_by_their_owner_only(tmp_path):
    old = os.umask(0)
    try:
        pseudonyms(tmp_path)("sub-a")
    finally:
        os.umask(old)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"salt": 0o600, TABLE_NAME: 0o600}


def test_names_are_found_by_their_hash_or_its_first_digits(tmp_path):
    name_hash = pseudonyms(tmp_path)
    for name in ("sub-b", "/data/größe.nii.gz", "train.jsonl", "two\nlines"):
        pseudonym = name_hash(name)
        assert pseudonym == name_hasher(read_or_create_salt(tmp_path / "salt"))(name)
        assert who_is(pseudonym, folders=[tmp_path]) == (name, tmp_path)
        assert who_is(pseudonym[:10].upper(), folders=[tmp_path]) == (name, tmp_path)


def test_hashes_in_texts_of_a_row_are_replaced():
    one, longer = "0123456789abcdef", "0123456789abcdef0"
    row = {"subject": one, "question": f"Is {one}_ses-1 or {longer} x{one}?", "options": [one, "no"], "score": 1.0}
    assert replace_hashes(row, by={one: "sub-a"}.__getitem__) == {
        "subject": "sub-a",
        "question": f"Is sub-a_ses-1 or {longer} x{one}?",
        "options": ["sub-a", "no"],
        "score": 1.0,
    }


def test_names_of_several_processes_are_found_and_repeated_ones_are_written_once(tmp_path):
    one, other = pseudonyms(tmp_path), pseudonyms(tmp_path)
    for name_hash in (one, other, one, other):
        assert who_is(name_hash("sub-a"), folders=[tmp_path]) == ("sub-a", tmp_path)
    assert len((tmp_path / TABLE_NAME).read_text().splitlines()) == 2


def test_hashes_in_the_list_of_bad_scans_are_found(tmp_path, capsys):
    error = ScanError("x", path="a.nii", reason=ScanReason.MISSING)
    bad = BadScan(manifest=Path("m.jsonl"), line=1, num_rows=2, subject="sub-a", error=error)
    BadScanList(max_fraction=1, folder=tmp_path).add(bad)
    row = json.loads((tmp_path / LIST_NAME).read_text())
    for key, name in (("manifest", "m.jsonl"), ("subject", "sub-a"), ("scan", "a.nii")):
        assert main(["whois", row[key], "--in", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"{name}\n"


@pytest.mark.parametrize("text", ["ab", "xyzxyz", "0" * 17])
def test_text_that_is_no_hash_is_rejected(tmp_path, text):
    with pytest.raises(UnknownHashError, match="not a hash"):
        who_is(text, folders=[tmp_path])


def test_hash_that_is_unknown_or_ambiguous_is_rejected(tmp_path):
    (tmp_path / TABLE_NAME).write_text('["abcd01", "sub-1"]\n["abcd02", "sub-2"]\n["abcd')  # cut off by a crash
    assert who_is("abcd01", folders=[tmp_path]) == ("sub-1", tmp_path)
    with pytest.raises(UnknownHashError, match="2 hashes"):
        who_is("abcd", folders=[tmp_path])
    with pytest.raises(UnknownHashError, match="--in"):
        who_is("ffff", folders=[tmp_path])


def test_folders_here_and_in_runs_are_searched_the_newest_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hashes = {}
    for age, folder in enumerate(["page", "runs/new", "runs/old", "runs/cv/fold-1", "."]):
        hashes[folder] = pseudonyms(tmp_path / folder)("sub-c")
        os.utime(tmp_path / folder / TABLE_NAME, (10_000 - age, 10_000 - age))
    for folder, pseudonym in hashes.items():
        assert main(["whois", pseudonym]) == 0
        assert capsys.readouterr() == ("sub-c\n", f"found in the table of {folder}\n")
    assert main(["whois", hashes["runs/old"], "--in", "runs/new"]) == 1
    assert "names.jsonl" in capsys.readouterr().err
