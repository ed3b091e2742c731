"""Augmentation depends on the given generator only, and exchanges left and right only if configured."""

from __future__ import annotations

import inspect
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from umbrella_data.pipeline.augment import Augmentation
from umbrella_data.pipeline.config import AugmentConfig, PipelineConfig, PipelineSettings
from umbrella_data.pipeline.random_transforms import TRANSFORMS, check_arguments

STILL = {"max_shift": 0.0, "max_rotation": 0.0, "max_intensity_scale": 0.0, "noise_std": 0.0}

# For each row of the table, arguments that change a scan strongly and keep left and right.
STRONG: dict[str, dict[str, Any]] = {
    "RandAffine": {
        "rotate_range": [3.1, 0.5, 0.5],
        "shear_range": [0.2, 0.2],
        "translate_range": [1, [-2, 2]],
        "scale_range": 0.2,
        "padding_mode": "border",
    },
    "Rand3DElastic": {"sigma_range": [2, 3], "magnitude_range": [10, 20], "rotate_range": 0.3},
    "RandGridDistortion": {"num_cells": 3, "distort_limit": 0.3},
    "RandRotate": {"range_x": 3.1, "range_y": 0.5, "range_z": [-0.5, 0.5]},
    "RandZoom": {"min_zoom": 0.7, "max_zoom": 1.4},
    "RandFlip": {"spatial_axis": [1, -1]},
    "RandAxisFlip": {},
    "RandRotate90": {"spatial_axes": [1, 2]},
    "RandBiasField": {"degree": 2, "coeff_range": [0.1, 0.4]},
    "RandAdjustContrast": {"gamma": [1.5, 2]},
    "RandScaleIntensity": {"factors": 0.3},
    "RandShiftIntensity": {"offsets": [0.1, 0.2]},
    "RandHistogramShift": {"num_control_points": [5, 8]},
    "RandGaussianNoise": {"std": 0.1},
    "RandGibbsNoise": {"alpha": [0.5, 0.7]},
    "RandGaussianSmooth": {"sigma_x": [0.5, 1.5]},
    "RandGaussianSharpen": {"alpha": [1, 2]},
    "RandSimulateLowResolution": {"zoom_range": [0.4, 0.6]},
    "RandCoarseDropout": {"holes": 3, "spatial_size": [3, 4, 5], "max_holes": 4, "fill_value": 0},
}
# Arguments of MONAI that change the shape or the dtype, or draw parameters for each channel.
LEFT_OUT = {
    "self",
    "prob",
    "dtype",
    "device",
    "lazy",
    "cache_grid",
    "keep_size",
    "channel_wise",
    "align_corners",
    "kwargs",
}
SIZE = (16, 14, 14)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marked(size: tuple[int, ...] = (16, 16, 16)) -> torch.Tensor:
    """A smooth blob well inside the right half (1, 1, X, Y, Z), not in the middle of any axis."""
    x, y, z = torch.meshgrid(*(torch.linspace(-1, 1, each) for each in size), indexing="ij")
    return torch.exp(-((x - 0.5) ** 2 + (y - 0.2) ** 2 + (z + 0.1) ** 2) / 0.05)[None, None]


def is_right(frames: torch.Tensor) -> bool:
    return bool(frames[:, :, 8:].sum() > frames[:, :, :8].sum())


def augmentation(*entries: dict[str, Any], size: tuple[int, ...] = SIZE, **settings: Any) -> Augmentation:
    config = PipelineConfig(image_size=size, augment=list(entries), **settings)
    assert isinstance(config.augment, tuple)
    return Augmentation(config.augment, image_size=size)


def row(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "prob": 1.0, **STRONG[name], **more}


def one(name: str) -> Augmentation:
    return augmentation(row(name), allow_left_right=name == "RandAxisFlip")


def preset(config: AugmentConfig, volume: torch.Tensor, seed: int) -> torch.Tensor:
    return Augmentation(config, image_size=volume.shape[2:])(volume, generator=generator(seed))


def problems(augment: Any, **settings: Any) -> list[tuple[Any, ...]]:
    with pytest.raises(ValidationError) as caught:
        PipelineSettings(augment=augment, **settings)
    return [each["loc"] for each in caught.value.errors()]


def test_strong_arguments_cover_the_table() -> None:
    assert list(STRONG) == list(TRANSFORMS)
    assert len(TRANSFORMS) >= 10


