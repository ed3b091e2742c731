"""Frames without an image, and frames that repeat, are warnings."""

from __future__ import annotations

import numpy as np
import pytest

from umbrella_data.scan.verify import verify_scan


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (lambda series: None, ()),
        (lambda series: series[..., 3].fill(0), ("empty_frames",)),
        (lambda series: series[..., 3].fill(7), ("empty_frames",)),
        (lambda series: series[..., 2:5].fill(0), ("empty_frames",)),
        (lambda series: np.copyto(series[..., 3], series[..., 2]), ()),
        (lambda series: np.copyto(series[..., 3:5], series[..., 2:3]), ("repeated_frames",)),
        (lambda series: np.copyto(series[..., 3:5], series[..., :1]), ()),
        (lambda series: np.copyto(series[..., :3], series[..., 2:3]), ("repeated_frames",)),
    ],
)
def test_empty_and_repeated_frames_are_warnings(nifti, random_voxels, change, codes):
    series = random_voxels(4, 5, 6, 8)
    change(series)
    path = nifti.write(series, repetition_time=2.0)
    assert verify_scan([path], modality="rsfMRI").warnings == ({path: codes} if codes else {})


def test_volume_has_no_warning_about_frames(nifti, random_voxels):
    path = nifti.write(random_voxels(4, 5, 6))
    assert verify_scan([path], modality="T1").warnings == {}


@pytest.mark.parametrize("has_mask", [False, True])
def test_frame_without_a_finite_voxel_other_than_0_is_empty(nifti, random_voxels, has_mask):
    series = random_voxels(4, 5, 6, 8).astype(np.float32)
    mask = None
    if has_mask:
        brain = np.zeros((4, 5, 6), dtype=np.uint8)
        brain[1:3, 1:4, 1:5] = 1
        mask = nifti.write(brain, "mask.nii.gz")
        series[brain == 0] = np.nan
        series[brain == 1, 3] = 0
    else:
        series[..., 3] = np.nan
    path = nifti.write(series, repetition_time=2.0)
    found = verify_scan([path], modality="rsfMRI", mask=mask, non_finite="zero")
    assert set(found.warnings[path]) == {"empty_frames", "non_finite_zeroed"}
