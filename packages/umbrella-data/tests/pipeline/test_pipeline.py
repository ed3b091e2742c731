"""The pipelines from files to tensors: shapes, orientation, windows, randomness and rejected inputs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.pipeline.augment import AugmentConfig
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig
from umbrella_data.scan.volume import load_volume


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counting_series(nifti: Any, *, num_frames: int, name: str = "bold.nii.gz") -> Path:
    """A series whose frame t is brighter than the one before, with a structure that does not change."""
    rng = np.random.default_rng(0)
    structure = rng.uniform(50, 100, (6, 6, 6, 1))
    return nifti.write((structure + 5 * np.arange(num_frames) ** 2).astype(np.float32), name)


def rising(window: torch.Tensor) -> list[int]:
    """Signs of the differences between neighbouring frames: the order of a counting series."""
    means = window.mean(dim=(0, 1, 2, 3))
    return [int(torch.sign(step)) for step in means.diff()]


@pytest.mark.parametrize("spacing", [None, (3.0, 3.0, 3.0)])
@pytest.mark.parametrize("orientation", ["LAS", "PSR", "LPI"])
def test_pipeline_gives_the_same_tensor_for_every_stored_orientation(
    nifti: Any, random_voxels: Any, spacing: tuple[float, float, float] | None, orientation: str
) -> None:
    affine = np.diag([2.0, 2.5, 1.75, 1.0])
    voxels = random_voxels(11, 12, 13)
    pipeline = Pipeline(PipelineConfig(image_size=(8, 9, 10), spacing=spacing), modality="T1")
    expected = pipeline(nifti.write(voxels, "a.nii.gz", affine=affine), generator=None)
    other = pipeline(nifti.write(voxels, "b.nii.gz", affine=affine, orientation=orientation), generator=None)
    assert expected.shape == (1, 8, 9, 10)
    # Axes are resampled in their stored order, which changes the rounding of the last bit.
    torch.testing.assert_close(other, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("interpolation", ["area", "trilinear"])
@pytest.mark.parametrize("method", ["zscore", "nonzero_zscore"])
@pytest.mark.parametrize("scaling", [None, (0.4, 0.0)])
def test_pipeline_equals_monais_when_its_steps_are_configured(
    nifti: Any, random_voxels: Any, interpolation: str, method: str, scaling: tuple[float, float] | None
) -> None:
    from monai.transforms import Compose, EnsureChannelFirst, LoadImage, NormalizeIntensity, Resize

    voxels = random_voxels(40, 41, 42)
    voxels[:, :9] = 0
    path = nifti.write(voxels, scaling=scaling)
    theirs = Compose(
        [
            LoadImage(image_only=True),
            EnsureChannelFirst(),
            Resize((16, 18, 20), mode=interpolation),
            NormalizeIntensity(nonzero=method == "nonzero_zscore"),
        ]
    )(path)
    config = PipelineConfig(image_size=(16, 18, 20), interpolation=interpolation, normalise=method)  # type: ignore[arg-type]
    ours = Pipeline(config, modality="T1")(path, generator=None)
    np.testing.assert_allclose(ours.numpy(), np.asarray(theirs), rtol=0, atol=1e-5)


def test_pipeline_accepts_file_names_as_str(nifti: Any, random_voxels: Any, tmp_path: Path) -> None:
    path = nifti.write(random_voxels(8, 8, 8))
    mask = nifti.write((np.arange(512).reshape(8, 8, 8) > 99).astype(np.uint8), "mask.nii.gz")
    config = PipelineConfig(image_size=(8, 8, 8))
    pipeline = Pipeline(config, modality="T1", cache=VolumeCache(str(tmp_path / "cache")), index_folder=str(tmp_path))
    expected = pipeline(path, generator=None, mask=mask)
    assert torch.equal(pipeline(str(path), generator=None, mask=str(mask)), expected)
    assert torch.equal(pipeline([str(path)], generator=None, mask=mask), expected)
    assert pipeline.index_folder == tmp_path


def test_pipeline_normalises_by_the_foreground_after_resizing(nifti: Any, random_voxels: Any) -> None:
    from monai.transforms import EnsureChannelFirst, LoadImage, Orientation, Resize

    path = nifti.write(random_voxels(20, 21, 22), orientation="LPI")
    volume = Orientation(axcodes="RAS")(EnsureChannelFirst()(LoadImage(image_only=True)(path)))
    resized = np.asarray(Resize(spatial_size=(12, 12, 12), mode="trilinear")(volume))
    inside = resized[resized > resized.mean()]
    expected = (resized - inside.mean()) / inside.std()
    result = Pipeline(PipelineConfig(image_size=(12, 12, 12)), modality="T1")(path, generator=None)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_pipeline_reads_the_middle_of_a_series_when_there_is_no_generator(nifti: Any) -> None:
    path = counting_series(nifti, num_frames=11)
    pipeline = Pipeline(PipelineConfig(image_size=(6, 6, 6, 4)), modality="rsfMRI")
    window = load_volume(path, modality="rsfMRI", window=(3, 4)).data
    result = pipeline(path, generator=None)
    assert result.shape == (1, 6, 6, 6, 4)
    assert result.is_contiguous()
    correlation = torch.corrcoef(torch.stack([window.flatten(), result.flatten()]))[0, 1]
    assert float(correlation) == pytest.approx(1, abs=1e-6)


def test_pipeline_draws_the_window_from_the_generator_when_training(
    nifti: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = counting_series(nifti, num_frames=7)
    pipeline = Pipeline(PipelineConfig(image_size=(6, 6, 6, 4)), modality="rsfMRI")
    starts = []
    place = pipeline._draw_window
    monkeypatch.setattr(
        pipeline, "_draw_window", lambda *args, **options: starts.append(place(*args, **options)) or starts[-1]
    )
    for seed in range(40):
        pipeline(path, generator=generator(seed))
    assert {start for start, _ in starts} == {0, 1, 2, 3}
    assert {count for _, count in starts} == {4}
    assert torch.equal(pipeline(path, generator=generator(9)), pipeline(path, generator=generator(9)))


def test_pipeline_rejects_or_pads_when_a_series_is_short(nifti: Any) -> None:
    path = counting_series(nifti, num_frames=3)
    config = PipelineConfig(image_size=(6, 6, 6, 8))
    with pytest.raises(ScanError) as caught:
        Pipeline(config, modality="bold")(path, generator=None)
    assert (caught.value.reason, caught.value.path) == (ScanReason.SHORT_SERIES, str(path))
    padded = Pipeline(config.model_copy(update={"short_series": "pad"}), modality="bold")(path, generator=generator())
    assert padded.shape == (1, 6, 6, 6, 8)
    assert rising(padded) == [1, 1, -1, -1, 1, 1, -1]


def test_pipeline_augments_only_when_a_generator_is_given(nifti: Any, random_voxels: Any) -> None:
    path = nifti.write(random_voxels(8, 8, 8))
    plain = Pipeline(PipelineConfig(image_size=(8, 8, 8)), modality="T1")
    pipeline = Pipeline(PipelineConfig(image_size=(8, 8, 8), augment=AugmentConfig()), modality="T1")
    assert torch.equal(pipeline(path, generator=None), plain(path, generator=generator()))
    first = pipeline(path, generator=generator(1))
    assert not torch.equal(first, plain(path, generator=None))
    assert torch.equal(first, pipeline(path, generator=generator(1)))


@pytest.mark.parametrize("modality", ["T1", "rsfMRI"])
def test_pipeline_gives_nearly_the_same_when_cached(
    nifti: Any, random_voxels: Any, tmp_path: Path, modality: str
) -> None:
    is_series = modality == "rsfMRI"
    path = nifti.write(random_voxels(8, 8, 8, 9) if is_series else random_voxels(8, 8, 8))
    config = PipelineConfig(image_size=(6, 6, 6, 4) if is_series else (6, 6, 6), augment=AugmentConfig())
    plain = Pipeline(config, modality=modality)
    cached = Pipeline(config, modality=modality, cache=VolumeCache(tmp_path / "cache"))
    cached.warm(path)
    for seed in range(3):
        expected = plain(path, generator=generator(seed))
        first = cached(path, generator=generator(seed))
        assert torch.equal(first, cached(path, generator=generator(seed)))
        torch.testing.assert_close(first, expected, rtol=0, atol=5e-3)


def test_fingerprint_differs_when_cached_voxels_would() -> None:
    base = PipelineConfig(image_size=(8, 8, 8))
    prints = {
        Pipeline(base, modality="T1").fingerprint,
        Pipeline(base, modality="dMRI").fingerprint,
        Pipeline(PipelineConfig(image_size=(8, 8, 8), max_b=1000), modality="dMRI").fingerprint,
        Pipeline(PipelineConfig(image_size=(8, 8, 8), b0_threshold=10), modality="dMRI").fingerprint,
        Pipeline(PipelineConfig(image_size=(8, 8, 10)), modality="T1").fingerprint,
        Pipeline(PipelineConfig(image_size=(8, 8, 8), spacing=(2, 2, 2)), modality="T1").fingerprint,
        Pipeline(PipelineConfig(image_size=(8, 8, 8), interpolation="area"), modality="T1").fingerprint,
        Pipeline(PipelineConfig(image_size=(8, 8, 8), normalise="zscore"), modality="T1").fingerprint,
    }
    assert len(prints) == 8
    augmented = base.model_copy(update={"augment": AugmentConfig()})
    assert Pipeline(augmented, modality="T1w").fingerprint == Pipeline(base, modality="T1").fingerprint


def test_pipeline_works_when_pickled(nifti: Any, random_voxels: Any, tmp_path: Path) -> None:
    path = nifti.write(random_voxels(8, 8, 8))
    pipeline = Pipeline(PipelineConfig(image_size=(8, 8, 8)), modality="T1", cache=VolumeCache(tmp_path / "cache"))
    copy = pickle.loads(pickle.dumps(pipeline))
    assert torch.equal(copy(path, generator=None), pipeline([path], generator=None))


def test_pipeline_rejects_when_the_resampled_image_is_constant(nifti: Any) -> None:
    voxels = np.zeros((30, 30, 30), np.int16)
    voxels[0, 0, 0] = 1
    path = nifti.write(voxels)
    with pytest.raises(ScanError) as caught:
        Pipeline(PipelineConfig(image_size=(2, 2, 2)), modality="T1")(path, generator=None)
    assert (caught.value.reason, caught.value.path) == (ScanReason.CONSTANT, str(path))


def test_pipeline_rejects_when_config_and_modality_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"T1 needs an image_size \(X, Y, Z\), not"):
        Pipeline(PipelineConfig(image_size=(8, 8, 8, 4)), modality="T1")
    with pytest.raises(ValueError, match=r"rsfMRI needs an image_size \(X, Y, Z, T\)"):
        Pipeline(PipelineConfig(image_size=(8, 8, 8)), modality="rsfMRI")
    with pytest.raises(ValueError, match="temporal_zscore is for series"):
        Pipeline(PipelineConfig(image_size=(8, 8, 8), normalise="temporal_zscore"), modality="T1")
    for key in ("max_b", "b0_threshold"):
        config = PipelineConfig(image_size=(8, 8, 8), **{key: 100})
        assert getattr(Pipeline(config, modality="dMRI").config, key) == 100
        with pytest.raises(ValueError, match=key):
            Pipeline(config, modality="T1")
    with pytest.raises(ValueError, match="b0_threshold"):
        PipelineConfig(image_size=(8, 8, 8), max_b=100, b0_threshold=100)


def test_pipeline_config_reports_all_problems_when_wrong() -> None:
    with pytest.raises(ValidationError) as caught:
        PipelineConfig(image_size=(8, 0, 8), spacing=(1, 1, -1), normalise="minmax", crop=True)  # type: ignore[call-arg, arg-type]
    assert {".".join(map(str, problem["loc"][:1])) for problem in caught.value.errors()} == {
        "image_size",
        "spacing",
        "normalise",
        "crop",
    }
    with pytest.raises(ValidationError, match="interpolation: area is for resizing"):
        PipelineConfig(image_size=(8, 8, 8), spacing=(1, 1, 1), interpolation="area")
    with pytest.raises(ValidationError, match="neither"):
        PipelineConfig(image_size=(8, 8))


def test_pipeline_reads_every_real_scan(real_data: Path) -> None:
    pytest.importorskip("dipy", reason="fitting tensors is an extra")
    sizes = {"anat": ("T1", (32, 32, 32)), "func": ("rsfMRI", (16, 16, 16, 8)), "dwi": ("dMRI", (32, 32, 32))}
    seen = dict.fromkeys(sizes, 0)
    pipelines = {
        folder: Pipeline(PipelineConfig(image_size=size), modality=modality)
        for folder, (modality, size) in sizes.items()
    }
    for path in sorted(real_data.glob("sub-*/*/*.nii*")):
        if path.name.startswith(("sub-nt01", "sub-ixi1", "sub-ixi2", "sub-ixi3", "sub-ixi4")):
            continue
        pipeline = pipelines[path.parent.name]
        result = pipeline(path, generator=None)
        assert result.shape == (pipeline.spec.num_channels, *pipeline.config.image_size)
        assert torch.isfinite(result).all()
        seen[path.parent.name] += 1
    assert min(seen.values()) >= 3
