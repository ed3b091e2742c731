"""Files are written completely or not at all."""

from __future__ import annotations

import os

import pytest

from umbrella_data.files.atomic import write_atomically


def test_file_is_replaced_and_its_folder_is_created(tmp_path):
    path = tmp_path / "new/file"
    for content in (b"one", b"other"):
        write_atomically(path, [content, b"!"])
        assert path.read_bytes() == content + b"!"
    assert list(path.parent.iterdir()) == [path]


def test_old_file_remains_and_no_other_if_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, (b"x" * (1 // number) for number in (1, 0)))
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("file", b"old")]


@pytest.mark.parametrize("sync", [False, True])
def test_content_is_synced_before_the_file_appears(tmp_path, monkeypatch, sync):
    path, synced = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((os.fstat(descriptor).st_size, path.exists())))
    write_atomically(path, [b"content"], sync=sync)
    assert synced == ([(7, False)] if sync else [])
