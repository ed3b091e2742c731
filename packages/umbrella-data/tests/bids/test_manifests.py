"""Manifests of a BIDS tree can be read again; every readable scan has a question, every other one is listed."""

from __future__ import annotations

import json

import pytest

from umbrella_data.bids.manifests import is_test_subject, write_manifests
from umbrella_data.bids.selection import Selection, select_scans
from umbrella_data.cli import main
from umbrella_data.errors import ManifestError
from umbrella_data.manifest.manifest import read_manifest


@pytest.fixture
def tree(nifti, random_voxels):
    """20 subjects with a T1w each, 3 of them with a BOLD series; the T1w of sub-05 is cut off."""
    for i in range(20):
        subject = f"sub-{i:02d}"
        path = nifti.write(random_voxels(4, 5, 6, seed=i), f"bids/{subject}/anat/{subject}_T1w.nii.gz")
        if i == 5:
            path.write_bytes(path.read_bytes()[:-9])
        if i < 3:
            nifti.write(random_voxels(4, 5, 6, 7), f"bids/{subject}/func/{subject}_task-rest_bold.nii.gz")
    rows = "".join(f"sub-{i:02d}\t{30 + i}\t{'MF'[i % 2]}\n" for i in range(20))
    (nifti.folder / "bids/participants.tsv").write_text(f"participant_id\tage\tsex\n{rows}")
    return nifti.folder / "bids"


@pytest.fixture
def report(tree, tmp_path):
    return write_manifests(tree, out=tmp_path / "out", test_fraction=0.3)


def read_all(report, tree):
    return {split: list(read_manifest(path, data_root=tree)) for split, path in report.manifests.items()}


def test_manifests_have_every_readable_scan(report, tree):
    samples = read_all(report, tree)
    for path in report.manifests.values():
        read_manifest(path, data_root=tree).validate()
    scans = {scan.paths[0] for of_split in samples.values() for sample in of_split for scan in sample.scans}
    unreadable = tree / "sub-05/anat/sub-05_T1w.nii.gz"
    assert scans == set(tree.rglob("*.nii.gz")) - {unreadable}
    assert [(error.path, error.reason) for error in report.unreadable] == [(str(unreadable), "gzip_truncated")]


def test_manifests_are_split_by_subject(report, tree):
    subjects = {split: {sample.subject for sample in samples} for split, samples in read_all(report, tree).items()}
    assert not subjects["train"] & subjects["test"]
    assert 0 < len(subjects["test"]) < len(subjects["train"])


def test_answers_come_from_the_table_and_the_scan(report, tree):
    samples = {sample.id: sample for of_split in read_all(report, tree).values() for sample in of_split}
    age, sex = samples["sub-03_T1w_age"], samples["sub-03_T1w_sex"]
    assert (age.answer.value, age.answer.unit, age.messages[-1].text) == (33.0, "years", "33")
    assert (sex.answer.value, sex.answer.options) == ("female", ("female", "male"))
    assert samples["sub-02_task-rest_bold_num_frames"].answer.value == 7
    assert samples["sub-02_task-rest_bold_modality"].answer.value == "a functional BOLD series"
    assert samples["sub-02_T1w_modality"].messages[0].scans[0].modality == "T1"


def test_manifests_in_the_tree_need_no_data_root(tree):
    report = write_manifests(tree, out=tree)
    read_manifest(report.manifests["train"]).validate()


def test_split_of_a_subject_does_not_depend_on_other_subjects():
    held_out = [name for name in map(str, range(2000)) if is_test_subject(name, fraction=0.2)]
    assert 300 < len(held_out) < 500
    assert held_out != [name for name in map(str, range(2000)) if is_test_subject(name, fraction=0.2, seed=1)]
    assert set(held_out) <= {name for name in map(str, range(2000)) if is_test_subject(name, fraction=0.4)}


def test_test_manifest_of_an_earlier_split_is_removed(tree, tmp_path):
    out = tmp_path / "out"
    write_manifests(tree, out=out, test_fraction=0.5)
    assert (out / "test.jsonl").exists()
    report = write_manifests(tree, out=out, test_fraction=0.0)
    assert sorted(path.name for path in out.iterdir()) == ["train.jsonl"]
    assert list(report.manifests) == ["train"]


def test_test_fraction_of_1_writes_the_test_manifest_alone(tree, tmp_path):
    out = tmp_path / "out"
    write_manifests(tree, out=out, test_fraction=0.5)
    report = write_manifests(tree, out=out, test_fraction=1.0)
    assert sorted(path.name for path in out.iterdir()) == ["test.jsonl"]
    assert list(report.manifests) == ["test"]
    assert len({row["subject"] for row in report.rows["test"]}) == 19
    assert not any("train.jsonl" in message for message in report.messages)


def test_modality_missing_in_a_split_is_reported(tree, tmp_path):
    seed = next(s for s in range(99) if not any(is_test_subject(f"sub-0{i}", fraction=0.2, seed=s) for i in range(3)))
    report = write_manifests(tree, out=tmp_path / "out", seed=seed)
    assert any("rsfMRI" in message and "test.jsonl: all 3" in message for message in report.messages)


