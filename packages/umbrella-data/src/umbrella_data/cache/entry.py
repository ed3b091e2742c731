"""One scan in the cache: a file of float16 frames, mapped, each with a checksum."""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod, sqrt
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from umbrella_data.errors import CacheError
from umbrella_data.files.atomic import write_atomically

_MAGIC = b"UMBRVOL1"
_ALIGNMENT = 64
# A frame adds about ten bytes to the header: this is more frames than fit into memory.
_MAX_HEADER_BYTES = 1 << 24
_MAX_REMEMBERED = 1 << 16
# Voxels per chunk when writing: 16 MiB in float32; larger chunks are slower.
_CHUNK_VOXELS = 1 << 22
# The largest magnitude stored: float16 ends at 65504.
_FLOAT16_LIMIT = 6e4
# In a cache that is far too small for its readers, an entry may be removed before it is read.
_MAX_ATTEMPTS = 10
# Path, inode and time of writing: another file under the same name is another entry.
_EntryKey = tuple[str, int, int]
_Result = TypeVar("_Result")


class DamagedEntryError(ValueError):
    """An entry that differs from what was written."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Header of an entry: the values are the stored float16 times `scale` plus `offset`."""

    shape: tuple[int, ...]
    scale: float
    offset: float
    checksums: tuple[int, ...]
    start: int
    key: _EntryKey

    @property
    def frame_bytes(self) -> int:
        return prod(self.shape[1:]) * 2


# Headers read and frames verified by this process, so that a warm cache is read at memory speed. Bounded; the oldest
# are removed first.
_layouts: OrderedDict[_EntryKey, _Layout] = OrderedDict()
_verified: OrderedDict[tuple[_EntryKey, int], None] = OrderedDict()


