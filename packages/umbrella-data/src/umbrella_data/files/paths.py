"""Files of scans: opened safely, pairs of `.hdr` and `.img`, and files next to a scan under its name."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from umbrella_data.errors import ScanError, ScanReason

_HEADER, _VOXELS = ".hdr", ".img"
_PLAIN_ENDINGS = (".nii", _HEADER, _VOXELS)
_ENDINGS = (*_PLAIN_ENDINGS, *(f"{ending}.gz" for ending in _PLAIN_ENDINGS))


@contextmanager
def open_regular_file(path: str) -> Iterator[BufferedReader]:
    """Open a file for reading; errors of the system become a `ScanError`.

    Raises:
        ScanError: `missing`, `not_regular_file` or `unreadable`; also if reading fails within the context.
    """
    try:
        # O_NONBLOCK: a FIFO under this name would block otherwise.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _cannot_open(error, path=path) from error
    # fdopen fails on a folder with an error of its own.
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
    """The status of a file, without opening it; a symbolic link is followed.

    Raises:
        ScanError: As `open_regular_file`, except for missing read permission.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise _cannot_open(error, path=str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(str(path))
    return status


def is_lost(error: ScanError) -> bool:
    """Whether nothing at all exists under the path of an error; a broken link exists."""
    return error.reason == ScanReason.MISSING and not Path(error.path).is_symlink()


def pair_of(path: str) -> tuple[str, str] | None:
    """The `.hdr` and the `.img` file of a pair, of which `path` is one; None for any other name.

    Both are compressed (`.hdr.gz`, `.img.gz`), or neither.
    """
    name, gzip = (path[:-3], path[-3:]) if path.lower().endswith(".gz") else (path, "")
    stem, ending = name[:-4], name[-4:]
    if ending.lower() not in (_HEADER, _VOXELS):
        return None
    header, voxels = (_HEADER.upper(), _VOXELS.upper()) if ending.isupper() else (_HEADER, _VOXELS)
    # The given name keeps its spelling.
    return (path, stem + voxels + gzip) if ending.lower() == _HEADER else (stem + header + gzip, path)


def is_scan_name(name: str) -> bool:
    """Whether a file name has the ending of a scan, in either case."""
    return name.lower().endswith(_ENDINGS)


def scan_stem(name: str) -> str:
    """A scan's file name without its ending, in either case."""
    return next((name[: -len(ending)] for ending in _ENDINGS if name.lower().endswith(ending)), name)


def sibling_file(scan: Path, ending: str) -> Path:
    """The file next to a scan that has its stem and another ending; it may not exist.

    Args:
        scan: The scan, or either file of a pair.
        ending: In lower case, as BIDS writes it, such as `.bval`. If there is no such file, one whose ending is in
            upper case is taken.
    """
    stem = scan_stem(scan.name)
    sibling, upper = scan.with_name(stem + ending), scan.with_name(stem + ending.upper())
    # A broken link exists: another file must not silently replace it.
    return upper if not os.path.lexists(sibling) and os.path.lexists(upper) else sibling


def _not_regular(path: str) -> ScanError:
    return ScanError(
        "not a regular file (a folder, a pipe, a socket or a device)", path=path, reason=ScanReason.NOT_REGULAR_FILE
    )


def _cannot_open(error: OSError | ValueError, *, path: str) -> ScanError:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT and Path(path).is_symlink():
        is_annex = "annex/objects/" in Path(path).readlink().as_posix()
        advice = "fetch its content (datalad get, or git annex get)" if is_annex else "copy that file, or fix the link"
        message = f"a link to a file that does not exist: {advice}"
        return ScanError(message, path=path, reason=ScanReason.MISSING)
    if number in (errno.ENOENT, errno.ENOTDIR):
        hint = "; a pair needs its .hdr and its .img, both compressed (.gz) or neither" if pair_of(path) else ""
        return ScanError(f"there is no such file{hint}", path=path, reason=ScanReason.MISSING)
    if number == errno.ENXIO:
        return _not_regular(path)
    return ScanError(f"cannot be opened: {error}", path=path, reason=ScanReason.UNREADABLE)
