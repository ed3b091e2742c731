"""`load_volume`: read and check the scan of a modality, in RAS+ and float32, on its own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import torch

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.modality import ModalitySpec, find_modality
from umbrella_data.scan.geometry import Reorientation, is_same_grid
from umbrella_data.scan.header import ScanHeader, ScanWarning
from umbrella_data.scan.reader import open_scan
from umbrella_data.scan.sidecar import RepetitionTime, repetition_time
from umbrella_data.scan.voxels import MAX_VOXELS, Voxels, read_voxels, verify_voxels


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A scan in memory.

    Attributes:
        data: float32 (C, X, Y, Z), or (C, X, Y, Z, T) for a series; X runs to the Right, Y to Anterior, Z to Superior.
            In memory, frames are contiguous, and within a frame the axes are in the file's order.
        affine: (4, 4) float64, index of a voxel to world coordinates in mm.
        spacing: Voxel size in mm along X, Y, Z.
        repetition_time: Seconds from frame to frame, the sidecar's if it has one; None for a volume or if neither
            sidecar nor header has a usable one.
        warnings: What is valid but suspicious in the headers of its files and in the sidecar, each once.
    """

    data: torch.Tensor
    affine: np.ndarray
    spacing: tuple[float, float, float]
    repetition_time: float | None = None
    warnings: tuple[ScanWarning, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScanShape:
    """Shape and geometry of a scan along RAS+, from its header and sidecar.

    Attributes:
        shape: (X, Y, Z) or (X, Y, Z, T).
        affine: (4, 4) float64, index of a voxel to world coordinates in mm.
        spacing: Voxel size in mm along X, Y, Z.
        repetition_time: Seconds from frame to frame, the sidecar's if it has one, or None.
        warnings: What is valid but suspicious in the header and in the sidecar.
    """

    shape: tuple[int, ...]
    affine: np.ndarray
    spacing: tuple[float, float, float]
    repetition_time: float | None
    warnings: tuple[ScanWarning, ...] = ()


def read_shape(path: str | PathLike[str]) -> ScanShape:
    """Read and check a scan's header; voxels are neither read nor checked.

    Raises:
        ScanError: If the header, or the size of the file, is wrong.
    """
    with open_scan(path) as scan:
        header = scan.header
        turn = Reorientation(header.affine, path=scan.path)
        timing = _timing(scan.path, header)
        return ScanShape(
            shape=turn.shape(header.shape),
            affine=turn.affine(header.shape),
            spacing=turn.spacing(header.spacing),
            repetition_time=timing.seconds,
            warnings=(*header.warnings, *timing.warnings),
        )


def _timing(path: str | PathLike[str], header: ScanHeader) -> RepetitionTime:
    """The repetition time of a series; a volume has none."""
    return repetition_time(path, header) if len(header.shape) == 4 else RepetitionTime(seconds=None)


def load_volume(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    modality: str,
    window: tuple[int, int] | None = None,
    max_voxels: int = MAX_VOXELS,
    index_folder: str | PathLike[str] | None = None,
    mask: str | PathLike[str] | None = None,
) -> Volume:
    """Read a scan.

    Args:
        path: The file; for dMRI a DWI with bval and bvec next to it, or its maps in the order of the channels.
        modality: A name or an alias.
        window: First frame and number of frames, for a series; None reads all of it.
        max_voxels: The most voxels to read from one file.
        index_folder: Folder of gzip indexes of long `.nii.gz` series, writable by you only: windows are then read
            without decompressing what precedes them.
        mask: The scan's brain mask, on the same grid: voxels outside are 0. A DWI is fitted inside of it.

    Raises:
        ScanError: If a file is damaged or inconsistent; see its `.path` and `.reason`.
        ValueError: For an unknown modality, or a window of a volume.
    """
    spec = find_modality(modality)
    paths = [path] if isinstance(path, (str, PathLike)) else list(path)
    folder = None if index_folder is None else Path(index_folder)
    if window is not None and not spec.is_series:
        raise ValueError(f"window {window}: {spec.name} has no frames; leave the window out")
    if len(paths) == 1 and spec.num_channels > 1:
        return _fit_maps(paths[0], max_voxels=max_voxels, mask=mask)
    _check_count(paths, spec=spec)
    channels = [
        read_voxels(each, rank=spec.spatial_rank, window=window, max_voxels=max_voxels, index_folder=folder, mask=mask)
        for each in paths
    ]
    _check_same_grid([(channel.frames.shape, channel.affine) for channel in channels], paths, spec=spec)
    if spec.channels[0] == "FA":
        _check_fractions(channels[0].frames, path=paths[0])
    timing = _timing(paths[0], channels[0].header)
    warnings = [warning for channel in channels for warning in channel.header.warnings]
    return Volume(
        data=_stacked(channels, is_series=spec.is_series),
        affine=channels[0].affine,
        spacing=channels[0].spacing,
        repetition_time=timing.seconds,
        warnings=tuple(dict.fromkeys([*warnings, *timing.warnings])),
    )


def verify_series(
    paths: Sequence[Path], *, spec: ModalitySpec, mask: Path | None = None, index_folder: Path | None = None
) -> None:
    """Check all frames of a series as `load_volume` does, in one pass over each file and in little memory.

    Args:
        paths: Its files.
        spec: Its modality.
        mask: Its brain mask.
        index_folder: Where to build indexes of long `.nii.gz` series.

    Raises:
        ScanError: As `load_volume`.
    """
    _check_count(paths, spec=spec)
    for path in paths:
        verify_voxels(path, rank=spec.spatial_rank, mask=mask, index_folder=index_folder)
    shapes = [read_shape(path) for path in paths]
    _check_same_grid([((each.shape[3], *each.shape[:3]), each.affine) for each in shapes], paths, spec=spec)


def _fit_maps(path: str | PathLike[str], *, max_voxels: int, mask: str | PathLike[str] | None) -> Volume:
    # Lazy: dipy is an extra, and only a raw diffusion series needs it.
    from umbrella_data.scan.diffusion import fit_dwi

    fit = fit_dwi(path, max_voxels=max_voxels, mask=mask)
    return Volume(
        data=torch.from_numpy(np.stack([fit.fa, fit.md])), affine=fit.affine, spacing=fit.spacing, warnings=fit.warnings
    )


def _stacked(channels: list[Voxels], *, is_series: bool) -> torch.Tensor:
    """(C, X, Y, Z), or (C, X, Y, Z, T) for a series."""
    # (T, C, X, Y, Z); one channel is not copied.
    parts = [torch.from_numpy(each.frames) for each in channels]
    frames = torch.stack(parts, dim=1) if len(parts) > 1 else parts[0][:, None]
    return frames.permute(1, 2, 3, 4, 0) if is_series else frames[0]


def _check_count(paths: Sequence[str | PathLike[str]], *, spec: ModalitySpec) -> None:
    if len(paths) != spec.num_channels:
        raise ScanError(
            f"{len(paths)} files for one {spec.name} scan; give {spec.num_channels} ({', '.join(spec.channels)})",
            path=paths[0] if paths else "",
            reason=ScanReason.MAPS,
        )


def _check_same_grid(
    grids: Sequence[tuple[tuple[int, ...], np.ndarray]], paths: Sequence[str | PathLike[str]], *, spec: ModalitySpec
) -> None:
    """Compare shapes (T, X, Y, Z) and affines (4, 4) along RAS+ with those of the first file."""
    shape, affine = grids[0]
    for path, (other_shape, other_affine) in zip(paths[1:], grids[1:], strict=True):
        if other_shape != shape or not is_same_grid(affine, other_affine, shape=shape[1:]):
            raise ScanError(
                f"shape {other_shape[1:]} or its affine differ from {paths[0]} {shape[1:]}: "
                f"the maps of one {spec.name} scan must have the same grid",
                path=path,
                reason=ScanReason.MAPS,
            )


def _check_fractions(values: np.ndarray, *, path: str | PathLike[str]) -> None:
    # Fits on noise give eigenvalues below 0 and FA up to sqrt(3/2).
    if values.min() < -0.01 or values.max() > 1.3:
        raise ScanError(
            f"values from {values.min():g} to {values.max():g} are not FA (0 to 1): give the maps in the order FA, MD",
            path=path,
            reason=ScanReason.MAPS,
        )
