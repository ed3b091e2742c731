"""A lock file is held by one process at a time; systems without locks are a warning."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from umbrella_data.files import locks, parallel
from umbrella_data.files.locks import locked


def test_lock_is_held_once(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locked(lock, wait=True) as first, locked(lock, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(lock, wait=False) as again:
        assert again


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_missing_locks_are_a_warning(
    number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, "no locks")

    if number is None:
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", fail)
    with locked(tmp_path / "lock", wait=True) as is_held:
        assert is_held
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_other_errors_of_locks_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="broken"), locked(tmp_path / "lock", wait=True):
        pass


def test_number_of_cores_without_sched_getaffinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for cores, workers in ((3, 3), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert parallel.default_workers() == workers
