"""Opening a path safely: only a regular file is read, and nothing under a path can make the reader wait."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from umbrella_data.errors import ScanError, ScanReason


@contextmanager
def open_regular_file(path: str) -> Iterator[BinaryIO]:
    """Open a file for reading, and turn what the system says against it into a `ScanError`.

    Raises:
        ScanError: `missing`, `not_regular_file` or `unreadable`; also where reading fails within the context.
    """
    try:
        # O_NONBLOCK: a FIFO under this name would otherwise block for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _cannot_open(error, path=path) from error
    # fdopen itself would stumble over a folder.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ScanError(
            "not a regular file (a folder, a pipe or a device)", path=path, reason=ScanReason.NOT_REGULAR_FILE
        )
    with os.fdopen(descriptor, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise ScanError(
                f"reading fails: {error.strerror or error}", path=path, reason=ScanReason.UNREADABLE
            ) from error


def _cannot_open(error: OSError | ValueError, *, path: str) -> ScanError:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOENT, errno.ENOTDIR):
        return ScanError("there is no such file", path=path, reason=ScanReason.MISSING)
    if number == errno.ENXIO:
        return ScanError("not a regular file (a socket or a device)", path=path, reason=ScanReason.NOT_REGULAR_FILE)
    return ScanError(f"cannot be opened: {error}", path=path, reason=ScanReason.UNREADABLE)
