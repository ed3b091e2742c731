"""From a file straight to the model's grid, slice by slice: the fast way for volumes and for windows of series.

    .nii or .nii.gz -> slices as stored -> checks on all of them -> separable resampling -> (T, X, Y, Z) float32, RAS+

What `read_voxels` and `resample` do one after the other happens here while a slice is in the processor's cache. The
checks are the same, and so are the voxels, but for rounding (a test holds both to 1e-6).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from umbrella_data.pipeline.resample import Grid, Taps, fill_outside, resample_slices
from umbrella_data.pipeline.scratch import empty_frames
from umbrella_data.scan.brain_mask import check_contrast, read_mask
from umbrella_data.scan.geometry import Reorientation
from umbrella_data.scan.header import ScanHeader
from umbrella_data.scan.reader import StoredScan
from umbrella_data.scan.scaling import ValueRange, write_real_values
from umbrella_data.scan.voxels import MAX_VOXELS, check_rank, check_size, checked_window


def read_resampled(
    scan: StoredScan,
    *,
    rank: int,
    grid: Grid,
    window: tuple[int, int] | None = None,
    max_voxels: int = MAX_VOXELS,
    mask: Path | None = None,
    is_masked: bool = False,
    folder: Path | None = None,
) -> np.ndarray:
    """Read frames on the model's grid.

    Args:
        scan: An open scan.
        rank: 3 for a volume, 4 for a series; the file must have it.
        grid: The grid to make; voxels outside of the field of view take the minimum of what was read, or 0 where the
            scan is masked.
        window: First frame and number of frames of a series; None reads all.
        max_voxels: The most voxels to read, and to make.
        mask: The scan's brain mask: all is 0 outside.
        is_masked: Whether the file's own background is exactly 0.
        folder: Where frames are kept that are too many for memory, see `empty_frames`. No more than a few slices of
            the file are in memory at a time anyway.

    Returns:
        (T, *grid.image_size) float32, RAS+; T is 1 for a volume.

    Raises:
        ScanError: As `umbrella_data.scan.voxels.read_voxels`.
    """
    header = scan.header
    check_rank(header, rank=rank, path=scan.path)
    first, count = checked_window(header, window, max_voxels=max_voxels, path=scan.path)
    inside = None if mask is None else read_mask(mask, like=header)
    shape = (count, *grid.image_size)
    check_size(shape, max_voxels=max_voxels, path=scan.path)
    frames = empty_frames(shape, folder=folder)
    _resample_into(frames, scan, first=first, grid=grid, inside=inside, is_masked=is_masked or inside is not None)
    if inside is not None:
        check_contrast(frames, path=scan.path)
    return frames


def _resample_into(
    frames: np.ndarray, scan: StoredScan, *, first: int, grid: Grid, inside: np.ndarray | None, is_masked: bool
) -> None:
    """Fill frames (T, X, Y, Z) of RAS+ from those of the file from `first` on, every voxel of which is checked."""
    header = scan.header
    turn = Reorientation(header.affine, path=scan.path)
    taps = grid.taps(turn.shape(header.shape), spacing=turn.spacing(header.spacing))
    x, y, z = _as_stored(taps, turn)
    values = ValueRange(header)
    slices = _looked_at(scan.iter_slices(first, len(frames)), values)
    convert = _RealPlane(header, inside)
    # Infinite voxels are refused below, when all are known.
    with np.errstate(invalid="ignore", over="ignore"):
        for frame in frames:
            # Slices run along the last stored axis, rows along the second, columns along the first.
            resampled = resample_slices(slices, (z, y, x), convert=convert)
            frame[...] = resampled.transpose(2, 1, 0).transpose(turn.order)
    # The file is proven by whoever reads to its end.
    next(slices, None)
    low, _ = values.check(path=scan.path)
    if not is_masked:
        fill_outside(frames, taps, low=low)


def _looked_at(blocks: Iterator[np.ndarray], values: ValueRange) -> Iterator[np.ndarray]:
    for block in blocks:
        values.add(block)
        yield block


class _RealPlane:
    """The real values of one stored slice (Y, X), 0 outside of a mask (X, Y, Z) of stored axes."""

    def __init__(self, header: ScanHeader, inside: np.ndarray | None) -> None:
        self._header = header
        self._outside = None if inside is None else ~inside.T

    def __call__(self, stored: np.ndarray, plane: np.ndarray, index: int) -> None:
        write_real_values(stored, plane, header=self._header)
        if self._outside is not None:
            np.copyto(plane, 0, where=self._outside[index])


def _as_stored(taps: tuple[Taps, Taps, Taps], turn: Reorientation) -> tuple[Taps, Taps, Taps]:
    """Taps along the stored axes, of those along RAS+."""
    along = dict(zip(turn.order, zip(taps, turn.flips, strict=True), strict=True))
    x, y, z = (each.flipped() if flip else each for each, flip in (along[axis] for axis in range(3)))
    return x, y, z
