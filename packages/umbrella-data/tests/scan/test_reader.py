"""A file is opened safely, validated, and read frame by frame."""

from __future__ import annotations

import gzip
import os
import socket
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan import reader as scan_file
from umbrella_data.scan.reader import StoredScan, open_scan


def read_frames(scan: StoredScan, first: int, count: int) -> np.ndarray:
    """Frames (T, X, Y, Z) as stored."""
    slices = np.concatenate([block.copy() for block in scan.iter_slices(first, count)])
    return slices.reshape(count, -1, *slices.shape[1:]).transpose(0, 3, 2, 1)


def reason_of(path: Path) -> ScanReason:
    """The reason why a scan is rejected on reading all of it."""
    with pytest.raises(ScanError) as caught, open_scan(path) as scan:
        read_frames(scan, 0, scan.header.num_frames)
    assert caught.value.path == str(path)
    return caught.value.reason


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "SCAN.NII.GZ"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_stored_frames_equal_those_of_nibabel(
    nifti: Any, random_voxels: Any, name: str, version: int, endianness: str
) -> None:
    path = nifti.write(random_voxels(5, 6, 7, 9), name, version=version, endianness=endianness)
    expected = np.asarray(nib.load(path).dataobj)
    with open_scan(path) as scan:
        assert scan.header.dtype.newbyteorder("=") == np.int16
        np.testing.assert_array_equal(np.moveaxis(read_frames(scan, 0, 9), 0, -1), expected)
        np.testing.assert_array_equal(np.moveaxis(read_frames(scan, 3, 2), 0, -1), expected[..., 3:5])


def test_multi_member_gzip_is_accepted(nifti: Any, random_voxels: Any) -> None:
    path = nifti.write(random_voxels(5, 6, 7), "scan.nii")
    content = path.read_bytes()
    compressed = path.with_name("scan.nii.gz")
    compressed.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    with open_scan(compressed) as scan:
        np.testing.assert_array_equal(read_frames(scan, 0, 1)[0], nib.load(path).dataobj)


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-1], ScanReason.TRUNCATED),
        (lambda data: data[:200], ScanReason.TRUNCATED),
        (lambda data: data[:350], ScanReason.TRUNCATED),
        (lambda data: data[:2], ScanReason.TRUNCATED),
        (lambda data: b"", ScanReason.TRUNCATED),
        (lambda data: data + b"\0", ScanReason.TRAILING),
        (gzip.compress, ScanReason.GZIP_HEADER),
        (lambda data: b"GIF89a" + data[6:], ScanReason.FILE_TYPE),
    ],
    ids=["one_byte", "in_header", "in_extension", "two_bytes", "empty", "longer", "gzip_inside", "other"],
)
def test_open_scan_rejects_a_plain_file_when_damaged(
    nifti: Any, random_voxels: Any, change: Callable[[bytes], bytes], reason: ScanReason
) -> None:
    path = nifti.write(random_voxels(5, 6, 7), "scan.nii")
    rewrite(path, change)
    assert reason_of(path) == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:-3], ScanReason.GZIP_TRUNCATED),
        (lambda data: data[:-8] + b"\0\0\0\0" + data[-4:], ScanReason.GZIP_CRC),
        (lambda data: data[:-4] + b"\0\0\0\0", ScanReason.GZIP_LENGTH),
        (lambda data: data + b"garbage", ScanReason.GZIP_TRAILING),
        (lambda data: gzip.compress(gzip.decompress(data)[:-2]), ScanReason.TRUNCATED),
        (lambda data: gzip.compress(gzip.decompress(data) + b"\0"), ScanReason.TRAILING),
        (lambda data: data + gzip.compress(b"\0"), ScanReason.TRAILING),
        (gzip.decompress, ScanReason.GZIP_HEADER),
        (lambda data: b"", ScanReason.GZIP_HEADER),
    ],
    ids=["cut", "crc", "length", "garbage", "short_inside", "long_inside", "extra_member", "not_gzip", "empty"],
)
def test_open_scan_rejects_a_compressed_file_when_damaged(
    nifti: Any, random_voxels: Any, change: Callable[[bytes], bytes], reason: ScanReason
) -> None:
    path = nifti.write(random_voxels(5, 6, 7))
    rewrite(path, change)
    assert reason_of(path) == reason


