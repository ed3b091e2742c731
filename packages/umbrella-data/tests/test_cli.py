"""The command writes what it says, and ends with words and an exit code where it cannot."""

from __future__ import annotations

import pytest

from umbrella_data.cli import main
from umbrella_data.manifest import read_manifest


def test_from_bids_writes_manifests_and_lists_scans(nifti, random_voxels, tmp_path, capsys):
    for i in range(6):
        nifti.write(random_voxels(4, 5, 6), f"bids/sub-{i}/anat/sub-{i}_T1w.nii.gz")
    (tmp_path / "bids/sub-0/anat/sub-0_T1w.nii.gz").write_bytes(b"no scan")
    (tmp_path / "bids/participants.tsv").write_text("participant_id\tgroup\n0\ta\n1\ta\n2\tb\n3\tb\n")
    root, out = tmp_path / "bids", tmp_path / "out"
    assert main(["from-bids", str(root), "--out", str(out), "--test-fraction", "0", "--choice", "group"]) == 0
    manifest = read_manifest(out / "train.jsonl", data_root=root)
    manifest.validate()
    assert {sample.task for sample in manifest} == {"modality", "group"}
    printed = capsys.readouterr().out
    assert "5 subjects, 8 rows" in printed
    assert f"manifest: {out / 'train.jsonl'}" in printed
    assert f"data_root: {root}" in printed
    assert "scans that cannot be used: 1" in printed
    assert "sub-0_T1w.nii.gz" in printed


def test_from_bids_counts_and_names_doubtful_scans(nifti, random_voxels, tmp_path, capsys):
    for i in range(3):
        path = nifti.write(random_voxels(4, 5, 6), f"bids/sub-{i}/anat/sub-{i}_T1w.nii.gz")
        nifti.patch(path, 72, b"\x08\x00")  # bitpix
    nifti.patch(path, 252, bytes(4))  # neither qform nor sform
    assert main(["from-bids", str(tmp_path / "bids"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for words in ("doubts about scans that can be used:\n  bitpix: 3\n", f"  no_form: 1\n    {path}\n"):
        assert words in printed
    (tmp_path / "bids/sub-1/anat/sub-1_T1w.nii.gz").write_bytes(b"no scan")
    for i in (0, 2):
        nifti.write(random_voxels(4, 5, 6), f"bids/sub-{i}/anat/sub-{i}_T1w.nii.gz")
    assert main(["from-bids", str(tmp_path / "bids"), "--out", str(tmp_path / "out")]) == 0
    assert "doubts about" not in capsys.readouterr().out


def test_from_bids_when_nothing_is_readable_fails(tmp_path, capsys):
    (tmp_path / "sub-1/anat").mkdir(parents=True)
    (tmp_path / "sub-1/anat/sub-1_T1w.nii").write_bytes(b"no scan")
    assert main(["from-bids", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "no readable scan" in capsys.readouterr().err


def test_from_bids_when_there_is_no_tree_says_so(tmp_path, capsys):
    assert main(["from-bids", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["from-bids"], ["from-bids", "a", "--out", "b", "--test-fraction", "1.5"]])
def test_arguments_when_wrong_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: umbrella-data" in capsys.readouterr().err


def test_demo_writes_a_cohort_that_reads_back(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--num-train", "2", "--num-test", "1"]) == 0
    assert f"wrote {tmp_path / 'train.jsonl'}" in capsys.readouterr().out
    for name in ("train", "test"):
        read_manifest(tmp_path / f"{name}.jsonl").validate()
