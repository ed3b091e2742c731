"""What to do with NaN and infinite voxels. Imports nothing: configurations have it too."""

from typing import Literal

NonFinite = Literal["reject", "outside_mask", "zero"]
"""What to do with voxels that are NaN or infinite in float32.

- `reject`: the scan cannot be used.
- `outside_mask`: outside of the scan's brain mask, where every voxel becomes 0, they are accepted with a warning;
  inside, and in a scan without a mask, they are rejected.
- `zero`: they become 0, with a warning.
"""
