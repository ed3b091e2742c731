"""Resampling while reading equals reading, then resampling, and rejects the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.pipeline.resample import Grid, resample
from umbrella_data.pipeline.streaming import read_resampled
from umbrella_data.scan.reader import open_scan
from umbrella_data.scan.voxels import read_voxels

GRIDS = {
    "trilinear": Grid(image_size=(7, 9, 11)),
    "area": Grid(image_size=(5, 6, 7), interpolation="area"),
    "spaced": Grid(image_size=(12, 10, 14), spacing=(3.0, 3.0, 1.5)),
}


def both(path: Path, *, rank: int, grid: Grid, window: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The results of `read_resampled`, and of `read_voxels` followed by `resample`."""
    with open_scan(path) as scan:
        fast = read_resampled(scan, rank=rank, grid=grid, window=window)
    voxels = read_voxels(path, rank=rank, window=window)
    slow = resample(torch.from_numpy(voxels.frames)[:, None], spacing=voxels.spacing, grid=grid)[:, 0]
    return fast, slow.numpy()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("orientation", ["RAS", "LPI", "PSR", "SAL", "IRP"])
def test_read_resampled_equals_resample_when_axes_differ(
    nifti: Any, random_voxels: Any, grid: Grid, orientation: str
) -> None:
    affine = np.diag([2.0, 2.5, 3.0, 1.0])
    path = nifti.write(random_voxels(11, 13, 9), affine=affine, orientation=orientation)
    fast, slow = both(path, rank=3, grid=grid)
    assert fast.shape == (1, *grid.image_size)
    np.testing.assert_allclose(fast, slow, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("scaling", [None, (-0.37, 12.5)])
def test_read_resampled_equals_resample_when_types_differ(
    nifti: Any, random_voxels: Any, dtype: str, endianness: str, scaling: tuple[float, float] | None
) -> None:
    stored = (random_voxels(8, 9, 10) % 120).astype(dtype)
    path = nifti.write(stored, "scan.nii", endianness=endianness, scaling=scaling)
    fast, slow = both(path, rank=3, grid=GRIDS["spaced"])
    np.testing.assert_allclose(fast, slow, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["bold.nii", "bold.nii.gz"])
def test_read_resampled_reads_a_window(nifti: Any, random_voxels: Any, name: str) -> None:
    path = nifti.write(random_voxels(8, 9, 10, 12), name, orientation="LPI")
    for window in (None, (0, 1), (3, 5), (11, 1)):
        fast, slow = both(path, rank=4, grid=GRIDS["trilinear"], window=window)
        assert len(fast) == (12 if window is None else window[1])
        np.testing.assert_allclose(fast, slow, rtol=1e-6, atol=1e-5)


def test_read_resampled_pads_with_0_when_the_background_is_0(nifti: Any, random_voxels: Any) -> None:
    path = nifti.write(random_voxels(4, 5, 6) - 300)
    grid = Grid(image_size=(12, 12, 12), spacing=(2.0, 2.0, 2.0))
    with open_scan(path) as scan:
        masked = read_resampled(scan, rank=3, grid=grid, is_masked=True)
    whole, _ = both(path, rank=3, grid=grid)
    assert not masked[:, 0].any()
    assert (whole[:, 0] == whole.min()).all()
    np.testing.assert_array_equal(masked[:, 4:8, 4:8, 3:9], whole[:, 4:8, 4:8, 3:9])


def reason_of(path: Path, **options: Any) -> ScanReason:
    with pytest.raises(ScanError) as caught, open_scan(path) as scan:
        read_resampled(scan, **{"rank": 3, "grid": GRIDS["trilinear"], **options})
    assert caught.value.path == str(path)
    return caught.value.reason


def test_read_resampled_checks_every_voxel_when_few_are_used(nifti: Any, random_voxels: Any) -> None:
    voxels = random_voxels(16, 16, 16).astype(np.float32)
    voxels[1, 1, 1] = np.nan
    few = Grid(image_size=(2, 2, 2), spacing=(1.0, 1.0, 1.0))
    assert reason_of(nifti.write(voxels, "nan.nii.gz"), grid=few) == ScanReason.NON_FINITE
    assert reason_of(nifti.write(voxels * 0 + 7, "both.nii"), grid=few) == ScanReason.NON_FINITE
    voxels[1, 1, 1] = np.inf
    assert reason_of(nifti.write(voxels, "inf.nii"), grid=few) == ScanReason.NON_FINITE
    assert reason_of(nifti.write(random_voxels(4, 5, 6), scaling=(1e37, 0.0))) == ScanReason.NON_FINITE
    assert reason_of(nifti.write(np.full((4, 5, 6), 7, np.int16))) == ScanReason.CONSTANT


def test_read_resampled_validates_the_whole_file_when_few_voxels_are_used(nifti: Any, random_voxels: Any) -> None:
    path = nifti.write(random_voxels(16, 16, 16))
    whole = path.read_bytes()
    few = Grid(image_size=(2, 2, 2), spacing=(1.0, 1.0, 1.0))
    for damaged, reason in (
        (whole[:-8] + bytes(8), ScanReason.GZIP_CRC),
        (whole[:-3], ScanReason.GZIP_TRUNCATED),
        (whole + b"x", ScanReason.GZIP_TRAILING),
    ):
        path.write_bytes(damaged)
        assert reason_of(path, grid=few) == reason


def test_read_resampled_rejects_when_rank_window_or_size_is_wrong(nifti: Any, random_voxels: Any) -> None:
    series = nifti.write(random_voxels(4, 5, 6, 8))
    assert reason_of(series) == ScanReason.RANK
    assert reason_of(series, rank=4, window=(4, 5)) == ScanReason.WINDOW
    assert reason_of(series, rank=4, max_voxels=240) == ScanReason.TOO_LARGE
