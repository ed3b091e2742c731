"""Resample a file to the model's grid while it is read, slice by slice, without a float copy of its volumes.

    .nii or .nii.gz -> checked slices, as stored -> separable resampling -> (T, X, Y, Z) float32, RAS+

A slice is scaled, masked and resampled while it is in the processor's cache. The result equals that of `read_voxels`
followed by `resample`, up to rounding (a test compares them to 1e-6).
"""

from __future__ import annotations

import errno
import logging
import math
import mmap
import os
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from umbrella_data.cache.entry import unusable
from umbrella_data.pipeline.resample import AxisWeights, Centre, Grid, fill_outside, resample_slices
from umbrella_data.scan.geometry import Reorientation
from umbrella_data.scan.reader import StoredScan
from umbrella_data.scan.settings import NonFinite
from umbrella_data.scan.voxels import MAX_VOXELS, FrameReader, check_size

logger = logging.getLogger(__name__)

MAX_IN_MEMORY = 1 << 28
"""The most voxels kept in memory: 1 GiB in float32, 300 frames of 96^3."""
# Zeros written at a time.
_WRITTEN_BYTES = 1 << 20


def read_resampled(
    scan: StoredScan,
    *,
    rank: int,
    grid: Grid,
    window: tuple[int, int] | None = None,
    max_voxels: int = MAX_VOXELS,
    mask: Path | None = None,
    is_masked: bool = False,
    non_finite: NonFinite = "outside_mask",
    centre: Centre = None,
    folder: Path | None = None,
) -> np.ndarray:
    """Read frames on the model's grid.

    Args:
        scan: An open scan.
        rank: 3 for a volume, 4 for a series; the file must have it.
        grid: The grid of the result; voxels outside of the field of view have the minimum of the frames read, or 0 if
            the scan is masked.
        window: First frame and number of frames of a series; None reads all.
        max_voxels: The most voxels to read, and of the result.
        mask: The scan's brain mask: voxels outside are 0.
        is_masked: Whether the file's own background is exactly 0.
        non_finite: What to do with voxels that are not finite.
        centre: See `Grid.weights`.
        folder: Folder for frames that do not fit into memory, see `empty_frames`.

    Returns:
        (T, *grid.image_size) float32, RAS+; T is 1 for a volume.

    Raises:
        ScanError: As `umbrella_data.scan.voxels.FrameReader`.
    """
    reader = FrameReader(scan, rank=rank, window=window, max_voxels=max_voxels, mask=mask, non_finite=non_finite)
    shape = (reader.count, *grid.image_size)
    check_size(shape, max_voxels=max_voxels, path=scan.path)
    frames = empty_frames(shape, folder=folder)
    header, turn = reader.header, reader.orientation
    weights = grid.weights(turn.shape(header.shape), spacing=turn.spacing(header.spacing), centre=centre)
    x, y, z = _as_stored(weights, turn)
    slices = reader.iter_slices()
    # value_range reports values that are not finite, once all are counted.
    with np.errstate(invalid="ignore", over="ignore"):
        for frame in frames:
            # Slices run along the last stored axis, rows along the second, columns along the first.
            resampled = resample_slices(slices, (z, y, x), convert=reader.write_real)
            frame[...] = resampled.transpose(2, 1, 0).transpose(turn.order)
    next(slices, None)  # the file is validated at its end
    low, _ = reader.value_range()
    if reader.num_zeroed:
        warn_of_zeroed()
    if not (is_masked or reader.has_mask):
        fill_outside(frames, weights, low=low)
    if reader.has_mask:
        reader.check_contrast(float(frames.min()), float(frames.max()))
    return frames


@lru_cache
def warn_of_zeroed() -> None:
    """Warn of voxels that are not finite, once per process: most scans of a cohort may have some outside of a mask."""
    logger.warning(
        "voxels of a scan, and maybe of others, are NaN or infinite and read as 0, as non_finite says; umbrella-data "
        "check counts such scans (non_finite_zeroed)"
    )


def empty_frames(shape: tuple[int, ...], *, folder: Path | None) -> np.ndarray:
    """Allocate frames (T, X, Y, Z) float32 in memory or, above `MAX_IN_MEMORY` voxels, in a temporary file.

    Args:
        shape: The shape of all frames.
        folder: Folder of the temporary file, which is removed with the array, even if the process is killed. None
            allocates any number in memory.

    Raises:
        CacheError: If the folder has not enough space.
    """
    num_voxels = math.prod(shape)
    if folder is None or num_voxels <= MAX_IN_MEMORY:
        return np.empty(shape, dtype=np.float32)
    num_bytes = num_voxels * np.dtype(np.float32).itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _allocate(file, num_bytes, folder=folder)
            return np.frombuffer(mmap.mmap(file.fileno(), num_bytes), dtype=np.float32).reshape(shape)
    except OSError as error:
        # Not an OSError, which would be reported as an error of the open scan.
        raise unusable(folder, error) from error


def _allocate(file: IO[bytes], num_bytes: int, *, folder: Path) -> None:
    """Allocate all blocks now: if the disk is full when a mapped page is written, the process is killed."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return
    # macOS: zeros are written. Not to a disk that they would fill first.
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    zeros = memoryview(bytes(_WRITTEN_BYTES))
    for start in range(0, num_bytes, _WRITTEN_BYTES):
        file.write(zeros[: num_bytes - start])
    file.flush()


def _as_stored(
    weights: tuple[AxisWeights, AxisWeights, AxisWeights], turn: Reorientation
) -> tuple[AxisWeights, AxisWeights, AxisWeights]:
    """Weights along the stored axes, from those along RAS+."""
    along = dict(zip(turn.order, zip(weights, turn.flips, strict=True), strict=True))
    x, y, z = (each.flipped() if flip else each for each, flip in (along[axis] for axis in range(3)))
    return x, y, z
