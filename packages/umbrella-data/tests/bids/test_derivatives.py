"""Choosing one version of each scan of fMRIPrep and QSIPrep trees, and finding brain masks."""

from __future__ import annotations

import numpy as np
import pytest

from umbrella_data.bids.derivatives import choose_versions, sibling_mask
from umbrella_data.bids.layout import find_scans
from umbrella_data.bids.manifests import write_manifests
from umbrella_data.cli import main
from umbrella_data.manifest.manifest import read_manifest

MNI = "MNI152NLin2009cAsym"
FMRIPREP = [
    "anat/sub-01_desc-preproc_T1w.nii.gz",
    "anat/sub-01_desc-brain_mask.nii.gz",
    "anat/sub-01_dseg.nii.gz",
    f"anat/sub-01_space-{MNI}_res-2_desc-preproc_T1w.nii.gz",
    f"anat/sub-01_space-{MNI}_res-2_desc-brain_mask.nii.gz",
    "func/sub-01_task-rest_run-1_space-T1w_desc-preproc_bold.nii.gz",
    f"func/sub-01_task-rest_run-1_space-{MNI}_res-2_desc-preproc_bold.nii.gz",
    f"func/sub-01_task-rest_run-1_space-{MNI}_res-2_boldref.nii.gz",
    f"func/sub-01_task-rest_run-2_space-{MNI}_res-2_desc-preproc_bold.nii.gz",
    f"func/sub-01_task-rest_run-2_space-{MNI}_res-2_desc-smoothAROMA_bold.nii.gz",
]
QSIPREP = ["dwi/sub-01_space-T1w_desc-preproc_dwi.nii.gz", "dwi/sub-01_space-T1w_desc-brain_mask.nii.gz"]


@pytest.fixture
def choose(tmp_path):
    def make(names, **filters):
        for name in names:
            path = tmp_path / "sub-01" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        listing = choose_versions(find_scans(tmp_path), **filters)
        return [scan.path.removeprefix("sub-01/") for scan in listing.scans], listing.messages

    return make


def test_preprocessed_scans_in_native_space_are_the_default(choose):
    paths, messages = choose([*FMRIPREP, *QSIPREP])
    assert paths == [FMRIPREP[0], QSIPREP[0], FMRIPREP[5], FMRIPREP[8]]
    assert any(f"space-{MNI}" in message for message in messages)


def test_space_option_keeps_this_space_only(choose):
    paths, messages = choose([*FMRIPREP, *QSIPREP], space=MNI)
    assert paths == [FMRIPREP[3], FMRIPREP[6], FMRIPREP[8]]
    assert any(message.startswith("1 ") and message.endswith(f"space-{MNI}") for message in messages)


def test_desc_option_keeps_this_description_only(choose):
    paths, messages = choose(FMRIPREP, space=MNI, desc="smoothAROMA")
    assert paths == [FMRIPREP[9]]
    assert any(message.startswith("2 ") and message.endswith("desc-smoothAROMA") for message in messages)


def test_raw_tree_is_unchanged(choose, tmp_path):
    names = [
        "anat/sub-01_run-1_T1w.nii.gz",
        "anat/sub-01_run-2_T1w.nii.gz",
        "anat/sub-01_UNIT1.nii.gz",
        "func/sub-01_task-rest_run-1_bold.nii.gz",
        "func/sub-01_task-rest_run-2_bold.nii.gz",
        "dwi/sub-01_dir-AP_dwi.nii.gz",
        "dwi/sub-01_dir-PA_dwi.nii.gz",
    ]
    paths, messages = choose([name for name in names if "UNIT1" not in name])
    assert messages == ()
    assert choose_versions(find_scans(tmp_path)) == find_scans(tmp_path)
    paths, messages = choose(names)
    assert sorted(paths) == sorted(names)
    assert [message.rpartition(": ")[2] for message in messages] == ["1 UNIT1"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("1 2", "echo-1"),
        ("1 2 3", "echo-2"),
        ("1 2 3 4", "echo-2"),
        ("8 9 10 11 12", "echo-10"),
        ("02 1 3", "echo-02"),
    ],
)
@pytest.mark.parametrize("name", ["func/sub-01_task-rest_{}_bold.nii.gz", "anat/sub-01_{}_T1w.nii.gz"])
def test_middle_echo_of_a_run_is_one_scan(choose, name, labels, expected):
    echoes = [name.format(f"echo-{label}") for label in labels.split()]
    paths, (message,) = choose(echoes)
    assert paths == [name.format(expected)]
    assert "--echo" in message
    assert sorted(part.split()[1] for part in message.rpartition(": ")[2].split(", ")) == sorted(
        f"echo-{label}" for label in labels.split() if f"echo-{label}" != expected
    )
    # A combination of the echoes is used instead of one of them.
    combined = name.format("").replace("__", "_")
    assert choose([combined])[0] == [combined]


@pytest.mark.parametrize(
    ("entities", "expected", "counted"),
    [
        (["", "rec-norm_"], "", "1 rec-norm"),
        (["rec-norm_", "rec-dis_"], "rec-dis_", "1 rec-norm"),
        (["rec-norm_"], "rec-norm_", None),
        (["part-mag_"], "part-mag_", None),
        (["", "part-mag_"], "", "1 part-mag"),
        (["rec-a_echo-1_", "rec-a_echo-2_", "rec-a_echo-3_", "rec-b_echo-1_"], "rec-a_echo-2_", "1 echo-1, 1 echo-3"),
    ],
)
def test_one_reconstruction_and_part_of_a_scan_is_used(choose, entities, expected, counted):
    paths, messages = choose([f"anat/sub-01_{each}T1w.nii.gz" for each in entities])
    assert paths == [f"anat/sub-01_{expected}T1w.nii.gz"]
    assert (messages[-1].rpartition(": ")[2] if messages else None) == counted


