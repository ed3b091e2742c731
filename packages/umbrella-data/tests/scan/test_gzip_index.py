"""A window read through a saved index has the same bytes, and damage to the file or the index is detected."""

from __future__ import annotations

import gzip
import os
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbrella_data.errors import CacheError, ScanError, ScanReason
from umbrella_data.files.mapped_arrays import MappedArrays
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig
from umbrella_data.scan import gzip_index
from umbrella_data.scan import reader as scan_file
from umbrella_data.scan.reader import open_scan
from umbrella_data.scan.volume import load_volume

pytest.importorskip("indexed_gzip", reason="the index is an extra")

SHAPE = (20, 25, 30, 40)


def flushed(content: bytes) -> bytes:
    compressor = zlib.compressobj(6, wbits=31)
    parts = [
        compressor.compress(content[i : i + 50_000]) + compressor.flush(zlib.Z_SYNC_FLUSH)
        for i in range(0, len(content), 50_000)
    ]
    return b"".join([*parts, compressor.flush()])


def members(content: bytes, size: int) -> bytes:
    return b"".join(gzip.compress(content[i : i + size]) for i in range(0, len(content), size))


STREAMS: dict[str, Callable[[bytes], bytes]] = {
    "level_6": lambda content: gzip.compress(content, 6),
    "level_1": lambda content: gzip.compress(content, 1),
    "members": lambda content: members(content, 300_000),
    "small_members": lambda content: members(content, 9000),
    "empty_members": lambda content: gzip.compress(b"") + gzip.compress(content) + gzip.compress(b""),
    "stored": lambda content: gzip.compress(content, 0),
    "sync_flushed": flushed,
}


@pytest.fixture
def series(nifti: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray]:
    """A series of 40 frames with several access points; frames repeat voxels of those before them."""
    monkeypatch.setattr(scan_file, "_MIN_INDEXED_BYTES", 0)
    monkeypatch.setattr(gzip_index, "SPACING", 1 << 17)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1000, SHAPE, dtype="<i2")
    is_repeated = rng.random(SHAPE) < 0.8
    voxels = np.asfortranarray(np.where(is_repeated, values[..., :1], values))
    return nifti.write(voxels, "bold.nii.gz"), voxels


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what is decompressed without an index."""
    sizes: list[int] = []
    original = scan_file.iter_gzip

    def counting(*args: Any, **options: Any) -> Any:
        for chunk in original(*args, **options):
            sizes.append(len(chunk))
            yield chunk

    monkeypatch.setattr(scan_file, "iter_gzip", counting)
    return sizes


def read(path: Path, folder: Path, first: int, count: int) -> np.ndarray:
    return load_volume(path, modality="rsfMRI", window=(first, count), index_folder=folder).data[0].numpy()


def saved_index(folder: Path) -> Path:
    (path,) = folder.rglob("*.gzindex")
    return path


@pytest.mark.parametrize("name", STREAMS)
def test_windows_have_the_same_voxels_when_read_through_an_index(
    series: tuple[Path, np.ndarray], streamed: list[int], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, voxels = series
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(STREAMS[name](content))
    read(path, tmp_path / "index", 0, 1)
    assert sum(streamed) >= len(content)  # the file was validated before its index was saved
    assert len(MappedArrays(saved_index(tmp_path / "index"))["points"]) >= 8 * 18
    streamed.clear()
    monkeypatch.setattr(gzip_index, "_PIECE_BYTES", 5 * voxels[..., 0].nbytes)
    for first, count in ((0, 1), (0, 39), (1, 39), (17, 4), (36, 4), (39, 1)):
        scan_file.forget_verified()
        np.testing.assert_array_equal(read(path, tmp_path / "index", first, count), voxels[..., first : first + count])
    assert sum(streamed) <= 6 * 8192  # headers


def test_damaged_index_is_replaced(series: tuple[Path, np.ndarray], streamed: list[int], tmp_path: Path) -> None:
    path, voxels = series
    read(path, tmp_path, 0, 1)
    saved = saved_index(tmp_path)
    content = saved.read_bytes()
    rng = np.random.default_rng(0)
    cut = [content[:-100], content[:50], b""]
    for position in rng.integers(0, len(content) - 3000, 40):
        cut.append(content[:position] + rng.bytes(3000) + content[position + 3000 :])
    for damaged in cut:
        saved.parent.mkdir(exist_ok=True)
        saved.write_bytes(damaged)
        for _ in range(2):
            streamed.clear()
            for first in range(0, 40, 4):
                np.testing.assert_array_equal(read(path, tmp_path, first, 2), voxels[..., first : first + 2])
        assert sum(streamed) <= 10 * 8192  # headers
        assert saved.exists()


def test_changed_file_is_detected(series: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, voxels = series
    folder = tmp_path / "index"
    read(path, folder, 0, 1)
    status = path.stat()
    # Another valid series of the same size: only its modification time differs.
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:352] + (voxels + 1).tobytes(order="F")))
    os.truncate(path, status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ScanError) as caught:
        read(path, folder, 16, 8)
    assert caught.value.path == str(path)
    assert saved_index(folder)  # none for the damaged file


def test_damaged_file_is_detected_when_its_size_and_time_are_the_same(
    series: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    path, _ = series
    folder = tmp_path / "index"
    read(path, folder, 0, 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    status = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ScanError) as caught:
        read(path, folder, 16, 8)
    assert caught.value.reason in (ScanReason.GZIP_CRC, ScanReason.GZIP_DATA)


def test_no_index_is_saved_when_the_file_is_invalid(series: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, _ = series
    packed = path.read_bytes()
    content = gzip.decompress(packed)
    for changed, reason in (
        (gzip.compress(content + b"\0"), ScanReason.TRAILING),
        (gzip.compress(content[:-2]), ScanReason.TRUNCATED),
        (packed[:-8] + bytes(4) + packed[-4:], ScanReason.GZIP_CRC),
        (packed[:-4] + bytes(4), ScanReason.GZIP_LENGTH),
        (packed[:-1], ScanReason.GZIP_TRUNCATED),
        (packed + b"x", ScanReason.GZIP_TRAILING),
    ):
        path.write_bytes(changed)
        for _ in range(2):
            with pytest.raises(ScanError) as caught, open_scan(path, index_folder=tmp_path / "index") as scan:
                next(scan.iter_slices(0, 1))
            assert caught.value.reason == reason
    assert not list((tmp_path / "index").rglob("*.gzindex"))


def test_file_of_another_kind_in_the_folder_ends_in_a_cache_error(
    series: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    folder.write_text("not a folder")
    with pytest.raises(CacheError, match=str(folder)):
        read(series[0], folder, 0, 1)


@pytest.mark.isolated
def test_pipeline_names_the_extra_when_indexed_gzip_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "indexed_gzip", None)
    with pytest.raises(ImportError, match=r"umbrella-data\[index\]"):
        Pipeline(PipelineConfig(image_size=(16, 16, 16, 8)), modality="rsfMRI", index_folder=tmp_path)


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
        for _ in range(2):  # verified or indexed at first, and known afterwards
            tracemalloc.start()
            read()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            # The series has 600 frames; the window of 8 has 1 MB in float32. An index is built in steps of a few MB,
            # which are larger with zlib than with ISA-L.
            assert peak < num_bytes / 4
