"""Ends the process although exit hooks, threads or services of another library hang, such as those of a tracker."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

import psutil

logger = logging.getLogger(__name__)

# How long exit hooks may take after a command, whose exit code is known, and in other programs.
COMMAND_SECONDS = 2.0
OTHER_SECONDS = 10.0

_exit_code: int | None = None
_thread: threading.Thread | None = None


def guard_exit() -> None:
    """From now on, the process and its children end at most a few seconds after its main thread."""
    global _thread  # noqa: PLW0603
    if _thread is None:
        _thread = threading.Thread(target=_end_process, name="exit guard", daemon=True)
        _thread.start()


def _end_process() -> None:
    # The main thread counts as ended before Python waits for other threads and calls exit hooks.
    threading.main_thread().join()
    time.sleep(OTHER_SECONDS if _exit_code is None else COMMAND_SECONDS)
    if _exit_code is None:
        logger.error("exit hooks or threads hang: the process is ended, with exit code 1")
    # Services of a tracker would continue, and keep pipes open that others read to their end.
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(1 if _exit_code is None else _exit_code)


@contextlib.contextmanager
def last_call() -> Iterator[None]:
    """The process exits after this call: its exit code is also that of a process ended by the guard."""
    global _exit_code  # noqa: PLW0603
    _exit_code = 1  # of an error with a traceback
    try:
        yield
    except SystemExit as stop:
        _exit_code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    _exit_code = 0
