"""Affines, voxel sizes and reorientation to RAS+: axes are permuted and flipped, voxels are never interpolated."""

from __future__ import annotations

from itertools import product

import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation

from umbrella_data.errors import ScanError, ScanReason

SPACING_LIMITS = (0.01, 100.0)
"""Voxel sizes in mm that a scan of a head can have; anything else is a wrong unit or a damaged header."""

MAX_GRID_SHIFT = 0.05
"""Largest distance between the grids of two files that count as one grid, as a fraction of the smallest voxel edge:
affines are stored as float32 or quaternions, and tools write them with few digits."""


def grid_shift(affine: np.ndarray, other: np.ndarray, *, shape: tuple[int, ...]) -> float:
    """Largest distance in mm between the corners of a grid of this shape (X, Y, Z) under two affines (4, 4).

    Affines with similar elements can place the far end of a long grid differently.
    """
    corners = np.array([[*corner, 1] for corner in product(*((0, size - 1) for size in shape[:3]))], dtype=np.float64)
    return float(np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1).max())


def is_same_grid(affine: np.ndarray, other: np.ndarray, *, shape: tuple[int, ...]) -> bool:
    """Whether two affines (4, 4) place a grid of this shape (X, Y, Z) alike, see `MAX_GRID_SHIFT`."""
    edge = float(np.linalg.norm(affine[:3, :3], axis=0).min())
    return grid_shift(affine, other, shape=shape) <= MAX_GRID_SHIFT * edge


def check_affine(affine: np.ndarray, *, path: str) -> None:
    """Reject an affine (4, 4) that is not finite or not invertible.

    Raises:
        ScanError: With the reason `affine`.
    """
    if not np.isfinite(affine).all():
        raise _affine_error("the affine has values that are not finite", path=path)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # Volume spanned by the three unit vectors: 1 for right angles, 0 if they are in one plane.
    if (lengths == 0).any() or abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise _affine_error("the affine cannot be inverted, because its axes are in one plane", path=path)


def _affine_error(problem: str, *, path: str) -> ScanError:
    return ScanError(f"{problem}: set sform or qform again", path=path, reason=ScanReason.AFFINE)


def spacing_of(affine: np.ndarray, *, path: str) -> tuple[float, float, float]:
    """Voxel size in mm along each axis of an affine (4, 4).

    Raises:
        ScanError: `spacing`, if it is outside of `SPACING_LIMITS`.
    """
    # Rounded to 0.1 um: float32 and quaternions are inexact, and one scan stored in two axis orders must agree.
    x, y, z = (round(float(length), 4) for length in np.linalg.norm(affine[:3, :3], axis=0))
    low, high = SPACING_LIMITS
    if not (low <= min(x, y, z) and max(x, y, z) <= high):
        raise ScanError(
            f"voxels of {x:g} x {y:g} x {z:g} mm: must be {low:g} to {high:g} mm; check the affine and its unit",
            path=path,
            reason=ScanReason.SPACING,
        )
    return x, y, z


class Reorientation:
    """The permutation and flips from the stored axes to the nearest RAS+ axes.

    Args:
        affine: (4, 4), of the stored axes; checked by `check_affine`.
        path: The file's name for errors.

    Attributes:
        order: The stored axis that becomes axis 0, 1 and 2 of RAS+.
        flips: Whether that stored axis is reversed.

    Raises:
        ScanError: `affine`, if two axes have the same nearest RAS+ axis.
    """

    def __init__(self, affine: np.ndarray, *, path: str) -> None:
        self._ornt = io_orientation(affine)
        if not np.isfinite(self._ornt).all():
            raise _affine_error("two axes of the affine point in the same direction", path=path)
        self.order: tuple[int, int, int] = tuple(int(axis) for axis in np.argsort(self._ornt[:, 0]))  # type: ignore[assignment]
        self.flips: tuple[bool, bool, bool] = tuple(bool(self._ornt[axis, 1] < 0) for axis in self.order)  # type: ignore[assignment]
        self._affine = affine

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes along RAS+ of a stored shape (X, Y, Z) or (X, Y, Z, T)."""
        return (*(shape[axis] for axis in self.order), *shape[3:])

    def spacing(self, spacing: tuple[float, float, float]) -> tuple[float, float, float]:
        """Voxel sizes in mm along RAS+, from those along the stored axes."""
        x, y, z = (spacing[axis] for axis in self.order)
        return x, y, z

    def affine(self, shape: tuple[int, ...]) -> np.ndarray:
        """The affine (4, 4) of the reoriented volume, for a stored shape."""
        return np.asarray(self._affine @ inv_ornt_aff(self._ornt, shape[:3]), dtype=np.float64)
