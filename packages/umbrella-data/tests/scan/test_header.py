"""A header is checked against the NIfTI standard: errors have a reason, suspicious values a warning."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.header import ScanWarning, header_length, parse_header

NAN = float("nan")


def block(change: Callable[[Any], None] | None = None, *, version: int = 1, endianness: str = "<") -> bytes:
    """A valid header of a (5, 6, 7, 10) int16 series at 2 mm, changed."""
    header = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(endianness=endianness)
    header.set_data_dtype(np.int16)
    header.set_data_shape((5, 6, 7, 10))
    header.set_xyzt_units("mm", "sec")
    header.set_zooms((2, 2, 2, 1.5))
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header["magic"] = b"n+1" if version == 1 else b"n+2\x00\r\n\x1a\n"
    header["vox_offset"] = 352 if version == 1 else 544
    if change is not None:
        change(header)
    return bytes(header.binaryblock)


def put(**fields: Any) -> Callable[[Any], None]:
    def change(header: Any) -> None:
        for name, value in fields.items():
            header[name] = value

    return change


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_parse_header_reads_all_fields_when_valid(version: int, endianness: str) -> None:
    content = block(put(scl_slope=0.5, scl_inter=-3), version=version, endianness=endianness)
    assert header_length(content[:4], path="x.nii") == len(content) == (348 if version == 1 else 540)
    header = parse_header(content, path="x.nii")
    assert header.shape == (5, 6, 7, 10)
    assert header.dtype == np.dtype(np.int16).newbyteorder(endianness)
    assert header.offset == len(content) + 4
    assert (header.slope, header.inter) == (0.5, -3.0)
    assert header.spacing == (2.0, 2.0, 2.0)
    assert header.repetition_time == 1.5
    assert header.file_bytes == header.offset + 5 * 6 * 7 * 10 * 2
    assert header.warnings == ()
    np.testing.assert_array_equal(header.affine, np.diag([2.0, 2.0, 2.0, 1.0]))


ZERO_SFORM = {"srow_x": [0, 0, 0, 0], "srow_y": [0, 2, 0, 0], "srow_z": [0, 0, 2, 0]}
WRONG = {
    "rank_0": (put(dim=[0, 5, 6, 7, 10, 1, 1, 1]), ScanReason.DIMS),
    "rank_8": (put(dim=[8, 5, 6, 7, 10, 1, 1, 1]), ScanReason.DIMS),
    "negative_size": (put(dim=[4, 5, -6, 7, 10, 1, 1, 1]), ScanReason.DIMS),
    "zero_size": (put(dim=[4, 5, 6, 7, 0, 1, 1, 1]), ScanReason.DIMS),
    "image_2d": (put(dim=[2, 5, 6, 1, 1, 1, 1, 1]), ScanReason.RANK),
    "one_slice": (put(dim=[3, 5, 6, 1, 1, 1, 1, 1]), ScanReason.RANK),
    "image_5d": (put(dim=[5, 5, 6, 7, 10, 2, 1, 1]), ScanReason.RANK),
    "vector_5d": (put(dim=[5, 5, 6, 7, 1, 3, 1, 1]), ScanReason.RANK),
    "complex64": (put(datatype=32, bitpix=64), ScanReason.DTYPE),
    "rgb24": (put(datatype=128, bitpix=24), ScanReason.DTYPE),
    "float128": (put(datatype=1536, bitpix=128), ScanReason.DTYPE),
    "unknown_type": (put(datatype=5), ScanReason.DTYPE),
    "offset_0": (put(vox_offset=0), ScanReason.OFFSET),
    "offset_in_header": (put(vox_offset=348), ScanReason.OFFSET),
    "offset_fraction": (put(vox_offset=352.5), ScanReason.OFFSET),
    "offset_nan": (put(vox_offset=NAN), ScanReason.OFFSET),
    "offset_huge": (put(vox_offset=1e9), ScanReason.OFFSET),
    "inter_nan": (put(scl_slope=2, scl_inter=NAN), ScanReason.SCALING),
    "sform_nan": (put(srow_x=[NAN, 0, 0, 0]), ScanReason.AFFINE),
    "sform_inf_origin": (put(srow_x=[2, 0, 0, np.inf]), ScanReason.AFFINE),
    "sform_zero": (put(srow_x=[0] * 4, srow_y=[0] * 4, srow_z=[0] * 4), ScanReason.AFFINE),
    "sform_singular": (put(**ZERO_SFORM), ScanReason.AFFINE),
    "sform_parallel": (put(srow_x=[2, 2, 0, 0], srow_y=[0, 0.001, 0, 0]), ScanReason.AFFINE),
    "qform_nan": (put(sform_code=0, quatern_b=NAN), ScanReason.AFFINE),
    "qform_too_long": (put(sform_code=0, quatern_b=2.0), ScanReason.AFFINE),
    "spacing_huge": (put(srow_x=[2000, 0, 0, 0]), ScanReason.SPACING),
    "spacing_tiny": (put(srow_x=[1e-4, 0, 0, 0]), ScanReason.SPACING),
    "unit_metre": (put(xyzt_units=1 | 8), ScanReason.SPACING),
    "magic_none": (put(magic=b""), ScanReason.FILE_TYPE),
    "magic_pair": (put(magic=b"ni1"), ScanReason.FILE_TYPE),
}


@pytest.mark.parametrize("name", WRONG)
def test_parse_header_rejects_with_its_reason_when_wrong(name: str) -> None:
    change, reason = WRONG[name]
    with pytest.raises(ScanError) as caught:
        parse_header(block(change), path="x.nii")
    assert (caught.value.reason, caught.value.path) == (reason, "x.nii")


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (put(sform_code=0, qform_code=0), ScanWarning.NO_FORM),
        (put(srow_x=[2, 0, 0, 30]), ScanWarning.FORMS_DISAGREE),
        (put(bitpix=8), ScanWarning.BITPIX),
        (put(pixdim=[1, 3, 2, 2, 1.5, 1, 1, 1]), ScanWarning.PIXDIM),
        (put(pixdim=[1, 0, 2, 2, 1.5, 1, 1, 1]), ScanWarning.PIXDIM),
        (put(pixdim=[1, 2, -2, 2, 1.5, 1, 1, 1]), ScanWarning.PIXDIM),
        (put(scl_slope=NAN), ScanWarning.SCALING),
        (put(scl_slope=np.inf), ScanWarning.SCALING),
        (put(pixdim=[1, 2, 2, 2, 2000, 1, 1, 1]), ScanWarning.REPETITION_TIME),
        (put(xyzt_units=2), ScanWarning.REPETITION_TIME),
    ],
)
def test_parse_header_warns_when_legal_but_suspicious(change: Callable[[Any], None], warning: ScanWarning) -> None:
    assert warning in parse_header(block(change), path="x.nii").warnings


@pytest.mark.parametrize("slope", [0.0, NAN, np.inf, -np.inf])
def test_parse_header_scales_nothing_when_slope_is_unset(slope: float) -> None:
    header = parse_header(block(put(scl_slope=slope, scl_inter=7)), path="x.nii")
    assert (header.slope, header.inter) == (1.0, 0.0)


@pytest.mark.parametrize(("unit", "value"), [(8, 1.5), (16, 1500.0), (24, 1_500_000.0)])
def test_parse_header_gives_seconds_when_the_unit_is_another(unit: int, value: float) -> None:
    header = parse_header(block(put(xyzt_units=2 | unit, pixdim=[1, 2, 2, 2, value, 1, 1, 1])), path="x.nii")
    assert header.repetition_time == pytest.approx(1.5)


def test_parse_header_reads_microns_when_they_are_the_unit() -> None:
    scale = {"srow_x": [2000, 0, 0, 0], "srow_y": [0, 2000, 0, 0], "srow_z": [0, 0, 2000, 0]}
    assert parse_header(block(put(xyzt_units=3 | 8, **scale)), path="x.nii").spacing == (2.0, 2.0, 2.0)


def test_parse_header_drops_trailing_axes_when_of_length_one() -> None:
    header = parse_header(block(put(dim=[6, 5, 6, 7, 1, 1, 1, 1])), path="x.nii")
    assert header.shape == (5, 6, 7)
    assert header.repetition_time is None


def test_header_length_rejects_when_not_nifti() -> None:
    with pytest.raises(ScanError) as caught:
        header_length(b"DICM", path="x.nii")
    assert caught.value.reason == ScanReason.FILE_TYPE
    with pytest.raises(ScanError) as caught:
        header_length(struct.pack("<h", 348), path="x.nii")
    assert caught.value.reason == ScanReason.TRUNCATED
