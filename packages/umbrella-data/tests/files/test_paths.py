"""Files of scans: pairs of `.hdr` and `.img`, read as strictly as single files, and files next to a scan."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from umbrella_data.cache.store import VolumeCache
from umbrella_data.errors import ManifestError, ScanError
from umbrella_data.errors import ScanReason as R
from umbrella_data.files.look_alikes import describe_look_alike
from umbrella_data.files.paths import scan_stem, sibling_file
from umbrella_data.manifest.manifest import read_manifest
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig
from umbrella_data.scan.gradient_table import gradient_files
from umbrella_data.scan.sidecar import sidecar_files
from umbrella_data.scan.volume import load_volume

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
VOXELS = np.random.default_rng(0).integers(1, 1000, (5, 6, 7)).astype("<i2")
AFFINE = np.diag([-2.0, 2.0, 2.0, 1.0])


def write_pair(folder: Path, *, kind: Any = nib.Nifti1Pair, stem: str = "scan") -> Path:
    image = kind(VOXELS, AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, folder / f"{stem}.img")
    return folder / f"{stem}.img"


def put(offset: int, kind: str, *values: object) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        data = bytearray(content)
        struct.pack_into("<" + kind, data, offset, *values)
        return bytes(data)

    return change


def append(block: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content + block


@dataclass(frozen=True)
class Row:
    """A change of the files of a valid pair, and the reason of the error; None if they are still read."""

    header: Callable[[bytes], bytes] = bytes
    voxels: Callable[[bytes], bytes] = bytes
    reason: R | None = None
    is_header_at_fault: bool = True


ROWS = {
    "good": Row(),
    "header_without_flag": Row(header=lambda content: content[:348]),
    "header_with_extension": Row(header=lambda c: c[:348] + b"\1\0\0\0" + struct.pack("<2i", 16, 6) + bytes(8)),
    "voxels_behind_a_gap": Row(header=put(108, "f", 32.0), voxels=lambda content: bytes(32) + content),
    "header_empty": Row(header=lambda content: b"", reason=R.TRUNCATED),
    "header_cut": Row(header=lambda content: content[:200], reason=R.TRUNCATED),
    "header_cut_in_flag": Row(header=lambda content: content[:348] + bytes(2), reason=R.TRUNCATED),
    "header_goes_on": Row(header=lambda content: content[:348] + bytes(40), reason=R.TRAILING),
    "header_of_megabytes": Row(header=lambda content: content[:348] + bytes(1 << 25), reason=R.TRAILING),
    "extension_too_long": Row(header=lambda c: c[:348] + b"\1\0\0\0" + struct.pack("<2i", 64, 6), reason=R.EXTENSION),
    "header_of_one_file": Row(header=put(344, "4s", b"n+1\0"), reason=R.FILE_TYPE),
    "analyze": Row(header=put(344, "4s", bytes(4)), reason=R.FILE_TYPE),
    "not_nifti": Row(header=lambda content: b"<html>" + content, reason=R.FILE_TYPE),
    "offset_negative": Row(header=put(108, "f", -4.0), reason=R.OFFSET),
    "offset_fraction": Row(header=put(108, "f", 0.5), reason=R.OFFSET),
    "offset_huge": Row(header=put(108, "f", 1e9), reason=R.OFFSET),
    "dims": Row(header=put(40, "8h", 3, 5, -6, 7, 1, 1, 1, 1), reason=R.DIMS),
    "complex": Row(header=put(70, "h", 32), reason=R.DTYPE),
    "offset_behind_voxels": Row(header=put(108, "f", 32.0), reason=R.TRUNCATED, is_header_at_fault=False),
    "voxels_empty": Row(voxels=lambda content: b"", reason=R.TRUNCATED, is_header_at_fault=False),
    "voxels_cut": Row(voxels=lambda content: content[:-1], reason=R.TRUNCATED, is_header_at_fault=False),
    "voxels_go_on": Row(voxels=append(b"\0"), reason=R.TRAILING, is_header_at_fault=False),
    "bomb": Row(header=put(40, "8h", 3, *[30000] * 3, 1, 1, 1, 1), reason=R.TOO_LARGE),
    "bomb_of_gigabytes": Row(
        header=put(40, "8h", 3, *[1000] * 3, 1, 1, 1, 1), reason=R.TOO_LARGE, is_header_at_fault=False
    ),
    "voxels_are_a_pointer": Row(voxels=lambda _: LFS_POINTER, reason=R.FILE_TYPE, is_header_at_fault=False),
    "header_is_a_pointer": Row(header=lambda _: LFS_POINTER, reason=R.FILE_TYPE),
    "constant": Row(voxels=lambda content: bytes(len(content)), reason=R.CONSTANT, is_header_at_fault=False),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("ending", [".img", ".hdr"])
def test_changed_pair_is_rejected_or_read(name: str, ending: str, tmp_path: Path) -> None:
    row = ROWS[name]
    voxels = write_pair(tmp_path)
    header = voxels.with_suffix(".hdr")
    header.write_bytes(row.header(header.read_bytes()))
    voxels.write_bytes(row.voxels(voxels.read_bytes()))
    if row.reason is None:
        volume = load_volume(voxels.with_suffix(ending), modality="T1")
        np.testing.assert_array_equal(volume.data[0].numpy(), VOXELS[::-1].astype(np.float32))
        return
    with pytest.raises(ScanError) as caught:
        load_volume(voxels.with_suffix(ending), modality="T1")
    assert caught.value.reason == row.reason
    assert caught.value.path == str(header if row.is_header_at_fault else voxels)


def test_pair_of_nifti2_and_of_upper_case_is_read(tmp_path: Path) -> None:
    voxels = write_pair(tmp_path, kind=nib.Nifti2Pair)
    expected = VOXELS[::-1].astype(np.float32)
    np.testing.assert_array_equal(load_volume(voxels, modality="T1").data[0].numpy(), expected)
    for ending in (".hdr", ".img"):
        voxels.with_suffix(ending).rename(tmp_path / f"SCAN{ending.upper()}")
    np.testing.assert_array_equal(load_volume(tmp_path / "SCAN.HDR", modality="T1").data[0].numpy(), expected)


@pytest.mark.parametrize(
    "ending", [".nii", ".nii.gz", ".hdr", ".img", ".img.gz", ".NII", ".NII.GZ", ".HDR", ".HDR.GZ", ".Nii.gz"]
)
def test_files_next_to_a_scan_are_found_in_either_case_of_its_ending(tmp_path: Path, ending: str) -> None:
    scan = tmp_path / f"sub-01.X_dwi{ending}"
    assert scan_stem(scan.name) == "sub-01.X_dwi"
    assert gradient_files(scan) == (tmp_path / "sub-01.X_dwi.bval", tmp_path / "sub-01.X_dwi.bvec")
    (tmp_path / "sub-01.X_dwi.json").write_text("{}")
    assert next(sidecar_files(scan)).name == "sub-01.X_dwi.json"


@pytest.mark.parametrize("ending", [".bval", ".json"])
def test_sibling_file_in_upper_case_is_found_if_there_is_none_in_lower_case(tmp_path: Path, ending: str) -> None:
    scan, lower, upper = (tmp_path / f"sub-01.x_dwi{each}" for each in (".nii", ending, ending.upper()))
    assert sibling_file(scan, ending) == lower
    upper.touch()
    assert sibling_file(scan, ending) == upper
    lower.symlink_to(tmp_path / "nowhere")
    assert sibling_file(scan, ending) == lower


def test_voxels_that_start_like_gzip_are_read_as_voxels(tmp_path: Path) -> None:
    voxels = write_pair(tmp_path)
    voxels.write_bytes(b"\x1f\x8b" + voxels.read_bytes()[2:])
    assert load_volume(voxels, modality="T1").data.max() == np.frombuffer(voxels.read_bytes(), "<i2").max()


@pytest.mark.parametrize("ending", [".img", ".hdr"])
def test_incomplete_pair_is_rejected(tmp_path: Path, ending: str) -> None:
    voxels = write_pair(tmp_path)
    voxels.with_suffix(ending).unlink()
    with pytest.raises(ScanError) as caught:
        load_volume(voxels, modality="T1")
    assert (caught.value.reason, caught.value.path) == (R.MISSING, str(voxels.with_suffix(ending)))


@pytest.mark.parametrize("ending", [".img.gz", ".hdr.gz"])
def test_compressed_pair_is_read_as_nibabel_reads_it(tmp_path: Path, ending: str) -> None:
    nib.save(nib.Nifti1Pair(VOXELS, AFFINE), tmp_path / "scan.img.gz")
    path = tmp_path / f"scan{ending}"
    expected = nib.as_closest_canonical(nib.load(path)).get_fdata().astype(np.float32)
    np.testing.assert_array_equal(load_volume(path, modality="T1").data[0].numpy(), expected)


COMPRESSED_ROWS: dict[str, tuple[str, Callable[[bytes], bytes], R]] = {
    "header_cut": (".hdr.gz", lambda stream: stream[:-1], R.GZIP_TRUNCATED),
    "header_damaged": (".hdr.gz", lambda stream: stream[:-5] + bytes([stream[-5] ^ 1]) + stream[-4:], R.GZIP_CRC),
    "header_not_compressed": (".hdr.gz", gzip.decompress, R.GZIP_HEADER),
    "header_goes_on": (".hdr.gz", lambda stream: stream + gzip.compress(bytes(40)), R.TRAILING),
    "header_empty": (".hdr.gz", lambda stream: b"", R.GZIP_HEADER),
    "voxels_cut": (".img.gz", lambda stream: stream[:-20], R.GZIP_TRUNCATED),
    "voxels_not_compressed": (".img.gz", gzip.decompress, R.GZIP_HEADER),
    "voxels_are_a_pointer": (".img.gz", lambda stream: LFS_POINTER, R.FILE_TYPE),
    "voxels_go_on": (".img.gz", lambda stream: stream + gzip.compress(bytes(2)), R.TRAILING),
}


@pytest.mark.parametrize("name", COMPRESSED_ROWS)
def test_damaged_compressed_pair_is_rejected(tmp_path: Path, name: str) -> None:
    ending, change, reason = COMPRESSED_ROWS[name]
    nib.save(nib.Nifti1Pair(VOXELS, AFFINE), tmp_path / "scan.img.gz")
    file = tmp_path / f"scan{ending}"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ScanError) as caught:
        load_volume(tmp_path / "scan.img.gz", modality="T1")
    assert (caught.value.reason, caught.value.path) == (reason, str(file))


def test_pair_with_one_compressed_file_is_rejected(tmp_path: Path) -> None:
    voxels = write_pair(tmp_path)
    compressed = gzip.compress(voxels.read_bytes())
    voxels.write_bytes(compressed)
    with pytest.raises(ScanError) as caught:
        load_volume(voxels, modality="T1")
    assert (caught.value.reason, caught.value.path) == (R.GZIP_HEADER, str(voxels))
    voxels.rename(tmp_path / "scan.img.gz")
    for path, missing in [("scan.hdr", "scan.img"), ("scan.img.gz", "scan.hdr.gz")]:
        with pytest.raises(ScanError) as caught:
            load_volume(tmp_path / path, modality="T1")
        assert (caught.value.reason, caught.value.path) == (R.MISSING, str(tmp_path / missing))


@pytest.mark.parametrize(
    ("target", "advice"), [("../.git/annex/objects/9k/f9/K/K", "datalad get"), ("nowhere.nii.gz", "fix the link")]
)
def test_dangling_link_is_rejected_with_what_to_do(tmp_path: Path, target: str, advice: str) -> None:
    path = tmp_path / "scan.nii.gz"
    path.symlink_to(target)
    with pytest.raises(ScanError, match=advice) as caught:
        load_volume(path, modality="T1")
    assert caught.value.reason == R.MISSING


@pytest.mark.parametrize(
    ("start", "advice"),
    [
        (b"", "0 bytes"),
        (b"/annex/objects/MD5E-s9--01.nii.gz\n", "datalad get"),
        (LFS_POINTER, "git lfs pull"),
        (b"\xef\xbb\xbf<!doctype HTML>", "download"),
        (bytes(128) + b"DICM", "dcm2niix"),
        (b"PK\x03\x04", "unpack"),
    ],
)
def test_look_alike_is_described_with_what_to_do(start: bytes, advice: str) -> None:
    assert advice in (describe_look_alike(start) or "")


def test_unknown_content_is_not_described() -> None:
    for start in (b"\x5c\x01\0\0" + bytes(400), b"\x1f\x8b\x08", b"version 2", b"annex", b"<", bytes(512)):
        assert describe_look_alike(start) is None


def test_cache_distinguishes_pairs_by_both_files(tmp_path: Path) -> None:
    voxels = write_pair(tmp_path)
    pipeline = Pipeline(PipelineConfig(image_size=(5, 6, 7)), modality="T1", cache=VolumeCache(tmp_path / "cache"))
    before = pipeline(voxels, generator=None)
    header = voxels.with_suffix(".hdr")
    # The sform's first row: left and right are exchanged.
    header.write_bytes(put(280, "f", 2.0)(put(252, "h", 0)(header.read_bytes())))
    assert torch.equal(pipeline(voxels, generator=None), before.flip(1))


def test_manifest_names_a_pair_by_its_img_file_and_neither_file_leaves_the_root(
    tmp_path: Path, make_row: Any, write_manifest: Any
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    write_pair(root)
    row = make_row("a", "T1")
    row["messages"][0]["content"][0]["path"] = "scan.hdr"
    manifest = read_manifest(write_manifest([row]), data_root=root)
    assert manifest[0].scans[0].paths == (root / "scan.img",)
    (root / "scan.img").rename(outside / "scan.img")
    (root / "scan.img").symlink_to(outside / "scan.img")
    with pytest.raises(ManifestError, match="leads out of"):
        manifest[0]
