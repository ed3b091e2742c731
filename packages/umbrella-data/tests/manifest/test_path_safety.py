"""No dialect lets a path leave the data root: not through `..`, absolute, by a link, or with odd bytes."""

from __future__ import annotations

import json

import pytest

from umbrella_data.errors import ManifestError
from umbrella_data.manifest.manifest import read_manifest

OUTSIDE = [
    "../a.nii",
    "b/../../a.nii",
    "/etc/passwd",
    "~/a.nii",
    "a\x00.nii",
    "a\n.nii",
    "a\\b.nii",
    "\udcff.nii",
    "way/a.nii",
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize(
    "dialect", ["canonical", "maps", "llava", "llava_paths", "umbrella", "umbrella_list", "hf", "hf_maps"]
)
def test_path_that_leaves_the_root_is_rejected_in_every_dialect(
    dialect, path, tmp_path, tmp_path_factory, write_manifest
):
    root = tmp_path.resolve()
    outside = tmp_path_factory.mktemp("outside")
    (root / "way").symlink_to(outside)
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A brain."}
    answer = {"role": "assistant", "content": "A brain."}
    text = {"role": "user", "content": "<image>What?"}

    def asks(**image):
        return [{"role": "user", "content": [{"type": "image", "modality": "T1", **image}]}, answer]

    place = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    row = {
        "canonical": {"messages": asks(path=path)},
        "maps": {"messages": asks(modality="dMRI", path=["fa.nii", path])},
        "llava": {"conversations": [human, gpt], "image": path, "modality": "T1"},
        "llava_paths": {"conversations": [human, gpt], "modality_paths": {"T1": path}},
        "umbrella": {"conversations": asks(image_path=path)},
        "umbrella_list": {"conversations": [text, answer], "images": [path], "modality": "T1"},
        "hf": {"messages": [place, answer], "images": [path], "modalities": ["T1"]},
        "hf_maps": {"messages": [place, answer], "images": [["fa.nii", path]], "modalities": ["dMRI"]},
    }[dialect]
    manifest = read_manifest(write_manifest([{"id": "a", "subject": "s", **row}]), data_root=root)
    words = "absolute|'..'|leads out|control characters|dialect"
    with pytest.raises(ManifestError, match=words):
        manifest[0]
    good = json.loads(json.dumps({"id": "a", "subject": "s", **row}).replace(json.dumps(path), '"good.nii"'))
    assert read_manifest(write_manifest([good]), data_root=root)[0].scans


@pytest.mark.parametrize(
    ("modality", "ending"),
    [("dMRI", "bval"), ("dMRI", "bvec"), ("rsfMRI", "json"), ("dMRI", "BVAL"), ("dMRI", "BVEC"), ("rsfMRI", "JSON")],
)
@pytest.mark.parametrize("name", ["sub/a.nii.gz", "a.nii", "a.hdr"])
def test_sibling_file_a_scan_may_not_lead_out_of_the_root(
    modality, ending, name, tmp_path, tmp_path_factory, make_row, write_manifest
):
    row = make_row("a", modality)
    row["messages"][0]["content"][0]["path"] = name
    manifest = read_manifest(write_manifest([row]), data_root=tmp_path)
    beside = (tmp_path / name.replace(".nii.gz", ".nii")).with_suffix(f".{ending}")
    beside.parent.mkdir(exist_ok=True)
    inside = tmp_path / "inside.txt"
    inside.write_text("0")
    beside.symlink_to(inside)
    assert manifest[0].scans
    outside = tmp_path_factory.mktemp("outside") / f"a.{ending}"
    outside.write_text("0")
    beside.unlink()
    beside.symlink_to(outside)
    with pytest.raises(ManifestError, match=rf"a\.{ending}' is a link that leads out"):
        manifest[0]


def test_files_next_to_a_scan_are_looked_at_where_they_are_read_only(tmp_path, make_row, write_manifest):
    for ending in ("bval", "bvec", "json"):
        (tmp_path / f"a_0.{ending}").symlink_to("/etc/hostname")
    assert read_manifest(write_manifest([make_row("a", "T1")]))[0].scans
