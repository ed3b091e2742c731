"""Scan files with the same content under different names, found without reading most of them.

    every file   a few hundred bytes  uncompressed size, and the CRC of the content that a gzip file ends with
    same size    up to 64 KiB         samples of the content, for files that do not state a CRC
    candidates   whole                a hash of the uncompressed content, kept in the user's cache

A file that was compressed again, or unpacked, is found too.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, TypeVar

from umbrella_data.errors import ScanError
from umbrella_data.files.atomic import write_atomically
from umbrella_data.files.paths import both_files, open_regular_file
from umbrella_data.manifest.index_file import cache_home
from umbrella_data.scan.header import header_length, parse_header

_START_BYTES = 512
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 17  # one of them in the middle
_GZIP_MAGIC = b"\x1f\x8b"

Key = TypeVar("Key", bound=Hashable)


class _Signature(NamedTuple):
    """What a file states about its content: uncompressed size modulo 2^32, and CRC-32 if it is one gzip member."""

    size: int
    crc: int | None
    is_gzip: bool


def find_copies(files: Iterable[Path], *, cache: Path | None = None) -> list[tuple[Path, ...]]:
    """Find files with the same uncompressed content.

    Args:
        files: Scan files; one that cannot be read is skipped. Names that are links to one file are copies, too.
        cache: Folder for hashes of whole files; None takes the user's cache.

    Returns:
        Groups of at least two names each, in the order of `files`.
    """
    cache = cache_home() / "digests" if cache is None else cache
    names: dict[Path, list[Path]] = defaultdict(list)
    for file in dict.fromkeys(files):
        names[both_files(file)[-1].resolve()].append(file)
    by_size: dict[int, list[tuple[Path, _Signature]]] = defaultdict(list)
    for file in names:
        try:
            signature = _read_signature(file)
        except ScanError:
            continue
        by_size[signature.size].append((file, signature))
    groups = [
        group
        for members in by_size.values()
        for candidates in _candidates(members)
        for group in _group(candidates, lambda file: _digest(file, cache=cache))
    ]
    in_groups = {file for group in groups for file in group}
    groups += [[file] for file in names if len(names[file]) > 1 and file not in in_groups]
    return [tuple(name for file in group for name in names[file]) for group in groups]


def _candidates(members: Sequence[tuple[Path, _Signature]]) -> list[list[Path]]:
    """Groups of files of one size that may have the same content."""
    stated = [(file, signature.crc) for file, signature in members if signature.crc is not None]
    groups = _group([file for file, _ in stated], dict(stated).__getitem__)
    if len(stated) == len(members):
        return groups
    # A file without a CRC can equal any other: plain files are compared where they can be read anywhere.
    plain = [file for file, signature in members if not signature.is_gzip]
    if len(plain) == len(members):
        return _group(plain, _sample)
    return _group([file for file, _ in members], _first_bytes)


def _group(files: Sequence[Path], key: Callable[[Path], Key | None]) -> list[list[Path]]:
    """Groups of at least two files with one key; files without a key are in none."""
    found: dict[Key, list[Path]] = defaultdict(list)
    for file in files:
        value = key(file)
        if value is not None:
            found[value].append(file)
    return [group for group in found.values() if len(group) > 1]


def _read_signature(path: Path) -> _Signature:
    with open_regular_file(str(path)) as file:
        status = os.fstat(file.fileno())
        start = os.pread(file.fileno(), _START_BYTES, 0)
        if not start.startswith(_GZIP_MAGIC):
            return _Signature(status.st_size % 2**32, None, is_gzip=False)
        trailer = os.pread(file.fileno(), 8, max(0, status.st_size - 8))
    crc, size = int.from_bytes(trailer[:4], "little"), int.from_bytes(trailer[4:], "little")
    declared = _declared_size(start, path=path)
    # The trailer is that of the last member: a file of several states no CRC of the whole.
    if declared is not None and declared % 2**32 != size:
        return _Signature(declared % 2**32, None, is_gzip=True)
    return _Signature(size, crc, is_gzip=True)


def _declared_size(start: bytes, *, path: Path) -> int | None:
    """Bytes of the decompressed file by its NIfTI header; None if its start holds none."""
    try:
        content = zlib.decompressobj(wbits=31).decompress(start)
        return parse_header(content[: header_length(content, path=str(path))], path=str(path)).file_bytes
    except (ScanError, zlib.error):
        return None


def _sample(path: Path) -> bytes | None:
    """A hash of parts of an uncompressed file, spread evenly over it."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        last = max(0, os.fstat(file.fileno()).st_size - _SAMPLE_BYTES)
        for number in range(_NUM_SAMPLES):
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, last * number // (_NUM_SAMPLES - 1)))
    return digest.digest()


def _first_bytes(path: Path) -> bytes | None:
    """A hash of the first decompressed bytes of a file."""
    try:
        with _decompressed(path) as file:
            return hashlib.sha256(file.read(_SAMPLE_BYTES * _NUM_SAMPLES)).digest()
    except (OSError, EOFError, zlib.error):
        return None


def _digest(path: Path, *, cache: Path) -> str | None:
    """The SHA-256 of the decompressed content, from the cache if the file has not changed."""
    status = path.stat()
    identity = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ino}"
    kept = cache / hashlib.sha256(os.fsencode(identity)).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        return kept.read_text(encoding="ascii")
    try:
        with _decompressed(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, EOFError, zlib.error):
        return None  # damaged: reading it reports what is wrong
    with suppress(OSError):  # a cache that cannot be written costs time alone
        write_atomically(kept, [digest.encode()])
    return digest


def _decompressed(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as file:
        is_gzip = file.read(2) == _GZIP_MAGIC
    return gzip.open(path) if is_gzip else path.open("rb")
