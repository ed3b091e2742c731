"""A scan passes through few modules from the call of its pipeline to the tensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch

import umbrella_data
from umbrella_data.cache.store import VolumeCache
from umbrella_data.pipeline.augment import AugmentConfig
from umbrella_data.pipeline.pipeline import Pipeline, PipelineConfig

PACKAGE = str(Path(umbrella_data.__file__).parent)
MAX_UNCACHED, MAX_CACHED = 12, 6


def modules_of(call: Callable[[], Any]) -> set[str]:
    """The modules of umbrella_data whose functions run during a call."""
    seen: set[str] = set()

    def record(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            seen.add(frame.f_globals["__name__"].removeprefix("umbrella_data."))

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


@pytest.fixture
def scan(request, nifti, random_voxels, tmp_path):
    """Files, mask, modality and image size of a scan of each kind, stored in another orientation than RAS+."""
    kind = request.param
    inside = np.zeros((12, 12, 12), dtype=np.uint8)
    inside[2:10, 2:10, 2:10] = 1
    options = {"orientation": "LPI"}
    mask = nifti.write(inside, "mask.nii.gz", **options) if kind.endswith("mask") else None
    if kind.startswith("T1"):
        return [nifti.write(random_voxels(12, 12, 12), "t1.nii.gz", **options)], mask, "T1", (8, 8, 8)
    if kind.startswith("series"):
        path = nifti.write(random_voxels(12, 12, 12, 9), "bold.nii.gz", repetition_time=2.0, **options)
        return [path], mask, "rsfMRI", (8, 8, 8, 4)
    if kind == "maps":
        voxels = np.random.default_rng(0).uniform(0, 1, (2, 12, 12, 12)).astype(np.float32)
        return [nifti.write(voxels[i], f"{i}.nii.gz", **options) for i in range(2)], mask, "dMRI", (8, 8, 8)
    pytest.importorskip("dipy", reason="fitting tensors is an extra")
    path = nifti.write(random_voxels(12, 12, 12, 8) + 100, "dwi.nii.gz", **options)
    directions = np.random.default_rng(1).normal(size=(3, 8))
    directions /= np.linalg.norm(directions, axis=0)
    path.with_name("dwi.bval").write_text(" ".join(["0", *["1000"] * 7]))
    path.with_name("dwi.bvec").write_text("\n".join(" ".join(f"{x:.6f}" for x in row) for row in directions))
    return [path], mask, "dMRI", (8, 8, 8)


@pytest.mark.parametrize("is_cached", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("scan", ["T1", "T1 with mask", "series", "series with mask", "maps", "DWI"], indirect=True)
def test_scan_passes_through_few_modules(scan, is_cached, tmp_path):
    paths, mask, modality, image_size = scan
    config = PipelineConfig(image_size=image_size, augment=AugmentConfig())
    cache = VolumeCache(tmp_path / "cache") if is_cached else None
    pipeline = Pipeline(config, modality=modality, cache=cache)

    def read() -> torch.Tensor:
        return pipeline(paths, generator=torch.Generator().manual_seed(0), mask=mask)

    expected = read()  # fills the cache, and imports what is imported on first use
    modules = modules_of(lambda: torch.testing.assert_close(read(), expected))
    assert "pipeline.pipeline" in modules
    assert len(modules) <= (MAX_CACHED if is_cached else MAX_UNCACHED), " ".join(sorted(modules))
