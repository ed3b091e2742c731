"""A scan's file: opened safely, proven whole, its frames read as stored; `.nii` by seeking, `.nii.gz` by streaming."""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.gzip_stream import GZIP_MAGIC, MAX_DEFLATE_RATIO, iter_gzip
from umbrella_data.header import ScanHeader, header_length, parse_header

MAX_PLAUSIBLE_RATIO = 200
"""Voxels that gzip shrinks more than this are no scan: even a masked map with little brain stays below 100."""

_ALWAYS_ALLOWED_BYTES = 1 << 24
_MAX_PROVEN = 1 << 16
_Identity = tuple[int, int, int, int]
# Files whose gzip stream was checked to the last byte, by device, inode, size and mtime. Bounded, oldest out first.
_proven: OrderedDict[_Identity, None] = OrderedDict()


class StoredScan:
    """An open scan. Use `open_scan`.

    Attributes:
        path: The file's name.
        header: Its checked header.
        is_compressed: Whether it is gzip.
    """

    def __init__(self, file: BinaryIO, *, path: str) -> None:
        self.path = path
        self._file = file
        status = os.fstat(file.fileno())
        self._size = status.st_size
        self._identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        self.is_compressed = _is_compressed(file, path=path)
        self.header = self._read_header()
        self._check_size()

    def read_frames(self, first: int, count: int) -> np.ndarray:
        """Read frames as stored.

        Args:
            first: The first frame; 0 for a volume.
            count: Number of frames; 1 for a volume.

        Returns:
            (T, X, Y, Z) along the stored axes, in the stored type, in Fortran order within a frame.

        Raises:
            ScanError: Where the file ends early, goes on too long or is damaged.
        """
        header = self.header
        start, length = header.offset + first * header.frame_bytes, count * header.frame_bytes
        data = self._read_compressed(start, length) if self.is_compressed else self._read_plain(start, length)
        x, y, z = header.shape[:3]
        return np.frombuffer(data, dtype=header.dtype).reshape(count, z, y, x).transpose(0, 3, 2, 1)

    def _stream(self) -> Iterator[bytes]:
        self._file.seek(0)
        if self.is_compressed:
            yield from iter_gzip(self._file, path=self.path)
        else:
            while block := self._file.read(1 << 16):
                yield block

    def _read_header(self) -> ScanHeader:
        stream = self._stream()
        start = _take(stream, b"", 4)
        length = header_length(start, path=self.path)
        start = _take(stream, start, length + 4)
        if len(start) < length + 4:
            raise ScanError(
                f"the file ends inside its header, after {len(start)} bytes",
                path=self.path,
                reason=ScanReason.TRUNCATED,
            )
        header = parse_header(start[:length], path=self.path)
        if start[length] != 0:
            _check_extensions(_take(stream, start, header.offset)[length + 4 : header.offset], path=self.path)
        return header

    def _check_size(self) -> None:
        """Refuse a declared size that the file cannot hold, before anything of that size is allocated."""
        declared, stored = self.header.file_bytes, self._size
        if self.is_compressed:
            if declared > stored * MAX_DEFLATE_RATIO:
                raise ScanError(
                    f"the header declares {declared} bytes, more than {stored} bytes of gzip can hold: "
                    "the file was cut or its header is damaged",
                    path=self.path,
                    reason=ScanReason.TRUNCATED,
                )
            if declared > max(stored * MAX_PLAUSIBLE_RATIO, _ALWAYS_ALLOWED_BYTES):
                raise ScanError(
                    f"{stored} bytes of gzip declare {declared} bytes of voxels: no scan compresses that well",
                    path=self.path,
                    reason=ScanReason.TOO_LARGE,
                )
        elif declared != stored:
            raise _wrong_length(stored, declared, path=self.path)

    def _read_plain(self, start: int, length: int) -> bytearray:
        data = bytearray(length)
        self._file.seek(start)
        found = self._file.readinto(data)  # type: ignore[attr-defined]
        if found != length:
            raise _wrong_length(start + found, self.header.file_bytes, path=self.path)
        return data

    def _read_compressed(self, start: int, length: int) -> bytearray:
        data = bytearray(length)
        view = memoryview(data)
        position, declared = 0, self.header.file_bytes
        is_proven = self._identity in _proven
        for chunk in self._stream():
            low, high = max(start - position, 0), min(start + length - position, len(chunk))
            if low < high:
                view[position + low - start : position + high - start] = chunk[low:high]
            position += len(chunk)
            if position > declared:
                raise _wrong_length(position, declared, path=self.path)
            if is_proven and position >= start + length:
                return data
        if position != declared:
            raise _wrong_length(position, declared, path=self.path)
        _proven[self._identity] = None
        if len(_proven) > _MAX_PROVEN:
            _proven.popitem(last=False)
        return data


