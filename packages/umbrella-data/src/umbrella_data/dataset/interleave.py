"""Mixture of several data sets in shuffled order, a pure function of (seed, virtual index)."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from umbrella_data.batch.example import Example
from umbrella_data.dataset.batch_plan import Indices
from umbrella_data.dataset.sampler import BatchSource
from umbrella_data.manifest.sample import Sample
from umbrella_data.seeding import Permutation, derive_seed

Mixing = Literal["proportional", "equal", "temperature"]


class ExampleSource(BatchSource, Protocol):
    """A data set of examples by virtual index, such as `ConversationDataset`."""

    def __getitem__(self, index: int, /) -> Example: ...
    def modalities(self, index: int) -> tuple[str, ...]:
        """The modality of each scan in reading order; no scan is opened."""

    def sample(self, index: int) -> Sample:
        """The manifest's row."""


class InterleaveDataset(Dataset[Example]):
    """Mixes data sets in one seeded order.

    `mixed[epoch * len(mixed) + i]` is the i-th example of that epoch's order, the same in every process;
    `list(mixed)` is epoch 0. Each data set contributes a fixed number of draws per epoch, and continues through its
    own samples across epochs: with `proportional` mixing an epoch holds every sample exactly once.

    A loader without a `ModalityBatchSampler` reads only the indices 0 to len - 1 in every pass: `DataLoader(mixed,
    shuffle=True)` repeats epoch 0, with the same augmentation and windows. Pass
    `batch_sampler=ModalityBatchSampler(mixed, ...)`, and call its `set_epoch(epoch)` before each pass.

    Args:
        datasets: The data sets to mix.
        mixing: `proportional` to their sizes; `equal`; `temperature`, with weights size^(1/temperature); or a
            weight for each data set.
        temperature: For `temperature` mixing: 1 is proportional, infinity equal.
        stop: An epoch ends when `all` data sets are exhausted (small ones repeat), or when the `first` one is.
        seed: Seed of the order.

    Raises:
        ValueError: If there is no data set, one is empty, or the weights are invalid.
    """

    def __init__(
        self,
        datasets: Sequence[ExampleSource],
        *,
        mixing: Mixing | Sequence[float] = "proportional",
        temperature: float | None = None,
        stop: Literal["all", "first"] = "all",
        seed: int = 0,
    ) -> None:
        sizes = [len(dataset) for dataset in datasets]
        if not sizes or 0 in sizes:
            raise ValueError(f"sizes of datasets are {sizes}; give at least one, and none that is empty")
        if stop not in ("all", "first"):
            raise ValueError(f"stop is {stop!r}; it must be 'all' or 'first'")
        self.datasets = list(datasets)
        self._sizes = sizes
        self._draws = _num_draws(sizes, _weights(sizes, mixing, temperature), stop=stop)
        self._ends = list(itertools.accumulate(self._draws))
        self._seed = seed

    @property
    def is_epoch_constant(self) -> bool:
        """Whether every epoch has the same samples, and so the same number of each modality."""
        whole = all(draws % size == 0 for draws, size in zip(self._draws, self._sizes, strict=True))
        return whole and all(dataset.is_epoch_constant for dataset in self.datasets)

    @property
    def draws(self) -> tuple[int, ...]:
        """Number of examples per epoch from each data set."""
        return tuple(self._draws)

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """The example at a virtual index."""
        part, child = self.locate(index)
        return self.datasets[part][child]

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the data set of a virtual index, and the virtual index within that data set."""
        if index < 0:
            raise IndexError(f"virtual index {index} is negative; it must be epoch * {len(self)} + i")
        epoch, position = divmod(index, len(self))
        slot = _order(len(self), derive_seed(self._seed, epoch))(position)
        part = bisect.bisect_right(self._ends, slot)
        # Draws are numbered across epochs, so that a partly drawn data set continues where the last epoch stopped.
        return part, epoch * self._draws[part] + slot - (self._ends[part] - self._draws[part])

    def locate_all(self, indices: Indices) -> tuple[NDArray[np.intp], Indices]:
        """`locate` for many virtual indices at once.

        Returns:
            Number of the data set of each index, (N,), and the virtual index within that data set, (N,).
        """
        epochs, positions = np.divmod(indices, len(self))
        slots = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            slots[chosen] = _order(len(self), derive_seed(self._seed, epoch)).elements(positions[chosen])
        ends, draws = np.array(self._ends), np.array(self._draws)
        parts = np.searchsorted(ends, slots, side="right")
        return parts, epochs * draws[parts] + slots - (ends[parts] - draws[parts])

    def modality_masks(self, indices: Indices) -> Indices:
        """The set of modalities of each example as a bit mask; see `row_columns.modality_mask`."""
        return self._gather(indices, lambda dataset, children: dataset.modality_masks(children))

    def lengths(self, indices: Indices) -> Indices:
        """The length of each example; no scan is opened."""
        return self._gather(indices, lambda dataset, children: dataset.lengths(children))

    def _gather(self, indices: Indices, read: Callable[[ExampleSource, Indices], Indices]) -> Indices:
        parts, children = self.locate_all(indices)
        values = np.empty(len(indices), dtype=np.int64)
        for part in np.unique(parts).tolist():
            chosen = parts == part
            values[chosen] = read(self.datasets[part], children[chosen])
        return values

    def modalities(self, index: int) -> tuple[str, ...]:
        """The modality of each scan of an example in reading order; no scan is opened."""
        part, child = self.locate(index)
        return self.datasets[part].modalities(child)

    def modality_sets(self) -> frozenset[frozenset[str]]:
        """The sets of modalities of the samples."""
        return frozenset[frozenset[str]]().union(*(dataset.modality_sets() for dataset in self.datasets))

    def sample(self, index: int) -> Sample:
        """The manifest's row of an example."""
        part, child = self.locate(index)
        return self.datasets[part].sample(child)


@lru_cache(maxsize=16)
def _order(size: int, key: int) -> Permutation:
    return Permutation(size, key=key)


def _weights(sizes: list[int], mixing: Mixing | Sequence[float], temperature: float | None) -> list[float]:
    """Relative weight of each data set."""
    if (mixing == "temperature") != (temperature is not None):
        raise ValueError(f"mixing is {mixing!r}, temperature {temperature}; 'temperature' needs one, others none")
    if temperature is not None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        return [float(size) ** (1.0 / temperature) for size in sizes]
    if isinstance(mixing, str):
        if mixing not in ("proportional", "equal"):
            raise ValueError(f"mixing is {mixing!r}; it must be proportional, equal, temperature or a list of weights")
        return [float(size) if mixing == "proportional" else 1.0 for size in sizes]
    if len(mixing) != len(sizes) or not all(0 < weight < float("inf") for weight in mixing):
        raise ValueError(f"mixing weights are {list(mixing)}; give one finite weight above 0 for each of the "
                         f"{len(sizes)} data sets")  # fmt: skip
    return [float(weight) for weight in mixing]


def _num_draws(sizes: list[int], weights: list[float], *, stop: str) -> list[int]:
    """Draws per epoch: the data set that ends the epoch is drawn exactly once, the others by their weights."""
    rates = [size / weight for size, weight in zip(sizes, weights, strict=True)]
    rate = max(rates) if stop == "all" else min(rates)
    return [max(1, round(rate * weight)) for weight in weights]
