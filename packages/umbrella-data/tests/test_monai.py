"""Files in a MONAI pipeline: the strict reader's arrays and metadata, rejected files, and the page about it."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from umbrella_data import ScanError, load_volume
from umbrella_data.cli import main
from umbrella_data.errors import ScanReason as R

PAGE = Path(__file__).parents[3] / "docs" / "monai.md"
AFFINE = np.array([[2.0, 0, 0, -7], [0, 3.0, 0, 5], [0, 0, 4.0, 11], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def monai() -> Any:
    from monai import data, transforms

    from umbrella_data.monai import StrictNiftiReader

    class Names:
        Strict, Nibabel, Dataset, MetaTensor = StrictNiftiReader, data.NibabelReader, data.Dataset, data.MetaTensor
        Compose, LoadImage, LoadImaged = transforms.Compose, transforms.LoadImage, transforms.LoadImaged

    return Names


def with_nan(content: bytes) -> bytes:
    return content[:352] + np.array([np.nan], "<f4").tobytes() + content[356:]


def with_bytes_behind(content: bytes) -> bytes:
    return content + b"more"


def with_infinite_affine(content: bytes) -> bytes:
    return content[:280] + np.array([np.inf], "<f4").tobytes() + content[284:]


# Files that NibabelReader loads and this package rejects.
ACCEPTED_BY_NIBABEL = {
    "nan.nii": (with_nan, R.NON_FINITE),
    "more.nii": (with_bytes_behind, R.TRAILING),
    "affine.nii": (with_infinite_affine, R.AFFINE),
    "more.nii.gz": (lambda content: gzip.compress(with_bytes_behind(content)), R.TRAILING),
}


@pytest.fixture
def rejected(nifti: Any, random_voxels: Any) -> dict[Path, R]:
    content = nifti.write(random_voxels(5, 6, 7).astype("f4"), "good.nii").read_bytes()
    reasons = {}
    for name, (change, reason) in ACCEPTED_BY_NIBABEL.items():
        (nifti.folder / name).write_bytes(change(content))
        reasons[nifti.folder / name] = reason
    return reasons


def test_rejected_file_is_not_read_by_another_reader(monai: Any, rejected: dict[Path, R]) -> None:
    for path, reason in rejected.items():
        assert monai.LoadImage(reader=monai.Nibabel())(path).shape == (5, 6, 7)
        for reader in (monai.Strict(), monai.Strict, "umbrella_data.monai.StrictNiftiReader"):
            with pytest.raises(ScanError) as caught:
                monai.LoadImage(reader=reader)(path)
            assert (caught.value.reason, caught.value.path) == (reason, str(path))


def test_error_in_compose_is_the_cause(monai: Any, rejected: dict[Path, R]) -> None:
    loaders = (monai.LoadImage(reader=monai.Strict()), monai.LoadImaged("image", reader=monai.Strict()))
    for path, reason in rejected.items():
        for loader, item in zip(loaders, (path, {"image": path}), strict=True):
            with pytest.raises(RuntimeError) as caught:
                monai.Compose([loader])(item)
            assert isinstance(caught.value.__cause__, ScanError)
            assert caught.value.__cause__.reason == reason
            assert str(caught.value.__cause__).endswith(f"[{reason}]")


def test_error_from_a_worker_has_the_code(monai: Any, rejected: dict[Path, R]) -> None:
    transform = monai.Compose([monai.LoadImage(reader=monai.Strict())])
    batches = iter(DataLoader(monai.Dataset(list(rejected), transform), batch_size=None, num_workers=1))
    for path, reason in rejected.items():
        with pytest.raises(RuntimeError, match=rf"(?m)ScanError: {re.escape(str(path))}: .* \[{reason}\]$"):
            next(batches)


def test_missing_file_is_rejected(monai: Any, tmp_path: Path) -> None:
    with pytest.raises(ScanError) as caught:
        monai.LoadImage(reader=monai.Strict())(tmp_path / "none.nii.gz")
    assert caught.value.reason == R.MISSING


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "SAR"])
def test_volume_is_that_of_nibabel_in_canonical_orientation(
    monai: Any, nifti: Any, random_voxels: Any, orientation: str
) -> None:
    path = nifti.write(random_voxels(5, 6, 7), affine=AFFINE, orientation=orientation, scaling=(0.5, 3.0))
    image = monai.LoadImage(reader=monai.Strict(), ensure_channel_first=True)(path)
    reference = monai.LoadImage(reader=monai.Nibabel(as_closest_canonical=True), ensure_channel_first=True)(path)
    assert image.dtype == torch.float32
    assert torch.equal(image.as_tensor(), reference.as_tensor())
    for key in ("affine", "original_affine", "spatial_shape"):
        np.testing.assert_allclose(image.meta[key], reference.meta[key])
    np.testing.assert_allclose(image.meta["original_affine"], nib.load(path).affine)
    for key in ("space", "filename_or_obj"):
        assert image.meta[key] == reference.meta[key]


def test_series_has_its_frames_last(monai: Any, nifti: Any, random_voxels: Any) -> None:
    path = nifti.write(random_voxels(5, 6, 7, 4), orientation="LPS", repetition_time=2.0)
    image = monai.LoadImage(reader=monai.Strict())(path)
    reference = monai.LoadImage(reader=monai.Nibabel(as_closest_canonical=True))(path)
    assert torch.equal(image.as_tensor(), reference.as_tensor())
    assert monai.LoadImage(reader=monai.Strict(), ensure_channel_first=True)(path).shape == (4, 5, 6, 7)


def test_several_volumes_are_channels_of_one_grid(monai: Any, nifti: Any, random_voxels: Any) -> None:
    maps = [random_voxels(5, 6, 7, seed=seed) for seed in range(2)]
    paths = [nifti.write(maps[0], "a.nii"), nifti.write(maps[1], "b.nii", orientation="LPS")]
    image = monai.LoadImage(reader=monai.Strict(), ensure_channel_first=True)(paths)
    np.testing.assert_array_equal(image, np.stack(maps).astype("f4"))
    shifted = np.diag([2.0, 2, 2, 1])
    shifted[0, 3] = 1
    cases = {
        R.MAPS: nifti.write(maps[0], "shifted.nii", affine=shifted),
        R.RANK: nifti.write(random_voxels(5, 6, 7, 3), "series.nii", repetition_time=2.0),
    }
    for reason, other in cases.items():
        with pytest.raises(ScanError) as caught:
            monai.LoadImage(reader=monai.Strict())([paths[0], other])
        assert (caught.value.reason, caught.value.path) == (reason, str(other))


def test_voxels_are_limited(monai: Any, nifti: Any, random_voxels: Any) -> None:
    with pytest.raises(ScanError) as caught:
        monai.LoadImage(reader=monai.Strict(max_voxels=100))(nifti.write(random_voxels(5, 6, 7)))
    assert caught.value.reason == R.TOO_LARGE


@pytest.mark.parametrize(
    ("name", "is_nifti"), [("a.nii", True), ("a.NII.GZ", True), ("a.img", True), ("a.dcm", False), ("a.gz", False)]
)
def test_suffixes_are_those_of_nifti(monai: Any, name: str, is_nifti: bool) -> None:
    assert monai.Strict().verify_suffix(name) is is_nifti
    assert monai.Strict().verify_suffix([Path(name), "b.nii"]) is is_nifti


def test_metatensor_has_the_affine_of_the_volume(monai: Any, nifti: Any, random_voxels: Any) -> None:
    path = nifti.write(random_voxels(5, 6, 7), affine=AFFINE, orientation="LPS")
    volume = load_volume(path, modality="T1")
    image = volume.to_metatensor()
    assert isinstance(image, monai.MetaTensor)
    assert image.shape == (1, 5, 6, 7)
    assert image.data_ptr() == volume.data.data_ptr()
    np.testing.assert_allclose(image.affine, AFFINE)
    np.testing.assert_allclose(image.pixdim, (2, 3, 4))
    assert torch.equal(image.as_tensor()[0], monai.LoadImage(reader=monai.Strict())(path).as_tensor())


def test_metatensor_of_a_series_has_frames_as_channels(monai: Any, nifti: Any, random_voxels: Any) -> None:
    voxels = random_voxels(5, 6, 7, 4)
    image = load_volume(nifti.write(voxels, repetition_time=2.0), modality="rsfMRI").to_metatensor()
    np.testing.assert_array_equal(image, np.moveaxis(voxels, 3, 0).astype("f4"))


def test_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--out", "cohort", "--num-train", "2", "--num-test", "0"]) == 0
    capsys.readouterr()
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "monai.md", "exec"), names)
    batch, reason, coarse = capsys.readouterr().out.splitlines()
    assert batch.startswith("(2, 1, 32, 32, 32) [6.")
    assert reason == "gzip_header"
    assert coarse.endswith("[10.0, 10.0, 10.0]")
