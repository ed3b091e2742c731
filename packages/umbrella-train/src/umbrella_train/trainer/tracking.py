"""Sends metrics to trackers in threads of their own, so that a tracker that fails or hangs cannot hurt the training."""

from __future__ import annotations

import logging
import math
import queue
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from umbrella_train.config import RunConfig
from umbrella_train.exit_guard import guard_exit
from umbrella_train.trainer.trackers import TRACKERS, TrackedRun, Tracker, public_settings

logger = logging.getLogger(__name__)

# How long all trackers together are waited for, in seconds.
START_SECONDS = 3.0
FINISH_SECONDS = 5.0
# A tracker that computes does not hang: mlflow needs seconds for a new database, and longer on a busy machine. It has
# this factor of its CPU time in addition, up to a limit.
BUSY_FACTOR = 5.0
MAX_FINISH_SECONDS = 30.0
# A tracker is given up if one of its calls takes longer (s), or if this many lines wait for it.
CALL_SECONDS = 120.0
MAX_LINES = 1000


class Trackers:
    """The trackers of a run, as a context: the metrics that `log` receives go to each of them.

    A tracker that raises, hangs or falls behind is given up, with one warning; training continues without it.

    Args:
        config: The run; `trainer.report_to` names the trackers.
        folder: The run's folder.
        step: The step that the run starts from.
        num_parameters: Of the model.
    """

    def __init__(self, config: RunConfig, folder: Path, *, step: int, num_parameters: int) -> None:
        settings = {**public_settings(config), "num_parameters": num_parameters}
        run = TrackedRun(name=folder.name, folder=folder, settings=settings, step=step)
        names = dict.fromkeys(config.trainer.report_to)
        self._threads = [_TrackerThread(name, TRACKERS[name](), run) for name in names]

    def __enter__(self) -> Trackers:
        for thread in self._threads:
            thread.start()
        # Data workers should not be forked during the imports of another thread.
        deadline = time.monotonic() + START_SECONDS
        for thread in self._threads:
            thread.is_started.wait(max(0.0, deadline - time.monotonic()))
        return self

    def log(self, row: Mapping[str, Any]) -> None:
        """Hands over a line of metrics.jsonl; returns at once.

        Args:
            row: With the step as `step`. Values that are not finite numbers are left out.
        """
        numbers = {key: value for key, value in row.items() if key != "step" and _is_number(value)}
        for thread in self._threads:
            thread.put((int(row["step"]), numbers))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.put(kind is not None)
        begin = time.monotonic()
        busy = [thread.cpu_seconds() for thread in self._threads]
        for thread, seconds in zip(self._threads, busy, strict=True):
            thread.wait(since=begin, busy=seconds)


class _TrackerThread:
    """Calls one tracker; in the queue are lines, and at last whether the run failed."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun) -> None:
        self.is_started = threading.Event()
        self._name = name
        self._tracker = tracker
        self._run = run
        self._queue: queue.Queue[tuple[int, dict[str, float]] | bool] = queue.Queue(MAX_LINES)
        self._lock = threading.Lock()
        self._is_over = False  # finished or given up
        self._call: tuple[str, float] | None = None  # what is being called, since when
        self._clock: int | None = None  # of the thread's CPU time, where the system has one
        self._thread = threading.Thread(target=self._guarded, name=f"tracker {name}", daemon=True)

    def start(self) -> None:
        """Starts the thread and the tracker."""
        self._thread.start()

    def _guarded(self) -> None:
        if hasattr(time, "pthread_getcpuclockid"):
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            self._follow_run()
        except BaseException as error:  # noqa: BLE001  (a tracker may raise anything, also SystemExit)
            words = " ".join(_without_secrets(str(error)).split())
            call = "" if self._call is None else self._call[0]
            self._give_up(f"{call} failed: {type(error).__name__}: {words[:300]}")
        finally:
            self.is_started.set()

    def _follow_run(self) -> None:
        self._call = ("start", time.monotonic())
        self._tracker.start(self._run)
        self._call = None
        self.is_started.set()
        while not self._is_over:
            item = self._queue.get()
            if isinstance(item, bool):
                self._call = ("finish", time.monotonic())
                self._tracker.finish(has_failed=item)
                with self._lock:
                    self._is_over = True
            else:
                self._call = ("log", time.monotonic())
                self._tracker.log(*item)
            self._call = None

    def put(self, item: tuple[int, dict[str, float]] | bool) -> None:
        """Adds to the queue, from the main thread."""
        if self._is_over:
            return
        call = self._call
        if call is not None and time.monotonic() - call[1] > CALL_SECONDS:
            self._give_up(f"{call[0]} has not returned for {CALL_SECONDS:.0f} s")
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._give_up(f"it is {MAX_LINES} lines behind")

    def wait(self, *, since: float, busy: float) -> None:
        """Waits for the end of the tracker, since a time of `time.monotonic` and of `cpu_seconds`."""
        while not self._is_over:
            patience = min(FINISH_SECONDS + BUSY_FACTOR * (self.cpu_seconds() - busy), MAX_FINISH_SECONDS)
            if time.monotonic() - since > patience:
                call = self._call
                self._give_up(f"{'it' if call is None else call[0]} has not returned at the end of the run")
            self._thread.join(0.05)

    def cpu_seconds(self) -> float:
        """CPU time of the thread; 0 if the system does not know it."""
        try:
            return 0.0 if self._clock is None else time.clock_gettime(self._clock)
        except OSError:  # the thread has ended
            return 0.0

    def _give_up(self, problem: str) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        logger.warning(
            "%s: %s; training continues without this tracker, and all numbers are in %s",
            self._name,
            problem,
            self._run.folder / "metrics.jsonl",
        )
        guard_exit()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _without_secrets(text: str) -> str:
    """Without passwords and keys, as in `https://user:password@host` and `?token=...`."""
    text = re.sub(r"://[^/@\s]*@", "://", text)
    return re.sub(r"(?i)((?:token|key|password|secret)\W{0,3}[=:]\W{0,3})[^\s&'\"]+", r"\1***", text)
