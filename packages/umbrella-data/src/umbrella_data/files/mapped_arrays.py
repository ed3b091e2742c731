"""Named arrays in one memory-mapped file, written atomically and shared by all processes."""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umbrella_data.files.atomic import write_atomically

_MAGIC = b"UMBRARR1"
_ALIGNMENT = 64

Arrays = Mapping[str, NDArray[Any]]


class DamagedArraysError(ValueError):
    """A file that differs from what `write_arrays` wrote."""


class MappedArrays(Mapping[str, NDArray[Any]]):
    """The arrays of one file, read-only. It is pickled as a path: other processes map the same pages.

    Args:
        path: A file of `write_arrays`.

    Attributes:
        facts: Metadata that was written with the arrays.

    Raises:
        DamagedArraysError: If the file has other content, or was truncated.
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header, begin = _read_header(path)
        self.facts: dict[str, Any] = header["facts"]
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != begin + header["size"]:
                raise DamagedArraysError(f"{path} has {size} bytes instead of {begin + header['size']}")
            # An empty file cannot be mapped; the header is always there.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._arrays = {
            name: np.ndarray((length,), dtype=np.dtype(kind), buffer=mapped, offset=begin + offset)
            for name, (kind, length, offset) in header["arrays"].items()
        }

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.facts)


def write_arrays(path: Path, arrays: Arrays, *, facts: Mapping[str, Any]) -> None:
    """Write one-dimensional arrays, with metadata in JSON."""
    table: dict[str, tuple[str, int, int]] = {}
    parts: list[bytes] = []
    position = 0
    for name, array in arrays.items():
        content = np.ascontiguousarray(array)
        table[name] = (content.dtype.str, len(content), position)
        padding = -content.nbytes % _ALIGNMENT
        parts += [content.tobytes(), b"\0" * padding]
        position += content.nbytes + padding
    header = json.dumps({"arrays": table, "size": position, "facts": dict(facts)}).encode()
    prefix = _MAGIC + struct.pack("<II", len(header), zlib.crc32(header)) + header
    write_atomically(path, [prefix, b"\0" * (-len(prefix) % _ALIGNMENT), *parts])


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        start = file.read(16)
        if len(start) != 16 or start[:8] != _MAGIC:
            raise DamagedArraysError(f"{path} is not a file of arrays")
        length, checksum = struct.unpack("<II", start[8:])
        text = file.read(length)
    if len(text) != length or zlib.crc32(text) != checksum:
        raise DamagedArraysError(f"{path} has a damaged header")
    end = 16 + length
    return json.loads(text), end + -end % _ALIGNMENT


def _reopen(path: Path, facts: dict[str, Any]) -> MappedArrays:
    arrays = MappedArrays(path)
    if arrays.facts != facts:
        raise DamagedArraysError(f"{path} was overwritten while a process used it; start the run again")
    return arrays
