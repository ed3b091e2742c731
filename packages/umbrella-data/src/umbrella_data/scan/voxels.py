"""A file read whole or in windows: real values in RAS+, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.brain_mask import check_contrast, clear_outside, no_contrast, read_mask
from umbrella_data.scan.geometry import Reorientation
from umbrella_data.scan.header import ScanHeader
from umbrella_data.scan.reader import StoredScan, open_scan
from umbrella_data.scan.scaling import ValueRange, write_real_values

MAX_VOXELS = 1 << 30
"""The most voxels read at once by default: 4 GiB in float32, a diffusion series of 288 volumes at 1.25 mm."""

MAX_SERIES_VOXELS = 1 << 32
"""The most voxels of a series that is prepared for the cache, which never stands in memory: 16 GiB on disk while it is
written. A header that says more is damaged, or worse."""


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """Frames of one file.

    Attributes:
        frames: (T, X, Y, Z) float32, RAS+; T is 1 for a volume. Frame lies after frame in memory, and within one the
            axes in the file's order.
        affine: (4, 4) float64, index of a RAS+ voxel to world mm.
        spacing: Voxel size in mm along X, Y, Z of RAS+.
        header: As stored.
    """

    frames: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, float, float]
    header: ScanHeader


def read_voxels(
    path: str | PathLike[str],
    *,
    rank: int,
    window: tuple[int, int] | None = None,
    max_voxels: int = MAX_VOXELS,
    index_folder: Path | None = None,
    mask: str | PathLike[str] | None = None,
) -> Voxels:
    """Read a file strictly.

    Args:
        path: A `.nii` or `.nii.gz` file.
        rank: 3 for a volume, 4 for a series; the file must have it.
        window: First frame and number of frames of a series; None reads all.
        max_voxels: The most voxels to read.
        index_folder: Folder of access points into `.nii.gz` series, see `open_scan`.
        mask: The scan's brain mask: voxels outside are 0, whatever finite value the file has there. NaN is refused
            there, too: who wrote the file lost something, and the mask does not say what.

    Raises:
        ScanError: With the file's path and a reason code.
    """
    with open_scan(path, index_folder=index_folder) as scan:
        header = scan.header
        check_rank(header, rank=rank, path=scan.path)
        first, count = checked_window(header, window, max_voxels=max_voxels, path=scan.path)
        turn = Reorientation(header.affine, path=scan.path)
        inside = None if mask is None else read_mask(mask, like=header)
        frames = _read_frames(scan, turn, first=first, count=count, inside=inside)
    return Voxels(
        frames=frames,
        affine=turn.affine(header.shape),
        spacing=turn.spacing(header.spacing),
        header=header,
    )


def _read_frames(
    scan: StoredScan, turn: Reorientation, *, first: int, count: int, inside: np.ndarray | None
) -> np.ndarray:
    """Frames (T, X, Y, Z) float32 in RAS+, checked; 0 outside of a mask (X, Y, Z) along the stored axes."""
    header = scan.header
    x, y, z = header.shape[:3]
    # Axes stay where the file has them, and only their directions are turned: to move them would take longer than
    # to read them.
    frames = np.empty((count, z, y, x), dtype=np.float32)
    flips = dict(zip(turn.order, turn.flips, strict=True))
    target = frames[(slice(None), *(slice(None, None, -1 if flips[axis] else 1) for axis in (2, 1, 0)))]
    values = ValueRange(header)
    position = 0
    for block in scan.iter_slices(first, count):
        values.add(block)
        frame, row = divmod(position, z)
        real = target[frame, row : row + len(block)]
        write_real_values(block, real, header=header)
        clear_outside(real, inside, first=row)
        position += len(block)
    values.check(path=scan.path)
    if inside is not None:
        check_contrast(frames, path=scan.path)
    return frames.transpose(0, 3, 2, 1).transpose(0, *(axis + 1 for axis in turn.order))


def verify_voxels(
    path: str | PathLike[str],
    *,
    rank: int,
    mask: str | PathLike[str] | None = None,
    index_folder: Path | None = None,
) -> None:
    """Check all frames of a file as `read_voxels` does, in one pass, and keep none: a few slices stand in memory.

    Args:
        path: A `.nii` or `.nii.gz` file.
        rank: 3 for a volume, 4 for a series; the file must have it.
        mask: The scan's brain mask.
        index_folder: Where to build the index of a long `.nii.gz` series, in another pass.

    Raises:
        ScanError: As `read_voxels`.
    """
    with open_scan(path, index_folder=index_folder) as scan:
        header = scan.header
        check_rank(header, rank=rank, path=scan.path)
        inside = None if mask is None else read_mask(mask, like=header)
        values = ValueRange(header)
        is_empty = inside is not None
        row, num_rows = 0, header.shape[2]
        for block in scan.iter_slices(0, header.num_frames):
            values.add(block)
            # Outside of a mask is 0: any other value inside is a contrast.
            if is_empty:
                real = np.empty(block.shape, dtype=np.float32)
                write_real_values(block, real, header=header)
                clear_outside(real, inside, first=row)
                is_empty = not real.any()
            row = (row + len(block)) % num_rows
        values.check(path=scan.path)
        if is_empty:
            raise no_contrast(0, path=scan.path)
        scan.ensure_index()


def checked_window(
    header: ScanHeader, window: tuple[int, int] | None, *, max_voxels: int, path: str
) -> tuple[int, int]:
    """First frame and number of frames to read.

    Raises:
        ScanError: `window` where they are not there, `too_large` where they are too many.
    """
    first, count = window if window is not None else (0, header.num_frames)
    if first < 0 or count < 1 or first + count > header.num_frames:
        raise ScanError(
            f"frames {first} to {first + count - 1} were asked for; the series has {header.num_frames}",
            path=path,
            reason=ScanReason.WINDOW,
        )
    check_size((*header.shape[:3], count), max_voxels=max_voxels, path=path)
    return first, count


def check_size(shape: tuple[int, ...], *, max_voxels: int, path: str) -> None:
    """Refuse what has too many voxels.

    Raises:
        ScanError: With the reason `too_large`.
    """
    num_voxels = math.prod(shape)
    if num_voxels > max_voxels:
        raise ScanError(
            f"{num_voxels} voxels (shape {shape}) are more than max_voxels = {max_voxels}",
            path=path,
            reason=ScanReason.TOO_LARGE,
        )


def check_rank(header: ScanHeader, *, rank: int, path: str) -> None:
    """Refuse a volume where a series is needed, and the other way round.

    Raises:
        ScanError: With the reason `rank`.
    """
    if len(header.shape) != rank:
        needed = "a volume (X, Y, Z)" if rank == 3 else "a series (X, Y, Z, T) of at least 2 frames"
        raise ScanError(f"shape {header.shape}, but {needed} is needed here", path=path, reason=ScanReason.RANK)
