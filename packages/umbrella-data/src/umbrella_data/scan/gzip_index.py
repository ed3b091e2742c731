"""Access points into a gzip file, saved: a window of a long series is read without inflating what comes before it.

An access point is the start of a deflate block: where its first bit stands, how many decompressed bytes come before
it, and the 32 KiB of output that its matches may look back to. The piece from each point to the next has a checksum,
so a window read through an index is proven as far as it goes; the whole file was proven when the index was built.

The index is our own, and not indexed_gzip's, for two reasons: what is read, and how fast, does not depend on whether
that library is installed; and pieces are inflated by ISA-L, two to three times faster than by the zlib inside of it.
`umbrella_data.scan.gzip_index_builder` makes one.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from umbrella_data.files.mapped_arrays import DamagedArraysError, MappedArrays, write_arrays
from umbrella_data.scan.gzip_stream import inflate

WINDOW_BYTES = 1 << 15
"""How far a deflate match looks back (RFC 1951)."""

Identity = tuple[int, int, int, int]
"""Device, inode, size and mtime in ns: what a file is remembered by."""

_VERSION = 1
# Pieces larger than this are not worth an index; they are also what is held in memory at once.
_MAX_PIECE_BYTES = 1 << 25


class DamagedIndexError(ValueError):
    """An index that does not fit its file."""


class GzipIndex:
    """Access points of one gzip file.

    Args:
        arrays: `bits` int64, where each block starts in the file; `starts` int64, decompressed bytes before it, and
            as a last entry all of them; `checksums` uint32, CRC-32 of each piece; `window_ends` int64 into `windows`
            uint8, the output that comes before each point.
    """

    def __init__(self, arrays: dict[str, np.ndarray] | MappedArrays) -> None:
        self._arrays = arrays
        self._bits, self._starts = arrays["bits"], arrays["starts"]

    def __len__(self) -> int:
        return len(self._bits)

    @property
    def num_bytes(self) -> int:
        """Decompressed bytes of the file."""
        return int(self._starts[-1])

    @property
    def is_useful(self) -> bool:
        """Whether the points lie close enough to each other; a stream without dynamic blocks has none."""
        return len(self) > 1 and int(np.diff(self._starts).max()) <= _MAX_PIECE_BYTES

    def iter_range(self, file: BinaryIO, start: int, length: int) -> Iterator[memoryview]:
        """The decompressed bytes from `start` on, piece by piece, each one checked before it is given.

        Raises:
            DamagedIndexError: Where a piece is not what it was.
        """
        piece = int(np.searchsorted(self._starts[:-1], start, side="right")) - 1
        end = start + length
        while piece < len(self) and self._starts[piece] < end:
            begin = int(self._starts[piece])
            content = self._inflate(file, piece)
            if content:
                yield memoryview(content)[max(start - begin, 0) : end - begin]
            piece += 1

    def _inflate(self, file: BinaryIO, piece: int) -> bytes:
        size = int(self._starts[piece + 1] - self._starts[piece])
        if not size:
            return b""
        first, shift = divmod(int(self._bits[piece]), 8)
        last = -(-int(self._bits[piece + 1]) // 8) if piece + 1 < len(self) else os.fstat(file.fileno()).st_size
        ends = self._arrays["window_ends"]
        window = self._arrays["windows"][int(ends[piece - 1]) if piece else 0 : int(ends[piece])].tobytes()
        block = aligned(os.pread(file.fileno(), last - first, first), shift)
        decompressor = inflate.decompressobj(-15, zdict=window) if window else inflate.decompressobj(-15)
        parts: list[bytes] = []
        try:
            while size and block and not decompressor.eof:
                parts.append(decompressor.decompress(block, size))
                size -= len(parts[-1])
                block = decompressor.unconsumed_tail
        except (zlib.error, inflate.error) as error:
            raise DamagedIndexError(f"access point {piece} does not inflate: {error}") from error
        content = parts[0] if len(parts) == 1 else b"".join(parts)
        if size or inflate.crc32(content) != int(self._arrays["checksums"][piece]):
            raise DamagedIndexError(f"the piece behind access point {piece} does not match its checksum")
        return content

    def save(self, path: Path, *, identity: Identity) -> None:
        """Write the index for a file of this identity."""
        write_arrays(path, dict(self._arrays), facts={"version": _VERSION, "identity": list(identity)})


def aligned(block: bytes, shift: int) -> bytes:
    """A raw deflate stream of which the first `shift` bits (0 to 7) belong to something else, made readable.

    Empty blocks that end at just this bit take the place of those bits. (To move the stream to a whole byte instead
    would break stored blocks: they skip to the next whole byte.)
    """
    if not shift:
        return block
    prefix, used = _PREFIXES[shift]
    return prefix[:-1] + bytes([prefix[-1] | block[0] >> used << used]) + block[1:]


def _empty_blocks(shift: int) -> tuple[bytes, int]:
    """Empty deflate blocks (RFC 1951) whose number of bits leaves `shift` when divided by 8."""
    bits = ""
    if shift % 2:
        # Dynamic: not the last, 257 literals and lengths, 2 distances, 18 code lengths of which 18 and 1 are in use.
        lengths = {2: "100", 17: "100"}
        bits += "0" + "01" + "00000" + "10000" + "0111" + "".join(lengths.get(place, "000") for place in range(18))
        # 138 and 118 zeros; one bit for the end of the block and for each distance; the end of the block.
        bits += "1" + "1111111" + "1" + "1101011" + "0" + "0" + "0" + "0"
    while len(bits) % 8 != shift:
        # Fixed: not the last, end of the block.
        bits += "0" + "10" + "0000000"
    return int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little"), shift


_PREFIXES = [(b"", 0), *map(_empty_blocks, range(1, 8))]


def index_path(folder: Path, file: str, *, identity: Identity) -> Path:
    """Where the index of a file is kept."""
    key = f"{Path(file).absolute()}\n{identity}"
    name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    return folder / name[:2] / f"{name}.gzindex"


def load_index(path: Path, *, identity: Identity) -> GzipIndex | None:
    """Open a saved index; None where there is none, or none that fits."""
    try:
        arrays = MappedArrays(path)
    except (OSError, DamagedArraysError):
        return None
    names = {"bits", "starts", "checksums", "window_ends", "windows"}
    if arrays.facts.get("version") != _VERSION or arrays.facts.get("identity") != list(identity):
        return None
    if not names <= set(arrays) or len(arrays["starts"]) != len(arrays["bits"]) + 1:
        return None
    return GzipIndex(arrays)
