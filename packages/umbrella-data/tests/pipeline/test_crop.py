"""The model's box is centred on the field of view, the mask or the foreground, and what it removes is measured."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import ScanError
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.pipeline.crop import centre_of, removed_by_crop, removed_fraction
from umbrella_data.pipeline.pipeline import Pipeline

SHAPE = (40, 24, 20)


@pytest.fixture
def head(random_voxels):
    """A bright box of 12 voxels, from (24, 4, 4), in a dark field of view."""
    voxels = random_voxels(*SHAPE) % 10 + 1
    voxels[24:36, 4:16, 4:16] += 500 + random_voxels(12, 12, 12) % 100
    return voxels.astype(np.int16)


@pytest.fixture
def brain():
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[26:34, 6:14, 6:14] = 1
    return mask


def pipeline_for(crop, *, modality="T1", size=(12, 12, 12), **options):
    config = PipelineConfig(image_size=size, spacing=(2.0, 2.0, 2.0), crop=crop, normalise="zscore")
    return Pipeline(config, modality=modality, **options)


def removed(pipeline, path, mask=None):
    return removed_by_crop([path], mask=mask, spec=pipeline.spec, config=pipeline.config)


def standardised(values):
    return (values - values.mean()) / values.std()


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "PSL"])
@pytest.mark.parametrize("has_cache", [False, True])
def test_crop_of_the_foreground_holds_the_head(nifti, head, tmp_path, orientation, has_cache):
    path = nifti.write(head, orientation=orientation)
    cache = VolumeCache(tmp_path / "cache") if has_cache else None
    found = pipeline_for("foreground", cache=cache)(path, generator=None)[0].float().numpy()
    expected = standardised(head[24:36, 4:16, 4:16].astype(np.float64))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert removed(pipeline_for("foreground"), path) == 0
    # The box around the middle of the field of view, x from 14 to 25, has two of twelve slices of the head.
    assert removed(pipeline_for("field_of_view"), path) > 0.8


def test_crop_of_the_mask_is_around_it(nifti, head, brain):
    path, mask = nifti.write(head), nifti.write(brain, "mask.nii.gz")
    pipeline = pipeline_for("mask", size=(8, 8, 8))
    found = pipeline(path, generator=None, mask=mask)[0].numpy()
    np.testing.assert_allclose(found, standardised(head[26:34, 6:14, 6:14].astype(np.float64)), atol=1e-4)
    assert removed(pipeline, path, mask=mask) == 0
    assert removed(pipeline_for("mask", size=(4, 8, 8)), path, mask=mask) == pytest.approx(0.5)
    with pytest.raises(ScanError) as caught:
        pipeline(path, generator=None)
    assert (caught.value.reason, caught.value.path) == ("mask", str(path))


def test_crop_of_a_series_and_of_maps(nifti, head, brain):
    series = np.stack([head, head + 3, head + 1], axis=-1)
    path = nifti.write(series, "bold.nii.gz", repetition_time=2.0)
    pipeline = pipeline_for("foreground", modality="rsfMRI", size=(12, 12, 12, 2))
    expected = standardised(series[24:36, 4:16, 4:16, :2].astype(np.float64))
    np.testing.assert_allclose(pipeline(path, generator=None)[0].numpy(), expected, atol=1e-4)

    fa = (brain * (0.2 + 0.5 * np.arange(SHAPE[0])[:, None, None] / SHAPE[0])).astype(np.float32)
    md = (brain * (5e-4 + 2e-4 * np.arange(SHAPE[1])[:, None] / SHAPE[1])).astype(np.float32)
    maps = [nifti.write(fa, "sub_FA.nii.gz"), nifti.write(md, "sub_MD.nii.gz")]
    found = pipeline_for("foreground", modality="dMRI", size=(8, 8, 8))(maps, generator=None).numpy()
    np.testing.assert_allclose(found[0], standardised(fa[26:34, 6:14, 6:14].astype(np.float64)), atol=1e-4)


def test_crop_needs_spacing():
    with pytest.raises(ValidationError, match="spacing"):
        PipelineConfig(image_size=(8, 8, 8), crop="foreground")


def test_crop_belongs_to_the_cached_volume():
    assert pipeline_for("foreground").fingerprint != pipeline_for("field_of_view").fingerprint


def test_centre_is_not_moved_by_a_few_voxels_far_away():
    inside = np.zeros((101, 50, 50), dtype=bool)
    inside[10:30, 10:30, 10:30] = True
    inside[100, 49, 49] = True
    assert centre_of(inside) == (19.5, 19.5, 19.5)
    assert removed_fraction(inside, centre=(19.5, 19.5, 19.5), sizes=(20, 20, 20)) == pytest.approx(1 / 8001)
    assert removed_fraction(inside, centre=None, sizes=(101, 50, 50)) == 0


def test_crop_of_a_series_with_an_empty_first_frame_uses_the_middle_one(nifti, head):
    series = np.stack([0 * head, head, head + 3, head + 1], axis=-1)
    path = nifti.write(series, "bold.nii.gz", repetition_time=2.0)
    pipeline = pipeline_for("foreground", modality="rsfMRI", size=(12, 12, 12, 2))
    expected = standardised(series[24:36, 4:16, 4:16, 1:3].astype(np.float64))
    np.testing.assert_allclose(pipeline(path, generator=None)[0].numpy(), expected, atol=1e-4)
    assert removed(pipeline, path) == 0
