"""A scan read once from the first byte to the last, to know that it can be used; its voxels are not kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.modality import find_modality

if TYPE_CHECKING:
    from umbrella_data.header import ScanDoubt

# Series are proven in a window of at most so many voxels: gzip is checked whole all the same.
_MAX_WINDOW_VOXELS = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What is known of a scan that can be used.

    Attributes:
        num_frames: Frames of a series, None for a volume.
        num_b0: Volumes of a diffusion series without weighting, None for all else.
        doubts: What is legal but doubtful in the headers of its files and in its sidecar, each once.
    """

    num_frames: int | None = None
    num_b0: int | None = None
    doubts: tuple[ScanDoubt, ...] = ()


def prove_scan(paths: Sequence[Path], *, modality: str, min_frames: int = 0, mask: Path | None = None) -> Proof:
    """Read a scan.

    Args:
        paths: Its files.
        modality: A name or an alias.
        min_frames: Refuse series that are shorter.
        mask: Its brain mask.

    Raises:
        ScanError: If the scan cannot be used.
    """
    # Lazy: torch is not needed to list files.
    from umbrella_data.gradients import count_b0
    from umbrella_data.volume import load_volume, read_shape

    spec = find_modality(modality)
    if not spec.is_series:
        volume = load_volume(list(paths), modality=spec.name, mask=mask)
        is_raw_dwi = spec.num_channels > 1 and len(paths) == 1
        return Proof(num_b0=count_b0(paths[0]) if is_raw_dwi else None, doubts=volume.doubts)
    shape = read_shape(paths[0]).shape
    num_frames = shape[3] if len(shape) == 4 else 1
    if num_frames < min_frames:
        raise ScanError(
            f"{num_frames} frames, fewer than the {min_frames} asked for", path=paths[0], reason=ScanReason.SHORT_SERIES
        )
    count = min(num_frames, max(2, _MAX_WINDOW_VOXELS // prod(shape[:3])))
    window = ((num_frames - count) // 2, count)
    volume = load_volume(list(paths), modality=spec.name, window=window, mask=mask)
    return Proof(num_frames=num_frames, doubts=volume.doubts)
