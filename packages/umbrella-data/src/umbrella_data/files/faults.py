"""Words for errors of the file system."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_FOLDER = (errno.EEXIST, errno.ENOTDIR)


def describe_os_error(error: OSError, *, folder: str | os.PathLike[str] | None = None) -> str | None:
    """One line: which path, what is wrong with it, what to do.

    Args:
        error: The error.
        folder: Where files were written, for an error that names none.

    Returns:
        None if the error has no message of its own, and neither it nor the caller names a path.
    """
    # Of two names, as in a rename, the second is the one to be written.
    name = error.filename2 or error.filename or folder
    if error.strerror is None:  # raised with a message
        return str(error) or None
    if name is None or isinstance(name, int):
        return None
    path = Path(os.fsdecode(name))
    if error.errno in _FULL:
        free = shutil.disk_usage(_existing(path)).free / 1e6
        return f"{path}: the disk or your quota is full ({free:,.1f} MB are free); remove files, or use another folder"
    if error.errno == errno.EROFS:
        return f"{path}: the disk is read-only; use another folder"
    if error.errno in _NO_FOLDER:
        # mkdir("file/folder") names the folder.
        file = next((each for each in (path, *path.parents) if each.exists() and not each.is_dir()), None)
        if file is not None:
            what = "" if file == path else f"{file} "
            return f"{path}: {what}is a file, but must be a folder; choose another name, or remove it"
    return f"{path}: {error.strerror}"


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents, Path.cwd()) if each.exists())
