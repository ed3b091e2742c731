"""Finds access points in a gzip file, and checks all of it on the way.

Python's zlib does not say where deflate blocks begin. Two things tell: the header of a dynamic block is some 60 bytes
long, and while it is read nothing is decompressed; any other 16 bytes give output. Where the output pauses, a block
begins within a few bytes, after exactly the output so far. Each bit there is tried as its first one, and the one from
which the same output follows is taken. A wrong guess cannot pass: it would have to inflate to the same bytes.
"""

from __future__ import annotations

import zlib
from typing import BinaryIO

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.gzip_index import WINDOW_BYTES, GzipIndex, aligned
from umbrella_data.scan.gzip_stream import CHUNK_BYTES, GzipSource, check_trailer, inflate, skip_member_header

SPACING = 1 << 21
"""Decompressed bytes from point to point, at least. A point costs 32 KiB."""

_PIECE_BYTES = 8
_QUIET_PIECES = 2
# A match of the last symbol, and the code that ends the block, may follow the last byte that gave output.
_CANDIDATE_BYTES = _PIECE_BYTES + 3
_LOOK_AHEAD_BYTES = 1 << 12
_MIN_VERIFIED_BYTES = 256
_SEARCH_BYTES = 1 << 16
_DYNAMIC_BLOCK = 2


def build_index(file: BinaryIO, *, path: str, spacing: int = SPACING) -> GzipIndex:
    """Read a gzip file to its end.

    Args:
        file: Opened at its first byte.
        path: The file's name for errors.
        spacing: Decompressed bytes from point to point, at least.

    Raises:
        ScanError: As `umbrella_data.scan.gzip_stream.iter_gzip`.
    """
    builder = _Builder(file, path=path, spacing=spacing)
    builder.read_all()
    return builder.index()


class _Builder:
    def __init__(self, file: BinaryIO, *, path: str, spacing: int) -> None:
        self._source = GzipSource(file, path=path)
        self._path = path
        self._spacing = spacing
        self._bits: list[int] = []
        self._starts: list[int] = []
        self._checksums: list[int] = []
        self._windows: list[bytes] = []
        self._position = 0
        self._tail = b""
        self._piece_checksum = self._member_checksum = self._member_size = 0
        # Where to look for the next point, in decompressed bytes.
        self._next_search = 0

    def index(self) -> GzipIndex:
        sizes = [len(window) for window in self._windows]
        return GzipIndex(
            {
                "bits": np.array(self._bits, dtype=np.int64),
                "starts": np.array([*self._starts, self._position], dtype=np.int64),
                "checksums": np.array([*self._checksums, self._piece_checksum], dtype=np.uint32),
                "window_ends": np.cumsum(sizes, dtype=np.int64),
                "windows": np.frombuffer(b"".join(self._windows), dtype=np.uint8),
            }
        )

    def read_all(self) -> None:
        skip_member_header(self._source, path=self._path)
        while True:
            self._read_member()
            if self._source.at_end():
                return
            if self._source.peek() != b"\x1f":
                raise ScanError(
                    "bytes that are not gzip follow the end of the gzip stream",
                    path=self._path,
                    reason=ScanReason.GZIP_TRAILING,
                )
            skip_member_header(self._source, path=self._path)

    def _read_member(self) -> None:
        self._tail = b""
        self._member_checksum = self._member_size = 0
        self._open_point(self._source.position * 8)
        decompressor = zlib.decompressobj(-15)
        block = b""
        while not decompressor.eof:
            block = block or self._source.block()
            if not block:
                raise ScanError(
                    f"the gzip stream ends early, after {self._position} decompressed bytes; "
                    "copy or convert the file again",
                    path=self._path,
                    reason=ScanReason.GZIP_TRUNCATED,
                )
            try:
                block = self._feed(decompressor, block)
            except zlib.error as error:
                raise ScanError(
                    f"the gzip stream is damaged after {self._position} decompressed bytes ({error}); "
                    "copy or convert the file again",
                    path=self._path,
                    reason=ScanReason.GZIP_DATA,
                ) from error
        self._source.push_back(block)
        check_trailer(self._source.take(8), crc=self._member_checksum, size=self._member_size, path=self._path)

    def _feed(self, decompressor: zlib._Decompress, block: bytes) -> bytes:
        """Inflate some of the block and return what is left of it."""
        if self._position >= self._next_search:
            return self._search(decompressor, block)
        self._add(decompressor.decompress(block, min(CHUNK_BYTES, self._next_search - self._position)))
        return decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail

    def _add(self, content: bytes) -> None:
        self._piece_checksum = inflate.crc32(content, self._piece_checksum)
        self._member_checksum = inflate.crc32(content, self._member_checksum)
        self._member_size += len(content)
        self._position += len(content)
        tail = content if len(content) >= WINDOW_BYTES else self._tail + content
        self._tail = tail[-WINDOW_BYTES:]

    def _open_point(self, bit: int) -> None:
        if self._bits:
            self._checksums.append(self._piece_checksum)
        self._bits.append(bit)
        self._starts.append(self._position)
        self._windows.append(self._tail)
        self._piece_checksum = 0
        self._next_search = self._position + self._spacing

    def _search(self, decompressor: zlib._Decompress, block: bytes) -> bytes:
        """Inflate a few bytes at a time until a block begins; the next point is opened there."""
        begin = self._source.position - len(block)
        active, quiet = -1, 0
        for position in range(0, len(block), _PIECE_BYTES):
            end = position + _PIECE_BYTES
            content = decompressor.decompress(block[position:end])
            self._add(content)
            if decompressor.eof:
                return decompressor.unused_data + block[end:]
            if content:
                active, quiet = position, 0
                continue
            quiet += 1
            if quiet == _QUIET_PIECES and active >= 0:
                bit = self._block_start(decompressor, block, active=active, end=end)
                if bit is not None:
                    self._open_point(begin * 8 + bit)
                    return block[end:]
        if len(block) >= _SEARCH_BYTES:
            # Looking so closely is slow: some way on, another block will do.
            self._next_search = self._position + self._spacing
        return b""

    def _block_start(self, decompressor: zlib._Decompress, block: bytes, *, active: int, end: int) -> int | None:
        """The bit of the block from which on the coming output inflates; None where no bit does it."""
        ahead = block[active : active + _LOOK_AHEAD_BYTES]
        try:
            expected = decompressor.copy().decompress(block[end : active + _LOOK_AHEAD_BYTES])
        except zlib.error:
            return None
        header = int.from_bytes(ahead[: _CANDIDATE_BYTES + 1], "little")
        for bit in range(_CANDIDATE_BYTES * 8):
            if header >> (bit + 1) & 3 != _DYNAMIC_BLOCK:
                continue
            trial = zlib.decompressobj(-15, zdict=self._tail) if self._tail else zlib.decompressobj(-15)
            try:
                found = trial.decompress(aligned(ahead[bit // 8 :], bit % 8))
            except zlib.error:
                continue
            size = min(len(found), len(expected))
            if size >= _MIN_VERIFIED_BYTES and found[:size] == expected[:size]:
                return active * 8 + bit
        return None
