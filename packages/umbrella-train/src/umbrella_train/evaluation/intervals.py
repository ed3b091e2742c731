"""Confidence intervals over subjects: several questions about one subject are not independent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
NUM_RESAMPLES = 2000
CHUNK_VALUES = 1 << 16
"""Number of weights that are in memory at once: 0.5 MB, which stay in a core's cache; 16 MB take 5 times as long."""
# The jackknife leaves out groups of subjects if there are more.
_MAX_JACKKNIFE = 500

Weights = NDArray[np.float64]
Statistic = Callable[[Weights], NDArray[np.float64]]
"""A figure of weighted rows: weights (R, N) of N rows in R resamples, to R values; not finite where it is undefined."""


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval; the bounds are NaN if there are too few subjects for one."""

    value: float
    lower: float
    upper: float


def mean_statistic(values: NDArray[np.float64]) -> Statistic:
    """The weighted mean of values (N,)."""
    return lambda weights: weights @ values / weights.sum(axis=1)


def value_of(statistic: Statistic, *, num_rows: int) -> float:
    """The statistic of the rows themselves, each with weight 1; NaN if it is undefined."""
    return float(evaluate(statistic, np.ones((1, num_rows)))[0]) if num_rows else float("nan")


def evaluate(statistic: Statistic, weights: Weights) -> NDArray[np.float64]:
    """The values (R,) of a statistic, without warnings about those that are undefined, which are NaN."""
    with np.errstate(all="ignore"):
        values = np.asarray(statistic(weights), dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def bca_interval(statistic: Statistic, *, subjects: Sequence[str], seed: int) -> Figure:
    """BCa bootstrap interval (Efron 1987) over subjects: the rows of a drawn subject are drawn together.

    Resamples in which the statistic is undefined (one class only, constant values) are left out. An interval that would
    not contain the value, as of a very biased statistic, is extended to it.

    Args:
        statistic: The figure.
        subjects: Subject of each row, (N,).
        seed: Seed of the 2,000 resamples.

    Returns:
        The figure. Its bounds are its value if all resamples agree, and NaN with fewer than 2 subjects.
    """
    _, positions = np.unique(np.asarray(subjects), return_inverse=True)
    num_subjects = int(positions.max(initial=-1)) + 1
    value = value_of(statistic, num_rows=len(positions))
    if num_subjects < 2 or not np.isfinite(value):
        return Figure(value, float("nan"), float("nan"))
    draws = np.concatenate([evaluate(statistic, weights) for weights in _resamples(positions, seed=seed)])
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Figure(value, float("nan"), float("nan"))
    # Sums in another order differ by rounding errors.
    is_equal = np.isclose(draws, value, rtol=1e-9, atol=1e-12)
    if is_equal.all():
        return Figure(value, value, value)
    below = (np.sum((draws < value) & ~is_equal) + 0.5 * np.sum(is_equal)) / len(draws)
    shares = _bca_shares(below, acceleration=_acceleration(statistic, positions), count=len(draws))
    lower, upper = np.quantile(draws, shares)
    return Figure(value, min(float(lower), value), max(float(upper), value))


def _resamples(positions: NDArray[np.intp], *, seed: int) -> Iterator[Weights]:
    """How often each row is drawn with its subject, in chunks (R, N) of 2,000 resamples in all."""
    rng = np.random.default_rng(seed)
    num_subjects = int(positions.max()) + 1
    size = max(1, CHUNK_VALUES // len(positions))
    for start in range(0, NUM_RESAMPLES, size):
        rows = min(size, NUM_RESAMPLES - start)
        drawn = rng.integers(num_subjects, size=(rows, num_subjects)) + num_subjects * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num_subjects)
        yield counts.reshape(rows, num_subjects)[:, positions].astype(np.float64)


def _bca_shares(below: float, *, acceleration: float, count: int) -> tuple[float, float]:
    """The quantiles of the resamples that are the bounds (Efron 1987, equation 2.3)."""
    from scipy.special import ndtr, ndtri  # late: takes a fraction of a second

    bias = ndtri(np.clip(below, 1 / (count + 1), count / (count + 1)))
    lower, upper = (bias + sign * ndtri((1 + LEVEL) / 2) for sign in (-1, 1))
    return float(ndtr(bias + lower / (1 - acceleration * lower))), float(
        ndtr(bias + upper / (1 - acceleration * upper))
    )


def _acceleration(statistic: Statistic, positions: NDArray[np.intp]) -> float:
    """A sixth of the skewness of the jackknife values."""
    num_subjects = int(positions.max()) + 1
    num_groups = min(num_subjects, _MAX_JACKKNIFE)
    groups = positions % num_groups
    size = max(1, CHUNK_VALUES // len(positions))
    chunks = [np.arange(start, min(start + size, num_groups)) for start in range(0, num_groups, size)]
    values = np.concatenate([evaluate(statistic, (chunk[:, None] != groups).astype(np.float64)) for chunk in chunks])
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0
    distances = values.mean() - values
    spread = float(np.sum(distances**2)) ** 1.5
    return float(np.sum(distances**3)) / (6 * spread) if spread > 0 else 0.0


def wilson_interval(proportion: float, *, count: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), always within 0 and 1.

    The count is that of independent observations, that is of subjects.

    Raises:
        ValueError: For a count below 1.
    """
    if count < 1:
        raise ValueError(f"count is {count}; an interval needs at least 1 observation")
    from scipy.special import ndtri  # late: takes a fraction of a second

    z = float(ndtri((1 + LEVEL) / 2))
    shrink = 1 + z**2 / count
    centre = (proportion + z**2 / (2 * count)) / shrink
    half = z * float(np.sqrt(proportion * (1 - proportion) / count + z**2 / (4 * count**2))) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def wilson_figure(proportion: float, *, count: int) -> Figure:
    """A proportion with Wilson's interval, see `wilson_interval`; rounding errors never exclude the proportion."""
    proportion = min(max(proportion, 0.0), 1.0)
    lower, upper = wilson_interval(proportion, count=count)
    return Figure(proportion, min(lower, proportion), max(upper, proportion))


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
