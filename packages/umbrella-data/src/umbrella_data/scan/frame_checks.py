"""Validates all frames of a file in one pass, and finds frames that a scanner or a conversion has lost."""

from __future__ import annotations

import math
import zlib
from os import PathLike
from pathlib import Path

import numpy as np

from umbrella_data.scan.header import ScanWarning
from umbrella_data.scan.reader import open_scan
from umbrella_data.scan.settings import NonFinite
from umbrella_data.scan.voxels import FrameReader, zeroed_warning

_MIN_REPEATED = 3
"""Consecutive identical frames that are suspicious: two could be the same by rounding in a short series."""


class FrameChecks:
    """Finds empty and repeated frames of a series, from stored values in the order of the file.

    Args:
        num_values: Number of values of a frame.
    """

    def __init__(self, num_values: int) -> None:
        self._num_values = num_values
        self._num_read = 0
        self._sum = 0
        self._limits: list[float] = []
        self._last_sum: int | None = None
        self._num_same = 1
        self.has_empty = False
        self.has_repeated = False

    def add(self, block: np.ndarray) -> None:
        """Add the next values, at most up to the end of a frame."""
        self._sum = zlib.crc32(np.ascontiguousarray(block).data.cast("B"), self._sum)
        limits = [float(block.min()), float(block.max())]
        if not all(map(math.isfinite, limits)):  # NaN outside of a mask, or read as 0
            finite = block[np.isfinite(block)]
            limits = [float(finite.min()), float(finite.max())] if finite.size else []
        self._limits += limits
        self._num_read += block.size
        if self._num_read < self._num_values:
            return
        is_empty = not self._limits or min(self._limits) == max(self._limits)
        is_same = not is_empty and self._sum == self._last_sum
        self._num_same = self._num_same + 1 if is_same else 1
        self.has_empty |= is_empty
        self.has_repeated |= self._num_same >= _MIN_REPEATED
        self._last_sum, self._sum, self._num_read, self._limits = self._sum, 0, 0, []

    @property
    def warnings(self) -> tuple[ScanWarning, ...]:
        """The codes of what was found."""
        found = {ScanWarning.EMPTY_FRAMES: self.has_empty, ScanWarning.REPEATED_FRAMES: self.has_repeated}
        return tuple(code for code, is_found in found.items() if is_found)


def verify_voxels(
    path: str | PathLike[str],
    *,
    rank: int,
    mask: str | PathLike[str] | None = None,
    index_folder: Path | None = None,
    non_finite: NonFinite = "outside_mask",
) -> tuple[ScanWarning, ...]:
    """Check all frames of a file in one pass, in the memory of a few slices.

    Args:
        path: A `.nii` or `.nii.gz` file.
        rank: 3 for a volume, 4 for a series; the file must have it.
        mask: The scan's brain mask.
        index_folder: Where to build an index of a long `.nii.gz` series.
        non_finite: What to do with voxels that are not finite.

    Returns:
        Warnings about the voxels.

    Raises:
        ScanError: As `read_voxels`.
    """
    with open_scan(path, index_folder=index_folder) as scan:
        shape = scan.header.shape
        reader = FrameReader(scan, rank=rank, max_voxels=math.prod(shape), mask=mask, non_finite=non_finite)
        checks = FrameChecks(math.prod(shape[:3]))
        has_contrast, row = not reader.has_mask, 0
        for block in reader.iter_slices():
            checks.add(block)
            # Voxels outside of a mask are 0: any other value is contrast.
            if not has_contrast:
                real = np.empty(block.shape, dtype=np.float32)
                reader.write_real(block, real, row)
                has_contrast = bool(real.any())
            row = (row + len(block)) % shape[2]
        reader.value_range()
        if not has_contrast:
            reader.check_contrast(0.0, 0.0)
        scan.ensure_index()
    return (*(checks.warnings if rank == 4 else ()), *zeroed_warning(reader.num_zeroed))
