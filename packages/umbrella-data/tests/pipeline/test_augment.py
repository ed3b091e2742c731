"""Augmentation depends on the given generator only, and swaps left and right only if configured."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from umbrella_data.pipeline.augment import AugmentConfig, augment

STILL = {"max_shift": 0.0, "max_rotation": 0.0, "max_intensity_scale": 0.0, "noise_std": 0.0}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marked() -> torch.Tensor:
    """A smooth blob well inside the right half (1, 1, 16, 16, 16)."""
    line = torch.linspace(-1, 1, 16)
    x, y, z = torch.meshgrid(line, line, line, indexing="ij")
    return torch.exp(-((x - 0.5) ** 2 + y**2 + z**2) / 0.05)[None, None]


def is_right(frames: torch.Tensor) -> bool:
    return bool(frames[:, :, 8:].sum() > frames[:, :, :8].sum())


def test_augment_depends_on_the_generator_only() -> None:
    config, volume = AugmentConfig(), marked()
    torch.manual_seed(1)
    first = augment(volume, config=config, generator=generator(5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(augment(volume, config=config, generator=generator(5)), first)
    assert not torch.equal(augment(volume, config=config, generator=generator(6)), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_augment_never_swaps_left_and_right_by_default() -> None:
    config = AugmentConfig(max_shift=0.1, max_rotation=30, noise_std=0.01)
    assert all(is_right(augment(marked(), config=config, generator=generator(seed))) for seed in range(60))


def test_augment_swaps_half_of_the_volumes_when_configured() -> None:
    config = AugmentConfig(flip_left_right=True, **STILL)
    volume = marked() + torch.linspace(0, 0.1, 16).reshape(1, 1, 1, 16, 1)
    results = [augment(volume, config=config, generator=generator(seed)) for seed in range(100)]
    rights = sum(map(is_right, results))
    assert 30 < rights < 70
    assert all(torch.equal(each, volume) or torch.equal(each, volume.flip(2)) for each in results)


def test_augment_changes_nothing_when_all_settings_are_zero() -> None:
    assert torch.equal(augment(marked(), config=AugmentConfig(**STILL), generator=generator(0)), marked())


def test_augment_moves_all_frames_and_channels_alike() -> None:
    frames = marked().expand(3, 2, 16, 16, 16)
    config = AugmentConfig(**{**STILL, "max_shift": 0.1, "max_rotation": 20})
    moved = augment(frames, config=config, generator=generator(3))
    assert not torch.allclose(moved, frames, atol=0.05)
    assert torch.equal(moved, moved[:1, :1].expand_as(moved))


def centre(volume: torch.Tensor) -> torch.Tensor:
    grids = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in volume.shape[2:]), indexing="ij")
    return torch.stack([(grid * volume[0, 0]).sum() / volume.sum() for grid in grids])


def test_augment_stays_within_its_bounds_when_shifting() -> None:
    config = AugmentConfig(**{**STILL, "max_shift": 0.1})
    shifts = torch.stack(
        [centre(augment(marked(), config=config, generator=generator(seed))) - centre(marked()) for seed in range(40)]
    )
    limit = 0.1 * 16
    assert shifts.abs().max() <= limit + 0.05
    assert (shifts.abs().amax(dim=0) > 0.6 * limit).all()


def test_augment_keeps_distances_when_the_grid_is_not_a_cube() -> None:
    size = (41, 23, 31)
    volume = torch.zeros(1, 1, *size)
    volume[0, 0, 32:34, 11, 15] = 1.0
    config = AugmentConfig(**{**STILL, "max_rotation": 40})
    for seed in range(40):
        x, y, z = (
            centre(augment(volume, config=config, generator=generator(seed))) - torch.tensor([20, 11, 15])
        ).tolist()
        assert math.hypot(x, y, z) == pytest.approx(12.5, abs=0.3)


@pytest.mark.parametrize(
    "wrong", [{"max_shift": -0.1}, {"max_rotation": 400}, {"noise_std": -1}, {"flip_up_down": True}]
)
def test_augment_config_rejects_when_wrong(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig(**wrong)
