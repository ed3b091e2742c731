"""The bytes after the fixed header: extensions, which are checked; a `.hdr` file must have nothing else."""

from __future__ import annotations

from typing import BinaryIO

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.header import MAX_OFFSET, ScanHeader, header_length, parse_header


def read_separate_header(file: BinaryIO, *, path: str) -> ScanHeader:
    """Read the header of a pair.

    Raises:
        ScanError: With the path of the header's file, if it is too short or too long, or the header is wrong.
    """
    content = file.read(MAX_OFFSET + 1)
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


def header_ends(num_bytes: int, *, path: str) -> ScanError:
    """The error for a file that is too short for its header."""
    return ScanError(
        f"the file ends inside its header, after {num_bytes} bytes", path=path, reason=ScanReason.TRUNCATED
    )


def check_extensions(block: bytes, *, path: str) -> None:
    """Reject header extensions that do not fill their block to the end.

    Raises:
        ScanError: With the reason `header`.
    """
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
