"""Brain masks: which voxels of a scan are brain, in a file of its own on the scan's grid, as fMRIPrep writes it."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.files.naming import scan_stem
from umbrella_data.scan.geometry import grid_shift, is_same_grid
from umbrella_data.scan.header import ScanHeader
from umbrella_data.scan.reader import open_scan
from umbrella_data.scan.scaling import ValueRange


def read_mask(path: str | PathLike[str], *, like: ScanHeader) -> np.ndarray:
    """Read a mask strictly.

    Args:
        path: A volume that is 0 outside of the brain and one other value inside.
        like: The header of the scan that it belongs to: both must be stored on one grid, axis by axis.

    Returns:
        (X, Y, Z) bool along the stored axes of the scan, in Fortran order.

    Raises:
        ScanError: Where the file cannot be trusted, or `mask` where it is no mask of this scan.
    """
    with open_scan(path) as scan:
        header = scan.header
        _check_grid(header, like, path=scan.path)
        stored = scan.read_frames(0, 1)[0]
        values = ValueRange(header)
        values.add(stored)
        low, high = values.check(path=scan.path)
    least, greatest = stored.min(), stored.max()
    if low != 0 or high <= 0 or not ((stored == least) | (stored == greatest)).all():
        raise ScanError(
            f"values from {low:g} to {high:g}: a mask is 0 outside of the brain and one other value inside; "
            "a map of probabilities needs a threshold first",
            path=path,
            reason=ScanReason.MASK,
        )
    # A negative slope turns the order of the values round.
    return np.asarray(stored == (least if header.slope < 0 else greatest))


def _check_grid(mask: ScanHeader, scan: ScanHeader, *, path: str) -> None:
    shape = scan.shape[:3]
    if mask.shape != shape:
        problem = f"shape {mask.shape} differs from the scan's, {shape}"
    elif not is_same_grid(scan.affine, mask.affine, shape=shape):
        problem = f"its affine lays a corner {grid_shift(scan.affine, mask.affine, shape=shape):.3g} mm from the scan's"
    else:
        return
    raise ScanError(f"{problem}: a mask lies on the grid of its scan, axis by axis", path=path, reason=ScanReason.MASK)


def clear_outside(real: np.ndarray, inside: np.ndarray | None, *, first: int) -> None:
    """Set slices (n, Y, X), the first of which has that number, to 0 outside of a mask (X, Y, Z) of stored axes."""
    if inside is not None:
        np.copyto(real, 0, where=~inside.T[first : first + len(real)])


def check_contrast(masked: np.ndarray, *, path: str) -> None:
    """Refuse a scan of which its mask leaves one value only.

    Raises:
        ScanError: `constant`.
    """
    low = masked.min()
    if low == masked.max():
        raise no_contrast(low, path=path)


def no_contrast(value: float, *, path: str) -> ScanError:
    """What is said of a scan of which its mask leaves this value only."""
    return ScanError(
        f"every voxel is {value:g} once its mask is put on: the mask belongs to another scan, or covers none of it",
        path=path,
        reason=ScanReason.CONSTANT,
    )


def mask_beside(scan: Path) -> Path | None:
    """The brain mask of a derivative by its BIDS name, or None where there is none.

    `sub-01_space-T1w_desc-preproc_bold.nii.gz` -> `sub-01_space-T1w_desc-brain_mask.nii.gz`, as fMRIPrep and QSIPrep
    write them; a raw scan, with neither `space` nor `desc`, has none.
    """
    *entities, _ = scan_stem(scan.name).split("_")
    if not any(entity.startswith(("space-", "desc-")) for entity in entities):
        return None
    stem = "_".join([*(entity for entity in entities if not entity.startswith("desc-")), "desc-brain_mask"])
    candidates = (scan.with_name(stem + ending) for ending in (".nii.gz", ".nii"))
    return next((file for file in candidates if file.exists()), None)
