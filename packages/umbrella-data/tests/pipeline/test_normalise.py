"""Normalisation uses the statistics of a scan's own foreground and never gives NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from umbrella_data.pipeline.normalise import NoContrastError, normalise


def head(*, frames: int = 1, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    """Tissue of 100 and 140 in a dark field with a little noise: (T, 1, 12, 12, 12)."""
    rng = np.random.default_rng(0)
    volume = rng.uniform(0, 5, (frames, 1, 12, 12, 12))
    volume[..., 3:9, 3:9, 3:9] = 100 + rng.uniform(-1, 1, (frames, 1, 6, 6, 6))
    volume[..., 3:9, 3:9, 6:9] += 40
    return torch.from_numpy((volume * scale + offset).astype(np.float32))


def test_foreground_zscore_has_mean_0_and_std_1_over_the_tissue() -> None:
    inside = normalise(head(), method="foreground_zscore", is_masked=False)[..., 3:9, 3:9, 3:9]
    assert float(inside.mean()) == pytest.approx(0, abs=1e-5)
    assert float(inside.std(correction=0)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("scale", "offset"), [(1e-4, 0.0), (1e6, 0.0), (1.0, 1000.0)])
def test_foreground_zscore_does_not_depend_on_the_unit(scale: float, offset: float) -> None:
    expected = normalise(head(), method="foreground_zscore", is_masked=False)
    result = normalise(head(scale=scale, offset=offset), method="foreground_zscore", is_masked=False)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_masked_foreground_is_what_is_not_zero_in_any_channel() -> None:
    maps = torch.zeros(1, 2, 8, 8, 8)
    maps[:, 0, 2:6, 2:6, 2:6] = torch.rand(4, 4, 4) * 0.8
    maps[:, 1, 2:6, 2:6, 2:6] = torch.rand(4, 4, 4) * 1e-3 + 7e-4
    maps[0, 0, 3, 3, 3] = 0.0  # inside of the brain, since the other channel is not 0
    result = normalise(maps, method="foreground_zscore", is_masked=True)
    inside = result[..., 2:6, 2:6, 2:6]
    torch.testing.assert_close(inside.mean(dim=(0, 2, 3, 4)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(inside.std(dim=(0, 2, 3, 4), correction=0), torch.ones(2), rtol=0, atol=1e-5)


def test_temporal_zscore_keeps_only_the_fluctuation() -> None:
    series = head(frames=10)
    result = normalise(series, method="temporal_zscore", is_masked=False)
    torch.testing.assert_close(result.mean(dim=0), torch.zeros(1, 12, 12, 12), rtol=0, atol=1e-4)
    assert float(result[..., 3:9, 3:9, 3:9].std(correction=0)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "volume",
    [
        torch.tensor([0.0, 1.0]).repeat(32).reshape(1, 1, 4, 4, 4),
        torch.eye(4).expand(1, 1, 4, 4, 4) * 1e-20,
        torch.arange(64.0).reshape(1, 1, 4, 4, 4) * 1e30,
        torch.cat([torch.full((63,), 5.0), torch.tensor([5.1])]).reshape(1, 1, 4, 4, 4),
    ],
    ids=["mask", "tiny", "huge", "one_voxel"],
)
@pytest.mark.parametrize("is_masked", [False, True])
def test_normalise_is_finite_for_unusual_images(volume: torch.Tensor, is_masked: bool) -> None:
    result = normalise(volume.clone(), method="foreground_zscore", is_masked=is_masked)
    assert torch.isfinite(result).all()
    assert float(result.std()) > 0.05


def test_normalise_stays_moderate_when_the_foreground_is_nearly_flat() -> None:
    volume = torch.zeros(1, 1, 8, 8, 8)
    volume[..., 2:6, 2:6, 2:6] = 1 + 1e-6 * torch.rand(4, 4, 4)
    for is_masked in (False, True):
        assert normalise(volume, method="foreground_zscore", is_masked=is_masked).abs().max() < 300


@pytest.mark.parametrize("value", [0.0, 1e-7, 12345.0])
def test_normalise_rejects_when_constant(value: float) -> None:
    with pytest.raises(NoContrastError):
        normalise(torch.full((1, 1, 4, 4, 4), value), method="foreground_zscore", is_masked=False)


def test_nonzero_zscore_keeps_zeros() -> None:
    volume = torch.zeros(1, 2, 4, 4, 4)
    volume[:, :, :2] = torch.rand(1, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    result = normalise(volume, method="nonzero_zscore", is_masked=False)
    assert not result[:, :, 2:].any()
    for channel in result[0, :, :2]:
        assert float(channel.mean()) == pytest.approx(0, abs=1e-5)
        assert float(channel.std(correction=0)) == pytest.approx(1, abs=1e-5)
    with pytest.raises(NoContrastError):
        normalise((volume > 0).float(), method="nonzero_zscore", is_masked=False)
    with pytest.raises(NoContrastError):
        normalise(torch.zeros(1, 1, 4, 4, 4), method="zscore", is_masked=False)


def test_normalise_does_not_change_its_input() -> None:
    volume = head()
    before = volume.clone()
    normalise(volume, method="foreground_zscore", is_masked=False)
    assert torch.equal(volume, before)
