"""The small CNN: it learns a planted signal, and repeats exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from umbrella_train.baselines.cnn import SmallSFCN, predict_cnn
from umbrella_train.baselines.features import StoredVolume, VolumeFile
from umbrella_train.baselines.models import Targets

NUM_TRAIN = 24


def blobs(volumes: VolumeFile, sizes: np.ndarray) -> list[list[StoredVolume]]:
    """Noise (1, 12, 10, 8) with a bright cube at a random place."""
    generator = torch.Generator().manual_seed(0)
    stored = []
    for size in sizes:
        volume = torch.randn(1, 12, 10, 8, generator=generator)
        x, y, z = (int(torch.randint(limit, (1,), generator=generator)) for limit in (9, 7, 5))
        volume[:, x : x + 3, y : y + 3, z : z + 3] += 4 * float(size)
        stored.append([volumes.add(volume)])
    return stored


def targets(values: np.ndarray) -> Targets:
    return Targets(values, np.arange(len(values)), values.dtype.kind == "U")


@pytest.fixture
def sizes() -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat([0.0, 1.0], 18))


def test_a_planted_blob_is_learnt(sizes: np.ndarray) -> None:
    volumes = VolumeFile()
    rows = blobs(volumes, sizes)
    words = np.array(["no", "yes"])[sizes.astype(int)]
    found = predict_cnn(
        rows[:NUM_TRAIN], rows[NUM_TRAIN:], targets(words[:NUM_TRAIN]), read=volumes.read, seed=0, num_epochs=15
    )
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert np.mean(found.argmax(axis=1) == sizes[NUM_TRAIN:]) >= 0.9


def test_a_planted_number_is_learnt_in_its_unit(sizes: np.ndarray) -> None:
    volumes = VolumeFile()
    rows = blobs(volumes, sizes)
    numbers = 1000 + 50 * sizes
    found = predict_cnn(
        rows[:NUM_TRAIN], rows[NUM_TRAIN:], targets(numbers[:NUM_TRAIN]), read=volumes.read, seed=0, num_epochs=15
    )
    assert np.abs(found - numbers[NUM_TRAIN:]).mean() < 15  # the median is 25 away


def test_it_repeats_exactly_and_leaves_the_random_state(sizes: np.ndarray) -> None:
    volumes = VolumeFile()
    rows = blobs(volumes, sizes[:9])
    numbers = targets(np.arange(6.0))
    found = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        found.append(predict_cnn(rows[:6], rows[6:], numbers, read=volumes.read, seed=seed, num_epochs=2))
        assert torch.equal(torch.get_rng_state(), state)
    one, two, other = found
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_an_answer_does_not_depend_on_the_other_rows(sizes: np.ndarray) -> None:
    volumes = VolumeFile()
    rows = blobs(volumes, sizes[:9])
    numbers = targets(np.arange(6.0))
    both = predict_cnn(rows[:6], rows[6:8], numbers, read=volumes.read, seed=1, num_epochs=1)
    alone = predict_cnn(rows[:6], rows[7:8], numbers, read=volumes.read, seed=1, num_epochs=1)
    assert both[1] == alone[0]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 1, 5), (1, 48, 40, 48), (4, 3, 3, 3)])
def test_any_shape_gives_outputs(shape: tuple[int, ...]) -> None:
    network = SmallSFCN([shape, (1, 8, 8, 8)], num_outputs=3)
    assert network([torch.zeros(2, *shape), torch.zeros(2, 1, 8, 8, 8)]).shape == (2, 3)


def test_nine_rows_train_without_a_batch_of_one() -> None:
    volumes = VolumeFile()
    rows = [[volumes.add(torch.randn(1, 1, 1, 1))] for _ in range(9)]
    found = predict_cnn(rows, rows, targets(np.arange(9.0)), read=volumes.read, seed=0, num_epochs=1)
    assert np.isfinite(found).all()
