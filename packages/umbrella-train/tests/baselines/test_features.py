"""Features of a scan: they equal plain loops, and bins come from the given voxels alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from umbrella_train.baselines.features import (
    NUM_BINS,
    NUM_STEPS,
    VolumeFile,
    bin_edges,
    count_intensities,
    histogram,
    shrink,
    shrink_for_cnn,
    spatial_maps,
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_volume_is_the_mean_of_blocks_of_each_channel() -> None:
    volume = random(2, 32, 48, 16)
    expected = np.empty((2, 16, 16, 16))
    for c, x, y, z in np.ndindex(2, 16, 16, 16):
        expected[c, x, y, z] = volume[c, 2 * x : 2 * x + 2, 3 * y : 3 * y + 3, z].double().mean()
    np.testing.assert_allclose(shrink(spatial_maps(volume)).numpy(), expected, atol=1e-6)


def test_small_axes_are_kept() -> None:
    assert shrink(random(1, 20, 7, 16)).shape == (1, 16, 7, 16)
    assert torch.equal(shrink(random(1, 8, 8, 8)), random(1, 8, 8, 8))


def test_series_has_mean_and_deviation_over_time() -> None:
    series = random(1, 3, 4, 5, 6).half()
    maps = spatial_maps(series)
    assert maps.shape == (2, 3, 4, 5)
    for x, y, z in np.ndindex(3, 4, 5):
        frames = series[0, x, y, z].double().numpy()
        assert maps[:, x, y, z].numpy() == pytest.approx([frames.mean(), frames.std()], abs=1e-5)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((96, 96, 96), (48, 48, 48)), ((96, 48, 30), (48, 24, 15)), ((40, 48, 8), (40, 48, 8)), ((480, 1, 2), (48, 1, 1))],
)
def test_cnn_volume_keeps_proportions(size: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert shrink_for_cnn(torch.zeros(1, *size)).shape[1:] == expected


def test_histogram_counts_voxels_between_edges() -> None:
    volume = 3 * random(2, 9, 9, 9)
    volume[0, 0, 0, 0], volume[0, 0, 0, 1] = 1000.0, -1000.0
    counts = count_intensities(volume)
    assert counts.shape == (2, NUM_STEPS)
    for channel in range(2):
        edges = bin_edges(counts[channel])
        assert len(edges) == NUM_BINS - 1
        limits = [-np.inf, *(edges / NUM_STEPS * 20 - 10), np.inf]
        values = volume[channel].double().flatten().tolist()
        expected = [sum(low <= each < high for each in values) / 729 for low, high in pairwise(limits)]
        np.testing.assert_allclose(histogram(counts[channel], edges), expected, atol=1e-12)


def test_bins_cover_the_given_voxels_but_a_few() -> None:
    counts = np.zeros(NUM_STEPS, dtype=np.int64)
    counts[1000:1640] = 1_000
    counts[0] = counts[-1] = 1
    edges = bin_edges(counts)
    assert edges.min() == pytest.approx(1010, abs=2)
    assert edges.max() == pytest.approx(1629, abs=2)
    assert set(np.diff(edges)) <= {9, 10, 11}


@pytest.mark.parametrize("step", [0, 5, NUM_STEPS - 1])
def test_a_constant_channel_has_a_valid_histogram(step: int) -> None:
    counts = np.zeros(NUM_STEPS, dtype=np.int64)
    counts[step] = 7
    fractions = histogram(counts, bin_edges(counts))
    assert fractions.sum() == 1
    assert fractions.max() == 1


def test_volume_file_returns_what_was_added() -> None:
    file = VolumeFile()
    volumes = [random(1, 3, 4, 5), random(2, 2, 2, 2), random(1, 3, 4, 5) + 1]
    stored = [file.add(volume) for volume in volumes]
    for place in (1, 0, 2):
        assert torch.equal(file.read(stored[place]), volumes[place].half().float())
