"""The b-values, shells and directions of a diffusion-weighted series, from its `.bval` and `.bvec` files, checked."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.files.look_alikes import describe_look_alike
from umbrella_data.files.paths import gradient_file, open_regular_file, stays_in_tree
from umbrella_data.scan.settings import B0_THRESHOLD, MAX_ACCEPTED_B, MAX_B

SHELL_WIDTH = 100.0
"""Volumes within less than this (s/mm2) of the lowest b-value of a shell belong to it: scanners write 985 and 1005, or
1495 and 1585 for the points of a grid."""

# A nominal b = 1500 is written as 1505 or 1540 and must not be above a `max_b` of 1500.
_TOLERANCE = SHELL_WIDTH / 2

# Twice the size of three numbers of 20 characters for each of 32,767 volumes, the maximum of NIfTI-1.
_MAX_BYTES = 1 << 22


@dataclass(frozen=True, order=True)
class Shell:
    """Volumes of about the same b-value.

    Attributes:
        b: Its mean in s/mm2, to the nearest 50; 0 for the b0 volumes.
        num_volumes: Number of volumes.
        is_fitted: Whether the tensor is fitted on them.
    """

    b: int
    num_volumes: int
    is_fitted: bool

    def __str__(self) -> str:
        return f"{self.b} x {self.num_volumes}" + ("" if self.is_fitted else " (left out)")


@dataclass(frozen=True, kw_only=True)
class ShellSelection:
    """The shells of a series, and the volumes of those that are fitted.

    Attributes:
        shells: The b0 volumes, then the shells in the order of b.
        is_fitted: (N,) bool, the volumes that the tensor is fitted on.
        is_above: Whether even the lowest shell is above `max_b`; that shell is fitted.
    """

    shells: tuple[Shell, ...]
    is_fitted: np.ndarray
    is_above: bool


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradients of a diffusion series, one row per volume.

    Attributes:
        b_values: (N,) float64 in s/mm2.
        b_vectors: (N, 3) float64 unit vectors by FSL's convention; zeros for a b0 without a direction.
        b0_threshold: Largest b-value of a b0 volume, in s/mm2.
    """

    b_values: np.ndarray
    b_vectors: np.ndarray
    b0_threshold: float = B0_THRESHOLD

    @property
    def is_b0(self) -> np.ndarray:
        """(N,) bool."""
        return np.asarray(self.b_values <= self.b0_threshold)

    def world_directions(self, affine: np.ndarray) -> np.ndarray:
        """Directions (N, 3) in RAS world coordinates.

        FSL's convention gives them along the stored axes, with the first one mirrored where the stored axes are
        right-handed (FSL user guide, "bvecs").

        Args:
            affine: (4, 4), of the axes as stored in the file.
        """
        axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        first = -1.0 if np.linalg.det(axes) > 0 else 1.0
        directions = (self.b_vectors * [first, 1.0, 1.0]) @ axes.T
        # An affine with shear changes their length.
        lengths = np.linalg.norm(directions, axis=1, keepdims=True)
        return np.asarray(directions / np.where(lengths > 0, lengths, 1.0))


def select_shells(b_values: np.ndarray, *, max_b: float = MAX_B, b0_threshold: float = B0_THRESHOLD) -> ShellSelection:
    """Group volumes into shells, and select b0 and the shells up to `max_b`, or the lowest shell if all are above it.

    A shell is above `max_b` if the mean of its b-values is more than 50 s/mm2 above it.

    Args:
        b_values: (N,) in s/mm2.
        max_b: Largest b-value to fit, in s/mm2.
        b0_threshold: Largest b-value of a b0 volume, in s/mm2.
    """
    is_b0 = b_values <= b0_threshold
    groups: list[np.ndarray] = []
    rest = np.sort(b_values[~is_b0])
    while len(rest):
        is_near = rest < rest[0] + SHELL_WIDTH
        groups.append((b_values >= rest[0]) & (b_values <= rest[is_near][-1]))
        rest = rest[~is_near]
    means = [float(b_values[group].mean()) for group in groups]
    is_above = bool(means) and means[0] > max_b + _TOLERANCE
    limit = means[0] if is_above else max_b + _TOLERANCE
    shells, is_fitted = [Shell(0, int(is_b0.sum()), is_fitted=True)], is_b0
    for group, mean in zip(groups, means, strict=True):
        shells.append(Shell(_nominal(mean), int(group.sum()), is_fitted=mean <= limit))
        if mean <= limit:
            is_fitted = is_fitted | group
    return ShellSelection(shells=tuple(shells), is_fitted=is_fitted, is_above=is_above)


def _nominal(mean: float) -> int:
    return round(mean) if mean < 50 else 50 * round(mean / 50)


def gradient_files(path: str | PathLike[str]) -> tuple[Path, Path]:
    """The `.bval` and `.bvec` files of a DWI: `sub-01_dwi.nii.gz` -> `sub-01_dwi.bval`, or an inherited `dwi.bval`.

    See `umbrella_data.files.paths.gradient_file`; a missing file's name is the one next to the DWI.
    """
    dwi = Path(path)
    return gradient_file(dwi, ".bval"), gradient_file(dwi, ".bvec")


def read_shells(
    path: str | PathLike[str], *, max_b: float = MAX_B, b0_threshold: float = B0_THRESHOLD
) -> tuple[Shell, ...]:
    """The b0 volumes and the shells of a DWI, from its bval file; arguments as in `select_shells`.

    Raises:
        ScanError: If the bval file is missing or wrong.
    """
    bval, _ = _files_in_tree(path)
    b_values = _read_b_values(bval, num_volumes=None, b0_threshold=b0_threshold)
    return select_shells(b_values, max_b=max_b, b0_threshold=b0_threshold).shells


