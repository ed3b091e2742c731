"""A hash leads back to its name with the salt and the manifests, and to nothing without."""

from __future__ import annotations

import os

import pytest

from umbrella_data.cli import main
from umbrella_data.errors import ManifestError
from umbrella_data.jobs.pseudonym_lookup import UnknownHashError, who_is
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.privacy import name_hasher, read_or_create_salt

SIZES = "model: {modalities: {T1: {image_size: [8, 8, 8], patch_size: [4, 4, 4]}}}\n"


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
    (folder / "config.yaml").write_text(f"{SIZES}data: {{train: [{{manifest: {manifest.path}}}]}}\n")
    assert main(["whois", name_hash("sub-c"), "--in", str(folder)]) == 0
    assert capsys.readouterr().out == "sub-c\n"
    (folder / "config.yaml").unlink()
    assert main(["whois", name_hash("sub-c"), "--in", str(folder)]) == 1
    assert "give --manifest" in capsys.readouterr().err
    (folder / "config.yaml").write_text("model: [")
    assert main(["whois", name_hash("sub-c"), "--in", str(folder)]) == 1
    assert "config.yaml: cannot be read as YAML" in capsys.readouterr().err


@pytest.mark.parametrize("synthetic", ["{directory: ELSEWHERE}", "{directory: null}", "{}"])
@pytest.mark.parametrize("is_moved", [False, True])
def test_cohort_of_a_demo_run_is_found_where_its_config_says_or_beside_it(
    make_row, write_manifest, tmp_path, capsys, monkeypatch, synthetic, is_moved
):
    pytest.importorskip("yaml", reason="the run's file is YAML")
    monkeypatch.chdir(tmp_path)
    named = "elsewhere" if "ELSEWHERE" in synthetic else "out/synthetic-cohort"
    cohort = "out/synthetic-cohort" if is_moved else named
    for folder in ("out/demo", cohort, "later"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    write_manifest([make_row("a", "T1")], f"{cohort}/train.jsonl")
    write_manifest([make_row("b", "T1")], f"{cohort}/test.jsonl")
    config = f"{SIZES}output_dir: out\ndata: {{synthetic: {synthetic}}}\n".replace("ELSEWHERE", f"{tmp_path}/elsewhere")
    (tmp_path / "out/demo/config.yaml").write_text(config)
    if is_moved:
        monkeypatch.chdir("later")
    name_hash = name_hasher(read_or_create_salt(tmp_path / "out/demo/salt"))
    for name in ("sub-a", "sub-b"):
        assert main(["whois", name_hash(name), "--in", str(tmp_path / "out/demo")]) == 0
        assert capsys.readouterr().out == f"{name}\n"


def test_folders_here_and_in_runs_are_searched_the_newest_first(manifest, tmp_path, capsys, monkeypatch):
    pytest.importorskip("yaml", reason="the run's file is YAML")
    monkeypatch.chdir(tmp_path)
    name_hash = {}
    for age, folder in enumerate(["page", "runs/new", "runs/old", "runs/gone", "."]):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        salt = tmp_path / folder / "salt"
        name_hash[folder] = name_hasher(read_or_create_salt(salt))
        if folder != "page":
            path = "nowhere.jsonl" if folder == "runs/gone" else manifest.path
            (tmp_path / folder / "config.yaml").write_text(f"{SIZES}data: {{train: [{{manifest: {path}}}]}}\n")
        os.utime(salt, (10_000 - age, 10_000 - age))
    for folder in ("runs/old", "runs/new", "."):
        assert main(["whois", name_hash[folder]("sub-c")]) == 0
        assert capsys.readouterr() == ("sub-c\n", f"found with the salt of {folder}\n")
    assert main(["whois", name_hash["page"]("sub-c")]) == 1
    assert capsys.readouterr().err.splitlines()[1:] == [
        "  page holds no config.yaml that names manifests; give --manifest",
        "  runs/new: no subject, scan or manifest has it",
        "  runs/old: no subject, scan or manifest has it",
        "  runs/gone: nowhere.jsonl: no such file",
        "  .: no subject, scan or manifest has it",
    ]
    assert main(["whois", name_hash["page"]("sub-c"), "--manifest", str(manifest.path)]) == 0
    (tmp_path / "runs/old/salt").write_bytes((tmp_path / "runs/new/salt").read_bytes())
    os.utime(tmp_path / "runs/old/salt", (20_000, 20_000))
    capsys.readouterr()
    assert main(["whois", name_hash["runs/new"]("sub-c")]) == 0
    assert capsys.readouterr().err == "found with the salt of runs/old\n"


def test_search_ends_in_words_for_what_is_no_hash_and_where_no_salt_is(run_folder, manifest, capsys, monkeypatch):
    folder, _ = run_folder
    monkeypatch.chdir(folder)
    assert main(["whois", "xyzxyz", "--manifest", str(manifest.path)]) == 1
    assert "is no hash" in capsys.readouterr().err
    (folder / "salt").unlink()
    assert main(["whois", "abcdef"]) == 1
    assert f"no folder with a salt in {folder} or its runs; give" in capsys.readouterr().err
