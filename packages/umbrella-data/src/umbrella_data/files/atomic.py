"""Atomic writes: a file appears complete or not at all, with any number of writing processes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

STAGED_PREFIX = ".writing-"

Buffer = bytes | bytearray | memoryview


def write_atomically(path: Path, parts: Iterable[Buffer], *, sync: bool = False) -> None:
    """Write a temporary file, then rename it.

    Args:
        path: The file; its folder is created if it is missing.
        parts: Its content, in order.
        sync: Whether the content is on the disk before the file appears, also after a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.parent / f"{STAGED_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
    # The mode follows the umask, so that a group can share files.
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
