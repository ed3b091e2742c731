"""Features of one preprocessed scan: a small volume, and counts of intensities."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

MAX_SIZE = 16
"""Longest axis of the features' volume, in voxels."""
MAX_CNN_SIZE = 48
"""Longest axis of the volume that the CNN is trained on, in voxels."""
NUM_BINS = 64
"""Bins of the intensity histogram."""
_TAIL = 0.001
# Preprocessed intensities are z-scores: counted in steps of 0.005, values beyond the limits in the first and last step.
_LIMIT = 10.0
NUM_STEPS = 4000


def spatial_maps(volume: Tensor) -> Tensor:
    """The channels of a volume (C, X, Y, Z); mean and standard deviation (2C, X, Y, Z) of a series (C, X, Y, Z, T)."""
    values = volume.float()
    if values.ndim == 4:
        return values
    return torch.cat([values.mean(dim=-1), values.std(dim=-1, correction=0)])


def shrink(maps: Tensor) -> Tensor:
    """Maps (C, X, Y, Z) averaged down to at most 16 voxels along each axis."""
    return _pool(maps, [min(size, MAX_SIZE) for size in maps.shape[1:]])


def shrink_for_cnn(maps: Tensor) -> Tensor:
    """Maps (C, X, Y, Z) averaged down so that the longest axis has at most 48 voxels; proportions are kept."""
    scale = min(1.0, MAX_CNN_SIZE / max(maps.shape[1:]))
    return _pool(maps, [max(1, round(size * scale)) for size in maps.shape[1:]])


def _pool(maps: Tensor, sizes: Sequence[int]) -> Tensor:
    x, y, z = sizes
    return adaptive_avg_pool3d(maps, (x, y, z))


def count_intensities(volume: Tensor) -> np.ndarray:
    """Number of voxels of each channel in each step of intensity: (C, `NUM_STEPS`) int64; all frames of a series."""
    steps = ((volume.float() + _LIMIT) * (NUM_STEPS / (2 * _LIMIT))).floor().clamp(0, NUM_STEPS - 1).long()
    return np.stack([torch.bincount(channel.flatten(), minlength=NUM_STEPS).numpy() for channel in steps])


def bin_edges(counts: np.ndarray) -> np.ndarray:
    """First steps of the bins after the first one: `NUM_BINS` of equal width over the central 99.8 % of these voxels.

    What is below or above is in the first or last bin. There are fewer bins if these voxels have fewer steps.

    Args:
        counts: (`NUM_STEPS`,), of all training scans.
    """
    cumulative = counts.cumsum() / counts.sum()
    low, high = np.searchsorted(cumulative, [_TAIL, 1 - _TAIL])
    edges = np.unique(np.linspace(low, high + 1, NUM_BINS + 1).astype(int)[1:-1])
    return edges[edges > 0]


def histogram(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Fraction of voxels in each bin, (len(edges) + 1,) float64, from the counts (`NUM_STEPS`,) of a channel."""
    return np.add.reduceat(counts, [0, *edges]) / counts.sum()


@dataclass(frozen=True)
class StoredVolume:
    """Where a volume is in a `VolumeFile`: the first byte, and the shape (C, X, Y, Z)."""

    offset: int
    shape: tuple[int, ...]


class VolumeFile:
    """Volumes in float16 in a temporary file, which disappears with the object: memory holds none of them."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object

    def add(self, volume: Tensor) -> StoredVolume:
        """Append a volume (C, X, Y, Z)."""
        offset = self._file.seek(0, 2)
        self._file.write(volume.half().contiguous().numpy().tobytes())
        return StoredVolume(offset, tuple(volume.shape))

    def read(self, stored: StoredVolume) -> Tensor:
        """The volume (C, X, Y, Z) in float32."""
        self._file.seek(stored.offset)
        content = self._file.read(2 * int(np.prod(stored.shape)))
        return torch.from_numpy(np.frombuffer(content, dtype=np.float16).reshape(stored.shape).astype(np.float32))
