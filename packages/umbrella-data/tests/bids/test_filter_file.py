"""BIDS filter files and lists of excluded scans: every problem is reported at once."""

from __future__ import annotations

import json

import pytest

from umbrella_data.bids.filter_file import read_excluded, read_filter
from umbrella_data.errors import ManifestError


@pytest.fixture
def write(tmp_path):
    def make(content):
        file = tmp_path / "filter.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return file

    return make


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("session", "01", ("ses", ("01",))),
        ("session", "ses-01", ("ses", ("01",))),
        ("task", ["rest", "task-nback"], ("task", ("rest", "nback"))),
        ("run", 1, ("run", ("1",))),
        ("acquisition", None, ("acq", (None,))),
        ("ceagent", "Query.NONE", ("ce", (None,))),
        ("reconstruction", "Query.ANY", ("rec", ("*",))),
        ("direction", "*", ("dir", ("*",))),
        ("part", ["mag", None], ("part", ("mag", None))),
        ("desc", "Query.OPTIONAL", ("desc", ("*", None))),
        ("suffix", "T1w", ("suffix", ("T1w",))),
        ("extension", [".nii", ".nii.gz"], ("extension", (".nii", ".nii.gz"))),
    ],
)
def test_values_of_a_filter_file_are_conditions(write, key, value, expected):
    found = read_filter(write({"bold": {key: value}, "fmap": {"anything": {}}}))
    assert dict(found.conditions) == {"rsfMRI": dict([expected])}
    assert found.ignored == ("fmap",)


def test_queries_are_names_of_modalities(write):
    found = read_filter(write({"t1w": {"session": "a"}, "dwi": {}, "sbref": {}}))
    assert dict(found.conditions) == {"T1": {"ses": ("a",)}, "dMRI": {}}


def test_all_problems_of_a_filter_file_are_reported(write):
    queries = {
        "t1w": {"sesion": "01", "run": {"from": 1}},
        "bold": {"task": [], "echo": True, "run": [1, 1.5]},
        "dwi": ["01"],
    }
    file = write(queries)
    with pytest.raises(ManifestError) as caught:
        read_filter(file)
    assert caught.value.path == str(file)
    keys = [problem.partition(":")[0] for problem in caught.value.problems]
    assert keys == ["t1w.sesion", "t1w.run", "bold.task", "bold.echo", "bold.run", "dwi"]
    assert "'session'" in caught.value.problems[0]


@pytest.mark.parametrize("content", ["{", '"t1w"', "[]", "[" * 100_000])
def test_filter_file_that_is_not_an_object_is_rejected(write, content):
    file = write(content)
    with pytest.raises(ManifestError) as caught:
        read_filter(file)
    assert caught.value.path == str(file)


@pytest.mark.parametrize("read", [read_filter, read_excluded])
def test_missing_file_or_other_encoding_is_rejected(tmp_path, read):
    file = tmp_path / "file"
    for _ in range(2):
        with pytest.raises(ManifestError) as caught:
            read(file)
        assert caught.value.path == str(file)
        file.write_bytes(b"\xff\xfe")


def test_comments_and_blank_lines_are_skipped(tmp_path):
    file = tmp_path / "exclude.txt"
    file.write_text("\ufeff# bad\nsub-01  # moved\n\n  sub-02/ses-01\r\n", encoding="utf-8")
    assert read_excluded(file) == ["sub-01", "sub-02/ses-01"]
