"""Opens the file of a scan and reads its frames as stored: `.nii` by seeking, `.nii.gz` by streaming.

Of a pair, `.hdr` is read for the header and `.img` for the voxels.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.files.paths import open_regular_file, pair_of
from umbrella_data.scan.gzip_index import GzipIndex, Identity, IndexMismatchError, build_index, index_path, load_index
from umbrella_data.scan.gzip_stream import CHUNK_BYTES, GZIP_MAGIC, MAX_DEFLATE_RATIO, inflate, iter_gzip
from umbrella_data.scan.header import (
    ScanHeader,
    check_extensions,
    header_ends,
    header_length,
    parse_header,
    read_separate_header,
)

MAX_PLAUSIBLE_RATIO = 200
"""Largest compression ratio of a scan; even a masked map with little brain is below 100."""

_ALWAYS_ALLOWED_BYTES = 1 << 24
_MAX_VERIFIED = 1 << 16
_HEADER_CHUNK_BYTES = 1 << 13
# Size of a block of slices, which fits into the processor's cache.
_SLICE_BLOCK_BYTES = 1 << 19
# Below this, decompressing from the start is as fast as an index.
_MIN_INDEXED_BYTES = 1 << 24
# Validated gzip files by device, inode, size and mtime. Bounded; the oldest are removed first.
_verified: OrderedDict[Identity, None] = OrderedDict()


class StoredScan:
    """An open scan. Use `open_scan`.

    Attributes:
        path: The file's name.
        header: Its checked header.
        is_compressed: Whether it is gzip.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        path: str,
        index_folder: Path | None = None,
        header_file: BinaryIO | None = None,
        header_path: str | None = None,
    ) -> None:
        self.path = path
        self._file = file
        status = os.fstat(file.fileno())
        self._size = status.st_size
        self._identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        self._index_path = None if index_folder is None else index_path(index_folder, path, identity=self._identity)
        self.is_compressed = header_file is None and _is_compressed(file, path=path)
        if header_file is None:
            self.header = self._read_header()
        else:
            self.header = read_separate_header(header_file, path=header_path or path)
        self._check_size()

    def read_frames(self, first: int, count: int) -> np.ndarray:
        """Read frames as stored.

        Args:
            first: The first frame; 0 for a volume.
            count: Number of frames; 1 for a volume.

        Returns:
            (T, X, Y, Z) along the stored axes, in the stored type, in Fortran order within a frame.

        Raises:
            ScanError: If the file ends early, is too long or is damaged.
        """
        x, y, z = self.header.shape[:3]
        slices = np.empty((count * z, y, x), dtype=self.header.dtype)
        position = 0
        for block in self.iter_slices(first, count):
            slices[position : position + len(block)] = block
            position += len(block)
        return slices.reshape(count, z, y, x).transpose(0, 3, 2, 1)

    def iter_slices(self, first: int, count: int) -> Iterator[np.ndarray]:
        """Read frames slice by slice; the file is validated once the iterator is exhausted.

        Args:
            first: The first frame; 0 for a volume.
            count: Number of frames; 1 for a volume.

        Yields:
            (n, Y, X) along the stored axes, in the stored type: neighbouring slices of one frame. Blocks share
            their memory.

        Raises:
            ScanError: As `read_frames`.
        """
        header = self.header
        x, y, z = header.shape[:3]
        slice_bytes = x * y * header.dtype.itemsize
        size = max(_SLICE_BLOCK_BYTES // slice_bytes, 1)
        buffer = bytearray(min(size, z) * slice_bytes)
        source = (
            _Filler(self._compressed(first, count)) if self.is_compressed else _Reader(self._file, self._start(first))
        )
        for _ in range(count):
            for position in range(0, z, size):
                num_slices = min(size, z - position)
                view = memoryview(buffer)[: num_slices * slice_bytes]
                if not source.fill(view):
                    raise ScanError("the file ends early: it was cut while it was read",
                                    path=self.path, reason=ScanReason.TRUNCATED)  # fmt: skip
                yield np.frombuffer(view, dtype=header.dtype).reshape(num_slices, y, x)
        source.finish()

    def _stream(self, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        self._file.seek(0)
        if self.is_compressed:
            yield from iter_gzip(self._file, path=self.path, chunk_bytes=chunk_bytes)
        else:
            while block := self._file.read(1 << 16):
                yield block

    def _read_header(self) -> ScanHeader:
        # Small chunks: only the header is needed.
        stream = self._stream(chunk_bytes=_HEADER_CHUNK_BYTES)
        start = _take(stream, b"", 4)
        length = header_length(start, path=self.path)
        start = _take(stream, start, length + 4)
        if len(start) < length + 4:
            raise header_ends(len(start), path=self.path)
        header = parse_header(start[:length], path=self.path)
        if start[length] != 0:
            check_extensions(_take(stream, start, header.offset)[length + 4 : header.offset], path=self.path)
        return header

    def _check_size(self) -> None:
        """Reject a declared size that the file cannot have, before memory is allocated."""
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

    def _start(self, frame: int) -> int:
        """The decompressed bytes before a frame."""
        return self.header.offset + frame * self.header.frame_bytes

    def _compressed(self, first: int, count: int) -> Iterator[memoryview]:
        """The bytes of frames; once it is exhausted, the file is validated."""
        if self._index_path is not None and self._is_long and count < self.header.num_frames:
            return self._indexed_range(first, count, path=self._index_path)
        return self._compressed_range(self._start(first), count * self.header.frame_bytes)

    @property
    def _is_long(self) -> bool:
        return self.header.num_frames > 1 and self.header.file_bytes - self.header.offset >= _MIN_INDEXED_BYTES

    def _compressed_range(self, start: int, length: int) -> Iterator[memoryview]:
        """Decompressed bytes, from the beginning of the stream; once it is exhausted, the file is validated."""
        position, declared = 0, self.header.file_bytes
        is_verified = self._identity in _verified
        for chunk in self._stream():
            low, high = max(start - position, 0), min(start + length - position, len(chunk))
            position += len(chunk)
            if position > declared:
                raise _wrong_length(position, declared, path=self.path)
            if low < high:
                yield memoryview(chunk)[low:high]
            if is_verified and position >= start + length:
                return
        if position != declared:
            raise _wrong_length(position, declared, path=self.path)
        _remember(self._identity)

    def _indexed_range(self, first: int, count: int, *, path: Path) -> Iterator[memoryview]:
        end = first + count
        try:
            for frame in self._index(path).iter_frames(self._file, first, count):
                yield frame
                first += 1
        except IndexMismatchError:
            # The index is damaged, or the file changed but not its size and time; a full validation tells which.
            path.unlink(missing_ok=True)
            _verified.pop(self._identity, None)
        else:
            return
        yield from self._compressed_range(self._start(first), (end - first) * self.header.frame_bytes)

    def ensure_index(self) -> None:
        """Build the index of a long `.nii.gz` series if a folder for indexes was given and it has none.

        Raises:
            ScanError: If the file is damaged.
            CacheError: If the index cannot be written.
        """
        if self._index_path is not None and self.is_compressed and self._is_long:
            self._index(self._index_path)

    def _index(self, path: Path) -> GzipIndex:
        """The saved index of this file, or a new one, for which the whole file is validated."""
        header = self.header
        index = load_index(path, identity=self._identity, header=header)
        if index is None:
            _verified.pop(self._identity, None)
            frames = _Filler(self._compressed(0, header.num_frames))
            frame, checksums = bytearray(header.frame_bytes), np.empty(header.num_frames, dtype=np.uint32)
            for position in range(header.num_frames):
                frames.fill(frame)
                checksums[position] = inflate.crc32(frame)
            frames.finish()
            index = build_index(self._file, checksums=checksums, header=header)
            index.save(path, identity=self._identity)
        _remember(self._identity)
        return index


def _remember(identity: Identity) -> None:
    _verified[identity] = None
    if len(_verified) > _MAX_VERIFIED:
        _verified.popitem(last=False)


def forget_verified() -> None:
    """Forget which files were validated (for tests and benchmarks)."""
    _verified.clear()


class _Filler:
    """Reads blocks of a given size from a stream of chunks of any size."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def fill(self, target: memoryview | bytearray) -> bool:
        """Fill the memory; False if the stream ends before."""
        position = 0
        while position < len(target):
            if not self._rest:
                self._rest = next(self._pieces, memoryview(b""))
                if not self._rest:
                    return False
            count = min(len(self._rest), len(target) - position)
            target[position : position + count] = self._rest[:count]
            self._rest = self._rest[count:]
            position += count
        return True

    def finish(self) -> None:
        """Let the stream validate the rest of the file."""
        next(self._pieces, None)


@contextmanager
def open_scan(path: str | os.PathLike[str], *, index_folder: Path | None = None) -> Iterator[StoredScan]:
    """Open a `.nii` or `.nii.gz` file, or a pair of `.hdr` and `.img`, and check its header.

    Args:
        path: The file, or either one of a pair.
        index_folder: Folder of access points into long `.nii.gz` series, so that their windows are read fast; an
            index is built on the first use of a file, which needs `indexed_gzip`. None reads from the beginning.

    Raises:
        ScanError: If there is no such regular file, or its header is wrong.
    """
    name = os.fspath(path)
    pair = pair_of(name)
    if pair is None:
        with open_regular_file(name) as file:
            yield StoredScan(file, path=name, index_folder=index_folder)
        return
    header_name, voxels_name = pair
    with open_regular_file(header_name) as header_file, open_regular_file(voxels_name) as file:
        yield StoredScan(file, path=voxels_name, header_file=header_file, header_path=header_name)


def _is_compressed(file: BinaryIO, *, path: str) -> bool:
    name = Path(path).name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise ScanError(
            "not a .nii, .nii.gz or .hdr/.img file: convert it (dcm2niix for DICOM, mri_convert for MGZ)",
            path=path,
            reason=ScanReason.FILE_TYPE,
        )
    is_gzip = file.read(2) == GZIP_MAGIC
    file.seek(0)
    if is_gzip != name.endswith(".gz"):
        message = "is gzip: name it .nii.gz" if is_gzip else "is not gzip: name it .nii, or compress it"
        raise ScanError(message, path=path, reason=ScanReason.GZIP_HEADER)
    return is_gzip


class _Reader:
    """Reads blocks of an uncompressed file, from a given byte."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file = file
        file.seek(start)

    def fill(self, target: memoryview) -> bool:
        """Fill the memory; False if the file ends before."""
        return bool(self._file.readinto(target) == len(target))  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Nothing to do: the size of the file was checked."""


def _take(stream: Iterator[bytes], start: bytes, count: int) -> bytes:
    """Add to `start` from the stream until it has `count` bytes, or the stream ends."""
    parts, size = [start], len(start)
    while size < count and (block := next(stream, b"")):
        parts.append(block)
        size += len(block)
    return b"".join(parts)


def _wrong_length(found: int, declared: int, *, path: str) -> ScanError:
    if found < declared:
        return ScanError(
            f"the file ends early: the header declares {declared} bytes, {found} are there",
            path=path,
            reason=ScanReason.TRUNCATED,
        )
    return ScanError(
        f"the header declares {declared} bytes, but the file is longer: its dimensions or type are wrong",
        path=path,
        reason=ScanReason.TRAILING,
    )
