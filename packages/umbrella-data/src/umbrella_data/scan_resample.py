"""From a file straight to the model's grid, slice by slice: the fast way for volumes and for windows of series.

    .nii or .nii.gz -> slices as stored -> checks on all of them -> separable resampling -> (T, X, Y, Z) float32, RAS+

What `read_voxels` and `resample` do one after the other happens here while a slice is in the processor's cache. The
checks are the same, and so are the voxels, but for rounding (a test holds both to 1e-6).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from umbrella_data.brain_mask import check_contrast, clear_outside, read_mask
from umbrella_data.geometry import Reorientation
from umbrella_data.real_values import ValueRange, write_real_values
from umbrella_data.resample import Grid, Taps, fill_outside, resample_slices
from umbrella_data.scan_file import StoredScan
from umbrella_data.voxels import MAX_VOXELS, check_rank, checked_window


def read_resampled(
    scan: StoredScan,
    *,
    rank: int,
    grid: Grid,
    window: tuple[int, int] | None = None,
    max_voxels: int = MAX_VOXELS,
    mask: Path | None = None,
    is_masked: bool = False,
) -> np.ndarray:
    """Read frames on the model's grid.

    Args:
        scan: An open scan.
        rank: 3 for a volume, 4 for a series; the file must have it.
        grid: The grid to make; voxels outside of the field of view take the minimum of what was read, or 0 where the
            scan is masked.
        window: First frame and number of frames of a series; None reads all.
        max_voxels: The most voxels to read.
        mask: The scan's brain mask: all is 0 outside.
        is_masked: Whether the file's own background is exactly 0.

    Returns:
        (T, *grid.image_size) float32, RAS+; T is 1 for a volume.

    Raises:
        ScanError: As `umbrella_data.voxels.read_voxels`.
    """
    header = scan.header
    check_rank(header, rank=rank, path=scan.path)
    first, count = checked_window(header, window, max_voxels=max_voxels, path=scan.path)
    turn = Reorientation(header.affine, path=scan.path)
    taps = grid.taps(turn.shape(header.shape), spacing=turn.spacing(header.spacing))
    stored_taps = _as_stored(taps, turn)
    values = ValueRange(header)
    inside = None if mask is None else read_mask(mask, like=header)

    def convert(stored: np.ndarray, plane: np.ndarray) -> None:
        write_real_values(stored, plane, header=header)

    def copy(real: np.ndarray, plane: np.ndarray) -> None:
        plane[...] = real

    def looked_at() -> Iterator[np.ndarray]:
        position = 0
        for block in scan.iter_slices(first, count):
            values.add(block)
            if inside is None:
                yield block
                continue
            real = np.empty(block.shape, dtype=np.float32)
            write_real_values(block, real, header=header)
            clear_outside(real, inside, first=position % header.shape[2])
            position += len(block)
            yield real

    frames = np.empty((count, *grid.image_size), dtype=np.float32)
    pieces = looked_at()
    # Infinite voxels are refused below, when all are known.
    with np.errstate(invalid="ignore", over="ignore"):
        for frame in frames:
            # Slices run along the last stored axis, rows along the second, columns along the first.
            resampled = resample_slices(pieces, stored_taps[::-1], convert=convert if inside is None else copy)
            frame[...] = resampled.transpose(2, 1, 0).transpose(turn.order)
    # The file is proven by whoever reads to its end.
    next(pieces, None)
    low, _ = values.check(path=scan.path)
    if inside is not None:
        check_contrast(frames, path=scan.path)
    if inside is None and not is_masked:
        fill_outside(frames, taps, low=low)
    return frames


def _as_stored(taps: tuple[Taps, Taps, Taps], turn: Reorientation) -> tuple[Taps, Taps, Taps]:
    """Taps along the stored axes, of those along RAS+."""
    along = dict(zip(turn.order, zip(taps, turn.flips, strict=True), strict=True))
    x, y, z = (each.flipped() if flip else each for each, flip in (along[axis] for axis in range(3)))
    return x, y, z
