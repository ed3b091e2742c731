"""Few combinations that contain every pair of values, to find interactions of two settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any


def all_combinations(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the options' values."""
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations chosen greedily until every pair of values of two options is in one of them."""
    candidates = all_combinations(options)
    open_pairs = {pair for candidate in candidates for pair in _pairs(candidate)}
    chosen = []
    while open_pairs:
        best = max(candidates, key=lambda candidate: len(open_pairs & set(_pairs(candidate))))
        chosen.append(best)
        open_pairs -= set(_pairs(best))
    return chosen


def _pairs(combination: Mapping[str, Any]) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    return combinations(sorted(combination.items()), 2)
