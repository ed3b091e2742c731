"""`--shard` and `--merge` write what one job writes, and a shard that is missing or does not fit is an error."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from umbrella_data.cli import main
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.scan.gradient_table import gradient_files

COUNTS = [1, 2, 3, 7]


@pytest.fixture
def tree(nifti, random_voxels, tmp_path):
    """A tree of five subjects with labels, a broken scan, a copy, a warning, and several repetition times."""
    for i in range(5):
        folder = f"bids/sub-{i}"
        nifti.write(random_voxels(4, 5, 6, seed=i), f"{folder}/anat/sub-{i}_T1w.nii.gz")
        bold = f"{folder}/func/sub-{i}_task-rest_bold.nii.gz"
        nifti.write(random_voxels(4, 5, 6, 4 + i, seed=i), bold, repetition_time=2 + i % 2)
    root = tmp_path / "bids"
    anat = [root / f"sub-{i}/anat/sub-{i}_T1w.nii.gz" for i in range(5)]
    shutil.copy(anat[0], anat[4])
    anat[1].write_bytes(b"no scan")
    # No sform and no qform: a warning.
    nifti.patch(anat[2], 252, bytes(4))
    (root / "participants.tsv").write_text(
        "participant_id\tage\tgroup\nsub-0\t30\ta\nsub-1\t31\tc\nsub-2\t999\tb\nsub-3\t52.5\tA\nsub-4\tn/a\tb\n"
    )
    return root


@pytest.fixture
def dwi(nifti, tree):
    pytest.importorskip("dipy", reason="fitting tensors is an extra")
    rng = np.random.default_rng(0)
    directions, b = rng.normal(size=(3, 8)), np.array([0.0, *[1000] * 8])
    series = rng.uniform(1, 2, (8, 8, 8, 9))
    series[2:6, 2:6, 2:6] *= 500 * np.exp(-7e-4 * b)
    path = nifti.write(series.astype(np.float32), "bids/sub-3/dwi/sub-3_dwi.nii.gz", repetition_time=5.0)
    bval, bvec = gradient_files(path)
    np.savetxt(bval, b[None])
    np.savetxt(bvec, np.hstack([np.zeros((3, 1)), directions / np.linalg.norm(directions, axis=0)]))
    return path


def from_bids(tree, out):
    words = ["--choice", "group", "--test-fraction", "0.4", "--seed", "3", "--max-b", "800", "--workers", "1"]
    return ["from-bids", str(tree), "--out", str(out), *words]


@pytest.fixture
def check(tree, tmp_path, capsys):
    """The arguments of `check` for a folder of output."""
    main(from_bids(tree, tmp_path / "m"))
    capsys.readouterr()
    manifests = [str(path) for path in sorted((tmp_path / "m").glob("*.jsonl"))]
    assert len(manifests) == 2
    return lambda out: ["check", *manifests, "--data-root", str(tree), "--out", str(out), "--names", "--workers", "1"]


def run_shards(words, count, capsys, *, numbers=None):
    for number in numbers or range(count, 0, -1):
        assert main([*words, "--shard", f"{number}/{count}"]) == 0
        assert f"shard {number}/{count}: " in capsys.readouterr().out


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_merged_manifests_equal_those_of_one_job(tree, dwi, tmp_path, capsys):
    assert main(from_bids(tree, tmp_path / "one")) == 0
    printed = capsys.readouterr().out
    assert "unusable scans: 1\n" in printed
    assert "no_form: 1 " in printed
    assert "high_b: 1 " in printed
    assert len(content(tmp_path / "one")) == 2
    for count in COUNTS:
        out = tmp_path / str(count)
        run_shards(from_bids(tree, out), count, capsys)
        assert not list(out.glob("*.jsonl"))
        assert main([*from_bids(tree, out), "--merge"]) == 0
        assert capsys.readouterr().out.replace(f"{out}/", f"{tmp_path}/one/") == printed
        assert content(out) == content(tmp_path / "one")


def test_merged_report_equals_that_of_one_job(dwi, check, tmp_path, capsys):
    assert main(check(tmp_path / "one")) == 1
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "one/check.json").read_bytes())
    # The cohort has what only a comparison of all scans finds.
    assert len(report["copies"]) == 1
    assert [each["num_scans"] for each in report["repetition_times"]] == [3, 2]
    assert set(report["warnings"]) == {"no_form"}
    assert len(report["diffusion_protocols"]) == 1
    for count in COUNTS:
        out = tmp_path / str(count)
        run_shards(check(out), count, capsys)
        assert not (out / "check.json").exists()
        assert main([*check(out), "--merge"]) == 1
        assert capsys.readouterr().out.replace(f"{out}/", f"{tmp_path}/one/") == printed
        assert content(out) == content(tmp_path / "one")


def test_merged_report_has_bad_files_and_what_a_crop_cuts(dwi, check, tree, tmp_path, capsys, run_config):
    (tree / "sub-0/anat/sub-0_T1w.nii.gz").unlink()
    (tree / "sub-2/anat/sub-2_T1w.nii.gz").write_bytes(b"")
    configs = {"T1": PipelineConfig(image_size=(2, 2, 2), spacing=(2, 2, 2), crop="foreground")}
    config = ["--config", run_config(configs=configs)]
    assert main([*check(tmp_path / "one"), *config]) == 1
    report = json.loads((tmp_path / "one/check.json").read_bytes())
    assert [bad["reason"] for bad in report["bad_files"]] == ["missing", "gzip_header"]
    assert {"cropped"} <= set(report["warnings"])
    capsys.readouterr()
    run_shards([*check(tmp_path / "two"), *config], 2, capsys)
    assert "shards 1-2 were read with other options" in problems(check(tmp_path / "two"), capsys)
    assert main([*check(tmp_path / "two"), *config, "--merge"]) == 1
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_merge_without_names_has_the_hashes_of_the_folder_alone(check, tmp_path, capsys):
    words = [word for word in check(tmp_path / "out") if word != "--names"]
    run_shards(words, 2, capsys)
    folder = tmp_path / "out/shards-of-check"
    assert folder.stat().st_mode & 0o077 == 0
    assert main([*words, "--merge"]) == 1
    assert not folder.exists()
    assert b"sub-" not in (tmp_path / "out/check.json").read_bytes()
    merged = (tmp_path / "out/check.json").read_bytes()
    assert main(words) == 1
    assert (tmp_path / "out/check.json").read_bytes() == merged


def problems(words, capsys):
    assert main([*words, "--merge"]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "from-bids"])
def test_merge_names_missing_repeated_and_changed_shards(command, check, tree, tmp_path, capsys):
    out = tmp_path / "out"
    words = check(out) if command == "check" else from_bids(tree, out)
    folder = out / f"shards-of-{command}"
    assert "no shard was read" in problems(words, capsys)
    run_shards(words, 7, capsys, numbers=[2, 3, 6])
    assert "missing shards of 7: 1,4-5,7;" in problems(words, capsys)
    run_shards(words, 7, capsys)
    shutil.copy(folder / "2-of-7.jsonl", folder / "again.jsonl")
    assert "repeated shards of 7: 2;" in problems(words, capsys)
    (folder / "again.jsonl").unlink()
    run_shards(words, 3, capsys, numbers=[3])
    assert "different divisions: 1 of 3, 7 of 7;" in problems(words, capsys)
    (folder / "3-of-3.jsonl").unlink()
    bold = tree / "sub-3/func/sub-3_task-rest_bold.nii.gz"
    state = f"[[{bold.stat().st_size}, {bold.stat().st_mtime_ns}]]"
    (path,) = [path for path in folder.iterdir() if state in path.read_text()]
    os.utime(bold, ns=(1, 1))
    assert f"since shards {path.name[0]} read them" in problems(words, capsys)
    run_shards(words, 7, capsys, numbers=[int(path.name[0])])
    assert main([*words, "--merge"]) == (1 if command == "check" else 0)
    assert not folder.exists()


def test_shards_with_other_options_or_scans_are_not_merged(tree, nifti, random_voxels, tmp_path, capsys):
    words = from_bids(tree, tmp_path / "out")
    run_shards(words, 3, capsys)
    assert main([*words, "--min-frames", "5", "--shard", "2/3"]) == 0
    assert "shards 2 were read with other options" in problems(words, capsys)
    run_shards(words, 3, capsys, numbers=[2])
    nifti.write(random_voxels(4, 5, 6), "bids/sub-9/anat/sub-9_T1w.nii.gz")
    assert "shards 1-3 were read" in problems(words, capsys)


def test_a_shard_that_was_run_twice_counts_once(tree, tmp_path, capsys):
    words = from_bids(tree, tmp_path / "out")
    run_shards(words, 2, capsys, numbers=[1, 1, 2, 1])
    assert main([*words, "--merge"]) == 0


def test_merge_reads_no_scan(tree, tmp_path, capsys, monkeypatch):
    words = from_bids(tree, tmp_path / "out")
    run_shards(words, 2, capsys)
    monkeypatch.setattr("umbrella_data.scan.shard.map_unordered", None)
    assert main([*words, "--merge"]) == 0


def test_check_shard_needs_a_folder(check, tmp_path, capsys):
    words = [word for word in check(tmp_path / "out") if word not in ("--out", str(tmp_path / "out"))]
    for option in (["--shard", "1/2"], ["--merge"]):
        assert main([*words, *option]) == 1
        assert "--out" in capsys.readouterr().err


def test_shards_of_the_cache_fill_it_together(tree, check, tmp_path, capsys):
    manifests = check(tmp_path)[1:3]
    words = ["cache", *manifests, "--data-root", str(tree), "--size", "T1=8,8,8", "--size", "rsfMRI=8,8,8,4"]
    words += ["--cache-dir", str(tmp_path / "cache"), "--workers", "1"]
    counts = []
    for number in range(1, 8):
        assert main([*words, "--shard", f"{number}/7"]) == 0
        counts.append(int(capsys.readouterr().out.split()[0]))
    # The five subjects have two scans, but one of them is unusable.
    assert sorted(counts) == [0, 0, 1, 2, 2, 2, 2]
    entries = {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("volumes/*/*")}
    shutil.rmtree(tmp_path / "cache")
    assert main(words) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").glob("volumes/*/*")} == entries


def test_shard_of_the_cache_without_any_scan_of_the_modality_fails(tree, check, tmp_path, capsys):
    words = ["cache", *check(tmp_path)[1:3], "--data-root", str(tree), "--size", "dMRI=8,8,8"]
    assert main([*words, "--cache-dir", str(tmp_path / "cache"), "--shard", "1/2"]) == 1
    assert "no scan of dMRI" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/8", "9/8", "1", "1/", "-1/3", "1/0", "1.5/3", "a/b", "1/2/3"])
def test_wrong_shard_ends_with_usage(text, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["from-bids", "bids", "--out", "out", f"--shard={text}"])
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_folder_that_cannot_be_created_ends_a_shard_before_a_scan_is_read(tree, check, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("umbrella_data.scan.shard.map_unordered", None)
    (tmp_path / "file").touch()
    for words in (check(tmp_path / "file/out"), from_bids(tree, tmp_path / "file/out")):
        assert main([*words, "--shard", "1/2"]) == 2
        assert "file/out" in capsys.readouterr().err
