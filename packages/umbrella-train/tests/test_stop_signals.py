"""Signals that stop a run: noted in training, raised otherwise; a second one ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from umbrella_train import stop_signals
from umbrella_train.errors import RunError
from umbrella_train.stop_signals import (
    STOP_SIGNALS,
    StoppedAtOnce,
    StopSignals,
    end_of_job,
    find_deadline,
    leave_signals_to_parent,
    without_worker_failures,
)


@pytest.fixture(autouse=True)
def handlers_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGCHLD)}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # a process in the background starts without SIGINT
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_in_training_is_noted_and_another_one_at_once_is_its_repetition(number: int) -> None:
    signals = StopSignals()
    signals.install()
    signals.is_training = True
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)
    assert (signals.is_asked, signals.number) == (True, number)
    signals.restore()
    assert {signal.getsignal(each) for each in STOP_SIGNALS} == {signal.SIG_DFL}


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_outside_of_training_is_raised(number: int) -> None:
    signals = StopSignals()
    signals.install()
    with pytest.raises(StoppedAtOnce) as raised:
        os.kill(os.getpid(), number)
    assert raised.value.signal_number == number


def test_a_second_signal_ends_the_process() -> None:
    child = os.fork()
    if child == 0:
        signals = StopSignals()
        signals.install()
        signals.is_training = True
        os.kill(os.getpid(), signal.SIGUSR1)
        stop_signals._REPEAT_SECONDS = 0.0
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_signals_ignored_at_the_start_stay_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = StopSignals()
    signals.install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not signals.is_asked


def test_the_deadline_counts_as_sigusr1() -> None:
    assert (StopSignals(deadline=time.time() + 60).is_asked, StopSignals().number) == (False, signal.SIGTERM)
    late = StopSignals(deadline=time.time() - 1)
    assert (late.is_asked, late.number) == (True, signal.SIGUSR1)


def test_a_data_process_ends_at_the_second_signal() -> None:
    child = os.fork()
    if child == 0:
        leave_signals_to_parent()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_the_death_of_a_child_is_no_error_in_a_save() -> None:
    def fail(number: int, frame: object) -> None:
        raise AssertionError("a worker died")

    signal.signal(signal.SIGCHLD, fail)
    with without_worker_failures():
        subprocess.run([sys.executable, "-c", ""], check=True)
    assert signal.getsignal(signal.SIGCHLD) is fail


def test_end_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert end_of_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert end_of_job() is None  # without SLURM's commands
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "JobId=$4 StartTime=2026-01-01T00:00:00 EndTime=2026-01-01T01:00:00 A=b=c"\n')
    scontrol.chmod(0o755)
    assert end_of_job() == time.mktime(time.strptime("2026-01-01 01:00", "%Y-%m-%d %H:%M"))
    scontrol.write_text('#!/bin/sh\necho "JobId=12 EndTime=Unknown"\n')
    assert end_of_job() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1767225600")
    assert end_of_job() == 1767225600.0


def test_a_job_without_time_to_train_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signals, "end_of_job", lambda: None)
    assert find_deadline(None, save_before_seconds=120) is None
    with pytest.raises(RunError, match="save_before_seconds"):
        find_deadline(120, save_before_seconds=120)
    monkeypatch.setattr(stop_signals, "end_of_job", lambda: time.time() + 1000)
    first = find_deadline(7200, save_before_seconds=400)
    assert first is not None
    assert 590 < first - time.time() <= 600
    with pytest.raises(RunError):
        find_deadline(None, save_before_seconds=2000)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_command_imports_libraries(number: signal.Signals, tmp_path: Path) -> None:
    program = f"""
import os, signal
import umbrella_train.config
from umbrella_train.cli import train_command
signal.signal(signal.SIGINT, signal.default_int_handler)
umbrella_train.config.load_config = lambda *_, **__: os.kill(os.getpid(), {int(number)})
train_command([])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.returncode == 128 + number
    assert done.stderr.count("\n") == 1
    assert "nothing to save" in done.stderr
    assert list(tmp_path.iterdir()) == []
