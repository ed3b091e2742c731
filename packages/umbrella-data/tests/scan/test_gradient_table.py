"""bval and bvec files: both layouts are read, directions are rotated to world axes, wrong files are rejected."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.gradient_table import (
    Shell,
    gradient_files,
    read_gradients,
    read_shells,
    select_shells,
)

B_VALUES = [5.0, 1000, 1000, 1000, 1000, 1000, 1000, 0.0]
NAN = float("nan")


def directions() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(8, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[[0, 7]] = 0
    return vectors


def write(folder: Path, *, b_values: Any = B_VALUES, vectors: Any = None, rows: bool = True) -> Path:
    path = folder / "sub-01_dwi.nii.gz"
    bval, bvec = gradient_files(path)
    np.savetxt(bval, np.atleast_2d(b_values), fmt="%g")
    vectors = directions() if vectors is None else np.asarray(vectors)
    np.savetxt(bvec, vectors.T if rows else vectors, fmt="%.8f")
    return path


def test_gradient_files_follow_the_bids_name() -> None:
    for name in ("sub-01_dwi.nii", "sub-01_dwi.nii.gz"):
        bval, bvec = gradient_files(Path("a") / name)
        assert (bval, bvec) == (Path("a/sub-01_dwi.bval"), Path("a/sub-01_dwi.bvec"))


def test_gradient_files_in_upper_case_are_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    for file in gradient_files(path):
        file.rename(file.with_suffix(file.suffix.upper()))
    assert [file.suffix for file in gradient_files(path)] == [".BVAL", ".BVEC"]
    gradients = read_gradients(path, num_volumes=8)
    np.testing.assert_allclose(gradients.b_values, B_VALUES)
    np.testing.assert_allclose(gradients.b_vectors, directions(), atol=1e-6)


@pytest.mark.parametrize("rows", [True, False], ids=["3 x N", "N x 3"])
def test_read_gradients_reads_both_layouts(tmp_path: Path, rows: bool) -> None:
    gradients = read_gradients(write(tmp_path, rows=rows), num_volumes=8)
    np.testing.assert_allclose(gradients.b_values, B_VALUES)
    np.testing.assert_allclose(gradients.b_vectors, directions(), atol=1e-6)
    assert gradients.is_b0.tolist() == [True] + [False] * 6 + [True]


def test_low_b_values_are_b0(tmp_path: Path) -> None:
    assert read_shells(write(tmp_path))[0].num_volumes == 2
    assert read_shells(write(tmp_path, b_values=[50, 1.25, 51, 1000]))[0].num_volumes == 2


@pytest.mark.parametrize("nothing", [NAN, 0.3])
def test_read_gradients_ignores_the_direction_of_a_b0(tmp_path: Path, nothing: float) -> None:
    vectors = directions()
    vectors[[0, 7]] = nothing
    gradients = read_gradients(write(tmp_path, vectors=vectors), num_volumes=8)
    np.testing.assert_allclose(gradients.b_vectors, directions(), atol=1e-6)


def test_read_gradients_reads_b_values_in_a_column_and_commas(tmp_path: Path) -> None:
    path = write(tmp_path)
    gradient_files(path)[0].write_text("\n".join(f"{b:g}," for b in B_VALUES) + "\n\n")
    np.testing.assert_allclose(read_gradients(path, num_volumes=8).b_values, B_VALUES)


def changed(row: int, value: Any) -> np.ndarray:
    vectors = directions()
    vectors[row] = value
    return vectors


@pytest.mark.parametrize(
    ("b_values", "options", "expected"),
    [
        # Measured b-values around the nominal ones, as scanners write them.
        ([5, 0, 995, 1005, 990], {}, [(0, 2, True), (1000, 3, True)]),
        ([0, 1505, 1510, 1495], {}, [(0, 1, True), (1500, 3, True)]),
        ([0, 1505, 1510, 1520], {}, [(0, 1, True), (1500, 3, True)]),
        ([0, 1600, 700, 1600], {}, [(0, 1, True), (700, 1, True), (1600, 2, False)]),
        ([2990, 0, 2010, 1000, 1995, 3010], {}, [(0, 1, True), (1000, 1, True), (2000, 2, False), (3000, 2, False)]),
        # The lowest shell alone.
        ([0, 3000, 2005, 1995], {}, [(0, 1, True), (2000, 2, True), (3000, 1, False)]),
        ([0, 1000, 2000], {"max_b": 2000}, [(0, 1, True), (1000, 1, True), (2000, 1, True)]),
        ([0, 1000, 2000], {"max_b": 800}, [(0, 1, True), (1000, 1, True), (2000, 1, False)]),
        ([75, 80, 1000], {"b0_threshold": 80}, [(0, 2, True), (1000, 1, True)]),
        ([0, 15, 1000], {"b0_threshold": 10}, [(0, 1, True), (15, 1, True), (1000, 1, True)]),
        # Without gaps between shells, a shell has less than 100 s/mm2.
        (range(0, 3000, 25), {"max_b": 300}, None),
        ([0, 0], {}, [(0, 2, True)]),
    ],
)  # fmt: skip
def test_select_shells_fits_b0_and_shells_up_to_max_b(b_values: Any, options: dict[str, float], expected: Any) -> None:
    values = np.array(b_values, dtype=float)
    selected = select_shells(values, **options)
    if expected is None:
        assert values[selected.is_fitted].max() == 350  # the shell from 275 to 350 has a mean of 312.5
        assert sum(shell.num_volumes for shell in selected.shells) == len(values)
        return
    assert selected.shells == tuple(Shell(*shell) for shell in expected)
    fitted = sum(shell.num_volumes for shell in selected.shells if shell.is_fitted)
    assert selected.is_fitted.sum() == fitted
    left_out = values[~selected.is_fitted]
    assert not len(left_out) or left_out.min() > values[selected.is_fitted].max()


def test_select_shells_says_when_all_shells_are_above_max_b() -> None:
    assert select_shells(np.array([0.0, 2000])).is_above
    assert select_shells(np.array([0.0, 1551])).is_above
    assert not select_shells(np.array([0.0, 1550])).is_above
    assert not select_shells(np.array([0.0, 1000, 2000])).is_above
    assert not select_shells(np.array([0.0, 2000]), max_b=2000).is_above


def test_read_shells_and_gradients_use_the_b0_threshold(tmp_path: Path) -> None:
    path = write(tmp_path, b_values=[60, *B_VALUES[1:]])
    assert [shell.num_volumes for shell in read_shells(path)] == [1, 1, 6]
    assert read_shells(path, b0_threshold=60) == (Shell(0, 2, is_fitted=True), Shell(1000, 6, is_fitted=True))
    # Without a threshold for it, its direction of length 0 is an error.
    assert read_gradients(path, num_volumes=8, b0_threshold=60).is_b0.sum() == 2
    with pytest.raises(ScanError) as caught:
        read_gradients(path, num_volumes=8)
    assert caught.value.reason == ScanReason.BVEC
    with pytest.raises(ScanError) as caught:
        read_shells(write(tmp_path, b_values=[60, *[1000] * 7]))
    assert caught.value.reason == ScanReason.BVAL
    assert "b0_threshold" in caught.value.message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"b_values": B_VALUES[:-1]}, ScanReason.BVAL),
        ({"b_values": [*B_VALUES, 1000]}, ScanReason.BVAL),
        ({"b_values": [0, -1000, *B_VALUES[2:]]}, ScanReason.BVAL),
        ({"b_values": [0, NAN, *B_VALUES[2:]]}, ScanReason.BVAL),
        ({"b_values": [0, np.inf, *B_VALUES[2:]]}, ScanReason.BVAL),
        ({"b_values": [1000] * 8}, ScanReason.BVAL),
        ({"b_values": np.array(B_VALUES) / 1000}, ScanReason.BVAL),
        ({"b_values": np.array(B_VALUES) * 1e6}, ScanReason.BVAL),
        ({"b_values": [B_VALUES, B_VALUES]}, ScanReason.BVAL),
        ({"vectors": directions()[:-1]}, ScanReason.BVEC),
        ({"vectors": directions()[:, :2]}, ScanReason.BVEC),
        ({"vectors": changed(3, NAN)}, ScanReason.BVEC),
        ({"vectors": changed(3, 0.0)}, ScanReason.BVEC),
        ({"vectors": changed(3, [0, 2, 0])}, ScanReason.BVEC),
    ],
    ids=[
        "few", "many", "negative", "nan", "inf", "no_b0", "ms_per_um2", "s_per_m2", "two_rows",
        "few_vectors", "two_axes", "nan_vector", "zero_vector", "long_vector",
    ],
)  # fmt: skip
def test_read_gradients_rejects_when_wrong(tmp_path: Path, options: dict[str, Any], reason: ScanReason) -> None:
    path = write(tmp_path, **options)
    with pytest.raises(ScanError) as caught:
        read_gradients(path, num_volumes=8)
    assert caught.value.reason == reason
    assert caught.value.path == str(gradient_files(path)[reason == ScanReason.BVEC])


def test_read_gradients_rejects_when_files_are_missing_or_not_numeric(tmp_path: Path) -> None:
    path = write(tmp_path)
    bval, bvec = gradient_files(path)
    bvec.write_text("0 1 zero\n")
    with pytest.raises(ScanError, match="line 1") as caught:
        read_gradients(path, num_volumes=8)
    assert caught.value.reason == ScanReason.BVEC
    bvec.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ScanError, match="git lfs pull") as caught:
        read_gradients(path, num_volumes=8)
    assert caught.value.reason == ScanReason.BVEC
    bvec.unlink()
    with pytest.raises(ScanError, match=r"needs its \.bval and \.bvec") as caught:
        read_gradients(path, num_volumes=8)
    assert caught.value.path == str(bvec)
    bval.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScanError) as caught:
        read_shells(path)
    assert caught.value.reason == ScanReason.BVAL


def make_folder(path: Path) -> None:
    path.mkdir()


def make_long(path: Path) -> None:
    path.write_text("1 " * 20_000_000)


def make_long_word(path: Path) -> None:
    path.write_text("x" * 4_000_000)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("reason", [ScanReason.BVAL, ScanReason.BVEC])
@pytest.mark.parametrize("make", [os.mkfifo, make_folder, make_long, make_long_word])
def test_read_gradients_rejects_files_without_numbers(
    tmp_path: Path, make: Callable[[Path], None], reason: ScanReason
) -> None:
    path = write(tmp_path)
    file = gradient_files(path)[reason == ScanReason.BVEC]
    file.unlink()
    make(file)
    tracemalloc.start()
    try:
        with pytest.raises(ScanError) as caught:
            read_gradients(path, num_volumes=8)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    assert (caught.value.reason, caught.value.path) == (reason, str(file))
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("axcodes", ["LAS", "RAS", "PSR", "LPI"])
def test_world_directions_undo_the_stored_axes(tmp_path: Path, axcodes: str) -> None:
    world = directions()
    stored_axes = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(axcodes), (4, 4, 4))[:3, :3].T
    # inv_ornt_aff maps RAS+ voxels to stored ones; the columns of its transpose are the stored axes in RAS+.
    affine = np.eye(4)
    affine[:3, :3] = stored_axes * 2.0
    assert "".join(nib.aff2axcodes(affine)) == axcodes
    along_stored = world @ stored_axes
    if np.linalg.det(stored_axes) > 0:
        along_stored[:, 0] *= -1
    gradients = read_gradients(write(tmp_path, vectors=along_stored), num_volumes=8)
    np.testing.assert_allclose(gradients.world_directions(affine), world, atol=1e-6)
