"""NIfTI header, parsed by nibabel and checked strictly: errors are raised, suspicious values become warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.files.look_alikes import describe_look_alike
from umbrella_data.scan.geometry import check_affine, spacing_of

MAX_OFFSET = 1 << 24
"""The most bytes of header extensions that are read before the voxels (16 MiB)."""

MAX_DECLARED_VOXELS = 1 << 40
"""More voxels than any scan has: such a header is damaged or malicious, whatever its rank is."""

REPETITION_TIME_LIMITS = (0.01, 100.0)
"""Accepted seconds from frame to frame; files with "2000 s" mean milliseconds, or have no usable value."""

_DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_MM_PER_UNIT = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
# NIFTI_XFORM_TEMPLATE_OTHER (nifti1.h)
_MAX_FORM_CODE = 5
_SECONDS_PER_UNIT = {8: 1.0, 16: 1e-3, 24: 1e-6}


class ScanWarning(StrEnum):
    """Codes of what is valid but suspicious in a scan's header, sidecar or voxels; they are stable."""

    NO_FORM = "no_form"
    FORMS_DISAGREE = "forms_disagree"
    BITPIX = "bitpix"
    PIXDIM = "pixdim"
    SCALING = "scaling"
    REPETITION_TIME = "repetition_time"
    SIDECAR = "sidecar"
    SIDECAR_REPETITION_TIME = "sidecar_repetition_time"
    NO_BACKGROUND = "no_background"
    HIGH_B = "high_b"
    NON_FINITE = "non_finite_zeroed"
    EMPTY_FRAMES = "empty_frames"
    REPEATED_FRAMES = "repeated_frames"
    CROPPED = "cropped"

    @property
    def meaning(self) -> str:
        """What is suspicious, and what is used instead."""
        return _MEANINGS[self]


_MEANINGS = {
    ScanWarning.NO_FORM: "the header has neither an sform nor a qform: left and right are a guess",
    ScanWarning.FORMS_DISAGREE: "sform and qform place the voxels differently: the sform is used",
    ScanWarning.BITPIX: "bitpix is not the size of the datatype: the datatype is used",
    ScanWarning.PIXDIM: "pixdim is zero, negative or not the affine's voxel sizes: the affine's are used",
    ScanWarning.SCALING: "the slope is infinite or NaN: the stored values are used without scaling",
    ScanWarning.REPETITION_TIME: "the header gives no usable repetition time: a sidecar's is used, if there is one",
    ScanWarning.SIDECAR: "the sidecar, or its RepetitionTime, cannot be used: the header's is used",
    ScanWarning.SIDECAR_REPETITION_TIME: "sidecar and header give different repetition times: the sidecar's is used",
    ScanWarning.NO_BACKGROUND: "the mean b0 has no dark background: every voxel with a signal is taken for brain",
    ScanWarning.NON_FINITE: "voxels outside of the mask, or any with non_finite: zero, are NaN or infinite: they are 0",
    ScanWarning.EMPTY_FRAMES: "every voxel of a frame has the same value, mostly 0: the frame has no image",
    ScanWarning.REPEATED_FRAMES: "three or more frames in a row are identical: frames were lost and filled in",
    ScanWarning.CROPPED: "more than 1 % of the mask or foreground is outside of the model's box (image_size)",
    ScanWarning.HIGH_B: "every shell of the DWI is above max_b: the tensor is fitted on the lowest one",
}


@dataclass(frozen=True, kw_only=True)
class ScanHeader:
    """A checked NIfTI header, as stored (not reoriented).

    Attributes:
        shape: (X, Y, Z) or (X, Y, Z, T) along the stored axes; trailing axes of length 1 are dropped.
        dtype: Stored type of a voxel, with its byte order.
        offset: First byte of the voxels in the decompressed file.
        slope: Factor from stored to real values; 1 if the header has no scaling.
        inter: Summand from stored to real values.
        affine: (4, 4) float64, voxel index to world coordinates in mm.
        spacing: Voxel size in mm along the three stored axes, from the affine.
        repetition_time: Seconds from frame to frame; None for a volume or without a usable value.
        warnings: What is valid but suspicious.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: np.ndarray
    spacing: tuple[float, float, float]
    repetition_time: float | None
    warnings: tuple[ScanWarning, ...]

    @property
    def num_frames(self) -> int:
        """Frames of a series; 1 for a volume."""
        return self.shape[3] if len(self.shape) == 4 else 1

    @property
    def frame_bytes(self) -> int:
        """Bytes of one stored frame."""
        return math.prod(self.shape[:3]) * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole decompressed file."""
        return self.offset + self.num_frames * self.frame_bytes


