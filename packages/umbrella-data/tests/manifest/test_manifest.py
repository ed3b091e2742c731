"""Manifests: random access by byte offsets; every problem is reported with its line."""

from __future__ import annotations

import json
import pickle

import pytest

from umbrella_data.errors import ManifestError
from umbrella_data.manifest.manifest import read_manifest


def test_samples_are_read_by_index_slice_and_iteration(make_row, write_manifest):
    manifest = read_manifest(write_manifest([make_row(name, "T1") for name in "abcd"]))
    assert len(manifest) == 4
    assert (manifest[2].id, manifest[-1].id) == ("c", "d")
    assert [sample.id for sample in manifest[1:3]] == ["b", "c"]
    assert [sample.id for sample in manifest] == list("abcd")
    with pytest.raises(IndexError):
        manifest[4]


def test_modalities_are_read_in_order_without_files(make_row, write_manifest):
    manifest = read_manifest(write_manifest([make_row("a", "dwi", "T1w"), make_row("b"), make_row("c", "dMRI", "T1")]))
    assert [manifest.modalities(i) for i in (2, 1, 0, 2)] == [("dMRI", "T1"), (), ("dMRI", "T1"), ("dMRI", "T1")]


def test_modalities_of_an_invalid_row_raise_its_problems(make_row, write_manifest):
    manifest = read_manifest(write_manifest([make_row("a", "T1"), {"messages": [{"content": 3}]}]))
    with pytest.raises(ManifestError, match="line 2: 'id'"):
        manifest.modalities(1)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n\n", ""])
def test_any_line_ending_is_read(make_row, tmp_path, end):
    separator = end or "\n"
    text = separator.join(json.dumps(make_row(name, "T1", question="脳?")) for name in "abc") + end
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    manifest = read_manifest(path)
    assert [sample.id for sample in manifest] == list("abc")
    assert manifest.line(2) == (7 if end == "\n\n\n" else 3)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_list_is_indexed_by_its_elements(make_row, tmp_path, indent):
    rows = [make_row(name, "T1", question="脳?") for name in "abc"]
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    manifest = read_manifest(path)
    assert [sample.id for sample in manifest] == list("abc")
    assert [sample.messages[0].text for sample in manifest] == ["脳?"] * 3
    lines = path.read_text(encoding="utf-8").splitlines()
    start = manifest.line(1) - 1
    assert '"id": "b"' in "\n".join(lines[start : start + 2])


def test_json_file_of_one_object_is_one_row(make_row, tmp_path):
    path = tmp_path / "row.json"
    path.write_text("\n" + json.dumps(make_row("a", "T1"), indent=1) + "\n")
    manifest = read_manifest(path)
    assert [sample.id for sample in manifest] == ["a"]
    assert manifest.line(0) == 2


@pytest.mark.parametrize(
    "text", ['{"id": 1}\n{"id": 2}', "3", '[{"a": 1}', '[{"a": 1},]', '[{"a": 1} {"b": 2}]', '[{"a": 1}] x']
)
def test_invalid_json_list_is_rejected(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ManifestError, match=r"rows\.json"):
        read_manifest(path)


def test_validate_reports_all_problems_of_all_rows_with_their_lines(make_row, write_manifest, tmp_path):
    rows = [make_row("a", "T1"), make_row("b", "T9"), make_row("a", "T1"), {"id": "x", "messages": 3}]
    path = write_manifest(rows)
    path.write_text(path.read_text() + '{"id": NaN}\nnot json\n')
    (tmp_path / "a_0.nii.gz").touch()
    with pytest.raises(ManifestError) as caught:
        read_manifest(path).validate()
    starts = [
        "line 2: messages[0].content[0]: unknown modality 'T9'",
        "line 3: duplicate id 'a'",
        "line 4: 'subject'",
        "line 4: 'messages'",
        "line 5: NaN",
        "line 6: ",
    ]
    for problem, start in zip(caught.value.problems, starts, strict=True):
        assert problem.startswith(start)
    assert str(path) in str(caught.value)


def test_rows_that_end_with_the_user_are_valid_only_if_asked_for(make_row, write_manifest):
    row = make_row("a", "T1")
    del row["messages"][-1]
    path = write_manifest([row])
    with pytest.raises(ManifestError, match="line 1: roles are user"):
        read_manifest(path).validate(check_files=False)
    with pytest.raises(ManifestError, match="line 1: roles are user"):
        read_manifest(path).turns(0)
    manifest = read_manifest(path, may_end_with_user=True)
    manifest.validate(check_files=False)
    assert [turn.role for turn in manifest[0].messages] == [turn.role for turn in manifest.turns(0)] == ["user"]
    assert manifest.modalities(0) == ("T1",)


def test_validate_reports_a_missing_file_or_a_broken_link(make_row, write_manifest, tmp_path):
    manifest = read_manifest(write_manifest([make_row("a", "T1")]))
    manifest.validate(check_files=False)
    with pytest.raises(ManifestError, match=r"line 1: subject 'sub-a': no file a_0\.nii\.gz under .*data_root"):
        manifest.validate()
    (tmp_path / "a_0.nii.gz").symlink_to("nothing")
    with pytest.raises(ManifestError) as caught:
        manifest.validate()
    (problem,) = caught.value.problems
    assert problem.startswith("line 1: subject 'sub-a': a_0.nii.gz: a link ")
    assert "data_root" not in problem
    (tmp_path / "nothing").touch()
    manifest.validate()


def test_paths_are_relative_to_data_root(make_row, write_manifest, tmp_path):
    root = tmp_path / "scans"
    root.mkdir()
    manifest = read_manifest(write_manifest([make_row("a", "T1")]), data_root=root)
    assert manifest[0].scans[0].paths == (root / "a_0.nii.gz",)
    with pytest.raises(ManifestError, match="data_root"):
        read_manifest(manifest.path, data_root=tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_manifest_without_rows_is_rejected(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(ManifestError, match="no rows"):
        read_manifest(path)


def test_missing_manifest_is_rejected(tmp_path):
    with pytest.raises(ManifestError, match=r"rows\.jsonl"):
        read_manifest(tmp_path / "rows.jsonl")


def test_manifest_can_be_pickled(make_row, write_manifest):
    manifest = read_manifest(write_manifest([make_row("a", "T1")]))
    assert manifest[0] == pickle.loads(pickle.dumps(manifest))[0]
