"""From a scan's grid to the model's: the whole field of view resized, or a box of given voxel size at its centre."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F


def resize(frames: torch.Tensor, image_size: tuple[int, int, int]) -> torch.Tensor:
    """Resize the whole field of view, trilinear, as `monai.transforms.Resize(mode="trilinear")` does.

    MONAI's transform calls the same function of torch; importing MONAI costs seconds in every process, so that the
    plain path goes without (a test holds both equal).

    Args:
        frames: (T, C, X, Y, Z) float32.
        image_size: The size (X, Y, Z) to make.

    Returns:
        (T, C, *image_size) float32.
    """
    return F.interpolate(frames, size=image_size, mode="trilinear", align_corners=False)


def resample(
    frames: torch.Tensor,
    *,
    spacing: tuple[float, float, float],
    target_spacing: tuple[float, float, float],
    image_size: tuple[int, int, int],
) -> torch.Tensor:
    """Resample to a voxel size in mm and cut or pad around the centre, in one trilinear interpolation.

    Args:
        frames: (T, C, X, Y, Z) float32, RAS+.
        spacing: Voxel size of the frames in mm.
        target_spacing: Voxel size to make, in mm.
        image_size: The size (X, Y, Z) to make; voxels outside of the field of view take the volume's minimum.

    Returns:
        (T, C, *image_size) float32.
    """
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms.spatial.array import SpatialResample

    num_frames, num_channels = frames.shape[:2]
    # Both grids have the world's origin at their centre.
    source, target = _centred(spacing, tuple(frames.shape[2:])), _centred(target_spacing, image_size)
    low = frames.amin()
    volume = MetaTensor((frames - low).flatten(0, 1), affine=torch.from_numpy(source))
    transform = SpatialResample(mode="bilinear", padding_mode="zeros", align_corners=True, dtype=np.float32)
    moved = transform(volume, dst_affine=torch.from_numpy(target), spatial_size=image_size)
    plain = torch.as_tensor(moved.numpy()) + low
    return plain.reshape(num_frames, num_channels, *image_size)


def _centred(spacing: tuple[float, float, float], shape: tuple[int, ...]) -> np.ndarray:
    """An affine (4, 4) with this voxel size and the origin in the middle of the grid."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -0.5 * (np.array(shape) - 1) * np.array(spacing)
    return affine