@contextmanager
def open_scan(path: str | os.PathLike[str]) -> Iterator[StoredScan]:
    """Open a `.nii` or `.nii.gz` file and check its header.

    Raises:
        ScanError: Where there is no such regular file, or its header is wrong.
    """
    name = os.fspath(path)
    try:
        # O_NONBLOCK: a FIFO under this name would otherwise block for ever.
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _cannot_open(error, path=name) from error
    # fdopen itself would stumble over a folder.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ScanError(
            "not a regular file (a folder, a pipe or a device)", path=name, reason=ScanReason.NOT_REGULAR_FILE
        )
    with os.fdopen(descriptor, "rb") as file:
        try:
            yield StoredScan(file, path=name)
        except OSError as error:
            raise ScanError(
                f"reading fails: {error.strerror or error}", path=name, reason=ScanReason.UNREADABLE
            ) from error


def _cannot_open(error: OSError | ValueError, *, path: str) -> ScanError:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOENT, errno.ENOTDIR):
        return ScanError("there is no such file", path=path, reason=ScanReason.MISSING)
    if number == errno.ENXIO:
        return ScanError("not a regular file (a socket or a device)", path=path, reason=ScanReason.NOT_REGULAR_FILE)
    return ScanError(f"cannot be opened: {error}", path=path, reason=ScanReason.UNREADABLE)


def _is_compressed(file: BinaryIO, *, path: str) -> bool:
    name = Path(path).name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise ScanError(
            "not a .nii or .nii.gz file: convert it (dcm2niix for DICOM, mri_convert for MGZ)",
            path=path,
            reason=ScanReason.FILE_TYPE,
        )
    is_gzip = file.read(2) == GZIP_MAGIC
    file.seek(0)
    if is_gzip != name.endswith(".gz"):
        message = "holds gzip: call it .nii.gz" if is_gzip else "holds no gzip: call it .nii, or compress it"
        raise ScanError(message, path=path, reason=ScanReason.GZIP_HEADER)
    return is_gzip


def _take(stream: Iterator[bytes], start: bytes, count: int) -> bytes:
    """Add to `start` from the stream until it holds `count` bytes, or the stream ends."""
    parts, size = [start], len(start)
    while size < count and (block := next(stream, b"")):
        parts.append(block)
        size += len(block)
    return b"".join(parts)


def _check_extensions(block: bytes, *, path: str) -> None:
    position = 0
    while position < len(block):
        size = int.from_bytes(block[position : position + 4], "little")
        swapped = int.from_bytes(block[position : position + 4], "big")
        size = min(size, swapped) if size >= 8 and swapped >= 8 else max(size, swapped)
        if size < 8 or position + size > len(block):
            raise ScanError(
                f"a header extension of {size} bytes does not fit before the voxels",
                path=path,
                reason=ScanReason.HEADER,
            )
        position += size


def _wrong_length(found: int, declared: int, *, path: str) -> ScanError:
    if found < declared:
        return ScanError(
            f"the file ends early: the header declares {declared} bytes, {found} are there",
            path=path,
            reason=ScanReason.TRUNCATED,
        )
    return ScanError(
        f"the header declares {declared} bytes, but the file goes on: its dimensions or type are wrong",
        path=path,
        reason=ScanReason.TRAILING,
    )
