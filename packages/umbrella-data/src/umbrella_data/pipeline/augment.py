"""Random augmentation of a training volume, drawn from the sample's own generator only."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from umbrella_data.pipeline.config import AugmentConfig


def augment(frames: torch.Tensor, *, config: AugmentConfig, generator: torch.Generator) -> torch.Tensor:
    """Augment frames (T, C, X, Y, Z) of one scan, with the same spatial change for all frames.

    Args:
        frames: Normalised float32.
        config: Which changes, and how large.
        generator: The only source of randomness; the same state gives the same result.
    """
    # Draw all random numbers unconditionally, so that changing one option does not shift the others.
    uniform = torch.rand(8, generator=generator, dtype=torch.float64) * 2 - 1
    if config.max_shift or config.max_rotation:
        frames = _move(
            frames,
            angles=uniform[:3] * math.radians(config.max_rotation),
            # torch's grid extends from -1 to 1: a fraction of the field of view is twice as large there.
            shift=uniform[3:6] * 2 * config.max_shift,
        )
    if config.flip_left_right and uniform[6] > 0:
        frames = frames.flip(2)
    if config.max_intensity_scale:
        frames = frames * float(1 + uniform[7] * config.max_intensity_scale)
    if config.noise_std:
        frames = frames + config.noise_std * torch.randn(frames.shape, generator=generator)
    return frames


def _move(frames: torch.Tensor, *, angles: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rotate by angles (radians around X, Y, Z) and shift, trilinear; voxels beyond the border have its values."""
    num_frames, num_channels, *size = frames.shape
    scale = torch.tensor(size, dtype=torch.float64)
    # Rotate in voxels, not in the unit cube, which would shear a flat grid.
    matrix = _rotation(angles) * scale[None, :] / scale[:, None]
    # grid_sample has the last axis first.
    theta = torch.cat([matrix.flip(0, 1), shift.flip(0)[:, None]], dim=1).float()[None]
    stacked = frames.reshape(1, num_frames * num_channels, *size)
    grid = F.affine_grid(theta, list(stacked.shape), align_corners=False)
    moved = F.grid_sample(stacked, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved.reshape(frames.shape)


def _rotation(angles: torch.Tensor) -> torch.Tensor:
    """The product (3, 3) of rotations around X, Y and Z."""
    turn = torch.eye(3, dtype=torch.float64)
    for axis in range(3):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        step = torch.eye(3, dtype=torch.float64)
        step[first, first] = step[second, second] = torch.cos(angles[axis])
        step[first, second] = -torch.sin(angles[axis])
        step[second, first] = torch.sin(angles[axis])
        turn = turn @ step
    return turn
