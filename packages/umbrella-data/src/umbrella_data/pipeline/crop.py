"""Where the model's box is in a scan, if voxels keep their size and the box may be smaller than the field of view."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.modality import ModalitySpec
from umbrella_data.pipeline.config import PipelineConfig
from umbrella_data.pipeline.normalise import foreground
from umbrella_data.pipeline.resample import Centre
from umbrella_data.scan.volume import load_volume, read_shape
from umbrella_data.scan.voxels import Voxels, read_voxels

# Of the foreground, this much on each side may be noise far away from the head.
_TAIL = 0.005


def box_centre(
    paths: Sequence[Path],
    *,
    mask: Path | None,
    spec: ModalitySpec,
    config: PipelineConfig,
    values: np.ndarray | None = None,
) -> Centre:
    """Centre of the model's box, in voxels of the scan along RAS+; None for that of the field of view.

    Args:
        paths: The files of the scan.
        mask: Its brain mask.
        spec: Its modality.
        config: The preprocessing.
        values: Its frames (1, C, X, Y, Z), if they are in memory; otherwise the first one is read.

    Raises:
        ScanError: `mask` if `crop` is `mask` and there is none, or as `load_volume`.
    """
    if config.crop == "field_of_view":
        return None
    if config.crop == "mask" and mask is None:
        raise ScanError(
            "the scan has no mask, which crop: mask needs; give one, or use crop: foreground",
            path=paths[0],
            reason=ScanReason.MASK,
        )
    if values is None:
        values, _ = _first_frame(paths, mask=mask, spec=spec, config=config)
    return centre_of(_inside(values, mask=mask, spec=spec))


def removed_by_crop(paths: Sequence[Path], *, mask: Path | None, spec: ModalitySpec, config: PipelineConfig) -> float:
    """The fraction of a scan's mask, or of its foreground, that is outside of the model's box.

    Arguments and errors are those of `box_centre`.
    """
    if config.spacing is None:
        return 0.0
    values, spacing = _first_frame(paths, mask=mask, spec=spec, config=config)
    x, y, z = (size * new / old for size, new, old in zip(config.image_size[:3], config.spacing, spacing, strict=True))
    centre = box_centre(paths, mask=mask, spec=spec, config=config, values=values)
    return removed_fraction(_inside(values, mask=mask, spec=spec), centre=centre, sizes=(x, y, z))


def _first_frame(
    paths: Sequence[Path], *, mask: Path | None, spec: ModalitySpec, config: PipelineConfig
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """The first frame (1, C, X, Y, Z) on the scan's own grid, and its voxel size in mm."""
    if spec.num_channels == 1:
        found = _read_frame(paths[0], mask=mask, spec=spec, config=config)
        return found.frames[:, None], found.spacing
    volume = load_volume(paths, modality=spec.name, mask=mask, **config.reading)
    return volume.data[None].numpy(), volume.spacing


def _read_frame(path: Path, *, mask: Path | None, spec: ModalitySpec, config: PipelineConfig) -> Voxels:
    """The volume, or the first frame of a series; the middle one if the first is empty."""

    def read(window: tuple[int, int] | None) -> Voxels:
        return read_voxels(path, rank=spec.spatial_rank, window=window, mask=mask, non_finite=config.non_finite)

    if not spec.is_series:
        return read(None)
    try:
        return read((0, 1))
    except ScanError as error:
        if error.reason not in (ScanReason.CONSTANT, ScanReason.NON_FINITE):
            raise
        return read((read_shape(path).shape[3] // 2, 1))


def _inside(values: np.ndarray, *, mask: Path | None, spec: ModalitySpec) -> np.ndarray:
    """The foreground (X, Y, Z) of frames (T, C, X, Y, Z)."""
    return np.asarray(foreground(values, is_masked=spec.is_masked or mask is not None).any(axis=0))


def centre_of(inside: np.ndarray) -> tuple[float, float, float]:
    """The centre of a mask, without the outermost 0.5 % of its voxels along each axis.

    Args:
        inside: (X, Y, Z) bool, with at least one voxel.

    Returns:
        Position along each axis, in voxels.
    """
    x, y, z = (_centre(inside.sum(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    return x, y, z


def removed_fraction(
    inside: np.ndarray,
    *,
    centre: tuple[float, float, float] | None,
    sizes: tuple[float, float, float],
) -> float:
    """The fraction of a mask that is outside of a box.

    Args:
        inside: (X, Y, Z) bool, with at least one voxel.
        centre: Centre of the box, in voxels; None for that of the field of view.
        sizes: Length of the box along each axis, in voxels of the mask.
    """
    box = []
    for axis, size in enumerate(sizes):
        middle = (inside.shape[axis] - 1) / 2 if centre is None else centre[axis]
        # A voxel is in the box if its centre is.
        first, last = np.ceil(middle - size / 2 - 1e-6), np.floor(middle + size / 2 + 1e-6)
        box.append(slice(max(0, int(first)), max(0, int(last) + 1)))
    return float(1 - inside[tuple(box)].sum() / inside.sum())


def _centre(counts: np.ndarray) -> float:
    shares = np.cumsum(counts) / counts.sum()
    first, last = np.searchsorted(shares, _TAIL, side="right"), np.searchsorted(shares, 1 - _TAIL)
    return float(first + last) / 2
