"""Resampling from a scan's grid to the model's: the whole field of view resized, or a box of given voxel size.

Both are separable: each axis has its own `AxisWeights`. A volume can therefore be resampled slice by slice, as it is
read from its file, without a float32 copy of the whole; this is several times faster than resizing such a copy, whose
cost is mostly memory traffic. The formulas, and in float32 the rounding of positions, are torch's:
`monai.transforms.Resize` and `SpatialResample` give the same voxels (tested).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from umbrella_data.pipeline.config import Interpolation

Convert = Callable[[np.ndarray, np.ndarray, int], None]
"""Writes the real values of a stored slice to a float32 slice; the third argument is its number in the volume."""


@dataclass(frozen=True, kw_only=True)
class AxisWeights:
    """Interpolation weights along one axis, from a scan's grid to M positions of the model's.

    Attributes:
        size: Length of the scan's axis.
        indices: (M, K) positions on the scan's axis.
        weights: (M, K) float32; a row sums to 1, or to less if the new position is outside of the scan's axis.
    """

    size: int
    indices: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def flipped(self) -> AxisWeights:
        """The same weights for a scan's axis that is stored in the opposite direction."""
        return AxisWeights(size=self.size, indices=self.size - 1 - self.indices, weights=self.weights)

    @property
    def inside(self) -> np.ndarray:
        """(M,) float32: how much of each new position is on the scan's axis."""
        return np.asarray(self.weights.sum(axis=1))


Centre = tuple[float, float, float] | None
GridWeights = tuple[AxisWeights, AxisWeights, AxisWeights]


