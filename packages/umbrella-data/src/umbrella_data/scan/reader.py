"""Open a scan's file, validate it, and read its frames as stored: `.nii` by seeking, `.nii.gz` by streaming.

Of a pair, the header is read from `.hdr` or `.hdr.gz`, the voxels from `.img` or `.img.gz`.
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
from umbrella_data.files.look_alikes import START_BYTES, describe_look_alike
from umbrella_data.files.paths import open_regular_file, pair_of
from umbrella_data.scan.gzip_index import GzipIndex, Identity, IndexMismatchError, build_index, index_path, load_index
from umbrella_data.scan.gzip_stream import (
    CHUNK_BYTES,
    GZIP_MAGIC,
    MAX_DEFLATE_RATIO,
    Filler,
    inflate,
    is_gzip_scan,
    iter_gzip,
)
from umbrella_data.scan.header import MAX_OFFSET, ScanHeader, check_extensions, header_ends, header_length, parse_header

MAX_PLAUSIBLE_RATIO = 200
"""Largest accepted compression ratio: even a masked map with little brain stays below 100."""

_ALWAYS_ALLOWED_BYTES = 1 << 24
# A header that declares this much and far more than the file can hold was not left by an interrupted copy.
_BOMB_BYTES = 1 << 30
_MAX_VERIFIED = 1 << 16
_HEADER_CHUNK_BYTES = 1 << 13
# Slices are yielded in blocks that fit into the processor's cache.
_SLICE_BLOCK_BYTES = 1 << 19
# Below this, decompressing from the start is as fast as an index.
_MIN_INDEXED_BYTES = 1 << 24
# Files whose gzip stream was checked to the last byte, by device, inode, size and mtime; bounded, oldest removed first.
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
        header: tuple[BinaryIO, str] | None = None,
    ) -> None:
        self.path = path
        self._file = file
        status = os.fstat(file.fileno())
        self._size = status.st_size
        self._identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        self._index_path = None if index_folder is None else index_path(index_folder, path, identity=self._identity)
        self._is_pair = header is not None
        self.is_compressed = is_gzip_scan(file, path=path)
        # Small chunks: voxels are not needed yet.
        if header is None:
            self.header = _read_header(self._stream(chunk_bytes=_HEADER_CHUNK_BYTES), path=path)
        else:
            header_file, name = header
            is_compressed = is_gzip_scan(header_file, path=name)
            chunks = _iter_file(header_file, path=name, is_compressed=is_compressed, chunk_bytes=_HEADER_CHUNK_BYTES)
            self.header = _read_separate_header(chunks, path=name)
        self._check_size()

    def iter_slices(self, first: int, count: int) -> Iterator[np.ndarray]:
        """Read frames slice by slice, in little memory; the file is validated once the iterator is exhausted.

        Args:
            first: The first frame; 0 for a volume.
            count: Number of frames; 1 for a volume.

        Yields:
            (n, Y, X) along the stored axes, in the stored type: neighbouring slices of one frame. Each block
            overwrites the one before.

        Raises:
            ScanError: If the file ends early, is too long or is damaged.
        """
        header = self.header
        x, y, z = header.shape[:3]
        slice_bytes = x * y * header.dtype.itemsize
        size = max(_SLICE_BLOCK_BYTES // slice_bytes, 1)
        buffer = bytearray(min(size, z) * slice_bytes)
        source = (
            Filler(self._compressed(first, count)) if self.is_compressed else _Reader(self._file, self._start(first))
        )
        for _ in range(count):
            for position in range(0, z, size):
                num_slices = min(size, z - position)
                view = memoryview(buffer)[: num_slices * slice_bytes]
                if not source.fill(view):
                    raise self._error(ScanReason.TRUNCATED, "the file ends early: it was truncated while it was read")
                yield np.frombuffer(view, dtype=header.dtype).reshape(num_slices, y, x)
        source.finish()

    def _stream(self, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        return _iter_file(self._file, path=self.path, is_compressed=self.is_compressed, chunk_bytes=chunk_bytes)

    def _check_size(self) -> None:
        """Reject a declared size that does not fit the file's, before memory of that size is allocated."""
        declared, stored = self.header.file_bytes, self._size
        if declared > max(stored * MAX_DEFLATE_RATIO, _BOMB_BYTES):
            raise self._error(
                ScanReason.TOO_LARGE,
                f"the header declares {declared} bytes, far more than a file of {stored} bytes can hold: "
                "its dimensions are wrong",
            )
        if self.is_compressed:
            if declared > stored * MAX_DEFLATE_RATIO:
                raise self._error(
                    ScanReason.TRUNCATED,
                    f"the header declares {declared} bytes, more than {stored} bytes of gzip can expand to: "
                    "the file was truncated or its header is damaged",
                )
            if declared > max(stored * MAX_PLAUSIBLE_RATIO, _ALWAYS_ALLOWED_BYTES):
                text = f"{stored} bytes of gzip declare {declared} bytes of voxels: no scan compresses that well"
                raise self._error(ScanReason.TOO_LARGE, text)
        elif declared != stored:
            raise self._wrong_size(stored)

    def _wrong_size(self, found: int) -> ScanError:
        """The error for a file that does not have the declared size."""
        declared = self.header.file_bytes
        if self._is_pair and not self.is_compressed and (problem := self._foreign_content()) is not None:
            return problem
        if found < declared:
            text = f"the file ends early: the header declares {declared} bytes, the file has {found}"
            return self._error(ScanReason.TRUNCATED, text)
        text = f"the header declares {declared} bytes, but the file is longer: its dimensions or type are wrong"
        return self._error(ScanReason.TRAILING, text)

    def _error(self, reason: ScanReason, text: str) -> ScanError:
        return ScanError(text, path=self.path, reason=reason)

    def _foreign_content(self) -> ScanError | None:
        """The error for voxels of a pair that are another kind of file: only a wrong size tells them from voxels."""
        self._file.seek(0)
        start = self._file.read(START_BYTES)
        if start.startswith(GZIP_MAGIC):
            text = "is gzip: rename it to .img.gz, and compress its .hdr file too"
            return self._error(ScanReason.GZIP_HEADER, text)
        look_alike = describe_look_alike(start) if start else None
        return None if look_alike is None else self._error(ScanReason.FILE_TYPE, look_alike)

    def _start(self, frame: int) -> int:
        """Number of decompressed bytes before a frame."""
        return self.header.offset + frame * self.header.frame_bytes

    def _compressed(self, first: int, count: int) -> Iterator[memoryview]:
        """The bytes of frames; the file is validated once the iterator is exhausted."""
        if self._index_path is not None and self._is_long and count < self.header.num_frames:
            return self._indexed_range(first, count, path=self._index_path)
        return self._compressed_range(self._start(first), count * self.header.frame_bytes)

    @property
    def _is_long(self) -> bool:
        return self.header.num_frames > 1 and self.header.file_bytes - self.header.offset >= _MIN_INDEXED_BYTES

    def _compressed_range(self, start: int, length: int) -> Iterator[memoryview]:
        """Some of the decompressed bytes, without an index; the file is validated once the iterator is exhausted."""
        position, declared = 0, self.header.file_bytes
        is_verified = self._identity in _verified
        for chunk in self._stream():
            low, high = max(start - position, 0), min(start + length - position, len(chunk))
            position += len(chunk)
            if position > declared:
                raise self._wrong_size(position)
            if low < high:
                yield memoryview(chunk)[low:high]
            if is_verified and position >= start + length:
                return
        if position != declared:
            raise self._wrong_size(position)
        _remember(self._identity)

    def _indexed_range(self, first: int, count: int, *, path: Path) -> Iterator[memoryview]:
        end = first + count
        try:
            for frame in self._index(path).iter_frames(self._file, first, count):
                yield frame
                first += 1
        except IndexMismatchError:
            # Either the index is damaged, or the file changed and its size and time did not: validate the file.
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
            frames = Filler(self._compressed(0, header.num_frames))
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
    """Validate each compressed file again on its next use, as in a new process."""
    _verified.clear()


