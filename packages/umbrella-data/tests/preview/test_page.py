"""The preview page has figures of each modality, and hashes instead of names unless `--names` is given."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="figures need the extra [preview]")

from umbrella_data.cli import main
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.privacy import name_hasher, read_or_create_salt
from umbrella_data.viewer import viewer_script

SIZES = ["--size", "T1=16,16,16", "--size", "rsfMRI=8,8,8,4", "--size", "dMRI=8,8,8"]
PATCHES = ["--patch", "T1=8,8,8", "--patch", "rsfMRI=8,8,4,2"]


@pytest.fixture
def manifest(nifti, random_voxels, make_row, write_manifest):
    rows = []
    for name in "abc":
        nifti.write(random_voxels(6, 7, 8), f"{name}_0.nii.gz")
        nifti.write(random_voxels(6, 7, 8, 6), f"{name}_1.nii.gz")
        rows += [make_row(name, "T1", "bold"), {**make_row(name, "T1", "bold"), "id": f"{name}-again"}]
    maps = make_row("m", "dMRI")
    maps["messages"][0]["content"][0]["path"] = ["fa.nii.gz", "md.nii.gz"]
    for name, scale in (("fa", 1.0), ("md", 2e-3)):
        nifti.write(scale * np.random.default_rng(0).random((6, 6, 6)).astype(np.float32), f"{name}.nii.gz")
    return write_manifest([*rows, maps])


def test_page_has_each_modality_of_several_subjects(manifest, tmp_path, capsys):
    out = tmp_path / "page"
    assert main(["preview", str(manifest), *SIZES, *PATCHES, "--out", str(out), "--num", "2"]) == 0
    assert "5 pictures" in capsys.readouterr().out
    names = sorted(path.name for path in out.iterdir())
    pictures = ["T1-1.png", "T1-2.png", "dMRI-1.png", "rsfMRI-1.png", "rsfMRI-2.png"]
    assert names == sorted([*pictures, "index.html", "names.jsonl", "salt", "viewer.js"])
    page = (out / "index.html").read_text()
    assert page.index("T1-1.png") < page.index("rsfMRI-1.png") < page.index("dMRI-1.png")  # the order of the options
    for name in names:
        if name.endswith(".png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")
            assert f'src="{name}"' in page
    for text in ("16 × 16 × 16", "<td>8</td>", "<td>4</td>", "whole field of view", "foreground_zscore"):
        assert text in page
    name_hash = name_hasher(read_or_create_salt(out / "salt"))
    assert name_hash("sub-a") in page
    assert name_hash("sub-b") in page
    assert name_hash("sub-c") not in page
    for pseudonym in re.findall(r"subject ([0-9a-f]{16}), scan ([0-9a-f]{16})", page)[0]:
        assert main(["whois", pseudonym, "--in", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == ["sub-a", str(tmp_path / "a_0.nii.gz")]
    for path in out.iterdir():
        if path.name in {"names.jsonl", "viewer.js"}:  # the table for umbrella-data whois; the same for every page
            continue
        content = path.read_bytes()
        assert not any(name in content for name in (b"sub-a", b"a_0", b"nii.gz", str(tmp_path).encode()))


def test_size_of_a_large_page_is_printed_with_advice(manifest, tmp_path, capsys, monkeypatch):
    args = ["preview", str(manifest), *SIZES[:2], "--num", "1", "--out", str(tmp_path / "page")]
    assert main(args) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'page' / 'index.html'}, 1 pictures\n"
    monkeypatch.setattr("umbrella_data.cli.preview._LARGE_MB", 0.001)
    assert main(args) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"1 pictures; 0 MB .*--num", last)


def test_page_has_more_scans_of_a_subject_if_there_are_no_other_subjects(
    nifti, random_voxels, make_row, write_manifest, tmp_path
):
    for name in ("a_0", "a_1", "a_2", "b_0"):
        nifti.write(random_voxels(6, 7, 8), f"{name}.nii.gz")
    path, out = write_manifest([make_row("a", "T1", "T1", "T1"), make_row("b", "T1")], "few.jsonl"), tmp_path / "page"
    assert main(["preview", str(path), *SIZES[:2], "--out", str(out), "--num", "3", "--names"]) == 0
    page = (out / "index.html").read_text()
    places = [page.find(f"{name}.nii.gz") for name in ("a_0", "b_0", "a_1", "a_2")]
    assert places[-1] == -1
    assert -1 < places[0] < places[1] < places[2]


def test_names_option_writes_names_of_subjects_and_files(manifest, tmp_path):
    out = tmp_path / "page"
    assert main(["preview", str(manifest), *SIZES[:2], "--out", str(out), "--num", "1", "--names"]) == 0
    page = (out / "index.html").read_text()
    assert "sub-a" in page
    assert "a_0.nii.gz" in page
    assert not (out / "salt").exists()


def test_page_has_the_questions_the_answers_and_a_viewer_of_each_scan(
    nifti, random_voxels, make_row, write_manifest, tmp_path
):
    rows = []
    for name, text in (("a", "Is a_0.nii.gz of sub-a_ses-1 <b>old</b>?"), ("b", "sub-bb?")):
        nifti.write(random_voxels(6, 7, 8), f"{name}_0.nii.gz")
        rows.append(make_row(name, "T1", question=text, answer="yes & no"))
    out = tmp_path / "page"
    args = ["preview", str(write_manifest(rows)), *SIZES[:2], "--out", str(out)]
    assert main(args) == 0
    page = (out / "index.html").read_text()
    name_hash = name_hasher(read_or_create_salt(out / "salt"))
    question = f"Is {name_hash('a_0.nii.gz')} of {name_hash('sub-a')}_ses-1 &lt;b&gt;old&lt;/b&gt;?"
    answer = "<dt>Answer</dt><dd>yes &amp; no</dd>"
    assert f"<dt>Question</dt><dd>{question}</dd>{answer}" in page
    assert f"<dt>Question</dt><dd>sub-bb?</dd>{answer}" in page  # not the name of a subject
    assert page.count('<details class="scan-viewer">') == 2
    assert page.count('<script src="viewer.js"></script>') == 1
    assert (out / "viewer.js").read_text() == viewer_script()
    assert main([*args, "--names"]) == 0
    assert "<dd>Is a_0.nii.gz of sub-a_ses-1 &lt;b&gt;old&lt;/b&gt;?</dd>" in (out / "index.html").read_text()


def test_page_lists_scans_that_cannot_be_used(manifest, tmp_path, capsys):
    (tmp_path / "a_0.nii.gz").write_bytes(b"not a scan")
    out = tmp_path / "page"
    assert main(["preview", str(manifest), *SIZES[:2], "--out", str(out), "--num", "2"]) == 1
    assert "a_0.nii.gz" in capsys.readouterr().out
    assert "gzip_header" in (out / "index.html").read_text()


def test_page_without_a_picture_fails_and_prints_the_data_root(manifest, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    args = [*SIZES[:2], "--out", str(tmp_path / "page"), "--data-root", str(tmp_path / "elsewhere")]
    assert main(["preview", str(manifest), *args]) == 1
    printed = capsys.readouterr().out
    assert "no picture: none of the 3 scans can be shown" in printed
    assert "wrote" not in printed
    assert printed.endswith(f"under {tmp_path / 'elsewhere'}: check --data-root\n")


@pytest.mark.isolated
def test_dwi_without_dipy_fails_before_a_scan_is_drawn(
    manifest, make_row, write_manifest, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "dipy", None)
    path = write_manifest([make_row("a", "T1"), make_row("d", "dMRI")], "dwi.jsonl")
    out = tmp_path / "page"
    args = ["preview", str(path), *SIZES, "--out", str(out), "--num", "1"]
    assert main(args) == 1
    error = capsys.readouterr().err
    for part in (f"{tmp_path / 'd_0.nii.gz'}: ", "pip install dipy", "--modality T1"):
        assert part in error
    assert not list(out.glob("*.png"))
    assert main([*args, "--modality", "T1", "--modality", "rsfMRI"]) == 0
    assert [path.name for path in out.glob("*.png")] == ["T1-1.png"]


def test_patch_option_is_checked_against_the_size_of_a_runs_configuration(manifest, tmp_path, capsys, run_config):
    path = run_config(
        configs={"T1": PipelineConfig(image_size=(16, 16, 8))},
        patch_sizes={"T1": (8, 8, 4)},
        sources=[(manifest, None)],
    )
    args = ["preview", "--config", path, "--out", str(tmp_path / "page"), "--patch", "T1=8,8,3"]
    assert main(args) == 1
    assert capsys.readouterr().err.endswith("16,16,8; did you mean 8,8,2?\n")
    assert not (tmp_path / "page").exists()
    assert main([*args[:-1], "T1=8,8,2", "--num", "1"]) == 0


def test_preview_uses_the_sizes_and_manifests_of_a_runs_configuration(manifest, tmp_path, run_config):
    config = PipelineConfig(image_size=(16, 16, 8), normalise="zscore")
    path = run_config(configs={"T1": config}, patch_sizes={"T1": (8, 8, 4)}, sources=[(manifest, None)])
    out = tmp_path / "page"
    assert main(["preview", "--config", path, "--out", str(out)]) == 0
    page = (out / "index.html").read_text()
    assert "16 × 16 × 8" in page
    assert "<td>zscore</td>" in page


def test_config_option_requires_umbrella_train(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("umbrella_data.cli.pipeline_options.entry_points", lambda group: [])
    path = tmp_path / "run.yaml"
    path.touch()
    assert main(["preview", "--config", str(path), "--out", str(tmp_path / "page")]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {path}: ")
    assert "umbrella-train" in error


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--size", "T1=16,16"], "T1 needs an image size X,Y,Z, 3 whole numbers of at least 1, not 16,16"),
        (["--size", "T1=16,0,16"], "T1 needs an image size"),
        (["--size", "T9=16,16,16"], "unknown modality"),
        (["--size", "T1=a,b,c"], "write MODALITY=NUMBER"),
        (["--spacing", "T1=2,2,2"], "T1 has no size"),
        (["--size", "T1=8,8,8", "--set", "T1=pad"], "MODALITY.KEY=VALUE"),
        (["--size", "T1=8,8,8", "--set", "T1.colour=pad"], "T1.colour: no such key; known are spacing, interpolation"),
        (
            ["--size", "T1=8,8,8", "--set", "T1.normalize=zscore"],
            "T1.normalize: no such key; did you mean 'normalise'?",
        ),
        (
            ["--size", "T1=8,8,8", "--set", "T1.normalise=zscor"],
            "or 'nonzero_zscore'; did you mean 'zscore'?",
        ),
        (["--size", "rsfMRI=8,8,8,4", "--patch", "rsfMRI=4,4,4"], "rsfMRI needs a patch size X,Y,Z,T"),
        (
            ["--size", "T1=96,96,96", "--patch", "T1=17,16,16"],
            "did you mean 16,16,16?",
        ),
        (["--size", "T1=8,8,8", "--patch", "rsfMRI=4,4,4,4"], "give --size rsfMRI=X,Y,Z,T"),
        ([], "--size"),
        (["--size", "dMRI=8,8,8"], "no scan of dMRI"),
    ],
)
def test_invalid_options_are_rejected(make_row, write_manifest, tmp_path, capsys, args, problem):
    path = write_manifest([make_row("a", "T1")])
    assert main(["preview", str(path), *args, "--out", str(tmp_path / "page")]) == 1
    error = capsys.readouterr().err
    assert problem in error
    assert "pydantic" not in error


def test_scan_whose_sides_are_a_guess_has_a_warning_below_its_picture(
    nifti, random_voxels, make_row, write_manifest, tmp_path
):
    nifti.patch(nifti.write(random_voxels(6, 7, 8), "a_0.nii"), 252, bytes(4))  # qform_code and sform_code
    row = make_row("a", "T1")
    row["messages"][0]["content"][0]["path"] = "a_0.nii"
    args = ["preview", str(write_manifest([row], "few.jsonl")), *SIZES[:2], "--out", str(tmp_path / "page")]
    assert main(args) == 0
    assert "Warning: no_form: " in (tmp_path / "page" / "index.html").read_text()
