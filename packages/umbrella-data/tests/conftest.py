"""What the tests of this package share: small NIfTI files made on the spot, and the real scans where they exist."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest


@pytest.fixture
def real_data() -> Path:
    """The BIDS tree of real scans that UMBRELLA_REAL_DATA names."""
    folder = os.environ.get("UMBRELLA_REAL_DATA")
    if not folder:
        pytest.skip("UMBRELLA_REAL_DATA is not set")
    return Path(folder)


@dataclass
class NiftiFactory:
    """Writes small scans below one folder."""

    folder: Path

    def image(
        self,
        voxels: np.ndarray,
        *,
        affine: np.ndarray | None = None,
        orientation: str = "RAS",
        repetition_time: float | None = None,
        version: int = 1,
        endianness: str = "<",
        scaling: tuple[float, float] | None = None,
    ) -> Any:
        """An image of voxels given in RAS+ order, stored as another orientation."""
        kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
        base = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
        header = kind.header_class(endianness=endianness)
        header.set_data_dtype(voxels.dtype)
        image = kind(voxels, base, header)
        image.header.set_xyzt_units("mm", "sec")
        image.set_sform(base, code=1)
        image.set_qform(base, code=1)
        if orientation != "RAS":
            start = nib.orientations.io_orientation(base)
            image = image.as_reoriented(
                nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(orientation))
            )
        if repetition_time is not None:
            zooms = image.header.get_zooms()
            image.header.set_zooms((*zooms[:3], repetition_time))
        if scaling is not None:
            image.header.set_slope_inter(*scaling)
        return image

    def write(self, voxels: np.ndarray, name: str = "scan.nii.gz", **options: Any) -> Path:
        """Write voxels (RAS+ order) and return the path. Options as in `image`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        scaling = options.get("scaling")
        image = self.image(voxels, **options)
        if scaling is None:
            nib.save(image, path)
            return path
        # nibabel would divide by the slope on saving; the stored numbers are wanted as they are.
        header = image.header.copy()
        header.set_slope_inter(*scaling)
        header["vox_offset"] = 352 if options.get("version", 1) == 1 else 544
        header["magic"] = b"n+1" if options.get("version", 1) == 1 else b"n+2\x00\r\n\x1a\n"
        stored = np.asarray(image.dataobj).astype(header.get_data_dtype())
        content = header.binaryblock + b"\0\0\0\0" + stored.tobytes(order="F")
        path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
        return path

    def patch(self, path: Path, offset: int, value: bytes) -> Path:
        """Overwrite bytes of the (decompressed) file."""
        compressed = path.name.endswith(".gz")
        content = bytearray(gzip.decompress(path.read_bytes()) if compressed else path.read_bytes())
        content[offset : offset + len(value)] = value
        path.write_bytes(gzip.compress(bytes(content)) if compressed else bytes(content))
        return path


@pytest.fixture
def nifti(tmp_path: Path) -> NiftiFactory:
    """A writer of small NIfTI files in the test's own folder."""
    return NiftiFactory(tmp_path)


@pytest.fixture
def random_voxels() -> Callable[..., np.ndarray]:
    """Random int16 voxels of a shape, the same at every call."""

    def make(*shape: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(1, 1000, size=shape).astype(np.int16)

    return make
