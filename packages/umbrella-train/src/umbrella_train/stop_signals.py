"""Signals by which schedulers and terminals stop a run: SIGTERM, SIGINT (Ctrl-C), SIGUSR1, SIGUSR2 and SIGHUP."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import util
from types import FrameType
from typing import Any

from umbrella_train.errors import RunError, RunStoppedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

# A signal to a whole process group arrives twice: from the kernel, and from the launcher that passes it on.
_REPEAT_SECONDS = 3.0
_ends_workers = False


class StoppedAtOnce(BaseException):
    """Raised where a signal arrives outside of training; like KeyboardInterrupt, no `except Exception` swallows it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopSignals:
    """Handles the signals of a run, from `install` to `restore`.

    In training, a signal is noted in `is_asked`; the trainer agrees on it over the ranks, saves and stops. Otherwise
    there is nothing to save, and `StoppedAtOnce` is raised. A second signal ends the process at once. Signals that were
    ignored when the process started (by `nohup`, or Ctrl-C in the background) stay so.

    Args:
        deadline: When to stop without a signal, in seconds since 1970; None for never.

    Attributes:
        received: The first signal; None before it.
        is_training: Whether training steps are running.
    """

    def __init__(self, *, deadline: float | None = None) -> None:
        self._deadline = deadline
        self._previous: dict[int, Any] = {}
        self._received_at = 0.0
        self.received: int | None = None
        self.is_training = False

    @property
    def is_asked(self) -> bool:
        """Whether this process is to stop, by a signal or by the deadline."""
        return self.received is not None or (self._deadline is not None and time.time() >= self._deadline)

    @property
    def number(self) -> int:
        """The signal that stops the run; SIGUSR1 for the deadline, SIGTERM if another rank received it."""
        if self.received is not None:
            return self.received
        return signal.SIGUSR1 if self.is_asked else signal.SIGTERM

    @property
    def is_installed(self) -> bool:
        """Whether the signals are handled here."""
        return bool(self._previous)

    def install(self) -> None:
        """Handles the signals; call it in the main thread."""
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._previous = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
        for number in self._previous:
            signal.signal(number, self._receive)

    def restore(self) -> None:
        """Handles them as before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at > _REPEAT_SECONDS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self._received_at = number, time.monotonic()
        if not self.is_training:
            raise StoppedAtOnce(number)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While a command imports libraries, a stop signal ends the process with a message: there is nothing to save."""

    # An exception could be swallowed, or become a traceback, somewhere in an import.
    def end(number: int, _frame: FrameType | None) -> None:
        os.write(2, f"{RunStoppedError(None, step=0, signal_number=number)}\n".encode())
        os._exit(128 + number)

    with stop_signals_handled_by(end):
        yield


@contextmanager
def stop_signals_handled_by(receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Stop signals that are not ignored call a function; afterwards they are handled as before."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_workers_at_exit() -> None:
    """Python ends processes that load data by one SIGTERM, which they ignore, and would wait for them forever."""
    global _ends_workers  # noqa: PLW0603
    if not _ends_workers:
        _ends_workers = True
        # Finalizers run before Python waits.
        util.Finalize(None, _kill_workers, exitpriority=0)


def _kill_workers() -> None:
    # PyTorch's handler raises when a worker is killed.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def leave_signals_to_parent(_worker: int = 0) -> None:
    """For processes that load data: a stop signal to the whole process group ends them only at the second time.

    The training process needs its workers until it has saved; it then ends them itself.
    """

    def ignore_once(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else ignore_once)


@contextmanager
def without_worker_failures() -> Iterator[None]:
    """While a checkpoint is saved, the death of a data worker is not an error; the next batch reports it."""
    # PyTorch raises in the handler, wherever the main thread is; other threads have no handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous)


def find_deadline(max_time: float | None, *, save_before_seconds: float) -> float | None:
    """When a run has to stop to be saved in time, in seconds since 1970; None if no end is known.

    Args:
        max_time: Seconds until the run ends, if SLURM does not end it earlier.
        save_before_seconds: Seconds to spare.

    Raises:
        RunError: There is no time to train: each job would stop after one step.
    """
    now = time.time()
    ends = [end for end in (end_of_job(), None if max_time is None else now + max_time) if end is not None]
    if not ends:
        return None
    seconds = min(ends) - now
    if seconds <= save_before_seconds:
        raise RunError(
            f"this job ends in {seconds:.0f} s, and the run is to stop {save_before_seconds:g} s before: there is no "
            "time to train; give it more time, or set a smaller trainer.save_before_seconds"
        )
    return min(ends) - save_before_seconds


def end_of_job() -> float | None:
    """When SLURM ends this job, in seconds since 1970; None if that is not known."""
    end, job = os.environ.get("SLURM_JOB_END_TIME", ""), os.environ.get("SLURM_JOB_ID")
    if end.isdecimal():
        return float(end)
    if job is None:
        return None
    try:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    fields = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
    try:
        return time.mktime(time.strptime(fields.get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:  # as "Unknown"
        return None
