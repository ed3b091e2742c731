"""Real values equal those of nibabel for every type, scaling and byte order; invalid values are rejected."""

from __future__ import annotations

import gzip
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.voxels import read_voxels

TYPES = ("u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")


def reason_of(path: Any, **options: Any) -> ScanReason:
    with pytest.raises(ScanError) as caught:
        read_voxels(path, **{"rank": 3, **options})
    assert caught.value.path == str(path)
    return caught.value.reason


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("scaling", [None, (0.37, -12.5)])
def test_read_voxels_equals_nibabel_when_types_differ(
    nifti: Any, random_voxels: Any, dtype: str, endianness: str, scaling: tuple[float, float] | None
) -> None:
    stored = (random_voxels(4, 5, 6) % 120).astype(dtype)
    path = nifti.write(stored, "scan.nii", endianness=endianness, scaling=scaling)
    image = nib.load(path)
    assert image.header.get_data_dtype() == np.dtype(dtype).newbyteorder(endianness)
    np.testing.assert_array_equal(read_voxels(path, rank=3).frames[0], image.get_fdata().astype(np.float32))


@pytest.mark.parametrize(
    ("value", "reason"),
    [(np.nan, ScanReason.NON_FINITE), (np.inf, ScanReason.NON_FINITE), (-np.inf, ScanReason.NON_FINITE)],
)
def test_read_voxels_rejects_when_one_voxel_is_not_finite(
    nifti: Any, random_voxels: Any, value: float, reason: ScanReason
) -> None:
    voxels = random_voxels(4, 5, 6).astype(np.float32)
    voxels[1, 2, 3] = value
    assert reason_of(nifti.write(voxels)) == reason


def test_read_voxels_rejects_when_values_overflow_float32(nifti: Any, random_voxels: Any) -> None:
    assert reason_of(nifti.write(random_voxels(4, 5, 6), scaling=(1e37, 0.0))) == ScanReason.NON_FINITE
    assert reason_of(nifti.write(random_voxels(4, 5, 6) * 1e300, "double.nii")) == ScanReason.NON_FINITE


def test_read_voxels_rejects_when_constant(nifti: Any) -> None:
    assert reason_of(nifti.write(np.full((4, 5, 6), 7, np.int16))) == ScanReason.CONSTANT


def test_read_voxels_rejects_when_the_rank_is_wrong(nifti: Any, random_voxels: Any) -> None:
    volume, series = nifti.write(random_voxels(4, 5, 6), "a.nii"), nifti.write(random_voxels(4, 5, 6, 3), "b.nii")
    assert reason_of(series, rank=3) == ScanReason.RANK
    assert reason_of(volume, rank=4) == ScanReason.RANK
    assert reason_of(nifti.write(random_voxels(4, 5, 6, 1), "c.nii"), rank=4) == ScanReason.RANK


def test_read_voxels_accepts_a_volume_when_stored_with_one_frame(nifti: Any, random_voxels: Any) -> None:
    voxels = random_voxels(4, 5, 6, 1)
    np.testing.assert_array_equal(read_voxels(nifti.write(voxels), rank=3).frames[0], voxels[..., 0])


@pytest.mark.parametrize("window", [(-1, 2), (0, 0), (2, 3), (4, 1)])
def test_read_voxels_rejects_when_the_window_leaves_the_series(
    nifti: Any, random_voxels: Any, window: tuple[int, int]
) -> None:
    assert reason_of(nifti.write(random_voxels(4, 5, 6, 4)), rank=4, window=window) == ScanReason.WINDOW


def test_read_voxels_counts_only_the_window_when_bounded(nifti: Any, random_voxels: Any) -> None:
    path = nifti.write(random_voxels(4, 5, 6, 8))
    assert read_voxels(path, rank=4, window=(1, 2), max_voxels=240).frames.shape == (2, 4, 5, 6)
    assert reason_of(path, rank=4, max_voxels=240) == ScanReason.TOO_LARGE


def test_read_voxels_ignores_bad_frames_when_outside_of_the_window(nifti: Any, random_voxels: Any) -> None:
    series = random_voxels(4, 5, 6, 4).astype(np.float32)
    series[0, 0, 0, 3] = np.nan
    path = nifti.write(series)
    np.testing.assert_array_equal(read_voxels(path, rank=4, window=(1, 2)).frames[1], series[..., 2])
    assert reason_of(path, rank=4) == ScanReason.NON_FINITE


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_read_voxels_raises_only_scan_errors_when_headers_are_random(nifti: Any, random_voxels: Any, name: str) -> None:
    whole = nifti.write(random_voxels(5, 6, 7, 4), "whole.nii").read_bytes()
    path = nifti.folder / name
    rng = np.random.default_rng(0)
    outcomes = {"read": 0, "rejected": 0}
    for _ in range(200):
        content = bytearray(whole)
        for position in rng.integers(0, 352, size=int(rng.integers(1, 6))):
            content[position] = int(rng.integers(0, 256))
        path.write_bytes(gzip.compress(content, compresslevel=1) if name.endswith(".gz") else content)
        try:
            read_voxels(path, rank=4)
            outcomes["read"] += 1
        except ScanError:
            outcomes["rejected"] += 1
    assert min(outcomes.values()) > 20
