"""A corpus of unusual and damaged files, one row per kind: rejected with a reason, or read bit-equal to a reference.

Every row changes a valid series (4-D) or volume (3-D). The reference of a row that is read is the valid file's voxels
as read by nibabel, scaled as the row states.
"""

from __future__ import annotations

import gzip
import os
import socket
import stat
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import ScanError
from umbrella_data.errors import ScanReason as R
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig
from umbrella_data.pipeline.resample import Grid
from umbrella_data.pipeline.streaming import read_resampled
from umbrella_data.scan.header import ScanWarning
from umbrella_data.scan.reader import open_scan
from umbrella_data.scan.volume import load_volume, read_shape

NAN, INF = float("nan"), float("inf")
SHAPE = (5, 6, 7)
HEADER = 352
RNG = np.random.default_rng(0)
VOLUME = RNG.integers(1, 1000, SHAPE).astype("<i2")
SERIES = RNG.integers(1, 1000, (*SHAPE, 4)).astype("<i2")

# Offsets of fields in a NIfTI-1 header, and their formats (nifti1.h).
FIELDS = {
    "sizeof_hdr": (0, "i"),
    "dim": (40, "8h"),
    "datatype": (70, "h"),
    "bitpix": (72, "h"),
    "pixdim": (76, "8f"),
    "vox_offset": (108, "f"),
    "scl_slope": (112, "f"),
    "scl_inter": (116, "f"),
    "xyzt_units": (123, "B"),
    "qform_code": (252, "h"),
    "sform_code": (254, "h"),
    "quatern": (256, "3f"),
    "qoffset": (268, "3f"),
    "srow_x": (280, "4f"),
    "srow_y": (296, "4f"),
    "srow_z": (312, "4f"),
    "magic": (344, "4s"),
    "extension": (348, "4B"),
}


def good(voxels: np.ndarray = VOLUME) -> bytes:
    """A valid NIfTI-1 file: 2 mm, RAS+, 1.5 s."""
    image = nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0]))
    image.header.set_xyzt_units("mm", "sec")
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    if voxels.ndim == 4:
        image.header.set_zooms((2.0, 2.0, 2.0, 1.5))
    return image.to_bytes()


Change = Callable[[bytes], bytes]


def put(**values: Any) -> Change:
    """Overwrite header fields."""

    def change(content: bytes) -> bytes:
        data = bytearray(content)
        for name, value in values.items():
            offset, kind = FIELDS[name]
            struct.pack_into("<" + kind, data, offset, *(value if isinstance(value, tuple | list) else (value,)))
        return bytes(data)

    return change


def pack_at(content: bytes, offset: int, kind: str, *values: object) -> bytes:
    """Overwrite bytes at an offset."""
    data = bytearray(content)
    struct.pack_into(kind, data, offset, *values)
    return bytes(data)


def stored_as(dtype: str, code: int, *, scale: float = 1.0) -> Change:
    """Store the volume in another type."""

    def change(content: bytes) -> bytes:
        header = put(datatype=code, bitpix=8 * np.dtype(dtype).itemsize)(content)[:HEADER]
        return header + (VOLUME * scale).astype(dtype).tobytes(order="F")

    return change


def with_extension(size: int, *, text: bytes = b"", offset: float | None = None) -> Change:
    """Add one extension with a declared size of `size` bytes."""

    def change(content: bytes) -> bytes:
        block = struct.pack("<2i", size, 6) + text
        header = put(vox_offset=HEADER + len(block) if offset is None else offset, extension=(1, 0, 0, 0))(content)
        return header[:HEADER] + block + content[HEADER:]

    return change


def floats(place: int, value: float) -> Change:
    """The volume in float32, with another value in one voxel."""

    def change(content: bytes) -> bytes:
        data = VOLUME.astype("<f4").ravel(order="F")
        data[place] = value
        return put(datatype=16, bitpix=32)(content)[:HEADER] + data.tobytes()

    return change


def all_voxels(value: int) -> Change:
    return lambda content: content[:HEADER] + np.full(SHAPE, value, "<i2").tobytes()


def big_endian(content: bytes) -> bytes:
    image = nib.Nifti1Image.from_bytes(content)
    swapped = image.header.as_byteswapped(">")
    swapped["vox_offset"], swapped["scl_slope"], swapped["scl_inter"] = HEADER, 1, 0
    return swapped.binaryblock + bytes(4) + VOLUME.astype(">i2").tobytes(order="F")


