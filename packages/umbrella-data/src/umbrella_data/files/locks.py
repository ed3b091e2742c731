"""Locks between processes, with a fallback for systems and file systems that have none."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Reported by network file systems that are mounted without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file, which is created if missing. Without locks, a warning is logged instead.

    Args:
        path: The lock file; its folder exists.
        wait: Whether to wait for another process that holds it.

    Yields:
        False only if another process holds the lock and `wait` is False.

    Raises:
        OSError: If the file cannot be opened.
    """
    with path.open("ab") as file:
        yield _lock(file, path, wait=wait)


def _lock(file: Any, path: Path, *, wait: bool) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    logger.warning("%s: this system has no file locks; let only one process at a time write to the folder", path.parent)
    return True
