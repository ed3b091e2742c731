"""Random augmentation of a training scan by MONAI, drawn from the sample's own generator only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from umbrella_data.pipeline.config import AugmentConfig, RandomTransform


class Augmentation:
    """The random transforms of a pipeline. Imports MONAI, which takes seconds; can be pickled for loader workers.

    Args:
        config: The transforms, in their order, or the preset.
        image_size: Voxels (X, Y, Z).

    Raises:
        ValueError: If MONAI rejects a combination of arguments.
    """

    def __init__(self, config: AugmentConfig | Sequence[RandomTransform], *, image_size: Sequence[int]) -> None:
        from monai import transforms

        listed = _preset(config, image_size) if isinstance(config, AugmentConfig) else config
        self._transforms: list[Any] = []
        for position, each in enumerate(listed):
            try:
                self._transforms.append(getattr(transforms, each.name)(**each.arguments))
            except ValueError as error:
                raise ValueError(f"augment.{position} ({each.name}): {error}") from error

    def __call__(self, frames: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """Augment frames (T, C, X, Y, Z) of one scan, with the same parameters for all frames; only noise differs.

        Args:
            frames: Normalised float32; not changed.
            generator: The only source of randomness; the same state gives the same result.
        """
        # One seed for each transform: what one of them draws does not shift the others.
        seeds = torch.randint(2**32, (len(self._transforms),), generator=generator).tolist()
        # Frames as channels of one image, which have the same parameters. Some transforms write into their input.
        image = frames.flatten(0, 1).clone()
        for transform, seed in zip(self._transforms, seeds, strict=True):
            image = transform.set_random_state(seed=seed)(image)
        # Without MONAI's metadata, which would make every later operation slower.
        return torch.as_tensor(image).as_subclass(torch.Tensor).to(frames.dtype).reshape(frames.shape)


def _preset(config: AugmentConfig, image_size: Sequence[int]) -> list[RandomTransform]:
    """The preset's transforms. Those that are off are kept with `prob` 0, so that the seeds of the others stay."""
    angle, shift = math.radians(config.max_rotation), config.max_shift
    settings: list[dict[str, Any]] = [
        {
            "name": "RandAffine",
            "prob": float(bool(angle or shift)),
            "rotate_range": [angle] * 3,
            "translate_range": [shift * size for size in image_size],
            "padding_mode": "border",
        },
        {"name": "RandFlip", "prob": 0.5 * config.flip_left_right, "spatial_axis": 0},
        {
            "name": "RandScaleIntensity",
            "prob": float(bool(config.max_intensity_scale)),
            "factors": config.max_intensity_scale,
        },
        {"name": "RandGaussianNoise", "prob": float(bool(config.noise_std)), "std": config.noise_std,
         "sample_std": False},
    ]  # fmt: skip
    return [RandomTransform(**each) for each in settings]