def test_readme_lists_the_table() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:spatial|intensity) \| (.*) \|$", readme, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_row_has_the_arguments_of_monai(name: str) -> None:
    from monai import transforms

    theirs = dict(inspect.signature(getattr(transforms, name).__init__).parameters)
    ours = TRANSFORMS[name].arguments
    left_out = LEFT_OUT | ({"spatial_size"} if name in {"RandAffine", "Rand3DElastic"} else set())
    assert set(theirs) - left_out == set(ours)
    assert {key for key in ours if theirs[key].default is inspect.Parameter.empty} == set(TRANSFORMS[name].required)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_row_keeps_shape_and_input_and_depends_on_the_generator_only(name: str) -> None:
    frames = torch.cat([marked(SIZE), marked(SIZE).flip(3)]).repeat(1, 2, 1, 1, 1)
    before, transform = frames.clone(), one(name)
    first = transform(frames, generator=generator(5))
    assert (first.shape, first.dtype, type(first)) == (frames.shape, torch.float32, torch.Tensor)
    assert torch.isfinite(first).all()
    assert not torch.equal(first, frames)
    assert torch.equal(frames, before)
    # A resumed run has another history, other global states, and a copy of the pipeline in each worker.
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for seed in (6, 7):
        transform(frames, generator=generator(seed))
    resumed = (transform, pickle.loads(pickle.dumps(transform)), one(name))
    assert all(torch.equal(each(frames, generator=generator(5)), first) for each in resumed)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    others = [transform(frames, generator=generator(seed)) for seed in range(10, 20)]
    # A flip has one parameter: whether.
    assert name == "RandFlip" or not all(torch.equal(each, first) for each in others)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "RandGaussianNoise"])
def test_row_treats_all_frames_alike(name: str) -> None:
    frames = marked(SIZE).repeat(3, 2, 1, 1, 1)
    moved = one(name)(frames, generator=generator(3))
    assert not torch.equal(moved, frames)
    torch.testing.assert_close(moved, moved[:1, :1].expand_as(moved))


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "RandAxisFlip"])
def test_row_keeps_left_and_right(name: str) -> None:
    transform = one(name)
    assert all(is_right(transform(marked(SIZE), generator=generator(seed))) for seed in range(12))


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"name": "RandFlip"}, "spatial_axis"),
        ({"name": "RandFlip", "spatial_axis": None}, "spatial_axis"),
        ({"name": "RandFlip", "spatial_axis": [1, 0]}, "spatial_axis"),
        ({"name": "RandFlip", "spatial_axis": -3}, "spatial_axis"),
        ({"name": "RandAxisFlip"}, "name"),
        ({"name": "RandRotate90"}, "spatial_axes"),
        ({"name": "RandRotate90", "spatial_axes": [2, -3]}, "spatial_axes"),
        ({"name": "RandRotate", "range_y": math.pi / 2}, "range_y"),
        ({"name": "RandRotate", "range_z": [-1.6, 0]}, "range_z"),
        ({"name": "RandAffine", "rotate_range": [0, 1.6]}, "rotate_range"),
        ({"name": "RandAffine", "rotate_range": [0, 0, [-1.6, 0]]}, "rotate_range"),
        ({"name": "RandAffine", "rotate_range": [0, 0, 1.5], "shear_range": [0, 0, 0.4]}, "rotate_range"),
        ({**row("Rand3DElastic"), "rotate_range": [0, 0, 3]}, "rotate_range"),
    ],
)
def test_left_and_right_need_consent(entry: dict[str, Any], key: str) -> None:
    assert problems([row("RandZoom"), entry]) == [("augment", 1, key)]
    settings = PipelineSettings(augment=[row("RandZoom"), entry], allow_left_right=True)
    assert isinstance(settings.augment, tuple)


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "RandFlip", "prob": 1.0, "spatial_axis": 0},
        {"name": "RandAffine", "prob": 1.0, "rotate_range": [0, [3.14, 3.15]]},
        {"name": "RandRotate", "prob": 1.0, "range_z": [3.14, 3.15]},
    ],
)
def test_left_and_right_are_exchanged_with_consent(entry: dict[str, Any]) -> None:
    assert not is_right(augmentation(entry, allow_left_right=True)(marked(SIZE), generator=generator(0)))


def test_turns_by_90_degrees_need_axes_of_the_same_length() -> None:
    entry = {"name": "RandRotate90", "spatial_axes": [1, 2]}
    PipelineConfig(image_size=(4, 8, 8), augment=[entry])
    with pytest.raises(ValidationError) as caught:
        PipelineConfig(image_size=(8, 8, 4), augment=[entry])
    assert caught.value.errors()[0]["loc"] == ("augment", 0, "spatial_axes")


