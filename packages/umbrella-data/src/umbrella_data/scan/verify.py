"""A scan read once from the first byte to the last, to know that it can be used; its voxels are not kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.modality import find_modality

if TYPE_CHECKING:
    from umbrella_data.scan.header import ScanDoubt


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What is known of a scan that can be used.

    Attributes:
        num_frames: Frames of a series, None for a volume.
        num_b0: Volumes of a diffusion series without weighting, None for all else.
        doubts: What is legal but doubtful in the header of each of its files, the mask among them; what its sidecar
            says stands with its first file. A file without doubts is left out.
    """

    num_frames: int | None = None
    num_b0: int | None = None
    doubts: Mapping[Path, tuple[ScanDoubt, ...]] = field(default_factory=dict)


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
    from umbrella_data.scan.gradient_table import count_b0
    from umbrella_data.scan.volume import load_volume, prove_series, read_shape

    spec = find_modality(modality)
    if not spec.is_series:
        volume = load_volume(list(paths), modality=spec.name, mask=mask)
        is_raw_dwi = spec.num_channels > 1 and len(paths) == 1
        num_b0 = count_b0(paths[0]) if is_raw_dwi else None
        return Proof(num_b0=num_b0, doubts=_doubts_by_file(volume.doubts, paths, mask))
    header = read_shape(paths[0])
    num_frames = header.shape[3] if len(header.shape) == 4 else 1
    if num_frames < min_frames:
        raise ScanError(
            f"{num_frames} frames, fewer than the {min_frames} asked for", path=paths[0], reason=ScanReason.SHORT_SERIES
        )
    # All frames: training draws its windows anywhere.
    prove_series(paths, spec=spec, mask=mask)
    return Proof(num_frames=num_frames, doubts=_doubts_by_file(header.doubts, paths, mask))


def _doubts_by_file(
    doubts: Sequence[ScanDoubt], paths: Sequence[Path], mask: Path | None
) -> dict[Path, tuple[ScanDoubt, ...]]:
    """The doubts about a scan by the files whose headers raise them; those about its sidecar go to the first file."""
    from umbrella_data.scan.reader import open_scan

    files = [*paths] if mask is None else [*paths, mask]
    found: dict[Path, tuple[ScanDoubt, ...]] = {}
    for file in files:
        with open_scan(file) as scan:
            found[file] = scan.header.doubts
    in_headers = {doubt for path in paths for doubt in found[path]}
    found[paths[0]] += tuple(doubt for doubt in doubts if doubt not in in_headers)
    return {file: codes for file, codes in found.items() if codes}
