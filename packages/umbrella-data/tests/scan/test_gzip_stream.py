"""Each kind of damage to a gzip stream is rejected with its own reason; legal variants are read."""

from __future__ import annotations

import gzip
import io
import struct
import sys
import zlib
from types import ModuleType

import numpy as np
import pytest

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan import gzip_stream
from umbrella_data.scan.gzip_stream import iter_gzip

CONTENT = np.random.default_rng(0).integers(0, 40, 100_000, dtype=np.uint8).tobytes()
GZIP = gzip.compress(CONTENT, mtime=0)


def read(stream: bytes) -> bytes:
    return b"".join(iter_gzip(io.BytesIO(stream), path="scan.nii.gz"))


def reason_of(stream: bytes) -> ScanReason:
    with pytest.raises(ScanError) as caught:
        read(stream)
    assert caught.value.path == "scan.nii.gz"
    return caught.value.reason


def member_with_all_fields(content: bytes) -> bytes:
    """A member with extra field, name, comment and header checksum (RFC 1952)."""
    deflate = zlib.compressobj(wbits=-15)
    body = deflate.compress(content) + deflate.flush()
    header = bytes([0x1F, 0x8B, 8, 0x02 | 0x04 | 0x08 | 0x10, 0, 0, 0, 0, 0, 3])
    header += struct.pack("<H", 5) + b"extra" + b"name\0" + b"comment\0"
    header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    return header + body + struct.pack("<II", zlib.crc32(content), len(content))


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (GZIP, CONTENT),
        (GZIP + gzip.compress(b"second") + gzip.compress(b""), CONTENT + b"second"),
        (member_with_all_fields(b"all fields"), b"all fields"),
        (gzip.compress(bytes(5_000_000)), bytes(5_000_000)),
    ],
    ids=["plain", "multi_member", "all_header_fields", "many_chunks"],
)
def test_iter_gzip_yields_the_content_when_the_stream_is_complete(stream: bytes, expected: bytes) -> None:
    assert read(stream) == expected


@pytest.mark.parametrize("cut", [1, 4, 7, 8, 9, len(GZIP) // 2, len(GZIP) - 12])
def test_iter_gzip_rejects_when_the_end_is_missing(cut: int) -> None:
    assert reason_of(GZIP[:-cut]) == ScanReason.GZIP_TRUNCATED


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (GZIP[:-8] + b"\0\0\0\0" + GZIP[-4:], ScanReason.GZIP_CRC),
        (GZIP[:-4] + b"\1\0\0\0", ScanReason.GZIP_LENGTH),
        (GZIP + b"\0", ScanReason.GZIP_TRAILING),
        (GZIP + b"garbage", ScanReason.GZIP_TRAILING),
        (GZIP + b"\x1f\x8b\x08", ScanReason.GZIP_TRUNCATED),
        (GZIP + b"\x1f\x00" + bytes(20), ScanReason.GZIP_HEADER),
        (GZIP[:10] + b"\xff" * 100 + GZIP[110:], ScanReason.GZIP_DATA),
        (b"\x1f\x8b\x07" + GZIP[3:], ScanReason.GZIP_HEADER),
        (GZIP[:3] + b"\xe0" + GZIP[4:], ScanReason.GZIP_HEADER),
        (GZIP[:3] + b"\x08" + GZIP[4:10] + b"x" * 100_000, ScanReason.GZIP_HEADER),
    ],
    ids=[
        "crc",
        "length",
        "trailing_zero",
        "trailing_text",
        "half_member",
        "trailing_other",
        "data",
        "method",
        "flags",
        "name",
    ],
)
def test_iter_gzip_names_the_damage_when_rejected(stream: bytes, reason: ScanReason) -> None:
    assert reason_of(stream) == reason


def test_iter_gzip_never_yields_wrong_bytes_silently_when_bits_flip() -> None:
    rng = np.random.default_rng(1)
    small = gzip.compress(CONTENT[:2000], mtime=0)
    for position in rng.integers(0, len(small) * 8, 300):
        flipped = bytearray(small)
        flipped[position // 8] ^= 1 << (position % 8)
        try:
            assert read(bytes(flipped)) == CONTENT[:2000]
        except ScanError:
            continue
        # Only the header may change undetected: time, system, compression level.
        assert position // 8 < 10


def test_iter_gzip_yields_small_chunks_when_the_stream_is_a_bomb() -> None:
    bomb = gzip.compress(bytes(10_000_000))
    assert max(len(chunk) for chunk in iter_gzip(io.BytesIO(bomb), path="bomb.nii.gz")) <= 1 << 20


@pytest.mark.isolated
def test_iter_gzip_uses_isal_when_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    fast = ModuleType("isal.isal_zlib")
    fast.decompressobj, fast.crc32, fast.error = zlib.decompressobj, zlib.crc32, zlib.error  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "isal", ModuleType("isal"))
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", fast)
    try:
        assert importlib.reload(gzip_stream).inflate is fast
        assert b"".join(gzip_stream.iter_gzip(io.BytesIO(GZIP), path="scan.nii.gz")) == CONTENT
    finally:
        monkeypatch.undo()
        importlib.reload(gzip_stream)
