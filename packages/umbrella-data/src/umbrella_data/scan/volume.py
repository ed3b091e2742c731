"""`load_volume`: read and check the scan of a modality, in RAS+ and float32, on its own grid."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.modality import ModalitySpec, find_modality
from umbrella_data.scan.frame_checks import verify_voxels
from umbrella_data.scan.geometry import Reorientation, is_same_grid
from umbrella_data.scan.header import ScanHeader, ScanWarning
from umbrella_data.scan.reader import open_scan
from umbrella_data.scan.settings import B0_THRESHOLD, MAX_B, NonFinite
from umbrella_data.scan.sidecar import RepetitionTime, repetition_time
from umbrella_data.scan.voxels import MAX_VOXELS, Voxels, read_voxels, zeroed_warning

if TYPE_CHECKING:
    from monai.data.meta_tensor import MetaTensor

# Fits on noise give eigenvalues below 0 and FA up to sqrt(3/2); spline interpolation gives values somewhat below 0.
_FA_LIMITS = (-0.1, 1.3)
# Free water has 0.003 mm2/s at 37 C, so that 0.01 separates MD in mm2/s from FA and from MD in um2/ms.
_MAX_MM2_PER_S = 0.01
# MD in um2/ms: white matter has about 0.7, free water 3. The 95th percentile of FA in a brain is about 0.6.
_UM2_PER_MS_LIMITS = (0.65, 10.0)
_IN_ORDER = "give the maps in the order FA, MD"
# Words of file names that say what a file has.
_QUANTITIES = {
    **{"fa": "FA", "md": "MD", "t2w": "T2w", "t2": "T2w", "flair": "FLAIR", "bold": "BOLD", "mask": "mask"},
    **dict.fromkeys(("t1w", "t1", "mprage", "mp2rage"), "T1w"),
}
# Their labels may be any words: the subject `sub-md`, the directions `acq-MD`, the space `space-T1w`.
_OTHER_ENTITIES = ("sub", "ses", "acq", "space")


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

    def to_metatensor(self) -> MetaTensor:
        """The scan for MONAI's transforms: (C, X, Y, Z) float32 with its affine in RAS+ mm, without a copy.

        The frames of a series are channels, (T, X, Y, Z), so that transforms treat them alike.
        """
        from monai.data.meta_tensor import MetaTensor  # takes seconds
        from monai.utils.enums import MetaKeys, SpaceKeys

        is_series = self.data.ndim == 5
        image = self.data.permute(4, 0, 1, 2, 3).flatten(0, 1) if is_series else self.data
        return MetaTensor(image, affine=torch.from_numpy(self.affine), meta={MetaKeys.SPACE: SpaceKeys.RAS})


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
    max_b: float = MAX_B,
    b0_threshold: float = B0_THRESHOLD,
    non_finite: NonFinite = "outside_mask",
) -> Volume:
    """Read a scan.

    Args:
        path: The file; for dMRI a DWI with bval and bvec next to it, or its maps in the order of the channels: FA from
            0 to 1, and MD in mm2/s or um2/ms.
        modality: A name or an alias.
        window: First frame and number of frames, for a series; None reads all of it.
        max_voxels: The most voxels to read from one file.
        index_folder: Folder of gzip indexes of long `.nii.gz` series, writable by you only: windows are then read
            without decompressing what precedes them.
        mask: The scan's brain mask, on the same grid: voxels outside are 0. A DWI is fitted inside of it.
        max_b: Largest b-value that the tensor of a DWI is fitted on, in s/mm2, see `umbrella_data.scan.diffusion`.
        b0_threshold: Largest b-value of a b0 volume of a DWI, in s/mm2.
        non_finite: What to do with voxels that are not finite, see `umbrella_data.scan.voxels`.

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
        from umbrella_data.scan.diffusion import fit_dwi  # lazy: dipy is an extra

        fit = fit_dwi(paths[0], max_voxels=max_voxels, mask=mask, max_b=max_b, b0_threshold=b0_threshold,
                      non_finite=non_finite)  # fmt: skip
        data = torch.from_numpy(np.stack([fit.fa, fit.md]))
        return Volume(data=data, affine=fit.affine, spacing=fit.spacing, warnings=fit.warnings)
    _check_count(paths, spec=spec)
    channels = [
        read_voxels(
            each,
            rank=spec.spatial_rank,
            window=window,
            max_voxels=max_voxels,
            index_folder=folder,
            mask=mask,
            non_finite=non_finite,
        )
        for each in paths
    ]
    _check_same_grid([(channel.frames.shape, channel.affine) for channel in channels], paths, spec=spec)
    if spec.num_channels > 1:
        _check_maps(dict(zip(spec.channels, [channel.frames for channel in channels], strict=True)), paths)
    timing = _timing(paths[0], channels[0].header)
    warnings = [
        warning for channel in channels for warning in (*channel.header.warnings, *zeroed_warning(channel.num_zeroed))
    ]
    return Volume(
        data=_stacked(channels, is_series=spec.is_series),
        affine=channels[0].affine,
        spacing=channels[0].spacing,
        repetition_time=timing.seconds,
        warnings=tuple(dict.fromkeys([*warnings, *timing.warnings])),
    )


