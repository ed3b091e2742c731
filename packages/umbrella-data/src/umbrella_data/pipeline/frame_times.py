"""Where the frames of a window of `window_seconds` are in a series with its own repetition time."""

from __future__ import annotations

from os import PathLike

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.header import REPETITION_TIME_LIMITS, ScanHeader
from umbrella_data.scan.reader import open_scan
from umbrella_data.scan.sidecar import repetition_time

# Of a frame; headers have repetition times to 1e-6 s.
_TOLERANCE = 1e-3


def check_window_seconds(window_seconds: float, *, num_frames: int) -> None:
    """Check that the frames of a window have a plausible repetition time.

    Args:
        window_seconds: Seconds that the window covers.
        num_frames: Its frames T.

    Raises:
        ValueError: If it is not a repetition time that a series may have, as with milliseconds.
    """
    low, high = REPETITION_TIME_LIMITS
    seconds = window_seconds / num_frames
    if not low <= seconds <= high:
        raise ValueError(
            f"window_seconds: {window_seconds:g} s for {num_frames} frames is one every {seconds:g} s; it must be one "
            f"every {low:g} to {high:g} s"
        )


def frame_positions(
    path: str | PathLike[str], *, window_seconds: float, num_frames: int, header: ScanHeader | None = None
) -> np.ndarray:
    """Where the T frames of a window are, in frames of the series from the first one: (T,) float64.

    Args:
        path: The series.
        window_seconds: Seconds that the window covers.
        num_frames: Its frames T.
        header: The header of the series; None reads it.

    Raises:
        ScanError: `repetition_time` if that of the series is unknown.
    """
    if header is None:
        with open_scan(path) as stored:
            header = stored.header
    seconds = repetition_time(path, header).seconds
    if seconds is None:
        raise ScanError(
            "no usable repetition time in its header or sidecar, which window_seconds needs: write RepetitionTime, in "
            "seconds, into its .json file",
            path=path,
            reason=ScanReason.REPETITION_TIME,
        )
    positions = np.arange(num_frames) * (window_seconds / num_frames / seconds)
    # Rounding errors must not turn a window of 24 frames into one of 25.
    whole = positions.round()
    return np.where(np.abs(positions - whole) < _TOLERANCE, whole, positions)
