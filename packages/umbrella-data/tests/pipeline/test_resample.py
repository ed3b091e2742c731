"""Every kind of resampling equals MONAI's transforms and keeps world coordinates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from umbrella_data.pipeline.resample import Grid, resample

Size = tuple[int, int, int]


@pytest.mark.parametrize("mode", ["trilinear", "area"])
@pytest.mark.parametrize("shape", [(91, 109, 91), (20, 33, 17), (32, 24, 41), (2, 3, 4)])
def test_resample_equals_monai_when_resized(shape: Size, mode: str) -> None:
    from monai.transforms import Resize

    volume = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) * 1000
    grid = Grid(image_size=(32, 24, 40), interpolation=mode)  # type: ignore[arg-type]
    ours = resample(volume[None], spacing=(1, 1, 1), grid=grid)[0]
    theirs = Resize(spatial_size=(32, 24, 40), mode=mode)(volume)
    # 1e-6 of the range: torch 2.10 rounds differently.
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("shape", "spacing"), [((21, 25, 17), (2.0, 1.5, 3.0)), ((60, 40, 50), (0.7, 0.8, 1.0))])
def test_resample_equals_monai_when_the_voxel_size_changes(shape: Size, spacing: tuple[float, float, float]) -> None:
    from monai.data.meta_tensor import MetaTensor
    from monai.transforms import SpatialResample

    def centred(step: tuple[float, float, float], size: Size) -> torch.Tensor:
        affine = np.diag([*step, 1.0])
        affine[:3, 3] = -0.5 * (np.array(size) - 1) * np.array(step)
        return torch.from_numpy(affine)

    volume = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)) * 1000
    ours = resample(volume[None], spacing=spacing, grid=Grid(image_size=(24, 16, 20), spacing=(2.0, 2.0, 2.0)))[0]
    low = volume.min()
    theirs = SpatialResample(mode="bilinear", padding_mode="zeros", align_corners=True, dtype=np.float64)(
        MetaTensor(volume - low, affine=centred(spacing, shape)),
        dst_affine=centred((2.0, 2.0, 2.0), (24, 16, 20)),
        spatial_size=(24, 16, 20),
    )
    torch.testing.assert_close(ours, torch.as_tensor(theirs.numpy()).float() + low, rtol=0, atol=5e-4)


def ramp(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> torch.Tensor:
    """World coordinates x + 10 y + 100 z in mm around the centre, as one frame."""
    lines = [(np.arange(size) - (size - 1) / 2) * step for size, step in zip(shape, spacing, strict=True)]
    x, y, z = np.meshgrid(*lines, indexing="ij")
    return torch.from_numpy((x + 10 * y + 100 * z).astype(np.float32))[None, None]


def test_resample_keeps_millimetres_when_the_voxel_size_changes() -> None:
    source = ramp((41, 51, 31), (2.0, 1.5, 3.0))
    result = resample(source, spacing=(2.0, 1.5, 3.0), grid=Grid(image_size=(20, 16, 24), spacing=(2.5, 2.5, 2.5)))
    torch.testing.assert_close(result, ramp((20, 16, 24), (2.5, 2.5, 2.5)), rtol=1e-4, atol=0.05)


@pytest.mark.parametrize("size", [8, 9])
def test_resample_crops_around_the_centre_when_the_grid_is_smaller(size: int) -> None:
    volume = torch.rand(3, 2, 17, 17, 17) if size % 2 else torch.rand(3, 2, 16, 16, 16)
    low = (volume.shape[-1] - size) // 2
    cut = volume[..., low : low + size, low : low + size, low : low + size]
    result = resample(volume, spacing=(1, 1, 1), grid=Grid(image_size=(size, size, size), spacing=(1, 1, 1)))
    torch.testing.assert_close(result, cut, rtol=0, atol=0)


def test_resample_pads_with_the_minimum_when_the_grid_is_larger() -> None:
    volume = torch.rand(1, 1, 8, 8, 8) - 5
    result = resample(volume, spacing=(1, 1, 1), grid=Grid(image_size=(16, 16, 16), spacing=(1, 1, 1)))
    torch.testing.assert_close(result[..., 4:12, 4:12, 4:12], volume, rtol=0, atol=1e-5)
    assert result[0, 0, 0, 0, 0] == volume.min()


def test_resample_pads_each_channel_with_its_own_minimum_or_with_0_when_masked() -> None:
    volume = torch.rand(2, 2, 8, 8, 8)
    volume[:, 1] -= 5
    grid = Grid(image_size=(16, 16, 16), spacing=(1, 1, 1))
    result = resample(volume, spacing=(1, 1, 1), grid=grid)
    for channel in range(2):
        assert (result[:, channel, 0] == volume[:, channel].min()).all()
    masked = resample(volume, spacing=(1, 1, 1), grid=grid, is_masked=True)
    torch.testing.assert_close(masked[..., 4:12, 4:12, 4:12], volume, rtol=0, atol=0)
    assert not masked[..., :4, :, :].any()