def verify_series(
    paths: Sequence[Path],
    *,
    spec: ModalitySpec,
    mask: Path | None = None,
    index_folder: Path | None = None,
    non_finite: NonFinite = "outside_mask",
) -> tuple[ScanWarning, ...]:
    """Check all frames of a series as `load_volume` does, in one pass over each file and in little memory.

    Args:
        paths: Its files.
        spec: Its modality.
        mask: Its brain mask.
        index_folder: Where to build indexes of long `.nii.gz` series.
        non_finite: What to do with voxels that are not finite.

    Returns:
        Warnings about the voxels.

    Raises:
        ScanError: As `load_volume`.
    """
    _check_count(paths, spec=spec)
    warnings = [
        warning
        for path in paths
        for warning in verify_voxels(
            path, rank=spec.spatial_rank, mask=mask, index_folder=index_folder, non_finite=non_finite
        )
    ]
    shapes = [read_shape(path) for path in paths]
    _check_same_grid([((each.shape[3], *each.shape[:3]), each.affine) for each in shapes], paths, spec=spec)
    return tuple(dict.fromkeys(warnings))


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


def _check_maps(maps: Mapping[str, np.ndarray], paths: Sequence[str | PathLike[str]]) -> None:
    """Reject maps, by the names of their channels, that are equal, exchanged, or of another quantity."""
    for (first, second), (path, other) in zip(combinations(maps, 2), combinations(paths, 2), strict=True):
        if np.array_equal(maps[first], maps[second]):
            raise _maps_error(f"has the same values as {path}, the map of {first}; give a map of {second}", path=other)
    path_of = dict(zip(maps, paths, strict=True))
    if not path_of.keys() >= {"FA", "MD"}:
        return
    for channel in ("FA", "MD"):
        named = _named_quantities(path_of[channel])
        if named and channel not in named:
            words = " and ".join(sorted(named))
            raise _maps_error(f"given as {channel}, but named {words}; {_IN_ORDER}", path=path_of[channel])
    _check_quantities(maps["FA"], maps["MD"], path_of)


def _check_quantities(fa: np.ndarray, md: np.ndarray, path_of: Mapping[str, str | PathLike[str]]) -> None:
    """Compare FA and MD with what tissue can have, by the 95th percentile of the voxels that are not 0."""
    low, high, fa_high, md_high = float(fa.min()), float(fa.max()), _high(fa), _high(md)
    if low < _FA_LIMITS[0] or high > _FA_LIMITS[1] or fa_high <= _MAX_MM2_PER_S:
        raise _maps_error(
            f"values from {low:g} to {high:g}, 95 % up to {fa_high:g}, are not FA (0 to 1); {_IN_ORDER}",
            path=path_of["FA"],
        )
    for channel, values in (("FA", fa), ("MD", md)):
        inside = values[values != 0]
        if inside.size and inside.min() == inside.max():
            raise _maps_error(f"every voxel that is not 0 is {inside[0]:g}: a mask, not a map of {channel}",
                              path=path_of[channel])  # fmt: skip
    least, most = _UM2_PER_MS_LIMITS
    if not (0 < md_high <= _MAX_MM2_PER_S or least <= md_high <= most):
        raise _maps_error(
            f"values of which 95 % are up to {md_high:g} are not MD, in mm2/s (up to {_MAX_MM2_PER_S:g}) or in um2/ms "
            f"({least:g} to {most:g}); {_IN_ORDER}, and convert MD from any other unit",
            path=path_of["MD"],
        )
    # Where there is no fluid, MD in um2/ms is within the limits of FA, but it is higher than FA.
    if _MAX_MM2_PER_S < md_high < 0.95 * fa_high and float(md.max()) <= _FA_LIMITS[1]:
        raise _maps_error(
            f"higher values than the map of MD; {_IN_ORDER}, or convert MD to mm2/s if they are", path=path_of["FA"]
        )


def _high(values: np.ndarray) -> float:
    """95th percentile of the voxels that are not 0: robust to outliers of the fit, and inside of the brain."""
    inside = values[values != 0]
    return float(np.percentile(inside, 95)) if inside.size else 0.0


def _named_quantities(path: str | PathLike[str]) -> set[str]:
    """Quantities that are words of a file's name, as in `tensor_FA.nii.gz` or `sub-01_param-md_dwimap.nii.gz`."""
    parts = Path(path).name.split("_")
    texts = [part for part in parts if part.partition("-")[0].lower() not in _OTHER_ENTITIES]
    words = {word.lower().removesuffix("map") for text in texts for word in re.split(r"[^A-Za-z0-9]+", text)}
    return {name for word, name in _QUANTITIES.items() if word in words}


def _maps_error(message: str, *, path: str | PathLike[str]) -> ScanError:
    return ScanError(message, path=path, reason=ScanReason.MAPS)
