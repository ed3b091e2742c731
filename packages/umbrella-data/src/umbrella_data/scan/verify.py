"""Full validation pass over the files of a scan; no voxels are retained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.modality import find_modality
from umbrella_data.scan.settings import B0_THRESHOLD, MAX_B

if TYPE_CHECKING:
    from umbrella_data.scan.gradient_table import Shell
    from umbrella_data.scan.header import ScanWarning
    from umbrella_data.scan.settings import NonFinite


@dataclass(frozen=True, kw_only=True)
class VerifiedScan:
    """Facts about a valid scan.

    Attributes:
        num_frames: Frames of a series, None for a volume.
        repetition_time: Seconds from frame to frame of a series; None if it is unknown, and for a volume.
        num_b0: Number of b0 volumes of a diffusion series, None for any other scan.
        shells: The b0 volumes and the shells of a diffusion series, and which of them are fitted.
        warnings: What is valid but suspicious in the header of each of its files, the mask included; warnings about
            the sidecar belong to the first file. A file without warnings is left out.
    """

    num_frames: int | None = None
    repetition_time: float | None = None
    num_b0: int | None = None
    shells: tuple[Shell, ...] = ()
    warnings: Mapping[Path, tuple[ScanWarning, ...]] = field(default_factory=dict)


def verify_scan(
    paths: Sequence[Path],
    *,
    modality: str,
    min_frames: int = 0,
    mask: Path | None = None,
    index_folder: Path | None = None,
    max_b: float = MAX_B,
    b0_threshold: float = B0_THRESHOLD,
    non_finite: NonFinite = "outside_mask",
) -> VerifiedScan:
    """Read and check all of a scan.

    Args:
        paths: Its files.
        modality: A name or an alias.
        min_frames: Fewest frames of a series.
        mask: Its brain mask.
        index_folder: Where to build indexes of long `.nii.gz` series.
        max_b: Largest b-value that the tensor of a DWI is fitted on, in s/mm2.
        b0_threshold: Largest b-value of a b0 volume of a DWI, in s/mm2.
        non_finite: What to do with voxels that are not finite, see `umbrella_data.scan.voxels`.

    Raises:
        ScanError: If the scan cannot be used.
    """
    # Lazy: torch is not needed to list files.
    from umbrella_data.scan.frame_checks import verify_voxels
    from umbrella_data.scan.gradient_table import read_shells
    from umbrella_data.scan.volume import load_volume, read_shape, verify_series

    spec = find_modality(modality)
    if not spec.is_series:
        volume = load_volume(
            list(paths),
            modality=spec.name,
            mask=mask,
            max_b=max_b,
            b0_threshold=b0_threshold,
            non_finite=non_finite,
        )
        if spec.num_channels == 1 or len(paths) > 1:
            return VerifiedScan(warnings=_warnings_by_file(volume.warnings, paths, mask))
        found = verify_voxels(paths[0], rank=4, mask=mask, non_finite=non_finite)
        warnings = _warnings_by_file((*volume.warnings, *found), paths, mask)
        shells = read_shells(paths[0], max_b=max_b, b0_threshold=b0_threshold)
        return VerifiedScan(num_b0=shells[0].num_volumes, shells=shells, warnings=warnings)
    header = read_shape(paths[0])
    num_frames = header.shape[3] if len(header.shape) == 4 else 1
    if num_frames < min_frames:
        raise ScanError(
            f"{num_frames} frames, but at least {min_frames} are needed", path=paths[0], reason=ScanReason.SHORT_SERIES
        )
    # All frames: training may draw any window.
    found = verify_series(paths, spec=spec, mask=mask, index_folder=index_folder, non_finite=non_finite)
    warnings = _warnings_by_file((*header.warnings, *found), paths, mask)
    return VerifiedScan(num_frames=num_frames, repetition_time=header.repetition_time, warnings=warnings)


def _warnings_by_file(
    warnings: Sequence[ScanWarning], paths: Sequence[Path], mask: Path | None
) -> dict[Path, tuple[ScanWarning, ...]]:
    """The warnings about a scan by file; those about its sidecar belong to the first file."""
    from umbrella_data.scan.reader import open_scan

    files = [*paths] if mask is None else [*paths, mask]
    found: dict[Path, tuple[ScanWarning, ...]] = {}
    for file in files:
        with open_scan(file) as scan:
            found[file] = scan.header.warnings
    in_headers = {warning for path in paths for warning in found[path]}
    found[paths[0]] += tuple(dict.fromkeys(warning for warning in warnings if warning not in in_headers))
    return {file: codes for file, codes in found.items() if codes}
