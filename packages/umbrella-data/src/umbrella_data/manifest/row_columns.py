"""What plans batches without opening a scan: for each row of a manifest its modalities and the length of its texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umbrella_data.errors import ManifestError
from umbrella_data.files.mapped_arrays import Arrays
from umbrella_data.manifest.sample import scan_items
from umbrella_data.modality import MODALITIES, find_modality

MAX_PROBLEMS = 100
"""A manifest of nothing but bad rows should not fill the screen."""

Combinations = Sequence[tuple[str, ...]]
Progress = Callable[[Iterable[int]], Iterable[int]]


class RowFacts:
    """The facts of all rows of one manifest.

    Args:
        arrays: `codes` (N,) uint32, each row's place in `combinations`; `text_bytes` (N,) uint32, the bytes of all that
            its turns say.
        combinations: The modality of each scan of a row in reading order, each combination once.
    """

    def __init__(self, arrays: Arrays, *, combinations: Combinations) -> None:
        self.arrays = arrays
        self.combinations = tuple(map(tuple, combinations))

    def modalities(self, row: int) -> tuple[str, ...]:
        """The modality of each scan of a row in reading order."""
        return self.combinations[self.arrays["codes"][row]]

    def masks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The set of modalities of each row as a bit mask: see `modality_mask`."""
        return np.array([modality_mask(names) for names in self.combinations], dtype=np.int64)[self._codes(rows)]

    def image_tokens(self, rows: NDArray[np.int64], *, num_image_tokens: Mapping[str, int]) -> NDArray[np.int64]:
        """The positions that the scans of each row take.

        Raises:
            ValueError: For a modality that `num_image_tokens` does not name.
        """
        missing = {name for names in self.combinations for name in names} - set(num_image_tokens)
        if missing:
            raise ValueError(f"no number of image tokens for {', '.join(sorted(missing))}: given are "
                             f"{', '.join(num_image_tokens) or 'none'}")  # fmt: skip
        totals = [sum(num_image_tokens[name] for name in names) for names in self.combinations]
        return np.array(totals, dtype=np.int64)[self._codes(rows)]

    def modality_sets(self) -> frozenset[frozenset[str]]:
        """The sets of modalities that rows hold."""
        return frozenset(map(frozenset, self.combinations))

    def _codes(self, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        return self.arrays["codes"][rows]


def modality_mask(modalities: Iterable[str]) -> int:
    """A set of canonical modality names as a bit mask: bit i stands for the i-th row of the `MODALITIES` table."""
    order = list(MODALITIES)
    # By way of the lookup, which says more of a name that is not there: its package may be gone.
    return sum(1 << order.index(find_modality(name).name) for name in set(modalities))


def collect_facts(num_rows: int, *, read: Callable[[int], Any], path: str, progress: Progress) -> RowFacts:
    """Read every row once.

    Args:
        num_rows: Number of rows.
        read: The canonical form of a row, unchecked; raises ManifestError.
        path: The manifest, for errors.
        progress: Wraps the numbers of the rows, as tqdm does.

    Raises:
        ManifestError: With the problems of all rows that cannot be read.
    """
    codes = np.zeros(num_rows, dtype=np.uint32)
    text_bytes = np.zeros(num_rows, dtype=np.uint32)
    code_of: dict[tuple[str, ...], int] = {}
    problems: list[str] = []
    for number in progress(range(num_rows)):
        try:
            row = read(number)
            names = modalities_of(row)
            codes[number] = code_of.setdefault(names, len(code_of))
            text_bytes[number] = _count_text_bytes(row)
        except ManifestError as error:
            problems += error.problems[:1]
            if len(problems) >= MAX_PROBLEMS:
                problems.append("and maybe more: `umbrella-data check` lists all")
                break
    if problems:
        raise ManifestError(problems, path=path)
    return RowFacts({"codes": codes, "text_bytes": text_bytes}, combinations=list(code_of))


def modalities_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The modality of each scan of a canonical row in reading order.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: For a row that is none.
    """
    return tuple(find_modality(item["modality"]).name for item in scan_items(row))


def _count_text_bytes(row: Mapping[str, Any]) -> int:
    total = 0
    for message in row["messages"]:
        content = message["content"]
        for item in [{"text": content}] if isinstance(content, str) else content:
            text = item.get("text")
            # What is no text is rejected when the row is parsed.
            total += len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0
    return total