def read_gradients(path: str | PathLike[str], *, num_volumes: int, b0_threshold: float = B0_THRESHOLD) -> Gradients:
    """Read and check the gradients of a DWI.

    Args:
        path: The DWI.
        num_volumes: Its volumes N.
        b0_threshold: Largest b-value of a b0 volume, in s/mm2.

    Raises:
        ScanError: `bval` or `bvec`, with that file's path.
    """
    bval, bvec = _files_in_tree(path)
    b_values = _read_b_values(bval, num_volumes=num_volumes, b0_threshold=b0_threshold)
    b_vectors = _read_b_vectors(bvec, b_values=b_values, is_b0=b_values <= b0_threshold)
    return Gradients(b_values=b_values, b_vectors=b_vectors, b0_threshold=b0_threshold)


def _files_in_tree(path: str | PathLike[str]) -> tuple[Path, Path]:
    """As `gradient_files`; a `ScanError` if an inherited file is a link out of the BIDS tree."""
    dwi = Path(path)
    files = gradient_files(dwi)
    for file, reason in zip(files, (ScanReason.BVAL, ScanReason.BVEC), strict=True):
        # The paths of a manifest are checked against its own root, with the files next to a scan.
        if file.parent != dwi.parent and not stays_in_tree(file, dwi):
            raise ScanError("a link that leads out of its BIDS tree; copy the file", path=file, reason=reason)
    return files


def _read_numbers(path: Path, *, reason: ScanReason) -> list[list[float]]:
    try:
        with open_regular_file(str(path)) as file:
            content = file.read(_MAX_BYTES + 1)
    except ScanError as error:
        is_missing = error.reason == ScanReason.MISSING
        hint = "; a DWI needs its .bval and .bvec next to it, or above it in its BIDS tree" if is_missing else ""
        raise ScanError(error.message + hint, path=path, reason=reason) from error
    if len(content) > _MAX_BYTES:
        raise ScanError(f"has more than {_MAX_BYTES} bytes: no series has so many volumes", path=path, reason=reason)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        text = "is not a text file; give the .bval and .bvec files of the DWI, which have numbers only"
        raise ScanError(text, path=path, reason=reason) from error
    rows: list[list[float]] = []
    for line, words in enumerate(text.splitlines(), start=1):
        try:
            numbers = [float(word) for word in words.replace(",", " ").split()]
        except ValueError as error:
            message = describe_look_alike(content) or f"line {line}: {error!s:.200}; write numbers only"
            raise ScanError(message, path=path, reason=reason) from error
        if numbers:
            rows.append(numbers)
    return rows


def _read_b_values(path: Path, *, num_volumes: int | None, b0_threshold: float) -> np.ndarray:
    rows = _read_numbers(path, reason=ScanReason.BVAL)
    values = np.array([number for row in rows for number in row])
    problem = None
    # The standard is one row; some tools write one column.
    if len(rows) > 1 and any(len(row) != 1 for row in rows):
        problem = f"{len(rows)} rows of b-values; write one row"
    elif num_volumes is not None and len(values) != num_volumes:
        problem = f"{len(values)} b-values for {num_volumes} volumes"
    elif not len(values) or not np.isfinite(values).all() or values.min() < 0:
        problem = "must have b-values, all finite and none negative"
    elif values.max() > MAX_ACCEPTED_B:
        problem = f"b up to {values.max():g}: must be at most {MAX_ACCEPTED_B:g} s/mm2; is the unit s/m2?"
    elif 0 < values.max() <= b0_threshold:
        problem = f"b up to {values.max():g} only: must be in s/mm2; is the unit ms/um2?"
    elif not (values <= b0_threshold).any():
        problem = (f"no b0 volume: the lowest b is {values.min():g}; at least one must be at most {b0_threshold:g}: if "
                   "these are b0 volumes, raise b0_threshold")  # fmt: skip
    if problem is not None:
        raise ScanError(problem, path=path, reason=ScanReason.BVAL)
    return values


def _read_b_vectors(path: Path, *, b_values: np.ndarray, is_b0: np.ndarray) -> np.ndarray:
    rows = _read_numbers(path, reason=ScanReason.BVEC)
    count = len(b_values)
    shape = (len(rows), len(rows[0]) if rows else 0)
    if any(len(row) != shape[1] for row in rows) or shape not in ((3, count), (count, 3)):
        lengths = sorted({len(row) for row in rows})
        raise ScanError(
            f"{len(rows)} rows of {lengths} numbers; write 3 rows of {count}, or {count} rows of 3",
            path=path,
            reason=ScanReason.BVEC,
        )
    vectors = np.array(rows) if shape == (count, 3) and count != 3 else np.array(rows).T
    # A b0 has no direction: real files have zeros, NaN or any other values for it.
    lengths_all = np.linalg.norm(vectors, axis=1)
    vectors = np.where((is_b0 & ~(np.abs(lengths_all - 1) < 0.05))[:, None], 0.0, vectors)
    wrong = [row for row in np.flatnonzero(~is_b0) if not abs(lengths_all[row] - 1) < 0.05]
    if wrong:
        raise ScanError(
            f"volume {wrong[0] + 1} (b = {b_values[wrong[0]]:g}) has a direction of length {lengths_all[wrong[0]]:.3g} "
            f"({len(wrong)} such); every direction must be finite and of length 1",
            path=path,
            reason=ScanReason.BVEC,
        )
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1.0))