def test_open_scan_rejects_when_there_is_no_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.nii").mkdir()
    os.mkfifo(tmp_path / "pipe.nii.gz")
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "nothing.nii")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.nii")
        assert reason_of(tmp_path / "socket.nii") == ScanReason.NOT_REGULAR_FILE
    assert reason_of(tmp_path / "folder.nii") == ScanReason.NOT_REGULAR_FILE
    assert reason_of(tmp_path / "pipe.nii.gz") == ScanReason.NOT_REGULAR_FILE
    assert reason_of(tmp_path / "dangling.nii") == ScanReason.MISSING
    assert reason_of(tmp_path / "missing.nii.gz") == ScanReason.MISSING
    assert reason_of(tmp_path / "folder.nii" / "x.nii") == ScanReason.MISSING
    assert reason_of(Path("nul\0byte.nii")) == ScanReason.UNREADABLE


def test_open_scan_rejects_when_the_file_type_is_wrong(tmp_path: Path) -> None:
    for name in ("scan.mgz", "scan.dcm", "nii"):
        (tmp_path / name).write_bytes(b"\0" * 400)
        assert reason_of(tmp_path / name) == ScanReason.FILE_TYPE


@pytest.mark.parametrize("dims", [(3, 30000, 30000, 30000), (4, 300, 300, 300, 300)])
@pytest.mark.parametrize("name", ["bomb.nii", "bomb.nii.gz"])
def test_open_scan_allocates_nothing_when_the_header_declares_terabytes(
    nifti: Any, random_voxels: Any, dims: tuple[int, ...], name: str
) -> None:
    path = nifti.write(random_voxels(5, 6, 7), name)
    nifti.patch(path, 40, struct.pack(f"<{len(dims)}h", *dims))
    tracemalloc.start()
    assert reason_of(path) == ScanReason.TOO_LARGE
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_open_scan_rejects_a_gzip_bomb_before_it_is_unpacked(nifti: Any, random_voxels: Any) -> None:
    path = nifti.write(random_voxels(5, 6, 7), "scan.nii")
    nifti.patch(path, 40, struct.pack("<4h", 3, 400, 400, 400))
    header = path.read_bytes()[:352]
    bomb = path.with_name("bomb.nii.gz")
    bomb.write_bytes(gzip.compress(header + bytes(2 * 400**3)))
    tracemalloc.start()
    assert reason_of(bomb) == ScanReason.TOO_LARGE
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_open_scan_skips_extensions_and_rejects_those_that_do_not_fit(nifti: Any, random_voxels: Any) -> None:
    voxels = random_voxels(5, 6, 7)
    image = nifti.image(voxels)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"some text" * 5))
    path = nifti.folder / "extended.nii"
    nib.save(image, path)
    with open_scan(path) as scan:
        assert scan.header.offset > 352
        np.testing.assert_array_equal(read_frames(scan, 0, 1)[0], voxels)
    nifti.patch(path, 352, struct.pack("<i", 100_000))
    assert reason_of(path) == ScanReason.EXTENSION


def test_compressed_file_is_validated_once_when_windows_are_read(
    nifti: Any, random_voxels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nifti.write(random_voxels(30, 30, 30, 60))
    sizes: list[int] = []
    original = scan_file.iter_gzip

    def counting(*args: Any, **options: Any) -> Any:
        sizes.append(0)
        for chunk in original(*args, **options):
            sizes[-1] += len(chunk)
            yield chunk

    monkeypatch.setattr(scan_file, "iter_gzip", counting)
    for _ in range(2):
        with open_scan(path) as scan:
            total = scan.header.file_bytes
            read_frames(scan, 2, 2)
    # Header and voxels, twice: the first call reads to the end, the second one stops after the window.
    assert sizes[1] == total
    assert sizes[3] < total / 2
    rewrite(path, lambda data: data[:-8] + b"\0\0\0\0" + data[-4:])
    os.utime(path, ns=(1, 1))
    assert reason_of(path) == ScanReason.GZIP_CRC
