"""Ready FA and MD maps of a BIDS tree are one scan with two files."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from umbrella_data.bids.derivatives import choose_versions, join_maps, prefer_maps
from umbrella_data.bids.layout import find_scans
from umbrella_data.bids.manifests import write_manifests
from umbrella_data.manifest.manifest import read_manifest

ACPC = "space-ACPC_model-tensor"
MNI = "space-MNI152NLin2009cAsym_model-tensor"


@pytest.fixture
def listing(tmp_path):
    def make(*names, **filters):
        folder = tmp_path / "sub-01/dwi"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / f"sub-01_{name}.nii.gz").touch()
        return prefer_maps(choose_versions(join_maps(find_scans(tmp_path)), **filters))

    return make


def names_of(listing):
    return [
        tuple(path.removeprefix("sub-01/dwi/sub-01_").removesuffix(".nii.gz") for path in scan.paths)
        for scan in listing.scans
    ]


@pytest.mark.parametrize(
    "maps",
    [
        ("FA", "MD"),
        ("run-1_space-T1w_FA", "run-1_space-T1w_MD"),
        (f"{ACPC}_param-fa_dwimap", f"{ACPC}_param-md_dwimap"),
        ("model-DTI_param-FA_desc-x_dwimap", "model-DTI_param-MD_desc-x_dwimap"),
    ],
)
def test_maps_with_the_same_entities_are_one_scan(listing, maps):
    found = listing(*maps)
    assert names_of(found) == [maps]
    assert (found.scans[0].modality, found.messages) == ("dMRI", ())


@pytest.mark.parametrize(
    "names",
    [
        ("FA",),
        ("run-1_FA", "run-2_MD"),
        ("space-T1w_FA", "MD"),
        ("FA", "param-md_dwimap"),
        ("model-a_param-fa_dwimap", "model-b_param-md_dwimap"),
    ],
)
def test_map_without_the_other_is_left_out(listing, names):
    found = listing(*names)
    assert found.scans == ()
    (message,) = found.messages
    assert f": {len(names)} (" in message
    assert all(name in message for name in names)


def test_one_version_of_maps_is_used(listing):
    dki = "space-ACPC_model-dki"
    maps = [f"{each}_param-{param}_dwimap" for each in (ACPC, MNI, dki) for param in ("fa", "md")]
    found = listing(*maps)
    assert names_of(found) == [tuple(maps[:2])]
    assert found.messages[0].endswith(f": 1 {dki}, 1 {MNI}")
    assert names_of(listing(space="MNI152NLin2009cAsym")) == [tuple(maps[2:4])]


@pytest.mark.parametrize(
    ("names", "kept", "num_left_out"),
    [
        (("FA", "MD", "dwi"), [("FA", "MD")], 1),
        (("FA", "MD", "dir-AP_dwi", "dir-PA_dwi"), [("FA", "MD")], 2),
        (("acq-a_space-T1w_FA", "acq-a_space-T1w_MD", "acq-a_dwi", "acq-b_dwi"),
         [("acq-a_space-T1w_FA", "acq-a_space-T1w_MD"), ("acq-b_dwi",)], 1),
        (("run-1_FA", "run-1_MD", "run-2_dwi"), [("run-1_FA", "run-1_MD"), ("run-2_dwi",)], 0),
        (("FA", "dwi"), [("dwi",)], 0),
        ((f"{ACPC}_param-fa_dwimap", f"{ACPC}_param-md_dwimap", "dir-AP_space-ACPC_desc-preproc_dwi"),
         [(f"{ACPC}_param-fa_dwimap", f"{ACPC}_param-md_dwimap")], 1),
    ],
)  # fmt: skip
def test_series_with_ready_maps_is_left_out(listing, names, kept, num_left_out):
    found = listing(*names)
    assert names_of(found) == kept
    assert [message for message in found.messages if message.endswith(f": {num_left_out} dwi")] == (
        [found.messages[-1]] if num_left_out else []
    )


def test_rows_name_both_maps_and_need_no_dipy(nifti, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dipy", None)
    rng = np.random.default_rng(0)
    for name in ("FA", "MD"):
        nifti.write(rng.random((4, 5, 6), dtype=np.float32), f"bids/sub-01/dwi/sub-01_{name}.nii.gz")
    root = tmp_path / "bids"
    report = write_manifests(root, out=tmp_path, data_root=tmp_path, test_fraction=0.0)
    assert not report.unreadable
    samples = list(read_manifest(tmp_path / "train.jsonl", data_root=tmp_path))
    assert {sample.task for sample in samples} == {"modality"}
    folder = root / "sub-01/dwi"
    assert samples[0].scans[0].paths == (folder / "sub-01_FA.nii.gz", folder / "sub-01_MD.nii.gz")
    assert samples[0].scans[0].modality == "dMRI"
