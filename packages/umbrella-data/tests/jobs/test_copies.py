"""Copies of a scan are found under any name and compression, and few bytes are read of all other files."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from umbrella_data.jobs import copies
from umbrella_data.jobs.copies import find_copies


@pytest.fixture
def scans(nifti):
    """Ten scans of one protocol, compressed."""
    rng = np.random.default_rng(0)
    return [nifti.write(rng.normal(100, 20, (24, 24, 24)).astype(np.float32), f"scan_{i}.nii.gz") for i in range(10)]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_different_scans_have_no_copies(scans, tmp_path):
    assert find_copies(scans, cache=tmp_path / "cache") == []


@pytest.mark.parametrize("form", ["same bytes", "other level", "unpacked", "two members", "link"])
def test_copy_is_found_under_another_name(scans, tmp_path, form):
    content = gzip.decompress(scans[3].read_bytes())
    half = len(content) // 2
    if form == "same bytes":
        copy = write(tmp_path / "copy.nii.gz", scans[3].read_bytes())
    elif form == "other level":
        copy = write(tmp_path / "copy.nii.gz", gzip.compress(content, 1))
    elif form == "unpacked":
        copy = write(tmp_path / "copy.nii", content)
    elif form == "two members":
        copy = write(tmp_path / "copy.nii.gz", gzip.compress(content[:half]) + gzip.compress(content[half:]))
    else:
        copy = tmp_path / "link.nii.gz"
        copy.symlink_to(scans[3])
    assert find_copies([*scans, copy], cache=tmp_path / "cache") == [(scans[3], copy)]


def test_links_to_one_file_and_its_copy_are_one_group(scans, tmp_path):
    links = [tmp_path / "one.nii.gz", tmp_path / "other.nii.gz"]
    for link in links:
        link.symlink_to(scans[3])
    copy = write(tmp_path / "copy.nii.gz", scans[3].read_bytes())
    assert find_copies(links, cache=tmp_path / "cache") == [tuple(links)]
    found = find_copies([*links, copy, scans[5]], cache=tmp_path / "cache")
    assert {path for group in found for path in group} == {*links, copy}


def test_whole_files_are_read_once(scans, tmp_path, monkeypatch):
    copy = write(tmp_path / "copy.nii.gz", gzip.compress(gzip.decompress(scans[3].read_bytes()), 1))
    assert len(find_copies([*scans, copy], cache=tmp_path / "cache")) == 1
    monkeypatch.setattr(copies, "_decompressed", None)
    assert len(find_copies([*scans, copy], cache=tmp_path / "cache")) == 1


def test_few_bytes_of_large_files_are_read(tmp_path, monkeypatch):
    # 200 sparse files of 1 GiB, which differ in the middle alone.
    files = []
    for number in range(200):
        files.append(tmp_path / f"{number}.nii")
        with files[-1].open("wb") as file:
            file.truncate(1 << 30)
            os.pwrite(file.fileno(), bytes([number] * 4096), (1 << 29) - 2048)
    bytes_read = 0
    pread = os.pread

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal bytes_read
        bytes_read += count
        return pread(descriptor, count, offset)

    monkeypatch.setattr(copies.os, "pread", counted)
    monkeypatch.setattr(copies, "_decompressed", None)
    assert find_copies(files, cache=tmp_path / "cache") == []
    assert 0 < bytes_read < 0.01 * 200 * (1 << 30)


def test_file_that_cannot_be_read_is_skipped(scans, tmp_path):
    damaged = write(tmp_path / "damaged.nii.gz", scans[3].read_bytes()[:-100] + scans[3].read_bytes()[-8:])
    missing = tmp_path / "missing.nii.gz"
    assert find_copies([*scans, damaged, missing], cache=tmp_path / "cache") == []
