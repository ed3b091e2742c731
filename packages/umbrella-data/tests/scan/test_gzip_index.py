"""A window read through saved access points is the same, byte for byte, and faster; damage anywhere is noticed."""

from __future__ import annotations

import gzip
import io
import os
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig
from umbrella_data.scan import reader as scan_file
from umbrella_data.scan.gzip_index import GzipIndex, aligned, load_index
from umbrella_data.scan.gzip_index_builder import build_index
from umbrella_data.scan.gzip_stream import inflate, iter_gzip
from umbrella_data.scan.reader import open_scan
from umbrella_data.scan.volume import load_volume

SPACING = 1 << 17
IDENTITY = (1, 2, 3, 4)


def voxel_bytes(num_bytes: int) -> bytes:
    """Bytes that compress as scans do: a slow wave with noise, int16."""
    rng = np.random.default_rng(0)
    line = np.arange(num_bytes // 2)
    return (300 + 200 * np.sin(line / 5000) + rng.normal(0, 20, len(line))).astype("<i2").tobytes()


CONTENT = voxel_bytes(2_000_000)


def flushed() -> bytes:
    compressor = zlib.compressobj(6, wbits=31)
    parts = [
        compressor.compress(CONTENT[i : i + 50_000]) + compressor.flush(zlib.Z_SYNC_FLUSH)
        for i in range(0, len(CONTENT), 50_000)
    ]
    return b"".join([*parts, compressor.flush()])


STREAMS: dict[str, Callable[[], bytes]] = {
    "level_6": lambda: gzip.compress(CONTENT, 6),
    "level_1": lambda: gzip.compress(CONTENT, 1),
    "members": lambda: b"".join(gzip.compress(CONTENT[i : i + 300_000]) for i in range(0, len(CONTENT), 300_000)),
    "small_members": lambda: b"".join(gzip.compress(CONTENT[i : i + 9000]) for i in range(0, len(CONTENT), 9000)),
    "empty_members": lambda: gzip.compress(b"") + gzip.compress(CONTENT) + gzip.compress(b""),
    "stored": lambda: gzip.compress(CONTENT, 0),
    "sync_flushed": flushed,
}


def build(stream: bytes) -> GzipIndex:
    return build_index(io.BytesIO(stream), path="scan.nii.gz", spacing=SPACING)


@pytest.mark.parametrize("name", STREAMS)
def test_iter_range_gives_the_same_bytes_when_read_through_points(name: str, tmp_path: Path) -> None:
    stream = STREAMS[name]()
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(stream)
    index = build(stream)
    assert index.num_bytes == len(CONTENT)
    if name == "stored":
        assert len(index) == 1
    else:
        assert len(index) >= 6
    rng = np.random.default_rng(1)
    with path.open("rb") as file:
        ranges = [(0, len(CONTENT)), (0, 1), (len(CONTENT) - 1, 1)]
        for start, length in [*ranges, *zip(rng.integers(0, 1_000_000, 20), rng.integers(1, 900_000, 20), strict=True)]:
            assert b"".join(index.iter_range(file, int(start), int(length))) == CONTENT[start : start + length]


def test_build_index_refuses_what_the_stream_refuses_when_damaged() -> None:
    whole = gzip.compress(CONTENT, 6)
    member = gzip.compress(b"second")
    for stream in (
        whole[:-1],
        whole[:-8],
        whole[: len(whole) // 2],
        whole[:-8] + bytes(4) + whole[-4:],
        whole[:-4] + bytes(4),
        whole + b"x",
        whole + member[:-1],
        whole[:5000] + b"\xff" * 100 + whole[5100:],
        b"\x1f\x8b\x07" + whole[3:],
    ):
        with pytest.raises(ScanError) as expected:
            list(iter_gzip(io.BytesIO(stream), path="scan.nii.gz"))
        with pytest.raises(ScanError) as caught:
            build(stream)
        assert caught.value.reason == expected.value.reason


@pytest.mark.parametrize("library", [zlib, inflate], ids=["zlib", "fast"])
@pytest.mark.parametrize("level", [0, 1, 6])
def test_aligned_makes_a_stream_readable_when_it_begins_at_any_bit(library: Any, level: int) -> None:
    content = CONTENT[:5000]
    compressor = zlib.compressobj(level, wbits=-15)
    stream = compressor.compress(content) + compressor.flush()
    for shift in range(8):
        number = int.from_bytes(stream, "little") << shift | (1 << shift) - 1
        if level == 0 and shift:
            # Stored: three bits, the rest of their byte, then the length.
            moved = bytes([(stream[0] & 7) << shift & 255 | (1 << shift) - 1])
            block = (moved + b"\0" if shift > 5 else moved) + stream[1:]
        else:
            block = number.to_bytes(len(stream) + 1, "little")
        assert library.decompressobj(-15).decompress(aligned(block, shift)) == content


def test_load_index_gives_nothing_when_missing_damaged_or_of_another_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gzindex"
    assert load_index(path, identity=IDENTITY) is None
    build(STREAMS["level_6"]()).save(path, identity=IDENTITY)
    assert len(load_index(path, identity=IDENTITY) or []) >= 6
    assert load_index(path, identity=(1, 2, 3, 5)) is None
    path.write_bytes(path.read_bytes()[:-100])
    assert load_index(path, identity=IDENTITY) is None


@pytest.fixture
def series(nifti: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A series of 40 frames, for which access points are kept."""
    monkeypatch.setattr(scan_file, "_MIN_INDEXED_BYTES", 0)
    monkeypatch.setattr(scan_file, "build_index", lambda file, path: build_index(file, path=path, spacing=SPACING))
    voxels = np.frombuffer(CONTENT, "<i2")[: 20 * 25 * 30 * 40].reshape(20, 25, 30, 40, order="F")
    return nifti.write(voxels, "bold.nii.gz"), voxels


def inflated_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what the stream inflates from now on."""
    sizes: list[int] = []
    original = scan_file.iter_gzip

    def counting(*args: Any, **options: Any) -> Any:
        for chunk in original(*args, **options):
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(scan_file, "iter_gzip", counting)
    return sizes


def test_load_volume_reads_windows_through_the_index_when_a_folder_is_given(
    series: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, voxels = series
    folder = tmp_path / "index"
    sizes = inflated_bytes(monkeypatch)
    for first in (0, 17, 36):
        data = load_volume(path, modality="rsfMRI", window=(first, 4), index_folder=str(folder)).data[0]
        np.testing.assert_array_equal(data, voxels[..., first : first + 4])
    # Headers only: the stream was not inflated for the voxels.
    assert max(sizes) <= 8192
    assert len(sizes) == 3
    assert len(list(folder.rglob("*.gzindex"))) == 1


def test_load_volume_falls_back_to_the_stream_when_the_index_is_damaged(
    series: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    path, voxels = series
    folder = tmp_path / "index"
    load_volume(path, modality="rsfMRI", window=(0, 1), index_folder=folder)
    (saved,) = folder.rglob("*.gzindex")
    content = saved.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(content), 40):
        damaged = bytearray(content)
        damaged[position : position + 2000] = rng.bytes(len(damaged[position : position + 2000]))
        saved.parent.mkdir(exist_ok=True)
        saved.write_bytes(damaged)
        data = load_volume(path, modality="rsfMRI", window=(20, 5), index_folder=folder).data[0]
        np.testing.assert_array_equal(data, voxels[..., 20:25])


def test_load_volume_refuses_when_the_file_changes_behind_its_index(
    series: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    path, _ = series
    folder = tmp_path / "index"
    load_volume(path, modality="rsfMRI", window=(0, 1), index_folder=folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    status = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    # The same size, time and inode: only the checksums can tell.
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ScanError) as caught:
        load_volume(path, modality="rsfMRI", window=(16, 8), index_folder=folder)
    assert caught.value.reason in (ScanReason.GZIP_CRC, ScanReason.GZIP_DATA)


def test_open_scan_refuses_a_wrong_length_when_indexed(series: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, _ = series
    content = gzip.decompress(path.read_bytes())
    for change, reason in ((content + b"\0", ScanReason.TRAILING), (content[:-2], ScanReason.TRUNCATED)):
        path.write_bytes(gzip.compress(change))
        with pytest.raises(ScanError) as caught, open_scan(path, index_folder=tmp_path / "index") as scan:
            scan.read_frames(0, 1)
        assert caught.value.reason == reason
    assert not list((tmp_path / "index").rglob("*.gzindex"))


@pytest.mark.parametrize("way", ["plain", "streamed", "indexed"])
def test_window_is_read_in_the_memory_of_a_window(nifti: Any, tmp_path: Path, way: str) -> None:
    series = np.random.default_rng(0).integers(0, 99, (32, 32, 32, 600), dtype=np.int16)
    path = nifti.write(series, "bold.nii" if way == "plain" else "bold.nii.gz", repetition_time=1.0)
    pipeline = Pipeline(
        PipelineConfig(image_size=(16, 16, 16, 8)),
        modality="rsfMRI",
        index_folder=tmp_path / "index" if way == "indexed" else None,
    )
    num_bytes = series.nbytes
    del series
    for read in (
        lambda: load_volume(path, modality="rsfMRI", window=(300, 8), index_folder=pipeline.index_folder),
        lambda: pipeline(path, generator=None),
    ):
        for _ in range(2):  # proven or indexed at first, and known afterwards
            tracemalloc.start()
            read()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            # The series has 600 frames; the window of 8 has 1 MB in float32. An index is built in steps of a few MB,
            # which are larger with zlib than with ISA-L.
            assert peak < num_bytes / 4
