"""The subcommands write their files, and end with a message and an exit code if they cannot."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from umbrella_data.cli import main
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.scan.gradient_table import gradient_files
from umbrella_data.scan.header import ScanWarning


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
    assert "unusable scans: 1" in printed
    assert "sub-0_T1w.nii.gz" in printed


def test_from_bids_writes_a_cohort_to_test_on(nifti, random_voxels, tmp_path, capsys):
    for i in range(3):
        nifti.write(random_voxels(4, 5, 6), f"bids/sub-{i}/anat/sub-{i}_T1w.nii.gz")
    out = tmp_path / "out"
    assert main(["from-bids", str(tmp_path / "bids"), "--out", str(out), "--test-fraction", "1"]) == 0
    assert [path.name for path in out.iterdir()] == ["test.jsonl"]
    printed = capsys.readouterr().out
    assert "test: 3 subjects, 3 rows" in printed
    assert "train.jsonl" not in printed


def test_from_bids_without_a_subject_to_train_on_fails(nifti, random_voxels, tmp_path, capsys):
    nifti.write(random_voxels(4, 5, 6), "bids/sub-1/anat/sub-1_T1w.nii.gz")
    words = ["from-bids", str(tmp_path / "bids"), "--out", str(tmp_path / "out"), "--test-fraction", "0.999"]
    assert main(words) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test.jsonl"]
    assert "--seed" in capsys.readouterr().err


def test_from_bids_reads_labels_of_several_tables(nifti, random_voxels, tmp_path, capsys):
    nifti.write(random_voxels(4, 5, 6), "bids/sub-1/anat/sub-1_T1w.nii.gz")
    (tmp_path / "a.tsv").write_text("participant_id\tage\n1\t30\n")
    (tmp_path / "b.csv").write_text("participant_id,icv\nsub-1,1512345.5\n")
    tables = ["--participants", str(tmp_path / "a.tsv"), "--participants", str(tmp_path / "b.csv")]
    words = ["from-bids", str(tmp_path / "bids"), "--out", str(tmp_path), "--test-fraction", "0"]
    assert main([*words, *tables, "--number", "icv:mm3"]) == 0
    answers = {
        sample.task: sample.messages[-1].text
        for sample in read_manifest(tmp_path / "train.jsonl", data_root=tmp_path / "bids")
    }
    assert answers == {"modality": "a T1-weighted structural scan", "age": "30", "icv": "1512345.5"}
    assert "note: 1 of 1 subjects of the table have a scan that is used\n" in capsys.readouterr().out
    assert main([*words, "--participants", str(tmp_path / "typo.tsv")]) == 1
    assert "typo.tsv" in capsys.readouterr().err


def test_from_bids_leaves_out_missing_values_given_as_options(nifti, random_voxels, tmp_path, capsys):
    for i in range(4):
        nifti.write(random_voxels(4, 5, 6), f"bids/sub-{i}/anat/sub-{i}_T1w.nii.gz")
    (tmp_path / "bids/participants.tsv").write_text("participant_id\tage\tx\n0\t88\t1\n1\t40\t88\n2\t50\t-1\n3\t9\t7\n")
    (tmp_path / "bids/participants.json").write_text('{"x": {"Units": "points"}}')
    words = ["from-bids", str(tmp_path / "bids"), "--out", str(tmp_path), "--test-fraction", "0", "--number", "x"]
    assert main([*words, "--missing", "-1", "--missing", "x=88"]) == 0
    samples = list(read_manifest(tmp_path / "train.jsonl", data_root=tmp_path / "bids"))
    answers = [(sample.subject, sample.answer.value, sample.answer.unit) for sample in samples if sample.task == "x"]
    assert answers == [("sub-0", 1.0, "points"), ("sub-3", 7.0, "points")]
    assert [sample.answer.value for sample in samples if sample.task == "age"] == [88.0, 40.0, 50.0, 9.0]
    assert "note: values of x declared as missing, left out: 2 (sub-1: '88', sub-2: '-1')\n" in capsys.readouterr().out


@pytest.mark.isolated
def test_from_bids_without_dipy_ends_before_a_scan_is_read_unless_dwi_is_skipped(
    nifti, random_voxels, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "dipy", None)
    nifti.write(random_voxels(4, 5, 6), "bids/sub-1/anat/sub-1_T1w.nii.gz")
    dwi = nifti.write(random_voxels(4, 5, 6, 7), "bids/sub-2/dwi/sub-2_dwi.nii.gz")
    words = ["from-bids", str(tmp_path / "bids"), "--out", str(tmp_path), "--test-fraction", "0"]
    with monkeypatch.context() as patch:
        patch.setattr("umbrella_data.bids.manifests.read_metadata", None)
        assert main(words) == 1
    error = capsys.readouterr().err
    for text in (f"{dwi}: ", "pip install dipy", "--modality T1"):
        assert text in error
    assert main([*words, "--modality", "T1w", "--modality", "rsfMRI"]) == 0
    printed = capsys.readouterr().out
    assert "note: scans of other modalities, left out: 1 dMRI\n" in printed
    assert "1 subjects, 1 rows" in printed
    with pytest.raises(SystemExit):
        main([*words, "--modality", "T1", "--modality", "rsfMR"])
    assert "did you mean 'rsfMRI'?" in capsys.readouterr().err


def test_from_bids_reads_a_tree_of_links_under_a_wider_data_root(nifti, random_voxels, tmp_path, capsys):
    tree = tmp_path / "home/bids"
    for i in range(7):
        anat = tree / f"sub-{i}/anat"
        anat.mkdir(parents=True)
        scan = nifti.write(random_voxels(4, 5, 6), f"store/{i}.nii")
        (anat / f"sub-{i}_T1w.nii").symlink_to(scan)
    words = ["from-bids", str(tree), "--out", str(tmp_path / "out"), "--test-fraction", "0", "--workers", "1"]
    assert main(words) == 1
    out, error = capsys.readouterr()
    assert f"sub-0_T1w.nii: a link that leads out of {tree}" in out
    assert "  and 2 more: a link that leads out of" in out
    assert "sub-5_T1w.nii" not in out
    assert "no readable scan" in error
    assert main([*words, "--data-root", str(tmp_path / "store")]) == 1
    assert f"data_root {tmp_path / 'store'}" in capsys.readouterr().err
    assert main([*words, "--data-root", str(tmp_path / "home")]) == 1
    assert "leads out of" in capsys.readouterr().out
    assert main([*words, "--data-root", str(tmp_path)]) == 0
    assert f"data_root: {tmp_path}\n" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out/train.jsonl", data_root=tmp_path)
    manifest.validate()
    assert manifest[0].scans[0].paths == (tree / "sub-0/anat/sub-0_T1w.nii",)


def test_from_bids_lists_contents_that_were_not_fetched(tmp_path, capsys):
    for i in range(7):
        anat = tmp_path / f"sub-{i}/anat"
        anat.mkdir(parents=True)
        (anat / f"sub-{i}_T1w.nii.gz").symlink_to("../../.git/annex/objects/Xx/content.nii.gz")
    assert main(["from-bids", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("sub-4_T1w.nii.gz: a link to a file that does not exist: fetch its content (datalad get") == 1
    assert "  and 2 more: a link to a file that does not exist" in printed
    assert "sub-5_T1w.nii.gz" not in printed
    assert printed.count("[missing]") == 5


def test_from_bids_counts_and_names_scans_with_warnings(nifti, random_voxels, tmp_path, capsys):
    for i in range(3):
        path = nifti.write(random_voxels(4, 5, 6), f"bids/sub-{i}/anat/sub-{i}_T1w.nii.gz")
        nifti.patch(path, 72, b"\x08\x00")  # bitpix
    nifti.patch(path, 252, bytes(4))  # neither qform nor sform
    assert main(["from-bids", str(tmp_path / "bids"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "  bitpix: 3 (bitpix is not the size" in printed
    assert f"  no_form: 1 ({ScanWarning.NO_FORM.meaning})\n    {path}\n" in printed
    (tmp_path / "bids/sub-1/anat/sub-1_T1w.nii.gz").write_bytes(b"no scan")
    for i in (0, 2):
        nifti.write(random_voxels(4, 5, 6), f"bids/sub-{i}/anat/sub-{i}_T1w.nii.gz")
    assert main(["from-bids", str(tmp_path / "bids"), "--out", str(tmp_path / "out")]) == 0
    assert "warnings about" not in capsys.readouterr().out


def test_from_bids_without_a_readable_scan_fails(tmp_path, capsys):
    (tmp_path / "sub-1/anat").mkdir(parents=True)
    (tmp_path / "sub-1/anat/sub-1_T1w.nii").write_bytes(b"no scan")
    assert main(["from-bids", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "no readable scan" in capsys.readouterr().err


def test_from_bids_of_a_missing_tree_fails(tmp_path, capsys):
    assert main(["from-bids", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["from-bids"], ["from-bids", "a", "--out", "b", "--test-fraction", "1.5"]])
def test_wrong_arguments_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: umbrella-data" in capsys.readouterr().err


def test_demo_writes_a_valid_cohort(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--num-train", "2", "--num-test", "1"]) == 0
    assert f"wrote {tmp_path / 'train.jsonl'}" in capsys.readouterr().out
    for name in ("train", "test"):
        read_manifest(tmp_path / f"{name}.jsonl").validate()
    assert main(["demo", "--out", str(tmp_path), "--num-train", "0", "--num-test", "1"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'test.jsonl'}\n"


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["cache", "--config", "nope.yaml"], "nope.yaml"),
        (["preview", "--config", "nope.yaml", "--out", "page"], "nope.yaml"),
        (["preview", "--config", ".", "--out", "page"], "."),
        (["demo", "--out", "a.jsonl/cohort"], "a.jsonl/cohort"),
        (["demo", "--out", "a.jsonl"], "a.jsonl"),
        (["check", "a.jsonl", "--out", "a.jsonl/report", "--names"], "a.jsonl/report"),
        (["from-bids", ".", "--out", "a.jsonl/manifests"], "a.jsonl/manifests"),
    ],
)
def test_wrong_path_ends_with_one_message_before_a_scan_is_read(
    words, path, make_row, write_manifest, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_manifest([make_row("a", "T1")], "a.jsonl")
    monkeypatch.setattr("umbrella_data.scan.shard.map_unordered", None)
    assert main(words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"error: {path}: ")


@pytest.mark.parametrize("words", [["--help"], ["check", "a.jsonl"]])
def test_closed_pipe_ends_the_command_without_an_error_message(
    words, nifti, random_voxels, make_row, write_manifest, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    nifti.write(random_voxels(4, 5, 6), "a_0.nii.gz")
    write_manifest([make_row("a", "T1")], "a.jsonl")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(words) == 141
    assert "rror" not in capsys.readouterr().err


def test_check_writes_its_report_before_it_prints(
    nifti, random_voxels, make_row, write_manifest, tmp_path, monkeypatch
):
    nifti.write(random_voxels(4, 5, 6), "a_0.nii.gz")
    monkeypatch.setattr("umbrella_data.cli.check._print_report", None)
    with pytest.raises(TypeError):
        main(["check", str(write_manifest([make_row("a", "T1")])), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/check.json").is_file()


def test_from_bids_reads_dwis_with_the_given_limits_of_b(nifti, tmp_path, capsys):
    pytest.importorskip("dipy", reason="fitting tensors is an extra")
    directions = np.random.default_rng(0).normal(size=(3, 8))
    b = np.array([60.0, *[1000] * 8])
    series = np.random.default_rng(0).uniform(1, 2, (8, 8, 8, 9))
    series[2:6, 2:6, 2:6] *= 500 * np.exp(-7e-4 * b)
    dwi = nifti.write(series.astype(np.float32), "bids/sub-1/dwi/sub-1_dwi.nii.gz", repetition_time=5.0)
    bval, bvec = gradient_files(dwi)
    np.savetxt(bval, b[None])
    np.savetxt(bvec, np.hstack([np.zeros((3, 1)), directions / np.linalg.norm(directions, axis=0)]))
    words = [
        "from-bids",
        str(tmp_path / "bids"),
        "--out",
        str(tmp_path / "out"),
        "--test-fraction",
        "0",
        "--workers",
        "1",
    ]
    assert main(words) == 1
    assert f"{bval}: " in capsys.readouterr().out
    assert main([*words, "--b0-threshold", "60"]) == 0
    assert "high_b" not in capsys.readouterr().out
    assert main([*words, "--b0-threshold", "60", "--max-b", "800"]) == 0
    assert "  high_b: 1 (" in capsys.readouterr().out
    assert main([*words, "--b0-threshold", "60", "--max-b", "60"]) == 1
    assert "b0_threshold" in capsys.readouterr().err
