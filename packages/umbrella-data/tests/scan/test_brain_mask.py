"""Voxels outside of a brain mask are 0; a mask that does not fit its scan is rejected, as are non-finite voxels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from umbrella_data.bids.derivatives import sibling_mask
from umbrella_data.cache.store import VolumeCache
from umbrella_data.dataset.conversation import ConversationDataset
from umbrella_data.errors import ManifestError, ScanError
from umbrella_data.jobs.check import check_manifests
from umbrella_data.jobs.warm_cache import warm_cache
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig
from umbrella_data.preview.page import write_preview
from umbrella_data.scan.verify import verify_scan
from umbrella_data.scan.volume import load_volume

SHAPE = (6, 7, 8)


@pytest.fixture
def brain():
    """An L-shaped brain: all its mirror images differ."""
    brain = np.zeros(SHAPE, dtype=np.uint8)
    brain[1:4, 1:6, 1:7] = 1
    brain[4, 1:3, 1:3] = 1
    return brain


@pytest.fixture
def write(nifti, random_voxels, brain):
    """Writes a scan, and its mask in the same orientation."""

    def make(*frames, orientation="RAS", name="scan", mask=brain):
        voxels = random_voxels(*SHAPE, *frames)  # some of the brain is darker than the mean of all
        options = {"repetition_time": 2.0} if frames else {}
        scan = nifti.write(voxels, f"{name}.nii.gz", orientation=orientation, **options)
        return voxels, scan, nifti.write(mask, f"{name}_mask.nii.gz", orientation=orientation)

    return make


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SAR"])
@pytest.mark.parametrize("frames", [(), (5,)])
def test_voxels_outside_of_the_mask_are_0_and_those_inside_are_unchanged(write, brain, orientation, frames):
    voxels, scan, mask = write(*frames, orientation=orientation)
    volume = load_volume(scan, modality="rsfMRI" if frames else "T1", mask=mask)
    expected = voxels * (brain[..., None] if frames else brain)
    np.testing.assert_array_equal(volume.data[0].numpy(), expected)


@pytest.mark.parametrize(
    ("scaling", "inside", "outside"),
    [((-1.0, 1.0), 0, 1), ((0.5, 0.0), 2, 0), ((2.0, -4.0), 9, 2), ((-3.0, 255.0), 0, 85)],
)
def test_mask_is_read_by_its_scaled_values(write, brain, nifti, scaling, inside, outside):
    voxels, scan, mask = write()
    nifti.write(np.where(brain == 1, inside, outside).astype(np.uint8), mask.name, scaling=scaling)
    np.testing.assert_array_equal(load_volume(scan, modality="T1", mask=mask).data[0].numpy(), voxels * brain)
    pipeline = Pipeline(PipelineConfig(image_size=SHAPE), modality="T1")
    plain = pipeline(scan, generator=None, mask=nifti.write(brain, "plain.nii"))
    assert torch.equal(pipeline(scan, generator=None, mask=mask), plain)


@pytest.mark.parametrize("orientation", ["RAS", "ILP"])
@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("frames", [(), (5,)])
def test_pipeline_normalises_voxels_inside(write, brain, tmp_path, orientation, is_cached, frames):
    voxels, scan, mask = write(*frames, orientation=orientation)
    config = PipelineConfig(image_size=(*SHAPE, *((3,) if frames else ())))
    cache = VolumeCache(tmp_path / "cache") if is_cached else None
    result = Pipeline(config, modality="rsfMRI" if frames else "T1", cache=cache)(scan, generator=None, mask=mask)
    chosen = (voxels[..., 1:4] if frames else voxels).astype(np.float64)
    inside = chosen[brain == 1]
    expected = (chosen * (brain[..., None] if frames else brain) - inside.mean()) / inside.std()
    np.testing.assert_allclose(result[0].float().numpy(), expected, atol=5e-3)
    outside = result[0][torch.from_numpy(brain) == 0]
    assert (outside == outside.flatten()[0]).all()


def test_voxels_beyond_the_field_of_view_equal_those_outside_of_the_mask(write):
    _, scan, mask = write()
    config = PipelineConfig(image_size=(12, 12, 12), spacing=(2.0, 2.0, 2.0))
    result = Pipeline(config, modality="T1")(scan, generator=None, mask=mask)
    assert (result[:, 0] == result[0, 0, 0, 0]).all()
    assert result[0, 0, 0, 0] == result.min()


@pytest.mark.parametrize("has_mask", [False, True])
def test_one_voxel_below_0_leaves_maps_beyond_the_field_of_view_background(nifti, brain, has_mask):
    rng = np.random.default_rng(0)
    inside = brain == 1
    fa = np.where(inside, rng.uniform(0.1, 0.9, SHAPE), 0).astype(np.float32)
    md = np.where(inside, rng.uniform(5e-4, 2e-3, SHAPE), 0).astype(np.float32)
    mask = nifti.write(brain, "mask.nii") if has_mask else None
    pipeline = Pipeline(PipelineConfig(image_size=(14, 14, 14), spacing=(2.0, 2.0, 2.0)), modality="dMRI")
    paths = [nifti.write(fa, "fa.nii"), nifti.write(md, "md.nii")]
    before = pipeline(paths, generator=None, mask=mask)
    md[2, 3, 4] = -1e-7  # as fits on noise give
    nifti.write(md, "md.nii")
    after = pipeline(paths, generator=None, mask=mask)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    for volume in (before, after):
        for channel, values in zip(volume, (fa, md), strict=True):
            assert (channel[:, 0] == channel[0, 0, 0]).all()
            np.testing.assert_allclose(channel[0, 0, 0], -values[inside].mean() / values[inside].std(), rtol=0.2)


def test_cache_distinguishes_masks_by_their_content(write, brain, tmp_path, nifti):
    _, scan, mask = write()
    pipeline = Pipeline(PipelineConfig(image_size=SHAPE), modality="T1", cache=VolumeCache(tmp_path / "cache"))
    whole, masked = pipeline(scan, generator=None), pipeline(scan, generator=None, mask=mask)
    assert not torch.equal(whole, masked)
    nifti.write(1 - brain, mask.name)
    assert not torch.equal(masked, pipeline(scan, generator=None, mask=mask))
    assert torch.equal(whole, pipeline(scan, generator=None))


def shifted(brain):
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 3] = 4.0
    return brain, {"affine": affine}


BAD = {
    "of another shape": lambda brain: (brain[:-1], {}),
    "moved": shifted,
    "turned": lambda brain: (brain, {"orientation": "LAS"}),
    "a map of probabilities": lambda brain: (brain * np.linspace(0.1, 1, 8).astype(np.float32), {}),
    "without an outside": lambda brain: (brain + np.uint8(1), {}),
    "of labels": lambda brain: (brain * np.arange(8, dtype=np.uint8), {}),
    "negative": lambda brain: (-brain.astype(np.int16), {}),
}


@pytest.mark.parametrize("name", BAD)
def test_mask_is_rejected_when_it_belongs_to_another_scan(write, brain, nifti, name):
    _, scan, mask = write()
    voxels, options = BAD[name](brain)
    nifti.write(voxels, mask.name, **options)
    with pytest.raises(ScanError) as caught:
        load_volume(scan, modality="T1", mask=mask)
    assert (caught.value.reason, caught.value.path) == ("mask", str(mask))


def test_mask_is_rejected_when_empty_damaged_or_missing(write, brain, nifti):
    _, scan, mask = write()
    nifti.write(brain * 0, mask.name)
    for reason in ("constant", "gzip_truncated", "missing"):
        with pytest.raises(ScanError) as caught:
            Pipeline(PipelineConfig(image_size=SHAPE), modality="T1")(scan, generator=None, mask=mask)
        assert (caught.value.reason, caught.value.path) == (reason, str(mask))
        if reason == "constant":
            mask.write_bytes(mask.read_bytes()[:-5])
        else:
            mask.unlink(missing_ok=True)


def test_mask_is_rejected_when_its_affine_is_not_finite(write, nifti):
    _, scan, mask = write()
    nifti.patch(mask, 280, np.array([np.nan], "<f4").tobytes())  # the sform's first number
    for read in (
        lambda: load_volume(scan, modality="T1", mask=mask),
        lambda: Pipeline(PipelineConfig(image_size=SHAPE), modality="T1")(scan, generator=None, mask=mask),
    ):
        with pytest.raises(ScanError) as caught:
            read()
        assert (caught.value.reason, caught.value.path) == ("affine", str(mask))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["outside", "inside", "no mask"])
@pytest.mark.parametrize("non_finite", ["reject", "outside_mask", "zero"])
def test_voxels_that_are_not_finite_become_0_or_are_rejected(nifti, random_voxels, brain, value, place, non_finite):
    voxels = random_voxels(*SHAPE).astype(np.float32)
    index = (0, 0, 0) if place == "outside" else tuple(np.argwhere(brain)[0])
    clean = voxels.copy()
    voxels[index], clean[index] = value, 0
    scan, mask = nifti.write(voxels, "scan.nii.gz"), nifti.write(brain, "mask.nii.gz")
    mask = None if place == "no mask" else mask
    config = PipelineConfig(image_size=SHAPE, non_finite=non_finite)
    reads = (
        lambda path: load_volume(path, modality="T1", mask=mask, non_finite=non_finite).data,
        lambda path: Pipeline(config, modality="T1")(path, generator=None, mask=mask),
    )
    is_accepted = non_finite == "zero" or (non_finite == "outside_mask" and place == "outside")
    for read in reads:
        if is_accepted:
            torch.testing.assert_close(read(scan), read(nifti.write(clean, "clean.nii.gz")))
            continue
        with pytest.raises(ScanError) as caught:
            read(scan)
        assert (caught.value.reason, caught.value.path) == ("non_finite", str(scan))
    if is_accepted:
        found = verify_scan([scan], modality="T1", mask=mask, non_finite=non_finite)
        assert found.warnings == {scan: ("non_finite_zeroed",)}


@pytest.mark.parametrize("non_finite", ["outside_mask", "zero"])
def test_series_with_nan_outside_of_its_mask_is_read_frame_by_frame(nifti, random_voxels, brain, non_finite):
    series = random_voxels(*SHAPE, 4).astype(np.float32)
    series[~brain.astype(bool), 2] = np.nan
    scan, mask = nifti.write(series, "bold.nii.gz", repetition_time=2.0), nifti.write(brain, "mask.nii.gz")
    expected = np.where(brain[..., None] > 0, np.nan_to_num(series), 0)
    volume = load_volume(scan, modality="rsfMRI", mask=mask, non_finite=non_finite)
    np.testing.assert_array_equal(volume.data[0].numpy(), expected)
    assert verify_scan([scan], modality="rsfMRI", mask=mask).warnings == {scan: ("non_finite_zeroed",)}


def test_scan_without_any_finite_voxel_is_rejected(nifti):
    scan = nifti.write(np.full(SHAPE, np.nan, dtype=np.float32), "scan.nii.gz")
    for non_finite in ("reject", "outside_mask", "zero"):
        with pytest.raises(ScanError) as caught:
            load_volume(scan, modality="T1", non_finite=non_finite)
        assert caught.value.reason == "non_finite"


def test_scan_is_rejected_when_its_mask_leaves_one_value(nifti, random_voxels, brain):
    scan = nifti.write(random_voxels(*SHAPE) * (1 - brain), "scan.nii.gz")
    mask = nifti.write(brain, "mask.nii.gz")
    for read in (
        lambda: load_volume(scan, modality="T1", mask=mask),
        lambda: Pipeline(PipelineConfig(image_size=SHAPE), modality="T1")(scan, generator=None, mask=mask),
    ):
        with pytest.raises(ScanError) as caught:
            read()
        assert caught.value.reason == "constant"


def test_manifest_names_a_mask_and_check_reads_it(write, make_row, write_manifest, tmp_path, nifti, brain):
    _, scan, mask = write(name="a_0")
    row = make_row("a", "T1")
    row["messages"][0]["content"][0]["mask"] = mask.name
    manifest = read_manifest(write_manifest([row]))
    assert manifest[0].scans[0].mask == mask
    assert manifest[0].scans[0].files == (scan, mask)
    assert check_manifests([manifest], num_workers=1).is_good
    nifti.write(brain[:-1], mask.name)
    (bad,) = check_manifests([manifest], num_workers=1).bad_files
    assert (bad.error.reason, bad.error.path) == ("mask", str(mask))
    mask.unlink()
    with pytest.raises(ManifestError, match="no file a_0_mask"):
        manifest.validate()


def test_check_reads_the_mask_of_a_series(write, make_row, write_manifest, brain, nifti):
    _, _, mask = write(5, name="a_0")
    row = make_row("a", "rsfMRI")
    row["messages"][0]["content"][0]["mask"] = mask.name
    manifest = read_manifest(write_manifest([row]))
    assert check_manifests([manifest], num_workers=1).is_good
    nifti.write(brain[:-1], mask.name)
    assert not check_manifests([manifest], num_workers=1).is_good


def test_dataset_cache_and_preview_apply_the_mask(write, make_row, write_manifest, make_tokenizer, tmp_path):
    _, scan, mask = write(name="a_0")
    row = make_row("a", "T1")
    row["messages"][0]["content"][0]["mask"] = mask.name
    manifest = read_manifest(write_manifest([row]))
    cache = VolumeCache(tmp_path / "cache")
    pipelines = {"T1": Pipeline(PipelineConfig(image_size=SHAPE), modality="T1", cache=cache)}
    assert warm_cache([manifest], pipelines=pipelines, num_workers=1).failed == []
    assert cache.holds([scan, mask], fingerprint=pipelines["T1"].fingerprint)
    tokenizer = make_tokenizer()
    dataset = ConversationDataset(
        manifest,
        tokenizer=tokenizer,
        image_token_id=tokenizer.ids["<image>"],
        num_image_tokens={"T1": 2},
        pipelines=pipelines,
    )
    masked = pipelines["T1"](scan, generator=None, mask=mask)
    assert torch.equal(dataset[0].scans[0].volume, masked)
    pytest.importorskip("matplotlib", reason="pictures are an extra")
    report = write_preview(
        [manifest], pipelines=pipelines, patch_sizes={}, folder=tmp_path / "page", name=lambda name: "x"
    )
    assert f"values {masked.min():.2f} to {masked.max():.2f}" in report.pictures[0].caption
    assert "brain mask" in report.pictures[0].caption
    assert "a_0" not in (tmp_path / "page" / "index.html").read_text()


def test_scan_in_two_splits_is_found_with_a_mask_in_one_of_them(write, make_row, write_manifest):
    _, _, mask = write(name="a_0")
    rows = [make_row("a", "T1"), make_row("a", "T1")]
    rows[0]["messages"][0]["content"][0]["mask"] = mask.name
    rows[1]["subject"] = "sub-other"
    manifests = [read_manifest(write_manifest([row], f"{i}.jsonl")) for i, row in enumerate(rows)]
    assert check_manifests(manifests, num_workers=1).shared_scans


@pytest.mark.parametrize("mask", [7, "../mask.nii.gz", "/etc/mask.nii.gz", ""])
def test_mask_outside_of_the_root_of_a_manifest_is_rejected(make_row, write_manifest, mask):
    row = make_row("a", "T1")
    row["messages"][0]["content"][0]["mask"] = mask
    with pytest.raises(ManifestError, match=r"content\[0\]"):
        read_manifest(write_manifest([row]))[0]


def test_mask_is_found_next_to_a_derivative_only(tmp_path):
    for name in ("sub-1_desc-brain_mask.nii.gz", "sub-1_space-T1w_res-2_desc-brain_mask.nii"):
        (tmp_path / name).touch()
    masks = {
        name: sibling_mask(tmp_path / name)
        for name in (
            "sub-1_desc-preproc_T1w.nii.gz",
            "sub-1_space-T1w_res-2_desc-preproc_bold.nii.gz",
            "sub-1_space-MNI_desc-preproc_T1w.nii.gz",
            "sub-1_T1w.nii.gz",
        )
    }
    assert [mask and mask.name for mask in masks.values()] == [
        "sub-1_desc-brain_mask.nii.gz",
        "sub-1_space-T1w_res-2_desc-brain_mask.nii",
        None,
        None,
    ]