def test_echoes_of_derivatives_give_way_to_their_combination(choose):
    native = [f"func/sub-01_task-rest_echo-{echo}_desc-preproc_bold.nii.gz" for echo in (1, 2, 3)]
    combined = f"func/sub-01_task-rest_space-{MNI}_desc-preproc_bold.nii.gz"
    assert choose(native)[0] == [native[1]]
    assert choose([*native, combined])[0] == [combined]


def test_brain_mask_with_its_ending_in_upper_case_is_found(tmp_path):
    scan = tmp_path / "sub-01_desc-preproc_T1w.NII.GZ"
    assert sibling_mask(scan) is None
    mask = tmp_path / "sub-01_desc-brain_mask.NII.GZ"
    mask.touch()
    assert sibling_mask(scan) == mask


def test_brain_mask_of_ready_maps_is_that_of_their_series(tmp_path):
    mask = tmp_path / "sub-01_space-ACPC_desc-brain_mask.nii.gz"
    mask.touch()
    assert sibling_mask(tmp_path / "sub-01_space-ACPC_model-tensor_param-fa_desc-x_dwimap.nii.gz") == mask
    assert sibling_mask(tmp_path / "sub-01_FA.nii.gz") is None


def test_manifest_of_derivatives_takes_labels_from_the_raw_tree(nifti, random_voxels, tmp_path, capsys):
    for i in range(10):  # enough for several processes
        folder = f"fmriprep/sub-{i}/anat/sub-{i}"
        nifti.write(random_voxels(4, 5, 6), f"{folder}_desc-preproc_T1w.nii.gz")
        nifti.write(random_voxels(4, 5, 6), f"{folder}_space-{MNI}_desc-preproc_T1w.nii.gz")
    table = tmp_path / "participants.tsv"
    table.write_text("participant_id\tage\n" + "".join(f"sub-{i}\t{20 + i}\n" for i in range(10)))
    root, out = tmp_path / "fmriprep", tmp_path / "out"
    args = ["from-bids", str(root), "--out", str(out), "--space", MNI, "--participants", str(table), "--workers", "2"]
    assert main([*args, "--test-fraction", "0"]) == 0
    samples = list(read_manifest(out / "train.jsonl", data_root=root))
    assert {sample.task for sample in samples} == {"modality", "age"}
    assert [sample.subject for sample in samples if sample.task == "age"] == [f"sub-{i}" for i in range(10)]
    assert all(f"space-{MNI}" in sample.scans[0].paths[0].name for sample in samples)
    assert ": 10 desc-preproc" in capsys.readouterr().out


def test_manifest_of_derivatives_has_the_brain_masks_of_scans(nifti, random_voxels, tmp_path, capsys):
    brain = np.zeros((4, 5, 6), dtype=np.uint8)
    brain[1:3, 1:4, 1:5] = 1
    for name in ("anat/sub-1", "func/sub-1_task-rest", "anat/sub-2", "anat/sub-3"):
        subject = name[5:10]
        is_series = name.startswith("func")
        shape = (4, 5, 6, 3) if is_series else (4, 5, 6)
        options = {"repetition_time": 2.0} if is_series else {}
        suffix = "bold" if is_series else "T1w"
        nifti.write(random_voxels(*shape), f"prep/{subject}/{name}_desc-preproc_{suffix}.nii.gz", **options)
    nifti.write(brain, "prep/sub-1/anat/sub-1_desc-brain_mask.nii.gz")
    nifti.write(brain, "prep/sub-1/func/sub-1_task-rest_desc-brain_mask.nii.gz")
    nifti.write(brain[:-1], "prep/sub-2/anat/sub-2_desc-brain_mask.nii.gz")
    args = ["from-bids", str(tmp_path / "prep"), "--out", str(tmp_path), "--test-fraction", "0", "--workers", "1"]
    assert main(args) == 0
    scans = {scan for sample in read_manifest(tmp_path / "train.jsonl", data_root=tmp_path / "prep")
             for scan in sample.scans}  # fmt: skip
    assert {scan.paths[0].name: scan.mask and scan.mask.name for scan in scans} == {
        "sub-1_desc-preproc_T1w.nii.gz": "sub-1_desc-brain_mask.nii.gz",
        "sub-1_task-rest_desc-preproc_bold.nii.gz": "sub-1_task-rest_desc-brain_mask.nii.gz",
        "sub-3_desc-preproc_T1w.nii.gz": None,
    }
    printed = capsys.readouterr().out
    assert "3 of 4 scans have a brain mask" in printed
    assert "sub-2_desc-brain_mask.nii.gz: shape (3, 5, 6)" in printed
    assert main([*args, "--data-root", str(tmp_path)]) == 0
    samples = read_manifest(tmp_path / "train.jsonl", data_root=tmp_path)
    assert {scan for sample in samples for scan in sample.scans} == scans
    assert main([*args, "--no-masks"]) == 0
    samples = list(read_manifest(tmp_path / "train.jsonl", data_root=tmp_path / "prep"))
    assert {scan.mask for sample in samples for scan in sample.scans} == {None}
    assert {sample.subject for sample in samples} == {"sub-1", "sub-2", "sub-3"}


def test_rows_do_not_depend_on_the_number_of_processes(nifti, random_voxels, tmp_path):
    for i in range(12):
        nifti.write(random_voxels(4, 5, 6), f"bids/sub-{i}/anat/sub-{i}_T1w.nii.gz")
    reports = [write_manifests(tmp_path / "bids", out=tmp_path / str(n), num_workers=n) for n in (1, 2)]
    assert reports[0].rows == reports[1].rows
