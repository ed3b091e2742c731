"""A size limit for a folder of files that can be recreated: the least recently used are removed first."""

from __future__ import annotations

import os
import time
from pathlib import Path

from umbrella_data.files.atomic import STAGED_PREFIX
from umbrella_data.files.locks import locked

# A use is recorded if the last record is older than this, so that not every read is a write.
_NOTE_AFTER_NS = 60 * 10**9
# The folder is scanned after this fraction of the limit has been added.
_LOOK_AFTER = 1 / 64
# Files are removed down to this fraction, so that not every new file removes one.
_KEEP = 0.9
_STALE_SECONDS = 24 * 3600


class SizeLimit:
    """Limits the total size of the files two levels below a folder; it may be exceeded briefly.

    Any number of processes may add, use and remove files at the same time. An open file stays readable after it is
    removed. The time of last use is the file's access time, set explicitly, since file systems seldom update it.

    Args:
        directory: The folder.
        max_bytes: The limit; None for none.

    Raises:
        ValueError: For a limit below 1.
    """

    def __init__(self, directory: Path, *, max_bytes: int | None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; it must be at least 1, or None for no limit")
        self.directory = directory
        self.max_bytes = max_bytes
        self._added = -1

    def note_use(self, path: Path) -> None:
        """Record that a file is used."""
        if self.max_bytes is None:
            return
        try:
            status = path.stat()
            if time.time_ns() - status.st_atime_ns > _NOTE_AFTER_NS:
                os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except OSError:
            return  # removed, or owned by another user

    def note_added(self, num_bytes: int) -> None:
        """Record that a file was added; above the limit, files are removed."""
        if self.max_bytes is None:
            return
        is_first = self._added < 0
        self._added = max(self._added, 0) + num_bytes
        if is_first or self._added > self.max_bytes * _LOOK_AFTER:
            self._added = 0
            self.enforce()

    def enforce(self) -> None:
        """Remove the least recently used files, unless another process does so."""
        assert self.max_bytes is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory / "lock", wait=False) as is_held:
            if not is_held:
                return
            files = self._files()
            total = sum(size for _, size, _ in files)
            if total <= self.max_bytes:
                return
            # The newest is kept whatever its size: it is about to be read.
            for _, size, path in sorted(files)[:-1]:
                if total <= self.max_bytes * _KEEP:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size

    def _files(self) -> list[tuple[int, int, str]]:
        """Time of last use, size and path of every file. Temporary files of a crashed writer are removed."""
        found = []
        for folder in [entry.path for entry in os.scandir(self.directory) if entry.is_dir()]:
            for entry in os.scandir(folder):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                if not entry.name.startswith(STAGED_PREFIX):
                    found.append((status.st_atime_ns, status.st_size, entry.path))
                elif time.time() - status.st_mtime > _STALE_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)
        return found
