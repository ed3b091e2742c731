"""Scans of a BIDS tree are found by name and verified to be readable, or rejected with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from umbrella_data.bids.layout import find_scans, read_facts
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
    assert listing.notes == ()


def test_files_of_other_kinds_are_counted_not_taken(tree):
    listing = tree(
        "sub-01/anat/sub-01_T2w.nii.gz",
        "sub-01/func/sub-01_task-rest_sbref.nii.gz",
        "sub-01/func/sub-01_task-rest_part-phase_bold.nii.gz",
        "sub-01/func/sub-01_task-rest_bold.json",
        "sub-01/fmap/sub-01_bold.nii.gz",
        "scan.nii.gz",
        "derivatives/fmriprep/sub-01/anat/sub-01_T1w.nii.gz",
        "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
        ".git/annex/sub-01/anat/sub-01_T1w.nii.gz",
    )
    assert listing.scans == ()
    assert listing.notes == ("other NIfTI files, left out: 1 T2w, 2 bold, 1 sbref, 1 without a BIDS name",)


def test_scan_in_the_folder_of_another_subject_is_left_out(tree):
    listing = tree("sub-01/anat/sub-02_T1w.nii.gz")
    assert listing.scans == ()
    assert listing.notes == (
        "scans that are in the folder of another subject, left out: 1 (sub-01/anat/sub-02_T1w.nii.gz)",
    )


def test_scan_stored_twice_is_taken_once(tree):
    listing = tree("sub-01/anat/sub-01_T1w.nii", "sub-01/anat/sub-01_T1w.nii.gz")
    assert [scan.path for scan in listing.scans] == ["sub-01/anat/sub-01_T1w.nii"]
    assert listing.notes[0].endswith(
        "left out: 1 (sub-01/anat/sub-01_T1w.nii.gz, the same as sub-01/anat/sub-01_T1w.nii)"
    )


def test_folders_that_are_links_are_not_followed_but_named(tree, tmp_path):
    tree("sub-01/anat/sub-01_T1w.nii")
    for i in range(2, 9):
        (tmp_path / "bids" / f"sub-0{i}").symlink_to(tmp_path)
    listing = find_scans(tmp_path / "bids")
    assert len(listing.scans) == 1
    (note,) = listing.notes
    assert note.startswith("links to folders, not followed: copy them")
    assert note.endswith(": 7 (sub-02, sub-03, sub-04, sub-05, sub-06 and 2 more)")


def test_tree_when_missing_is_rejected(tmp_path):
    with pytest.raises(ManifestError, match="no such folder"):
        find_scans(tmp_path / "nowhere")


@pytest.fixture
def only_scan(nifti, random_voxels):
    """Writes one scan into a tree, and returns what `read_facts` is given."""

    def write(name, *shape, **options):
        nifti.write(random_voxels(*shape), f"bids/sub-01/{name}", **options)
        root = nifti.folder / "bids"
        return find_scans(root).scans[0], root

    return write


def test_facts_of_a_series_count_its_frames(only_scan):
    scan, root = only_scan("func/sub-01_task-rest_bold.nii.gz", 4, 5, 6, 9)
    assert read_facts(scan, root=root).num_frames == 9
    with pytest.raises(ScanError) as caught:
        read_facts(scan, root=root, min_frames=10)
    assert caught.value.reason == "short_series"


def test_facts_of_a_dwi_count_its_b0_volumes(only_scan, nifti):
    pytest.importorskip("dipy")
    directions = np.random.default_rng(0).normal(size=(8, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    directions[:2] = 0
    scan, root = only_scan("dwi/sub-01_dwi.nii.gz", 8, 8, 8, 8)
    folder = nifti.folder / "bids/sub-01/dwi"
    np.savetxt(folder / "sub-01_dwi.bval", [[0, 5, *[1000] * 6]], fmt="%d")
    np.savetxt(folder / "sub-01_dwi.bvec", directions.T)
    assert read_facts(scan, root=root).num_b0 == 2


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("func/sub-01_task-rest_bold.nii.gz", (4, 5, 6), "rank"),
        ("anat/sub-01_T1w.nii.gz", (4, 5, 6, 7), "rank"),
        ("dwi/sub-01_dwi.nii.gz", (8, 8, 8, 8), "bval"),
    ],
)
def test_scan_when_unreadable_is_rejected_with_its_reason(only_scan, name, shape, reason):
    if reason == "bval":
        pytest.importorskip("dipy")
    scan, root = only_scan(name, *shape)
    with pytest.raises(ScanError) as caught:
        read_facts(scan, root=root)
    assert caught.value.reason == reason


def test_scan_when_a_link_leads_out_of_the_tree_is_rejected(only_scan, nifti, random_voxels):
    scan, root = only_scan("anat/sub-01_T1w.nii.gz", 4, 5, 6)
    outside = nifti.write(random_voxels(4, 5, 6), "outside.nii.gz")
    (root / scan.path).unlink()
    (root / scan.path).symlink_to(outside)
    with pytest.raises(ScanError, match="leads out"):
        read_facts(scan, root=root)


def test_scan_when_a_sibling_file_it_leads_out_of_the_tree_is_rejected(only_scan, nifti):
    scan, root = only_scan("func/sub-01_task-rest_bold.nii.gz", 4, 5, 6, 9)
    (nifti.folder / "outside.json").write_text("{}")
    (root / "sub-01/func/sub-01_task-rest_bold.json").symlink_to(nifti.folder / "outside.json")
    with pytest.raises(ScanError, match=r"bold\.json' is a link that leads out"):
        read_facts(scan, root=root)
