"""`check` shows the labels, missing codes, tasks, repetition times and masks of a cohort."""

from __future__ import annotations

import json

import pytest

from umbrella_data.cli import main
from umbrella_data.jobs import cohort_table
from umbrella_data.jobs.check import check_manifests
from umbrella_data.jobs.check_rows import task_rows
from umbrella_data.jobs.cohort_table import OTHERS, NumberSummary, TaskAnswers, add_answer, answer_notes
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.manifest.sample import Answer, Sample


def answers_of(values, *, task="age", unit="years"):
    """Notes by code, and the rows of check.json, of numbers of one task."""
    tasks = {}
    for value in values:
        add_answer(tasks, Sample("id", "sub", task, (), Answer("number", value, unit=unit)))
    (row,) = task_rows(tasks)
    return {note.code: note.count for note in answer_notes(tasks)}, row


def choices_of(values, options):
    tasks = {}
    for value in values:
        add_answer(tasks, Sample("id", "sub", "group", (), Answer("choice", value, options=options)))
    (row,) = task_rows(tasks)
    return {note.code: note.count for note in answer_notes(tasks)}, row


@pytest.fixture
def checked(nifti, random_voxels, make_row, write_manifest, tmp_path, capsys):
    """Writes manifests of rows and series; returns the report of `check` and what it printed."""

    def check(manifests, *, code=0):
        paths = [str(write_manifest(rows, f"{name}.jsonl")) for name, rows in manifests.items()]
        assert main(["check", *paths, "--out", str(tmp_path / "out"), "--workers", "1"]) == code
        text = (tmp_path / "out" / "check.json").read_text()
        assert not any(word in text for word in ("sub-", ".nii", "jsonl", str(tmp_path)))
        return json.loads(text), capsys.readouterr().out

    return check


def test_check_counts_the_answers_of_each_manifest_and_task(checked, nifti, random_voxels, make_row):
    for seed, name in enumerate("abcdef"):
        nifti.write(random_voxels(4, 5, 6, seed=seed), f"{name}_0.nii.gz")
    sexes = {"a": "female", "b": "male", "c": "female"}
    rows = {
        "train": [
            {
                **make_row(name, "T1", answer=sex),
                "task": "sex",
                "answer": {"type": "choice", "options": ["male", "female", "other"], "value": sex},
            }
            for name, sex in sexes.items()
        ]
    }
    rows["train"] += [{**make_row("a", "T1", answer="no finding"), "id": "free", "task": "finding"}]
    words = {"type": "text", "value": "n/a"}
    rows["train"] += [{**make_row("a", "T1", answer="n/a"), "id": "words", "task": "finding", "answer": words}]
    rows["test"] = [
        {**make_row(name, "T1", answer=str(age)), "task": "age", "answer": {"type": "number", "value": age} | unit}
        for name, age, unit in (("d", 21.5, {"unit": "years"}), ("e", 60, {"unit": "years"}), ("f", -9, {}))
    ]
    report, printed = checked(rows)
    train, test = report["manifests"]
    empty = {"num_unanswered": 0, "num_texts": 0, "options": {}, "numbers": [], "missing_codes": {}}
    empty |= {"num_impossible_ages": 0}
    assert train["tasks"] == [
        {**empty, "task": "finding", "num_unanswered": 1, "num_texts": 1, "missing_codes": {"n/a": 1}},
        {**empty, "task": "sex", "options": {"female": 2, "male": 1, "other": 0}},
    ]
    assert train["notes"] == [{"code": "missing_codes", "name": "finding", "count": 1}]
    numbers = [
        {"unit": None, "count": 1, "min": -9, "mean": -9, "max": -9},
        {"unit": "years", "count": 2, "min": 21.5, "mean": 40.75, "max": 60},
    ]
    assert test["tasks"] == [{**empty, "task": "age", "numbers": numbers, "missing_codes": {"-9": 1}}]
    assert test["notes"] == [{"code": "missing_codes", "name": "age", "count": 1}]
    lines = [line.split() for line in printed.splitlines()]
    assert ["3", "sex:", "female", "2,", "male", "1,", "other", "0"] in lines
    assert ["2", "age:", "21.5", "to", "60,", "mean", "40.75", "years"] in lines
    assert ["1", "finding:", "no", "answer", "to", "score"] in lines
    assert printed.count("[missing_codes]") == 2


@pytest.mark.parametrize("code", [-9, -99, -999, -9999, 999, 9999])
def test_codes_outside_the_range_of_the_other_values_are_noted(code):
    notes, row = answers_of([20, 30, code, code, 70])
    assert notes == {"missing_codes": 2}
    assert row["missing_codes"] == {str(code): 2}
    assert answers_of([code])[0] == {"missing_codes": 1}
    assert answers_of([-10_000, code, 10_000], task="volume", unit="mL")[0] == {}


def test_ages_outside_0_to_120_years_are_noted_in_their_unit():
    assert answers_of([0, 120])[0] == {}
    assert answers_of([-1, 0, 121, 999], unit=None) == (
        {"missing_codes": 1, "impossible_ages": 2},
        {
            "task": "age",
            "num_unanswered": 0,
            "num_texts": 0,
            "options": {},
            "numbers": [{"unit": None, "count": 4, "min": -1, "mean": 279.75, "max": 999}],
            "missing_codes": {"999": 1},
            "num_impossible_ages": 2,
        },
    )
    assert answers_of([1440], unit="months")[0] == {}
    assert answers_of([1441], unit="Months")[0] == {"impossible_ages": 1}
    assert answers_of([-3, 500], task="brain_age_gap")[0] == {}
    # An impossible age does not widen the range in which 999 would be a value.
    assert answers_of([30, 5000, 999])[0] == {"missing_codes": 1, "impossible_ages": 1}