def test_modalities_may_be_aliases_and_a_typo_is_an_error(tree, tmp_path):
    report = write_manifests(tree, out=tmp_path / "out", modalities=["bold"])
    assert {scan.modality for scans in report.scans.values() for scan in scans} == {"rsfMRI"}
    with pytest.raises(ValueError, match="unknown modality 'bodl'"):
        write_manifests(tree, out=tmp_path / "out", modalities=["bodl"])


def test_missing_table_is_an_error(tree, tmp_path):
    with pytest.raises(ManifestError, match=r"nofile\.tsv"):
        write_manifests(tree, out=tmp_path / "out", participants=tree / "nofile.tsv")
    (tree / "participants.tsv").unlink()
    assert write_manifests(tree, out=tmp_path / "out").rows["train"]
    with pytest.raises(ManifestError, match=r"participants\.tsv"):
        write_manifests(tree, out=tmp_path / "out", numbers={"icv": "mm3"})


def test_own_table_of_a_tree_may_not_be_a_link_out_of_data_root(tree, tmp_path):
    own = tree / "participants.tsv"
    elsewhere = own.rename(tree.parent / "elsewhere.tsv")
    own.symlink_to(elsewhere)
    all_known = "20 of 20 subjects of the table have a scan that is used"
    with pytest.raises(ManifestError, match=r"participants\.tsv.*--participants"):
        write_manifests(tree, out=tmp_path / "out")
    assert all_known in write_manifests(tree, out=tmp_path / "out", data_root=tree.parent).messages
    assert all_known in write_manifests(tree, out=tmp_path / "out", participants=own).messages
    own.unlink()
    own.symlink_to(elsewhere.rename(tree / "inside.tsv"))
    assert all_known in write_manifests(tree, out=tmp_path / "out").messages


def test_labels_without_a_scan_are_reported(tree, tmp_path):
    table = tmp_path / "labels.tsv"
    table.write_text("participant_id\ticv\tsite\nSUB01\t1400000\tA\n05\t1500000\tA\n")
    report = write_manifests(
        tree, out=tmp_path / "out", participants=[table], numbers={"icv": "mm3"}, choices=["site"], test_fraction=0.0
    )
    compared, site, icv = report.messages
    assert compared.startswith("1 of 2 subjects")
    assert "sub-SUB01" in compared
    assert compared.endswith(": sub-00, sub-01, sub-02, sub-03, sub-04 and 14 more")
    assert (site.partition(":")[0], icv.partition(":")[0]) == ("no question about site", "no question about icv")


def test_rows_contain_no_header_text(nifti, random_voxels, tmp_path):
    path = nifti.write(random_voxels(4, 5, 6), "bids/sub-01/anat/sub-01_T1w.nii")
    nifti.patch(path, 148, b"SECRET NAME")
    report = write_manifests(nifti.folder / "bids", out=tmp_path / "out")
    text = "".join(path.read_text() for path in report.manifests.values())
    assert "SECRET" not in text
    assert json.loads(text.splitlines()[0])["id"] == "sub-01_T1w_modality"


def test_each_scan_of_a_real_tree_is_in_a_manifest_or_listed(real_data, tmp_path):
    pytest.importorskip("dipy")
    report = write_manifests(real_data, out=tmp_path, selection=Selection(labels={"task": ["*"]}))
    used = {
        scan.paths[0] for split in read_all(report, real_data).values() for sample in split for scan in sample.scans
    }
    listed = {error.path for error in report.unreadable}
    found = set(real_data.glob("sub-*/*/*.nii*"))
    assert {str(path) for path in used} | listed == {str(path) for path in found}
    kinds = {scan.modality for scans in report.scans.values() for scan in scans}
    assert kinds == {"T1", "rsfMRI", "dMRI"}
    assert len(used) >= 30


def test_tasks_of_a_real_tree_are_listed_when_none_is_rest(real_data):
    listing = select_scans(real_data, Selection(), modalities=["rsfMRI"])
    assert listing.scans == ()
    assert "--task" in listing.messages[-1]
    assert listing.messages[-1].endswith(": 4 task-objectviewing, 2 task-oneback, 2 task-unknown")


def test_only_the_questions_that_are_asked_for(tree, tmp_path):
    report = write_manifests(tree, out=tmp_path / "out", questions=["age", "num_frames"])
    rows = [row for of_split in report.rows.values() for row in of_split]
    assert {row["task"] for row in rows} == {"age", "num_frames"}
    with pytest.raises(ManifestError, match="no question ages, weight"):
        write_manifests(tree, out=tmp_path / "none", questions=["weight", "ages", "sex"])
    assert not (tmp_path / "none").exists()
    command = ["from-bids", str(tree), "--out", str(tmp_path / "command"), "--question", "sex"]
    assert main(command) == 0
    lines = (tmp_path / "command" / "train.jsonl").read_text().splitlines()
    assert {json.loads(line)["task"] for line in lines} == {"sex"}