def nifti2(content: bytes) -> bytes:
    image = nib.Nifti2Image(VOLUME, np.diag([2.0, 2.0, 2.0, 1.0]))
    image.set_sform(image.affine, code=1)
    return image.to_bytes()


def members(content: bytes) -> bytes:
    return b"".join(gzip.compress(content[i : i + 100]) for i in range(0, len(content), 100))


def packed(change: Callable[[bytes], bytes] = lambda stream: stream) -> Change:
    """Compress the file, then change the stream."""
    return lambda content: change(gzip.compress(content, mtime=0))


def flip(position: int) -> Callable[[bytes], bytes]:
    def change(stream: bytes) -> bytes:
        data = bytearray(stream)
        data[position] ^= 0x10
        return bytes(data)

    return change


@dataclass(frozen=True)
class Row:
    """One kind of file.

    Attributes:
        change: Converts the valid file to this one.
        reason: Why it is rejected; None if it is read.
        name: Its file name.
        factor, summand: Scaling from the valid file's voxels to those of this one.
        warnings: Its warnings, if it is read.
        is_series: Whether the valid file is the series.
        is_mirrored: Whether left and right are swapped.
    """

    change: Change
    reason: R | None = None
    name: str = "scan.nii"
    factor: float = 1.0
    summand: float = 0.0
    warnings: tuple[ScanWarning, ...] = ()
    is_series: bool = False
    is_mirrored: bool = False


