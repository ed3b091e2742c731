"""Scans of a BIDS tree are found by name and validated, or rejected with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from umbrella_data.bids.layout import find_scans, read_metadata
from umbrella_data.errors import ManifestError, ScanError


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "bids"
    root.mkdir()

    def touch(*paths):
        for path in paths:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).touch()
        return find_scans(root)

    return touch


def test_scans_are_found_by_suffix_and_folder(tree):
    listing = tree(
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/ses-a/func/sub-01_ses-a_task-rest_run-1_bold.nii",
        "sub-02/dwi/sub-02_acq-b1000_dwi.nii.gz",
    )
    assert [(scan.name, scan.subject, scan.modality, scan.path) for scan in listing.scans] == [
        ("sub-01_T1w", "sub-01", "T1", "sub-01/anat/sub-01_T1w.nii.gz"),
        (
            "sub-01_ses-a_task-rest_run-1_bold",
            "sub-01",
            "rsfMRI",
            "sub-01/ses-a/func/sub-01_ses-a_task-rest_run-1_bold.nii",
        ),
        ("sub-02_acq-b1000_dwi", "sub-02", "dMRI", "sub-02/dwi/sub-02_acq-b1000_dwi.nii.gz"),
    ]
    assert [scan.session for scan in listing.scans] == [None, "ses-a", None]
    assert listing.messages == ()


def test_other_files_are_counted_and_left_out(tree):
    listing = tree(
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-01/func/sub-01_task-rest_sbref.nii.gz",
        "sub-01/func/sub-01_task-rest_part-phase_bold.nii.gz",
        "sub-01/func/sub-01_task-rest_part-real_bold.nii.gz",
        "sub-01/anat/sub-01_part-imag_T1w.nii.gz",
        "sub-01/anat/sub-01_inv-1_MP2RAGE.nii.gz",
        "sub-01/dwi/sub-01_model-tensor_param-rd_dwimap.nii.gz",
        "sub-01/anat/sub-01_FA.nii.gz",
        "sub-01/func/sub-01_task-rest_bold.json",
        "sub-01/fmap/sub-01_bold.nii.gz",
        "scan.nii.gz",
        "derivatives/fmriprep/sub-01/anat/sub-01_T1w.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
        ".git/annex/sub-01/anat/sub-01_T1w.nii.gz",
    )
    assert listing.scans == ()
    others, parts = listing.messages
    assert others.endswith(": 1 FA, 1 MP2RAGE, 1 T2w, 1 bold, 1 dwimap, 1 sbref, 1 without a BIDS name")
    assert parts.endswith(": 1 part-imag, 1 part-phase, 1 part-real")


def test_ending_in_upper_case_is_found(tree):
    listing = tree(
        "sub-01/anat/sub-01_T1w.NII",
        "sub-02/anat/sub-02_T1w.NII.GZ",
        "sub-02/anat/sub-02_T1w.nii",
        "sub-03/dwi/sub-03_FA.Nii.gz",
    )
    assert [scan.name for scan in listing.scans] == ["sub-01_T1w", "sub-02_T1w", "sub-03_FA"]
    (message,) = listing.messages
    assert message.endswith(": 1 (sub-02/anat/sub-02_T1w.nii, the same as sub-02/anat/sub-02_T1w.NII.GZ)")


def test_scan_in_the_folder_of_another_subject_is_left_out(tree):
    listing = tree("sub-01/anat/sub-02_T1w.nii.gz")
    assert listing.scans == ()
    (message,) = listing.messages
    assert message.endswith(": 1 (sub-01/anat/sub-02_T1w.nii.gz)")


def test_duplicate_scan_is_read_once(tree):
    listing = tree("sub-01/anat/sub-01_T1w.nii", "sub-01/anat/sub-01_T1w.nii.gz")
    assert [scan.path for scan in listing.scans] == ["sub-01/anat/sub-01_T1w.nii"]
    (message,) = listing.messages
    assert message.endswith(": 1 (sub-01/anat/sub-01_T1w.nii.gz, the same as sub-01/anat/sub-01_T1w.nii)")


def test_links_to_folders_are_listed_and_not_followed(tree, tmp_path):
    tree("sub-01/anat/sub-01_T1w.nii")
    for i in range(2, 9):
        (tmp_path / "bids" / f"sub-0{i}").symlink_to(tmp_path)
    listing = find_scans(tmp_path / "bids")
    assert len(listing.scans) == 1
    (message,) = listing.messages
    assert message.endswith(": 7 (sub-02, sub-03, sub-04, sub-05, sub-06 and 2 more)")


def test_missing_tree_is_rejected(tmp_path):
    with pytest.raises(ManifestError, match="nowhere"):
        find_scans(tmp_path / "nowhere")


@pytest.fixture
def only_scan(nifti, random_voxels):
    """Writes a tree of one scan; returns the arguments of `read_metadata`."""

    def write(name, *shape, **options):
        nifti.write(random_voxels(*shape), f"bids/sub-01/{name}", **options)
        root = nifti.folder / "bids"
        return find_scans(root).scans[0], root

    return write


def test_metadata_of_a_series_has_its_number_of_frames(only_scan):
    scan, root = only_scan("func/sub-01_task-rest_bold.nii.gz", 4, 5, 6, 9)
    assert read_metadata(scan, root=root).num_frames == 9
    with pytest.raises(ScanError) as caught:
        read_metadata(scan, root=root, min_frames=10)
    assert caught.value.reason == "short_series"


def test_metadata_of_a_dwi_has_its_number_of_b0_volumes(only_scan, nifti):
    pytest.importorskip("dipy")
    directions = np.random.default_rng(0).normal(size=(8, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    directions[:2] = 0
    scan, root = only_scan("dwi/sub-01_dwi.nii.gz", 8, 8, 8, 8)
    folder = nifti.folder / "bids/sub-01/dwi"
    np.savetxt(folder / "sub-01_dwi.bval", [[0, 5, *[1000] * 6]], fmt="%d")
    np.savetxt(folder / "sub-01_dwi.bvec", directions.T)
    assert read_metadata(scan, root=root).num_b0 == 2
    np.savetxt(folder / "sub-01_dwi.bval", [[60, 70, *[2000] * 6]], fmt="%d")
    with pytest.raises(ScanError) as caught:
        read_metadata(scan, root=root)
    assert caught.value.reason == "bval"
    found = read_metadata(scan, root=root, b0_threshold=70)
    assert found.num_b0 == 2
    assert any("high_b" in codes for codes in found.warnings.values())
    found = read_metadata(scan, root=root, b0_threshold=70, max_b=2000)
    assert not any("high_b" in codes for codes in found.warnings.values())


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("func/sub-01_task-rest_bold.nii.gz", (4, 5, 6), "rank"),
        ("anat/sub-01_T1w.nii.gz", (4, 5, 6, 7), "rank"),
        ("dwi/sub-01_dwi.nii.gz", (8, 8, 8, 8), "bval"),
    ],
)
def test_unreadable_scan_is_rejected_with_its_reason(only_scan, name, shape, reason):
    if reason == "bval":
        pytest.importorskip("dipy")
    scan, root = only_scan(name, *shape)
    with pytest.raises(ScanError) as caught:
        read_metadata(scan, root=root)
    assert caught.value.reason == reason


def test_link_out_of_the_tree_is_rejected(only_scan, nifti, random_voxels):
    scan, root = only_scan("anat/sub-01_T1w.nii.gz", 4, 5, 6)
    outside = nifti.write(random_voxels(4, 5, 6), "outside.nii.gz")
    (root / scan.path).unlink()
    (root / scan.path).symlink_to(outside)
    with pytest.raises(ScanError) as caught:
        read_metadata(scan, root=root)
    assert (caught.value.path, caught.value.reason) == (str(root / scan.path), "unreadable")


def test_sidecar_that_is_a_link_out_of_the_tree_is_rejected(only_scan, nifti):
    scan, root = only_scan("func/sub-01_task-rest_bold.nii.gz", 4, 5, 6, 9)
    (nifti.folder / "outside.json").write_text("{}")
    (root / "sub-01/func/sub-01_task-rest_bold.json").symlink_to(nifti.folder / "outside.json")
    with pytest.raises(ScanError, match=r"task-rest_bold\.json"):
        read_metadata(scan, root=root)
