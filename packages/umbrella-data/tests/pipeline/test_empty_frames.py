"""Series that do not fit into memory are cached through a temporary file, with the same result."""

from __future__ import annotations

import errno
import os
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from umbrella_data.cache import entry as cache_entry
from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import CacheError, ScanError
from umbrella_data.pipeline import pipeline as transforms
from umbrella_data.pipeline import streaming as frame_file
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig
from umbrella_data.pipeline.streaming import empty_frames
from umbrella_data.scan.voxels import MAX_SERIES_VOXELS, MAX_VOXELS

NUM_FRAMES = 120
CHUNK = 1 << 17


def prepare(scan: Path, folder: Path, *, mask: Path | None = None, **options: Any) -> torch.Tensor:
    """All frames of a series, read through a new cache."""
    config = PipelineConfig(image_size=(24, 24, 24, NUM_FRAMES), **options)
    return Pipeline(config, modality="rsfMRI", cache=VolumeCache(folder))(scan, generator=None, mask=mask)


@pytest.fixture
def series(nifti: Any, random_voxels: Any) -> Path:
    return nifti.write(random_voxels(10, 11, 12, NUM_FRAMES), "bold.nii", repetition_time=1.0)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_file, "MAX_IN_MEMORY", CHUNK)
    monkeypatch.setattr(cache_entry, "_CHUNK_VOXELS", CHUNK)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 2.0)])
def test_cached_frames_of_a_long_series_equal_those_computed_in_memory(
    series: Path, tmp_path: Path, nifti: Any, request: pytest.FixtureRequest, spacing: Any, has_mask: bool
) -> None:
    brain = np.zeros((10, 11, 12), np.uint8)
    brain[2:8, 3:9, 3:8] = 1
    mask = nifti.write(brain, "mask.nii") if has_mask else None
    whole = prepare(series, tmp_path / "whole", mask=mask, spacing=spacing)
    request.getfixturevalue("little_memory")
    in_chunks = prepare(series, tmp_path / "chunks", mask=mask, spacing=spacing)
    assert torch.equal(in_chunks, whole)
    # Only the entry and the hashes remain.
    assert {path.name for path in (tmp_path / "chunks").iterdir()} == {"volumes", "content"}


def test_peak_memory_is_that_of_a_chunk(series: Path, tmp_path: Path, little_memory: None) -> None:
    config = PipelineConfig(image_size=(24, 24, 24, 4))
    pipeline = Pipeline(config, modality="rsfMRI", cache=VolumeCache(tmp_path / "cache"))
    tracemalloc.start()
    try:
        pipeline.warm(series)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A chunk in float32 twice, in float64 twice and in float16 twice; the frames alone are 6.6 MB.
    assert peak < 28 * CHUNK + (1 << 20) < 24**3 * NUM_FRAMES * 4


def test_series_may_have_more_voxels_than_are_read_at_once(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_VOXELS < 91 * 109 * 91 * 1200 < MAX_SERIES_VOXELS
    monkeypatch.setattr(transforms, "MAX_VOXELS", 10 * 11 * 12 * 20)
    assert prepare(series, tmp_path / "cache").shape == (1, 24, 24, 24, NUM_FRAMES)
    # The limit applies to the result too.
    for limit in (10 * 11 * 12 * NUM_FRAMES - 1, 24**3 * NUM_FRAMES - 1):
        monkeypatch.setattr(transforms, "MAX_SERIES_VOXELS", limit)
        with pytest.raises(ScanError) as caught:
            prepare(series, tmp_path / f"cache{limit}")
        assert (caught.value.reason, caught.value.path) == ("too_large", str(series))


def test_temporary_file_has_no_name_and_is_allocated_on_disk(tmp_path: Path, little_memory: None) -> None:
    frames = empty_frames((2, 64, 64, 64), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    frames[1] = 3
    assert frames.sum() == 3 * 64**3
    with pytest.raises(CacheError, match=r"File too large|No space left"):
        empty_frames((2, 1 << 30, 1 << 20, 1 << 8), folder=tmp_path)
    assert empty_frames((2, 64, 64, 64), folder=None).base is None


def test_full_disk_is_an_error_of_the_cache(
    nifti: Any, random_voxels: Any, tmp_path: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    scan = nifti.write(random_voxels(8, 8, 8, NUM_FRAMES), "bold.nii", repetition_time=2.0)
    with pytest.raises(CacheError, match="No space left on device"):
        prepare(scan, tmp_path / "cache")


def test_file_is_allocated_without_posix_fallocate(
    tmp_path: Path, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(frame_file, "_WRITTEN_BYTES", 999_999)  # the last part is shorter
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        frame_file._allocate(file, 2_500_000, folder=tmp_path)
        status = os.fstat(file.fileno())
    assert status.st_size == 2_500_000
    assert status.st_blocks * 512 >= 2_500_000
    frames = empty_frames((2, 64, 64, 64), folder=tmp_path)
    frames[1] = 3
    assert frames.sum() == 3 * 64**3
    with pytest.raises(CacheError, match="No space left"):
        empty_frames((2, 1 << 30, 1 << 20, 1 << 8), folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
