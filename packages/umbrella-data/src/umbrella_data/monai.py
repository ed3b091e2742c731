"""Strict reading of NIfTI files in MONAI pipelines. Imports MONAI, so that nothing else here imports this module."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

import numpy as np
from monai.data.image_reader import ImageReader
from monai.utils.enums import MetaKeys, SpaceKeys

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.geometry import is_same_grid
from umbrella_data.scan.reader import open_scan
from umbrella_data.scan.voxels import MAX_VOXELS, Voxels, check_rank, read_voxels

__all__ = ["StrictNiftiReader"]

_ENDINGS = (".nii", ".hdr", ".img")


class StrictNiftiReader(ImageReader):
    """Reads NIfTI files into RAS+ for `LoadImage(reader=StrictNiftiReader())`; unusable ones raise a `ScanError`.

    `Compose` raises a RuntimeError with the `ScanError` as its `__cause__`. PyTorch raises an error of a loader worker
    as text, in which the line of the cause is `ScanError: FILE: what is wrong [reason]`.

    Args:
        max_voxels: The most voxels to read from one file.
    """

    def __init__(self, *, max_voxels: int = MAX_VOXELS) -> None:
        super().__init__()
        self.max_voxels = max_voxels

    def verify_suffix(self, filename: Sequence[str | PathLike[str]] | str | PathLike[str]) -> bool:
        """Whether all files have names of NIfTI files."""
        return all(name.lower().removesuffix(".gz").endswith(_ENDINGS) for name in _names(filename))

    def read(self, data: Sequence[str | PathLike[str]] | str | PathLike[str], **_: Any) -> tuple[str, ...]:
        """The names, for `get_data`. `LoadImage` would read a file that is rejected here with its other readers."""
        return _names(data)

    def get_data(self, img: tuple[str, ...]) -> tuple[np.ndarray, dict[str, Any]]:
        """Read what `read` returned.

        Returns:
            float32 (X, Y, Z) for a volume, (X, Y, Z, T) for a series, (C, X, Y, Z) for several volumes, where X runs to
            the Right, Y to Anterior, Z to Superior; and MONAI's metadata: `affine` of this array, `original_affine` of
            the file, in mm.

        Raises:
            ScanError: If a file cannot be used, or `maps` if several do not have the same grid.
        """
        read = [self._voxels(name, is_one_of_several=len(img) > 1) for name in img]
        first = read[0]
        for name, other in zip(img, read, strict=True):
            shape = first.frames.shape[1:]
            if other.frames.shape[1:] != shape or not is_same_grid(first.affine, other.affine, shape=shape):
                raise ScanError(
                    f"its grid differs from that of {img[0]}; resample one of them",
                    path=name,
                    reason=ScanReason.MAPS,
                )
        is_series = len(first.header.shape) == 4
        if len(img) > 1:
            array, channel_dim = np.concatenate([each.frames for each in read]), 0.0
        else:
            array = first.frames.transpose(1, 2, 3, 0) if is_series else first.frames[0]
            channel_dim = -1 if is_series else float("nan")  # MONAI's value for no channels
        return array, {
            MetaKeys.AFFINE: first.affine,
            MetaKeys.ORIGINAL_AFFINE: first.header.affine,
            MetaKeys.SPATIAL_SHAPE: np.asarray(first.frames.shape[1:]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: channel_dim,
            MetaKeys.SPACE: SpaceKeys.RAS,
        }

    def _voxels(self, name: str, *, is_one_of_several: bool) -> Voxels:
        with open_scan(name) as scan:
            if is_one_of_several:
                check_rank(scan.header, rank=3, path=scan.path)
            rank = len(scan.header.shape)
        return read_voxels(name, rank=rank, max_voxels=self.max_voxels, non_finite="reject")


def _names(paths: Sequence[str | PathLike[str]] | str | PathLike[str]) -> tuple[str, ...]:
    # A str is a sequence of characters.
    listed = [paths] if isinstance(paths, str | PathLike) else paths
    return tuple(fspath(path) for path in listed)