def test_config_reports_all_problems_of_a_list() -> None:
    entries = [
        {"name": "RandAfine"},
        {"name": "RandGaussianNoise", "stdd": 1, "prob": 3},
        {"prob": 1},
        3,
        {"name": "RandCoarseDropout", "holes": 3, "max_holes": 2},
        {"name": "RandZoom", "min_zoom": 1.2},
    ]
    with pytest.raises(ValidationError) as caught:
        PipelineSettings(augment=entries)
    found = {each["loc"][1:]: each["msg"] for each in caught.value.errors()}
    assert set(found) == {
        (0, "name"), (1, "stdd"), (1, "prob"), (2, "name"), (3,), (4, "spatial_size"), (4, "max_holes"),
        (5, "max_zoom"),
    }  # fmt: skip
    assert "did you mean 'RandAffine'" in found[0, "name"]
    assert "did you mean 'std'" in found[1, "stdd"]


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("RandAffine", "rotate_range", "much"),
        ("RandAffine", "rotate_range", [0.1, [0.2, 0.1]]),
        ("RandAffine", "scale_range", [[-2.5, 0]]),
        ("RandAffine", "scale_range", 1.0),
        ("RandAffine", "shear_range", 0.5),
        ("RandAffine", "padding_mode", "wrap"),
        ("RandAffine", "spatial_size", [4, 4, 4]),
        ("RandZoom", "min_zoom", 0),
        ("RandZoom", "keep_size", False),
        ("RandGibbsNoise", "alpha", 2),
        ("RandAdjustContrast", "gamma", 0.4),
        ("RandGaussianNoise", "std", float("nan")),
        ("RandBiasField", "degree", 0),
        ("RandScaleIntensity", "channel_wise", True),
        ("RandHistogramShift", "num_control_points", 2),
        ("RandFlip", "spatial_axis", 3),
        ("RandRotate90", "spatial_axes", [1, -2]),
        ("RandCoarseDropout", "spatial_size", [0, 4, 4]),
    ],
)
def test_config_rejects_an_argument(name: str, key: str, value: Any) -> None:
    assert ("augment", 0, key) in problems([{**row(name), key: value}])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_true_is_a_number_in_no_argument(name: str) -> None:
    switches = {"invert_image", "retain_stats", "safe", "sample_std", "dropout_holes"}
    numbers = {"prob", *TRANSFORMS[name].arguments} - switches
    for value in (True, [True, True]):
        rejected = {key for key, _ in check_arguments(name, dict.fromkeys(numbers, value))[1]}
        assert numbers <= rejected


@pytest.mark.parametrize("wrong", ["RandAffine", 3, True])
def test_config_rejects_what_is_neither_preset_nor_list(wrong: Any) -> None:
    assert problems(wrong) == [("augment",)]


def test_config_of_a_list_survives_json() -> None:
    settings = PipelineSettings(augment=[row(name) for name in STRONG], allow_left_right=True)
    content = settings.model_dump(mode="json")
    assert PipelineSettings.model_validate(content) == settings
    assert content["augment"][0] == row("RandAffine", translate_range=[1.0, [-2.0, 2.0]])


def test_transforms_of_a_list_do_not_shift_each_other() -> None:
    still = {"name": "RandZoom", "prob": 0.0}
    volume = marked(SIZE)
    both = augmentation(row("RandGaussianNoise"), row("RandShiftIntensity"))(volume, generator=generator(1))
    first = augmentation(row("RandGaussianNoise"), still)(volume, generator=generator(1))
    second = augmentation(still, row("RandShiftIntensity"))(volume, generator=generator(1))
    torch.testing.assert_close(both, first + second - volume)


def test_transforms_of_a_list_draw_different_numbers() -> None:
    noise = [row("RandGaussianNoise", sample_std=False), row("RandGaussianNoise", std=0, sample_std=False)]
    volume = marked(SIZE)
    once = augmentation(noise[0], noise[1])(volume, generator=generator(1)) - volume
    twice = augmentation(noise[0], noise[0])(volume, generator=generator(1)) - volume
    assert not torch.allclose(twice, 2 * once, atol=1e-3)


