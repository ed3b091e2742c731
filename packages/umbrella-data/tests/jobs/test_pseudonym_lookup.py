"""A hash leads to its name by the table next to the salt, and to nothing without it."""

from __future__ import annotations

import os
import stat

import pytest

from umbrella_data.cli import main
from umbrella_data.jobs.pseudonym_lookup import UnknownHashError, who_is
from umbrella_data.privacy import TABLE_NAME, name_hasher, pseudonyms, read_or_create_salt


def test_names_are_found_by_their_hash_or_its_first_digits(tmp_path):
    name_hash = pseudonyms(tmp_path)
    for name in ("sub-b", "/data/größe.nii.gz", "train.jsonl"):
        pseudonym = name_hash(name)
        assert pseudonym == name_hasher(read_or_create_salt(tmp_path / "salt"))(name)
        assert who_is(pseudonym, folders=[tmp_path]) == (name, tmp_path)
        assert who_is(pseudonym[:10].upper(), folders=[tmp_path]) == (name, tmp_path)


def test_table_is_readable_by_its_owner_only_and_names_are_added_once(tmp_path):
    name_hash = pseudonyms(tmp_path)
    for _ in range(3):
        name_hash("sub-a")
    assert stat.S_IMODE((tmp_path / TABLE_NAME).stat().st_mode) == 0o600
    assert len((tmp_path / TABLE_NAME).read_text().splitlines()) == 1


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
    for age, folder in enumerate(["page", "runs/new", "runs/old", "."]):
        hashes[folder] = pseudonyms(tmp_path / folder)("sub-c")
        os.utime(tmp_path / folder / TABLE_NAME, (10_000 - age, 10_000 - age))
    for folder, pseudonym in hashes.items():
        assert main(["whois", pseudonym]) == 0
        assert capsys.readouterr() == ("sub-c\n", f"found in the table of {folder}\n")
    assert main(["whois", hashes["runs/old"], "--in", "runs/new"]) == 1
    assert "names.jsonl" in capsys.readouterr().err
