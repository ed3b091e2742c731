"""A manifest exported to Hugging Face rows is read again as equal samples."""

from __future__ import annotations

import json

import pytest

from umbrella_data.errors import ManifestError
from umbrella_data.manifest.hf_export import to_hf_dataset, to_hf_rows
from umbrella_data.manifest.manifest import read_manifest


@pytest.fixture
def manifest(make_row, write_manifest):
    rows = [make_row("a", "T1"), make_row("b", "bold", "T1", question="two lines\n  and blanks"), make_row("c")]
    rows[0]["answer"] = {"type": "choice", "options": ["a brain", "none"], "value": "a brain"}
    rows[1]["answer"] = {"type": "number", "value": 3.5, "unit": "years"}
    rows[1]["messages"][0]["content"][1]["mask"] = "b_mask.nii.gz"
    rows[2]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    maps = make_row("m", "dMRI", question="Maps?")
    maps["messages"][0]["content"][0]["path"] = ["deep/fa.nii.gz", "deep/md.nii.gz"]
    # A comparison of two scans in two exchanges; the second scan is in the middle of a turn.
    second = make_row("n", "T1")["messages"]
    second[0]["content"].insert(0, {"type": "text", "text": "And this one:"})
    maps["messages"] += second
    return read_manifest(write_manifest([*rows, maps]))


def read_back(text, manifest, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    return list(read_manifest(path, data_root=manifest.data_root))


def test_exported_rows_are_read_as_equal_samples(manifest, tmp_path):
    rows = list(to_hf_rows(manifest))
    assert {tuple(row) for row in rows} == {
        ("id", "subject", "task", "messages", "images", "modalities", "masks", "answer")
    }
    assert rows[1]["masks"] == [None, "b_mask.nii.gz"]
    assert rows[3]["images"] == [["deep/fa.nii.gz", "deep/md.nii.gz"], ["n_0.nii.gz"]]
    assert read_back("".join(json.dumps(row) + "\n" for row in rows), manifest, tmp_path) == list(manifest)


def test_exported_dataset_is_read_as_equal_samples(manifest, tmp_path):
    pytest.importorskip("datasets", reason="the export is an extra")
    dataset = to_hf_dataset(manifest)
    assert dataset.num_rows == 4
    assert dataset[1]["modalities"] == ["rsfMRI", "T1"]
    dataset.to_json(tmp_path / "out.jsonl")
    assert read_back((tmp_path / "out.jsonl").read_text(), manifest, tmp_path) == list(manifest)


def test_text_with_an_image_placeholder_is_rejected(make_row, write_manifest):
    manifest = read_manifest(write_manifest([make_row("a"), make_row("b", question="an <image> here")]))
    with pytest.raises(ManifestError, match=r"line 2: .*<image>"):
        list(to_hf_rows(manifest))
