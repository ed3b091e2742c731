"""The lock of a run's folder: one running job at a time.

Without it, two jobs with one name would train into the same checkpoints. The lock is a file with the owner's host and
process; a thread touches it while the run lives, so that a job on another host can tell whether it still does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from umbrella_data.files.atomic import write_atomically
from umbrella_train.errors import RunError

logger = logging.getLogger(__name__)

LOCK_NAME = "lock.json"
# A suspended job that wakes up after this time finds its folder taken over, and stops.
_HEARTBEAT_SECONDS, _STALE_SECONDS = 20.0, 300.0
_SETTLE_SECONDS = 2.0


@dataclass(frozen=True)
class LockOwner:
    """The process that trains into a run's folder.

    Attributes:
        host: Name of its host.
        processes: What its process ids belong to: containers on one host have their own.
        pid: Its process id.
        created: When the process was started, in seconds since the host's start: process ids are used again, and the
            clock may be set while it runs.
        started: When it locked the folder, local time.
        job: `SLURM_JOB_ID`, if it has one.
        restarts: How often the scheduler has restarted this job.
        token: Random, so that no two locks are equal.
    """

    host: str
    processes: str
    pid: int
    created: float
    started: str
    job: str | None
    restarts: int
    token: str

    @classmethod
    def this_process(cls) -> LockOwner:
        """The calling process."""
        try:
            processes = str(Path("/proc/self/ns/pid").readlink())
        except OSError:  # no Linux
            processes = ""
        return cls(
            host=socket.gethostname(),
            processes=processes,
            pid=os.getpid(),
            created=_created(psutil.Process()),
            started=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            token=secrets.token_hex(8),
        )

    def is_gone(self, *, silent_seconds: float, seen_from: LockOwner) -> bool:
        """Whether this owner, whose lock is silent for so long, has ended, as far as another process can tell."""
        if self.job is not None and self.job == seen_from.job and self.restarts < seen_from.restarts:
            return True  # the scheduler restarts a job only after it has ended
        if (self.host, self.processes) != (seen_from.host, seen_from.processes):
            return silent_seconds > _STALE_SECONDS
        try:
            process = psutil.Process(self.pid)
            # A zombie has ended, and its parent, such as the first process of a container, does not care.
            return process.status() == psutil.STATUS_ZOMBIE or abs(_created(process) - self.created) > 1
        except psutil.NoSuchProcess:
            return True


class RunLock:
    """Holds the lock of a folder until `release`.

    Args:
        folder: An existing folder.

    Raises:
        RunError: Another process holds it; with its host, process and start.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._owner = LockOwner.this_process()
        self._content = json.dumps(asdict(self._owner)).encode()
        self._stopped = threading.Event()
        self._acquire()
        threading.Thread(target=self._keep, name="run lock", daemon=True).start()

    def move_to(self, folder: Path) -> None:
        """The folder was renamed."""
        self._path = folder / LOCK_NAME

    def release(self) -> None:
        """Lets other processes have the folder."""
        self._stopped.set()
        if os.getpid() == self._owner.pid and _read(self._path) == self._content:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _acquire(self) -> None:
        while _read(self._path) != self._content:
            try:
                file = self._path.open("xb")  # fails if the file exists, also on network file systems
            except FileExistsError:
                self._take_over()
                continue
            try:
                with file:
                    file.write(self._content)
            except OSError:  # a full disk; an empty lock would keep others out for minutes
                self._path.unlink()
                raise

    def _take_over(self) -> None:
        """Replaces a lock whose owner is gone.

        Raises:
            RunError: It is not.
        """
        content = _read(self._path)
        silent = _seconds_since_change(self._path)
        if content is None or silent is None:
            return
        owner = _owner_in(content)
        if owner is None:
            is_gone, who = silent > _STALE_SECONDS, "a process whose lock cannot be read"
        else:
            is_gone = owner.is_gone(silent_seconds=silent, seen_from=self._owner)
            who = f"process {owner.pid} on {owner.host}, started {owner.started}"
        if not is_gone:
            raise RunError(
                f"{self._path.parent}: is in use by {who}, last active {max(0, round(silent))} s ago. Wait until it "
                f"has ended, or stop it; on another host, a job that is silent for {round(_STALE_SECONDS)} s counts as "
                f"ended. If you know that it has ended, remove {self._path}"
            )
        if _read(self._path) != content:
            return
        # Replaced, not removed: there is a lock at any time. Of several that do this at once, the last one has it.
        write_atomically(self._path, [self._content])
        time.sleep(_SETTLE_SECONDS)
        if _read(self._path) == self._content:
            logger.warning("%s: took over the lock of %s, which has ended", self._path.parent, who)

    def _keep(self) -> None:
        while not self._stopped.wait(_HEARTBEAT_SECONDS):
            content = _read(self._path)
            if content == self._content:
                with contextlib.suppress(OSError):  # of a file server; the next try may succeed
                    os.utime(self._path)
            elif content is not None and not self._stopped.is_set():
                logger.error("%s: was taken over by another job; this one stops without saving", self._path.parent)
                os._exit(2)  # nothing else can end a step, or a collective, that is running


def _created(process: psutil.Process) -> float:
    # psutil derives times since 1970 from the clock of this moment.
    return process.create_time() - psutil.boot_time()


def _seconds_since_change(path: Path) -> float | None:
    """By the clock of the file server, since those of hosts differ; None without the file."""
    probe = path.with_name(f"{LOCK_NAME}.{secrets.token_hex(8)}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _owner_in(content: bytes) -> LockOwner | None:
    try:
        return LockOwner(**json.loads(content))
    except (ValueError, TypeError):
        return None
