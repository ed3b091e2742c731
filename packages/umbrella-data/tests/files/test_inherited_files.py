"""bval and bvec files are found next to a DWI, inherited, or as `bvals.txt` where only one DWI can be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from umbrella_data.errors import ManifestError, ScanError, ScanReason
from umbrella_data.files.paths import gradient_file
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.scan.gradient_table import gradient_files, read_gradients, read_shells

NAME = "sub-01/ses-a/dwi/sub-01_ses-a_dir-AP_run-1_dwi"
BVEC = "0 1 0\n0 0 1\n0 0 0\n"


@pytest.fixture
def dwi(tmp_path: Path) -> Path:
    """A DWI without gradients in a BIDS tree."""
    path = tmp_path / f"{NAME}.nii.gz"
    path.parent.mkdir(parents=True)
    path.touch()
    (tmp_path / "dataset_description.json").write_text("{}")
    return path


def test_gradients_are_inherited_by_decreasing_precedence(dwi: Path, tmp_path: Path) -> None:
    assert gradient_file(dwi, ".bval") == dwi.with_name("sub-01_ses-a_dir-AP_run-1_dwi.bval")
    below = [
        "bvals",
        "bvals.txt",
        "../../../dwi.BVAL",
        "../../../dwi.bval",
        "../../../dir-AP_dwi.bval",
        "../../sub-01_dwi.bval",
        "../sub-01_ses-a_dwi.bval",
        "sub-01_ses-a_dir-AP_dwi.bval",
        "sub-01_ses-a_dir-AP_run-1_dwi.BVAL",
        "sub-01_ses-a_dir-AP_run-1_dwi.bval",
    ]
    for name in below:
        file = (dwi.parent / name).resolve()
        file.write_text("0 1000 1000\n")
        assert gradient_file(dwi, ".bval") == file
        assert gradient_file(dwi, ".bvec") == dwi.with_name("sub-01_ses-a_dir-AP_run-1_dwi.bvec")
    (tmp_path / "dwi.bvec").write_text(BVEC)
    assert read_gradients(dwi, num_volumes=3).b_values.tolist() == [0, 1000, 1000]
    assert read_shells(dwi)[0].num_volumes == 1


@pytest.mark.parametrize(
    "name", ["dir-PA_dwi.bval", "sub-02_dwi.bval", "bold.bval", "dir-AP_run-1_sbref.bval", "derivatives/dwi.bval"]
)
def test_file_with_another_entity_or_suffix_is_not_inherited(dwi: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("0 1000\n")
    assert gradient_file(dwi, ".bval") == dwi.with_name("sub-01_ses-a_dir-AP_run-1_dwi.bval")


def test_nothing_is_inherited_outside_of_a_bids_tree(dwi: Path, tmp_path: Path) -> None:
    (tmp_path / "dwi.bval").write_text("0 1000\n")
    assert gradient_file(dwi, ".bval") == tmp_path / "dwi.bval"
    (tmp_path / "dataset_description.json").unlink()
    assert gradient_file(dwi, ".bval") == dwi.with_name("sub-01_ses-a_dir-AP_run-1_dwi.bval")


@pytest.mark.parametrize("names", [("bvals.txt", "bvecs.txt"), ("bvals", "bvecs")])
@pytest.mark.parametrize("scan", ["sub-01_dwi.nii.gz", "data.nii.gz", "sub-01_dwi.NII"])
def test_plain_names_are_read_when_the_folder_has_one_dwi(tmp_path: Path, scan: str, names: tuple[str, str]) -> None:
    for name in ("sub-01_sbref.nii.gz", "sub-01_T1w.nii", "nodif_brain_mask.nii.gz", scan):
        (tmp_path / name).touch()
    (tmp_path / names[0]).write_text("0 1000 1000\n")
    (tmp_path / names[1]).write_text(BVEC)
    assert gradient_files(tmp_path / scan) == (tmp_path / names[0], tmp_path / names[1])
    assert read_gradients(tmp_path / scan, num_volumes=3).b_vectors.shape == (3, 3)
    (tmp_path / "sub-01_run-2_dwi.nii").touch()
    with pytest.raises(ScanError) as caught:
        read_gradients(tmp_path / scan, num_volumes=3)
    assert caught.value.reason == ScanReason.BVAL
    (tmp_path / "sub-01_run-2_dwi.nii").rename(tmp_path / "other.nii.gz")
    assert gradient_files(tmp_path / scan)[0].suffix == ".bval"


@pytest.mark.parametrize(("name", "reason"), [("dwi.bval", "bval"), ("dir-AP_dwi.bvec", "bvec")])
def test_inherited_link_out_of_the_tree_is_rejected(
    dwi: Path, tmp_path: Path, tmp_path_factory: Any, name: str, reason: str
) -> None:
    (tmp_path / "dwi.bval").write_text("0 1000 1000\n")
    (tmp_path / "dwi.bvec").write_text(BVEC)
    assert read_shells(dwi)[0].num_volumes == 1
    outside = tmp_path_factory.mktemp("outside") / "x"
    outside.write_text("0 1000 1000\n")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to(outside)
    with pytest.raises(ScanError) as caught:
        read_gradients(dwi, num_volumes=3)
    assert (caught.value.path, caught.value.reason) == (str(tmp_path / name), reason)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ScanError) as caught:
        read_gradients(dwi, num_volumes=3)
    assert (caught.value.path, caught.value.reason) == (str(tmp_path / name), reason)


@pytest.mark.parametrize("name", ["bvals.txt", "../../../dwi.bval"])
def test_manifest_rejects_gradients_out_of_its_root(
    dwi: Path, tmp_path: Path, tmp_path_factory: Any, make_row: Any, write_manifest: Any, name: str
) -> None:
    row = make_row("a", "dMRI")
    image = row["messages"][0]["content"][0]
    image["path"] = f"{NAME}.nii.gz"
    manifest = read_manifest(write_manifest([row]), data_root=tmp_path)
    file = (dwi.parent / name).resolve()
    file.write_text("0 1000\n")
    assert manifest[0].scans
    # Within the tree, though above the root: inherited as for JSON sidecars.
    image["path"] = f"{NAME}.nii.gz".removeprefix("sub-01/")
    assert read_manifest(write_manifest([row], "inner.jsonl"), data_root=tmp_path / "sub-01")[0].scans
    file.unlink()
    file.symlink_to(tmp_path_factory.mktemp("outside") / "x")
    with pytest.raises(ManifestError, match="leads out"):
        manifest[0]