@contextmanager
def open_scan(path: str | os.PathLike[str], *, index_folder: Path | None = None) -> Iterator[StoredScan]:
    """Open a `.nii` file, or a pair of `.hdr` and `.img`, plain or compressed (`.gz`), and check its header.

    Args:
        path: The file, or either file of a pair.
        index_folder: Folder of gzip indexes of long compressed series, for fast reading of windows; the index of a file
            is built on its first use, which needs `indexed_gzip`. None decompresses from the beginning.

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
        yield StoredScan(file, path=voxels_name, index_folder=index_folder, header=(header_file, header_name))


def _read_header(stream: Iterator[bytes], *, path: str) -> ScanHeader:
    """Read the header of a decompressed `.nii` file; no more of the stream is read than needed."""
    start = _take(stream, b"", START_BYTES)
    length = header_length(start, path=path)
    start = _take(stream, start, length + 4)
    if len(start) < length + 4:
        raise header_ends(len(start), path=path)
    header = parse_header(start[:length], path=path)
    if start[length] != 0:
        check_extensions(_take(stream, start, header.offset)[length + 4 : header.offset], path=path)
    return header


def _read_separate_header(stream: Iterator[bytes], *, path: str) -> ScanHeader:
    """Read the decompressed header file of a pair, which contains a header and extensions only."""
    content = _take(stream, b"", MAX_OFFSET + 1)
    length = header_length(content, path=path)
    if len(content) < length:
        raise header_ends(len(content), path=path)
    header = parse_header(content[:length], path=path, is_pair=True)
    flag, extensions = content[length : length + 4], content[length + 4 :]
    if 0 < len(flag) < 4:
        raise header_ends(len(content), path=path)
    if len(content) > MAX_OFFSET or (extensions and flag[0] == 0):
        raise ScanError(
            f"the file is longer than {length} bytes of header and the 4 that declare no extension",
            path=path,
            reason=ScanReason.TRAILING,
        )
    check_extensions(extensions, path=path)
    return header


def _take(stream: Iterator[bytes], start: bytes, count: int) -> bytes:
    """Add to `start` from the stream until it has `count` bytes, or the stream ends."""
    parts, size = [start], len(start)
    while size < count and (block := next(stream, b"")):
        parts.append(block)
        size += len(block)
    return b"".join(parts)


def _iter_file(file: BinaryIO, *, path: str, is_compressed: bool, chunk_bytes: int) -> Iterator[bytes]:
    """The decompressed bytes of a file."""
    file.seek(0)
    if is_compressed:
        yield from iter_gzip(file, path=path, chunk_bytes=chunk_bytes)
    else:
        while block := file.read(1 << 16):
            yield block


class _Reader:
    """Reads an uncompressed file, from a given byte."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file = file
        file.seek(start)

    def fill(self, target: memoryview) -> bool:
        """Fill the memory; False if the file ends before."""
        return bool(self._file.readinto(target) == len(target))  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Do nothing: the size of the file is checked already."""
