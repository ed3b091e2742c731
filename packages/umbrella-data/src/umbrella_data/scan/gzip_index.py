"""Saved access points into a long `.nii.gz` series: read a window without decompressing what precedes it.

`indexed_gzip` finds the access points and decompresses from them. An index is written only after the whole file was
validated; it also has the file's identity and a CRC-32 of each frame, which is compared whenever the frame is read.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from umbrella_data.errors import CacheError
from umbrella_data.files.mapped_arrays import Arrays, DamagedArraysError, MappedArrays, write_arrays
from umbrella_data.scan.gzip_stream import inflate

if TYPE_CHECKING:
    from umbrella_data.scan.header import ScanHeader

Identity = tuple[int, int, int, int]
"""Device, inode, size and modification time in ns; an index is valid only for the file that has all four."""

SPACING = 1 << 20
"""Decompressed bytes between access points, at least. A point takes 32 KiB."""

_VERSION = 2
_PIECE_BYTES = 1 << 24
# An index as indexed_gzip exports it (zran.c): magic, version, flags, compressed and decompressed size of the file,
# spacing, window size and number of points; then the points; then the windows of those that have one.
_HEADER = struct.Struct("=5s2B2Q3I")
_POINT = np.dtype([("file_offset", "u8"), ("start", "u8"), ("bits", "u1"), ("has_window", "u1")])
_WINDOW_BYTES = 1 << 15
# The library needs the header of a gzip member (at most 64 KiB and two names) in one read.
_READ_BYTES = 1 << 17


class IndexMismatchError(ValueError):
    """A file that does not match its index."""


@dataclass(frozen=True)
class GzipIndex:
    """Access points into one series.

    Attributes:
        arrays: `points`, the bytes of `_POINT` records; `windows`, uint8, the output before each point; `checksums`,
            uint32 (T,), CRC-32 of each frame as stored.
        header: The series' header.
    """

    arrays: Arrays
    header: ScanHeader

    def iter_frames(self, file: BinaryIO, first: int, count: int) -> Iterator[memoryview]:
        """Read frames; each is compared with its checksum before it is yielded, and overwritten by later ones.

        Raises:
            IndexMismatchError: If the file or its index has changed.
        """
        size, checksums = self.header.frame_bytes, self.arrays["checksums"]
        step = max(_PIECE_BYTES // size, 1)
        piece = np.empty(min(step, count) * size, dtype=np.uint8).data
        start, end = (self.header.offset + frame * size for frame in (first, first + count))
        try:
            source = _open(file)
            source.import_index(fileobj=io.BytesIO(self._points_around(start, end, os.fstat(file.fileno()).st_size)))
            # Many frames at once: each read starts again at an access point.
            for begin in range(first, first + count, step):
                num_frames = min(step, first + count - begin)
                source.seek(self.header.offset + begin * size)
                source.readinto(piece[: num_frames * size])
                for position in range(num_frames):
                    frame = piece[position * size : (position + 1) * size]
                    if inflate.crc32(frame) != checksums[begin + position]:
                        raise ValueError(f"frame {begin + position} does not match its checksum")
                    yield frame
        except (OSError, ValueError) as error:
            raise IndexMismatchError(str(error)) from error

    def _points_around(self, start: int, end: int, file_size: int) -> bytes:
        """The library's index, reduced to what it needs for a range: it would copy all windows otherwise."""
        points = self.arrays["points"].view(_POINT)
        first = int(np.searchsorted(points["start"], start, side="right")) - 1
        chosen = points[first : int(np.searchsorted(points["start"], end)) + 1]
        num_before, num_windows = int(points["has_window"][:first].sum()), int(chosen["has_window"].sum())
        windows = self.arrays["windows"][num_before * _WINDOW_BYTES : (num_before + num_windows) * _WINDOW_BYTES]
        header = _HEADER.pack(b"GZIDX", 1, 0, file_size, self.header.file_bytes, SPACING, _WINDOW_BYTES, len(chosen))
        return header + chosen.tobytes() + windows.tobytes()

    def save(self, path: Path, *, identity: Identity) -> None:
        """Write the index for the file with this identity.

        Raises:
            CacheError: If it cannot be written.
        """
        facts = {"version": _VERSION, "identity": list(identity), "checksum": zlib.crc32(self.arrays["points"].data)}
        try:
            write_arrays(path, self.arrays, facts=facts)
        except OSError as error:
            raise CacheError(
                f"{path}: the gzip index cannot be written ({error.strerror or error}): free space on its disk, or "
                "choose another folder for indexes"
            ) from error


def build_index(file: BinaryIO, *, checksums: np.ndarray, header: ScanHeader) -> GzipIndex:
    """Find the access points of a validated series.

    Args:
        file: The series.
        checksums: uint32 (T,), CRC-32 of each frame as stored.
        header: Its header.

    Raises:
        OSError: If `indexed_gzip` cannot read the file.
    """
    source, exported = _open(file), io.BytesIO()
    source.build_full_index()
    source.export_index(fileobj=exported)
    content = np.frombuffer(exported.getbuffer(), dtype=np.uint8)
    *_, num_points = _HEADER.unpack_from(content.data)
    points, windows = np.split(content[_HEADER.size :], [num_points * _POINT.itemsize])
    return GzipIndex({"points": points, "windows": windows, "checksums": checksums}, header)


def load_index(path: Path, *, identity: Identity, header: ScanHeader) -> GzipIndex | None:
    """Open a saved index; None if there is none, or if it is damaged or belongs to another file."""
    try:
        arrays = MappedArrays(path)
    except (OSError, DamagedArraysError):
        return None
    facts = arrays.facts
    if facts.get("version") != _VERSION or facts.get("identity") != list(identity):
        return None
    # Damaged windows are noticed by the frames' checksums.
    is_whole = zlib.crc32(arrays["points"].data) == facts["checksum"] and len(arrays["checksums"]) == header.num_frames
    return GzipIndex(arrays, header) if is_whole else None


def index_path(folder: Path, file: str, *, identity: Identity) -> Path:
    """Path of the index of a file."""
    key = f"{Path(file).absolute()}\n{identity}"
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    return folder / name[:2] / f"{name}.gzindex"


def check_indexed_gzip() -> None:
    """Check that the library is installed.

    Raises:
        ImportError: With the command that installs it.
    """
    if find_spec("indexed_gzip") is None:
        raise ImportError("a folder for gzip indexes needs indexed_gzip: pip install 'umbrella-data[index]'")


class _FileWithoutDescriptor(io.RawIOBase):
    """Makes `indexed_gzip` use these methods; with a descriptor it moves a shared position and leaks a C stream."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._file.readinto(buffer)  # type: ignore[attr-defined]


def _open(file: BinaryIO) -> Any:
    # Lazy: an extra.
    from indexed_gzip import IndexedGzipFile

    return IndexedGzipFile(
        fileobj=_FileWithoutDescriptor(file),
        auto_build=False,
        spacing=SPACING,
        window_size=_WINDOW_BYTES,
        readbuf_size=_READ_BYTES,
        buffer_size=io.DEFAULT_BUFFER_SIZE,
    )
