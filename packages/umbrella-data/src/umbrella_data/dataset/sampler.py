"""Batch sampler of virtual indices: by modality or mixed, by count or token budget, equally many on every rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np
from torch.utils.data import Sampler

from umbrella_data.dataset.batch_plan import BatchRule, Indices, cut_block, merge_to, split_to
from umbrella_data.seeding import Permutation, derive_seed

logger = logging.getLogger(__name__)

# Batches are formed within blocks of about this many shuffled samples, so memory does not grow with the data set.
BLOCK_SIZE = 65_536
_SHUFFLE_SAMPLES, _SHUFFLE_BATCHES = 0, 1
# Relative margin for epochs that were not planned: they may need a few batches more than the first one.
_SPARE = 0.02

Batch = list[int]


class BatchSource(Protocol):
    """A data set that knows modalities and lengths without opening scans."""

    @property
    def is_epoch_constant(self) -> bool:
        """Whether every epoch has the same samples."""

    def __len__(self) -> int: ...
    def modality_masks(self, indices: Indices, /) -> Indices:
        """The set of modalities of each sample as a bit mask."""

    def modality_sets(self) -> frozenset[frozenset[str]]:
        """The sets of modalities that samples hold."""

    def lengths(self, indices: Indices, /) -> Indices:
        """Tokens of each sample; called only for batches by length or by token budget."""


class ModalityBatchSampler(Sampler[list[int]]):
    """Yields this rank's batches of one epoch, as virtual indices `epoch * len(dataset) + i`.

    There is one list of global batches; rank r takes batches r, r + world_size, ... If the number of batches is not a
    multiple of world_size, some of the last batches are split: every rank gets the same number of batches, no batch is
    empty, and no sample is dropped or repeated. If no batch can be split (`batch_size` 1, for example), some are
    merged instead and have one sample more than `batch_size`. A batch never exceeds the token budget.

    The number of batches is the same in every epoch. A batch is a pure function of (seed, epoch, block, its number in
    the block). A block is about 65,536 shuffled samples; only one block is in memory at a time.

    Call `set_epoch(epoch)` before each pass. Without it every pass is epoch 0: the same batches in the same order, and
    for each sample the same augmentation and the same window of its series. A second pass through the same shuffled
    epoch logs one warning.

    Args:
        dataset: The data set that the indices refer to.
        batch_size: Maximum number of samples per batch and rank; may be None with a token budget.
        mode: `by_modality`: all samples of a batch hold the same set of modalities; `mixed`: any modalities.
        by_length: Whether samples of similar length are batched together, which reduces padding.
        max_tokens: Token budget of a batch: length of its longest sample times its number of samples, image tokens
            included.
        padded: Whether samples are padded to the longest. False for packed batches: the budget is the sum of lengths.
        num_epochs: Number of epochs to plan for with a token budget. None plans the first epoch and adds a margin.
        seed: Seed of the order.
        rank: Rank of this process.
        world_size: Number of processes.
        shuffle: Whether samples and batches are shuffled in every epoch.

    Raises:
        ValueError: For fewer samples than ranks, a sample longer than the token budget, or arguments out of range.
    """

    def __init__(
        self,
        dataset: BatchSource,
        *,
        batch_size: int | None,
        mode: Literal["by_modality", "mixed"] = "by_modality",
        by_length: bool = False,
        max_tokens: int | None = None,
        padded: bool = True,
        num_epochs: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        self._rule = BatchRule(batch_size=batch_size, max_tokens=max_tokens, padded=padded, by_length=by_length)
        if mode not in ("by_modality", "mixed") or not 0 <= rank < world_size:
            raise ValueError(
                f"mode {mode!r} must be by_modality or mixed, and rank {rank} below world_size {world_size}"
            )
        if len(dataset) < world_size:
            raise ValueError(f"{len(dataset)} samples are fewer than world_size {world_size}; use fewer ranks")
        self.dataset = dataset
        self.batch_size = batch_size
        self.drop_last = False
        self.mode = mode
        self.rank = rank
        self.world_size = world_size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._has_passed = False
        self._has_warned = False
        # A multiple of the batch size: otherwise every block would end with a short batch.
        unit = batch_size if batch_size is not None and max_tokens is None else 1
        block = max(1, BLOCK_SIZE // unit) * unit
        num_blocks = max(1, len(dataset) // block)
        self._bounds = [*range(0, num_blocks * block, block), len(dataset)]
        self._targets = self._plan(num_epochs)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; it determines the order, augmentation and windows.

        Args:
            epoch: Counted from 0; use a different one for each pass over the data.
        """
        self._has_passed = self._has_passed and epoch == self._epoch
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(self._targets) // self.world_size

    def __iter__(self) -> Iterator[Batch]:
        self._warn_of_repetition()
        num_before = 0  # global batches of earlier blocks
        for block, target in enumerate(self._targets):
            first = (self.rank - num_before) % self.world_size
            for batch in self._block_batches(block, target)[first :: self.world_size]:
                yield batch.tolist()
            num_before += target
        self._has_passed = True

    def _warn_of_repetition(self) -> None:
        """Log a warning if a shuffled epoch is repeated; unshuffled data, as in evaluation, may be read repeatedly."""
        if self._has_passed and self._shuffle and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "ModalityBatchSampler repeats epoch %d with the same batches, augmentation and windows; "
                "call set_epoch(epoch) before each pass",
                self._epoch,
            )

    # ---- number of batches, computed before training ----

    def _plan(self, num_epochs: int | None) -> list[int]:
        """Number of batches of each block, the same in every epoch."""
        sizes: list[int] = np.diff(self._bounds).tolist()
        targets, num_groups = self._budget_targets(num_epochs) if self._rule.max_tokens else self._count_targets(sizes)
        short = -sum(targets) % self.world_size
        if targets[-1] + short > sizes[-1]:
            short -= self.world_size
            if targets[-1] + short < num_groups or self._rule.max_tokens is not None:
                remedy = "use another number of ranks, or raise max_tokens" if self._rule.max_tokens else (
                    "use mode 'mixed' or fewer ranks")  # fmt: skip
                raise ValueError(f"{len(self.dataset)} samples with {num_groups} sets of modalities cannot be divided "
                                 f"evenly among {self.world_size} ranks; {remedy}")  # fmt: skip
        targets[-1] += short
        return targets

    def _count_targets(self, sizes: list[int]) -> tuple[list[int], int]:
        assert self._rule.batch_size is not None
        batch_size = self._rule.batch_size
        if self.mode == "mixed":
            return [_ceil_div(size, batch_size) for size in sizes], 1
        if len(sizes) == 1 and self.dataset.is_epoch_constant:
            _, counts = np.unique(self.dataset.modality_masks(np.arange(sizes[0])), return_counts=True)
            return [sum(_ceil_div(count, batch_size) for count in counts.tolist())], len(counts)
        # The modalities in a block differ by epoch. This is the maximum number of batches that a block can need;
        # if it needs fewer, some batches are split.
        num_groups = len(self.dataset.modality_sets())
        return [min(size, (size + num_groups * (batch_size - 1)) // batch_size) for size in sizes], num_groups

    def _budget_targets(self, num_epochs: int | None) -> tuple[list[int], int]:
        """Maximum number of batches of each block in any epoch, since the lengths in a block differ by epoch."""
        blocks = range(len(self._bounds) - 1)
        is_constant = len(blocks) == 1 and self.dataset.is_epoch_constant
        planned = 1 if is_constant or num_epochs is None or not self._shuffle else num_epochs
        targets = [max(self._num_batches(epoch, block) for epoch in range(planned)) for block in blocks]
        if not is_constant and num_epochs is None:
            sizes = np.diff(self._bounds).tolist()
            targets = [
                min(size, target + _ceil_div(int(target * _SPARE * 100), 100) + 2)
                for size, target in zip(sizes, targets, strict=True)
            ]
        return targets, len(self.dataset.modality_sets()) if self.mode == "by_modality" else 1

    def _num_batches(self, epoch: int, block: int) -> int:
        indices = self._block_indices(epoch, block)
        return len(cut_block(self._groups(indices), self._lengths(indices), rule=self._rule)[1])

    # ---- the batches of a block ----

    def _block_batches(self, block: int, target: int) -> list[Indices]:
        indices = self._block_indices(self._epoch, block)
        groups = self._groups(indices)
        order, bounds = cut_block(groups, self._lengths(indices), rule=self._rule)
        if self._shuffle:
            generator = np.random.default_rng(derive_seed(self._seed, self._epoch, _SHUFFLE_BATCHES, block))
            bounds = [bounds[i] for i in generator.permutation(len(bounds))]
        else:
            bounds.sort(key=lambda bound: order[bound[0]])
        batches = [indices[order[start:stop]] for start, stop in bounds]
        if len(batches) > target:
            if self._rule.max_tokens is not None:
                raise ValueError(f"epoch {self._epoch} needs {len(batches)} batches in block {block}, but {target} are "
                                 "planned; set num_epochs to the number of epochs")  # fmt: skip
            return merge_to(batches, [int(groups[order[start]]) for start, _ in bounds], target)
        return split_to(batches, target)

    def _block_indices(self, epoch: int, block: int) -> Indices:
        size = len(self.dataset)
        start, stop = self._bounds[block], self._bounds[block + 1]
        if not self._shuffle:
            return np.arange(start, stop) + epoch * size
        order = Permutation(size, key=derive_seed(self._seed, epoch, _SHUFFLE_SAMPLES))
        return order.block(start, stop) + epoch * size

    def _groups(self, indices: Indices) -> Indices:
        return self.dataset.modality_masks(indices) if self.mode == "by_modality" else np.zeros_like(indices)

    def _lengths(self, indices: Indices) -> Indices | None:
        return self.dataset.lengths(indices) if self._rule.needs_lengths else None


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)