GZ = "scan.nii.gz"
# Other kinds of files, by their first bytes.
LOOK_ALIKES = {
    "annex_pointer": b"/annex/objects/MD5E-s9123456--0123456789abcdef0123456789abcdef.nii.gz\n",
    "annex_link_as_text": b"../../.git/annex/objects/f9/9k/MD5E-s9--01/MD5E-s9--01.nii.gz",
    "lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n",
    "web_page": b"\n<!DOCTYPE html>\n<html><body>404</body></html>\n",
    "web_page_without_type": b"<HTML><head></head></HTML>",
    "xml_error": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "dicom": bytes(128) + b"DICM",
    "zip": b"PK\x03\x04\x14\x00",
    "tar": b"sub-01_T1w.nii".ljust(257, b"\0") + b"ustar\x0000",
    "minc": b"\x89HDF\r\n\x1a\n",
    "nrrd": b"NRRD0005\ntype: short\n",
}
BOTH_ZERO = {"srow_x": (0,) * 4, "srow_y": (0,) * 4, "srow_z": (0,) * 4}
ROWS: dict[str, Row] = {
    # Valid, and unusual but legal
    "good": Row(bytes),
    "good_series": Row(bytes, is_series=True),
    "good_gzip": Row(packed(), name=GZ),
    "good_big_endian": Row(big_endian),
    "good_nifti2": Row(nifti2),
    "good_members": Row(members, name=GZ),
    "good_empty_member_last": Row(packed(lambda stream: stream + gzip.compress(b"")), name=GZ),
    "good_stored_blocks": Row(lambda content: gzip.compress(content, 0), name=GZ),
    "good_upper_case": Row(packed(), name="SCAN.NII.GZ"),
    "good_extension": Row(with_extension(16, text=b"comment\0")),
    "good_extension_of_24_bytes": Row(with_extension(24, text=bytes(16))),
    "good_padding_after_extension": Row(with_extension(16, text=bytes(8 + 12))),
    "good_gap_before_voxels": Row(lambda c: put(vox_offset=400)(c)[:HEADER] + bytes(48) + c[HEADER:]),
    "good_trailing_axes": Row(put(dim=(6, 5, 6, 7, 1, 1, 1, 1))),
    "good_scaled": Row(put(scl_slope=0.5, scl_inter=-3.0), factor=0.5, summand=-3.0),
    "good_negative_slope": Row(put(scl_slope=-1.0, scl_inter=0.0), factor=-1.0),
    "good_slope_zero": Row(put(scl_slope=0.0, scl_inter=7.0)),
    "unusual_slope_nan": Row(put(scl_slope=NAN, scl_inter=NAN), warnings=(ScanWarning.SCALING,)),
    "unusual_slope_infinite": Row(put(scl_slope=INF, scl_inter=3.0), warnings=(ScanWarning.SCALING,)),
    "unusual_slope_minus_infinite": Row(put(scl_slope=-INF, scl_inter=NAN), warnings=(ScanWarning.SCALING,)),
    "good_uint8": Row(stored_as("u1", 2, scale=0.25), name="scan.nii", factor=0.25),
    "good_float64": Row(stored_as("<f8", 64, scale=0.5), factor=0.5),
    "good_int64": Row(stored_as("<i8", 1024)),
    "unusual_bitpix": Row(put(bitpix=8), warnings=(ScanWarning.BITPIX,)),
    # Without a form, nibabel and FSL assume storage from right to left.
    "unusual_no_form": Row(put(qform_code=0, sform_code=0), warnings=(ScanWarning.NO_FORM,), is_mirrored=True),
    "good_mirrored": Row(put(srow_x=(-2, 0, 0, 0), qform_code=0), is_mirrored=True),
    "unusual_forms_disagree": Row(put(qoffset=(30, 0, 0)), warnings=(ScanWarning.FORMS_DISAGREE,)),
    "unusual_pixdim": Row(put(qform_code=0, pixdim=(1, 5, 2, 2, 0, 0, 0, 0)), warnings=(ScanWarning.PIXDIM,)),
    "unusual_pixdim_0": Row(put(pixdim=(1, 0, 2, 2, 0, 0, 0, 0)), warnings=(ScanWarning.PIXDIM,)),
    "unusual_qform_no_rotation": Row(put(quatern=(0, 2, 0)), warnings=(ScanWarning.FORMS_DISAGREE,)),
    "unusual_pixdim_0_without_qform": Row(
        put(qform_code=0, pixdim=(1, 0, 0, 0, 0, 0, 0, 0)), warnings=(ScanWarning.PIXDIM,)
    ),
    "unusual_pixdim_negative": Row(put(pixdim=(1, -2, 2, -2, 0, 0, 0, 0)), warnings=(ScanWarning.PIXDIM,)),
    "unusual_pixdim_negative_of_qform": Row(
        put(sform_code=0, pixdim=(1, -2, 2, 2, 0, 0, 0, 0)), warnings=(ScanWarning.PIXDIM,)
    ),
    "unusual_pixdim_negative_without_form": Row(
        put(sform_code=0, qform_code=0, pixdim=(1, -2, 2, 2, 0, 0, 0, 0)),
        warnings=(ScanWarning.NO_FORM, ScanWarning.PIXDIM),
        is_mirrored=True,
    ),
    "good_qfac_0": Row(put(sform_code=0, pixdim=(0, 2, 2, 2, 0, 0, 0, 0))),
    "unusual_time_unit": Row(put(xyzt_units=2), warnings=(ScanWarning.REPETITION_TIME,), is_series=True),
    "unusual_time_negative": Row(
        put(pixdim=(1, 2, 2, 2, -1.5, 0, 0, 0)), warnings=(ScanWarning.REPETITION_TIME,), is_series=True
    ),
    # Kind of file
    "empty": Row(lambda content: b"", R.TRUNCATED),
    "three_bytes": Row(lambda content: content[:3], R.TRUNCATED),
    "dicom": Row(lambda content: bytes(128) + b"DICM" + content, R.FILE_TYPE),
    "text": Row(lambda content: b"<html>404</html>" * 40, R.FILE_TYPE),
    "analyze": Row(put(magic=b"\0\0\0\0"), R.FILE_TYPE),
    "pair_header": Row(put(magic=b"ni1\0"), R.FILE_TYPE),
    "magic_of_nifti2": Row(put(magic=b"n+2\0"), R.FILE_TYPE),
    "magic_without_end": Row(put(magic=b"n+1*"), R.FILE_TYPE),
    "sizeof_hdr": Row(put(sizeof_hdr=349), R.FILE_TYPE),
    "mgz": Row(packed(), R.FILE_TYPE, name="scan.mgz"),
    "no_extension": Row(bytes, R.FILE_TYPE, name="scan"),
    "bzip2": Row(lambda content: b"BZh9" + content, R.FILE_TYPE, name="scan.nii.bz2"),
    "zstandard_as_gzip": Row(lambda content: b"\x28\xb5\x2f\xfd" + content, R.GZIP_HEADER, name=GZ),
    "plain_as_gzip": Row(bytes, R.GZIP_HEADER, name=GZ),
    "gzip_as_plain": Row(packed(), R.GZIP_HEADER),
    "gzip_in_gzip": Row(packed(gzip.compress), R.FILE_TYPE, name=GZ),
    **{
        f"{name}_as_{ending}": Row(lambda _, start=start: start + bytes(700), R.FILE_TYPE, f"scan.{ending}")  # type: ignore[misc]
        for name, start in LOOK_ALIKES.items()
        for ending in ("nii", "nii.gz")
    },
    "web_page_in_gzip": Row(lambda content: gzip.compress(LOOK_ALIKES["web_page"]), R.FILE_TYPE, GZ),
    # Length
    "cut_in_header": Row(lambda content: content[:200], R.TRUNCATED),
    "cut_before_extension_flag": Row(lambda content: content[:348], R.TRUNCATED),
    "cut_before_voxels": Row(lambda content: content[:HEADER], R.TRUNCATED),
    "cut_in_voxels": Row(lambda content: content[:-1], R.TRUNCATED),
    "cut_a_frame": Row(lambda content: content[: -2 * 210], R.TRUNCATED, is_series=True),
    "one_byte_more": Row(lambda content: content + b"\0", R.TRAILING),
    "a_frame_more": Row(lambda content: content + bytes(2 * 210), R.TRAILING),
    "twice": Row(lambda content: content * 2, R.TRAILING),
    "line_ends_converted": Row(lambda content: content.replace(b"\n", b"\r\n"), R.FILE_TYPE),
    # Dimensions
    "rank_0": Row(put(dim=(0, 5, 6, 7, 1, 1, 1, 1)), R.DIMS),
    "rank_8": Row(put(dim=(8, 5, 6, 7, 1, 1, 1, 1)), R.DIMS),
    "rank_negative": Row(put(dim=(-3, 5, 6, 7, 1, 1, 1, 1)), R.DIMS),
    "size_0": Row(put(dim=(3, 5, 0, 7, 1, 1, 1, 1)), R.DIMS),
    "size_negative": Row(put(dim=(3, -5, -6, 7, 1, 1, 1, 1)), R.DIMS),
    "two_axes": Row(put(dim=(2, 30, 7, 1, 1, 1, 1, 1)), R.RANK),
    "one_slice": Row(put(dim=(3, 30, 7, 1, 1, 1, 1, 1)), R.RANK),
    "vectors": Row(put(dim=(5, 5, 6, 7, 1, 4, 1, 1)), R.RANK, is_series=True),
    "series_as_volume": Row(put(dim=(4, 5, 6, 1, 7, 1, 1, 1)), R.RANK),
    "volume_bomb": Row(put(dim=(3, 30000, 30000, 30000, 1, 1, 1, 1)), R.TOO_LARGE),
    "volume_bomb_of_gigabytes": Row(put(dim=(3, 1000, 1000, 1000, 1, 1, 1, 1)), R.TOO_LARGE),
    "series_bomb": Row(put(dim=(4, 300, 300, 300, 30000, 1, 1, 1)), R.TOO_LARGE, is_series=True),
    "gzip_bomb_in_header": Row(lambda c: packed()(put(dim=(3, 30000, 30000, 30000, 1, 1, 1, 1))(c)), R.TOO_LARGE, GZ),
    "bomb_of_7_axes": Row(put(dim=(7, *[32767] * 7)), R.TOO_LARGE),
    "nifti2_bomb": Row(lambda c: pack_at(nifti2(c), 16, "<4q", 3, 1 << 60, 1 << 60, 1 << 60), R.TOO_LARGE),
    "size_of_a_real_scan": Row(put(dim=(3, 256, 256, 256, 1, 1, 1, 1)), R.TRUNCATED),
    "size_of_a_real_scan_gzip": Row(lambda c: packed()(put(dim=(3, 256, 256, 256, 1, 1, 1, 1))(c)), R.TRUNCATED, GZ),
    # Types
    "type_0": Row(put(datatype=0), R.DTYPE),
    "type_binary": Row(put(datatype=1, bitpix=1), R.DTYPE),
    "type_complex64": Row(put(datatype=32, bitpix=64), R.DTYPE),
    "type_complex256": Row(put(datatype=2048, bitpix=256), R.DTYPE),
    "type_rgb": Row(put(datatype=128, bitpix=24), R.DTYPE),
    "type_rgba": Row(put(datatype=2304, bitpix=32), R.DTYPE),
    "type_float128": Row(put(datatype=1536, bitpix=128), R.DTYPE),
    "type_negative": Row(put(datatype=-4), R.DTYPE),
    "type_wider_than_stored": Row(put(datatype=16, bitpix=32), R.TRUNCATED),
    "type_narrower_than_stored": Row(put(datatype=2, bitpix=8), R.TRAILING),
    # Offsets and extensions
    "offset_0": Row(put(vox_offset=0.0), R.OFFSET),
    "offset_in_header": Row(put(vox_offset=100.0), R.OFFSET),
    "offset_fraction": Row(put(vox_offset=352.25), R.OFFSET),
    "offset_negative": Row(put(vox_offset=-352.0), R.OFFSET),
    "offset_nan": Row(put(vox_offset=NAN), R.OFFSET),
    "offset_infinite": Row(put(vox_offset=INF), R.OFFSET),
    "offset_huge": Row(put(vox_offset=1e15), R.OFFSET),
    "offset_after_file": Row(put(vox_offset=100_000.0), R.TRUNCATED),
    "offset_too_small": Row(with_extension(16, text=bytes(8), offset=352.0), R.TRAILING),
    "extension_too_long": Row(with_extension(1 << 30, text=bytes(8)), R.EXTENSION),
    "extension_negative": Row(with_extension(-16, text=bytes(8)), R.EXTENSION),
    "extension_of_0": Row(with_extension(0, text=bytes(8)), R.EXTENSION),
    "extension_of_4": Row(with_extension(4, text=bytes(8)), R.EXTENSION),
    "extension_past_the_voxels": Row(with_extension(48, text=bytes(8)), R.EXTENSION),
    "second_extension_of_0": Row(with_extension(16, text=bytes(8 + 32)), R.EXTENSION),
    "second_extension_too_long": Row(
        with_extension(16, text=bytes(8) + struct.pack("<2i", 64, 6) + bytes(24)), R.EXTENSION
    ),
    "rest_after_extension": Row(with_extension(16, text=bytes(8) + b"rest"), R.EXTENSION),
    # Scaling
    "inter_infinite": Row(put(scl_slope=1.0, scl_inter=-INF), R.SCALING),
    "inter_nan": Row(put(scl_slope=1.0, scl_inter=NAN), R.SCALING),
    "slope_overflows": Row(put(scl_slope=1e37, scl_inter=0.0), R.NON_FINITE),
    "slope_vanishes": Row(put(scl_slope=1e-38, scl_inter=100.0), R.CONSTANT),
    # Affines and forms
    "sform_code_unknown": Row(put(sform_code=90), R.AFFINE),
    "qform_code_negative": Row(put(qform_code=-1), R.AFFINE),
    "sform_zero": Row(put(**BOTH_ZERO), R.AFFINE),
    "sform_nan": Row(put(srow_y=(0, NAN, 0, 0)), R.AFFINE),
    "sform_infinite_origin": Row(put(srow_z=(0, 0, 2, INF)), R.AFFINE),
    "sform_singular": Row(put(srow_z=(2, 0, 0, 0)), R.AFFINE),
    "sform_flat": Row(put(srow_z=(0, 0, 1e-9, 0)), R.SPACING),
    "qform_too_long": Row(put(sform_code=0, quatern=(1, 1, 0)), R.AFFINE),
    "qform_nan": Row(put(sform_code=0, quatern=(0, NAN, 0)), R.AFFINE),
    "qform_spacing_0": Row(put(sform_code=0, pixdim=(1, 0, 2, 2, 0, 0, 0, 0)), R.AFFINE),
    "no_form_spacing_0": Row(put(sform_code=0, qform_code=0, pixdim=(1, 0, 2, 2, 0, 0, 0, 0)), R.AFFINE),
    "no_form_spacing_nan": Row(put(sform_code=0, qform_code=0, pixdim=(1, NAN, 2, 2, 0, 0, 0, 0)), R.AFFINE),
    "spacing_in_metres": Row(put(xyzt_units=1 | 8), R.SPACING),
    "spacing_in_microns": Row(put(xyzt_units=3 | 8), R.SPACING),
    "spacing_huge": Row(put(srow_x=(5000, 0, 0, 0)), R.SPACING),
    # Values
    "value_nan": Row(floats(0, NAN), R.NON_FINITE),
    "value_infinite": Row(floats(209, INF), R.NON_FINITE),
    "value_minus_infinite": Row(floats(100, -INF), R.NON_FINITE),
    "value_overflows": Row(stored_as("<f8", 64, scale=1e300), R.NON_FINITE),
    "all_zero": Row(all_voxels(0), R.CONSTANT),
    "all_one_value": Row(all_voxels(-7), R.CONSTANT),
    # Compression
    "gzip_cut": Row(packed(lambda stream: stream[:-100]), R.GZIP_TRUNCATED, GZ),
    "gzip_without_trailer": Row(packed(lambda stream: stream[:-8]), R.GZIP_TRUNCATED, GZ),
    "gzip_half_trailer": Row(packed(lambda stream: stream[:-4]), R.GZIP_TRUNCATED, GZ),
    "gzip_crc": Row(packed(flip(-6)), R.GZIP_CRC, GZ),
    "gzip_length": Row(packed(flip(-2)), R.GZIP_LENGTH, GZ),
    "gzip_method": Row(packed(flip(2)), R.GZIP_HEADER, GZ),
    "gzip_reserved_flag": Row(packed(lambda s: s[:3] + b"\x80" + s[4:]), R.GZIP_HEADER, GZ),
    "gzip_name_without_end": Row(packed(lambda s: s[:3] + b"\x08" + s[4:10] + b"n" * 5000), R.GZIP_HEADER, GZ),
    "gzip_only_a_header": Row(packed(lambda stream: stream[:10]), R.GZIP_TRUNCATED, GZ),
    "gzip_block_type": Row(packed(lambda s: s[:10] + b"\x07" + s[11:]), R.GZIP_DATA, GZ),
    "gzip_trailing_zeros": Row(packed(lambda stream: stream + bytes(512)), R.GZIP_TRAILING, GZ),
    "gzip_trailing_text": Row(packed(lambda stream: stream + b"trailing"), R.GZIP_TRAILING, GZ),
    "gzip_trailing_scan": Row(packed(lambda stream: stream * 2), R.TRAILING, GZ),
    "gzip_second_member_cut": Row(packed(lambda s: s + gzip.compress(b"")[:-1]), R.GZIP_TRUNCATED, GZ),
    "gzip_of_less": Row(lambda content: gzip.compress(content[:-2]), R.TRUNCATED, GZ),
    "gzip_of_more": Row(lambda content: gzip.compress(content + b"\0\0"), R.TRAILING, GZ),
    "gzip_of_nothing": Row(lambda content: gzip.compress(b""), R.TRUNCATED, GZ),
    "zlib_as_gzip": Row(zlib.compress, R.GZIP_HEADER, GZ),
    "empty_gzip": Row(lambda content: b"", R.GZIP_HEADER, GZ),
}