def trilinear_weights(size: int, new_size: int) -> AxisWeights:
    """Weights of `torch.nn.functional.interpolate(mode="trilinear", align_corners=False)` along one axis."""
    # In float32 like torch: exact positions would differ by up to 1e-5 of a voxel.
    scale = np.float32(size) / np.float32(new_size)
    source = np.maximum(scale * (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    low = np.minimum(source.astype(np.intp), size - 1)
    weight = np.clip(source - low.astype(np.float32), 0, 1)
    return AxisWeights(
        size=size,
        indices=np.stack([low, np.minimum(low + 1, size - 1)], axis=1),
        weights=np.stack([1 - weight, weight], axis=1).astype(np.float32),
    )


def area_weights(size: int, new_size: int) -> AxisWeights:
    """Weights of `torch.nn.functional.interpolate(mode="area")` along one axis."""
    low = np.arange(new_size) * size // new_size
    high = -(-np.arange(1, new_size + 1) * size // new_size)
    indices = low[:, None] + np.arange(int((high - low).max()))
    is_covered = indices < high[:, None]
    return AxisWeights(
        size=size,
        indices=np.where(is_covered, indices, low[:, None]),
        weights=(is_covered / (high - low)[:, None]).astype(np.float32),
    )


def spaced_weights(
    size: int, new_size: int, *, spacing: float, new_spacing: float, centre: float | None = None
) -> AxisWeights:
    """Linear weights for a new voxel size in mm, around `centre` (in voxels) or that of the scan's axis; 0 outside."""
    middle = (size - 1) / 2 if centre is None else centre
    source = (np.arange(new_size) - (new_size - 1) / 2) * (new_spacing / spacing) + middle
    # A grid that is only cropped or padded must return the scan's voxels, not mixtures due to rounding errors.
    source = np.round(source, 9)
    low = np.floor(source).astype(np.intp)
    indices = np.stack([low, low + 1], axis=1)
    weights = np.stack([low + 1 - source, source - low], axis=1)
    is_inside = (indices >= 0) & (indices < size)
    return AxisWeights(
        size=size,
        indices=np.clip(indices, 0, size - 1),
        weights=np.where(is_inside, weights, 0).astype(np.float32),
    )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The model's grid.

    Attributes:
        image_size: Voxels (X, Y, Z).
        spacing: Voxel size in mm, around the centre of the field of view; None resizes the whole field of view.
        interpolation: See `Interpolation`; `trilinear` wherever `spacing` is given.
    """

    image_size: tuple[int, int, int]
    spacing: tuple[float, float, float] | None = None
    interpolation: Interpolation = "trilinear"

    def weights(
        self, shape: tuple[int, ...], *, spacing: tuple[float, float, float], centre: Centre = None
    ) -> GridWeights:
        """Weights along X, Y and Z of a volume of this shape and voxel size (mm).

        Args:
            shape: Of the volume.
            spacing: Its voxel size in mm.
            centre: Centre of the grid in voxels of the volume, if the grid has a `spacing`; None for the volume's own.
        """
        if self.spacing is None:
            make = area_weights if self.interpolation == "area" else trilinear_weights
            x, y, z = (make(size, new) for size, new in zip(shape[:3], self.image_size, strict=True))
        else:
            x, y, z = (
                spaced_weights(size, new, spacing=step, new_spacing=new_step, centre=middle)
                for size, new, step, new_step, middle in zip(
                    shape[:3], self.image_size, spacing, self.spacing, centre or (None, None, None), strict=True
                )
            )
        return x, y, z


def resample(
    frames: torch.Tensor,
    *,
    spacing: tuple[float, float, float],
    grid: Grid,
    is_masked: bool = False,
    centre: Centre = None,
) -> torch.Tensor:
    """Resample frames in memory.

    Args:
        frames: (T, C, X, Y, Z) float32, RAS+.
        spacing: Voxel size of the frames in mm.
        grid: The grid of the result.
        is_masked: Whether the background is exactly 0: voxels outside of the field of view are then 0 too; otherwise
            they have the minimum of their channel.
        centre: See `Grid.weights`.

    Returns:
        (T, C, *grid.image_size) float32.
    """
    values = frames.numpy()
    weights = grid.weights(values.shape[2:], spacing=spacing, centre=centre)
    result = np.empty((*values.shape[:2], *grid.image_size), dtype=np.float32)
    for source, target in zip(values.reshape(-1, *values.shape[2:]), result.reshape(-1, *grid.image_size), strict=True):
        target[...] = resample_slices(iter([source]), weights, convert=_copy)
    if not is_masked:
        for channel in range(values.shape[1]):
            fill_outside(result[:, channel], weights, low=float(values[:, channel].min()))
    return torch.from_numpy(result)


def _copy(stored: np.ndarray, plane: np.ndarray, index: int) -> None:  # noqa: ARG001
    plane[...] = stored


def fill_outside(volumes: np.ndarray, weights: GridWeights, *, low: float) -> None:
    """Add `low` to volumes (..., X, Y, Z) in place, weighted by the part of a voxel outside of the field of view."""
    x, y, z = (each.inside for each in weights)
    if all((each == 1).all() for each in (x, y, z)):
        return
    volumes += np.float32(low) * (1 - x[:, None, None] * y[:, None] * z)


def resample_slices(
    blocks: Iterator[np.ndarray],
    weights: GridWeights,
    *,
    convert: Convert,
) -> np.ndarray:
    """Resample one volume while its slices are read; slices that are no longer needed are released.

    Args:
        blocks: Slices (n, N1, N2) in order, any number at a time; iteration stops after the volume's last slice.
        weights: Along N0 (the slices), N1 and N2.
        convert: See `Convert`; called only for slices that are needed.

    Returns:
        (M0, M1, M2) float32.
    """
    along, rows, columns = weights
    order = _Order(along)
    planes = _Planes((rows.size, columns.size), convert=convert)
    result = np.zeros((len(along), len(columns), len(rows)), dtype=np.float32)
    position = 0
    while position < along.size:
        block = next(blocks)
        # One by one, so that a slice is still in the processor's cache when it is used.
        for index, stored in enumerate(block, start=position):
            if order.is_needed[index]:
                planes.keep(index, stored)
            for row in order.ready_after[index]:
                mixed = planes.mix(along.indices[row], along.weights[row])
                result[row] = _resample_plane(mixed, rows=rows, columns=columns)
            planes.release(before=int(order.oldest_after[index]))
        position += len(block)
    return result.transpose(0, 2, 1)


class _Order:
    """Which slices of the scan are needed, until when, and which new slices can be computed after each."""

    def __init__(self, along: AxisWeights) -> None:
        is_used = along.weights != 0
        self.is_needed = np.zeros(along.size, dtype=bool)
        self.is_needed[along.indices[is_used]] = True
        self.ready_after: list[list[int]] = [[] for _ in range(along.size)]
        # oldest_after[i]: the first slice that is still needed after slice i.
        self.oldest_after = np.arange(1, along.size + 1)
        for row, used in enumerate(is_used):
            if used.any():
                first, last = along.indices[row][used].min(), along.indices[row][used].max()
                self.ready_after[last].append(row)
                self.oldest_after[first:last] = np.minimum(self.oldest_after[first:last], first)


class _Planes:
    """Slices that are still needed, in reused memory: allocating costs more than the arithmetic."""

    def __init__(self, shape: tuple[int, int], *, convert: Convert) -> None:
        self._shape = shape
        self._convert = convert
        self._kept: dict[int, np.ndarray] = {}
        self._free: list[np.ndarray] = []
        self._total = np.empty(shape, dtype=np.float32)
        self._product = np.empty(shape, dtype=np.float32)

    def keep(self, index: int, stored: np.ndarray) -> None:
        plane = self._free.pop() if self._free else np.empty(self._shape, dtype=np.float32)
        self._convert(stored, plane, index)
        self._kept[index] = plane

    def release(self, *, before: int) -> None:
        for index in [index for index in self._kept if index < before]:
            self._free.append(self._kept.pop(index))

    def mix(self, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The weighted sum of slices; the array is overwritten by the next call."""
        used = [(self._kept[index], weight) for index, weight in zip(indices.tolist(), weights, strict=True) if weight]
        np.multiply(*used[0], out=self._total)
        for plane, weight in used[1:]:
            np.multiply(plane, weight, out=self._product)
            self._total += self._product
        return self._total


def _resample_plane(plane: np.ndarray, *, rows: AxisWeights, columns: AxisWeights) -> np.ndarray:
    """A plane (N1, N2) on its new grid, transposed: (M2, M1)."""
    # Gathering whole rows is faster than gathering elements, so the plane is transposed between its two axes.
    turned = np.ascontiguousarray(_gather(plane, rows).T)
    return _gather(turned, columns)


def _gather(plane: np.ndarray, weights: AxisWeights) -> np.ndarray:
    total = plane[weights.indices[:, 0]]
    total *= weights.weights[:, :1]
    for k in range(1, weights.indices.shape[1]):
        part = plane[weights.indices[:, k]]
        part *= weights.weights[:, k : k + 1]
        total += part
    return np.asarray(total)
