"""Checked real values of a scan's frames, in RAS+: one reader for volumes, series, diffusion data and validation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.geometry import Reorientation, grid_shift, is_same_grid
from umbrella_data.scan.header import ScanHeader, ScanWarning
from umbrella_data.scan.reader import StoredScan, open_scan
from umbrella_data.scan.settings import NonFinite

MAX_VOXELS = 1 << 30
"""Default limit of voxels read at once: 4 GiB in float32, a diffusion series of 288 volumes at 1.25 mm."""

MAX_SERIES_VOXELS = 1 << 32
"""Limit of voxels of a series that is prepared for the cache, which is written to disk as it is read: 16 GiB. A header
that declares more is damaged or malicious."""


class FrameReader:
    """Reads frames of an open scan slice by slice; every stored value is checked.

    Args:
        scan: The scan.
        rank: 3 for a volume, 4 for a series; the file must have it.
        window: First frame and number of frames of a series; None reads all.
        max_voxels: The most voxels to read.
        mask: The scan's brain mask: values outside are 0.
        non_finite: What to do with voxels that are not finite.

    Attributes:
        header: The scan's header.
        orientation: Permutation and flips from the stored axes to RAS+.
        first: First frame.
        count: Number of frames.
        has_mask: Whether there is a mask.
        num_zeroed: Voxels read so far that are not finite, and become 0.

    Raises:
        ScanError: `rank`, `window`, `too_large`, `affine`, or what is wrong with the mask.
    """

    def __init__(
        self,
        scan: StoredScan,
        *,
        rank: int,
        window: tuple[int, int] | None = None,
        max_voxels: int = MAX_VOXELS,
        mask: str | PathLike[str] | None = None,
        non_finite: NonFinite = "outside_mask",
    ) -> None:
        self.header = header = scan.header
        self._scan = scan
        check_rank(header, rank=rank, path=scan.path)
        self.first, self.count = window if window is not None else (0, header.num_frames)
        if self.first < 0 or self.count < 1 or self.first + self.count > header.num_frames:
            last = self.first + self.count - 1
            text = f"frames {self.first} to {last} are requested; the series has {header.num_frames}"
            raise ScanError(text, path=scan.path, reason=ScanReason.WINDOW)
        check_size((*header.shape[:3], self.count), max_voxels=max_voxels, path=scan.path)
        self.orientation = Reorientation(header.affine, path=scan.path)
        self.has_mask = mask is not None
        # (Z, Y, X) along the stored axes.
        self._outside = None if mask is None else ~_read_mask(mask, like=header).T
        self._non_finite = non_finite
        self._limits: list[np.generic] = []
        self._num_rejected = 0
        self.num_zeroed = 0

    def iter_slices(self) -> Iterator[np.ndarray]:
        """Stored slices, in order; the file is validated once the iterator is exhausted.

        Yields:
            (n, Y, X) along the stored axes, in the stored type: neighbouring slices of one frame. Each block
            overwrites the one before.

        Raises:
            ScanError: As `StoredScan.iter_slices`.
        """
        row = 0
        for block in self._scan.iter_slices(self.first, self.count):
            # Minimum and maximum propagate a NaN, without a temporary array of booleans.
            limits = [block.min(), block.max()]
            if not np.isfinite(self._scaled(limits)).all():
                limits = self._limits_of_finite(block, row)
            self._limits += limits
            yield block
            row = (row + len(block)) % self.header.shape[2]

    def _limits_of_finite(self, block: np.ndarray, row: int) -> list[np.generic]:
        """Count the voxels of stored slices that are not finite; return the limits of the others."""
        is_finite = np.isfinite(self._scaled(block))
        is_accepted = np.full(block.shape, self._non_finite == "zero")
        if self._outside is not None and self._non_finite != "reject":
            is_accepted |= self._outside[row : row + len(block)]
        self._num_rejected += int((~is_finite & ~is_accepted).sum())
        self.num_zeroed += int((~is_finite & is_accepted).sum())
        finite = block[is_finite]
        return [finite.min(), finite.max()] if finite.size else []

    def write_real(self, stored: np.ndarray, target: np.ndarray, row: int) -> None:
        """Write the real values of stored slices, 0 outside of the mask and where they are not finite but accepted.

        Args:
            stored: One slice (Y, X) or several (n, Y, X).
            target: float32 array of the same shape.
            row: Number of the (first) slice in its frame.
        """
        _scale(stored, target, header=self.header)
        if self._outside is not None:
            outside = self._outside[row] if stored.ndim == 2 else self._outside[row : row + len(stored)]
            np.copyto(target, 0, where=outside)
        if self.num_zeroed and self._non_finite == "zero":
            np.nan_to_num(target, copy=False, nan=0.0, posinf=0.0, neginf=0.0)

    def value_range(self) -> tuple[float, float]:
        """Least and greatest real value of the slices read so far, also outside of the mask.

        Scaling is monotonic: if the extremes of the stored values are finite, all values are, and only if the extremes
        are equal, all values are.

        Raises:
            ScanError: `non_finite` if a value is not finite in float32 and not accepted, or `constant` if all others
                are the same.
        """
        if self._num_rejected or not self._limits:
            where = " inside of the mask" if self.has_mask and self._non_finite == "outside_mask" else ""
            raise ScanError(
                f"{self._num_rejected or self.num_zeroed} voxels are NaN or infinite in float32{where}; repair the "
                "scan, or set non_finite: zero to read them as 0",
                path=self._scan.path,
                reason=ScanReason.NON_FINITE,
            )
        values = self._scaled(self._limits)
        low, high = float(values.min()), float(values.max())
        if low == high:
            is_whole = self.count == self.header.num_frames
            frames = "" if is_whole else f"of the frames {self.first} to {self.first + self.count - 1} "
            text = f"every voxel {frames}is {low:g}: no image there"
            raise ScanError(text, path=self._scan.path, reason=ScanReason.CONSTANT)
        return low, high

    def check_contrast(self, low: float, high: float) -> None:
        """Check that more than one value remains inside of the mask.

        Args:
            low: Least value once the mask is applied.
            high: Greatest value.

        Raises:
            ScanError: `constant`.
        """
        if self.has_mask and low == high:
            raise ScanError(
                f"every voxel is {low:g} once its mask is applied: the mask belongs to another scan, or is empty there",
                path=self._scan.path,
                reason=ScanReason.CONSTANT,
            )

    def _scaled(self, stored: np.ndarray | list[np.generic]) -> np.ndarray:
        array = np.asarray(stored)
        values = np.empty(array.shape, dtype=np.float32)
        _scale(array, values, header=self.header)
        return values


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """Frames of one file.

    Attributes:
        frames: (T, X, Y, Z) float32, RAS+; T is 1 for a volume. Frames are contiguous in memory, and within a frame the
            axes are in the file's order.
        affine: (4, 4) float64, index of a RAS+ voxel to world mm.
        spacing: Voxel size in mm along X, Y, Z of RAS+.
        header: As stored.
        num_zeroed: Number of voxels that are not finite in the file, and are 0 here.
    """

    frames: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, float, float]
    header: ScanHeader
    num_zeroed: int = 0


def read_voxels(
    path: str | PathLike[str],
    *,
    rank: int,
    window: tuple[int, int] | None = None,
    max_voxels: int = MAX_VOXELS,
    index_folder: Path | None = None,
    mask: str | PathLike[str] | None = None,
    non_finite: NonFinite = "outside_mask",
) -> Voxels:
    """Read a file into memory; arguments and errors are those of `open_scan` and `FrameReader`."""
    with open_scan(path, index_folder=index_folder) as scan:
        reader = FrameReader(scan, rank=rank, window=window, max_voxels=max_voxels, mask=mask, non_finite=non_finite)
        x, y, z = scan.header.shape[:3]
        turn = reader.orientation
        # In memory, axes are flipped but not permuted: permuting takes longer than reading.
        frames = np.empty((reader.count, z, y, x), dtype=np.float32)
        flips = dict(zip(turn.order, turn.flips, strict=True))
        target = frames[(slice(None), *(slice(None, None, -1 if flips[axis] else 1) for axis in (2, 1, 0)))]
        position = 0
        for block in reader.iter_slices():
            frame, row = divmod(position, z)
            reader.write_real(block, target[frame, row : row + len(block)], row)
            position += len(block)
        reader.value_range()
        if mask is not None:
            reader.check_contrast(float(frames.min()), float(frames.max()))
    return Voxels(
        frames=frames.transpose(0, 3, 2, 1).transpose(0, *(axis + 1 for axis in turn.order)),
        affine=turn.affine(scan.header.shape),
        spacing=turn.spacing(scan.header.spacing),
        header=scan.header,
        num_zeroed=reader.num_zeroed,
    )


def zeroed_warning(num_zeroed: int) -> tuple[ScanWarning, ...]:
    """The warning about voxels that are not finite and read as 0, if there are any."""
    return (ScanWarning.NON_FINITE,) if num_zeroed else ()


def check_size(shape: tuple[int, ...], *, max_voxels: int, path: str) -> None:
    """Reject a shape with too many voxels.

    Raises:
        ScanError: `too_large`.
    """
    num_voxels = math.prod(shape)
    if num_voxels > max_voxels:
        text = f"{num_voxels} voxels (shape {shape}) are more than max_voxels = {max_voxels}"
        raise ScanError(text, path=path, reason=ScanReason.TOO_LARGE)


def check_rank(header: ScanHeader, *, rank: int, path: str) -> None:
    """Reject a volume if a series is needed, and a series if a volume is needed.

    Raises:
        ScanError: `rank`.
    """
    if len(header.shape) != rank:
        needed = "a volume (X, Y, Z)" if rank == 3 else "a series (X, Y, Z, T) of at least 2 frames"
        raise ScanError(
            f"shape {header.shape}, but this modality needs {needed}; give another file, or the file's own modality",
            path=path,
            reason=ScanReason.RANK,
        )


def _scale(stored: np.ndarray, target: np.ndarray, *, header: ScanHeader) -> None:
    """Scale stored values into a float32 array of the same shape."""
    with np.errstate(over="ignore", invalid="ignore"):
        if header.slope == 1.0 and header.inter == 0.0:
            target[...] = stored
        else:
            target[...] = stored.astype(np.float64) * header.slope + header.inter


def _read_mask(path: str | PathLike[str], *, like: ScanHeader) -> np.ndarray:
    """Read a brain mask: a volume that is 0 outside of the brain and one other value inside.

    Args:
        path: The file.
        like: The header of its scan: both must be stored on one grid, axis by axis.

    Returns:
        (X, Y, Z) bool along the stored axes, in Fortran order.

    Raises:
        ScanError: If the file is damaged, or `mask` if it is not a mask of this scan.
    """
    with open_scan(path) as scan:
        header, shape = scan.header, like.shape[:3]
        problem = None
        if header.shape != shape:
            problem = f"shape {header.shape} differs from the scan's, {shape}"
        elif not is_same_grid(like.affine, header.affine, shape=shape):
            shift = grid_shift(like.affine, header.affine, shape=shape)
            problem = f"its affine places a corner {shift:.3g} mm away from the scan's"
        if problem is not None:
            text = f"{problem}: a mask must be stored on the grid of its scan; resample it"
            raise ScanError(text, path=scan.path, reason=ScanReason.MASK)
        reader = FrameReader(scan, rank=3, max_voxels=math.prod(shape), non_finite="reject")
        stored = np.concatenate([block.copy() for block in reader.iter_slices()]).transpose(2, 1, 0)
        low, high = reader.value_range()
    least, greatest = stored.min(), stored.max()
    if low != 0 or high <= 0 or not ((stored == least) | (stored == greatest)).all():
        raise ScanError(
            f"values from {low:g} to {high:g}: a mask must be 0 outside of the brain and one positive value inside; "
            "apply a threshold to a probability map or a segmentation",
            path=scan.path,
            reason=ScanReason.MASK,
        )
    # A negative slope inverts the order of the values.
    return np.asarray(stored == (least if header.slope < 0 else greatest))
