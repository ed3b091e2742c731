"""The demo cohort: complete, reusable and balanced; answers show in the pattern, not in the brightness."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella_data.errors import UmbrellaDataError
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig
from umbrella_data.synthetic.cohort import QUESTIONS, DemoCohort, find_demo_cohort, make_demo_cohort

SIZES = {"T1": (32, 32, 32), "rsfMRI": (24, 24, 24, 16), "dMRI": (32, 32, 32)}


def rows_of(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DemoCohort:
    return make_demo_cohort(tmp_path_factory.mktemp("demo") / "cohort", num_train=84, num_test=12, seed=7)


def test_make_demo_cohort_writes_balanced_manifests(cohort: DemoCohort) -> None:
    train, test = rows_of(cohort.train_manifest), rows_of(cohort.test_manifest)
    assert (len(train), len(test)) == (84 * 3, 12 * 3)
    assert not {row["subject"] for row in train} & {row["subject"] for row in test}
    for rows in (train, test):
        for question in QUESTIONS:
            values = [row["answer"]["value"] for row in rows if row["task"] == question.task]
            assert Counter(values) == {"left": len(values) // 2, "right": len(values) // 2}
    for row in test:
        scan, text = row["messages"][0]["content"]
        assert (cohort.directory / scan["path"]).is_file()
        assert text["text"].endswith("?")
        assert row["messages"][1]["content"][0]["text"] == row["answer"]["value"]
        assert row["answer"]["options"] == ["left", "right"]


def test_scans_are_stored_in_several_orientations(cohort: DemoCohort) -> None:
    codes = {"".join(nib.aff2axcodes(nib.load(path).affine)) for path in cohort.directory.glob("sub-*/*/*.nii.gz")}
    assert len(codes) >= 5


def test_part_without_subjects_has_no_manifest(tmp_path: Path) -> None:
    make_demo_cohort(tmp_path, num_train=1, num_test=1, seed=0)
    cohort = make_demo_cohort(tmp_path, num_train=0, num_test=1, seed=0)
    assert not cohort.train_manifest.exists()
    assert len(rows_of(cohort.test_manifest)) == 3


def test_finished_cohort_is_reused_and_an_unfinished_one_written_again(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def make(seed: int = 0, num_train: int = 2) -> DemoCohort:
        calls.clear()
        return make_demo_cohort(
            tmp_path / "c", num_train=num_train, num_test=1, seed=seed, progress=lambda *step: calls.append(step)
        )

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted((tmp_path / "c").rglob("*")) if path.is_file()}

    make()
    assert calls == [(1, 3), (2, 3), (3, 3)]
    first = contents()
    make()
    assert calls == []
    stamp = tmp_path / "c" / "cohort.json"
    stamp.write_text(stamp.read_text().replace("true", "false"))
    next((tmp_path / "c").glob("sub-*/anat/*.nii.gz")).unlink()
    make()
    assert len(calls) == 3
    assert contents() == first
    make(seed=1, num_train=1)
    assert len(list((tmp_path / "c").glob("sub-*"))) == 2
    assert contents() != first


def test_concurrent_calls_write_the_cohort_once(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def make() -> None:
        make_demo_cohort(tmp_path, num_train=3, num_test=1, seed=0, progress=lambda *step: calls.append(step))

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_find_demo_cohort_returns_a_finished_one_with_these_parameters(tmp_path: Path) -> None:
    numbers = {"num_train": 1, "num_test": 1, "seed": 0}
    assert find_demo_cohort(tmp_path / "c", **numbers) is None
    assert list(tmp_path.iterdir()) == []
    assert find_demo_cohort(make_demo_cohort(tmp_path / "c", **numbers).directory, **numbers) is not None
    assert find_demo_cohort(tmp_path / "c", **{**numbers, "seed": 1}) is None


def test_folder_with_other_files_is_rejected_and_unchanged(tmp_path: Path) -> None:
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "sub-01" / "precious.nii.gz").write_bytes(b"data")
    with pytest.raises(UmbrellaDataError, match=str(tmp_path)):
        make_demo_cohort(tmp_path, num_train=1, num_test=1, seed=0)
    assert (tmp_path / "sub-01" / "precious.nii.gz").read_bytes() == b"data"
    with pytest.raises(ValueError, match="num_train -1"):
        make_demo_cohort(tmp_path / "new", num_train=-1, num_test=1, seed=0)


def load_volumes(cohort: DemoCohort, modality: str) -> tuple[np.ndarray, np.ndarray]:
    """Preprocessed volumes (N, C, ...), and whether their answer is "right" (N,)."""
    pipeline = Pipeline(PipelineConfig(image_size=SIZES[modality]), modality=modality)
    volumes, answers = [], []
    for row in rows_of(cohort.train_manifest) + rows_of(cohort.test_manifest):
        scan = row["messages"][0]["content"][0]
        if scan["modality"] == modality:
            volumes.append(pipeline(cohort.directory / scan["path"], generator=None).numpy())
            answers.append(row["answer"]["value"] == "right")
    return np.stack(volumes), np.array(answers)


def looks_right(volume: np.ndarray, modality: str) -> bool:
    """Whether the pattern of a volume (C, X, Y, Z[, T]), x to the right, is that of the answer "right"."""
    half = volume.shape[1] // 2
    right, left = volume[0, half:], volume[0, :half]
    if modality == "T1":
        return bool(np.sort(right.ravel())[-500:].sum() > np.sort(left.ravel())[-500:].sum())
    if modality == "dMRI":
        return bool(right.sum() < left.sum())
    lead = (right - left[::-1]).sum(axis=(0, 1, 2))
    return bool(lead[:8].sum() > lead[8:].sum())


@pytest.mark.parametrize("modality", SIZES)
def test_answers_show_in_the_pattern_and_not_in_the_brightness(cohort: DemoCohort, modality: str) -> None:
    if modality == "dMRI":
        pytest.importorskip("dipy", reason="fitting tensors needs the extra [dmri]")
    linear_model = pytest.importorskip("sklearn.linear_model")
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    volumes, answers = load_volumes(cohort, modality)
    accuracy = np.mean(
        [looks_right(volume, modality) == answer for volume, answer in zip(volumes, answers, strict=True)]
    )
    assert accuracy >= 0.98
    flat = volumes.reshape(len(volumes), -1)
    edges = np.linspace(*np.percentile(flat, [0.1, 99.9]), 17)
    histograms = [np.histogram(values, edges)[0] / len(values) for values in flat]
    features = np.column_stack([flat.mean(axis=1), flat.std(axis=1), histograms])
    classifier = make_pipeline(StandardScaler(), linear_model.LogisticRegression(max_iter=1000))
    assert cross_val_score(classifier, features, answers, cv=6).mean() <= 0.65
