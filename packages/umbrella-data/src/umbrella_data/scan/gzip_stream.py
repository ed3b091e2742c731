"""Strict gzip decompression (RFC 1952): every member's header, CRC and length are checked, to the file's last byte."""

from __future__ import annotations

import importlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.files.look_alikes import START_BYTES, describe_look_alike
from umbrella_data.files.paths import is_scan_name

try:
    # ISA-L decompresses two to three times faster than zlib and has the same interface.
    inflate: Any = importlib.import_module("isal.isal_zlib")
except ImportError:
    inflate = zlib

GZIP_MAGIC = b"\x1f\x8b"
MAX_DEFLATE_RATIO = 1032
"""The most bytes that one byte of a deflate stream can hold (zlib's technical notes)."""

CHUNK_BYTES = 1 << 20
"""Default size of a decompressed chunk in bytes."""

_BLOCK_BYTES = 1 << 18
_FHCRC, _FEXTRA, _FNAME, _FCOMMENT, _RESERVED = 0x02, 0x04, 0x08, 0x10, 0xE0
_MAX_NAME_BYTES = 1 << 12


class GzipSource:
    """The compressed file. Bytes can be pushed back, since a member's end is known only after a block was read."""

    def __init__(self, file: BinaryIO, *, path: str) -> None:
        self._file = file
        self._path = path
        self._pending = b""

    def error(self, reason: ScanReason, message: str) -> ScanError:
        """An error of this file."""
        return ScanError(message, path=self._path, reason=reason)

    def block(self) -> bytes:
        """The next bytes, about 256 KiB; empty at the end of the file."""
        pending, self._pending = self._pending, b""
        return pending or self._file.read(_BLOCK_BYTES)

    def push_back(self, data: bytes) -> None:
        """Return bytes that were read, to be read again."""
        self._pending = data + self._pending

    def take(self, count: int) -> bytes:
        """Read exactly this many bytes.

        Raises:
            ScanError: `gzip_truncated`.
        """
        data = self._pending
        while len(data) < count:
            more = self._file.read(_BLOCK_BYTES)
            if not more:
                raise self.error(
                    ScanReason.GZIP_TRUNCATED,
                    "the gzip stream ends inside a member's header or trailer; copy or convert the file again",
                )
            data += more
        self._pending = data[count:]
        return data[:count]

    def skip_text(self) -> None:
        """Skip a text that ends with a zero byte.

        Raises:
            ScanError: `gzip_header` if it does not end.
        """
        for _ in range(_MAX_NAME_BYTES):
            if self.take(1) == b"\0":
                return
        raise self.error(
            ScanReason.GZIP_HEADER, "a name in the gzip header does not end; not a gzip file, or a damaged one"
        )

    def peek(self) -> bytes:
        """The next byte, without reading past it; empty at the end of the file."""
        self._pending = self._pending or self._file.read(_BLOCK_BYTES)
        return self._pending[:1]


