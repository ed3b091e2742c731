"""Paths out of the data root are rejected in every dialect: `..`, absolute paths, links, unprintable characters."""

from __future__ import annotations

import json

import pytest

from umbrella_data.errors import ManifestError
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.manifest.path_safety import resolve_inside

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
def test_path_out_of_the_root_is_rejected_in_every_dialect(dialect, path, tmp_path, tmp_path_factory, write_manifest):
    root = tmp_path.resolve()
    outside = tmp_path_factory.mktemp("outside")
    (root / "way").symlink_to(outside)
    human, gpt = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A brain."}
    answer = {"role": "assistant", "content": "A brain."}
    text = {"role": "user", "content": "<image>What?"}

    def messages(**image):
        return [{"role": "user", "content": [{"type": "image", "modality": "T1", **image}]}, answer]

    place = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    row = {
        "canonical": {"messages": messages(path=path)},
        "maps": {"messages": messages(modality="dMRI", path=["fa.nii", path])},
        "llava": {"conversations": [human, gpt], "image": path, "modality": "T1"},
        "llava_paths": {"conversations": [human, gpt], "modality_paths": {"T1": path}},
        "umbrella": {"conversations": messages(image_path=path)},
        "umbrella_list": {"conversations": [text, answer], "images": [path], "modality": "T1"},
        "hf": {"messages": [place, answer], "images": [path], "modalities": ["T1"]},
        "hf_maps": {"messages": [place, answer], "images": [["fa.nii", path]], "modalities": ["dMRI"]},
    }[dialect]
    manifest = read_manifest(write_manifest([{"id": "a", "subject": "s", **row}]), data_root=root)
    with pytest.raises(ManifestError, match=r"absolute|'..'|leads out|control characters|surrogate|dialect"):
        manifest[0]
    good = json.loads(json.dumps({"id": "a", "subject": "s", **row}).replace(json.dumps(path), '"good.nii"'))
    assert read_manifest(write_manifest([good]), data_root=root)[0].scans


@pytest.mark.parametrize(
    ("modality", "ending"),
    [("dMRI", "bval"), ("dMRI", "bvec"), ("rsfMRI", "json"), ("dMRI", "BVAL"), ("dMRI", "BVEC"), ("rsfMRI", "JSON")],
)
@pytest.mark.parametrize("name", ["sub/a.nii.gz", "a.nii", "a.hdr"])
def test_sidecar_or_gradients_out_of_the_root_are_rejected(
    modality, ending, name, tmp_path, tmp_path_factory, make_row, write_manifest
):
    row = make_row("a", modality)
    row["messages"][0]["content"][0]["path"] = name
    manifest = read_manifest(write_manifest([row]), data_root=tmp_path)
    sibling = (tmp_path / name.replace(".nii.gz", ".nii")).with_suffix(f".{ending}")
    sibling.parent.mkdir(exist_ok=True)
    inside = tmp_path / "inside.txt"
    inside.write_text("0")
    sibling.symlink_to(inside)
    assert manifest[0].scans
    outside = tmp_path_factory.mktemp("outside") / f"a.{ending}"
    outside.write_text("0")
    sibling.unlink()
    sibling.symlink_to(outside)
    with pytest.raises(ManifestError, match=rf"a\.{ending}'.* leads out"):
        manifest[0]


def test_sibling_files_of_a_t1_are_not_checked(tmp_path, make_row, write_manifest):
    for ending in ("bval", "bvec", "json"):
        (tmp_path / f"a_0.{ending}").symlink_to("/etc/hostname")
    assert read_manifest(write_manifest([make_row("a", "T1")]))[0].scans


@pytest.mark.parametrize(
    "text",
    ["../a", "a/../../b", "a/../b", "/etc/passwd", "~/a", "C:/a", "a\\..\\b", "", " a", "a\x00b", "a\nb", "\udcff"],
)
def test_unsafe_path_is_rejected(tmp_path, text):
    with pytest.raises(ValueError, match="path"):
        resolve_inside(text, root=tmp_path.resolve())


def test_link_out_of_the_root_is_rejected(tmp_path, tmp_path_factory):
    root = tmp_path.resolve()
    outside = tmp_path_factory.mktemp("outside")
    (outside / "scan.nii").touch()
    (root / "folder").symlink_to(outside)
    (root / "inner").mkdir()
    (root / "link.nii").symlink_to(root / "inner")
    with pytest.raises(ValueError, match="leads out"):
        resolve_inside("folder/scan.nii", root=root)
    assert resolve_inside("link.nii", root=root) == root / "link.nii"


def test_dots_within_names_are_allowed(tmp_path):
    root = tmp_path.resolve()
    assert resolve_inside("a..b/c.nii.gz", root=root) == root / "a..b/c.nii.gz"
