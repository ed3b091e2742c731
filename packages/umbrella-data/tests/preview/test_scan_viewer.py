"""The viewer of a preprocessed scan: its voxel size, and its mask on the same grid."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from umbrella_data.modality import find_modality
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.pipeline.pipeline import Pipeline
from umbrella_data.preview.scan_viewer import grid_spacing, header_warnings, mask_on_grid, scan_viewer
from umbrella_data.scan.header import ScanWarning


@pytest.fixture
def scan(nifti, random_voxels):
    """A scan of 12 × 16 × 20 mm stored in LAS order, with a mask of the left and upper part of the person."""
    inside = np.zeros((6, 8, 10), dtype=np.uint8)
    inside[:2, :, 5:] = 1
    paths = [nifti.write(random_voxels(6, 8, 10), orientation="LAS")]
    return paths, nifti.write(inside, "mask.nii.gz", orientation="LAS")


@pytest.mark.parametrize(
    ("config", "spacing", "expected"),
    [
        ({"image_size": (12, 16, 10)}, (1.0, 1.0, 2.0), np.s_[:4, :, 5:]),
        # The centre of the box is that of the scan.
        ({"image_size": (4, 4, 4), "spacing": (2.0, 2.0, 2.0)}, (2.0, 2.0, 2.0), np.s_[:1, :, 2:]),
        # The centre of the box is that of the mask.
        ({"image_size": (4, 8, 9), "spacing": (2.0, 2.0, 2.0), "crop": "mask"}, (2.0, 2.0, 2.0), None),
    ],
)
def test_mask_is_on_the_grid_of_the_preprocessed_scan(scan, config, spacing, expected):
    paths, mask = scan
    pipeline = Pipeline(PipelineConfig(**config), modality="T1")
    assert grid_spacing(pipeline, paths) == spacing
    inside = mask_on_grid(mask, pipeline=pipeline, paths=paths)
    assert inside.shape == config["image_size"]
    if expected is None:
        # What the pipeline itself keeps inside of the mask.
        volume = pipeline(paths, generator=None, mask=mask)[0].numpy()
        background = volume[0, 0, 0]
        np.testing.assert_array_equal(inside, volume != background)
        assert inside.sum() == 2 * 8 * 5
        return
    wanted = np.zeros(inside.shape, dtype=bool)
    wanted[expected] = True
    np.testing.assert_array_equal(inside, wanted)


def test_viewer_has_the_mask_as_an_overlay_and_the_names_of_channels(scan):
    paths, mask = scan
    pipeline = Pipeline(PipelineConfig(image_size=(6, 8, 10)), modality="T1")
    for each, names in ((None, []), (mask, ["Brain mask"])):
        volume = pipeline(paths, generator=None, mask=each)
        page = scan_viewer(volume, pipeline=pipeline, paths=paths, mask=each)
        data = json.loads(re.findall(r'json">(.*?)</script>', page)[0])
        assert [item["name"] for item in data["overlays"]] == names
        assert [item["name"] for item in data["channels"]] == ["T1"]


def test_suspicious_headers_are_named_with_their_codes(nifti, random_voxels):
    plain, guess = (nifti.write(random_voxels(6, 7, 8), f"{name}.nii") for name in ("plain", "guess"))
    nifti.patch(guess, 252, bytes(4))  # qform_code and sform_code
    t1, rsfmri, dmri = (find_modality(name) for name in ("T1", "rsfMRI", "dMRI"))
    assert header_warnings([plain], spec=t1) == []
    assert header_warnings([plain, guess, guess], spec=t1) == [f"no_form: {ScanWarning.NO_FORM.meaning}"]
    series = nifti.write(random_voxels(6, 7, 8, 4), "series.nii.gz")
    series.with_name("series.json").write_text("no JSON")
    # A DWI needs no repetition time.
    assert [len(header_warnings([series], spec=spec)) for spec in (rsfmri, dmri)] == [1, 0]
