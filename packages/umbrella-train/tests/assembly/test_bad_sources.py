"""Invalid manifests and scans: all reported before a run starts, or skipped if the config says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from umbrella_data import ScanError
from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train.checkpoint.integrity import newest_valid_checkpoint
from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError
from umbrella_train.run.evaluation import evaluate_run
from umbrella_train.run.training import train

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def own_cohort(cohort: DemoCohort, tmp_path: Path) -> Path:
    """A copy of the cohort that a test may damage."""
    folder = tmp_path / "cohort"
    shutil.copytree(cohort.train_manifest.parent, folder)
    return folder


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def write(manifest: Path, rows: list[dict]) -> None:
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sources(folder: Path) -> dict:
    return {
        "train": [{"manifest": str(folder / "train.jsonl")}],
        "evaluation": [{"manifest": str(folder / "test.jsonl")}],
    }


def test_all_problems_of_all_manifests_are_reported_before_anything_is_created(
    make_config: MakeConfig, own_cohort: Path, tmp_path: Path
) -> None:
    rows = rows_of(own_cohort / "train.jsonl")
    rows[1]["messages"][0]["content"][0]["path"] = "nowhere.nii.gz"
    rows[3]["answer"]["value"] = "neither"
    write(own_cohort / "train.jsonl", rows)
    rows = rows_of(own_cohort / "test.jsonl")
    rows[0]["messages"][0]["content"][0]["path"] = "../outside.nii.gz"
    write(own_cohort / "test.jsonl", rows)
    config = make_config(tmp_path / "runs", data={**sources(own_cohort), "pipelines": {}})
    for dry_run in (False, True):
        with pytest.raises(RunError) as caught:
            train(config, dry_run=dry_run)
        for words in ("line 2", "nowhere.nii.gz", "line 4", "neither", "line 1", "outside"):
            assert words in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_modalities_without_a_model_section_are_reported_before_anything_is_created(
    make_config: MakeConfig, own_cohort: Path, tmp_path: Path
) -> None:
    modalities = {"T1": {"image_size": [16, 16, 16], "patch_size": [8, 8, 8]}}
    config = make_config(
        tmp_path / "runs", model={"modalities": modalities}, data={**sources(own_cohort), "pipelines": {}}
    )
    with pytest.raises(RunError) as caught:
        train(config)
    for manifest in ("train.jsonl", "test.jsonl"):
        for name in ("dMRI", "rsfMRI"):
            assert f"{manifest}: has {name} scans, and the config has no model.modalities.{name}" in str(caught.value)
    assert "T1" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_bad_held_out_scan_does_not_lose_earlier_steps(
    make_config: MakeConfig, own_cohort: Path, tmp_path: Path
) -> None:
    row = next(row for row in rows_of(own_cohort / "test.jsonl") if row["messages"][0]["content"][0]["type"] == "image")
    scan = own_cohort / row["messages"][0]["content"][0]["path"]
    scan.write_bytes(scan.read_bytes()[:-200])
    config = make_config(
        tmp_path, data={**sources(own_cohort), "pipelines": {}}, trainer={"eval_steps": 2, "save_steps": 2}
    )
    with pytest.raises(ScanError):
        train(config)
    assert newest_valid_checkpoint(tmp_path / "run").name == "checkpoint-2"


def test_question_about_a_bad_scan_is_skipped_and_listed(
    make_config: MakeConfig, own_cohort: Path, tmp_path: Path
) -> None:
    row = next(row for row in rows_of(own_cohort / "test.jsonl") if "T1" in json.dumps(row["messages"]))
    scan = own_cohort / row["messages"][0]["content"][0]["path"]
    scan.write_bytes(scan.read_bytes()[:-200])
    data = {**sources(own_cohort), "cache_dir": None, "pipelines": {}}
    options = {
        "trainer": {"max_steps": 1, "use_cpu": True},
        "report": {"enabled": True, "controls": True, "pictures": True, "viewer": True},
    }
    skipping = make_config(tmp_path / "runs", data={**data, "on_bad_scan": "skip", "max_bad_fraction": 0.9}, **options)
    folder = train(skipping)
    assert folder is not None
    listed = [json.loads(line) for line in (folder / "bad_scans.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in listed] == ["gzip_truncated"]
    metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["eval/questions/T1"] == metrics["eval/questions/dMRI"] - 1
    assert (folder / "pictures" / "T1.png").is_file()
    report, viewer = (folder / "report.html").read_text(), (folder / "pictures" / "T1.html").read_text()
    assert "1 sample was skipped" in report
    assert viewer.startswith('<dl class="conversation"><dt>Question</dt>')
    assert viewer in report
    with pytest.raises(RunError, match=r"nothing\.jsonl"):
        evaluate_run(folder, manifests=[tmp_path / "nothing.jsonl"])
    with pytest.raises(Exception, match="gzip"):
        train(make_config(tmp_path / "strict", data=data, **options))
