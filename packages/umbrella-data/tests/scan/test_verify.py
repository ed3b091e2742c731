"""Every voxel of a scan is verified: all frames of a series, in one pass and in little memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.modality import MODALITIES
from umbrella_data.scan import reader as scan_file
from umbrella_data.scan import verify as verify_module
from umbrella_data.scan.verify import verify_scan


def reason_of(*paths: Path, modality: str = "rsfMRI", mask: Path | None = None) -> ScanReason:
    with pytest.raises(ScanError) as caught:
        verify_scan(paths, modality=modality, mask=mask)
    assert caught.value.path in map(str, (*paths, mask))
    return caught.value.reason


@pytest.mark.parametrize("name", ["bold.nii", "bold.nii.gz"])
@pytest.mark.parametrize("frame", [0, 20, 39])
def test_series_is_rejected_when_one_voxel_of_any_frame_is_not_finite(
    nifti: Any, random_voxels: Any, name: str, frame: int
) -> None:
    voxels = random_voxels(4, 5, 6, 40).astype(np.float32)
    assert verify_scan([nifti.write(voxels, name)], modality="rsfMRI").num_frames == 40
    voxels[1, 2, 3, frame] = np.nan
    assert reason_of(nifti.write(voxels, name)) == ScanReason.NON_FINITE


def test_series_is_rejected_as_one_read_whole(nifti: Any, random_voxels: Any) -> None:
    series = random_voxels(4, 5, 6, 8)
    assert reason_of(nifti.write(np.full_like(series, 3), "flat.nii")) == ScanReason.CONSTANT
    assert reason_of(nifti.write(series, "large.nii", scaling=(1e37, 0.0))) == ScanReason.NON_FINITE
    assert reason_of(nifti.write(series[..., 0], "volume.nii")) == ScanReason.RANK
    path = nifti.write(series, "cut.nii.gz")
    path.write_bytes(path.read_bytes()[:-3])
    assert reason_of(path) == ScanReason.GZIP_TRUNCATED
    assert reason_of(path, path) == ScanReason.MAPS


@pytest.mark.parametrize("orientation", ["RAS", "SPL"])
def test_series_is_rejected_when_its_mask_leaves_one_value_in_all_frames(
    nifti: Any, random_voxels: Any, orientation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_file, "_SLICE_BLOCK_BYTES", 1)  # slice by slice
    series, brain = random_voxels(4, 5, 6, 8), np.zeros((4, 5, 6), np.uint8)
    brain[1:3, 1:4, 2:5] = 1
    series[brain == 1] = 0
    mask = nifti.write(brain, "mask.nii", orientation=orientation)
    path = nifti.write(series, "bold.nii", orientation=orientation)
    assert reason_of(path, mask=mask) == ScanReason.CONSTANT
    series[2, 3, 4, 7] = 5
    nifti.write(series, "bold.nii", orientation=orientation)
    assert verify_scan([path], modality="rsfMRI", mask=mask).num_frames == 8


def test_series_of_several_files_is_rejected_when_their_grids_differ(
    nifti: Any, random_voxels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(MODALITIES["rsfMRI"], channels=("echo 1", "echo 2"))
    monkeypatch.setattr(verify_module, "find_modality", lambda _: spec)
    series = random_voxels(4, 5, 6, 8)
    first, second = nifti.write(series, "1.nii"), nifti.write(series, "2.nii", orientation="LPI")
    assert verify_scan([first, second], modality="rsfMRI").num_frames == 8
    assert reason_of(first) == ScanReason.MAPS
    assert reason_of(first, nifti.write(series[..., :7], "short.nii")) == ScanReason.MAPS
    assert reason_of(first, nifti.write(series, "moved.nii", affine=np.diag([2, 2, 2.2, 1]))) == ScanReason.MAPS


@pytest.mark.parametrize("name", ["bold.nii", "bold.nii.gz"])
def test_long_series_is_verified_in_one_pass_and_in_little_memory(
    nifti: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = np.random.default_rng(0).integers(0, 99, (32, 32, 32, 600), dtype=np.int16)
    path, num_bytes = nifti.write(series, name), series.nbytes
    del series
    inflated = []
    iter_gzip = scan_file.iter_gzip

    def counted(*args: Any, **options: Any) -> Any:
        for chunk in iter_gzip(*args, **options):
            inflated.append(len(chunk))
            yield chunk

    monkeypatch.setattr(scan_file, "iter_gzip", counted)
    tracemalloc.start()
    verify_scan([path], modality="rsfMRI")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < num_bytes / 8
    assert sum(inflated) < 1.1 * num_bytes
