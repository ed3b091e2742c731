"""Nothing of the evaluation data is in the training data, or the run does not start and says what is in both."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest

from umbrella_train.assembly.held_out import Overlap, check_held_out
from umbrella_train.config import DatasetConfig
from umbrella_train.errors import RunError
from umbrella_train.report.page import render
from umbrella_train.report.run_data import read_run
from umbrella_train.run.training import train

Pair = tuple[DatasetConfig, DatasetConfig]


@pytest.fixture
def plant(cohort, tmp_path):
    """A function that plants a leak into a copy of the cohort and returns its training and test data."""
    folder = tmp_path / "data"
    shutil.copytree(cohort.test_manifest.parent, folder)
    train_path, test_path = folder / cohort.train_manifest.name, folder / cohort.test_manifest.name
    first = json.loads(train_path.read_text().splitlines()[0])
    train_scan = first["messages"][0]["content"][0]["path"]
    rows = [json.loads(line) for line in test_path.read_text().splitlines()]

    def make(kind: str) -> Pair:
        item = rows[0]["messages"][0]["content"][0]
        if kind == "subject":
            rows[0]["subject"] = first["subject"]
        elif kind == "subject without prefix":
            rows[0]["subject"] = first["subject"].removeprefix("sub-")
        elif kind == "file":
            item["path"] = train_scan
        elif kind == "copy":
            shutil.copy(folder / train_scan, folder / item["path"])
        elif kind == "compressed again":
            content = gzip.decompress((folder / train_scan).read_bytes())
            (folder / item["path"]).write_bytes(gzip.compress(content, 1))
        test_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DatasetConfig(manifest=train_path), DatasetConfig(manifest=test_path)

    return make


def check(pair: Pair, *, max_rows: int = 100, allow_overlap: bool = False) -> Overlap:
    return check_held_out([pair[0]], [pair[1]], max_rows=max_rows, allow_overlap=allow_overlap)


def test_held_out_data_have_no_overlap(plant):
    assert not check(plant("nothing"))


@pytest.mark.parametrize("kind", ["subject", "subject without prefix"])
def test_subject_in_both_is_rejected(plant, kind):
    pair = plant(kind)
    with pytest.raises(RunError, match="1 subjects"):
        check(pair)
    overlap = check(pair, allow_overlap=True)
    assert (len(overlap.subjects), overlap.files) == (1, ())


@pytest.mark.parametrize("kind", ["file", "copy", "compressed again"])
def test_content_in_both_is_rejected(plant, kind):
    pair = plant(kind)
    with pytest.raises(RunError, match="1 files"):
        check(pair)
    overlap = check(pair, allow_overlap=True)
    assert (overlap.subjects, len(overlap.files)) == ((), 1)
    assert (overlap.files[0][0] == overlap.files[0][1]) is (kind == "file")


def test_more_rows_than_are_compared_are_warned_of(plant, caplog):
    assert not check(plant("subject"), max_rows=3)
    assert "umbrella-data check" in caplog.text


def test_report_of_a_run_with_overlap_says_that_it_is_not_held_out(plant, make_config, tmp_path):
    data = {name: [source.model_dump()] for name, source in zip(("train", "evaluation"), plant("subject"), strict=True)}
    folder = train(make_config(tmp_path / "runs", data={**data, "allow_overlap": True}))
    assert folder is not None
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert (first["overlap/subjects"], first["overlap/files"]) == (1, 0)
    run = read_run(folder, name="run")
    assert not run.is_held_out
    page = render([run])
    assert "Answers on held-out subjects" not in page
    assert "not held out" in page


def test_report_of_a_run_that_was_not_compared_does_not_call_it_held_out(plant, make_config, tmp_path, monkeypatch):
    data = {name: [source.model_dump()] for name, source in zip(("train", "evaluation"), plant("nothing"), strict=True)}
    monkeypatch.setattr("umbrella_train.assembly.sources.MAX_ROWS_CHECKED", 1)
    folder = train(make_config(tmp_path / "runs", data=data))
    assert folder is not None
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["overlap/unchecked_rows"] == 24
    run = read_run(folder, name="run")
    assert run.is_held_out is None
    page = render([run])
    assert "Answers on evaluation subjects" in page
    assert "held-out" not in page