def read(path: Path, *, is_series: bool) -> np.ndarray:
    """The voxels, (X, Y, Z) or (X, Y, Z, T)."""
    return load_volume(path, modality="rsfMRI" if is_series else "T1").data[0].numpy()


def reason_with_cache(path: Path, cache_dir: Path, *, is_series: bool = False) -> R:
    """Why a pipeline with a cache rejects a file."""
    config = PipelineConfig(image_size=(3, 3, 3, 2) if is_series else (3, 3, 3))
    pipeline = Pipeline(config, modality="rsfMRI" if is_series else "T1", cache=VolumeCache(cache_dir))
    with pytest.raises(ScanError) as caught:
        pipeline(path, generator=None)
    assert not list(cache_dir.glob("volumes/*/*"))
    return caught.value.reason


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ROWS)
def test_file_is_rejected_or_read_as_its_row_says(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    path = tmp_path / row.name
    path.write_bytes(row.change(good(SERIES if row.is_series else VOLUME)))
    tracemalloc.start()
    try:
        if row.reason is None:
            reference = (SERIES if row.is_series else VOLUME) * row.factor + row.summand
            if name == "good_uint8":
                reference = np.trunc(reference)
            voxels = read(path, is_series=row.is_series)
            reference = reference[::-1] if row.is_mirrored else reference
            np.testing.assert_array_equal(voxels, reference.astype(np.float32))
            assert set(row.warnings) == set(read_shape(path).warnings)
        else:
            with pytest.raises(ScanError) as caught:
                read(path, is_series=row.is_series)
            assert (caught.value.reason, caught.value.path) == (row.reason, str(path))
            # The streaming reader rejects it too, for the same reason.
            with pytest.raises(ScanError) as caught, open_scan(path) as scan:
                read_resampled(scan, rank=4 if row.is_series else 3, grid=Grid(image_size=(3, 3, 3)))
            assert caught.value.reason == row.reason
            assert reason_with_cache(path, tmp_path / "cache", is_series=row.is_series) == row.reason
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_corpus_is_rejected_in_a_monai_pipeline_with_workers(tmp_path: Path, end_workers: Callable[[], None]) -> None:
    from monai.data import Dataset
    from monai.transforms import Compose, LoadImage
    from torch.utils.data import DataLoader

    from umbrella_data.monai import StrictNiftiReader

    # The reader takes volumes and series.
    rows = {name: row for name, row in ROWS.items() if row.reason not in (None, R.RANK)}
    assert len(rows) >= 60
    paths = []
    for name, row in rows.items():
        paths.append(tmp_path / name / row.name)
        paths[-1].parent.mkdir()
        paths[-1].write_bytes(row.change(good(SERIES if row.is_series else VOLUME)))
    transform = Compose([LoadImage(reader=StrictNiftiReader())])
    batches = iter(DataLoader(Dataset(paths, transform), batch_size=None, num_workers=1))
    for path, row in zip(paths, rows.values(), strict=True):
        with pytest.raises(RuntimeError) as in_process:
            transform(path)
        assert isinstance(in_process.value.__cause__, ScanError), path
        assert in_process.value.__cause__.reason == row.reason, path
        with pytest.raises(RuntimeError) as in_worker:
            next(batches)
        assert str(in_process.value.__cause__) in str(in_worker.value)


def test_corpus_is_large() -> None:
    assert sum(row.reason is not None for row in ROWS.values()) >= 60
    # Every reason that one file of voxels can have is in some row; others concern paths, windows or other files.
    elsewhere = {R.MISSING, R.NOT_REGULAR_FILE, R.UNREADABLE, R.WINDOW, R.SHORT_SERIES}
    elsewhere |= {R.MAPS, R.BVAL, R.BVEC, R.NO_BRAIN, R.MASK, R.HEADER, R.REPETITION_TIME}
    assert {row.reason for row in ROWS.values()} - {None} >= set(R) - elsewhere


def make_folder(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)
        server.bind(path.name)


def make_loop(path: Path) -> None:
    path.symlink_to(path.with_name("other.nii"))
    path.with_name("other.nii").symlink_to(path)


def make_link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to(path.with_name("pipe"))


PLACES: dict[str, tuple[Callable[[Path], object], R]] = {
    "nothing": (lambda path: None, R.MISSING),
    "dangling_link": (lambda path: path.symlink_to("nowhere.nii"), R.MISSING),
    "folder": (make_folder, R.NOT_REGULAR_FILE),
    "pipe": (make_pipe, R.NOT_REGULAR_FILE),
    "socket": (make_socket, R.NOT_REGULAR_FILE),
    "link_to_pipe": (make_link_to_pipe, R.NOT_REGULAR_FILE),
    "link_to_device": (lambda path: path.symlink_to("/dev/zero"), R.NOT_REGULAR_FILE),
    "link_loop": (make_loop, R.UNREADABLE),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("ending", ["scan.nii", GZ])
def test_path_is_rejected_when_it_is_not_a_regular_file(
    name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, reason = PLACES[name]
    make(tmp_path / ending)
    for _ in range(2):
        with pytest.raises(ScanError) as caught:
            load_volume(tmp_path / ending, modality="T1")
        assert caught.value.reason == reason
        assert reason_with_cache(tmp_path / ending, tmp_path / "cache") == reason


def test_path_is_rejected_when_too_long_or_with_invalid_bytes(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 300 + ".nii"), Path("nul\0byte.nii"), tmp_path / "\udcff" / "scan.nii"):
        with pytest.raises(ScanError) as caught:
            load_volume(path, modality="T1")
        assert caught.value.reason in (R.UNREADABLE, R.MISSING)
        assert reason_with_cache(path, tmp_path / "cache") == caught.value.reason


_READ_AS_NOBODY = """
import os, sys, tempfile
from pathlib import Path
from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import ScanError
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
with tempfile.TemporaryDirectory() as folder:
    for cache in (None, VolumeCache(folder)):
        pipeline = Pipeline(PipelineConfig(image_size=(3, 3, 3)), modality="T1", cache=cache)
        try:
            pipeline(Path(sys.argv[1]), generator=None)
        except ScanError as error:
            print(error.reason)
"""


@pytest.mark.parametrize("mode", [0o000, 0o200])
def test_file_is_rejected_when_permissions_forbid_it(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    path.write_bytes(good())
    for folder in [tmp_path, *tmp_path.parents[:2]]:
        folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IXGRP)
    path.chmod(mode)
    # In a separate process, which gives up the rights of the administrator.
    run = subprocess.run(
        [sys.executable, "-c", _READ_AS_NOBODY, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.split() == [R.UNREADABLE] * 2


_MEASURE = r"""
import re, sys
from pathlib import Path
from umbrella_data.errors import ScanError
from umbrella_data.scan.voxels import read_voxels
def peak():
    # getrusage would include the parent process.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
for path in sys.argv[1:]:
    before = peak()
    try:
        read_voxels(path, rank=4)
    except ScanError as error:
        print(error.reason, (peak() - before) // 1024)
"""


def bombs() -> dict[str, tuple[bytes, R]]:
    """Small files that declare much memory."""
    huge = put(dim=(4, 30000, 30000, 30000, 30000, 1, 1, 1))(good(SERIES))
    declared = put(dim=(4, 200, 200, 200, 30, 1, 1, 1))(good(SERIES))[:HEADER]
    long_extension = put(vox_offset=float(1 << 24), extension=(1, 0, 0, 0))(good(SERIES))
    zeros = zlib.compressobj(1, wbits=31)
    stream = zeros.compress(declared) + b"".join(zeros.compress(bytes(1 << 20)) for _ in range(458)) + zeros.flush()
    return {
        "header.nii": (huge, R.TOO_LARGE),
        "header.nii.gz": (gzip.compress(huge), R.TOO_LARGE),
        "zeros.nii.gz": (stream, R.TOO_LARGE),
        "extension.nii": (long_extension, R.EXTENSION),
        "extension.nii.gz": (gzip.compress(long_extension[:HEADER] + bytes(1 << 24)), R.EXTENSION),
    }


@pytest.mark.timeout(120)
def test_bombs_take_little_memory_when_rejected(tmp_path: Path) -> None:
    files = bombs()
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    # In a separate process, so that memory of C libraries counts too.
    command = [sys.executable, "-c", _MEASURE, *(str(tmp_path / name) for name in files)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    outcomes = [line.split() for line in run.stdout.splitlines()]
    assert [reason for reason, _ in outcomes] == [reason for _, reason in files.values()]
    assert max(int(megabytes) for _, megabytes in outcomes) < 50


def mutate_headers(count: int, *, seed: int, folder: Path) -> dict[str, int]:
    """Read `count` files with random bytes in their headers, half of them compressed."""
    rng = np.random.default_rng(seed)
    whole = good(SERIES)
    truth = np.asarray(SERIES, dtype=np.float32)
    outcomes = dict.fromkeys(("rejected", "the same", "as its header says"), 0)
    for turn in range(count):
        content = bytearray(whole)
        for position in rng.integers(0, HEADER, size=int(rng.integers(1, 6))):
            content[position] = int(rng.integers(0, 256))
        path = folder / (GZ if turn % 2 else "scan.nii")
        path.write_bytes(gzip.compress(content, compresslevel=1) if turn % 2 else content)
        try:
            voxels = read(path, is_series=True)
        except ScanError:
            outcomes["rejected"] += 1
            continue
        # A file that is read has the original voxels, or those that nibabel reads with its header.
        if voxels.shape == truth.shape and np.array_equal(voxels, truth):
            outcomes["the same"] += 1
            continue
        image = nib.as_closest_canonical(nib.Nifti1Image.from_bytes(bytes(content)))
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(voxels, image.get_fdata().astype(np.float32).reshape(voxels.shape))
        outcomes["as its header says"] += 1
    return outcomes


def flip_bytes(count: int, *, seed: int, folder: Path) -> dict[str, int]:
    """Read `count` gzip files with one changed byte each."""
    rng = np.random.default_rng(seed)
    stream = gzip.compress(good(SERIES), mtime=0)
    truth = np.asarray(SERIES, dtype=np.float32)
    outcomes = dict.fromkeys(("rejected", "the same"), 0)
    path = folder / GZ
    for position in rng.integers(0, len(stream), count):
        content = bytearray(stream)
        content[position] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
        try:
            voxels = read(path, is_series=True)
        except ScanError:
            outcomes["rejected"] += 1
            continue
        np.testing.assert_array_equal(voxels, truth)
        outcomes["the same"] += 1
    return outcomes


@pytest.mark.timeout(60)
def test_random_headers_raise_typed_errors_only(tmp_path: Path) -> None:
    outcomes = mutate_headers(400, seed=0, folder=tmp_path)
    assert min(outcomes["rejected"], outcomes["the same"]) > 40
    assert sum(outcomes.values()) == 400


@pytest.mark.timeout(60)
def test_random_bytes_in_gzip_never_change_voxels_silently(tmp_path: Path) -> None:
    outcomes = flip_bytes(300, seed=0, folder=tmp_path)
    assert outcomes["rejected"] > 250


@pytest.mark.slow
def test_random_headers_raise_typed_errors_only_when_many(tmp_path: Path) -> None:
    outcomes = mutate_headers(5000, seed=1, folder=tmp_path)
    assert sum(outcomes.values()) == 5000
    assert min(outcomes["rejected"], outcomes["the same"]) > 500


@pytest.mark.slow
def test_random_bytes_in_gzip_never_change_voxels_silently_when_many(tmp_path: Path) -> None:
    outcomes = flip_bytes(2000, seed=1, folder=tmp_path)
    assert sum(outcomes.values()) == 2000
    assert min(outcomes.values()) > 0
