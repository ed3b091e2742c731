"""Two affines are the same grid if they place every voxel at the same point."""

from __future__ import annotations

import numpy as np
import pytest

from umbrella_data.errors import ScanError
from umbrella_data.scan.geometry import grid_shift, is_same_grid
from umbrella_data.scan.volume import load_volume

LONG = (256, 4, 4)
# 1 mm voxels and a corner in scanner space.
SCAN = np.array([[1.0, 0, 0, -90], [0, 1, 0, -126], [0, 0, 1, -72], [0, 0, 0, 1]])


def changed(row: int, column: int, by: float) -> np.ndarray:
    affine = SCAN.copy()
    affine[row, column] += by
    return affine


def test_grid_shift_is_the_largest_distance_between_corners() -> None:
    assert grid_shift(SCAN, changed(0, 0, 0.0099), shape=LONG) == pytest.approx(255 * 0.0099)
    assert grid_shift(SCAN, changed(0, 0, 0.0099), shape=(4, 256, 256)) == pytest.approx(3 * 0.0099)
    both = SCAN.copy()
    both[:3, 3] += [0.3, -0.4, 0]
    assert grid_shift(SCAN, both, shape=LONG) == pytest.approx(0.5)


@pytest.mark.parametrize("by", [0.0099, -0.0099, 0.0003])
def test_grids_differ_when_a_far_corner_moves(by: float) -> None:
    assert not is_same_grid(SCAN, changed(0, 0, by), shape=LONG)
    assert not is_same_grid(SCAN, changed(1, 0, by), shape=LONG)


def test_grid_is_the_same_when_it_moves_by_a_small_fraction_of_a_voxel() -> None:
    assert is_same_grid(SCAN, SCAN.astype(np.float32).astype(np.float64) + 1e-6, shape=LONG)
    assert is_same_grid(SCAN, changed(2, 3, 0.04), shape=LONG)
    assert not is_same_grid(SCAN, changed(2, 3, 0.06), shape=LONG)
    # A fraction of the voxel, not of a millimetre.
    large = SCAN @ np.diag([3.0, 3.0, 3.0, 1.0])
    moved = large.copy()
    moved[2, 3] += 0.06
    assert is_same_grid(large, moved, shape=LONG)


@pytest.mark.parametrize("other", ["mask", "map"])
def test_scan_is_rejected_with_a_mask_or_map_whose_far_corner_is_elsewhere(nifti, random_voxels, other) -> None:
    voxels = (random_voxels(*LONG) % 2).astype(np.float32)
    fa = voxels * np.linspace(0.2, 0.8, LONG[0], dtype=np.float32)[:, None, None]
    scan = nifti.write(fa, "scan.nii", affine=SCAN)
    values = voxels if other == "mask" else 1e-3 * fa  # MD in mm2/s, next to the scan as FA
    near = nifti.write(values, "near.nii", affine=changed(0, 0, 0.0001))
    far = nifti.write(values, "far.nii", affine=changed(0, 0, 0.0099))

    def load(file):
        if other == "mask":
            return load_volume(scan, modality="T1", mask=file)
        return load_volume([scan, file], modality="dMRI")

    load(near)
    with pytest.raises(ScanError) as caught:
        load(far)
    assert (caught.value.reason, caught.value.path) == ("mask" if other == "mask" else "maps", str(far))
