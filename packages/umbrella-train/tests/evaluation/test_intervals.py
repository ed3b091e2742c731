"""Intervals against published and independent values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from umbrella_train.evaluation.intervals import binomial_interval, wilson_interval


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (5, 10), (75, 100), (64, 64)])
def test_wilson_interval_equals_scipys(hits: int, count: int) -> None:
    theirs = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert wilson_interval(hits / count, count=count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_binomial_interval_contains_95_percent_of_guesses() -> None:
    lower, upper = binomial_interval(0.5, count=64)
    assert (lower * 64, upper * 64) == (24, 40)
    guesses = np.random.default_rng(0).binomial(64, 0.5, size=20_000) / 64
    assert np.mean((guesses >= lower) & (guesses <= upper)) >= 0.95


def test_intervals_without_observations_are_rejected() -> None:
    with pytest.raises(ValueError, match="at least 1 observation"):
        wilson_interval(0.5, count=0)
    with pytest.raises(ValueError, match="at least 1 observation"):
        binomial_interval(0.5, count=0)
