"""Errors of the file system in words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from umbrella_data.files.faults import describe_os_error


def error(number: int, *names: str | Path) -> OSError:
    paths = [str(name) for name in names]
    return OSError(number, os.strerror(number), *paths[:1], *([None, paths[1]] if paths[1:] else []))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("is_named", [True, False])
def test_a_full_disk_is_named_with_its_free_space(number: int, is_named: bool, tmp_path: Path) -> None:
    path = tmp_path / "not" / "there"
    words = describe_os_error(error(number, *[path] * is_named), folder=None if is_named else path)
    assert words is not None
    assert words.startswith(f"{path}: ")
    assert "MB are free" in words


def test_a_disk_is_read_only(tmp_path: Path) -> None:
    words = describe_os_error(error(errno.EROFS, tmp_path))
    assert words is not None
    assert words.startswith(f"{tmp_path}: ")
    assert "read-only" in words


@pytest.mark.parametrize("inside", ["", "deep/er"])
def test_a_file_is_where_a_folder_must_be(inside: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="file") as caught:
        (file / inside).mkdir(parents=True)
    words = describe_os_error(caught.value)
    assert words is not None
    assert words.startswith(f"{caught.value.filename}: ")
    assert "file is a file" in words or words.startswith(f"{file}: is a file")


def test_of_two_names_that_of_the_target_is_shown(tmp_path: Path) -> None:
    words = describe_os_error(error(errno.EACCES, tmp_path / "from", tmp_path / "to"))
    assert words == f"{tmp_path / 'to'}: Permission denied"


def test_an_error_without_a_name_has_no_words() -> None:
    assert describe_os_error(error(errno.ENOSPC)) is None
    assert describe_os_error(BrokenPipeError()) is None
    assert describe_os_error(FileNotFoundError("a.nii: there is no such file")) == "a.nii: there is no such file"
