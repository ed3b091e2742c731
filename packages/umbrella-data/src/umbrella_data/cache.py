"""Preprocessed volumes on disk: float16, one mapped file a scan, keyed by the content of its files and the pipeline."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from umbrella_data.errors import ScanError, ScanReason

_MAGIC = b"UMBRVOL1"
_ALIGNMENT = 64
_MAX_REMEMBERED = 1 << 16
# The largest magnitude stored: float16 ends at 65504.
_FLOAT16_LIMIT = 6e4


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What an entry's header says: the stored float16 times `scale` plus `offset` are the values."""

    shape: tuple[int, ...]
    scale: float
    offset: float
    checksums: tuple[int, ...]
    start: int

    @property
    def frame_bytes(self) -> int:
        return int(np.prod(self.shape[1:])) * 2


class DamagedEntryError(ValueError):
    """An entry that does not hold what was written."""


class CachedFrames:
    """One scan in the cache.

    Attributes:
        num_frames: Frames of a series; 1 for a volume.
    """

    def __init__(self, path: Path, *, restore: Callable[[], None]) -> None:
        self._path = path
        self._restore = restore
        self._layout = _read_layout(path)
        self.num_frames = self._layout.shape[0]

    def read(self, first: int, count: int) -> torch.Tensor:
        """Frames (count, C, X, Y, Z) float32, checked; a damaged entry is made again from the scan.

        Args:
            first: The first frame.
            count: Number of frames.
        """
        try:
            return self._read(first, count)
        except DamagedEntryError:
            self._restore()
            self._layout = _read_layout(self._path)
            return self._read(first, count)

    def _read(self, first: int, count: int) -> torch.Tensor:
        layout = self._layout
        stored = np.memmap(self._path, dtype=np.uint8, mode="r")
        frames = []
        for frame in range(first, first + count):
            begin = layout.start + frame * layout.frame_bytes
            content = stored[begin : begin + layout.frame_bytes]
            _verify(content, layout.checksums[frame], key=(str(self._path), frame))
            frames.append(content)
        values = np.concatenate(frames).view(np.float16).reshape(count, *layout.shape[1:]).astype(np.float32)
        if layout.scale != 1.0 or layout.offset != 0.0:
            values = values * np.float32(layout.scale) + np.float32(layout.offset)
        return torch.from_numpy(values)


class VolumeCache:
    """A folder of preprocessed scans. Any number of processes may read and write it at the same time.

    Args:
        directory: Made where it does not exist.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def fetch(self, sources: Sequence[Path], *, fingerprint: str, make: Callable[[], torch.Tensor]) -> CachedFrames:
        """Open the entry of a scan, which is made first where it is missing or damaged.

        Args:
            sources: Every file that decides the voxels.
            fingerprint: The pipeline's.
            make: Computes the frames (T, C, X, Y, Z) float32.

        Raises:
            ScanError: Where a source is missing, or from `make`.
        """
        key = hashlib.sha256("\n".join([fingerprint, *map(self._content_hash, sources)]).encode()).hexdigest()
        path = self.directory / "volumes" / key[:2] / f"{key}.f16"

        def restore() -> None:
            _write_entry(path, make().numpy())

        if not path.exists():
            restore()
        try:
            return CachedFrames(path, restore=restore)
        except DamagedEntryError:
            restore()
            return CachedFrames(path, restore=restore)

    def _content_hash(self, source: Path) -> str:
        """The hash of a file's content, remembered beside the cache by the file's path, size, mtime and inode."""
        try:
            status = source.stat()
        except OSError as error:
            raise ScanError(f"cannot be opened: {error}", path=source, reason=ScanReason.MISSING) from error
        identity = f"{source.absolute()}\n{status.st_size}\n{status.st_mtime_ns}\n{status.st_ino}\n{status.st_dev}"
        name = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
        memory = self.directory / "content" / name[:2] / name
        try:
            remembered = memory.read_text()
        except FileNotFoundError:
            remembered = ""
        if len(remembered) == 64:
            return remembered
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        _write_atomically(memory, [digest.encode()])
        return digest


def _write_entry(path: Path, frames: np.ndarray) -> None:
    """Write frames (T, C, X, Y, Z) float32 as float16."""
    low, high = float(frames.min()), float(frames.max())
    scale, offset = 1.0, 0.0
    if frames.shape[0] > 1:
        # A series waits unnormalised for its window: centred, float16 resolves its fluctuation best.
        offset = float(frames.mean(dtype=np.float64))
        scale = float(frames.std(dtype=np.float64)) or 1.0
    scale = max(scale, max(abs(low - offset), abs(high - offset)) / _FLOAT16_LIMIT)
    stored = ((frames - np.float32(offset)) / np.float32(scale)).astype(np.float16)
    header = json.dumps(
        {
            "shape": frames.shape,
            "scale": scale,
            "offset": offset,
            "checksums": [zlib.crc32(np.ascontiguousarray(frame).data) for frame in stored],
        }
    ).encode()
    prefix = _MAGIC + struct.pack("<II", len(header), zlib.crc32(header)) + header
    padding = b"\0" * (-len(prefix) % _ALIGNMENT)
    _write_atomically(path, [prefix, padding, stored.tobytes()])


def _read_layout(path: Path) -> _Layout:
    with path.open("rb") as file:
        start = file.read(16)
        if len(start) != 16 or start[:8] != _MAGIC:
            raise DamagedEntryError(f"{path} is no cache entry")
        length, checksum = struct.unpack("<II", start[8:])
        header = file.read(length)
        size = os.fstat(file.fileno()).st_size
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
    )
    if size != layout.start + layout.shape[0] * layout.frame_bytes:
        raise DamagedEntryError(f"{path} has {size} bytes and should have more or fewer")
    return layout


# Frames whose checksum was verified by this process, so that a warm cache is read at the speed of memory.
_verified: OrderedDict[tuple[str, int], int] = OrderedDict()


def _verify(content: np.ndarray, checksum: int, *, key: tuple[str, int]) -> None:
    if _verified.get(key) == checksum:
        return
    if zlib.crc32(content.data) != checksum:
        raise DamagedEntryError(f"frame {key[1]} of {key[0]} does not match its checksum")
    _verified[key] = checksum
    if len(_verified) > _MAX_REMEMBERED:
        _verified.popitem(last=False)


def _write_atomically(path: Path, parts: Sequence[bytes]) -> None:
    """Write under a name of our own, then rename: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
