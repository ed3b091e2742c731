"""`check` validates every row and file once, finds subjects in two splits, and writes hashes of names."""

from __future__ import annotations

import gzip
import json
import sys

import numpy as np
import pytest

from umbrella_data.cli import main
from umbrella_data.files.parallel import map_unordered
from umbrella_data.jobs import check as check_module
from umbrella_data.jobs.check import check_manifests
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.scan import reader
from umbrella_data.scan.gradient_table import gradient_files
from umbrella_data.scan.reader import open_scan


@pytest.fixture
def cohort(nifti, random_voxels, make_row, write_manifest, tmp_path):
    """Two manifests of three good scans each; returns their rows and a function that writes rows."""
    for seed, name in enumerate("abcdef"):
        nifti.write(random_voxels(4, 5, 6, seed=seed), f"{name}_0.nii.gz")
    rows = {"train": [make_row(name, "T1") for name in "abc"], "test": [make_row(name, "T1") for name in "def"]}

    def write(changed=rows):
        return [write_manifest(of_split, f"{split}.jsonl") for split, of_split in changed.items()]

    return rows, write


def test_check_of_good_manifests_is_good(cohort, capsys):
    paths = cohort[1]()
    assert main(["check", *map(str, paths)]) == 0
    printed = capsys.readouterr().out
    assert "6 scans read: all is well" in printed
    assert str(paths[0]) in printed


def test_check_lists_all_rows_that_json_readers_repair_silently(cohort, capsys):
    train, test = cohort[1]()
    row = train.read_text().splitlines()[0]
    odd = [
        row.replace('"id": "a"', '"id": "b", "id": "a"'),
        row.replace("What", "\\ud800"),
        row.replace("What", "<image>"),
        "[" * 100_000,
    ]
    train.write_text("\n".join([row, *odd]))
    assert main(["check", str(train), str(test)]) == 1
    printed = capsys.readouterr().out
    assert all(f"line {number}: " in printed for number in (2, 3, 4, 5))
    test.write_text(row, encoding="utf-16")
    assert main(["check", str(test)]) != 0


def test_check_reads_every_file_once(cohort, make_row, monkeypatch):
    rows, write = cohort
    rows["train"] += [{**make_row("a", "T1", question="And?"), "id": "a-2"}, {**make_row("a", "T1"), "id": "a-3"}]
    read = []
    prove = check_module.verify_scan
    monkeypatch.setattr(check_module, "verify_scan", lambda paths, **kind: read.append(paths) or prove(paths, **kind))
    report = check_manifests([read_manifest(path) for path in write()], num_workers=1)
    assert len(read) == report.num_files == 6
    assert report.is_good
    assert report.manifests[0].scans == {"T1": 3}
    assert report.manifests[0].subjects == {"sub-a": 3, "sub-b": 1, "sub-c": 1}


