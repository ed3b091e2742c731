"""Replacement of a sample whose scan is unusable: a pure function of seed and index."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from umbrella_data.manifest.row_columns import RowFacts
from umbrella_data.seeding import derive_seed

_WINDOW = 65_536  # rows searched at a time
_MAX_MEASURED = 64  # candidates among which a short one is preferred
_STREAM = 2


def replacements(row: int, *, index: int, facts: RowFacts, seed: int, length: Callable[[int], int]) -> Iterator[int]:
    """Rows that can replace one with an unusable scan, best first, each once.

    They hold the same modalities in the same order, so that batches by modality stay valid. Among each 64 candidates,
    those that are not longer than the replaced row come first, so that the batch stays within its token budget.

    Args:
        row: The row to replace.
        index: The virtual index that was requested; in another epoch the replacement differs.
        facts: The modalities of all rows.
        seed: Seed of the data set.
        length: Returns the number of tokens of a row.
    """
    codes = facts.arrays["codes"]
    size = len(codes)
    start = derive_seed(seed, index, _STREAM) % size
    waiting: list[int] = []
    limit = length(row)
    for candidate in _same(codes, int(codes[row]), start=start, size=size):
        if candidate == row:
            continue
        waiting.append(candidate)
        if len(waiting) == _MAX_MEASURED:
            yield from _shortest_first(waiting, limit, length)
            waiting = []
    yield from _shortest_first(waiting, limit, length)


def _same(codes: np.ndarray, code: int, *, start: int, size: int) -> Iterator[int]:
    """The rows with a code, from `start` to the end, then from 0 to `start`."""
    for first, last in ((start, size), (0, start)):
        for low in range(first, last, _WINDOW):
            high = min(low + _WINDOW, last)
            yield from (np.flatnonzero(codes[low:high] == code) + low).tolist()


def _shortest_first(rows: list[int], limit: int, length: Callable[[int], int]) -> Iterator[int]:
    longer: list[tuple[int, int]] = []
    for row in rows:
        measured = length(row)
        if measured <= limit:
            yield row
        else:
            longer.append((measured, row))
    yield from (row for _, row in sorted(longer))
