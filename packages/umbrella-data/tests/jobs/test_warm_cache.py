"""`cache` fills the cache as a run would, once, and continues where it stopped."""

from __future__ import annotations

import errno
import os
import sys

import pytest
import torch

from umbrella_data.cache.store import VolumeCache
from umbrella_data.cli import main
from umbrella_data.jobs.warm_cache import warm_cache
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig


@pytest.fixture
def manifest(nifti, random_voxels, make_row, write_manifest):
    for i in range(10):
        nifti.write(random_voxels(6, 7, 8, seed=i), f"{i}_0.nii.gz")
    rows = [make_row(str(i), "T1") for i in range(10)]
    return write_manifest([*rows, {**rows[3], "id": "again"}, make_row("x", "bold")])


@pytest.fixture
def pipeline(tmp_path):
    config = PipelineConfig(image_size=(8, 8, 8))
    return Pipeline(config, modality="T1", cache=VolumeCache(tmp_path / "cache"))


def entries(tmp_path):
    return sorted((tmp_path / "cache").glob("volumes/*/*"))


def test_command_preprocesses_every_scan_as_the_run_does(manifest, pipeline, tmp_path, capsys, monkeypatch):
    cache = ["--cache-dir", str(tmp_path / "cache")]
    assert main(["cache", str(manifest), *cache, "--size", "T1=8,8,8", "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "10 of 10 scans are in" in printed
    assert "skipped: 1 scans of rsfMRI" in printed
    assert len(entries(tmp_path)) == 10
    monkeypatch.setattr(pipeline, "_prepare", None)  # fails if a scan is preprocessed again
    scan = read_manifest(manifest)[4].scans[0]
    assert pipeline(scan.paths, generator=None).shape == (1, 8, 8, 8)


def test_evicted_scans_are_not_counted_as_kept(manifest, tmp_path, capsys):
    words = ["cache", str(manifest), "--cache-dir", str(tmp_path / "cache"), "--size", "T1=8,8,8", "--workers", "1"]
    assert main([*words, "--max-gb", "0.00001"]) == 1
    num_kept = len(entries(tmp_path))
    assert 0 < num_kept < 9
    printed = capsys.readouterr().out
    assert f"preprocessed 10 of 10 scans; {num_kept} remain in {tmp_path / 'cache'}" in printed
    assert "--max-gb 1e-05" in printed
    assert main([*words, "--max-gb", "1"]) == 0
    assert "10 of 10 scans are in" in capsys.readouterr().out


@pytest.mark.isolated
def test_dwi_without_dipy_ends_before_a_scan_is_read_unless_it_is_skipped(
    manifest, make_row, write_manifest, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "dipy", None)
    path = write_manifest([make_row("1", "T1"), make_row("d", "dMRI")], "dwi.jsonl")
    words = ["cache", str(path), "--cache-dir", str(tmp_path / "cache"), "--size", "T1=8,8,8", "--size", "dMRI=8,8,8"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'd_0.nii.gz'}: " in error
    assert "pip install dipy" in error
    assert "--modality T1" in error
    assert entries(tmp_path) == []
    assert main([*words, "--modality", "T1"]) == 0
    assert "skipped: 1 scans of dMRI, not selected by --modality" in capsys.readouterr().out
    assert main([*words, "--modality", "bold"]) == 1
    assert "rsfMRI has no size" in capsys.readouterr().err


@pytest.mark.isolated
def test_dwi_in_the_cache_needs_no_dipy(nifti, random_voxels, make_row, write_manifest, tmp_path, capsys, monkeypatch):
    nifti.write(random_voxels(6, 7, 8), "d_0.nii.gz")
    for ending in ("bval", "bvec"):
        (tmp_path / f"d_0.{ending}").write_text("0\n")
    monkeypatch.setattr(Pipeline, "_prepare", lambda self, files: torch.ones(1, 2, 8, 8, 8))
    path = write_manifest([make_row("d", "dMRI")], "dwi.jsonl")
    words = ["cache", str(path), "--cache-dir", str(tmp_path / "cache"), "--size", "dMRI=8,8,8"]
    assert main(words) == 0
    monkeypatch.setitem(sys.modules, "dipy", None)
    assert main(words) == 0


def test_warming_continues_where_it_stopped(manifest, pipeline, tmp_path, monkeypatch):
    manifests = [read_manifest(manifest)]
    warm_cache(manifests, pipelines={"T1": pipeline}, num_workers=1)
    for entry in entries(tmp_path)[:3]:
        entry.unlink()
    made = []
    prepare = Pipeline._prepare
    monkeypatch.setattr(Pipeline, "_prepare", lambda self, files: made.append(files) or prepare(self, files))
    report = warm_cache(manifests, pipelines={"T1": pipeline}, num_workers=1)
    assert len(made) == 3
    assert (report.num_scans, report.failed) == (10, [])
    assert len(entries(tmp_path)) == 10


def test_unusable_scans_are_listed(manifest, tmp_path, capsys):
    (tmp_path / "5_0.nii.gz").write_bytes(b"no scan")
    words = ["--cache-dir", str(tmp_path / "cache"), "--size", "T1=8,8,8", "--workers", "1"]
    assert main(["cache", str(manifest), *words]) == 1
    printed = capsys.readouterr().out
    assert "9 of 10 scans" in printed
    assert "5_0.nii.gz" in printed
    assert "--data-root" not in printed
    (tmp_path / "elsewhere").mkdir()
    assert main(["cache", str(manifest), *words, "--data-root", str(tmp_path / "elsewhere")]) == 1
    assert capsys.readouterr().out.endswith(f"under {tmp_path / 'elsewhere'}: check --data-root\n")


def test_errors_in_the_report_have_no_traceback(manifest, pipeline, tmp_path):
    (tmp_path / "5_0.nii.gz").write_bytes(b"no scan")
    (error,) = warm_cache([read_manifest(manifest)], pipelines={"T1": pipeline}, num_workers=1).failed
    assert error.path == str(tmp_path / "5_0.nii.gz")
    assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)


@pytest.mark.timeout(60)
def test_missing_files_are_listed_and_do_not_stop_the_command(manifest, tmp_path, capsys):
    for name in "345":
        (tmp_path / f"{name}_0.nii.gz").unlink()
    (tmp_path / "3_0.nii.gz").mkdir()
    os.mkfifo(tmp_path / "4_0.nii.gz")
    words = ["--cache-dir", str(tmp_path / "cache"), "--size", "T1=8,8,8", "--workers", "1"]
    assert main(["cache", str(manifest), *words]) == 1
    printed = capsys.readouterr().out
    assert "7 of 10 scans" in printed
    assert printed.count("[not_regular_file]") == 2
    assert printed.count("[missing]") == 1


def test_full_disk_ends_the_command_with_a_message(manifest, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("umbrella_data.cache.store.write_entry", fail)
    words = ["--cache-dir", str(tmp_path / "cache"), "--size", "T1=8,8,8", "--workers", "1"]
    assert main(["cache", str(manifest), *words]) == 1
    error = capsys.readouterr().err
    assert "error: " in error
    assert "No space left on device" in error


def test_cache_uses_the_folder_sizes_and_manifests_of_a_runs_configuration(manifest, tmp_path, run_config):
    configs = {"T1": PipelineConfig(image_size=(8, 8, 8))}
    path = run_config(configs=configs, sources=[(manifest, None)], cache_dir=tmp_path / "cache")
    assert main(["cache", "--config", path, "--max-gb", "1", "--workers", "1"]) == 0
    assert len(entries(tmp_path)) == 10


def test_cache_without_a_folder_or_pipelines_is_rejected(manifest, tmp_path, capsys):
    assert main(["cache", str(manifest), "--size", "T1=8,8,8"]) == 1
    assert "--cache-dir" in capsys.readouterr().err
    bare = Pipeline(PipelineConfig(image_size=(8, 8, 8)), modality="T1")
    with pytest.raises(ValueError, match="T1 have no cache"):
        warm_cache([read_manifest(manifest)], pipelines={"T1": bare})
    assert torch.is_tensor(bare(tmp_path / "1_0.nii.gz", generator=None))
