"""Confidence intervals over subjects: several questions about one subject are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
NUM_RESAMPLES = 2000


def wilson_interval(proportion: float, *, count: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), always within 0 and 1.

    The count is that of independent observations, that is of subjects.

    Raises:
        ValueError: For a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; an interval needs at least 1 observation")
    from scipy import stats  # late: takes most of a second

    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    shrink = 1 + z**2 / count
    centre = (proportion + z**2 / (2 * count)) / shrink
    half = z * float(np.sqrt(proportion * (1 - proportion) / count + z**2 / (4 * count**2))) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def binomial_interval(chance: float, *, count: int) -> tuple[float, float]:
    """Central interval of the proportion of hits in `count` independent guesses.

    Raises:
        ValueError: For a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; an interval needs at least 1 observation")
    from scipy import stats  # late: takes most of a second

    lower, upper = stats.binom.interval(LEVEL, count, chance)
    return float(lower) / count, float(upper) / count


def bootstrap_interval(values: Sequence[float], *, subjects: Sequence[str], seed: int) -> tuple[float, float]:
    """Percentile interval of a mean by cluster bootstrap: subjects are resampled with all their values.

    Raises:
        ValueError: Without values.
    """
    if not values:
        raise ValueError("values is empty; an interval needs at least 1 observation")
    _, positions = np.unique(np.asarray(subjects), return_inverse=True)
    sums = np.bincount(positions, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(positions)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(NUM_RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    lower, upper = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lower), float(upper)