def test_argument_that_only_monai_rejects_names_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    from monai import transforms

    def reject(**arguments: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(transforms, "RandZoom", reject)
    with pytest.raises(ValueError, match=r"augment\.1 \(RandZoom\)"):
        augmentation(row("RandFlip"), row("RandZoom"))


def test_pipeline_imports_no_monai() -> None:
    code = (
        "import sys; from umbrella_data import Pipeline, PipelineConfig; from umbrella_data.pipeline import augment\n"
        "config = PipelineConfig(image_size=(4, 4, 4), augment=[{'name': 'RandFlip', 'spatial_axis': 1}])\n"
        "Pipeline(config, modality='T1')\n"
        "assert 'torch' in sys.modules and 'monai' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_imports_neither_torch_nor_monai() -> None:
    code = (
        "import sys; from umbrella_data.pipeline.config import PipelineSettings\n"
        "PipelineSettings(augment=[{'name': 'RandFlip', 'spatial_axis': 1}])\n"
        "assert 'torch' not in sys.modules and 'monai' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_preset_depends_on_the_generator_only() -> None:
    config, volume = AugmentConfig(), marked()
    first = preset(config, volume, 5)
    assert torch.equal(preset(config, volume, 5), first)
    assert not torch.equal(preset(config, volume, 6), first)


def test_preset_never_swaps_left_and_right_by_default() -> None:
    config = AugmentConfig(max_shift=0.1, max_rotation=30, noise_std=0.01)
    assert all(is_right(preset(config, marked(), seed)) for seed in range(40))


def test_preset_swaps_half_of_the_volumes_when_configured() -> None:
    config = AugmentConfig(flip_left_right=True, **STILL)
    volume = marked() + torch.linspace(0, 0.1, 16).reshape(1, 1, 1, 16, 1)
    results = [preset(config, volume, seed) for seed in range(100)]
    rights = sum(map(is_right, results))
    assert 30 < rights < 70
    assert all(torch.equal(each, volume) or torch.equal(each, volume.flip(2)) for each in results)


def test_preset_changes_nothing_when_all_settings_are_zero() -> None:
    assert torch.equal(preset(AugmentConfig(**STILL), marked(), 0), marked())


def test_preset_moves_all_frames_and_channels_alike() -> None:
    frames = marked().expand(3, 2, 16, 16, 16)
    moved = preset(AugmentConfig(**{**STILL, "max_shift": 0.1, "max_rotation": 20}), frames, 3)
    assert not torch.allclose(moved, frames, atol=0.05)
    assert torch.equal(moved, moved[:1, :1].expand_as(moved))


def centre(volume: torch.Tensor) -> torch.Tensor:
    grids = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in volume.shape[2:]), indexing="ij")
    return torch.stack([(grid * volume[0, 0]).sum() / volume.sum() for grid in grids])


def test_preset_stays_within_its_bounds_when_shifting() -> None:
    size = (32, 16, 24)
    config = AugmentConfig(**{**STILL, "max_shift": 0.1})
    shifts = torch.stack([centre(preset(config, marked(size), seed)) - centre(marked(size)) for seed in range(40)])
    limits = 0.1 * torch.tensor(size)
    assert (shifts.abs().amax(dim=0) <= limits + 0.05).all()
    assert (shifts.abs().amax(dim=0) > 0.6 * limits).all()


def test_preset_scales_contrast_within_its_bounds() -> None:
    config = AugmentConfig(**{**STILL, "max_intensity_scale": 0.2})
    scales = [float(preset(config, marked(), seed).max() / marked().max()) for seed in range(40)]
    assert 0.8 <= min(scales) < 0.9
    assert 1.1 < max(scales) <= 1.2


def test_preset_adds_noise_of_its_standard_deviation() -> None:
    noise = preset(AugmentConfig(**{**STILL, "noise_std": 0.1}), marked(), 0) - marked()
    assert float(noise.std()) == pytest.approx(0.1, rel=0.1)


def test_preset_extends_the_border() -> None:
    volume = torch.full((1, 1, 16, 16, 16), 3.0)
    moved = preset(AugmentConfig(**{**STILL, "max_shift": 0.25, "max_rotation": 20}), volume, 0)
    torch.testing.assert_close(moved, volume)


def test_preset_keeps_distances_when_the_grid_is_not_a_cube() -> None:
    size = (41, 23, 31)
    volume = torch.zeros(1, 1, *size)
    volume[0, 0, 32:34, 11, 15] = 1.0
    config = AugmentConfig(**{**STILL, "max_rotation": 40})
    for seed in range(40):
        x, y, z = (centre(preset(config, volume, seed)) - torch.tensor([20, 11, 15])).tolist()
        assert math.hypot(x, y, z) == pytest.approx(12.5, abs=0.3)


@pytest.mark.parametrize(
    "wrong", [{"max_shift": -0.1}, {"max_rotation": 400}, {"noise_std": -1}, {"flip_up_down": True}]
)
def test_preset_rejects_when_wrong(wrong: dict[str, float]) -> None:
    assert problems(wrong) == [("augment", *wrong)]
