"""`umbrella-eval RUN --baselines` on a small run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train import cli
from umbrella_train.baselines import compare, models
from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError
from umbrella_train.run.evaluation import evaluate_run
from umbrella_train.run.training import train
from umbrella_train.run_folder import RunFolder, read_lines

MakeConfig = Callable[..., RunConfig]
NAMES = ["constant", "text", "volume", "histogram", "cnn"]
LABELS = ["T1/lesion_side", "rsfMRI/first_active_side", "dMRI/fibre_damage_side"]


@pytest.fixture(scope="module")
def trained(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step."""
    path = train(make_config(tmp_path_factory.mktemp("runs"), trainer={"max_steps": 1}))
    assert path is not None
    return path


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of the run; with two penalties, and one epoch of the CNN."""
    monkeypatch.setattr(models, "PENALTIES", (1.0, 100.0))
    monkeypatch.setattr(compare, "predict_cnn", partial(compare.predict_cnn, num_epochs=1))
    return RunFolder.open(Path(shutil.copytree(trained, tmp_path / "run")))


def test_baselines_are_in_the_table_in_the_metrics_and_in_their_file(
    folder: RunFolder, cohort: DemoCohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for subject in cohort.directory.glob("sub-*"):
        path = tmp_path / "seg" / subject.name / f"{subject.name}_desc-x_dseg.nii.gz"
        path.parent.mkdir(parents=True)
        labels = np.random.default_rng(int(subject.name[4:])).integers(0, 3, (4, 4, 4))
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), np.eye(4)), path)
    num_before = len(read_lines(folder.metrics)[0])
    cli.eval_command([str(folder.path), "--baselines", "--segmentations", str(tmp_path / "seg"), "--json"])
    metrics = json.loads(capsys.readouterr().out)
    own, added = read_lines(folder.metrics)[0][num_before:][:2]
    assert {"step": 1, **metrics} == own | added
    assert {key.split("/")[0] for key in added} == {"step", "baseline"}
    for name in [*NAMES, "regions"]:
        assert {f"baseline/{name}/accuracy/{label}" for label in LABELS} <= added.keys()
    rows, num_broken = read_lines(folder.baselines)
    assert num_broken == 0
    assert len(rows) == 6 * 6
    asked, _ = read_lines(folder.predictions)
    for row in asked:
        same = [each for each in rows if all(each[key] == row[key] for key in ("subject", "task", "answer"))]
        assert sorted(each["baseline"] for each in same) == sorted([*NAMES, "regions"])
    assert sum(np.exp(rows[0]["option_scores"])) == pytest.approx(1)
    assert "sub-0" not in folder.baselines.read_text()


def test_a_part_of_the_rows_is_scored_and_nothing_written(folder: RunFolder) -> None:
    before = folder.metrics.read_bytes()
    metrics = evaluate_run(folder.path, baselines=True, max_samples=1)
    assert metrics["baseline/volume/questions/T1/lesion_side"] == metrics["eval/questions/T1/lesion_side"] == 1
    assert folder.metrics.read_bytes() == before
    assert not folder.baselines.exists()


def test_other_rows_and_rows_without_an_answer(folder: RunFolder, cohort: DemoCohort, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in cohort.test_manifest.read_text().splitlines()]
    rows[0]["messages"].pop()
    rows[1].pop("answer")
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = evaluate_run(
        folder.path, manifests=[tmp_path / "other.jsonl"], data_root=cohort.directory, baselines=True
    )
    assert {label: metrics[f"baseline/cnn/questions/{label}"] for label in LABELS} == dict(
        zip(LABELS, (2, 1, 2), strict=True)
    )


def test_data_are_checked_before_the_model_is_asked(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*data: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr("umbrella_train.run.evaluation.evaluate_sources", fail)
    with pytest.raises(RunError, match="has no file"):
        evaluate_run(folder.path, baselines=True, segmentations=folder.pictures)
    config = folder.config.read_text().replace("train.jsonl", "gone.jsonl")
    folder.config.write_text(config)
    with pytest.raises(RunError, match=r"gone\.jsonl"):
        evaluate_run(folder.path, baselines=True)
