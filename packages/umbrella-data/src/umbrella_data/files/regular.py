"""Opening a path safely: only a regular file is read, and nothing under a path can make the reader wait."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from umbrella_data.errors import ScanError, ScanReason


@contextmanager
def open_regular_file(path: str) -> Iterator[BufferedReader]:
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
        raise _not_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        try:
            yield file
        except OSError as error:
            raise ScanError(
                f"reading fails: {error.strerror or error}", path=path, reason=ScanReason.UNREADABLE
            ) from error


def stat_regular_file(path: Path) -> os.stat_result:
    """What the system knows of a file, without opening it; a symbolic link is followed.

    Raises:
        ScanError: As `open_regular_file`, but for a file that may not be read.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _cannot_open(error, path=str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(str(path))
    return status


def is_lost(error: ScanError) -> bool:
    """Whether nothing at all is where a file was looked for; a link is there, whatever became of its content."""
    return error.reason == ScanReason.MISSING and not Path(error.path).is_symlink()


def _not_regular(path: str) -> ScanError:
    return ScanError(
        "not a regular file (a folder, a pipe, a socket or a device)", path=path, reason=ScanReason.NOT_REGULAR_FILE
    )


def _cannot_open(error: OSError | ValueError, *, path: str) -> ScanError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT and Path(path).is_symlink():
        return ScanError(
            "a link to a file that is not here: fetch its content (`datalad get` or `git annex get`), or mend the link",
            path=path,
            reason=ScanReason.MISSING,
        )
    if number in (errno.ENOENT, errno.ENOTDIR):
        return ScanError("there is no such file", path=path, reason=ScanReason.MISSING)
    if number == errno.ENXIO:
        return _not_regular(path)
    return ScanError(f"cannot be opened: {error}", path=path, reason=ScanReason.UNREADABLE)
