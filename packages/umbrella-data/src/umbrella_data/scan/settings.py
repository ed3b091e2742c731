"""Settings of how scans are read, which configurations have too: imports no numpy."""

from typing import Literal

NonFinite = Literal["reject", "outside_mask", "zero"]
"""What to do with voxels that are NaN or infinite in float32.

- `reject`: the scan cannot be used.
- `outside_mask`: outside of the scan's brain mask, where every voxel becomes 0, they are accepted with a warning;
  inside, and in a scan without a mask, they are rejected.
- `zero`: they become 0, with a warning.
"""

MAX_B = 1500.0
"""Default largest b-value (s/mm2) that a tensor is fitted on. Above it, the signal is not mono-exponential: kurtosis
changes FA (Jensen and Helpern, NMR Biomed 2010)."""

B0_THRESHOLD = 50.0
"""Volumes with b up to this (s/mm2) count as b0 by default: scanners write 5 or 1.25 for 0."""

MAX_ACCEPTED_B = 30_000.0
"""Largest accepted b-value in s/mm2; human scanners reach about 20,000."""


def check_b_limits(*, max_b: float, b0_threshold: float) -> None:
    """Check the two settings of a fit, in s/mm2.

    Raises:
        ValueError: If `b0_threshold` is negative or not below `max_b`.
    """
    if not 0 <= b0_threshold < max_b:
        raise ValueError(f"b0_threshold is {b0_threshold:g}: it must be at least 0, and below max_b ({max_b:g})")