def test_codes_among_options_are_noted():
    assert choices_of(["a", "-9", "-9"], ("a", "b", "-9"))[0] == {"missing_codes": 2}
    assert choices_of(["1", "-9.0"], ("1", "2", "-9.0"))[1]["missing_codes"] == {"-9.0": 1}
    assert choices_of(["N/A", "yes"], ("yes", "N/A"))[0] == {"missing_codes": 1}
    assert choices_of(["-9"], ("-10", "-9", "0"))[0] == {}
    assert choices_of(["yes"], ("yes", "N/A"))[0] == {}  # nowhere the right answer


def test_mean_does_not_overflow():
    summary = NumberSummary()
    for value in (1.7e308, 1.7e308, -1.7e308, -1.7e308):
        summary.add(value)
    assert summary.mean == pytest.approx(0, abs=1e300)


def test_counts_do_not_grow_with_the_rows(monkeypatch):
    monkeypatch.setattr(cohort_table, "MAX_NAMES", 3)
    tasks = {}
    for i in range(20):
        options = (f"{i}a", f"{i}b")
        add_answer(tasks, Sample("id", "sub", f"task {i}", (), Answer("choice", options[0], options=options)))
        add_answer(tasks, Sample("id", "sub", f"task {i}", (), Answer("number", i, unit=f"unit {i}")))
        add_answer(tasks, Sample("id", "sub", f"task {i}", (), Answer("text", f"text {i}")))
    assert list(tasks) == ["task 0", "task 1", "task 2", OTHERS]
    others: TaskAnswers = tasks[OTHERS]
    assert (len(others.options), len(others.numbers), len(others.texts)) == (4, 4, 1)
    assert others.options.total() == sum(each.count for each in others.numbers.values()) == others.texts.total() == 17


def test_check_shows_repetition_times_tasks_and_masks(checked, nifti, random_voxels, make_row, tmp_path):
    names = {
        "ses-1_task-rest_run-1_bold": 2.0, "task-rest_bold": 0.8, "task-nback_bold": 2.0004, "plain": 0.0,
    }  # fmt: skip
    rows = []
    for seed, (name, seconds) in enumerate(names.items()):
        nifti.write(random_voxels(4, 5, 6, 7, seed=seed), f"{name}_0.nii.gz", repetition_time=seconds)
        rows.append(make_row(name, "rsfMRI"))
    (tmp_path / "task-nback_bold_0.json").write_text('{"RepetitionTime": 2.5}')
    voxels = random_voxels(4, 5, 6)
    nifti.write(voxels, "t1_0.nii.gz")
    nifti.write(voxels[::-1].copy(), "t2_0.nii.gz")
    mask = nifti.write((voxels > 500).astype("uint8"), "mask.nii.gz")
    rows += [make_row("t1", "T1"), make_row("t2", "T1"), {**make_row("t1", "T1"), "id": "again"}]
    rows[-2]["messages"][0]["content"][0]["mask"] = mask.name
    report, printed = checked({"train": rows})
    assert report["repetition_times"] == [
        {"modality": "rsfMRI", "seconds": 2.0, "num_scans": 1},
        {"modality": "rsfMRI", "seconds": 0.8, "num_scans": 1},
        {"modality": "rsfMRI", "seconds": 2.5, "num_scans": 1},
        {"modality": "rsfMRI", "seconds": None, "num_scans": 1},
    ]
    assert report["series_tasks"] == [
        {"modality": "rsfMRI", "task": "rest", "num_scans": 2},
        {"modality": "rsfMRI", "task": "nback", "num_scans": 1},
        {"modality": "rsfMRI", "task": None, "num_scans": 1},
    ]
    assert report["masks"] == [
        {"modality": "T1", "with_mask": 1, "without_mask": 1},
        {"modality": "rsfMRI", "with_mask": 0, "without_mask": 4},
    ]
    assert report["notes"] == [
        {"code": "mixed_repetition_times", "name": "rsfMRI", "count": 3},
        {"code": "mixed_masks", "name": "T1", "count": 1},
    ]
    assert "window_seconds of data.pipelines.rsfMRI" in printed
    lines = [line.split() for line in printed.splitlines()]
    for line in ("1 rsfMRI 0.8", "1 rsfMRI unknown", "2 rsfMRI rest", "1 T1 with a mask"):
        assert line.split() in lines


def test_one_repetition_time_and_no_masks_are_no_note(nifti, random_voxels, make_row, write_manifest):
    # The headers differ in the last digits only.
    for seed, (name, seconds) in enumerate({"a": 2.0, "b": 2.0004, "c": 0.0}.items()):
        nifti.write(random_voxels(4, 5, 6, 7, seed=seed), f"{name}_0.nii.gz", repetition_time=seconds)
    manifest = read_manifest(write_manifest([make_row(name, "rsfMRI") for name in "abc"]))
    report = check_manifests([manifest], num_workers=1)
    assert report.cohort.repetition_times == {"rsfMRI": {2.0: 2, None: 1}}
    assert report.cohort.notes == []
