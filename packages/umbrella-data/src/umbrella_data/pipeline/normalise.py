"""Intensity normalisation: MRI intensities have no unit, so each scan is scaled by statistics of its own voxels."""

from __future__ import annotations

import numpy as np
import torch

from umbrella_data.pipeline.config import Normalisation

_MIN_RELATIVE_STD = 1e-2
# Below this, float32 cannot distinguish contrast from rounding.
_MIN_STD_OF_MEAN, _MIN_STD = 1e-6, 1e-30


class NoContrastError(ValueError):
    """All voxels of a scan have the same value on the model's grid."""


def normalise(frames: torch.Tensor, *, method: Normalisation, is_masked: bool) -> torch.Tensor:
    """Normalise frames (T, C, X, Y, Z); the result is always finite.

    Statistics are computed in float64 and one thread, so that they do not depend on the number of threads.

    Args:
        frames: float32.
        method: See `Normalisation`.
        is_masked: Whether the background is exactly 0 (maps such as FA); otherwise the foreground is above the mean of
            the mean frame, as in TorchIO's `ZNormalization.mean`.

    Returns:
        float32, the same shape.

    Raises:
        NoContrastError: If a channel is constant.
    """
    values = frames.numpy()
    result = np.empty_like(values)
    if method in ("zscore", "nonzero_zscore"):
        for channel in range(values.shape[1]):
            _standardise(values[:, channel], result[:, channel], keep_zero=method == "nonzero_zscore")
        return torch.from_numpy(result)
    masked = foreground(values, is_masked=is_masked)
    for channel in range(values.shape[1]):
        source, target = values[:, channel], result[:, channel]
        if method == "temporal_zscore":
            source = source - source.mean(axis=0, dtype=np.float64).astype(np.float32)
        mean, std = _statistics(source, masked[channel])
        if method == "temporal_zscore":
            mean = 0.0
        np.subtract(source, np.float32(mean), out=target)
        target /= np.float32(std)
    return torch.from_numpy(result)


def _standardise(source: np.ndarray, target: np.ndarray, *, keep_zero: bool) -> None:
    """Write a channel (T, X, Y, Z) with mean 0 and standard deviation 1."""
    inside = source[source != 0] if keep_zero else source
    std = float(inside.std(dtype=np.float64)) if inside.size else 0.0
    mean = float(inside.mean(dtype=np.float64)) if inside.size else 0.0
    if std <= _MIN_STD_OF_MEAN * abs(mean) or std < _MIN_STD:
        raise NoContrastError("every selected voxel has the same value on the model's grid")
    np.subtract(source, np.float32(mean), out=target)
    target /= np.float32(std)
    if keep_zero:
        target[source == 0] = 0.0


def foreground(values: np.ndarray, *, is_masked: bool) -> np.ndarray:
    """The foreground, (C, X, Y, Z) bool, of frames (T, C, X, Y, Z)."""
    if is_masked:
        return np.broadcast_to((values != 0).any(axis=(0, 1)), values.shape[1:])
    mean_frame = values.mean(axis=0, dtype=np.float64)
    return np.asarray(mean_frame > mean_frame.mean(axis=(1, 2, 3), keepdims=True))


def _statistics(source: np.ndarray, foreground: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a channel (T, X, Y, Z) over its foreground (X, Y, Z)."""
    whole_std = float(source.std(dtype=np.float64))
    inside = source[:, foreground]
    std = float(inside.std(dtype=np.float64)) if inside.size else 0.0
    if std > _MIN_RELATIVE_STD * whole_std:
        return float(inside.mean(dtype=np.float64)), std
    # The foreground of an image like a mask has no contrast: statistics of the whole volume are used instead.
    mean = float(source.mean(dtype=np.float64))
    if whole_std <= _MIN_STD_OF_MEAN * abs(mean) or whole_std < _MIN_STD:
        raise NoContrastError("every voxel has the same value on the model's grid")
    return mean, whole_std