def header_length(start: bytes, *, path: str) -> int:
    """Bytes of the fixed header, 348 (NIfTI-1) or 540 (NIfTI-2).

    Args:
        start: At least the first 4 bytes of the decompressed file; with `START_BYTES`, errors say what the file is.
        path: The file's name for errors.

    Raises:
        ScanError: `file_type` if the file is not NIfTI, `truncated` if it has less than 4 bytes.
    """
    if len(start) < 4:
        message = describe_look_alike(start) or "the file is too short for a NIfTI header"
        raise ScanError(message, path=path, reason=ScanReason.TRUNCATED)
    for length in (348, 540):
        if length in (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")):
            return length
    unknown = f"not a NIfTI file: it begins with {start[:4].hex(' ')}; convert it to NIfTI-1 or NIfTI-2"
    raise ScanError(describe_look_alike(start) or unknown, path=path, reason=ScanReason.FILE_TYPE)


def parse_header(block: bytes, *, path: str, is_pair: bool = False) -> ScanHeader:
    """Read and check the fixed header.

    Args:
        block: Exactly the 348 or 540 bytes that `header_length` returns.
        path: The file's name for errors.
        is_pair: Whether header and voxels are in separate files.

    Raises:
        ScanError: With the reason `file_type`, `dims`, `dtype`, `offset`, `scaling`, `affine` or `spacing`.
    """
    fields = _nibabel_header(block, path=path, is_pair=is_pair)
    warnings: list[ScanWarning] = []
    shape = _shape(fields, path=path)
    dtype = _dtype(fields, warnings, path=path)
    offset = _offset(fields, least=0 if is_pair else len(block) + 4, path=path)
    slope, inter = _scaling(fields, warnings, path=path)
    _repair_pixdim(fields, warnings)
    affine = _affine(fields, warnings, path=path)
    spacing = _spacing(fields, affine, warnings, path=path)
    return ScanHeader(
        shape=shape,
        dtype=dtype,
        offset=offset,
        slope=slope,
        inter=inter,
        affine=affine,
        spacing=spacing,
        repetition_time=_repetition_time(fields, warnings) if len(shape) == 4 else None,
        warnings=tuple(warnings),
    )


def header_ends(num_bytes: int, *, path: str) -> ScanError:
    """The error for a file that is too short for its header."""
    return ScanError(
        f"the file ends inside its header, after {num_bytes} bytes", path=path, reason=ScanReason.TRUNCATED
    )


def check_extensions(block: bytes, *, path: str) -> None:
    """Reject header extensions that do not fill their block to the end.

    Raises:
        ScanError: With the reason `extension`.
    """
    position = 0
    # As in nibabel, sizes need not be multiples of 16, and padding that is too short for an extension is skipped.
    while len(block) - position >= 16 or block[position:].strip(b"\0"):
        size = int.from_bytes(block[position : position + 4], "little")
        swapped = int.from_bytes(block[position : position + 4], "big")
        size = min(size, swapped) if size >= 8 and swapped >= 8 else max(size, swapped)
        if size < 8 or position + size > len(block):
            raise ScanError(
                f"a header extension of {size} bytes does not fit before the voxels; write the file again with nibabel",
                path=path,
                reason=ScanReason.EXTENSION,
            )
        position += size


def _nibabel_header(block: bytes, *, path: str, is_pair: bool) -> Nifti1Header:
    little = int.from_bytes(block[:4], "little") == len(block)
    kind, number = (Nifti1Header, b"1") if len(block) == 348 else (Nifti2Header, b"2")
    magic = (b"ni" if is_pair else b"n+") + number + b"\0"
    # check=False: nibabel's own checks repair some fields silently; the checks below reject them.
    fields = kind(block, endianness="<" if little else ">", check=False)
    stored = bytes(fields["magic"])
    if stored == magic:
        return fields
    if stored[:2] == b"ni":
        message = "the header of a .hdr/.img pair: name the two files so, or convert them to one .nii file"
    else:
        message = f"not a NIfTI file: its magic is {stored!r} and not {magic!r} (an Analyze file has no orientation)"
    raise ScanError(message, path=path, reason=ScanReason.FILE_TYPE)


def _shape(fields: Nifti1Header, *, path: str) -> tuple[int, ...]:
    dims = [int(size) for size in fields["dim"]]
    rank = dims[0]
    if not 1 <= rank <= 7 or any(size < 1 for size in dims[1 : rank + 1]):
        raise ScanError(
            f"impossible dimensions {dims}: must be the rank, 1 to 7, then that many sizes of at least 1",
            path=path,
            reason=ScanReason.DIMS,
        )
    shape = dims[1 : rank + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if math.prod(shape) > MAX_DECLARED_VOXELS:
        raise ScanError(
            f"the header declares {math.prod(shape)} voxels: its dimensions are wrong",
            path=path,
            reason=ScanReason.TOO_LARGE,
        )
    if not 3 <= len(shape) <= 4 or min(shape[:3]) < 2:
        raise ScanError(
            f"shape {tuple(dims[1 : rank + 1])} is neither a volume (X, Y, Z) nor a series (X, Y, Z, T) "
            "with at least 2 voxels along X, Y and Z",
            path=path,
            reason=ScanReason.RANK,
        )
    return tuple(shape)


def _dtype(fields: Nifti1Header, warnings: list[ScanWarning], *, path: str) -> np.dtype[Any]:
    code = int(fields["datatype"])
    if code not in _DTYPES:
        raise ScanError(
            f"datatype {code} is not supported: must be real numbers of 8 to 64 bits, not complex, RGB or 128-bit; "
            "convert to int16 or float32",
            path=path,
            reason=ScanReason.DTYPE,
        )
    dtype = np.dtype(_DTYPES[code]).newbyteorder(fields.endianness)
    if int(fields["bitpix"]) != 8 * dtype.itemsize:
        warnings.append(ScanWarning.BITPIX)
    return dtype


def _offset(fields: Nifti1Header, *, least: int, path: str) -> int:
    offset = float(fields["vox_offset"])
    # Four bytes after the fixed header declare extensions: voxels cannot begin before their end. 0 is usual in a pair.
    if not (math.isfinite(offset) and offset == int(offset) and least <= offset <= MAX_OFFSET):
        raise ScanError(
            f"voxels cannot begin at byte {offset:g}: must be a whole number from {least} to {MAX_OFFSET}",
            path=path,
            reason=ScanReason.OFFSET,
        )
    return int(offset)


def _scaling(fields: Nifti1Header, warnings: list[ScanWarning], *, path: str) -> tuple[float, float]:
    slope, inter = float(fields["scl_slope"]), float(fields["scl_inter"])
    # 0 means "no scaling" in the standard. nibabel treats a slope that is not finite alike, whatever the intercept is.
    if not math.isfinite(slope):
        warnings.append(ScanWarning.SCALING)
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(inter):
        raise ScanError(
            f"voxels cannot be scaled by slope {slope} and intercept {inter}: both must be finite",
            path=path,
            reason=ScanReason.SCALING,
        )
    return slope, inter


def _repair_pixdim(fields: Nifti1Header, warnings: list[ScanWarning]) -> None:
    """Ignore the sign of voxel sizes, and take a qfac of 0 for 1 (nifti1.h), as nibabel does.

    A size of 0, for which nibabel takes 1 mm, is rejected with the affine unless an sform gives it.
    """
    pixdim = fields["pixdim"]
    if (pixdim[1:4] < 0).any():
        warnings.append(ScanWarning.PIXDIM)
        pixdim[1:4] = np.abs(pixdim[1:4])
    if not pixdim[0] < 0:
        pixdim[0] = 1


def _affine(fields: Nifti1Header, warnings: list[ScanWarning], *, path: str) -> np.ndarray:
    codes = int(fields["sform_code"]), int(fields["qform_code"])
    # Readers differ on unknown codes: nibabel ignores the form, others use it, which may swap left and right.
    if not all(0 <= code <= _MAX_FORM_CODE for code in codes):
        raise ScanError(
            f"sform_code {codes[0]} and qform_code {codes[1]}: must be 0 to {_MAX_FORM_CODE}; set the forms again",
            path=path,
            reason=ScanReason.AFFINE,
        )
    has_sform, has_qform = (code > 0 for code in codes)
    if not (has_sform or has_qform):
        warnings.append(ScanWarning.NO_FORM)
    # Without voxel sizes, there is no qform to compare.
    is_compared = has_sform and has_qform and bool((fields["pixdim"][1:4] > 0).all())
    try:
        affine = np.array(fields.get_best_affine(), dtype=np.float64)
        qform = np.array(fields.get_qform()) if is_compared else affine
    except (HeaderDataError, ValueError, np.linalg.LinAlgError) as error:
        if not has_sform:
            raise ScanError(f"the qform is not a rotation ({error})", path=path, reason=ScanReason.AFFINE) from error
        affine, qform = np.array(fields.get_sform(), dtype=np.float64), np.full((4, 4), np.nan)
    scale = _MM_PER_UNIT.get(int(fields["xyzt_units"]) & 7, 1.0)
    affine[:3] *= scale
    qform[:3] *= scale if is_compared else 1.0
    check_affine(affine, path=path)
    if is_compared and not np.allclose(qform, affine, atol=0.1):
        warnings.append(ScanWarning.FORMS_DISAGREE)
    return affine


def _spacing(
    fields: Nifti1Header, affine: np.ndarray, warnings: list[ScanWarning], *, path: str
) -> tuple[float, float, float]:
    spacing = spacing_of(affine, path=path)
    scale = _MM_PER_UNIT.get(int(fields["xyzt_units"]) & 7, 1.0)
    is_equal = np.allclose(fields["pixdim"][1:4] * scale, spacing, rtol=0.01)
    if not is_equal and ScanWarning.PIXDIM not in warnings:
        warnings.append(ScanWarning.PIXDIM)
    return spacing


def _repetition_time(fields: Nifti1Header, warnings: list[ScanWarning]) -> float | None:
    """Seconds from frame to frame, or None: without a unit, 2000 may be milliseconds or wrong."""
    unit = _SECONDS_PER_UNIT.get(int(fields["xyzt_units"]) & 56)
    seconds = float(fields["pixdim"][4]) * unit if unit is not None else math.nan
    low, high = REPETITION_TIME_LIMITS
    if low <= seconds <= high:
        # Later digits are rounding errors of float32.
        return round(seconds, 6)
    warnings.append(ScanWarning.REPETITION_TIME)
    return None
