"""Fit FA and MD maps to a diffusion-weighted series and its gradients, with dipy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike, fspath

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.modality import find_modality
from umbrella_data.scan.gradient_table import Shell, read_gradients, select_shells
from umbrella_data.scan.header import ScanWarning
from umbrella_data.scan.settings import B0_THRESHOLD, MAX_B, NonFinite
from umbrella_data.scan.voxels import MAX_VOXELS, read_voxels, zeroed_warning

_NEEDS_DIPY = "fitting FA and MD from a diffusion series needs dipy: pip install dipy, or give ready maps [fa, md]"
_MIN_DIRECTIONS = 6
# Least ratio of the mean b0 inside of a brain to that outside. Two real heads have 8 and 18; two cut-outs from within
# a brain, where Otsu's threshold separates fluid from tissue, have 1.5 and 2.7.
_MIN_CONTRAST = 3.0


@dataclass(frozen=True, kw_only=True)
class TensorMaps:
    """The diffusion tensor of each voxel, RAS+.

    Attributes:
        fa: (X, Y, Z) float32, fractional anisotropy, 0 to 1; 0 outside of the brain.
        md: (X, Y, Z) float32, mean diffusivity in mm2/s; 0 outside of the brain.
        direction: (3, X, Y, Z) float32, the main direction as a unit vector in RAS world coordinates, of arbitrary
            sign; 0 outside of the brain.
        mask: (X, Y, Z) bool, the brain.
        affine: (4, 4) float64.
        spacing: Voxel size in mm along X, Y, Z.
        shells: The shells of the series, and which of them are fitted.
        warnings: What is valid but suspicious in the header of the series; `no_background` if none was found, `high_b`
            if all shells are above `max_b`.
    """

    fa: np.ndarray
    md: np.ndarray
    direction: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    spacing: tuple[float, float, float]
    shells: tuple[Shell, ...]
    warnings: tuple[ScanWarning, ...] = ()


def needs_fit(paths: Sequence[str | PathLike[str]], modality: str) -> bool:
    """Whether the channels of a scan are fitted from one file; ready maps are several files."""
    return len(paths) == 1 and find_modality(modality).num_channels > 1


def check_dipy(dwis: Iterable[str | PathLike[str]]) -> None:
    """Check that dipy is installed if series must be fitted, before many other scans are read.

    Args:
        dwis: The series; iterated only if dipy is missing.

    Raises:
        ImportError: With the first series, and how to leave such scans out.
    """
    first = next(iter(dwis), None) if find_spec("dipy") is None else None
    if first is not None:
        raise ImportError(f"{fspath(first)}: {_NEEDS_DIPY}; or leave such scans out by naming the others, as in "
                          "--modality T1")  # fmt: skip


def fit_dwi(
    path: str | PathLike[str],
    *,
    max_voxels: int = MAX_VOXELS,
    mask: str | PathLike[str] | None = None,
    max_b: float = MAX_B,
    b0_threshold: float = B0_THRESHOLD,
    non_finite: NonFinite = "outside_mask",
) -> TensorMaps:
    """Fit a tensor in each voxel of the brain of a DWI, with `.bval` and `.bvec` next to it.

    The tensor is fitted on the b0 volumes and the shells up to `max_b`, so that FA does not depend on whether shells of
    high b were measured too. If all shells are above it, the lowest one is fitted, with the warning `high_b`.

    Args:
        path: The series, `.nii` or `.nii.gz`.
        max_voxels: The most voxels to read.
        mask: The brain mask of the series; None finds the brain in the mean b0 volume (median filter, Otsu). If that
            has no dark background, as in a cut-out from within a brain, every voxel with a signal is fitted, with the
            warning `no_background`.
        max_b: Largest b-value to fit, in s/mm2, see `umbrella_data.scan.gradient_table`.
        b0_threshold: Largest b-value of a b0 volume, in s/mm2.
        non_finite: What to do with voxels that are not finite, see `umbrella_data.scan.voxels`.

    Raises:
        ScanError: If a file is damaged or inconsistent, no brain is found, or the fitted shells do not determine a
            tensor.
        ImportError: Without dipy.
    """
    try:
        from dipy.core.gradients import gradient_table
        from dipy.reconst.dti import TensorModel
    except ImportError as error:
        raise ImportError(_NEEDS_DIPY) from error
    voxels = read_voxels(path, rank=4, max_voxels=max_voxels, mask=mask, non_finite=non_finite)
    gradients = read_gradients(path, num_volumes=len(voxels.frames), b0_threshold=b0_threshold)
    selected = select_shells(gradients.b_values, max_b=max_b, b0_threshold=b0_threshold)
    # A lost volume is no signal of 0, which would be a large diffusivity.
    has_image = np.array([frame.min() < frame.max() for frame in voxels.frames])
    is_fitted, is_b0 = selected.is_fitted & has_image, gradients.is_b0 & has_image
    if not is_b0.any():
        raise ScanError("every b0 volume is empty", path=path, reason=ScanReason.CONSTANT)
    directions = gradients.world_directions(voxels.header.affine)
    _check_span(directions[is_fitted & ~gradients.is_b0], shells=selected.shells, path=fspath(path))
    table = gradient_table(
        gradients.b_values[is_fitted], bvecs=directions[is_fitted], b0_threshold=b0_threshold, atol=0.05
    )
    mean_b0 = voxels.frames[is_b0].mean(axis=0)
    brain, has_background = (mean_b0 > 0, True) if mask is not None else _find_brain(mean_b0, spacing=voxels.spacing)
    warnings = (
        *voxels.header.warnings,
        *zeroed_warning(voxels.num_zeroed),
        *([] if has_image.all() else [ScanWarning.EMPTY_FRAMES]),
        *([ScanWarning.HIGH_B] if selected.is_above else []),
        *([] if has_background else [ScanWarning.NO_BACKGROUND]),
    )
    if not brain.any():
        raise ScanError("no brain is found in the mean b0 volume; give a mask", path=path, reason=ScanReason.NO_BRAIN)
    signal = np.ascontiguousarray(voxels.frames[:, brain][is_fitted].T)
    fit = TensorModel(table, fit_method="WLS").fit(signal)

    def spread(values: np.ndarray) -> np.ndarray:
        volume = np.zeros((*values.shape[1:], *brain.shape), dtype=np.float32)
        volume[..., brain] = values.T
        return volume

    return TensorMaps(
        fa=spread(np.clip(np.nan_to_num(fit.fa), 0.0, 1.0)),
        md=spread(np.clip(np.nan_to_num(fit.md), 0.0, None)),
        direction=spread(fit.evecs[..., 0]),
        mask=np.asarray(brain, dtype=bool),
        affine=voxels.affine,
        spacing=voxels.spacing,
        shells=selected.shells,
        warnings=warnings,
    )


def _find_brain(mean_b0: np.ndarray, *, spacing: tuple[float, float, float]) -> tuple[np.ndarray, bool]:
    """The brain (X, Y, Z), and whether voxels outside are a dark background, not tissue, which must not become 0."""
    from dipy.segment.mask import median_otsu

    # About 6 mm, at most dipy's default of 4 voxels.
    radius = int(np.clip(round(6.0 / float(np.mean(spacing))), 1, 4))
    _, found = median_otsu(mean_b0, median_radius=radius, numpass=1)
    is_mixed = found.any() and not found.all()
    if is_mixed and float(mean_b0[found].mean()) < _MIN_CONTRAST * float(mean_b0[~found].mean()):
        return mean_b0 > 0, False
    return found, True


def _check_span(directions: np.ndarray, *, shells: tuple[Shell, ...], path: str) -> None:
    """Reject directions (N, 3) that do not determine the six elements of a tensor."""
    x, y, z = directions.T
    design = np.stack([x * x, y * y, z * z, x * y, x * z, y * z], axis=1)
    if np.linalg.matrix_rank(design, tol=1e-3) < _MIN_DIRECTIONS:
        others = ", ".join(str(shell.b) for shell in shells if not shell.is_fitted)
        raise ScanError(
            f"{len(design)} weighted volumes do not determine a tensor: at least {_MIN_DIRECTIONS} different "
            "directions are needed" + (f"; raise max_b to fit b = {others} too" if others else ""),
            path=path,
            reason=ScanReason.BVEC,
        )