def iter_gzip(file: BinaryIO, *, path: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Decompress a gzip file in chunks of bounded size; the file is validated once the iterator is exhausted.

    Args:
        file: Opened at its first byte.
        path: The file's name for errors.
        chunk_bytes: The most bytes of a chunk.

    Raises:
        ScanError: `gzip_header`, `gzip_data`, `gzip_crc`, `gzip_length`, `gzip_truncated` or `gzip_trailing`.
    """
    source = GzipSource(file, path=path)
    while True:
        _skip_member_header(source)
        yield from _iter_member(source, chunk_bytes=chunk_bytes)
        following = source.peek()
        if not following:
            return
        if following != GZIP_MAGIC[:1]:
            raise source.error(
                ScanReason.GZIP_TRAILING,
                "bytes that are not gzip follow the end of the gzip stream: damaged, or joined with another file",
            )


def _skip_member_header(source: GzipSource) -> None:
    header = source.take(10)
    flags = header[3]
    if header[:2] != GZIP_MAGIC or header[2] != 8 or flags & _RESERVED:
        raise source.error(
            ScanReason.GZIP_HEADER, f"not a gzip member: it begins with {header[:4].hex(' ')} and not 1f 8b 08"
        )
    if flags & _FEXTRA:
        source.take(struct.unpack("<H", source.take(2))[0])
    if flags & _FNAME:
        source.skip_text()
    if flags & _FCOMMENT:
        source.skip_text()
    if flags & _FHCRC:
        source.take(2)


def _iter_member(source: GzipSource, *, chunk_bytes: int) -> Iterator[bytes]:
    """Yield one member's bytes and check its trailer."""
    decompressor = inflate.decompressobj(-15)
    crc, size = 0, 0
    block = b""
    while not decompressor.eof:
        block = block or source.block()
        if not block:
            raise source.error(
                ScanReason.GZIP_TRUNCATED,
                f"the gzip stream ends early, after {size} decompressed bytes; copy or convert the file again",
            )
        try:
            chunk = decompressor.decompress(block, chunk_bytes)
        except (zlib.error, inflate.error) as error:
            raise source.error(
                ScanReason.GZIP_DATA,
                f"the gzip stream is damaged after {size} decompressed bytes ({error}); copy or convert the file again",
            ) from error
        block = decompressor.unconsumed_tail
        if chunk:
            crc = inflate.crc32(chunk, crc)
            size += len(chunk)
            yield chunk
    source.push_back(decompressor.unused_data)
    stored_crc, stored_size = struct.unpack("<II", source.take(8))
    if stored_crc != crc:
        raise source.error(
            ScanReason.GZIP_CRC,
            f"the gzip checksum does not match ({stored_crc:08x} stored, {crc:08x} found): the data are damaged; "
            "copy or convert the file again",
        )
    if stored_size != size & 0xFFFFFFFF:
        raise source.error(
            ScanReason.GZIP_LENGTH,
            f"the gzip length does not match ({stored_size} bytes stored, {size} found); "
            "copy or convert the file again",
        )


class Filler:
    """Copies a stream of pieces of any size into given memory."""

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
        """Continue the stream after the last byte needed, so that it validates the rest."""
        next(self._pieces, None)


def is_gzip_scan(file: BinaryIO, *, path: str) -> bool:
    """Whether a scan is gzip, by its name; its content must agree.

    Args:
        file: Opened at its first byte, and still there on return.
        path: Its name.

    Raises:
        ScanError: `file_type` for another kind of file, `gzip_header` for a scan with the wrong ending.
    """
    name = Path(path).name.lower()
    if not is_scan_name(name):
        raise ScanError(
            "not a .nii, .nii.gz or .hdr/.img file: convert it (dcm2niix for DICOM, mri_convert for MGZ)",
            path=path,
            reason=ScanReason.FILE_TYPE,
        )
    is_gzip_name = name.endswith(".gz")
    start = file.read(START_BYTES)
    file.seek(0)
    # Voxels alone may begin with any bytes.
    if start.startswith(GZIP_MAGIC) == is_gzip_name or name.endswith(".img"):
        return is_gzip_name
    if not is_gzip_name:
        raise ScanError(f"is gzip: rename it to {name[-4:]}.gz", path=path, reason=ScanReason.GZIP_HEADER)
    if start and (look_alike := describe_look_alike(start)):
        raise ScanError(look_alike, path=path, reason=ScanReason.FILE_TYPE)
    raise ScanError(_not_gzip(start, ending=name[-7:-3]), path=path, reason=ScanReason.GZIP_HEADER)


def _not_gzip(start: bytes, *, ending: str) -> str:
    """What is wrong with a file named `.gz`."""
    if start[344:347] in (b"n+1", b"ni1") or start[4:7] in (b"n+2", b"ni2"):
        return f"is NIfTI that is not compressed: rename it to {ending}, or compress it with gzip"
    return describe_look_alike(start) or f"is not gzip: it begins with {start[:4].hex(' ')}; copy or convert it again"
