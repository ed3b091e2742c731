"""Segmentations are found by subject and session, and read strictly."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from umbrella_data import ScanError
from umbrella_data.manifest.sample import Scan
from umbrella_train.baselines.regions import Segmentations, region_volumes
from umbrella_train.errors import RunError


def write(path: Path, values: np.ndarray | None = None, *, spacing: tuple[float, float, float] = (1, 1, 1)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.arange(8).reshape(2, 2, 2) if values is None else values
    nib.save(nib.Nifti1Image(labels.astype(np.float32), np.diag([*spacing, 1])), path)
    return path


def scan(name: str) -> Scan:
    return Scan("T1", (Path("anywhere") / name,))


def test_volumes_are_counts_of_voxels_in_mm3(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).choice([0, 3, 14175], (5, 6, 7))
    volumes = region_volumes(write(tmp_path / "a_dseg.nii.gz", labels, spacing=(1.5, 2, -0.5)))
    expected = dict.fromkeys((3, 14175), 0.0)
    for label in labels.flatten().tolist():
        if label:
            expected[label] += 1.5
    assert volumes == pytest.approx(expected)


def test_values_that_are_no_labels_and_damaged_files_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a_dseg.nii.gz", np.arange(8).reshape(2, 2, 2) / 2)
    with pytest.raises(RunError, match=r"a_dseg\.nii\.gz: has the value 0\.5"):
        region_volumes(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ScanError):
        region_volumes(path)


def test_segmentation_is_that_of_subject_and_session(tmp_path: Path) -> None:
    first = write(tmp_path / "sub-01" / "ses-a" / "anat" / "sub-01_ses-a_desc-x_dseg.nii.gz")
    second = write(tmp_path / "sub-01" / "ses-b" / "anat" / "sub-01_ses-b_desc-x_dseg.nii.gz")
    third = write(tmp_path / "sub-02_desc-x_dseg.nii")
    found = Segmentations(tmp_path)
    assert found.find(scan("sub-01_ses-a_T1w.nii.gz"), subject="sub-01") == first
    assert found.find(scan("sub-01_ses-b_task-rest_bold.nii.gz"), subject="01") == second
    assert found.find(scan("any.nii.gz"), subject="sub-02") == third
    for name, subject in [
        ("sub-01_T1w.nii.gz", "sub-01"),
        ("sub-01_ses-c_T1w.nii.gz", "sub-01"),
        ("sub-02_ses-a_T1w.nii.gz", "sub-02"),
        ("sub-03_T1w.nii.gz", "sub-03"),
    ]:
        assert found.find(scan(name), subject=subject) is None


def test_of_two_runs_the_scans_own_is_used(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"sub-01_run-{run}_desc-x_dseg.nii.gz") for run in (1, 2)]
    found = Segmentations(tmp_path)
    for run in (1, 2):
        assert found.find(scan(f"sub-01_run-{run}_T1w.nii.gz"), subject="sub-01") == paths[run - 1]
    assert found.find(scan("sub-01_task-rest_bold.nii.gz"), subject="sub-01") is None


def test_one_version_is_used_and_a_mixture_of_kinds_rejected(tmp_path: Path) -> None:
    native = write(tmp_path / "sub-01_dseg.nii.gz")
    write(tmp_path / "sub-01_space-MNI152NLin2009cAsym_dseg.nii.gz")
    assert Segmentations(tmp_path).find(scan("sub-01_T1w.nii.gz"), subject="sub-01") == native
    write(tmp_path / "sub-02_space-MNI152NLin2009cAsym_dseg.nii.gz")
    with pytest.raises(RunError, match="space-MNI152NLin2009cAsym, without entities"):
        Segmentations(tmp_path)


def test_folders_without_segmentations_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no such folder"):
        Segmentations(tmp_path / "no")
    with pytest.raises(RunError, match="has no file"):
        Segmentations(tmp_path)
