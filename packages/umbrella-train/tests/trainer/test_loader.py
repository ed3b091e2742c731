"""Loaders: every sample once per epoch over all ranks, in an order that depends on (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbrella_data import Example
from umbrella_data.synthetic.cohort import DemoCohort
from umbrella_train.assembly.build import build_components
from umbrella_train.config import RunConfig
from umbrella_train.errors import RunError
from umbrella_train.trainer.loader import build_loader, evaluation_batches


class IndexCollator:
    """A batch is the indices of its examples and their modalities."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        modalities = [tuple(scan.modality for scan in example.scans) for example in examples]
        return {"index": [example.index for example in examples], "modalities": modalities}


@pytest.fixture
def make_batches(make_config: Callable[..., RunConfig], cohort: DemoCohort, tmp_path: Path) -> Callable[..., Any]:
    """The batches of one epoch of the cohort's 18 training samples."""
    config = make_config(tmp_path)
    dataset = build_components(config).mixture(config.data.train, config=config, augment=False)

    def batches(epoch: int = 0, **options: Any) -> list[dict[str, Any]]:
        settings = {"batch_size": 4, "mode": "mixed", "seed": 0, "rank": 0, "world_size": 1, "shuffle": True}
        loader = build_loader(dataset, collate=IndexCollator(), **(settings | options))
        loader.set_epoch(epoch)
        found = list(loader)
        assert len(loader) == len(found)
        return found

    return batches


def indices_of(batches: list[dict[str, Any]]) -> list[int]:
    return [index for batch in batches for index in batch["index"]]


@pytest.mark.parametrize("mode", ["mixed", "by_modality"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_epoch_has_every_sample_once_over_all_ranks(make_batches: Callable[..., Any], mode: str, epoch: int) -> None:
    shares = [make_batches(epoch, mode=mode, rank=rank, world_size=2) for rank in range(2)]
    assert len(shares[0]) == len(shares[1])
    drawn = [index for share in shares for batch in share for index in batch["index"]]
    assert len(drawn) == len(set(drawn)) == 18
    if mode == "by_modality":
        assert all(len({frozenset(kind) for kind in batch["modalities"]}) == 1 for share in shares for batch in share)


def test_order_depends_only_on_seed_and_epoch(make_batches: Callable[..., Any]) -> None:
    first = indices_of(make_batches())
    assert indices_of(make_batches()) == first
    assert indices_of(make_batches(num_workers=2)) == first
    assert indices_of(make_batches(seed=1)) != first
    # Virtual indices: the samples of the second epoch have the next numbers, in another order.
    second = indices_of(make_batches(1))
    assert sorted(second) == list(range(18, 36))
    assert [index - 18 for index in second] != first


def test_evaluation_is_in_order(make_batches: Callable[..., Any]) -> None:
    assert make_batches(shuffle=False) == make_batches(shuffle=False, seed=5)


class Few:
    """A few samples, each with a scan of one modality."""

    is_epoch_constant = True

    def __init__(self, modalities: Sequence[int]) -> None:
        self._masks = np.array([1 << modality for modality in modalities])

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, index: int) -> int:
        return index

    def modality_masks(self, indices: Any) -> Any:
        return self._masks[indices]

    def modality_sets(self) -> frozenset[frozenset[str]]:
        return frozenset(frozenset({str(mask)}) for mask in self._masks)


@pytest.mark.parametrize(
    ("modalities", "num_mixed"), [([0, 1, 2], 1), ([0, 1, 2, 3, 4], 1), ([0, 0], 0), ([0, 1, 0, 1, 0, 1], 0)]
)
def test_evaluation_mixes_modalities_if_there_are_too_few_samples(modalities: list[int], num_mixed: int) -> None:
    settings = {"batch_size": 8, "mode": "by_modality", "seed": 0, "shuffle": False}
    shares = [
        list(build_loader(Few(modalities), collate=list, rank=rank, world_size=2, **settings)) for rank in range(2)
    ]
    assert len(shares[0]) == len(shares[1])
    batches = [batch for share in shares for batch in share]
    assert sorted(index for batch in batches for index in batch) == list(range(len(modalities)))
    # A batch has two modalities only if necessary.
    mixed = [batch for batch in batches if len({modalities[index] for index in batch}) > 1]
    assert len(mixed) == num_mixed


def test_fewer_evaluation_samples_than_ranks_are_rejected_with_the_key() -> None:
    with pytest.raises(RunError, match=r"data\.evaluation: 1 samples cannot give each of 2 ranks a batch"):
        evaluation_batches(Few([0]), batch_size=8, mode="mixed", rank=0, world_size=2)


class Changing:
    """Samples whose lengths differ between epochs, as in a mixture that draws other samples."""

    is_epoch_constant = False

    def __len__(self) -> int:
        return 40

    def lengths(self, indices: Any) -> Any:
        return np.array([np.random.default_rng(index).choice([10, 60]) for index in indices])

    def modality_masks(self, indices: Any) -> Any:
        return np.zeros_like(indices)

    def modality_sets(self) -> frozenset[frozenset[str]]:
        return frozenset({frozenset()})


@pytest.mark.parametrize("padded", [True, False])
def test_planned_epochs_have_the_number_of_batches(padded: bool) -> None:
    def take(count: int, **options: Any) -> None:
        settings = {"batch_size": 1, "mode": "mixed", "seed": 0, "rank": 0, "world_size": 1, "shuffle": True}
        loader = build_loader(Changing(), collate=list, max_tokens=100, padded=padded, **(settings | options))
        num_epochs = -(-count // len(loader))
        assert num_epochs > 10
        for epoch in range(num_epochs):
            loader.set_epoch(epoch)
            assert len(list(loader.batch_sampler)) == len(loader)

    with pytest.raises(ValueError, match="num_epochs"):
        take(2000)
    take(2000, num_batches=2000)
