"""Preprocessed volumes on disk: float16, one mapped file per scan, keyed by file contents and pipeline."""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from umbrella_data.cache.entry import CachedFrames, DamagedEntryError, retry, unusable, write_entry
from umbrella_data.cache.eviction import SizeLimit
from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.files.atomic import write_atomically
from umbrella_data.files.paths import open_regular_file, stat_regular_file

_MAX_REMEMBERED = 1 << 16
# How often a scan is computed again because its files changed while they were read.
_MAX_CHANGES = 2
# Path, size, mtime, inode and device: a change of a file changes one of them.
_FileIdentity = tuple[str, int, int, int, int]


class VolumeCache:
    """A folder of preprocessed scans. Any number of processes may read and write it at the same time.

    Args:
        directory: The folder; created if it is missing.
        max_bytes: Limit of its size: the least recently used scans are removed first; None for no limit. Processes that
            share a folder should have the same limit.

    Attributes:
        max_bytes: The limit.

    Raises:
        CacheError: If the folder cannot be created.
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_bytes: int | None = None) -> None:
        self.directory = Path(directory)
        self.max_bytes = max_bytes
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unusable(self.directory, error) from error
        self._limit = SizeLimit(self.directory / "volumes", max_bytes=max_bytes)
        self._paths: OrderedDict[tuple[str, tuple[_FileIdentity, ...]], Path] = OrderedDict()

    def fetch(self, sources: Sequence[Path], *, fingerprint: str, make: Callable[[], torch.Tensor]) -> CachedFrames:
        """Open the entry of a scan; write it first if it is missing or damaged.

        Args:
            sources: Every file that determines the voxels.
            fingerprint: Hash of the pipeline.
            make: Computes the frames (T, C, X, Y, Z) float32.

        Raises:
            ScanError: If a source cannot be read, or changes repeatedly while it is read; or from `make`.
            CacheError: If the cache cannot be read or written, or entries are lost repeatedly.
        """
        for _ in range(_MAX_CHANGES):
            try:
                return self._fetch(sources, fingerprint, make)
            except _SourceChangedError:
                continue
        return self._fetch(sources, fingerprint, make)

    def _fetch(self, sources: Sequence[Path], fingerprint: str, make: Callable[[], torch.Tensor]) -> CachedFrames:
        try:
            path = self._path(sources, fingerprint)
        except _SourceChangedError:
            raise
        except ScanError:
            make()  # raises the error of reading without a cache
            raise

        def restore() -> None:
            # Sources are opened by name twice, for hashing and for reading: the result belongs to this key only if they
            # were the same files each time.
            before = _identify_all(sources)
            if self._path(sources, fingerprint) != path:
                raise _changed(sources)
            frames = make().numpy()
            if _identify_all(sources) != before:
                raise _changed(sources)
            self._limit.note_added(write_entry(path, frames))

        frames = retry(lambda: CachedFrames(path, restore=restore), restore=restore, path=path)
        if self.max_bytes is not None:
            self._limit.note_use(path)
        return frames

    def holds(self, sources: Sequence[Path], *, fingerprint: str) -> bool:
        """Whether there is an entry of a scan; a damaged one counts as none.

        Raises:
            ScanError: If a source cannot be read.
            CacheError: If the cache cannot be read.
        """
        path = self._path(sources, fingerprint)
        try:
            CachedFrames(path, restore=lambda: None)
        except (FileNotFoundError, DamagedEntryError):
            return False
        except OSError as error:
            raise unusable(path, error) from error
        return True

    def _path(self, sources: Sequence[Path], fingerprint: str) -> Path:
        """The entry of some files, remembered by their paths, sizes, mtimes and inodes."""
        identities = _identify_all(sources)
        path = self._paths.get((fingerprint, identities))
        if path is None:
            hashes = map(self._content_hash, sources, identities)
            key = hashlib.sha256("\n".join([fingerprint, *hashes]).encode()).hexdigest()
            path = self.directory / "volumes" / key[:2] / f"{key}.f16"
            self._paths[fingerprint, identities] = path
            if len(self._paths) > _MAX_REMEMBERED:
                self._paths.popitem(last=False)
        return path

    def _content_hash(self, source: Path, identity: _FileIdentity) -> str:
        """The hash of a file's content, remembered on disk by the file's identity."""
        name = hashlib.sha256("\n".join(map(str, identity)).encode(errors="surrogateescape")).hexdigest()
        memory = self.directory / "content" / name[:2] / name
        try:
            remembered = memory.read_bytes()
        except FileNotFoundError:
            remembered = b""
        except OSError as error:
            raise unusable(memory, error) from error
        if re.fullmatch(rb"[0-9a-f]{64}", remembered):
            return remembered.decode()
        digest = _hash_file(source, identity)
        try:
            write_atomically(memory, [digest.encode()])
        except OSError as error:
            raise unusable(memory, error) from error
        return digest


def _hash_file(source: Path, identity: _FileIdentity) -> str:
    with open_regular_file(str(source)) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        status = os.fstat(file.fileno())
    if _identity(source, status) != identity:
        raise _changed([source])
    return digest


class _SourceChangedError(ScanError):
    """A source was changed or replaced while it was read."""


def _changed(sources: Sequence[Path]) -> _SourceChangedError:
    names = ", ".join(source.name for source in sources[1:])
    others = f" (or one of {names})" if names else ""
    message = f"changes{others} while it is read: wait until it is complete"
    return _SourceChangedError(message, path=sources[0], reason=ScanReason.UNREADABLE)


def _identify_all(sources: Sequence[Path]) -> tuple[_FileIdentity, ...]:
    return tuple(_identity(source, stat_regular_file(source)) for source in sources)


def _identity(source: Path, status: os.stat_result) -> _FileIdentity:
    return str(source.absolute()), status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev
