"""Which sample replaces one whose scan is bad: a pure function of the seed and the index."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from umbrella_data.manifest.row_columns import RowFacts
from umbrella_data.seeding import derive_seed

# Rows looked at in one go, and candidates of which one that is short enough is preferred.
_WINDOW = 65_536
_MAX_MEASURED = 64
_STREAM = 2


def substitutes(row: int, *, index: int, facts: RowFacts, seed: int, length: Callable[[int], int]) -> Iterator[int]:
    """Rows to take in place of a bad one, best first, each once.

    They hold the same modalities in the same order, so that a batch keeps its kind. Of the next few in a row, those
    come first that are not longer than the bad one, so that a token budget keeps its bounds.

    Args:
        row: The bad row.
        index: The virtual index that it was asked for: another epoch takes another row.
        facts: The modalities of all rows.
        seed: The data set's.
        length: Measures a row in tokens.
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
    """The rows of one code from `start` on, and round to the rows before it."""
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
