"""`window_seconds`: windows of series with different repetition times, interpolated to a common one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.pipeline.augment import AugmentConfig
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig

STRUCTURE = np.random.default_rng(0).uniform(50, 100, (6, 6, 6, 1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def series(
    nifti: Any, course: np.ndarray, *, repetition_time: float | None = None, name: str = "bold.nii.gz", **options: Any
) -> Path:
    """A series whose voxels are a structure plus a time course (T,)."""
    voxels = (STRUCTURE + course).astype(np.float32)
    return nifti.write(voxels, name, repetition_time=repetition_time, **options)


def pipeline(num_frames: int, cache: VolumeCache | None = None, **settings: Any) -> Pipeline:
    return Pipeline(PipelineConfig(image_size=(6, 6, 6, num_frames), **settings), modality="rsfMRI", cache=cache)


def course_of(window: torch.Tensor) -> np.ndarray:
    """Mean over space of each frame (T,)."""
    return window.double().mean(dim=(0, 1, 2, 3)).numpy()


def unit(course: np.ndarray) -> np.ndarray:
    """From 0 to 1: normalisation is affine."""
    return (course - course.min()) / (course.max() - course.min())


@pytest.mark.parametrize("is_cached", [False, True], ids=["uncached", "cached"])
def test_series_with_two_repetition_times_have_the_same_window(nifti: Any, tmp_path: Path, is_cached: bool) -> None:
    cache = VolumeCache(tmp_path / "cache") if is_cached else None
    frequency = 0.02
    windows = []
    for seconds, num_frames in ((0.8, 61), (2.0, 25)):  # 48 s from the first frame to the last one
        course = 20 * np.sin(2 * np.pi * frequency * seconds * np.arange(num_frames))
        path = series(nifti, course, repetition_time=seconds, name=f"{num_frames}.nii")
        windows.append(pipeline(40, cache, window_seconds=49.0)(path, generator=None))
    # Error of linear interpolation, relative to the amplitude: (2 pi f h)^2 / 8.
    error = (2 * np.pi * frequency * 2.0) ** 2 / 8
    courses = [unit(course_of(window)) for window in windows]
    np.testing.assert_allclose(courses[0], courses[1], rtol=0, atol=2 * error)
    expected = np.sin(2 * np.pi * frequency * 49 / 40 * np.arange(40))
    np.testing.assert_allclose(courses[0], unit(expected), rtol=0, atol=error)


@pytest.mark.parametrize(("seconds", "num_read"), [(0.5, 28), (0.9, 16), (1.5, 10), (2.7, 6), (4.0, 5), (7.0, 3)])
def test_ramp_is_exact_and_as_few_frames_as_possible_are_read(nifti: Any, seconds: float, num_read: int) -> None:
    ramp = pipeline(10, window_seconds=15.0)  # a frame every 1.5 s, 13.5 s from the first to the last one
    path = series(nifti, seconds * np.arange(num_read), repetition_time=seconds)
    window = ramp(path, generator=generator())
    assert window.shape == (1, 6, 6, 6, 10)
    np.testing.assert_allclose(unit(course_of(window)), np.arange(10) / 9, rtol=0, atol=1e-5)
    too_short = series(nifti, seconds * np.arange(num_read - 1), repetition_time=seconds, name="short.nii.gz")
    with pytest.raises(ScanError) as caught:
        ramp(too_short, generator=None)
    assert (caught.value.reason, caught.value.path) == (ScanReason.SHORT_SERIES, str(too_short))
    assert f"{num_read - 1} frames" in str(caught.value)
    assert f"{seconds * (num_read - 2):g} s" in str(caught.value)
    assert "13.5 s" in str(caught.value)


@pytest.mark.parametrize("seconds", [0.1, 0.72, 0.8, 1.1, 2.2, 0.735])
@pytest.mark.parametrize("num_frames", [24, 25, 49])
def test_common_repetition_time_of_the_series_changes_no_bit(nifti: Any, seconds: float, num_frames: int) -> None:
    course = np.random.default_rng(1).normal(size=num_frames)
    path = series(nifti, course, repetition_time=seconds)  # float32 in the header
    for length in (24, num_frames):
        plain, common = pipeline(length), pipeline(length, window_seconds=seconds * length)
        for drawn in (None, 0, 1):
            each = [p(path, generator=None if drawn is None else generator(drawn)) for p in (plain, common)]
            assert torch.equal(*each)


def test_sidecar_has_precedence_and_unknown_repetition_time_is_an_error(nifti: Any, tmp_path: Path) -> None:
    path = series(nifti, np.arange(10.0) ** 2, repetition_time=0.0)
    short = pipeline(4, window_seconds=4.0)
    for cache in (None, VolumeCache(tmp_path / "cache")):
        short.cache = cache
        with pytest.raises(ScanError) as caught:
            short(path, generator=None)
        assert (caught.value.reason, caught.value.path) == (ScanReason.REPETITION_TIME, str(path))
    path = series(nifti, np.arange(10.0), repetition_time=1.0)
    path.with_name("bold.json").write_text(json.dumps({"RepetitionTime": 3.0}))
    np.testing.assert_allclose(short._positions(path), [0, 1 / 3, 2 / 3, 1])


def test_short_series_is_extended_back_and_forth_before_it_is_interpolated(nifti: Any) -> None:
    path = series(nifti, np.array([0.0, 2.0, 4.0]), repetition_time=2.0)
    window = pipeline(8, window_seconds=12.0, short_series="pad")(path, generator=generator())
    # One frame every 1.5 s, of the time course 0, 2, 4, 2, 0, 2, ... with a frame every 2 s.
    expected = np.array([0, 1.5, 3, 3.5, 2, 0.5, 1, 2.5])
    np.testing.assert_allclose(unit(course_of(window)), unit(expected), rtol=0, atol=1e-5)


def test_padding_needs_no_memory_for_frames_that_are_not_used(nifti: Any) -> None:
    path = series(nifti, np.array([0.0, 1.0]), repetition_time=0.02)
    padded = pipeline(3, window_seconds=300.0, short_series="pad")
    assert padded(path, generator=None).shape == (1, 6, 6, 6, 3)
    assert padded._positions(path).tolist() == [0, 5_000, 10_000]


def test_window_is_a_function_of_the_generator(nifti: Any, tmp_path: Path) -> None:
    path = series(nifti, np.random.default_rng(2).normal(size=30), repetition_time=0.9)
    for cache in (None, VolumeCache(tmp_path / "cache")):
        drawn = pipeline(8, cache, window_seconds=10.0, augment=AugmentConfig())
        windows = [drawn(path, generator=generator(seed)) for seed in (0, 1, 0)]
        assert torch.equal(windows[0], windows[2])
        assert not torch.equal(windows[0], windows[1])


def test_cache_is_shared_by_all_window_seconds() -> None:
    assert pipeline(8).fingerprint == pipeline(8, window_seconds=10.0).fingerprint


def test_unfit_window_seconds_is_rejected() -> None:
    with pytest.raises(ValueError, match="window_seconds: is for series; T1"):
        Pipeline(PipelineConfig(image_size=(6, 6, 6), window_seconds=10.0), modality="T1")
    for seconds in (0.01, 20_000.0):  # the latter in ms
        with pytest.raises(ValueError, match="window_seconds"):
            pipeline(8, window_seconds=seconds)