class CachedFrames:
    """One scan in the cache.

    Args:
        path: The entry.
        restore: Writes the entry again.

    Attributes:
        num_frames: Frames of a series; 1 for a volume.

    Raises:
        DamagedEntryError: If the file is not an entry.
        FileNotFoundError: If there is none.
    """

    def __init__(self, path: Path, *, restore: Callable[[], None]) -> None:
        self._path = path
        self._restore = restore
        self._layout = _read_layout(path)
        self.num_frames = self._layout.shape[0]

    @property
    def is_scaled(self) -> bool:
        """Whether the stored numbers differ from the values."""
        return self._layout.scale != 1.0 or self._layout.offset != 0.0

    def read(self, first: int, count: int) -> torch.Tensor:
        """Frames (count, C, X, Y, Z) float32, checked; a damaged or lost entry is written again from the scan.

        Args:
            first: The first frame.
            count: Number of frames.

        Raises:
            CacheError: If it cannot be written again, or is lost repeatedly.
        """
        stored = self._read(first, count)
        values = stored.float()
        layout = self._layout
        return values.mul_(layout.scale).add_(layout.offset) if self.is_scaled else values

    def read_stored(self) -> torch.Tensor:
        """All frames (T, C, X, Y, Z) float16 as stored, mapped from the file and checked as in `read`."""
        return self._read(0, self.num_frames)

    def _read(self, first: int, count: int) -> torch.Tensor:
        return retry(lambda: self._read_once(first, count), restore=self._restore, path=self._path)

    def _read_once(self, first: int, count: int) -> torch.Tensor:
        # A plain descriptor: a Python file object would take as long as all other steps except reading.
        file = os.open(self._path, os.O_RDONLY)
        try:
            status = os.fstat(file)
            if (status.st_ino, status.st_mtime_ns) != self._layout.key[1:]:
                self._layout = _read_layout(self._path)  # written again since it was opened
            layout = self._layout
            begin, num_bytes = layout.start + first * layout.frame_bytes, count * layout.frame_bytes
            if status.st_size < begin + num_bytes:
                raise DamagedEntryError(f"{self._path} is truncated")
            # Private and never written to: the pages are those of the file, and torch may treat the memory as its own.
            mapped = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
        finally:
            os.close(file)
        stored = torch.frombuffer(mapped, dtype=torch.float16, count=num_bytes // 2, offset=begin)
        stored = stored.reshape(count, *layout.shape[1:])
        for number, frame in enumerate(stored.numpy(), start=first):
            _verify(frame, number, layout=layout)
        return stored


def retry(read: Callable[[], _Result], *, restore: Callable[[], None], path: Path) -> _Result:
    """Read from an entry; if it is lost or damaged, write it again and retry, a limited number of times.

    Args:
        read: Reads from the entry.
        restore: Writes the entry again.
        path: The entry.

    Raises:
        CacheError: If it is lost each time, or cannot be read or written.
    """
    try:
        for _ in range(_MAX_ATTEMPTS):
            try:
                return read()
            except (DamagedEntryError, FileNotFoundError):
                restore()
        return read()
    except (DamagedEntryError, FileNotFoundError) as error:
        raise CacheError(
            f"{path}: written {_MAX_ATTEMPTS} times, and lost or damaged each time before it was read ({error}): "
            "raise the size limit of the cache, or use another disk"
        ) from error
    except OSError as error:
        raise unusable(path, error) from error


def unusable(path: Path, error: OSError) -> CacheError:
    """The error for a file of the cache that cannot be read or written."""
    return CacheError(
        f"{path}: the cache cannot be read or written ({error.strerror or error}): free space on its disk, or choose "
        "a folder that is writable"
    )


def write_entry(path: Path, frames: np.ndarray) -> int:
    """Write frames (T, C, X, Y, Z) float32 as float16, a few at a time; returns the size in bytes."""
    scale, offset = _scaling(frames)

    def stored() -> Iterator[np.ndarray]:
        for chunk in _chunks(frames):
            yield np.ascontiguousarray(((chunk - np.float32(offset)) / np.float32(scale)).astype(np.float16))

    # Checksums precede the frames; a long series is converted twice rather than kept in memory.
    kept = list(stored()) if len(frames) == 1 or frames.size <= _CHUNK_VOXELS else None
    header = json.dumps(
        {
            "shape": frames.shape,
            "scale": scale,
            "offset": offset,
            "checksums": [zlib.crc32(frame.data) for chunk in kept or stored() for frame in chunk],
        }
    ).encode()
    prefix = _MAGIC + struct.pack("<II", len(header), zlib.crc32(header)) + header
    prefix += b"\0" * (-len(prefix) % _ALIGNMENT)
    write_atomically(path, chain([prefix], (chunk.data for chunk in kept or stored())))
    return len(prefix) + frames.size * 2


def _chunks(frames: np.ndarray) -> Iterator[np.ndarray]:
    """Frames (T, C, X, Y, Z) in chunks of at least one."""
    count = max(1, _CHUNK_VOXELS // prod(frames.shape[1:]))
    return (frames[first : first + count] for first in range(0, len(frames), count))


def _scaling(frames: np.ndarray) -> tuple[float, float]:
    """Scale and offset with which frames (T, C, X, Y, Z) are stored."""
    low, high = float(frames.min()), float(frames.max())
    scale, offset = 1.0, 0.0
    if frames.shape[0] > 1:
        # A series is stored before normalisation: centred, float16 resolves its fluctuation best.
        offset, std = _mean_and_std(frames)
        scale = std or 1.0
    scale = max(scale, max(abs(low - offset), abs(high - offset)) / _FLOAT16_LIMIT)
    if offset != 0.0 and low <= 0.0 <= high:
        # Shift by less than a step, so that 0, the value outside of a mask, is read as exactly 0.
        offset = -float(np.float32(np.float16(-offset / scale)) * np.float32(scale))
    return scale, offset


def _mean_and_std(frames: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation in float64; numpy's if there is one chunk."""
    seen, mean, variance = 0, 0.0, 0.0
    for chunk in _chunks(frames):
        seen += chunk.size
        share = chunk.size / seen
        step = float(chunk.mean(dtype=np.float64)) - mean
        variance += (float(chunk.var(dtype=np.float64)) - variance) * share + step * step * share * (1 - share)
        mean += step * share
    return mean, sqrt(variance)


def _read_layout(path: Path) -> _Layout:
    status = path.stat()
    key = (str(path), status.st_ino, status.st_mtime_ns)
    if (known := _layouts.get(key)) is not None:
        return known
    with path.open("rb") as file:
        start = file.read(16)
        if len(start) != 16 or start[:8] != _MAGIC:
            raise DamagedEntryError(f"{path} is not a cache entry")
        length, checksum = struct.unpack("<II", start[8:])
        size = os.fstat(file.fileno()).st_size
        # The checksum covers the header only: with a damaged length, a whole series would be read as header.
        if length > min(size, _MAX_HEADER_BYTES):
            raise DamagedEntryError(f"{path} has a damaged header")
        header = file.read(length)
    if len(header) != length or zlib.crc32(header) != checksum:
        raise DamagedEntryError(f"{path} has a damaged header")
    facts = json.loads(header)
    begin = 16 + length
    layout = _Layout(
        shape=tuple(facts["shape"]),
        scale=facts["scale"],
        offset=facts["offset"],
        checksums=tuple(facts["checksums"]),
        start=begin + -begin % _ALIGNMENT,
        key=key,
    )
    if size != layout.start + layout.shape[0] * layout.frame_bytes:
        raise DamagedEntryError(f"{path} has {size} bytes, which is not what its header declares")
    _layouts[key] = layout
    if len(_layouts) > _MAX_REMEMBERED:
        _layouts.popitem(last=False)
    return layout


def _verify(stored: np.ndarray, frame: int, *, layout: _Layout) -> None:
    key = (layout.key, frame)
    if key in _verified:
        return
    if zlib.crc32(stored.data) != layout.checksums[frame]:
        raise DamagedEntryError(f"frame {frame} of {layout.key[0]} does not match its checksum")
    _verified[key] = None
    if len(_verified) > _MAX_REMEMBERED:
        _verified.popitem(last=False)
