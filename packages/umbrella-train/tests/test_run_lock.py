"""The lock of a run's folder: who is rejected, and whose lock is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from umbrella_train import run_lock
from umbrella_train.errors import RunError
from umbrella_train.run_lock import LOCK_NAME, LockOwner, RunLock


@pytest.fixture(autouse=True)
def settle_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_SETTLE_SECONDS", 0.2)


def leave_lock(folder: Path, *, silent_seconds: float = 0.0, **changes: object) -> None:
    """A lock of another process, as it is found after that process ended, or while it runs."""
    owner = replace(LockOwner.this_process(), **changes)  # type: ignore[arg-type]
    path = folder / LOCK_NAME
    path.write_text(json.dumps(asdict(owner)))
    then = path.stat().st_mtime - silent_seconds
    os.utime(path, (then, then))


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_second_job_is_rejected_with_the_first_ones_process(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(RunError) as raised:
        RunLock(tmp_path)
    owner = LockOwner.this_process()
    assert f"process {owner.pid} on {owner.host}, started {owner.started[:10]}" in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    RunLock(tmp_path).release()


STALE = [
    {"pid": "dead"},
    {"created": 0.0},  # the process id belongs to another process by now
    {"host": "other", "silent_seconds": 301.0},
    {"processes": "pid:[other container]", "silent_seconds": 301.0},
    {"host": "other", "job": "7", "restarts": 0},  # restarted by the scheduler, on another host
]


@pytest.mark.parametrize("change", STALE, ids=str)
def test_the_lock_of_an_ended_job_is_taken_over(
    tmp_path: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if change.get("pid") == "dead":
        change = {"pid": dead_pid()}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave_lock(tmp_path, **change)  # type: ignore[arg-type]
    RunLock(tmp_path).release()
    assert ["took over" in record.message for record in caplog.records] == [True]
    assert list(tmp_path.iterdir()) == []


RUNNING = [
    {},
    {"host": "other", "silent_seconds": 250.0},
    {"host": "other", "pid": 1, "created": 0.0},  # its process ids say nothing here
    {"host": "other", "job": "7", "restarts": 1},
    {"host": "other", "job": "8", "restarts": 0},
]


@pytest.mark.parametrize("change", RUNNING, ids=str)
def test_the_lock_of_a_running_job_is_respected(
    tmp_path: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave_lock(tmp_path, **change)  # type: ignore[arg-type]
    before = (tmp_path / LOCK_NAME).read_bytes()
    with pytest.raises(RunError):
        RunLock(tmp_path)
    assert (tmp_path / LOCK_NAME).read_bytes() == before


def test_the_lock_of_a_zombie_is_taken_over(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process = psutil.Process(child.pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        threading.Event().wait(0.01)
    leave_lock(tmp_path, pid=child.pid, created=run_lock._created(process))
    RunLock(tmp_path).release()
    child.wait()


def test_a_clock_that_is_set_does_not_end_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunLock(tmp_path):
        # psutil computes times since 1970 from the time of the host's start, which moves with the clock.
        platform = psutil._psplatform  # type: ignore[attr-defined]
        started = platform.boot_time()
        monkeypatch.setattr(platform, "boot_time", lambda: started + 3600)
        with pytest.raises(RunError):
            RunLock(tmp_path)


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def on_full_disk(path: Path, mode: str) -> Any:
        opened(path, mode).close()
        return opened(Path("/dev/full"), "wb", buffering=0)

    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "_read", lambda _: None)
        patch.setattr(Path, "open", on_full_disk)
        with pytest.raises(OSError, match="No space"):
            RunLock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_heartbeat_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_HEARTBEAT_SECONDS", 0.01)
    calls = threading.Semaphore(0)

    def fails(_: Path) -> None:
        calls.release()
        raise OSError

    monkeypatch.setattr(run_lock.os, "utime", fails)
    with RunLock(tmp_path):
        assert all(calls.acquire(timeout=10) for _ in range(2))


def test_an_unreadable_lock_is_respected_while_it_is_new(tmp_path: Path) -> None:
    path = tmp_path / LOCK_NAME
    path.touch()
    with pytest.raises(RunError):
        RunLock(tmp_path)
    os.utime(path, (0, 0))
    RunLock(tmp_path).release()


def test_of_many_that_take_over_one_wins(tmp_path: Path) -> None:
    leave_lock(tmp_path, created=0.0)

    def take(_: int) -> RunLock | None:
        try:
            return RunLock(tmp_path)
        except RunError:
            return None

    with ThreadPoolExecutor(8) as pool:
        locks = [lock for lock in pool.map(take, range(16)) if lock is not None]
    assert len(locks) == 1
    locks[0].release()


def test_the_lock_is_touched_while_the_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_HEARTBEAT_SECONDS", 0.01)
    with RunLock(tmp_path):
        path = tmp_path / LOCK_NAME
        os.utime(path, (0, 0))
        wait = threading.Event()
        for _ in range(500):
            if path.stat().st_mtime > 0:
                break
            wait.wait(0.01)
        assert path.stat().st_mtime > 0


def test_a_job_whose_folder_was_taken_over_stops(tmp_path: Path) -> None:
    program = f"""
import pathlib, time
from umbrella_train import run_lock
run_lock._HEARTBEAT_SECONDS = 0.05
folder = pathlib.Path({str(tmp_path)!r})
lock = run_lock.RunLock(folder)
(folder / run_lock.LOCK_NAME).write_text("of another job")
time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 2
    assert (tmp_path / LOCK_NAME).read_text() == "of another job"