@pytest.mark.isolated
def test_check_without_dipy_ends_before_a_scan_is_read_unless_dwi_is_skipped(
    cohort, make_row, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "dipy", None)
    rows, write = cohort
    rows["train"] += [make_row("g", "dMRI"), make_row("h", "T1", "dMRI"), make_row("i", "T7")]
    paths = list(map(str, write()))
    with monkeypatch.context() as patch:
        patch.setattr(check_module, "verify_scan", None)
        assert main(["check", *paths]) == 1
    error = capsys.readouterr().err
    for words in (f"{tmp_path / 'g_0.nii.gz'}: ", "pip install dipy", "--modality T1"):
        assert words in error
    assert main(["check", *paths, "--modality", "T1", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "skipped rows with other modalities: 2\n" in printed
    assert "unusable rows: 1" in printed  # an unknown modality is an error
    assert "6 scans read" in printed
    report = json.loads((tmp_path / "out/check.json").read_text())
    assert [each["num_left_out"] for each in report["manifests"]] == [2, 0]
    assert main(["check", paths[1], "--modality", "rsfMRI"]) == 1
    assert "no scan of rsfMRI in the manifests" in capsys.readouterr().err


def test_check_finds_rows_files_and_leaks(cohort, make_row, tmp_path, capsys):
    rows, write = cohort
    content = (tmp_path / "b_0.nii.gz").read_bytes()
    (tmp_path / "b_0.nii.gz").write_bytes(content[:-3])
    (tmp_path / "e_0.nii.gz").unlink()
    rows["train"].append({**make_row("x", "T1"), "id": "a"} | {"messages": make_row("c", "T1")["messages"]})
    rows["train"].append(make_row("y", "T7"))
    rows["test"].append({**make_row("d", "T1"), "id": "leak", "subject": "a"})
    rows["test"].append({**make_row("c", "T1"), "id": "scan-leak", "subject": "sub-other"})
    paths = write()
    out = tmp_path / "out"
    assert main(["check", *map(str, paths), "--out", str(out), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    for words in (
        "b_0.nii.gz: ", "[gzip_", "e_0.nii.gz: there is no such file", "id 'a' is in line 1 already",
        "unknown modality 'T7'", "subjects in more than one manifest: 1", "sub-a: ",
        "scans in more than one manifest, under different subjects: 1", "c_0.nii.gz", "not all is well",
    ):  # fmt: skip
        assert words in printed
    text = (out / "check.json").read_text()
    assert not any(name in text for name in ("sub-", ".nii", "jsonl", "T7", str(tmp_path)))
    report = json.loads(text)
    assert not report["is_good"]
    assert [sorted(each["reason"] for each in report["bad_files"])[0][:4]] == ["gzip"]
    assert [len(each["row_problems"]) for each in report["manifests"]] == [2, 0]
    assert len(report["shared_subjects"]) == len(report["shared_scans"]) == 1
    assert main(["whois", report["shared_subjects"][0]["subject"], "--in", str(out)]) == 0
    assert capsys.readouterr().out == "sub-a\n"
    assert main(["whois", report["bad_files"][0]["scan"][:8], "--in", str(out)]) == 0
    assert capsys.readouterr().out.strip().endswith("b_0.nii.gz")


def test_check_finds_copies_under_other_names(cohort, tmp_path, capsys):
    _, write = cohort
    content = gzip.decompress((tmp_path / "a_0.nii.gz").read_bytes())
    (tmp_path / "e_0.nii.gz").write_bytes(gzip.compress(content, 1))
    paths, out = write(), tmp_path / "out"
    assert main(["check", *map(str, paths), "--workers", "1", "--out", str(out), "--names"]) == 1
    printed = capsys.readouterr().out
    assert str(tmp_path / "a_0.nii.gz") in printed
    assert str(tmp_path / "e_0.nii.gz") in printed
    report = json.loads((out / "check.json").read_text())
    assert report["copies"] == [[str(tmp_path / "a_0.nii.gz"), str(tmp_path / "e_0.nii.gz")]]


def test_check_finds_answers_that_contradict_the_scored_value(cohort, make_row, capsys):
    rows, write = cohort
    answer = {"type": "choice", "options": ["left", "right"], "value": "left"}
    rows["train"][1] = {**make_row("b", "T1", answer="right"), "answer": answer}
    rows["train"][2] = {**make_row("c", "T1", answer="left"), "answer": answer}
    report = check_manifests([read_manifest(path) for path in write()], num_workers=1)
    assert [line for line, _ in report.manifests[0].problems] == [2]
    assert not report.is_good


def test_warnings_are_counted_by_code_and_are_not_problems(cohort, nifti, random_voxels, make_row, capsys, tmp_path):
    rows, write = cohort
    for name in "ab":
        nifti.patch(tmp_path / f"{name}_0.nii.gz", 72, b"\x08\x00")  # bitpix
    nifti.patch(tmp_path / "b_0.nii.gz", 252, bytes(4))  # neither qform nor sform
    series = nifti.write(random_voxels(4, 5, 6, 7), "d_1.nii.gz", repetition_time=2.0)
    series.with_name("d_1.json").write_text('{"RepetitionTime": 1.0}')
    rows["test"][0] = make_row("d", "T1", "rsfMRI")
    rows["train"].append({**make_row("a", "T1"), "id": "the same scan again"})
    paths, out = write(), tmp_path / "out"
    assert main(["check", *map(str, paths), "--out", str(out), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "7 scans read: all is well" in printed
    head, train, test = (line.split() for line in printed.splitlines()[:3])
    assert head[-3:] == ["bitpix", "no_form", "sidecar_repetition_time"]
    assert (train[-3:], test[-3:]) == (["2", "1", "0"], ["0", "0", "1"])
    report = json.loads((out / "check.json").read_text())
    assert report["is_good"]
    assert [each["warnings"] for each in report["manifests"]] == [
        {"bitpix": 2, "no_form": 1},
        {"sidecar_repetition_time": 1},
    ]
    for words in ("  bitpix: 2 (", f"    {tmp_path / 'a_0.nii.gz'}\n", f"    {series}\n"):
        assert words in printed
    assert "sub-" not in (text := (out / "check.json").read_text())
    assert ".nii" not in text
    listed = report["warnings"]
    assert {code: each["num_scans"] for code, each in listed.items()} == {
        "bitpix": 2, "no_form": 1, "sidecar_repetition_time": 1,
    }  # fmt: skip
    assert listed["no_form"]["meaning"].endswith("left and right are a guess")
    (scan,) = listed["sidecar_repetition_time"]["scans"]
    for name, expected in ((scan["files"][0], series), (scan["subject"], "sub-d"), (scan["manifests"][0], paths[1])):
        assert main(["whois", name, "--in", str(out)]) == 0
        assert capsys.readouterr().out == f"{expected}\n"


def test_all_warnings_are_counted_and_the_first_are_listed(cohort, nifti, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("umbrella_data.cli.output._MAX_WARNINGS", 2)
    for name in "abc":
        nifti.patch(tmp_path / f"{name}_0.nii.gz", 72, b"\x08\x00")  # bitpix
    paths = cohort[1]()
    assert main(["check", *map(str, paths), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "bitpix: 3 (bitpix is not the size of the datatype: the datatype is used)\n" in printed
    assert [name for name in "abc" if f"    {tmp_path}/{name}_0.nii.gz\n" in printed] == ["a", "b"]
    assert "and 1 more" in printed


def test_warnings_about_a_mask_name_its_file(nifti, random_voxels, make_row, write_manifest, tmp_path):
    voxels = random_voxels(4, 5, 6)
    scan = nifti.write(voxels, "a_0.nii.gz")
    mask = nifti.write((voxels > 500).astype("uint8"), "mask.nii.gz")
    row = make_row("a", "T1")
    row["messages"][0]["content"][0]["mask"] = mask.name
    manifest = read_manifest(write_manifest([row]))
    assert not check_manifests([manifest], num_workers=1).warnings.counts
    nifti.patch(mask, 72, b"\x10\x00")  # bitpix
    report = check_manifests([manifest], num_workers=1)
    assert report.is_good
    assert report.manifests[0].warnings == report.warnings.counts == {"bitpix": 1}
    assert [listed.files for listed in report.warnings.listed("bitpix")] == [(str(mask),)]
    nifti.patch(scan, 72, b"\x08\x00")
    report = check_manifests([manifest], num_workers=1)
    assert report.manifests[0].warnings == {"bitpix": 1}
    assert [listed.files for listed in report.warnings.listed("bitpix")] == [(str(scan), str(mask))]


def test_check_suggests_the_data_root_if_nearly_all_scans_are_missing(cohort, tmp_path, capsys):
    paths = list(map(str, cohort[1]()))
    (tmp_path / "elsewhere").mkdir()
    assert main(["check", *paths, "--data-root", str(tmp_path / "elsewhere")]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (f"6 of 6 scans are missing under {tmp_path / 'elsewhere'}: check --data-root")
    for name in "abcde":
        (tmp_path / f"{name}_0.nii.gz").unlink()
    assert main(["check", *paths]) == 1
    assert "--data-root" not in capsys.readouterr().out


def test_check_does_not_suggest_the_data_root_if_contents_were_not_fetched(cohort, tmp_path, capsys):
    for name in "abcdef":
        (tmp_path / f"{name}_0.nii.gz").unlink()
        (tmp_path / f"{name}_0.nii.gz").symlink_to("nothing")
    assert main(["check", *map(str, cohort[1]())]) == 1
    printed = capsys.readouterr().out
    assert printed.count("a link to a file that does not exist") == 6
    assert "--data-root" not in printed


def test_check_with_names_writes_them_in_plain_text(cohort, tmp_path):
    (tmp_path / "b_0.nii.gz").unlink()
    paths = cohort[1]()
    assert main(["check", *map(str, paths), "--out", str(tmp_path / "out"), "--names"]) == 1
    (bad,) = json.loads((tmp_path / "out" / "check.json").read_text())["bad_files"]
    assert bad["subject"] == "sub-b"
    assert "there is no such file" in bad["words"]
    assert not (tmp_path / "out" / "salt").exists()


def test_manifests_of_one_split_may_share_subjects(cohort, make_row):
    rows, write = cohort
    rows["test"].append({**make_row("d", "T1"), "id": "again", "subject": "sub-a"})
    paths = list(map(str, write()))
    assert main(["check", *paths]) == 1
    assert main(["check", *paths, "--one-split"]) == 0


def test_modalities_may_be_aliases_and_a_typo_is_an_error(cohort):
    manifests = [read_manifest(path) for path in cohort[1]()]
    report = check_manifests(manifests, num_workers=1, modalities=["T1w"])
    assert report.num_files == 6
    assert [found.num_left_out for found in report.manifests] == [0, 0]
    with pytest.raises(ValueError, match="unknown modality 'T1q'"):
        check_manifests(manifests, modalities=["T1q"])


def test_scans_are_read_in_several_processes(cohort, nifti, random_voxels, make_row, write_manifest, tmp_path):
    for i in range(10):
        nifti.write(random_voxels(4, 5, 6), f"{i}_0.nii.gz")
    (tmp_path / "7_0.nii.gz").write_bytes(b"no scan")
    manifest = read_manifest(write_manifest([make_row(str(i), "T1") for i in range(10)], "many.jsonl"))
    report = check_manifests([manifest], num_workers=2)
    assert [bad.error.path for bad in report.bad_files] == [str(tmp_path / "7_0.nii.gz")]
    assert report.bad_files[0].subject == "sub-7"


def test_errors_in_the_report_have_no_traceback(cohort, tmp_path):
    (tmp_path / "b_0.nii.gz").write_bytes(b"no scan")
    (bad,) = check_manifests([read_manifest(path) for path in cohort[1]()], num_workers=1).bad_files
    # A traceback keeps the arrays of its frames alive.
    assert bad.error.__traceback__ is bad.error.__cause__ is bad.error.__context__ is None


def test_map_unordered_returns_every_result():
    assert sorted(map_unordered(abs, range(-30, 0), num_workers=2)) == list(range(1, 31))
    assert list(map_unordered(abs, [-3, -2], num_workers=2)) == [3, 2]
    assert list(map_unordered(abs, iter(range(100)), num_workers=1)) == list(range(100))


def test_check_builds_indexes_of_long_series(cohort, nifti, random_voxels, make_row, tmp_path, monkeypatch):
    pytest.importorskip("indexed_gzip", reason="the index is an extra")
    monkeypatch.setattr(reader, "_MIN_INDEXED_BYTES", 4 * 5 * 6 * 7 * 2)
    rows, write = cohort
    for name, num_frames in (("g", 7), ("h", 6), ("i", 7)):
        nifti.write(random_voxels(4, 5, 6, num_frames), f"{name}_0.nii.gz", repetition_time=2.0)
        rows["train"].append(make_row(name, "rsfMRI"))
    damaged = tmp_path / "i_0.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    folder = tmp_path / "index"
    train, _ = map(str, write())
    # The patch applies to this process only.
    assert main(["check", train, "--index-dir", str(folder), "--workers", "1"]) == 1
    (index,) = folder.rglob("*.gzindex")  # h is too short, i is damaged
    written = index.stat().st_mtime_ns
    with open_scan(tmp_path / "g_0.nii.gz", index_folder=folder) as scan:
        assert list(scan.iter_slices(2, 3))
    assert index.stat().st_mtime_ns == written
    assert [index] == list(folder.rglob("*.gzindex"))
    assert main(["check", train, "--index-dir", train]) == 2
    # Without indexed_gzip the command ends before a scan is read.
    monkeypatch.setitem(sys.modules, "indexed_gzip", None)
    monkeypatch.setattr(check_module, "verify_scan", None)
    assert main(["check", train, "--index-dir", str(folder)]) == 1


def test_check_lists_the_shells_of_dwis_and_what_is_left_out(nifti, make_row, write_manifest, tmp_path, capsys):
    pytest.importorskip("dipy", reason="fitting tensors is an extra")
    directions = np.random.default_rng(0).normal(size=(8, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows = []
    for name, shells in {"a": [1005, 2990], "b": [995, 3000], "c": [2000], "d": [1000], "e": [40, 1000]}.items():
        b = np.concatenate([[0.0], np.repeat(shells, 8)])
        series = np.full((8, 8, 8, len(b)), 1.0, dtype=np.float32)
        series[2:6, 2:6, 2:6] = 1000 * np.exp(-7e-4 * b)
        series[0, 0, 0] += np.arange(len(b)) * 1e-3  # no two frames are identical
        path = nifti.write(series, f"{name}_0.nii.gz", repetition_time=5.0)
        for file, numbers in zip(gradient_files(path), (b[None], np.tile(directions, (len(shells), 1)).T), strict=True):
            zero = [] if numbers.shape[0] == 1 else [np.zeros((3, 1))]
            np.savetxt(file, np.hstack([*zero, numbers]))
        rows.append(make_row(name, "dMRI"))
    paths = [str(write_manifest(rows[:4], "one.jsonl")), str(write_manifest(rows[4:], "two.jsonl"))]
    assert main(["check", *paths, "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    table = [line.split(maxsplit=1) for line in printed.splitlines() if line.strip()[:1].isdigit() and " x " in line]
    assert table == [
        ["2", "0 x 1, 1000 x 8, 3000 x 8 (left out)"],
        ["1", "0 x 1, 1000 x 8"],
        ["1", "0 x 1, 2000 x 8"],
        ["1", "0 x 9, 1000 x 8"],
    ]
    saved = json.loads((tmp_path / "out" / "check.json").read_text())
    first = saved["diffusion_protocols"][0]
    assert first["num_scans"] == 2
    assert first["shells"][1:] == [
        {"b": 1000, "num_volumes": 8, "is_fitted": True},
        {"b": 3000, "num_volumes": 8, "is_fitted": False},
    ]
    assert [each["warnings"] for each in saved["manifests"]] == [{"high_b": 1}, {}]
    report = check_manifests([read_manifest(path) for path in paths], num_workers=1, max_b=3000, b0_threshold=10)
    shells = [[(shell.b, shell.num_volumes) for shell in shells] for shells, _ in report.diffusion_protocols]
    assert [(0, 1), (40, 8), (1000, 8)] in shells
    assert all(shell.is_fitted for shells, _ in report.diffusion_protocols for shell in shells)
    assert not report.warnings.counts
    capsys.readouterr()
    assert main(["check", *paths, "--max-b", "40"]) == 1
    assert "b0_threshold" in capsys.readouterr().err


def test_check_counts_scans_that_the_crop_of_a_run_cuts(nifti, make_row, write_manifest, random_voxels, tmp_path):
    for name, corner in {"a": 14, "b": 2}.items():
        voxels = random_voxels(40, 24, 20) % 10 + 1
        voxels[corner : corner + 12, 6:18, 4:16] += 500
        nifti.write(voxels, f"{name}_0.nii.gz")
    manifest = read_manifest(write_manifest([make_row("a", "T1"), make_row("b", "T1")]))
    for crop, count in (("field_of_view", 1), ("foreground", 0)):
        config = PipelineConfig(image_size=(12, 12, 12), spacing=(2.0, 2.0, 2.0), crop=crop)
        report = check_manifests([manifest], num_workers=1, configs={"T1": config})
        assert report.warnings.counts.get("cropped", 0) == count
        assert report.is_good
    config = PipelineConfig(image_size=(12, 12, 12), spacing=(2.0, 2.0, 2.0), crop="mask")
    report = check_manifests([manifest], num_workers=1, configs={"T1": config})
    assert [bad.error.reason for bad in report.bad_files] == ["mask", "mask"]
