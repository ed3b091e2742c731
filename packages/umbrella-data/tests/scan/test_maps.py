"""Ready FA and MD maps that are exchanged, equal or of another quantity are rejected; legal maps are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbrella_data.errors import ScanError, ScanReason
from umbrella_data.scan.volume import load_volume

Read = Callable[..., None]
SHAPE = (20, 20, 20)
INSIDE = np.zeros(SHAPE, bool)
INSIDE[3:17, 3:17, 3:17] = True
SMALL = np.zeros(SHAPE, bool)
SMALL[8:12, 8:12, 8:12] = True


def fa(seed: int = 0, *, tissue: tuple[float, float] = (2, 5)) -> np.ndarray:
    return np.where(INSIDE, np.random.default_rng(seed).beta(*tissue, SHAPE), 0)


def md(seed: int = 0, *, mean: float = 0.8, fluid: bool = True) -> np.ndarray:
    """In um2/ms, with fluid in a corner of the brain."""
    values = np.random.default_rng(seed).normal(mean, 0.1, SHAPE).clip(0.1)
    if fluid:
        values[3:7, 3:7, 3:7] = 3.0
    return np.where(INSIDE, values, 0)


def t1w() -> np.ndarray:
    return np.where(INSIDE, np.random.default_rng(0).normal(500, 100, SHAPE).clip(1), 0)


@pytest.fixture
def paths(nifti: Any) -> Callable[..., list[Path]]:
    def write(first: np.ndarray, second: np.ndarray, names: tuple[str, str] = ("a", "b")) -> list[Path]:
        return [
            nifti.write(values.astype(np.float32), f"{name}.nii.gz")
            for values, name in zip((first, second), names, strict=True)
        ]

    return write


def culprit(files: list[Path]) -> str:
    with pytest.raises(ScanError) as caught:
        load_volume(files, modality="dMRI")
    assert caught.value.reason == ScanReason.MAPS
    return Path(caught.value.path).name.removesuffix(".nii.gz")


ringing = np.random.default_rng(3).normal(0, 1e-3, SHAPE)
noise = np.random.default_rng(4)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(fa(), 1e-3 * md(), id="mm2/s"),
        pytest.param(fa(), md(), id="um2/ms"),
        pytest.param(fa(), 1e-9 * md(), id="m2/s"),
        pytest.param(0.5 * fa(), 1e-3 * md(mean=1.5), id="infant"),
        pytest.param(fa(tissue=(6, 5)), md(mean=0.75, fluid=False), id="white matter"),
        pytest.param(fa() * SMALL, md(fluid=False) * SMALL, id="small part of the field of view"),
        pytest.param(fa() + ringing * ~INSIDE, md() + ringing * ~INSIDE, id="ringing"),
        pytest.param(1.2 * fa(tissue=(4, 1)) - 0.02, 1e-3 * md(), id="overshoot"),
        pytest.param(
            np.where(INSIDE, fa(), noise.beta(4, 4, SHAPE)),
            np.where(INSIDE, 1e-3 * md(), noise.normal(0, 5e-4, SHAPE)),
            id="no brain mask",
        ),
        pytest.param(fa(), 1e-3 * md() + 5.0 * (noise.random(SHAPE) < 1e-3), id="outliers of the fit"),
    ],
)
def test_load_volume_reads_legal_maps(paths: Any, first: np.ndarray, second: np.ndarray) -> None:
    files = paths(first, second)
    data = load_volume(files, modality="dMRI").data
    np.testing.assert_array_equal(data.numpy(), np.stack([first, second]).astype(np.float32))


@pytest.mark.parametrize(
    ("first", "second", "wrong"),
    [
        pytest.param(1e-3 * md(), fa(), "a", id="exchanged, mm2/s"),
        pytest.param(md(), fa(), "a", id="exchanged, um2/ms"),
        pytest.param(1e-9 * md(), fa(), "a", id="exchanged, m2/s"),
        pytest.param(md(fluid=False, mean=0.9), fa(tissue=(6, 5)), "a", id="exchanged white matter"),
        pytest.param(1e-3 * md(), 1e-3 * md(1), "a", id="two MD"),
        pytest.param(fa(), fa(1), "b", id="two FA"),
        pytest.param(t1w(), 1e-3 * md(), "a", id="T1w as FA"),
        pytest.param(fa(), t1w(), "b", id="T1w as MD"),
        pytest.param(1000 * fa(), 1e-3 * md(), "a", id="scaled FA"),
        pytest.param(fa(), 1000 * md(), "b", id="MD in um2/s"),
        pytest.param(fa(), -1e-3 * md(), "b", id="negative MD"),
    ],
)
def test_load_volume_rejects_maps_of_another_quantity(
    paths: Any, first: np.ndarray, second: np.ndarray, wrong: str
) -> None:
    assert culprit(paths(first, second)) == wrong


def test_load_volume_rejects_the_same_map_twice(paths: Any, tmp_path: Path) -> None:
    file, other = paths(fa(tissue=(6, 2)), md())
    assert culprit([file, file]) == "a"
    link, copy = tmp_path / "link.nii.gz", tmp_path / "copy.nii.gz"
    link.symlink_to(file)
    shutil.copy(file, copy)
    assert culprit([file, link]) == "link"
    assert culprit([file, copy]) == "copy"
    assert culprit([other, other]) == "b"


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (("sub-01_param-md_dwimap", "sub-01_param-fa_dwimap"), "sub-01_param-md_dwimap"),
        (("tensor_MD", "tensor_FA"), "tensor_MD"),
        (("sub-01_desc-MDmap_dwi", "b"), "sub-01_desc-MDmap_dwi"),
        (("a", "dti_fa"), "dti_fa"),
        (("sub-01_T1w", "md"), "sub-01_T1w"),
        (("fa", "sub-01_desc-preproc_T1w"), "sub-01_desc-preproc_T1w"),
    ],
)
def test_load_volume_rejects_names_that_contradict_the_order(paths: Any, names: Any, wrong: str) -> None:
    # By their values, these maps could be FA and MD.
    assert culprit(paths(fa(), 1e-3 * md(), names)) == wrong


@pytest.mark.parametrize(
    "names",
    [
        ("sub-01_param-fa_dwimap", "sub-01_param-md_dwimap"),
        ("sub-MD_map1", "sub-FA_map2"),
        ("sub-01_acq-MD_desc-FA_dwi", "sub-01_acq-MD_desc-MD_dwi"),
        ("sub-01_space-T1w_map1", "sub-01_space-T1w_map2"),
        ("FAmap", "MDmap"),
        ("fa_and_md_1", "fa_and_md_2"),
        ("MD5E-s10--fa0b", "MD5E-s20--md1c"),
    ],
)
def test_load_volume_reads_maps_of_any_other_name(paths: Any, names: Any) -> None:
    assert load_volume(paths(fa(), 1e-3 * md(), names), modality="dMRI").data.shape == (2, *SHAPE)


@pytest.mark.parametrize("channel", ["FA", "MD"])
def test_load_volume_rejects_when_a_mask_is_given_as_a_map(nifti, random_voxels, channel):
    inside = (random_voxels(6, 7, 8) % 2).astype(np.float32)
    maps = {"FA": inside * np.linspace(0.2, 0.8, 6, dtype=np.float32)[:, None, None],
            "MD": inside * np.linspace(6e-4, 9e-4, 7, dtype=np.float32)[:, None]}  # fmt: skip
    files = [nifti.write(maps[name], f"{number}.nii") for number, name in enumerate(maps)]
    load_volume(files, modality="dMRI")
    value = 1.0 if channel == "FA" else 1e-3
    files[channel == "MD"] = nifti.write(value * inside, "inside.nii")
    with pytest.raises(ScanError) as caught:
        load_volume(files, modality="dMRI")
    assert (caught.value.reason, caught.value.path) == ("maps", str(files[channel == "MD"]))
