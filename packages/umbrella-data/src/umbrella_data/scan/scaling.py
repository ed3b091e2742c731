"""From stored to real values: scaling, and the checks on the values themselves."""

from __future__ import annotations

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.header import ScanHeader


class ValueRange:
    """The least and the greatest of the stored values seen so far; a NaN stays.

    Scaling keeps their order or, where the slope is negative, turns it round: either way the two decide for all voxels
    whether they are finite and whether they differ, without a float copy of the volume.
    """

    def __init__(self, header: ScanHeader) -> None:
        self._header = header
        self._limits: list[np.generic] = []
        self._num_wrong = 0

    def add(self, stored: np.ndarray) -> None:
        """Look at stored values."""
        # Minimum and maximum carry a NaN along: no temporary array of truth values.
        limits = [stored.min(), stored.max()]
        self._limits += limits
        if not np.isfinite(self._scaled(limits)).all():
            self._num_wrong += int(stored.size - np.isfinite(self._scaled(stored)).sum())

    def check(self, *, path: str) -> tuple[float, float]:
        """The least and the greatest value.

        Raises:
            ScanError: `non_finite` where a value is not finite in float32, or `constant` where all are the same.
        """
        if self._num_wrong:
            raise ScanError(
                f"{self._num_wrong} voxels are NaN or infinite in float32; masked voxels should be 0",
                path=path,
                reason=ScanReason.NON_FINITE,
            )
        values = self._scaled(self._limits)
        low, high = float(values.min()), float(values.max())
        if low == high:
            raise ScanError(f"every voxel is {low:g}: there is no image", path=path, reason=ScanReason.CONSTANT)
        return low, high

    def _scaled(self, stored: np.ndarray | list[np.generic]) -> np.ndarray:
        array = np.asarray(stored)
        values = np.empty(array.shape, dtype=np.float32)
        write_real_values(array, values, header=self._header)
        return values


def write_real_values(stored: np.ndarray, target: np.ndarray, *, header: ScanHeader) -> None:
    """Scale stored values into a float32 array of the same shape."""
    with np.errstate(over="ignore", invalid="ignore"):
        if header.slope == 1.0 and header.inter == 0.0:
            target[...] = stored
        else:
            target[...] = stored.astype(np.float64) * header.slope + header.inter
