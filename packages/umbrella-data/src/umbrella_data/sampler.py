"""Batches of virtual indices: by modality or mixed, equal numbers on every rank, each sample exactly once an epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
from torch.utils.data import Sampler

from umbrella_data.permutation import Permutation, derive_seed

# Batches are formed within blocks of about so many shuffled samples: memory does not grow with the data set.
BLOCK_SIZE = 65_536
_SHUFFLE_SAMPLES, _SHUFFLE_BATCHES = 0, 1

Batch = list[int]


class ModalitySource(Protocol):
    """A data set that tells modalities without opening scans."""

    @property
    def is_epoch_constant(self) -> bool:
        """Whether every epoch holds the same samples."""

    def __len__(self) -> int: ...
    def modalities(self, index: int) -> tuple[str, ...]:
        """The modality of each scan in reading order."""

    def modality_sets(self) -> frozenset[frozenset[str]]:
        """The sets of modalities that samples hold."""


class ModalityBatchSampler(Sampler[list[int]]):
    """Yields this rank's batches of one epoch, as virtual indices `epoch * len(dataset) + i`.

    There is one list of global batches; rank r takes numbers r, r + world_size, ... For the last batches of an epoch to
    go round, some are split, so that every rank gets the same number of batches, none of them empty, and no sample is
    dropped or repeated. Where nothing is left to split (`batch_size` 1, say), one of the last batches holds one more.

    Args:
        dataset: What the indices are for.
        batch_size: Samples a batch and rank.
        mode: `by_modality`: all samples of a batch hold the same set of modalities; `mixed`: any.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.
        shuffle: Whether samples, and batches, come in a new order each epoch.

    Raises:
        ValueError: For fewer samples than ranks, or arguments out of range.
    """

    def __init__(
        self,
        dataset: ModalitySource,
        *,
        batch_size: int,
        mode: Literal["by_modality", "mixed"] = "by_modality",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1 or mode not in ("by_modality", "mixed") or not 0 <= rank < world_size:
            raise ValueError(f"batch_size {batch_size} must be at least 1, mode {mode!r} by_modality or mixed, and "
                             f"rank {rank} below world_size {world_size}")  # fmt: skip
        if len(dataset) < world_size:
            raise ValueError(f"{len(dataset)} samples cannot give each of {world_size} ranks a batch; use fewer ranks")
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = False
        self.mode = mode
        self.rank = rank
        self.world_size = world_size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        # A multiple of the batch size, lest every block end in a short batch.
        block = max(1, BLOCK_SIZE // batch_size) * batch_size
        num_blocks = max(1, len(dataset) // block)
        self._bounds = [*range(0, num_blocks * block, block), len(dataset)]
        self._targets = self._num_batches()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(self._targets) // self.world_size

    def __iter__(self) -> Iterator[Batch]:
        number = 0
        for block, target in enumerate(self._targets):
            batches = self._block_batches(block, target)
            # Of the global batches, the one at hand has this number of the block:
            first = (self.rank - number) % self.world_size
            yield from batches[first :: self.world_size]
            number += target

    def _num_batches(self) -> list[int]:
        """Batches of each block, the same in every epoch, known without looking at more than modalities."""
        sizes: list[int] = np.diff(self._bounds).tolist()
        num_groups = 1
        if self.mode == "mixed":
            targets = [_ceil_div(size, self.batch_size) for size in sizes]
        elif len(sizes) == 1 and self.dataset.is_epoch_constant:
            counts = Counter(self._group(index) for index in range(sizes[0]))
            num_groups = len(counts)
            targets = [sum(_ceil_div(count, self.batch_size) for count in counts.values())]
        else:
            # How modalities fall into blocks differs by epoch. This is the most batches they can need: the blocks
            # that need fewer have some split.
            num_groups = len(self.dataset.modality_sets())
            targets = [min(size, (size + num_groups * (self.batch_size - 1)) // self.batch_size) for size in sizes]
        short = -sum(targets) % self.world_size
        if targets[-1] + short > sizes[-1]:
            short -= self.world_size
            if targets[-1] + short < num_groups:
                raise ValueError(f"{len(self.dataset)} samples of {num_groups} sets of modalities cannot be dealt "
                                 f"evenly to {self.world_size} ranks; use mode 'mixed' or fewer ranks")  # fmt: skip
        targets[-1] += short
        return targets

    def _block_batches(self, block: int, target: int) -> list[Batch]:
        size = len(self.dataset)
        start, stop = self._bounds[block], self._bounds[block + 1]
        order = np.arange(start, stop)
        if self._shuffle:
            key = derive_seed(self._seed, self._epoch, _SHUFFLE_SAMPLES)
            order = Permutation(size, key=key).block(start, stop)
        groups: dict[frozenset[str], Batch] = {}
        for index in (order + self._epoch * size).tolist():
            groups.setdefault(self._group(index), []).append(index)
        batches = [
            members[i : i + self.batch_size]
            for members in groups.values()
            for i in range(0, len(members), self.batch_size)
        ]
        if self._shuffle:
            generator = np.random.default_rng(derive_seed(self._seed, self._epoch, _SHUFFLE_BATCHES, block))
            batches = [batches[i] for i in generator.permutation(len(batches))]
        else:
            batches.sort(key=lambda batch: batch[0])
        return self._fit(batches, target)

    def _fit(self, batches: list[Batch], target: int) -> list[Batch]:
        """Split batches from the end, or where there are too many merge some, until there are `target`."""
        while len(batches) > target:
            batches = self._merge_last(batches)
        while len(batches) < target:
            for i in range(len(batches) - 1, -1, -1):
                if len(batches[i]) > 1 and len(batches) < target:
                    half = _ceil_div(len(batches[i]), 2)
                    batches[i : i + 1] = [batches[i][:half], batches[i][half:]]
        return batches

    def _merge_last(self, batches: list[Batch]) -> list[Batch]:
        """Join two of the smallest and last batches of one group."""
        by_size = sorted(range(len(batches)), key=lambda i: (len(batches[i]), -i))
        earlier: dict[frozenset[str], int] = {}
        for i in by_size:
            j = earlier.setdefault(self._group(batches[i][0]), i)
            if j != i:
                first, last = min(i, j), max(i, j)
                merged = batches[first] + batches[last]
                return [*batches[:first], merged, *batches[first + 1 : last], *batches[last + 1 :]]
        raise AssertionError("no two batches of one group: excluded on construction")

    def _group(self, index: int) -> frozenset[str]:
        return frozenset(self.dataset.modalities(index)) if self.mode == "by_modality" else frozenset()


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)
