"""Columns of a manifest for planning batches: the modalities and the text length of each row; no scan is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umbrella_data.errors import ManifestError
from umbrella_data.files.mapped_arrays import Arrays
from umbrella_data.manifest.row_validation import scan_items
from umbrella_data.modality import MODALITIES, find_modality

MAX_PROBLEMS = 100
"""Invalid rows that an error lists at most."""

Combinations = Sequence[tuple[str, ...]]
Progress = Callable[[Iterable[int]], Iterable[int]]


class RowFacts:
    """Modalities and text lengths of all N rows of a manifest.

    Args:
        arrays: `codes` (N,) uint32, the index of each row's entry in `combinations`; `text_bytes` (N,) uint32, the size
            of the texts of its turns.
        combinations: The distinct lists of modalities, one modality for each scan of a row in reading order.
    """

    def __init__(self, arrays: Arrays, *, combinations: Combinations) -> None:
        self.arrays = arrays
        self.combinations = tuple(map(tuple, combinations))

    def modalities(self, row: int) -> tuple[str, ...]:
        """The modality of each scan of a row in reading order."""
        return self.combinations[self.arrays["codes"][row]]

    def masks(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The set of modalities of each row as a bit mask, see `modality_mask`."""
        return np.array([modality_mask(names) for names in self.combinations], dtype=np.int64)[self._codes(rows)]

    def image_tokens(self, rows: NDArray[np.int64], *, num_image_tokens: Mapping[str, int]) -> NDArray[np.int64]:
        """The number of image tokens of each row.

        Raises:
            ValueError: For a modality that is not in `num_image_tokens`.
        """
        missing = {name for names in self.combinations for name in names} - set(num_image_tokens)
        if missing:
            raise ValueError(f"no number of image tokens for {', '.join(sorted(missing))}; num_image_tokens has "
                             f"{', '.join(num_image_tokens) or 'none'}")  # fmt: skip
        totals = [sum(num_image_tokens[name] for name in names) for names in self.combinations]
        return np.array(totals, dtype=np.int64)[self._codes(rows)]

    def modality_sets(self) -> frozenset[frozenset[str]]:
        """The distinct sets of modalities of the rows."""
        return frozenset(map(frozenset, self.combinations))

    def select(self, rows: NDArray[np.int64]) -> RowFacts:
        """The facts of some rows, in this order, with the combinations that these have."""
        used, codes = np.unique(self._codes(rows), return_inverse=True)
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        combinations = [self.combinations[code] for code in used.tolist()]
        return RowFacts({**arrays, "codes": codes.astype(np.uint32)}, combinations=combinations)

    def _codes(self, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        return self.arrays["codes"][rows]


def modality_mask(modalities: Iterable[str]) -> int:
    """A set of canonical modality names as a bit mask: bit i is the i-th row of the `MODALITIES` table."""
    order = list(MODALITIES)
    # find_modality explains an unknown name: the package that registered it may be missing.
    return sum(1 << order.index(find_modality(name).name) for name in set(modalities))


def collect_facts(num_rows: int, *, read: Callable[[int], Any], path: str, progress: Progress) -> RowFacts:
    """Read every row once, and return the columns.

    Args:
        num_rows: Number of rows.
        read: Returns the canonical form of a row, not validated; raises ManifestError.
        path: The manifest, for error messages.
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
                problems.append("there may be more; `umbrella-data check` lists all")
                break
    if problems:
        raise ManifestError(problems, path=path)
    return RowFacts({"codes": codes, "text_bytes": text_bytes}, combinations=list(code_of))


def modalities_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The modality of each scan of a canonical row in reading order.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: If the row is invalid.
    """
    return tuple(find_modality(item["modality"]).name for item in scan_items(row))


def _count_text_bytes(row: Mapping[str, Any]) -> int:
    total = 0
    for message in row["messages"]:
        content = message["content"]
        for item in [{"text": content}] if isinstance(content, str) else content:
            text = item.get("text")
            # A text of another type is rejected by the validation of the row.
            total += len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0
    return total
