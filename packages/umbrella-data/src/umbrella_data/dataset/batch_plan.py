"""Group the samples of one block into batches: by count or by token budget, within groups, to a given number."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BatchRule:
    """Limits of a batch.

    Attributes:
        batch_size: Maximum number of samples; None if only tokens are limited.
        max_tokens: Maximum number of positions: length of the longest sample times number of samples if padded.
        padded: Whether samples are padded to the longest. If not, positions are the sum of the sample lengths.
        by_length: Whether samples of similar length are batched together; a token budget implies it.

    Raises:
        ValueError: If there is no limit, or one is below 1.
    """

    batch_size: int | None
    max_tokens: int | None = None
    padded: bool = True
    by_length: bool = False

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.batch_size, self.max_tokens) if limit is not None]
        if not limits or min(limits) < 1:
            raise ValueError(f"batch_size is {self.batch_size} and max_tokens is {self.max_tokens}; set one or both, "
                             "to at least 1")  # fmt: skip

    @property
    def needs_lengths(self) -> bool:
        """Whether batches depend on the lengths of the samples."""
        return self.by_length or self.max_tokens is not None


def cut_block(
    groups: Indices, lengths: Indices | None, *, rule: BatchRule
) -> tuple[NDArray[np.intp], list[tuple[int, int]]]:
    """Cut the samples of a block into batches.

    Args:
        groups: (N,) group of each sample; a batch holds samples of one group.
        lengths: (N,) tokens of each sample, if `rule.needs_lengths`.
        rule: Limits of a batch.

    Returns:
        The order of the samples, (N,): by group, then from long to short within a batch (and, if they are padded, from
        batch to batch), else as given; and the (start, stop) of each batch in it. These bounds depend only on the
        values of groups and lengths, not on their order.

    Raises:
        ValueError: For a sample longer than `max_tokens`.
    """
    order = np.argsort(groups, kind="stable") if lengths is None else np.lexsort((-lengths, groups))
    ordered = groups[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])).tolist()
    bounds: list[tuple[int, int]] = []
    for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
        of_group = None if lengths is None else lengths[order[start:stop]]
        if of_group is not None and rule.max_tokens is not None and not rule.padded:
            filled = _fill(of_group.tolist(), most=rule.max_tokens, count=rule.batch_size)
            order[start:stop] = order[start:stop][list(chain.from_iterable(filled))]
            ends = [start, *(start + end for end in accumulate(map(len, filled)))]
            bounds += pairwise(ends)
        else:
            bounds += [(start + first, start + last) for first, last in _cut_group(stop - start, of_group, rule=rule)]
    return order, bounds


def _fill(lengths: list[int], *, most: int, count: int | None) -> list[list[int]]:
    """Best-fit decreasing: put each sample, from long to short, into the batch where the least room remains.

    Args:
        lengths: Tokens of each sample, in decreasing order.
        most: Maximum number of tokens of a batch.
        count: Maximum number of samples of a batch; None for no limit.

    Returns:
        The positions of the samples of each batch. The number and sizes of batches depend only on the values of the
        lengths. At most 11/9 of the optimal number of batches plus 4 (Johnson et al. 1974, SIAM J. Comput. 3:299).
    """
    batches: list[list[int]] = []
    open_batches: list[tuple[int, int, int]] = []  # room, samples, number: sorted
    for position, length in enumerate(lengths):
        _check_length(length, most)
        place = bisect_left(open_batches, (length, 0, 0))
        if place < len(open_batches):
            room, size, number = open_batches.pop(place)
        else:
            room, size, number = most, 0, len(batches)
            batches.append([])
        batches[number].append(position)
        if size + 1 != count and room > length:
            insort(open_batches, (room - length, size + 1, number))
    return batches


def _cut_group(size: int, lengths: Indices | None, *, rule: BatchRule) -> list[tuple[int, int]]:
    if rule.max_tokens is None or lengths is None:
        assert rule.batch_size is not None
        return [(first, min(first + rule.batch_size, size)) for first in range(0, size, rule.batch_size)]
    bounds = []
    first = 0
    while first < size:
        # In decreasing order of length: the first sample of a batch is its longest and determines how many fit.
        longest = int(lengths[first])
        _check_length(longest, rule.max_tokens)
        count = rule.max_tokens // max(1, longest)
        last = min(first + min(count, rule.batch_size or count), size)
        bounds.append((first, last))
        first = last
    return bounds


def _check_length(length: int, most: int) -> None:
    if length > most:
        raise ValueError(f"a sample has {length} tokens, more than max_tokens {most} of a batch; raise max_tokens, or "
                         "shorten conversations with max_length")  # fmt: skip


def split_to(batches: list[Indices], target: int) -> list[Indices]:
    """Halve batches, the last ones first, until there are `target`; there must be at least as many samples."""
    while len(batches) < target:
        for i in range(len(batches) - 1, -1, -1):
            if len(batches[i]) > 1 and len(batches) < target:
                half = -(-len(batches[i]) // 2)
                batches[i : i + 1] = [batches[i][:half], batches[i][half:]]
    return batches


def merge_to(batches: list[Indices], groups: list[int], target: int) -> list[Indices]:
    """Merge the two smallest and last batches of one group repeatedly until there are `target`.

    Args:
        batches: The batches.
        groups: The group of each.
        target: Number of batches; at least the number of groups.
    """
    while len(batches) > target:
        earlier: dict[int, int] = {}
        for i in sorted(range(len(batches)), key=lambda i: (len(batches[i]), -i)):
            j = earlier.setdefault(groups[i], i)
            if j != i:
                first, last = min(i, j), max(i, j)
                batches[first] = np.concatenate([batches[first], batches[last]])
                del batches[last], groups[last]
                break
        else:
            raise AssertionError("no two batches of one group: excluded on construction")
    return batches
