"""A hash leads back to its name with the salt and the manifests, and to nothing without."""

from __future__ import annotations

import pytest

from umbrella_data.cli import main
from umbrella_data.errors import ManifestError
from umbrella_data.manifest import read_manifest
from umbrella_data.privacy import name_hasher, read_or_create_salt
from umbrella_data.whois import UnknownHashError, who_is


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder, name_hasher(read_or_create_salt(folder / "salt"))


@pytest.fixture
def manifest(make_row, write_manifest):
    rows = [make_row(name, "T1") for name in "abc"]
    rows[1]["messages"][0]["content"][0]["mask"] = "b_mask.nii.gz"
    return read_manifest(write_manifest(rows))


def test_subjects_scans_samples_and_manifests_are_found(run_folder, manifest):
    folder, name_hash = run_folder
    for name in ("sub-b", "b", str(manifest.path), *map(str, manifest[1].scans[0].files)):
        assert who_is(name_hash(name), folder=folder, manifests=[manifest]) == name
        assert who_is(name_hash(name)[:10].upper(), folder=folder / "salt", manifests=[manifest]) == name


def test_hash_when_unknown_short_or_shared_is_refused(run_folder, manifest):
    folder, name_hash = run_folder
    for text, words in ((name_hash("sub-z"), "no subject"), ("ab", "is no hash"), ("xyzxyz", "is no hash")):
        with pytest.raises(UnknownHashError, match=words):
            who_is(text, folder=folder, manifests=[manifest])
    with pytest.raises(ManifestError, match="no salt"):
        who_is(name_hash("sub-b"), folder=folder.parent, manifests=[manifest])


def test_manifests_of_a_run_are_found_by_its_config(run_folder, manifest, capsys):
    pytest.importorskip("yaml", reason="the run's file is YAML")
    folder, name_hash = run_folder
    sizes = "{image_size: [8, 8, 8], patch_size: [4, 4, 4]}"
    (folder / "config.yaml").write_text(
        f"model:\n  modalities:\n    T1: {sizes}\ndata:\n  train:\n  - manifest: {manifest.path}\n"
    )
    assert main(["whois", name_hash("sub-c"), "--in", str(folder)]) == 0
    assert capsys.readouterr().out == "sub-c\n"
    (folder / "config.yaml").unlink()
    assert main(["whois", name_hash("sub-c"), "--in", str(folder)]) == 1
    assert "give --manifest" in capsys.readouterr().err
