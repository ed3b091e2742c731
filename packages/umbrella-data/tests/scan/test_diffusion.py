"""FA, MD and the main direction of fitted tensors, on a phantom of known fibres and on real brains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig
from umbrella_data.scan.gradient_table import Shell, gradient_files
from umbrella_data.scan.header import ScanWarning
from umbrella_data.scan.volume import load_volume

pytest.importorskip("dipy", reason="fitting tensors is an extra")

from umbrella_data.scan.diffusion import fit_dwi

FIBRE = np.array([2.0, 1.0, 0.5]) / np.linalg.norm([2.0, 1.0, 0.5])
ALONG, ACROSS = 1.7e-3, 0.3e-3


def write_dwi(nifti: Any, *, orientation: str = "RAS", num_directions: int = 12, background: float = 0.0) -> Path:
    """A ball of one fibre direction in its right half and isotropic in its left half, without noise."""
    rng = np.random.default_rng(0)
    world = rng.normal(size=(num_directions, 3))
    world /= np.linalg.norm(world, axis=1, keepdims=True)
    world = np.concatenate([np.zeros((2, 3)), world])
    b_values = np.array([0.0, 0.0] + [1000.0] * num_directions)
    line = np.arange(16) - 7.5
    x, y, z = np.meshgrid(line, line, line, indexing="ij")
    ball = (x**2 + y**2 + z**2) < 36
    fibre = np.exp(-b_values * (ACROSS + (ALONG - ACROSS) * (world @ FIBRE) ** 2))
    round_ = np.exp(-b_values * (ALONG + 2 * ACROSS) / 3)
    series = 1000 * np.where(ball, 1.0, background)[..., None] * np.where((x > 0)[..., None], fibre, round_)
    path = nifti.write(series.astype(np.float32), "sub-01_dwi.nii.gz", orientation=orientation, repetition_time=5.0)
    axes = np.asarray(nifti.image(np.zeros((2, 2, 2), np.int16), orientation=orientation).affine)[:3, :3] / 2
    stored = world @ axes
    if np.linalg.det(axes) > 0:
        stored[:, 0] *= -1
    bval, bvec = gradient_files(path)
    np.savetxt(bval, b_values[None])
    np.savetxt(bvec, stored.T)
    return path


def write_shells(nifti: Any, b_values: list[float], *, num_directions: int = 24, kurtosis: float = 1.0) -> Path:
    """Tissue inside of air, without noise: two b0, then each b-value in the same directions. Kurtosis grows with x."""
    tensor = np.diag([1.3e-3, 0.6e-3, 0.6e-3])
    directions = np.random.default_rng(0).normal(size=(num_directions, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    b = np.concatenate([[0.0, 0.0], np.repeat(b_values, num_directions)])
    vectors = np.concatenate([np.zeros((2, 3)), np.tile(directions, (len(b_values), 1))])
    adc = np.einsum("ni,ij,nj->n", vectors, tensor, vectors)
    series = np.full((12, 12, 12, len(b)), 3.0)
    of_voxel = kurtosis * np.linspace(0.5, 1.5, 6)[:, None, None, None]
    series[3:9, 3:9, 3:9] = 1000 * np.exp(-b * adc + (b * np.trace(tensor) / 3) ** 2 * of_voxel / 6)
    path = nifti.write(series.astype(np.float32), "sub-01_dwi.nii.gz", repetition_time=5.0)
    for file, rows in zip(gradient_files(path), (b[None], vectors.T), strict=True):
        np.savetxt(file, rows)
    return path


def inner_fa(path: Path, **options: float) -> float:
    return float(fit_dwi(path, **options).fa[5:7, 5:7, 5:7].mean())


def test_fit_dwi_gives_the_same_fa_with_and_without_shells_of_high_b(nifti: Any) -> None:
    single = inner_fa(write_shells(nifti, [1000]))
    path = write_shells(nifti, [1005, 1995, 3000])
    assert abs(inner_fa(path) - single) < 0.02
    assert abs(inner_fa(path, max_b=3000) - single) > 0.1
    maps = fit_dwi(path)
    left_out = [Shell(2000, 24, is_fitted=False), Shell(3000, 24, is_fitted=False)]
    assert maps.shells == (Shell(0, 2, is_fitted=True), Shell(1000, 24, is_fitted=True), *left_out)
    assert maps.warnings == ()
    volume = load_volume(path, modality="dMRI", max_b=3000)
    np.testing.assert_array_equal(volume.data[0], fit_dwi(path, max_b=3000).fa)


def test_fit_dwi_fits_the_lowest_shell_when_all_are_above_max_b(nifti: Any) -> None:
    both = fit_dwi(write_shells(nifti, [2000, 3000]))
    single = fit_dwi(write_shells(nifti, [2000]))
    np.testing.assert_allclose(both.fa, single.fa, atol=1e-5)
    assert both.warnings == single.warnings == (ScanWarning.HIGH_B,)
    path = write_shells(nifti, [2000])
    assert load_volume(path, modality="dMRI").warnings == (ScanWarning.HIGH_B,)
    assert fit_dwi(path, max_b=2000).warnings == ()


def test_fit_dwi_rejects_when_the_fitted_shells_have_too_few_directions(nifti: Any) -> None:
    path = write_shells(nifti, [1000, 2000], num_directions=6)
    bval = gradient_files(path)[0]
    fit_dwi(path)
    b = np.loadtxt(bval)
    b[2] = 2000  # 5 directions of b = 1000 are left
    np.savetxt(bval, b[None])
    with pytest.raises(ScanError) as caught:
        fit_dwi(path)
    assert caught.value.reason == ScanReason.BVEC
    assert "max_b" in caught.value.message
    fit_dwi(path, max_b=2000)


def test_fit_dwi_takes_volumes_up_to_the_b0_threshold_for_b0(nifti: Any) -> None:
    path = write_shells(nifti, [1000], kurtosis=0)
    expected = inner_fa(path)
    bval = gradient_files(path)[0]
    b = np.loadtxt(bval)
    b[:2] = 60
    np.savetxt(bval, b[None])
    with pytest.raises(ScanError) as caught:
        fit_dwi(path)
    assert caught.value.reason == ScanReason.BVAL
    assert abs(inner_fa(path, b0_threshold=60) - expected) < 0.02


def test_pipeline_fits_with_its_settings_and_caches_each(nifti: Any) -> None:
    path = write_shells(nifti, [1000, 3000])
    bval = gradient_files(path)[0]
    b = np.loadtxt(bval)
    b[:2] = 60
    np.savetxt(bval, b[None])
    cache = VolumeCache(nifti.folder / "cache")
    volumes = []
    for settings in ({}, {"max_b": 3000.0}):
        config = PipelineConfig(image_size=(8, 8, 8), b0_threshold=60, **settings)
        pipeline = Pipeline(config, modality="dMRI", cache=cache)
        assert not pipeline.is_cached(path)
        volumes.append(pipeline(path, generator=None).float().numpy())
        expected = Pipeline(config, modality="dMRI")(path, generator=None).numpy()
        np.testing.assert_allclose(volumes[-1], expected, atol=5e-3)
    assert np.abs(volumes[0] - volumes[1]).max() > 0.1
    with pytest.raises(ScanError) as caught:
        Pipeline(PipelineConfig(image_size=(8, 8, 8)), modality="dMRI", cache=cache)(path, generator=None)
    assert caught.value.reason == ScanReason.BVAL


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "PSR", "LPI"])
def test_fit_dwi_finds_the_tensor_when_stored_in_any_way(nifti: Any, orientation: str) -> None:
    maps = fit_dwi(write_dwi(nifti, orientation=orientation))
    right, left = maps.mask.copy(), maps.mask.copy()
    right[:8], left[8:] = False, False
    assert right.sum() > 200
    mean = (ALONG + 2 * ACROSS) / 3
    np.testing.assert_allclose(maps.md[maps.mask], mean, rtol=1e-3)
    spread = np.array([ALONG, ACROSS, ACROSS])
    expected = np.sqrt(1.5 * np.square(spread - mean).sum() / np.square(spread).sum())
    np.testing.assert_allclose(maps.fa[right], expected, rtol=1e-3)
    np.testing.assert_allclose(maps.fa[left], 0, atol=1e-3)
    np.testing.assert_allclose(np.abs(FIBRE @ maps.direction[:, right]), 1, atol=1e-3)
    assert not maps.fa[~maps.mask].any()


def test_load_volume_gives_fa_and_md_when_given_a_dwi(nifti: Any) -> None:
    path = write_dwi(nifti)
    maps = fit_dwi(path)
    for paths in (path, [path]):
        volume = load_volume(paths, modality="dMRI")
        assert volume.data.shape == (2, 16, 16, 16)
        np.testing.assert_array_equal(volume.data[0], maps.fa)
        np.testing.assert_array_equal(volume.data[1], maps.md)
        assert volume.spacing == (2.0, 2.0, 2.0)


def test_fit_dwi_uses_the_given_mask_as_brain(nifti: Any) -> None:
    path = write_dwi(nifti)
    found = fit_dwi(path)
    given = found.mask.copy()
    given[:, :, 8:] = False
    mask = nifti.write(given.astype(np.uint8), "sub-01_desc-brain_mask.nii.gz")
    maps = fit_dwi(path, mask=mask)
    np.testing.assert_array_equal(maps.mask, given)
    both = given & found.mask
    np.testing.assert_allclose(maps.fa[both], found.fa[both], rtol=1e-5)
    assert not maps.fa[~given].any()
    volume = load_volume(path, modality="dMRI", mask=mask)
    np.testing.assert_array_equal(volume.data[0], maps.fa)


def test_fit_dwi_fits_all_of_a_cut_out_without_background(nifti: Any) -> None:
    ball = fit_dwi(write_dwi(nifti)).mask
    dim = fit_dwi(write_dwi(nifti, background=0.25))
    assert (dim.mask.sum(), dim.warnings) == (ball.sum(), ())
    path = write_dwi(nifti, background=0.5)
    whole = fit_dwi(path)
    assert whole.mask.all()
    assert whole.warnings == (ScanWarning.NO_BACKGROUND,)
    assert load_volume(path, modality="dMRI").warnings == (ScanWarning.NO_BACKGROUND,)
    mask = nifti.write(ball.astype(np.uint8), "mask.nii.gz")
    masked = fit_dwi(path, mask=mask)
    np.testing.assert_array_equal(masked.mask, ball)
    assert masked.warnings == ()


@pytest.mark.parametrize("name", ["sub-dipy101d/dwi/sub-dipy101d_dwi.nii.gz", "sub-dipy64d/dwi/sub-dipy64d_dwi.nii"])
def test_fit_dwi_fits_all_of_real_cut_outs(real_data: Path, name: str) -> None:
    maps = fit_dwi(real_data / name)
    assert ScanWarning.NO_BACKGROUND in maps.warnings
    assert maps.mask.mean() > 0.99
    # White and grey matter, not only fluid.
    assert 4e-4 < np.median(maps.md[maps.mask]) < 1.5e-3


def test_fit_dwi_rejects_when_directions_do_not_span_the_tensor(nifti: Any) -> None:
    path = write_dwi(nifti, num_directions=5)
    with pytest.raises(ScanError, match="at least 6 different directions") as caught:
        fit_dwi(path)
    assert caught.value.reason == ScanReason.BVEC
    path = write_dwi(nifti, num_directions=12)
    bvec = gradient_files(path)[1]
    np.savetxt(bvec, np.tile([[1.0], [0.0], [0.0]], 14))
    with pytest.raises(ScanError, match="at least 6 different directions"):
        fit_dwi(path)


def test_load_volume_rejects_when_a_dwi_is_a_volume_or_lacks_gradients(nifti: Any, random_voxels: Any) -> None:
    with pytest.raises(ScanError) as caught:
        load_volume(nifti.write(random_voxels(8, 8, 8), "a_dwi.nii"), modality="dMRI")
    assert caught.value.reason == ScanReason.RANK
    with pytest.raises(ScanError) as caught:
        load_volume(nifti.write(random_voxels(8, 8, 8, 8), "b_dwi.nii"), modality="dMRI")
    assert caught.value.reason == ScanReason.BVAL
    cache = VolumeCache(nifti.folder / "cache")
    pipeline = Pipeline(PipelineConfig(image_size=(8, 8, 8)), modality="dMRI", cache=cache)
    with pytest.raises(ScanError) as cached:
        pipeline(nifti.folder / "b_dwi.nii", generator=None)
    assert (cached.value.reason, cached.value.path) == (ScanReason.BVAL, caught.value.path)


@pytest.mark.isolated
def test_fit_dwi_names_the_library_when_dipy_is_missing(nifti: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dwi(nifti)
    monkeypatch.setitem(sys.modules, "dipy.core.gradients", None)
    with pytest.raises(ImportError, match=r"needs dipy: pip install dipy"):
        fit_dwi(path)


@pytest.mark.parametrize("subject", ["sub-sag01", "sub-uih01"])
def test_corpus_callosum_runs_left_right_when_the_brain_is_real(real_data: Path, subject: str) -> None:
    from scipy.ndimage import label

    maps = fit_dwi(real_data / subject / "dwi" / f"{subject}_dwi.nii.gz")
    columns = np.flatnonzero(maps.mask.any(axis=(1, 2)))
    middle = (columns[0] + columns[-1]) // 2
    slab = np.zeros_like(maps.mask)
    slab[middle - 1 : middle + 3] = True
    # Four slices around the middle: the largest coherent piece of high FA there is the corpus callosum.
    pieces, _ = label(slab & (maps.fa > 0.6))
    callosum = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
    directions = np.abs(maps.direction[:, callosum])
    assert callosum.sum() >= 10
    assert (directions.argmax(axis=0) == 0).all()
    assert np.median(directions[0]) > 0.9
    assert 0.15 < maps.fa[maps.mask].mean() < 0.35
    assert 0.5e-3 < np.median(maps.md[maps.mask]) < 1.5e-3


@pytest.mark.parametrize("lost", [0, 5])
def test_fit_dwi_leaves_out_volumes_without_an_image(nifti: Any, lost: int) -> None:
    expected = inner_fa(write_shells(nifti, [1000]))
    path = write_shells(nifti, [1000])
    image = nib.load(path)
    series = image.get_fdata(dtype=np.float32)
    series[..., lost] = 0
    nib.save(nib.Nifti1Image(series, image.affine, image.header), path)
    assert inner_fa(path) == pytest.approx(expected, abs=5e-3)
    assert ScanWarning.EMPTY_FRAMES in fit_dwi(path).warnings
