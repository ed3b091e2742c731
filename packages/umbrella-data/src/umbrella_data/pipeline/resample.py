"""From a scan's grid to the model's: the whole field of view resized, or a box of given voxel size at its centre.

Both are separable: each axis has its own `Taps`. So a volume can be resampled slice by slice, as it comes out of its
file, and the whole of it never stands in memory as float32; that is several times faster than resizing a float copy,
because most of the work of the latter is moving memory. The maths, and in float32 the rounding of the positions, are
torch's: `monai.transforms.Resize` and `SpatialResample` give the same voxels, and tests hold them to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from umbrella_data.pipeline.config import Interpolation

Convert = Callable[[np.ndarray, np.ndarray, int], None]
"""Writes the real values of a stored slice into a float32 one; the third argument is its number in the volume."""


@dataclass(frozen=True, kw_only=True)
class Taps:
    """Which old positions along one axis make each of the M new ones.

    Attributes:
        size: Length of the old axis.
        indices: (M, K) positions on the old axis.
        weights: (M, K) float32; a row adds up to 1, or to less where the new position lies outside of the old axis.
    """

    size: int
    indices: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def flipped(self) -> Taps:
        """The same taps for an old axis that is stored the other way round."""
        return Taps(size=self.size, indices=self.size - 1 - self.indices, weights=self.weights)

    @property
    def inside(self) -> np.ndarray:
        """(M,) float32: how much of each new position lies on the old axis."""
        return np.asarray(self.weights.sum(axis=1))


def trilinear_taps(size: int, new_size: int) -> Taps:
    """Taps of `torch.nn.functional.interpolate(mode="trilinear", align_corners=False)` along one axis."""
    # In float32, as torch has it: exact positions would differ from it by up to 1e-5 of a voxel.
    scale = np.float32(size) / np.float32(new_size)
    source = np.maximum(scale * (np.arange(new_size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    low = np.minimum(source.astype(np.intp), size - 1)
    weight = np.clip(source - low.astype(np.float32), 0, 1)
    return Taps(
        size=size,
        indices=np.stack([low, np.minimum(low + 1, size - 1)], axis=1),
        weights=np.stack([1 - weight, weight], axis=1).astype(np.float32),
    )


def area_taps(size: int, new_size: int) -> Taps:
    """Taps of `torch.nn.functional.interpolate(mode="area")` along one axis."""
    low = np.arange(new_size) * size // new_size
    high = -(-np.arange(1, new_size + 1) * size // new_size)
    indices = low[:, None] + np.arange(int((high - low).max()))
    is_covered = indices < high[:, None]
    return Taps(
        size=size,
        indices=np.where(is_covered, indices, low[:, None]),
        weights=(is_covered / (high - low)[:, None]).astype(np.float32),
    )


def spaced_taps(size: int, new_size: int, *, spacing: float, new_spacing: float) -> Taps:
    """Linear taps for a new voxel size in mm, around the centre of the old axis; nothing lies outside of it."""
    source = (np.arange(new_size) - (new_size - 1) / 2) * (new_spacing / spacing) + (size - 1) / 2
    # A grid that is only cut or padded must give the old voxels back, not their mixture by a rounding error.
    source = np.round(source, 9)
    low = np.floor(source).astype(np.intp)
    indices = np.stack([low, low + 1], axis=1)
    weights = np.stack([low + 1 - source, source - low], axis=1)
    is_inside = (indices >= 0) & (indices < size)
    return Taps(
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

    def taps(self, shape: tuple[int, ...], *, spacing: tuple[float, float, float]) -> tuple[Taps, Taps, Taps]:
        """Taps along X, Y and Z of a volume of this shape and voxel size (mm)."""
        if self.spacing is None:
            make = area_taps if self.interpolation == "area" else trilinear_taps
            x, y, z = (make(size, new) for size, new in zip(shape[:3], self.image_size, strict=True))
        else:
            x, y, z = (
                spaced_taps(size, new, spacing=step, new_spacing=new_step)
                for size, new, step, new_step in zip(shape[:3], self.image_size, spacing, self.spacing, strict=True)
            )
        return x, y, z


def resample(
    frames: torch.Tensor, *, spacing: tuple[float, float, float], grid: Grid, is_masked: bool = False
) -> torch.Tensor:
    """Resample frames in memory.

    Args:
        frames: (T, C, X, Y, Z) float32, RAS+.
        spacing: Voxel size of the frames in mm.
        grid: The grid to make.
        is_masked: Whether the background is exactly 0: voxels outside of the field of view then are 0, too. Otherwise
            they take the minimum of their channel.

    Returns:
        (T, C, *grid.image_size) float32.
    """
    values = frames.numpy()
    taps = grid.taps(values.shape[2:], spacing=spacing)
    result = np.empty((*values.shape[:2], *grid.image_size), dtype=np.float32)
    for source, target in zip(values.reshape(-1, *values.shape[2:]), result.reshape(-1, *grid.image_size), strict=True):
        target[...] = resample_slices(iter([source]), taps, convert=_copy)
    if not is_masked:
        for channel in range(values.shape[1]):
            fill_outside(result[:, channel], taps, low=float(values[:, channel].min()))
    return torch.from_numpy(result)


def _copy(stored: np.ndarray, plane: np.ndarray, index: int) -> None:  # noqa: ARG001
    plane[...] = stored


def fill_outside(volumes: np.ndarray, taps: tuple[Taps, Taps, Taps], *, low: float) -> None:
    """Add `low` to the volumes (..., X, Y, Z), in place, by as much as each voxel lies outside of the field of view."""
    x, y, z = (each.inside for each in taps)
    if all((each == 1).all() for each in (x, y, z)):
        return
    volumes += np.float32(low) * (1 - x[:, None, None] * y[:, None] * z)


def resample_slices(
    blocks: Iterator[np.ndarray],
    taps: tuple[Taps, Taps, Taps],
    *,
    convert: Convert,
) -> np.ndarray:
    """Resample one volume whose slices come one after another; those that no new slice needs any more are let go.

    Args:
        blocks: Slices (n, N1, N2) in order, any number at a time; no more are taken than the volume has.
        taps: Along N0 (the slices), N1 and N2.
        convert: See `Convert`; asked about slices that are needed alone.

    Returns:
        (M0, M1, M2) float32.
    """
    along, rows, columns = taps
    order = _Order(along)
    planes = _Planes((rows.size, columns.size), convert=convert)
    result = np.zeros((len(along), len(columns), len(rows)), dtype=np.float32)
    position = 0
    while position < along.size:
        block = next(blocks)
        # Slice by slice, so that one is still in the processor's cache when it is used.
        for index, stored in enumerate(block, start=position):
            if order.is_needed[index]:
                planes.keep(index, stored)
            for row in order.ready_after[index]:
                mixed = planes.mix(along.indices[row], along.weights[row])
                result[row] = _resample_plane(mixed, rows=rows, columns=columns)
            planes.let_go(before=int(order.oldest_after[index]))
        position += len(block)
    return result.transpose(0, 2, 1)


class _Order:
    """When each old slice is needed, and which new ones are ready after it."""

    def __init__(self, along: Taps) -> None:
        is_used = along.weights != 0
        self.is_needed = np.zeros(along.size, dtype=bool)
        self.is_needed[along.indices[is_used]] = True
        self.ready_after: list[list[int]] = [[] for _ in range(along.size)]
        # oldest_after[i]: the first slice that something after slice i still needs.
        self.oldest_after = np.arange(1, along.size + 1)
        for row, used in enumerate(is_used):
            if used.any():
                first, last = along.indices[row][used].min(), along.indices[row][used].max()
                self.ready_after[last].append(row)
                self.oldest_after[first:last] = np.minimum(self.oldest_after[first:last], first)


class _Planes:
    """The old slices that are still needed, in memory that is used again: new memory costs more than the arithmetic."""

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

    def let_go(self, *, before: int) -> None:
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


def _resample_plane(plane: np.ndarray, *, rows: Taps, columns: Taps) -> np.ndarray:
    """A plane (N1, N2) on its new grid, turned: (M2, M1)."""
    # Whole rows are gathered faster than single elements, so the plane is turned between its two axes.
    turned = np.ascontiguousarray(_gather(plane, rows).T)
    return _gather(turned, columns)


def _gather(plane: np.ndarray, taps: Taps) -> np.ndarray:
    total = plane[taps.indices[:, 0]]
    total *= taps.weights[:, :1]
    for k in range(1, taps.indices.shape[1]):
        part = plane[taps.indices[:, k]]
        part *= taps.weights[:, k : k + 1]
        total += part
    return np.asarray(total)
