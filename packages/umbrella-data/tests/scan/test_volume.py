"""Scans of any stored orientation are read in RAS+; maps must belong together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.volume import load_volume, read_shape

ORIENTATIONS = ("RAS", "LAS", "PSR", "LPI", "SAL", "IRP")


def oblique(*, degrees: float = 12.0) -> np.ndarray:
    """Axes rotated around all three world axes, with voxels of 2 x 2.5 x 3 mm."""
    affine = np.eye(4)
    for axis in range(3):
        turn = np.eye(4)
        first, second = (axis + 1) % 3, (axis + 2) % 3
        cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        turn[[first, first, second, second], [first, second, first, second]] = [cosine, -sine, sine, cosine]
        affine = affine @ turn
    affine[:3, :3] = affine[:3, :3] * [2.0, 2.5, 3.0]
    affine[:3, 3] = [-30.0, 12.0, 5.0]
    return affine


@pytest.mark.parametrize("affine", [np.diag([2.0, 2.5, 3.0, 1.0]), oblique()], ids=["straight", "oblique"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_load_volume_gives_the_same_tensor_for_every_stored_orientation(
    nifti: Any, random_voxels: Any, affine: np.ndarray, orientation: str
) -> None:
    voxels = random_voxels(5, 6, 7)
    path = nifti.write(voxels, affine=affine, orientation=orientation)
    assert nib.aff2axcodes(nib.load(path).affine) == tuple(orientation)
    volume = load_volume(path, modality="T1")
    assert volume.data.dtype == torch.float32
    np.testing.assert_array_equal(volume.data[0], voxels)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)
    assert volume.spacing == (2.0, 2.5, 3.0)
    shape = read_shape(path)
    assert (shape.shape, shape.spacing) == ((5, 6, 7), (2.0, 2.5, 3.0))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_load_volume_keeps_right_on_the_right_when_reoriented(nifti: Any, orientation: str) -> None:
    voxels = np.zeros((6, 6, 6), np.int16)
    voxels[5, 3, 1] = 100  # far right, a little anterior, low
    data = load_volume(nifti.write(voxels, orientation=orientation), modality="T1").data[0]
    assert np.unravel_index(int(data.argmax()), data.shape) == (5, 3, 1)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("name", ["bold.nii", "bold.nii.gz"])
def test_load_volume_reads_a_window(nifti: Any, random_voxels: Any, orientation: str, name: str) -> None:
    series = random_voxels(4, 5, 6, 12)
    path = nifti.write(series, name, orientation=orientation, repetition_time=0.8)
    whole = load_volume(path, modality="bold")
    assert whole.data.shape == (1, 4, 5, 6, 12)
    assert whole.repetition_time == pytest.approx(0.8)
    np.testing.assert_array_equal(whole.data[0], series)
    window = load_volume(path, modality="rsfMRI", window=(3, 5)).data
    np.testing.assert_array_equal(window[0], series[..., 3:8])
    # Time first in memory.
    assert window.stride()[4] == 4 * 5 * 6
    assert read_shape(path).shape == (4, 5, 6, 12)


def test_load_volume_rejects_a_window_when_the_modality_has_no_frames(nifti: Any, random_voxels: Any) -> None:
    with pytest.raises(ValueError, match="T1 has no frames"):
        load_volume(nifti.write(random_voxels(4, 5, 6)), modality="T1", window=(0, 1))
    with pytest.raises(ValueError, match="unknown modality"):
        load_volume(nifti.write(random_voxels(4, 5, 6)), modality="T7")


def maps(nifti: Any, *, orientation: str = "RAS", shape: tuple[int, ...] = (4, 5, 6)) -> list[Path]:
    rng = np.random.default_rng(0)
    fa, md = rng.random(shape, dtype=np.float32), 1e-3 * rng.random(shape, dtype=np.float32)
    return [nifti.write(fa, "fa.nii.gz"), nifti.write(md, "md.nii.gz", orientation=orientation)]


@pytest.mark.parametrize("orientation", ["RAS", "LPI"])
def test_load_volume_stacks_maps_when_given_as_a_list(nifti: Any, orientation: str) -> None:
    paths = maps(nifti, orientation=orientation)
    volume = load_volume(paths, modality="dMRI")
    assert volume.data.shape == (2, 4, 5, 6)
    for channel, path in zip(volume.data, paths, strict=True):
        np.testing.assert_array_equal(channel, nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32))


def test_load_volume_rejects_maps_when_they_do_not_belong_together(nifti: Any, random_voxels: Any) -> None:
    fa, md = maps(nifti)
    other_shape = nifti.write(random_voxels(4, 5, 7), "other.nii.gz")
    moved = nifti.write(random_voxels(4, 5, 6), "moved.nii.gz", affine=np.diag([2, 2, 2.2, 1]))
    not_fa = nifti.write(random_voxels(4, 5, 6), "large.nii.gz")
    for paths, culprit in (
        ([fa, other_shape], other_shape),
        ([fa, moved], moved),
        ([fa, md, md], fa),
        ([not_fa, md], not_fa),
    ):
        with pytest.raises(ScanError) as caught:
            load_volume(paths, modality="dMRI")
        assert (caught.value.reason, caught.value.path) == (ScanReason.MAPS, str(culprit))


def test_load_volume_rejects_when_files_and_channels_differ(nifti: Any, random_voxels: Any) -> None:
    path = nifti.write(random_voxels(4, 5, 6))
    for paths in ([], [path, path]):
        with pytest.raises(ScanError) as caught:
            load_volume(paths, modality="T1")
        assert caught.value.reason == ScanReason.MAPS


def test_load_volume_does_not_need_indexed_gzip(
    nifti: Any, random_voxels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nifti.write(random_voxels(4, 5, 6))
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    monkeypatch.setitem(sys.modules, "indexed_gzip", None)
    with pytest.raises(ScanError) as caught:
        load_volume(path, modality="T1")
    assert caught.value.reason == ScanReason.GZIP_CRC


def test_load_volume_equals_nibabel_when_scans_are_real(real_data: Path) -> None:
    found, rejected = 0, {}
    for path in sorted(real_data.glob("sub-*/*/*.nii*")):
        is_volume = path.parent.name == "anat"
        try:
            data = load_volume(path, modality="T1" if is_volume else "rsfMRI").data[0]
        except ScanError as error:
            rejected[path.name] = error.reason
            continue
        expected = nib.as_closest_canonical(nib.load(path)).get_fdata().astype(np.float32)
        np.testing.assert_array_equal(data, expected)
        found += 1
    assert found >= 30
    # These two declare that voxels begin at byte 352; they begin at 704, and 352 bytes are left over. Other readers
    # shift every voxel by 176 places.
    assert set(rejected.values()) == {ScanReason.TRAILING}
    assert all(name.startswith("sub-nt01") for name in rejected)


def test_load_volume_reads_or_rejects_when_files_are_nibabels_own() -> None:
    from nibabel.testing import data_path

    reasons = {}
    for path in sorted(Path(data_path).glob("*.nii*")):
        try:
            rank = len(read_shape(path).shape)
            data = load_volume(path, modality="T1" if rank == 3 else "rsfMRI").data[0]
        except ScanError as error:
            reasons[path.name] = error.reason
            continue
        expected = nib.as_closest_canonical(nib.load(path)).get_fdata().astype(np.float32)
        np.testing.assert_array_equal(data, expected.reshape(data.shape))
        reasons[path.name] = None
    assert reasons.pop("resampled_anat_moved.nii") == ScanReason.NON_FINITE
    assert reasons.pop("row_major.dconn.nii") == ScanReason.RANK
    assert len(reasons) >= 6
    assert set(reasons.values()) == {None}
